"""A whole answer of `/v1/responses`: passed byte for byte, read for its usage and its text.

Source: the `Response` schema of OpenAI's OpenAPI document 2.3.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetuo.errors import UpstreamError
from perpetuo.providers.base import Answer, ModelRequest, Usage
from perpetuo.providers.openai_answer import read_object
from perpetuo.providers.openai_errors import failure
from perpetuo.providers.openai_usage import read_usage


def read_answer(request: ModelRequest, body: bytes, secret: str) -> Answer:
    """Read the body of a 200 for `request`. UpstreamError for what is no answer, or a failed one."""
    fields = read_object(body)
    check(fields, secret)
    text = response_text(fields)
    usage = read_response_usage(fields.get("usage"), request.fields, len(text))
    model = fields.get("model")
    return Answer(body, usage, text, model if isinstance(model, str) and model else None)


def check(fields: Mapping[str, Any], secret: str) -> None:
    """Raise UpstreamError where `fields` are no response, or one that failed."""
    if fields.get("error") is not None:
        raise failure(fields, secret)
    if fields.get("status") == "failed":
        raise UpstreamError("The upstream failed to answer and did not say why.", upstream_status=200)
    if not isinstance(fields.get("output"), list):
        raise UpstreamError("The upstream's answer has no output.", upstream_status=200)


def read_response_usage(reported: object, request: Mapping[str, Any], characters: int) -> Usage:
    """Usage under the names of this API, estimated as far as it is absent."""
    if not isinstance(reported, dict):
        return read_usage(None, _said(request), characters)
    chat = {
        "prompt_tokens": reported.get("input_tokens"),
        "completion_tokens": reported.get("output_tokens"),
        "total_tokens": reported.get("total_tokens"),
        "prompt_tokens_details": reported.get("input_tokens_details"),
        "completion_tokens_details": reported.get("output_tokens_details"),
    }
    return read_usage(chat, _said(request), characters)


def _said(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the estimate of the prompt counts: the input, and the instructions as if they were some of it."""
    return {"input": request.get("input"), "messages": request.get("instructions")}


def response_text(fields: Mapping[str, Any]) -> str:
    """What a person would read: the messages, else the calls. "" for odd shapes."""
    output = fields.get("output")
    items = [item for item in output if isinstance(item, dict)] if isinstance(output, list) else []
    texts = [text for item in items for text in _message_texts(item)]
    if any(texts):
        return "".join(texts)
    return "\n".join(_call_text(item) for item in items if item.get("type") == "function_call")


def _message_texts(item: Mapping[str, Any]) -> list[str]:
    parts = item.get("content")
    if item.get("type") != "message" or not isinstance(parts, list):
        return []
    said = [part.get("text") or part.get("refusal") for part in parts if isinstance(part, dict)]
    return [text for text in said if isinstance(text, str)]


def _call_text(item: Mapping[str, Any]) -> str:
    return f"{item.get('name') or ''}({item.get('arguments') or ''})"
