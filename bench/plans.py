"""Which statements read a whole table: the plan of each, asked for at the moment at which it is executed."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

from sqlalchemy import Connection, Engine, event

from webapp.models import db

GROWING: Final = frozenset(
    {"stream_sessions", "messages", "conversations", "conversation_members", "idempotency_keys", "sign_in_tokens"}
)
"""The tables that grow with use."""
PARTIAL_INDEXES: Final = frozenset(
    str(index.name)
    for table in db.metadata.sorted_tables
    for index in table.indexes
    if index.dialect_options["sqlite"]["where"] is not None
)
"""Those that hold only what is ACTIVE, unpublished or deleted: to walk one is not to walk its table."""


@dataclass(frozen=True)
class Walk:
    """A statement that reads all of something that grows."""

    statement: str
    node: str
    """The line of the plan that says so."""


@dataclass
class PlanWatch:
    """Notes the plan of every statement of an engine that looks for something, for the time of a `with` block."""

    engine: Engine
    statements: int = 0
    """SELECT, UPDATE and DELETE."""
    inserts: int = 0
    walks: set[Walk] = field(default_factory=set)
    plans: dict[str, list[str]] = field(default_factory=dict)
    """The nodes of the plans of each statement, every different one once."""
    steps: int = 0
    """Hundreds of instructions of SQLite's machine, which depend on nothing but the rows; 0: another database."""
    _counted: list[sqlite3.Connection] = field(default_factory=list)

    @property
    def executed(self) -> int:
        """All statements but those that begin and end transactions."""
        return self.statements + self.inserts

    def __enter__(self) -> Self:
        event.listen(self.engine, "before_cursor_execute", self._explain)
        return self

    def __exit__(self, *_: object) -> None:
        event.remove(self.engine, "before_cursor_execute", self._explain)
        for connection in self._counted:
            with suppress(sqlite3.ProgrammingError):  # it was closed meanwhile
                connection.set_progress_handler(None, 0)

    def _count_steps(self, connection: Any) -> None:
        """Of a connection, from the first statement on that it executes here."""
        if isinstance(connection, sqlite3.Connection) and connection not in self._counted:
            self._counted.append(connection)
            connection.set_progress_handler(self._step, 100)

    def _step(self) -> None:
        self.steps += 1

    def _explain(
        self, connection: Connection, _: Any, statement: str, parameters: Any, __: Any, executemany: bool
    ) -> None:
        self._count_steps(connection.connection.driver_connection)
        inserts = bool(re.match(r"\s*INSERT\b", statement))
        self.inserts += inserts
        selects = bool(re.match(r"\s*(SELECT|UPDATE|DELETE|WITH)\b", statement))
        self.statements += selects
        if not selects and not (inserts and re.search(r"\bSELECT\b", statement)):
            return
        explain = _postgresql if connection.dialect.name == "postgresql" else _sqlite
        cursor = connection.connection.cursor()
        try:
            found = list(explain(cursor, statement, parameters[0] if executemany else parameters))
        finally:
            cursor.close()
        statement = _brief(statement)
        known = self.plans.setdefault(statement, [])
        known += [line for line, _ in found if line not in known]
        self.walks |= {Walk(statement, line) for line, walks in found if walks}


def _brief(statement: str) -> str:
    """On one line, without the list of all columns and the other members of a list of values."""
    statement = re.sub(r"(?<=SELECT )[^()]{200,}?(?= FROM )", "…", " ".join(statement.split()))
    return re.sub(r" IN \((%\(\w+\)s::\w+|\?), [^()]*(\(\w+\)s::\w+[^()]*)*\)", r" IN (\1, …)", statement)


def _sqlite(cursor: Any, statement: str, parameters: Any) -> Iterator[tuple[str, bool]]:
    """Each line of the plan, and whether it walks a table that grows; all ids below one are most of a table, too."""
    cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
    for *_, line in cursor.fetchall():
        scan = re.match(r"(SCAN|SEARCH) (\w+)(?: USING (?:COVERING )?INDEX (\w+))?", line)
        whole = scan and (scan[1] == "SCAN" or line.endswith(("(id<?)", "(id>?)")))
        yield line, bool(scan and whole and scan[2] in GROWING and scan[3] not in PARTIAL_INDEXES)


def _postgresql(cursor: Any, statement: str, parameters: Any) -> Iterator[tuple[str, bool]]:
    """As `_sqlite`. An index that is read without a condition is walked, from one end to where it stops."""
    cursor.execute(f"EXPLAIN (FORMAT JSON) {statement}", parameters)
    for node in _nodes(cursor.fetchone()[0][0]["Plan"]):
        kind, table, index = node["Node Type"], node.get("Relation Name"), node.get("Index Name")
        condition = re.sub(r"'[^']*'", "?", node.get("Index Cond") or node.get("Filter") or "")
        line = " ".join(filter(None, [kind, table, index, condition]))
        whole = "Index Cond" not in node or re.match(r"\(id [<>] ", condition)
        reads = "Scan" in kind and kind != "Bitmap Heap Scan"  # which reads what the index scans below it have found
        yield line, bool(whole) and reads and table in GROWING and index not in PARTIAL_INDEXES


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan and all below it. What a bitmap is made of does not say itself of which table it is."""
    yield plan
    for below in plan.get("Plans", ()):
        if below["Node Type"].startswith("Bitmap") and "Relation Name" in plan:
            below.setdefault("Relation Name", plan["Relation Name"])
        yield from _nodes(below)
