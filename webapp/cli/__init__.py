"""The command line: `sluicegate`.

Modules of this package import what is heavy inside their functions, so that `--help` is quick.
Every failure is one line on standard error and a non-zero exit code; `--debug` adds the traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from webapp.cli.database import migrate, retain
from webapp.cli.doctor import doctor
from webapp.cli.flower import flower
from webapp.cli.settings import config
from webapp.cli.streams import streams
from webapp.cli.up import up
from webapp.cli.users import users

DEBUG_VARIABLE = "SLUICEGATE_DEBUG"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help=f"Show the traceback of a failure (also {DEBUG_VARIABLE}=1).")
@click.version_option(package_name="sluicegate", prog_name="sluicegate")
def cli(debug: bool) -> None:
    """Stream language-model answers, and stop them exactly."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


for _command in (up, users, streams, doctor, config, migrate, retain, flower):
    cli.add_command(_command)


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    try:
        result = cli.main(args=list(arguments), prog_name="sluicegate", standalone_mode=False)
        sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "sluicegate"
        return _fail(f"{error.format_message()} (see `{command} --help`)", error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from webapp.cli.failures import explain

        return _fail(explain(error), 1)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    print("sluicegate: " + " ".join(message.split()), file=sys.stderr)
    return code
