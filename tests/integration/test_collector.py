"""What is deleted and when: by wish, by age, and the bytes that no row names; on both databases."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from genpulse.config import Settings
from genpulse.errors import ObjectNotFound, StorageUnavailable
from genpulse.ledger import Ledger, SourceGone, Stray
from genpulse.ledger import tables as t
from genpulse.ledger.running import REMOVAL_PASSES_S
from genpulse.model import (
    Asset,
    Claim,
    Fence,
    NewOutput,
    NewTask,
    OutputKind,
    Task,
    TaskStatus,
    output_prefix,
)
from genpulse.storage import LocalStorage
from genpulse.tasks.background import Background
from genpulse.tasks.collector import Collected, Collector
from tests.support import wait_until
from tests.support.ledger import OOM, at_once, claim, die, open_ledger, prompt, rows, run_sql, submit

DAY_S = 86_400.0
COMPLETED, FAILED = TaskStatus.COMPLETED, TaskStatus.FAILED


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """A migrated ledger of this test alone."""
    with open_ledger(ledger_url, pool_size=2) as found:
        yield found


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """Where outputs and uploads are."""
    return LocalStorage(tmp_path / "assets")


def collector(ledger: Ledger, storage: LocalStorage, days: float | None = None) -> Collector:
    """A fresh one, as after a start."""
    return Collector(Settings.build(retention_days=days), ledger, storage)


def collect(ledger: Ledger, storage: LocalStorage, days: float | None = None) -> Collected:
    """One pass of a fresh collector."""
    return collector(ledger, storage, days).collect()


def put(storage: LocalStorage, fence: Fence, number: int = 0) -> str:
    """Store an object as an attempt does; returns its key."""
    key = f"{output_prefix(fence.task_id, fence.attempt)}{number:04d}-a.png"
    storage.upload_file(key, io.BytesIO(b"png"), content_type="image/png")
    return key


def named(key: str) -> NewOutput:
    """The output under a key."""
    return NewOutput("9", "a.png", OutputKind.IMAGE, "image/png", 3, "0" * 64, key)


def complete(ledger: Ledger, storage: LocalStorage, task: Task | None = None) -> Task:
    """A task that completed with one stored object."""
    task = task or submit(ledger)
    held = claim(ledger, task)
    assert ledger.finish(held.fence, COMPLETED, outputs=[named(put(storage, held.fence))]) is COMPLETED
    return task


def age(ledger: Ledger, table: sa.Table, seconds: float, *where: sa.ColumnElement[bool]) -> None:
    """Let what is in a table be so much older: its times are the database's, so nobody waits for it."""
    ago = sa.text(f"interval '{seconds} seconds'" if ledger.is_postgresql else str(int(seconds * 1000)))
    names = [column.name for column in table.c if column.name.endswith("_at")]
    values: dict[str, Any] = {name: sa.literal_column(name).op("-")(ago) for name in names}
    guards, unguards = t.TRIGGERS[ledger.engine.dialect.name]
    with ledger.engine.begin() as connection:  # no verb changes the end of a task
        for statement in unguards:
            connection.exec_driver_sql(statement)
        connection.execute(sa.update(table).where(*where).values(**values))
        for statement in guards:
            connection.exec_driver_sql(statement.replace("%", "%%") if ledger.is_postgresql else statement)


def asset(ledger: Ledger, storage: LocalStorage, name: str = "a.png", digest: str = "0" * 64) -> Asset:
    """An upload as the API takes it."""
    known = ledger.reuse_asset(owner="ada", name=name, content_type="image/png", sha256=digest)
    if known is not None:
        return known
    asset_id, key = ledger.expect_asset("ada", digest, ".png")
    storage.upload_file(key, io.BytesIO(b"png"), content_type="image/png")
    return ledger.add_asset(
        asset_id=asset_id,
        owner="ada",
        key=key,
        name=name,
        content_type="image/png",
        size_bytes=3,
        sha256=digest,
    )


