"""How long readers wait when a worker is killed: from `kill -9` to the next text of each of its streams.

    python -m bench.lost_worker --streams 20 --kills 5

With the default lease, renewals and heartbeats. Ends with 1 where a stream took longer than the lease and two seconds,
or where its text, when it is stopped in the end, is not the upstream's numbered tokens, each once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.progress import LINE, Steps
from bench.rig import Rig, running
from tests.functional.nodes import Client, Reader
from tests.services import wait_until
from tests.upstream import expected_text
from webapp.config import Settings

ALLOWED_SECONDS: Final = 2.0
"""Beyond the lease."""
TOKENS: Final = 1500
PACE: Final = 10


def pauses_after_a_kill(rig: Rig, client: Client, streams: int, kill: int) -> list[float]:
    """Seconds from the kill of the one worker that has all the streams to the next text of each.

    Raises:
        AssertionError: a text is not that of an uninterrupted answer.
    """
    victim = rig.stack.workers[-1]
    model = f"pace={PACE},tokens={TOKENS},alphabet=mixed"
    sessions = [client.post_message("go on", model=f"name=k{kill}n{n},{model}") for n in range(streams)]
    readers = [client.follow(session["sessionId"]) for session in sessions]
    for reader in readers:
        reader.wait_for_text(50)
    rig.stack.start_worker()  # which is given what the victim has
    killed_at = time.monotonic()
    victim.container.kill("SIGKILL")
    pauses = [_next_text_at(reader, killed_at) - killed_at for reader in readers]
    for session, reader in zip(sessions, readers, strict=True):
        receipt = client.terminate(session["sessionId"])
        reader.wait_until_done()
        assert reader.text == receipt["partialResponse"] == expected_text(model).content[: len(reader.text)]
    return pauses


def _next_text_at(reader: Reader, killed_at: float) -> float:
    """When the first text came that another worker wrote."""

    def first() -> float:
        assert not reader.ended, f"a stream ended: {reader.done} {reader.error!r}"
        second = [event.received_at for event in reader.of("phase") if event.data["attempt"] > 1]
        return next((one.received_at for one in reader.of("message") if second and one.received_at > second[0]), 0.0)

    return wait_until(first, 60, "text of a second attempt")


def measure(streams: int, kills: int) -> dict[str, Any]:
    """All the pauses."""
    lease_seconds = float(Settings.model_fields["lease_seconds"].default)
    with running() as rig:
        client = rig.stack.client()
        pauses = []
        steps = Steps(kills, "kill ")
        for kill in range(kills):
            steps.begin(f"{streams} streams go on with another worker")
            pauses.append(pauses_after_a_kill(rig, client, streams, kill))
    LINE.clear()
    return {"streams": streams, "lease_seconds": lease_seconds, "pauses_seconds": pauses}


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["| kill | streams | first | median | last | allowed |", "| ---: | ---: | ---: | ---: | ---: | ---: |"]
    allowed = found["lease_seconds"] + ALLOWED_SECONDS
    for number, pauses in enumerate(found["pauses_seconds"], start=1):
        figures = " | ".join(f"{one:.2f} s" for one in (min(pauses), statistics.median(pauses), max(pauses), allowed))
        lines.append(f"| {number} | {found['streams']} | {figures} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    options = parser.parse_args(arguments)
    found = measure(options.streams, options.kills)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    worst = max(max(pauses) for pauses in found["pauses_seconds"])
    return int(worst > found["lease_seconds"] + ALLOWED_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
