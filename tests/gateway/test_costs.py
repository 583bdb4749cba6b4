import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from perpetuo import reports
from perpetuo.config import ROOT
from perpetuo.gateway import costs, intake
from perpetuo.gateway.ledger import Ledger
from perpetuo.gateway.router import Target, resolve
from perpetuo.gateway.sweep import Sweep
from perpetuo.models import ProviderKey
from perpetuo.price_list import Overrides, price_for
from perpetuo.pricing import Price
from tests.fake_upstream import FakeUpstream, completion, cut_after, embedding, status, stream
from tests.gateway.conftest import CHAT
from tests.gateway.test_ledger import CALLER, OPENING, die, rows
from tests.tenants import new_tenant

STREAMS = pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
CACHED = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
CACHED["prompt_tokens_details"] = {"cached_tokens": 40}
OWN = {"gpt-*": {"input": 7, "cached_input": 1, "output": 0.000000001}}
CALL = 9 * 2500 + 3 * 10_000  # the fake upstream's usage at gpt-4o's 2.5 and 10 USD a million
LIST = price_for("openai", "gpt-4o", None, datetime.now(UTC))


@pytest.fixture(autouse=True)
def always(books_at_the_end):
    """Every test here ends with books that balance."""


@pytest.fixture
def custom(upstream, gateway, tenant):
    """A second key, asked where the first fails or by name: what it serves has no price."""
    with FakeUpstream() as second:
        key_id = tenant.add_provider_key(second.base_url, provider="custom", models=["gpt-4o"], priority=1)
        tenant.first = tenant.add_provider_key(upstream.base_url, models=["gpt-4o"], name="first")
        yield key_id


@STREAMS
def test_a_call_costs_its_tokens_at_the_price_of_its_opening(ask, upstream, logs, counters, is_stream):
    upstream.reply = stream() if is_stream else completion()
    ask(stream=is_stream).get_data()
    (row,) = logs()
    assert (row["cost_nano"], Price.from_json(row["price"])) == (CALL, LIST)
    assert (counters()[0]["cost_nano"], counters()[0]["unpriced_requests"]) == (CALL, 0)


@STREAMS
def test_cached_tokens_have_their_own_price(ask, upstream, logs, is_stream):
    upstream.reply = stream(usage=CACHED) if is_stream else completion(usage=CACHED)
    ask(stream=is_stream).get_data()
    assert logs()[0]["cost_nano"] == 60 * 2500 + 40 * 1250 + 10 * 10_000


def test_an_embedding_has_no_output(client, tenant, upstream, logs):
    upstream.reply = embedding()
    body = {"model": "text-embedding-3-small", "input": "x"}
    client.post("/v1/embeddings", json=body, headers=tenant.headers)
    assert logs()[0]["cost_nano"] == 5 * 20


def test_the_owners_own_price_counts_before_the_list(ask, upstream, tenant, logs):
    tenant.add_provider_key(upstream.base_url, models=["gpt-4o"], prices=OWN)
    upstream.reply = completion(usage=CACHED)
    ask()
    (row,) = logs()
    assert row["price"]["source"] == "override"
    assert row["cost_nano"] == 60 * 7000 + 40 * 1000 + 0  # ten tokens of output are less than half a nano


def test_a_price_changed_meanwhile_counts_for_later_calls_only(ask, upstream, tenant, logs):
    key_id = tenant.add_provider_key(upstream.base_url, models=["gpt-4o"], prices=OWN)
    response = ask(stream=True)
    pieces = response.iter_encoded()
    next(pieces)
    tenant.change(ProviderKey, key_id, prices={"*": {"input": 1, "output": 1}})
    b"".join(pieces)
    assert logs()[0]["price"]["input"] == "7"


def test_what_has_no_known_price_is_counted_as_unpriced(ask, upstream, logs, counters):
    ask(model="nobody-knows-this")
    (row,) = logs()
    assert (row["status"], row["total_tokens"], row["price"], row["cost_nano"]) == ("ok", 12, None, None)
    assert (counters()[0]["cost_nano"], counters()[0]["unpriced_requests"]) == (0, 1)


@STREAMS
@pytest.mark.parametrize(("prices", "nano"), [(OWN, 9 * 7000), (None, None)], ids=["own price", "unpriced"])
def test_after_a_fallback_the_price_is_that_of_who_answered(
    ask, upstream, custom, tenant, logs, counters, is_stream, prices, nano
):
    tenant.change(ProviderKey, custom, prices=prices)
    upstream.reply = status(500)
    ask(stream=is_stream, model="first/gpt-4o", models=["custom/gpt-4o"]).get_data()
    (row,) = logs()
    assert (row["status"], row["provider"], row["cost_nano"]) == ("ok", "custom", nano)
    assert row["price"] == (prices and Overrides(prices).price("gpt-4o").to_json())
    assert counters()[0]["unpriced_requests"] == (nano is None)