def keys(storage: LocalStorage) -> set[str]:
    """All that is stored."""
    return set(storage.keys())


def retries_of(ledger: Ledger, task: Task) -> NewTask:
    """A request for the same once more."""
    return NewTask(task_type="comfyui", queue="comfy", params={}, owner="ada", retry_of=task.id)


# -- what dead attempts stored --------------------------------------------------------------------


def ended(ledger: Ledger, held: Claim, how: str) -> None:
    """End an attempt without completing its task."""
    if how == "lost":
        die(ledger, held)
    elif how == "handed back":
        ledger.hand_back(held.fence, adopt_wait_s=None)
    elif how == "retry":
        ledger.retry_later(held.fence, OOM, delay_s=0)
    elif how == "canceled":
        ledger.cancel(held.task.id)
        ledger.finish(held.fence, COMPLETED, outputs=[named("outputs/x")])
    else:
        ledger.finish(held.fence, FAILED, error=OOM)


@pytest.mark.parametrize("how", ["lost", "handed back", "retry", "canceled", "failed"])
def test_what_an_attempt_stored_in_vain_is_deleted(ledger: Ledger, storage: LocalStorage, how: str) -> None:
    """However it ended, once a lease has passed; and nothing of its neighbours."""
    held = claim(ledger, submit(ledger))
    orphan = put(storage, held.fence)
    neighbour = put(storage, Fence(held.task.id, 10, ""))  # its prefix begins with the same text
    other = put(storage, claim(ledger, submit(ledger)).fence)  # runs
    ended(ledger, held, how)

    assert collect(ledger, storage).objects == 0
    age(ledger, t.removals, REMOVAL_PASSES_S[0] + 1)
    assert collect(ledger, storage).objects == 1

    assert keys(storage) == {neighbour, other}, orphan


def test_the_completed_attempts_objects_stay(ledger: Ledger, storage: LocalStorage) -> None:
    """Only what the attempts before it left goes, whatever order sweepers and collectors come in."""
    task = submit(ledger)
    lost = claim(ledger, task)
    orphan = put(storage, lost.fence)
    die(ledger, lost)
    complete(ledger, storage, task)
    age(ledger, t.removals, 2 * DAY_S)

    collect(ledger, storage)

    found = ledger.get(task.id)
    assert found is not None
    assert keys(storage) == {found.outputs[0].key} != {orphan}
    assert rows(ledger, t.removals) == []


def test_what_a_fenced_off_attempt_stores_later_is_deleted_too(ledger: Ledger, storage: LocalStorage) -> None:
    """A process that was frozen, or learns late that it lost its lease, may store when the collector was there."""
    held = claim(ledger, submit(ledger))
    die(ledger, held)
    found = []
    for number, after_s in enumerate(REMOVAL_PASSES_S):
        put(storage, held.fence, number)
        before = REMOVAL_PASSES_S[number - 1] if number else 0.0
        age(ledger, t.removals, after_s - before + 1)
        found.append(collect(ledger, storage).objects)

    assert found == [1, 1, 1]
    assert keys(storage) == set()
    assert rows(ledger, t.removals) == []


def test_an_attempt_that_stored_nothing_costs_nothing(ledger: Ledger) -> None:
    """A worker without a server hands back again and again: no removal is noted for that."""
    ledger.hand_back(claim(ledger, submit(ledger)).fence, adopt_wait_s=None, stored=False)

    assert rows(ledger, t.removals) == []


