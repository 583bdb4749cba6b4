import dataclasses
import io
import ipaddress
import select
import socket
import ssl
import struct
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from perpetuo.gateway import upstream as upstream_module
from tests.conftest import BACKENDS
from tests.fake_upstream import (
    LoopbackServer,
    event,
    hang,
    headers_then_hang,
    stale,
    stall_after,
    status,
    stream,
)
from tests.fault_upstream import LAST, chunk
from tests.gateway.test_chat import text_of
from tests.gateway.test_leaving import SOON
from tests.house import House, Visitor, new_database
from tests.tenants import new_tenant

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class TlsFront(LoopbackServer):
    """TLS 1.3 in front of a plain upstream, which records what it was asked and when its peer left."""

    def __init__(self, behind, context):
        self.behind, self.context = behind, context
        self.ends_with_reset = False
        super().__init__()

    def base_url(self, host="localhost"):
        return f"https://{host}:{self.port}/v1"

    def serve(self, connection, number):
        # A duplicate: close() of the server shuts the original, which wakes whoever waits on either.
        with self.context.wrap_socket(connection.dup(), server_side=True) as outside:
            try:
                with socket.create_connection(self.behind.address) as inside:
                    pump(outside, inside)
            finally:
                if self.ends_with_reset:
                    outside.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def pump(one, other):
    """Passes bytes on in both directions until either side ends."""
    poller, sinks = select.poll(), {one.fileno(): (one, other), other.fileno(): (other, one)}
    for handle in sinks:
        poller.register(handle, select.POLLIN)
    while True:
        for handle, _ in poller.poll():
            source, sink = sinks[handle]
            received = source.recv(65536)
            if not received:
                return
            sink.sendall(received)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A file with a self-signed certificate of localhost, and a server's context that has its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("192.0.2.1"))]
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("certificate")
    path, key_path = folder / "certificate.pem", folder / "key.pem"
    path.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(path, key_path)
    return path, context


@pytest.fixture
def front(upstream, certificate):
    with TlsFront(upstream, certificate[1]) as front:
        yield front


