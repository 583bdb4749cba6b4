"""One view, three faces: JSON for programs, a page or a fragment for people; and one shape for every error.

Every management view answers through `answer` and reads through `read`. `/v1` uses only the error handlers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast
from urllib.parse import quote, urlsplit

import flask_login
from flask import Blueprint, Flask, Response, current_app, redirect, render_template, request
from flask.typing import ResponseReturnValue
from pydantic import BaseModel
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.exceptions import NotFound as UnknownUrl
from werkzeug.routing.exceptions import RoutingException

from perpetuo import accounts, forms, guard, listing, log_lines, schemas
from perpetuo.errors import GatewayError, InvalidRequest, NotFound, Unauthenticated, Unavailable
from perpetuo.gateway.walk import Gateway
from perpetuo.models import User, Workspace, new_id
from perpetuo.wire import to_json

Face = Literal["json", "page", "fragment"]
Model = TypeVar("Model", bound=BaseModel)
View = TypeVar("View", bound=Callable[..., ResponseReturnValue])

NAME = "PERPETUO"
DESCRIPTION = "A self-hosted gateway for language models whose books are honest."
VARY = "Accept, HX-Request, Cookie, Authorization"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; object-src 'none'"
)
WRONG_URL = (UnknownUrl, MethodNotAllowed)

logger = logging.getLogger(__name__)
blueprint = Blueprint("web", __name__)


def init_app(app: Flask) -> None:
    """Cookies, sign-in, error handlers and the pages that belong to nobody. Before any other blueprint."""
    own = cast(Gateway, app.extensions["perpetuo"])
    guard.init_app(app, own.settings, own.database)
    app.url_map.strict_slashes = False  # with and without a trailing slash, and never a redirect
    app.url_map.merge_slashes = False
    app.register_error_handler(GatewayError, _error_response)
    app.register_error_handler(HTTPException, _answer_http_error)
    app.register_error_handler(Exception, _answer_bug)
    app.register_blueprint(blueprint)


def protect(blueprint: Blueprint) -> Blueprint:
    """Everything in `blueprint` needs our host, a signed-in user and our origin, unless marked `public`."""
    blueprint.before_request(_admit)
    blueprint.after_request(_dress)
    return blueprint


def public(view: View) -> View:
    """Marks a view that needs no sign-in."""
    view.is_public = True  # type: ignore[attr-defined]
    return view


def gateway() -> Gateway:
    return cast(Gateway, current_app.extensions["perpetuo"])


def user() -> User:
    """Who is signed in; only behind `protect`."""
    return cast(User, flask_login.current_user._get_current_object())


def get_workspace(workspace_id: str) -> Workspace:
    """The signed-in user's own workspace, else NotFound."""
    return accounts.get_workspace(gateway().database, user(), workspace_id)


def list_page(query: Any, model: Any) -> listing.Page[Any]:
    """The page of management records that the request's `cursor` and `limit` ask for."""
    cursor = listing.read_cursor(request.args.get("cursor"))
    limit = listing.read_limit(request.args.get("limit"))
    query = listing.ordered(query, model.created_at, model.id, cursor).limit(limit + 1)
    rows = accounts.reading(gateway().database, lambda session: session.scalars(query).all())
    return listing.page_of(rows, cursor, limit)


def face() -> Face:
    """What this request wants to see: the one place that decides it."""
    if guard.bearer() is not None:
        return "json"
    if request.headers.get("HX-Request") == "true":
        # A boosted link and a restored history want the whole page, whatever `Accept` says (htmx 2: `*/*`).
        whole = "true" in (
            request.headers.get("HX-Boosted"),
            request.headers.get("HX-History-Restore-Request"),
        )
        return "page" if whole else "fragment"
    accepted = request.accept_mimetypes
    names_html = any(name.lower() == "text/html" for name, _ in accepted)
    return "page" if names_html and accepted["text/html"] > accepted["application/json"] else "json"


def answer(
    value: Any, status: int = 200, *, template: str | None = None, to: str | None = None
) -> ResponseReturnValue:
    """The answer of every management view.

    `template` shows `value` as page or fragment, `to` is where a plain form goes after its POST. Without a
    template every face gets JSON.
    """
    shown = face()
    if shown == "page" and to is not None and request.method not in guard.SAFE_METHODS:
        return redirect(to, 303)
    if shown == "fragment" or (shown == "page" and template is not None):
        status = 200
    if template is not None and shown != "json":
        name = template if shown == "page" else template.replace("/", "/_", 1)
        return Response(render_template(name, **value), status, mimetype="text/html")
    if value is None:
        empty = Response(status=status)
        del empty.headers["Content-Type"]
        return empty
    return Response(to_json(value), status, mimetype="application/json")


def read(model: type[Model]) -> Model:
    """The body as `model`, JSON or form. Raises InvalidRequest with every problem."""
    value, is_form = forms.body()
    return schemas.parse(model, value, form=is_form)


