"""GraphQL at `/graphql`: the calls that REST has too, and the streams as subscriptions."""

from __future__ import annotations

from flask import Flask

from webapp.config import Settings
from webapp.graphql.schema import make_schema
from webapp.graphql.view import SCHEMA, graphql

__all__ = ["configure_graphql"]


def configure_graphql(app: Flask, settings: Settings) -> None:
    """Mount it, with the limits of the settings; errors of HTTP are told as REST tells them."""
    app.extensions[SCHEMA] = make_schema(settings)
    app.register_blueprint(graphql)
