#!/usr/bin/env python3
"""Check the model of the stop protocol with Spin, and that the model misses no guard.

First every scenario of the intact protocol is searched to the end, once for broken claims and once
for runs without an end; what none of them reaches is named. Then every guard is taken out in turn:
the search must break the claim named here. Exits 0 only if all is as expected.

Needs spin and a C compiler. Builds in a temporary directory and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = HERE / "stop.pml"
README = HERE / "README.md"

SEARCH_SECONDS = 600
MEMORY_MEGABYTES = 4000
MAX_DEPTH_STEPS = 10_000
HASH_BITS = 22

# Switches that choose a scenario; every other name tested by an #if of the model is a guard.
SIZES = {"TOKENS", "DELIVERIES", "TERMINATORS", "UNANSWERED", "REAPERS", "CRASH"}
SWITCHES = {"BEATS", "SILENCE", "DRAIN", "WEB_IS_QUICK", "VISIBLE_ONLY", "NO_READER", "ANY_READER"}
FAULTS = {"SLOW", "EMPTIED", "AWAY", "ANSWER_LOST"}


@dataclass(frozen=True)
class Scenario:
    name: str
    defines: str
    what: str
    loops: bool = False  # whether runs without an end are looked for as well


QUICK = "ANY_READER TOKENS=1 WEB_IS_QUICK"

SCENARIOS = (
    Scenario("race", QUICK + " TERMINATORS=2 UNANSWERED=0", "natural end against two terminators"),
    Scenario(
        "retry",
        "TOKENS=2 TERMINATORS=1 UNANSWERED=1 WEB_IS_QUICK BEATS",
        "an answer lost, a grown batch sent again",
        loops=True,
    ),
    Scenario("losses", "TOKENS=4 TERMINATORS=0 UNANSWERED=3", "several answers lost, nobody stops it"),
    Scenario("twice", QUICK + " TERMINATORS=1 UNANSWERED=0 DELIVERIES=2", "the message delivered twice"),
    Scenario("silence", "TOKENS=1 TERMINATORS=1 UNANSWERED=0 SILENCE BEATS", "the upstream falls silent", loops=True),
    Scenario("slow", QUICK + " TERMINATORS=1 UNANSWERED=0 REAPERS=1 SLOW", "a new owner beside the slow old one"),
    Scenario(
        "slow-late",
        QUICK + " TERMINATORS=0 UNANSWERED=1 REAPERS=1 SLOW BEATS",
        "and the old one's append arrives late",
        loops=True,
    ),
    Scenario(
        "slow-twice",
        QUICK + " TERMINATORS=0 UNANSWERED=0 REAPERS=1 SLOW DELIVERIES=2",
        "a new owner and a late second delivery",
        loops=True,
    ),
    Scenario(
        "worker-dies",
        QUICK + " TERMINATORS=1 UNANSWERED=0 REAPERS=1 CRASH=1",
        "the worker dies at any step",
    ),
    Scenario(
        "worker-dies-late",
        QUICK + " TERMINATORS=0 UNANSWERED=1 REAPERS=1 CRASH=1 BEATS",
        "and its last append arrives later",
        loops=True,
    ),
    Scenario(
        "terminator-dies",
        QUICK + " TERMINATORS=1 UNANSWERED=0 REAPERS=1 CRASH=11 BEATS SILENCE",
        "the caller of terminate dies at any step",
        loops=True,
    ),
    Scenario(
        "reaper-dies",
        QUICK + " TERMINATORS=0 UNANSWERED=0 REAPERS=2 CRASH=20 ANSWER_LOST",
        "a claim's or commit's answer is lost, and of two reapers one dies",
        loops=True,
    ),
    Scenario("answer-lost", QUICK + " TERMINATORS=1 UNANSWERED=0 REAPERS=1 ANSWER_LOST", "the same, and a terminator"),
    Scenario("emptied", QUICK + " TERMINATORS=1 UNANSWERED=1 BEATS EMPTIED", "Redis is emptied at any step"),
    Scenario(
        "emptied-web",
        "ANY_READER TOKENS=1 TERMINATORS=1 UNANSWERED=0 BEATS EMPTIED",
        "and the web process's OPEN is late",
        loops=True,
    ),
    Scenario(
        "emptied-reader",
        "TOKENS=1 TERMINATORS=1 UNANSWERED=0 WEB_IS_QUICK EMPTIED",
        "and a reader with a pace of its own",
    ),
    Scenario(
        "drain",
        QUICK + " TERMINATORS=0 UNANSWERED=1 BEATS EMPTIED DRAIN",
        "Redis is emptied while a worker hands over",
        loops=True,
    ),
    Scenario(
        "away", "TOKENS=1 TERMINATORS=1 UNANSWERED=0 WEB_IS_QUICK BEATS REAPERS=1 AWAY", "Redis cannot be reached"
    ),
    Scenario(
        "away-late",
        QUICK + " TERMINATORS=1 UNANSWERED=1 BEATS REAPERS=1 AWAY",
        "and an append arrives late",
    ),
    Scenario(
        "two-faults",
        QUICK + " TERMINATORS=0 UNANSWERED=0 BEATS REAPERS=1 EMPTIED CRASH=1",
        "Redis is emptied and the worker dies: what was checkpointed stays",
    ),
    Scenario(
        "two-faults-stop",
        QUICK + " TERMINATORS=1 UNANSWERED=0 BEATS EMPTIED CRASH=1",
        "the same, without a reaper; a terminator settles it",
        loops=True,
    ),
)

# What the mutants need: as small as it can be while the missing guard still shows.
ALONE = "TOKENS=1 TERMINATORS=1 UNANSWERED=0 WEB_IS_QUICK"
LOST = "TOKENS=2 TERMINATORS=1 UNANSWERED=1 WEB_IS_QUICK"
RACE = QUICK + " TERMINATORS=2 UNANSWERED=0"
TWICE = "TOKENS=1 TERMINATORS=0 UNANSWERED=0 DELIVERIES=2 WEB_IS_QUICK"
SLOW = QUICK + " TERMINATORS=0 UNANSWERED=0 REAPERS=1 SLOW"
SLOW_TWICE = SLOW + " DELIVERIES=2"
DIES = QUICK + " TERMINATORS=0 UNANSWERED=0 REAPERS=1 CRASH=1"
EMPTIED = QUICK + " TERMINATORS=1 UNANSWERED=0 EMPTIED"
EMPTIED_WEB = "ANY_READER TOKENS=1 TERMINATORS=1 UNANSWERED=0 EMPTIED"
AWAY = QUICK + " TERMINATORS=0 UNANSWERED=1 REAPERS=1 AWAY"
TWO_FAULTS = QUICK + " TERMINATORS=0 UNANSWERED=0 BEATS REAPERS=1 EMPTIED CRASH=1"
TWO_FAULTS_STOP = QUICK + " TERMINATORS=1 UNANSWERED=0 BEATS EMPTIED CRASH=1"
DRAIN = QUICK + " TERMINATORS=0 UNANSWERED=1 BEATS EMPTIED DRAIN"
DIES_STOP = QUICK + " TERMINATORS=1 UNANSWERED=0 REAPERS=1 CRASH=11 BEATS SILENCE"
READER_AWAY = "TOKENS=1 TERMINATORS=0 UNANSWERED=0 WEB_IS_QUICK REAPERS=1 AWAY"
NOTHING = "nothing"
UNBOUNDED = "unbounded"  # not looked at: without the guard there is no end of workers


@dataclass(frozen=True)
class Mutant:
    guard: str
    defines: str
    first: str  # the claim that the shortest counterexample breaks
    visible: str  # the same where only what a user could notice is looked at


MUTANTS = (
    Mutant("NO_CLAIM_OWNER", TWICE, "One_owner", NOTHING),
    Mutant("NO_CLAIM_EPOCH", SLOW_TWICE, "Nothing_lost", "Nothing_lost"),
    Mutant("NO_CLAIM_STATUS", ALONE, "One_owner", NOTHING),
    Mutant("NO_CLAIM_GUARD", TWICE, "One_owner", "Nothing_lost"),
    Mutant("NO_RELEASE_EPOCH", DIES.replace("REAPERS=1", "REAPERS=2"), "One_owner", UNBOUNDED),
    Mutant("NO_OPEN_EPOCH", SLOW, "Seen_is_saved", "Seen_is_saved"),
    Mutant("NO_OPEN_RAISE", SLOW, "Seen_is_saved", "Seen_is_saved"),
    Mutant("NO_OPEN_ONLY_IF_ABSENT", SLOW, "Seen_is_saved", "Seen_is_saved"),
    Mutant("READ_LOG_BEFORE_OPEN", SLOW, "Seen_is_saved", "Seen_is_saved"),
    Mutant("OLDER_IS_STALE", EMPTIED_WEB, "All_is_said", "All_is_said"),
    Mutant("NO_ATOMIC_REBUILD", EMPTIED, "Seen_is_saved", "Seen_is_saved"),
    Mutant("NO_REBUILD_ANEW", EMPTIED_WEB, "Seen_is_saved", "Seen_is_saved"),
    Mutant("NO_ASK_BEFORE_REBUILD", EMPTIED, "Seen_is_saved", "Seen_is_saved"),
    Mutant("NO_APPEND_START", LOST, "Nothing_lost", "Nothing_lost"),
    Mutant("NO_APPEND_FENCE", ALONE, "Stop_is_a_fence", "Seen_is_saved"),
    Mutant("NO_APPEND_EPOCH", SLOW, "Log_has_its_writer", "Nothing_lost"),
    Mutant("NO_FENCE_FIRST_WINS", ALONE, "First_fence_decides", NOTHING),
    Mutant("NO_FENCE_EPOCH", SLOW, "Nothing_lost", "Nothing_lost"),
    Mutant("NO_FENCE_EXPECTED_END", LOST, "Nothing_lost", "Nothing_lost"),
    Mutant("NO_RENEW_EPOCH", SLOW, "Log_has_its_writer", NOTHING),
    Mutant("NO_RECORD_FIRST_WINS", RACE, "Stop_on_record", "Stop_on_record"),
    Mutant("NO_BEAT_EPOCH", SLOW + " BEATS AWAY", "Checkpoint_is_saved", "Checkpoint_is_saved"),
    Mutant("CHECKPOINT_UNACKNOWLEDGED", ALONE + " BEATS", "First_fence_decides", "All_is_said"),
    Mutant("DRAIN_ACKNOWLEDGED", DRAIN, "Seen_is_saved", "Seen_is_saved"),
    Mutant("LOG_ALONE", TWO_FAULTS, "Checkpoint_is_saved", "Checkpoint_is_saved"),
    Mutant("CHECKPOINT_ALONE", DIES, "First_fence_decides", "Seen_is_saved"),
    Mutant("NO_SETTLE_EPOCH", EMPTIED_WEB, "Seen_is_saved", "Seen_is_saved"),
    Mutant("NO_SETTLE_RETRY", EMPTIED, "Seen_is_saved", "Seen_is_saved"),
    Mutant("SETTLE_RETRY_IF_ABSENT", EMPTIED_WEB, "Seen_is_saved", "Seen_is_saved"),
    Mutant("NO_OWNER_ENDS_IT", EMPTIED, "Seen_is_saved", "Seen_is_saved"),
    Mutant("COMMIT_WITHOUT_FENCE", ALONE, "First_fence_decides", "Seen_is_saved"),
    Mutant("COMMIT_UNCUT", ALONE, "First_fence_decides", "All_is_said"),
    Mutant("COMMIT_OWN_REASON", RACE, "First_fence_decides", "Stop_on_record"),
    Mutant("NO_COMMIT_GUARD", ALONE, "One_commit", NOTHING),
    Mutant("NO_COMMIT_EPOCH", SLOW + " AWAY", "Seen_is_saved", "Seen_is_saved"),
    Mutant("NO_COMMIT_CHECKPOINT", TWO_FAULTS_STOP, "Checkpoint_is_saved", "Checkpoint_is_saved"),
    Mutant("UNFENCED_ACKNOWLEDGED", AWAY, "Seen_is_saved", "Seen_is_saved"),
    Mutant("END_AT_FENCE_NOT_SEEN", EMPTIED, NOTHING, NOTHING),
    Mutant("RECEIPT_FROM_FENCE_NOT_ROW", ALONE, "Same_outcome", "Same_outcome"),
    Mutant("PUBLISH_BEFORE_COMMIT", ALONE, "Done_after_commit", "Done_after_commit"),
    Mutant("NO_FINISH_ONCE", ALONE, "One_done", "One_done"),
    Mutant("NO_FINISH_FENCE", AWAY, NOTHING, NOTHING),
    Mutant("TERMINATOR_ONLY_WAITS", ALONE, "All_have_ended", "All_have_ended"),
    Mutant("NO_LEASE_NEWS", ALONE + " SILENCE", "All_have_ended", "All_have_ended"),
    Mutant("NO_BEAT_NEWS", DIES_STOP, "All_have_ended", "All_have_ended"),
    Mutant("REAPER_LEAVES_LOST", DIES, "All_have_ended", "All_have_ended"),
    Mutant("REAPER_LEAVES_UNCLAIMED", DIES, "All_have_ended", "All_have_ended"),
    Mutant("REAPER_LEAVES_UNPUBLISHED", DIES, "All_have_ended", "All_have_ended"),
    Mutant("READER_IGNORES_GAP", READER_AWAY, "Seen_is_saved", "Seen_is_saved"),
)


class CheckError(Exception):
    """Spin, the compiler or the model did not do what a check needs."""


@dataclass(frozen=True)
class Search:
    states: int
    seconds: float
    complete: bool  # to the end, without an error and without a limit being reached
    output: str


def run(command: list[str], where: Path, seconds: float = SEARCH_SECONDS) -> str:
    """Return what `command` prints. Raises: CheckError if it takes longer than `seconds`."""
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise CheckError(f"{command[0]} took more than {seconds:.0f} s") from None
    return done.stdout + done.stderr


def search(where: Path, defines: str, compiler_options: str, pan_options: str = "") -> Search:
    """Build the verifier for `defines` in `where` and run it."""
    began = time.monotonic()
    shutil.copy(MODEL, where)
    for old in (where / "pan", where / "stop.pml.trail"):
        old.unlink(missing_ok=True)
    said = run(["spin", "-a", *(f"-D{each}" for each in defines.split()), MODEL.name], where)
    if "rror" in said:
        raise CheckError(f"spin: {said.strip()}")
    said = run(["cc", "-w", *compiler_options.split(), f"-DMEMLIM={MEMORY_MEGABYTES}", "-o", "pan", "pan.c"], where)
    if not (where / "pan").exists():
        raise CheckError(f"cc: {said.strip()}")
    output = run(["./pan", f"-m{MAX_DEPTH_STEPS}", f"-w{HASH_BITS}", *pan_options.split()], where)
    states = re.search(r"^\s*([\d.e+]+) states, stored", output, re.M)
    if states is None:
        raise CheckError(f"the search did not end: {output.strip()[-500:]}")
    limited = re.search(r"too small|out of memory|not completed|aborting|truncated", output, re.I)
    complete = "errors: 0" in output and not limited
    return Search(int(float(states[1])), time.monotonic() - began, complete, output)


def broken_claim(where: Path, defines: str) -> str:
    """The name in the assertion that the trail in `where` ends with."""
    replay = run(["spin", "-t", *(f"-D{each}" for each in defines.split()), MODEL.name], where)
    found = re.search(r"text of failed assertion:.*\((\w+)==0\)", replay)
    return found[1] if found else "an error without a name"


def unreached(output: str) -> set[str]:
    """The statements that a search never came to, as `process: line, statement`."""
    statements = set()
    for process, lines in re.findall(r"^unreached in (.+)\n((?:\t.*\n)*)", output, re.M):
        for line, statement in re.findall(r"stop\.pml:(\d+), state \d+, (.*)", lines):
            statements.add(f"{process}: line {line}, {statement}")
    return statements


def claims_of_model(macro: str) -> set[str]:
    return set(re.findall(rf"\b{macro}\((\w+),", MODEL.read_text())) - {"claim"}


def guards_of_model() -> set[str]:
    tested = re.findall(r"^#\s*(?:ifdef|ifndef|if|elif)\b(.*)", MODEL.read_text(), re.M)
    return set(re.findall(r"\b[A-Z][A-Z_]+\b", " ".join(tested))) - SIZES - SWITCHES - FAULTS


@dataclass(frozen=True)
class Line:
    name: str
    states: int
    result: str
    seconds: float
    ok: bool
    unreached: frozenset[str] = frozenset()


Job = Callable[[Path], Line]
"""A search, or several that belong together, in a directory of its own."""


class Table:
    """One line a job, in their order; remembers whether all was as expected."""

    def __init__(self) -> None:
        self.ok = True
        print(f"{'name':<36} {'states':>10}  {'result':<44} {'seconds':>7}", flush=True)

    def line(self, line: Line) -> None:
        self.ok &= line.ok
        mark = "" if line.ok else "   <-- NOT AS EXPECTED"
        print(f"{line.name:<36} {line.states:>10,}  {line.result:<44} {line.seconds:>7.1f}{mark}", flush=True)

    def run(self, jobs: Sequence[Job], where: Path) -> list[Line]:
        """As many at a time as there are processors; most of it is the C compiler's work."""
        lines = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for line in pool.map(lambda job: in_a_directory_of_its_own(job, where), jobs):
                self.line(line)
                lines.append(line)
        return lines


