"""Sending final tasks again, one by one and by filter, and deleting them, on both databases."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import pytest
import sqlalchemy as sa

from genpulse.comfy import workflow as graph
from genpulse.errors import LedgerUnavailable
from genpulse.ledger import tables as t
from genpulse.model import ErrorInfo, NewOutput, NewTask, TaskStatus
from genpulse.tasks import submit
from genpulse.tasks.registry import BaseHandler, Registry
from tests.support.ledger import at_once, die, rows, run_sql

UNKNOWN = str(uuid.uuid4())


class FileParams(pydantic.BaseModel):
    """The files that the task needs."""

    asset: str | None = None
    output_of: str | None = None


class FileTask(BaseHandler):
    """A task type that names files; it is never run here."""

    task_type: ClassVar[str] = "file"
    queue: ClassVar[str] = "cpu"
    params_model: ClassVar[type[pydantic.BaseModel]] = FileParams
    summary: ClassVar[str] = "Needs files."

    def referenced_assets(self, params: Any) -> tuple[str, ...]:
        """The asset."""
        return (params["asset"],) if params["asset"] else ()

    def referenced_outputs(self, params: Any) -> tuple[tuple[str, int], ...]:
        """Output 0 of the other task."""
        return ((params["output_of"], 0),) if params["output_of"] else ()

    def execute(self, task: Any, context: Any) -> tuple[NewOutput, ...]:
        """Not run by these tests."""
        raise NotImplementedError


@pytest.fixture
def file_api(api: Any) -> Any:
    """The API with the task type that names files."""
    api.service.registry = Registry([*map(type, api.service.registry), FileTask])
    return api


def failed(api: Any, code: str = "node_error", **more: Any) -> str:
    """A task that ended failed."""
    task_id = str(api.submit(**more)["task_id"])
    error = ErrorInfo(code=code, message="It went wrong.")
    assert api.service.ledger.finish(api.claim(task_id).fence, TaskStatus.FAILED, error=error)
    return task_id


def asset(api: Any, content: bytes = b"\x89PNG\r\n\x1a\n") -> str:
    """The id of an uploaded file."""
    import io

    answer = api.client.post("/storage/upload", data={"file": (io.BytesIO(content), "a.png")})
    return str(answer.json["id"])


def somebody_elses(api: Any) -> str:
    """A failed task of another owner."""
    task, _ = api.service.ledger.submit(NewTask(task_type="echo", queue="cpu", params={}, owner="bob"))
    api.service.ledger.finish(api.claim(task.id).fence, TaskStatus.FAILED)
    return str(task.id)


# -- one task -------------------------------------------------------------------------------------


def test_a_retry_is_a_new_task_with_the_same_request(api: Any) -> None:
    """The old task stays as it ended; the new one says what it is a retry of, and the relay is told."""
    request: dict[str, Any] = {
        "priority": "high",
        "timeout_s": 7,
        "max_attempts": 5,
        "metadata": {"job": "4711"},
    }
    old = failed(api, params={"text": "hi", "value": [1, {"a": None}]}, **request)
    before = api.client.get(f"/task/{old}").json
    woken: list[int] = []
    api.service.wake = lambda: woken.append(api.rows("tasks"))

    answer = api.client.post(f"/task/{old}/retry")

    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == answer.json["urls"]["self"]
    assert (answer.json["retry_of"], answer.json["status"], woken) == (old, "pending", [2])
    new = api.client.get(answer.headers["Location"]).json
    assert (new["retry_of"], new["task_type"], new["attempt"]) == (old, "echo", 0)
    assert {name: new[name] for name in ("priority", "max_attempts", "metadata")} == {
        name: request[name] for name in ("priority", "max_attempts", "metadata")
    }
    params = [api.service.ledger.get(each) for each in (old, new["task_id"])]
    assert params[0].params == params[1].params
    assert params[1].timeout_s == 7
    assert api.client.get(f"/task/{old}").json == before
    assert before["retry_of"] is None


@pytest.mark.parametrize("running", [False, True])
def test_only_a_final_task_can_be_retried(api: Any, running: bool) -> None:
    """Anything else would make two of one."""
    task_id = api.submit()["task_id"]
    if running:
        api.claim(task_id)

    answer = api.client.post(f"/task/{task_id}/retry")

    assert (answer.status_code, answer.json["code"]) == (409, "not_final")
    assert api.rows("tasks") == 1


def test_somebody_elses_task_is_unknown(api: Any) -> None:
    """Neither retried nor deleted nor confirmed to exist."""
    theirs = somebody_elses(api)
    for task_id in (theirs, UNKNOWN, "nonsense"):
        for call in (
            api.client.post(f"/task/{task_id}/retry"),
            api.client.delete(f"/task/{task_id}"),
        ):
            assert (call.status_code, call.json["code"]) == (404, "not_found")
    assert api.rows("tasks") == 1


def test_a_repeated_key_gives_the_same_retry(api: Any) -> None:
    """As with ``POST /task``: the answer may be asked for again, and the key is for this alone."""
    one, other = failed(api), failed(api)
    key = {"Idempotency-Key": "again-1"}

    first, second = (api.client.post(f"/task/{one}/retry", headers=key) for _ in range(2))
    wrong = api.client.post(f"/task/{other}/retry", headers=key)
    free = api.client.post(f"/task/{one}/retry")

    assert first.json["task_id"] == second.json["task_id"] != free.json["task_id"]
    assert second.headers["Idempotency-Replayed"] == "true"
    assert "Idempotency-Replayed" not in first.headers
    assert (wrong.status_code, wrong.json["code"]) == (422, "idempotency_key_reuse")


def test_a_retry_whose_file_is_gone_is_refused_by_name(file_api: Any) -> None:
    """422 ``missing_asset`` at the door instead of a task that fails later."""
    api = file_api
    file = asset(api)
    source = api.submit()["task_id"]
    api.complete(source, ("a.png", b"png", "image/png"))
    tasks = [
        failed(api, task_type="file", params={"asset": file}),
        failed(api, task_type="file", params={"output_of": source}),
    ]
    assert [api.client.post(f"/task/{each}/retry").status_code for each in tasks] == [202, 202]
    run_sql(api.service.ledger, sa.delete(t.assets))
    assert api.client.delete(f"/task/{source}").status_code == 204

    for task_id, name in zip(tasks, (f"asset:{file}", f"output:{source}/0"), strict=True):
        answer = api.client.post(f"/task/{task_id}/retry")
        assert (answer.status_code, answer.json["code"]) == (422, "missing_asset")
        assert name in answer.json["detail"]


def test_a_task_type_that_is_gone_is_a_clear_refusal(file_api: Any) -> None:
    """A plug-in was removed since: nothing would ever run the task."""
    task_id = failed(file_api, task_type="file", params={})
    file_api.service.registry = Registry(
        [type(each) for each in file_api.service.registry if each.task_type != "file"]
    )

    answer = file_api.client.post(f"/task/{task_id}/retry")

    assert (answer.status_code, answer.json["code"]) == (422, "unknown_task_type")


def test_a_poison_task_keeps_its_history_and_can_be_sent_again(api: Any) -> None:
    """Three losses are tolerated, the fourth ends it; every attempt stays readable."""
    task_id = api.submit()["task_id"]
    ledger = api.service.ledger
    for number in range(4):
        run_sql(ledger, sa.update(t.tasks).values(available_at=t.tasks.c.created_at))
        ended = die(ledger, api.claim(task_id), max_lost=3)
        assert ended == (TaskStatus.PENDING if number < 3 else TaskStatus.FAILED)

    task = api.client.get(f"/task/{task_id}").json
    again = api.client.post(f"/task/{task_id}/retry")

    assert (task["status"], task["error"]["code"], task["attempt"]) == ("failed", "worker_lost", 4)
    assert [each["outcome"] for each in task["attempts"]] == ["lost"] * 4
    assert task["attempt"] > task["max_attempts"]
    assert again.status_code == 202
    assert api.client.get(f"/task/{task_id}").json == task


# -- by filter ------------------------------------------------------------------------------------


def many(api: Any, **body: Any) -> Any:
    """Retry by filter."""
    return api.client.post("/task/retry", json=body)


def test_a_filter_sends_each_matching_task_again_once(api: Any) -> None:
    """The oldest first; a second call finds nothing to do, unless it asks for more of the same."""
    tasks = [failed(api) for _ in range(3)]
    api.complete(api.submit()["task_id"], ("a.png", b"png", "image/png"))
    api.submit()
    somebody_elses(api)

    first, second = many(api), many(api)
    again = many(api, again=True)

    assert first.status_code == second.status_code == 202
    assert [each["retry_of"] for each in first.json["retried"]] == tasks
    assert first.json["refused"] == []
    assert first.json["next_cursor"] is None
    for pair in first.json["retried"]:
        assert api.client.get(f"/task/{pair['task_id']}").json["retry_of"] == pair["retry_of"]
    assert second.json["retried"] == []
    assert [each["retry_of"] for each in again.json["retried"]] == tasks


def test_a_retry_that_failed_too_is_what_the_next_call_takes(api: Any) -> None:
    """Not the task at the head of the chain, which has its retry."""
    head = failed(api)
    (pair,) = many(api).json["retried"]
    api.fail(pair["task_id"])

    (found,) = many(api).json["retried"]

    assert found["retry_of"] == pair["task_id"] != head


def test_filters_narrow(api: Any) -> None:
    """By status, error code, task type and time; an alias means its type."""
    lost, node = failed(api, "server_lost"), failed(api, "node_error")
    canceled = api.submit()["task_id"]
    api.client.post(f"/task/{canceled}/cancel")
    now = dt.datetime.now(dt.UTC)
    hour = dt.timedelta(hours=1)

    def found(**body: Any) -> list[str]:
        answer = many(api, dry_run=True, **body)
        assert answer.status_code == 200, answer.text
        assert all(each["task_id"] is None for each in answer.json["retried"])
        return [each["retry_of"] for each in answer.json["retried"]]

    assert found() == [lost, node]
    assert found(error_code="server_lost") == [lost]
    assert found(status="canceled") == [canceled]
    assert found(status="completed") == []
    assert found(task_type="repeat") == found(task_type="echo") == [lost, node]
    assert found(task_type="other") == []
    assert found(created_after=(now - hour).isoformat()) == [lost, node]
    assert found(created_after=(now + hour).isoformat()) == []
    assert found(created_before=(now - hour).isoformat()) == []
    assert api.rows("tasks") == 3


def test_a_page_at_a_time_gets_to_the_end(file_api: Any) -> None:
    """Also past tasks that are refused: the cursor leads on behind what was looked at."""
    api = file_api
    file = asset(api)
    gone = [failed(api, task_type="file", params={"asset": file}) for _ in range(2)]
    good = [failed(api) for _ in range(3)]
    run_sql(api.service.ledger, sa.delete(t.assets))

    pages, cursor = [], None
    while True:
        pages.append(many(api, limit=2, **({"cursor": cursor} if cursor else {})).json)
        if (cursor := pages[-1]["next_cursor"]) is None:
            break

    refused = [each for page in pages for each in page["refused"]]
    assert [(each["task_id"], each["code"]) for each in refused] == [(each, "missing_asset") for each in gone]
    assert [each["retry_of"] for page in pages for each in page["retried"]] == good
    assert len(pages) == 3


def test_many_who_retry_by_filter_at_once_make_one_of_each(api: Any) -> None:
    """Of any number of operators with the same idea, each task is sent again once."""
    tasks = [failed(api) for _ in range(5)]

    answers = at_once(4, lambda _: many_with(api.app.test_client()))

    made = [pair["retry_of"] for answer in answers for pair in answer["retried"]]
    assert sorted(made) == sorted(tasks)
    assert api.rows("tasks") == 10


def many_with(client: Any) -> Any:
    """Retry by filter with a client of one's own, as threads must."""
    return client.post("/task/retry", json={}).json


