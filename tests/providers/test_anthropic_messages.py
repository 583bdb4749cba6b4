import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetuo.errors import InvalidRequest
from perpetuo.providers.anthropic_messages import read_messages
from perpetuo.providers.tool_ids import nine_character_id, word_id

CACHE = {"type": "ephemeral"}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(call_id: str, arguments: Any = "{}", name: str = "f") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict[str, Any], content: Any = None, **more: Any) -> dict[str, Any]:
    return said("assistant", content, tool_calls=list(calls), **more)


def result(call_id: str, content: Any = "1", **more: Any) -> dict[str, Any]:
    return said("tool", content, tool_call_id=call_id, **more)


def tool_use(call_id: str, value: dict[str, Any], name: str = "f") -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": value}


def tool_result(call_id: str, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, **({"content": "1"} | more)}


USER = said("user", "Hi")


def turns_of(*messages: Any) -> list[Any]:
    return [(turn["role"], turn["content"]) for turn in read_messages(messages).turns]


def refusal_of(*messages: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read_messages(messages)
    assert (caught.value.status, caught.value.type) == (400, "invalid_request_error")
    return caught.value


def test_system_and_developer_messages_are_hoisted_from_anywhere() -> None:
    messages = [said("system", "One."), USER, said("developer", [text("Tw"), text("o.")]), said("system", "")]
    read = read_messages(messages)
    assert read.system == [text("One."), text("Two.")]
    assert read.turns == [{"role": "user", "content": [text("Hi")]}]


def test_a_cache_mark_stays_where_it_was_put() -> None:
    parts = [text("a"), text("b", cache_control=CACHE), text("c")]
    system = read_messages([said("system", parts), USER]).system
    assert system == [text("ab", cache_control=CACHE), text("c")]
    assert read_messages([said("system", "a", cache_control=CACHE), USER]).system == [
        text("a", cache_control=CACHE)
    ]
    marked = said("user", [text("x", cache_control=CACHE), text("y")])
    assert turns_of(marked) == [("user", [text("x", cache_control=CACHE), text("y")])]
    assert turns_of(said("user", "x", cache_control=CACHE)) == [("user", [text("x", cache_control=CACHE)])]
    assert turns_of(said("user", [text("x", cache_control="on")])) == [("user", [text("x")])]


def test_system_alone_becomes_a_question() -> None:
    read = read_messages([said("system", "One."), said("developer", "Two.")])
    assert (read.system, read.turns) == ([text("One.")], [{"role": "user", "content": [text("Two.")]}])


def test_user_messages_in_a_row_become_one_turn() -> None:
    messages = [said("user", "a", name="ann"), said("user", [text("b")]), said("assistant", "c")]
    assert turns_of(*messages, USER)[:2] == [("user", [text("a"), text("b")]), ("assistant", [text("c")])]


def test_blank_texts_and_empty_turns_are_left_out() -> None:
    messages = [said("user", [text(""), text("a"), text(" \n")]), said("assistant", ""), said("user", "b")]
    assert turns_of(*messages) == [("user", [text("a"), text("b")])]


def test_the_assistant_does_not_begin() -> None:
    assert turns_of(said("assistant", "a"), USER)[0] == ("user", [text("(continue)")])


def test_a_prefill_ends_without_blanks() -> None:
    assert turns_of(USER, said("assistant", "Once  \n"))[-1] == ("assistant", [text("Once")])
    assert turns_of(USER, said("assistant", "Once "), USER)[1] == ("assistant", [text("Once ")])


def test_refusals_and_parts_of_the_assistant_are_text() -> None:
    parts = [text("a"), {"type": "refusal", "refusal": "b"}]
    assert turns_of(USER, said("assistant", parts), USER)[1] == ("assistant", [text("a"), text("b")])
    assert turns_of(USER, said("assistant", None, refusal="no"), USER)[1] == ("assistant", [text("no")])


def test_results_come_first_in_one_turn() -> None:
    messages = [
        USER,
        calling(call("a"), call("b"), content="So."),
        result("a"),
        result("b"),
        said("user", "?"),
    ]
    assert turns_of(*messages)[1:] == [
        ("assistant", [text("So."), tool_use("a", {}), tool_use("b", {})]),
        ("user", [tool_result("a"), tool_result("b"), text("?")]),
    ]
    late = [*messages[:3], messages[4], messages[3]]
    assert turns_of(*late)[2][1][-1] == text("?")


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("", {}),
        (None, {}),
        (" ", {}),
        ('{"a": [1]}', {"a": [1]}),
        ({"a": 1}, {"a": 1}),
        ('{"a": ', {"_raw": '{"a": '}),
        ("[1]", {"_raw": "[1]"}),
        ("\ud800", {"_raw": "\ud800"}),
    ],
)
def test_arguments_become_an_object(arguments: Any, value: dict[str, Any]) -> None:
    blocks = turns_of(USER, calling(call("a", arguments)), result("a"))[1][1]
    assert blocks == [tool_use("a", value)]


