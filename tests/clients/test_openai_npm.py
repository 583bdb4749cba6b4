import base64
import json
import socket

import psutil
import pytest

from perpetuo.models import ProviderKey
from tests.clients.conftest import MAX_BODY_BYTES
from tests.clients.npm_client import NodeProcess, NpmClient, NpmError
from tests.clients.test_odd_upstreams import BROKEN, FAILED, TOOLS, WHOLE
from tests.clients.test_openai_python import CALLS, CHAT, FORCED, MESSAGES, WEATHER, outcomes, refusal, said
from tests.fake_upstream import auto, completion, cut_after, event, hang, html, stall_after, status, stream

ASKED = {**CHAT, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def node(site):
    """Ends before the site, whose shutdown would wait for its idle connections."""
    with NodeProcess() as node:
        yield node


@pytest.fixture
def client(node, site, tenant):
    """As the Python tests' it does not retry unless told to."""
    return NpmClient(node, {"baseURL": site.base_url, "apiKey": tenant.key, "maxRetries": 0})


@pytest.fixture
def patient(client):
    """Retries twice, as the client does where nothing is set."""
    return client.with_options(maxRetries=2)


def message_of(answer):
    return answer["choices"][0]["message"]


def text_of(chunks):
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def told(error):
    return error.kind, error.status, error.type, error.code, error.param


def test_a_completion(client, rows):
    seen = client.call("create", **CHAT)
    assert message_of(seen["answer"])["content"] == "Hello world"
    assert seen["answer"]["choices"][0]["finish_reason"] == "stop"
    assert seen["answer"]["usage"]["total_tokens"] == 12
    (row,) = rows()
    assert (row["status"], row["stream"]) == ("ok", False)
    assert row["id"] == seen["request_id"] == seen["own_id"]


def test_a_streamed_completion(client, rows):
    seen = client.call("chunks", **CHAT)
    assert text_of(seen["chunks"]) == "Hello world"
    assert seen["chunks"][-1]["choices"][0]["finish_reason"] == "stop"
    (row,) = rows()
    assert (row["id"], row["status"], row["stream"]) == (seen["headers"]["x-request-id"], "ok", True)
    assert (row["total_tokens"], row["usage_source"]) == (12, "provider")


@pytest.mark.parametrize("is_wanted", [True, False])
def test_usage_reaches_the_client_only_if_asked_for(client, rows, is_wanted):
    seen = client.call("chunks", **CHAT, stream_options={"include_usage": is_wanted})["chunks"]
    assert [chunk["usage"]["total_tokens"] for chunk in seen if chunk.get("usage")] == [12] * is_wanted
    assert bool(seen[-1]["choices"]) is not is_wanted
    assert rows()[0]["total_tokens"] == 12


def test_the_stream_helper_ends_with_the_whole_completion(client, rows):
    seen = client.call("helper", **ASKED)
    assert set(seen["kinds"]) == {"chunk", "content", "content.done", "message", "chatCompletion", "end"}
    assert message_of(seen["answer"])["content"] == "Hello world"
    assert message_of(seen["answer"])["role"] == "assistant"
    assert seen["answer"]["usage"]["total_tokens"] == seen["usage"]["total_tokens"] == 12
    assert rows()[0]["status"] == "ok"


@pytest.mark.parametrize("scenario", ["create", "helper"])
def test_two_choices(client, rows, scenario):
    choices = client.call(scenario, **CHAT, n=2)["answer"]["choices"]
    assert [(choice["index"], choice["message"]["content"]) for choice in choices] == [
        (0, "Hello world"),
        (1, "Hello world"),
    ]
    assert outcomes(rows()) == [("ok", 200)]


@pytest.mark.parametrize("scenario", ["create", "helper"])
def test_a_forced_tool_call(client, rows, scenario):
    seen = client.call(scenario, **CHAT, **FORCED)
    (call,) = message_of(seen["answer"])["tool_calls"]
    assert (call["id"], call["type"], call["function"]["name"]) == ("call_1", "function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "text"}
    assert seen["answer"]["choices"][0]["finish_reason"] == "tool_calls"
    assert [call["name"] for call in seen.get("calls", [])] == ["weather"] * (scenario == "helper")
    assert outcomes(rows()) == [("ok", 200)]


@pytest.mark.parametrize(("scenario", "reply"), [("create", completion), ("helper", stream)])
def test_parallel_tool_calls(client, upstream, rows, scenario, reply):
    upstream.reply = reply(tool_calls=CALLS)
    answer = client.call(scenario, **CHAT, tools=[WEATHER])["answer"]
    calls = [(call["id"], call["function"]["arguments"]) for call in message_of(answer)["tool_calls"]]
    assert calls == [("call_0", '{"city":"0"}'), ("call_1", '{"city":"1"}')]
    assert outcomes(rows()) == [("ok", 200)]


def test_a_tool_result_goes_back_as_it_is(client, upstream):
    asked = message_of(client.call("create", **CHAT, **FORCED)["answer"])
    result = {"role": "tool", "tool_call_id": asked["tool_calls"][0]["id"], "content": "sunny"}
    client.call("create", model="gpt-4o", messages=[*MESSAGES, asked, result])
    assert upstream.requests[-1].json["messages"] == [*MESSAGES, asked, result]


@pytest.mark.parametrize(("is_streamed", "reply"), [(False, completion), (True, stream)])
def test_the_helper_that_runs_tools(client, upstream, rows, is_streamed, reply):
    upstream.script([reply(tool_calls=CALLS)])
    seen = client.call("runTools", **ASKED, stream=is_streamed)
    assert seen["content"] == "Hello world"
    assert [each["role"] for each in seen["messages"]] == ["user", "assistant", "tool", "tool", "assistant"]
    assert seen["usage"]["total_tokens"] == 24
    given = [(each["tool_call_id"], each["content"]) for each in upstream.requests[-1].json["messages"][2:]]
    assert given == [("call_0", "sunny in 0"), ("call_1", "sunny in 1")]
    assert outcomes(rows(2)) == [("ok", 200)] * 2


@pytest.mark.parametrize("scenario", ["parse", "parseStream"])
def test_structured_output(client, rows, scenario):
    assert message_of(client.call(scenario, **CHAT))["parsed"] == {"name": "text", "people": 1}
    assert outcomes(rows()) == [("ok", 200)]


@pytest.mark.parametrize("finish", ["length", "content_filter"])
@pytest.mark.parametrize(("scenario", "reply"), [("parse", completion), ("parseStream", stream)])
def test_a_cut_off_structured_output_is_an_error_of_its_own(client, upstream, rows, scenario, reply, finish):
    upstream.reply = reply(text='{"na', finish=finish)
    with pytest.raises(NpmError) as caught:
        client.call(scenario, **CHAT)
    kinds = {"length": "LengthFinishReasonError", "content_filter": "ContentFilterFinishReasonError"}
    assert caught.value.kind == kinds[finish]
    assert outcomes(rows()) == [("ok", 200)]


def test_embeddings_are_decoded(client, upstream, rows):
    seen = client.call("embeddings", model="text-embedding-3-small", input="one")
    assert upstream.requests[0].json["encoding_format"] == "base64"
    assert seen["answer"]["data"][0]["embedding"] == [0.25, -0.5, 1.0]
    (row,) = rows()
    assert (row["id"], row["status"], row["endpoint"]) == (seen["request_id"], "ok", "embeddings")
    assert (row["prompt_tokens"], row["usage_source"]) == (5, "provider")


@pytest.mark.parametrize(
    ("given", "count"), [("one", 1), (["one", "two"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)]
)
def test_embeddings_of_texts_and_tokens(client, upstream, given, count):
    answer = client.call("embeddings", model="m", input=given, encoding_format="float")["answer"]
    assert [item["embedding"] for item in answer["data"]] == [[0.25, -0.5, 1.0]] * count
    assert upstream.requests[0].json["input"] == given


def test_embeddings_as_base64(client):
    answer = client.call("embeddings", model="m", input="one", encoding_format="base64")["answer"]
    assert len(base64.b64decode(answer["data"][0]["embedding"])) == 12


def test_models(client, tenant, upstream):
    tenant.add_provider_key(upstream.base_url, provider="vllm", models=["org/some model"])
    assert {model["id"] for model in client.call("models")} >= {"gpt-4o-mini", "org/some model"}
    found = client.call("model", id="org/some model")
    assert (found["id"], found["object"], found["owned_by"]) == ("org/some model", "model", "vllm")
    with pytest.raises(NpmError, match="does not exist") as caught:
        client.call("model", id="org/other")
    assert (caught.value.kind, caught.value.code) == ("NotFoundError", "model_not_found")


def test_the_response_says_who_answered(client, upstream, rows):
    upstream.reply = completion(headers={"x-request-id": "up_1", "x-ratelimit-remaining-tokens": "7"})
    headers = client.call("create", **CHAT)["headers"]
    assert headers["x-request-id"] == rows()[0]["id"]
    assert headers["x-upstream-request-id"] == "up_1"
    assert headers["x-perpetuo-provider"] == "openai"
    assert headers["x-perpetuo-model"] == "gpt-4o"
    assert headers["x-perpetuo-attempts"] == "1"
    assert headers["x-ratelimit-remaining-tokens"] == "7"


def test_a_raw_stream_can_be_read_line_by_line(client, rows):
    seen = client.call("lines", **CHAT)
    assert [line for line in seen["lines"] if line][-1] == "data: [DONE]"
    assert seen["headers"]["cache-control"] == "no-cache"
    assert seen["headers"]["content-type"].startswith("text/event-stream")
    assert seen["headers"]["x-request-id"] == rows()[0]["id"]


@pytest.mark.parametrize("scenario", ["create", "chunks"])
def test_unknown_fields_reach_the_upstream(client, upstream, scenario):
    extra = {"top_k": 3, "provider": {"order": ["a"]}, "seed": None}
    headers = {"OpenAI-Beta": "x=v1", "x-perpetuo-log": "metadata", "x-own": "1"}
    client.call(scenario, **CHAT, **extra, options={"headers": headers})
    sent = upstream.requests[0]
    assert {name: sent.json[name] for name in extra} == extra
    assert sent.headers["openai-beta"] == "x=v1"
    assert not {"x-own", "x-perpetuo-log", "x-stainless-lang", "sec-fetch-mode"} & set(sent.headers)


def test_unknown_fields_reach_the_client(client, upstream):
    upstream.reply = completion(citations=["https://example.com"], service_tier="default")
    answer = client.call("create", **CHAT)["answer"]
    assert (answer["citations"], answer["service_tier"]) == (["https://example.com"], "default")


@pytest.mark.parametrize("scenario", ["create", "chunks", "helper"])
def test_calls_share_their_connections(site, node, client, upstream, rows, scenario):
    def call_and_look():
        client.call(scenario, **CHAT)
        peers = psutil.Process(node.process.pid).net_connections()
        return {each.laddr.port for each in peers if each.raddr and each.raddr.port == site.server.port}

    first = call_and_look()
    assert first
    assert call_and_look() | call_and_look() <= first
    assert {request.connection_id for request in upstream.requests} == {upstream.requests[0].connection_id}
    assert outcomes(rows(3)) == [("ok", 200)] * 3


def test_many_calls_at_once_do_not_mix(client, upstream, rows):
    upstream.reply = auto(echo=True)
    assert client.call("many", **CHAT, count=20) == [f"number {number}" for number in range(20)]
    assert outcomes(rows(20)) == [("ok", 200)] * 20


# Refusals and failures.


@pytest.mark.parametrize(
    ("http_status", "kind"),
    [
        (400, "BadRequestError"),
        (404, "NotFoundError"),
        (413, "APIError"),
        (422, "UnprocessableEntityError"),
    ],
)
@pytest.mark.parametrize("scenario", ["create", "chunks"])
def test_a_refusal_of_the_upstream_comes_as_it_is(patient, upstream, rows, http_status, kind, scenario):
    upstream.reply = refusal(http_status, code="unsupported_value", param="top_p")
    with pytest.raises(NpmError, match=f"^{http_status} as said$") as caught:
        patient.call(scenario, **CHAT)
    assert told(caught.value) == (kind, http_status, "odd", "unsupported_value", "top_p")
    assert rows()[0]["id"] == caught.value.request_id
    assert outcomes(rows()) == [("error", http_status)]


REFUSED = {
    "no messages": ({"messages": []}, "BadRequestError", 400, None, "messages"),
    "no model": ({"model": None}, "BadRequestError", 400, None, "model"),
    "a model that is not allowed": (
        {"model": "other"},
        "PermissionDeniedError",
        403,
        "model_not_allowed",
        "model",
    ),
    "a model that nobody serves": ({"model": "lost"}, "NotFoundError", 404, "model_not_found", "model"),
    "too large": (
        {"messages": [{"role": "user", "content": "x" * MAX_BODY_BYTES}]},
        "APIError",
        413,
        "request_too_large",
        None,
    ),
}


@pytest.mark.parametrize(("fields", "kind", "http_status", "code", "param"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("scenario", ["create", "helper"])
def test_what_the_gateway_refuses_is_not_asked_again(
    patient, tenant, upstream, rows, fields, kind, http_status, code, param, scenario
):
    tenant.add_provider_key(upstream.base_url, provider="xai")
    key = tenant.add_api_key(models=["gpt-4o", "lost"])
    with pytest.raises(NpmError) as caught:
        patient.with_options(apiKey=key).call(scenario, **{**CHAT, **fields})
    error = caught.value
    assert (error.kind, error.status, error.code, error.param) == (kind, http_status, code, param)
    assert not upstream.requests
    assert rows()[0]["id"] == error.request_id
    assert outcomes(rows()) == [("refused", http_status)]


@pytest.mark.parametrize("scenario", ["create", "chunks", "embeddings", "models"])
def test_an_unknown_key_is_refused(patient, upstream, scenario):
    with pytest.raises(NpmError) as caught:
        patient.with_options(apiKey="pk_unknown").call(scenario, **CHAT, input="one")
    expected = ("AuthenticationError", 401, "authentication_error", "invalid_api_key", None)
    assert told(caught.value) == expected
    assert caught.value.request_id.startswith("req_")
    assert not upstream.requests


def test_the_responses_api_names_the_chat_setting(patient, tenant, upstream):
    tenant.add_provider_key(upstream.base_url, provider="groq")
    with pytest.raises(NpmError, match=r"client\.chat\.completions") as caught:
        patient.call("responses", model="groq/llama-3", input="hello")
    assert (caught.value.kind, caught.value.code) == ("NotFoundError", "endpoint_not_supported")


def test_a_rate_limit_is_waited_for(client, upstream, rows):
    upstream.script([status(429, headers={"retry-after": "1"})] * 3)  # the gateway's own tries among them
    seen = client.with_options(maxRetries=1).call("create", **CHAT)
    assert message_of(seen["answer"])["content"] == "Hello world"
    assert len(upstream.requests) == 4
    assert upstream.requests[-1].received_at - upstream.requests[0].received_at >= 3.0
    assert outcomes(rows(2)) == [("error", 429), ("ok", 200)]


FAILED_CALL = ("InternalServerError", 502, "upstream_error", "upstream_error", None)
FAILED_AUTH = ("InternalServerError", 502, "upstream_error", "upstream_auth", None)
FAILURES = {
    "429": (
        refusal(429),
        "as said",
        ("RateLimitError", 429, "rate_limit_error", "upstream_rate_limited", None),
    ),
    "no credit": (
        refusal(429, code="insufficient_quota"),
        "as said",
        ("RateLimitError", 429, "insufficient_quota", "upstream_quota", None),
    ),
    "401": (refusal(401), "refused the provider key", FAILED_AUTH),
    "403": (refusal(403), "refused the provider key", FAILED_AUTH),
    "500": (refusal(500), "as said", FAILED_CALL),
    "503": (refusal(503), "as said", FAILED_CALL),
    "409": (refusal(409), "as said", FAILED_CALL),
    "html 502": (html(502), "status 502", FAILED_CALL),
    "html 200": (html(200), "not JSON|without an answer", FAILED_CALL),
    "cut": (cut_after(10), "closed the connection|connection to the upstream failed", FAILED_CALL),
    "200 with error": (
        status(200, {"error": {"message": "as said"}}),
        "as said|without an answer",
        FAILED_CALL,
    ),
}


@pytest.mark.parametrize(("reply", "message", "expected"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("scenario", ["create", "helper"])
def test_a_failed_upstream_is_not_asked_again_by_the_client(
    patient, upstream, rows, reply, message, expected, scenario
):
    upstream.reply = reply
    with pytest.raises(NpmError, match=message) as caught:
        patient.call(scenario, **CHAT)
    assert told(caught.value) == expected
    assert rows()[0]["id"] == caught.value.request_id
    assert outcomes(rows()) == [("error", caught.value.status)]


def test_a_slow_upstream_is_not_asked_again_by_the_client(patient, upstream, rows):
    upstream.reply = hang()
    with pytest.raises(NpmError, match="did not begin") as caught:
        patient.call("chunks", **CHAT)
    expected = ("InternalServerError", 504, "upstream_error", "upstream_timeout", None)
    assert told(caught.value) == expected
    assert outcomes(rows()) == [("error", 504)]


def test_a_provider_key_that_cannot_be_opened_is_not_tried_again(patient, tenant, rows):
    key = tenant.add_provider_key("http://127.0.0.1:9/v1", models=["lost"])
    tenant.change(ProviderKey, key, sealed="v1:none:AAAA")
    with pytest.raises(NpmError, match="cannot be opened") as caught:
        patient.call("create", model="lost", messages=MESSAGES)
    expected = ("InternalServerError", 503, "server_error", "provider_key_unreadable", None)
    assert told(caught.value) == expected
    assert outcomes(rows()) == [("error", 503)]


@pytest.mark.parametrize("scenario", ["chunks", "helper"])
def test_an_error_in_the_middle_of_a_stream_is_thrown(patient, upstream, rows, scenario):
    failure = {"error": {"message": "overloaded", "type": "x", "code": 529}}
    upstream.reply = stream([*said("Hel"), event(failure)])
    with pytest.raises(NpmError, match="^overloaded$") as caught:
        patient.call(scenario, **CHAT)
    assert told(caught.value) == ("APIError", None, "upstream_error", "upstream_error", None)
    assert rows()[0]["id"] == caught.value.request_id
    assert outcomes(rows()) == [("error", 200)]


@pytest.mark.parametrize("scenario", ["chunks", "helper"])
def test_a_stream_that_fails_early_has_a_real_status(patient, upstream, rows, scenario):
    upstream.reply = stream(pieces=[event({"error": {"message": "overloaded"}})])
    with pytest.raises(NpmError, match="overloaded") as caught:
        patient.call(scenario, **CHAT)
    assert told(caught.value) == FAILED_CALL
    assert outcomes(rows()) == [("error", 502)]


def test_nobody_at_the_address_is_a_connection_error(client):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unheard.getsockname()[1]}/v1"
        with pytest.raises(NpmError) as caught:
            client.with_options(baseURL=address).call("create", **CHAT)
    assert (caught.value.kind, caught.value.status) == ("APIConnectionError", None)


# Clients that leave.


@pytest.mark.parametrize("how", ["abort", "break"])
def test_a_stream_left_early_ends_the_upstream_call(client, upstream, rows, how):
    upstream.reply = stall_after(2)
    client.call("leave", **CHAT, how=how)
    upstream.wait_for_close(upstream.requests[0], timeout_seconds=1.0)
    assert outcomes(rows()) == [("client_closed", 200)]


def test_leaving_the_stream_helper_ends_the_upstream_call(client, upstream, rows):
    upstream.reply = stall_after(2)
    with pytest.raises(NpmError) as caught:
        client.call("leaveHelper", **CHAT)
    assert caught.value.kind == "APIUserAbortError"
    upstream.wait_for_close(upstream.requests[0], timeout_seconds=1.0)
    assert outcomes(rows()) == [("client_closed", 200)]


@pytest.mark.parametrize("scenario", ["create", "chunks"])
def test_an_aborted_call_ends_the_upstream_call(patient, upstream, rows, scenario):
    upstream.reply = hang()
    patient.start(scenario, **CHAT)
    upstream.wait_for_requests(1)
    patient.node.abort()
    with pytest.raises(NpmError) as caught:
        patient.node.result()
    assert caught.value.kind == "APIUserAbortError"
    upstream.wait_for_close(upstream.requests[0], timeout_seconds=1.0)
    assert rows()[0]["status"] == "client_closed"


def test_a_client_that_gives_up_waiting_ends_the_upstream_call(client, upstream, rows):
    upstream.reply = hang()
    with pytest.raises(NpmError) as caught:
        client.with_options(timeout=500).call("create", **CHAT)
    assert caught.value.kind == "APIConnectionTimeoutError"
    upstream.wait_for_close(upstream.requests[0], timeout_seconds=1.0)
    assert rows()[0]["status"] == "client_closed"


# Odd upstreams: the npm client's own accumulator is picky about other things than Python's.


def seen(client):
    """What the accumulator makes of a stream: role, text, tool calls, finish reason, tokens."""
    answer = client.call("helper", **ASKED)["answer"]
    (choice,) = answer["choices"]
    calls = choice["message"].get("tool_calls") or []
    assert {call["type"] for call in calls} <= {"function"}
    assert all(call["id"].startswith("call_") and call["id"].count("call_") == 1 for call in calls)
    assert (answer["object"], type(answer["created"])) == ("chat.completion", int)
    named = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    text = choice["message"]["content"]
    return choice["message"]["role"], text, named, choice["finish_reason"], answer["usage"]["total_tokens"]


@pytest.mark.parametrize("sent", WHOLE.values(), ids=WHOLE)
def test_an_odd_answer_arrives_whole(client, upstream, sent):
    upstream.reply = stream(pieces=[sent])
    assert seen(client) == ("assistant", "Hello", [], "stop", 5)


@pytest.mark.parametrize(("sent", "expected"), TOOLS.values(), ids=TOOLS)
def test_odd_tool_calls_arrive_whole(client, upstream, sent, expected):
    upstream.reply = stream(pieces=[sent])
    role, _, calls, _, total_tokens = seen(client)
    assert (role, calls, total_tokens) == ("assistant", expected, 5)


@pytest.mark.parametrize(("sent", "message"), FAILED.values(), ids=FAILED)
def test_a_stream_that_fails_throws(client, upstream, sent, message):
    upstream.reply = stream(pieces=[sent] if sent else [])
    with pytest.raises(NpmError, match=message) as caught:
        seen(client)
    assert caught.value.is_api_error
    assert (caught.value.type, caught.value.code) == ("upstream_error", "upstream_error")


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN)
def test_a_broken_connection_throws(client, upstream, reply):
    upstream.reply = reply
    with pytest.raises(NpmError) as caught:
        seen(client)
    assert (caught.value.is_api_error, caught.value.code) == (True, "upstream_error")


def test_line_separators_inside_a_text_stay(client, upstream):
    text = "a\u2028b\u2029c\u0085d\r\n\ve"
    upstream.reply = stream([*said(text), {**said()[0], "choices": [{"index": 0, "finish_reason": "stop"}]}])
    assert message_of(client.call("helper", **CHAT)["answer"])["content"] == text
