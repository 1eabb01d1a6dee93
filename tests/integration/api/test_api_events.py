"""Watching a task: event streams, long polls and ``Prefer: wait``, with a real Valkey and without one."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from genpulse.errors import LedgerUnavailable
from genpulse.ledger import tables as t
from genpulse.live import EVENTS_KEPT, PREVIEW_MAX_BYTES
from genpulse.model import NewTask
from genpulse.testing.services import FaultProxy
from tests.support import wait_until

UNKNOWN = "7c9e6679-7425-40de-944b-e07fc1f90ae7"


class Stream:
    """One event stream, read in a thread of its own."""

    def __init__(
        self, api: Any, task_id: str, *, last: str | None = None, query: str = "", call: Any = None
    ) -> None:
        self.api = api
        self.answer: Any = None
        self.events: list[tuple[str, str, Any]] = []
        """Id, name and data of each."""
        self.comments = 0
        self.ours, self.theirs = socket.socketpair()
        headers = ({"Last-Event-ID": last} if last else {}) | (call.headers if call else {})
        self.thread = threading.Thread(
            target=self._read, args=(f"/task/{task_id}/events{query}", headers), daemon=True
        )
        self.thread.start()

    def _read(self, path: str, headers: dict[str, str]) -> None:
        with self.ours, self.theirs:
            self.answer = self.api.app.test_client().get(
                path, headers=headers, environ_overrides={"gunicorn.socket": self.theirs}
            )
            self._parse()
            self.answer.close()

    def _parse(self) -> None:
        text = b""
        for chunk in self.answer.response:
            text += chunk
            while b"\n\n" in text:
                block, _, text = text.partition(b"\n\n")
                fields = dict(line.partition(": ")[::2] for line in block.decode().split("\n"))
                if "event" in fields:
                    self.events.append((fields.get("id", ""), fields["event"], json.loads(fields["data"])))
                elif fields.keys() == {":"}:
                    self.comments += 1

    @property
    def names(self) -> list[str]:
        """The names of the events so far."""
        return [name for _, name, _ in self.events]

    def until(self, name: str, *, count: int = 1) -> list[str]:
        """Wait for so many events of this name; all names so far."""
        wait_until(lambda: self.names.count(name) >= count, 15, message=f"{count} {name} in {self.names}")
        return self.names

    def until_progress(self, percent: float) -> None:
        """Wait until the newest event says so."""
        wait_until(lambda: bool(self.events) and self.events[-1][2].get("progress") == percent)

    def until_end(self) -> list[str]:
        """Wait until the stream is over; all names."""
        self.thread.join(15)
        assert not self.thread.is_alive(), self.names
        return self.names

    def close(self) -> None:
        """Go away, and be noticed at once."""
        for watch in self.api.service.watchers._watches():
            if watch.connection is self.theirs:
                watch.end()
        self.until_end()


def progress(api: Any, task_id: str, percent: float, attempt: int = 1) -> None:
    """What a worker publishes."""
    detail = {"node_id": "3", "class_type": "KSampler", "step": 1, "steps": 20}
    api.worker.publish_progress(task_id, attempt, percent, detail)


def complete(api: Any, task_id: str) -> None:
    """What a worker does at the end: the ledger first, then a word in Redis."""
    api.complete(task_id, ("a.png", b"png", "image/png"))
    api.worker.forget_progress(task_id)


@pytest.fixture
def watched(build: Any, ledger_url: str, valkey_url: str, tmp_path: Path) -> Iterator[Any]:
    """The API with a real Valkey, on both databases in turn."""
    yield from opened(build(ledger_url, tmp_path / "data", redis_url=valkey_url), valkey_url)


@pytest.fixture
def lone(build: Any, sqlite_ledger_url: str, valkey_url: str, tmp_path: Path) -> Iterator[Any]:
    """The API with a real Valkey, on SQLite, with places for two watchers."""
    made = build(sqlite_ledger_url, tmp_path / "data", redis_url=valkey_url, max_watchers=2)
    yield from opened(made, valkey_url)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test opens is closed after it."""
    with ExitStack() as found:
        yield found


def opened(api: Any, worker_url: str) -> Iterator[Any]:
    """Give it the means of a worker, and close it afterwards."""
    from genpulse.live import Live

    api.worker = Live(worker_url)
    yield api
    api.service.watchers.close()
    api.worker.close()
    api.service.ledger.close()


