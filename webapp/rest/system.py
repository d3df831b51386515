"""Liveness and readiness."""

from __future__ import annotations

from collections.abc import Callable

from apiflask import APIBlueprint
from flask import current_app, jsonify
from flask.typing import ResponseReturnValue

from webapp.errors import SluicegateError

system = APIBlueprint("system", __name__, tag="System")


@system.get("/healthz")
@system.doc(responses={200: "Alive"})
def healthz() -> ResponseReturnValue:
    """Whether this process answers"""
    return jsonify({"status": "ok"})


@system.get("/readyz")
@system.doc(responses={200: "Ready", 503: "Some part is not"})
def readyz() -> ResponseReturnValue:
    """Whether the database, Redis and a worker are there"""
    services = current_app.extensions["sluicegate"]
    checks = {
        "database": _check(services.database.ping),
        "redis": _check(services.log.ping),
        "redisEviction": _check(services.log.require_no_eviction),
        "worker": _check(services.workers.require_one),
        "hub": "ok" if services.hub.healthy else "Redis could not be read",
    }
    ready = all(state == "ok" for state in checks.values())
    return jsonify({"status": "ok" if ready else "unavailable", "checks": checks}), 200 if ready else 503


def _check(action: Callable[[], object]) -> str:
    try:
        action()
    except SluicegateError as error:
        return error.detail
    except Exception as error:
        return f"{type(error).__name__}: cannot be reached"
    return "ok"
