"""A whole answer of an OpenAI-compatible upstream: told from what is none, mended where clients would trip.

An answer that needs no mending passes byte for byte. Rules 20 to 38 of the notes on clients.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from perpetuo.errors import UpstreamError
from perpetuo.providers.base import Answer, ModelRequest
from perpetuo.providers.hosts import Host
from perpetuo.providers.jsonbody import read_json, write_json
from perpetuo.providers.openai_errors import failure
from perpetuo.providers.openai_message import (
    arguments_text,
    finish_reason,
    flatten_content,
    message_characters,
    message_text,
    name_thoughts,
    new_call_id,
    new_completion_id,
)
from perpetuo.providers.openai_usage import mend_usage, read_usage


def read_answer(request: ModelRequest, body: bytes, secret: str, host: Host) -> Answer:
    """Read the body of a 200 for `request`. UpstreamError for what is no answer, an `error` in it too."""
    fields = read_object(body)
    if fields.get("error") is not None:
        raise failure(fields, secret)
    if request.endpoint == "embeddings":
        return _read_embeddings(request, body, fields)
    messages = _messages(fields, secret)
    try:
        if _mend(fields, request.model, host):
            body = write_json(fields)
        usage = read_usage(fields.get("usage"), request.fields, sum(map(message_characters, messages)))
        return Answer(body, usage, message_text(messages[0]), _model(fields))
    except ValueError as exc:
        raise UpstreamError("The upstream's answer is nested too deeply.", upstream_status=200) from exc


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object that an answer is. UpstreamError for anything else."""
    try:
        fields = read_json(body)
    except ValueError as exc:
        what = "an empty body" if not body.strip() else "something that is not JSON"
        raise UpstreamError(f"The upstream answered with {what}.", upstream_status=200) from exc
    if not isinstance(fields, dict):
        raise UpstreamError("The upstream's answer is not a JSON object.", upstream_status=200)
    return fields


def _read_embeddings(request: ModelRequest, body: bytes, fields: dict[str, Any]) -> Answer:
    if not isinstance(fields.get("data"), list):
        raise UpstreamError("The upstream's answer has no list of embeddings.", upstream_status=200)
    reported = fields.get("usage")
    if isinstance(reported, dict):
        reported = {"completion_tokens": 0} | reported  # OpenAI leaves it out here
    return Answer(body, read_usage(reported, request.fields, 0), "", _model(fields))


def _messages(fields: Mapping[str, Any], secret: str) -> list[dict[str, Any]]:
    choices = fields.get("choices")
    if not isinstance(choices, list) or not choices:
        raise UpstreamError("The upstream's answer has no choices.", upstream_status=200)
    messages = []
    for choice in choices:
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise UpstreamError("The upstream's answer has a choice without a message.", upstream_status=200)
        if choice.get("error"):  # OpenRouter
            raise failure(choice, secret)
        messages.append(message)
    return messages


def _model(fields: Mapping[str, Any]) -> str | None:
    model = fields.get("model")
    return model if isinstance(model, str) and model else None


def _mend(fields: dict[str, Any], model: str, host: Host) -> bool:
    """Mend `fields` in place; True if anything was amiss."""
    is_mended = False
    if not isinstance(fields.get("id"), str) or not fields["id"]:
        fields["id"] = new_completion_id()
        is_mended = True
    if fields.get("object") != "chat.completion":
        fields["object"] = "chat.completion"
        is_mended = True
    if type(fields.get("created")) is not int:
        fields["created"] = created_at(fields.get("created"))
        is_mended = True
    if _model(fields) is None:
        fields["model"] = model
        is_mended = True
    for position, choice in enumerate(fields["choices"]):
        is_mended |= _mend_choice(choice, position, host)
    usage = fields.get("usage")
    return (isinstance(usage, dict) and mend_usage(usage, host)) or is_mended


def created_at(created: object) -> int:
    """The whole seconds of a time that came as a float, else now."""
    return int(created) if isinstance(created, float) and created > 0 else int(time.time())


def _mend_choice(choice: dict[str, Any], position: int, host: Host) -> bool:
    is_mended = False
    if type(choice.get("index")) is not int:
        choice["index"] = position
        is_mended = True
    is_mended |= _mend_message(choice["message"], host)
    return _mend_finish(choice, host) or is_mended


def _mend_finish(choice: dict[str, Any], host: Host) -> bool:
    """A whole answer is finished, whether the upstream says so or not: xAI and Ollama may not."""
    given, has_calls = choice.get("finish_reason"), bool(choice["message"].get("tool_calls"))
    if isinstance(given, str) and given:
        choice["finish_reason"] = finish_reason(given, has_calls, host)
    else:
        choice["finish_reason"] = "tool_calls" if has_calls else "stop"
    return choice["finish_reason"] != given


def _mend_message(message: dict[str, Any], host: Host) -> bool:
    is_mended = host.thinks_as_reasoning and name_thoughts(message)
    if message.get("role") != "assistant":
        message["role"] = "assistant"
        is_mended = True
    if message.get("content") is not None and not isinstance(message["content"], str):
        flatten_content(message)
        is_mended = True
    if "content" not in message:
        message["content"] = None
        is_mended = True
    if message.get("refusal") == "":  # instructor takes any string for a refusal
        message["refusal"] = None
        is_mended = True
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        del message["tool_calls"]
        return True
    for call in calls or ():
        is_mended |= isinstance(call, dict) and _mend_call(call)
    return is_mended


def _mend_call(call: dict[str, Any]) -> bool:
    is_mended = False
    if not isinstance(call.get("id"), str) or not call["id"]:
        call["id"] = new_call_id()
        is_mended = True
    if not call.get("type"):
        call["type"] = "function"
        is_mended = True
    function = call.get("function")
    if isinstance(function, dict) and (
        not isinstance(function.get("arguments"), str) or not function["arguments"]
    ):
        function["arguments"] = arguments_text(function.get("arguments")) or "{}"
        is_mended = True
    return is_mended
