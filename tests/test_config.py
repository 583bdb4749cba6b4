import base64
import multiprocessing
import os
import re
import stat

import pytest

from perpetuo.config import ROOT, SettingsError, load
from perpetuo.made_secrets import fresh

KEY = "3q9vYkR7cWm2ZsXf8TbLh5DnJp4GxQaE"
SEALING = base64.b64encode(bytes(range(32))).decode()
PRODUCTION = {
    "PERPETUO_ENV": "production",
    "PUBLIC_URL": "https://gateway.example.com",
    "SECRET_KEY": KEY,
    "ENCRYPTION_KEYS": f"k1:{SEALING}",
    "DATABASE_URL": "postgresql://user:dbword@db/perpetuo",
}


def faults(environ):
    with pytest.raises(SettingsError) as refused:
        load(environ)
    return refused.value.faults


@pytest.fixture
def local(tmp_path):
    return {"PERPETUO_DATA": str(tmp_path)}


def test_the_defaults_are_those_of_the_contract(local, tmp_path):
    settings = load({**local, "PORT": "9000"})
    assert (settings.env, settings.host, settings.port, settings.web_concurrency) == (
        "local",
        "127.0.0.1",
        9000,
        2,
    )
    assert settings.public_url == "http://localhost:9000"
    assert settings.database_url.database == str(tmp_path / "perpetuo.db")
    assert (settings.signup, settings.max_body_bytes, settings.max_in_flight) == ("open", 20971520, 2000)
    timeouts = (
        settings.connect_timeout,
        settings.first_byte_timeout,
        settings.idle_timeout,
        settings.total_timeout,
    )
    assert timeouts == (5, 120, 120, 900)
    assert (settings.budget_wait, settings.orphan_grace, settings.drain_timeout) == (5, 0, 20)
    assert (settings.cors_origins, settings.metrics_token) == (frozenset(), None)


def test_production_has_defaults_of_its_own():
    settings = load(PRODUCTION)
    assert (settings.host, settings.signup, settings.orphan_grace) == ("0.0.0.0", "first", 30)
    assert (settings.is_https, settings.public_host) == (True, "gateway.example.com")
    assert settings.upstream_allow_networks == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("PORT", value) for value in ("x", "0", "-1", "8000.5", "1e999")),
        *(("WEB_CONCURRENCY", value) for value in ("0", "two")),
        *(("PERPETUO_MAX_BODY_BYTES", value) for value in ("20MB", "10", "-1")),
        ("PERPETUO_MAX_IN_FLIGHT", "0"),
        *(("PERPETUO_CONNECT_TIMEOUT", value) for value in ("0", "-1", "nan", "inf", "five")),
        ("PERPETUO_FIRST_BYTE_TIMEOUT", "x"),
        ("PERPETUO_IDLE_TIMEOUT", "0"),
        ("PERPETUO_TOTAL_TIMEOUT", """ "5" """),
        ("PERPETUO_BUDGET_WAIT", "-1"),
        ("PERPETUO_ORPHAN_GRACE", "x"),
        ("PERPETUO_DRAIN_TIMEOUT", "NaN"),
        ("PERPETUO_SIGNUP", "maybe"),
        ("PERPETUO_ENV", "staging"),
        *(
            ("PUBLIC_URL", value)
            for value in ("gateway", "ftp://x", "http://x/path", "http://user@x", "https://")
        ),
        *(
            ("DATABASE_URL", value)
            for value in ("mysql://x/y", "nonsense", "sqlite://", "sqlite:///:memory:")
        ),
        *(("PERPETUO_UPSTREAM_ALLOW", value) for value in ("10.0.0.0/99", "http://x", "::1::")),
        *(("ENCRYPTION_KEYS", value) for value in ("k1", "k1:short", "k1:!!!!", f":{SEALING}")),
        ("ENCRYPTION_KEYS", f"k1:{SEALING},k1:{base64.b64encode(b'y' * 32).decode()}"),
    ],
)
def test_a_wrong_setting_is_named(local, name, value):
    (fault,) = faults({**local, "SECRET_KEY": KEY, "ENCRYPTION_KEYS": f"k1:{SEALING}", name: value})
    assert name in fault


def test_all_faults_are_reported_together(local):
    wrong = {
        "PORT": "x",
        "PERPETUO_SIGNUP": "maybe",
        "PERPETUO_IDLE_TIMEOUT": "0",
        "DATABASE_URL": "mysql://x",
    }
    found = faults({**local, **wrong})
    assert len(found) == 4
    assert all(any(name in fault for fault in found) for name in wrong)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"SECRET_KEY": ""}, "SECRET_KEY"),
        ({"ENCRYPTION_KEYS": ""}, "ENCRYPTION_KEYS"),
        ({"PUBLIC_URL": ""}, "PUBLIC_URL"),
        ({"SECRET_KEY": KEY[:31]}, "SECRET_KEY"),
        ({"SECRET_KEY": f"{KEY},short"}, "SECRET_KEY"),
        ({"SECRET_KEY": "a" * 40}, "SECRET_KEY"),
        ({"SECRET_KEY": "change-me-" + KEY}, "SECRET_KEY"),
        ({"SECRET_KEY": "your-secret-key-here-0123456789abcdef"}, "SECRET_KEY"),
        ({"SECRET_KEY": f"{KEY},{KEY}"}, "SECRET_KEY"),
        ({"SECRET_KEY": SEALING}, "SECRET_KEY"),
        ({"ENCRYPTION_KEYS": f"k1:{base64.b64encode(bytes(32)).decode()}"}, "ENCRYPTION_KEYS"),
        ({"ENCRYPTION_KEYS": f"k1:{SEALING},k2:{SEALING}"}, "ENCRYPTION_KEYS"),
        ({"PERPETUO_METRICS_TOKEN": "short"}, "PERPETUO_METRICS_TOKEN"),
        ({"PERPETUO_METRICS_TOKEN": KEY}, "PERPETUO_METRICS_TOKEN"),
    ],
)
def test_production_refuses_what_is_not_safe(change, named):
    assert any(named in fault for fault in faults({**PRODUCTION, **change}))


