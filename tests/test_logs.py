import csv
import io
import json
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from flask import Flask

from perpetuo import reports
from perpetuo.gateway.bodies import pack
from perpetuo.gateway.walk import Gateway
from tests.books import add_log, add_logs
from tests.people import Person

SHAPE = (
    "id created_at finished_at status http_status endpoint stream count model served_model provider "
    "provider_key_id api_key_id api_key_name end_user usage preview cost_usd latency_ms ttft_ms overhead_ms "
    "cache cached_from error attempts"
)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def listed(person: Person, query: str = "") -> list[str]:
    response = person.get(f"logs?{query}")
    assert response.status_code == 200, response.text
    return [row["id"] for row in response.get_json()["data"]]


def everything(person: Person, query: str) -> list[str]:
    """The ids of all pages, following next_cursor."""
    found, cursor = [], ""
    while cursor is not None:
        body = person.get(f"logs?{query}&cursor={cursor}").get_json()
        found += [row["id"] for row in body["data"]]
        cursor = body["next_cursor"]
    return found


def test_a_full_row_is_answered_as_promised(app: Flask, gateway: Gateway):
    person = Person(app)
    attempt = {"provider": "openai", "provider_key_id": "prov_1", "model": "gpt-5", "http_status": 200}
    add_log(
        gateway,
        person.workspace,
        created_at=NOON,
        finished_at=NOON + timedelta(microseconds=1),
        served_model="gpt-5-2026",
        **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"), 10),
        reasoning_tokens=0,
        usage_source="provider",
        cost_nano=12_345,
        latency_us=1_234_567,
        preview_prompt="hi",
        attempts=[{**attempt, "error": None, "duration_ms": 1.5}],
    )
    response = person.get("logs")
    row = response.get_json()["data"][0]
    assert " ".join(row) == SHAPE
    assert (row["created_at"], row["finished_at"]) == (
        "2026-03-01T12:00:00.000000Z",
        "2026-03-01T12:00:00.000001Z",
    )
    assert row["usage"] == {
        **dict.fromkeys(list(row["usage"])[:4], 10),
        "reasoning_tokens": 0,
        "source": "provider",
    }
    assert '"cost_usd":0.000012345,' in response.text
    assert (row["latency_ms"], row["ttft_ms"]) == (1234.567, None)
    assert row["preview"] == {"prompt": "hi", "answer": None}
    assert row["attempts"][0]["duration_ms"] == 1.5


def test_a_bare_row_has_nulls_not_zeros(app: Flask, gateway: Gateway):
    person = Person(app)
    add_log(
        gateway, person.workspace, status="refused", error_type="rate_limit_error", error_message="slow down"
    )
    row = person.get("logs").get_json()["data"][0]
    for name in ("usage", "preview", "cost_usd", "latency_ms", "provider", "cache", "cached_from"):
        assert row[name] is None
    assert row["error"] == {"type": "rate_limit_error", "code": None, "message": "slow down"}
    assert row["attempts"] == []