def test_a_stream_tells_the_whole_story(watched: Any) -> None:
    """A snapshot, the beginning, progress, each output, the end; then it is over and its place free."""
    task_id = watched.submit()["task_id"]
    stream = Stream(watched, task_id)
    stream.until("snapshot")

    claim = watched.claim(task_id)
    watched.worker.touch(task_id)
    stream.until("status")
    progress(watched, task_id, 10)
    progress(watched, task_id, 40)
    stream.until("progress", count=2)
    watched.finish(claim, ("a.png", b"png", "image/png"), ("b.png", b"more", "image/png"))
    watched.worker.forget_progress(task_id)

    assert stream.until_end() == ["snapshot", "status", "progress", "progress", "output", "output", "done"]
    assert (stream.answer.status_code, stream.answer.content_type) == (200, "text/event-stream")
    assert stream.answer.headers["Cache-Control"] == "no-store"
    assert stream.answer.headers["X-Accel-Buffering"] == "no"
    data = [each for _, _, each in stream.events]
    assert [data[0]["status"], data[1]["status"], data[1]["attempt"]] == ["pending", "processing", 1]
    assert (data[3]["progress"], data[3]["progress_detail"]["class_type"]) == (40, "KSampler")
    assert [data[4]["name"], data[5]["name"]] == ["a.png", "b.png"]
    assert data[6] == watched.client.get(f"/task/{task_id}").json
    assert watched.service.watchers.taken == 0


def test_progress_never_falls_and_old_attempts_are_silent(lone: Any) -> None:
    """Numbers of an attempt that lost its lease, or that came late, are not shown."""
    task_id = lone.submit()["task_id"]
    lone.claim(task_id)
    stream = Stream(lone, task_id)
    stream.until("snapshot")

    for percent, attempt in ((30, 1), (20, 1), (99, 0), (50, 1)):
        progress(lone, task_id, percent, attempt)
    stream.until("progress", count=2)

    assert [data["progress"] for _, name, data in stream.events if name == "progress"] == [30, 50]
    stream.close()


def test_a_reader_that_comes_back_gets_what_it_missed(lone: Any) -> None:
    """With ``Last-Event-ID`` nothing is lost and nothing comes twice, and there is no new snapshot."""
    task_id = lone.submit()["task_id"]
    lone.claim(task_id)
    first = Stream(lone, task_id)
    first.until("snapshot")
    for percent in (10, 20):
        progress(lone, task_id, percent)
    first.until("progress", count=2)
    first.close()
    for percent in (30, 40):
        progress(lone, task_id, percent)

    second = Stream(lone, task_id, last=first.events[1][0])

    second.until("progress", count=3)
    progress(lone, task_id, 50)
    second.until("progress", count=4)
    assert [data["progress"] for _, _, data in second.events] == [20, 30, 40, 50]
    assert set(second.names) == {"progress"}
    second.close()


def test_a_reader_that_missed_a_state_is_told_it(lone: Any) -> None:
    """The id says which state was seen; what the state is by now comes first."""
    task_id = lone.submit()["task_id"]
    first = Stream(lone, task_id)
    first.until("snapshot")
    first.close()
    claim = lone.claim(task_id)
    lone.worker.touch(task_id)
    progress(lone, task_id, 10)

    second = Stream(lone, task_id, last=first.events[0][0])
    second.until("progress")
    second.close()
    lone.finish(claim, ("a.png", b"png", "image/png"))
    third = Stream(lone, task_id, last=second.events[-1][0])

    assert second.names == ["status", "progress"]
    assert third.until_end() == ["output", "done"]


@pytest.mark.parametrize("loss", ["trimmed", "flushed"])
def test_where_the_log_does_not_reach_there_is_a_gap(lone: Any, valkey_url: str, loss: str) -> None:
    """The reader learns that events are missing, and how things are now."""
    task_id = lone.submit()["task_id"]
    lone.claim(task_id)
    progress(lone, task_id, 1)
    first = Stream(lone, task_id)
    first.until("snapshot")
    first.close()
    if loss == "flushed":
        with redis.Redis.from_url(valkey_url) as client:
            client.flushall()
        progress(lone, task_id, 50)
    else:
        for number in range(EVENTS_KEPT + 200):
            progress(lone, task_id, 10 + 40 * number / (EVENTS_KEPT + 199))

    second = Stream(lone, task_id, last=first.events[0][0])

    second.until("snapshot")
    assert second.names[:2] == ["gap", "snapshot"]
    assert second.events[0][2] == {"reason": "trimmed"}
    assert second.events[1][2]["progress"] == 50
    second.close()


