"""a user's ACTIVE sessions, and the queue, are counted among themselves on SQLite too

Two indexes are made anew with the status, which all in them share. They hold only what is ACTIVE, so that what takes
time is one reading of the table each; what an older process asks meanwhile finds what it did.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_ACTIVE = sa.text("status = 'ACTIVE'")
_UNCLAIMED = sa.text("status = 'ACTIVE' AND owner IS NULL")


def upgrade() -> None:
    _make_anew("ix_stream_sessions_active_user", ["user_id", "status"], _ACTIVE)
    _make_anew("ix_stream_sessions_unclaimed", ["requeue_at", "status"], _UNCLAIMED)


def downgrade() -> None:
    _make_anew("ix_stream_sessions_unclaimed", ["requeue_at"], _UNCLAIMED)
    _make_anew("ix_stream_sessions_active_user", ["user_id", "id"], _ACTIVE)


def _make_anew(name: str, columns: list[str], where: sa.TextClause) -> None:
    op.drop_index(name, table_name="stream_sessions")
    op.create_index(name, "stream_sessions", columns, sqlite_where=where, postgresql_where=where)
