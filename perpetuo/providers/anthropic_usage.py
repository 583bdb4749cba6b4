"""Anthropic's token counts as OpenAI's.

`input_tokens` leaves out what was read from the cache and written to it; `output_tokens` has the thoughts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetuo.providers.base import Usage
from perpetuo.providers.openai_usage import read_usage

_COUNTS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


def merge_usage(known: dict[str, Any], reported: object) -> None:
    """Bring `known` up to date: counts are cumulative, and what is absent or null stays as it was."""
    if isinstance(reported, dict):
        known.update((name, value) for name, value in reported.items() if value is not None)


def openai_usage(reported: Mapping[str, Any]) -> dict[str, Any] | None:
    """OpenAI's `usage` object, None unless both input and output were counted."""
    read, written = (
        _count(reported, "cache_read_input_tokens"),
        _count(reported, "cache_creation_input_tokens"),
    )
    if not _is_count(reported.get("input_tokens")) or not _is_count(reported.get("output_tokens")):
        return None
    prompt, completion = reported["input_tokens"] + written + read, reported["output_tokens"]
    thinking = _count(reported.get("output_tokens_details"), "thinking_tokens")
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
        "completion_tokens_details": {"reasoning_tokens": thinking},
    }


def billed_usage(
    reported: Mapping[str, Any], request: Mapping[str, Any], characters: int, *, is_final: bool = True
) -> Usage:
    """What the call is billed by, estimated as far as it was not counted.

    `characters` is the length of the answer. Before the end (`is_final` false) the upstream's count of the
    output says nothing. An answer that took several passes of the model is billed by their sum.
    """
    passes = reported.get("iterations")
    sums = _summed(passes) if isinstance(passes, list) else None
    counts = openai_usage({**reported, **(sums or {})})
    if counts is None:
        with_output = openai_usage({**reported, "output_tokens": 0})
        counts = {} if with_output is None else {"prompt_tokens": with_output["prompt_tokens"]}
    elif not is_final:
        del counts["completion_tokens"], counts["total_tokens"]
    return read_usage(counts, request, characters)


def _summed(passes: list[Any]) -> dict[str, int] | None:
    """The sum over the passes of the model itself; an adviser's are another model's, at another price."""
    own = [each for each in passes if isinstance(each, dict) and "advisor" not in str(each.get("type"))]
    return {name: sum(_count(each, name) for each in own) for name in _COUNTS} if own else None


def _count(fields: object, name: str) -> int:
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if isinstance(value, int) and _is_count(value) else 0


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= 2**53
