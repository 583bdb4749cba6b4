import dataclasses
import threading
from datetime import UTC, datetime, timedelta
from statistics import median
from time import perf_counter

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient

from perpetuo import accounts, create_app, crypto
from perpetuo.errors import GatewayError
from perpetuo.gateway.walk import Gateway
from perpetuo.models import User, Workspace
from tests.people import PASSWORD, Browser, Person

ADA = {"email": "ada@example.com", "password": PASSWORD}


def code(response) -> tuple[int, str]:
    return response.status_code, response.get_json()["error"]["code"]


def with_signup(app: Flask, signup: str) -> Flask:
    return create_app(dataclasses.replace(app.extensions["perpetuo"].settings, signup=signup))


def found(gateway: Gateway, person: Person) -> User:
    user = accounts.find_user(gateway.database, person.email)
    assert user is not None
    return user


def test_signup_makes_user_workspace_and_token(client: FlaskClient):
    response = client.post("/auth/signup", json={**ADA, "name": "Ada"})
    body = response.get_json()
    assert response.status_code == 201
    assert list(body) == ["user", "workspace", "token", "expires_at"]
    assert list(body["user"]) == ["id", "email", "name", "created_at"]
    assert body["workspace"]["role"] == "owner"
    assert "Set-Cookie" not in response.headers


def test_token_expires_after_twelve_hours(client: FlaskClient):
    expires_at = datetime.fromisoformat(client.post("/auth/signup", json=ADA).get_json()["expires_at"])
    assert abs(expires_at - datetime.now(UTC) - timedelta(hours=12)) < timedelta(seconds=5)


def test_an_expired_token_is_no_token(app: Flask, monkeypatch: pytest.MonkeyPatch):
    person = Person(app)
    monkeypatch.setattr("perpetuo.guard.TOKEN_SECONDS", -1)
    assert person.get("/auth/me").status_code == 401


def test_signup_ignores_case_and_refuses_a_second_account(client: FlaskClient):
    client.post("/auth/signup", json=ADA)
    response = client.post("/auth/signup", json={**ADA, "email": "ADA@example.com"})
    assert code(response) == (409, "email_taken")


def test_two_signups_at_once_make_one_account(gateway: Gateway):
    results = at_once(lambda _: accounts.create_user(gateway.database, "ada@example.com", PASSWORD), 4)
    errors = [result for result in results if isinstance(result, GatewayError)]
    assert [error.code for error in errors] == ["email_taken"] * 3
    assert count(gateway, User) == count(gateway, Workspace) == 1


def test_the_first_user_is_exactly_one(gateway: Gateway):
    results = at_once(
        lambda n: accounts.create_user(gateway.database, f"u{n}@example.com", PASSWORD, signup="first"), 6
    )
    errors = [result for result in results if isinstance(result, GatewayError)]
    assert [error.code for error in errors] == ["signup_closed"] * 5
    assert count(gateway, User) == 1


def at_once(call, times: int) -> list:
    """The results or errors of `times` calls that start together."""
    results, barrier = [], threading.Barrier(times)

    def run(number: int) -> None:
        barrier.wait()
        try:
            results.append(call(number))
        except GatewayError as exc:
            results.append(exc)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(times)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    return results


def count(gateway: Gateway, model: type) -> int:
    query = sa.select(sa.func.count()).select_from(model)
    return gateway.database.read(lambda connection: connection.execute(query).scalar_one())


def test_closed_signup_is_closed(app: Flask):
    response = with_signup(app, "closed").test_client().post("/auth/signup", json=ADA)
    assert code(response) == (403, "signup_closed")


def test_first_signup_closes_behind_the_first(app: Flask):
    client = with_signup(app, "first").test_client()
    assert client.post("/auth/signup", json=ADA).status_code == 201
    assert code(client.post("/auth/signup", json={**ADA, "email": "b@b.b"})) == (403, "signup_closed")


