"""The migrations build exactly the tables of the models, up, down and up again, and for many at once."""

from __future__ import annotations

import dataclasses
import datetime as dt
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext

import genpulse.ledger
from genpulse.errors import LedgerUnavailable
from genpulse.ledger import Ledger, metadata, mint
from genpulse.ledger import tables as t
from genpulse.model import NewTask
from tests.support.ledger import claim, open_ledger, rows, run_sql, submit


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest) -> str:
    """A database without tables."""
    name = "sqlite_url" if request.param == "sqlite" else "fresh_postgres_url"
    url: str = request.getfixturevalue(name)
    return url


def migrate_to(ledger: Ledger, revision: str, *, down: bool = False) -> None:
    """Run Alembic as :meth:`Ledger.migrate` does, to any revision."""
    config = Config()
    config.set_main_option("script_location", str(Path(genpulse.ledger.__file__).parent / "migrations"))
    with ledger.engine.begin() as connection:
        config.attributes["connection"] = connection
        (command.downgrade if down else command.upgrade)(config, revision)


def differences(ledger: Ledger) -> list[Any]:
    """What Alembic would have to change to get from the database to the models."""
    with ledger.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, metadata))


def schema(ledger: Ledger) -> list[tuple[Any, ...]]:
    """Names and texts of all tables, indexes, checks and triggers, as the database itself tells them."""
    if ledger.is_postgresql:
        query = (
            "SELECT 'i', indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
            " UNION ALL SELECT 'c', conname, pg_get_constraintdef(oid) FROM pg_constraint"
            "   WHERE connamespace = 'public'::regnamespace"
            " UNION ALL SELECT 't', tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal"
            " UNION ALL SELECT 'f', proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
            " UNION ALL SELECT 'k', table_name || '.' || column_name,"
            "   concat_ws(' ', data_type, character_maximum_length, is_nullable, column_default)"
            "   FROM information_schema.columns WHERE table_schema = 'public'"
        )
    else:
        query = "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
    with ledger.engine.connect() as connection:
        found = [tuple(row) for row in connection.execute(sa.text(query))]
    return sorted(
        (kind, name, " ".join(str(text).split()))
        for kind, name, text in found
        if "alembic" not in f"{name}{text}"
    )


def test_migrations_build_what_the_models_say(empty_url: str) -> None:
    """Alembic finds nothing to change: no table, column, type or index differs."""
    with open_ledger(empty_url) as ledger:
        ledger.migrate()
        assert differences(ledger) == []