@pytest.mark.parametrize(
    "body",
    [
        {"status": "pending"},
        {"limit": 0},
        {"limit": 1001},
        {"limit": "5"},
        {"created_after": "yesterday"},
        {"cursor": "x"},
        {"error_code": "A B"},
        {"nonsense": 1},
        [],
    ],
)
def test_a_wrong_filter_is_refused(lone_api: Any, body: Any) -> None:
    """A typing mistake never becomes "all of them"."""
    task_id = failed(lone_api)

    answer = lone_api.client.post("/task/retry", json=body)

    assert (answer.status_code, answer.json["code"]) == (422, "invalid_request")
    assert lone_api.client.get(f"/task/{task_id}").status_code == 200
    assert lone_api.rows("tasks") == 1


# -- by filter, a batch that shares much -----------------------------------------------------------


@pytest.fixture
def batch_api(build: Any, ledger_url: str, tmp_path: Path) -> Iterator[Any]:
    """The API with the installed task types."""
    made = build(ledger_url, tmp_path / "data", registry=Registry.load())
    yield made
    made.service.ledger.close()


def failed_batch(api: Any, size: int, workflow: dict[str, Any], place: str = "inputs.seed") -> list[str]:
    """A batch over a workflow whose tasks all failed; their ids."""
    node = workflow["0"] if place.startswith("workflow") else {}
    values = [{**node, "inputs": {"seed": n}} if node else n for n in range(size)]
    template = {"task_type": "comfyui", "params": {"workflow": workflow, "inputs": {}}}
    answer = api.client.post("/task/batch", json={"template": template, "grid": {place: values}})
    assert answer.status_code == 202, answer.text
    run_sql(
        api.service.ledger,
        sa.update(t.tasks).values(status=TaskStatus.FAILED, completed_at=t.tasks.c.created_at),
    )
    return list(answer.json["task_ids"])


