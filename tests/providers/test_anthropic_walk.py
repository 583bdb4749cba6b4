import json
from typing import Any

import pytest
from flask.testing import FlaskClient

from perpetuo.gateway.walk import Gateway
from perpetuo.providers import catalog
from perpetuo.providers.anthropic import Anthropic
from tests.fake_upstream import Exchange, FakeUpstream, Reply, status
from tests.providers.anthropic_case import MIDDLE, USER, load, sse
from tests.tenants import Tenant, new_tenant


@pytest.fixture
def tenant(gateway: Gateway, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> Tenant:
    monkeypatch.setitem(catalog._ADAPTERS, "anthropic", Anthropic())
    tenant = new_tenant(gateway)
    base_url = upstream.base_url.removesuffix("/v1")
    tenant.add_provider_key(base_url, "sk-ant-1", provider="anthropic")
    return tenant


def streaming(body: bytes) -> Reply:
    def reply(exchange: Exchange) -> None:
        exchange.start(headers={"Content-Type": "text/event-stream"})
        exchange.write(body, last=True)

    return reply


def ask(client: FlaskClient, tenant: Tenant, **fields: Any) -> Any:
    asked = {"model": MIDDLE, "messages": [USER], **fields}
    return client.post("/v1/chat/completions", json=asked, headers=tenant.headers)


def events_of(answer: Any) -> list[str]:
    events = answer.get_data(as_text=True).split("\n\n")
    assert events.pop() == ""
    return [event.removeprefix("data: ") for event in events]


def test_a_plain_call(client: FlaskClient, tenant: Tenant, upstream: FakeUpstream) -> None:
    case = load("answers/thinking_text_and_a_tool")
    upstream.reply = status(200, case["answer"])
    answer = ask(client, tenant, max_tokens=99)
    assert answer.status_code == 200
    assert answer.json["choices"][0]["message"]["tool_calls"] == case["expected"]["message"]["tool_calls"]
    (asked,) = upstream.requests
    assert (asked.path, asked.headers["x-api-key"]) == ("/v1/messages", "sk-ant-1")
    assert "authorization" not in asked.headers
    assert asked.json["max_tokens"] == 99


def test_a_long_plain_call_is_streamed_by_the_upstream_and_whole_for_the_client(
    client: FlaskClient, tenant: Tenant, upstream: FakeUpstream
) -> None:
    upstream.reply = streaming(sse("thinking_and_text"))
    answer = ask(client, tenant)
    assert answer.json["object"] == "chat.completion"
    assert answer.json["choices"][0]["message"]["content"] == "42"
    assert upstream.requests[0].json["stream"] is True


def test_a_stream(client: FlaskClient, tenant: Tenant, upstream: FakeUpstream) -> None:
    upstream.reply = streaming(sse("text_and_two_tools"))
    *chunks, done = events_of(ask(client, tenant, stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert json.loads(chunks[-2])["choices"][0]["finish_reason"] == "tool_calls"
    assert json.loads(chunks[-1])["usage"]["total_tokens"] == 50


def test_an_error_before_content_has_its_status(
    client: FlaskClient, tenant: Tenant, upstream: FakeUpstream
) -> None:
    upstream.reply = streaming(sse("error_of_the_rate"))
    answer = ask(client, tenant, stream=True)
    assert (answer.status_code, answer.json["error"]["code"]) == (429, "upstream_rate_limited")


def test_an_error_after_content_ends_the_stream(
    client: FlaskClient, tenant: Tenant, upstream: FakeUpstream
) -> None:
    upstream.reply = streaming(sse("error_after_content"))
    *_, last = events_of(ask(client, tenant, stream=True))
    error = {"message": "Overloaded", "type": "upstream_error", "param": None, "code": "upstream_error"}
    assert json.loads(last) == {"error": error}


@pytest.mark.parametrize("stream", [False, True])
def test_what_anthropic_cannot_do_is_refused_before_it_is_asked(
    client: FlaskClient, tenant: Tenant, upstream: FakeUpstream, stream: bool
) -> None:
    answer = ask(client, tenant, n=2, stream=stream)
    assert answer.status_code == 400
    assert (answer.json["error"]["param"], answer.json["error"]["code"]) == ("n", "unsupported_parameter")
    assert upstream.requests == []
