"""What the web side asks of the upstream: which models there are. Answers are kept for a moment."""

from __future__ import annotations

import time
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

import requests

from webapp.config import Settings
from webapp.errors import Unavailable
from webapp.views import ModelView

KEPT_SECONDS: Final = 15.0
TIMEOUT_SECONDS: Final = 3.0


class Upstream:
    """The upstream's catalogue (Ollama's `GET /api/tags`)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._models: list[ModelView] = []
        self._asked_at = float("-inf")

    def models(self) -> list[ModelView]:
        """What the upstream offers, in its own order.

        Raises:
            Unavailable: it does not answer.
        """
        if time.monotonic() - self._asked_at > KEPT_SECONDS:
            self._models = self._ask()
            self._asked_at = time.monotonic()
        return self._models

    def default_model(self) -> str:
        """The model for a request that names none.

        Raises:
            Unavailable: the upstream does not answer, or has no model.
        """
        if self._settings.default_model:
            return self._settings.default_model
        models = self.models()
        if not models:
            raise Unavailable("The model's server has no model: pull one, or name one in the request")
        return models[0].name

    def _ask(self) -> list[ModelView]:
        url = f"{self._settings.ollama_base_url}/api/tags"
        try:
            with requests.Session() as http:
                http.trust_env = not is_loopback(url)
                answer = http.get(url, timeout=TIMEOUT_SECONDS)
                answer.raise_for_status()
                return [_model(one) for one in answer.json()["models"]]
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise Unavailable("The model's server does not answer; is it running?") from error


def is_loopback(url: str) -> bool:
    """Whether a URL is of this machine, where a proxy that the environment names has no business."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _model(one: dict[str, Any]) -> ModelView:
    return ModelView(str(one["name"]), one.get("size"), (one.get("details") or {}).get("family"))