def test_whoever_saw_the_end_is_told_to_stop(lone: Any) -> None:
    """A browser reconnects when a stream ends; 204 makes it stop."""
    task_id = lone.submit()["task_id"]
    complete(lone, task_id)
    stream = Stream(lone, task_id)
    assert stream.until_end() == ["snapshot", "done"]

    again = lone.client.get(f"/task/{task_id}/events", headers={"Last-Event-ID": stream.events[-1][0]})
    between = Stream(lone, task_id, last=stream.events[0][0])

    assert (again.status_code, again.data) == (204, b"")
    assert between.until_end() == ["output", "done"]


def test_any_last_event_id_is_taken(lone: Any) -> None:
    """It comes from elsewhere, and may be anything; at worst the reader begins anew."""
    task_id = lone.submit()["task_id"]

    for last in ("x", "1-1", "1-1.q1", "9" * 99 + "-0.p0", "-.p0", "1-0.p1", "99999999999999-0.r5"):
        stream = Stream(lone, task_id, last=last)

        stream.until("snapshot")
        stream.close()


def test_a_cancel_is_seen(lone: Any) -> None:
    """A waiting task that is canceled ends its streams at once."""
    task_id = lone.submit()["task_id"]
    stream = Stream(lone, task_id)
    stream.until("snapshot")

    lone.client.post(f"/task/{task_id}/cancel")

    assert stream.until_end() == ["snapshot", "done"]
    assert stream.events[1][2]["status"] == "canceled"


def test_two_watchers_of_one_task_both_hear_all(watched: Any) -> None:
    """Whoever comes later takes nothing away from who was there."""
    task_id = watched.submit()["task_id"]
    watched.claim(task_id)
    streams = [Stream(watched, task_id)]
    for number in range(1, 6):
        progress(watched, task_id, 10 * number)
        streams.append(Stream(watched, task_id))
    progress(watched, task_id, 90)

    for stream in streams:
        stream.until_progress(90)
        seen = [data["progress"] for _, _, data in stream.events]
        assert seen == [*range(int(seen[0]), 60, 10), 90]
        stream.close()


def test_previews_only_for_those_who_ask(lone: Any, valkey_url: str) -> None:
    """Without such a watcher nothing is published; with one, the newest picture goes to it alone."""
    task_id = lone.submit()["task_id"]
    claim = lone.claim(task_id)
    plain = Stream(lone, task_id)
    plain.until("snapshot")

    def publish(picture: bytes) -> bool:
        return bool(lone.worker.publish_preview(task_id, 1, picture, "image/jpeg", "3"))

    before = publish(b"unseen")
    asking = Stream(lone, task_id, query="?preview=1")
    asking.until("snapshot")
    seen = publish(b"\xff\xd8 jpeg")
    huge = publish(bytes(PREVIEW_MAX_BYTES + 1))
    asking.until("preview")

    assert (before, seen, huge) == (False, True, False)
    event_id, _, data = asking.events[-1]
    assert data == {"attempt": 1, "node_id": "3", "content_type": "image/jpeg", "data": "/9gganBlZw=="}
    assert event_id == ""  # it cannot be resumed from
    asking.close()
    lone.finish(claim, ("a.png", b"png", "image/png"))
    lone.worker.forget_progress(task_id)
    assert plain.until_end() == ["snapshot", "output", "done"]
    with redis.Redis.from_url(valkey_url, decode_responses=True) as client:
        assert {key: client.ttl(key) for key in client.scan_iter() if client.ttl(key) < 0} == {}