def test_foreign_ids_are_rewritten_alike_in_call_and_result() -> None:
    ids = ["functions.get:0", "functions.get:1", "functions_get_0", "Bash:0", "call_x|fc_y", "ok-1_A", ""]
    turns = turns_of(USER, calling(*map(call, ids)), *map(result, ids))
    used, answered = [block["id"] for block in turns[1][1]], [block["tool_use_id"] for block in turns[2][1]]
    assert used == answered
    assert len(set(used)) == len(ids)
    assert all(re.fullmatch("[a-zA-Z0-9_-]+", each) for each in used)
    assert used[2] == "functions_get_0"
    assert used[5] == "ok-1_A"


@given(st.text(max_size=60), st.text(max_size=60))
def test_ids_travel_into_every_form_and_stay_apart(one: str, other: str) -> None:
    for rewrite, form in [
        (word_id, "[a-zA-Z0-9_-]+"),
        (lambda given: word_id(given, 40), "[a-zA-Z0-9_-]{1,40}"),
        (nine_character_id, "[a-zA-Z0-9]{9}"),
    ]:
        new = rewrite(one)
        assert re.fullmatch(form, new)
        assert rewrite(new) == new
        assert (new == rewrite(other)) is (one == other)


def test_results_keep_their_form() -> None:
    parts = [text("a"), {"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
    messages = [result("a", parts), result("b", ""), result("c", None), result("d", "1", is_error=True)]
    blocks = turns_of(USER, calling(*map(call, "abcd")), *messages)[2][1]
    image = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
    assert blocks[0] == tool_result("a", content=[text("a"), image])
    assert blocks[1:3] == [{"type": "tool_result", "tool_use_id": each} for each in "bc"]
    assert blocks[3] == tool_result("d", is_error=True)


def test_legacy_calls_are_paired_in_order() -> None:
    asks = said("assistant", None, function_call={"name": "f", "arguments": '{"a":1}'})
    turns = turns_of(USER, asks, said("function", "1", name="f"), asks, said("function", "2", name="f"))
    assert turns[1][1][0]["input"] == {"a": 1}
    assert turns[1][1][0]["id"] == turns[2][1][0]["tool_use_id"]
    assert turns[3][1][0]["id"] == turns[4][1][0]["tool_use_id"] != turns[1][1][0]["id"]


def test_legacy_calls_in_a_row_are_answered_in_order() -> None:
    asks = [said("assistant", None, function_call={"name": name}) for name in "fg"]
    turns = turns_of(USER, *asks, said("function", "1", name="f"), said("function", "2", name="g"))
    called = [block["id"] for block in turns[1][1]]
    assert len(set(called)) == 2
    assert called == [block["tool_use_id"] for block in turns[2][1]]


def test_names_of_tools_are_those_of_the_definitions() -> None:
    read = read_messages(
        [USER, calling(call("a", name="x.y"), call("b", name="f")), result("a"), result("b")]
    )
    assert read.tool_names == [word_id("x.y", 64), "f"]


SIGNED = {
    "type": "reasoning.text",
    "text": "Hm.",
    "signature": "sig==",
    "format": "anthropic-claude-v1",
    "index": 0,
}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "sig=="}


@pytest.mark.parametrize(
    ("more", "thoughts"),
    [
        ({"reasoning_details": [SIGNED]}, [THOUGHT]),
        ({"reasoning_details": [{**SIGNED, "text": None}]}, [{**THOUGHT, "thinking": ""}]),
        (
            {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x=="}]},
            [{"type": "redacted_thinking", "data": "x=="}],
        ),
        ({"thinking_blocks": [THOUGHT, {"type": "redacted_thinking", "data": "x"}]}, None),
        ({"reasoning_details": [{**SIGNED, "format": "google-gemini-v1"}]}, []),
        ({"reasoning_details": [{**SIGNED, "signature": ""}]}, []),
        ({"reasoning_details": [{"type": "reasoning.summary", "summary": "x"}, 1]}, []),
        ({"reasoning_details": 1, "thinking_blocks": 1}, []),
        ({"reasoning_content": "Hm."}, []),
    ],
)
def test_thoughts_go_back_first_and_only_with_their_signature(more: Any, thoughts: Any) -> None:
    blocks = turns_of(USER, calling(call("a"), content="So.", **more), result("a"))[1][1]
    expected = more["thinking_blocks"] if thoughts is None else thoughts
    assert blocks == [*expected, text("So."), tool_use("a", {})]


def test_a_history_of_calls_without_thoughts_is_noticed() -> None:
    exchange = [USER, calling(call("a")), result("a")]
    assert read_messages(exchange).ends_in_unthought_calls
    assert not read_messages([*exchange, said("assistant", "b"), USER]).ends_in_unthought_calls
    assert not read_messages([USER]).ends_in_unthought_calls
    thought = [USER, calling(call("a"), reasoning_details=[SIGNED]), result("a")]
    assert not read_messages(thought).ends_in_unthought_calls


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (["Hi"], "messages[0]"),
        ([said("robot", "Hi")], "messages[0].role"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([said("user", "")], "messages"),
        ([said("user", 1)], "messages[0].content"),
        ([said("user", ["Hi"])], "messages[0].content[0]"),
        ([said("user", [text("Hi"), {"type": "text", "text": 1}])], "messages[0].content[1].text"),
        ([said("user", [{"type": "hologram"}])], "messages[0].content[0].type"),
        ([said("system", [{"type": "image_url"}]), USER], "messages[0].content[0].type"),
        ([USER, said("assistant", [{"type": "image_url"}])], "messages[1].content[0].type"),
        ([USER, said("assistant", "a", tool_calls="b")], "messages[1].tool_calls"),
        ([USER, calling({"id": "a"})], "messages[1].tool_calls[0]"),
        ([USER, calling({**call("a"), "id": None})], "messages[1].tool_calls[0].id"),
        ([USER, calling(call("a", name=""))], "messages[1].tool_calls[0].function.name"),
        ([USER, calling(call("a"))], "messages[1].tool_calls"),
        ([USER, calling(call("a")), USER], "messages[1].tool_calls"),
        ([USER, calling(call("a"), call("b")), result("a")], "messages[1].tool_calls"),
        ([USER, result("a")], "messages[1].tool_call_id"),
        (
            [USER, calling(call("a")), result("a"), said("assistant", "b"), result("a")],
            "messages[4].tool_call_id",
        ),
        ([USER, said("tool", "1")], "messages[1].tool_call_id"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(messages: Any, param: str) -> None:
    assert refusal_of(*messages).param == param


CONTENTS = st.none() | st.sampled_from(["", " ", "Hi"]) | st.just([text("a"), text("")])
MESSAGES = st.one_of(
    st.builds(said, st.sampled_from(["system", "user", "assistant", "developer"]), CONTENTS),
    st.builds(lambda ids: calling(*map(call, ids)), st.sets(st.sampled_from("abc"), min_size=1)),
    st.builds(result, st.sampled_from("abc")),
)


@given(st.lists(MESSAGES, min_size=1, max_size=10))
def test_turns_alternate_and_pair_or_are_refused(messages: list[Any]) -> None:
    try:
        read = read_messages(messages)
    except InvalidRequest:
        assert refusal_of(*messages).param
        return
    roles = [turn["role"] for turn in read.turns]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
    asked: list[str] = []
    for turn in read.turns:
        kinds = [block["type"] for block in turn["content"]]
        results = [block["tool_use_id"] for block in turn["content"] if block["type"] == "tool_result"]
        assert kinds[: len(results)] == ["tool_result"] * len(results)
        assert sorted(set(results)) == sorted(asked)
        asked = sorted({block["id"] for block in turn["content"] if block["type"] == "tool_use"})
        assert all(block["text"].strip() for block in turn["content"] if block["type"] == "text")
    assert not asked