@pytest.fixture
def trusted(monkeypatch, certificate):
    """As an operator does it who has an authority of their own."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))


@pytest.fixture
def tenant(gateway, front):
    tenant = new_tenant(gateway)
    tenant.add_provider_key(front.base_url())
    return tenant


@pytest.fixture
def settings(settings):
    return dataclasses.replace(settings, first_byte_timeout=3.0)


def words(text):
    return event({"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


@pytest.fixture
def talkative(monkeypatch):
    monkeypatch.setattr(upstream_module, "KEEP_ALIVE_SECONDS", 0.05)


def test_calls_under_tls_work_on_one_connection(trusted, ask, upstream, front, logs):
    for _ in range(2):
        assert ask().json["choices"][0]["message"]["content"] == "Hello world"
        assert text_of(ask(stream=True)) == "Hello world"
        assert ask(messages=[{"role": "user", "content": "x" * 300_000}]).status_code == 200
    assert (len(upstream.requests), front.connections) == (6, 1)
    assert [row["status"] for row in logs()] == ["ok"] * 6


def test_a_refusal_under_tls_keeps_its_status_and_its_connection(trusted, ask, upstream, front):
    upstream.reply = status(429)
    assert [ask(stream=is_stream).status_code for is_stream in (False, True)] == [429, 429]
    assert front.connections == 1


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
def test_a_certificate_that_nobody_vouches_for_is_a_502_that_says_tls(ask, upstream, logs, is_stream):
    response = ask(stream=is_stream)
    assert (response.status_code, response.json["error"]["code"]) == (502, "upstream_error")
    assert "TLS" in response.json["error"]["message"]
    assert upstream.requests == []
    assert logs()[0]["status"] == "error"


def test_a_certificate_of_another_host_is_a_502_that_says_tls(trusted, gateway, front, upstream, ask):
    other = new_tenant(gateway)
    other.add_provider_key(front.base_url("127.0.0.1"))
    response = ask(headers=other.headers)
    assert response.status_code == 502
    assert "TLS" in response.json["error"]["message"]
    assert upstream.requests == []


def test_session_tickets_are_not_taken_for_an_answer(trusted, talkative, ask, upstream):
    upstream.reply = hang()
    response = ask(stream=True)
    assert (response.status_code, response.mimetype) == (200, "text/event-stream")
    pieces = response.iter_encoded()
    assert [next(pieces) for _ in range(2)] == [KEEP_ALIVE] * 2
    response.close()
    upstream.wait_for_close(upstream.requests[0])


def test_what_comes_after_comments_is_whole(trusted, talkative, ask, upstream, front, logs):
    upstream.reply = lambda exchange: (exchange.wait(0.2), stream(delay=0.06)(exchange))
    for _ in range(2):  # the second on a connection whose tickets were read
        response = ask(stream=True)
        data = response.get_data()
        assert data.startswith(KEEP_ALIVE)
        assert data.endswith(DONE)
        assert text_of(response) == "Hello world"
    assert front.connections == 1
    assert [row["status"] for row in logs()] == ["ok"] * 2


def test_what_tls_has_unpacked_already_is_not_waited_for(trusted, ask, upstream, monkeypatch):
    # The reader's buffer ends with the first chunk; the rest of its record no socket announces.
    room = io.DEFAULT_BUFFER_SIZE - len(chunk(words("x" * 8000))) + 8000
    first, rest = chunk(words("x" * room)), chunk(LAST)
    assert len(first) == io.DEFAULT_BUFFER_SIZE

    def reply(exchange):
        exchange.start(200, {"Content-Type": "text/event-stream"})
        exchange.wait(0.2)
        exchange.send(first + rest)
        exchange.wait()

    monkeypatch.setattr(upstream_module, "KEEP_ALIVE_SECONDS", 1.0)
    upstream.reply = reply
    response = ask(stream=True)
    pieces = response.iter_encoded()
    assert next(pieces).endswith(b"\n\n")
    assert b"stop" in next(pieces)
    assert next(pieces) == DONE
    response.close()


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("with_reset", [False, True], ids=["FIN", "RST"])
def test_a_stale_connection_under_tls_costs_a_second_try(
    trusted, ask, upstream, front, with_reset, is_stream
):
    front.ends_with_reset = with_reset
    upstream.script([stale()])
    ask().get_data()
    response = ask(stream=is_stream)
    assert response.status_code == 200
    response.get_data()
    assert (upstream.stale_closes, front.connections) == (1, 2)


# The real server.


@pytest.fixture(scope="module")
def tls_house(request, tmp_path_factory, certificate):
    folder = tmp_path_factory.mktemp("tls_house")
    url = new_database(request, BACKENDS[0], folder)
    with House(url, folder, SSL_CERT_FILE=str(certificate[0])) as house:
        yield house


@pytest.fixture
def guest(tls_house, front):
    tenant = new_tenant(tls_house.gateway)
    tenant.add_provider_key(front.base_url())
    return tenant


def test_the_real_server_trusts_the_file_of_its_operator(tls_house, guest, front, upstream):
    for _ in range(2):
        assert tls_house.post(guest).status_code == 200
        assert tls_house.post(guest, stream=True).content.endswith(DONE)
    assert (len(upstream.requests), front.connections) == (4, 1)
    assert [row["status"] for row in tls_house.settled(guest, 4)] == ["ok"] * 4


@pytest.mark.parametrize("with_reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize("fields", [{"stream": True}, {}], ids=["stream", "plain"])
@pytest.mark.parametrize(
    "reply", [hang(), headers_then_hang(), stall_after(3)], ids=["no head", "no content", "some content"]
)
def test_leaving_a_silent_upstream_under_tls_closes_its_connection(
    tls_house, guest, front, upstream, reply, fields, with_reset
):
    upstream.reply = reply
    visitor = Visitor(tls_house, guest, **fields)
    upstream.wait_for_requests(1)
    visitor.leave(with_reset=with_reset)
    upstream.wait_for_close(upstream.requests[0], SOON)
    assert [row["status"] for row in tls_house.settled(guest)] == ["client_closed"]


def test_leaving_a_reused_connection_under_tls_closes_it(tls_house, guest, front, upstream):
    upstream.script([stream(), hang()])
    assert tls_house.post(guest, stream=True).content.endswith(DONE)
    visitor = Visitor(tls_house, guest, stream=True)
    upstream.wait_for_requests(2)
    visitor.leave()
    upstream.wait_for_close(upstream.requests[1], SOON)
    assert [row["status"] for row in tls_house.settled(guest, 2)] == ["ok", "client_closed"]
    assert front.connections == 1
