import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from perpetuo.config import load
from perpetuo.gateway import destinations, network
from perpetuo.gateway.destinations import DestinationBlocked, Guard, Resolver, base_url_fault
from perpetuo.gateway.network import Pool, origin_of

PRODUCTION = {
    "PERPETUO_ENV": "production",
    "PUBLIC_URL": "https://gateway.example.com",
    "SECRET_KEY": "3q9vYkR7cWm2ZsXf8TbLh5DnJp4GxQaE",
    "ENCRYPTION_KEYS": "k1:MDEyMzQ1Njc4OWFiY2RlZmdoaWprbG1ub3BxcnN0dXY=",
}


def settings_of(**environ):
    return load({**PRODUCTION, **environ})


@pytest.fixture
def guard():
    return Guard(settings_of())


@pytest.fixture
def resolver(guard):
    return Resolver(guard)


@pytest.fixture
def clock(monkeypatch):
    """A function that lets so many seconds pass for names and connections."""
    real, passed = destinations.monotonic, []
    for module in (network, destinations):
        monkeypatch.setattr(module, "monotonic", lambda: real() + sum(passed))
    return passed.append


@pytest.fixture
def pool():
    return Pool(settings_of())


NOT_PUBLIC = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "169.254.0.1", "100.64.0.1", "100.127.255.255", "192.0.0.192", "168.63.129.16"),
    *("192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1"),
    *("255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "::127.0.0.1", "::10.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::1"),
    *("2001::1", "2001:db8::1", "100::1", "fec0::1"),
]
PUBLIC = ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8"]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_refused(guard, address):
    assert not guard.is_allowed("host", address)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_allowed(guard, address):
    assert guard.is_allowed("host", address)


def spelt(host):
    return f"http://{host}:9/v1"


SPELLINGS = [
    *(
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "127.1",
        "0177.0.0.1",
        "0",
        "127.0.0.1.",
        "localhost",
        "LOCALHOST.",
    ),
    *("[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::]", "①②⑦.⓪.⓪.①", "127。0。0。1"),
]


@pytest.mark.parametrize("host", SPELLINGS)
def test_no_spelling_of_loopback_is_dialled(pool, monkeypatch, host):
    dialled = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: dialled.append(address))
    connection, _ = pool.take(origin_of(spelt(host))[0])
    with pytest.raises((DestinationBlocked, OSError, UnicodeError)):
        connection.connect(2.0)
    assert dialled == []


def resolving(monkeypatch, *answers):
    """Names resolve to these addresses, one list for each lookup; returns the lookups made."""
    lookups, left = [], list(answers)

    def getaddrinfo(host, port, *_, **__):
        lookups.append(host)
        addresses = left.pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(destinations.socket, "getaddrinfo", getaddrinfo)
    return lookups


@pytest.mark.parametrize("addresses", [["8.8.8.8", "10.0.0.1"], ["10.0.0.1", "8.8.8.8"], ["10.0.0.1"]])
def test_a_name_with_one_private_address_among_others_is_refused(resolver, monkeypatch, addresses):
    lookups = resolving(monkeypatch, addresses, addresses)
    for _ in range(2):
        with pytest.raises(DestinationBlocked):
            resolver.resolve("mixed.example.com", 443, 5)
    assert len(lookups) == 2


def test_a_name_is_looked_up_once_and_the_checked_address_is_dialled(pool, monkeypatch):
    lookups, dialled = resolving(monkeypatch, ["8.8.8.8"], ["127.0.0.1"]), []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: dialled.append(address))
    connection, _ = pool.take(("http", "rebinding.example.com", 80))
    connection.connect(2.0)
    connection.close()
    assert dialled == [("8.8.8.8", 80)]
    assert lookups == ["rebinding.example.com"]


def test_a_name_is_looked_up_again_after_a_while_and_checked_again(resolver, monkeypatch, clock):
    lookups = resolving(monkeypatch, ["8.8.8.8"], ["127.0.0.1"], ["127.0.0.1"])
    for port in (80, 443):
        assert [address for *_, address in resolver.resolve("rebinding.example", port, 5)] == [
            ("8.8.8.8", port)
        ]
    assert len(lookups) == 1
    clock(destinations.FRESH_SECONDS)
    for count in (2, 3):
        with pytest.raises(DestinationBlocked):
            resolver.resolve("rebinding.example", 80, 5)
        assert len(lookups) == count


def test_old_addresses_serve_for_a_while_where_the_name_is_no_longer_found(resolver, monkeypatch, clock):
    resolving(monkeypatch, ["8.8.8.8"])
    found = resolver.resolve("api.example", 80, 5)
    monkeypatch.setattr(destinations.socket, "getaddrinfo", refusing(socket.gaierror("no answer")))
    clock(destinations.STALE_SECONDS - 1)
    assert resolver.resolve("api.example", 80, 5) == found
    clock(1)
    with pytest.raises(socket.gaierror):
        resolver.resolve("api.example", 80, 5)


def refusing(error):
    def getaddrinfo(*_, **__):
        raise error

    return getaddrinfo


