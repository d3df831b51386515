"""Liveness, readiness and metrics: what looks after the processes asks here, without a token."""

from __future__ import annotations

from collections.abc import Callable

from apiflask import APIBlueprint
from flask import Response, current_app, jsonify, request
from flask.typing import ResponseReturnValue

from webapp.errors import SluicegateError
from webapp.rest.openapi import problems
from webapp.streams.hub import StreamHub

system = APIBlueprint("system", __name__, tag="System")


@system.get("/healthz")
@system.doc(responses={200: "Alive"})
def healthz() -> ResponseReturnValue:
    """Whether this process answers"""
    return jsonify({"status": "ok"})


@system.get("/readyz")
@system.doc(responses={200: "Ready", 503: "Some part is not"})
def readyz() -> ResponseReturnValue:
    """Whether the database, Redis and a worker are there, and this process can serve readers"""
    services = current_app.extensions["sluicegate"]
    checks = {"database": _check(services.database.ping), "redis": _check(services.views_log.ping)}
    for name, action in (
        ("redisEviction", services.log.require_no_eviction),
        ("worker", services.workers.require_one),
    ):
        # One wait for a Redis that says nothing is enough.
        checks[name] = _check(action) if checks["redis"] == "ok" else checks["redis"]
    checks["hub"] = _hub_state(services.hub)
    ready = all(state == "ok" for state in checks.values())
    return jsonify({"status": "ok" if ready else "unavailable", "checks": checks}), 200 if ready else 503


@system.get("/metrics")
@system.doc(
    responses={
        200: {
            "description": "Figures of the processes of this host",
            "content": {
                "text/plain": {"schema": {"type": "string"}},
                "application/openmetrics-text": {"schema": {"type": "string"}},
            },
        },
        **problems(503),
    }
)
def metrics() -> Response:
    """Figures for Prometheus; not for the public"""
    text, content_type = current_app.extensions["sluicegate"].metrics.render(request.headers.get("Accept", ""))
    return Response(text, content_type=content_type)


def _hub_state(hub: StreamHub) -> str:
    if not hub.alive:
        return "a loop that serves this process's readers has ended: restart the process"
    return "ok" if hub.healthy else "Redis could not be read"


def _check(action: Callable[[], object]) -> str:
    try:
        action()
    except SluicegateError as error:
        return error.detail
    except Exception as error:
        return f"{type(error).__name__}: cannot be reached"
    return "ok"
