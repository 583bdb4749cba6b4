import pytest
import sqlalchemy as sa
from flask import Flask

from perpetuo import crypto
from perpetuo.gateway.walk import Gateway
from perpetuo.models import ProviderKey
from tests.people import Browser, Person

SECRET = "sk-canary-0123456789-abcd"
SHAPE = (
    "id provider name base_url models priority weight enabled prices hint created_at last_used_at last_error"
)


def stored(gateway: Gateway, id: str) -> sa.Row:
    query = sa.select(ProviderKey.__table__).where(ProviderKey.id == id)
    return gateway.database.read(lambda connection: connection.execute(query).one())


def secret_of(gateway: Gateway, id: str) -> str:
    row = stored(gateway, id)
    return gateway.ring.open(row.sealed, "provider_key", row.workspace_id, row.id, row.resolved_base_url)


def param(response) -> tuple[int, str]:
    return response.status_code, response.get_json()["error"]["param"]


def test_a_new_provider_key_has_the_shape_and_the_defaults(app: Flask):
    body = Person(app).provider_key(api_key=SECRET)
    assert " ".join(body) == SHAPE
    assert (body["priority"], body["weight"], body["enabled"], body["hint"]) == (0, 1, True, "abcd")
    assert (body["models"], body["prices"], body["base_url"], body["last_used_at"]) == (None,) * 4


def test_the_secret_is_sealed_for_its_row_and_host(app: Flask, gateway: Gateway):
    id = Person(app).provider_key(api_key=SECRET)["id"]
    row = stored(gateway, id)
    assert secret_of(gateway, id) == SECRET
    assert SECRET not in str(tuple(row))
    with pytest.raises(crypto.Unreadable):
        gateway.ring.open(row.sealed, "provider_key", row.workspace_id, row.id, "https://evil.example/v1")


def test_the_secret_leaves_with_no_answer(app: Flask):
    person = Person(app)
    url = f"providers/{person.provider_key(api_key=SECRET)['id']}"
    answers = [
        person.get(url),
        person.get("providers"),
        person.patch(url, {"api_key": SECRET}),
        person.get(""),
    ]
    answers += [person.patch(url, {"api_key": SECRET, "x": 1}), person.post("providers", {"api_key": SECRET})]
    assert [answer.status_code for answer in answers] == [200] * 4 + [400] * 2
    assert not any(SECRET in answer.text + str(answer.headers) for answer in answers)


def test_a_short_secret_shows_nothing_of_itself(app: Flask):
    assert Person(app).provider_key(api_key="short-1")["hint"] == ""


def test_prices_and_models_come_back_as_given(app: Flask):
    prices = {"gpt-*": {"input": 2.5, "cached_input": 0.25, "output": 10}}
    body = Person(app).provider_key(models=["gpt-*", "o3"], prices=prices, name="main", priority=-1, weight=3)
    assert (body["models"], body["prices"], body["name"]) == (["gpt-*", "o3"], prices, "main")
    assert (body["priority"], body["weight"]) == (-1, 3)


@pytest.mark.parametrize(
    ("fields", "at_fault"),
    [
        ({"provider": "nobody"}, "provider"),
        ({"provider": "vllm"}, "base_url"),
        ({"provider": "custom"}, "base_url"),
        ({"provider": "azure", "api_key": "x"}, "base_url"),
        ({"provider": "openai"}, "api_key"),
        ({"provider": "openai", "api_key": ""}, "api_key"),
        ({"provider": "openai", "api_key": None}, None),
        ({"provider": "openai", "api_key": "x", "base_url": "ftp://example.com"}, "base_url"),
        ({"provider": "openai", "api_key": "x", "base_url": "https://u:p@example.com"}, "base_url"),
        ({"provider": "openai", "api_key": "x", "base_url": "https://example.com?a=1"}, "base_url"),
        ({"provider": "openai", "api_key": "x", "base_url": "https://example.com/#a"}, "base_url"),
        ({"provider": "openai", "api_key": "x", "base_url": "http://169.254.169.254/latest"}, "base_url"),
        ({"provider": "openai", "api_key": "x", "base_url": "https://" + "a" * 2000}, "base_url"),
        ({"api_key": "x"}, "provider"),
        ({"provider": "openai", "api_key": "x", "hint": "abcd"}, "hint"),
    ],
)
def test_what_cannot_work_is_refused(app: Flask, fields: dict, at_fault: str | None):
    assert param(Person(app).post("providers", fields)) == (400, at_fault or "api_key")


@pytest.mark.parametrize("provider", ["ollama", "vllm", "custom"])
def test_some_providers_need_no_secret(app: Flask, gateway: Gateway, provider: str):
    body = Person(app).provider_key(provider=provider, base_url="http://127.0.0.1:9/v1/", api_key="")
    assert (body["hint"], body["base_url"]) == ("", "http://127.0.0.1:9/v1/")
    assert stored(gateway, body["id"]).resolved_base_url == "http://127.0.0.1:9/v1"
    assert secret_of(gateway, body["id"]) == ""


