"""What each family of Claude models can do: what must not be sent to it, and what is sent in its place.

`max_output` is what the model accepts; what is sent where a client names no maximum is `output_limits`'.
Source: the catalogues of the AI SDK, LiteLLM and Pydantic AI, November 2026. Data only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

_DATE_OR_CHANNEL = re.compile(r"([-@]\d{6,}.*|-latest|@.*)$")
_FURTHER_VERSION = re.compile(r"-?\d{1,2}(?!\d)")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """`max_output` is None where it is unknown. `thinking_off` is the type of `thinking` that turns it off,
    None where there is no safe one. `efforts` are the accepted values of `output_config.effort`."""

    max_output: int | None
    has_sampling: bool = False
    has_sampling_pair: bool = False  # temperature together with top_p
    thinking: Literal["none", "budget", "adaptive"] = "adaptive"
    thinking_off: Literal["disabled", "between_tools"] | None = None
    efforts: tuple[str, ...] = ()
    has_structured_output: bool = True


_MOST_EFFORTS = ("low", "medium", "high", "max")
_ALL_EFFORTS = ("low", "medium", "high", "xhigh", "max")

_CLAUDE_3 = Capabilities(4_096, True, True, thinking="none", has_structured_output=False)
_CLAUDE_4 = Capabilities(64_000, True, True, thinking="budget", has_structured_output=False)
_CLAUDE_4_5 = Capabilities(64_000, True, thinking="budget")
_CLAUDE_4_6 = Capabilities(128_000, True, thinking_off="disabled", efforts=_MOST_EFFORTS)
_CLAUDE_5 = Capabilities(128_000, thinking_off="disabled", efforts=_ALL_EFFORTS)
_ALWAYS_THINKING = replace(_CLAUDE_5, thinking_off="between_tools")

_FAMILIES: dict[str, Capabilities] = {
    "3": _CLAUDE_3,
    "3-5": replace(_CLAUDE_3, max_output=8_192),
    "3-7": _CLAUDE_4,
    "opus-4": replace(_CLAUDE_4, max_output=32_000),
    "opus-4-0": replace(_CLAUDE_4, max_output=32_000),
    "opus-4-1": replace(_CLAUDE_4, max_output=32_000, has_structured_output=True),
    "sonnet-4": _CLAUDE_4,
    "sonnet-4-0": _CLAUDE_4,
    "haiku-4-5": _CLAUDE_4_5,
    "sonnet-4-5": _CLAUDE_4_5,
    "opus-4-5": _CLAUDE_4_5,
    "sonnet-4-6": _CLAUDE_4_6,
    "opus-4-6": _CLAUDE_4_6,
    "opus-4-7": _CLAUDE_5,
    "opus-4-8": _CLAUDE_5,
    "sonnet-5": _CLAUDE_5,
    "opus-5": _CLAUDE_5,
    "haiku-5-5": _CLAUDE_5,
    "sonnet-5-5": _ALWAYS_THINKING,
    "opus-5-5": _ALWAYS_THINKING,
}
_FABLE_5 = _ALWAYS_THINKING
# A Claude newer than this table: what all recent ones have in common.
_UNKNOWN_CLAUDE = Capabilities(128_000, efforts=_MOST_EFFORTS)
# Another model behind a server that speaks Anthropic's protocol: what the protocol's first version had.
_NO_CLAUDE = Capabilities(None, True, True, thinking="budget", has_structured_output=False)


@lru_cache(1024)
def capabilities(model: str) -> Capabilities:
    """What `model` can do, by the beginning of its name; a path before it and dots in it do not matter."""
    name = model.rpartition("/")[2].replace(".", "-").lower()
    if not name.startswith("claude-"):
        return _NO_CLAUDE
    name = _DATE_OR_CHANNEL.sub("", name.removeprefix("claude-"))
    if name.startswith("fable-5"):
        return _FABLE_5
    for family in sorted(_FAMILIES, key=len, reverse=True):
        rest = name.removeprefix(family)
        if name.startswith(family) and not _FURTHER_VERSION.match(rest):
            return _FAMILIES[family]
    return _UNKNOWN_CLAUDE