def test_without_redis_the_final_state_arrives(api: Any) -> None:
    """Nobody listens at its address: a stream and a long poll read the ledger."""
    task_id = api.submit()["task_id"]
    stream = Stream(api, task_id)
    stream.until("snapshot")
    timer = threading.Timer(0.3, api.complete, (task_id, ("a.png", b"png", "image/png")))
    timer.start()

    task = api.client.get(f"/task/{task_id}?wait=20").json

    assert task["status"] == "completed"
    assert stream.until_end()[-2:] == ["output", "done"]
    again = Stream(api, task_id, last=stream.events[0][0])
    assert again.until_end() == ["output", "done"]
    api.service.watchers.close()


@pytest.mark.parametrize("fault", ["refuse", "blackhole"])
def test_redis_may_vanish_and_come_back(
    build: Any,
    sqlite_ledger_url: str,
    valkey_url: str,
    tmp_path: Path,
    fault_proxy: Callable[[str], FaultProxy],
    stack: ExitStack,
    fault: Any,
) -> None:
    """In the middle of a stream: states go on by the ledger, and progress when it is back."""
    proxy = fault_proxy(valkey_url)
    made = build(sqlite_ledger_url, tmp_path / "data", redis_url=proxy.url_of(valkey_url))
    api = stack.enter_context(contextmanager(opened)(made, valkey_url))
    one, two = (api.submit()["task_id"] for _ in range(2))
    streams = [Stream(api, task_id) for task_id in (one, two)]
    for stream in streams:
        stream.until("snapshot")

    proxy.set_mode(fault)
    complete(api, one)
    api.claim(two)
    late = Stream(api, two)

    assert streams[0].until_end() == ["snapshot", "output", "done"]
    streams[1].until("status")
    late.until("snapshot")
    proxy.set_mode("pass")

    def heard() -> bool:
        """Each time a little more, since nobody knows when the reader is back."""
        progress(api, two, min(99, time.monotonic() - began))
        return all("progress" in stream.names for stream in (streams[1], late))

    began = time.monotonic()
    wait_until(heard, 20, every_s=0.1, message="progress after Redis came back")
    for stream in (streams[1], late):
        stream.close()


def test_a_wiped_redis_costs_no_state(lone: Any, valkey_url: str) -> None:
    """After FLUSHALL in the middle: progress goes on, and the end is seen."""
    task_id = lone.submit()["task_id"]
    claim = lone.claim(task_id)
    stream = Stream(lone, task_id)
    stream.until("snapshot")
    progress(lone, task_id, 10)
    stream.until("progress")

    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    progress(lone, task_id, 20)
    stream.until("progress", count=2)
    lone.finish(claim, ("a.png", b"png", "image/png"))

    assert stream.until_end() == ["snapshot", "progress", "progress", "output", "done"]


def test_a_watcher_that_does_not_read_begins_anew(lone: Any) -> None:
    """What waits for one watcher is bounded; it is told that something is missing, and how it is now."""
    task_id = lone.submit()["task_id"]
    lone.claim(task_id)
    answer = lone.client.get(f"/task/{task_id}/events")
    chunks = iter(answer.response)
    first = next(chunks)
    for number in range(400):
        progress(lone, task_id, number / 10)
    watchers = lone.service.watchers
    wait_until(lambda: any(watch._lost for watch in watchers._watches()))

    text = next(chunks).decode()

    assert b"event: snapshot" in first
    assert text.index("event: gap") < text.index("event: snapshot")
    assert '"reason":"slow"' in text
    answer.close()


def test_beyond_the_cap_streams_are_refused_and_polls_answer_at_once(lone: Any) -> None:
    """503 with Retry-After; nothing else is affected, and a freed place can be taken."""
    task_id = lone.submit()["task_id"]
    held = [Stream(lone, task_id) for _ in range(2)]
    for stream in held:
        stream.until("snapshot")
    began = time.monotonic()

    refused = lone.client.get(f"/task/{task_id}/events")
    polled = lone.client.get(f"/task/{task_id}?wait=30")
    sent = lone.client.post("/task", json={"task_type": "echo", "params": {}}, headers={"Prefer": "wait=30"})

    assert time.monotonic() - began < 10
    assert (refused.status_code, refused.json["code"], refused.json["retryable"]) == (
        503,
        "unavailable",
        True,
    )
    assert int(refused.headers["Retry-After"]) > 0
    assert (polled.status_code, polled.json["status"]) == (200, "pending")
    assert sent.status_code == 202
    assert "Preference-Applied" not in sent.headers
    held[0].close()
    assert lone.client.get(f"/task/{task_id}/events").status_code == 200


