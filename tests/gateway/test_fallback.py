import pytest

from perpetuo.gateway import plan
from perpetuo.models import ProviderKey
from tests.fake_upstream import FakeUpstream, completion, cut_after, hang, html, status, stream
from tests.gateway.conftest import with_settings
from tests.tenants import new_tenant

STREAMS = pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
MOVING = {
    "500": status(500),
    "529": status(529),
    "408": status(408),
    "409": status(409),
    "429": status(429),
    "no JSON": html(200),
    "reset": lambda exchange: exchange.reset(),
    "401": status(401),
    "402": status(402),
    "403": status(403),
}
ANSWERED = (400, 404, 413, 422)


@pytest.fixture(autouse=True)
def always(books_at_the_end):
    """Every test here ends with books that balance."""


@pytest.fixture
def second():
    with FakeUpstream(reply=completion("from the second")) as second:
        yield second


@pytest.fixture
def tenant(gateway, upstream, second):
    """Two keys for one model: the first is asked first."""
    tenant = new_tenant(gateway)
    tenant.first = tenant.add_provider_key(upstream.base_url, models=["gpt-4o"], priority=0)
    tenant.second = tenant.add_provider_key(
        second.base_url, "sk-second", provider="custom", models=["gpt-4o", "other"], priority=1
    )
    return tenant


@STREAMS
@pytest.mark.parametrize("reply", MOVING.values(), ids=MOVING)
def test_what_fails_before_its_content_moves_on(ask, upstream, second, logs, tenant, reply, is_stream):
    upstream.reply = reply
    second.reply = stream(text="from the second") if is_stream else completion("from the second")
    response = ask(stream=is_stream)
    assert response.status_code == 200
    assert "second" in response.get_data(as_text=True)
    assert response.headers["x-perpetuo-provider"] == "custom"
    assert response.headers["x-perpetuo-attempts"] == "2"
    (row,) = logs()
    assert (row["status"], row["provider"], row["provider_key_id"]) == ("ok", "custom", tenant.second)
    failed, answered = row["attempts"]
    assert (failed["provider_key_id"], answered["provider_key_id"]) == (tenant.first, tenant.second)
    assert failed["error"]["message"]
    assert answered["error"] is None
    assert second.requests[0].headers["authorization"] == "Bearer sk-second"


@STREAMS
@pytest.mark.parametrize("code", ANSWERED)
def test_a_refusal_of_the_request_itself_is_the_answer(ask, upstream, second, code, is_stream):
    upstream.reply = status(code)
    assert ask(stream=is_stream).status_code == code
    assert (len(upstream.requests), len(second.requests)) == (1, 0)


def test_once_content_has_gone_out_nothing_moves_on(ask, upstream, second, logs):
    upstream.reply = cut_after(900, stream(text="one two three four five six seven eight nine ten eleven"))
    body = ask(stream=True).get_data()
    assert b'"error"' in body
    assert b"[DONE]" not in body
    assert (len(second.requests), len(logs()[0]["attempts"])) == (0, 1)


@with_settings(first_byte_timeout=0.2)
def test_a_stream_that_only_comments_moves_on_behind_the_keep_alives(ask, upstream, second, monkeypatch):
    monkeypatch.setattr("perpetuo.gateway.upstream.KEEP_ALIVE_SECONDS", 0.05)
    upstream.reply, second.reply = hang(), stream(text="from the second")
    body = ask(stream=True).get_data()
    assert body.startswith(b": keep-alive")
    assert b"second" in body
    assert body.endswith(b"data: [DONE]\n\n")


def test_the_last_failure_is_the_answer_where_all_fail(ask, upstream, second, logs):
    upstream.reply, second.reply = status(500), status(429)
    response = ask()
    assert (response.status_code, response.json["error"]["code"]) == (429, "upstream_rate_limited")
    assert response.headers["x-should-retry"] == "false"
    assert [attempt["http_status"] for attempt in logs()[0]["attempts"]] == [500, 429]


def test_the_only_target_is_tried_three_times(ask, upstream, second, tenant, logs):
    tenant.add_provider_key(upstream.base_url, models=["lonely"])
    upstream.script([status(500), status(503), completion("at last")])
    assert ask(model="lonely").json["choices"][0]["message"]["content"] == "at last"
    assert [attempt["http_status"] for attempt in logs()[0]["attempts"]] == [500, 503, 200]


def test_a_refused_key_is_not_tried_twice(ask, upstream, tenant):
    tenant.add_provider_key(upstream.base_url, models=["lonely"])
    upstream.reply = status(401)
    assert ask(model="lonely").status_code == 502
    assert len(upstream.requests) == 1


def test_a_short_retry_after_is_waited_for_and_a_long_one_is_the_clients(ask, upstream, tenant):
    tenant.add_provider_key(upstream.base_url, models=["lonely"])
    upstream.script([status(429, headers={"retry-after-ms": "20"}), completion("now")])
    assert ask(model="lonely").status_code == 200
    upstream.reply = status(429, headers={"retry-after": "30"})
    response = ask(model="lonely")
    assert (response.status_code, response.headers["retry-after"]) == (429, "30")
    assert len(upstream.requests) == 3


@with_settings(total_timeout=1.0)
def test_no_retry_waits_beyond_the_deadline(ask, upstream, tenant):
    tenant.add_provider_key(upstream.base_url, models=["lonely"])
    upstream.reply = status(503, headers={"retry-after": "3"})
    assert ask(model="lonely").headers["retry-after"] == "3"
    assert len(upstream.requests) == 1


def test_models_of_the_request_are_fallbacks_in_turn(ask, upstream, second):
    upstream.reply = status(500)
    response = ask(model="openai/gpt-4o", models=["custom/other"])
    assert response.status_code == 200
    assert response.headers["x-perpetuo-model"] == "other"
    assert "models" not in second.requests[0].json
    assert second.requests[0].json["model"] == "other"


def test_a_key_that_keeps_failing_goes_to_the_end_until_it_has_rested(ask, upstream, second, monkeypatch):
    upstream.reply = status(500)
    for _ in range(plan.FAILURES):
        assert ask().status_code == 200
    seen = len(upstream.requests)
    assert ask().headers["x-perpetuo-attempts"] == "1"
    assert len(upstream.requests) == seen
    now = plan.monotonic()
    monkeypatch.setattr(plan, "monotonic", lambda: now + plan.LONGEST_REST_SECONDS)
    upstream.reply = completion("rested")
    assert ask().headers["x-perpetuo-provider"] == "openai"


def test_a_resting_key_is_tried_where_nothing_else_is_left(ask, upstream, second):
    upstream.reply = status(500)
    for _ in range(plan.FAILURES):
        ask()
    second.reply, upstream.reply = status(500), completion("after all")
    assert ask().headers["x-perpetuo-provider"] == "openai"


def test_an_unreadable_key_is_passed_over(ask, upstream, tenant):
    tenant.change(ProviderKey, tenant.first, sealed="k1:AAAA")
    response = ask()
    assert (response.status_code, response.headers["x-perpetuo-provider"]) == (200, "custom")
    assert upstream.requests == []
