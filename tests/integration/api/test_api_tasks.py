"""Submitting, reading, listing and canceling over HTTP, on both databases."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest

from genpulse.errors import LedgerUnavailable
from genpulse.model import ErrorInfo, NewTask, TaskStatus
from tests.support.ledger import prompt

UNKNOWN = "7c9e6679-7425-40de-944b-e07fc1f90ae7"


def test_202_means_that_the_task_can_be_read(api: Any) -> None:
    """The answer to a submission leads to the task, and the relay is told after the commit."""
    woken = []
    api.service.wake = lambda: woken.append(api.rows("tasks"))

    answer = api.client.post("/task", json={"task_type": "echo", "params": {"text": "hi"}})

    assert answer.status_code == 202
    assert answer.headers["Location"] == answer.json["urls"]["self"]
    assert int(answer.headers["Retry-After"]) > 0
    assert woken == [1]
    task = api.client.get(answer.headers["Location"]).json
    assert (task["task_id"], task["status"], task["queue_position"]) == (answer.json["task_id"], "pending", 1)


def test_every_state_has_the_same_fields(api: Any) -> None:
    """One shape, always: a caller never asks whether a field is there."""
    waiting, running, done, failed, canceled = (api.submit()["task_id"] for _ in range(5))
    api.claim(running)
    api.complete(done, ("a.png", b"png", "image/png"))
    api.fail(failed)
    api.client.post(f"/task/{canceled}/cancel")

    tasks = [api.client.get(f"/task/{one}").json for one in (waiting, running, done, failed, canceled)]

    assert [task["status"] for task in tasks] == ["pending", "processing", "completed", "failed", "canceled"]
    assert len({tuple(task) for task in tasks}) == 1
    assert tasks[3]["error"]["node_id"] == "3"
    assert tasks[4]["error"]["code"] == "canceled"


def test_a_completed_task_names_its_pictures_twice(api: Any) -> None:
    """``outputs`` says all, ``result`` keeps the words of the original system."""
    task_id = api.submit()["task_id"]
    api.complete(task_id, ("notes.bin", b"..", "application/octet-stream"), ("a.png", b"png", "image/png"))

    task = api.client.get(f"/task/{task_id}").json

    assert [output["index"] for output in task["outputs"]] == [0, 1]
    picture = task["outputs"][1]["url"]
    assert task["result"] == {"prompt_id": None, "images": [picture], "image_url": picture}
    assert (task["progress"], task["timings"]["run_s"]) == (100.0, 1.5)
    assert [attempt["outcome"] for attempt in task["attempts"]] == ["completed"]


def test_the_v1_mount_answers_with_v1_links(api: Any) -> None:
    """Who came in under ``/v1`` is led on under ``/v1``."""
    answer = api.client.post("/v1/task", json={"task_type": "repeat", "params": {}})

    assert answer.headers["Location"].startswith("http://localhost/v1/task/")
    assert api.client.get(answer.headers["Location"]).json["task_type"] == "echo"


def test_the_public_url_is_what_links_begin_with(lone_api: Any, tmp_path: Any, build: Any) -> None:
    """Behind a proxy, links lead through the proxy, its path prefix included."""
    url = lone_api.service.settings.database_url.get_secret_value()
    behind = build(url, tmp_path / "data", public_url="https://pulse.example/api/")

    assert behind.submit()["urls"]["self"].startswith("https://pulse.example/api/task/")
    behind.service.ledger.close()


def test_the_same_key_and_body_give_the_same_task(api: Any) -> None:
    """A repeated submission makes nothing new, whatever the order of its keys, and says so."""
    one = {"task_type": "echo", "params": {"text": "a", "value": 1}}
    other = {"params": {"value": 1, "text": "a"}, "task_type": "echo"}

    first = api.client.post("/task", json=one, headers={"Idempotency-Key": "k"})
    second = api.client.post("/task", json=other, headers={"Idempotency-Key": "k"})

    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json["task_id"] == second.json["task_id"]
    assert "Idempotency-Replayed" not in first.headers
    assert second.headers["Idempotency-Replayed"] == "true"
    assert api.rows("tasks") == 1


def test_the_same_key_with_another_body_is_refused(api: Any) -> None:
    """A key that was used for something else is a mistake of the caller's."""
    api.client.post("/task", json={"task_type": "echo", "params": {}}, headers={"Idempotency-Key": "k"})

    answer = api.client.post(
        "/task", json={"task_type": "echo", "params": {"text": "b"}}, headers={"Idempotency-Key": "k"}
    )

    assert (answer.status_code, answer.json["code"]) == (422, "idempotency_key_reuse")
    assert api.rows("tasks") == 1


