"""The fake upstream does what its replies say, seen from an ordinary HTTP client."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from tests import fake_upstream as fake
from tests.fake_upstream import FakeUpstream

QUESTION = {"model": "gpt-x", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def upstream():
    with FakeUpstream() as upstream:
        yield upstream
    leftovers = [thread.name for thread in threading.enumerate() if "FakeUpstream" in thread.name]
    assert leftovers == []


@pytest.fixture
def client(upstream):
    connection = http.client.HTTPConnection(*upstream.address, timeout=10)
    yield connection
    connection.close()


def ask(client, path="/v1/chat/completions", **fields):
    client.request("POST", path, json.dumps(QUESTION | fields), {"X-Test": "yes"})
    return client.getresponse()


def events(body):
    return [part.removeprefix(b"data: ") for part in body.split(b"\n\n") if part]


def test_proper_answers_by_path_and_body_on_one_connection(upstream, client):
    assert json.load(ask(client))["choices"][0]["message"]["content"] == "Hello world"
    assert len(json.load(ask(client, "/p/v1/embeddings", input=["a", "b"]))["data"]) == 2
    client.request("GET", "/v1/models")
    assert json.load(client.getresponse())["data"][0]["id"] == "gpt-4o-mini"
    assert ask(client, "/v1/nothing").read()
    assert upstream.connections == 1
    first = upstream.requests[0]
    assert (first.method, first.path, first.headers["x-test"]) == ("POST", "/v1/chat/completions", "yes")
    assert first.json == QUESTION
    assert first.closed_at is None


def test_stream_has_role_text_finish_and_usage_only_where_asked(client):
    *chunks, done = events(ask(client, stream=True, stream_options={"include_usage": True}).read())
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hello"}, {"content": " world"}, {}]
    assert json.loads(chunks[-1])["usage"] == fake.USAGE
    assert done == b"[DONE]"
    assert b"usage" not in ask(client, stream=True).read()


@pytest.mark.parametrize("is_stream", [False, True])
def test_required_tool_and_json_schema_are_answered_with_fitting_json(client, is_stream):
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    called = ask(client, tools=[tool], tool_choice="required", stream=is_stream).read()
    assert b'"weather"' in called
    assert b'"finish_reason":"tool_calls"' in called
    wanted = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema}}
    content = json.load(ask(client, response_format=wanted))["choices"][0]["message"]["content"]
    assert json.loads(content) == {"city": "text", "days": 1}


def test_script_answers_call_by_call_then_the_reply(upstream, client):
    upstream.reply = fake.completion("later", usage=None, system_fingerprint="fp")
    upstream.script([fake.status(429, headers={"Retry-After": "2"}), fake.html(), fake.empty()])
    limited = ask(client)
    assert (limited.status, limited.headers["Retry-After"]) == (429, "2")
    assert limited.read()
    assert ask(client).read().startswith(b"<!DOCTYPE")
    assert ask(client).read() == b""
    later = json.load(ask(client))
    assert later["choices"][0]["message"]["content"] == "later"
    assert later["system_fingerprint"] == "fp"
    assert "usage" not in later


def test_pieces_are_sent_split_as_given_and_dripped_bytes_add_up(upstream, client):
    body = 'data: {"a":"é"}\n\ndata: [DONE]\n\n'.encode()
    upstream.reply = fake.stream(pieces=[body[:12], body[12:]])
    answer = ask(client, stream=True)
    assert [answer.read1(), answer.read()] == [body[:12], body[12:]]
    upstream.reply = fake.drip(0, upstream.reply)
    assert ask(client, stream=True).read() == body


@pytest.mark.parametrize(
    ("reply", "sent"),
    [
        (fake.hang(), 0),
        (fake.headers_then_hang(), 0),
        (fake.stall_after(2), 2),
        (fake.stall_after(5), 5),
        (fake.stream(first_delay=60), 0),
        (fake.comments_forever(0.01), 1),
    ],
)
def test_silent_upstream_notices_that_the_peer_has_gone(upstream, reply, sent):
    upstream.reply = reply
    client = http.client.HTTPConnection(*upstream.address, timeout=10)
    client.request("POST", "/v1/chat/completions", json.dumps(QUESTION | {"stream": True}))
    if sent:
        answer = client.getresponse()
        assert all(answer.readline() + answer.readline() for _ in range(sent))
        answer.close()
    (request,) = upstream.wait_for_requests(1)
    assert request.closed_at is None
    closed_at = time.monotonic()
    client.close()
    assert upstream.wait_for_close(request) >= closed_at


def test_upstream_closes_while_it_hangs_on_an_open_connection():
    with FakeUpstream(reply=fake.hang()) as upstream:
        client = http.client.HTTPConnection(*upstream.address, timeout=10)
        client.request("POST", "/v1/chat/completions", json.dumps(QUESTION))
        (request,) = upstream.wait_for_requests(1)
    assert request.closed_at is None
    client.close()


@pytest.mark.parametrize("is_stream", [False, True])
def test_cut_ends_the_body_short_and_reset_resets(upstream, client, is_stream):
    upstream.script([fake.cut_after(10), fake.reset_after(10)])
    with pytest.raises(http.client.IncompleteRead):
        ask(client, stream=is_stream).read()
    client.close()
    answer = ask(client, stream=is_stream)
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
        answer.read()
    client.close()


def test_reset_is_a_reset(upstream, client):
    upstream.reply = fake.reset_after(0)
    with pytest.raises(ConnectionResetError):
        ask(client).read()


def test_stale_connection_is_closed_in_the_face_of_the_next_request(upstream, client):
    upstream.script([fake.stale()])
    assert ask(client).read()
    with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
        ask(client)
    upstream.wait_until(lambda: upstream.stale_closes == 1)
    client.close()
    assert ask(client).read()
    assert len(upstream.requests) == 2


def test_raw_bytes_and_redirect(upstream, client):
    upstream.script([fake.raw(b"SSH-2.0-x\r\n"), fake.redirect("http://169.254.169.254/")])
    with pytest.raises(http.client.BadStatusLine):
        ask(client)
    client.close()
    answer = ask(client)
    assert (answer.status, answer.headers["Location"]) == (302, "http://169.254.169.254/")


def test_own_process_echoes_the_last_user_message():
    command = [sys.executable, "-m", "tests.fake_upstream", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        base_url = process.stdout.readline().split()[-1]
        body = json.dumps({**QUESTION, "messages": [{"role": "user", "content": "seed 17"}]}).encode()
        with urllib.request.urlopen(f"{base_url}/chat/completions", body, timeout=10) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"] == "seed 17"
        process.terminate()
    assert process.returncode == 0