@pytest.mark.parametrize("change", [{"base_url": "https://evil.example/v1"}, {"provider": "groq"}])
def test_another_destination_needs_the_secret_again(app: Flask, gateway: Gateway, change: dict):
    person = Person(app)
    id = person.provider_key(api_key=SECRET)["id"]
    before = stored(gateway, id)
    assert param(person.patch(f"providers/{id}", change)) == (400, "api_key")
    assert stored(gateway, id) == before
    assert person.patch(f"providers/{id}", {**change, "api_key": "sk-other-0123456789"}).status_code == 200
    assert secret_of(gateway, id) == "sk-other-0123456789"


def test_the_same_destination_needs_no_secret(app: Flask, gateway: Gateway):
    person = Person(app)
    id = person.provider_key(api_key=SECRET)["id"]
    same = {"base_url": "https://api.openai.com/v1", "provider": "openai", "weight": 2}
    assert person.patch(f"providers/{id}", same).get_json()["weight"] == 2
    assert secret_of(gateway, id) == SECRET


def test_where_there_is_no_secret_none_is_asked_for(app: Flask):
    person = Person(app)
    id = person.provider_key(provider="ollama", api_key="")["id"]
    change = {"base_url": "http://127.0.0.1:9/v1"}
    assert person.patch(f"providers/{id}", change).get_json()["base_url"] == change["base_url"]


def test_base_url_cannot_be_cleared_where_it_is_needed(app: Flask):
    person = Person(app)
    id = person.provider_key(provider="custom", base_url="https://example.com/v1")["id"]
    assert param(person.patch(f"providers/{id}", {"base_url": None, "api_key": "x"})) == (400, "base_url")


def test_a_new_secret_replaces_the_old_one(app: Flask, gateway: Gateway):
    person = Person(app)
    id = person.provider_key(api_key=SECRET)["id"]
    assert person.patch(f"providers/{id}", {"api_key": "sk-newer-0123456789"}).get_json()["hint"] == "6789"
    assert secret_of(gateway, id) == "sk-newer-0123456789"


def test_an_empty_secret_in_a_form_means_unchanged(app: Flask, gateway: Gateway):
    person = Person(app)
    id = person.provider_key(api_key=SECRET)["id"]
    form = {
        "api_key": "",
        "name": "new",
        "enabled": "false",
        "models": "a\r\nb",
        "priority": "3",
        "prices": "",
    }
    url = f"/workspaces/{person.workspace}/providers/{id}"
    assert Browser(app, person).open("POST", url, data=form).status_code == 303
    body = person.get(url).get_json()
    assert (body["name"], body["enabled"], body["models"], body["priority"]) == ("new", False, ["a", "b"], 3)
    assert secret_of(gateway, id) == SECRET


def test_a_deleted_provider_key_is_gone_with_its_secret(app: Flask, gateway: Gateway):
    person = Person(app)
    one, two = person.provider_key(), person.provider_key()
    assert person.delete(f"providers/{one['id']}").status_code == 204
    assert person.post(f"providers/{two['id']}/delete").status_code == 204
    assert person.get("providers").get_json()["data"] == []
    assert person.delete(f"providers/{one['id']}").status_code == 404


def test_provider_keys_are_listed_newest_first(app: Flask):
    person = Person(app)
    made = [person.provider_key() for _ in range(3)]
    assert person.get("providers").get_json()["data"] == made[::-1]
    assert person.get("providers?limit=1").get_json()["next_cursor"]


def test_a_test_asks_the_upstream(app: Flask, upstream):
    person = Person(app)
    id = person.provider_key(provider="custom", base_url=upstream.base_url, api_key=SECRET)["id"]
    body = person.post(f"providers/{id}/test").get_json()
    assert list(body) == ["ok", "http_status", "latency_ms", "models", "error"]
    assert (body["ok"], body["http_status"], body["error"]) == (True, 200, None)


def test_a_test_says_what_is_wrong(app: Flask):
    person = Person(app)
    id = person.provider_key(provider="custom", base_url="http://127.0.0.1:9/v1")["id"]
    body = person.post(f"providers/{id}/test").get_json()
    assert (body["ok"], body["http_status"]) == (False, None)
    assert body["error"]


def test_an_unreadable_secret_is_a_sentence(app: Flask, gateway: Gateway):
    person = Person(app)
    id = person.provider_key()["id"]
    damage = sa.update(ProviderKey).values(sealed="v1.x.AAAA")
    gateway.database.transaction(lambda connection: connection.execute(damage))
    body = person.post(f"providers/{id}/test").get_json()
    assert (body["ok"], body["error"]) == (False, "The stored secret cannot be opened: enter it again.")
    assert person.patch(f"providers/{id}", {"api_key": SECRET}).status_code == 200
    assert secret_of(gateway, id) == SECRET
