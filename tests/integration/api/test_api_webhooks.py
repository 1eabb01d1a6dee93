"""Webhooks through the API: which callbacks are taken, and what a caller sees of their deliveries."""

from __future__ import annotations

import base64
import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genpulse.ledger import DeliveryStatus
from genpulse.ledger import tables as t
from genpulse.tasks.webhooks import payload
from genpulse.web import access
from tests.integration.api.conftest import Api

SECRET = "whsec_" + base64.b64encode(b"0" * 32).decode()
HOOK = "https://hooks.example.com/x"


@pytest.fixture
def hooks(ledger_url: str, tmp_path: Path, build: Any) -> Iterator[Api]:
    """The API with a webhook secret."""
    made: Api = build(
        ledger_url, tmp_path / "data", webhook_secret=SECRET, public_url="https://pulse.example"
    )
    yield made
    made.service.ledger.close()


def ended(api: Api, **more: Any) -> str:
    """A completed task with a callback; returns its id."""
    task_id = str(api.submit(callback_url=HOOK, **more)["task_id"])
    api.complete(task_id, ("a.png", b"\x89PNG\r\n\x1a\n", "image/png"))
    return task_id


def test_a_callback_without_a_secret_to_sign_with_is_refused(lone_api: Api) -> None:
    """Nobody could tell an unsigned webhook from a forged one."""
    answer = lone_api.client.post("/task", json={"task_type": "echo", "params": {}, "callback_url": HOOK})
    assert answer.status_code == 422
    assert answer.get_json()["errors"][0]["pointer"] == "/callback_url"
    assert "GENPULSE_WEBHOOK_SECRET" in answer.get_json()["detail"]


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://169.254.169.254/latest/",
        "https://2130706433/",
        "https://0x7f.1/",
        "https://redis/",
        "https://localhost/",
        "https://a:b@hooks.example.com/",
        "https://hooks.example.com:22/",
    ],
)
def test_a_callback_to_an_unsafe_address_is_refused(hooks: Api, url: str) -> None:
    """At the POST, with a pointer, and nothing is recorded."""
    answer = hooks.client.post("/task", json={"task_type": "echo", "params": {}, "callback_url": url})
    assert (answer.status_code, answer.get_json()["code"]) == (422, "unsafe_url")
    assert answer.get_json()["errors"][0]["pointer"] == "/callback_url"
    assert hooks.rows("tasks") == 0


def test_deliveries_are_listed_and_read(hooks: Api) -> None:
    """With filters and a cursor; a task without a callback has none."""
    tasks = [ended(hooks) for _ in range(3)]
    hooks.complete(str(hooks.submit()["task_id"]))
    first = hooks.client.get("/webhooks/deliveries?limit=2").get_json()
    rest = hooks.client.get(f"/webhooks/deliveries?limit=2&cursor={first['next_cursor']}").get_json()
    found = first["deliveries"] + rest["deliveries"]
    assert [each["task_id"] for each in found] == tasks[::-1]
    assert rest["next_cursor"] is None
    assert {each["status"] for each in found} == {"pending"}
    (one,) = hooks.client.get(f"/v1/webhooks/deliveries?task_id={tasks[1]}").get_json()["deliveries"]
    assert hooks.client.get("/webhooks/deliveries?status=gone").get_json()["deliveries"] == []

    detail = hooks.client.get(f"/webhooks/deliveries/{one['id']}").get_json()
    assert detail == {**one, "log": []}
    assert (one["event_type"], one["url"]) == ("task.completed", HOOK)


@pytest.mark.parametrize("query", ["status=lost", "limit=0", "cursor=x", "task_id=5", "page=2"])
def test_a_strange_query_is_refused(lone_api: Api, query: str) -> None:
    """Names the parameter."""
    assert lone_api.client.get(f"/webhooks/deliveries?{query}").status_code == 422


def test_a_delivery_is_sent_again_when_asked(hooks: Api) -> None:
    """202 each time; the log stays."""
    ended(hooks)
    ledger = hooks.service.ledger
    claimed = ledger.claim_delivery(lease_s=60, per_host=8, per_owner=16)
    assert claimed is not None
    ledger.record_delivery(claimed, DeliveryStatus.GONE, duration_s=0.5, status_code=410, excerpt="no")
    for _ in range(2):
        answer = hooks.client.post(f"/webhooks/deliveries/{claimed.id}/redeliver")
        assert answer.status_code == 202
        body = answer.get_json()
        assert (body["status"], body["tries"], body["attempts"]) == ("pending", 0, 1)
        assert [(each["status_code"], each["excerpt"]) for each in body["log"]] == [(410, "no")]
    again = ledger.claim_delivery(lease_s=60, per_host=8, per_owner=16)
    assert again is not None
    assert again.id == claimed.id


@pytest.mark.parametrize("name", ["0199f2c4-7a1e-7000-8000-00000000cafe", "x", "%00"])
def test_a_delivery_nobody_knows_is_404(lone_api: Api, name: str) -> None:
    """Whatever its id looks like."""
    assert lone_api.client.get(f"/webhooks/deliveries/{name}").status_code == 404
    assert lone_api.client.post(f"/webhooks/deliveries/{name}/redeliver").status_code == 404


def test_somebody_elses_deliveries_do_not_exist(hooks: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither listed nor read nor sent again."""
    ended(hooks)
    (one,) = hooks.client.get("/webhooks/deliveries").get_json()["deliveries"]
    monkeypatch.setattr(access, "owner", lambda: "eve")
    assert hooks.client.get("/webhooks/deliveries").get_json()["deliveries"] == []
    assert hooks.client.get(f"/webhooks/deliveries/{one['id']}").status_code == 404
    assert hooks.client.post(f"/webhooks/deliveries/{one['id']}/redeliver").status_code == 404


def test_the_body_shows_the_task_as_the_api_does(hooks: Api) -> None:
    """``data`` is what ``GET /task/{id}`` answers, links and all."""
    task_id = ended(hooks, metadata={"k": "v"})
    here = hooks.service
    (delivery,) = here.ledger.list_deliveries("default")
    task = here.ledger.get(task_id)
    assert task is not None
    body = json.loads(payload(delivery, task, here.settings))
    assert body["data"] == hooks.client.get(f"/task/{task_id}").get_json()
    assert body["type"] == "task.completed"
    assert body["timestamp"] == task.completed_at.isoformat() if task.completed_at else None


def test_the_document_tells_receivers_what_they_get(lone_api: Api) -> None:
    """OpenAPI's own place for webhooks, with the task's schema."""
    document = lone_api.client.get("/openapi.json").get_json()
    body = document["webhooks"]["task"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rpartition("/")[2]
    assert document["components"]["schemas"][name]["properties"]["data"]["$ref"].endswith("/TaskView")


def test_the_status_says_that_webhooks_are_late(hooks: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody serves their queue, and the oldest is due for more than a minute."""
    monkeypatch.setattr("genpulse.web.condition.REMEMBERED_S", 0)
    ended(hooks)
    ledger = hooks.service.ledger
    assert not any("late" in problem for problem in hooks.client.get("/status").get_json()["problems"])
    long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=2)
    with ledger.engine.begin() as connection:
        connection.execute(t.webhook_deliveries.update().values(next_at=long_ago))
    (problem,) = [each for each in hooks.client.get("/status").get_json()["problems"] if "late" in each]
    assert "no worker serves the queue webhooks" in problem
