"""Chaos: many streams with readers that come and go, random stops, and one fault after another; then the audit.

    python -m bench.chaos [--seed N] [--minutes M] [--streams N] [--json PATH] [--short] [--only KIND] [--plan] [--keep]

The whole system runs as local processes: two web processes, two workers, reaper and beat over PostgreSQL, Valkey and a
scripted upstream. What is done to it is drawn from the seed. The method and its caveats are in `bench/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil

from bench import schedule
from bench.audit import ANSWERS, LEFT, RECOVERY, Audit, Finding
from bench.crowd import Crowd
from bench.nemesis import RECOVERY_LIMIT_SECONDS, Nemesis
from bench.progress import LINE
from bench.report import Options, Outcome, figures, table
from bench.rig import Rig, start
from bench.stability import leftovers
from tests.services import LocalProcess

SETTINGS: Final = {
    "SLUICEGATE_LEASE_RENEW_SECONDS": "0.5",
    "SLUICEGATE_HEARTBEAT_SECONDS": "1",
    "SLUICEGATE_CHECKPOINT_SECONDS": "2",
    "SLUICEGATE_DRAIN_SECONDS": "1",
    "SLUICEGATE_DATABASE_CHECK_SECONDS": "2",
    "SLUICEGATE_KEEPALIVE_SECONDS": "3",
    # Here a stream loses its worker every few seconds; in life, five times are a reason to give up.
    "SLUICEGATE_MAX_ATTEMPTS": "1000",
}
BEGIN_SECONDS: Final = 60.0
"""That the streams have for getting under way before the first fault."""
LOOKED_AT_AGAIN: Final = 100
"""Streams that are read, and whose receipt is asked for, once more when all is over."""


# The run


def run(rig: Rig, options: Options) -> Outcome:
    """Let it happen, then look at everything."""
    outcome = Outcome(options)
    stack = rig.stack
    urls, token = [stack.url(web) for web in stack.webs], stack.user("tester")
    asyncio.run(_run(rig, Crowd(urls, token, options.seed, options.load), outcome))
    assert outcome.crowd
    _say("what is left over")
    outcome.left = leftovers(stack, rig.upstream)
    outcome.audit = Audit(stack, outcome.crowd.streams, outcome.hits)
    outcome.findings = [*outcome.audit.findings(), *_other_findings(outcome)]
    return outcome


async def _run(rig: Rig, crowd: Crowd, outcome: Outcome) -> None:
    loop, ended = asyncio.get_running_loop(), threading.Event()
    outcome.crowd = crowd
    crowding = asyncio.create_task(crowd.run())
    watching = asyncio.create_task(_watch(crowd, outcome))
    striking = loop.run_in_executor(None, _strike, Nemesis(rig, crowd, ended), crowd, outcome, ended)
    try:
        done, _ = await asyncio.wait([crowding, striking], return_when=asyncio.FIRST_COMPLETED)
        for one in done:
            await one  # the crowd, if it is the first, with the error that it ended with
        _say("the end: what runs is stopped")
        crowd.finish()
        await crowding
        _say("some are looked at again")
        streams = [one for one in crowd.streams if one.ended_at]
        draw = random.Random(outcome.options.seed)
        await crowd.look_again(draw.sample(streams, min(LOOKED_AT_AGAIN, len(streams))))
    finally:
        ended.set()
        watching.cancel()


def _strike(nemesis: Nemesis, crowd: Crowd, outcome: Outcome, ended: threading.Event) -> None:
    """One fault after another, until the time is over."""
    options = outcome.options
    deadline = time.monotonic() + BEGIN_SECONDS
    while len(crowd.active()) < 0.95 * options.streams and time.monotonic() < deadline:
        ended.wait(0.1)
    began, cpu_began = time.monotonic(), time.process_time()
    for plan in options.faults():
        if ended.wait(plan.rest_seconds) or time.monotonic() - began > options.minutes * 60:
            break
        hit = nemesis.strike(plan)
        outcome.hits.append(hit)
        stuck = f"; STUCK: {len(hit.stuck)}: {hit.last}" if hit.stuck else f"; last: {hit.last[:2]}"
        _say(
            f"fault {plan.number}: {plan.kind} on {hit.on}, {hit.streams} streams: undone after "
            f"{hit.undone_at - hit.struck_at:.1f} s, processes back {hit.back_at - hit.struck_at:.1f} s, "
            f"all on {hit.seconds:.1f} s{stuck}"
        )
    outcome.seconds = time.monotonic() - began
    outcome.own_cpu_seconds = time.process_time() - cpu_began


async def _watch(crowd: Crowd, outcome: Outcome) -> None:
    """What there is each second; a line of it every five."""
    psutil.cpu_percent()
    for second in itertools.count(1):
        await asyncio.sleep(1)
        active, cpu_percent = len(crowd.active()), psutil.cpu_percent()
        if not crowd.ending and outcome.hits:
            outcome.at_once.append(active)
            outcome.cpu_percent.append(cpu_percent)
        if not crowd.ending:
            LINE.show(f"{len(outcome.hits)} faults in {outcome.options.minutes:g} min, {active} streams active")
        if second % 5 == 0:
            stops = sum(len(one.stops) for one in crowd.streams)
            _say(
                f"{active} streams active, {len(crowd.streams)} in all, {stops} stops, {len(outcome.hits)} faults, "
                f"{crowd.refusals} calls refused, {len(crowd.unexpected)} unexpected, CPU {cpu_percent:.0f} %"
            )


def _other_findings(outcome: Outcome) -> Iterator[Finding]:
    """What concerns no single stream."""
    assert outcome.crowd
    for unexpected in outcome.crowd.unexpected:
        yield Finding(ANSWERS, "", unexpected)
    for hit in outcome.hits:
        if hit.stuck:
            what = f"after {RECOVERY_LIMIT_SECONDS:g} s: " + "; ".join(hit.stuck)
            yield Finding(RECOVERY, "", what, f"{hit.plan.number} {hit.plan.kind} ({hit.on})")
    for what, count in outcome.left.items():
        if count:
            yield Finding(LEFT, "", f"{what}: {count}")


# The command


@contextmanager
def system(directory: Path, options: Options) -> Iterator[Rig]:
    """Two web processes and two workers, of which one alone can run everything; only what is begun here is ended."""
    settings = SETTINGS | {
        "SLUICEGATE_LEASE_SECONDS": f"{options.lease_seconds:g}",
        "SLUICEGATE_WORKER_CONCURRENCY": str(options.streams + 100),
    }
    before = list(LocalProcess.started)
    try:
        yield start(directory, workers=2, webs=2, settings=settings)
    finally:
        for process in LocalProcess.started:
            if process not in before:
                process.kill()


def main() -> int:
    """Run, print the table and every violation, and answer 1 where there is one."""
    arguments = _arguments()
    only = tuple(arguments.only or ())
    options = Options(arguments.seed, arguments.minutes, arguments.streams, arguments.short, only)
    if arguments.plan:
        _print_plan(options)
        return 0
    _say(f"seed {options.seed}")
    directory = Path(tempfile.mkdtemp(prefix="sluicegate-chaos-"))
    with system(directory, options) as rig:
        outcome = run(rig, options)
    LINE.clear()
    print(table(outcome))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures(outcome), indent=1, ensure_ascii=False) + "\n")
    for finding in outcome.findings:
        print(f"\n{finding}")
    if outcome.findings or arguments.keep:
        print(f"\nseed {options.seed}; the logs are in {directory}")
    else:
        shutil.rmtree(directory, ignore_errors=True)
    return int(bool(outcome.findings))


def _print_plan(options: Options) -> None:
    """What the seed draws: the first hundred faults, and the first streams of each slot."""
    for fault in itertools.islice(options.faults(), 100):
        print(fault)
    for slot in range(options.streams):
        for stream in itertools.islice(schedule.streams(options.seed, slot, options.load), 3):
            print(stream)


def _say(what: str) -> None:
    LINE.say(f"{time.strftime('%H:%M:%S')} {what}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="many streams, random stops, one fault after another; then the audit")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the schedule (default: the time)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults (default: 10)")
    parser.add_argument("--streams", type=int, default=220, help="at once (default: 220)")
    parser.add_argument("--short", action="store_true", help="each kind of fault once, and shorter streams")
    parser.add_argument("--only", action="append", metavar="KIND", help="faults whose kind begins so; may be repeated")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--plan", action="store_true", help="print what the seed draws, and do nothing")
    parser.add_argument("--keep", action="store_true", help="keep the logs, whatever is found")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
