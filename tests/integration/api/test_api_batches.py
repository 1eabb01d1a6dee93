"""Many tasks in one request, over HTTP, on both databases; and the list's filters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from genpulse.errors import InvalidRequest
from genpulse.tasks import batch
from genpulse.tasks.batch import Grid
from genpulse.tasks.registry import Registry

TASK: dict[str, Any] = {"task_type": "echo", "params": {"text": "hi"}}
WORKFLOW: dict[str, Any] = {
    "1": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20, "image": ["2", 0]}},
    "2": {"class_type": "LoadImage", "inputs": {"image": "cat.png"}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": ""}, "_meta": {"title": "INPUT_prompt"}},
}


def pointers(answer: Any) -> list[str]:
    """Where the mistakes are; the answer is a 422."""
    assert answer.status_code == 422, answer.text
    return [error["pointer"] for error in answer.json["errors"]]


def test_a_grid_makes_a_task_of_each_combination(api: Any) -> None:
    """In order, the last place fastest; each says what the grid gave it, and runs by itself."""
    body = {
        "template": {**TASK, "params": {"text": "same"}, "priority": "high", "metadata": {"k": "v"}},
        "grid": {"value.seed": [1, 2], "value.6.text": ["a", "b", "c"]},
    }
    woken: list[int] = []
    api.service.wake = lambda: woken.append(api.rows("tasks"))

    answer = api.client.post("/task/batch", json=body)

    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == answer.json["urls"]["self"]
    assert (answer.json["total"], woken) == (6, [6])
    found = api.client.get(answer.headers["Location"]).json
    assert [task["values"] for task in found["tasks"]] == [
        {"value.seed": seed, "value.6.text": text} for seed, text in itertools.product([1, 2], "abc")
    ]
    assert [task["task_id"] for task in found["tasks"]] == answer.json["task_ids"]
    assert {(task["priority"], task["metadata"]["k"]) for task in found["tasks"]} == {("high", "v")}
    whole = api.service.ledger.get(answer.json["task_ids"][4]).params
    assert whole == {"value": {"seed": 2, "6.text": "b"}, "text": "same"}
    one = api.client.get(f"/task/{answer.json['task_ids'][4]}").json
    assert one["batch_id"] == answer.json["batch_id"]


def test_a_batch_is_followed_and_canceled(api: Any) -> None:
    """Counts by status, a page of tasks by cursor, the cancel as for one task; under ``/v1`` all stays there."""
    made = api.client.post("/v1/task/batch", json={"tasks": [TASK] * 5}).json
    api.complete(made["task_ids"][0])
    api.fail(made["task_ids"][1])
    api.claim(made["task_ids"][2])

    first = api.client.get(made["urls"]["self"] + "?limit=3")
    second = api.client.get(first.json["next"])
    only_counts = api.client.get(made["urls"]["self"] + "?limit=0").json
    canceled = [api.client.post(made["urls"]["cancel"]) for _ in range(2)]

    counts = {"pending": 2, "processing": 1, "completed": 1, "failed": 1, "canceled": 0, "deleted": 0}
    assert first.json["counts"] == counts
    assert (first.json["status"], first.json["progress"]) == ("processing", 40.0)
    assert [task["index"] for task in first.json["tasks"] + second.json["tasks"]] == [0, 1, 2, 3, 4]
    assert second.json["next"] is None
    assert (only_counts["tasks"], only_counts["next_cursor"]) == ([], None)
    assert [answer.status_code for answer in canceled] == [202, 202]
    assert canceled[1].json["counts"] == counts | {"pending": 0, "canceled": 2}
    failed = api.client.get(made["urls"]["tasks"] + "&status=failed").json["tasks"]
    assert [task["task_id"] for task in failed] == [made["task_ids"][1]]
    links = [*first.json["urls"].values(), first.json["next"], failed[0]["urls"]["self"]]
    assert {urlsplit(link).path.split("/")[1] for link in links} == {"v1"}


def test_a_batch_that_waits_is_canceled_at_once(api: Any) -> None:
    """200, each time."""
    made = api.client.post("/task/batch", json={"tasks": [TASK, TASK]}).json

    answers = [api.client.post(made["urls"]["cancel"]) for _ in range(2)]

    assert [(each.status_code, each.json["status"]) for each in answers] == [(200, "canceled")] * 2


def test_the_same_key_and_body_give_the_same_batch(api: Any) -> None:
    """And another order of the grid's names is another body, for it is another order of tasks."""
    body = {"template": TASK, "grid": {"value": [1, 2], "text": ["a", "b"]}}
    turned = {"template": TASK, "grid": {"text": ["a", "b"], "value": [1, 2]}}
    headers = {"Idempotency-Key": "k"}

    first, second, other = (
        api.client.post("/task/batch", json=each, headers=headers) for each in (body, body, turned)
    )

    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json["task_ids"] == second.json["task_ids"]
    assert second.headers["Idempotency-Replayed"] == "true"
    assert (other.status_code, other.json["code"]) == (422, "idempotency_key_reuse")
    assert api.rows("tasks") == 4


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"tasks": [TASK] * 17 + [{**TASK, "priority": "urgent"}]}, "/tasks/17/priority"),
        ({"tasks": [TASK, {**TASK, "params": {"colour": 1}}]}, "/tasks/1/params/colour"),
        ({"tasks": [TASK, {**TASK, "task_type": "none"}]}, "/tasks/1/task_type"),
        ({"tasks": [{**TASK, "params": {"server_address": "h"}}]}, "/tasks/0/params/server_address"),
        ({"tasks": []}, "/tasks"),
        ({"tasks": [TASK] * 1001}, "/tasks"),
        ({"tasks": None}, "/tasks"),
        ({}, ""),
        ({"tasks": [TASK], "template": TASK, "grid": {"text": ["a"]}}, ""),
        ({"template": TASK}, ""),
        ({"grid": {"text": ["a"]}}, ""),
        ({"template": None, "grid": {"text": ["a"]}}, ""),
        ({"template": TASK, "grid": {}}, "/grid"),
        ({"template": TASK, "grid": {"text": []}}, "/grid/text"),
        ({"template": TASK, "grid": {"text": "abc"}}, "/grid/text"),
        ({"template": TASK, "grid": {"value": [0] * 32, "text": ["a"] * 32}}, "/grid"),
        ({"template": TASK, "grid": {"text": ["a", "b", 3]}}, "/grid/text/2"),
        ({"template": TASK, "grid": {"value": [1, 2], "text": ["a", 3]}}, "/grid/text/1"),
        ({"template": TASK, "grid": {"text": ["a", 3], "value": [1, 2]}}, "/grid/text/1"),
        ({"template": TASK, "grid": {"text": ["a"], "a/b.c": [1]}}, "/grid/a~1b.c/0"),
        ({"template": TASK, "grid": {"text.x": [1]}}, "/grid/text.x"),
        ({"template": TASK, "grid": {"value": [1], "value.x": [1]}}, "/grid/value.x"),
        ({"template": TASK, "grid": {".x": [1]}}, "/grid/.x"),
        ({"template": TASK, "grid": {"value.": [1]}}, "/grid/value."),
        ({"template": {**TASK, "params": {"text": 5}}, "grid": {"value": [1]}}, "/template/params/text"),
        ({"template": {**TASK, "timeout_s": 0}, "grid": {"value": [1]}}, "/template/timeout_s"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_recorded(lone_api: Any, body: Any, where: str) -> None:
    """All or nothing: the pointer leads to the task, the template or the value of the grid."""
    answer = lone_api.client.post("/task/batch", json=body)

    assert where in pointers(answer), answer.text
    assert (lone_api.rows("tasks"), lone_api.rows("batches")) == (0, 0)


def test_a_grid_may_not_unfold_into_more_than_a_body(lone_api: Any) -> None:
    """A small request must not become a gigabyte in the ledger."""
    long = ["x" * 1000 + str(number) for number in range(30)]
    body = {"template": TASK, "grid": {"text": long, "value": list(range(30))}}

    answer = lone_api.client.post("/task/batch", json=body)

    assert (answer.status_code, answer.json["code"]) == (413, "too_large")
    assert lone_api.rows("tasks") == 0


def test_a_grid_below_a_large_workflow_is_refused_before_the_work(
    real_api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand copies of a graph would be made, checked and compared; a value of ``inputs`` needs none."""
    monkeypatch.setattr(Grid, "requests", lambda _: pytest.fail("it was unfolded"))
    monkeypatch.setattr(batch, "MAX_COPIED", 4000)
    node = {"class_type": "SaveImage", "inputs": {"seed": 1, "images": ["0", 0]}}
    params = {"workflow": {str(number): node for number in range(20)}, "inputs": {}}
    changed = [{**node, "inputs": {"seed": seed}} for seed in range(50)]
    body = {"template": {"task_type": "comfyui", "params": params}, "grid": {"workflow.6": changed}}

    answer = real_api.client.post("/task/batch", json=body)

    assert (answer.status_code, answer.json["code"]) == (413, "too_large")
    assert [error["pointer"] for error in answer.json["errors"]] == ["/grid/workflow.6"]
    assert "inputs" in answer.json["detail"]
    assert real_api.rows("tasks") == 0


@pytest.mark.parametrize(
    ("field", "value", "size", "fits"),
    [
        ("workflow", {str(n): {"inputs": {"a": n}} for n in range(100)}, 1000, True),  # of real life
        ("workflow", {str(n): {"inputs": {"a": n}} for n in range(5000)}, 60, True),
        ("workflow", {str(n): {"inputs": {"a": n}} for n in range(5000)}, 70, False),
        ("inputs", {"image": "data:image/png;base64," + "A" * 2**22}, 1000, True),  # is not copied
        ("inputs", {"image": "data:image/png;base64," + "A" * 2**23}, 1000, False),
    ],
)
def test_how_much_a_grid_may_copy(field: str, value: Any, size: int, fits: bool) -> None:
    """By the number of values, not by the length of texts, which all copies have in common."""
    grid = Grid({**TASK, "params": {field: value}}, {f"{field}.6": list(range(size))})

    try:
        grid.check_copies()
    except InvalidRequest as error:
        assert (error.problem, fits) == ("too_large", False)  # noqa: PT017 - either way is right
    else:
        assert fits


def test_the_place_of_a_mistake_in_a_grid_is_found_for_each_combination() -> None:
    """The pointer names the value that this combination took from each place."""
    values = {"a": [0, 1], "b.c": [0, 1, 2], "d": [0, 1]}
    grid = Grid(TASK, values)

    for number, expected in enumerate(itertools.product(*values.values())):
        assert grid.requests()[number]["params"] | {"text": 0} == {
            "text": 0, "a": expected[0], "b": {"c": expected[1]}, "d": expected[2]
        }  # fmt: skip
        assert grid.locate(number, "/params/a") == f"/grid/a/{expected[0]}"
        assert grid.locate(number, "/params/b/c/x") == f"/grid/b.c/{expected[1]}/x"
        assert grid.locate(number, "/params/d") == f"/grid/d/{expected[2]}"
        assert grid.locate(number, "/params/b") == f"/grid/b.c/{expected[1]}"  # only the grid has a "b"
        assert grid.locate(number, "/params/text") == "/template/params/text"


@pytest.fixture
def real_api(build: Any, sqlite_ledger_url: str, tmp_path: Path) -> Iterator[Any]:
    """The API with the task types that are installed."""
    made = build(sqlite_ledger_url, tmp_path / "data", registry=Registry.load())
    yield made
    made.service.ledger.close()


def test_the_inputs_of_a_workflow_are_checked_like_single_ones(real_api: Any) -> None:
    """Names, kinds, links and files; by the value of the grid, or by the task."""

    def send(**grid: list[Any]) -> Any:
        template = {"task_type": "comfyui", "params": {"workflow": WORKFLOW}}
        named = {f"inputs.{name.replace('__', '.')}": values for name, values in grid.items()}
        return real_api.client.post("/task/batch", json={"template": template, "grid": named})

    unknown = send(promt=["a"])
    kind = send(prompt=["a", "b"], **{"1__seed": [1, "two"]})
    link = send(**{"1__image": ["x"]})
    asset = send(**{"2__image": ["cat.png", "asset:00000000-0000-7000-8000-000000000000"]})
    fine = send(prompt=["a", "b"], **{"1__seed": [1, 2]})

    assert (unknown.json["code"], pointers(unknown)) == ("unknown_input", ["/grid/inputs.promt/0"])
    assert pointers(kind) == ["/grid/inputs.1.seed/1"]
    assert pointers(link) == ["/grid/inputs.1.image/0"]
    assert asset.json["code"] == "missing_asset"
    assert fine.status_code == 202
    assert real_api.rows("tasks") == 4


def test_a_workflow_that_all_bring_along_is_stored_once(real_api: Any) -> None:
    """Down to its nodes: where only a seed differs, a task's row has that node alone."""
    workflows = [{**WORKFLOW, "1": {**WORKFLOW["1"], "inputs": {"seed": seed}}} for seed in range(3)]
    tasks = [{"task_type": "comfyui", "params": {"workflow": each}} for each in workflows]

    answer = real_api.client.post("/task/batch", json={"tasks": tasks})

    ledger = real_api.service.ledger
    with ledger.engine.connect() as connection:
        stored = [row[0] for row in connection.exec_driver_sql("SELECT params FROM tasks ORDER BY id")]
    assert all("CLIPTextEncode" not in params and "seed" in params for params in stored)
    read = [ledger.get(task_id).params for task_id in answer.json["task_ids"]]
    assert [params["workflow"] for params in read] == workflows


@pytest.mark.parametrize("batch_id", ["nope", "7c9e6679-7425-40de-944b-e07fc1f90ae7", "%00"])
def test_an_unknown_batch_is_404(api: Any, batch_id: str) -> None:
    """Whatever its id looks like."""
    for answer in (
        api.client.get(f"/batch/{batch_id}"),
        api.client.post(f"/batch/{batch_id}/cancel"),
    ):
        assert (answer.status_code, answer.json["code"]) == (404, "not_found")
    assert (
        api.client.get("/task", query_string={"batch_id": str(api.submit()["task_id"])}).json["tasks"] == []
    )


def test_unchanged_batches_and_lists_are_304(api: Any) -> None:
    """Also if a proxy made the ETag a weak one."""
    made = api.client.post("/task/batch", json={"tasks": [TASK, TASK]}).json

    for path in (f"/batch/{made['batch_id']}", "/task?limit=1", f"/task/{made['task_ids'][0]}"):
        etag = api.client.get(path).headers["ETag"]
        assert etag.startswith('"')
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            same = api.client.get(path, headers={"If-None-Match": known})
            assert (same.status_code, same.data, same.headers["ETag"]) == (304, b"", etag)
    etags = {api.client.get(path).headers["ETag"] for path in (f"/batch/{made['batch_id']}", "/task")}
    api.client.post(made["urls"]["cancel"])
    for path in (f"/batch/{made['batch_id']}", "/task"):
        changed = api.client.get(path, headers={"If-None-Match": ", ".join(etags)})
        assert changed.status_code == 200


def test_a_list_is_filtered_by_what_the_query_says(api: Any) -> None:
    """Several statuses, entries of the metadata, an alias of a type; the next page has the same filters."""
    made = [
        api.submit(metadata={"project": "fox & co", "n": str(number)}, task_type="echo")["task_id"]
        for number in range(4)
    ]
    api.submit()
    api.client.post(f"/task/{made[0]}/cancel")
    api.claim(made[1])

    def found(**query: Any) -> list[str]:
        answer = api.client.get("/task", query_string=query)
        assert answer.status_code == 200, answer.text
        return [task["task_id"] for task in answer.json["tasks"]]

    assert found(**{"metadata[project]": "fox & co"}) == made[::-1]
    assert found(**{"metadata[project]": "fox & co", "metadata[n]": "2"}) == [made[2]]
    assert found(status="processing,canceled") == [made[1], made[0]]
    assert found(**{"status": "pending", "metadata[project]": "fox & co", "task_type": "repeat"}) == [
        made[3],
        made[2],
    ]
    page = api.client.get("/v1/task", query_string={"metadata[project]": "fox & co", "limit": 3}).json
    assert urlsplit(page["next"]).path == "/v1/task"
    rest = api.client.get(page["next"]).json
    assert ([task["task_id"] for task in rest["tasks"]], rest["next"]) == ([made[0]], None)


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("limit=0", "query:limit"),
        ("limit=1&limit=2", "query:limit"),
        ("cursor=x", "query:cursor"),
        ("status=new", "query:status[0]"),
        ("status=pending,", "query:status[1]"),
        ("status=", "query:status[0]"),
        ("colour=red", "query:colour"),
        ("task_type=%00", "query:task_type"),
        ("batch_id=7", "query:batch_id"),
        ("created_before=yesterday", "query:created_before"),
        ("metadata=x", "query:metadata"),
        ("metadata[]=x", "query:metadata[]"),
        (
            "metadata[a]=1&metadata[b]=1&metadata[c]=1&metadata[d]=1&metadata[e]=1&metadata[f]=1",
            "query:metadata",
        ),
        ("metadata[a%00]=x", "query:metadata[a\ufffd]"),
        ("limit[a]=1", "query:limit[a]"),
    ],
)
def test_a_mistake_in_a_query_is_named(lone_api: Any, query: str, pointer: str) -> None:
    """``query:<name>``, with the key or the place in brackets."""
    assert pointers(lone_api.client.get(f"/task?{query}")) == [pointer]


@pytest.mark.parametrize("query", ["limit=201", "limit=-1", "cursor=x", "cursor=1000", "cursor=1e2", "x=1"])
def test_a_batch_is_read_with_a_query_that_means_something(lone_api: Any, query: str) -> None:
    """422 that names the parameter."""
    made = lone_api.client.post("/task/batch", json={"tasks": [TASK]}).json

    answer = lone_api.client.get(f"/batch/{made['batch_id']}?{query}")

    assert pointers(answer) == ["query:" + query.partition("=")[0]]