def test_what_a_row_names_is_never_taken(ledger: Ledger, storage: LocalStorage) -> None:
    """Belt and braces: a removal that should not be there touches no output, task or asset."""
    task, file = complete(ledger, storage), asset(ledger, storage)
    before = keys(storage)
    made = {"ended_at": t.tasks.c.created_at, "due_at": t.tasks.c.created_at}
    wrongs: list[dict[str, Any]] = [
        {"task_id": task.id, "attempt": 1},
        {"task_id": task.id},
        {"key": file.key},
    ]
    for number, wrong in enumerate(wrongs):
        columns = ["id", *wrong, *made]
        values: list[Any] = [sa.literal(f"00000000-0000-0000-0000-00000000000{number}", t.tasks.c.id.type)]
        values += [sa.literal(value, t.removals.c[name].type) for name, value in wrong.items()]
        run_sql(
            ledger,
            sa.insert(t.removals).from_select(columns, sa.select(*values, *made.values()).limit(1)),
        )

    assert collect(ledger, storage).objects == 0
    assert keys(storage) == before
    assert len(rows(ledger, t.removals)) == 3


# -- by wish and by age ---------------------------------------------------------------------------


def test_a_deleted_tasks_files_go(ledger: Ledger, storage: LocalStorage) -> None:
    """All attempts' objects, at the next pass; that it was deleted is remembered for its owner."""
    task, kept = complete(ledger, storage), complete(ledger, storage)
    put(storage, Fence(task.id, 7, ""))

    assert ledger.delete_task(task.id, "bob") is None
    assert ledger.delete_task(task.id, "ada") is COMPLETED
    assert ledger.was_deleted(task.id, "ada")
    assert collect(ledger, storage).objects == 2

    assert keys(storage) == {f"{output_prefix(kept.id, 1)}0000-a.png"}
    age(ledger, t.removals, 40 * DAY_S)
    collect(ledger, storage)
    collect(ledger, storage)
    assert rows(ledger, t.removals) == []
    assert not ledger.was_deleted(task.id, "ada")


def test_retention_deletes_what_ended_long_ago(ledger: Ledger, storage: LocalStorage) -> None:
    """Rows and bytes together; what is younger, or not final, stays; without the setting all does."""
    old = [complete(ledger, storage) for _ in range(3)]
    canceled = submit(ledger)
    ledger.cancel(canceled.id)
    run_sql(ledger, sa.delete(t.leases))
    waiting = submit(ledger)
    age(ledger, t.tasks, 3 * DAY_S)
    young = complete(ledger, storage)

    assert collect(ledger, storage) == Collected()
    done = collect(ledger, storage, days=2)

    assert (done.tasks, done.objects) == (4, 3)
    assert {row["id"] for row in rows(ledger, t.tasks)} == {waiting.id, young.id}
    assert keys(storage) == {f"{output_prefix(young.id, 1)}0000-a.png"}
    for task in old:
        assert ledger.get(task.id) is None
        assert rows(ledger, t.outputs, t.outputs.c.task_id == task.id) == []


def test_retention_goes_in_batches_until_all_is_done(ledger: Ledger, storage: LocalStorage) -> None:
    """Each transaction is bounded; a long absence of the setting is caught up with in one pass."""
    for _ in range(5):
        ledger.cancel(submit(ledger).id)
    age(ledger, t.tasks, 3 * DAY_S)

    assert ledger.retire_tasks(2 * DAY_S, limit=3) == 3
    assert ledger.retire_tasks(2 * DAY_S, limit=3) == 2
    assert ledger.retire_tasks(2 * DAY_S, limit=3) == 0


def test_a_task_whose_output_is_needed_stays_until_its_user_is_final(
    ledger: Ledger, storage: LocalStorage
) -> None:
    """A backlog may be longer than the retention: what waits in it finds its input."""
    source = complete(ledger, storage)
    age(ledger, t.tasks, 3 * DAY_S)
    user = submit(ledger, source_tasks=frozenset({source.id}))

    assert collect(ledger, storage, days=2).tasks == 0
    ledger.cancel(user.id)
    assert collect(ledger, storage, days=2).tasks == 1
    assert keys(storage) == set()


