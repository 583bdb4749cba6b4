import asyncio
import base64
import itertools
import json
from contextlib import closing

import openai
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from perpetuo.models import ProviderKey
from tests.clients.conftest import MAX_BODY_BYTES
from tests.fake_upstream import auto, completion, cut_after, event, hang, html, stall_after, status, stream

MESSAGES = [{"role": "user", "content": "Say hello"}]
CHAT = {"model": "gpt-4o", "messages": MESSAGES}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
FORCED = {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
CALLS = [
    {"id": f"call_{n}", "type": "function", "function": {"name": "weather", "arguments": f'{{"city":"{n}"}}'}}
    for n in range(2)
]


class City(BaseModel):
    name: str
    people: int


def refusal(http_status, **fields):
    return status(http_status, {"error": {"message": "as said", "type": "odd", **fields}})


def text_of(chunks):
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def outcomes(rows):
    return [(row["status"], row["http_status"]) for row in rows]


def test_a_completion(client, rows):
    answer = client.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == "Hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 12
    (row,) = rows()
    assert (row["id"], row["status"], row["stream"]) == (answer._request_id, "ok", False)


def test_a_streamed_completion(client, rows):
    with client.chat.completions.create(**CHAT, stream=True) as chunks:
        request_id = chunks.response.headers["x-request-id"]
        seen = list(chunks)
    assert text_of(seen) == "Hello world"
    assert seen[-1].choices[0].finish_reason == "stop"
    (row,) = rows()
    assert (row["id"], row["status"], row["stream"]) == (request_id, "ok", True)
    assert (row["total_tokens"], row["usage_source"]) == (12, "provider")


@pytest.mark.parametrize("is_wanted", [True, False])
def test_usage_reaches_the_client_only_if_asked_for(client, rows, is_wanted):
    options = {"include_usage": is_wanted}
    with client.chat.completions.create(**CHAT, stream=True, stream_options=options) as chunks:
        seen = list(chunks)
    assert [chunk.usage.total_tokens for chunk in seen if chunk.usage] == [12] * is_wanted
    assert bool(seen[-1].choices) is not is_wanted
    assert rows()[0]["total_tokens"] == 12


def test_the_stream_helper_ends_with_the_whole_completion(client, rows):
    with client.chat.completions.stream(**CHAT, stream_options={"include_usage": True}) as events:
        kinds = {item.type for item in events}
        answer = events.get_final_completion()
    assert kinds >= {"chunk", "content.delta", "content.done"}
    assert answer.choices[0].message.content == "Hello world"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.total_tokens == 12
    assert rows()[0]["status"] == "ok"


def test_two_choices(client, rows):
    answer = client.chat.completions.create(**CHAT, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    with client.chat.completions.stream(**CHAT, n=2) as events:
        streamed = events.get_final_completion()
    assert [choice.message.content for choice in streamed.choices] == ["Hello world"] * 2
    assert outcomes(rows(2)) == [("ok", 200)] * 2


def test_a_forced_tool_call(client, rows):
    answer = client.chat.completions.create(**CHAT, **FORCED)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "text"})
    assert answer.choices[0].finish_reason == "tool_calls"
    assert rows()[0]["status"] == "ok"


def test_a_streamed_tool_call(client, rows):
    with client.chat.completions.stream(**CHAT, **FORCED) as events:
        done = [item for item in events if item.type == "tool_calls.function.arguments.done"]
        answer = events.get_final_completion()
    assert [(item.name, json.loads(item.arguments)) for item in done] == [("weather", {"city": "text"})]
    assert answer.choices[0].message.tool_calls[0].id == "call_1"
    assert rows()[0]["status"] == "ok"


def test_parallel_tool_calls(client, upstream, rows):
    upstream.script([completion(tool_calls=CALLS), stream(tool_calls=CALLS)])
    plain = client.chat.completions.create(**CHAT, tools=[WEATHER])
    with client.chat.completions.stream(**CHAT, tools=[WEATHER]) as events:
        streamed = events.get_final_completion()
    for answer in (plain, streamed):
        calls = answer.choices[0].message.tool_calls
        assert [(call.id, call.function.arguments) for call in calls] == [
            ("call_0", '{"city":"0"}'),
            ("call_1", '{"city":"1"}'),
        ]
    assert outcomes(rows(2)) == [("ok", 200)] * 2


