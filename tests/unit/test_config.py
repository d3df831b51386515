"""Settings: where they come from, which source wins, what is refused, and what is never shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from webapp.config import EMBEDDED_ENV_FILE, OLLAMA_DEFAULT_URL, Settings, load_settings, mask_url
from webapp.errors import ConfigurationError


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of ours is set, and no file of settings lies in the working directory."""
    for name in Settings.model_fields:
        monkeypatch.delenv(Settings.variable_of(name), raising=False)
    monkeypatch.chdir(tmp_path)


class TestSources:
    def test_the_defaults_are_those_of_the_contract(self) -> None:
        settings = load_settings()
        assert settings.ollama_base_url == OLLAMA_DEFAULT_URL
        assert settings.port == 8000
        assert settings.data_dir == Path("var")
        assert settings.worker_concurrency == 200
        assert settings.max_active_streams_per_user == 20
        assert settings.rate_limit == "120/minute"
        assert settings.lease_seconds == 10
        assert settings.on_worker_lost == "continue"
        assert settings.drain_seconds == 30
        timeouts = (
            settings.queue_timeout_seconds,
            settings.first_token_timeout_seconds,
            settings.idle_timeout_seconds,
            settings.max_duration_seconds,
            settings.abandon_grace_seconds,
        )
        assert timeouts == (600, 300, 120, 3600, 30)

    def test_every_field_says_what_it_means(self) -> None:
        assert [name for name, field in Settings.model_fields.items() if not field.description] == []

    def test_the_environment_wins_over_the_file_and_the_file_over_what_up_wrote(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "var").mkdir()
        (tmp_path / "var" / EMBEDDED_ENV_FILE).write_text(
            "REDIS_URL=redis://embedded\nOLLAMA_BASE_URL=http://embedded\nPORT=1\n"
        )
        (tmp_path / ".env").write_text("OLLAMA_BASE_URL=http://file\nPORT=2\n")
        monkeypatch.setenv("PORT", "3")
        settings = load_settings()
        found = (settings.redis_url, settings.ollama_base_url, settings.port)
        assert found == ("redis://embedded", "http://file", 3)

    def test_what_up_wrote_is_found_in_another_data_directory(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        other = tmp_path / "elsewhere"
        other.mkdir()
        (other / EMBEDDED_ENV_FILE).write_text("REDIS_URL=redis://there\n")
        monkeypatch.setenv("SLUICEGATE_DATA_DIR", str(other))
        assert load_settings().redis_url == "redis://there"

    def test_they_cannot_be_changed(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            load_settings().port = 1  # type: ignore[misc]


class TestEffectiveValues:
    @pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
    def test_a_postgresql_url_gets_the_driver_that_is_installed(
        self, monkeypatch: pytest.MonkeyPatch, scheme: str
    ) -> None:
        monkeypatch.setenv("DATABASE_URL", f"{scheme}://u:p@h/d")
        assert load_settings().effective_database_url == "postgresql+psycopg://u:p@h/d"

    def test_without_a_database_url_there_is_a_file_in_the_data_directory(self, tmp_path: Path) -> None:
        assert load_settings().effective_database_url == f"sqlite:///{tmp_path / 'var' / 'sluicegate.db'}"

    def test_without_redis_the_error_says_what_to_do(self) -> None:
        with pytest.raises(ConfigurationError, match="sluicegate up"):
            _ = load_settings().effective_redis_url

    @pytest.mark.parametrize(
        ("redis_url", "broker_url", "expected"),
        [
            ("redis://h/1", "", "redis://h/1"),
            ("redis://h/1", "amqp://b//", "amqp://b//"),
            ("unix:///run/valkey.sock", "", "redis+socket:///run/valkey.sock"),
        ],
    )
    def test_the_broker_is_redis_unless_it_is_named(
        self, monkeypatch: pytest.MonkeyPatch, redis_url: str, broker_url: str, expected: str
    ) -> None:
        monkeypatch.setenv("REDIS_URL", redis_url)
        monkeypatch.setenv("CELERY_BROKER_URL", broker_url)
        assert load_settings().effective_broker_url == expected

    @pytest.mark.parametrize(
        ("given", "expected"),
        [("", OLLAMA_DEFAULT_URL), ("gpu:11434", "http://gpu:11434"), ("https://gpu/ollama/", "https://gpu/ollama")],
    )
    def test_the_upstream_url_is_read_as_people_write_it(
        self, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
    ) -> None:
        monkeypatch.setenv("OLLAMA_BASE_URL", given)
        assert load_settings().ollama_base_url == expected


class TestRefusals:
    @pytest.mark.parametrize(
        ("variable", "value"),
        [
            ("PORT", "many"),
            ("PORT", "70000"),
            ("REDIS_URL", "http://h"),
            ("OLLAMA_BASE_URL", "ftp://h"),
            ("SLUICEGATE_FLOWER_URL", "h:5555"),
            ("SLUICEGATE_FLOWER_URL", "javascript:alert(1)"),
            ("SLUICEGATE_WORKER_CONCURRENCY", "0"),
            ("SLUICEGATE_ON_WORKER_LOST", "panic"),
        ],
    )
    def test_a_bad_value_is_one_line_that_names_its_variable(
        self, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
    ) -> None:
        monkeypatch.setenv(variable, value)
        with pytest.raises(ConfigurationError) as caught:
            load_settings()
        assert caught.value.detail.startswith(f"{variable}: ")
        assert "\n" not in caught.value.detail


class TestMasking:
    SECRETS: tuple[tuple[str, str], ...] = (
        ("DATABASE_URL", "postgresql://u:hush@h/d"),
        ("REDIS_URL", "redis://:hush@h/0"),
        ("CELERY_BROKER_URL", "amqp://u:hush@h//"),
        ("OLLAMA_BASE_URL", "https://u:hush@h"),
        ("SLUICEGATE_SECRET_KEY", "hush"),
        ("SLUICEGATE_FLOWER_BASIC_AUTH", "u:hush"),
        ("SLUICEGATE_FLOWER_URL", "https://u:hush@h"),
    )

    def test_no_secret_is_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable, value in self.SECRETS:
            monkeypatch.setenv(variable, value)
        shown: dict[str, Any] = load_settings().masked()
        assert "hush" not in str(shown)
        assert shown["redis_url"] == "redis://:***@h/0"

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("redis://h/0", "redis://h/0"),
            ("redis://:p%40@h/0", "redis://:***@h/0"),
            ("redis://h/0?password=p", "redis://h/0?password=***"),
            ("sqlite:////var/x.db", "sqlite:////var/x.db"),
            ("", ""),
        ],
    )
    def test_only_the_password_is_masked(self, url: str, expected: str) -> None:
        assert mask_url(url) == expected
