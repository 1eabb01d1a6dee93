"""How others know that a process is dead: what it holds goes with it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from genpulse.config import Settings
from genpulse.errors import LedgerUnavailable
from genpulse.ledger import Ledger, ProcessSession, SessionProbe
from genpulse.ledger import tables as t
from genpulse.tasks.heartbeat import Heartbeat, Signals
from genpulse.testing.services import FaultProxy
from tests.support import wait_until
from tests.support.ledger import claim, open_ledger, rows, submit

HOLD = """
import os, sys, time
from genpulse.ledger import Ledger, ProcessSession
session = ProcessSession(Ledger.connect(sys.argv[1]))
session.hold()
child = 0
if sys.argv[2] == "fork":
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
print(session.key, child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """A migrated ledger of this test alone."""
    with open_ledger(ledger_url) as found:
        yield found


def test_leases_are_renewed_although_no_session_can_be_had(
    postgres_ledger_url: str, valkey_url: str, tmp_path: Path
) -> None:
    """Behind a pooler the session has an address of its own; with that one away, everything else goes on."""
    with FaultProxy(postgres_ledger_url) as direct, open_ledger(postgres_ledger_url) as ledger:
        settings = Settings.build(
            data_dir=tmp_path,
            database_url=postgres_ledger_url,
            database_direct_url=direct.url_of(postgres_ledger_url),
            redis_url=valkey_url,
            beat_s=0.2,
        )
        heartbeat = Heartbeat(settings, lambda: False)
        heartbeat.start()
        held = claim(ledger, submit(ledger), lease_s=2.0)
        signals = Signals()
        heartbeat.watch(held.fence, signals)
        direct.set_mode("refuse")
        time.sleep(3.0)
        stale = ledger.stale_leases(1.5)
        heartbeat.stop()
        (lease,) = rows(ledger, t.leases)

    assert stale == []
    assert not signals.lost
    assert lease["claim"] == held.fence.claim


@contextlib.contextmanager
def holder(url: str, mode: str = "alone") -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A process that holds a session; yields it, the key, and the pid of the child it forked."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, url, mode], stdout=subprocess.PIPE, text=True)
    child = 0
    try:
        assert process.stdout is not None
        key, child = map(int, process.stdout.readline().split())
        yield process, key, child
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_a_process_that_lives_holds_its_session_and_kill_9_frees_it(ledger: Ledger, ledger_url: str) -> None:
    """Nothing it could have forgotten to do is needed."""
    probe = SessionProbe(ledger)
    with holder(ledger_url) as (process, key, _):
        assert probe.alive([key, 12345]) == {key}
        process.kill()
        wait_until(lambda: not probe.alive([key]), 3.0)


def test_a_frozen_process_still_holds_its_session(ledger: Ledger, ledger_url: str) -> None:
    """It may come back, so only its lease may end it."""
    with holder(ledger_url) as (process, key, _):
        process.send_signal(signal.SIGSTOP)
        assert SessionProbe(ledger).alive([key]) == {key}


def test_a_forked_child_does_not_keep_its_parents_session_alive(ledger: Ledger, ledger_url: str) -> None:
    """The child closes its copies, and the parent's session survives that."""
    probe = SessionProbe(ledger)
    with holder(ledger_url, "fork") as (process, key, child):
        time.sleep(0.1)
        assert probe.alive([key]) == {key}
        process.kill()
        process.wait()
        wait_until(lambda: not probe.alive([key]), 3.0)
        os.kill(child, 0)  # it lives on


def test_letting_go_is_seen_at_once_and_holding_again_works(ledger: Ledger) -> None:
    """A worker that stops in order keeps nobody waiting."""
    probe, session = SessionProbe(ledger), ProcessSession(ledger)
    assert probe.alive([session.key]) == set()
    session.hold()
    session.hold()
    assert probe.alive([session.key]) == {session.key}
    session.release()
    wait_until(lambda: not probe.alive([session.key]), 3.0)
    session.hold()
    assert probe.alive([session.key]) == {session.key}
    session.release()


def test_nothing_is_asked_about_nobody(ledger: Ledger) -> None:
    """No keys, no answer."""
    assert SessionProbe(ledger).alive([]) == set()


def test_every_key_fits_a_lock(ledger: Ledger) -> None:
    """PostgreSQL splits the key over two columns; the smallest and the largest come together again."""
    probe = SessionProbe(ledger)
    for key in (0, 1, 2**31, 2**32 - 1, 2**32, 2**62 - 1):
        session = ProcessSession(ledger)
        session.key = key
        session.hold()
        assert probe.alive([key]) == {key}
        session.release()


def test_two_that_look_at_once_do_not_deceive_each_other(sqlite_ledger_url: str) -> None:
    """Looking takes a lock for a moment, which another one who looks must not take for a life."""
    with open_ledger(sqlite_ledger_url) as ledger:
        probe, session = SessionProbe(ledger), ProcessSession(ledger)
        session.hold()
        descriptor = session._file
        assert descriptor is not None
        os.close(descriptor)  # as the kernel does for a dead process
        session._file = None
        deceived: list[int] = []

        def look() -> None:
            deceived.extend(1 for _ in range(3000) if probe.alive([session.key]))

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert deceived == []


def test_files_of_the_dead_are_collected_and_those_of_the_living_kept(sqlite_ledger_url: str) -> None:
    """The folder does not grow with every restart."""
    folder = Path(sqlite_ledger_url.removeprefix("sqlite:///") + ".sessions")
    with open_ledger(sqlite_ledger_url) as ledger:
        session = ProcessSession(ledger)
        session.hold()
        with holder(sqlite_ledger_url) as (process, key, _):
            process.kill()
            process.wait()
            assert {path.name for path in folder.iterdir()} == {str(session.key), str(key)}
            SessionProbe(ledger).collect()
        assert [path.name for path in folder.iterdir()] == [str(session.key)]
        session.release()
        assert list(folder.iterdir()) == []


def test_a_file_collected_while_it_is_being_taken_is_taken_anew(
    sqlite_ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making the file and locking it, it looks like a dead process's."""
    import fcntl

    with open_ledger(sqlite_ledger_url) as ledger:
        probe, session = SessionProbe(ledger), ProcessSession(ledger)
        real = fcntl.flock
        collected: list[int] = []

        def flock(file: int, operation: int) -> None:
            if operation == fcntl.LOCK_EX and not collected:
                collected.append(1)
                probe.collect()
            real(file, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        session.hold()
        assert collected
        assert probe.alive([session.key]) == {session.key}
        session.release()


# -- PostgreSQL's connection ----------------------------------------------------------------------


def wait_for_words(session: ProcessSession, timeout_s: float = 5.0) -> list[str]:
    """What the session hears."""
    reader, writer = os.pipe()
    try:
        return session.wait(timeout_s, reader)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_cancel_is_heard_within_milliseconds(postgres_ledger_url: str) -> None:
    """It is announced when its transaction commits."""
    with open_ledger(postgres_ledger_url) as ledger:
        session = ProcessSession(ledger)
        session.hold()
        task = submit(ledger)
        timer = threading.Timer(0.2, lambda: ledger.cancel(task.id))
        timer.start()
        began = time.monotonic()
        assert wait_for_words(session) == ["cancel"]
        assert time.monotonic() - began < 1.0
        timer.join()
        session.release()


def test_words_do_not_pile_up_where_nobody_waits_for_them(postgres_ledger_url: str) -> None:
    """A worker's main process only holds; a million tasks later it has kept no word."""
    with open_ledger(postgres_ledger_url) as ledger:
        session = ProcessSession(ledger)
        session.hold()
        for _ in range(3):
            ledger.cancel(submit(ledger).id)
        assert session._connection is not None
        driver = session._connection.connection.dbapi_connection
        assert driver is not None
        wait_until(lambda: select.select([driver.fileno()], [], [], 0)[0], 3.0)
        session.hold()
        assert driver.notifies == []
        session.release()


def test_the_waker_ends_a_wait(ledger: Ledger) -> None:
    """A byte in the pipe is enough; without one the time is."""
    session = ProcessSession(ledger)
    session.hold()
    reader, writer = os.pipe()
    threading.Timer(0.1, lambda: os.write(writer, b"!")).start()
    began = time.monotonic()
    assert session.wait(10.0, reader) == []
    assert time.monotonic() - began < 5.0
    os.read(reader, 1)
    assert session.wait(0.05, reader) == []
    os.close(reader)
    os.close(writer)
    session.release()


def test_a_session_that_was_cut_off_is_taken_again(
    postgres_ledger_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """Each beat makes sure that it is still held."""
    proxy = fault_proxy(postgres_ledger_url)
    with open_ledger(proxy.url_of(postgres_ledger_url)) as ledger, open_ledger(postgres_ledger_url) as other:
        probe, session = SessionProbe(other), ProcessSession(ledger)
        session.hold()
        proxy.set_mode("refuse")
        for _ in range(2):
            with pytest.raises(LedgerUnavailable):
                session.hold()
        wait_until(lambda: not probe.alive([session.key]), 3.0)
        proxy.set_mode("pass")
        session.hold()
        assert probe.alive([session.key]) == {session.key}
        session.release()


def test_a_lock_that_the_servers_side_still_holds_for_us_is_taken_later(postgres_ledger_url: str) -> None:
    """After a cut the server may not know yet that our old connection is gone."""
    with open_ledger(postgres_ledger_url) as ledger:
        probe, session = SessionProbe(ledger), ProcessSession(ledger)
        with ledger.engine.connect() as old:
            old.execute(sa.select(sa.func.pg_advisory_lock(session.key)))
            session.hold()
            old.rollback()
            old.execute(sa.select(sa.func.pg_advisory_unlock(session.key)))
            old.rollback()
        assert probe.alive([session.key]) == set()
        session.hold()
        assert probe.alive([session.key]) == {session.key}
        session.release()


def test_renewing_opens_no_further_connection(postgres_ledger_url: str) -> None:
    """A process that holds its session renews on it: a beat costs the database no connect."""
    with open_ledger(postgres_ledger_url) as ledger:
        session = ProcessSession(ledger)
        session.hold()
        held = claim(ledger, submit(ledger), session_key=session.key)
        opened: list[object] = []
        sa.event.listen(ledger.engine, "connect", lambda *_: opened.append(1))

        for _ in range(3):
            assert set(session.renew([held.fence.claim], 15.0)) == {held.fence.claim}

        assert opened == []
        session.release()


def test_a_word_that_comes_with_a_renewal_is_heard(postgres_ledger_url: str) -> None:
    """A cancel that the renewal was too early to see makes the next one come at once."""
    with open_ledger(postgres_ledger_url) as ledger:
        session = ProcessSession(ledger)
        session.hold()
        held = claim(ledger, submit(ledger), session_key=session.key)
        ledger.cancel(held.task.id)
        session.renew([held.fence.claim], 15.0)
        reader, writer = os.pipe()

        began = time.monotonic()
        assert "cancel" in session.wait(5.0, reader)
        assert time.monotonic() - began < 2.0
        os.close(reader)
        os.close(writer)
        session.release()
