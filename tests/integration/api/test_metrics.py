"""``GET /metrics`` of the API: live rows and ended tasks out of the ledger, requests out of the process."""

from __future__ import annotations

import datetime as dt
import json
import logging
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from prometheus_client.parser import text_string_to_metric_families

from genpulse.ledger import measures
from genpulse.ledger.tables import tasks
from genpulse.telemetry import metrics
from tests.integration.api.conftest import Api

LABELS = {
    "queue", "status", "consuming", "server", "task_type", "error_code", "method", "route", "work", "outcome", "le",
}  # fmt: skip


def scrape(api: Api, **headers: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by its name and labels."""
    answer = api.client.get("/metrics", headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.content_type == metrics.CONTENT_TYPE
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(found: Any, name: str, **labels: str) -> float:
    """One sample; 0 if it was never counted."""
    return float(found.get((name, frozenset(labels.items())), 0.0))


@pytest.fixture(autouse=True)
def _from_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """No task of another test counts; ends count at once."""
    monkeypatch.setattr(metrics, "_bookmark", metrics.Bookmark())
    monkeypatch.setattr(measures, "_SETTLED_S", 0.0)


def test_live_tasks_are_counted_by_queue_and_age(api: Api) -> None:
    """Depth, state and the age of the oldest are those of the rows that are not final."""
    for _ in range(3):
        api.submit()
    api.claim(api.submit()["task_id"])
    api.complete(api.submit()["task_id"])
    oldest = api.submit()["task_id"]
    with api.service.ledger.engine.begin() as connection:
        then = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=90)
        connection.execute(sa.update(tasks).where(tasks.c.id == oldest).values(created_at=then))

    found = scrape(api)

    assert value(found, "genpulse_queue_tasks", queue="cpu", status="pending") == 4
    assert value(found, "genpulse_queue_tasks", queue="cpu", status="processing") == 1
    assert 85 < value(found, "genpulse_queue_oldest_seconds", queue="cpu") < 150
    assert value(found, "genpulse_ledger_up") == 1
    assert value(found, "genpulse_broker_up") == 0


def test_each_end_is_counted_once_whoever_ended_it(api: Api) -> None:
    """Completed, failed and canceled tasks, by a worker and by a request, with what they took."""
    before = scrape(api)
    api.complete(api.submit()["task_id"])
    api.fail(api.submit()["task_id"])
    api.client.post(f"/task/{api.submit()['task_id']}/cancel")
    scrape(api)
    after = scrape(api)

    def more(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    ended = "genpulse_tasks_ended_total"
    assert more(ended, task_type="echo", status="completed", error_code="") == 1
    assert more(ended, task_type="echo", status="failed", error_code="node_error") == 1
    assert more(ended, task_type="echo", status="canceled", error_code="canceled") == 1
    assert more("genpulse_task_queue_seconds_count", task_type="echo") == 2
    assert more("genpulse_task_run_seconds_sum", task_type="echo") == pytest.approx(1.50004)
    assert more("genpulse_tasks_submitted_total", task_type="echo") == 3


def test_requests_are_counted_by_template_and_never_by_id(lone_api: Api) -> None:
    """One hundred ids are one label; what no route has is one more; a made-up method is "other"."""
    before = scrape(lone_api)
    task_id = lone_api.submit()["task_id"]
    for prefix in ("", "/v1"):
        lone_api.client.get(f"{prefix}/task/{task_id}")
    for number in range(50):
        lone_api.client.get(f"/nothing/{number}")
        lone_api.client.open("/task", method=f"M{number}")
    after = scrape(lone_api)

    read = {"method": "GET", "route": "/task/<task_id>", "status": "200"}
    name = "genpulse_http_requests_total"
    assert value(after, name, **read) - value(before, name, **read) == 2
    unknown = {"method": "GET", "route": "unmatched", "status": "404"}
    assert value(after, name, **unknown) - value(before, name, **unknown) == 50
    assert len(after.keys() - before.keys()) < 120
    assert task_id not in str(after)
    assert {label for _, labels in after for label, _ in labels} <= LABELS


def test_metrics_ask_for_the_scope_admin_once_there_are_keys(lone_api: Api) -> None:
    """They are about everybody's tasks, so a key that may read its own is not enough."""
    ordinary, operator = lone_api.key(), lone_api.key("ops", scopes=("admin",))
    assert lone_api.client.get("/metrics").status_code == 401
    assert ordinary("GET", "/metrics").status_code == 403
    assert operator("GET", "/metrics").status_code == 200


def test_without_a_ledger_the_rest_is_still_told(
    keyed_api: Api, bearer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scrape that fails would hide the one thing there is to know."""
    keyed_api.client.get("/health")  # so that there is something to count
    engine = sa.create_engine("sqlite:////nowhere/at/all.db")
    monkeypatch.setattr(keyed_api.service.ledger, "engine", engine)
    found = scrape(keyed_api, **bearer)
    assert value(found, "genpulse_ledger_up") == 0
    assert not [name for name, _ in found if name == "genpulse_queue_tasks"]
    assert [name for name, _ in found if name == "genpulse_http_requests_total"]


def test_a_scrape_reads_no_history(lone_api: Api) -> None:
    """Each statement of a scrape goes by an index that has live rows only, or by the time of the end."""
    said: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.lstrip().startswith("SELECT"):
            said.append((statement, parameters))

    engine = lone_api.service.ledger.engine
    sa.event.listen(engine, "before_cursor_execute", note)
    scrape(lone_api)
    sa.event.remove(engine, "before_cursor_execute", note)

    with engine.connect() as connection:
        plans = [
            row.detail
            for statement, parameters in said
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]
    for index in ("ix_tasks_live", "ix_tasks_ended", "ix_attempts_running", "ix_webhook_deliveries_due"):
        assert any(index in each for each in plans), plans
    for each in plans:
        bare = each.startswith("SCAN") and "USING" not in each
        assert not bare or each in {"SCAN CONSTANT ROW", "SCAN workers"}, plans


def test_each_line_of_a_request_carries_its_id(lone_api: Api, capfd: pytest.CaptureFixture[str]) -> None:
    """The line of the access log too; the caller's own id is taken if it is one."""
    from genpulse.telemetry import setup_logging

    kept, before = (logging.getLogger().handlers[:], logging.getLogger().level), structlog.get_config()
    setup_logging("INFO", "json")
    try:
        answer = lone_api.client.post(
            "/task",
            json={"task_type": "echo", "params": {"text": "a secret wish"}},
            headers={"X-Request-ID": "order-4711"},
        )
        refused = lone_api.client.get("/task/none", headers={"X-Request-ID": "order-4712"})
        odd = lone_api.client.get("/task/none", headers={"X-Request-ID": "a b\tc"})
    finally:
        logging.getLogger().handlers[:], level = kept[0], kept[1]
        logging.getLogger().setLevel(level)
        structlog.configure(**before)
    lines = capfd.readouterr().err
    assert answer.headers["X-Request-Id"] == "order-4711"
    assert refused.get_json()["instance"] == "urn:genpulse:request:order-4712"
    assert odd.get_json()["instance"].removeprefix("urn:uuid:") == odd.headers["X-Request-Id"]
    told = [json.loads(line) for line in lines.splitlines() if '"request"' in line]
    first = told[0]
    assert first["request_id"] == "order-4711"
    assert (first["method"], first["route"], first["status"], first["owner"]) == (
        "POST",
        "/task",
        202,
        "default",
    )
    assert first["ms"] > 0
    assert [each["request_id"] for each in told[1:]] == ["order-4712", odd.headers["X-Request-Id"]]
    assert "a secret wish" not in lines
    task = lone_api.service.ledger.get(answer.get_json()["task_id"])
    assert task is not None
    assert task.request_id == "order-4711"
