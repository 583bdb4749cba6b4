"""The secrets that local mode makes for itself: fresh ones, and the file in which they stay."""

from __future__ import annotations

import base64
import os
import secrets
import tempfile
from pathlib import Path

from dotenv import dotenv_values


def fresh() -> dict[str, str]:
    """A fresh `SECRET_KEY` and `ENCRYPTION_KEYS`, as they stand in `.env`."""
    name = secrets.token_hex(2)
    return {
        "SECRET_KEY": secrets.token_urlsafe(48),
        "ENCRYPTION_KEYS": f"k{name}:{base64.b64encode(secrets.token_bytes(32)).decode()}",
    }


def read(path: Path) -> dict[str, str]:
    """What stands in the file; whichever process comes first makes it. Raises OSError."""
    if not path.exists():
        _write_once(path, "".join(f"{name}={value}\n" for name, value in fresh().items()))
    return {name: value or "" for name, value in dotenv_values(path).items()}


def _write_once(path: Path, text: str) -> None:
    """Writes a file with mode 0600 that appears whole or not at all; an existing one stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # prompts will be in it too
    handle, name = tempfile.mkstemp(dir=path.parent)  # mkstemp gives 0600
    try:
        os.write(handle, text.encode())
        os.fsync(handle)
        os.link(name, path)  # fails where another process was first
    except FileExistsError:
        pass
    finally:
        os.close(handle)
        os.unlink(name)
