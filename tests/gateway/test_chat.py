import json

from perpetuo.gateway import bodies
from perpetuo.models import ApiKey, ProviderKey, Workspace
from tests.fake_upstream import completion, embedding, models, stream
from tests.gateway.conftest import CHAT


def events(response):
    return [line[6:] for line in response.get_data().decode().split("\n\n") if line.startswith("data: ")]


def text_of(response):
    chunks = [json.loads(event) for event in events(response) if event != "[DONE]"]
    return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])


def test_an_answer_passes_unchanged_and_is_logged(ask, upstream, logs, counters):
    upstream.reply = completion("Hello", service_tier="default")
    response = ask()
    (row,) = logs()
    assert response.status_code == 200
    assert response.json["choices"][0]["message"]["content"] == "Hello"
    assert response.json["service_tier"] == "default"
    assert response.headers["x-request-id"] == row["id"]
    assert (row["status"], row["http_status"], row["provider"]) == ("ok", 200, "openai")
    assert row["total_tokens"] == response.json["usage"]["total_tokens"]
    assert (row["usage_source"], row["cost_nano"]) == ("provider", 52_500)
    assert counters()[0]["requests"] == 1


def test_the_body_reaches_the_upstream_byte_for_byte(client, tenant, upstream):
    body = b'{"model":"gpt-4o", "messages":[{"role":"user","content":"\\u00e9\\ud83d"}],"x":1.50,"n":null}'
    assert client.post("/v1/chat/completions", data=body, headers=tenant.headers).status_code == 200
    assert upstream.requests[0].body == body


def test_only_what_belongs_there_reaches_the_upstream(ask, upstream):
    ask(
        headers={
            "Cookie": "a=b",
            "X-Forwarded-For": "1.2.3.4",
            "x-stainless-lang": "python",
            "OpenAI-Beta": "x",
        }
    )
    sent = upstream.requests[0].headers
    assert sent["authorization"] == "Bearer sk-upstream"
    assert sent["openai-beta"] == "x"
    assert not {"cookie", "x-forwarded-for", "x-stainless-lang"} & set(sent)


def test_only_what_belongs_there_reaches_the_client(ask, upstream):
    upstream.reply = completion(
        headers={
            "Set-Cookie": "a=b",
            "Server": "x",
            "x-ratelimit-limit-requests": "9",
            "x-request-id": "up_1",
        }
    )
    headers = ask().headers
    assert headers["x-ratelimit-limit-requests"] == "9"
    assert headers["x-upstream-request-id"] == "up_1"
    assert headers["x-perpetuo-provider"] == "openai"
    assert headers["x-perpetuo-model"] == "gpt-4o"
    assert headers["x-perpetuo-attempts"] == "1"
    assert "Set-Cookie" not in headers


