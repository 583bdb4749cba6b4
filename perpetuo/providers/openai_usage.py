"""Token counts as OpenAI-compatible upstreams report them, and an estimate where they do not.

Source: the `CompletionUsage` schema of OpenAI's API; DeepSeek, xAI and Groq as noted at their lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetuo.providers.base import Usage

_MAX_TOKENS = 2**53  # above this a count is no exact number in JSON, nor true
_BYTES_PER_TOKEN = 4
# Where text stands in a request. Images, audio and files are left out: their bytes say nothing of tokens.
_TEXT_MEMBERS = ("content", "text", "refusal", "tool_calls", "function", "name", "arguments")


def read_usage(fields: object, request: Mapping[str, Any], answer_characters: int) -> Usage:
    """Usage from an upstream's `usage` object, estimated as far as that is absent or makes no sense.

    `request` are the fields of the client's request, `answer_characters` the length of the answer's text.
    `source` is "provider" only if all that is billed was counted by the upstream.
    """
    reported = fields if isinstance(fields, dict) else {}
    prompt = _count(reported, "prompt_tokens")
    completion = _count(reported, "completion_tokens")
    total = _count(reported, "total_tokens")
    if prompt is not None and completion is None and total is not None and total >= prompt:
        completion = total - prompt
    if prompt is None and completion is not None and total is not None and total >= completion:
        prompt = total - completion
    if prompt is None or completion is None:
        return _estimated(request, answer_characters, prompt, completion)
    reasoning = _count(reported.get("completion_tokens_details"), "reasoning_tokens") or 0
    if reasoning and total == prompt + completion + reasoning:
        completion += reasoning  # xAI counts reasoning in the total only
    cached = _first_count(
        (reported.get("prompt_tokens_details"), "cached_tokens"),
        (reported, "prompt_cache_hit_tokens"),  # DeepSeek
    )
    cache_write = _first_count(
        (reported.get("prompt_tokens_details"), "cache_write_tokens"), (reported, "cache_write_tokens")
    )
    cached = min(cached, prompt)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion if total is None else total,
        cached_tokens=cached,
        cache_write_tokens=min(cache_write, prompt - cached),
        reasoning_tokens=min(reasoning, completion),
    )


def _count(fields: object, name: str) -> int | None:
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if type(value) is int and 0 <= value <= _MAX_TOKENS else None


def _first_count(*places: tuple[object, str]) -> int:
    counts = (_count(fields, name) for fields, name in places)
    return next((count for count in counts if count is not None), 0)


def _estimated(
    request: Mapping[str, Any], answer_characters: int, prompt: int | None, completion: int | None
) -> Usage:
    if prompt is None:
        prompt = _tokens(_text_bytes(request.get("messages")) + _text_bytes(request.get("input")))
    if completion is None:
        completion = _tokens(answer_characters)
    return Usage(prompt, completion, prompt + completion, source="estimate")


def _tokens(size: int) -> int:
    return -(-size // _BYTES_PER_TOKEN)


def _text_bytes(value: object) -> int:
    """Bytes of the text anywhere in `value`; a token id counts as a token. Any shape and depth will do."""
    size = 0
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            size += len(item.encode("utf-8", "surrogatepass"))
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, dict):
            pending += [item[name] for name in _TEXT_MEMBERS if name in item]
        elif type(item) is int:
            size += _BYTES_PER_TOKEN
    return size