def test_rows_come_newest_first_and_pages_lead_both_ways(app: Flask, gateway: Gateway):
    person = Person(app)
    rows = [{"created_at": NOON + timedelta(seconds=n // 2), "id": f"req_{n}"} for n in range(7)]
    newest = add_logs(gateway, person.workspace, rows)[::-1]
    assert listed(person) == newest
    first = person.get("logs?limit=3").get_json()
    second = person.get(f"logs?limit=3&cursor={first['next_cursor']}").get_json()
    assert [row["id"] for row in second["data"]] == newest[3:6]
    back = person.get(f"logs?limit=3&cursor={second['prev_cursor']}").get_json()
    assert back["data"] == first["data"]
    assert (first["prev_cursor"], back["prev_cursor"]) == (None, None)
    assert everything(person, "limit=2") == newest


def test_the_way_back_from_an_empty_page_misses_nothing(app: Flask, gateway: Gateway):
    person = Person(app)
    rows = [{"created_at": NOON + timedelta(seconds=n), "status": "error" if n else "ok"} for n in range(3)]
    add_logs(gateway, person.workspace, rows)
    first = person.get("logs?limit=2").get_json()
    empty = person.get(f"logs?status=error&limit=2&cursor={first['next_cursor']}").get_json()
    assert (empty["data"], empty["next_cursor"]) == ([], None)
    back = person.get(f"logs?status=error&cursor={empty['prev_cursor']}").get_json()
    assert back["data"] == first["data"]


FILTERED = [
    {
        "id": "a",
        "status": "ok",
        "model": "gpt-5",
        "provider": "openai",
        "api_key_id": "key_1",
        "end_user": "u1",
    },
    {"id": "b", "status": "error", "model": "smart", "served_model": "gpt-5", "api_key_id": "key_2"},
    {"id": "c", "status": "open", "model": "claude", "provider": "anthropic", "api_key_id": "key_2"},
    {"id": "d", "status": "refused", "model": "", "api_key_id": "key_3", "end_user": "u2"},
]


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("status=ok", "a"),
        ("status=ok&status=error", "ab"),
        ("status=open", "c"),
        ("status=open&provider=openai", ""),
        ("model=gpt-5", "ab"),
        ("model=gpt-5&model=claude", "abc"),
        ("provider=anthropic&provider=openai", "ac"),
        ("api_key_id=key_2", "bc"),
        ("api_key_id=key_2&status=error", "b"),
        ("end_user=u2", "d"),
        ("end_user=u", ""),
        ("status=&model=&q=", "abcd"),
        ("colour=red", "abcd"),
    ],
)
def test_filters_narrow_the_list(app: Flask, gateway: Gateway, query: str, ids: str):
    person = Person(app)
    add_logs(gateway, person.workspace, FILTERED)
    assert sorted(listed(person, query)) == list(ids)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hello", True),
        ("HELLO wor", True),
        ("100%", True),
        ("100_", False),
        ("a_b\\c", True),
        ("a%c", False),
        ("a_b/c", False),
        ("ÄRGER", True),
        ("ärger", True),
        ("örger", False),
        ("日本", True),
        ("the answer", True),
        ("nothing", False),
    ],
)
def test_text_is_searched_literally_and_whatever_its_case(
    app: Flask, gateway: Gateway, text: str, found: bool
):
    person = Person(app)
    prompt = "Hello World, 100% a_b\\c Ärger 日本語"
    add_log(gateway, person.workspace, preview_prompt=prompt, preview_answer="The Answer")
    add_log(gateway, person.workspace)
    assert len(listed(person, f"q={quote(text)}")) == found


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ("from=2026-03-01", [0, 1, 2]),
        ("from=2026-03-02", []),
        ("to=2026-03-01T12:00:01Z", [0]),
        ("from=2026-03-01T12:00:01Z&to=2026-03-01T12:00:02Z", [1]),
        ("from=2026-03-01T13:00:01%2B01:00", [1, 2]),
        ("from=2026-03-01T13:00:01+01:00", [1, 2]),
    ],
)
def test_times_are_half_open(app: Flask, gateway: Gateway, query: str, numbers: list[int]):
    person = Person(app)
    rows = [{"id": str(n), "created_at": NOON + timedelta(seconds=n)} for n in range(3)]
    add_logs(gateway, person.workspace, rows)
    assert sorted(listed(person, query)) == [str(n) for n in numbers]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=yesterday", "from"),
        ("to=2026-02-30", "to"),
        ("from=0000-01-01", "from"),
        ("status=fine", "status"),
        ("q=" + "x" * 201, "q"),
        ("q=%00", "q"),
        ("model=a%00", "model"),
        ("cursor=x", "cursor"),
        ("limit=201", "limit"),
    ],
)
def test_a_bad_filter_is_refused(app: Flask, query: str, param: str):
    response = Person(app).get(f"logs?{query}")
    assert (response.status_code, response.get_json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("query", ["q=needle", "q=n%C3%A4del", "model=needle"])
def test_a_filter_that_reads_too_much_stops_and_goes_on(
    app: Flask, gateway: Gateway, monkeypatch, query: str
):
    monkeypatch.setattr(reports, "SCAN", 10)
    person = Person(app)
    rows = [{"created_at": NOON + timedelta(seconds=n), "id": f"req_{n:02}"} for n in range(35)]
    for number in (2, 3, 33):
        rows[number] |= {"preview_prompt": "needle Nädel", "model": "needle"}
    add_logs(gateway, person.workspace, rows)
    first = person.get(f"logs?{query}").get_json()
    assert [row["id"] for row in first["data"]] == ["req_33"]
    second = person.get(f"logs?{query}&cursor={first['next_cursor']}").get_json()
    assert second["data"] == []
    assert second["next_cursor"]
    assert everything(person, query) == ["req_33", "req_03", "req_02"]
    back = person.get(f"logs?{query}&cursor={second['prev_cursor']}").get_json()
    assert back["data"] == first["data"]


def test_what_is_in_flight_is_found_behind_many_rows(app: Flask, gateway: Gateway, monkeypatch):
    monkeypatch.setattr(reports, "SCAN", 10)
    person = Person(app)
    rows = [{"created_at": NOON + timedelta(seconds=n), "id": f"req_{n:02}"} for n in range(30)]
    rows[0]["status"] = "open"
    add_logs(gateway, person.workspace, rows)
    assert listed(person, "status=open") == ["req_00"]
    assert listed(person, "status=open&model=gpt-5") == ["req_00"]


def test_lists_never_touch_the_bodies(app: Flask, gateway: Gateway):
    person = Person(app)
    add_log(gateway, person.workspace, request_body=pack(b"{}"), preview_prompt="x")
    statements = []
    for engine in {gateway.database.reader, gateway.database.long_reader}:
        sa.event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    for path in ("logs", "logs?q=x", "logs.csv", "logs.jsonl"):
        assert person.get(path).status_code == 200
    assert any("request_logs" in statement for statement in statements)
    assert not any("_body" in statement for statement in statements)


def test_the_single_row_has_bodies_and_arithmetic(app: Flask, gateway: Gateway):
    person = Person(app)
    body = {"model": "gpt-5", "messages": [{"role": "user", "content": "x" * 2000}]}
    id = add_log(
        gateway, person.workspace, request_body=pack(json.dumps(body).encode()), response_body=pack(b'"a"')
    )
    row = person.get(f"logs/{id}").get_json()
    assert " ".join(row) == SHAPE + " request response cost checks"
    assert (row["request"], row["response"], row["cost"], row["checks"]) == (body, "a", [], [])


def test_a_body_beyond_its_cap_says_so(app: Flask, gateway: Gateway):
    person = Person(app)
    id = add_log(gateway, person.workspace, request_body=pack(b'"' + b"x" * 300_000 + b'"'))
    row = person.get(f"logs/{id}").get_json()
    assert (row["request"]["truncated"], row["request"]["bytes"], row["response"]) == (True, 300_002, None)


@pytest.mark.parametrize(
    "body", [rb'{"a": "\ud800", "\ud801": "\u0000"}', b'{"a": 123456789012345678901234567890}']
)
def test_odd_json_in_a_body_is_answered_all_the_same(app: Flask, gateway: Gateway, body: bytes):
    person = Person(app)
    id = add_log(gateway, person.workspace, request_body=pack(body), cost_nano=1)
    response = person.get(f"logs/{id}")
    assert response.status_code == 200
    assert response.get_json()["request"].keys() == json.loads(body).keys()


def test_the_arithmetic_of_a_cost_is_exact(app: Flask, gateway: Gateway):
    person = Person(app)
    price = {"source": "override", "input": "2.5", "cached_input": "0", "cache_write": "3", "output": "1E-9"}
    counts = {"prompt_tokens": 3, "cached_tokens": 1, "completion_tokens": 5, "usage_source": "provider"}
    id = add_log(gateway, person.workspace, price=price, cost_nano=5000, **counts)
    response = person.get(f"logs/{id}")
    assert response.get_json()["cost"] == [
        {"class": "input", "tokens": 2, "usd_per_million": 2.5, "usd": 0.000005},
        {"class": "cached_input", "tokens": 1, "usd_per_million": 0, "usd": 0},
        {"class": "output", "tokens": 5, "usd_per_million": 1e-9, "usd": 0},
    ]
    assert '"usd_per_million":0.000000001,' in response.text
    assert "price" not in response.get_json()


@pytest.mark.parametrize("id", ["nothing", "%00", "%ED%A0%80", "x" * 5000])
def test_a_row_that_is_not_there_is_404(app: Flask, id: str):
    assert Person(app).get(f"logs/{id}").status_code == 404


def test_csv_is_an_attachment_with_a_header_row(app: Flask, gateway: Gateway):
    person = Person(app)
    add_log(gateway, person.workspace, created_at=NOON, cost_nano=1, preview_prompt='a,"b"\r\nc', stream=True)
    response = person.get("logs.csv")
    assert response.headers["Content-Disposition"] == 'attachment; filename="logs.csv"'
    assert response.mimetype == "text/csv"
    (row,) = csv.DictReader(io.StringIO(response.text, newline=""))
    assert row["created_at"] == "2026-03-01T12:00:00.000000Z"
    assert (row["cost_usd"], row["preview.prompt"], row["stream"]) == ("0.000000001", 'a,"b"\r\nc', "true")
    assert response.text.count("\r\n") == 3


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_csv_holds_no_formula(app: Flask, gateway: Gateway, text: str):
    person = Person(app)
    add_log(gateway, person.workspace, preview_prompt=text, end_user=text, model=text, error_message=text)
    (row,) = csv.DictReader(io.StringIO(person.get("logs.csv").text, newline=""))
    cells = [row[name] for name in ("preview.prompt", "end_user", "model", "error.message")]
    assert cells == [f"'{text}"] * 4


def test_exports_stream_all_rows_that_match(app: Flask, gateway: Gateway, monkeypatch):
    monkeypatch.setattr(reports, "EXPORT_BATCH", 3)
    person = Person(app)
    rows = [
        {"created_at": NOON + timedelta(seconds=n), "status": "error" if n % 2 else "ok"} for n in range(10)
    ]
    ids = add_logs(gateway, person.workspace, rows)
    lines = person.get("logs.jsonl?status=ok").text.splitlines()
    assert [json.loads(line)["id"] for line in lines] == ids[::-1][1::2]
    assert json.loads(lines[0]) == person.get("logs?status=ok&limit=1").get_json()["data"][0]
    assert len(list(csv.reader(io.StringIO(person.get("logs.csv").text)))) == 11


def test_an_export_refuses_a_bad_filter_before_it_begins(app: Flask):
    for path in ("logs.csv", "logs.jsonl"):
        assert Person(app).get(f"{path}?status=fine").status_code == 400
