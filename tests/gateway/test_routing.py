import dataclasses
import random
from collections import Counter
from datetime import UTC, datetime

import pytest

from perpetuo.errors import Forbidden, NotFound
from perpetuo.gateway import router as router_module
from perpetuo.gateway.access import Caller
from perpetuo.gateway.router import Config, Key, Target, resolve
from perpetuo.models import ProviderKey, Workspace

CALLER = Caller("ws_1", "key_1", "laptop", None, True, 1)


def key(key_id, provider="openai", **columns):
    values = {"name": None, "models": None, "priority": 0, "weight": 1, **columns}
    return Key(key_id, "ws_1", provider, base_url="", sealed="", created_at=datetime.now(UTC), **values)


def ids(targets):
    return [(target.key.id, target.model) for target in targets]


def found(keys, name, **routes):
    config = Config(tuple(keys), routes)
    return ids(router_module._targets(config, name))


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The same draws in every run."""
    monkeypatch.setattr(router_module.random, "random", random.Random(7).random)


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("gpt-5", "openai"),
        ("o3-mini", "openai"),
        ("chatgpt-4o-latest", "openai"),
        ("text-embedding-3-small", "openai"),
        ("gemini-2.5-pro", "gemini"),
        ("grok-4", "xai"),
        ("mistral-large", "mistral"),
        ("codestral-latest", "mistral"),
        ("deepseek-chat", "deepseek"),
    ],
)
def test_a_bare_name_goes_to_the_provider_it_belongs_to(name, provider):
    keys = [key(other, other) for other in ("groq", "openai", "gemini", "xai", "mistral", "deepseek")]
    assert found(keys, name) == [(provider, name)]


def test_a_prefix_is_the_name_of_a_key_before_it_is_a_provider():
    keys = [key("a", "openai"), key("b", "custom", name="openai"), key("c", "groq", name="lab")]
    assert found(keys, "openai/gpt-5") == [("b", "gpt-5")]
    assert found(keys, "lab/llama") == [("c", "llama")]
    assert found(keys[:1], "openai/gpt-5") == [("a", "gpt-5")]
    assert found(keys, "groq/llama/3:free") == [("c", "llama/3:free")]


def test_a_name_that_several_keys_bear_leads_to_all_of_them():
    keys = [key("a", name="lab", priority=1), key("b", "groq", name="lab")]
    assert found(keys, "lab/x") == [("b", "x"), ("a", "x")]


def test_what_is_no_prefix_is_part_of_a_bare_name():
    keys = [key("a", "openrouter", models=["meta/*"]), key("b")]
    assert found(keys, "meta/llama") == [("a", "meta/llama")]
    assert found(keys, "anthropic/claude") == []
    assert found([key("a", "groq")], "meta/llama") == [("a", "meta/llama")]
    assert found(keys, "openai/") == []


def test_a_prefix_never_reaches_a_key_that_excludes_the_model():
    keys = [key("a", models=["gpt-4o"]), key("b", "custom")]
    assert found(keys, "openai/gpt-5") == []
    assert found(keys, "openai/gpt-4o") == [("a", "gpt-4o")]


def test_keys_that_name_a_model_come_before_its_provider():
    keys = [key("a"), key("b", "custom", models=["gpt-*"])]
    assert found(keys, "gpt-5") == [("b", "gpt-5")]
    assert found(keys, "o3") == [("a", "o3")]


@pytest.mark.parametrize(
    ("models", "name", "is_served"),
    [
        (["gpt-4o"], "gpt-4o", True),
        (["gpt-4o"], "gpt-4o-mini", False),
        (["gpt-4?"], "gpt-4o", True),
        (["*"], "anything/at all", True),
        (["gpt-[45]*"], "gpt-5", True),
        (["gpt-[45]*"], "gpt-3", False),
        (["a[b]"], "a[b]", True),
        (["GPT-4o"], "gpt-4o", False),
        ([], "gpt-4o", False),
    ],
)
def test_models_are_names_or_globs(models, name, is_served):
    assert key("a", models=tuple(models)).serves(name) is is_served


def test_a_key_that_excludes_a_name_is_never_used_for_it():
    assert found([key("a", models=["gpt-4o"])], "gpt-5") == []
    assert found([key("a", models=[])], "gpt-5") == []
    assert found([key("a", "groq", models=["llama"])], "unknown") == []


def test_the_only_key_there_is_takes_what_belongs_to_nobody():
    assert found([key("a", "groq")], "llama-3") == [("a", "llama-3")]
    assert found([key("a", "groq"), key("b", "together")], "llama-3") == []
    assert found([key("a", "groq")], "gpt-5") == [("a", "gpt-5")]
    assert found([], "gpt-5") == []


def test_lower_priority_comes_first():
    keys = [key("c", priority=9), key("a", priority=-1), key("b")]
    assert found(keys, "gpt-5") == [("a", "gpt-5"), ("b", "gpt-5"), ("c", "gpt-5")]


def test_equal_priority_is_drawn_by_weight():
    keys = [key("a", weight=3), key("b", weight=1), key("last", priority=1, weight=1000)]
    draws = [found(keys, "gpt-5") for _ in range(2000)]
    first = Counter(draw[0][0] for draw in draws)
    assert 1400 < first["a"] < 1600
    assert all(draw[2][0] == "last" for draw in draws)
    assert {len(draw) for draw in draws} == {3}


def test_an_alias_leads_to_its_targets_in_order():
    route = [{"model": "openai/gpt-5"}, {"model": "groq/llama"}, {"model": "gpt-4o", "priority": -1}]
    keys = [key("a"), key("b", "groq")]
    assert found(keys, "smart", smart=route) == [("a", "gpt-4o"), ("a", "gpt-5"), ("b", "llama")]


def test_targets_of_equal_priority_are_shared_out_by_weight():
    route = [{"model": "gpt-5", "priority": 0, "weight": 9}, {"model": "gpt-4o", "priority": 0}]
    draws = Counter(found([key("a")], "smart", smart=route)[0][1] for _ in range(2000))
    assert 1740 < draws["gpt-5"] < 1860


def test_a_target_is_never_an_alias():
    routes = {"a": [{"model": "b"}], "b": [{"model": "gpt-5"}]}
    assert found([key("k"), key("l", "groq")], "a", **routes) == []


def test_a_target_that_nobody_serves_is_left_out():
    route = [{"model": "claude-x"}, {"model": "gpt-5"}]
    assert found([key("a"), key("b", "groq")], "smart", smart=route) == [("a", "gpt-5")]


def test_an_alias_hides_a_model_of_the_same_name():
    assert found([key("a")], "gpt-5", **{"gpt-5": [{"model": "gpt-4o"}]}) == [("a", "gpt-4o")]


def test_an_alias_grants_its_targets(gateway, monkeypatch):
    config = Config((key("a"),), {"smart": [{"model": "gpt-5"}]})
    monkeypatch.setattr(gateway.router, "config", lambda caller: config)
    caller = dataclasses.replace(CALLER, models=("smart",))
    assert ids(gateway.router.route(caller, ["smart"])) == [("a", "gpt-5")]
    with pytest.raises(Forbidden):
        gateway.router.route(caller, ["gpt-5"])


def test_what_a_key_may_ask_for_is_matched_against_the_name_asked(gateway, monkeypatch):
    monkeypatch.setattr(gateway.router, "config", lambda caller: Config((key("a"),), {}))
    caller = dataclasses.replace(CALLER, models=("openai/*",))
    assert ids(gateway.router.route(caller, ["openai/gpt-5"])) == [("a", "gpt-5")]
    with pytest.raises(Forbidden):
        gateway.router.route(caller, ["gpt-5"])


def test_the_models_of_a_request_follow_each_other(gateway, monkeypatch):
    config = Config((key("a"), key("b", "gemini")), {"smart": [{"model": "gpt-5"}]})
    monkeypatch.setattr(gateway.router, "config", lambda caller: config)
    targets = gateway.router.route(CALLER, ["gemini-2", "nobody's", "smart"])
    assert ids(targets) == [("b", "gemini-2"), ("a", "gpt-5")]
    with pytest.raises(NotFound, match="openai, gemini|gemini, openai"):
        gateway.router.route(CALLER, ["nobody's"])


def test_resolve_knows_no_alias():
    config = Config((key("a"), key("b", "groq")), {"smart": [{"model": "gpt-5"}]})
    assert resolve(config, "smart") == []
    assert resolve(config, "gpt-5") == [Target(config.keys[0], "gpt-5")]


# With the database.


def test_model_comes_first_then_models_without_repeats(ask, upstream, logs):
    assert ask(model="gpt-5", models=["gpt-4o", "gpt-5"]).status_code == 200
    assert ask(model=None, models=["gpt-4o", "gpt-5"]).status_code == 200
    assert [request.json["model"] for request in upstream.requests] == ["gpt-5", "gpt-4o"]
    assert not any("models" in request.json for request in upstream.requests)
    assert [row["model"] for row in logs()] == ["gpt-5", "gpt-4o"]


def test_a_disabled_key_is_not_used(ask, tenant, upstream):
    second = tenant.add_provider_key(upstream.base_url, "sk-second", priority=-1)
    ask()
    tenant.change(ProviderKey, second, enabled=False)
    tenant.gateway.access._known.clear()  # as after 0.95 s
    ask()
    secrets = [request.headers["authorization"] for request in upstream.requests]
    assert secrets == ["Bearer sk-second", "Bearer sk-upstream"]


def test_the_configuration_is_read_once_for_each_version(gateway, tenant, monkeypatch):
    reads = []
    select = router_module._select
    monkeypatch.setattr(router_module, "_select", lambda *given: reads.append(1) or select(*given))
    caller = gateway.access.authenticate(f"Bearer {tenant.key}")
    for _ in range(3):
        assert len(gateway.router.config(caller).keys) == 1
    assert len(reads) == 1
    tenant.change(Workspace, tenant.workspace_id, routes={"smart": [{"model": "gpt-5"}]})
    gateway.access._known.clear()
    caller = gateway.access.authenticate(f"Bearer {tenant.key}")
    assert gateway.router.config(caller).routes == {"smart": [{"model": "gpt-5"}]}
    assert len(reads) == 2


def test_another_workspaces_keys_are_out_of_reach(client, gateway, tenant):
    from tests.tenants import new_tenant

    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "x"}]}
    stranger = new_tenant(gateway)
    response = client.post("/v1/chat/completions", json=body, headers=stranger.headers)
    assert response.json["error"]["code"] == "model_not_found"