def test_a_finished_task_needs_no_place(lone: Any) -> None:
    """What can be answered at once is answered at once, however many watch."""
    task_id, done = (lone.submit()["task_id"] for _ in range(2))
    complete(lone, done)
    held = [Stream(lone, task_id) for _ in range(2)]

    assert Stream(lone, done).until_end() == ["snapshot", "done"]
    assert lone.client.get(f"/task/{done}?wait=60").json["status"] == "completed"
    for stream in held:
        stream.close()


def test_a_stream_that_is_dropped_gives_its_place_back(lone: Any) -> None:
    """Also where nothing of it was ever read, as for HEAD."""
    task_id = lone.submit()["task_id"]

    for _ in range(5):
        for method in ("HEAD", "GET"):
            answer = lone.client.open(f"/task/{task_id}/events", method=method)
            assert answer.status_code == 200
            answer.close()  # as servers do

    assert lone.service.watchers.taken == 0


def test_somebody_elses_task_cannot_be_watched(lone: Any) -> None:
    """It is as unknown as one that is not."""
    other, _ = lone.service.ledger.submit(
        NewTask(owner="somebody else", task_type="echo", queue="cpu", params={}, timeout_s=9, max_attempts=1)
    )

    for task_id in (other.id, UNKNOWN, "x"):
        for path in (
            f"/task/{task_id}/events",
            f"/task/{task_id}/events?preview=1",
            f"/task/{task_id}?wait=20",
        ):
            assert lone.client.get(path).status_code == 404
    # Nor does its worker make unfinished pictures for somebody who gets none.
    assert not lone.worker.publish_preview(other.id, 1, b"picture", "image/jpeg", "3")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are remembered for a fifth of a second, and streams look at theirs each half of one."""
    monkeypatch.setattr("genpulse.web.callers.REMEMBERED_S", 0.2)
    monkeypatch.setattr("genpulse.web.events.HEARTBEAT_S", 0.5)


@pytest.mark.parametrize("end", ["revoked", "expired", "made"])
def test_a_stream_ends_with_its_key(hasty: None, lone: Any, end: str) -> None:
    """Also while it is so busy that no heartbeat is due, and where it began before there were any keys."""
    call = None if end == "made" else lone.key("default")
    task_id = call.submit() if call else lone.submit()["task_id"]
    lone.claim(task_id)
    stream = Stream(lone, task_id, call=call)
    stream.until("snapshot")

    if call is None:
        lone.key("somebody else")
    elif end == "revoked":
        lone.service.ledger.revoke_key(call.key.id)
    else:
        past = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=1)
        with lone.service.ledger.engine.begin() as connection:
            connection.execute(t.api_keys.update().values(expires_at=past))
    percents = itertools.count()

    def ended() -> bool:
        progress(lone, task_id, next(percents) / 10)
        return not stream.thread.is_alive()

    wait_until(ended, 30, every_s=0.1, message="the stream is over")
    assert stream.names[-1] != "done"
    assert lone.service.watchers.taken == 0


def test_a_key_that_still_opens_keeps_its_stream(
    hasty: None, lone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at time and again; a ledger that does not tell changes nothing."""
    call = lone.key()
    stream = Stream(lone, call.submit(), call=call)
    wait_until(lambda: stream.comments >= 2)

    def away(key_id: str) -> None:
        raise LedgerUnavailable("away")

    monkeypatch.setattr(lone.service.ledger, "find_key", away)
    seen = stream.comments
    wait_until(lambda: stream.comments >= seen + 3)

    stream.close()


def test_one_owner_leaves_places_to_the_others(lone: Any) -> None:
    """With keys an owner has half of the places, whichever of its keys it shows; a long poll answers at once."""
    ada, again, bob = lone.key("ada"), lone.key("ada"), lone.key("bob")
    task_id = ada.submit()
    first = Stream(lone, task_id, call=ada)
    first.until("snapshot")

    refused = again("GET", f"/task/{task_id}/events")
    polled = again("GET", f"/task/{task_id}?wait=60")
    other = Stream(lone, bob.submit(), call=bob)
    other.until("snapshot")
    first.close()
    second = Stream(lone, task_id, call=again)

    second.until("snapshot")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    assert polled.json["status"] == "pending"
    for stream in (other, second):
        stream.close()