def test_a_task_whose_webhook_waits_stays_until_it_is_told(ledger: Ledger, storage: LocalStorage) -> None:
    """The schedule may be longer than the retention; a task that its owner deletes tells nobody."""
    told, deleted = (submit(ledger, callback_url="https://example.org/hook") for _ in range(2))
    for task in (told, deleted):
        complete(ledger, storage, task)
    age(ledger, t.tasks, 3 * DAY_S)

    assert collect(ledger, storage, days=2).tasks == 0
    assert ledger.delete_task(deleted.id) is COMPLETED
    assert {row["task_id"] for row in rows(ledger, t.webhook_deliveries)} == {told.id}
    run_sql(ledger, sa.update(t.webhook_deliveries).values(status="delivered", next_at=None))
    assert collect(ledger, storage, days=2).tasks == 1
    assert rows(ledger, t.webhook_deliveries) == []


def test_a_retry_forgets_what_it_was_a_retry_of(ledger: Ledger, storage: LocalStorage) -> None:
    """No link leads to a task that is gone."""
    old = complete(ledger, storage)
    new, _ = ledger.submit(retries_of(ledger, old))

    ledger.delete_task(old.id)
    collect(ledger, storage)

    found = ledger.get(new.id)
    assert found is not None
    assert found.retry_of is None
    with pytest.raises(SourceGone):
        ledger.submit(retries_of(ledger, old))


def test_a_prompt_left_on_a_server_is_stopped_although_its_task_is_deleted(ledger: Ledger) -> None:
    """A GPU must not work on for a task that nobody can find any more."""
    held = claim(ledger, submit(ledger))
    prompt_id = prompt(ledger, held, "gpu1")
    ledger.finish(held.fence, FAILED, error=OOM, leaves_prompt=True)
    ledger.delete_task(held.task.id)

    stray = Stray("gpu1", prompt_id, held.task.id, 1)
    assert ledger.strays_on(["gpu1"]) == [stray]
    ledger.forget_stray(stray)
    assert ledger.strays_on(["gpu1"]) == []


# -- uploads --------------------------------------------------------------------------------------


def test_uploads_that_nothing_needs_go_with_age(ledger: Ledger, storage: LocalStorage) -> None:
    """One that a task names stays as long as the task, also a final one: it may be sent again."""
    unused, used = asset(ledger, storage, digest="1" * 64), asset(ledger, storage, digest="2" * 64)
    user = submit(ledger, assets=frozenset({used.id}))
    ledger.cancel(user.id)
    age(ledger, t.assets, 3 * DAY_S)
    young = asset(ledger, storage, digest="3" * 64)

    assert collect(ledger, storage, days=2).assets == 1
    assert keys(storage) == {used.key, young.key} != {unused.key}
    ledger.delete_task(user.id)
    assert collect(ledger, storage, days=2).assets == 1
    assert keys(storage) == {young.key}


def test_an_upload_that_is_sent_again_is_young_again(ledger: Ledger, storage: LocalStorage) -> None:
    """Its caller was told 201 just now and is going to use it."""
    asset(ledger, storage)
    age(ledger, t.assets, 3 * DAY_S)
    again = asset(ledger, storage)

    assert collect(ledger, storage, days=2).assets == 0
    assert keys(storage) == {again.key}


def test_shared_bytes_go_with_the_last_asset(ledger: Ledger, storage: LocalStorage) -> None:
    """Two names of one file are two assets and one object; deleting one never takes the other's bytes."""
    first = asset(ledger, storage, "a.png")
    age(ledger, t.assets, 3 * DAY_S)
    second = asset(ledger, storage, "b.png")
    assert first.key == second.key

    assert collect(ledger, storage, days=2).assets == 1
    assert keys(storage) == {second.key}
    assert rows(ledger, t.removals) == []
    age(ledger, t.assets, 3 * DAY_S)
    assert collect(ledger, storage, days=2).assets == 1
    assert keys(storage) == set()


