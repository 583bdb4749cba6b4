"""The adapter for Anthropic's Messages API, and for servers that speak it.

Requests are translated in `anthropic_request` and the modules that it stands on, whole answers in
`anthropic_answer`, streams in `anthropic_stream`, refusals in `anthropic_errors`. What happened to names
and to the format on the way out is worked out again from the request on the way back: nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

from perpetuo.errors import InvalidRequest, UpstreamError
from perpetuo.providers import anthropic_answer, anthropic_errors
from perpetuo.providers.anthropic_models import capabilities
from perpetuo.providers.anthropic_request import Translation
from perpetuo.providers.anthropic_stream import MAX_KEPT_CHARACTERS, AnthropicStream
from perpetuo.providers.anthropic_tools import changed_names, json_tool_name
from perpetuo.providers.base import Answer, ModelRequest, UpstreamRequest
from perpetuo.providers.jsonbody import write_json
from perpetuo.providers.openai import OpenAI

VERSION = "2023-06-01"

_LAST_VERSION_WITH_SAMPLING = VERSION
_FILES = "files-api-2025-04-14"
# By the yardstick of Anthropic's own libraries (128,000 tokens an hour) what takes longer than ten minutes
# has to be streamed, or something on the way cuts the silent connection.
_MAX_UNSTREAMED_TOKENS = 128_000 // 6
_PASSED_HEADERS = ("anthropic-beta", "idempotency-key")
_EVENT_STREAM = (b"event:", b"data:", b":")


class Anthropic:
    """`version` is the date of the API; the newer ones refuse temperature, top_p and top_k."""

    name = "anthropic"

    def __init__(self, version: str = VERSION) -> None:
        self._version = version

    def build_request(self, request: ModelRequest, base_url: str, secret: str) -> UpstreamRequest:
        """The upstream request. Raises InvalidRequest for what Anthropic has no counterpart for."""
        if request.endpoint != "chat.completions":
            raise InvalidRequest(
                f"Anthropic has no {request.endpoint}; use chat completions, or a model of another provider.",
                status=404,
                code="endpoint_not_supported",
            )
        try:
            translated = Translation(
                request, version_has_sampling=self._version <= _LAST_VERSION_WITH_SAMPLING
            )
            if translated.body["max_tokens"] > _MAX_UNSTREAMED_TOKENS:
                translated.body["stream"] = True  # read_answer puts it together
            body = write_json(translated.body)
        except (ValueError, RecursionError) as exc:
            raise InvalidRequest("The body is nested too deeply.", code="invalid_json") from exc
        is_stream = translated.body.get("stream") is True
        headers = self._headers(secret, accept="text/event-stream" if is_stream else "application/json")
        headers |= {name: request.headers[name] for name in _PASSED_HEADERS if name in request.headers}
        if translated.conversation.uses_files:
            headers["anthropic-beta"] = ",".join(filter(None, [headers.get("anthropic-beta"), _FILES]))
        headers["content-type"] = "application/json"
        dropped = tuple(dict.fromkeys(translated.dropped))
        return UpstreamRequest(_url(base_url, "/v1/messages"), headers, body, dropped=dropped)

    def build_models_request(self, base_url: str, secret: str) -> UpstreamRequest:
        headers = self._headers(secret, accept="application/json")
        return UpstreamRequest(_url(base_url, "/v1/models?limit=1000"), headers, method="GET")

    def read_models(self, body: bytes) -> list[str]:
        """The ids of `{"data": [{"id": …}]}`, the form that OpenAI's list has too."""
        return OpenAI().read_models(body)

    def read_answer(self, request: ModelRequest, body: bytes, *, secret: str = "") -> Answer:
        """See `anthropic_answer.read_answer`; an answer that came as a stream is put together."""
        if body.lstrip().startswith(_EVENT_STREAM):
            stream = self._open(request, anthropic_answer.ALL_CHARACTERS, secret)
            stream.feed(body)
            stream.close()
            return Answer(stream.completion(), stream.usage(), stream.text(), stream.model)
        names, json_tool = changed_names(request.fields), _json_tool(request)
        return anthropic_answer.read_answer(request, body, names, json_tool, secret)

    def read_error(self, status: int, headers: Mapping[str, str], body: bytes, secret: str) -> UpstreamError:
        """See `anthropic_errors.read_error`."""
        return anthropic_errors.read_error(status, headers, body, secret)

    def open_stream(self, request: ModelRequest, *, keep_text: bool, secret: str = "") -> AnthropicStream:
        """A reader for one stream that answers `request`."""
        return self._open(request, MAX_KEPT_CHARACTERS if keep_text else -1, secret)

    def _open(self, request: ModelRequest, kept_characters: int, secret: str) -> AnthropicStream:
        names, json_tool = changed_names(request.fields), _json_tool(request)
        return AnthropicStream(request, names, json_tool, kept_characters=kept_characters, secret=secret)

    def _headers(self, secret: str, *, accept: str) -> dict[str, str]:
        headers = {
            "accept": accept,
            "accept-encoding": "identity",
            "anthropic-version": self._version,
            "user-agent": "perpetuo/0.1",
        }
        if secret:
            headers["x-api-key"] = secret
        return headers


def _url(base_url: str, path: str) -> str:
    """`path` at an upstream; a base URL that ends in `/v1`, as those of all others do, is understood."""
    return base_url.rstrip("/").removesuffix("/v1") + path


def _json_tool(request: ModelRequest) -> str | None:
    """The name of the tool whose input is the answer, None where the answer is the text."""
    asked = request.fields.get("response_format")
    if not isinstance(asked, dict) or asked.get("type") != "json_schema":
        return None
    return None if capabilities(request.model).has_structured_output else json_tool_name(request.fields)
