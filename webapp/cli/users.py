"""`sluicegate users`: who may use the API and the page."""

from __future__ import annotations

import click


@click.group()
def users() -> None:
    """Create, list and disable users, and give them new tokens."""


@users.command(short_help="Create the user NAME and print the API token.")
@click.argument("name")
@click.option("--operator", is_flag=True, help="One who sees and stops everybody's streams, on the page /ops.")
def create(name: str, operator: bool) -> None:
    """Create the user NAME and print the API token, which is shown only now."""
    from webapp.cli.services import open_accounts

    with open_accounts() as accounts:
        token = accounts.create_user(name, operator=operator)
    click.echo(f"API token of {name}, shown only now: {token}")


@users.command()
@click.argument("name")
def rotate(name: str) -> None:
    """Print a new API token of NAME; the old one is no longer valid."""
    from webapp.cli.services import open_accounts

    with open_accounts() as accounts:
        token = accounts.rotate_token(name)
    click.echo(f"New API token of {name}, shown only now: {token}")


@users.command("sign-in")
@click.argument("name")
def sign_in(name: str) -> None:
    """Print a link with which NAME signs in to the page, once."""
    from webapp.cli.services import open_accounts
    from webapp.config import load_settings

    with open_accounts() as accounts:
        token = accounts.make_sign_in_token(name)
    click.echo(f"Sign in as {name}, once: {sign_in_url(load_settings().effective_public_url, token)}")


@users.command()
@click.argument("name")
def disable(name: str) -> None:
    """Take every access from NAME; what the user wrote stays."""
    from webapp.cli.services import open_accounts

    with open_accounts() as accounts:
        accounts.disable_user(name)
    click.echo(f"{name} is disabled")


@users.command(short_help="Make NAME an operator, who sees and stops all streams.")
@click.argument("name")
@click.option("--revoke", is_flag=True, help="Take the role away again.")
def operator(name: str, revoke: bool) -> None:
    """Make NAME an operator, who sees and stops everybody's streams on the page /ops, and reads none of them."""
    from webapp.cli.services import open_accounts

    with open_accounts() as accounts:
        accounts.set_operator(name, not revoke)
    click.echo(f"{name} is {'no longer' if revoke else 'now'} an operator")


@users.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_users(as_json: bool) -> None:
    """List all users."""
    from webapp.cli.output import print_json, print_table
    from webapp.cli.services import open_accounts

    with open_accounts() as accounts:
        found = accounts.list_users()
    if as_json:
        print_json([user.as_dict() for user in found])
        return
    print_table(
        ("Name", "Operator", "Created", "Last used", "Disabled"),
        [
            (user.name, "yes" if user.operator else "no", user.created_at, user.last_used_at, user.disabled_at)
            for user in found
        ],
    )


def sign_in_url(public_url: str, token: str) -> str:
    """The page's address at which a one-time token signs in."""
    return f"{public_url}/sign-in?token={token}"