def large_workflow(nodes: int = 100) -> dict[str, Any]:
    """A graph whose first node has the input ``seed``."""
    node = {"class_type": "SaveImage", "inputs": {"images": ["0", 0], "text": "x" * 100}}
    first = {"class_type": "KSampler", "inputs": {"seed": 0}, "_meta": {"title": "INPUT_seed"}}
    return {"0": first, **{str(number): node for number in range(1, nodes)}}


@pytest.mark.parametrize("place", ["inputs.seed", "workflow.0"])
def test_retries_of_a_batch_share_what_the_batch_shares(
    batch_api: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """It is neither checked nor stored once more for each; each is whole to whoever reads it."""
    api, ledger = batch_api, batch_api.service.ledger
    workflow = large_workflow()
    ids = failed_batch(api, 150, workflow, place)
    looked_at: list[int] = []
    check = graph.check_structure

    def count(*args: Any, **more: Any) -> None:
        looked_at.append(1)
        check(*args, **more)

    monkeypatch.setattr(graph, "check_structure", count)

    dry = many(api, limit=1000, dry_run=True)
    assert len(looked_at) == (1 if place == "inputs.seed" else 150)
    answer = many(api, limit=1000)

    assert [each["retry_of"] for each in dry.json["retried"]] == ids
    assert [each["retry_of"] for each in answer.json["retried"]] == ids
    retries = [each["task_id"] for each in answer.json["retried"]]
    stored = rows(ledger, t.tasks, t.tasks.c.retry_of.is_not(None))
    assert max(len(json.dumps(row["params"])) for row in stored) < 200
    for former, retry in zip(ids[::50], retries[::50], strict=True):
        assert json.dumps(ledger.get(retry).params) == json.dumps(ledger.get(former).params)
    read = api.client.get(f"/task/{retries[0]}").json
    assert (read["batch_id"], read["retry_of"]) == (None, ids[0])
    assert many(api, limit=1000).json["retried"] == []


def test_what_is_sent_again_is_read_in_parts_that_fit(
    batch_api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its number: by the bytes of what tasks have alone, of what they share, and of copies."""
    api = batch_api
    ledger = api.service.ledger
    monkeypatch.setattr(submit, "_RETRY_BYTES", 50_000)
    ids = [
        *failed_batch(api, 5, large_workflow(), "workflow.0"),
        *failed_batch(api, 150, large_workflow()),
        *(
            str(api.submit(task_type="comfyui", params={"workflow": large_workflow()})["task_id"])
            for _ in "ab"
        ),
    ]
    run_sql(ledger, sa.update(t.tasks).values(status=TaskStatus.FAILED, completed_at=t.tasks.c.created_at))
    parts: list[list[Any]] = []
    sources = ledger.retry_sources

    def count(*args: Any, **more: Any) -> list[Any]:
        parts.append(sources(*args, **more))
        return parts[-1]

    monkeypatch.setattr(ledger, "retry_sources", count)

    answer = many(api, limit=1000)

    assert [each["retry_of"] for each in answer.json["retried"]] == ids
    assert all(sum(source.size for source in part[:-1]) <= 50_000 for part in parts)
    assert {len(part) for part in parts} > {100}
    assert max(len(part) for part in parts) == 100  # small ones go together


def test_a_ledger_that_goes_away_behind_the_first_part_leaves_doubt(
    batch_api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred were recorded: nobody is told that nothing was, and a repeated call does the rest."""
    api, ledger = batch_api, batch_api.service.ledger
    failed_batch(api, 150, large_workflow(2))
    record = ledger.retry_all
    calls: list[int] = []

    def away(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise LedgerUnavailable("away")
        return record(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "retry_all", away)
        answer = many(api, limit=1000)

    assert answer.status_code == 503
    assert "not known" in answer.json["detail"]
    assert len(many(api, limit=1000).json["retried"]) == 50


# -- progress -------------------------------------------------------------------------------------


def test_the_last_progress_stays_when_a_task_ends(api: Any) -> None:
    """Redis forgets; the attempt's row does not."""
    ledger = api.service.ledger
    stopped, lost, untold = (api.submit(max_attempts=1)["task_id"] for _ in range(3))
    ledger.finish(api.claim(stopped).fence, TaskStatus.FAILED, progress=62.5)
    held = api.claim(lost)
    run_sql(ledger, sa.update(t.leases).values(expires_at=t.leases.c.renewed_at))
    (lease,) = [each for each in ledger.stale_leases(60.0) if each.fence == held.fence]
    ledger.reap(lease, missed_s=6.0, max_lost=0, progress=30.0)
    api.fail(untold)

    tasks = [api.client.get(f"/task/{each}").json for each in (stopped, lost, untold)]

    assert [each["progress"] for each in tasks] == [62.5, 30.0, 0.0]
    assert [each["attempts"][0]["progress"] for each in tasks] == [62.5, 30.0, None]
    assert [each["status"] for each in tasks] == ["failed"] * 3


# -- deletion -------------------------------------------------------------------------------------


def test_a_deleted_task_is_gone_at_once(api: Any) -> None:
    """Unknown from the next request on; its outputs say that they are gone, to their owner alone."""
    task_id = api.submit()["task_id"]
    api.complete(task_id, ("a.png", b"png", "image/png"))
    output = api.client.get(f"/task/{task_id}").json["outputs"][0]["url"]
    key = f"outputs/{task_id}/1/0"

    assert api.client.delete(f"/task/{task_id}").status_code == 204

    assert api.client.get(f"/task/{task_id}").status_code == 404
    assert api.client.delete(f"/task/{task_id}").status_code == 404
    assert (api.client.get(output).status_code, api.client.get(output).json["code"]) == (410, "gone")
    assert api.client.get(f"/static/assets/{key}").status_code == 404
    assert api.client.get("/task").json["tasks"] == []
    assert not api.service.ledger.was_deleted(task_id, "bob")
    assert {name: api.rows(name) for name in ("tasks", "attempts", "outputs", "leases")} == {
        "tasks": 0, "attempts": 0, "outputs": 0, "leases": 0,
    }  # fmt: skip


def test_a_task_that_is_not_final_is_not_deleted(api: Any) -> None:
    """409; it is canceled first."""
    task_id = api.submit()["task_id"]

    answer = api.client.delete(f"/task/{task_id}")

    assert (answer.status_code, answer.json["code"]) == (409, "not_final")
    assert api.client.post(f"/task/{task_id}/cancel").status_code == 200
    assert api.client.delete(f"/task/{task_id}").status_code == 204


def test_the_shape_tells_when_a_task_goes(lone_api: Any, build: Any, tmp_path: Path) -> None:
    """``expires_at``: so many days after the end, for as long as the setting says so."""
    task_id = failed(lone_api)
    url = lone_api.service.settings.database_url.get_secret_value()
    keeping = build(url, tmp_path / "data", retention_days=2)

    for api, days in ((lone_api, None), (keeping, 2)):
        for task in (api.client.get(f"/task/{task_id}").json, api.client.get("/task").json["tasks"][0]):
            ended = dt.datetime.fromisoformat(task["completed_at"])
            told = task["expires_at"] and dt.datetime.fromisoformat(task["expires_at"]) - ended
            assert told == (dt.timedelta(days=days) if days else None)
    waiting = keeping.submit(expires_in_s=60)["task_id"]
    assert keeping.client.get(f"/task/{waiting}").json["expires_at"] is not None
    keeping.service.ledger.close()
