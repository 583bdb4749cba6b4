"""Who is at the door of the management side: host, sign-in by cookie or token, origin. `web.py` asks it.

The cookie is Flask's signed session, the token signed for the purpose `access`; both carry the user's
epoch, so that one number ends them all.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

import flask_login
from flask import Flask, Request, request, session
from flask.sessions import NullSession, SecureCookieSessionInterface

from perpetuo import accounts, crypto
from perpetuo.config import Settings
from perpetuo.db import Database
from perpetuo.errors import Forbidden, InvalidRequest
from perpetuo.models import User

TOKEN_SECONDS = 12 * 3600
SESSION_DAYS = 14
LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.ASCII)
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class SessionCookie(SecureCookieSessionInterface):
    """Flask's signed session, except under `/v1`, where cookies are ignored and cost nothing."""

    def open_session(self, app: Flask, request: Request) -> Any:
        return NullSession() if is_gateway_path(request.path) else super().open_session(app, request)


def is_gateway_path(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/")


def init_app(app: Flask, settings: Settings, database: Database) -> None:
    """Cookies and Flask-Login."""
    app.session_interface = SessionCookie()
    app.config.update(
        SESSION_COOKIE_NAME="__Host-session" if settings.is_https else "session",
        SESSION_COOKIE_SECURE=settings.is_https,
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_REFRESH_EACH_REQUEST=False,
        PERMANENT_SESSION_LIFETIME=timedelta(days=SESSION_DAYS),
        REMEMBER_COOKIE_NAME="",  # no cookie has this name: Flask-Login's own is never read
    )
    manager = flask_login.LoginManager()
    manager.session_protection = None
    manager.user_loader(lambda text: _user_of_session(database, text))
    manager.request_loader(lambda _request: _user_of_token(settings, database))
    # Not manager.init_app: it looks for its remember cookie after every answer, those of /v1 included.
    app.login_manager = manager  # type: ignore[attr-defined]
    app.context_processor(lambda: {"current_user": flask_login.current_user})


def bearer() -> str | None:
    """The token after `Authorization: Bearer`, '' for an empty one, None without that scheme."""
    scheme, _, token = request.headers.get("Authorization", "").strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _user_of_session(database: Database, text: str) -> User | None:
    if bearer() is not None:
        return None
    id, _, epoch = text.rpartition(":")
    return accounts.load_user(database, id, int(epoch)) if epoch.isdecimal() else None


def _user_of_token(settings: Settings, database: Database) -> User | None:
    token = bearer()
    if not token:
        return None
    payload = crypto.unsign(settings.secret_keys, "access", token, TOKEN_SECONDS)
    if not isinstance(payload, list) or len(payload) != 2:
        return None
    return accounts.load_user(database, payload[0], payload[1])


def access_token(settings: Settings, user: User) -> dict[str, Any]:
    """`{token, expires_at}` for a program."""
    return {
        "token": crypto.sign(settings.secret_keys, "access", [user.id, user.epoch]),
        "expires_at": datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=TOKEN_SECONDS),
    }


def sign_in(user: User) -> None:
    """Writes the cookie session, a fresh one, so that nothing set before the sign-in survives it."""
    session.clear()
    session.permanent = True
    flask_login.login_user(user)


def sign_out() -> None:
    """Clears this browser's cookie."""
    session.clear()
    session.modified = True


def check_host(settings: Settings) -> None:
    """Refuses a `Host` that is not ours (DNS rebinding, poisoned links). Raises InvalidRequest."""
    host = request.environ.get("HTTP_HOST", "").lower()
    port = _default_port(settings)
    if host.removesuffix(port) == settings.public_host.lower().removesuffix(port):
        return
    if not settings.is_production and LOCAL_HOST.fullmatch(host):
        return
    raise InvalidRequest("This host name is not PUBLIC_URL's.", code="invalid_host")


def check_origin(settings: Settings) -> None:
    """Refuses what another site makes a browser send. Raises Forbidden.

    `Sec-Fetch-Site` decides, else `Origin`; no browser sends neither.
    """
    if request.method in SAFE_METHODS:
        return
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is not None:
        allowed = site in ("same-origin", "none")
    else:
        allowed = origin is None or origin.lower() in _our_origins(settings)
    if not allowed:
        raise Forbidden("This request came from another site.", code="forbidden_origin")


def _our_origins(settings: Settings) -> set[str]:
    ours = {settings.public_url.lower().removesuffix(_default_port(settings))}
    if not settings.is_production:  # check_host has passed it
        ours.add(f"{request.scheme}://{request.environ.get('HTTP_HOST', '').lower()}")
    return ours


def _default_port(settings: Settings) -> str:
    return DEFAULT_PORTS[urlsplit(settings.public_url).scheme]


def safe_next(text: str | None) -> str:
    """A local path to go to after signing in; `/` for everything else."""
    if not text or len(text) > 2000 or not text.startswith("/"):
        return "/"
    for spelling in (text, unquote(text)):
        parts = urlsplit(spelling)
        if spelling.startswith("//") or "\\" in spelling or parts.scheme or parts.netloc:
            return "/"
        if not spelling.isprintable():
            return "/"
    return text