def test_many_callers_with_one_key_get_one_task(api: Any) -> None:
    """Key and task are one transaction, so a race has one winner and everybody gets its task."""
    answers: list[Any] = []
    start = threading.Barrier(8)

    def call() -> None:
        start.wait()
        answers.append(
            api.app.test_client().post(
                "/task", json={"task_type": "echo", "params": {}}, headers={"Idempotency-Key": "race"}
            )
        )

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json["task_id"] for answer in answers}) == 1
    assert api.rows("tasks") == 1


@pytest.mark.parametrize("key", ["", "a b", "ä", "x" * 256, "tab\t"])
def test_a_key_that_cannot_be_one_is_refused(lone_api: Any, key: str) -> None:
    """1 to 255 visible characters; anything else would be kept in a form nobody sends again."""
    answer = lone_api.client.post(
        "/task", json={"task_type": "echo", "params": {}}, headers={"Idempotency-Key": key}
    )

    assert (answer.status_code, answer.json["code"]) == (422, "invalid_request")
    assert answer.json["errors"][0]["pointer"] == "header:Idempotency-Key"
    assert lone_api.rows("tasks") == 0


@pytest.mark.parametrize("task_id", ["nope", UNKNOWN, "{" + UNKNOWN + "}", "%00", "é"])
@pytest.mark.parametrize("tail", ["", "/outputs/0", "/cancel"])
def test_an_unknown_task_is_404_whatever_its_id_looks_like(api: Any, task_id: str, tail: str) -> None:
    """No id is an error of another kind: neither a database's complaint nor a hint."""
    call = api.client.post if tail == "/cancel" else api.client.get

    answer = call(f"/task/{task_id}{tail}")

    assert (answer.status_code, answer.json["code"]) == (404, "not_found")


def test_an_unchanged_task_is_304(api: Any) -> None:
    """A poller that sends the ETag back gets no body until something changed."""
    task_id = api.submit()["task_id"]
    etag = api.client.get(f"/task/{task_id}").headers["ETag"]

    same = api.client.get(f"/task/{task_id}", headers={"If-None-Match": etag})
    api.claim(task_id)
    changed = api.client.get(f"/task/{task_id}", headers={"If-None-Match": etag})

    assert (same.status_code, same.data) == (304, b"")
    assert (changed.status_code, changed.json["status"]) == (200, "processing")


def test_live_progress_is_shown_and_an_older_attempts_is_not(api: Any, valkey_url: str) -> None:
    """Progress belongs to an attempt: a new one begins at 0 even while Redis has the old number."""
    from genpulse.live import Live

    api.service.live = Live(valkey_url)
    task_id = api.submit()["task_id"]
    api.claim(task_id)

    api.service.live.publish_progress(task_id, 7, 99.0, {})
    other = api.client.get(f"/task/{task_id}").json
    api.service.live.publish_progress(task_id, 1, 42.5, {"node_id": "3", "step": 5, "steps": 20})
    now = api.client.get(f"/task/{task_id}").json
    api.service.live.close()

    assert other["progress"] == 0.0
    assert (now["progress"], now["progress_detail"]["step"]) == (42.5, 5)


def test_progress_does_not_fall_while_redis_is_silent(api: Any, valkey_url: str) -> None:
    """Nor does a long poll end for it: the task is what it was, with the same ETag."""
    from genpulse.live import Live

    task_id = api.submit()["task_id"]
    held = api.claim(task_id)
    api.service.live = Live(valkey_url)
    api.service.live.publish_progress(task_id, 1, 63.0, {"node_id": "3", "step": 5, "steps": 8})
    before = api.client.get(f"/task/{task_id}")
    api.service.live.close()

    api.service.live = Live("redis://127.0.0.1:1/0")
    during = api.client.get(f"/task/{task_id}")
    waited = api.client.get(f"/task/{task_id}?wait=1", headers={"If-None-Match": before.headers["ETag"]})
    assert (during.json["progress"], during.json["progress_detail"]) == (63.0, before.json["progress_detail"])
    assert during.headers["ETag"] == before.headers["ETag"]
    assert waited.status_code == 304

    api.service.ledger.hand_back(held.fence, adopt_wait_s=None)
    api.claim(task_id)
    assert api.client.get(f"/task/{task_id}").json["progress"] == 0.0


def test_canceling_a_waiting_task_ends_it_and_may_be_repeated(api: Any) -> None:
    """200 with the final task, each time."""
    task_id = api.submit()["task_id"]

    answers = [api.client.post(f"/task/{task_id}/cancel") for _ in range(2)]

    assert [(answer.status_code, answer.json["status"]) for answer in answers] == [(200, "canceled")] * 2
    assert answers[0].json["attempts"] == []


