"""R4 of the security notes, whole: whatever a name resolves to, no packet leaves to a refused address."""

import ipaddress
import select
import socket
import subprocess
import sys

import pytest

from perpetuo.gateway import destinations
from tests.fake_upstream import completion, stream
from tests.gateway.conftest import CHAT, with_settings
from tests.gateway.test_errors import assert_row, error_of
from tests.gateway.test_network import NOT_PUBLIC
from tests.tenants import new_tenant

NAME = "rebinding.example"
ALLOWED, FORBIDDEN = "127.0.0.1", "127.0.0.2"  # both are real, on this machine
ONE_ADDRESS = {"upstream_allow_networks": (ipaddress.ip_network(f"{ALLOWED}/32"),)}
BLOCKED = (502, "upstream_error", "destination_blocked")
STREAMS = pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])


@pytest.fixture(autouse=True)
def always(books_at_the_end):
    """Every test here ends with books that balance."""


@pytest.fixture
def victim(upstream):
    """What listens at the forbidden address, on the upstream's port; tells whether anybody knocked."""
    with socket.create_server((FORBIDDEN, upstream.port)) as listener:
        yield lambda: bool(select.select([listener], [], [], 0)[0])


@pytest.fixture
def dialled(monkeypatch):
    """The addresses that sockets of this process were connected to."""
    seen, connect = [], socket.socket.connect

    def noting(self, address):
        seen.append(address[0])
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noting)
    return seen


@pytest.fixture
def resolving(monkeypatch):
    """Sets what names resolve to from now on; nothing found before is kept."""
    monkeypatch.setattr(destinations, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(destinations, "STALE_SECONDS", 0.0)

    def resolving(*addresses):
        found = [
            (socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0))
            for ip in addresses
        ]
        monkeypatch.setattr(destinations.socket, "getaddrinfo", lambda *_, **__: found)

    return resolving


@pytest.fixture
def tenant(gateway, upstream, dialled):
    tenant = new_tenant(gateway)
    tenant.add_provider_key(f"http://{NAME}:{upstream.port}/v1", provider="custom")
    return tenant


@STREAMS
@with_settings(**ONE_ADDRESS)
def test_a_name_that_turns_to_a_refused_address_is_called_no_more(
    ask, upstream, victim, dialled, resolving, logs, is_stream
):
    upstream.reply = stream(text="Hello") if is_stream else completion("Hello")
    for addresses, is_good in [
        ([ALLOWED], True),
        ([FORBIDDEN], False),
        ([ALLOWED, FORBIDDEN], False),
        ([FORBIDDEN, ALLOWED], False),
        ([ALLOWED], True),
    ]:
        upstream.close_connections()  # a connection to a checked address would serve on
        resolving(*addresses)
        response = ask(stream=is_stream)
        response.get_data()
        if is_good:
            assert response.status_code == 200
        else:
            error_of(response, *BLOCKED)
            (attempt,) = assert_row(logs, response, "error", BLOCKED[2])["attempts"]
            assert attempt["http_status"] is None
    assert set(dialled) == {ALLOWED}
    assert not victim()


@with_settings(upstream_allow_networks=())
@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_a_name_of_a_refused_address_is_not_dialled(ask, dialled, resolving, address):
    for addresses in ([address], ["8.8.8.8", address], [address, "8.8.8.8"]):
        resolving(*addresses)
        error_of(ask(), *BLOCKED)
    assert dialled == []


WAYS = {
    "chat": ("/v1/chat/completions", CHAT),
    "stream": ("/v1/chat/completions", {**CHAT, "stream": True}),
    "embeddings": ("/v1/embeddings", {"model": "m", "input": "x"}),
    "responses": ("/v1/responses", {"model": "m", "input": "x"}),
}


@with_settings(**ONE_ADDRESS)
@pytest.mark.parametrize("way", WAYS)
def test_no_endpoint_goes_round_the_guard(client, tenant, victim, dialled, resolving, way):
    resolving(FORBIDDEN)
    path, body = WAYS[way]
    error_of(client.post(path, json=body, headers=tenant.headers), *BLOCKED)
    assert dialled == []
    assert not victim()


@with_settings(**ONE_ADDRESS)
def test_neither_a_test_of_a_key_nor_the_list_of_models_goes_round_the_guard(
    client, gateway, tenant, upstream, victim, dialled, resolving
):
    resolving(FORBIDDEN)
    probe = gateway.upstream.probe("custom", f"http://{NAME}:{upstream.port}/v1", "sk")
    assert (probe.ok, probe.http_status, probe.models) == (False, None, None)
    assert "not a public address" in probe.error
    assert client.get("/v1/models", headers=tenant.headers).json["data"] == []
    assert dialled == []
    assert not victim()


@with_settings(**ONE_ADDRESS)
def test_a_refused_address_is_passed_over_for_the_next_target(
    ask, tenant, upstream, victim, resolving, dialled
):
    resolving(FORBIDDEN)
    tenant.add_provider_key(upstream.base_url, "sk-second", priority=1, models=["gpt-4o", "m"])
    tenant.add_provider_key(f"http://{NAME}:{upstream.port}/v1", name="first", models=["m"], priority=0)
    response = ask(model="m")
    assert (response.status_code, response.headers["x-perpetuo-attempts"]) == (200, "2")
    assert upstream.requests[0].headers["authorization"] == "Bearer sk-second"
    assert set(dialled) == {ALLOWED}
    assert not victim()


@with_settings(**ONE_ADDRESS)
def test_a_redirect_to_a_refused_address_is_not_followed(ask, upstream, victim, dialled, resolving):
    resolving(ALLOWED)
    location = (
        f"Location: http://{FORBIDDEN}:{upstream.port}/v1/chat/completions\r\nContent-Length: 0\r\n\r\n"
    )
    upstream.reply = lambda exchange: exchange.send(f"HTTP/1.1 307 Go\r\n{location}".encode())
    error_of(ask(), 502, "upstream_error", "upstream_redirect")
    assert set(dialled) == {ALLOWED}
    assert not victim()


# The real resolver's way under gevent: a native thread, whose answers turn with every lookup.
TURNING = """
from gevent import monkey; monkey.patch_all()
import sys, _socket, dataclasses, ipaddress
from perpetuo.config import load
from perpetuo.gateway import destinations
from perpetuo.gateway.destinations import DestinationBlocked
from perpetuo.gateway.network import Pool

allowed, forbidden, port, data = sys.argv[1:]
lookups = []

def getaddrinfo(host, *rest, **named):
    lookups.append(host)
    return [(2, 1, 6, "", (forbidden if len(lookups) % 2 == 0 else allowed, 0))]

_socket.getaddrinfo = getaddrinfo
destinations.FRESH_SECONDS = destinations.STALE_SECONDS = 0.0
networks = (ipaddress.ip_network(allowed + "/32"),)
pool = Pool(dataclasses.replace(load({"PERPETUO_DATA": data}), upstream_allow_networks=networks))
for _ in range(20):
    connection, _ = pool.take(("http", "rebinding.example", int(port)), fresh=True)
    try:
        connection.connect(5.0)
        print(connection.sock.getpeername()[0])
        connection.close()
    except DestinationBlocked:
        print("blocked")
print(len(lookups))
"""


def test_under_gevent_every_connection_goes_to_the_address_that_was_checked(upstream, victim, tmp_path):
    command = [sys.executable, "-c", TURNING, ALLOWED, FORBIDDEN, str(upstream.port), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.stdout.split(), ran.stderr) == ([ALLOWED, "blocked"] * 10 + ["20"], "")
    assert not victim()
