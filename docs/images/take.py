"""The pictures of the pages, taken from the running system: `make screenshots`.

It starts the Procfile's lines over SQLite with the demo model, as a person would have them with `make run`, has a few
conversations, and writes PNG files, and one moving picture of a stop, beside itself.
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Browser, BrowserContext, expect

from tests.functional.browsing import PHONE, ChatPage, chromium
from tests.functional.nodes import Client, Stack
from tests.services import HOST, LocalProcess, free_port, stop_everything, valkey_server, wait_until

HERE: Final = Path(__file__).resolve().parent
WINDOW: Final = {"width": 1180, "height": 760}
SCHEMES: Final = ("light", "dark")
QUESTION: Final = "Why do canals have locks?"
OTHERS: Final = (
    "How high can a weir be?",
    "A packing list for a week on a narrowboat",
    "Explain sluice gates to a child",
    "Which timber lasts longest under water?",
)
TOKENS_PER_SECOND: Final = 30
TRAFFIC_SECONDS: Final = 25
FRAMES_BEFORE_STOP: Final = 26
FRAMES_AFTER_STOP: Final = 6
FRAME_MILLISECONDS: Final = 130
REST_MILLISECONDS: Final = 2200
MOVING_WIDTH: Final = 860


def main() -> int:
    with running() as stack, chromium() as browser:
        client = stack.client()
        for question in OTHERS:
            whole = client.post_message(question, model="demo")
        wait_until(lambda: client.message(whole)["status"] == "COMPLETED", 60)
        _stop(browser, stack)
        for scheme in SCHEMES:
            _chat(browser, stack, scheme)
        for scheme in SCHEMES:
            _ops(browser, stack, scheme)
    print(f"Written to {HERE}:", *sorted(path.name for path in HERE.glob("*.[pw][ne][gb]*")), sep="\n  ")
    return 0


@contextmanager
def running() -> Iterator[Stack]:
    """The whole system, with the demo model and an operator, for the block's time."""
    with tempfile.TemporaryDirectory(prefix="sluicegate-images-") as name:
        directory = Path(name)
        port = free_port()
        command = ["-m", "webapp.embedded.demo_model", "--port", str(port)]
        command += ["--tokens-per-second", str(TOKENS_PER_SECOND)]
        model = LocalProcess(
            "demo", [sys.executable, *command], log_path=directory / "demo.log", ready_prompt="listens on"
        )
        try:
            model.start()
            model.await_ready()
            stack = Stack(
                directory,
                database_url=f"sqlite:///{directory / 'pictures.db'}",
                valkey=valkey_server(directory / "valkey", append_only=True),
                upstream_url=f"http://{HOST}:{port}",
            )
            stack.release()
            worker = stack.start_worker(wait=False)
            stack.start_recovery()
            stack.start_web()
            worker.ready()
            stack.user("tester")
            stack.cli("users", "operator", "tester")
            yield stack
        finally:
            stop_everything()


@contextmanager
def signed_in(browser: Browser, stack: Stack, **options: Any) -> Iterator[ChatPage]:
    """A page of a browser of its own."""
    context: BrowserContext = browser.new_context(**{"device_scale_factor": 2, **options})
    chat = ChatPage(context.new_page(), stack.url())
    chat.sign_in(stack.user("tester"))
    yield chat
    context.close()


def _chat(browser: Browser, stack: Stack, scheme: str) -> None:
    """An answer under way, one that was stopped, and both on a phone."""
    with signed_in(browser, stack, viewport=WINDOW, color_scheme=scheme) as chat:
        chat.ask(QUESTION)
        expect(chat.content.locator("li").nth(1)).to_be_visible()
        chat.page.screenshot(path=HERE / f"chat-{scheme}.png")
        expect(chat.content.locator("pre")).to_contain_text("return")
        chat.page.keyboard.press("Escape")
        chat.expect_ended("Stopped")
        expect(chat.content.locator("pre > code:not([data-coloured])")).to_have_count(0)
        chat.page.screenshot(path=HERE / f"chat-stopped-{scheme}.png")
        conversation_id = chat.conversation_id
    with signed_in(browser, stack, viewport=PHONE, color_scheme=scheme, is_mobile=True, has_touch=True) as chat:
        chat.open(conversation_id)
        chat.expect_ended("Stopped")
        expect(chat.content.locator("pre > code:not([data-coloured])")).to_have_count(0)
        chat.page.screenshot(path=HERE / f"chat-phone-{scheme}.png")


def _ops(browser: Browser, stack: Stack, scheme: str) -> None:
    """The operations page over streams that come, and go, and are stopped."""
    with (
        traffic(stack.client()),
        signed_in(browser, stack, viewport=PHONE, color_scheme=scheme, is_mobile=True) as phone,
        signed_in(browser, stack, viewport={"width": 1280, "height": 1010}, color_scheme=scheme) as chat,
    ):
        for page in (phone.page, chat.page):
            page.goto(f"{chat.base_url}/ops")
            page.get_by_role("radio", name="15 min").check()
        chat.page.wait_for_timeout(TRAFFIC_SECONDS * 1000)  # so that what begins with the page has something to show
        chat.page.screenshot(path=HERE / f"ops-{scheme}.png", full_page=True)
        phone.page.screenshot(path=HERE / f"ops-phone-{scheme}.png")


@contextmanager
def traffic(client: Client) -> Iterator[None]:
    """Streams that begin one after the other, every second one of which is stopped, for the block's time."""
    over = threading.Event()
    dice = random.Random(7)

    def run() -> None:
        sessions: list[dict[str, Any]] = []
        while not over.wait(dice.uniform(0.3, 1.2)):
            sessions.append(client.post_message(dice.choice((QUESTION, *OTHERS)), model="demo"))
            if len(sessions) % 2 and len(sessions) > 4:
                client.terminate(sessions[-dice.randint(2, 5)]["sessionId"])
        for session in sessions:
            client.terminate(session["sessionId"])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _stop(browser: Browser, stack: Stack) -> None:
    """A question, its answer under way, and the stop, as they follow each other."""
    with signed_in(browser, stack, viewport=WINDOW, color_scheme="light", device_scale_factor=1) as chat:
        chat.ask(QUESTION)
        frames = []
        for _ in range(FRAMES_BEFORE_STOP):
            frames.append(_frame(chat))
            chat.page.wait_for_timeout(FRAME_MILLISECONDS)
        chat.page.keyboard.press("Escape")
        chat.expect_ended("Stopped")
        frames += [_with_key(_frame(chat), "Esc")] * FRAMES_AFTER_STOP
        frames.append(_frame(chat))
    durations = [FRAME_MILLISECONDS] * (len(frames) - 1) + [REST_MILLISECONDS]
    frames[0].save(
        HERE / "stop.webp",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        quality=80,
        method=6,
    )


def _frame(chat: ChatPage) -> Image.Image:
    image = Image.open(io.BytesIO(chat.page.screenshot())).convert("RGB")
    height = round(image.height * MOVING_WIDTH / image.width)
    return image.resize((MOVING_WIDTH, height), Image.Resampling.LANCZOS)


def _with_key(image: Image.Image, key: str) -> Image.Image:
    """The picture with the key that has just been pressed."""
    shown = image.copy()
    draw = ImageDraw.Draw(shown)
    middle, top = shown.width * 0.61, shown.height * 0.56
    draw.rounded_rectangle((middle - 52, top, middle + 52, top + 58), 12, fill="#22302f")
    draw.text((middle, top + 28), key, fill="white", font=ImageFont.load_default(26), anchor="mm")
    return shown


if __name__ == "__main__":
    sys.exit(main())
