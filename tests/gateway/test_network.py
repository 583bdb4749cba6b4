import socket

import pytest

from perpetuo.config import load
from perpetuo.gateway import network
from perpetuo.gateway.network import DestinationBlocked, Guard, Pool, base_url_fault, origin_of

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
        connection.connect()
    assert dialled == []


def resolving(monkeypatch, *answers):
    """Names resolve to these addresses, one list for each lookup; returns the lookups made."""
    lookups, left = [], list(answers)

    def getaddrinfo(host, port, *_, **__):
        lookups.append(host)
        addresses = left.pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(network.socket, "getaddrinfo", getaddrinfo)
    return lookups


@pytest.mark.parametrize("addresses", [["8.8.8.8", "10.0.0.1"], ["10.0.0.1", "8.8.8.8"], ["10.0.0.1"]])
def test_a_name_with_one_private_address_among_others_is_refused(guard, monkeypatch, addresses):
    resolving(monkeypatch, addresses)
    with pytest.raises(DestinationBlocked):
        guard.resolve("mixed.example.com", 443)


def test_a_name_is_looked_up_once_and_the_checked_address_is_dialled(pool, monkeypatch):
    lookups, dialled = resolving(monkeypatch, ["8.8.8.8"], ["127.0.0.1"]), []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: dialled.append(address))
    connection, _ = pool.take(("http", "rebinding.example.com", 80))
    connection.connect()
    connection.close()
    assert dialled == [("8.8.8.8", 80)]
    assert lookups == ["rebinding.example.com"]


def test_each_new_connection_looks_again(pool, monkeypatch):
    lookups = resolving(monkeypatch, ["8.8.8.8"], ["127.0.0.1"])
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: None)
    first, _ = pool.take(("http", "rebinding.example.com", 80))
    first.connect()
    first.close()
    second, _ = pool.take(("http", "rebinding.example.com", 80))
    with pytest.raises(DestinationBlocked):
        second.connect()
    assert len(lookups) == 2


def test_the_second_address_is_tried_where_the_first_does_not_answer(pool, monkeypatch):
    resolving(monkeypatch, ["8.8.8.8", "1.1.1.1"])
    dialled = []

    def connect(self, address):
        dialled.append(address[0])
        if len(dialled) == 1:
            raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", connect)
    connection, _ = pool.take(("http", "two.example.com", 80))
    connection.connect()
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
    "url", ["https://api.openai.com/v1", "http://8.8.8.8:8000/v1/", "https://x.example/"]
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
    first.connect()
    assert not is_reused
    pool.give(origin, first)
    assert pool.take(origin) == (first, True)
    second, is_reused = pool.take(origin)
    assert (second is first, is_reused) == (False, False)
    first.close()


def test_a_connection_idle_for_too_long_is_closed(pooled, monkeypatch):
    pool, origin = pooled
    connection, _ = pool.take(origin)
    connection.connect()
    pool.give(origin, connection)
    now = network.monotonic()
    monkeypatch.setattr(network, "monotonic", lambda: now + network.IDLE_SECONDS + 1)
    assert pool.take(origin)[1] is False
    assert connection.sock is None


def test_a_connection_that_the_upstream_closed_is_not_taken(pooled, upstream):
    pool, origin = pooled
    connection, _ = pool.take(origin)
    connection.connect()
    pool.give(origin, connection)
    upstream.close()
    assert pool.take(origin)[1] is False