def in_a_directory_of_its_own(job: Job, where: Path) -> Line:
    with tempfile.TemporaryDirectory(dir=where) as directory:
        return job(Path(directory))


def check_scenario(where: Path, scenario: Scenario) -> Line:
    found = search(where, scenario.defines, "-O1 -DSAFETY -DCOLLAPSE -DNOFAIR")
    result = "every claim holds"
    if not found.complete:
        has_trail = (where / "stop.pml.trail").exists()
        result = f"broken: {broken_claim(where, scenario.defines)}" if has_trail else "not searched to the end"
    missed = frozenset(unreached(found.output))
    return Line(scenario.name, found.states, result, found.seconds, found.complete, missed)


def check_reached(lines: Sequence[Line], table: Table) -> None:
    """Each statement of the model is come to in some scenario."""
    for statement in sorted(frozenset.intersection(*(line.unreached for line in lines))):
        # It serves for ever; and not everybody has to die at every step.
        if not re.search(r'^proctype Network: .*"-end-"|\(crashed==me\)', statement):
            table.line(Line(statement, 0, "reached in no scenario", 0, False))


def check_intact(where: Path, mutant: Mutant) -> Line:
    """What is broken without a guard holds with it, in the very same scenario."""
    found = search(where, mutant.defines, "-O0 -DSAFETY -DCOLLAPSE -DNOFAIR")
    result = "every claim holds" if found.complete else "broken, or not searched to the end"
    return Line(f"intact: {mutant.guard}", found.states, result, found.seconds, found.complete)


