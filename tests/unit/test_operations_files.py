"""The dashboard and the alerts in `docs/operations` ask for what the code exports, and for nothing else."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from tests.figures import Figures
from tests.services import ROOT
from tests.unit.test_docs import anchors
from webapp import metrics
from webapp.metrics import Exposition, Timings
from webapp.streams.lifecycle import StreamPhase, StreamStatus, TerminationReason
from webapp.streams.recovery import Reaper
from webapp.streams.retention import Retention

OPERATIONS = ROOT / "docs" / "operations"
DASHBOARD_PATH = OPERATIONS / "grafana-dashboard.json"
RULES_PATH = OPERATIONS / "prometheus-alerts.yml"
RULE_TESTS_PATH = OPERATIONS / "prometheus-alerts.test.yml"

COLUMNS = 24
OF_THE_INSTALLATION = {"sluicegate_active_streams", "sluicegate_queued_streams"}
"""Every host tells the same of these: they are not to be added up."""
PROMETHEUS_OWN = {"up"}
"""What Prometheus itself records of a target."""
SCRAPED_WITH = {"job", "instance"}
WORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "offset", "bool"}


# -- what the code exports ---------------------------------------------------------------------------


def steps() -> set[str]:
    """What the reaper counts, under the names that it counts it by: the literal keys in its code."""
    found: set[str] = set()
    for method in (Reaper.reap, Retention.sweep):
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
            keys = node.keys if isinstance(node, ast.Dict) else [node.slice] if isinstance(node, ast.Subscript) else []
            found.update(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
    return found


@dataclass(frozen=True)
class Exported:
    """What `/metrics` tells."""

    families: dict[str, Metric]
    """By the name that is documented: a counter's has its `_total`."""
    labels: dict[str, set[str]]
    """Of each name that a sample may have."""
    values: dict[tuple[str, str], set[str]]
    """Of each name and label."""

    @classmethod
    def by_the_code(cls) -> Exported:
        """Everything is counted once, and then asked for."""
        for reason in TerminationReason:
            for phase in StreamPhase:
                timings = Timings(0.0, 0.0, 0.0)
                metrics.stream_ended(
                    status=reason.status, reason=reason, phase=phase, partial_length=0, timings=timings
                )
        metrics.tokens_counted({"prompt_eval_count": 1, "eval_count": 1})
        metrics.reaped(dict.fromkeys(steps(), 1), 0.0)
        text = Exposition(lambda: (0, 0)).render("")[0].decode()
        families = Figures.parse(text).families.values()
        labels: dict[str, set[str]] = {}
        values: dict[tuple[str, str], set[str]] = {}
        for sample in (sample for family in families for sample in family.samples):
            labels.setdefault(sample.name, set()).update(sample.labels)
            for label, value in sample.labels.items():
                values.setdefault((sample.name, label), set()).add(value)
        named = {f"{family.name}_total" if family.type == "counter" else family.name: family for family in families}
        return cls(named, labels, values)

    def family(self, name: str) -> str:
        """The documented name of what has samples of this name."""
        return name if name in self.families else name.rpartition("_")[0]

    def rises(self, name: str) -> bool:
        """Whether it only rises, as counters and all samples of a histogram do."""
        return self.families[self.family(name)].type in ("counter", "histogram")


@pytest.fixture(scope="module")
def exported() -> Exported:
    return Exported.by_the_code()


# -- what is asked for -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expression:
    """An expression of PromQL, and where it stands. Read by patterns; that it is well-formed promtool says."""

    where: str
    text: str
    legend: str = ""

    @property
    def _bare(self) -> str:
        """Without selectors, durations and what stands in parentheses behind `by` and its like: names are left."""
        bare = re.sub(r"\{[^}]*\}", "", re.sub(r"\[[^\]]*\]", "", self.text))
        return re.sub(r"\b(?:by|without|on|ignoring)\s*\([^)]*\)", " ", bare)

    @property
    def names(self) -> set[str]:
        """The metrics: all words that are neither functions, nor PromQL's own, nor durations."""
        return set(re.findall(r"(?<![\w.$])[a-zA-Z_]\w*\b(?!\s*\()", self._bare)) - WORDS

    @property
    def selectors(self) -> list[tuple[str, str, str]]:
        """Metric, label and value of each matcher."""
        return [
            (name, label, value)
            for name, inside in re.findall(r"(\w+)\{([^}]*)\}", self.text)
            for label, value in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', inside)
        ]

    @property
    def grouped_by(self) -> set[str]:
        """The labels behind every `by` and `on`."""
        lists = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", self.text)
        return {label.strip() for labels in lists for label in labels.split(",") if label.strip()}

    def inside(self, function: str) -> Iterator[str]:
        """What stands in the parentheses of each call of a function or aggregation."""
        for call in re.finditer(rf"\b{function}\b(?:\s*by\s*\([^)]*\))?\s*\(", self.text):
            depth = 1
            for at in range(call.end(), len(self.text)):
                depth += {"(": 1, ")": -1}.get(self.text[at], 0)
                if not depth:
                    yield self.text[call.end() : at]
                    break

    def names_inside(self, *functions: str) -> set[str]:
        """The metrics in the parentheses of these."""
        return {name for function in functions for inside in self.inside(function) for name in names_in(inside)}