def test_a_tool_result_goes_back_as_it_is(client, upstream):
    asked = client.chat.completions.create(**CHAT, **FORCED).choices[0].message
    result = {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "sunny"}
    client.chat.completions.create(model="gpt-4o", messages=[*MESSAGES, asked, result])
    assert upstream.requests[-1].json["messages"][-1] == result
    assert upstream.requests[-1].json["messages"][-2]["tool_calls"][0]["id"] == "call_1"


def test_structured_output(client, rows):
    answer = client.chat.completions.parse(**CHAT, response_format=City)
    with client.chat.completions.stream(**CHAT, response_format=City) as events:
        streamed = events.get_final_completion()
    for whole in (answer, streamed):
        assert whole.choices[0].message.parsed == City(name="text", people=1)
    assert outcomes(rows(2)) == [("ok", 200)] * 2


def test_a_cut_off_structured_output_is_an_error_of_its_own(client, upstream, rows):
    upstream.script([completion('{"na', finish="length"), stream(text='{"na', finish="length")])
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**CHAT, response_format=City)
    with (
        client.chat.completions.stream(**CHAT, response_format=City) as events,
        pytest.raises(openai.LengthFinishReasonError),
    ):
        events.get_final_completion()
    assert outcomes(rows(2)) == [("ok", 200)] * 2


def test_embeddings_are_decoded(client, upstream, rows):
    answer = client.embeddings.create(model="text-embedding-3-small", input="one")
    assert upstream.requests[0].json["encoding_format"] == "base64"
    assert answer.data[0].embedding == [0.25, -0.5, 1.0]
    (row,) = rows()
    assert (row["id"], row["status"], row["endpoint"]) == (answer._request_id, "ok", "embeddings")
    assert (row["prompt_tokens"], row["usage_source"]) == (5, "provider")


