from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from perpetuo import crypto
from perpetuo.errors import Unauthenticated
from perpetuo.gateway import access as access_module
from perpetuo.gateway.access import Access
from perpetuo.models import ApiKey, Workspace

PROMISED_SECONDS = 1.0


class Clock:
    """A clock that the test moves."""

    def __init__(self, moment):
        self.moment = moment

    def __call__(self):
        return self.moment

    def pass_seconds(self, seconds):
        self.moment += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(access_module.monotonic())
    monkeypatch.setattr(access_module, "monotonic", clock)
    return clock


@pytest.fixture
def queries(gateway):
    """The statements that the read pool has run."""
    seen = []

    def note(connection, cursor, statement, *_):
        seen.append(statement)

    sa.event.listen(gateway.database.reader, "before_cursor_execute", note)
    yield seen
    sa.event.remove(gateway.database.reader, "before_cursor_execute", note)


@pytest.fixture
def access(gateway):
    return Access(gateway.database)


def is_refused(access, header):
    with pytest.raises(Unauthenticated) as refused:
        access.authenticate(header)
    return refused.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", "Bearer", "Bearer ", "Bearer pk_short", "Basic x", "Bearer " + "pk_" + "0" * 49),
        *(
            "pk_" + "0" * 49,
            "Bearer pk_" + "0" * 100_000,
            "Bearer sk-" + "a" * 48,
            "Bearer \x00",
            "Bearer pk_é",
        ),
    ],
)
def test_a_malformed_key_costs_no_query(access, queries, header):
    assert is_refused(access, header)
    assert queries == []


def test_a_key_with_a_wrong_checksum_costs_no_query(access, tenant, queries):
    swapped = tenant.key[:4] + ("a" if tenant.key[4] != "a" else "b") + tenant.key[5:]
    assert is_refused(access, f"Bearer {swapped}")
    assert queries == []


def test_a_known_key_costs_one_query_and_then_none(access, tenant, queries):
    callers = [access.authenticate(f"Bearer {tenant.key}") for _ in range(5)]
    assert len(queries) == 1
    assert {caller.api_key_id for caller in callers} == {tenant.api_key_id}
    assert callers[0].workspace_id == tenant.workspace_id


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_scheme_is_written_as_one_likes(access, tenant, scheme):
    assert access.authenticate(f"{scheme} {tenant.key} ").api_key_id == tenant.api_key_id


def test_an_unknown_key_is_asked_for_each_time(access, queries):
    header = f"Bearer {crypto.new_api_key()}"
    assert is_refused(access, header)
    assert is_refused(access, header)
    assert len(queries) == 2


def test_a_revoked_key_is_refused_within_a_second(access, clock, tenant):
    header = f"Bearer {tenant.key}"
    access.authenticate(header)
    tenant.change(ApiKey, tenant.api_key_id, revoked_at=datetime.now(UTC))
    clock.pass_seconds(PROMISED_SECONDS - 0.01)
    assert is_refused(access, header)
    assert is_refused(access, header)


def test_while_one_request_reads_anew_the_others_go_on(access, clock, tenant, queries):
    header = f"Bearer {tenant.key}"
    access.authenticate(header)
    clock.pass_seconds(access_module.FRESH_SECONDS + 0.01)
    read = access._read
    others = []
    access._read = lambda *given: (others.append(access.authenticate(header)), read(*given))[1]
    access.authenticate(header)
    assert len(others) == 1
    assert len(queries) == 2


def test_even_the_others_do_not_go_on_for_more_than_a_second(access, clock, tenant):
    header = f"Bearer {tenant.key}"
    access.authenticate(header)
    clock.pass_seconds(access_module.FRESH_SECONDS + 0.01)
    tenant.change(ApiKey, tenant.api_key_id, revoked_at=datetime.now(UTC))
    access._read = lambda *given: None  # the one that reads anew takes its time
    access.authenticate(header)
    del access._read
    clock.pass_seconds(PROMISED_SECONDS - access_module.FRESH_SECONDS - 0.02)
    assert is_refused(access, header)


def test_the_clock_starts_before_the_read(access, clock, tenant):
    header = f"Bearer {tenant.key}"
    read = access._database.read

    def slow_read(work):
        result = read(work)
        clock.pass_seconds(0.9)
        return result

    access._database.read = slow_read
    try:
        access.authenticate(header)
    finally:
        access._database.read = read
    tenant.change(ApiKey, tenant.api_key_id, revoked_at=datetime.now(UTC))
    clock.pass_seconds(PROMISED_SECONDS - 0.9)
    assert is_refused(access, header)


def test_an_expiring_key_is_known_no_longer_than_it_lives(access, clock, tenant, queries):
    tenant.change(ApiKey, tenant.api_key_id, expires_at=datetime.now(UTC) + timedelta(seconds=0.5))
    header = f"Bearer {tenant.key}"
    access.authenticate(header)
    clock.pass_seconds(0.51)
    while True:  # the database has a clock of its own
        try:
            access.authenticate(header)
        except Unauthenticated:
            break
        clock.pass_seconds(0.51)
    assert len(queries) >= 2


def test_an_expired_key_is_refused(access, tenant):
    tenant.change(ApiKey, tenant.api_key_id, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert is_refused(access, f"Bearer {tenant.key}")


def test_what_the_key_and_its_workspace_say_comes_along(access, clock, tenant):
    header = f"Bearer {tenant.key}"
    assert access.authenticate(header).models is None
    tenant.change(ApiKey, tenant.api_key_id, models=["gpt-*"], name="laptop")
    tenant.change(Workspace, tenant.workspace_id, log_bodies=False)
    clock.pass_seconds(PROMISED_SECONDS)
    caller = access.authenticate(header)
    assert (caller.models, caller.api_key_name, caller.log_bodies) == (("gpt-*",), "laptop", False)
    assert caller.config_version > 1


def test_a_deleted_workspace_takes_its_keys_along(access, clock, gateway, tenant):
    header = f"Bearer {tenant.key}"
    access.authenticate(header)
    gateway.database.save(lambda session: session.delete(session.get(Workspace, tenant.workspace_id)))
    clock.pass_seconds(PROMISED_SECONDS)
    assert is_refused(access, header)


def test_the_memory_for_keys_is_bounded(access, tenant, monkeypatch):
    monkeypatch.setattr(access_module, "KEPT", 3)
    for _ in range(10):
        access.authenticate(f"Bearer {tenant.add_api_key()}")
    assert len(access._known) <= 3
