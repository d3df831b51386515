"""`sluicegate config`: the settings in force."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from webapp.config import Settings


@click.command(short_help="Print the settings in force.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def config(as_json: bool) -> None:
    """Print the effective settings, with secrets masked.

    \b
    Example:
      sluicegate config --json | jq '.[] | select(.source != "default")'
    """
    from webapp.cli.output import print_json, print_table
    from webapp.config import Settings, load_settings

    settings = load_settings()
    sources = _sources(settings)
    listed = [
        {
            "variable": Settings.variable_of(name),
            "value": value,
            "source": sources.get(name, "default"),
            "meaning": Settings.model_fields[name].description,
        }
        for name, value in settings.masked().items()
    ]
    if as_json:
        print_json(listed)
    else:
        print_table(("Variable", "Value", "From", "Meaning"), [tuple(item.values()) for item in listed])


def _sources(settings: Settings) -> dict[str, str]:
    """Field name to where its value comes from, of those that are set anywhere."""
    from webapp.config import EMBEDDED_ENV_FILE
    from webapp.embedded.runtime import read_environment

    embedded = settings.data_dir / EMBEDDED_ENV_FILE
    layers = (  # the last wins
        (str(embedded), read_environment(embedded)),
        (".env", read_environment(Path(".env"))),
        ("environment", os.environ),
    )
    found = {}
    for name in settings.model_fields_set:
        variable = settings.variable_of(name)
        for label, values in layers:
            if variable in values:
                found[name] = label
    return found