def test_a_single_owner_has_all_places(
    build: Any, sqlite_ledger_url: str, valkey_url: str, tmp_path: Path, stack: ExitStack
) -> None:
    """The key of the settings alone is one owner; beside keys of the ledger it is one of several."""
    made = build(sqlite_ledger_url, tmp_path / "data", redis_url=valkey_url, max_watchers=4, api_key="k")
    api = stack.enter_context(contextmanager(opened)(made, valkey_url))
    headers = {"Authorization": "Bearer k"}
    call = SimpleNamespace(headers=headers)
    answer = api.client.post("/task", json={"task_type": "echo", "params": {}}, headers=headers)
    task_id = answer.json["task_id"]
    streams = [Stream(api, task_id, call=call) for _ in range(4)]
    for stream in streams:
        stream.until("snapshot")
    for stream in streams[1:]:
        stream.close()

    api.key("ada")

    def is_full() -> bool:
        """By now it is known that there are several."""
        more = Stream(api, task_id, call=call)
        wait_until(lambda: more.answer is not None)
        taken = api.service.watchers.taken
        refused = bool(more.answer.status_code == 503)
        if not refused:
            more.until("snapshot")
            more.close()
        return refused and taken == 2

    second = Stream(api, task_id, call=call)
    second.until("snapshot")
    wait_until(is_full, 20, every_s=0.2, message="the owner has only half of the places")
    for stream in (streams[0], second):
        stream.close()


def test_a_stream_lives_for_a_bounded_time(
    build: Any, sqlite_ledger_url: str, valkey_url: str, tmp_path: Path, stack: ExitStack
) -> None:
    """After it the reader comes back with its id; a long poll answers by then, too."""
    made = build(sqlite_ledger_url, tmp_path / "data", redis_url=valkey_url, watch_s=0.5)
    api = stack.enter_context(contextmanager(opened)(made, valkey_url))
    task_id = api.submit()["task_id"]

    stream = Stream(api, task_id)

    assert stream.until_end() == ["snapshot"]
    assert api.client.get(f"/task/{task_id}?wait=60").json["status"] == "pending"