def names_in(text: str) -> set[str]:
    """The metrics in a piece of an expression."""
    return Expression("", text).names


DASHBOARD: dict[str, Any] = json.loads(DASHBOARD_PATH.read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES_PATH.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
]
RULE_TESTS: list[dict[str, Any]] = yaml.safe_load(RULE_TESTS_PATH.read_text(encoding="utf-8"))["tests"]
OF_PANELS = [
    Expression(f"{panel['title']} {target['refId']}", target["expr"], target["legendFormat"])
    for panel in PANELS
    for target in panel["targets"]
]
OF_RULES = [Expression(rule["alert"], rule["expr"]) for rule in RULES]
SERIES = [
    Expression(f"test: {test['name']}", series["series"]) for test in RULE_TESTS for series in test["input_series"]
]
ASKED = OF_PANELS + OF_RULES
ALL = ASKED + SERIES


class TestExpressions:
    """Each of them by name: what is wrong with it stands in the list that should be empty."""

    def test_names_are_exported(self, exported: Exported) -> None:
        known = exported.labels.keys() | PROMETHEUS_OWN
        assert [(one.where, one.names - known) for one in ALL if not one.names or one.names - known] == []

    def test_labels_and_their_values_are_exported(self, exported: Exported) -> None:
        asked = {(one.where, *selector) for one in ALL for selector in one.selectors if selector[1] not in SCRAPED_WITH}
        assert asked
        assert [one for one in asked if one[3] not in exported.values.get(one[1:3], ())] == []

    def test_values_are_those_of_the_code(self, exported: Exported) -> None:
        """Of what is compared with above: that it is neither empty nor made up."""
        ended = "sluicegate_streams_ended_total"
        assert exported.values[ended, "status"] == set(StreamStatus) - {StreamStatus.ACTIVE}
        assert exported.values[ended, "reason"] == set(TerminationReason)
        assert exported.values[ended, "phase"] == set(StreamPhase)
        told = exported.values["sluicegate_reaper_handled_total", "step"]
        assert {"lost", "due", "abandoned", "unclaimed", "unpublished", "old_sessions"} <= told

    def test_labels_that_are_grouped_by_are_exported(self, exported: Exported) -> None:
        def told(expression: Expression) -> set[str]:
            return set().union(*(exported.labels.get(name, ()) for name in expression.names)) | SCRAPED_WITH

        assert [(one.where, one.grouped_by - told(one)) for one in ALL if one.grouped_by - told(one)] == []

    def test_quantiles_are_of_histograms(self, exported: Exported) -> None:
        for one in ASKED:
            quantiles = [inside.partition(",") for inside in one.inside("histogram_quantile")]
            for quantile, _, of in quantiles:
                (name,) = names_in(of)
                assert exported.families[exported.family(name)].type == "histogram", one.where
                assert of.strip().startswith(f"sum by (le) (rate({name}["), one.where
                assert name.endswith("_bucket"), one.where
                assert one.legend.endswith(f"p{round(float(quantile) * 100)}") or not one.legend, one.where
            assert one.text.count("_bucket") == len(quantiles), one.where

    def test_what_rises_is_asked_for_its_rate_and_nothing_else_is(self, exported: Exported) -> None:
        for one in ASKED:
            ours = one.names - PROMETHEUS_OWN
            assert ours & one.names_inside("rate", "increase") == {name for name in ours if exported.rises(name)}, (
                one.where
            )
            assert not any(exported.rises(name) for name in one.names_inside("deriv")), one.where

    def test_hosts_are_added_up_but_not_where_each_tells_of_all(self) -> None:
        for one in ASKED:
            added = one.names_inside("sum")
            assert added & OF_THE_INSTALLATION == set(), one.where
            assert one.names & OF_THE_INSTALLATION <= one.names_inside("max", "absent"), one.where
            assert one.names - OF_THE_INSTALLATION - PROMETHEUS_OWN <= added, one.where

    def test_the_job_is_that_of_the_documented_scrape(self) -> None:
        text = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
        jobs = {value for one in ALL for _, label, value in one.selectors if label == "job"}
        assert jobs == set(re.findall(r"job_name: (\w+)", text))


