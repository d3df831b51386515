"""The states of a stream session, the reasons for its ending, and which moves are allowed.

The standard library only: everything else may import this module.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class StreamStatus(StrEnum):
    """What a session is. It leaves ACTIVE exactly once."""

    ACTIVE = "ACTIVE"
    COMPLETED = "COMPLETED"
    TERMINATED = "TERMINATED"
    ERROR = "ERROR"


class StreamPhase(StrEnum):
    """How far an ACTIVE session has come; after the end, how far it had come."""

    QUEUED = "QUEUED"
    LOADING = "LOADING"
    GENERATING = "GENERATING"


class TerminationReason(StrEnum):
    """Why a session ended. The values are stored and sent; never rename one."""

    STOP = "stop"
    LENGTH = "length"
    USER = "user"
    ADMIN = "admin"
    SUPERSEDED = "superseded"
    CONVERSATION_DELETED = "conversation_deleted"
    REVOKED = "revoked"
    ABANDONED = "abandoned"
    QUEUE_TIMEOUT = "queue_timeout"
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    MAX_DURATION = "max_duration"
    SHUTDOWN = "shutdown"
    UPSTREAM_ERROR = "upstream_error"
    WORKER_LOST = "worker_lost"
    INTERNAL = "internal"

    @property
    def status(self) -> StreamStatus:
        """The status in which a session that ended for this reason stays."""
        if self in _COMPLETED:
            return StreamStatus.COMPLETED
        if self in _ERROR:
            return StreamStatus.ERROR
        return StreamStatus.TERMINATED

    @property
    def by_terminate_call(self) -> bool:
        """Whether a terminate call, rather than anything else, ended the session."""
        return self in (TerminationReason.USER, TerminationReason.ADMIN)


_COMPLETED: Final = frozenset({TerminationReason.STOP, TerminationReason.LENGTH})
_ERROR: Final = frozenset({TerminationReason.UPSTREAM_ERROR, TerminationReason.WORKER_LOST, TerminationReason.INTERNAL})

TRANSITIONS: Final[dict[StreamStatus, frozenset[StreamStatus]]] = {
    StreamStatus.ACTIVE: frozenset({StreamStatus.COMPLETED, StreamStatus.TERMINATED, StreamStatus.ERROR}),
    StreamStatus.COMPLETED: frozenset(),
    StreamStatus.TERMINATED: frozenset(),
    StreamStatus.ERROR: frozenset(),
}


def sources_of(target: StreamStatus) -> frozenset[StreamStatus]:
    """The states from which `target` may be reached: what a guarded UPDATE names in its WHERE."""
    return frozenset(source for source, targets in TRANSITIONS.items() if target in targets)
