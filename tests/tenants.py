"""A workspace with its keys, put straight into the database: what a gateway test needs to make a call."""

from __future__ import annotations

from dataclasses import dataclass

from perpetuo import crypto
from perpetuo.gateway.walk import Gateway
from perpetuo.models import ApiKey, ProviderKey, User, Workspace, new_id


@dataclass
class Tenant:
    gateway: Gateway
    workspace_id: str
    key: str = ""
    api_key_id: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def add_provider_key(self, base_url: str, secret: str = "sk-upstream", **columns) -> str:
        columns = {"provider": "openai", **columns}
        row_id = new_id("prov")
        sealed = self.gateway.ring.seal(secret, "provider_key", self.workspace_id, row_id, base_url)

        def add(session) -> None:
            session.add(
                ProviderKey(
                    id=row_id,
                    workspace_id=self.workspace_id,
                    base_url=base_url,
                    resolved_base_url=base_url,
                    sealed=sealed,
                    hint=secret[-4:],
                    **columns,
                )
            )
            session.get(Workspace, self.workspace_id).config_version += 1

        self.gateway.database.save(add)
        return row_id

    def add_api_key(self, **columns) -> str:
        self.key, self.api_key_id = crypto.new_api_key(), new_id("key")

        def add(session) -> None:
            values = {
                "name": "test",
                "prefix": self.key[:11],
                "hash": crypto.hash_api_key(self.key),
                **columns,
            }
            session.add(ApiKey(id=self.api_key_id, workspace_id=self.workspace_id, **values))

        self.gateway.database.save(add)
        return self.key

    def change(self, model, record_id: str, **columns) -> None:
        def change(session) -> None:
            record = session.get(model, record_id)
            for name, value in columns.items():
                setattr(record, name, value)
            session.get(Workspace, self.workspace_id).config_version += 1

        self.gateway.database.save(change)


def new_tenant(gateway: Gateway, **workspace) -> Tenant:
    """A user's workspace with one API key and no provider key yet."""
    user_id, workspace_id = new_id("usr"), new_id("ws")

    def add(session) -> None:
        session.add(User(id=user_id, email=f"{user_id}@example.com", password_hash="-"))
        session.flush()
        session.add(Workspace(id=workspace_id, user_id=user_id, name="test", **workspace))

    gateway.database.save(add)
    tenant = Tenant(gateway, workspace_id)
    tenant.add_api_key()
    return tenant