def test_a_stream_ends_with_done_and_is_logged(ask, upstream, logs):
    response = ask(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert text_of(response) == "Hello world"
    assert events(response)[-1] == "[DONE]"
    (row,) = logs()
    assert (row["status"], row["stream"], row["usage_source"]) == ("ok", True, "provider")
    assert row["ttft_us"] <= row["latency_us"]
    joined = bodies.unpack(row["response_body"])
    assert joined["choices"][0]["message"]["content"] == "Hello world"


def test_the_row_is_there_before_the_first_byte_and_settled_before_done(ask, gateway):
    response = ask(stream=True)
    seen = {}
    for piece in response.iter_encoded():
        for event in piece.split(b"\n\n"):
            seen.setdefault(event[:12], statuses(gateway))
    assert seen.pop(b"data: [DONE]") == ["ok"]
    assert seen[b'data: {"id":'] == ["open"]


def test_the_row_of_a_plain_answer_is_settled_before_it_goes_out(ask, gateway):
    ask()
    assert statuses(gateway) == ["ok"]


def statuses(gateway):
    return gateway.database.read(
        lambda connection: connection.exec_driver_sql("select status from request_logs").scalars().all()
    )


def test_usage_is_asked_for_but_shown_only_on_request(ask, upstream):
    hidden = [json.loads(event) for event in events(ask(stream=True))[:-1]]
    shown = [json.loads(e) for e in events(ask(stream=True, stream_options={"include_usage": True}))[:-1]]
    assert upstream.requests[0].json["stream_options"] == {"include_usage": True}
    assert not any(chunk.get("usage") for chunk in hidden)
    assert shown[-1]["usage"]["total_tokens"] > 0
    assert shown[-1]["choices"] == []


def test_missing_usage_is_estimated_and_says_so(ask, upstream, logs):
    upstream.reply = completion("Hello there", usage=None)
    ask()
    upstream.reply = stream(usage=False)
    ask(stream=True).get_data()
    assert [row["usage_source"] for row in logs()] == ["estimate", "estimate"]
    assert all(row["completion_tokens"] > 0 and row["prompt_tokens"] > 0 for row in logs())


def test_embeddings_pass(client, tenant, upstream, logs):
    upstream.reply = embedding()
    body = {"model": "text-embedding-3-small", "input": ["a", "b"], "encoding_format": "base64"}
    response = client.post("/v1/embeddings", json=body, headers=tenant.headers)
    assert response.json["object"] == "list"
    assert (logs()[0]["endpoint"], logs()[0]["status"]) == ("embeddings", "ok")


def test_a_prefix_names_the_provider_key_and_is_not_sent(ask, tenant, upstream, logs):
    tenant.add_provider_key(upstream.base_url, "sk-second", name="lab", provider="custom")
    assert ask(model="lab/llama/3").status_code == 200
    request = upstream.requests[0]
    assert (request.json["model"], request.headers["authorization"]) == ("llama/3", "Bearer sk-second")
    assert (logs()[0]["model"], logs()[0]["served_model"]) == ("lab/llama/3", "llama/3")


def test_an_alias_leads_to_its_first_target(ask, tenant, upstream):
    tenant.change(Workspace, tenant.workspace_id, routes={"smart": [{"model": "openai/gpt-5"}]})
    assert ask(model="smart").status_code == 200
    assert upstream.requests[0].json["model"] == "gpt-5"


def test_bodies_and_previews_are_kept_unless_told_otherwise(ask, logs):
    ask()
    ask(headers={"x-perpetuo-log": "metadata"})
    full, bare = logs()
    assert bodies.unpack(full["request_body"]) == CHAT
    assert (full["preview_prompt"], bare["preview_prompt"]) == ("Say hello", None)
    assert bare["request_body"] is None is bare["response_body"]
    assert bare["preview_answer"] is None


def test_a_workspace_may_keep_no_bodies(ask, tenant, logs):
    tenant.change(Workspace, tenant.workspace_id, log_bodies=False)
    ask(stream=True).get_data()
    assert logs()[0]["request_body"] is None is logs()[0]["preview_answer"]


def test_odd_texts_are_logged_on_both_databases(ask, logs):
    content = "nul \0 and a lone \ud83d surrogate"
    response = ask(messages=[{"role": "user", "content": content}], user="u\0\ud83d")
    (row,) = logs()
    assert response.status_code == 200
    assert row["preview_prompt"] == "nul \\u0000 and a lone \\ud83d surrogate"
    assert bodies.unpack(row["request_body"])["messages"][0]["content"] == content
    assert row["end_user"] == "u\\u0000\\ud83d"


def test_models_are_what_the_key_may_use(client, tenant, upstream):
    tenant.change(Workspace, tenant.workspace_id, routes={"smart": [{"model": "gpt-5"}]})
    tenant.add_provider_key(
        upstream.base_url, name="lab", provider="custom", models=["llama", "gpt-*"], priority=5
    )
    upstream.reply = models(["gpt-4o", "other"])
    listed = client.get("/v1/models", headers=tenant.headers).json["data"]
    assert [m["id"] for m in listed] == ["gpt-4o", "llama", "openai/gpt-4o", "openai/other", "smart"]
    assert {"id", "object", "created", "owned_by"} == set(listed[0])
    for name in ("openai/other", "openai%2Fother", "openai/other/"):
        assert client.get(f"/v1/models/{name}", headers=tenant.headers).json["id"] == "openai/other"
    assert client.get("/v1/models/nope", headers=tenant.headers).json["error"]["code"] == "model_not_found"
    assert len(upstream.requests) == 2


def test_last_use_is_written(ask, gateway, tenant):
    ask()
    gateway.ledger.close()
    key = gateway.database.save(lambda session: session.get(ApiKey, tenant.api_key_id))
    (provider_key,) = gateway.database.save(lambda session: session.query(ProviderKey).all())
    assert key.last_used_at is not None is not provider_key.last_used_at


def test_a_revoked_key_is_refused_within_a_second(ask, gateway, tenant):
    assert ask().status_code == 200
    gateway.access._known.clear()  # as after 0.95 s
    tenant.change(
        ApiKey,
        tenant.api_key_id,
        revoked_at=gateway.database.save(lambda s: s.get(ApiKey, tenant.api_key_id).created_at),
    )
    assert ask().status_code == 401
