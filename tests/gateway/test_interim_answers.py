import pytest

from tests.fake_upstream import auto, completion
from tests.gateway.test_chat import text_of
from tests.tenants import new_tenant

INTERIM = {
    "101": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    "102": b"HTTP/1.1 102 Processing\r\n\r\n",
    "103": b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n",
}
LATE_SECONDS = 0.3  # only a connection that was not closed lives to see the answer behind


def first_then_late(first):
    """Sends these bytes and later, on the same connection, what the same caller should have got."""

    def reply(exchange):
        exchange.send(first)
        exchange.wait(LATE_SECONDS)
        auto(echo=True)(exchange)

    return reply


@pytest.fixture
def stranger(gateway, upstream):
    """Another workspace that calls the same upstream."""
    tenant = new_tenant(gateway)
    tenant.add_provider_key(upstream.base_url)
    return tenant


def said(text):
    return [{"role": "user", "content": text}]


def assert_next_call_gets_its_own(ask, upstream, stranger):
    upstream.reply = auto(echo=True)
    response = ask(headers=stranger.headers, messages=said("mine"))
    assert response.status_code == 200
    assert response.json["choices"][0]["message"]["content"] == "mine"
    assert upstream.requests[0].connection_id != upstream.requests[1].connection_id
    upstream.wait_for_close(upstream.requests[0])


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("code", INTERIM)
def test_an_interim_answer_never_leaves_its_real_one_to_the_next(ask, upstream, stranger, code, is_stream):
    upstream.reply = first_then_late(INTERIM[code])
    response = ask(messages=said("secret of the first"), stream=is_stream)
    assert (response.status_code, response.json["error"]["code"]) == (502, "upstream_error")
    assert_next_call_gets_its_own(ask, upstream, stranger)


@pytest.mark.parametrize("code", [204, 205, 304])
def test_an_answer_that_has_no_body_never_leaves_one_to_the_next(ask, upstream, stranger, code):
    upstream.reply = first_then_late(f"HTTP/1.1 {code} Empty\r\nContent-Length: 0\r\n\r\n".encode())
    assert ask(messages=said("secret of the first")).status_code == 502
    assert_next_call_gets_its_own(ask, upstream, stranger)


def test_after_100_continue_all_is_well(ask, upstream, logs):
    def reply(exchange):
        exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        auto(echo=True)(exchange)

    upstream.reply = reply
    for text in ("one", "two"):
        answer = ask(messages=said(text)).json
        assert answer["choices"][0]["message"]["content"] == text
    assert text_of(ask(messages=said("three"), stream=True)) == "three"
    assert upstream.connections == 1
    assert [row["status"] for row in logs()] == ["ok"] * 3


def test_after_an_ordinary_answer_the_connection_is_used_by_the_next(ask, upstream, stranger):
    upstream.reply = completion()
    assert ask().status_code == ask(headers=stranger.headers).status_code == 200
    assert upstream.connections == 1
