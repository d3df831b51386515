"""How samples of stacks are sorted, for the tables of where time goes."""

from __future__ import annotations

import pytest

from bench.speed_profile import LOOP, OTHER, place, sorted_samples

HUB = "StreamHub._read_once (webapp/streams/hub.py:337)"
XREAD = "StreamCommands.xread (redis/commands/core.py:7949)"
SOCKET = "socket.send (gevent/_socket3.py:484)"
GUNICORN = "Response.write (gunicorn/http/wsgi.py:504)"


@pytest.mark.parametrize(
    ("stack", "belongs_to"),
    [
        ([HUB, XREAD, SOCKET], "Redis"),  # a socket is its user's
        ([GUNICORN, HUB], "our own: hub"),  # the innermost that tells
        ([HUB, GUNICORN, SOCKET], "readers' and callers' HTTP"),
        (["x (.venv/lib/python3.11/site-packages/sqlalchemy/engine/base.py:9)"], "PostgreSQL"),
        (["read1 (socket.py:720)", "recv_into (gevent/_socket3.py:9)"], "the upstream's socket"),
        (["Hub.run (gevent/hub.py:647)"], LOOP),
        (["<module> (x.py:1)"], OTHER),
    ],
)
def test_a_stack_belongs_to_one_place(stack: list[str], belongs_to: str) -> None:
    assert place(stack).startswith(belongs_to)


def test_samples_are_added_up_without_those_of_threads_that_wait() -> None:
    lines = [f"{HUB};{XREAD} 2", f"{XREAD} 3", f"{HUB} 4", "acquire_with_timeout (threading.py:1) 50"]
    assert sorted(sorted_samples(lines).values()) == [4, 5]
