"""The adapter for OpenAI and for every server that speaks its protocol.

The client's body travels as it came; only what has to change is spliced (`openai_request`). Whole answers,
errors and streams are read next door: `openai_answer`, `openai_errors`, `openai_stream`; those of
`/v1/responses`: `responses_answer`, `responses_stream`. How hosts differ: `hosts`.
"""

from __future__ import annotations

from collections.abc import Mapping

from perpetuo.errors import UpstreamError
from perpetuo.providers import openai_answer, openai_errors, responses_answer
from perpetuo.providers.base import Answer, ChunkReader, ModelRequest, UpstreamRequest
from perpetuo.providers.hosts import OPENAI, Host
from perpetuo.providers.jsonbody import read_json
from perpetuo.providers.openai_request import build_body
from perpetuo.providers.openai_stream import OpenAIStream
from perpetuo.providers.openai_urls import endpoint_url, models_url
from perpetuo.providers.responses_stream import ResponsesStream


class OpenAI:
    """One host; what it has in common with OpenAI is most of it."""

    def __init__(self, host: Host = OPENAI) -> None:
        self.name = host.name
        self._host = host

    def build_request(self, request: ModelRequest, base_url: str, secret: str) -> UpstreamRequest:
        """The upstream request; `base_url` usually ends in `/v1`, without `secret` no authorization.

        Raises InvalidRequest (`unsupported_parameter`) for what the host cannot do.
        """
        is_stream = request.is_stream and request.endpoint != "embeddings"
        headers = {
            **request.headers,
            **self._headers(secret, accept="text/event-stream" if is_stream else "application/json"),
            "content-type": "application/json",
        }
        url = endpoint_url(self._host, base_url, request.endpoint, request.model)
        body, dropped = build_body(request, self._host, is_stream)
        return UpstreamRequest(url, headers, body, dropped=dropped)

    def build_models_request(self, base_url: str, secret: str) -> UpstreamRequest:
        headers = self._headers(secret, accept="application/json")
        return UpstreamRequest(models_url(self._host, base_url), headers, method="GET")

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
        return [name.removeprefix(self._host.model_prefix) for name in names]

    def read_answer(self, request: ModelRequest, body: bytes, *, secret: str = "") -> Answer:
        """See `openai_answer.read_answer` and `responses_answer.read_answer`."""
        if request.endpoint == "responses":
            return responses_answer.read_answer(request, body, secret)
        return openai_answer.read_answer(request, body, secret, self._host)

    def read_error(self, status: int, headers: Mapping[str, str], body: bytes, secret: str) -> UpstreamError:
        """See `openai_errors.read_error`."""
        return openai_errors.read_error(status, headers, body, secret, self._host.bad_key)

    def open_stream(self, request: ModelRequest, *, keep_text: bool, secret: str = "") -> ChunkReader:
        """A reader for one stream that answers `request`."""
        if request.endpoint == "responses":
            return ResponsesStream(request, keep_text=keep_text, secret=secret)
        return OpenAIStream(request, keep_text=keep_text, secret=secret, host=self._host)

    def _headers(self, secret: str, *, accept: str) -> dict[str, str]:
        headers = {"accept": accept, "accept-encoding": "identity", "user-agent": "perpetuo/0.1"}
        if secret and self._host.auth == "api-key":
            headers["api-key"] = secret
        elif secret:
            headers["authorization"] = f"Bearer {secret}"
        return headers