def _admit() -> ResponseReturnValue | None:
    settings = gateway().settings
    guard.check_host(settings)
    view = current_app.view_functions[request.endpoint or ""]
    is_public = getattr(view, "is_public", False)
    if not is_public and not flask_login.current_user.is_authenticated:
        return _challenge()
    if guard.bearer() is None:
        guard.check_origin(settings)
    return None


def _challenge() -> ResponseReturnValue:
    """Asks for a sign-in in the way that the visitor understands."""
    shown = face()
    if shown == "page":
        there = request.full_path.rstrip("?") if request.method in guard.SAFE_METHODS else "/"
        return redirect(_login_url(there), 303)
    response = _error_response(Unauthenticated("Sign in, or send an access token as Bearer."))
    response.headers["WWW-Authenticate"] = "Bearer"
    if shown == "fragment":
        there = urlsplit(request.headers.get("HX-Current-URL", "")).path
        response.headers["HX-Redirect"] = _login_url(there)
    return response


def _login_url(there: str) -> str:
    there = guard.safe_next(there)
    return "/auth/login" if there == "/" else f"/auth/login?next={quote(there)}"


def _answer_http_error(error: HTTPException) -> ResponseReturnValue:
    """What Flask and Werkzeug refuse, in our shape."""
    if isinstance(error, RoutingException) or error.code is None:
        return error
    is_gateway = guard.is_gateway_path(request.path)
    if is_gateway and isinstance(error, MethodNotAllowed):
        unknown = current_app.view_functions["gateway.unknown"]  # for TRACE and all that no rule there lists
        return cast(Response, unknown(path=request.path.removeprefix("/v1").strip("/")))
    if not is_gateway and isinstance(error, WRONG_URL):
        try:
            guard.check_host(gateway().settings)
        except InvalidRequest as refused:
            return _error_response(refused)
    return _error_response(_translate(error))


def _translate(error: HTTPException) -> GatewayError:
    is_gateway = guard.is_gateway_path(request.path)
    if isinstance(error, MethodNotAllowed):
        allow = ", ".join(sorted(error.valid_methods or ()))
        message = f"{request.method} is not possible here."
        return InvalidRequest(message, status=405, code="method_not_allowed", headers={"Allow": allow})
    if error.code == 404 and is_gateway:
        return InvalidRequest("There is no such endpoint.", status=404, code="endpoint_not_supported")
    if error.code == 404:
        return NotFound("There is nothing here.")
    if error.code == 413:
        return InvalidRequest("The body is too large.", status=413, code="request_too_large")
    if error.code and error.code >= 500:
        return GatewayError("The request cannot be answered now.", status=error.code)
    return InvalidRequest("The request cannot be read.", status=error.code)


def _answer_bug(error: Exception) -> Response:
    """Logged whole, and answered without a detail."""
    response = _error_response(
        GatewayError("Something went wrong here; it is in the log.", code="internal_error")
    )
    logger.error("%s failed", request.endpoint, exc_info=error)
    return response


def _error_response(error: GatewayError) -> Response:
    """The one place where an error of ours becomes an answer."""
    status = error.status
    if error.details is not None and not guard.is_gateway_path(request.path) and face() != "json":
        status = 422
    response = Response(to_json(error.body()), status, mimetype="application/json")
    response.headers.extend(error.headers)
    return _dress(response)


def _dress(response: Response) -> Response:
    """The headers of every answer: its id, and outside `/v1` what keeps browsers and caches in order."""
    headers = response.headers
    log_lines.request_id.set(headers.setdefault("x-request-id", new_id("req")))
    headers["X-Content-Type-Options"] = "nosniff"
    if guard.is_gateway_path(request.path):
        return response
    headers["Vary"] = VARY
    headers["Cache-Control"] = "no-store"
    headers["Content-Security-Policy"] = POLICY
    headers["Referrer-Policy"] = "same-origin"
    headers["X-Frame-Options"] = "DENY"
    if gateway().settings.is_https:
        headers["Strict-Transport-Security"] = "max-age=31536000"
    return response


@blueprint.get("/")
def home() -> ResponseReturnValue:
    """What this is, in a sentence."""
    guard.check_host(gateway().settings)
    kinds = ["application/json", "text/html", "text/plain"]
    kind = request.accept_mimetypes.best_match(kinds, kinds[0]) if guard.bearer() is None else kinds[0]
    if kind == kinds[0]:
        return answer({"name": NAME, "description": DESCRIPTION, "endpoint": "/v1"})
    sentence = f"{NAME}: {DESCRIPTION}"
    return Response(
        f"<!doctype html><title>{NAME}</title><p>{sentence}</p>" if kind == kinds[1] else sentence,
        mimetype=kind,
    )


@blueprint.get("/healthz")
def healthz() -> ResponseReturnValue:
    """200 while this process serves."""
    return answer({"status": "ok"})


@blueprint.get("/readyz")
def readyz() -> ResponseReturnValue:
    """Whether this process can do its work: database there and migrated, not shutting down."""
    reason = gateway().readiness()
    if reason is not None:
        raise Unavailable(reason)
    return answer({"status": "ok"})


blueprint.after_request(_dress)
