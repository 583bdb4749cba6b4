from __future__ import annotations

import dataclasses

import pytest
import sqlalchemy as sa

from perpetuo.gateway import plan
from perpetuo.models import RequestLog, UsageCounter
from tests.balance import books_balance
from tests.tenants import Tenant, new_tenant

CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Say hello"}]}


@pytest.fixture
def tenant(gateway, upstream) -> Tenant:
    """A workspace whose one provider key leads to the fake upstream."""
    tenant = new_tenant(gateway)
    tenant.add_provider_key(upstream.base_url)
    return tenant


@pytest.fixture(autouse=True)
def hasty_retries(monkeypatch):
    """What is tried again, is so at once."""
    monkeypatch.setattr(plan, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture
def ask(client, tenant):
    """Posts a chat completion; keyword arguments change its body."""

    def ask(path="/v1/chat/completions", headers=None, **fields):
        return client.post(path, json={**CHAT, **fields}, headers={**tenant.headers, **(headers or {})})

    return ask


@pytest.fixture
def logs(gateway):
    """Settles what waits, then reads all rows."""

    def logs():
        gateway.ledger.writer.close()
        gateway.ledger.writer.__init__(gateway.ledger.writer._commit, gateway.ledger.touches.flush)
        gateway.ledger.writer.start()
        table = RequestLog.__table__
        return gateway.database.read(
            lambda c: c.execute(sa.select(table).order_by(table.c.id)).mappings().all()
        )

    return logs


@pytest.fixture
def counters(gateway):
    return lambda: gateway.database.read(
        lambda c: c.execute(sa.select(UsageCounter.__table__)).mappings().all()
    )


@pytest.fixture
def changed():
    """What a test's settings have otherwise than the default; set by parametrisation."""
    return {}


@pytest.fixture
def settings(settings, changed):
    return dataclasses.replace(settings, **changed)


def with_settings(**values):
    return pytest.mark.parametrize("changed", [values], ids=["-".join(values)])


@pytest.fixture
def books_at_the_end(gateway):
    """After every test: all is settled, the counters agree, and no call still counts as in flight."""
    yield
    gateway.ledger.writer.close()
    books_balance(gateway.database)
    assert len(gateway.calls) == 0
