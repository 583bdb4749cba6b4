"""Blueprint `auth`: sign-up, sign-in, signing out, and the account itself."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from math import ceil
from time import monotonic
from typing import Any

from flask import Blueprint, Response, current_app, redirect, request
from flask.sansio.blueprints import BlueprintSetupState
from flask.typing import ResponseReturnValue

from perpetuo import accounts, guard, schemas, web
from perpetuo.errors import RateLimited, Unauthenticated
from perpetuo.models import User, Workspace
from perpetuo.throttle import Throttle, network_of

blueprint = web.protect(Blueprint("auth", __name__, url_prefix="/auth"))

# Five mistakes are human, twenty an office behind one address.
FREE_PER_ACCOUNT, FREE_PER_NETWORK = 5, 20


@dataclass(frozen=True, slots=True)
class Throttles:
    """What one process remembers of failed sign-ins; more processes allow proportionally more."""

    accounts: Throttle
    networks: Throttle
    turn: threading.Lock


@blueprint.record
def _set_up(state: BlueprintSetupState) -> None:
    state.app.extensions["perpetuo_throttles"] = Throttles(
        Throttle(FREE_PER_ACCOUNT), Throttle(FREE_PER_NETWORK), threading.Lock()
    )


@blueprint.post("/signup")
@web.public
def signup() -> ResponseReturnValue:
    """Makes an account with its first workspace."""
    gateway = web.gateway()
    accounts.check_signup(gateway.database, gateway.settings.signup)
    form = web.read(schemas.Signup)
    user, workspace = accounts.create_user(
        gateway.database, form.email, form.password, form.name, gateway.settings.signup
    )
    return _signed_in({"user": shape_user(user), "workspace": _brief(workspace)}, user, 201)


@blueprint.post("/login")
@web.public
def login() -> ResponseReturnValue:
    """Signs in: a token for a program, the cookie for a browser."""
    form = web.read(schemas.Login)
    user = accounts.find_user(web.gateway().database, form.email)
    if not _is_password(user, form.email, form.password) or user is None:
        raise Unauthenticated("This e-mail address and password do not fit together.")
    return _signed_in({"user": shape_user(user)}, user, 200, form.next or request.args.get("next"))


@blueprint.post("/logout")
def logout() -> ResponseReturnValue:
    """Signs out everywhere."""
    accounts.sign_out(web.gateway().database, web.user().id)
    if web.face() != "json":
        guard.sign_out()
    return web.answer(None, 204, to="/auth/login")


@blueprint.get("/me")
def me() -> ResponseReturnValue:
    """The account and its workspaces."""
    workspaces = accounts.workspaces_of(web.gateway().database, web.user())
    return web.answer({"user": shape_user(web.user()), "workspaces": [_brief(one) for one in workspaces]})


@blueprint.route("/me", methods=["PATCH", "POST"])
def change_me() -> ResponseReturnValue:
    """Changes the name or, with the present one, the password."""
    changes = web.read(schemas.ChangeMe).changes()
    current = changes.pop("current_password", None)
    if "password" in changes:
        _confirm(current)
    user = accounts.change_user(web.gateway().database, web.user().id, **changes)
    if "password" not in changes:
        return web.answer({"user": shape_user(user)}, to="/auth/me")
    return _signed_in({"user": shape_user(user)}, user, 200, "/auth/me")


def _confirm(current: str | None) -> None:
    """Whoever changes the password knows the present one, or a borrowed session would be enough."""
    if not current:
        raise schemas.invalid("current_password", "The present password is needed to change it.")
    if not _is_password(web.user(), web.user().email, current):
        raise schemas.invalid("current_password", "This is not the present password.")


def _is_password(user: User | None, email: str, password: str) -> bool:
    """One guess at a password: refused during a delay, without any work; slower after each that fails.

    One at a time, as the hashes are anyway: or many at once would all be the first.
    """
    throttles: Throttles = current_app.extensions["perpetuo_throttles"]
    network = network_of(request.remote_addr)
    _refuse_hasty(throttles, email, network)
    with throttles.turn:
        _refuse_hasty(throttles, email, network)
        fits = accounts.is_password(web.gateway().database, user, password)
        if fits:
            throttles.accounts.succeed(email)
        else:
            throttles.accounts.fail(email, monotonic())
            throttles.networks.fail(network, monotonic())
    return fits


def _refuse_hasty(throttles: Throttles, email: str, network: str) -> None:
    now = monotonic()
    wait = max(throttles.accounts.wait(email, now), throttles.networks.wait(network, now))
    if wait > 0:
        message = "Too many attempts failed; try again in a moment."
        raise RateLimited(message, code="too_many_attempts", headers={"retry-after": str(ceil(wait))})


def _signed_in(body: dict[str, Any], user: User, status: int, next: str | None = None) -> ResponseReturnValue:
    """The token for a program; for a browser the cookie, and on to the page it came for."""
    if web.face() == "json":
        return web.answer(body | guard.access_token(web.gateway().settings, user), status)
    guard.sign_in(user)
    to = guard.safe_next(next)
    return Response(headers={"HX-Redirect": to}) if web.face() == "fragment" else redirect(to, 303)


def shape_user(user: User) -> dict[str, Any]:
    return {"id": user.id, "email": user.email, "name": user.name, "created_at": user.created_at}


def _brief(workspace: Workspace) -> dict[str, Any]:
    return {"id": workspace.id, "name": workspace.name, "role": "owner"}