def test_heartbeats_keep_a_quiet_stream_open(lone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment, which readers skip and proxies count as life."""
    monkeypatch.setattr("genpulse.web.events.HEARTBEAT_S", 0.1)
    stream = Stream(lone, lone.submit()["task_id"])

    wait_until(lambda: stream.comments >= 3)
    assert stream.names == ["snapshot"]
    stream.close()


# -- Long polls -------------------------------------------------------------------------------------


def test_a_long_poll_answers_when_the_task_ends(watched: Any) -> None:
    """Not at the end of its time; and at once if the task ended before."""
    task_id = watched.submit()["task_id"]
    claim = watched.claim(task_id)
    ended: list[float] = []

    def end() -> None:
        ended.append(time.monotonic())
        watched.finish(claim, ("a.png", b"png", "image/png"))
        watched.worker.forget_progress(task_id)

    threading.Timer(0.5, end).start()
    task = watched.client.get(f"/task/{task_id}?wait=60").json
    late_s = time.monotonic() - ended[0]

    assert task["status"] == "completed"
    assert late_s < 5  # a busy machine's share; it is some milliseconds
    assert watched.client.get(f"/task/{task_id}?wait=60").json["status"] == "completed"


def test_redis_alone_tells_at_once(lone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger is asked once in ten minutes here: what is seen was told."""
    monkeypatch.setattr("genpulse.web.watch.LOOK_S", 600)
    first, second = (lone.submit()["task_id"] for _ in range(2))
    stream = Stream(lone, first)
    stream.until("snapshot")
    claim = lone.claim(first)
    lone.worker.touch(first)
    stream.until("status")
    lone.finish(claim, ("a.png", b"png", "image/png"))
    lone.worker.forget_progress(first)
    threading.Timer(0.3, complete, (lone, second)).start()

    polled = lone.client.get(f"/task/{second}?wait=50").json

    assert polled["status"] == "completed"
    assert stream.until_end() == ["snapshot", "status", "output", "done"]


def test_a_long_poll_ends_in_time(lone: Any) -> None:
    """The task as it is then, with its ETag; 304 where the caller has that already."""
    task_id = lone.submit()["task_id"]
    began = time.monotonic()

    first = lone.client.get(f"/task/{task_id}?wait=0.3")
    again = lone.client.get(f"/task/{task_id}?wait=0.3", headers={"If-None-Match": first.headers["ETag"]})

    assert time.monotonic() - began > 0.6
    assert (first.status_code, first.json["status"]) == (200, "pending")
    assert (again.status_code, again.data) == (304, b"")


def test_a_weak_etag_waits_as_a_strong_one_does(lone: Any) -> None:
    """A proxy that compresses makes our ETag weak, and ``If-None-Match`` compares weakly (RFC 9110, 13.1.2)."""
    task_id = lone.submit()["task_id"]
    known = lone.client.get(f"/task/{task_id}").headers["ETag"]
    threading.Timer(0.5, lone.client.post, (f"/task/{task_id}/cancel",)).start()

    moved = lone.client.get(f"/task/{task_id}?wait=60", headers={"If-None-Match": f"W/{known}"})

    assert (moved.status_code, moved.json["status"]) == (200, "canceled")


def test_a_conditional_long_poll_answers_when_anything_changes(watched: Any) -> None:
    """With ``If-None-Match`` progress is news; and what differs already is answered at once."""
    task_id = watched.submit()["task_id"]
    watched.claim(task_id)
    known = watched.client.get(f"/task/{task_id}").headers["ETag"]
    threading.Timer(0.3, progress, (watched, task_id, 37.5)).start()

    moved = watched.client.get(f"/task/{task_id}?wait=60", headers={"If-None-Match": known})
    at_once = watched.client.get(f"/task/{task_id}?wait=60", headers={"If-None-Match": '"another"'})

    assert (moved.status_code, moved.json["progress"]) == (200, 37.5)
    assert at_once.status_code == 200


def test_a_wait_beyond_sense_is_refused(lone: Any) -> None:
    """422, and no thread is held."""
    task_id = lone.submit()["task_id"]

    for wait in ("-1", "60.5", "nan", "inf", "x", "", "1&wait=2", "1e999"):
        answer = lone.client.get(f"/task/{task_id}?wait={wait}")

        assert (answer.status_code, answer.json["code"]) == (422, "invalid_request"), wait


# -- Prefer: wait -----------------------------------------------------------------------------------


def end_next(api: Any) -> None:
    """Complete the next task that is submitted, as a worker would."""

    def run() -> None:
        client = api.app.test_client()
        waiting = wait_until(lambda: client.get("/task?status=pending").json["tasks"], 20)
        complete(api, waiting[0]["task_id"])

    threading.Thread(target=run, daemon=True).start()


def test_a_submission_may_wait_for_the_end(watched: Any) -> None:
    """200 with the final task in one request; the same again with the same key."""
    request = {
        "json": {"task_type": "echo", "params": {}},
        "headers": {"Prefer": "respond-async, wait=60", "Idempotency-Key": "k"},
    }
    end_next(watched)

    answer = watched.client.post("/task", **request)
    again = watched.client.post("/task", **request)

    assert (answer.status_code, answer.json["status"]) == (200, "completed")
    assert answer.headers["Preference-Applied"] == "wait=60"
    assert answer.headers["Location"].endswith(answer.json["task_id"])
    assert again.json == answer.json
    assert again.headers["Idempotency-Replayed"] == "true"


def test_a_preference_is_no_demand(lone: Any) -> None:
    """202 when the time is over."""
    answer = lone.client.post(
        "/task", json={"task_type": "echo", "params": {}}, headers={"Prefer": "respond-async; x, WAIT = 1"}
    )

    assert (answer.status_code, answer.json["status"]) == (202, "pending")
    assert answer.headers["Preference-Applied"] == "wait=1"


def test_what_is_not_understood_is_no_preference(lone: Any) -> None:
    """RFC 7240: it is left aside, never refused."""
    for prefer in ("wait=0", "wait=-1", "wait", "wait=x", "wait=١", "waits=9", "", ",;=,", "x" * 5000):
        answer = lone.client.post(
            "/task",
            json={"task_type": "echo", "params": {}},
            headers={"Prefer": prefer.encode().decode("latin-1")},
        )

        assert (answer.status_code, "Preference-Applied" in answer.headers) == (202, False), prefer
