"""`genpulse keys`, and who may listen where: the command line on a real ledger."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from genpulse import cli as commands
from genpulse.cli import Exit, cli
from genpulse.ledger import KeyText, Ledger
from tests.support.ledger import open_ledger


@pytest.fixture
def ledger(sqlite_ledger_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ledger]:
    """The ledger that the commands find by the environment."""
    for name in [name for name in os.environ if name.startswith("GENPULSE_") and "REQUIRE" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GENPULSE_DATABASE_URL", sqlite_ledger_url)
    monkeypatch.chdir(tmp_path)
    with open_ledger(sqlite_ledger_url) as opened:
        yield opened


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the process would become."""
    seen: list[str] = []

    def become(module: str, *_: str) -> None:
        seen.append(module)

    monkeypatch.setattr(commands, "execute", become)
    # An option is put into the environment; this takes it away again.
    for name in ("GENPULSE_HOST", "GENPULSE_FLOWER_HOST", "FLOWER_BASIC_AUTH"):
        monkeypatch.setenv(name, "")
    return seen


def run(*arguments: str) -> Result:
    """One command."""
    return CliRunner().invoke(cli, ["keys", *arguments])


def test_a_new_key_is_all_of_standard_output(ledger: Ledger) -> None:
    """`KEY=$(genpulse keys create shop)` works; what a person wants to know is beside it."""
    result = run("create", "shop", "--expires-in", "90d", "--max-running", "2")

    key = KeyText.parse(result.stdout.strip())
    assert key is not None
    found = ledger.find_key(key.id)
    assert key.fits(found)
    assert found is not None
    assert (found.name, found.owner, found.scopes, found.max_running) == (
        "shop",
        "shop",
        ("submit", "read"),
        2,
    )
    assert found.expires_at is not None
    assert round((found.expires_at - found.created_at).total_seconds()) == 90 * 86_400
    assert key.id in result.stderr
    assert key.text not in result.stderr


def test_as_json_it_is_one_object_with_the_key(ledger: Ledger) -> None:
    """For programs; the digest stays where it is."""
    told = json.loads(run("create", "ops", "--owner", "ada", "--scope", "admin", "--json").stdout)

    assert KeyText.parse(told["key"]) is not None
    assert (told["owner"], told["scopes"], told["usable"]) == ("ada", ["admin"], True)
    listed = json.loads(run("list", "--json").stdout)
    assert listed == [{name: value for name, value in told.items() if name != "key"}]


def test_keys_are_listed_without_themselves(ledger: Ledger) -> None:
    """Ended ones only on demand."""
    text = run("create", "shop", "--rate", "5/second").stdout.strip()
    ended = run("create", "old").stdout.strip()
    assert run("revoke", ended).exit_code == Exit.OK  # the whole key does, too

    usual, everything = run("list").stdout, run("list", "--all").stdout

    assert re.search(r"shop +shop +submit,read +usable +never +5/second", usual)
    assert "old" not in usual
    assert re.search(r"old +old .*revoked", everything)
    assert text.rpartition("_")[2] not in usual + everything


def test_an_unknown_key_cannot_be_revoked(ledger: Ledger) -> None:
    """And nothing is said to have happened."""
    result = run("revoke", "nothing")

    assert (result.exit_code, result.stderr) == (Exit.FAILED, "Error: there is no key nothing\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("a/b",),
        ("../x",),
        ("",),
        ("x" * 65,),
        ("x", "--owner", "a b"),
        ("x", "--scope", "root"),
        ("x", "--rate", "fast"),
        ("x", "--rate", "-1/second"),
        ("x", "--expires-in", "soon"),
        ("x", "--expires-in", "999999999w"),
        ("x", "--max-queued", "-1"),
    ],
)
def test_what_makes_no_key_is_refused(ledger: Ledger, arguments: tuple[str, ...]) -> None:
    """With the option's name, and nothing made."""
    assert run("create", *arguments).exit_code == Exit.USAGE
    assert ledger.list_keys() == []


def test_without_tables_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line and exit code 3."""
    monkeypatch.setenv("GENPULSE_DATABASE_URL", f"sqlite:///{tmp_path / 'new.db'}")

    result = run("create", "shop")

    assert result.exit_code == Exit.UNREACHABLE
    assert "genpulse migrate" in result.stderr
    assert result.stdout == ""


def test_with_a_key_in_the_ledger_the_api_may_listen_elsewhere(ledger: Ledger, executed: list[str]) -> None:
    """And without one it may not, whatever the ledger is."""
    refused = CliRunner().invoke(cli, ["start-api", "--host", "0.0.0.0"])
    run("create", "shop")
    taken = CliRunner().invoke(cli, ["start-api", "--host", "0.0.0.0"])

    assert (refused.exit_code, taken.exit_code) == (Exit.USAGE, Exit.OK)
    assert "genpulse keys create" in refused.stderr
    assert executed == ["gunicorn"]


def test_flower_wants_a_password_where_there_are_keys(
    ledger: Ledger, executed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows everybody's tasks, and knows no keys."""
    run("create", "shop")
    refused = CliRunner().invoke(cli, ["start-flower"])
    monkeypatch.setenv("GENPULSE_FLOWER_BASIC_AUTH", "me:secret")
    taken = CliRunner().invoke(cli, ["start-flower"])

    assert (refused.exit_code, taken.exit_code) == (Exit.USAGE, Exit.OK)
    assert "GENPULSE_FLOWER_BASIC_AUTH" in refused.stderr


def test_gunicorn_itself_refuses_another_address_without_a_key(
    sqlite_ledger_url: str, tmp_path: Path
) -> None:
    """For those who start it without our command."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gunicorn", "--config", "python:genpulse.web.gunicorn_conf"),
            "genpulse.web:create_app()",
        ],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("GENPULSE_")},
            "GENPULSE_DATABASE_URL": sqlite_ledger_url,
            "GENPULSE_HOST": "0.0.0.0",
            "GENPULSE_PORT": "0",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
    )

    assert done.returncode != 0
    assert "without an API key the API listens on loopback only" in done.stderr
