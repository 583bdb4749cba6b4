import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from perpetuo.gateway import offers as offers_module
from perpetuo.gateway import upstream as upstream_module
from tests.fake_upstream import hang, models, status


@pytest.fixture
def clock(monkeypatch):
    """A function that lets so many seconds pass for the lists."""
    real, passed = offers_module.monotonic, []
    monkeypatch.setattr(offers_module, "monotonic", lambda: real() + sum(passed))
    return passed.append


@pytest.fixture
def listed(gateway, tenant):
    """The ids that a key may ask for now."""

    def listed():
        caller = gateway.access.authenticate(f"Bearer {tenant.key}")
        return [offer.id for offer in gateway.offers.all(caller)]

    return listed


def test_a_silent_upstream_is_asked_once_however_many_wait(listed, upstream, monkeypatch):
    monkeypatch.setattr(upstream_module, "LIST_SECONDS", 0.5)
    upstream.reply = hang()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: listed(), range(8))) == [[]] * 8
    assert len(upstream.requests) == 1


def test_who_has_an_old_list_does_not_wait_for_the_next(listed, upstream, clock, monkeypatch):
    monkeypatch.setattr(upstream_module, "LIST_SECONDS", 2)
    upstream.reply = models(["gpt-4o"])
    listed()
    clock(offers_module.KEPT_SECONDS + 1)
    upstream.reply = hang()
    first = threading.Thread(target=listed)
    first.start()
    upstream.wait_for_requests(2)
    assert listed() == ["gpt-4o"]
    assert first.is_alive()
    upstream.close_connections()
    first.join()


def test_the_last_list_serves_for_five_minutes_while_its_upstream_is_away(listed, upstream, clock):
    upstream.reply = models(["gpt-4o"])
    listed()
    upstream.reply = status(500)
    for _ in range(9):
        clock(60)
        assert listed() == ["gpt-4o"]
    clock(60)
    assert listed() == []
    upstream.reply = models(["gpt-5"])
    clock(offers_module.AWAY_SECONDS)
    assert listed() == ["gpt-5"]


def test_a_secret_that_cannot_be_sent_leaves_its_upstream_out(listed, tenant, upstream, monkeypatch):
    uncaught = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    upstream.reply = models(["gpt-4o"])
    tenant.add_provider_key(upstream.base_url, secret="sk-\u20ac", name="euro")
    assert listed() == ["gpt-4o"]
    assert uncaught == []
