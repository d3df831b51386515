"""What the calls cost beside a hundred thousand conversations, and whether any statement of theirs reads all of it.

    python -m bench.scale --conversations 100000 --sessions 1000000 --database postgresql

Each call is made in turn at a large database and at one of 1,000 conversations, so that both have the same minutes of
the same machine. It should cost what it shows, not what exists. The plans are those of the statements that it executes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import structlog
from flask import Flask
from sqlalchemy import Select, select

from bench.history import Words, add_healthy, analyse, ended_session, fill, small_tables
from bench.plans import PlanWatch, Walk
from bench.progress import LINE, Steps
from bench.reaper import empty_database, put_off
from tests.integration.world import Worker, World, make_settings, make_world
from tests.services import ValkeyServer, postgres_server, stop_everything, valkey_server
from webapp.calls import Calls, SendRequest
from webapp.models import Conversation, Member, StreamSession, User
from webapp.views import SessionView

REPETITIONS: Final = 50
"""Of each call at each database; the median counts."""
HEALTHY: Final = 200
"""Other users' sessions that are ACTIVE, in either database."""
RUNNING: Final = 10
"""The heavy user's."""
CHATTING: Final = 30
"""Of the heavy user's conversations: those in which messages are sent."""
PAGE: Final = 20
MAX_RATIO: Final = 3.0
"""Of the cost at many to that at few."""
HEAVY, IDLE, USUAL = "user1", "user2", "user5"
"""Who owns every tenth conversation; who owns only the oldest; who owns as many as most do, in either database."""


@dataclass(frozen=True)
class Size:
    """Of a past."""

    conversations: int
    sessions: int


FEW: Final = Size(1_000, 10_000)


# The past


