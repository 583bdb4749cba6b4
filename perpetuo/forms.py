"""The body of a management request, JSON or form: bounded in bytes and in time, read into plain values."""

from __future__ import annotations

import io
from typing import Any

from flask import request
from gunicorn.http.errors import ParseException
from werkzeug.formparser import FormDataParser

from perpetuo import schemas
from perpetuo.errors import InvalidRequest
from perpetuo.fields import load_json
from perpetuo.gateway.clients import within
from perpetuo.gateway.walk import BODY_SECONDS

MOST_BYTES = 1024 * 1024
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


def body() -> tuple[Any, bool]:
    """The value of this request's body, and whether it is a form. Raises InvalidRequest."""
    raw = _raw()
    if request.mimetype in FORMS:
        return _form(raw), True
    if not raw:
        return {}, False
    if request.mimetype != "application/json" and not request.mimetype.endswith("+json"):
        raise InvalidRequest(
            "The body must be application/json or a form.", status=415, code="unsupported_media_type"
        )
    try:
        return load_json(raw.decode()), False
    except ValueError as exc:
        raise InvalidRequest("The body is not JSON.", code="invalid_json") from exc


def _raw() -> bytes:
    too_large = InvalidRequest("The body is larger than 1 MiB.", status=413, code="request_too_large")
    too_late = InvalidRequest("The body did not arrive in time.", status=408, code="request_timeout")
    if (request.content_length or 0) > MOST_BYTES:
        raise too_large
    try:
        with within(BODY_SECONDS, too_late):
            raw: bytes = request.stream.read(MOST_BYTES + 1)
    except (OSError, ParseException) as exc:  # a client that left, and chunks that are none
        raise InvalidRequest("The body broke off.", code="invalid_json") from exc
    if len(raw) > MOST_BYTES:
        raise too_large
    return raw


def _form(raw: bytes) -> dict[str, Any]:
    """The last value of each field; an empty one is null, an empty secret is left out."""
    parser = FormDataParser(silent=False, max_form_parts=1000)
    try:
        _, fields, files = parser.parse(io.BytesIO(raw), request.mimetype, len(raw), request.mimetype_params)
    except ValueError as exc:
        raise schemas.invalid(None, "The form cannot be read.") from exc
    if files:
        raise schemas.invalid(next(iter(files)), "Files are not taken here.")
    values = {name: given[-1] for name, given in fields.lists()}
    return {k: v or None for k, v in values.items() if v or k not in schemas.SECRETS}