@pytest.mark.parametrize(
    ("given", "count"), [("one", 1), (["one", "two"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)]
)
def test_embeddings_of_texts_and_tokens(client, upstream, given, count):
    answer = client.embeddings.create(model="m", input=given, encoding_format="float")
    assert [item.embedding for item in answer.data] == [[0.25, -0.5, 1.0]] * count
    assert upstream.requests[0].json["input"] == given


def test_embeddings_as_base64(client):
    answer = client.embeddings.create(model="m", input="one", encoding_format="base64")
    assert len(base64.b64decode(answer.data[0].embedding)) == 12


def test_models(client, tenant, upstream):
    tenant.add_provider_key(upstream.base_url, provider="vllm", models=["org/some model"])
    assert {model.id for model in client.models.list()} >= {"gpt-4o-mini", "org/some model"}
    found = client.models.retrieve("org/some model")
    assert (found.id, found.object, found.owned_by) == ("org/some model", "model", "vllm")
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


def test_the_raw_response_says_who_answered(client, upstream, rows):
    upstream.reply = completion(headers={"x-request-id": "up_1", "x-ratelimit-remaining-tokens": "7"})
    raw = client.chat.completions.with_raw_response.create(**CHAT)
    assert raw.parse().choices[0].message.content == "Hello"
    assert raw.headers["x-request-id"] == raw.request_id == rows()[0]["id"]
    assert raw.headers["x-upstream-request-id"] == "up_1"
    assert raw.headers["x-perpetuo-provider"] == "openai"
    assert raw.headers["x-perpetuo-model"] == "gpt-4o"
    assert raw.headers["x-perpetuo-attempts"] == "1"
    assert raw.headers["x-ratelimit-remaining-tokens"] == "7"


def test_a_raw_stream_can_be_read_line_by_line(client, rows):
    with client.chat.completions.with_streaming_response.create(**CHAT, stream=True) as raw:
        lines = [line for line in raw.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert (raw.headers["cache-control"], rows()[0]["id"]) == ("no-cache", raw.headers["x-request-id"])


@pytest.mark.parametrize("is_streamed", [False, True])
def test_unknown_fields_reach_the_upstream(client, upstream, is_streamed):
    extra = {"top_k": 3, "provider": {"order": ["a"]}, "seed": None}
    headers = {"OpenAI-Beta": "x=v1", "x-perpetuo-log": "metadata", "x-own": "1"}
    with closing(
        client.chat.completions.with_raw_response.create(
            **CHAT, stream=is_streamed, extra_body=extra, extra_headers=headers
        ).http_response
    ):
        sent = upstream.requests[0]
        assert {name: sent.json[name] for name in extra} == extra
        assert sent.headers["openai-beta"] == "x=v1"
        assert not {"x-own", "x-perpetuo-log"} & set(sent.headers)


def test_unknown_fields_reach_the_client(client, upstream):
    upstream.reply = completion(citations=["https://example.com"], service_tier="default")
    answer = client.chat.completions.create(**CHAT)
    assert (answer.citations, answer.service_tier) == (["https://example.com"], "default")


def ports_to(server):
    connections = psutil.Process().net_connections()
    return {each.laddr.port for each in connections if each.raddr and each.raddr.port == server.port}


def test_calls_share_their_connections(site, client, upstream, rows):
    ports = set()
    for _ in range(3):
        client.chat.completions.create(**CHAT)
        ports |= ports_to(site.server)
    assert len(ports) == 1
    assert {request.connection_id for request in upstream.requests} == {upstream.requests[0].connection_id}
    assert outcomes(rows(3)) == [("ok", 200)] * 3


def test_streams_share_their_connections(site, tenant, upstream, rows):
    # Only the asynchronous client reads a stream to its end; the other hangs up at [DONE].
    async def talk():
        ports, others = set(), ports_to(site.server)
        async with AsyncOpenAI(base_url=site.base_url, api_key=tenant.key) as client:
            for _ in range(3):
                assert [chunk async for chunk in await client.chat.completions.create(**CHAT, stream=True)]
                ports |= ports_to(site.server) - others
        return ports

    assert len(asyncio.run(talk())) == 1
    assert {request.connection_id for request in upstream.requests} == {upstream.requests[0].connection_id}
    assert outcomes(rows(3)) == [("ok", 200)] * 3


# Refusals and failures.


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, openai.BadRequestError),
        (404, openai.NotFoundError),
        (413, openai.APIStatusError),
        (422, openai.UnprocessableEntityError),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_refusal_of_the_upstream_comes_as_it_is(client, upstream, rows, code, kind, is_streamed):
    upstream.reply = refusal(code, code="unsupported_value", param="top_p")
    with pytest.raises(kind, match="as said") as caught:
        client.with_options(max_retries=2).chat.completions.create(**CHAT, stream=is_streamed)
    error = caught.value
    assert (error.status_code, error.code, error.param) == (code, "unsupported_value", "top_p")
    assert error.type == "odd"
    assert rows()[0]["id"] == error.request_id
    assert outcomes(rows()) == [("error", code)]


def test_a_request_without_messages_is_refused(client, upstream, rows):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=[])
    assert caught.value.param == "messages"
    assert not upstream.requests
    assert rows()[0]["id"] == caught.value.request_id
    assert outcomes(rows()) == [("refused", 400)]


def test_an_unknown_key_is_refused(site, upstream):
    with (
        OpenAI(base_url=site.base_url, api_key="pk_unknown") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.chat.completions.create(**CHAT)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id.startswith("req_")


def test_a_model_that_the_key_may_not_use(site, tenant, rows):
    tenant.add_api_key(models=["gpt-4o-mini"])
    with (
        OpenAI(base_url=site.base_url, api_key=tenant.key) as client,
        pytest.raises(openai.PermissionDeniedError) as caught,
    ):
        client.chat.completions.create(**CHAT)
    assert (caught.value.code, caught.value.param) == ("model_not_allowed", "model")
    assert outcomes(rows()) == [("refused", 403)]


def test_a_model_that_nobody_serves(client, tenant, upstream, rows):
    tenant.add_provider_key(upstream.base_url, provider="xai")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nothing", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert outcomes(rows()) == [("refused", 404)]


def test_a_body_that_is_too_large(client, rows):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": "x" * MAX_BODY_BYTES}]
        )
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
    assert outcomes(rows()) == [("refused", 413)]


