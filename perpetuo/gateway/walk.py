"""The stair of one completion, a line a step; `/v1` and the playground walk it. Knows no Flask."""

from __future__ import annotations

from perpetuo.config import Settings
from perpetuo.crypto import KeyRing
from perpetuo.db import Database


class Gateway:
    """Everything that one process serves with. Opens nothing before its first use."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings.database_url)
        self.ring = KeyRing(settings.encryption_keys)

    def close(self) -> None:
        """Ends every thread and connection of this process."""
        self.database.close()
