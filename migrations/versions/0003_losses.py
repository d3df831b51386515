"""how many workers a session has lost, apart from those that handed it over

A column is added with a constant default, so neither database copies the table, and what an older process writes
during the upgrade has a value too.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("stream_sessions", sa.Column("losses", sa.Integer(), server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    op.drop_column("stream_sessions", "losses")
