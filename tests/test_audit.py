import threading

import pytest
import sqlalchemy as sa

from perpetuo.gateway import reprice as reprice_module
from perpetuo.gateway.ledger import Ledger
from perpetuo.gateway.reprice import reprice
from perpetuo.models import ProviderKey, RequestLog, UsageCounter
from perpetuo.pricing import Price
from tests.balance import books_balance
from tests.gateway.conftest import CHAT
from tests.gateway.test_ledger import counters, rows
from tests.tenants import Tenant, new_tenant

OWN = {"mine": {"input": 1, "output": 2}}
MINE = 9 * 1000 + 3 * 2000  # the fake upstream's usage


@pytest.fixture
def run(app):
    runner = app.test_cli_runner()
    return lambda *words: runner.invoke(args=words)


@pytest.fixture
def tenant(gateway, upstream) -> Tenant:
    """A workspace whose key serves a model that has a price, and one that has none yet."""
    tenant = new_tenant(gateway)
    tenant.provider_key_id = tenant.add_provider_key(upstream.base_url, models=["gpt-4o", "mine"])
    return tenant


@pytest.fixture
def ask(client, tenant):
    def ask(**fields):
        response = client.post("/v1/chat/completions", json={**CHAT, **fields}, headers=tenant.headers)
        return response.headers["x-request-id"]

    return ask


def change_row(gateway, row_id, **columns):
    statement = sa.update(RequestLog).where(RequestLog.__table__.c.id == row_id).values(**columns)
    gateway.database.transaction(lambda connection: connection.execute(statement))


def by_id(gateway):
    return {row["id"]: row for row in rows(gateway.database)}


def test_nothing_differs_after_calls_of_every_kind(run, ask, gateway):
    for fields in ({}, {"model": "mine"}, {"model": "unknown"}, {"messages": []}, {"stream": True}):
        ask(**fields)
    gateway.ledger.close()
    assert run("audit").output == "0 differences.\n"


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"cost_nano": 52_501}, "cost_nano is 52501, its usage and price say 52500"),
        ({"cost_nano": None}, "cost_nano is None, its usage and price say 52500"),
        ({"price": None}, "cost_nano is 52500, its usage and price say None"),
        ({"completion_tokens": 4}, "cost_nano is 52500, its usage and price say 62500"),
        ({"cached_tokens": 9}, "cost_nano is 52500, its usage and price say 41250"),
        ({"usage_source": None}, "cost_nano is 52500, its usage and price say 0"),
        ({"swept": True, "hold_nano": 5}, "cost_nano is 52500, its usage and price say 5"),
    ],
)
def test_a_doctored_row_is_named(run, ask, gateway, columns, told):
    ask()
    doctored = ask()
    change_row(gateway, doctored, **columns)
    found = run("audit")
    assert found.exit_code == 1
    assert f"request {doctored}: {told}\n" in found.output
    assert found.output.count("request req_") == 1


def test_what_had_no_price_gets_it_once_there_is_one(run, ask, tenant, gateway):
    priced, unpriced, refused = ask(), ask(model="mine"), ask(messages=[])
    gateway.ledger.close()
    before = by_id(gateway)
    assert run("audit", "--reprice").output == "0 calls that had no price have one now.\n0 differences.\n"
    tenant.change(ProviderKey, tenant.provider_key_id, prices={**OWN, "gpt-4o": {"input": 9, "output": 9}})
    assert run("audit", "--reprice").output == "1 calls that had no price have one now.\n0 differences.\n"
    assert run("audit", "--reprice").output.startswith("0 calls")
    after = by_id(gateway)
    assert (after[priced], after[refused]) == (before[priced], before[refused])
    assert (after[unpriced]["cost_nano"], after[unpriced]["price"]["source"]) == (MINE, "override")
    changed = {name for name in after[unpriced] if after[unpriced][name] != before[unpriced][name]}
    assert changed == {"cost_nano", "price"}
    books_balance(gateway.database)
    (counter,) = [row for row in counters(gateway.database) if row["model"] == "mine"]
    assert (counter["cost_nano"], counter["unpriced_requests"], counter["requests"]) == (MINE, 0, 1)


def test_open_rows_wait_for_their_own_settle(ask, tenant, gateway, client):
    body = {**CHAT, "model": "mine", "stream": True}
    pieces = client.post("/v1/chat/completions", json=body, headers=tenant.headers).iter_encoded()
    next(pieces)
    tenant.change(ProviderKey, tenant.provider_key_id, prices=OWN)
    assert reprice(gateway.ledger) == 0
    b"".join(pieces)
    assert reprice(gateway.ledger) == 1
    books_balance(gateway.database)


def test_two_at_once_price_each_call_once(ask, tenant, gateway, monkeypatch):
    monkeypatch.setattr(reprice_module, "PAGE", 5)
    monkeypatch.setattr(reprice_module, "BATCH", 2)
    for _ in range(20):
        ask(model="mine")
    tenant.change(ProviderKey, tenant.provider_key_id, prices=OWN)
    repriced = []
    ledgers = [Ledger(gateway.database) for _ in range(2)]
    threads = [threading.Thread(target=lambda each=each: repriced.append(reprice(each))) for each in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(repriced) == 20
    books_balance(gateway.database)
    (counter,) = counters(gateway.database)
    assert (counter["cost_nano"], counter["unpriced_requests"]) == (20 * MINE, 0)


def test_a_row_priced_between_the_look_and_the_write_is_left_alone(ask, tenant, gateway):
    row_id = ask(model="mine")
    tenant.change(ProviderKey, tenant.provider_key_id, prices=OWN)
    assert reprice(gateway.ledger) == 1
    price = Price.from_json(by_id(gateway)[row_id]["price"])
    late = {row_id: price}
    write = reprice_module._write
    assert gateway.database.transaction(lambda connection: write(gateway.ledger, connection, late)) == 0
    books_balance(gateway.database)


def test_a_wrong_counter_is_named_beside_the_cost(run, ask, gateway):
    ask()
    change = sa.update(UsageCounter).values(cost_nano=UsageCounter.__table__.c.cost_nano + 1)
    gateway.database.transaction(lambda connection: connection.execute(change))
    found = run("audit")
    assert found.exit_code == 1
    assert "cost_nano is 52501, rows say 52500" in found.output
