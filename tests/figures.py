"""What Prometheus would read: the text of a scrape as figures that can be asked for and compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import requests
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Figures:
    """One scrape."""

    families: dict[str, Metric]

    @classmethod
    def parse(cls, text: str) -> Figures:
        """Read the text format, strictly."""
        return cls({family.name: family for family in text_string_to_metric_families(text)})

    @classmethod
    def scrape(cls, base_url: str, timeout_seconds: float = 10) -> Figures:
        """GET /metrics."""
        response = requests.get(f"{base_url}/metrics", timeout=timeout_seconds, proxies={"http": ""})
        assert response.status_code == 200, response.text
        return cls.parse(response.text)

    def sum(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name (with `_total`, `_count`, …) that have these labels; 0: there is none."""
        return sum(value for value, found in self._samples(name) if labels.items() <= found.items())

    def has(self, name: str) -> bool:
        """Whether there is any sample of that name."""
        return any(True for _ in self._samples(name))

    def _samples(self, name: str) -> Iterator[tuple[float, dict[str, str]]]:
        for family in self.families.values():
            yield from ((sample.value, sample.labels) for sample in family.samples if sample.name == name)


@dataclass(frozen=True)
class Moved:
    """How far figures have moved from one scrape to another."""

    before: Figures
    after: Figures

    def by(self, name: str, **labels: str) -> float:
        """The difference of the sums."""
        return self.after.sum(name, **labels) - self.before.sum(name, **labels)
