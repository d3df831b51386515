"""Every Redis key of ours: what it is, how long it lives, who writes it.

| key | type | TTL | written by |
| --- | --- | --- | --- |
| `sg:{SESSION}:state` | hash, see below | live: the longest life plus slack; ended: minutes | the Lua verbs alone |
| `sg:{SESSION}:log` | stream: the token log, an entry an event | as its state | the Lua verbs alone |
| `sg:{SESSION}:viewers` | hash: hub -> `COUNT:UNIX_SECONDS` of its last report | half a minute | hub |
| `sg:workers` | sorted set: worker's node name by Unix seconds when it was last alive | a minute | workers |
| `sg:reaper` | string: held while a pass of the reaper runs | ten seconds | reaper |
| `sg:queue` | string: stands for the queue; where it is gone, so is the queue: Redis was emptied | a day | reaper |
| `sg:hub:HUB:wake` | stream of one entry: wakes a hub's blocking read | a minute | hub |
| `sg:limit:LIMITER/WHAT/WHO/RATE` | string: how often a user or an address did WHAT | the rate's window | limits |

A state holds `epoch`, `owner`, `end` and `tlen` (code points of text, and of thinking), `seq` (of the last event
at `end`), `phase` and `marked` (the epoch that it was marked at), `fence` (the reason) and `fenced_us`, `lease_us`
(microseconds of Redis's clock), and `done`.

The braces are a hash tag: all keys of one session live in one slot of a cluster.
"""

from __future__ import annotations

from uuid import UUID

_PREFIX = "sg"


def state_key(session_id: UUID) -> str:
    """Hash with the epoch, the owner, the log's end and the fence of a session."""
    return _key(session_id, "state")


def log_key(session_id: UUID) -> str:
    """Stream with the events of a session."""
    return _key(session_id, "log")


def viewers_key(session_id: UUID) -> str:
    """Hash with the number of readers that each web process reports."""
    return _key(session_id, "viewers")


def wake_key(hub_id: str) -> str:
    """Stream on which a hub is told to look at its followers again."""
    return f"{_PREFIX}:hub:{hub_id}:wake"


def _key(session_id: UUID, part: str) -> str:
    return f"{_PREFIX}:{{{session_id}}}:{part}"


REAPER_KEY = f"{_PREFIX}:reaper"
QUEUE_KEY = f"{_PREFIX}:queue"
WORKERS_KEY = f"{_PREFIX}:workers"
LIMIT_PREFIX = f"{_PREFIX}:limit"
"""Of the counters of rates, whose names are completed by the library that counts."""
