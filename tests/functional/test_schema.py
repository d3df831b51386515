"""The system does what its documents say: schemathesis asks for whatever they allow, and for what they do not.

`make fuzz` is the same with more examples and another seed: SLUICEGATE_FUZZ_EXAMPLES for each call,
SLUICEGATE_FUZZ_SECONDS for each document, and SLUICEGATE_FUZZ_SEED, which schemathesis prints.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.functional.nodes import Client, Stack
from tests.services import ROOT, clean_environment

EXAMPLES = os.environ.get("SLUICEGATE_FUZZ_EXAMPLES", "8")
REST_SECONDS = int(os.environ.get("SLUICEGATE_FUZZ_SECONDS", "28"))
GRAPHQL_SECONDS = int(os.environ.get("SLUICEGATE_FUZZ_SECONDS", "14"))
SEED = os.environ.get("SLUICEGATE_FUZZ_SEED", "7")
HOOKS = "tests.functional.schemathesis_hooks"
# All checks are made of REST but this one, which is in the place of `not_a_server_error` for GraphQL: to that, each
# refusal is one.
REST_CHECKS = ("--exclude-checks", "refuses_as_graphql_does")
GRAPHQL_CHECKS = ("--checks", "refuses_as_graphql_does")


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    """A model that has said everything at once, so that streams end."""
    return {"SLUICEGATE_DEFAULT_MODEL": "name=fuzz,tokens=3,pace=0"}


def run(client: Client, document: str, base: str, directory: Path, seconds: int, options: Sequence[str] = ()) -> None:
    """Let schemathesis try a document for so long; what it finds fails the test, in its own words."""
    command = [str(Path(sys.executable).with_name("schemathesis"))]
    command += ["--config-file", str(ROOT / "tests/functional/schemathesis.toml")]
    command += ["run", client.base_url + document, "--url", client.base_url + base]
    command += ["--header", f"Authorization: Bearer {client.token}", "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing,stateful", "--max-examples", EXAMPLES]
    command += ["--max-time", str(seconds), "--seed", SEED, "--request-timeout", "20"]
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


@pytest.mark.timeout(2 * REST_SECONDS + 120)
def test_rest_does_what_its_document_says(stack: Stack, client: Client, tmp_path: Path) -> None:
    run(client, "/openapi.json", "", tmp_path, REST_SECONDS, REST_CHECKS)


@pytest.mark.timeout(2 * GRAPHQL_SECONDS + 120)
def test_graphql_does_what_its_schema_says(stack: Stack, client: Client, tmp_path: Path) -> None:
    run(client, "/graphql", "/graphql", tmp_path, GRAPHQL_SECONDS, GRAPHQL_CHECKS)