def test_canceling_a_running_task_is_accepted(api: Any) -> None:
    """202: the worker is asked, and the cancel wins over its later finish."""
    task_id = api.submit()["task_id"]
    claim = api.claim(task_id)

    answer = api.client.post(f"/task/{task_id}/cancel")

    assert (answer.status_code, answer.json["status"]) == (202, "processing")
    api.service.ledger.finish(claim.fence, TaskStatus.COMPLETED)
    assert api.client.get(f"/task/{task_id}").json["status"] == "canceled"


def test_canceling_a_final_task_changes_nothing(api: Any) -> None:
    """200 with the task as it ended."""
    task_id = api.submit()["task_id"]
    api.complete(task_id, ("a.png", b"png", "image/png"))

    answer = api.client.post(f"/task/{task_id}/cancel")

    assert (answer.status_code, answer.json["status"]) == (200, "completed")


def test_pages_of_a_list_neither_skip_nor_repeat(api: Any) -> None:
    """The cursor goes by id, so tasks that arrive between two pages disturb nobody."""
    made = [api.submit()["task_id"] for _ in range(5)]

    first = api.client.get("/task?limit=2").json
    api.submit()
    second = api.client.get(f"/task?limit=2&cursor={first['next_cursor']}").json
    third = api.client.get(f"/task?limit=2&cursor={second['next_cursor']}").json

    pages = [[task["task_id"] for task in page["tasks"]] for page in (first, second, third)]
    assert pages == [made[:2:-1], made[2:0:-1], made[:1]]
    assert third["next_cursor"] is None


def test_a_list_is_filtered(api: Any) -> None:
    """By status, by type and by time of creation."""
    old, new = api.submit(), api.submit()
    api.fail(old["task_id"])

    by_status = api.client.get("/task?status=failed").json["tasks"]
    by_type = api.client.get("/task?task_type=other").json["tasks"]
    by_time = api.client.get("/task", query_string={"created_after": new["created_at"]}).json["tasks"]

    assert [task["task_id"] for task in by_status] == [old["task_id"]]
    assert (by_type, by_time) == ([], [])


@pytest.mark.parametrize("year", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"])
def test_the_first_and_the_last_year_are_times_too(api: Any, year: str) -> None:
    """Beyond both there are none, but what is asked for is not beyond them; also for a retry by filter."""
    task_id = api.submit()["task_id"]
    api.fail(task_id)
    is_first = year.startswith("0")

    for name, found in (("created_after", is_first), ("created_before", not is_first)):
        listed = api.client.get("/task", query_string={name: year})
        retried = api.client.post("/task/retry", json={"status": "failed", "dry_run": True, name: year})

        assert [task["task_id"] for task in listed.json["tasks"]] == [task_id] * found
        assert [pair["retry_of"] for pair in retried.json["retried"]] == [task_id] * found


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=201",
        "limit=x",
        "limit=1&limit=2",
        "cursor=x",
        "status=new",
        "colour=red",
        "created_after=1",
        "created_after=2026-02-30T00:00:00Z",
        "created_after=0001-01-01T00:00:00%2B23:59",
        "created_after=2026-01-01T00:00:00",
        "task_type=%00",
    ],
)
def test_a_query_that_means_nothing_is_refused(api: Any, query: str) -> None:
    """422 that names the parameter; never a list that was not asked for, and never a 500."""
    answer = api.client.get(f"/task?{query}")

    assert (answer.status_code, answer.json["code"]) == (422, "invalid_request")


def test_labels_come_back_as_they_were(api: Any) -> None:
    """Metadata is the caller's own, whatever the script."""
    labels = {"réf": "日本語 🚀", "empty": ""}

    task_id = api.submit(metadata=labels)["task_id"]

    assert api.client.get(f"/task/{task_id}").json["metadata"] == labels


def test_a_seed_of_64_bits_is_kept_exactly(api: Any) -> None:
    """ComfyUI's seeds go up to 2**64 - 1, beyond what a float can hold."""
    task_id = api.submit(params={"value": 2**64 - 1})["task_id"]

    assert api.service.ledger.get(task_id).params["value"] == 2**64 - 1


