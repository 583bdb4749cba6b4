import json
from pathlib import Path

import openai
import pytest

from tests.fake_upstream import cut_after, status, stream

FOLDER = Path(__file__).parent.parent / "streams" / "openai" / "responses"
ASKED = {
    "model": "gpt-4o",
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "Say hello"}]}],
}


def recorded(name):
    return (FOLDER / name).read_bytes()


def test_a_whole_response_passes_and_is_counted(client, upstream, rows):
    upstream.reply = status(200, recorded("answer.json"))
    response = client.responses.create(**ASKED)
    sent = json.loads(recorded("answer.json"))
    assert (response.id, response.usage.total_tokens) == (sent["id"], sent["usage"]["total_tokens"])
    assert upstream.requests[0].path == "/v1/responses"
    (row,) = rows()
    assert (row["endpoint"], row["status"], row["stream"]) == ("responses", "ok", False)
    assert row["prompt_tokens"] == sent["usage"]["input_tokens"]
    assert row["preview_prompt"] == "Say hello"
    assert row["preview_answer"]


@pytest.mark.parametrize("name", ["text", "tools", "incomplete"])
def test_a_streamed_response_passes_with_its_own_events(client, upstream, rows, name):
    upstream.reply = stream(pieces=[recorded(f"{name}.sse")])
    events = list(client.responses.create(**ASKED, stream=True))
    kinds, response = [event.type for event in events], events[-1].response
    assert kinds[0] == "response.created"
    assert kinds[-1] == ("response.incomplete" if name == "incomplete" else "response.completed")
    (row,) = rows()
    assert (row["endpoint"], row["status"], row["stream"]) == ("responses", "ok", True)
    assert row["total_tokens"] == response.usage.total_tokens
    assert row["usage_source"] == "provider"


def test_the_row_is_settled_before_the_last_event(client, upstream, rows):
    upstream.reply = stream(pieces=[recorded("text.sse")])
    with client.responses.stream(**ASKED) as events:
        for event in events:
            if event.type == "response.completed":
                assert [row["status"] for row in rows()] == ["ok"]
                break


def test_a_stream_that_is_cut_ends_in_its_own_error_event(client, upstream, rows):
    whole = recorded("text.sse")
    upstream.reply = cut_after(whole.index(b"event: response.completed"), stream(pieces=[whole]))
    with pytest.raises(openai.APIError) as caught, client.responses.stream(**ASKED) as events:
        list(events)
    assert caught.value.code == "upstream_error"
    assert [row["status"] for row in rows()] == ["error"]


def test_a_refusal_keeps_its_status_and_words(client, upstream, rows):
    upstream.reply = status(400)
    with pytest.raises(openai.BadRequestError, match="fake 400"):
        client.responses.create(**ASKED)
    assert [row["http_status"] for row in rows()] == [400]


def test_of_several_providers_only_those_that_have_it_are_asked(client, tenant, upstream, rows):
    tenant.add_provider_key(upstream.base_url, provider="groq", models=["gpt-4o"], priority=-1)
    tenant.add_provider_key(upstream.base_url, provider="custom", models=["gpt-4o"])
    upstream.reply = status(200, recorded("answer.json"))
    client.responses.create(**ASKED)
    assert [row["provider"] for row in rows()] == ["custom"]