@STREAMS
def test_what_fails_before_its_first_byte_costs_nothing(ask, upstream, logs, counters, is_stream):
    upstream.reply = status(500)
    ask(stream=is_stream)
    ask(stream=is_stream, model="nobody-knows-this")
    ask(messages=[])
    assert [(row["status"], row["cost_nano"]) for row in logs()] == [
        ("error", 0),
        ("error", 0),
        ("refused", 0),
    ]
    assert sum(counter["unpriced_requests"] for counter in counters()) == 0


def of_usage(row):
    return row["prompt_tokens"] * 2500 + row["completion_tokens"] * 10_000


def test_a_stream_that_breaks_costs_what_came(ask, upstream, logs):
    upstream.reply = cut_after(900, stream(text="one two three four five six seven eight nine ten eleven"))
    ask(stream=True).get_data()
    (row,) = logs()
    assert (row["status"], row["usage_source"], row["cost_nano"]) == ("error", "estimate", of_usage(row))
    assert row["completion_tokens"] > 0


def test_a_client_that_leaves_pays_the_estimate_of_what_it_got(ask, upstream, logs):
    upstream.reply = stream(text="word " * 200)
    response = ask(stream=True)
    next(response.iter_encoded())
    response.close()
    (row,) = logs()
    assert (row["status"], row["usage_source"]) == ("client_closed", "estimate")
    assert row["cost_nano"] == of_usage(row) > 0


def test_an_answer_without_usage_is_priced_by_the_estimate(ask, upstream, logs):
    upstream.reply = completion("Hello there", usage=None)
    ask()
    (row,) = logs()
    assert (row["usage_source"], row["cost_nano"]) == ("estimate", of_usage(row))


def test_a_row_has_its_price_while_the_call_is_in_flight(ask, upstream, gateway):
    pieces = ask(stream=True).iter_encoded()
    next(pieces)
    (row,) = rows(gateway.database)
    assert (row["status"], row["price"]["output"], row["cost_nano"]) == ("open", "10", None)
    shown = reports.log_row(gateway.database, row["workspace_id"], row["id"])
    assert (shown["cost_usd"], shown["cost"]) == (None, [])
    b"".join(pieces)


@pytest.mark.parametrize(
    ("known", "nano", "line"),
    [
        ({"price": LIST}, 1000 * 2500, ("input", 1000)),
        ({"price": LIST, "hold_nano": 77}, 77, ("hold", None)),
        ({"hold_nano": 77}, 77, ("hold", None)),
        ({}, None, None),
    ],
    ids=["estimate", "hold", "hold without a price", "unpriced"],
)
def test_a_dead_processs_call_costs_its_hold_or_its_estimate(gateway, known, nano, line):
    dead, living = Ledger(gateway.database), Ledger(gateway.database)
    estimate = {"prompt_tokens": 1000, "total_tokens": 1000, "usage_source": "estimate"}
    dead.ensure_open(dead.open(CALLER, {**OPENING, **estimate, **known}))
    die(dead)
    assert Sweep(living, 0).look() == 1
    living.close()
    (row,) = rows(gateway.database)
    assert (row["status"], row["cost_nano"]) == ("interrupted", nano)
    cost = reports.log_row(gateway.database, CALLER.workspace_id, row["id"])["cost"]
    assert [(each["class"], each["tokens"]) for each in cost] == ([line] if line else [])


def test_the_arithmetic_adds_up_to_the_cost(ask, upstream, tenant, gateway):
    upstream.reply = completion(usage=CACHED)
    row_id = ask().headers["x-request-id"]
    shown = reports.log_row(gateway.database, tenant.workspace_id, row_id)
    assert [(line["class"], line["tokens"], str(line["usd_per_million"])) for line in shown["cost"]] == [
        ("input", 60, "2.5"),
        ("cached_input", 40, "1.25"),
        ("output", 10, "10"),
    ]
    assert sum(line["usd"] for line in shown["cost"]) == shown["cost_usd"]


def test_a_service_tier_counts_unless_the_provider_was_not_asked_for_it(gateway):
    tenant = new_tenant(gateway)
    tenant.add_provider_key("https://api.openai.com/v1")
    key = resolve(gateway.router.config(replace(CALLER, workspace_id=tenant.workspace_id)), "gpt-5")[0].key
    asked = intake.check("chat.completions", b"", {**CHAT, "service_tier": "flex"}, {})
    target, now = Target(key, "gpt-5"), datetime.now(UTC)
    standard = price_for("openai", "gpt-5", None, now)
    assert costs.price_of(target, asked, now).rates.output == standard.rates.output / 2
    assert costs.price_of(target, asked, now, ("service_tier",)) == standard


def test_the_list_is_read_before_the_fork(tmp_path):
    code = """
import runpy
runpy.run_path("gunicorn.conf.py")
from perpetuo import price_list
assert price_list._find.cache_info().currsize == 1
"""
    environ = {**os.environ, "PERPETUO_DATA": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
