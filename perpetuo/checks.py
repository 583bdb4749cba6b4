"""What must be true of an installation: asked as the server starts, and by `flask doctor`."""

from __future__ import annotations

import re
from collections import Counter

from sqlalchemy import select
from sqlalchemy.engine import Connection

from perpetuo import crypto
from perpetuo.config import ROOT, Settings
from perpetuo.db import Database
from perpetuo.errors import Unavailable
from perpetuo.models import ProviderKey

REVISION = re.compile(r"^revision\b.*?=\s*[\"'](\w+)", re.MULTILINE)
DOWN_REVISION = re.compile(r"^down_revision\b.*?=\s*[\"'](\w+)", re.MULTILINE)
SAMPLE = 50  # provider keys a ring key is tried on


def at_start(settings: Settings) -> list[str]:
    """Why the server must not start, a sentence each. A database that is down is no reason."""
    database = Database(settings.database_url)
    try:
        fault = schema_fault(database)
        if fault is not None:
            return [fault]
        return ring_faults(database, settings) if settings.is_production else []
    except Unavailable:
        return []
    finally:
        database.close()


def schema_fault(database: Database) -> str | None:
    """Whether the schema is behind the code; one ahead of it is fine. Raises Unavailable."""
    if database.path is not None and not database.path.exists():
        return "There is no database yet: run `flask --app wsgi db upgrade`."
    revision = database.revision()
    known, head = _revisions()
    if revision == head or (revision is not None and revision not in known):
        return None
    return "The database's schema is behind the code: run `flask --app wsgi db upgrade`."


def _revisions() -> tuple[set[str], str]:
    """All revisions and the newest. Read from their files: Alembic would stay in memory, 12 MiB a process."""
    texts = [path.read_text() for path in (ROOT / "migrations" / "versions").glob("*.py")]
    known = {name for text in texts for name in REVISION.findall(text)}
    (head,) = known - {name for text in texts for name in DOWN_REVISION.findall(text)}
    return known, head


def ring_faults(database: Database, settings: Settings) -> list[str]:
    """Keys of ENCRYPTION_KEYS under whose id secrets are stored, none of which opens. Raises Unavailable."""
    ring = crypto.KeyRing(settings.encryption_keys)
    faults = []
    for name, _ in settings.encryption_keys:
        rows = database.read(lambda connection, name=name: _sealed_with(connection, name))  # type: ignore[misc]
        if rows and not any(_opens(ring, row) for row in rows):
            faults.append(
                f"ENCRYPTION_KEYS: the key '{name}' opens none of the provider keys stored under it."
            )
    return faults


def lost_keys(database: Database, settings: Settings) -> list[str]:
    """Ids of ring keys under which provider keys are stored, and which are not listed. Raises Unavailable."""
    rows = database.read(lambda connection: connection.execute(select(ProviderKey.sealed)).scalars().all())
    listed = {name for name, _ in settings.encryption_keys}
    lost = Counter(name for name in map(crypto.key_id, rows) if name not in listed)
    return [
        f"ENCRYPTION_KEYS lacks the key '{name}': {count} stored provider keys cannot be opened without it."
        for name, count in sorted(lost.items())
    ]


def _sealed_with(connection: Connection, name: str) -> list:
    statement = select(
        ProviderKey.id, ProviderKey.workspace_id, ProviderKey.resolved_base_url, ProviderKey.sealed
    ).where(ProviderKey.sealed.startswith(f"v1.{name}.", autoescape=True))
    return list(connection.execute(statement.limit(SAMPLE)))


def _opens(ring: crypto.KeyRing, row) -> bool:  # type: ignore[no-untyped-def]
    try:
        ring.open(row.sealed, "provider_key", row.workspace_id, row.id, row.resolved_base_url)
    except crypto.Unreadable:
        return False
    return True
