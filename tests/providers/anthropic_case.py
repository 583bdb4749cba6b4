"""The recorded-style streams and answers of Anthropic under `tests/streams/anthropic`, and how to ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perpetuo.errors import InvalidRequest
from perpetuo.providers.anthropic import Anthropic
from perpetuo.providers.base import ModelRequest, UpstreamRequest

FOLDER = Path(__file__).parent.parent / "streams" / "anthropic"
STREAMS = sorted(path.stem for path in FOLDER.glob("*.sse"))
ANSWERS = sorted(path.stem for path in (FOLDER / "answers").glob("*.json"))
SECRET = "sk-ant-1"
BASE = "https://api.anthropic.com"
OLD, MIDDLE, FRESH = "claude-3-haiku-20240307", "claude-sonnet-4-5", "claude-sonnet-4-6"
NEW, NEWEST, OTHER = "claude-opus-5", "claude-opus-5-5", "glm-5"
USER = {"role": "user", "content": "Say hello"}


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def sse(name: str) -> bytes:
    return (FOLDER / f"{name}.sse").read_bytes()


def asking(model: str = MIDDLE, **fields: Any) -> ModelRequest:
    fields = {"messages": [USER], **fields}
    return ModelRequest("chat.completions", model, b"", fields)


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def built(model: str = MIDDLE, version: str = "2023-06-01", **fields: Any) -> UpstreamRequest:
    return Anthropic(version).build_request(asking(model, **fields), BASE, "sk-ant-1")


def body_of(model: str = MIDDLE, version: str = "2023-06-01", **fields: Any) -> dict[str, Any]:
    return json.loads(built(model, version, **fields).body or b"")


def dropped_of(model: str = MIDDLE, version: str = "2023-06-01", **fields: Any) -> tuple[str, ...]:
    return built(model, version, **fields).dropped


def refusal_of(model: str = MIDDLE, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        built(model, **fields)
    assert (caught.value.status, caught.value.type) == (400, "invalid_request_error")
    return caught.value


def exchange(**more: Any) -> list[Any]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call], **more}
    return [USER, asks, {"role": "tool", "tool_call_id": "a", "content": "1"}]
