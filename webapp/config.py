"""The settings: one frozen object, and the only place that reads the environment.

Sources, the first wins: the environment, `.env` in the working directory, and `embedded.env` in
the data directory, which `sluicegate up` writes while it runs, so that a command in another
terminal finds the embedded Valkey and the demo model.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from webapp.errors import ConfigurationError

EMBEDDED_ENV_FILE = "embedded.env"
_EVERY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104 - compared with, not bound
OLLAMA_DEFAULT_URL = "http://127.0.0.1:11434"


class _DataDirectory(BaseSettings):
    """Where the other file of settings lies, which must be known first."""

    model_config = SettingsConfigDict(env_prefix="SLUICEGATE_", env_file=".env", extra="ignore")
    data_dir: Path = Path("var")


def _outside(name: str, default: Any, description: str, **options: Any) -> Any:
    """A field whose variable has no SLUICEGATE_ prefix."""
    return Field(default, validation_alias=AliasChoices(name), description=description, **options)


class Settings(BaseSettings):
    """Every setting, with its unit in its name and one line of explanation."""

    model_config = SettingsConfigDict(
        env_prefix="SLUICEGATE_", frozen=True, extra="ignore", env_file_encoding="utf-8", populate_by_name=True
    )

    # Where things are
    database_url: str = _outside("DATABASE_URL", "", "SQLAlchemy URL; empty: an SQLite file in the data directory")
    redis_url: str = _outside("REDIS_URL", "", "token logs, leases and fences; empty: the embedded Valkey")
    celery_broker_url: str = _outside("CELERY_BROKER_URL", "", "Celery's broker; empty: REDIS_URL")
    ollama_base_url: str = _outside("OLLAMA_BASE_URL", OLLAMA_DEFAULT_URL, "the Ollama server")
    port: int = _outside("PORT", 8000, "port of the web process", ge=0, le=65535)
    host: str = Field("127.0.0.1", description="address that the web process binds; 0.0.0.0: every one")
    public_url: str = Field("", description="the page's URL as people reach it; empty: http://HOST:PORT")
    data_dir: Path = Field(Path("var"), description="directory of everything that the embedded default writes")
    secret_key: str = Field("", description="signs cookies; empty: made once and kept in the data directory")

    # The model
    default_model: str = Field("", description="model where a request names none; empty: the upstream's first")
    upstream_connect_timeout_seconds: float = Field(10, gt=0, description="to open a connection to the upstream")
    upstream_line_limit_bytes: int = Field(1_048_576, ge=1024, description="longest line taken from the upstream")
    answer_limit_characters: int = Field(5_000_000, ge=1, description="code points taken of one answer of the upstream")
    history_limit_characters: int = Field(100_000, ge=0, description="code points of history sent to the model")
    keep_alive: str = Field("", description="how long the upstream keeps a model loaded; empty: its own default")

    # Limits
    request_limit_bytes: int = Field(1_048_576, ge=1024, description="largest request body")
    message_limit_characters: int = Field(200_000, ge=1, description="code points of one message")
    max_active_streams_per_user: int = Field(20, ge=0, description="0: no cap")
    max_queued_streams: int = Field(10_000, ge=0, description="sessions that no worker has claimed; 0: no cap")
    rate_limit: str = Field("120/minute", description="new messages per user; empty: none")
    sign_in_rate_limit: str = Field("20/minute", description="failed tries to sign in per address; empty: none")
    trusted_proxies: int = Field(0, ge=0, description="reverse proxies in front, each adding to X-Forwarded-For")

    # The worker
    worker_concurrency: int = Field(200, ge=1, description="generations that one worker process runs at once")
    lease_seconds: float = Field(10, gt=1, description="after which a silent worker is taken for lost")
    lease_renew_seconds: float = Field(1, gt=0, description="between two renewals of a worker's leases")
    heartbeat_seconds: float = Field(2, gt=0, description="between two heartbeats in the database")
    checkpoint_seconds: float = Field(10, gt=0, description="between two checkpoints of text while Redis answers")
    on_worker_lost: Literal["continue", "keep"] = Field(
        "continue", description="go on elsewhere, or commit the partial"
    )
    on_worker_lost_keep_models: str = Field(
        "", description="models whose partial is committed all the same: patterns with * and ?, separated by commas"
    )
    max_attempts: int = Field(5, ge=1, description="workers that one session may lose before it ends as worker_lost")
    drain_seconds: float = Field(30, ge=0, description="a stopping worker's grace for its running streams")

    # Time-outs, each the reason of its name
    queue_timeout_seconds: float = Field(600, gt=0, description="waiting for a worker")
    first_token_timeout_seconds: float = Field(300, gt=0, description="from the claim to the first token")
    idle_timeout_seconds: float = Field(120, gt=0, description="silence between two tokens")
    max_duration_seconds: float = Field(3600, gt=0, description="from the claim to the end")
    abandon_grace_seconds: float = Field(30, ge=0, description="without a viewer, where onDisconnect is terminate")
    on_disconnect: Literal["continue", "terminate"] = Field(
        "continue", description="what becomes of a stream that nobody watches, where a request does not say"
    )
    request_timeout_cap_seconds: float = Field(7200, gt=0, description="longest time-out that a request may ask for")

    # The database
    database_timeout_seconds: float = Field(
        10, ge=2.5, description="that one transaction may take before the database counts as unreachable"
    )
    database_busy_seconds: float = Field(
        15, ge=0, description="that a transaction is tried again while others are in its way, or SQLite is locked"
    )

    # Retention
    session_retention_days: float = Field(30, gt=0, description="that the row of an ended session is kept")
    deleted_retention_days: float = Field(7, gt=0, description="that a deleted conversation is kept, unseen")

    # The ending and the log
    terminate_wait_seconds: float = Field(3, gt=0, description="that a terminate call waits for the worker's commit")
    log_retention_seconds: int = Field(300, ge=1, description="that a token log outlives its session's end")
    log_slack_seconds: int = Field(600, ge=1, description="added to the longest possible life, as a live log's TTL")

    # Readers
    keepalive_seconds: float = Field(15, gt=0, description="between two comment lines on a silent stream")
    reader_buffer_bytes: int = Field(262_144, ge=4096, description="held for a slow reader before it reads by itself")
    database_check_seconds: float = Field(5, gt=0, description="between a hub's questions about silent streams")

    # GraphQL
    graphql_depth_limit: int = Field(10, ge=1, description="levels of fields in one document")
    graphql_alias_limit: int = Field(15, ge=0, description="aliases in one document")
    graphql_token_limit: int = Field(1000, ge=1, description="tokens in one document; fields, fragments written out")
    graphql_introspection: bool = Field(True, description="tell clients the schema")
    graphql_ide: bool = Field(False, description="serve GraphiQL to browsers, its scripts from a public CDN")

    # Sign-in
    sign_in_token_seconds: int = Field(3600, ge=1, description="life of a one-time sign-in token")
    cookie_lifetime_seconds: int = Field(30 * 86400, ge=60, description="life of the page's session cookie")
    cookie_secure: bool = Field(False, description="send the cookie over HTTPS only")

    # Flower
    flower_port: int = Field(5555, ge=0, le=65535, description="port of Flower")
    flower_basic_auth: str = Field("", description="USER:PASSWORD for Flower; empty: made once by `sluicegate flower`")

    flower_url: str = Field(
        "", description="Flower's URL as operators reach it; empty: this host at Flower's port, where it can be reached"
    )

    # Logs
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="least level that is logged")
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: console at a terminal, else JSON")

    # Metrics and traces
    metrics_port: int = Field(0, ge=0, le=65535, description="port of a worker's own /metrics; 0: none")
    tracing: bool = Field(False, description="send OpenTelemetry traces, as OTEL_* say; needs the extra otel")

    @field_validator("database_url")
    @classmethod
    def _database_driver(cls, value: str) -> str:
        for scheme in ("postgres://", "postgresql://"):
            if value.startswith(scheme):
                return "postgresql+psycopg://" + value.removeprefix(scheme)
        if value.startswith("sqlite"):
            path = value.partition("///")[2].partition("?")[0]
            if path in ("", ":memory:"):
                raise ValueError("an SQLite in memory is not shared by the processes: name a file, sqlite:///PATH")
            # Against the working directory, as everywhere else, and not Flask's instance directory.
            return value.replace("///" + path, f"///{Path(path).absolute()}", 1)
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: str) -> str:
        if value and urlsplit(value).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        return value

    @field_validator("rate_limit", "sign_in_rate_limit")
    @classmethod
    def _rates(cls, value: str) -> str:
        value = value.strip()
        if value:
            from limits import parse_many  # which takes a tenth of a second, and most commands do without

            try:
                possible = all(rate.amount for rate in parse_many(value))
            except ValueError:
                possible = False
            if not possible:
                raise ValueError("must be a rate as 120/minute, or several as 10/second;120/minute, or empty: none")
        return value

    @field_validator("flower_url")
    @classmethod
    def _link(cls, value: str) -> str:
        if value and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname):
            raise ValueError("must be an http:// or https:// URL, or empty")
        return value

    @field_validator("ollama_base_url")
    @classmethod
    def _http_url(cls, value: str) -> str:
        value = value or OLLAMA_DEFAULT_URL
        if "://" not in value:
            value = "http://" + value  # as OLLAMA_HOST is often written
        if urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname:
            raise ValueError("must be an http:// or https:// URL")
        return value.rstrip("/")

    @field_validator("tracing")
    @classmethod
    def _tracing_installed(cls, value: bool) -> bool:
        if value and not (find_spec("opentelemetry") and find_spec("opentelemetry.sdk")):
            raise ValueError("needs OpenTelemetry: pip install 'sluicegate[otel]'")
        return value

    @cached_property
    def metrics_directory(self) -> Path:
        """Where the processes of this host keep their figures."""
        return self.data_dir / "metrics"

    @cached_property
    def effective_database_url(self) -> str:
        """The SQLAlchemy URL in force."""
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'sluicegate.db'}"

    @cached_property
    def effective_redis_url(self) -> str:
        """The Redis URL in force.

        Raises:
            ConfigurationError: none is set and no `sluicegate up` has written one.
        """
        if not self.redis_url:
            raise ConfigurationError(
                "REDIS_URL is not set and no embedded Valkey runs: set it, or start `sluicegate up`"
            )
        return self.redis_url

    @property
    def broker_configured(self) -> bool:
        """Whether there is a broker to speak to."""
        return bool(self.celery_broker_url or self.redis_url)

    @cached_property
    def effective_broker_url(self) -> str:
        """The broker's URL as Celery spells it: it does not know `unix://`."""
        url = self.celery_broker_url or self.effective_redis_url
        return "redis+socket://" + url.removeprefix("unix://") if url.startswith("unix://") else url

    @cached_property
    def effective_public_url(self) -> str:
        """Where a person finds the page."""
        if self.public_url:
            return self.public_url.rstrip("/")
        host = "127.0.0.1" if self.host in _EVERY_ADDRESS else self.host
        return f"http://{host}:{self.port}"

    def goes_on_elsewhere(self, model: str) -> bool:
        """Whether another worker goes on with this model's answers where theirs is lost, or stops."""
        patterns = (one.strip() for one in self.on_worker_lost_keep_models.split(","))
        return self.on_worker_lost == "continue" and not any(fnmatchcase(model, one) for one in patterns)

    def masked(self) -> dict[str, Any]:
        """Field name to effective value, with passwords and keys replaced by `***`."""
        values = self.model_dump(mode="json")
        for name in ("secret_key", "flower_basic_auth"):
            values[name] = "***" if values[name] else ""
        for name in ("database_url", "redis_url", "celery_broker_url", "ollama_base_url", "flower_url"):
            values[name] = mask_url(values[name])
        values["database_url"] = mask_url(self.effective_database_url)
        return values

    @classmethod
    def variable_of(cls, field: str) -> str:
        """The environment variable that sets a field."""
        alias = cls.model_fields[field].validation_alias
        return str(alias.choices[0]) if isinstance(alias, AliasChoices) else f"SLUICEGATE_{field.upper()}"


def mask_url(url: str) -> str:
    """The URL without its password; also without `password=` in its query."""
    parts = urlsplit(url)
    if parts.password:
        url = url.replace(f":{parts.password}@", ":***@", 1)
    return re.sub(r"(password=)[^&]*", r"\1***", url)


def load_settings(**overrides: Any) -> Settings:
    """Read the settings from their sources; `overrides` win over all of them.

    Raises:
        ConfigurationError: a value is not acceptable; names the variable and what is wrong.
    """
    try:
        data_dir = Path(overrides.get("data_dir") or _DataDirectory().data_dir)
        files = (data_dir / EMBEDDED_ENV_FILE, Path(".env"))
        return Settings(_env_file=files, **overrides)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "settings"
        variable = Settings.variable_of(field) if field in Settings.model_fields else field
        raise ConfigurationError(
            f"{variable}: {first['msg'].removeprefix('Value error, ')} (got {first.get('input')!r})"
        ) from None
