from typing import Any

import pytest

from tests.providers.anthropic_case import (
    FORMAT,
    FRESH,
    MIDDLE,
    NEW,
    NEWEST,
    OLD,
    OTHER,
    body_of,
    built,
    dropped_of,
    exchange,
    refusal_of,
    tool,
)


@pytest.mark.parametrize(
    ("model", "version", "given", "sent", "dropped"),
    [
        (
            OLD,
            "2023-06-01",
            {"temperature": 1.7, "top_p": 0.5, "top_k": 9},
            {"temperature": 1, "top_p": 0.5, "top_k": 9},
            (),
        ),
        (MIDDLE, "2023-06-01", {"temperature": 0.2, "top_p": 0.5}, {"temperature": 0.2}, ("top_p",)),
        (MIDDLE, "2023-06-01", {"top_p": 0.5}, {"top_p": 0.5}, ()),
        (OTHER, "2023-06-01", {"temperature": 0, "top_p": 0.5}, {"temperature": 0, "top_p": 0.5}, ()),
        (NEWEST, "2023-06-01", {"temperature": 1.7, "top_k": 9}, {}, ("temperature", "top_k")),
        (NEWEST, "2023-06-01", {"temperature": 1, "top_p": 1.0}, {}, ()),
        (MIDDLE, "2026-10-21", {"temperature": 1.7, "top_p": 1}, {}, ("temperature",)),
        (NEWEST, "2026-10-21", {"temperature": 1.7}, {}, ("temperature",)),
        (
            MIDDLE,
            "2023-06-01",
            {"reasoning_effort": "low", "temperature": 0.2, "top_p": 0.96, "top_k": 4},
            {"top_p": 0.96},
            ("temperature", "top_k"),
        ),
        (
            MIDDLE,
            "2023-06-01",
            {"thinking": {"type": "enabled", "budget_tokens": 1024}, "top_p": 0.9},
            {},
            ("top_p",),
        ),
        (MIDDLE, "2023-06-01", {"temperature": None, "top_p": None, "top_k": None}, {}, ()),
    ],
)
def test_sampling_is_sent_where_it_is_taken(
    model: str, version: str, given: dict[str, Any], sent: dict[str, Any], dropped: tuple[str, ...]
) -> None:
    body = body_of(model, version, **given)
    assert {name: body[name] for name in ("temperature", "top_p", "top_k") if name in body} == sent
    assert dropped_of(model, version, **given) == dropped


@pytest.mark.parametrize(("name", "value"), [("temperature", "hot"), ("top_p", True), ("top_k", 1.5)])
def test_sampling_must_be_numbers(name: str, value: Any) -> None:
    assert refusal_of(**{name: value}).param == name


ADAPTIVE = {"type": "adaptive", "display": "summarized"}


@pytest.mark.parametrize(
    ("model", "effort", "thinking", "output"),
    [
        (MIDDLE, "none", None, None),
        (MIDDLE, "minimal", 1_024, None),
        (MIDDLE, "low", 2_048, None),
        (MIDDLE, "medium", 10_000, None),
        (MIDDLE, "high", 16_384, None),
        (MIDDLE, "xhigh", 32_768, None),
        (MIDDLE, "max", 32_768, None),
        (OTHER, "low", 2_048, None),
        (FRESH, "none", {"type": "disabled"}, None),
        (FRESH, "minimal", ADAPTIVE, "low"),
        (FRESH, "medium", ADAPTIVE, "medium"),
        (FRESH, "xhigh", ADAPTIVE, "max"),
        (FRESH, "max", ADAPTIVE, "max"),
        (NEW, "none", {"type": "disabled"}, None),
        (NEW, "xhigh", ADAPTIVE, "xhigh"),
        (NEWEST, "none", {"type": "between_tools"}, None),
        (NEWEST, "high", ADAPTIVE, "high"),
        ("claude-novel-1", "none", None, "low"),
        ("claude-novel-1", "xhigh", ADAPTIVE, "max"),
        (MIDDLE, None, None, None),
        (NEWEST, None, None, None),
    ],
)
def test_effort_becomes_thinking(model: str, effort: Any, thinking: Any, output: Any) -> None:
    body = body_of(model, reasoning_effort=effort)
    if isinstance(thinking, int):
        thinking = {"type": "enabled", "budget_tokens": thinking}
    assert body.get("thinking") == thinking
    assert body.get("output_config") == ({"effort": output} if output else None)
    assert dropped_of(model, reasoning_effort=effort) == ()


def test_a_model_that_cannot_think_is_not_asked_to() -> None:
    assert "thinking" not in body_of(OLD, reasoning_effort="high")
    assert dropped_of(OLD, reasoning_effort="high") == ("reasoning_effort",)
    assert dropped_of(OLD, reasoning_effort="none") == ()


@pytest.mark.parametrize(
    ("most", "budget"), [(20_000, 16_384), (16_384, 16_383), (1_025, 1_024), (1_024, None)]
)
def test_a_budget_leaves_room_for_the_answer(most: int, budget: int | None) -> None:
    body = body_of(max_tokens=most, reasoning_effort="high")
    assert body.get("thinking") == (budget and {"type": "enabled", "budget_tokens": budget})
    assert bool(dropped_of(max_tokens=most, reasoning_effort="high")) is (budget is None)


@pytest.mark.parametrize("effort", ["much", 1, ["low"], {}])
def test_an_effort_that_is_none_is_refused(effort: Any) -> None:
    assert refusal_of(reasoning_effort=effort).param == "reasoning_effort"


def test_thinking_by_budget_needs_the_thoughts_of_the_calls_before() -> None:
    fields: dict[str, Any] = {"reasoning_effort": "low", "tools": [tool()]}
    without = built(messages=exchange(), **fields)
    assert b"budget_tokens" not in (without.body or b"")
    assert without.dropped == ("reasoning_effort",)
    signed = [{"type": "reasoning.text", "text": "Hm.", "signature": "s"}]
    body = body_of(messages=exchange(reasoning_details=signed), **fields)
    assert body["thinking"]["budget_tokens"] == 2_048
    assert body["messages"][1]["content"][0] == {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    assert body_of(NEW, messages=exchange(), **fields)["thinking"] == ADAPTIVE


def test_a_forced_choice_stops_thinking_by_budget_only() -> None:
    fields: dict[str, Any] = {"reasoning_effort": "low", "tools": [tool()], "tool_choice": "required"}
    assert "thinking" not in body_of(**fields)
    assert dropped_of(**fields) == ("reasoning_effort",)
    assert body_of(NEW, **fields)["thinking"] == ADAPTIVE


def test_the_clients_own_thinking_counts() -> None:
    own = {"thinking": {"type": "disabled"}, "output_config": {"effort": "max", "novelty": 1}}
    body = body_of(NEW, reasoning_effort="low", response_format=FORMAT, **own)
    assert body["thinking"] == {"type": "disabled"}
    assert body["output_config"].pop("format")["type"] == "json_schema"
    assert body["output_config"] == {"effort": "max", "novelty": 1}
    assert body_of(NEW, reasoning_effort="low", output_config="odd")["output_config"] == "odd"


def test_json_by_a_tool_stops_thinking() -> None:
    model = "claude-sonnet-4-20250514"
    assert "thinking" not in body_of(model, response_format=FORMAT, reasoning_effort="low")
    assert dropped_of(model, response_format=FORMAT, reasoning_effort="low") == ("reasoning_effort",)