def check_ends(where: Path, scenario: Scenario) -> Line:
    """Without progress labels every endless run is a non-progress cycle. (-A: of the claims it knows nothing.)"""
    without_reader = scenario.defines.replace("ANY_READER ", "")
    defines = re.sub(r"TOKENS=\d", "TOKENS=1", without_reader) + " NO_READER WEB_IS_QUICK"
    found = search(where, defines, "-O1 -DNP -DCOLLAPSE -DNOFAIR", "-l -A -n")
    result = "every run ends" if found.complete else "an endless run, or not searched to the end"
    return Line(f"{scenario.name}, ends", found.states, result, found.seconds, found.complete)


def check_mutant(where: Path, mutant: Mutant) -> Line:
    first, states, seconds = search_mutant(where, f"{mutant.guard} {mutant.defines}")
    visible = first
    if mutant.visible == UNBOUNDED:
        visible = UNBOUNDED
    elif first in claims_of_model("KEEPS") | claims_of_model("KEEPS_OF_FENCE"):
        visible, more_states, more_seconds = search_mutant(where, f"{mutant.guard} {mutant.defines} VISIBLE_ONLY")
        states, seconds = states + more_states, seconds + more_seconds
    ok = (first, visible) == (mutant.first, mutant.visible)
    return Line(mutant.guard, states, f"{first}; visibly {visible}", seconds, ok)


