"""Seals the stored provider keys anew under the ring's newest key, while everything serves."""

from __future__ import annotations

import sqlalchemy as sa

from perpetuo.crypto import KeyRing, Unreadable, key_id
from perpetuo.db import Database
from perpetuo.models import ProviderKey

KEYS = ProviderKey.__table__.c


def rekey(database: Database, ring: KeyRing) -> tuple[int, list[str]]:
    """How many secrets were sealed anew, and the ids of the provider keys whose secret does not open.

    Each is its own short transaction, so it may be broken off and run again. Raises Unavailable.
    """
    columns = (KEYS.id, KEYS.workspace_id, KEYS.resolved_base_url, KEYS.sealed)
    stored = database.read(lambda connection: connection.execute(sa.select(*columns)).all())
    moved, unreadable = 0, []
    for id, workspace_id, base_url, sealed in stored:
        if key_id(sealed) == ring.newest:
            continue
        place = ("provider_key", workspace_id, id, base_url)
        try:
            anew = ring.seal(ring.open(sealed, *place), *place)
        except Unreadable:
            unreadable.append(id)
            continue
        # Only what was read: a secret that its owner replaced meanwhile is sealed under the newest key.
        change = sa.update(ProviderKey).where(KEYS.id == id, KEYS.sealed == sealed).values(sealed=anew)
        moved += database.transaction(lambda connection: connection.execute(change).rowcount)  # noqa: B023
    return moved, unreadable
