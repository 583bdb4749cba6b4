"""Blueprint `gateway`: /v1, HTTP in and out. What a call does is the walk's business."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, current_app, request
from gunicorn.http.errors import ParseException

from perpetuo.errors import GatewayError, InvalidRequest, NotFound
from perpetuo.gateway.offers import Offer
from perpetuo.gateway.walk import Answer, Gateway, Refused, walk
from perpetuo.models import new_id
from perpetuo.providers.base import Endpoint
from perpetuo.providers.jsonbody import write_json

blueprint = Blueprint("gateway", __name__)

KNOWN = {"chat/completions": "POST", "embeddings": "POST", "responses": "POST", "models": "GET"}
EVERY_METHOD = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


@blueprint.post("/v1/chat/completions", strict_slashes=False, provide_automatic_options=False)
def chat_completions() -> Response:
    """A chat completion, whole or streamed."""
    return _serve("chat.completions")


@blueprint.post("/v1/embeddings", strict_slashes=False, provide_automatic_options=False)
def embeddings() -> Response:
    """Embeddings of texts."""
    return _serve("embeddings")


@blueprint.post("/v1/responses", strict_slashes=False, provide_automatic_options=False)
def responses() -> Response:
    """OpenAI's other API, passed through to the providers that have it."""
    return _serve("responses")


@blueprint.get("/v1/models", strict_slashes=False, provide_automatic_options=False)
def models() -> Response:
    """The models that this key may use."""
    try:
        gateway = _gateway()
        caller = gateway.access.authenticate(request.headers.get("Authorization"))
        offers = [_model(offer) for offer in gateway.offers.all(caller)]
    except GatewayError as error:
        return _refused(error)
    return _json({"object": "list", "data": offers})


@blueprint.get("/v1/models/<path:model>", strict_slashes=False, provide_automatic_options=False)
def model(model: str) -> Response:
    """One model that this key may use; its id may hold slashes."""
    try:
        gateway = _gateway()
        caller = gateway.access.authenticate(request.headers.get("Authorization"))
        found = gateway.offers.find(caller, model) or gateway.offers.find(caller, model.rstrip("/"))
        if found is None:
            raise NotFound(f"The model '{model}' does not exist here.", code="model_not_found", param="model")
    except GatewayError as error:
        return _refused(error)
    return _json(_model(found))


@blueprint.route("/v1", methods=EVERY_METHOD, defaults={"path": ""}, strict_slashes=False)
@blueprint.route("/v1/<path:path>", methods=EVERY_METHOD)
def unknown(path: str) -> Response:
    """Every other path and method, browsers' preflights among them."""
    path = path.rstrip("/")
    allowed = "GET" if path.startswith("models/") else KNOWN.get(path)
    if request.method == "OPTIONS" and allowed is not None:
        return _preflight(allowed)
    if allowed is None:
        return _refused(NotFound(f"There is no /v1/{path} here.", code="endpoint_not_supported"))
    message = f"/v1/{path} takes {allowed}, not {request.method}."
    return _refused(
        InvalidRequest(message, status=405, code="method_not_allowed", headers={"allow": allowed})
    )


def _serve(endpoint: Endpoint) -> Response:
    gateway = _gateway()
    try:
        caller = gateway.access.authenticate(request.headers.get("Authorization"))
        headers = {name.lower(): value for name, value in request.headers.items()}
        answer = walk(gateway, caller, endpoint, request.environ.get("gunicorn.socket"), _read_body, headers)
    except Refused as refused:
        return _refused(refused.error, refused.request_id, refused.headers)
    except GatewayError as error:
        return _refused(error)
    return _answer(answer)


def _read_body() -> bytes:
    """The body, bounded, be its length declared or not. Raises InvalidRequest.

    Not through Flask, which cuts a chunked body at its limit in silence.
    """
    most = _gateway().settings.max_body_bytes
    declared = request.environ.get("CONTENT_LENGTH")
    too_large = InvalidRequest(f"The body is above {most} bytes.", status=413, code="request_too_large")
    if declared and int(declared) > most:
        raise too_large
    encoding = request.environ.get("HTTP_CONTENT_ENCODING", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = "Send the body without Content-Encoding; compressed bodies are not read."
        raise InvalidRequest(message, status=415, code="unsupported_encoding")
    is_chunked = "chunked" in request.environ.get("HTTP_TRANSFER_ENCODING", "").lower()
    size = int(declared) if declared else most + 1 if is_chunked else 0
    try:
        body: bytes = request.environ["wsgi.input"].read(size) if size else b""
    except (OSError, ParseException) as exc:  # gunicorn's for chunks that end too soon, or are none
        raise InvalidRequest("The body broke off.", code="invalid_json") from exc
    if len(body) > most:
        raise too_large
    return body


def _answer(answer: Answer) -> Response:
    if answer.stream is None:
        response = Response(answer.body, mimetype="application/json")
    else:
        response = Response(answer.stream, mimetype="text/event-stream", headers=STREAM_HEADERS)
    return _finish(response, answer.request_id, answer.headers)


def _refused(
    error: GatewayError, request_id: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    response = Response(write_json(error.body()), status=error.status, mimetype="application/json")
    return _finish(response, request_id, {**(headers or {}), **error.headers})


def _json(value: Any) -> Response:
    return _finish(Response(write_json(value), mimetype="application/json"), None, {})


def _finish(response: Response, request_id: str | None, headers: Mapping[str, str]) -> Response:
    for name, value in headers.items():
        response.headers[name] = value
    response.headers["x-request-id"] = request_id or new_id("req")
    response.headers["x-content-type-options"] = "nosniff"
    if _gateway().settings.cors_origins:
        _allow_origin(response)
    return response


def _preflight(allowed: str) -> Response:
    response = Response(status=204)
    del response.headers["content-type"]  # it would be text/html, of no body
    if request.headers.get("Origin") in _gateway().settings.cors_origins:
        response.headers["access-control-allow-methods"] = f"{allowed}, OPTIONS"
        asked = request.headers.get("Access-Control-Request-Headers", "authorization, content-type")
        response.headers["access-control-allow-headers"] = asked
        response.headers["access-control-max-age"] = "600"
    return _finish(response, None, {})


def _allow_origin(response: Response) -> None:
    """Exact origins, and never with credentials: cookies mean nothing here."""
    origin = request.headers.get("Origin")
    response.vary.add("Origin")
    if origin in _gateway().settings.cors_origins:
        response.headers["access-control-allow-origin"] = origin
        response.headers["access-control-expose-headers"] = "*"


def _model(offer: Offer) -> dict[str, Any]:
    return {"id": offer.id, "object": "model", "created": offer.created, "owned_by": offer.owned_by}


def _gateway() -> Gateway:
    return current_app.extensions["perpetuo"]
