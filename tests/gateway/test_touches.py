from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from perpetuo.gateway import touches as touches_module
from perpetuo.gateway.touches import Touches
from perpetuo.models import ApiKey, ProviderKey


@pytest.fixture
def provider_key_id(tenant, gateway):
    return gateway.database.read(lambda c: c.execute(sa.select(ProviderKey.id)).scalar_one())


@pytest.fixture
def touches(gateway):
    return Touches(gateway.database)


@pytest.fixture
def ended(touches, tenant, provider_key_id):
    """Notes a call that met these complaints, one an attempt, and writes what is due."""

    def ended(*messages):
        attempts = [
            {"provider_key_id": provider_key_id, "error": message and {"message": message}}
            for message in messages
        ]
        touches.note(tenant.api_key_id, {"finished_at": datetime.now(UTC), "attempts": attempts})
        touches.flush()

    return ended


@pytest.fixture
def last_error(gateway):
    return lambda: gateway.database.read(lambda c: c.execute(sa.select(ProviderKey.last_error)).scalar_one())


@pytest.fixture
def transactions(gateway, monkeypatch):
    """Those begun from now on."""
    begun, real = [], gateway.database.transaction
    monkeypatch.setattr(gateway.database, "transaction", lambda work: [begun.append(work), real(work)])
    return begun


def test_a_text_that_a_database_refuses_stops_no_key(gateway, ended, last_error):
    ended("nul \0 and a lone \ud83d surrogate")
    assert last_error() == "nul \\u0000 and a lone \\ud83d surrogate"
    assert gateway.database.read(lambda c: c.execute(sa.select(ApiKey.last_used_at)).scalar_one())


def test_a_long_text_is_cut_after_it_was_made_storable(ended, last_error):
    ended("\0" * 2000)
    assert last_error() == ("\\u0000" * 1000)[:1000]


def test_another_text_of_the_same_trouble_waits_its_minute(ended, last_error, transactions, monkeypatch):
    for number in range(5):
        ended(f"request {number} failed")
    assert (len(transactions), last_error()) == (1, "request 0 failed")
    now = touches_module.monotonic()
    monkeypatch.setattr(touches_module, "monotonic", lambda: now + touches_module.EVERY_SECONDS)
    ended("request 5 failed")
    assert (len(transactions), last_error()) == (2, "request 5 failed")


def test_the_begin_and_the_end_of_a_trouble_are_written_at_once(ended, last_error, transactions):
    seen = [(ended(message), last_error())[1] for message in (None, "away", None, None)]
    assert seen == [None, "away", None, None]
    assert len(transactions) == 3


def test_a_retry_that_went_well_is_the_last_word(ended, last_error):
    ended(None)
    ended("away", None)
    assert last_error() is None