def test_a_rate_limit_is_waited_for(client, upstream, rows):
    upstream.script([status(429, headers={"retry-after": "1"})] * 3)  # the gateway's own tries among them
    answer = client.with_options(max_retries=1).chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == "Hello world"
    times = [request.received_at for request in upstream.requests]
    assert len(times) == 4
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(times))
    assert outcomes(rows(2)) == [("error", 429), ("ok", 200)]


def test_a_rate_limit_that_stays(client, upstream, rows):
    upstream.reply = refusal(429)
    with pytest.raises(openai.RateLimitError, match="as said") as caught:
        client.with_options(max_retries=2).chat.completions.create(**CHAT)
    assert (caught.value.code, len(upstream.requests)) == ("upstream_rate_limited", 3)
    assert outcomes(rows()) == [("error", 429)]


def test_an_account_without_credit(client, upstream, rows):
    upstream.reply = refusal(429, code="insufficient_quota")
    with pytest.raises(openai.RateLimitError) as caught:
        client.with_options(max_retries=2).chat.completions.create(**CHAT)
    assert (caught.value.type, caught.value.code) == ("insufficient_quota", "upstream_quota")
    assert len(upstream.requests) == 1
    assert outcomes(rows()) == [("error", 429)]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refusal(500), "as said"),
        (refusal(503), "as said"),
        (refusal(409), "as said"),
        (html(502), "status 502"),
        (html(200), "not JSON|without an answer"),
        (cut_after(10), "closed the connection|connection to the upstream failed"),
        (status(200, {"error": {"message": "as said"}}), "as said|without an answer"),
    ],
    ids=["500", "503", "409", "html 502", "html 200", "cut", "200 with error"],
)
def test_a_failed_upstream_is_not_asked_again_by_the_client(
    client, upstream, rows, reply, message, is_streamed
):
    upstream.reply = reply
    with pytest.raises(openai.InternalServerError, match=message) as caught:
        client.with_options(max_retries=2).chat.completions.create(**CHAT, stream=is_streamed)
    error = caught.value
    assert (error.status_code, error.code, error.type) == (502, "upstream_error", "upstream_error")
    assert rows()[0]["id"] == error.request_id
    assert outcomes(rows()) == [("error", 502)]


def test_a_slow_upstream_is_not_asked_again_by_the_client(client, upstream, rows):
    upstream.reply = hang()
    with pytest.raises(openai.InternalServerError, match="did not begin") as caught:
        client.with_options(max_retries=2).chat.completions.create(**CHAT, stream=True)
    assert (caught.value.status_code, caught.value.code) == (504, "upstream_timeout")
    assert outcomes(rows()) == [("error", 504)]


def test_a_provider_key_that_cannot_be_opened_is_not_tried_again(client, tenant, rows):
    key = tenant.add_provider_key("http://127.0.0.1:9/v1", models=["lost"])
    tenant.change(ProviderKey, key, sealed="v1:none:AAAA")
    with pytest.raises(openai.InternalServerError, match="cannot be opened") as caught:
        client.with_options(max_retries=2).chat.completions.create(model="lost", messages=MESSAGES)
    assert (caught.value.status_code, caught.value.code) == (503, "provider_key_unreadable")
    assert outcomes(rows()) == [("error", 503)]


@pytest.mark.parametrize("options", [{}, {"stream": True}], ids=["plain", "streamed"])
def test_a_refused_provider_key_is_not_the_callers_fault(client, upstream, rows, options):
    upstream.reply = refusal(401)
    with pytest.raises(openai.InternalServerError, match="refused the provider key") as caught:
        client.with_options(max_retries=2).chat.completions.create(**CHAT, **options)
    assert caught.value.code == "upstream_auth"
    assert outcomes(rows()) == [("error", 502)]