def test_production_takes_nothing_for_granted_and_says_all_of_it(tmp_path):
    found = faults({"PERPETUO_ENV": "production", "PERPETUO_DATA": str(tmp_path)})
    assert [fault.split()[0] for fault in found] == ["PUBLIC_URL", "SECRET_KEY", "ENCRYPTION_KEYS"]
    assert list(tmp_path.iterdir()) == []


def test_no_message_holds_a_secret(local):
    secret = "3q9vYkR7cWm2"  # too short, so it is complained of
    environ = {
        **PRODUCTION,
        "SECRET_KEY": f"{secret},{secret}",
        "ENCRYPTION_KEYS": f"k1:{secret}",
        "PERPETUO_METRICS_TOKEN": secret,
        "DATABASE_URL": f"mysql://user:{secret}@db/x",
        "PORT": secret,
        "PUBLIC_URL": f"https://user:{secret}@x",
    }
    with pytest.raises(SettingsError) as refused:
        load(environ)
    assert len(refused.value.faults) >= 6
    assert secret not in str(refused.value)


def test_settings_do_not_print_what_they_hold():
    assert KEY not in repr(load(PRODUCTION)) + str(load(PRODUCTION))


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_every_usual_name_of_postgresql_is_understood(local, scheme):
    url = load({**local, "DATABASE_URL": f"{scheme}://u:p@db:5433/x?sslmode=require"}).database_url
    assert (url.drivername, url.host, url.port, url.database) == ("postgresql+psycopg2", "db", 5433, "x")
    assert url.query == {"sslmode": "require"}


def test_a_socket_folder_is_understood(local):
    url = load({**local, "DATABASE_URL": "postgresql:///x?host=/run/postgresql"}).database_url
    assert url.query == {"host": "/run/postgresql"}
    assert load({**local, "DATABASE_URL": "postgresql:///x"}).orphan_grace == 30


def test_a_dotenv_file_counts_in_local_mode_and_beneath_the_environment(local, tmp_path):
    dotenv = tmp_path / ".env"
    dotenv.write_text("PORT=7000\nPERPETUO_SIGNUP=closed\n")
    settings = load({**local, "PORT": "7001"}, dotenv)
    assert (settings.port, settings.signup) == (7001, "closed")
    assert load({**PRODUCTION}, dotenv).signup == "first"


def test_lists_are_split_at_commas(local):
    environ = {"SECRET_KEY": f"{KEY}, {KEY[::-1]} ,", "PERPETUO_CORS_ORIGINS": "https://a.com, https://b.com"}
    settings = load({**local, **environ})
    assert settings.secret_keys == (KEY, KEY[::-1])
    assert settings.cors_origins == {"https://a.com", "https://b.com"}


def test_local_secrets_are_made_once_and_kept_private(local, tmp_path):
    first, second = load(local), load(local)
    assert first.secret_keys == second.secret_keys
    assert first.encryption_keys == second.encryption_keys
    assert len(first.secret_keys[0]) >= 32
    assert stat.S_IMODE((tmp_path / "secrets.env").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secrets.env"]


def test_given_secrets_make_none(local, tmp_path):
    load({**local, "SECRET_KEY": KEY, "ENCRYPTION_KEYS": f"k1:{SEALING}"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "SECRET_KEY=x\n", "ENCRYPTION_KEYS=k1:broken\nSECRET_KEY=x\n"])
def test_damaged_secrets_are_never_replaced(local, tmp_path, text):
    path = tmp_path / "secrets.env"
    path.write_text(text)
    assert any("damaged" in fault for fault in faults(local))
    assert path.read_text() == text


def test_a_data_folder_that_cannot_be_made_is_a_fault(tmp_path):
    (tmp_path / "file").write_text("")
    assert any("PERPETUO_DATA" in fault for fault in faults({"PERPETUO_DATA": str(tmp_path / "file" / "x")}))


def race(folder, barrier, results):
    barrier.wait()
    settings = load({"PERPETUO_DATA": folder})
    results.put((settings.secret_keys, settings.encryption_keys))


def test_processes_that_start_together_have_the_same_secrets(tmp_path):
    context = multiprocessing.get_context("forkserver")
    barrier, results = context.Barrier(4), context.Queue()
    racing = [context.Process(target=race, args=(str(tmp_path / "new"), barrier, results)) for _ in range(4)]
    for process in racing:
        process.start()
    found = {results.get(timeout=60) for _ in racing}
    for process in racing:
        process.join()
    results.close()
    results.join_thread()
    assert len(found) == 1
    assert os.listdir(tmp_path / "new") == ["secrets.env"]


def test_fresh_secrets_are_good_enough_for_production():
    assert load({**PRODUCTION, **fresh()}).is_production
    assert fresh() != fresh()


def test_what_is_shipped_runs_in_production_and_stops_after_its_drain():
    compose = (ROOT / "docker-compose.yml").read_text()
    grace = int(re.search(r"stop_grace_period: (\d+)s", compose)[1])
    assert grace > load(PRODUCTION).drain_timeout + 5 + 5  # gunicorn's keep-alive and its own margin
    for name in ("Procfile", "Dockerfile"):
        assert "PERPETUO_ENV=production" in (ROOT / name).read_text()
