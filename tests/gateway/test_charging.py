"""The charging rule of the README, a test for each of its lines."""

import json
import re
from pathlib import Path

import pytest

from perpetuo.gateway import intake
from perpetuo.gateway.admission import open_row
from perpetuo.gateway.ledger import Ledger
from perpetuo.gateway.sweep import Sweep
from perpetuo.gateway.walk import _opening
from tests.fake_upstream import completion, cut_after, stall_after, status, stream
from tests.gateway.conftest import CHAT
from tests.gateway.test_ledger import die
from tests.people import Person

README = Path(__file__).parents[2] / "README.md"
USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
COST = 100 * 1_000 + 10 * 2_000  # nano-dollars at 1 and 2 USD a million
WORDS = "one two three four five six seven eight"
TOLD = {}  # by line of the README, the test that shows it


def line(name):
    def mark(test):
        TOLD[name] = test.__name__
        return test

    return mark


@pytest.fixture
def owner(app, upstream):
    person = Person(app)
    person.provider_key(base_url=upstream.base_url, prices={"*": {"input": 1, "output": 2}})
    return person


@pytest.fixture
def call(client, owner):
    key = owner.api_key(budget_usd=1)

    def call(**fields):
        headers = {"Authorization": f"Bearer {key['key']}"}
        return client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 500} | fields, headers=headers)

    return call


@pytest.fixture
def charged(logs, owner):
    """(status, cost in nano-dollars, source of the usage) of the one call; its key has spent the same."""

    def charged():
        (row,) = logs()
        spent = owner.get("api-keys").json["data"][0]
        assert (spent["spent_usd"], spent["held_usd"]) == ((row["cost_nano"] or 0) / 1e9, 0)
        return row["status"], row["cost_nano"], row["usage_source"]

    return charged


def test_every_line_of_the_readme_has_its_test():
    table = README.read_text().partition("### What a call costs")[2].partition("\n\nWhere")[0]
    lines = [match[1] for match in re.finditer(r"^\| (`.*?) \|", table, re.MULTILINE)]
    assert set(lines) == set(TOLD)


@line("`ok`")
def test_what_the_provider_counted(call, upstream, charged):
    upstream.reply = completion(usage=USAGE)
    call()
    assert charged() == ("ok", COST, "provider")


@line("`ok`, the provider counted nothing")
def test_an_estimate_where_it_counted_nothing(call, upstream, charged):
    upstream.reply = completion(WORDS, usage=None)
    call()
    state, cost, source = charged()
    assert (state, source) == ("ok", "estimate")
    assert cost >= len(WORDS) // 4 * 2_000


@line("`ok`, after failed attempts")
def test_only_the_attempt_that_answered(call, owner, upstream, charged):
    dear = {"*": {"input": 50, "output": 90}}
    owner.provider_key(base_url=upstream.base_url, name="dear", prices=dear, priority=-1)
    upstream.script([status(500), completion(usage=USAGE)])
    assert call().headers["x-perpetuo-attempts"] == "2"
    assert charged() == ("ok", COST, "provider")


@line("`refused`")
def test_nothing_for_a_refusal(call, upstream, charged):
    assert call(model="nobody/knows", temperature="hot", n=10**9).status_code in (403, 404, 429)
    assert charged() == ("refused", 0, None)
    assert not upstream.requests


@line("`error` before any content")
@pytest.mark.parametrize("is_stream", [False, True])
def test_nothing_before_any_content(call, upstream, charged, is_stream):
    upstream.reply = status(500)
    assert call(stream=is_stream).status_code == 502
    assert charged() == ("error", 0, None)


@line("`error` after the first content")
def test_what_was_delivered_of_a_broken_stream(call, upstream, charged):
    upstream.reply = cut_after(900, stream(text=WORDS))
    assert b"error" in call(stream=True).get_data()
    state, cost, source = charged()
    assert (state, source) == ("error", "estimate")
    assert 0 < cost < COST


@line("`client_closed` before any content")
def test_nothing_for_who_left_too_soon(call, gateway, upstream, charged):
    def reply(exchange):
        gateway.calls.fire_all("client_closed")
        stream(text=WORDS)(exchange)

    upstream.reply = reply
    assert call(stream=True).status_code == 499
    assert charged() == ("client_closed", 0, None)


@line("`client_closed` after the first content")
def test_what_was_delivered_to_who_left(call, upstream, charged):
    upstream.reply = stall_after(4, stream(text=WORDS))
    response = call(stream=True)
    next(response.iter_encoded())
    response.close()
    state, cost, source = charged()
    assert (state, source) == ("client_closed", "estimate")
    assert 0 < cost < COST


@pytest.fixture
def dies_under(gateway, owner):
    """A call of a process that dies, swept by this one."""

    def dies_under(key, **fields):
        dead = Ledger(gateway.database, gateway.access.limits_of)
        caller = gateway.access.authenticate(f"Bearer {key['key']}")
        body = json.dumps(CHAT | fields).encode()
        asked = intake.check("chat.completions", body, json.loads(body), {})
        targets = gateway.router.route(caller, asked.names)
        values = {
            "endpoint": "chat.completions",
            "stream": False,
            "model": "gpt-4o",
            **_opening(targets[0], asked),
        }
        call = gateway.calls.begin(caller.workspace_id, 60)
        row, _ = open_row(dead, call, caller, asked, targets, values, 0)
        dead.ensure_open(row)
        call.close()
        die(dead)
        assert Sweep(gateway.ledger, 0).look() == 1
        return len(body)

    return dies_under


@line("`interrupted` under a budget")
def test_the_hold_of_a_process_that_died(owner, dies_under, charged):
    size = dies_under(owner.api_key(budget_usd=1), max_tokens=500)
    assert charged() == ("interrupted", (size + 1024) * 1_000 + 500 * 2_000, "estimate")


@line("`interrupted` without a budget")
def test_an_estimate_for_a_process_that_died(owner, dies_under, logs):
    size = dies_under(owner.api_key())
    (row,) = logs()
    assert (row["status"], row["cost_nano"]) == ("interrupted", size // 4 * 1_000)