def test_a_key_is_never_used_twice(ledger: Ledger, storage: LocalStorage) -> None:
    """So the removal of a former upload can never be about the bytes of a new one."""
    first = asset(ledger, storage)
    age(ledger, t.assets, 3 * DAY_S)
    ledger.retire_assets(2 * DAY_S)
    second = asset(ledger, storage)

    collect(ledger, storage)

    assert first.key != second.key
    assert keys(storage) == {second.key}


def test_an_upload_whose_process_died_before_its_record_is_collected(
    ledger: Ledger, storage: LocalStorage
) -> None:
    """Bytes are announced before they are stored, so that no crash leaves an object nobody knows."""
    asset_id, key = ledger.expect_asset("ada", "0" * 64)
    storage.upload_file(key, io.BytesIO(b"png"), content_type="image/png")
    collect(ledger, storage)
    assert keys(storage) == {key}

    age(ledger, t.removals, DAY_S + 1)
    collect(ledger, storage)

    assert keys(storage) == set()
    with pytest.raises(SourceGone):
        ledger.add_asset(
            asset_id=asset_id,
            owner="ada",
            key=key,
            name="a",
            content_type="image/png",
            size_bytes=3,
            sha256="0" * 64,
        )
    assert rows(ledger, t.assets) == []


def test_a_task_that_names_what_is_gone_is_not_recorded(ledger: Ledger, storage: LocalStorage) -> None:
    """Whatever was looked up before: the transaction that records it has the last word."""
    file, source = asset(ledger, storage), complete(ledger, storage)
    run_sql(ledger, sa.delete(t.assets))
    ledger.delete_task(source.id)

    for gone in ({"assets": frozenset({file.id})}, {"source_tasks": frozenset({source.id})}):
        with pytest.raises(SourceGone):
            submit(ledger, **gone)
    assert rows(ledger, t.tasks) == []


def test_a_task_and_the_end_of_its_file_at_once(ledger: Ledger, storage: LocalStorage) -> None:
    """Either the task is accepted and its file stays, or the file is gone and the task refused."""
    for number in range(8):
        file = asset(ledger, storage, digest=f"{number:064d}")
        age(ledger, t.assets, 3 * DAY_S)

        def act(index: int, file: Asset = file) -> bool:
            if index == 0:
                return bool(ledger.retire_assets(2 * DAY_S))
            try:
                submit(ledger, assets=frozenset({file.id}))
            except SourceGone:
                return False
            return True

        retired, accepted = at_once(2, act)

        assert retired is not accepted
        assert (ledger.get_asset(file.id, "ada") is not None) is accepted


# -- crashes, outages, crowds ---------------------------------------------------------------------


def test_a_pass_that_was_cut_short_is_done_by_the_next_one(ledger: Ledger, storage: LocalStorage) -> None:
    """Between the rows and the bytes a crash costs nothing but time."""
    complete(ledger, storage)
    age(ledger, t.tasks, 3 * DAY_S)
    ledger.retire_tasks(2 * DAY_S)  # and then it died
    assert len(keys(storage)) == 1

    (taken,) = ledger.take_removals(for_s=300)  # and the next one died holding it
    assert ledger.take_removals() == []
    age(ledger, t.removals, 301)
    assert collect(ledger, storage).objects == 1

    assert keys(storage) == set()
    ledger.removed(taken)  # a late one changes nothing that matters
    assert collect(ledger, storage).objects == 0


def test_a_storage_that_is_away_is_asked_again(ledger: Ledger, tmp_path: Path) -> None:
    """The rows are gone already; the bytes follow when the store is back."""
    storage = LocalStorage(tmp_path / "assets")
    for _ in range(5):
        ledger.delete_task(complete(ledger, storage).id)
    (tmp_path / "assets").rename(tmp_path / "away")
    (tmp_path / "assets").write_text("no directory")

    with pytest.raises(StorageUnavailable):
        collect(ledger, storage)
    (tmp_path / "assets").unlink()
    (tmp_path / "away").rename(tmp_path / "assets")
    age(ledger, t.removals, 301)

    assert collect(ledger, storage).objects == 5
    assert keys(storage) == set()


