import socket
from http.client import HTTPException, RemoteDisconnected

import pytest

from perpetuo.gateway.response import LINE_BYTES, MOST_LINES, Response


@pytest.fixture
def answered():
    """Reads these bytes as an answer."""
    ours, theirs = socket.socketpair()
    opened = []

    def answered(sent):
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        response = Response(ours, "POST", None)
        opened.append(response)
        response.begin()
        return response

    yield answered
    for response in opened:
        response.close()
    ours.close()
    theirs.close()


def head(*lines, status=b"HTTP/1.1 200 OK"):
    return b"\r\n".join([status, *lines, b"", b""])


def body_of(response):
    return b"".join(iter(lambda: response.read1(100), b""))


def test_names_are_lower_and_values_stripped(answered):
    response = answered(head(b"X-Some-Thing:  a b \t", b"content-length:2") + b"hi")
    assert (response.status, response.fields) == (200, {"x-some-thing": "a b", "content-length": "2"})
    assert (body_of(response), response.will_close) == (b"hi", False)


def test_repeated_headers_are_joined_and_folded_lines_too(answered):
    assert answered(head(b"a: 1", b"A: 2", b"b: x", b"\ty")).fields == {"a": "1, 2", "b": "x y"}


def test_a_line_without_a_colon_is_passed_over(answered):
    assert answered(head(b"nonsense", b"a: 1")).fields == {"a": "1"}


def test_a_chunked_body_ends_with_its_last_chunk(answered):
    response = answered(head(b"Transfer-Encoding: Chunked") + b"2\r\nhi\r\n0\r\n\r\n")
    assert (body_of(response), response.will_close) == (b"hi", False)


def test_a_chunked_body_that_is_cut_is_an_error(answered):
    response = answered(head(b"transfer-encoding: chunked") + b"9\r\nhi")
    with pytest.raises(HTTPException):
        body_of(response)


def test_without_a_length_the_end_of_the_connection_is_that_of_the_body(answered):
    response = answered(head() + b"all of it")
    assert (body_of(response), response.will_close) == (b"all of it", True)


@pytest.mark.parametrize(
    ("version", "connection", "will_close"),
    [
        (b"1.1", b"keep-alive", False),
        (b"1.1", b"Close", True),
        (b"1.0", b"", True),
        (b"1.0", b"Keep-Alive", False),
    ],
)
def test_the_server_says_whether_the_connection_stays(answered, version, connection, will_close):
    lines = [b"content-length: 0", b"connection: " + connection]
    assert answered(head(*lines, status=b"HTTP/%b 200 OK" % version)).will_close is will_close


def test_equal_lengths_are_one(answered):
    assert answered(head(b"content-length: 2", b"content-length: 2") + b"hi").length == 2


@pytest.mark.parametrize("told", [b"content-length: 2\r\ncontent-length: 3", b"content-length: +2"])
def test_an_unclear_length_is_an_error(answered, told):
    with pytest.raises(HTTPException):
        answered(head(told) + b"hi!")


def test_a_100_is_passed_over_and_other_interim_answers_are_not(answered):
    interim = head(b"x: 1", status=b"HTTP/1.1 100 Continue")
    assert answered(interim + head(b"content-length: 0")).fields == {"content-length": "0"}


def test_an_early_hint_has_no_body(answered):
    assert answered(head(b"link: x", status=b"HTTP/1.1 103 Early Hints")).length == 0


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        head(*[b"a: 1"] * (MOST_LINES + 1)),
        head(b"a: " + b"x" * LINE_BYTES),
    ],
    ids=["no HTTP", "HTTP/2", "no status", "many lines", "long line"],
)
def test_what_is_no_answer_is_an_error(answered, sent):
    with pytest.raises(HTTPException):
        answered(sent)


def test_a_closed_connection_is_told_apart(answered):
    with pytest.raises(RemoteDisconnected):
        answered(b"")
