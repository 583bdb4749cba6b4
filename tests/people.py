"""People who use the management side as a program does: through HTTP, with an access token."""

from __future__ import annotations

import itertools
from typing import Any

from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

PASSWORD = "correct horse battery"
NUMBERS = itertools.count(1)


class Person:
    """Signs up, and has a workspace."""

    def __init__(self, app: Flask, email: str | None = None, password: str = PASSWORD) -> None:
        self.client: FlaskClient = app.test_client(use_cookies=False)
        self.email = email or f"person{next(NUMBERS)}@example.com"
        self.password = password
        body = self.client.post("/auth/signup", json={"email": self.email, "password": password}).get_json()
        self.id: str = body["user"]["id"]
        self.token: str = body["token"]
        self.workspace: str = body["workspace"]["id"]

    def open(self, method: str, path: str, **options: Any) -> TestResponse:
        """Paths that do not begin with a slash are inside the workspace."""
        url = path if path.startswith("/") else f"/workspaces/{self.workspace}/{path}".rstrip("/")
        headers = {"Authorization": f"Bearer {self.token}", **options.pop("headers", {})}
        return self.client.open(url, method=method, headers=headers, **options)

    def get(self, path: str, **options: Any) -> TestResponse:
        return self.open("GET", path, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> TestResponse:
        return self.open("POST", path, json=json, **options)

    def patch(self, path: str, json: Any = None, **options: Any) -> TestResponse:
        return self.open("PATCH", path, json=json, **options)

    def delete(self, path: str, **options: Any) -> TestResponse:
        return self.open("DELETE", path, **options)

    def provider_key(self, **fields: Any) -> dict[str, Any]:
        """A new provider key, as it was answered."""
        wanted = {"provider": "openai", "api_key": "sk-test-0123456789abcdef", **fields}
        response = self.post("providers", json=wanted)
        assert response.status_code == 201, response.text
        return response.get_json()

    def api_key(self, **fields: Any) -> dict[str, Any]:
        """A new API key, with its `key`."""
        response = self.post("api-keys", json={"name": "test", **fields})
        assert response.status_code == 201, response.text
        return response.get_json()


class Browser:
    """The same person in a browser: forms, pages and the session cookie."""

    def __init__(self, app: Flask, person: Person) -> None:
        self.client = app.test_client()
        self.headers = {"Accept": "text/html", "Sec-Fetch-Site": "same-origin"}
        form = {"email": person.email, "password": person.password}
        self.signed_in = self.open("POST", "/auth/login", data=form)

    def open(self, method: str, url: str, **options: Any) -> TestResponse:
        headers = {**self.headers, **options.pop("headers", {})}
        return self.client.open(url, method=method, headers=headers, **options)
