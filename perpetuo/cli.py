"""The operator's commands. Each says in a sentence what it did; exit status 1 says what is wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import click
from flask import Flask, current_app
from flask.cli import with_appcontext

from perpetuo import accounts, checks, made_secrets
from perpetuo.errors import GatewayError
from perpetuo.gateway import audit, retention
from perpetuo.gateway.rekey import rekey
from perpetuo.gateway.reprice import reprice
from perpetuo.gateway.walk import Gateway


def init_app(app: Flask) -> None:
    """Adds the commands to `flask --app wsgi`."""
    for command in (print_secrets, user, doctor, rekey_secrets, sweep, prune, audit_books):
        app.cli.add_command(command)


def app_for_secrets() -> Flask:
    """What `flask secrets` runs on: there may be no settings yet, and none shall be made."""
    app = Flask(__name__)
    app.cli.add_command(print_secrets)
    return app


def _told(command: Callable[..., Any]) -> Callable[..., Any]:
    """An error of ours is told as a sentence, not as a traceback; the process's threads end."""

    @wraps(command)
    def tell(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except GatewayError as error:
            _fail(error.message)
        finally:
            _gateway().close()

    return with_appcontext(tell)


@click.command("secrets")
def print_secrets() -> None:
    """Print a fresh SECRET_KEY and ENCRYPTION_KEYS for .env."""
    for name, value in made_secrets.fresh().items():
        click.echo(f"{name}={value}")


@click.group()
def user() -> None:
    """Add a user, or set a forgotten password."""


@user.command("add")
@click.argument("email")
@click.option("--name", help="The person's name.")
@click.password_option(help="Asked for where it is not given.")
@_told
def user_add(email: str, name: str | None, password: str) -> None:
    """Make an account with its first workspace, whatever PERPETUO_SIGNUP says."""
    made, workspace = accounts.create_user(_gateway().database, email, password, name)
    click.echo(f"{made.email} can sign in; the first workspace is {workspace.id}.")


@user.command("password")
@click.argument("email")
@click.password_option(help="Asked for where it is not given.")
@_told
def user_password(email: str, password: str) -> None:
    """Set a new password; every session and token of the user ends."""
    changed = accounts.reset_password(_gateway().database, email, password)
    click.echo(f"{changed.email} has a new password and is signed out everywhere.")


@click.command("doctor")
@_told
def doctor() -> None:
    """Check the installation: database, schema, encryption keys, open rows."""
    gateway = _gateway()
    faults = [checks.schema_fault(gateway.database)]
    if faults == [None]:
        faults += checks.ring_faults(gateway.database, gateway.settings)
        faults += checks.lost_keys(gateway.database, gateway.settings)
        open_rows = audit.open_rows(gateway.database)
        click.echo(f"{open_rows} calls are in flight or wait for the sweep.")
    found = [fault for fault in faults if fault]
    for fault in found:
        click.echo(fault, err=True)
    if found:
        sys.exit(1)
    kind = "SQLite" if gateway.database.is_sqlite else "PostgreSQL"
    click.echo(f"All is well: {kind} is reached and migrated, every encryption key opens what it sealed.")


@click.command("rekey")
@_told
def rekey_secrets() -> None:
    """Seal every provider key anew under the newest of ENCRYPTION_KEYS; older ones can be dropped then."""
    gateway = _gateway()
    moved, unreadable = rekey(gateway.database, gateway.ring)
    click.echo(f"{moved} provider keys are sealed anew under '{gateway.ring.newest}'.")
    for id in unreadable:
        click.echo(f"{id} cannot be opened by any key: its owner must enter it again.", err=True)
    if unreadable:
        sys.exit(1)


@click.command("sweep")
@_told
def sweep() -> None:
    """Settle what dead processes left open: both looks, with the grace between them."""
    gateway = _gateway()
    settled = gateway.sweep.look()
    time.sleep(gateway.settings.orphan_grace)
    settled += gateway.sweep.look()
    click.echo(f"{settled} calls were settled as interrupted.")


@click.command("prune")
@_told
def prune() -> None:
    """Delete the log rows that their workspace no longer keeps."""
    click.echo(f"{retention.prune(_gateway().database)} log rows were deleted.")


@click.command("audit")
@click.option("--reprice", "is_repricing", is_flag=True, help="First price what had no known price.")
@_told
def audit_books(is_repricing: bool) -> None:
    """Recompute cost and counters from the rows and print each difference; exit with 1 if there is one."""
    if is_repricing:
        click.echo(f"{reprice(_gateway().ledger)} calls that had no price have one now.")
    found = audit.differences(_gateway().database)
    for difference in found:
        click.echo(difference)
    click.echo(f"{len(found)} differences.")
    if found:
        sys.exit(1)


def _fail(message: str) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(1)


def _gateway() -> Gateway:
    gateway: Gateway = current_app.extensions["perpetuo"]
    return gateway
