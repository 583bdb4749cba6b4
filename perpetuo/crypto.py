"""Secrets: provider keys sealed, API keys and passwords hashed, tokens signed.

The only room that imports `cryptography`. Knows no database and no Flask; the caller runs the slow
functions (passwords) in a native thread.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
import zlib
from typing import Any

from cryptography.exceptions import InvalidKey, InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from itsdangerous import BadData, URLSafeTimedSerializer

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
API_KEY = re.compile(r"pk_[0-9A-Za-z]{49}")  # published: 43 random characters (256 bits), 6 of CRC-32
PREFIX_LENGTH = 11  # `pk_` and eight characters: enough to recognise, 35 stay unknown

# OWASP's Password Storage sheet (2026-08): argon2id with 19 MiB, two passes, one lane.
ARGON2: dict[str, Any] = {"memory_cost": 19456, "iterations": 2, "lanes": 1, "length": 32}
ARGON2_PREFIX = "$argon2id$v=19$m=19456,t=2,p=1$"


class Unreadable(Exception):
    """A sealed secret does not open: another ring, another row, another host, or damage."""


class KeyRing:
    """Seals and opens secrets with AES-256-GCM. The first key writes, all read.

    `context` names the place of the ciphertext (row, workspace, host): it opens nowhere else.
    """

    def __init__(self, keys: tuple[tuple[str, bytes], ...]) -> None:
        self.newest = keys[0][0]
        self._keys = {name: AESGCM(key) for name, key in keys}

    def seal(self, secret: str, *context: str) -> str:
        """`v1.<key id>.<base64 of nonce and ciphertext>`; about 1 µs."""
        nonce = secrets.token_bytes(12)
        sealed = self._keys[self.newest].encrypt(nonce, secret.encode(), _join(context))
        return f"v1.{self.newest}.{base64.b64encode(nonce + sealed).decode()}"

    def open(self, sealed: str, *context: str) -> str:
        """The secret, or Unreadable."""
        try:
            blob = base64.b64decode(sealed.rsplit(".", 1)[-1], validate=True)
            return self._keys[key_id(sealed)].decrypt(blob[:12], blob[12:], _join(context)).decode()
        except (ValueError, KeyError, InvalidTag, binascii.Error) as exc:
            raise Unreadable("the sealed secret does not open with this ring at this place") from exc


def key_id(sealed: str) -> str:
    """The id of the ring's key that sealed this secret ('' for damage)."""
    return sealed[3:].rpartition(".")[0] if sealed.startswith("v1.") else ""


def _join(context: tuple[str, ...]) -> bytes:
    return b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in context)


def new_api_key() -> str:
    """A fresh API key. It is shown once and never stored; `hash_api_key` is."""
    body = "".join(secrets.choice(BASE62) for _ in range(43))
    return f"pk_{body}{_checksum(body)}"


def is_api_key(text: str) -> bool:
    """Whether this could be one of ours: form and checksum, without a query."""
    return API_KEY.fullmatch(text) is not None and _checksum(text[3:46]) == text[46:]


def hash_api_key(key: str) -> str:
    """SHA-256 as hex. A key of 256 random bits needs no slow hash and no pepper."""
    return hashlib.sha256(key.encode()).hexdigest()


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        digits = BASE62[digit] + digits
    return digits


def hash_password(password: str) -> str:
    """Argon2id as a PHC string; 16 to 18 ms and 19 MiB, so run it in a native thread."""
    return Argon2id(salt=secrets.token_bytes(16), **ARGON2).derive_phc_encoded(password.encode())


def is_password(password: str, hashed: str) -> bool:
    """Whether the password fits; a damaged hash fits nothing. As slow as `hash_password`."""
    try:
        Argon2id.verify_phc_encoded(password.encode(), hashed)
    except (InvalidKey, ValueError):
        return False
    return True


def is_weak(hashed: str) -> bool:
    """Whether the hash was made with other parameters than today's."""
    return not hashed.startswith(ARGON2_PREFIX)


def sign(secret_keys: tuple[str, ...], purpose: str, payload: Any) -> str:
    """A token for one purpose, signed with the newest key. The payload is JSON, readable by anyone."""
    return _signer(secret_keys, purpose).dumps(payload)


def unsign(secret_keys: tuple[str, ...], purpose: str, token: str, max_age: int) -> Any:
    """The payload of a token of this purpose not older than `max_age` seconds, else None."""
    try:
        return _signer(secret_keys, purpose).loads(token, max_age=max_age)
    except BadData:
        return None


def _signer(secret_keys: tuple[str, ...], purpose: str) -> URLSafeTimedSerializer:
    # itsdangerous signs with the last of the list and accepts all; ours come newest first.
    return URLSafeTimedSerializer(list(reversed(secret_keys)), salt=f"perpetuo/{purpose}/v1")
