"""What of a request nobody can bound beforehand, and how much input the rest of it can be billed for.

What makes the upstream fetch, search or run something, or adds what lies there, is named and not bounded. A
list of names holds the names that are known: it is kept with the providers' documentation. Text is never more
tokens than bytes; pictures and files are counted next door (`media`). Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from perpetuo.gateway.intake import Asked
from perpetuo.gateway.media import Fault, Media
from perpetuo.providers.hosts import HOSTS
from perpetuo.providers.jsonbody import write_json

# Chat templates, system texts that a host adds (Anthropic's for tools has at most 804 tokens), marks between
# messages: all of it is small beside the JSON around it, which counts in full.
SLACK_TOKENS = 1_024
ESTIMATED_BYTES_PER_TOKEN = 4

# Top-level members, each with what may be billed beyond the request's own text. Sources, November 2026:
# platform.openai.com/docs/api-reference, docs.x.ai/docs/guides (live search, deferred completions),
# openrouter.ai/docs/features (plugins, presets), docs.anthropic.com (MCP, containers, context editing),
# learn.microsoft.com (Azure, `data_sources`), console.groq.com/docs/compound, docs.vllm.ai (templates).
_MEMBERS: Mapping[str, str] = {
    "web_search_options": "searches the web",
    "search_parameters": "searches the web",
    "search_settings": "searches the web",
    "compound_custom": "lets the host run tools of its own",
    "plugins": "lets the host run tools of its own",
    "mcp_servers": "lets the host run tools of its own",
    "container": "lets the host run code",
    "data_sources": "adds texts that the host searches for",
    "previous_response_id": "adds a conversation that is stored at the host",
    "conversation": "adds a conversation that is stored at the host",
    "prompt": "adds a text that is stored at the host",
    "preset": "adds a text that is stored at the host",
    "cached_content": "adds a text that is stored at the host",
    "background": "goes on after the answer",
    "deferred": "goes on after the answer",
    "context_management": "may take several passes of the model",
    "chat_template": "changes how much the text comes to",
    "mm_processor_kwargs": "changes how much pictures come to",
}
NAMES = frozenset(_MEMBERS) | {"google", "extra_body"}
# What they say when they ask for nothing. An empty object does ask: `web_search_options: {}` searches.
_NOTHING: tuple[object, ...] = (None, False, "", [], {"mode": "off"})
# Models that search or run tools by themselves, whatever the request says; the last two are OpenRouter's.
_SEARCHING_MODELS = (
    "*-search-preview*",
    "*-search-api*",
    "*deep-research*",
    "compound*",
    "sonar*",
    "*:online",
    "*@preset*",
)

_CLIENT_TOOLS = frozenset({"function", "custom"})
# Anthropic's tools that the client runs. The dearest texts that stand for one: computer 735, editor 700.
_ANTHROPICS_CLIENT_TOOLS = ("bash_", "computer_", "memory_", "text_editor_")
_ANTHROPICS_TOOL_TOKENS = 1_024
_HINTS_OF_ANTHROPIC = frozenset({"web_search_options", "prediction", "moderation"})  # left out on the way


def input_tokens(asked: Asked, provider: str, model: str, media: Media) -> int:
    """The most tokens of input that this target can bill, once `fault_of` has found nothing."""
    tools = sum(1 for _ in _anthropics_tools(asked, provider))
    beside_text = media.tokens(provider, model) + _ANTHROPICS_TOOL_TOKENS * tools
    return len(asked.body) + SLACK_TOKENS + beside_text


def prediction_tokens(asked: Asked, provider: str) -> int:
    """What of a `prediction` does not come true is billed as output, beside the answer."""
    predicted = asked.fields.get("prediction")
    return len(write_json(predicted)) if predicted and is_sent(asked, provider, "prediction") else 0


def is_sent(asked: Asked, provider: str, name: str) -> bool:
    """Whether a member of the client's body reaches this provider; hints without a place there do not."""
    if asked.endpoint == "responses":
        return True
    if provider == "anthropic":
        return name not in _HINTS_OF_ANTHROPIC
    return name not in HOSTS[provider].lacks


def fault_of(asked: Asked, provider: str, model: str, media: Media) -> Fault | None:
    """What of the request nobody can bound at this target: where it stands, and why; None for nothing."""
    return (
        _member_fault(asked, provider)
        or _tool_fault(asked, provider)
        or _model_fault(model)
        or media.fault_at(provider, model)
    )


def _member_fault(asked: Asked, provider: str) -> Fault | None:
    fields = asked.fields
    for name in _MEMBERS.keys() & fields.keys():
        value = fields[name]
        if value not in _NOTHING and is_sent(asked, provider, name) and not _only_clears(value):
            return name, f"it {_MEMBERS[name]}"
    for google in (fields.get("google"), _member(fields.get("extra_body"), "google")):
        if _member(google, "cached_content") or _member(google, "cachedContent"):
            return "cached_content", f"it {_MEMBERS['cached_content']}"
    return None


def _member(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None


def _only_clears(value: object) -> bool:
    """Anthropic's context editing without compaction: it makes the input shorter, and takes one pass."""
    edits = _member(value, "edits")
    kinds = [_member(edit, "type") for edit in edits] if isinstance(edits, list) else []
    return bool(kinds) and all(str(kind).startswith("clear_") for kind in kinds)


def _tool_fault(asked: Asked, provider: str) -> Fault | None:
    own = {number for number, _ in _anthropics_tools(asked, provider)}
    for number, tool in _tools(asked):
        kind = tool.get("type")
        is_plain = kind is None and ("function" in tool or "input_schema" in tool)
        if not (is_plain or (isinstance(kind, str) and kind in _CLIENT_TOOLS) or number in own):
            return f"tools[{number}]", f"the host runs a tool of the type {kind!r}"
    return None


def _tools(asked: Asked) -> Iterator[tuple[int, dict[str, Any]]]:
    tools = asked.fields.get("tools")
    for number, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, dict):
            yield number, tool


def _anthropics_tools(asked: Asked, provider: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if provider == "anthropic":
        for number, tool in _tools(asked):
            if str(tool.get("type")).startswith(_ANTHROPICS_CLIENT_TOOLS):
                yield number, tool


@lru_cache(1024)
def _model_fault(model: str) -> Fault | None:
    full = model.lower()
    names = full, full.rpartition("/")[2]
    if any(fnmatchcase(name, glob) for glob in _SEARCHING_MODELS for name in names):
        return "model", "this model searches or runs tools by itself"
    return None