def test_without_the_ledger_submissions_are_503(lone_api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller is told to come back; nothing pretends to have been accepted."""
    broken = LedgerUnavailable("connection refused at 10.0.0.7")
    monkeypatch.setattr(
        type(lone_api.service.ledger), "submit", lambda *_, **__: (_ for _ in ()).throw(broken)
    )

    answer = lone_api.client.post("/task", json={"task_type": "echo", "params": {}})

    assert (answer.status_code, answer.json["code"], answer.json["retryable"]) == (503, "unavailable", True)
    assert int(answer.headers["Retry-After"]) > 0
    assert "10.0.0.7" not in answer.text


def test_the_task_types_come_with_their_schema(lone_api: Any) -> None:
    """A caller can build a form from it."""
    (found,) = lone_api.client.get("/task-types").json["task_types"]

    assert (found["task_type"], found["aliases"], found["queue"]) == ("echo", ["repeat"], "cpu")
    assert found["params_schema"]["properties"]["text"]["type"] == "string"


def register(api: Any, *, healthy: bool = True, consuming: bool = True) -> None:
    """A live worker of both queues with one ComfyUI server."""
    api.service.ledger.register_worker(
        name="w@host",
        host="host",
        pid=1,
        queues=["comfy", "comfy@gpu1", "cpu", "cpu@gpu1"],
        servers=[{"name": "gpu1", "healthy": healthy, "reason": "" if healthy else "no progress"}],
        slots=2,
        consuming=consuming,
        session_key=1,
        version="1",
    )


def waits(api: Any, task_id: str) -> tuple[str, str]:
    """Why a task waits: code and text."""
    reason = api.client.get(f"/task/{task_id}").json["wait_reason"]
    return reason["code"], reason["text"]


@pytest.fixture
def up_api(api: Any, valkey_url: str) -> Any:
    """The API with a broker that answers."""
    from genpulse.live import Live

    api.service.live = Live(valkey_url)
    yield api
    api.service.live.close()


def test_a_waiting_task_says_why(up_api: Any) -> None:
    """From no worker at all to the next in the line; a sick ComfyUI holds up only what needs one."""
    api = up_api
    short = api.submit()["task_id"]
    render = api.service.ledger.submit(NewTask("echo", "comfy", {}, owner="default"))[0].id
    behind = api.service.ledger.submit(NewTask("echo", "comfy", {}, owner="default"))[0].id

    assert waits(api, render) == ("no_worker", "Waiting for a worker of the queue comfy.")
    register(api, healthy=False)
    assert waits(api, render)[0] == "no_server"
    assert waits(api, short)[0] == "next"
    register(api, consuming=False)
    assert waits(api, render) == ("no_worker", "The workers of the queue comfy are stopping.")
    register(api)
    assert waits(api, render) == ("next", "The task goes next.")
    assert waits(api, behind) == ("queued", "1 task goes first.")


def test_a_task_waits_for_the_broker(api: Any) -> None:
    """The task is recorded and a worker is there, and nothing can be sent to it."""
    task_id = api.submit()["task_id"]
    register(api)

    assert waits(api, task_id)[0] == "no_broker"


def test_a_task_waits_for_its_next_attempt_only_until_that_is_due(up_api: Any) -> None:
    """Afterwards it waits for what all the others wait for."""
    api = up_api
    register(api)
    later, due = api.submit()["task_id"], api.submit()["task_id"]
    for task_id, delay_s in ((later, 60.0), (due, 0.0)):
        fence = api.claim(task_id).fence
        api.service.ledger.retry_later(fence, ErrorInfo(code="server_lost", message="m"), delay_s=delay_s)

    code, text = waits(api, later)

    assert code == "backoff"
    assert 1 <= int(re.findall(r"due in (\d+) s", text)[0]) <= 60
    assert waits(api, due)[0] in {"next", "queued"}


def test_a_task_waits_for_the_server_that_has_its_prompt(up_api: Any) -> None:
    """Handed back while its prompt runs on: only that server's workers may go on with it."""
    api = up_api
    task_id = api.submit()["task_id"]
    held = api.claim(task_id)
    prompt(api.service.ledger, held)
    assert api.service.ledger.hand_back(held.fence, adopt_wait_s=60)

    assert waits(api, task_id)[1].startswith("The server gpu1 has what the task needs, and no worker")
    register(api)
    assert waits(api, task_id) == (
        "bound",
        "The task goes on on the server gpu1, which has what it needs.",
    )


def test_status_counts_the_connections_to_the_database(api: Any) -> None:
    """On PostgreSQL, where there is a limit to them."""
    found = api.client.get("/status").json.get("database")

    if api.service.ledger.is_postgresql:
        assert 1 <= found["connections"] < found["limit"]
    else:
        assert found is None


def test_status_says_which_queue_nobody_takes_from(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue whose only ComfyUI is sick has no slots; one that needs none keeps its own."""
    monkeypatch.setattr("genpulse.web.condition.REMEMBERED_S", 0)
    register(api, healthy=False)

    found = api.client.get("/status").json

    assert found["status"] == "degraded"
    assert found["queues"]["cpu"]["slots"] == 2
    assert "The server gpu1 is not healthy: no progress." in found["problems"]
    assert not any("queue cpu" in problem for problem in found["problems"])
    register(api, consuming=False)
    assert "No worker of the queue cpu takes tasks just now." in api.client.get("/status").json["problems"]