def past(words: Words, sessions: int, conversations: int) -> Iterator[tuple[str, int, dict[str, str]]]:
    """For `history.fill`: users who own ten conversations or so, and two who own many; two messages a session."""
    users = max(10, conversations // 10)
    recent = words.moment.format(seconds="29 * 86400")
    own = words.id.format(n="n")
    yield "users", users, {"id": own, "name": "'user' || n", "token_hash": "'hash' || n", "created_at": recent}
    yield (
        "conversations",
        conversations,
        {
            "id": own,
            "title": "'Conversation ' || n",
            "created_at": recent,
            "deleted_at": f"CASE WHEN n % 17 = 3 THEN {recent} END",
        },
    )
    owner = {"user_id": words.id.format(n=_owner("n", conversations, users)), "conversation_id": own, "role": "'owner'"}
    yield "conversation_members", conversations, owner
    # The heavy user is a guest in others' conversations as well, none of which is a multiple of ten.
    guest = {"user_id": words.id.format(n="1"), "conversation_id": words.id.format(n="(100 * n - 9)")}
    yield "conversation_members", conversations // 100, guest | {"role": "'editor'"}
    yield from _said(words, sessions, conversations, users)
    yield from small_tables(words, users)


def _said(words: Words, sessions: int, conversations: int, users: int) -> Iterator[tuple[str, int, dict[str, str]]]:
    """Questions, answers and the sessions that gave these, one conversation after the other."""
    each = max(1, sessions // conversations)
    place = f"(({{n}} - 1) / {each} % {conversations} + 1)"
    session = "((n + 1) / 2)"

    def of_answer(value: str) -> str:
        return f"CASE WHEN n % 2 = 0 THEN {value} END"

    message = {
        "id": words.id.format(n="n"),
        "conversation_id": words.id.format(n=place.format(n=session)),
        "role": "CASE WHEN n % 2 = 0 THEN 'assistant' ELSE 'user' END",
        "content": "'Something of no great length.'",
        "thinking": "''",
        "created_at": words.moment.format(seconds=f"{session} * :step"),
    }
    given = {
        "model": "'a-model'",
        "status": "'COMPLETED'",
        "reason": "'stop'",
        "session_id": words.id.format(n=session),
    }
    yield "messages", 2 * sessions, message | {name: of_answer(value) for name, value in given.items()}
    conversation = place.format(n="n")
    yield (
        "stream_sessions",
        sessions,
        ended_session(
            words.id.format(n="n"),
            words.id.format(n="2 * n"),
            words.id.format(n=conversation),
            words.id.format(n=_owner(conversation, conversations, users)),
            words.moment.format(seconds="n * :step"),
        ),
    )


def _owner(conversation: str, conversations: int, users: int) -> str:
    """The number of the user who owns the conversation of a number."""
    return (
        f"(CASE WHEN {conversation} <= {conversations // 100} THEN 2 WHEN {conversation} % 10 = 0 THEN 1 "
        f"ELSE {conversation} % {users - 2} + 3 END)"
    )


# The application


class Site:
    """An application over a database of its own, and who asks it."""

    def __init__(self, world: World, size: Size) -> None:
        self.world = world
        self.size = size
        self.calls: Calls = world.services.calls
        self._app = Flask(__name__)
        self._app.extensions["sluicegate"] = world.services
        names = (HEAVY, IDLE, USUAL)
        self._tokens = {name: world.services.accounts.rotate_token(name) for name in names}
        self.visible = {name: world.database.read(partial(_visible, name=name)) for name in names}
        """Ids of each one's conversations, oldest first."""
        self.ended = world.database.read(lambda s: s.scalars(_first_in(self.middle(HEAVY))).one())
        """A session in the middle of the heavy user's past."""
        # As many in a small database as in a large one, or more would be said in each.
        of_heavy = self.visible[HEAVY]
        self._free = itertools.cycle(of_heavy[-min(CHATTING, len(of_heavy) // 3) :])

    @contextmanager
    def asked_by(self, name: str) -> Iterator[None]:
        """A request of a user, who is looked up anew."""
        with self._app.test_request_context(headers={"Authorization": f"Bearer {self._tokens[name]}"}):
            yield

    def send(self, conversation_id: UUID | None = None) -> SessionView:
        """A message of the heavy user, by default in a conversation in which nothing runs."""
        return self.calls.send(SendRequest("What else?", conversation_id or next(self._free)), key=None)

    def middle(self, name: str) -> UUID:
        """The conversation of a user in the middle of all."""
        return self.visible[name][len(self.visible[name]) // 2]


def _first_in(conversation_id: UUID) -> Select[tuple[UUID]]:
    where = StreamSession.conversation_id == conversation_id
    return select(StreamSession.id).where(where).order_by(StreamSession.id).limit(1)


def _visible(s: Any, name: str) -> list[UUID]:
    query = (
        select(Member.conversation_id)
        .join(User, User.id == Member.user_id)
        .join(Conversation, Conversation.id == Member.conversation_id)
        .where(User.name == name, Conversation.deleted_at.is_(None))
        .order_by(Member.conversation_id)
    )
    return list(s.scalars(query))


@contextmanager
def site(kind: str, size: Size, valkey: ValkeyServer, postgres: Any, directory: Path) -> Iterator[Site]:
    """A database with a past of that size, and sessions that run, the same few in each."""
    with empty_database(kind, postgres, directory) as url:
        fill(url, size.sessions, partial(past, conversations=size.conversations))
        unlimited = {"rate_limit": "", "max_active_streams_per_user": 100}
        world = make_world(make_settings(url, valkey.url, directory, **unlimited))
        try:
            world.database.write(lambda s: add_healthy(s, HEALTHY))
            made = Site(world, size)
            with made.asked_by(HEAVY):
                for conversation_id in made.visible[HEAVY][:RUNNING]:
                    made.send(conversation_id)
            analyse(world.database.engine)
            yield made
        finally:
            world.close()
            world.database.engine.dispose()


# The calls


Asked = Callable[[], object]
Preparing = Callable[[Site], Iterator[Asked]]
"""Yields what is measured; what stands before and after it is not."""


def _plain(ask: Callable[[Site], object]) -> Preparing:
    def preparing(site: Site) -> Iterator[Asked]:
        yield lambda: ask(site)

    return preparing


def _page_deep_in(name: str) -> Preparing:
    return _plain(lambda site: site.calls.conversations(PAGE, site.middle(name)))


def _streams(*, active_only: bool) -> Preparing:
    return _plain(lambda site: site.calls.streams(active_only=active_only))


def _start(site: Site) -> Iterator[Asked]:
    started: list[SessionView] = []
    yield lambda: started.append(site.send())
    site.calls.terminate(started[0].session_id)


def _start_anew(site: Site) -> Iterator[Asked]:
    started: list[SessionView] = []
    key = f"bench {time.monotonic_ns()}"
    yield lambda: started.append(site.calls.send(SendRequest("Anything new?"), key))
    site.calls.terminate(started[0].session_id)
    site.calls.delete_conversation(started[0].conversation_id)


def _claim(site: Site) -> Iterator[Asked]:
    worker = Worker(site.world, site.send().session_id)
    yield worker.claim
    worker.end()


def _end(site: Site) -> Iterator[Asked]:
    worker = Worker(site.world, site.send().session_id)
    worker.claim()
    worker.say("An answer.")
    yield worker.end


def _stop(site: Site) -> Iterator[Asked]:
    session_id = site.send().session_id
    yield lambda: site.calls.terminate(session_id)


def _again(ask: Callable[[Calls, UUID], SessionView]) -> Preparing:
    def preparing(site: Site) -> Iterator[Asked]:
        session_id = site.send().session_id
        site.calls.terminate(session_id)
        again: list[SessionView] = []
        yield lambda: again.append(ask(site.calls, session_id))
        site.calls.terminate(again[0].session_id)

    return preparing


def _delete(site: Site) -> Iterator[Asked]:
    conversation = site.calls.create_conversation("Not for long")
    yield lambda: site.calls.delete_conversation(conversation.id)


def _idle_pass(site: Site) -> Iterator[Asked]:
    put_off(site.world)
    found: list[Mapping[str, int]] = []
    yield lambda: found.append(site.world.reaper.reap())
    assert not found[0], f"the pass found {found[0]} where nothing was due"


CALLS: Final[Mapping[tuple[str, str], Preparing]] = {
    ("conversations, first page", HEAVY): _plain(lambda site: site.calls.conversations(PAGE, None)),
    ("conversations, a page deep in", HEAVY): _page_deep_in(HEAVY),
    ("conversations", USUAL): _plain(lambda site: site.calls.conversations(PAGE, None)),
    ("one conversation", HEAVY): _plain(lambda site: site.calls.conversation(site.middle(HEAVY))),
    ("its members", HEAVY): _plain(lambda site: site.calls.members(site.middle(HEAVY))),
    ("its messages", HEAVY): _plain(lambda site: site.calls.messages(site.middle(HEAVY))),
    ("its active stream", HEAVY): _plain(lambda site: site.calls.active_streams_in(site.visible[HEAVY][0])),
    ("active streams", HEAVY): _streams(active_only=True),
    ("active streams", USUAL): _streams(active_only=True),
    ("all streams", HEAVY): _streams(active_only=False),
    ("all streams", IDLE): _streams(active_only=False),
    ("all streams", USUAL): _streams(active_only=False),
    ("one stream", HEAVY): _plain(lambda site: site.calls.stream(site.ended)),
    ("start", HEAVY): _start,
    ("start, in a new conversation, with a key", HEAVY): _start_anew,
    ("claim", HEAVY): _claim,
    ("end", HEAVY): _end,
    ("stop of a queued one", HEAVY): _stop,
    ("receipt of one that has ended", HEAVY): _plain(lambda site: site.calls.terminate(site.ended)),
    ("continue", HEAVY): _again(lambda calls, session_id: calls.continue_stream(session_id)),
    ("retry", HEAVY): _again(lambda calls, session_id: calls.retry_stream(session_id)),
    ("delete a conversation", HEAVY): _delete,
    ("readiness of the database", HEAVY): _plain(lambda site: site.world.database.ping()),
    ("population, for the metrics", HEAVY): _plain(lambda site: site.world.queries.population()),
    ("a pass of the reaper, nothing due", HEAVY): _idle_pass,
}
"""By what is asked, and who asks."""
ALLOWED: Final[Mapping[tuple[str, str], float]] = {("all streams", HEAVY): 10.0}
"""Ratios other than `MAX_RATIO`: there is a look at each conversation of the user, who has a hundred times as many."""


@contextmanager
def _prepared(site: Site, name: str, preparing: Preparing) -> Iterator[Callable[[], float]]:
    """Makes the call, as a request of its own; answers the seconds that it took."""
    with site.asked_by(name):
        steps = preparing(site)
        ask = next(steps)

    def timed() -> float:
        with site.asked_by(name):
            began = time.perf_counter()
            ask()
            return time.perf_counter() - began

    yield timed
    with site.asked_by(name):
        next(steps, None)


def seconds_of(site: Site, name: str, preparing: Preparing) -> float:
    """Of one call."""
    with _prepared(site, name, preparing) as timed:
        return timed()


def watch(site: Site, call: str, user: str) -> PlanWatch:
    """What one call executes; it is made once before, for what is noted only once in a while."""
    preparing = CALLS[call, user]
    seconds_of(site, user, preparing)
    with _prepared(site, user, preparing) as timed, PlanWatch(site.world.database.engine) as watch:
        timed()
    return watch


# What it comes to


@dataclass
class Figure:
    """Of one call, at few conversations and at many."""

    database: str
    call: str
    user: str
    few_seconds: float
    many_seconds: float
    """Medians."""
    statements: tuple[int, int]
    """At few, and at many."""
    walks: list[Walk] = field(default_factory=list)
    plans: dict[str, list[str]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.many_seconds / self.few_seconds

    @property
    def flaws(self) -> Iterator[str]:
        """What is wrong with it, for a person."""
        if self.ratio > ALLOWED.get((self.call, self.user), MAX_RATIO):
            yield f"{self.ratio:.1f} times the cost"
        if self.statements[0] != self.statements[1]:
            yield f"{self.statements[1]} statements, and {self.statements[0]} at few"
        for walk in self.walks:
            yield f"reads a whole table: {walk.node}\n    {walk.statement}"


def measure(few: Site, many: Site, repetitions: int = REPETITIONS) -> Iterator[Figure]:
    """Each call in turn, at the one site and at the other."""
    kind = many.world.database.engine.dialect.name
    steps = Steps(len(CALLS), f"{kind}, call ")
    for (call, user), preparing in CALLS.items():
        steps.begin(f"{call}, {user}")
        watches = [watch(one, call, user) for one in (few, many)]
        seconds = [[seconds_of(one, user, preparing) for one in (few, many)] for _ in range(repetitions)]
        yield Figure(
            kind,
            call,
            user,
            *map(statistics.median, zip(*seconds, strict=True)),
            statements=(watches[0].executed, watches[1].executed),
            walks=sorted(watches[1].walks, key=str),
            plans=watches[1].plans,
        )


def table(figures: Sequence[Figure]) -> str:
    """The figures as Markdown: a row for each call, and three columns for each database."""
    kinds = list(dict.fromkeys(one.database for one in figures))
    heads = [f"{kind}: at few | at many | ratio" for kind in kinds]
    lines = [" | ".join(["| call | by", *heads, "statements |"]), "| --- | --- |" + " ---: |" * (3 * len(kinds) + 1)]
    names = {HEAVY: "heavy", IDLE: "idle", USUAL: "usual"}
    for call, user in CALLS:
        row = [one for one in figures if (one.call, one.user) == (call, user)]
        cells = [f"{_ms(one.few_seconds)} | {_ms(one.many_seconds)} | {one.ratio:.2f}" for one in row]
        statements = "/".join(dict.fromkeys(str(one.statements[1]) for one in row))
        lines.append(" | ".join([f"| {call} | {names[user]}", *cells, f"{statements} |"]))
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def main() -> int:
    """Measure, print, and answer 1 where a call costs what exists."""
    arguments = _arguments()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    kinds = ["postgresql", "sqlite"] if arguments.database == "both" else [arguments.database]
    size = Size(arguments.conversations, arguments.sessions)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="sluicegate-bench-") as name:
        directory = Path(name)
        valkey = valkey_server(directory / "valkey")
        postgres = postgres_server(directory / "postgres.log") if "postgresql" in kinds else None
        for kind in kinds:
            with ExitStack() as stack:
                LINE.show(f"{kind}: filling in {size.sessions:,} sessions")
                few, many = (stack.enter_context(site(kind, one, valkey, postgres, directory)) for one in (FEW, size))
                figures += measure(few, many, arguments.repetitions)
        stop_everything()
    LINE.clear()
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in figures], indent=2) + "\n")
    return int(_explain(figures, everything=arguments.plans))


def _explain(figures: Sequence[Figure], *, everything: bool) -> bool:
    """Whether anything is wrong, which is said."""
    for one in figures:
        for flaw in one.flaws:
            print(f"{one.database}: {one.call} ({one.user}): {flaw}", file=sys.stderr)
        for statement, nodes in one.plans.items() if everything else ():
            print(f"{one.database}: {one.call}: {statement}", *nodes, sep="\n    ", file=sys.stderr)
    return any(True for one in figures for _ in one.flaws)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what the calls cost beside many conversations")
    parser.add_argument("--conversations", type=int, default=100_000, help="(default: 100,000)")
    parser.add_argument("--sessions", type=int, default=1_000_000, help="ended ones (default: 1,000,000)")
    parser.add_argument("--database", choices=["postgresql", "sqlite", "both"], default="both")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="of each call (default: 50)")
    parser.add_argument("--plans", action="store_true", help="print the plan of every statement")
    parser.add_argument("--json", type=Path, help="write the figures, and the plans, there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
