"""One assistant message in OpenAI's shape: its mends that whole answers and streams share, and its text.

Rules 23 to 32 of the notes on clients: content is a string, arguments are a JSON string.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from perpetuo.providers.jsonbody import write_json


def new_completion_id() -> str:
    return f"chatcmpl-{uuid4().hex}"


def new_call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


def flatten_content(message: dict[str, Any]) -> None:
    """Turn content that is a list of parts (Mistral) into `content` and `reasoning_content`, in place."""
    parts = message["content"]
    texts, thoughts = [], []
    for part in parts if isinstance(parts, list) else [parts]:
        if isinstance(part, dict) and "thinking" in part:
            thoughts.append(_part_text(part["thinking"]))
        else:
            texts.append(_part_text(part))
    message["content"] = "".join(texts)
    if any(thoughts):
        earlier = message.get("reasoning_content")
        message["reasoning_content"] = (earlier if isinstance(earlier, str) else "") + "".join(thoughts)


def _part_text(part: object) -> str:
    if isinstance(part, list):
        return "".join(_part_text(inner) for inner in part if not isinstance(inner, list))
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else ""


def arguments_text(arguments: object) -> str:
    """Arguments as the JSON string that they must be; "" where there are none."""
    if isinstance(arguments, str):
        return arguments
    return "" if arguments is None else write_json(arguments).decode()


def message_text(message: dict[str, Any]) -> str:
    """What a person would read: the content, else the refusal, else the calls. "" for odd shapes."""
    for name in ("content", "refusal"):
        if isinstance(text := message.get(name), str) and text:
            return text
    calls = message.get("tool_calls")
    return "\n".join(map(_call_text, calls)) if isinstance(calls, list) else ""


def _call_text(call: object) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return ""
    return f"{function.get('name') or ''}({arguments_text(function.get('arguments'))})"


def message_characters(message: dict[str, Any]) -> int:
    """Length of all that the model wrote, thoughts and calls included."""
    texts = [message.get(name) for name in ("content", "refusal")]
    texts.append(message.get("reasoning_content") or message.get("reasoning"))
    calls = message.get("tool_calls")
    texts += map(_call_text, calls if isinstance(calls, list) else [])
    return sum(len(text) for text in texts if isinstance(text, str))
