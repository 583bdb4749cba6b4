import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from perpetuo.config import ROOT
from perpetuo.crypto import KeyRing
from perpetuo.gateway.ledger import Ledger
from perpetuo.models import ProviderKey, RequestLog, UsageCounter, Workspace
from tests.gateway.test_ledger import CALLER, OK, OPENING, die
from tests.tenants import new_tenant


@pytest.fixture
def run(app):
    runner = app.test_cli_runner()
    return lambda *words: runner.invoke(args=words)


def flask(*words, **environ):
    command = [sys.executable, "-m", "flask", "--app", "wsgi", *words]
    environ = {"PATH": os.environ["PATH"], "PERPETUO_ENV": "production", **environ}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)


def test_secrets_are_printed_even_before_there_are_any():
    printed = flask("secrets").stdout
    assert [line.partition("=")[0] for line in printed.split()] == ["SECRET_KEY", "ENCRYPTION_KEYS"]


def test_any_other_command_names_the_faults():
    ran = flask("doctor")
    assert ran.returncode == 1
    assert "PUBLIC_URL must be set" in ran.stderr
    assert "SECRET_KEY must be set" in ran.stderr


def test_migrating_a_database_that_is_away_says_so_in_a_sentence(tmp_path):
    away = "postgresql://nobody@127.0.0.1:1/none"
    ran = flask("db", "upgrade", PERPETUO_ENV="local", PERPETUO_DATA=str(tmp_path), DATABASE_URL=away)
    assert ran.returncode == 1
    assert ran.stderr.strip() == "The database cannot be reached; try again in a moment."


def test_an_operator_adds_a_user_and_sets_a_password(run, client):
    added = run("user", "add", "ann@example.com", "--password", "first password")
    changed = run("user", "password", "ann@example.com", "--password", "second password")
    again = run("user", "add", "ann@example.com", "--password", "third password")
    assert (added.exit_code, changed.exit_code, again.exit_code) == (0, 0, 1)
    login = {"email": "ann@example.com", "password": "second password"}
    assert client.post("/auth/login", json=login).status_code == 200


def test_doctor_finds_a_lost_encryption_key(run, app, gateway):
    tenant = new_tenant(gateway)
    tenant.add_provider_key("https://api.openai.com/v1")
    assert run("doctor").exit_code == 0
    gateway.database.transaction(
        lambda c: c.execute(sa.text("update provider_keys set workspace_id = workspace_id, id = 'moved'"))
    )
    found = run("doctor")
    assert found.exit_code == 1
    assert "opens none" in found.output + found.stderr


def test_doctor_names_a_key_that_is_no_longer_listed(run, gateway):
    new_tenant(gateway).add_provider_key("https://api.openai.com/v1")
    gateway.database.transaction(
        lambda c: c.execute(sa.text("update provider_keys set sealed = 'v1.old.AAAA'"))
    )
    found = run("doctor")
    assert found.exit_code == 1
    assert "lacks the key 'old': 1 stored" in found.output + found.stderr


def test_sweep_settles_the_orphans(run, gateway):
    dead = Ledger(gateway.database)
    dead.ensure_open(dead.open(CALLER, OPENING))
    die(dead)
    assert run("sweep").output == "1 calls were settled as interrupted.\n"
    assert run("sweep").output == "0 calls were settled as interrupted.\n"


def test_audit_finds_what_is_off_by_one(run, gateway):
    ledger = Ledger(gateway.database)
    ledger.settle(ledger.open(CALLER, OPENING), dict(OK))
    ledger.close()
    assert run("audit").output == "0 differences.\n"
    change = sa.update(UsageCounter).values(total_tokens=UsageCounter.__table__.c.total_tokens + 1)
    gateway.database.transaction(lambda connection: connection.execute(change))
    found = run("audit")
    assert found.exit_code == 1
    assert "total_tokens is 13, rows say 12" in found.output


def test_prune_deletes_old_rows_and_leaves_the_books_agreeing(run, gateway):
    tenant = new_tenant(gateway, retention_days=30)
    ledger = Ledger(gateway.database)
    for days in (0, 29, 31, 400):
        values = {**OPENING, "workspace_id": tenant.workspace_id, "created_at": days_ago(days)}
        ledger.settle(ledger.open(CALLER, values), dict(OK))
    ledger.close()
    assert run("prune").output == "2 log rows were deleted.\n"
    count = sa.select(sa.func.count()).select_from(RequestLog)
    assert gateway.database.read(lambda connection: connection.execute(count).scalar()) == 2
    assert run("audit").output == "0 differences.\n"
    workspace = gateway.database.save(lambda session: session.get(Workspace, tenant.workspace_id))
    assert workspace.pruned_before is not None


def test_prune_takes_what_a_deleted_workspace_left_behind(run, gateway):
    ledger = Ledger(gateway.database)
    ledger.settle(ledger.open(CALLER, OPENING), dict(OK))  # its workspace was never there
    ledger.close()
    assert run("prune").output == "1 log rows were deleted.\n"
    count = sa.select(sa.func.count()).select_from(UsageCounter)
    assert gateway.database.read(lambda connection: connection.execute(count).scalar()) == 0


def days_ago(days):
    return datetime.now(UTC) - timedelta(days=days)


def test_rekey_seals_under_the_newest_key_what_older_ones_had_sealed(run, app, gateway, monkeypatch):
    tenant = new_tenant(gateway)
    ids = [tenant.add_provider_key("https://api.openai.com/v1", f"sk-{n}") for n in range(3)]
    old = gateway.settings.encryption_keys
    monkeypatch.setattr(gateway, "ring", KeyRing((("new", b"n" * 32), *old)))
    assert run("rekey").output == "3 provider keys are sealed anew under 'new'.\n"
    assert run("rekey").output == "0 provider keys are sealed anew under 'new'.\n"
    alone = KeyRing((("new", b"n" * 32),))
    stored = gateway.database.read(
        lambda c: dict(iter(c.execute(sa.select(ProviderKey.id, ProviderKey.sealed))))
    )
    opened = [
        alone.open(stored[id], "provider_key", tenant.workspace_id, id, "https://api.openai.com/v1")
        for id in ids
    ]
    assert opened == ["sk-0", "sk-1", "sk-2"]


def test_rekey_names_what_no_key_opens(run, gateway):
    lost = new_tenant(gateway).add_provider_key("https://api.openai.com/v1")
    gateway.database.transaction(
        lambda c: c.execute(sa.text("update provider_keys set sealed = 'v1.old.AAAA'"))
    )
    found = run("rekey")
    assert found.exit_code == 1
    assert lost in found.output + found.stderr
