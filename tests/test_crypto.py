import base64
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetuo import crypto
from perpetuo.crypto import KeyRing, Unreadable

OLD, NEW = ("old", bytes(range(32))), ("new", bytes(range(32, 64)))
PLACE = ("provider_key", "ws_1", "prov_1", "https://api.openai.com/v1")


@pytest.fixture
def ring():
    return KeyRing((NEW, OLD))


def test_what_is_sealed_opens_in_its_place(ring):
    for secret in ("", "sk-1", "ünï 🎉" * 1000):
        assert ring.open(ring.seal(secret, *PLACE), *PLACE) == secret


def test_a_sealed_text_tells_nothing_and_is_never_the_same(ring):
    first, second = ring.seal("sk-very-secret", *PLACE), ring.seal("sk-very-secret", *PLACE)
    assert first != second
    assert b"very" not in base64.b64decode(first.rsplit(".", 1)[1])
    assert crypto.key_id(first) == "new"


@pytest.mark.parametrize("changed", range(len(PLACE)))
def test_a_sealed_text_opens_nowhere_else(ring, changed):
    sealed = ring.seal("sk-1", *PLACE)
    elsewhere = [part + "x" if index == changed else part for index, part in enumerate(PLACE)]
    with pytest.raises(Unreadable):
        ring.open(sealed, *elsewhere)


def test_the_parts_of_a_place_do_not_run_into_each_other(ring):
    with pytest.raises(Unreadable):
        ring.open(ring.seal("sk-1", "ab", "c"), "a", "bc")


def test_an_old_key_still_reads_and_the_newest_writes(ring):
    sealed = KeyRing((OLD,)).seal("sk-1", *PLACE)
    assert ring.open(sealed, *PLACE) == "sk-1"
    assert crypto.key_id(ring.seal("sk-1", *PLACE)) == "new"
    with pytest.raises(Unreadable):
        KeyRing((NEW,)).open(sealed, *PLACE)


def test_the_same_id_with_another_key_opens_nothing(ring):
    sealed = ring.seal("sk-1", *PLACE)
    with pytest.raises(Unreadable):
        KeyRing((("new", bytes(32)),)).open(sealed, *PLACE)


def test_damage_anywhere_is_noticed(ring):
    sealed = ring.seal("sk-1", *PLACE)
    head, _, text = sealed.rpartition(".")
    blob = bytearray(base64.b64decode(text))
    for position in range(len(blob)):
        damaged = bytes(blob[:position]) + bytes([blob[position] ^ 1]) + bytes(blob[position + 1 :])
        with pytest.raises(Unreadable):
            ring.open(f"{head}.{base64.b64encode(damaged).decode()}", *PLACE)


@given(st.text(max_size=60) | st.text("v1.new=AB", max_size=20))
def test_nonsense_is_unreadable_and_nothing_else(text):
    with pytest.raises(Unreadable):
        KeyRing((NEW,)).open(text, *PLACE)


def test_a_key_id_may_hold_dots():
    ring = KeyRing((("2026.08", NEW[1]),))
    assert ring.open(ring.seal("sk-1"), *()) == "sk-1"


def test_an_api_key_has_the_published_form():
    key = crypto.new_api_key()
    assert key.startswith("pk_")
    assert len(key) == 3 + 43 + 6
    assert set(key[3:]) <= set(string.ascii_letters + string.digits)
    assert crypto.is_api_key(key)
    assert len({crypto.new_api_key() for _ in range(100)}) == 100


def test_one_wrong_character_is_no_api_key():
    key = crypto.new_api_key()
    for position in range(3, len(key)):
        for other in "0aZ":
            if other != key[position]:
                assert not crypto.is_api_key(key[:position] + other + key[position + 1 :])


@pytest.mark.parametrize("change", [str.upper, str.strip, lambda key: key[:-1], lambda key: key + "0"])
def test_another_form_is_no_api_key(change):
    key = crypto.new_api_key()
    assert crypto.is_api_key(change(key)) is (change(key) == key)
    assert not crypto.is_api_key(f"{key}\n")
    assert not crypto.is_api_key(key.replace("pk_", "sk_"))


@given(st.text(max_size=80))
def test_no_text_breaks_the_check_of_an_api_key(text):
    assert not crypto.is_api_key(text)


def test_the_hash_of_an_api_key_is_sha_256():
    assert crypto.hash_api_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_password_fits_its_own_hash_only():
    hashed = crypto.hash_password("correct horse 🎉")
    assert crypto.is_password("correct horse 🎉", hashed)
    assert not crypto.is_password("correct horse", hashed)
    assert hashed.startswith(crypto.ARGON2_PREFIX)
    assert hashed != crypto.hash_password("correct horse 🎉")
    assert len(hashed) <= 200


@pytest.mark.parametrize("hashed", ["", "-", "x" * 200, "$argon2id$v=19$m=19456,t=2,p=1$", "$2b$12$abc"])
def test_a_damaged_hash_fits_nothing(hashed):
    assert not crypto.is_password("", hashed)


def test_a_hash_of_other_parameters_is_weak():
    assert not crypto.is_weak(crypto.hash_password("x"))
    assert crypto.is_weak("$argon2id$v=19$m=4096,t=1,p=1$c2FsdA$aGFzaA")


def test_a_token_is_for_one_purpose_and_one_time():
    token = crypto.sign(("key",), "access", ["usr_1", 3])
    assert crypto.unsign(("key",), "access", token, 60) == ["usr_1", 3]
    assert crypto.unsign(("key",), "reset", token, 60) is None
    assert crypto.unsign(("other",), "access", token, 60) is None
    assert crypto.unsign(("key",), "access", token, -1) is None
    assert crypto.unsign(("key",), "access", f"{token}x", 60) is None
    assert crypto.unsign(("key",), "access", "", 60) is None


def test_signing_keys_rotate_without_ending_tokens():
    old = crypto.sign(("old",), "access", 1)
    assert crypto.unsign(("new", "old"), "access", old, 60) == 1
    new = crypto.sign(("new", "old"), "access", 1)
    assert crypto.unsign(("new",), "access", new, 60) == 1
    assert crypto.unsign(("old",), "access", new, 60) is None