def check_everything(where: Path, table: Table) -> None:
    check_names(table)
    scenarios = table.run([partial(check_scenario, scenario=each) for each in SCENARIOS], where)
    check_reached(scenarios, table)
    searched = {each.defines for each in SCENARIOS}
    first_users = {each.defines: each for each in reversed(MUTANTS) if each.defines not in searched}
    jobs: list[Job] = [partial(check_ends, scenario=each) for each in SCENARIOS if each.loops]
    jobs += [partial(check_intact, mutant=each) for each in first_users.values()]
    jobs += [partial(check_mutant, mutant=each) for each in MUTANTS]
    table.run(jobs, where)


def search_mutant(where: Path, defines: str) -> tuple[str, int, float]:
    """The claim that the shortest counterexample breaks, the states and the seconds. (BFS: the shortest.)"""
    found = search(where, defines, "-O0 -DSAFETY -DBFS -DCOLLAPSE -DNOFAIR", "-n")
    claim = NOTHING if found.complete else broken_claim(where, defines)
    return claim, found.states, found.seconds


def check_names(table: Table) -> None:
    """Every guard of the model has a mutant here and a line in the README that says the same."""
    readme = README.read_text()
    for guard in sorted(guards_of_model() ^ {each.guard for each in MUTANTS}):
        table.line(Line(guard, 0, "in the model or in check.py, but not in both", 0, False))
    for each in MUTANTS:
        row = re.search(rf"^\| `{each.guard}` .*\| {each.first} \| {each.visible} \|$", readme, re.M)
        if row is None:
            table.line(Line(each.guard, 0, "README.md does not say this", 0, False))


