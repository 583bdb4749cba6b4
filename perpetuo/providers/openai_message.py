"""One assistant message in OpenAI's shape: its mends that whole answers and streams share, and its text.

Rules 23 to 32 of the notes on clients: content is a string, arguments are a JSON string, thoughts have one
name, the finish reason is one of five.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from perpetuo.errors import UpstreamError
from perpetuo.providers.hosts import Host
from perpetuo.providers.jsonbody import write_json

# Other words for OpenAI's finish reasons, as their documentation has them in 2026.
_FINISH_REASONS = {
    "eos": "stop",  # Together
    "eos_token": "stop",  # Text Generation Inference
    "stop_sequence": "stop",
    "end_turn": "stop",
    "load": "stop",  # Ollama, of a request that only loads the model
    "model_length": "length",  # Mistral
    "max_tokens": "length",
    "tool_use": "tool_calls",
}
# Mistral, OpenRouter; DeepSeek; vLLM: the model was stopped in the middle, and no client would know.
_FAILURES = ("error", "insufficient_system_resource", "abort")


def new_completion_id() -> str:
    return f"chatcmpl-{uuid4().hex}"


def new_call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


def finish_reason(given: str, has_calls: bool, host: Host) -> str:
    """OpenAI's word for a finish reason; an unknown one stays. Raises UpstreamError where it is a failure."""
    if given in _FAILURES:
        raise UpstreamError(f"The upstream broke off its answer ({given}).", upstream_status=200)
    if given.startswith("content_filter"):  # Gemini adds which of its filters
        return "content_filter"
    reason = _FINISH_REASONS.get(given, given)
    return "tool_calls" if reason == "stop" and has_calls and host.stops_after_calls else reason


def name_thoughts(message: dict[str, Any]) -> bool:
    """Move `reasoning` to `reasoning_content`, the name that most clients know; True if it was there."""
    thoughts = message.get("reasoning")
    if not isinstance(thoughts, str):
        return False
    del message["reasoning"]
    if not isinstance(message.get("reasoning_content"), str):
        message["reasoning_content"] = thoughts
    return True


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
