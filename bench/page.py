"""What the chat page costs a person's time: from the Stop key to "Stopped" on the screen, from a token's arrival in the
browser to its paint, and how long frames are while an answer grows.

    python -m bench.page [--short] [--json PATH]

A real Chromium over the whole system. A paint is taken to be done when the task after its frame runs, which is a little
after the pixels are handed over. It ends with 1 where a frame took more than `FRAME_LIMIT_MS` while tokens came.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from playwright.sync_api import Page, expect

from bench.progress import LINE
from bench.rig import running
from tests.functional.browsing import ChatPage, chromium
from tests.functional.nodes import Stack

STOPS: Final = 20
TOKENS_PER_SECOND: Final = 100
# Of Markdown: headings, lists, code, tables. So many are 41,007 characters, and 5,906.
TOKENS: Final = {"long": 2000, "short": 300}
FRAME_LIMIT_MS: Final = 50.0

_WATCH: Final = """() => {
  const figures = (self.figures = { tokens: [], frames: [], gaps: [], stops: [] });
  const afterPaint = (act) => requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = act;
    channel.port2.postMessage(0);
  });
  const now = () => performance.timeOrigin + performance.now();

  // A token: from when the shared worker has read it off the network, until the frame that shows it is painted.
  let arrived = [];
  const Original = self.SharedWorker;
  self.SharedWorker = class extends Original {
    constructor(...rest) {
      super(...rest);
      this.port.addEventListener("message", ({ data }) => data.type === "content" && arrived.push(data.at));
    }
  };
  const watchContent = new MutationObserver(() => {
    const shown = arrived;
    arrived = [];
    if (shown.length) afterPaint(() => figures.tokens.push(...shown.map((at) => now() - at)));
  });

  // A stop: from the key until "Stopping…", and until "Stopped", is painted.
  let pressed = null;
  addEventListener("keydown", ({ key, timeStamp }) => {
    if (key !== "Escape") return;
    pressed = { at: timeStamp };
    afterPaint(() => { pressed.stopping = performance.now() - pressed.at; });
  }, true);
  const watchNotes = new MutationObserver((records) => {
    for (const { target } of records) {
      if (pressed && !pressed.stopped && target.textContent === "Stopped") {
        const stop = pressed;
        stop.stopped = -1;
        afterPaint(() => {
          stop.stopped = performance.now() - stop.at;
          figures.stops.push([stop.stopping, stop.stopped]);
        });
      }
    }
  });
  addEventListener("DOMContentLoaded", () => {
    const messages = document.getElementById("messages");
    watchContent.observe(messages, { subtree: true, childList: true, characterData: true });
    watchNotes.observe(messages, { subtree: true, childList: true });
  });

  // Frames: those that the browser itself calls long, and the time between all of them.
  new PerformanceObserver((list) => {
    for (const { duration, scripts } of list.getEntries()) {
      figures.frames.push([duration, scripts.map(({ invoker, duration }) => `${invoker} ${Math.round(duration)} ms`)]);
    }
  }).observe({ type: "long-animation-frame" });
  let last = performance.now();
  requestAnimationFrame(function tick() {
    const moment = performance.now();
    figures.gaps.push(moment - last);
    last = moment;
    requestAnimationFrame(tick);
  });
}"""


@dataclass(frozen=True)
class Spread:
    """Of so many, in milliseconds."""

    count: int
    p50_ms: float
    p99_ms: float
    most_ms: float

    @classmethod
    def of(cls, values_ms: Sequence[float]) -> Spread:
        ordered = sorted(values_ms)
        return cls(len(ordered), *(round(v, 1) for v in (statistics.median(ordered), _p99(ordered), ordered[-1])))

    def __str__(self) -> str:
        return f"p50 {self.p50_ms:6.1f}  p99 {self.p99_ms:6.1f}  most {self.most_ms:6.1f} ms  (of {self.count})"


def _p99(ordered: Sequence[float]) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def measure(stack: Stack, stops: int, tokens: int) -> dict[str, Any]:
    """Every figure, from one page each for the stops and for the long answer."""
    with chromium() as browser:
        context = browser.new_context(viewport={"width": 1200, "height": 760})
        context.add_init_script(f"({_WATCH})()")
        chat = ChatPage(context.new_page(), stack.url())
        chat.sign_in(stack.user("tester"))
        found: dict[str, Any] = _stops(chat, stops)
        LINE.show(f"an answer of {tokens} tokens at {TOKENS_PER_SECOND} a second")
        found |= _long_answer(chat, stack, tokens)
        context.close()
    return found


def _stops(chat: ChatPage, count: int) -> dict[str, Any]:
    for number in range(count):
        LINE.show(f"stop {number + 1} of {count}")
        chat.page.get_by_role("link", name="New conversation").click()
        chat.ask("Tell me about sluices")
        chat.await_token(5)
        chat.page.keyboard.press("Escape")
        chat.expect_ended("Stopped")
        chat.page.wait_for_function("n => figures.stops.length > n", arg=number)
    stops = _figures(chat.page)["stops"]
    return {
        "key_to_stopping": Spread.of([stopping for stopping, _ in stops]),
        "key_to_stopped": Spread.of([stopped for _, stopped in stops]),
    }


def _long_answer(chat: ChatPage, stack: Stack, tokens: int) -> dict[str, Any]:
    model = f"alphabet=markdown,pace={TOKENS_PER_SECOND},tokens={tokens}"
    session = stack.client().post_message("Everything", model=model)
    chat.open(session["conversationId"])
    # The page is left alone meanwhile: who looks at it ten times a second is what the frames are long of.
    chat.page.wait_for_timeout(1000 * tokens / TOKENS_PER_SECOND + 1000)
    expect(chat.answer).to_have_attribute("data-state", "completed")
    figures = _figures(chat.page)
    return {
        "characters": stack.client().message(session)["length"],
        "token_to_paint": Spread.of(figures["tokens"]),
        "between_frames": Spread.of(figures["gaps"]),
        "long_frames": [
            [round(duration), causes] for duration, causes in figures["frames"] if duration > FRAME_LIMIT_MS
        ],
    }


def _figures(page: Page) -> dict[str, Any]:
    found: dict[str, Any] = page.evaluate("figures")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--short", action="store_true", help="few stops, a short answer")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    chosen = parser.parse_args(arguments)
    tokens = TOKENS["short" if chosen.short else "long"]
    with running(settings={"SLUICEGATE_DEFAULT_MODEL": "pace=40,tokens=2000", "SLUICEGATE_RATE_LIMIT": ""}) as rig:
        found = measure(rig.stack, 3 if chosen.short else STOPS, tokens)
    LINE.clear()
    print(f"Stop key to “Stopping…” painted   {found['key_to_stopping']}")
    print(f"Stop key to “Stopped” painted     {found['key_to_stopped']}")
    print(f"token in the browser to painted   {found['token_to_paint']}")
    print(f"between two frames                {found['between_frames']}")
    print(f"frames over {FRAME_LIMIT_MS:g} ms, to {found['characters']} characters: {len(found['long_frames'])}")
    for duration_ms, causes in found["long_frames"]:
        print(f"  {duration_ms} ms: {', '.join(causes) or 'not by a script'}")
    if chosen.json:
        plain = {name: asdict(value) if isinstance(value, Spread) else value for name, value in found.items()}
        chosen.json.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    return 1 if found["long_frames"] else 0


if __name__ == "__main__":
    sys.exit(main())
