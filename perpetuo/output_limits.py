"""How many tokens a model writes at most, where the client names no maximum: the output side of a hold.

genai-prices knows context windows but no output limits, so this is a table of ours. It says only what the
makers' own model pages say; where a model is missing the fallback holds. Too low cuts an answer short, too
high makes the upstream refuse the request: of two numbers in circulation the lower one stands here.
Sources, November 2026: platform.openai.com/docs/models, docs.anthropic.com (models overview),
ai.google.dev/gemini-api/docs/models, api-docs.deepseek.com/quick_start/pricing, console.groq.com/docs/models.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache

FALLBACK = 32_768

# Globs of bare names, the first that matches counts. A host that serves another maker's model as
# `maker/name` (OpenRouter) is looked up by the name; where each host has its own limit, nothing stands here.
LIMITS: Mapping[str, int] = {
    "gpt-3.5-turbo*": 4_096,
    "gpt-4": 8_192,
    "gpt-4-0*": 8_192,
    "gpt-4-turbo*": 4_096,
    "gpt-4-*preview": 4_096,
    "gpt-4o-2024-05-13": 4_096,
    "gpt-4o*": 16_384,
    "chatgpt-4o*": 16_384,
    "gpt-4.1*": 32_768,
    "gpt-4.5-preview*": 16_384,
    "gpt-5*-chat*": 16_384,
    "gpt-5-search-api*": 16_384,
    "gpt-5*": 128_000,
    "o1-mini*": 65_536,
    "o1-preview*": 32_768,
    "o1*": 100_000,
    "o3*": 100_000,
    "o4-mini*": 100_000,
    "claude-3-haiku*": 4_096,
    "claude-3-opus*": 4_096,
    "claude-3-sonnet*": 4_096,
    "claude-3-5-*": 8_192,
    "claude-3.5-*": 8_192,
    "claude-3-7-*": 64_000,
    "claude-3.7-*": 64_000,
    "claude-sonnet-4*": 64_000,
    "claude-opus-4-0": 32_000,
    "claude-opus-4-1*": 32_000,
    "claude-opus-4-2025*": 32_000,
    "claude-opus-4": 32_000,
    "claude-opus-4.1": 32_000,
    "claude-opus-4*": 64_000,
    "claude-haiku-4*": 64_000,
    "gemini-1.5-*": 8_192,
    "gemini-2.0-*": 8_192,
    "gemini-2.5-flash-image*": 32_768,
    "gemini-2.5-*": 65_535,
    "gemini-3-*": 65_535,
    "gemini-3.1-*": 65_535,
    "deepseek-chat": 8_192,
    "gemma2-9b-it": 8_192,
    "llama3-70b-8192": 8_192,
    "llama3-8b-8192": 8_192,
}


@lru_cache(1024)
def most_output_tokens(model: str) -> int | None:
    """The most that `model`, the name asked of the upstream, writes; None where nobody says."""
    name = model.rpartition("/")[2].lower()
    return next((limit for glob, limit in LIMITS.items() if fnmatchcase(name, glob)), None)


def output_bound(model: str) -> int:
    """What to hold, and to send as the maximum, for a request that names none."""
    return most_output_tokens(model) or FALLBACK
