import time

import gevent
import pytest
from gevent import socket

from perpetuo.errors import InvalidRequest
from perpetuo.gateway import clients
from perpetuo.gateway.clients import Client, within

BIG = b"x" * 4_000_000  # more than lies between two sockets


@pytest.fixture
def pair(monkeypatch):
    """A client's socket as the server has it, with little time for each piece, and the client's own."""
    monkeypatch.setattr(clients, "WRITE_SECONDS", 0.2)
    server, client = socket.socketpair()
    server.__class__ = Client
    with server, client:
        yield server, client


def read_slowly(client, pause):
    received = 0
    while received < len(BIG):
        gevent.sleep(pause)
        received += len(client.recv(200_000))
    return received


def test_a_client_that_reads_nothing_is_taken_for_gone(pair):
    with pytest.raises(BrokenPipeError):
        pair[0].sendall(BIG)


def test_one_that_reads_slowly_gets_everything_in_its_own_time(pair):
    began = time.monotonic()
    reading = gevent.spawn(read_slowly, pair[1], 0.03)
    pair[0].sendall(BIG)
    assert reading.get() == len(BIG)
    assert time.monotonic() - began > 2 * clients.WRITE_SECONDS


def test_one_that_reads_a_few_bytes_now_and_then_is_not_spared(pair):
    def drip():
        while pair[1].recv(100):
            gevent.sleep(0.02)

    reading = gevent.spawn(drip)
    with pytest.raises(BrokenPipeError):
        pair[0].sendall(BIG)
    reading.kill()


def test_a_word_to_a_client_whose_buffers_are_full_does_not_wait_for_ever(pair):
    with pytest.raises(BrokenPipeError):
        pair[0].sendall(BIG)
    with pytest.raises(BrokenPipeError):
        pair[0].send(b"HTTP/1.1 100 Continue\r\n\r\n")


def test_a_client_that_has_left_is_told_at_once(pair):
    pair[1].close()
    with pytest.raises(BrokenPipeError):
        pair[0].sendall(b"x")


def test_another_time_out_passes_through_a_write(pair):
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
        pair[0].sendall(BIG)


def test_what_is_read_in_time_is_not_disturbed(pair, monkeypatch):
    monkeypatch.setattr(clients, "is_patched", lambda: True)
    with pytest.raises(InvalidRequest, match="late"), within(0.05, InvalidRequest("late")):
        pair[0].recv(1)
    pair[1].sendall(b"x")
    with within(0.05, InvalidRequest("late")):
        assert pair[0].recv(1) == b"x"
    gevent.sleep(0.1)
