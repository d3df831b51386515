"""`sluicegate doctor`: is every part there that the others depend on, and if not, what to do."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from webapp.cli.terminal import StatusLine, paint

if TYPE_CHECKING:
    from webapp.config import Settings

_OLDEST_PYTHON = (3, 11)
_OLDEST_REDIS = (6, 2)
_TIMEOUT_SECONDS = 3
_CLOCK_TOLERANCE_SECONDS = 1.0
_START_IT = "start everything with `sluicegate up`, or this part with its line of the Procfile"


class Trouble(Exception):
    """A check that failed: what is wrong, and what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        self.remedy = remedy
        super().__init__(problem)


@click.command(short_help="Check every part, and say what to do.")
def doctor() -> int:
    """Check every part that Sluicegate depends on, and say what to do about what is wrong.

    Run it where the part in question runs, with the same settings. It exits with 1 where a check fails.

    \b
    Example:
      sluicegate doctor || sluicegate config
    """
    from webapp.config import load_settings

    settings = load_settings()
    failed = sum(not _passes(name, check, settings) for name, check in CHECKS)
    if failed:
        click.echo(f"sluicegate: {failed} of {len(CHECKS)} checks failed", err=True)
    return 1 if failed else 0


def _passes(name: str, check: Callable[[Settings], str], settings: Settings) -> bool:
    from webapp.cli.failures import explain

    status = StatusLine()
    status.show(f"Checking: {name}")
    try:
        finding = check(settings)
    except Trouble as trouble:
        remedy = f"\n      {paint(sys.stdout, '->', fg='yellow')} {trouble.remedy}"
        return _verdict(status, "FAIL", "red", f"{name}: {trouble}{remedy}")
    except Exception as error:
        return _verdict(status, "FAIL", "red", f"{name}: {explain(error)}")
    finally:
        status.clear()
    return _verdict(status, "ok", "green", f"{name}: {finding}")


def _verdict(status: StatusLine, word: str, colour: str, text: str) -> bool:
    """Print the outcome of a check; whether it is a good one."""
    status.clear()
    click.echo(f"{paint(sys.stdout, word, fg=colour, bold=True)}{' ' * (6 - len(word))}{text}", color=True)
    return word == "ok"


def _python(settings: Settings) -> str:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _OLDEST_PYTHON:
        raise Trouble(found, "install Python 3.11 or newer")
    return found


def _data_directory(settings: Settings) -> str:
    path = settings.data_dir.absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"probe")
            file.flush()
    except OSError as error:
        raise Trouble(f"{path}: {error.strerror}", "make it writable, or set SLUICEGATE_DATA_DIR") from None
    return str(path)


def _database(settings: Settings) -> str:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    from webapp.config import mask_url

    shown = mask_url(settings.effective_database_url)
    try:
        limit = "timeout" if settings.effective_database_url.startswith("sqlite") else "connect_timeout"
        engine = create_engine(settings.effective_database_url, connect_args={limit: _TIMEOUT_SECONDS})
        with engine.connect() as connection:
            current, newest = _revisions(connection)
    except (SQLAlchemyError, ImportError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise Trouble(f"{shown}: {reason}", "start it, or set DATABASE_URL") from None
    if current != newest:
        raise Trouble(f"{shown}: its tables are not this version's", "run `sluicegate migrate`")
    return f"{shown}, at revision {', '.join(sorted(newest))}"


def _revisions(connection: Any) -> tuple[set[str], set[str]]:
    """The database's revision, and the newest one there is."""
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from webapp.migrate import MIGRATIONS_DIRECTORY

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_DIRECTORY).replace("%", "%%"))
    newest = set(ScriptDirectory.from_config(config).get_heads())
    return set(MigrationContext.configure(connection).get_current_heads()), newest


def _redis(settings: Settings) -> str:
    info = _redis_client(settings).info()
    version = str(info["redis_version"])
    name = str(info.get("server_name", "redis"))
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_REDIS:
        raise Trouble(f"{name} {version}", "use Valkey, or Redis 6.2 or newer")
    return f"{name} {info.get('valkey_version', version)}"


def _redis_memory(settings: Settings) -> str:
    info = _redis_client(settings).info("memory")
    policy, limit = info.get("maxmemory_policy", "unknown"), int(info.get("maxmemory", 0))
    if limit and policy != "noeviction":
        raise Trouble(
            f"maxmemory-policy is {policy}, which may drop the mark that stops a stream",
            "set maxmemory-policy to noeviction in its configuration",
        )
    return f"maxmemory-policy {policy}" if limit else "no maxmemory"


def _redis_persistence(settings: Settings) -> str:
    import redis

    client = _redis_client(settings)
    if client.info("persistence").get("aof_enabled"):
        return "append-only file"
    try:
        snapshots = client.config_get("save").get("save", "")
    except redis.ResponseError:  # a managed server does not tell
        return "managed by the server's provider"
    if not snapshots:
        raise Trouble("neither append-only file nor snapshots: a restart empties it", "set appendonly to yes")
    return f"snapshots ({snapshots}); appendonly yes loses less"


def _clock(settings: Settings) -> str:
    began = time.time()
    seconds, microseconds = _redis_client(settings).time()
    apart = seconds + microseconds / 1e6 - (began + time.time()) / 2
    if abs(apart) > _CLOCK_TOLERANCE_SECONDS:
        raise Trouble(f"Redis's clock is {apart:+.1f} s from this machine's", "set the clocks of all machines by NTP")
    return f"{abs(apart) * 1000:.0f} ms from Redis's"


