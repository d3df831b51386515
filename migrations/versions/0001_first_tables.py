"""first tables"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "conversations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("title", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_conversations"),
    )
    op.create_index(
        "ix_conversations_deleted_at",
        "conversations",
        ["deleted_at"],
        sqlite_where=sa.text("deleted_at IS NOT NULL"),
        postgresql_where=sa.text("deleted_at IS NOT NULL"),
    )

    op.create_table(
        "users",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("token_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("operator", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("name", name="uq_users_name"),
        sa.UniqueConstraint("token_hash", name="uq_users_token_hash"),
    )
    op.create_table(
        "conversation_members",
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("conversation_id", sa.Uuid(), nullable=False),
        sa.Column("role", sa.String(length=10), nullable=False),
        sa.CheckConstraint("role IN ('owner', 'editor', 'viewer')", name=op.f("ck_conversation_members_role")),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name="fk_conversation_members_conversation_id_conversations",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name="fk_conversation_members_user_id_users", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("user_id", "conversation_id", name="pk_conversation_members"),
    )
    op.create_index("ix_conversation_members_conversation_id", "conversation_members", ["conversation_id"])

    op.create_table(
        "messages",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("conversation_id", sa.Uuid(), nullable=False),
        sa.Column("role", sa.String(length=10), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("thinking", sa.Text(), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=True),
        sa.Column("status", sa.String(length=10), nullable=True),
        sa.Column("reason", sa.String(length=24), nullable=True),
        sa.Column("session_id", sa.Uuid(), nullable=True),
        sa.Column("replaced_by_id", sa.Uuid(), nullable=True),
        sa.Column("stats", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "reason IN ('stop', 'length', 'user', 'admin', 'superseded', 'conversation_deleted', 'revoked', 'abandoned', 'queue_timeout', 'first_token_timeout', 'idle_timeout', 'max_duration', 'shutdown', 'upstream_error', 'worker_lost', 'internal')",
            name=op.f("ck_messages_reason"),
        ),
        sa.CheckConstraint("role IN ('user', 'assistant')", name=op.f("ck_messages_role")),
        sa.CheckConstraint("status IN ('ACTIVE', 'COMPLETED', 'TERMINATED', 'ERROR')", name=op.f("ck_messages_status")),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name="fk_messages_conversation_id_conversations",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["replaced_by_id"], ["messages.id"], name="fk_messages_replaced_by_id_messages", ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_messages"),
    )
    op.create_index("ix_messages_conversation_id_id", "messages", ["conversation_id", "id"])
    op.create_index("ix_messages_replaced_by_id", "messages", ["replaced_by_id"])

    op.create_table(
        "idempotency_keys",
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name="fk_idempotency_keys_user_id_users", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("user_id", "key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])

    op.create_table(
        "sign_in_tokens",
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_sign_in_tokens_user_id_users", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("token_hash", name="pk_sign_in_tokens"),
    )
    op.create_index("ix_sign_in_tokens_expires_at", "sign_in_tokens", ["expires_at"])
    op.create_index("ix_sign_in_tokens_user_id", "sign_in_tokens", ["user_id"])

    op.create_table(
        "stream_sessions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("conversation_id", sa.Uuid(), nullable=False),
        sa.Column("message_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("options", sa.JSON(), nullable=True),
        sa.Column("think", sa.JSON(), nullable=True),
        sa.Column("keep_alive", sa.String(length=20), nullable=True),
        sa.Column("on_disconnect", sa.String(length=10), nullable=False),
        sa.Column("status", sa.String(length=10), nullable=False),
        sa.Column("reason", sa.String(length=24), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("phase", sa.String(length=10), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=True),
        sa.Column("requeue_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("checkpoint", sa.Text(), nullable=False),
        sa.Column("checkpoint_length", sa.Integer(), nullable=False),
        sa.Column("checkpoint_thinking_length", sa.Integer(), nullable=False),
        sa.Column("stop_reason", sa.String(length=24), nullable=True),
        sa.Column("stop_by", sa.String(length=100), nullable=True),
        sa.Column("stop_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("length", sa.Integer(), nullable=True),
        sa.Column("thinking_length", sa.Integer(), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("fenced_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("upstream_closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("(status = 'ACTIVE') = (ended_at IS NULL)", name=op.f("ck_stream_sessions_ended")),
        sa.CheckConstraint("(status = 'ACTIVE') = (reason IS NULL)", name=op.f("ck_stream_sessions_has_reason")),
        sa.CheckConstraint("on_disconnect IN ('continue', 'terminate')", name=op.f("ck_stream_sessions_on_disconnect")),
        sa.CheckConstraint("phase IN ('QUEUED', 'LOADING', 'GENERATING')", name=op.f("ck_stream_sessions_phase")),
        sa.CheckConstraint(
            "reason IN ('stop', 'length', 'user', 'admin', 'superseded', 'conversation_deleted', 'revoked', 'abandoned', 'queue_timeout', 'first_token_timeout', 'idle_timeout', 'max_duration', 'shutdown', 'upstream_error', 'worker_lost', 'internal')",
            name=op.f("ck_stream_sessions_reason"),
        ),
        sa.CheckConstraint(
            "status IN ('ACTIVE', 'COMPLETED', 'TERMINATED', 'ERROR')", name=op.f("ck_stream_sessions_status")
        ),
        sa.CheckConstraint(
            "stop_reason IN ('stop', 'length', 'user', 'admin', 'superseded', 'conversation_deleted', 'revoked', 'abandoned', 'queue_timeout', 'first_token_timeout', 'idle_timeout', 'max_duration', 'shutdown', 'upstream_error', 'worker_lost', 'internal')",
            name=op.f("ck_stream_sessions_stop_reason"),
        ),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name="fk_stream_sessions_conversation_id_conversations",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["message_id"], ["messages.id"], name="fk_stream_sessions_message_id_messages", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_stream_sessions_user_id_users", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_stream_sessions"),
    )
    op.create_index(
        "ix_stream_sessions_active_heartbeat",
        "stream_sessions",
        ["heartbeat_at"],
        sqlite_where=sa.text("status = 'ACTIVE'"),
        postgresql_where=sa.text("status = 'ACTIVE'"),
    )
    op.create_index(
        "ix_stream_sessions_active_unclaimed",
        "stream_sessions",
        ["requeue_at"],
        sqlite_where=sa.text("status = 'ACTIVE'"),
        postgresql_where=sa.text("status = 'ACTIVE'"),
    )
    op.create_index(
        "ix_stream_sessions_active_user",
        "stream_sessions",
        ["user_id", "id"],
        sqlite_where=sa.text("status = 'ACTIVE'"),
        postgresql_where=sa.text("status = 'ACTIVE'"),
    )
    op.create_index("ix_stream_sessions_conversation_id_id", "stream_sessions", ["conversation_id", "id"])
    op.create_index("ix_stream_sessions_message_id", "stream_sessions", ["message_id"])
    op.create_index(
        "ix_stream_sessions_unpublished",
        "stream_sessions",
        ["ended_at"],
        sqlite_where=sa.text("published_at IS NULL AND status <> 'ACTIVE'"),
        postgresql_where=sa.text("published_at IS NULL AND status <> 'ACTIVE'"),
    )
    op.create_index("ix_stream_sessions_user_id_id", "stream_sessions", ["user_id", "id"])
    op.create_index(
        "uq_stream_sessions_active_conversation",
        "stream_sessions",
        ["conversation_id"],
        unique=True,
        sqlite_where=sa.text("status = 'ACTIVE'"),
        postgresql_where=sa.text("status = 'ACTIVE'"),
    )


def downgrade() -> None:
    op.drop_table("stream_sessions")
    op.drop_table("sign_in_tokens")
    op.drop_table("idempotency_keys")
    op.drop_table("messages")
    op.drop_table("conversation_members")
    op.drop_table("users")
    op.drop_table("conversations")