def test_the_responses_api_names_the_chat_setting(client, tenant, upstream):
    tenant.add_provider_key(upstream.base_url, provider="groq")
    with pytest.raises(openai.NotFoundError, match=r"client\.chat\.completions") as caught:
        client.responses.create(model="groq/llama", input="hello")
    assert caught.value.code == "endpoint_not_supported"


def test_an_error_in_the_middle_of_a_stream_is_raised(client, upstream, rows):
    failure = {"error": {"message": "overloaded", "type": "x", "code": 529}}
    upstream.reply = stream([*said("Hel"), event(failure)])
    with pytest.raises(openai.APIError, match="overloaded") as caught:
        list(client.chat.completions.create(**CHAT, stream=True))
    assert (type(caught.value), caught.value.code) == (openai.APIError, "upstream_error")
    assert caught.value.type == "upstream_error"
    assert outcomes(rows()) == [("error", 200)]


def test_a_stream_that_is_cut_is_an_error(client, upstream, rows):
    upstream.reply = cut_after(400, stream())
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(**CHAT, stream=True))
    assert caught.value.code == "upstream_error"
    assert outcomes(rows()) == [("error", 200)]


def test_a_stream_that_fails_early_has_a_real_status(client, upstream, rows):
    upstream.reply = stream(pieces=[event({"error": {"message": "overloaded"}})])
    with pytest.raises(openai.InternalServerError, match="overloaded") as caught:
        client.with_options(max_retries=2).chat.completions.create(**CHAT, stream=True)
    assert caught.value.status_code == 502
    assert outcomes(rows()) == [("error", 502)]


def said(*texts):
    deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts)]
    return [
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1790000000,
            "model": "gpt-4o",
            "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
        }
        for delta in deltas
    ]


# The asynchronous client, and clients that leave.


def test_the_asynchronous_client(site, tenant, rows):
    async def talk():
        async with AsyncOpenAI(base_url=site.base_url, api_key=tenant.key) as client:
            plain = await client.chat.completions.create(**CHAT)
            chunks = [chunk async for chunk in await client.chat.completions.create(**CHAT, stream=True)]
            async with client.chat.completions.stream(**CHAT) as events:
                whole = await events.get_final_completion()
            return plain, chunks, whole

    plain, chunks, whole = asyncio.run(talk())
    assert plain.choices[0].message.content == whole.choices[0].message.content == text_of(chunks)
    assert outcomes(rows(3)) == [("ok", 200)] * 3


def test_many_calls_at_once_do_not_mix(site, upstream, tenant, rows):
    upstream.reply = auto(echo=True)

    async def ask(client, number):
        messages = [{"role": "user", "content": f"number {number}"}]
        stream = await client.chat.completions.create(model="gpt-4o", messages=messages, stream=True)
        return text_of([chunk async for chunk in stream])

    async def talk():
        async with AsyncOpenAI(base_url=site.base_url, api_key=tenant.key) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(20)))

    assert asyncio.run(talk()) == [f"number {number}" for number in range(20)]
    assert outcomes(rows(20)) == [("ok", 200)] * 20


def test_a_stream_closed_early_ends_the_upstream_call(site, upstream, tenant, rows):
    upstream.reply = stall_after(2)

    async def leave():
        async with AsyncOpenAI(base_url=site.base_url, api_key=tenant.key) as client:
            stream = await client.chat.completions.create(**CHAT, stream=True)
            await anext(aiter(stream))
            await stream.close()

    asyncio.run(leave())
    upstream.wait_for_close(upstream.requests[0], timeout_seconds=1.0)
    assert outcomes(rows()) == [("client_closed", 200)]


def test_a_client_that_gives_up_waiting_ends_the_upstream_call(client, upstream, rows):
    upstream.reply = hang()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(**CHAT)
    upstream.wait_for_close(upstream.requests[0], timeout_seconds=1.0)
    assert rows()[0]["status"] == "client_closed"
