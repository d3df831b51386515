"""What operators see of all streams, and how they stop one; nobody's words are in any answer."""

from __future__ import annotations

from typing import Final

from apiflask import APIBlueprint
from flask import current_app, jsonify
from flask.typing import ResponseReturnValue

from webapp import auth
from webapp.history import HistoryView
from webapp.logs import bind
from webapp.operations import Operations, OperationsView
from webapp.rest.openapi import described, problems, schema_of
from webapp.schemas import HistoryWindow, OperatorStop
from webapp.views import ReceiptView

operations = APIBlueprint("operations", __name__, url_prefix="/api/operations", tag="Operations")

RECEIPT: Final = described(
    ReceiptView,
    "How it ended, without its text",
    only=tuple(name for name in schema_of(ReceiptView)["properties"] if name != "partialResponse"),
)


@operations.get("")
@operations.doc(responses={200: described(OperationsView, "How things stand"), **problems(401, 403)})
def overview() -> ResponseReturnValue:
    """Look at all streams, the workers, the last endings and the figures of this host; for operators"""
    return jsonify(_operations().overview().as_dict())


@operations.get("/history")
@operations.input(HistoryWindow, location="query", arg_name="query")
@operations.doc(responses={200: described(HistoryView, "Series over time"), **problems(401, 403)})
def history(query: HistoryWindow) -> ResponseReturnValue:
    """Look back: active and queued streams, endings, stops and partial lengths over time; for operators"""
    return jsonify(_operations().history(query.minutes).as_dict())


@operations.post("/terminate")
@operations.input(OperatorStop, arg_name="body")
@operations.doc(responses={200: RECEIPT, **problems(400, 401, 403, 404, 413, 415)})
def terminate(body: OperatorStop) -> ResponseReturnValue:
    """Terminate anybody's stream, with the reason `admin`; for operators"""
    bind(session_id=body.session_id)
    return jsonify(_operations().terminate(body.session_id, by=auth.require_operator().name))


def _operations() -> Operations:
    found: Operations = current_app.extensions["sluicegate"].operations
    return found
