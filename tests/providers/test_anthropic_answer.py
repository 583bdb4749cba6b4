import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from perpetuo.errors import UpstreamError
from perpetuo.providers.anthropic import Anthropic
from perpetuo.providers.base import Answer
from tests.providers.anthropic_case import ANSWERS, FOLDER, SECRET, STREAMS, asking, load, sse

CASES = {name: load(f"answers/{name}") for name in ANSWERS}
FAILING = [name for name, case in CASES.items() if "error" in case["expected"]]
WHOLE = [name for name in ANSWERS if name not in FAILING]


def read(case: dict[str, Any], body: bytes | None = None) -> Answer:
    request = asking(case["model"], **case["request"])
    body = json.dumps(case["answer"]).encode() if body is None else body
    return Anthropic().read_answer(request, body, secret=SECRET)


@pytest.fixture(autouse=True)
def same_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perpetuo.providers.anthropic_answer.time.time", lambda: 1234.5)


@pytest.mark.parametrize("name", WHOLE)
def test_an_answer_becomes_the_expected_completion(name: str) -> None:
    expected, answer = CASES[name]["expected"], read(CASES[name])
    completion = json.loads(answer.body)
    message = {"role": "assistant", "refusal": None, **expected["message"]}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": expected["finish_reason"]}
    usage = {"usage": expected["usage"]} if expected["usage"] else {}
    frame = {"id": "msg_01A", "created": 1234, "model": "claude-sonnet-4-5-20250929"}
    assert completion == {**frame, "object": "chat.completion", "choices": [choice], **usage}
    assert answer.model == frame["model"]
    parsed = ChatCompletion.model_validate(completion, strict=True)
    assert parsed.choices[0].finish_reason == expected["finish_reason"]


@pytest.mark.parametrize("name", FAILING)
def test_what_is_no_answer_raises_what_is_expected(name: str) -> None:
    expected = CASES[name]["expected"]["error"]
    with pytest.raises(UpstreamError) as caught:
        read(CASES[name])
    assert {key: getattr(caught.value, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "an empty body"),
        (b" \n", "an empty body"),
        (b"<html>", "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"error": {"message": "as said"}}', "as said"),
        (b'{"error": "as said"}', "as said"),
        (
            b'{"content":[{"type":"tool_use","input":' + b'{"a":' * 1010 + b"1" + b"}" * 1011 + b"]}",
            "too deeply",
        ),
    ],
)
def test_a_200_that_is_no_message_is_an_error(body: bytes, words: str) -> None:
    with pytest.raises(UpstreamError, match=words) as caught:
        read(CASES["nothing_said"], body)
    assert caught.value.status == 502


def test_usage_is_what_the_upstream_counted() -> None:
    usage = read(CASES["cache_counts"]).usage
    counts = (usage.prompt_tokens, usage.cached_tokens, usage.cache_write_tokens)
    assert counts == (119, 100, 7)
    assert (usage.completion_tokens, usage.reasoning_tokens, usage.source) == (40, 12, "provider")


def test_usage_is_estimated_where_nothing_was_counted() -> None:
    usage = read(CASES["no_usage"]).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.source) == (3, 1, "estimate")


def test_text_is_what_a_person_would_read() -> None:
    assert read(CASES["text_in_blocks"]).text == "Looking. Found."
    assert read(CASES["refusal_explained"]).text == "Not this."
    assert read(CASES["two_tools"]).text.startswith("f(")


@pytest.mark.parametrize("name", [name for name in STREAMS if "error" not in load(name)["expected"]])
def test_an_answer_that_came_as_a_stream_is_put_together(name: str) -> None:
    case = load(name)
    completion = json.loads(read(case, sse(name)).body)
    expected = case["expected"]
    assert completion["choices"][0]["message"] == {
        "role": "assistant",
        "refusal": None,
        **expected["message"],
    }
    assert completion["choices"][0]["finish_reason"] == expected["finish_reason"]
    assert completion["object"] == "chat.completion"


def test_an_answer_that_came_as_a_stream_is_never_cut_short() -> None:
    long = sse("text").replace(b'"Hel"', b'"' + b"x" * 2_000_000 + b'"')
    answer = read(load("text"), long)
    assert len(json.loads(answer.body)["choices"][0]["message"]["content"]) > 2_000_000
    assert b"truncated" not in answer.body


@pytest.mark.parametrize("name", ["error_after_content", "cut_in_the_middle"])
def test_a_stream_that_broke_off_is_no_answer(name: str) -> None:
    expected = load(name)["expected"]["error"]
    with pytest.raises(UpstreamError) as caught:
        read(load(name), sse(name))
    assert {key: getattr(caught.value, key) for key in expected} == expected


def test_every_recording_has_its_expectation() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(STREAMS)
    assert len(STREAMS) > 50