@pytest.mark.parametrize("host", ["127.0.0.1", "8.8.8.8", "::1", "2606:4700::1111"])
def test_an_address_is_not_looked_up(monkeypatch, tmp_path, host):
    local = Resolver(Guard(load({"PERPETUO_DATA": str(tmp_path)})))
    expected = socket.getaddrinfo(host, 80, type=socket.SOCK_STREAM)
    monkeypatch.setattr(destinations.socket, "getaddrinfo", refusing(AssertionError("looked up")))
    assert local.resolve(host, 80, 5) == expected


def test_a_host_that_no_name_can_be_is_not_found(resolver):
    with pytest.raises(socket.gaierror):
        resolver.resolve("a" * 64 + ".example", 80, 5)


@pytest.fixture
def asleep(monkeypatch):
    """Lookups of names that begin so get no answer before the test ends; all others find 8.8.8.8."""
    end, lookups = threading.Event(), []

    def getaddrinfo(host, *_, **__):
        lookups.append(host)
        if host.startswith("asleep"):
            end.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 0))]

    monkeypatch.setattr(destinations.socket, "getaddrinfo", getaddrinfo)
    yield lookups
    end.set()


def test_many_calls_to_one_name_make_one_lookup(resolver, asleep):
    def resolve(port):
        with pytest.raises(TimeoutError):
            resolver.resolve("asleep.example", port, 0.1)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(resolve, range(1, 11)))
    assert asleep == ["asleep.example"]


def test_names_never_found_before_leave_room_for_those_that_were(monkeypatch, guard, asleep, clock):
    monkeypatch.setattr(destinations, "NEW_LOOKUPS", 2)
    resolver = Resolver(guard)
    resolver.resolve("api.example", 80, 5)
    for number in range(3):
        with pytest.raises((TimeoutError, socket.gaierror)):
            resolver.resolve(f"asleep-{number}.example", 80, 0.1)
    clock(destinations.STALE_SECONDS)
    assert resolver.resolve("api.example", 80, 5)
    assert "asleep-2.example" not in asleep


def test_the_names_that_are_kept_are_bounded(monkeypatch, resolver, asleep):
    monkeypatch.setattr(destinations, "NAMES_KEPT", 2)
    for host in ("a.example", "b.example", "c.example", "c.example", "a.example"):
        resolver.resolve(host, 80, 5)
    assert asleep == ["a.example", "b.example", "c.example", "a.example"]


SLEEPERS = """
from gevent import monkey; monkey.patch_all()
import os, sys, time, _socket, gevent
from perpetuo.config import load
from perpetuo.gateway.network import Pool

real, sleep = _socket.getaddrinfo, monkey.get_original("time", "sleep")

def getaddrinfo(host, *rest, **named):
    if b"asleep" in (host if isinstance(host, bytes) else host.encode()):
        sleep(60)
    return real(host, *rest, **named)

_socket.getaddrinfo = getaddrinfo
pool = Pool(load({"PERPETUO_DATA": sys.argv[1]}))

def connect(host):
    connection, _ = pool.take(("http", host, int(sys.argv[2])))
    with gevent.Timeout(5, False):
        connection.connect(2.0)
    print(connection.is_fresh, flush=True)

for number in range(20):
    gevent.spawn(connect, f"asleep-{number}.example")
gevent.sleep(0.1)
connect("localhost")
os._exit(0)
"""


