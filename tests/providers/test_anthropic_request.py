import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetuo.errors import InvalidRequest
from perpetuo.providers.anthropic import Anthropic
from tests.providers.anthropic_case import (
    MIDDLE,
    NEWEST,
    OLD,
    OTHER,
    asking,
    body_of,
    built,
    dropped_of,
    refusal_of,
    tool,
)


def test_the_smallest_request() -> None:
    assert body_of(max_tokens=9) == {
        "model": MIDDLE,
        "max_tokens": 9,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Say hello"}]}],
    }


@pytest.mark.parametrize(
    ("model", "fields", "most"),
    [
        (MIDDLE, {}, 64_000),
        (OLD, {}, 4_096),
        ("claude-novel-1", {}, 32_768),
        (OTHER, {}, 32_768),
        (MIDDLE, {"max_tokens": 5}, 5),
        (MIDDLE, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        (MIDDLE, {"max_tokens": 5, "max_completion_tokens": None}, 5),
        (MIDDLE, {"max_tokens": 64_001}, 64_000),
        (OTHER, {"max_tokens": 999_999}, 999_999),
    ],
)
def test_max_tokens_is_always_sent(model: str, fields: dict[str, Any], most: int) -> None:
    assert body_of(model, **fields)["max_tokens"] == most


@pytest.mark.parametrize("most", [0, -1, 1.5, "9", True])
def test_max_tokens_must_be_a_number(most: Any) -> None:
    assert refusal_of(max_tokens=most).param == "max_tokens"


@pytest.mark.parametrize(
    ("stop", "sent"),
    [
        ("END", ["END"]),
        (["a", "\n", "", "b"], ["a", "b"]),
        (["\n"], None),
        ("", None),
        (None, None),
        ([], None),
    ],
)
def test_stop_becomes_stop_sequences(stop: Any, sent: Any) -> None:
    assert body_of(stop=stop).get("stop_sequences") == sent


@pytest.mark.parametrize("stop", [1, ["a", 1], {"a": 1}])
def test_stop_must_be_texts(stop: Any) -> None:
    assert refusal_of(stop=stop).param == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
    ],
)
def test_what_changes_the_shape_of_the_answer_is_refused(fields: dict[str, Any], param: str) -> None:
    error = refusal_of(**fields)
    assert (error.code, error.param) == ("unsupported_parameter", param)


def test_parameters_without_effect_are_left_out_silently() -> None:
    without = {"n": 1, "logprobs": False, "top_logprobs": 0, "modalities": ["text"], "audio": None}
    without |= {"store": False, "metadata": {}, "presence_penalty": 0, "stream_options": {}, "models": ["a"]}
    request = built(**without, max_tokens=9)
    assert request.dropped == ()
    assert json.loads(request.body or b"") == body_of(max_tokens=9)


HINTS = ["metadata", "store", "seed", "logit_bias", "presence_penalty", "frequency_penalty", "prediction"]
HINTS += ["verbosity", "moderation", "web_search_options", "prompt_cache_key", "prompt_cache_options"]
HINTS += ["prompt_cache_retention", "min_p", "repetition_penalty"]


@pytest.mark.parametrize("name", HINTS)
def test_hints_are_dropped_and_named(name: str) -> None:
    request = built(**{name: 1}, max_tokens=9)
    assert request.dropped == (name,)
    assert json.loads(request.body or b"") == body_of(max_tokens=9)
    assert dropped_of(**{name: None}) == ()


def test_seed_zero_is_a_seed() -> None:
    assert dropped_of(seed=0) == ("seed",)


def test_other_members_pass_unchanged() -> None:
    own = {"cache_control": {"type": "ephemeral"}, "mcp_servers": [{"url": "x"}], "novelty": {"a": None}}
    body = body_of(**own, nothing=None)
    assert {name: body[name] for name in own} == own
    assert "nothing" not in body


@pytest.mark.parametrize(
    ("fields", "user_id"),
    [
        ({"user": "u-1"}, "u-1"),
        ({"user": "u-1", "safety_identifier": "s-1"}, "s-1"),
        ({"user": ""}, None),
        ({"user": 5}, None),
    ],
)
def test_the_user_is_passed_on(fields: dict[str, Any], user_id: str | None) -> None:
    assert body_of(**fields).get("metadata") == ({"user_id": user_id} if user_id else None)


@pytest.mark.parametrize(
    "user", ["ann@example.com", "+47 22 33 44 55", "(022) 334-4556", "x" * 257, "a@\ud800"]
)
def test_a_user_who_may_not_be_named_is_hashed(user: str) -> None:
    sent = body_of(user=user)["metadata"]["user_id"]
    assert len(sent) == 64
    assert (
        sent == body_of(user=user)["metadata"]["user_id"] != body_of(user=user + "@")["metadata"]["user_id"]
    )


@pytest.mark.parametrize(
    ("tier", "sent", "dropped"),
    [
        ("auto", "auto", ()),
        ("default", "standard_only", ()),
        ("flex", None, ("service_tier",)),
        (None, None, ()),
        (["auto"], None, ("service_tier",)),
    ],
)
def test_the_service_tier_is_translated(tier: Any, sent: Any, dropped: tuple[str, ...]) -> None:
    assert body_of(service_tier=tier).get("service_tier") == sent
    assert dropped_of(service_tier=tier) == dropped


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "f"}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool(""), tool()]}, "tools[0].function.name"),
        ({"tools": [tool(parameters="odd")]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": ["x"]}]}, "tools[0].type"),
        ({"functions": ["f"]}, "functions[0]"),
        ({"tools": [tool()], "tool_choice": "some"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": ["auto"]}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        (
            {"tools": [tool()], "tool_choice": {"type": "allowed_tools"}},
            "tool_choice.allowed_tools.tools",
        ),
        ({"response_format": "json"}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            "response_format.json_schema.schema",
        ),
        ({"messages": [{"role": "robot"}]}, "messages[0].role"),
    ],
)
def test_what_is_malformed_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refusal_of(**fields).param == param


def test_a_body_nested_too_deeply_is_refused() -> None:
    deep: Any = 1
    for _ in range(1_010):
        deep = [deep]
    assert refusal_of(novelty=deep).code == "invalid_json"


def test_lone_surrogates_pass() -> None:
    body = built(messages=[{"role": "user", "content": "half \ud83d"}]).body or b""
    assert b"half \\ud83d" in body


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.floats(0, 2)
    | st.sampled_from(["auto", "json_schema", "f"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "json_schema", "schema"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)
FIELDS = ["tools", "functions", "tool_choice", "function_call", "response_format", "stop", "temperature", "n"]
FIELDS += ["reasoning_effort", "thinking", "output_config", "max_tokens", "user", "service_tier", "metadata"]


@given(
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6),
    st.sampled_from([OLD, MIDDLE, NEWEST, OTHER]),
)
def test_any_parameters_are_translated_or_refused_by_name(fields: dict[str, Any], model: str) -> None:
    try:
        body = body_of(model, **fields)
    except InvalidRequest:
        assert refusal_of(model, **fields).param
        return
    assert body["model"] == model
    assert body["messages"]
    Anthropic().open_stream(asking(model, **fields), keep_text=True)