def show_trail(where: Path, guard: str) -> None:
    """Print the shortest run that goes wrong without `guard`."""
    mutant = next((each for each in MUTANTS if each.guard == guard), None)
    if mutant is None:
        raise CheckError(f"no guard is called {guard}")
    defines = f"{guard} {mutant.defines}"
    search(where, defines, "-O0 -DSAFETY -DBFS -DCOLLAPSE -DNOFAIR", "-n")
    replay = run(["spin", "-t", "-T", *(f"-D{each}" for each in defines.split()), MODEL.name], where)
    print(f"{guard} ({mutant.defines})")
    steps = replay.split("spin: trail ends")[0].splitlines()
    print("\n".join(step for step in steps if not step.startswith("spin:")))
    print(f"broken: {broken_claim(where, defines)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trail", metavar="GUARD", help="print the shortest run that goes wrong without GUARD")
    parser.add_argument("--list", action="store_true", help="name the scenarios and guards, and stop")
    arguments = parser.parse_args()
    if arguments.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:<16} {scenario.what}: {scenario.defines}")
        for mutant in MUTANTS:
            print(f"{mutant.guard:<28} {mutant.defines}")
        return 0
    for tool, package in (("spin", "spin"), ("cc", "gcc")):
        if shutil.which(tool) is None:
            print(f"check.py: {tool} is not on PATH (Debian and Ubuntu: apt install {package})", file=sys.stderr)
            return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the directory goes then too
    with tempfile.TemporaryDirectory(prefix="sluicegate-model-") as directory:
        where = Path(directory)
        try:
            if arguments.trail:
                show_trail(where, arguments.trail)
                return 0
            began = time.monotonic()
            table = Table()
            check_everything(where, table)
        except CheckError as error:
            print(f"check.py: {error}", file=sys.stderr)
            return 1
    verdict = "as expected" if table.ok else "NOT as expected"
    print(f"The model is {verdict}, after {time.monotonic() - began:.0f} s.")
    return 0 if table.ok else 1


if __name__ == "__main__":
    sys.exit(main())