def test_login_gives_a_token_that_works(app: Flask, client: FlaskClient):
    person = Person(app)
    body = client.post("/auth/login", json={"email": person.email.upper(), "password": PASSWORD}).get_json()
    assert list(body) == ["user", "token", "expires_at"]
    person.token = body["token"]
    assert person.get("/auth/me").get_json()["workspaces"][0]["id"] == person.workspace


def test_wrong_password_and_unknown_email_look_the_same(app: Flask, client: FlaskClient):
    person = Person(app)
    wrong = client.post("/auth/login", json={"email": person.email, "password": "wrong password"})
    unknown = client.post("/auth/login", json={"email": "nobody@example.com", "password": "wrong password"})
    assert code(wrong) == code(unknown) == (401, "unauthorized")
    assert wrong.get_data() == unknown.get_data()


def test_an_unknown_email_costs_a_hash_too(gateway: Gateway, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(crypto, "is_password", lambda password, hashed: asked.append(hashed) or False)
    assert not accounts.is_password(gateway.database, None, PASSWORD)
    assert asked == [accounts.NOBODY]


def test_the_hash_of_nobody_is_worked_out_in_full():
    def seconds(hashed: str) -> float:
        began = perf_counter()
        assert not crypto.is_password("wrong", hashed)
        return perf_counter() - began

    real = crypto.hash_password(PASSWORD)
    assert median(seconds(accounts.NOBODY) for _ in range(5)) > median(seconds(real) for _ in range(5)) / 3


def test_a_weak_hash_is_renewed_at_login(app: Flask, gateway: Gateway, monkeypatch: pytest.MonkeyPatch):
    person = Person(app)
    monkeypatch.setattr(crypto, "ARGON2", {**crypto.ARGON2, "iterations": 1})
    weak = crypto.hash_password(PASSWORD)
    monkeypatch.undo()
    change = sa.update(User).values(password_hash=weak)
    gateway.database.transaction(lambda connection: connection.execute(change))
    assert accounts.is_password(gateway.database, found(gateway, person), PASSWORD)
    assert not crypto.is_weak(found(gateway, person).password_hash)
    assert person.get("/auth/me").status_code == 200


def test_guessing_is_slowed_per_account_known_or_not(app: Flask, client: FlaskClient):
    for email in (Person(app).email, "nobody@example.com"):
        wrong = {"email": email, "password": "wrong password"}
        answers = [client.post("/auth/login", json=wrong) for _ in range(7)]
        assert [answer.status_code for answer in answers] == [401] * 6 + [429]
        assert code(answers[-1]) == (429, "too_many_attempts")
        assert answers[-1].headers["retry-after"] == "1"


def test_a_delayed_attempt_does_no_work(client: FlaskClient, monkeypatch: pytest.MonkeyPatch):
    worked = []
    monkeypatch.setattr(crypto, "is_password", lambda *_: worked.append(1) or False)
    for _ in range(9):
        client.post("/auth/login", json=ADA)
    assert len(worked) == 6


def test_guessing_is_slowed_per_network(app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crypto, "is_password", lambda *_: False)
    answers = [client.post("/auth/login", json={**ADA, "email": f"a{n}@b.c"}) for n in range(22)]
    assert [answer.status_code for answer in answers] == [401] * 21 + [429]
    elsewhere = {"REMOTE_ADDR": "192.0.2.9"}
    assert client.post("/auth/login", json=ADA, environ_overrides=elsewhere).status_code == 401


def test_guesses_at_the_same_moment_are_slowed_too(app: Flask):
    wrong = {"email": "nobody@example.com", "password": "wrong password"}
    statuses = at_once(lambda _: app.test_client().post("/auth/login", json=wrong).status_code, 12)
    assert sorted(statuses) == [401] * 6 + [429] * 6


def test_many_may_sign_in_at_the_same_moment(app: Flask):
    person = Person(app)
    right = {"email": person.email, "password": PASSWORD}
    statuses = at_once(lambda _: app.test_client().post("/auth/login", json=right).status_code, 25)
    assert statuses == [200] * 25


def test_success_forgets_the_accounts_failures(app: Flask, client: FlaskClient):
    person = Person(app)
    right = {"email": person.email, "password": PASSWORD}
    for _ in range(2):
        for _ in range(5):
            client.post("/auth/login", json={**right, "password": "wrong password"})
        assert client.post("/auth/login", json=right).status_code == 200


def test_logout_ends_every_session_and_token(app: Flask):
    person = Person(app)
    one, other = Browser(app, person), Browser(app, person)
    copy = one.client.get_cookie("session")
    assert person.post("/auth/logout").status_code == 204
    assert person.get("/auth/me").status_code == 401
    for browser in (one, other):
        assert browser.open("GET", "/auth/me").status_code == 303
    assert copy is not None


def test_a_copied_cookie_dies_with_the_logout(app: Flask):
    person = Person(app)
    visitor = Browser(app, person)
    cookie = visitor.client.get_cookie("session")
    assert visitor.open("POST", "/auth/logout").status_code == 303
    assert visitor.client.get_cookie("session") is None
    thief = app.test_client()
    thief.set_cookie("session", cookie.value)
    assert thief.get("/auth/me").status_code == 401


def test_a_form_signs_in_by_cookie_and_goes_on(app: Flask):
    person = Person(app)
    visitor = Browser(app, person)
    assert (visitor.signed_in.status_code, visitor.signed_in.location) == (303, "/")
    set_cookie = visitor.signed_in.headers["Set-Cookie"]
    assert "HttpOnly" in set_cookie
    assert "SameSite=Lax" in set_cookie
    assert "Expires=" in set_cookie
    assert "remember" not in set_cookie
    assert visitor.open("GET", "/auth/me").get_json()["user"]["id"] == person.id


def test_nothing_from_before_the_sign_in_survives_it(app: Flask):
    person, client = Person(app), app.test_client()
    with client.session_transaction() as session:
        session["planted"] = "x"
    form = {"email": person.email, "password": PASSWORD}
    assert client.post("/auth/login", data=form, headers={"Accept": "text/html"}).status_code == 303
    with client.session_transaction() as session:
        assert "planted" not in session


@pytest.mark.parametrize(("next", "location"), [("/workspaces?a=1", "/workspaces?a=1"), ("//evil.com", "/")])
def test_the_login_form_goes_on_to_local_paths_only(app: Flask, next: str, location: str):
    person, client = Person(app), app.test_client()
    form = {"email": person.email, "password": PASSWORD, "next": next}
    assert client.post("/auth/login", data=form, headers={"Accept": "text/html"}).location == location
    url = f"/auth/login?next={next}"
    del form["next"]
    assert client.post(url, data=form, headers={"Accept": "text/html"}).location == location


def test_on_https_the_cookie_is_a_secure_host_cookie(app: Flask):
    settings = dataclasses.replace(app.extensions["perpetuo"].settings, public_url="https://localhost")
    visitor = Browser(create_app(settings), Person(app))
    set_cookie = visitor.signed_in.headers["Set-Cookie"]
    assert set_cookie.startswith("__Host-session=")
    assert "Secure" in set_cookie
    assert "Path=/;" in set_cookie + ";"
    assert "Domain" not in set_cookie


def test_a_json_login_sets_no_cookie(app: Flask, client: FlaskClient):
    person = Person(app)
    response = client.post("/auth/login", json={"email": person.email, "password": PASSWORD})
    assert "Set-Cookie" not in response.headers


def test_bearer_beats_cookie(app: Flask):
    person, other = Person(app), Person(app)
    visitor = Browser(app, person)
    mixed = visitor.open("GET", "/auth/me", headers={"Authorization": f"Bearer {other.token}"})
    assert mixed.get_json()["user"]["id"] == other.id
    bad = visitor.open("GET", "/auth/me", headers={"Authorization": "Bearer nonsense"})
    assert bad.status_code == 401


@pytest.mark.parametrize(
    "header", ["Bearer", "Bearer ", "Bearer x.y.z", "Basic x", "", "Bearer \xff", "x" * 10_000]
)
def test_no_token_is_401(client: FlaskClient, header: str):
    assert code(client.get("/auth/me", headers={"Authorization": header})) == (401, "unauthorized")


def test_a_token_of_another_purpose_is_refused(app: Flask, gateway: Gateway):
    person = Person(app)
    person.token = crypto.sign(gateway.settings.secret_keys, "reset", [person.id, 0])
    assert person.get("/auth/me").status_code == 401


def test_signing_secrets_rotate_without_logging_anybody_out(app: Flask, gateway: Gateway):
    person = Person(app)
    visitor = Browser(app, person)
    keys = ("a-new-secret-key-of-more-than-32-characters", *gateway.settings.secret_keys)
    rotated = create_app(dataclasses.replace(gateway.settings, secret_keys=keys))
    person.client = rotated.test_client()
    visitor.client.application = rotated
    assert person.get("/auth/me").status_code == 200
    assert visitor.open("GET", "/auth/me").status_code == 200
    dropped = create_app(dataclasses.replace(gateway.settings, secret_keys=keys[:1]))
    person.client = dropped.test_client()
    assert person.get("/auth/me").status_code == 401


def test_name_changes_without_a_new_token(app: Flask):
    person = Person(app)
    assert person.patch("/auth/me", {"name": " Ada "}).get_json()["user"]["name"] == "Ada"
    assert person.patch("/auth/me", {"name": None}).get_json()["user"]["name"] is None
    assert list(person.post("/auth/me", {"name": "x"}).get_json()) == ["user"]


def test_a_new_password_ends_every_earlier_token(app: Flask, client: FlaskClient):
    person = Person(app)
    change = {"password": "another password", "current_password": PASSWORD}
    body = person.patch("/auth/me", change).get_json()
    assert list(body) == ["user", "token", "expires_at"]
    assert person.get("/auth/me").status_code == 401
    person.token = body["token"]
    assert person.get("/auth/me").status_code == 200
    assert client.post("/auth/login", json={"email": person.email, "password": PASSWORD}).status_code == 401


def test_a_new_password_renews_the_browsers_own_cookie(app: Flask):
    person = Person(app)
    one, other = Browser(app, person), Browser(app, person)
    form = {"password": "another password", "current_password": PASSWORD, "name": ""}
    assert one.open("POST", "/auth/me", data=form).status_code == 303
    assert one.open("GET", "/auth/me").status_code == 200
    assert other.open("GET", "/auth/me").status_code == 303


@pytest.mark.parametrize("current", [None, "", "wrong password"])
def test_a_new_password_needs_the_present_one(app: Flask, current: str | None):
    person = Person(app)
    response = person.patch("/auth/me", {"password": "another password", "current_password": current})
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == "current_password"
    assert person.get("/auth/me").status_code == 200


def test_guessing_the_present_password_is_slowed(app: Flask):
    person = Person(app)
    change = {"password": "another password", "current_password": "wrong password"}
    statuses = [person.patch("/auth/me", change).status_code for _ in range(7)]
    assert statuses == [400] * 6 + [429]


def test_an_empty_password_field_changes_nothing(app: Flask):
    person = Person(app)
    visitor = Browser(app, person)
    form = {"name": "Ada", "password": "", "current_password": ""}
    assert visitor.open("POST", "/auth/me", data=form).status_code == 303
    assert person.get("/auth/me").get_json()["user"]["name"] == "Ada"


def test_the_operator_can_reset_a_password(app: Flask, gateway: Gateway):
    person = Person(app)
    accounts.reset_password(gateway.database, person.email, "another password")
    assert person.get("/auth/me").status_code == 401
    assert accounts.is_password(gateway.database, found(gateway, person), "another password")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("path", ["/auth/login", "/auth/signup"])
def test_another_site_cannot_sign_anybody_in(app: Flask, path: str, site: str):
    response = app.test_client().post(path, data=ADA, headers={"Sec-Fetch-Site": site})
    assert code(response) == (403, "forbidden_origin")
