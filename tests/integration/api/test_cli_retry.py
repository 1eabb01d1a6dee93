"""``genpulse retry`` against the real API: what is sent again, what is shown, and the exit codes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from genpulse.cli import Exit, cli, instant
from genpulse.client import ApiRefused, Client


@pytest.fixture
def failed(lone_api: Any) -> list[str]:
    """Three failed tasks, the oldest first."""
    found = [str(lone_api.submit()["task_id"]) for _ in range(3)]
    for task_id in found:
        lone_api.fail(task_id)
    return found


def run(*arguments: str) -> Result:
    """One command line, in this process."""
    return CliRunner().invoke(cli, ["retry", *arguments])


def test_named_tasks_are_sent_again(lone_api: Any, url: str, failed: list[str]) -> None:
    """A line for each on standard output; what is refused does not stop the others, and shows in the exit code."""
    waiting = str(lone_api.submit()["task_id"])

    shown = run(failed[0], waiting, failed[2], "--url", url)

    pairs = [line.split() for line in shown.stdout.splitlines()]
    assert [pair[0] for pair in pairs] == [failed[0], failed[2]]
    for old, new in pairs:
        assert lone_api.client.get(f"/task/{new}").json["retry_of"] == old
    assert f"{waiting}: The task is pending" in shown.stderr
    assert "(not_final)" in shown.stderr
    assert shown.stderr.endswith("retried 2 tasks\n")
    assert shown.exit_code == Exit.REFUSED


def test_a_filter_is_shown_before_it_is_used(lone_api: Any, url: str, failed: list[str]) -> None:
    """A dry run names what would be sent again and records nothing; then it is done, once."""
    filters = ("--status", "failed", "--error-code", "node_error", "--since", "1h", "--url", url)

    dry = run(*filters, "--dry-run")
    assert (dry.stdout.split(), dry.stderr) == (failed, "would retry 3 tasks\n")
    assert (dry.exit_code, lone_api.rows("tasks")) == (Exit.OK, 3)

    done = run(*filters)
    assert [line.split()[0] for line in done.stdout.splitlines()] == failed
    again = run(*filters, "--json")
    assert json.loads(again.stdout) == {"retried": [], "refused": []}
    assert again.stderr == "retried 0 tasks\n"
    assert lone_api.rows("tasks") == 6


def test_the_limit_takes_the_oldest(url: str, failed: list[str]) -> None:
    """So that a careful operator goes on in steps."""
    first = run("--status", "failed", "--limit", "1", "--url", url)
    rest = run("--status", "failed", "--limit", "5", "--url", url)

    assert [line.split()[0] for line in first.stdout.splitlines()] == failed[:1]
    assert first.stderr == "retried 1 task\n"
    assert [line.split()[0] for line in rest.stdout.splitlines()] == failed[1:]


def test_pages_are_followed_to_the_end(url: str, failed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The API bounds a call; the command does not."""
    monkeypatch.setattr("genpulse.cli.RETRY_PAGE", 2)

    shown = run("--status", "failed", "--url", url)

    assert [line.split()[0] for line in shown.stdout.splitlines()] == failed


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--dry-run",),
        ("--again",),
        ("--limit", "3"),
        ("x", "--status", "failed"),
        ("x", "--limit", "3"),
        ("--since", "yesterday"),
        ("--status", "pending"),
    ],
)
def test_wrong_usage_sends_nothing_again(lone_api: Any, url: str, failed: list[str], arguments: Any) -> None:
    """Without a filter nothing is meant; never "all of them"."""
    shown = run(*arguments, "--url", url)

    assert shown.exit_code == Exit.USAGE
    assert lone_api.rows("tasks") == len(failed)


def test_an_api_that_is_away_is_exit_code_3() -> None:
    """Nothing was done, and the count says so."""
    shown = run("--status", "failed", "--url", "http://127.0.0.1:1")

    assert shown.exit_code == Exit.UNREACHABLE
    assert "retried 0 tasks" in shown.stderr


def test_times_are_spelled_in_two_ways() -> None:
    """So long ago, or as the contract has it; the API judges the details."""
    assert instant("--since", "2026-10-31T12:00:00Z") == "2026-10-31T12:00:00Z"
    assert instant("--since", "7d") < instant("--since", "90m") < instant("--since", "1s")


def test_the_client_deletes(lone_api: Any, url: str, failed: list[str]) -> None:
    """A final task goes; what is not final, or gone, is refused."""
    with Client(url) as client:
        client.delete(failed[0])
        with pytest.raises(ApiRefused, match="no task"):
            client.delete(failed[0])
        with pytest.raises(ApiRefused, match="cancel it first"):
            client.delete(lone_api.submit()["task_id"])
    assert lone_api.client.get(f"/task/{failed[0]}").status_code == 404