def test_under_gevent_twenty_names_without_an_answer_keep_no_other_waiting(upstream, tmp_path):
    command = [sys.executable, "-c", SLEEPERS, str(tmp_path), str(upstream.port)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("True\n", "")


def test_the_second_address_is_tried_where_the_first_does_not_answer(pool, monkeypatch):
    resolving(monkeypatch, ["8.8.8.8", "1.1.1.1"])
    dialled = []

    def connect(self, address):
        dialled.append(address[0])
        if len(dialled) == 1:
            raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", connect)
    connection, _ = pool.take(("http", "two.example.com", 80))
    connection.connect(2.0)
    connection.close()
    assert dialled == ["8.8.8.8", "1.1.1.1"]


@pytest.mark.parametrize(
    ("allow", "host", "address", "is_allowed"),
    [
        ("10.1.0.0/16", "x", "10.1.2.3", True),
        ("10.1.0.0/16", "x", "10.2.0.1", False),
        ("10.1.0.0/16", "x", "::ffff:10.1.2.3", True),
        ("fd00::/8", "x", "fd12::1", True),
        ("fd00::/8", "x", "fc00::1", False),
        ("127.0.0.1", "x", "127.0.0.1", True),
        ("127.0.0.1", "x", "127.0.0.2", False),
        ("Ollama.internal", "ollama.internal", "10.0.0.1", True),
        ("ollama.internal", "OLLAMA.internal.", "10.0.0.1", True),
        ("ollama.internal", "evil.ollama.internal", "10.0.0.1", False),
    ],
)
def test_the_operator_opens_exactly_what_is_listed(allow, host, address, is_allowed):
    guard = Guard(settings_of(PERPETUO_UPSTREAM_ALLOW=allow))
    assert guard.is_allowed(host, address) is is_allowed


def test_local_mode_allows_home_and_nothing_that_has_credentials(tmp_path):
    guard = Guard(load({"PERPETUO_DATA": str(tmp_path)}))
    assert all(guard.is_allowed("x", address) for address in ("127.0.0.1", "192.168.1.5", "::1", "fd00::1"))
    metadata = ("169.254.169.254", "168.63.129.16", "192.0.0.192", "100.100.100.200", "0.0.0.0")
    assert not any(guard.is_allowed("x", address) for address in metadata)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "api.example.com/v1",
            "ftp://example.com",
            "file:///etc/passwd",
            "http://",
            "http:///v1",
            "//x/v1",
        ),
        *("http://user@example.com", "http://user:word@example.com", "http://:@example.com", "http://@x"),
        *("https://example.com/v1?key=x", "https://example.com/v1#x", "https://example.com/?", "https://x/#"),
        *("https://example.com/?api-version=1&key=x", "https://example.com/?api-version=a%20b"),
        *("http://exa mple.com", "http://example.com/\n", "http://example.com\\@127.0.0.1", "http://①.com"),
        *(
            "http://example.com:0",
            "http://example.com:99999",
            "http://example.com:x",
            "http://[::1",
            "http://[x]",
        ),
        *(
            "http://127.0.0.1/v1",
            "http://[::1]:8000/v1",
            "http://169.254.169.254",
            "http://[::ffff:10.0.0.1]",
        ),
    ],
)
def test_what_cannot_be_a_base_url_is_said_before_it_is_saved(url):
    assert base_url_fault(url, settings_of())


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com/v1",
        "http://8.8.8.8:8000/v1/",
        "https://x.example/",
        "https://x.openai.azure.com/openai/deployments?api-version=2024-10-21",
    ],
)
def test_a_base_url_that_may_be_called_has_no_fault(url):
    assert base_url_fault(url, settings_of()) is None


def test_an_origin_has_its_port_and_the_rest_is_the_path():
    assert origin_of("https://x.com/v1/chat?a=b") == (("https", "x.com", 443), "/v1/chat?a=b")
    assert origin_of("http://X.com:8000") == (("http", "x.com", 8000), "/")


def test_proxies_of_the_environment_are_not_used(ask, upstream, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ask().status_code == 200


@pytest.fixture
def pooled(upstream, tmp_path):
    pool = Pool(load({"PERPETUO_DATA": str(tmp_path)}))
    yield pool, ("http", upstream.host, upstream.port)
    pool.close()


def test_an_idle_connection_is_used_again_and_a_busy_one_is_not(pooled):
    pool, origin = pooled
    first, is_reused = pool.take(origin)
    first.connect(2.0)
    assert not is_reused
    pool.give(origin, first)
    assert pool.take(origin) == (first, True)
    second, is_reused = pool.take(origin)
    assert (second is first, is_reused) == (False, False)
    first.close()


def idle(pool, origin, count=1):
    """So many connections, given back in this order."""
    connections = [pool.take(origin)[0] for _ in range(count)]
    for connection in connections:
        connection.connect(2.0)
    for connection in connections:
        pool.give(origin, connection)
    return connections


def test_a_connection_idle_for_too_long_is_not_taken(pooled, clock):
    pool, origin = pooled
    (connection,) = idle(pool, origin)
    clock(network.IDLE_SECONDS)
    assert pool.take(origin)[1] is False
    assert connection.sock is None


def test_the_idle_connections_of_an_origin_no_longer_used_are_closed_when_another_is(pooled, clock):
    pool, (_, _, port) = pooled
    left = idle(pool, ("http", "127.0.0.1", port), 3)
    clock(network.IDLE_SECONDS)
    (kept,) = idle(pool, ("http", "localhost", port))
    assert [connection.sock for connection in left] == [None] * 3
    assert kept.is_fresh
    assert list(pool._idle) == [("http", "localhost", port)]


def test_idle_connections_are_closed_without_any_call_too(pooled, clock):
    pool, origin = pooled
    old = idle(pool, origin, 2)
    clock(network.IDLE_SECONDS / 2)
    pool.give(origin, new := pool.take(origin)[0])
    pool.close_expired()
    assert old[0].is_fresh
    clock(network.IDLE_SECONDS / 2)
    pool.close_expired()
    assert (old[0].sock, new.is_fresh, new is old[1]) == (None, True, True)


def test_of_too_many_idle_connections_the_oldest_go(pooled, monkeypatch):
    monkeypatch.setattr(network, "IDLE_IN_ALL", 3)
    pool, (_, _, port) = pooled
    first, second = idle(pool, ("http", "127.0.0.1", port), 2)
    rest = idle(pool, ("http", "localhost", port), 2)
    assert [c.is_fresh for c in (first, second, *rest)] == [False, True, True, True]
    pool.close()
    assert not any(c.is_fresh for c in (second, *rest))


def test_a_connection_that_the_upstream_closed_is_not_taken(pooled, upstream):
    pool, origin = pooled
    connection, _ = pool.take(origin)
    connection.connect(2.0)
    pool.give(origin, connection)
    upstream.close()
    assert pool.take(origin)[1] is False