class TestDashboard:
    def test_every_figure_is_shown(self, exported: Exported) -> None:
        shown = {exported.family(name) for expression in OF_PANELS for name in expression.names}
        assert exported.families.keys() - shown == set()

    def test_legends_name_labels_that_are_left(self) -> None:
        for one in OF_PANELS:
            assert one.legend, one.where
            assert set(re.findall(r"\{\{(\w+)\}\}", one.legend)) == one.grouped_by - {"le"}, one.where

    def test_rates_fit_the_scrape_interval(self) -> None:
        assert {span for one in OF_PANELS for span in re.findall(r"\[([^\]]*)\]", one.text)} == {"$__rate_interval"}

    def test_a_panel_says_what_it_shows(self) -> None:
        for panel in PANELS:
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources), panel["title"]
            letters = [target["refId"] for target in panel["targets"]]
            assert letters == list("ABCDEF")[: len(letters)], panel["title"]

    def test_alerts_that_panels_name_are_there(self) -> None:
        named = {name for panel in PANELS for name in re.findall(r"alert (\w+)", panel["description"])}
        assert named
        assert named <= {rule["alert"] for rule in RULES}

    def test_panels_lie_beside_each_other(self) -> None:
        taken: dict[tuple[int, int], str] = {}
        for panel in DASHBOARD["panels"]:
            place = panel["gridPos"]
            assert place["x"] >= 0
            assert place["w"] > 0
            assert place["h"] > 0
            assert place["x"] + place["w"] <= COLUMNS, panel["title"]
            for cell in cells(place):
                assert taken.setdefault(cell, panel["title"]) == panel["title"]
        assert len({panel["title"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
        assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])

    def test_rows(self) -> None:
        rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
        assert rows == ["Now", "Stops", "Generation", "Inside"]

    def test_it_can_be_imported(self) -> None:
        """What the dialog asks for is what the panels use, and no other installation's ids are in it."""
        (asked,) = DASHBOARD["__inputs"]
        assert (asked["name"], asked["type"], asked["pluginId"]) == ("DS_PROMETHEUS", "datasource", "prometheus")
        (variable,) = DASHBOARD["templating"]["list"]
        assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
        assert variable["current"]["value"] == "${DS_PROMETHEUS}"
        assert (DASHBOARD["uid"], DASHBOARD["title"], DASHBOARD["id"]) == ("sluicegate", "Sluicegate", None)
        used = {panel["type"] for panel in PANELS}
        assert used == {one["id"] for one in DASHBOARD["__requires"] if one["type"] == "panel"}

    def test_its_keys_are_sorted(self) -> None:
        """So that two versions of it can be compared, whoever saved them."""
        written = json.dumps(DASHBOARD, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        assert DASHBOARD_PATH.read_text(encoding="utf-8") == written


def cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y


class TestRules:
    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
    def test_an_alert_says_what_it_means_and_where_to_look(self, rule: dict[str, Any]) -> None:
        assert rule["labels"]["severity"] in ("critical", "warning")
        notes = rule["annotations"]
        assert notes.keys() == {"summary", "description"}
        assert " First: " in notes["description"]
        links = re.findall(r"(docs/[\w.]+)#([\w-]+)", notes["description"])
        assert links
        assert [link for link in links if link[1] not in anchors(ROOT / link[0])] == []

    def test_what_waits_for_nothing_looks_back_itself(self) -> None:
        """Without `for`, an alert is one scrape's word."""
        at_once = [rule["expr"] for rule in RULES if "for" not in rule]
        assert [expression for expression in at_once if "increase(" not in expression] == []

    def test_each_is_explained_with_its_severity(self) -> None:
        text = (OPERATIONS / "README.md").read_text(encoding="utf-8")
        explained = re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE)
        assert explained == [(rule["alert"], rule["labels"]["severity"]) for rule in RULES]

    def test_each_is_seen_to_fire_and_to_be_silent(self) -> None:
        seen = [sample["labels"] for case in self.cases() for sample in case["exp_samples"]]
        fired = {name for labels in seen for name in re.findall(r'alertname="(\w+)"', labels)}
        assert fired == {rule["alert"] for rule in RULES}
        assert any(not case["exp_samples"] for case in self.cases())

    @staticmethod
    def cases() -> Iterator[dict[str, Any]]:
        for test in RULE_TESTS:
            yield from test["promql_expr_test"]


class TestPromtool:
    """By Prometheus itself: that what is written is PromQL, and that alerts fire when they should."""

    @pytest.fixture(autouse=True)
    def _promtool(self) -> None:
        if shutil.which("promtool") is None:
            pytest.skip("promtool is not on the PATH; on Debian it is in the package prometheus")

    def test_the_rules_are_rules(self) -> None:
        assert f"SUCCESS: {len(RULES)} rules found" in promtool("check", "rules", "--lint-fatal", str(RULES_PATH))

    def test_the_rules_do_what_they_should(self) -> None:
        assert "SUCCESS" in promtool("test", "rules", str(RULE_TESTS_PATH))

    def test_the_panels_ask_in_promql(self, tmp_path: Path) -> None:
        rules = [
            {"record": f"panel:{number}", "expr": expression.text.replace("$__rate_interval", "1m")}
            for number, expression in enumerate(OF_PANELS)
        ]
        path = tmp_path / "panels.yml"
        path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
        assert f"SUCCESS: {len(rules)} rules found" in promtool("check", "rules", str(path))


def promtool(*arguments: str) -> str:
    """Run it; returns what it says. Fails where it does."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
