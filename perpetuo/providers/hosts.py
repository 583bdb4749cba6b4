"""How each OpenAI-compatible host differs from OpenAI: one row a host, and nothing but data.

A field that a host lacks is left out and named where it is only a hint; where it shapes the answer the
request is refused (`openai_request`). What is not in a row is as OpenAI has it. Each row names its sources:
the host's documentation or a recorded answer, with the time when it was looked up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from perpetuo.providers.tool_ids import nine_character_id, short_id

Names = frozenset[str]
NONE: Names = frozenset()
_CALL = {"id", "type", "function", "custom"}
THOUGHTS = frozenset({"reasoning_content", "reasoning", "reasoning_details"})


@dataclass(frozen=True, slots=True)
class Host:
    """One row. The upper half is about requests, the lower about answers."""

    name: str
    auth: Literal["bearer", "api-key"] = "bearer"
    urls: Literal["openai", "azure"] = "openai"
    # The client's field -> the host's; a field that the host has in another spelling only.
    renames: Mapping[str, str] = field(default_factory=dict)
    lacks: Names = NONE  # OpenAI's fields that the host refuses, or ignores in silence
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # its words for OpenAI's values
    counts_unasked: bool = False  # streams say their usage anyway, and `stream_options` is refused
    new_limit_models: tuple[str, ...] = ()  # how the names begin of those that refuse `max_tokens`
    # The maximum's name where the client named none and `renames` has none either. Thoughts count inside it
    # everywhere: DeepSeek since R1-0528, xAI by its documentation only.
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    roles: Mapping[str, str] = field(default_factory=dict)
    name_roles: Names | None = None  # the roles whose messages may have a `name`; None for all
    message_renames: Mapping[str, str] = field(default_factory=dict)  # of the assistant's messages
    message_lacks: Names = NONE  # likewise
    call_members: Names | None = frozenset(_CALL)  # what may stand in an assistant's tool call; None for all
    call_ids: Callable[[str], str] | None = None  # puts a tool call's id into the form that it must have
    wants_thoughts_back: bool = False  # every assistant message of a talk with tools needs its thoughts
    unsigned_models: re.Pattern[str] | None = None  # those that take calls without a thought signature

    thinks_as_reasoning: bool = False  # `reasoning`, where most clients look for `reasoning_content`
    sends_whole_calls: bool = False  # a tool call's name begins another call, whatever its index says
    stops_after_calls: bool = False  # says "stop" where it means "tool_calls"
    done_finishes: bool = False  # `[DONE]` may come without a finish reason, and only after a whole answer
    counts_thoughts_in_total_only: bool = False
    bad_key: re.Pattern[str] | None = None  # what a 400 says that is about our key, not about the request
    model_prefix: str = ""  # what the list of models puts before each name

    @property
    def has_other_messages(self) -> bool:
        """Whether a system's or a user's message may have to change."""
        return bool(self.roles) or self.name_roles is not None


# Fields of OpenAI's own services, newer than what most hosts know. Source: its OpenAPI document 2.3.0.
_OWN = frozenset(
    {
        "audio",
        "modalities",
        "moderation",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "store",
        "verbosity",
        "web_search_options",
    }
)
_OLD_LIMIT = {"max_completion_tokens": "max_tokens"}
_NO_DEVELOPER = {"developer": "system"}

# "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'": the
# o series and all since GPT-5. On Azure the deployment's name is all there is to go by.
_REASONERS = ("gpt-5", "gpt-6", "o1", "o3", "o4", "codex")

# OpenAI. Ids above 40 characters get 400 ("string too long"), unknown members of messages too.
OPENAI = Host(
    "openai",
    new_limit_models=_REASONERS,
    limit_name="max_completion_tokens",
    message_lacks=THOUGHTS,
    call_ids=short_id,
)

# learn.microsoft.com, "Azure OpenAI in Azure AI Foundry Models REST API reference" and "API version
# lifecycle", 2026: the models are OpenAI's; the key goes into `api-key`, the URL has two shapes.
AZURE = Host(
    "azure",
    auth="api-key",
    urls="azure",
    new_limit_models=_REASONERS,
    limit_name="max_completion_tokens",
    message_lacks=THOUGHTS,
    call_ids=short_id,
)

# console.groq.com/docs/openai and /docs/api-reference, 2026: 400 for logprobs, top_logprobs, logit_bias,
# messages[].name and n > 1; whatever else it does not know is "property … is unsupported", in messages too
# (reasoning_content: reports until September 2026).
GROQ = Host(
    "groq",
    lacks=_OWN | {"logprobs", "top_logprobs", "logit_bias", "n", "prediction", "prompt_cache_key"},
    limit_name="max_completion_tokens",
    values={"service_tier": {"default": "on_demand"}},
    name_roles=NONE,
    message_lacks=THOUGHTS | {"annotations", "audio", "refusal"},
    thinks_as_reasoning=True,
)

# docs.mistral.ai/api and the request models of its Python client, October 2026: everything else is 422
# "Extra inputs are not permitted", `max_completion_tokens`, `stream_options` and members of messages among
# them. Ids of tool calls: "must be a-z, A-Z, 0-9, with a length of 9".
MISTRAL = Host(
    "mistral",
    renames=_OLD_LIMIT | {"seed": "random_seed", "dimensions": "output_dimension"},
    lacks=_OWN | {"logprobs", "top_logprobs", "logit_bias", "user"},
    values={"tool_choice": {"required": "any"}},
    counts_unasked=True,
    roles=_NO_DEVELOPER,
    name_roles=frozenset({"tool"}),
    message_lacks=THOUGHTS | {"annotations", "audio", "function_call", "refusal"},
    call_ids=nine_character_id,
)

# docs.together.ai/reference/chat-completions-1, 2026: `max_tokens`; the finish reason may be "eos".
TOGETHER = Host("together", renames=_OLD_LIMIT, roles=_NO_DEVELOPER, thinks_as_reasoning=True)

# openrouter.ai/docs/api-reference, 2026: drops by itself what a model lacks; takes either name of the limit,
# and thoughts back under any of theirs.
OPENROUTER = Host("openrouter", call_members=None, thinks_as_reasoning=True)

# api-docs.deepseek.com/api/create-chat-completion and /guides/thinking_mode, 2026: unknown fields are ignored
# in silence, `max_completion_tokens` too; "Missing `reasoning_content` field in the assistant message" where
# a talk with tools leaves it out, which one begun at another provider must; an empty one will do.
DEEPSEEK = Host(
    "deepseek",
    renames=_OLD_LIMIT,
    lacks=_OWN
    | {"logit_bias", "n", "parallel_tool_calls", "prediction", "prompt_cache_key", "seed", "service_tier"},
    roles=_NO_DEVELOPER,
    message_lacks=frozenset({"reasoning", "reasoning_details"}),
    wants_thoughts_back=True,
)

# docs.x.ai/docs/api-reference, 2026: a wrong key is a 400; names are for users' messages only; `max_tokens`
# is deprecated.
XAI = Host(
    "xai",
    limit_name="max_completion_tokens",
    name_roles=frozenset({"user"}),
    bad_key=re.compile(r"incorrect api key", re.IGNORECASE),
)

# ai.google.dev/gemini-api/docs/openai, 2026: 'Unknown name "…": Cannot find field.' for what it lacks; tool
# calls come whole and without index, their streams end with "stop" (googleapis/python-genai #2868, August
# 2026); thoughts are in the total only. /docs/thought-signatures: from Gemini 3 on each first call of a step
# needs its signature, and there is a word for calls that have none.
GEMINI = Host(
    "gemini",
    lacks=_OWN
    | {"frequency_penalty", "logit_bias", "logprobs", "metadata", "prediction", "presence_penalty"}
    | {"prompt_cache_key", "seed", "top_logprobs", "user"},
    roles=_NO_DEVELOPER,
    message_lacks=THOUGHTS,
    call_members=frozenset(_CALL | {"extra_content"}),
    unsigned_models=re.compile(r"(?:models/)?gemini-[12]\b|(?!(?:models/)?gemini)"),
    sends_whole_calls=True,
    stops_after_calls=True,
    counts_thoughts_in_total_only=True,
    bad_key=re.compile(r"API key (?:not valid|expired|not found)|API_KEY_INVALID"),
    model_prefix="models/",
)

# docs.fireworks.ai/api-reference/post-chatcompletions, 2026.
FIREWORKS = Host(
    "fireworks",
    renames=_OLD_LIMIT,
    roles=_NO_DEVELOPER,
    message_lacks=frozenset({"reasoning", "reasoning_details"}),
)

# docs.ollama.com/api/openai-compatibility and `openai/openai.go` of its source, 2026: fields that it does not
# name are ignored in silence; roles go into the model's template as they are; older versions give every tool
# call the index 0, and end an answer whose reason they do not know with `[DONE]` alone.
OLLAMA = Host(
    "ollama",
    renames=_OLD_LIMIT,
    lacks=_OWN
    | {"logit_bias", "metadata", "n", "parallel_tool_calls", "prediction", "prompt_cache_key"}
    | {"service_tier"},
    roles=_NO_DEVELOPER,
    message_renames={"reasoning_content": "reasoning"},
    thinks_as_reasoning=True,
    sends_whole_calls=True,
    done_finishes=True,
)

# docs.vllm.ai/en/stable/serving/openai_compatible_server.html, 2026: either name of the limit; what it does
# not know is ignored, what it knows beyond OpenAI's stands at the top level.
VLLM = Host("vllm", call_members=None, thinks_as_reasoning=True)

# Whoever it is: nothing is known of it, so nothing is taken away.
CUSTOM = Host("custom", call_members=None, thinks_as_reasoning=True)

HOSTS = {
    host.name: host
    for host in (
        OPENAI,
        GROQ,
        MISTRAL,
        TOGETHER,
        OPENROUTER,
        DEEPSEEK,
        XAI,
        GEMINI,
        FIREWORKS,
        AZURE,
        OLLAMA,
        VLLM,
        CUSTOM,
    )
}