def test_collectors_at_once_do_the_work_once(ledger: Ledger, storage: LocalStorage) -> None:
    """Any number may run, beside callers who delete the same."""
    tasks = [complete(ledger, storage) for _ in range(12)]
    kept = complete(ledger, storage)
    age(ledger, t.tasks, 3 * DAY_S, t.tasks.c.id != kept.id)

    def act(index: int) -> int:
        if index == 0:
            return sum(ledger.delete_task(each.id) is not None for each in tasks)
        return collect(ledger, storage, days=2).tasks

    assert sum(at_once(4, act)) == 12
    collect(ledger, storage)
    assert keys(storage) == {f"{output_prefix(kept.id, 1)}0000-a.png"}
    assert {row["id"] for row in rows(ledger, t.tasks)} == {kept.id}


KILLED = """
import os, signal, sys, time
from genpulse.config import Settings
from genpulse.ledger import Ledger
from genpulse.storage import LocalStorage
from genpulse.tasks.collector import Collector
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        Collector(Settings.build(retention_days=2), Ledger.connect(sys.argv[1]), LocalStorage(sys.argv[2])).collect()
        os._exit(0)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_killed_collector_leaves_no_row_without_its_bytes(ledger: Ledger, storage: LocalStorage) -> None:
    """At whatever moment: a task that can be read has its outputs, and in the end nothing is left."""
    tasks = [complete(ledger, storage) for _ in range(30)]
    age(ledger, t.tasks, 3 * DAY_S)
    url = ledger.engine.url.render_as_string(hide_password=False)
    ends = []
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, url, str(storage.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for delay_s in (0.02, 0.05, 0.1):
            process.stdin.write(f"{delay_s}\n")
            process.stdin.flush()
            ends.append(process.stdout.readline())
            for task in tasks:
                found = ledger.get(task.id)
                for output in found.outputs if found else ():
                    assert storage.stat(output.key).size_bytes == 3
        process.stdin.close()
    assert f"{signal.SIGKILL:d}\n" in ends

    age(ledger, t.removals, 301)
    collect(ledger, storage, days=2)

    assert rows(ledger, t.tasks) == []
    assert keys(storage) == set()


def test_storms_of_retries_deletions_and_collectors_make_no_deadlock(ledger_url: str, tmp_path: Path) -> None:
    """Callers who retry, delete and submit, and collectors of no patience, on the same few tasks."""
    failures: list[BaseException] = []
    over = threading.Event()
    ids: list[str] = []

    def call(ledger: Ledger, storage: LocalStorage, dice: random.Random) -> None:
        file = asset(ledger, storage, digest=f"{dice.randrange(3):064d}")
        try:
            task = submit(ledger, assets=frozenset({file.id}), source_tasks=frozenset(ids[-1:]))
        except SourceGone:
            task = submit(ledger)
        ids.append(task.id)
        held = claim(ledger, task)
        if dice.random() < 0.5:
            ledger.finish(held.fence, FAILED, error=OOM)
        else:
            ledger.finish(held.fence, COMPLETED, outputs=[named(put(storage, held.fence))])

    def retry(ledger: Ledger, storage: LocalStorage, dice: random.Random) -> None:
        sources = ledger.retry_sources(ledger.retryable("ada", limit=20), {}, max_bytes=10**6)
        found = [source.task for source in sources if source is not None]
        dice.shuffle(found)
        for new in ledger.retry_all([retries_of(ledger, each) for each in found]):
            ledger.cancel(new.id)

    def delete(ledger: Ledger, storage: LocalStorage, dice: random.Random) -> None:
        if ids:
            ledger.delete_task(dice.choice(ids[-20:]))

    def sweep(ledger: Ledger, storage: LocalStorage, dice: random.Random) -> None:
        ledger.retire_tasks(0.2, limit=10)
        ledger.retire_assets(0.05, limit=10)
        for removal in ledger.take_removals(limit=20):
            if removal.task_id is not None:
                storage.delete_below(output_prefix(removal.task_id, removal.attempt))
            else:
                storage.delete_file(str(removal.key))
            ledger.removed(removal)

    def run(part: Callable[[Ledger, LocalStorage, random.Random], None], seed: int) -> None:
        dice = random.Random(seed)
        with open_ledger(ledger_url, pool_size=1) as ledger:
            try:
                while not over.is_set():
                    part(ledger, LocalStorage(tmp_path / "assets"), dice)
            except BaseException as error:  # noqa: BLE001  # whatever it is fails the test
                failures.append(error)
                over.set()

    parts = [call, call, retry, retry, delete, sweep, sweep]
    threads = [threading.Thread(target=run, args=(part, seed)) for seed, part in enumerate(parts)]
    for thread in threads:
        thread.start()
    over.wait(3)
    over.set()
    for thread in threads:
        thread.join(40)

    assert not failures, failures
    storage = LocalStorage(tmp_path / "assets")
    with open_ledger(ledger_url) as ledger:
        assert len(ids) > 3
        for row in rows(ledger, t.outputs):
            assert storage.stat(row["key"]).size_bytes == 3
        for row in rows(ledger, t.assets):
            assert storage.stat(row["key"]).size_bytes == 3


# -- the parts it stands on -----------------------------------------------------------------------


def test_half_written_files_of_crashed_uploads_go(ledger: Ledger, storage: LocalStorage) -> None:
    """At a start and hourly, once they are a day old."""
    put(storage, Fence("x", 1, ""))
    tmp = storage.root / ".genpulse" / "tmp"
    (tmp / "old").write_bytes(b"half")
    (tmp / "new").write_bytes(b"half")
    day_ago = time.time() - DAY_S - 60
    os.utime(tmp / "old", (day_ago, day_ago))
    found = collector(ledger, storage)

    assert found.collect().leftovers == 1
    assert [path.name for path in tmp.iterdir()] == ["new"]
    os.utime(tmp / "new", (day_ago, day_ago))
    assert found.collect().leftovers == 0  # not before the hour is over


def test_tasks_of_a_status_are_listed_along_an_index(sqlite_ledger_url: str) -> None:
    """An owner with a million completed tasks sees the few that failed at once."""
    with open_ledger(sqlite_ledger_url) as ledger, ledger.engine.connect() as connection:
        query = (
            sa.select(t.tasks)
            .where(t.tasks.c.owner == "ada", t.tasks.c.status == "failed")
            .order_by(t.tasks.c.id.desc())
            .limit(50)
        )
        text = str(query.compile(ledger.engine, compile_kwargs={"literal_binds": True}))
        plan = [row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]

    assert plan == ["SEARCH tasks USING INDEX ix_tasks_owner_status_id (owner=? AND status=?)"]


def test_the_threads_beside_the_api_collect(sqlite_ledger_url: str, valkey_url: str, tmp_path: Path) -> None:
    """Nobody has to call anything: a deleted task's files are gone within seconds."""
    settings = Settings.build(database_url=sqlite_ledger_url, redis_url=valkey_url, data_dir=tmp_path)
    storage = LocalStorage(settings.assets_dir)
    background = Background(settings)
    background.start()
    try:
        with open_ledger(sqlite_ledger_url) as ledger:
            task = complete(ledger, storage)
            key = f"{output_prefix(task.id, 1)}0000-a.png"
            ledger.delete_task(task.id)

            def is_gone() -> bool:
                try:
                    storage.stat(key)
                except ObjectNotFound:
                    return True
                return False

            wait_until(is_gone, 20.0)
    finally:
        background.stop()
