"""when a session is over by itself, and when it is abandoned

Only columns and indexes are added, so SQLite does not copy the table.
"""

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ACTIVE = sa.text("status = 'ACTIVE'")
_UNCLAIMED = sa.text("status = 'ACTIVE' AND owner IS NULL")
_COLUMNS = (
    ("timeouts", sa.JSON()),
    ("due_at", sa.DateTime(timezone=True)),
    ("due_reason", sa.String(length=24)),
    ("abandon_at", sa.DateTime(timezone=True)),
)
_ON_DISCONNECT = ("on_disconnect", sa.String(length=10))


def upgrade() -> None:
    for name, kind in _COLUMNS:
        op.add_column("stream_sessions", sa.Column(name, kind, nullable=True))
    # What runs over the upgrade is due as if it had begun to wait now; its worker's next heartbeat knows better.
    moment = datetime.now(UTC)
    sessions = sa.table("stream_sessions", *(sa.column(*column) for column in (*_COLUMNS, ("status",), _ON_DISCONNECT)))
    active = sessions.update().where(sessions.c.status == "ACTIVE")
    op.execute(active.values(due_at=moment + timedelta(seconds=600), due_reason="queue_timeout"))
    unwatched = active.where(sessions.c.on_disconnect == "terminate")
    op.execute(unwatched.values(abandon_at=moment + timedelta(seconds=30)))
    op.create_index("ix_stream_sessions_ended_at", "stream_sessions", ["ended_at"])
    for name, column in (("due", "due_at"), ("abandoned", "abandon_at")):
        op.create_index(
            f"ix_stream_sessions_active_{name}",
            "stream_sessions",
            [column],
            sqlite_where=_ACTIVE,
            postgresql_where=_ACTIVE,
        )
    # Without those that run, which the reaper would walk past in each of its passes.
    op.drop_index("ix_stream_sessions_active_unclaimed", table_name="stream_sessions")
    op.create_index(
        "ix_stream_sessions_unclaimed",
        "stream_sessions",
        ["requeue_at"],
        sqlite_where=_UNCLAIMED,
        postgresql_where=_UNCLAIMED,
    )


def downgrade() -> None:
    op.drop_index("ix_stream_sessions_unclaimed", table_name="stream_sessions")
    op.create_index(
        "ix_stream_sessions_active_unclaimed",
        "stream_sessions",
        ["requeue_at"],
        sqlite_where=_ACTIVE,
        postgresql_where=_ACTIVE,
    )
    for name in ("active_abandoned", "active_due", "ended_at"):
        op.drop_index(f"ix_stream_sessions_{name}", table_name="stream_sessions")
    for name, _ in reversed(_COLUMNS):
        op.drop_column("stream_sessions", name)
