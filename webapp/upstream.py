"""What the web side asks of the upstream: which models there are. Answers are kept for a moment."""

from __future__ import annotations

import time
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

import gevent
import orjson
import requests
from urllib3.exceptions import HTTPError

from webapp.config import Settings
from webapp.errors import Unavailable
from webapp.views import ModelView

KEPT_SECONDS: Final = 15.0
TIMEOUT_SECONDS: Final = 3.0
"""For the whole question, however slowly the answer comes; outside of gevent, for each of its parts."""
CATALOGUE_LIMIT_BYTES: Final = 4_194_304
NAME_LIMIT_CHARACTERS: Final = 200
"""Of a model, as in a request and in the database."""


class Upstream:
    """The upstream's catalogue (Ollama's `GET /api/tags`)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._models: list[ModelView] = []
        self._asked_at = float("-inf")

    def models(self) -> list[ModelView]:
        """What the upstream offers, in its own order.

        Raises:
            Unavailable: it does not answer, or not with a catalogue.
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
        try:
            with gevent.Timeout(TIMEOUT_SECONDS, TimeoutError("the whole answer took too long")):
                body = _fetch(f"{self._settings.ollama_base_url}/api/tags")
        except (requests.RequestException, HTTPError, OSError) as error:
            raise Unavailable("The model's server does not answer; is it running?") from error
        try:
            return [_model(one) for one in orjson.loads(body)["models"] if _is_model(one)]
        except (ValueError, KeyError, TypeError) as error:
            raise Unavailable("The model's server answered with something that is no list of models") from error


class UpstreamSession(requests.Session):
    """Speaks to the one server that is configured, and to no other that this one points to.

    A redirect would send a conversation to a place that nobody has chosen, and requests would read its whole body.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        # A proxy of the environment is for the world outside.
        self.trust_env = not is_loopback(url)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None: requests looks no further."""
        return None


def _fetch(url: str) -> bytes:
    """The body of what a GET answers, if that is not too long.

    Raises:
        Unavailable: it was refused, or is too long.
    """
    with UpstreamSession(url) as http:
        headers = {"Accept-Encoding": "identity"}
        with http.get(url, stream=True, timeout=TIMEOUT_SECONDS, headers=headers) as answer:
            if answer.status_code != 200:
                raise Unavailable(f"The model's server answered {answer.status_code} when it was asked for its models")
            body: bytes = answer.raw.read(CATALOGUE_LIMIT_BYTES + 1, decode_content=True)
    if len(body) > CATALOGUE_LIMIT_BYTES:
        raise Unavailable(f"The model's server sent a list of models of over {CATALOGUE_LIMIT_BYTES} bytes")
    return body


def is_loopback(url: str) -> bool:
    """Whether a URL is of this machine, where a proxy that the environment names has no business."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _is_model(one: Any) -> bool:
    """Whether it has a name that a request may name."""
    name = one.get("name") if isinstance(one, dict) else None
    return isinstance(name, str) and 0 < len(name) <= NAME_LIMIT_CHARACTERS and name.isprintable()


def _model(one: dict[str, Any]) -> ModelView:
    """A model of the catalogue; what is said of it in a form that is not Ollama's is as if it were not said."""
    size, details = one.get("size"), one.get("details")
    family = details.get("family") if isinstance(details, dict) else None
    known_size = isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63
    return ModelView(one["name"], size if known_size else None, family if isinstance(family, str) else None)
