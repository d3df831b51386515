"""The schema: each field one of the calls that REST makes too."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Final

import strawberry
from flask import request
from graphql import GraphQLError
from redis.exceptions import RedisError
from strawberry.schema.config import StrawberryConfig

from webapp.calls import calls
from webapp.config import Settings
from webapp.errors import SluicegateError
from webapp.graphql.events import Connection, StreamEvent, followed, nothing
from webapp.graphql.failures import known
from webapp.graphql.inputs import StreamMessageInput, TerminateStreamInput, as_uuid, validated
from webapp.graphql.limits import limits
from webapp.graphql.types import SCALARS, ConversationPage, StreamError
from webapp.schemas import ConversationPage as ConversationPageQuery
from webapp.schemas import NewConversation
from webapp.streams.events import START, Position
from webapp.streams.follow import check_cursor
from webapp.views import ConversationView, ModelView, ReceiptView, SessionView, UserView

ACTIVE_LIMIT: Final = 500
"""Of `activeStreams`, which has no pages: as many as REST gives at most."""

TerminateStreamResult = Annotated[ReceiptView | StreamError, strawberry.union("TerminateStreamResult")]


@strawberry.type
class Query:
    @strawberry.field(description="Who is asking.")
    def me(self) -> UserView:
        return calls().me()

    @strawberry.field(description="Your conversations, newest first; `cursor` is `nextCursor` of the page before.")
    def conversations(self, limit: int | None = 50, cursor: strawberry.ID | None = None) -> ConversationPage:
        query = validated(ConversationPageQuery, {"limit": 50 if limit is None else limit, "cursor": cursor})
        items, following = calls().conversations(query.limit, query.cursor)
        return ConversationPage(items=items, next_cursor=following)

    @strawberry.field(description="One conversation.")
    def conversation(self, id: strawberry.ID) -> ConversationView:
        return calls().conversation(as_uuid(id, "id"))

    @strawberry.field(description="One stream, whether it has ended or not.")
    def stream_session(self, id: strawberry.ID) -> SessionView:
        return calls().stream(as_uuid(id, "id"))

    @strawberry.field(description="The ACTIVE streams of all your conversations, newest first.")
    def active_streams(self) -> list[SessionView]:
        return calls().streams(active_only=True, limit=ACTIVE_LIMIT)

    @strawberry.field(description="What the model's server offers.")
    def models(self) -> list[ModelView]:
        return calls().models()[0]


@strawberry.type
class Mutation:
    @strawberry.mutation(description="Begin a conversation.")
    def create_conversation(self, title: str | None = None) -> ConversationView:
        return calls().create_conversation(validated(NewConversation, {"title": title}).title)

    @strawberry.mutation(description="Send a message; the session is the run that answers it. Idempotency-Key counts.")
    def stream_message(self, input: StreamMessageInput) -> SessionView:
        return calls().send(input.body().request(), _idempotency_key())

    @strawberry.mutation(description="Terminate a stream; the receipt is the same to every caller, however often.")
    def terminate_stream(self, input: TerminateStreamInput) -> TerminateStreamResult:
        try:
            body = input.body()
            return calls().terminate(body.session_id, body.conversation_id)
        except (SluicegateError, RedisError) as error:
            told = known(error) or SluicegateError()
            return StreamError(code=told.code, message=told.detail)

    @strawberry.mutation(description="Go on with an answer from where its partial ends. Idempotency-Key counts.")
    def continue_stream(self, session_id: strawberry.ID) -> SessionView:
        return calls().continue_stream(as_uuid(session_id, "sessionId"), _idempotency_key())

    @strawberry.mutation(description="Answer the same question anew; the old answer is kept. Idempotency-Key counts.")
    def retry_stream(self, session_id: strawberry.ID) -> SessionView:
        return calls().retry_stream(as_uuid(session_id, "sessionId"), _idempotency_key())


@strawberry.type
class Subscription:
    @strawberry.subscription(description="A stream from its start, or from behind the event whose id `after` is.")
    def stream_events(
        self, info: strawberry.Info[Connection, None], session_id: strawberry.ID, after: str | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        cursor = Position.parse(after) if after else START
        session = calls().stream(as_uuid(session_id, "sessionId"))
        return followed(session, cursor, info.context) if check_cursor(cursor, session) else nothing()


class _Schema(strawberry.Schema):
    def process_errors(self, errors: list[GraphQLError], execution_context: Any = None) -> None:
        """Nothing here: what is to be logged is logged where it is told, in `failures`."""


def make_schema(settings: Settings) -> strawberry.Schema:
    """The schema, with the limits of the settings."""
    config = StrawberryConfig(scalar_map=SCALARS, disable_field_suggestions=not settings.graphql_introspection)
    return _Schema(Query, Mutation, Subscription, config=config, extensions=limits(settings))


def _idempotency_key() -> str | None:
    return request.headers.get("Idempotency-Key")
