"""The adapter for OpenAI and for every server that speaks its protocol.

The client's body travels as it came; only what has to change is spliced. Whole answers, errors and
streams are read next door: `openai_answer`, `openai_errors`, `openai_stream`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetuo.errors import UpstreamError
from perpetuo.providers import openai_answer, openai_errors
from perpetuo.providers.base import Answer, ModelRequest, UpstreamRequest
from perpetuo.providers.jsonbody import read_json, replace_members
from perpetuo.providers.openai_stream import OpenAIStream

_PATHS = {"chat.completions": "/chat/completions", "embeddings": "/embeddings"}


class OpenAI:
    name = "openai"

    def build_request(self, request: ModelRequest, base_url: str, secret: str) -> UpstreamRequest:
        """The upstream request; `base_url` usually ends in `/v1`, without `secret` no authorization."""
        is_stream = request.is_stream and request.endpoint == "chat.completions"
        headers = {
            **request.headers,
            **_headers(secret, accept="text/event-stream" if is_stream else "application/json"),
            "content-type": "application/json",
        }
        url = base_url.rstrip("/") + _PATHS[request.endpoint]
        return UpstreamRequest(url, headers, _body(request, is_stream))

    def build_models_request(self, base_url: str, secret: str) -> UpstreamRequest:
        headers = _headers(secret, accept="application/json")
        return UpstreamRequest(base_url.rstrip("/") + "/models", headers, method="GET")

    def read_models(self, body: bytes) -> list[str]:
        """The ids of `{"data": [{"id": …}]}`, or of the bare list that Together sends."""
        try:
            fields = read_json(body)
            models = fields if isinstance(fields, list) else fields["data"]
            names = [model["id"] for model in models]
            if not isinstance(models, list):
                raise TypeError("not a list")
        except (ValueError, KeyError, TypeError) as exc:
            raise UpstreamError(
                "The upstream's answer is not a list of models.", upstream_status=200
            ) from exc
        if not all(isinstance(name, str) for name in names):
            raise UpstreamError(
                "The upstream's list of models has an id that is no text.", upstream_status=200
            )
        return names

    def read_answer(self, request: ModelRequest, body: bytes, *, secret: str = "") -> Answer:
        """See `openai_answer.read_answer`."""
        return openai_answer.read_answer(request, body, secret)

    def read_error(self, status: int, headers: Mapping[str, str], body: bytes, secret: str) -> UpstreamError:
        """See `openai_errors.read_error`."""
        return openai_errors.read_error(status, headers, body, secret)

    def open_stream(self, request: ModelRequest, *, keep_text: bool, secret: str = "") -> OpenAIStream:
        """A reader for one stream that answers `request`."""
        return OpenAIStream(request, keep_text=keep_text, secret=secret)


def _headers(secret: str, *, accept: str) -> dict[str, str]:
    headers = {"accept": accept, "accept-encoding": "identity", "user-agent": "perpetuo/0.1"}
    if secret:
        headers["authorization"] = f"Bearer {secret}"
    return headers


def _body(request: ModelRequest, is_stream: bool) -> bytes:
    changes: dict[str, Any] = {}
    if request.fields.get("model") != request.model:
        changes["model"] = request.model
    options = request.fields.get("stream_options")
    # What is neither an object nor null is the client's mistake, for the upstream to name.
    if is_stream and (options is None or isinstance(options, dict)) and not request.wants_usage:
        changes["stream_options"] = {**(options or {}), "include_usage": True}
    if not changes and "models" not in request.fields:
        return request.body
    return replace_members(request.body, changes, ("models",))
