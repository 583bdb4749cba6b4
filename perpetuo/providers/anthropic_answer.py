"""A whole answer of Anthropic's as a chat completion."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from perpetuo.errors import UpstreamError
from perpetuo.providers.anthropic_blocks import Blocks
from perpetuo.providers.anthropic_collect import Collected
from perpetuo.providers.anthropic_errors import failure
from perpetuo.providers.anthropic_usage import billed_usage, openai_usage
from perpetuo.providers.base import Answer, ModelRequest
from perpetuo.providers.jsonbody import read_json, write_json
from perpetuo.providers.openai_choice import TextRoom
from perpetuo.providers.openai_message import message_text, new_completion_id

ALL_CHARACTERS = 2**62


def read_answer(
    request: ModelRequest, body: bytes, names: Mapping[str, str], json_tool: str | None, secret: str
) -> Answer:
    """Read the body of a 200 for `request`; `names` and `json_tool` as for `Blocks`.

    UpstreamError for what is no message, an error in it too.
    """
    fields = _read_message(body, secret)
    collected = Collected(TextRoom(ALL_CHARACTERS))
    blocks = Blocks(collected, names, json_tool)
    try:
        for index, block in enumerate(fields["content"]):
            blocks.begin(index, block)
            blocks.end(index)
        collected.stop_reason = _text(fields.get("stop_reason"))
        collected.stop_details = stop_details(fields)
        blocks.end_all()
        counts = fields.get("usage")
        counts = counts if isinstance(counts, dict) else {}
        model = _text(fields.get("model"))
        frame = {
            "id": _text(fields.get("id")) or new_completion_id(),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model or request.model,
        }
        completion = completion_body(frame, collected, openai_usage(counts), is_finished=True)
        usage = billed_usage(counts, request.fields, collected.room.characters)
        return Answer(write_json(completion), usage, message_text(collected.message()), model)
    except ValueError as exc:
        raise UpstreamError("The upstream's answer is nested too deeply.", upstream_status=200) from exc


def _read_message(body: bytes, secret: str) -> dict[str, Any]:
    try:
        fields = read_json(body)
    except ValueError as exc:
        what = "an empty body" if not body.strip() else "something that is not JSON"
        raise UpstreamError(f"The upstream answered with {what}.", upstream_status=200) from exc
    if not isinstance(fields, dict):
        raise UpstreamError("The upstream's answer is not a JSON object.", upstream_status=200)
    if fields.get("type") == "error" or fields.get("error") is not None:
        raise failure(fields, secret)
    content = fields.get("content")
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise UpstreamError("The upstream's answer has no list of content blocks.", upstream_status=200)
    return fields


def stop_details(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    details = fields.get("stop_details")
    return details if isinstance(details, dict) else {}


def completion_body(
    frame: Mapping[str, Any], collected: Collected, usage: dict[str, Any] | None, *, is_finished: bool
) -> dict[str, Any]:
    """A `chat.completion` with what was collected; `frame` are its id, created and model."""
    choice = {
        "index": 0,
        "message": collected.message(),
        "logprobs": None,
        "finish_reason": collected.finish_reason if is_finished else None,
    }
    completion: dict[str, Any] = {**frame, "object": "chat.completion", "choices": [choice]}
    if usage is not None:
        completion["usage"] = usage
    return completion


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
