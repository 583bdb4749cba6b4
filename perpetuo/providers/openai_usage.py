"""Token counts as OpenAI-compatible upstreams report them, and an estimate where they do not.

Source: the `CompletionUsage` schema of OpenAI's API; DeepSeek, xAI and Gemini as noted at their lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetuo.providers.base import Usage
from perpetuo.providers.hosts import Host

_MAX_TOKENS = 2**53  # above this a count is no exact number in JSON, nor true
_BYTES_PER_TOKEN = 4
# Where text stands in a request. Images, audio and files are left out: their bytes say nothing of tokens.
_TEXT_MEMBERS = ("content", "text", "refusal", "tool_calls", "function", "name", "arguments")


def mend_usage(fields: dict[str, Any], host: Host) -> bool:
    """Make a chat's `usage` what clients reckon with, in place; True if anything was amiss.

    Thoughts are inside `completion_tokens`, the total is the sum, the cached tokens have OpenAI's place.
    """
    prompt, completion = _count(fields, "prompt_tokens"), _count(fields, "completion_tokens")
    total = _count(fields, "total_tokens")
    if prompt is None or completion is None:
        return False  # of no use to anyone, and for the estimate to fill
    is_mended = "prompt_cache_hit_tokens" in fields and _mend_cached(fields)
    if total == prompt + completion:
        return is_mended
    thoughts = _count(fields.get("completion_tokens_details"), "reasoning_tokens") or 0
    if host.counts_thoughts_in_total_only and total is not None and total > prompt + completion:
        thoughts = total - prompt - completion
        details = fields.get("completion_tokens_details")
        fields["completion_tokens_details"] = {
            **(details if isinstance(details, dict) else {}),
            "reasoning_tokens": thoughts,
        }
    if thoughts and total == prompt + completion + thoughts:  # xAI counts them in the total only, as Gemini
        fields["completion_tokens"] = completion + thoughts
        return True
    if total is None:
        fields["total_tokens"] = prompt + completion
        return True
    return is_mended


def _mend_cached(fields: dict[str, Any]) -> bool:
    """DeepSeek's older name for cached tokens."""
    hits, details = _count(fields, "prompt_cache_hit_tokens"), fields.get("prompt_tokens_details")
    if hits is None or (isinstance(details, dict) and "cached_tokens" in details):
        return False
    fields["prompt_tokens_details"] = {
        **(details if isinstance(details, dict) else {}),
        "cached_tokens": hits,
    }
    return True


def read_usage(fields: object, request: Mapping[str, Any], answer_characters: int) -> Usage:
    """Usage from an upstream's `usage` object, estimated as far as that is absent or makes no sense.

    `fields` have been through `mend_usage`; `request` are the fields of the client's request,
    `answer_characters` the length of the answer's text.
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
    cached = _count(reported.get("prompt_tokens_details"), "cached_tokens") or 0
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
