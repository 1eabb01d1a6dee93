"""``genpulse submit --grid`` and ``genpulse batch`` against the real API, and the client's own methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click import UsageError
from click.testing import CliRunner, Result

from genpulse.cli import Exit, cli, parse_grid
from genpulse.client import ApiRefused, Client, WaitTimeout


@pytest.fixture
def params(tmp_path: Path) -> str:
    """A file of params of the type ``echo``."""
    path = tmp_path / "params.json"
    path.write_text('{"text": "a"}')
    return str(path)


def run(*arguments: str) -> Result:
    """One command line, in this process."""
    return CliRunner().invoke(cli, arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=1,2,3", ("seed", [1, 2, 3])),
        ("6.text=a fox,b", ("6.text", ["a fox", "b"])),
        ("on=true,null", ("on", [True, None])),
        ("seed=-1..2", ("seed", [-1, 0, 1, 2])),
        ('size:=[[64, 64], "x"]', ("size", [[64, 64], "x"])),
    ],
)
def test_a_grid_is_written_shortly(text: str, expected: tuple[str, list[Any]]) -> None:
    """Values with commas, a range of numbers, or a JSON list; types as for an input."""
    assert parse_grid(text) == expected


@pytest.mark.parametrize(
    "text", ["seed", "=1", "x:=5", "x:=[]", "x=@/nowhere", "x=1..1001", "x=2..1", ":=[1]"]
)
def test_a_grid_that_means_nothing_is_wrong_usage(text: str) -> None:
    """Before anything is sent."""
    with pytest.raises(UsageError):
        parse_grid(text)


def test_a_grid_becomes_a_batch(lone_api: Any, url: str, params: str, tmp_path: Path) -> None:
    """Its id on standard output; each combination is a task with its values over the file's."""
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\ntwo, three\n", encoding="utf-8")

    shown = run("submit", params, "--type", "echo", "-g", f"text=@{lines}", "-g", "value=1..3", "--url", url)

    assert shown.exit_code == 0, shown.output
    with Client(url) as client:
        tasks = list(client.batch_tasks(shown.stdout.strip()))
    assert [task["values"] for task in tasks] == [
        {"text": text, "value": value} for text in ("one", "two, three") for value in (1, 2, 3)
    ]


def test_what_a_batch_made_is_saved(lone_api: Any, url: str, params: str, tmp_path: Path) -> None:
    """A folder for each task; the exit code says that one failed."""
    made = json.loads(
        run("submit", params, "--type", "echo", "-g", "value=1,2", "--json", "--url", url).stdout
    )
    lone_api.complete(made["task_ids"][0], ("a.png", b"png", "image/png"))
    lone_api.fail(made["task_ids"][1])

    shown = run("batch", made["batch_id"], "-o", str(tmp_path / "out"), "--url", url)

    assert shown.exit_code == Exit.FAILED
    assert shown.stdout.splitlines() == [str(tmp_path / "out" / "0000" / "a.png")]
    assert (tmp_path / "out" / "0000" / "a.png").read_bytes() == b"png"
    assert "failed: 1 of 2 completed, 1 failed" in shown.stderr


def test_a_batch_is_shown_and_canceled(lone_api: Any, url: str) -> None:
    """In a line for people, or whole as JSON."""
    body = {"tasks": [{"task_type": "echo", "params": {}}] * 3}
    with Client(url) as client:
        batch_id = client.submit_batch(body)["batch_id"]
        with pytest.raises(WaitTimeout):
            client.follow_batch(batch_id, timeout_s=0)

    before, canceled = run("batch", batch_id, "--url", url), run("batch", batch_id, "--cancel", "--url", url)
    whole = json.loads(run("batch", batch_id, "--json", "--url", url).stdout)

    assert before.stdout == "pending: 0 of 3 completed, 3 pending\n"
    assert canceled.stdout == "canceled: 0 of 3 completed, 3 canceled\n"
    assert len(whole["tasks"]) == 3


def test_the_client_lists_over_pages(lone_api: Any, url: str) -> None:
    """With the filters of the contract."""
    kept = [lone_api.submit(metadata={"k": "v"})["task_id"] for _ in range(3)]
    lone_api.submit()

    with Client(url) as client:
        found = [task["task_id"] for task in client.tasks(limit="2", **{"metadata[k]": "v"})]

    assert found == kept[::-1]


def test_a_refused_batch_names_the_value(lone_api: Any, url: str, params: str) -> None:
    """Exit code 5 and the place in the grid."""
    shown = run("submit", params, "--type", "echo", "-g", "text=a,5", "--url", url)

    assert shown.exit_code == Exit.REFUSED
    assert "/grid/text/1" in shown.stderr
    with Client(url) as client, pytest.raises(ApiRefused) as refused:
        client.submit_batch({"tasks": []})
    assert refused.value.status == 422