def _redis_client(settings: Settings) -> Any:
    import redis

    client = redis.Redis.from_url(
        settings.effective_redis_url,
        socket_timeout=_TIMEOUT_SECONDS,
        socket_connect_timeout=_TIMEOUT_SECONDS,
        decode_responses=True,
    )
    try:
        client.ping()
    except redis.RedisError as error:
        raise Trouble(str(error), "start it, or set REDIS_URL") from None
    return client


def _broker(settings: Settings) -> str:
    if not settings.broker_configured:
        raise Trouble("neither CELERY_BROKER_URL nor REDIS_URL is set", _START_IT)
    with _celery(settings).connection_for_write(connect_timeout=_TIMEOUT_SECONDS) as connection:
        try:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=_TIMEOUT_SECONDS)
        except Exception as error:  # each transport has its own
            raise Trouble(f"{connection.as_uri()}: {error}", "start it, or set CELERY_BROKER_URL") from None
        return str(connection.as_uri())


def _worker(settings: Settings) -> str:
    from webapp.queue import GENERATE_QUEUE

    return ", ".join(_nodes_of(settings, GENERATE_QUEUE))


def _reaper(settings: Settings) -> str:
    from webapp.queue import MAINTENANCE_QUEUE

    return ", ".join(_nodes_of(settings, MAINTENANCE_QUEUE))


def _beat(settings: Settings) -> str:
    """Beat itself cannot be asked: what it sends must arrive."""
    from webapp.queue import MAINTENANCE_QUEUE, REAP_INTERVAL_SECONDS

    nodes = _nodes_of(settings, MAINTENANCE_QUEUE)
    before = _reaps(settings, nodes)
    deadline = time.monotonic() + 6 * REAP_INTERVAL_SECONDS
    while time.monotonic() < deadline:
        time.sleep(REAP_INTERVAL_SECONDS / 2)
        if _reaps(settings, nodes) > before:
            return f"a pass every {REAP_INTERVAL_SECONDS:g} s"
    raise Trouble("the reaper is not given anything to do", _START_IT)


def _reaps(settings: Settings, nodes: list[str]) -> int:
    from webapp.queue import REAP_TASK

    stats = _celery(settings).control.inspect(destination=nodes, timeout=_TIMEOUT_SECONDS, limit=len(nodes)).stats()
    return sum(node["total"].get(REAP_TASK, 0) for node in (stats or {}).values())


def _nodes_of(settings: Settings, queue: str) -> list[str]:
    """The live workers that take from a queue.

    Raises:
        Trouble: there is none.
    """
    answers = _celery(settings).control.inspect(timeout=_TIMEOUT_SECONDS / 2).active_queues() or {}
    nodes = sorted(node for node, queues in answers.items() if any(item["name"] == queue for item in queues))
    if not nodes:
        raise Trouble(f"no worker answers for the queue {queue!r}", _START_IT)
    return nodes


def _celery(settings: Settings) -> Any:
    from webapp.queue import make_celery

    return make_celery(settings, set_as_current=False)


def _upstream(settings: Settings) -> str:
    url = settings.ollama_base_url
    remedy = "start Ollama, or set OLLAMA_BASE_URL"
    version = _get_json(f"{url}/api/version", remedy).get("version", "unknown")
    models = [str(model.get("name")) for model in _get_json(f"{url}/api/tags", remedy).get("models", [])]
    if not models:
        raise Trouble(f"{url} has no model", "pull one, as with `ollama pull llama3.2`")
    wanted = settings.default_model
    if wanted and wanted not in models and f"{wanted}:latest" not in models:
        raise Trouble(f"{url} does not list the model {wanted!r}", "pull it, or set SLUICEGATE_DEFAULT_MODEL")
    return f"{url}, version {version}, {len(models)} model{'s' * (len(models) != 1)}"


def _get_json(url: str, remedy: str) -> dict[str, Any]:
    import requests

    try:
        response = requests.get(url, timeout=_TIMEOUT_SECONDS)
        response.raise_for_status()
        return dict(response.json())
    except (requests.RequestException, ValueError, TypeError) as error:
        raise Trouble(f"{url}: {_reason(error)}", remedy) from None


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.HTTPError):
        return str(error)
    if isinstance(error, requests.Timeout):
        return "does not answer in time"
    return "cannot be reached" if isinstance(error, requests.ConnectionError) else f"an unexpected answer ({error})"


def _page(settings: Settings) -> str:
    from webapp.cli.up import get, reachable

    url = f"http://{reachable(settings.host)}:{settings.port}/readyz"
    status, answer = get(url, timeout_seconds=2 * _TIMEOUT_SECONDS)
    if status == 0:
        raise Trouble(f"nothing answers at {url}", _START_IT)
    if status != 200:
        raise Trouble(f"{url} answers {status}: {' '.join(answer.split())[:300]}", "see the other checks")
    return url


CHECKS: tuple[tuple[str, Callable[[Settings], str]], ...] = (
    ("Python", _python),
    ("Data directory", _data_directory),
    ("Database", _database),
    ("Redis", _redis),
    ("Redis memory", _redis_memory),
    ("Redis persistence", _redis_persistence),
    ("Clock", _clock),
    ("Broker", _broker),
    ("Worker", _worker),
    ("Reaper", _reaper),
    ("Beat", _beat),
    ("Model server", _upstream),
    ("Page", _page),
)
