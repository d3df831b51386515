"""The system does what its documents say: schemathesis asks for whatever they allow, and for what they do not.

`make fuzz-http` is the same with more examples and another seed: SLUICEGATE_FUZZ_EXAMPLES for each call of a round,
rounds of SLUICEGATE_FUZZ_SECONDS for each document until SLUICEGATE_FUZZ_CASES were tried, and SLUICEGATE_FUZZ_SEED,
from which the rounds count and which schemathesis prints.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bench.stability import leftovers, sample
from tests.functional.nodes import Client, Stack
from tests.services import ROOT, clean_environment
from tests.upstream import UpstreamProcess

EXAMPLES = os.environ.get("SLUICEGATE_FUZZ_EXAMPLES", "8")
REST_SECONDS = int(os.environ.get("SLUICEGATE_FUZZ_SECONDS", "14"))
GRAPHQL_SECONDS = int(os.environ.get("SLUICEGATE_FUZZ_SECONDS", "8"))
CASES = int(os.environ.get("SLUICEGATE_FUZZ_CASES", "1"))
SEED = int(os.environ.get("SLUICEGATE_FUZZ_SEED", "7"))
GROWTH_KB = 60_000
"""Of the web processes and of the workers, first uses included, over however many cases."""
GROWTH_FILES = 50
"""Of what the web processes have open: pools fill."""
HOOKS = "tests.functional.schemathesis_hooks"
# All checks are made of REST but this one, which is in the place of `not_a_server_error` for GraphQL: to that, each
# refusal is one.
REST_CHECKS = ("--exclude-checks", "refuses_as_graphql_does")
GRAPHQL_CHECKS = ("--checks", "refuses_as_graphql_does")


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    """A model that has said everything at once, so that streams end."""
    return {"SLUICEGATE_DEFAULT_MODEL": "name=fuzz,tokens=3,pace=0"}


def run(
    client: Client,
    document: str,
    base: str,
    directory: Path,
    seconds: int,
    options: Sequence[str],
    round_number: int,
) -> int:
    """Let schemathesis try a document for so long; what it finds fails the test, in its own words.

    Returns the number of cases.
    """
    command = [str(Path(sys.executable).with_name("schemathesis"))]
    command += ["--config-file", str(ROOT / "tests/functional/schemathesis.toml")]
    command += ["run", client.base_url + document, "--url", client.base_url + base]
    command += ["--header", f"Authorization: Bearer {client.token}", "--no-color"]
    phases = (
        "fuzzing,stateful" if round_number else "examples,coverage,fuzzing,stateful"
    )  # the first two say the same again
    command += ["--phases", phases, "--max-examples", EXAMPLES]
    command += ["--max-time", str(seconds), "--seed", str(SEED + round_number), "--request-timeout", "20"]
    command += ["--continue-on-failure", "--generation-database", "none", *options]
    environment = clean_environment(PYTHONPATH=str(ROOT), SCHEMATHESIS_HOOKS=HOOKS)
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * seconds + 60,
    )
    print(done.stdout)  # what was left out, and what could not be reached, is said there
    assert done.returncode == 0, done.stdout
    tried = re.search(r"(\d[\d,]*) generated, ", done.stdout)
    return int(tried[1].replace(",", "")) if tried else 0  # a busy machine may not come to it in one round


def run_rounds(
    stack: Stack,
    upstream: UpstreamProcess,
    document: str,
    base: str,
    directory: Path,
    seconds: int,
    options: Sequence[str],
) -> None:
    """Round after round, until so many cases were tried as was asked for; then nothing must be left of them."""
    client, before = stack.client(), sample(stack)
    tried = rounds = 0
    while tried < CASES:
        tried += run(client, document, base, directory, seconds, options, rounds)
        rounds += 1
    print(f"{document}: {tried} cases in {rounds} rounds, from seed {SEED}")
    left = leftovers(stack, upstream)
    assert left == dict.fromkeys(left, 0)
    after = sample(stack)
    print(f"before {before}, after {after}")
    assert after.web_kb - before.web_kb < GROWTH_KB
    assert after.worker_kb - before.worker_kb < GROWTH_KB
    assert after.web_files - before.web_files < GROWTH_FILES
    assert client.request("GET", "/readyz").status_code == 200


LONG_SECONDS = 6 * 3600 if CASES > 1 else 180


@pytest.mark.timeout(2 * REST_SECONDS + LONG_SECONDS)
def test_rest_does_what_its_document_says(stack: Stack, upstream: UpstreamProcess, tmp_path: Path) -> None:
    run_rounds(stack, upstream, "/openapi.json", "", tmp_path, REST_SECONDS, REST_CHECKS)


@pytest.mark.timeout(2 * GRAPHQL_SECONDS + LONG_SECONDS)
def test_graphql_does_what_its_schema_says(stack: Stack, upstream: UpstreamProcess, tmp_path: Path) -> None:
    run_rounds(stack, upstream, "/graphql", "/graphql", tmp_path, GRAPHQL_SECONDS, GRAPHQL_CHECKS)
