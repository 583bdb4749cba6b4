"""Budgets and limits, through the whole stair: what is held, what passes, what is refused and how."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from perpetuo.gateway import audit
from perpetuo.models import ApiKey, Workspace
from tests.fake_upstream import completion, status, stream
from tests.gateway.conftest import CHAT, with_settings
from tests.people import Person

PRICES = {"*": {"input": 0, "output": 10}}  # a token of output is 10,000 nano-dollars
CALL = 10_000 * 100  # nano-dollars of a call whose maximum is 100 tokens
pytestmark = pytest.mark.usefixtures("books_at_the_end")


def used(tokens):
    return {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": tokens + 7}


@pytest.fixture
def owner(app, upstream):
    upstream.reply = completion(usage=used(100))
    person = Person(app)
    person.provider_key(base_url=upstream.base_url, prices=PRICES)
    return person


@pytest.fixture
def accounts(gateway):
    """Spent and held, of every API key and every workspace."""

    def accounts():
        query = [sa.select(model.spent_nano, model.held_nano) for model in (ApiKey, Workspace)]
        return gateway.database.read(lambda c: [tuple(row) for q in query for row in c.execute(q)])

    return accounts


@pytest.fixture
def call(client, owner):
    def call(key, **fields):
        headers = {"Authorization": f"Bearer {key['key']}"}
        return client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 100} | fields, headers=headers)

    return call


def usd(nano):
    return nano / 10**9


def test_a_call_is_held_at_its_bound_and_settled_at_its_cost(owner, call, upstream, accounts, logs):
    key = owner.api_key(budget_usd=usd(10 * CALL))
    seen = []

    def reply(exchange):
        seen.append(accounts()[0])
        completion(usage=used(40))(exchange)

    upstream.reply = reply
    assert call(key).status_code == 200
    assert seen == [(0, CALL)]
    assert accounts()[0] == (40 * 10_000, 0)
    assert logs()[0]["hold_nano"] == CALL


@pytest.mark.parametrize("is_stream", [False, True])
def test_exactly_what_the_budget_holds_passes(owner, call, upstream, accounts, logs, gateway, is_stream):
    key = owner.api_key(budget_usd=usd(3 * CALL))
    upstream.reply = stream(usage=used(100)) if is_stream else completion(usage=used(100))
    answers = [call(key, stream=is_stream) for _ in range(5)]
    for answer in answers:
        answer.get_data()
    assert [answer.status_code for answer in answers] == [200] * 3 + [429] * 2
    assert accounts()[0] == (3 * CALL, 0)
    assert len(upstream.requests) == 3
    assert [row["status"] for row in logs()] == ["ok"] * 3 + ["refused"] * 2
    assert audit.differences(gateway.database) == []


def test_a_spent_budget_says_what_was_spent_when_it_resets_and_where_to_change_it(owner, call):
    key = owner.api_key(name="app", budget_usd=usd(CALL))
    call(key)
    answer = call(key)
    error = answer.json["error"]
    assert (error["type"], error["code"]) == ("insufficient_quota", "budget_exceeded")
    for said in ("monthly", "'app'", "$0.001", "resets at", f"/api-keys/{key['id']}"):
        assert said in error["message"]
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["x-should-retry"] == "false"


def test_a_total_budget_names_no_reset(owner, call):
    key = owner.api_key(budget_usd=usd(CALL), budget_period="total")
    call(key)
    answer = call(key)
    assert answer.json["error"]["code"] == "budget_exceeded"
    assert "retry-after" not in answer.headers


def test_near_the_end_the_answer_shrinks_and_says_so(owner, call, upstream):
    key = owner.api_key(budget_usd=usd(6 * CALL))
    upstream.reply = completion(usage=used(50))
    answer = call(key, max_tokens=1000)
    assert answer.status_code == 200
    assert answer.headers["x-perpetuo-max-tokens"] == "600"
    assert upstream.requests[-1].json["max_tokens"] == 600
    assert "x-perpetuo-max-tokens" not in call(key, max_tokens=100).headers


def test_it_never_shrinks_below_what_is_of_use(owner, call, upstream):
    key = owner.api_key(budget_usd=usd(2 * CALL))
    assert call(key, max_tokens=1000).json["error"]["code"] == "budget_exceeded"
    assert not upstream.requests


def test_without_a_maximum_the_bound_is_sent_as_one(owner, call, upstream):
    key = owner.api_key(budget_usd=1)
    answer = call(key, max_tokens=None)
    assert answer.status_code == 200
    assert upstream.requests[-1].json["max_completion_tokens"] == 16_384
    assert "x-perpetuo-max-tokens" not in answer.headers


def test_the_workspace_has_a_budget_of_its_own(owner, call, accounts):
    owner.patch("", {"monthly_budget_usd": usd(2 * CALL)})
    keys = [owner.api_key(), owner.api_key(budget_usd=1)]
    assert [call(keys[0]).status_code, call(keys[1]).status_code] == [200, 200]
    answer = call(keys[1])
    assert answer.json["error"]["code"] == "budget_exceeded"
    assert f"/workspaces/{owner.workspace}/settings" in answer.json["error"]["message"]
    assert sorted(accounts()) == [(0, 0), (CALL, 0), (2 * CALL, 0)]


def test_a_failure_costs_nothing_and_gives_its_hold_back(owner, call, upstream, accounts):
    key = owner.api_key(budget_usd=usd(CALL))
    upstream.reply = status(400)
    assert call(key).status_code == 400
    assert accounts()[0] == (0, 0)
    upstream.reply = completion(usage=used(100))
    assert call(key).status_code == 200


def test_what_has_no_price_or_no_bound_is_refused_by_name(owner, call, upstream, client):
    unpriced = Person(client.application)
    unpriced.provider_key(base_url=upstream.base_url, provider="custom")
    answer = call(unpriced.api_key(budget_usd=1), model="nobody-knows")
    assert (answer.status_code, answer.json["error"]["code"]) == (403, "model_not_priced")
    key = owner.api_key(budget_usd=1)
    answer = call(key, web_search_options={})
    assert (answer.status_code, answer.json["error"]["code"]) == (403, "request_not_boundable")
    assert "web_search_options" in answer.json["error"]["message"]
    assert not upstream.requests


def test_a_budget_that_begins_takes_what_was_spent_before(owner, call, accounts, gateway):
    key = owner.api_key()
    call(key)
    owner.patch(f"api-keys/{key['id']}", {"budget_usd": usd(2 * CALL)})
    gateway.access._known.clear()
    assert call(key).status_code == 200
    assert call(key).json["error"]["code"] == "budget_exceeded"
    assert accounts()[0] == (2 * CALL, 0)
    assert owner.get(f"api-keys/{key['id']}").json["spent_usd"] == usd(2 * CALL)


def test_a_call_begun_before_its_budget_still_counts(owner, call, upstream, accounts, gateway):
    key = owner.api_key()

    def reply(exchange):
        owner.patch(f"api-keys/{key['id']}", {"budget_usd": usd(2 * CALL)})
        completion(usage=used(100))(exchange)

    upstream.reply = reply
    call(key)
    gateway.access._known.clear()
    upstream.reply = completion(usage=used(100))
    assert [call(key).status_code, call(key).status_code] == [200, 429]
    assert accounts()[0] == (2 * CALL, 0)


def test_another_period_counts_anew(owner, call, accounts):
    key = owner.api_key(budget_usd=usd(CALL))
    call(key)
    owner.patch(f"api-keys/{key['id']}", {"budget_period": "total"})
    assert accounts()[0] == (CALL, 0)
    assert call(key).json["error"]["code"] == "budget_exceeded"


def test_raising_a_budget_lets_calls_through_again(owner, call):
    key = owner.api_key(budget_usd=usd(CALL))
    assert [call(key).status_code, call(key).status_code] == [200, 429]
    owner.patch(f"api-keys/{key['id']}", {"budget_usd": usd(2 * CALL)})
    assert call(key).status_code == 200


@with_settings(budget_wait=10.0)
def test_a_call_waits_for_money_that_another_holds(owner, call, upstream, accounts):
    key = owner.api_key(budget_usd=usd(CALL))
    asked, go_on = threading.Event(), threading.Event()

    def reply(exchange):
        asked.set()
        assert go_on.wait(10)
        completion(usage=used(0))(exchange)

    upstream.reply = reply
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call, key)
        assert asked.wait(10)
        second = pool.submit(call, key)
        assert not second.done()
        go_on.set()
        assert (first.result().status_code, second.result().status_code) == (200, 200)
    assert accounts()[0] == (0, 0)


@with_settings(budget_wait=0.0)
def test_money_that_stays_held_is_no_spent_budget(owner, call, upstream):
    key = owner.api_key(budget_usd=usd(CALL))
    inner = []

    def reply(exchange):
        if not inner:
            inner.append(None)
            inner[0] = call(key)
        completion(usage=used(0))(exchange)

    upstream.reply = reply
    assert call(key).status_code == 200
    error = inner[0].json["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "budget_held")
    assert inner[0].headers["retry-after"] == "1"


def test_the_log_tells_each_check(owner, call, logs):
    key = owner.api_key(budget_usd=usd(2 * CALL), rpm_limit=10, tpm_limit=50_000)
    call(key)
    call(key)
    call(key)
    refused = logs()[-1]
    checks = owner.get(f"logs/{refused['id']}").json["checks"]
    assert [(check["limit"], check["ok"]) for check in checks] == [
        ("rpm", True),
        ("tpm", True),
        ("api_key_budget", False),
    ]
    budget = checks[-1]
    assert (budget["spent"], budget["held"], budget["this"]) == (usd(2 * CALL), 0, usd(CALL))
    assert budget["allowed"] == usd(2 * CALL)
    assert json.dumps(budget["resets_at"])


def test_requests_per_minute_let_a_minutes_worth_through(owner, call, upstream):
    key = owner.api_key(rpm_limit=3)
    answers = [call(key) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    assert answers[0].headers["x-ratelimit-reset-requests"] == "20s"
    refused = answers[3]
    assert refused.json["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert len(upstream.requests) == 3


def test_tokens_per_minute_are_taken_at_the_bound_and_put_right(owner, call, upstream):
    key = owner.api_key(tpm_limit=10_000)
    upstream.reply = completion(usage=used(93))
    first = call(key, max_tokens=8_000)
    assert first.status_code == 200
    assert int(first.headers["x-ratelimit-remaining-tokens"]) < 2_000  # while it runs, its bound counts
    second = call(key, max_tokens=8_000)
    assert second.status_code == 200
    third = call(key, max_tokens=100_000)  # more than a minute's worth waits for a full bucket
    assert third.json["error"]["code"] == "rate_limit_exceeded"
    assert "tokens per minute" in third.json["error"]["message"]


def test_our_limits_hide_those_of_the_upstream(owner, call, upstream):
    upstream.reply = completion(headers={"x-ratelimit-limit-requests": "9", "x-ratelimit-limit-tokens": "9"})
    assert call(owner.api_key()).headers["x-ratelimit-limit-tokens"] == "9"
    headers = call(owner.api_key(rpm_limit=60)).headers
    assert headers["x-ratelimit-limit-requests"] == "60"
    assert "x-ratelimit-limit-tokens" not in headers


def test_a_refused_call_takes_nothing(owner, call, accounts):
    key = owner.api_key(budget_usd=usd(CALL), rpm_limit=2)
    assert [call(key).status_code for _ in range(3)] == [200, 429, 429]
    owner.patch(f"api-keys/{key['id']}", {"budget_usd": 1})
    assert [call(key).status_code for _ in range(2)] == [200, 429]
