import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetuo.errors import UpstreamError
from perpetuo.providers.sse import MAX_EVENT_BYTES, Event, EventSplitter

fragments = st.sampled_from(
    [b"data: ", b"data:", b"data", b"event: x", b"\n", b"\r", b"\r\n", b"\n\n", b": c", b" ", b"{}", b"a"]
    + [b"\xef\xbb\xbf", "\u2028\u0085é".encode(), b'data: {"a":1}\n\n', b"\x0b\x0c\x1c", b"[DONE]", b"id: 1"]
)
streams = st.lists(fragments, max_size=14).map(b"".join)


def split(*pieces: bytes) -> list[Event]:
    splitter = EventSplitter()
    return [event for piece in pieces for event in splitter.feed(piece)] + splitter.close()


def split_by_the_book(stream: bytes) -> list[Event]:
    """The standard's own words, line by line; of a cut stream nothing."""
    events, lines, name = [], [], None
    for line in re.split(rb"\r\n|\n|\r", stream.removeprefix(b"\xef\xbb\xbf"))[:-1]:
        field, colon, value = line.partition(b":")
        if not line:
            data = b"\n".join(lines)
            events += [Event(name, data)] if data.strip() else []
            lines, name = [], None
        elif field == b"data":
            lines.append(value.removeprefix(b" "))
        elif field == b"event" and colon:
            name = value.removeprefix(b" ")
    return events


@given(streams, st.lists(st.integers(0, 60)))
def test_events_are_those_of_the_standard_however_the_stream_is_cut(stream: bytes, cuts: list[int]) -> None:
    stream += b"\n\n"
    places = [0, *sorted(cuts), len(stream)]
    pieces = [stream[start:end] for start, end in zip(places, places[1:], strict=False)]
    assert split(*pieces) == split_by_the_book(stream)


@given(streams)
def test_end_is_the_same_however_the_stream_is_cut(stream: bytes) -> None:
    whole = split(stream)
    assert split(*[bytes([byte]) for byte in stream]) == whole
    assert all(split(stream[:cut], stream[cut:]) == whole for cut in range(len(stream)))


def test_event_is_given_as_soon_as_its_blank_line_is_there_even_with_cr() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: a\r\r") == [Event(None, b"a")]
    assert splitter.feed(b"\n") == []
    assert splitter.feed(b"data: b\n\n") == [Event(None, b"b")]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_lines_of_data_are_joined(line_end: bytes) -> None:
    stream = line_end.join([b": hello", b"event: error", b"id: 7", b"data: a", b"data:b", b"", b""])
    assert split(stream) == [Event(b"error", b"a\nb")]


def test_byte_order_mark_is_dropped_at_the_start_only() -> None:
    stream = b"\xef\xbb\xbfdata: 1\n\n"
    assert split(stream) == [Event(None, b"1")]
    assert split(b"data: 100\n\n", stream) == [Event(None, b"100")]


def test_name_belongs_to_one_event_only() -> None:
    assert split(b"event: a\n", b"\n", b"data: 1\n\n") == [Event(None, b"1")]
    assert split(b"event: a\n", b"data: 1\n\n") == [Event(b"a", b"1")]


@pytest.mark.parametrize(
    "stream", [b"data:\n\n", b"data: \n\n", b"data:   \n\n", b"event: ping\n\n", b":\n\n"]
)
def test_event_without_data_is_ignored(stream: bytes) -> None:
    assert split(stream) == []


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b'data: {"a":1}\n', b'{"a":1}'),
        (b'data: {"a":1}', b'{"a":1}'),
        (b"data: [DONE]", b"[DONE]"),
        (b"data: text\n", b"text"),
        (b'data: {"a":\ndata: 1}', b'{"a":\n1}'),
    ],
)
def test_last_event_may_lack_its_blank_line(stream: bytes, expected: bytes) -> None:
    assert split(stream) == [Event(None, expected)]


@pytest.mark.parametrize("stream", [b'data: {"a":', b"data: [DON", b"dat", b"event: error"])
def test_last_event_with_a_cut_line_is_dropped(stream: bytes) -> None:
    assert split(b"data: 1\n\n" + stream) == [Event(None, b"1")]


@pytest.mark.parametrize(
    "piece", [b"data: " + b"x" * 9999 + b"\n", b"x" * 10_000, b"event: " + b"x" * 9999 + b"\n"]
)
def test_event_above_the_bound_is_refused(piece: bytes) -> None:
    with pytest.raises(UpstreamError, match="16 MiB"):
        split(*[piece] * (MAX_EVENT_BYTES // len(piece) + 2))


def test_event_above_the_bound_is_refused_in_one_piece() -> None:
    with pytest.raises(UpstreamError, match="16 MiB"):
        split(b"data: " + b"x" * MAX_EVENT_BYTES + b"\n\n")


def test_many_events_and_comments_together_may_be_above_the_bound() -> None:
    splitter = EventSplitter()
    piece = (b": " + b"x" * 99 + b"\ndata: " + b"x" * 99 + b"\n\n") * 5000
    assert sum(len(splitter.feed(piece)) for _ in range(20)) == 100_000