def test_migrations_and_models_make_the_same_schema_word_for_word(
    empty_url: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Also what Alembic does not compare: conditions of partial indexes, checks, storage, triggers."""
    with open_ledger(empty_url) as ledger:
        ledger.migrate()
        migrated = schema(ledger)
    if empty_url.startswith("sqlite"):
        other_url = f"sqlite:///{tmp_path / 'models.db'}"
    else:
        other_url = request.getfixturevalue("postgres").create_database()
    with open_ledger(other_url) as ledger:
        with ledger.engine.begin() as connection:
            metadata.create_all(connection)
            database = ledger.engine.dialect.name
            for statement in (*t.TRIGGERS[database][0], *t.WEBHOOK_TRIGGERS[database][0]):
                connection.exec_driver_sql(
                    statement.replace("%", "%%") if ledger.is_postgresql else statement
                )
        made = schema(ledger)

    def comparable(found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        # SQLite keeps the text of CREATE TABLE, whose constraints may stand in any order.
        return [
            (kind, name, sorted(text.replace("(", " ( ").replace(")", " ) ").replace(",", " ").split()))
            for kind, name, text in found
        ]

    assert comparable(migrated) == comparable(made)


def test_down_takes_everything_away_and_up_brings_it_back(empty_url: str) -> None:
    """A downgrade leaves no table, trigger or function that a later upgrade would trip over."""
    with open_ledger(empty_url) as ledger:
        ledger.migrate()
        before = schema(ledger)
        migrate_to(ledger, "base", down=True)
        assert schema(ledger) == []
        ledger.migrate()
        assert schema(ledger) == before


def test_migrating_again_keeps_the_tasks(empty_url: str) -> None:
    """Every start may migrate."""
    with open_ledger(empty_url) as ledger:
        ledger.migrate()
        task = submit(ledger)
        ledger.migrate()
        assert claim(ledger, task).task.id == task.id


def test_what_an_older_ledger_holds_comes_along(empty_url: str) -> None:
    """Its tasks keep their uploads from being retired, twin records of one upload and its strays stay."""
    one, twin, other, task = (f"0190000000007000800000000000000{digit}" for digit in "1234")
    dashed = f"{one[:8]}-{one[8:12]}-{one[12:16]}-{one[16:20]}-{one[20:]}"
    with open_ledger(empty_url) as ledger:
        migrate_to(ledger, "0001")
        at = "now()" if ledger.is_postgresql else "0"
        for asset_id, name in ((one, "a.png"), (twin, "a.png"), (other, "b.png")):
            run_sql(
                ledger,
                "INSERT INTO assets (id, owner, key, name, content_type, size_bytes, sha256, created_at)"
                f" VALUES ('{asset_id}', 'ada', 'k', '{name}', 'image/png', 1, 'd', {at})",
            )
        run_sql(
            ledger,
            "INSERT INTO tasks (id, owner, task_type, queue, priority, status, params, metadata, timeout_s,"
            " max_attempts, created_at, updated_at, available_at) VALUES"
            f" ('{task}', 'ada', 'x', 'cpu', 3, 'pending',"
            f" '{{\"image\"\\:\"asset\\:{dashed}\"}}', '{{}}', 1, 1, {at}, {at}, {at})",
        )
        run_sql(
            ledger,
            "INSERT INTO strays (server, prompt_id, task_id, attempt, since)"
            f" VALUES ('gpu1', '{other}', '{task}', 1, {at})",
        )

        ledger.migrate()

        assert [row["source_id"] for row in rows(ledger, t.task_inputs)] == [dashed]
        names = {row["id"].replace("-", ""): row["name"] for row in rows(ledger, t.assets)}
        assert (names[one], names[other]) == ("a.png", "b.png")
        assert names[twin].startswith("a.png (")
        assert [row["server"] for row in rows(ledger, t.strays)] == ["gpu1"]


def test_the_hosts_of_webhooks_that_wait_lose_their_ports(empty_url: str) -> None:
    """Written by an older version, they count with those that are written from now on."""
    hosts = [
        "a.example:8443",
        "a.example",
        "a.example.",
        "192.0.2.10",
        "192.0.2.10:443",
        "[2606:4700::11]:443",
    ]
    with open_ledger(empty_url) as ledger:
        ledger.migrate()
        task = submit(ledger)
        migrate_to(ledger, "0006", down=True)
        at = dt.datetime.now(dt.UTC)
        for host in hosts:
            waits = {"status": "pending", "tries": 0, "attempts": 0, "created_at": at, "next_at": at}
            whose = {"owner": "ada", "task_id": task.id, "event_type": "task.completed", "url": "https://x"}
            values = {"id": str(uuid.uuid4()), "host": host, **whose, **waits}
            run_sql(ledger, sa.insert(t.webhook_deliveries).values(values))

        ledger.migrate()

        found = sorted(row["host"] for row in rows(ledger, t.webhook_deliveries))
    assert found == ["192.0.2.10"] * 2 + ["[2606:4700::11]"] + ["a.example"] * 3


def test_idempotency_keys_of_an_owner_become_those_of_its_api_keys(empty_url: str) -> None:
    """Whoever repeats a request after the upgrade still finds it, and going back leaves one of each."""
    with open_ledger(empty_url) as ledger:
        ledger.migrate()
        one, two = (mint() for _ in range(2))
        for key in (one, two):
            ledger.add_key(key, name="k", owner="ada", scopes=["submit"])
        new = {name: NewTask("comfyui", "comfy", {}, owner=name) for name in ("ada", "default")}
        hers, _ = ledger.submit(new["ada"], idempotency_key="k", api_key=one.id, body_hash="h")
        everybodys, _ = ledger.submit(new["default"], idempotency_key="k", api_key="single", body_hash="h")
        batch, _ = ledger.submit_batch([new["ada"]], idempotency_key="b", api_key=two.id, body_hash="h")
        migrate_to(ledger, "0007", down=True)
        assert len(rows_of(ledger, "idempotency_keys")) == 3

        ledger.migrate()

        for key in (one, two):
            assert ledger.find_replay("ada", "k", "h", api_key=key.id) == hers
            found = ledger.find_batch_replay("ada", "b", "h", api_key=key.id)
            assert found is not None
            assert found.id == batch.id
        for word in ("", "single"):
            assert ledger.find_replay("default", "k", "h", api_key=word) == everybodys
        migrate_to(ledger, "0007", down=True)
        assert len(rows_of(ledger, "idempotency_keys")) == 3


def test_going_back_gives_retries_their_whole_params(empty_url: str) -> None:
    """What a batch kept for them, and they did not repeat."""
    with open_ledger(empty_url) as ledger:
        ledger.migrate()
        new = NewTask("comfyui", "comfy", {"workflow": {"1": "node"}, "inputs": {"seed": 1}}, owner="ada")
        batch, _ = ledger.submit_batch([new])
        ledger.cancel_batch(batch.id)
        retry = dataclasses.replace(
            new, params={"inputs": {"seed": 2}}, params_of=batch.id, retry_of=batch.task_ids[0]
        )
        (made,) = ledger.retry_all([retry])
        whole = {"workflow": {"1": "node"}, "inputs": {"seed": 2}}
        assert claim(ledger, made).task.params == whole

        migrate_to(ledger, "0008", down=True)

        ledger.migrate()
        (row,) = rows(ledger, t.tasks, t.tasks.c.id == made.id)
        assert (row["params"], row["params_of"]) == (whole, None)


def rows_of(ledger: Ledger, table: str) -> list[Any]:
    """Rows of a table as it is now, which need not be as the models say."""
    with ledger.engine.connect() as connection:
        return list(connection.execute(sa.text(f"SELECT * FROM {table}")))


def test_a_ledger_that_was_not_migrated_says_so(empty_url: str) -> None:
    """``ping`` and every verb are our own error, so that a start can name the cure."""
    with open_ledger(empty_url) as ledger:
        with pytest.raises(LedgerUnavailable, match="genpulse migrate"):
            ledger.ping()
        with pytest.raises(LedgerUnavailable):
            submit(ledger)


def test_processes_that_migrate_at_once_all_succeed(empty_url: str) -> None:
    """The second one waits, then finds nothing to do."""
    program = (
        "import sys, alembic.command; from genpulse.ledger import Ledger\n"
        "ledger = Ledger.connect(sys.argv[1]); print('ready', flush=True); sys.stdin.readline()\n"
        "ledger.migrate(); ledger.ping()"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, empty_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:  # all have imported what they need, so that they really meet
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [(process.communicate(timeout=50)[1], process.returncode) for process in processes]

    assert [code for _, code in ends] == [0, 0, 0], ends
    with open_ledger(empty_url) as ledger:
        assert differences(ledger) == []
