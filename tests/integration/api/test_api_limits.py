"""How much an owner may send: rates, caps on what waits, and a disk that is nearly full."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genpulse.tasks import admission
from genpulse.testing.services import FaultProxy
from genpulse.web import limits
from tests.support import wait_until

BODY = {"task_type": "echo", "params": {"text": "hi"}}


def post(call: Any, **more: Any) -> Any:
    """Submit, and hand over the answer as it is."""
    return call("POST", "/task", json=BODY, **more)


@pytest.fixture
def limited(build: Any, sqlite_ledger_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """Build an API with limits of its own, closed at the end."""

    def make(**settings: Any) -> Any:
        api = build(sqlite_ledger_url, tmp_path / "data", **settings)
        request.addfinalizer(api.service.ledger.close)
        return api

    return make


# -- rates ----------------------------------------------------------------------------------------


def test_more_than_the_rate_is_429(limited: Any) -> None:
    """With an integer Retry-After, before anything is recorded; the headers say how much is left."""
    call = limited(submit_rate="3/hour").key()

    answers = [post(call) for _ in range(4)]

    assert [answer.status_code for answer in answers] == [202, 202, 202, 429]
    assert [answer.headers["RateLimit-Remaining"] for answer in answers] == ["2", "1", "0", "0"]
    refused = answers[-1]
    assert (refused.json["code"], refused.json["retryable"]) == ("rate_limited", True)
    assert refused.content_type == "application/problem+json"
    assert 1 <= int(refused.headers["Retry-After"]) <= 3600
    assert refused.headers["RateLimit-Limit"] == "3"
    assert 1 <= int(refused.headers["RateLimit-Reset"]) <= 3600
    assert call.api.rows("tasks") == 3


def test_a_rate_is_the_owners_on_every_submitting_route(limited: Any) -> None:
    """Two keys of one owner, both mounts, tasks and uploads count together; other owners do not."""
    api = limited(submit_rate="2/hour")
    one, two, bob = api.key("ada"), api.key("ada"), api.key("bob")

    assert post(one).status_code == 202
    assert two("POST", "/v1/task", json=BODY).status_code == 202
    assert post(one).status_code == 429
    assert two("POST", "/storage/upload").status_code == 429
    assert post(bob).status_code == 202


def test_reading_and_canceling_are_not_submissions(limited: Any) -> None:
    """Whoever may not send more may still look, and take back."""
    call = limited(submit_rate="1/hour").key()
    task_id = post(call).json["task_id"]
    assert post(call).status_code == 429

    for _ in range(3):
        assert call("GET", f"/task/{task_id}").status_code == 200
        assert call("POST", f"/task/{task_id}/cancel").status_code == 200
    assert "RateLimit-Limit" not in call("GET", "/task").headers


def test_a_key_may_have_a_rate_of_its_own(limited: Any) -> None:
    """It counts for itself: neither does it use up the owner's, nor the owner its."""
    api = limited(submit_rate="1/hour")
    own, shared, free = api.key(rate="2/hour"), api.key(), api.key(rate="0")

    assert [post(own).status_code for _ in range(3)] == [202, 202, 429]
    assert [post(shared).status_code for _ in range(2)] == [202, 429]
    assert {post(free).status_code for _ in range(5)} == {202}
    assert "RateLimit-Limit" not in post(free).headers


def test_without_keys_there_is_no_rate(limited: Any) -> None:
    """The only callers are this machine's own."""
    api = limited(submit_rate="1/hour")

    assert {api.client.post("/task", json=BODY).status_code for _ in range(3)} == {202}


def test_processes_count_together_through_redis(limited: Any, valkey_url: str) -> None:
    """And every key that they leave in Redis expires."""
    import redis

    one, two = (limited(submit_rate="4/minute", redis_url=valkey_url) for _ in range(2))
    first = one.key()
    second = type(first)(two, "ada", first.key)

    answers = [post((first, second)[number % 2]) for number in range(6)]

    assert [answer.status_code for answer in answers] == [202] * 4 + [429] * 2
    with redis.Redis.from_url(valkey_url) as client:
        left = [client.ttl(key) for key in client.scan_iter("*genpulse:limit*")]
    assert left
    assert all(0 < seconds <= 180 for seconds in left)


def test_without_redis_each_process_counts_for_itself(
    limited: Any, valkey_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """The limit holds on, whatever Redis does, and is shared again when it is back."""
    proxy = fault_proxy(valkey_url)
    call = limited(submit_rate="3/hour", redis_url=proxy.url_of(valkey_url)).key()
    assert post(call).headers["RateLimit-Remaining"] == "2"
    proxy.set_mode("refuse")

    answers = [post(call) for _ in range(4)]

    assert [answer.status_code for answer in answers] == [202] * 3 + [429]
    proxy.set_mode("pass")
    wait_until(lambda: post(call).headers["RateLimit-Remaining"] == "1", 30, every_s=0.5)


def test_a_black_hole_for_redis_slows_nobody_down(
    limited: Any, valkey_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """
    POST and GET at p99 under 100 ms while Redis takes connections and says nothing.

    A busy machine has slow moments of its own: the same calls with Redis there are the measure beside.
    """
    proxy = fault_proxy(valkey_url)
    api = limited(submit_rate="100000/second", redis_url=proxy.url_of(valkey_url))
    call = api.key()
    task_id = post(call).json["task_id"]
    api.claim(task_id)  # so that GET asks Redis for its progress

    def p99(method: str) -> float:
        taken = []
        for _ in range(150):
            began = time.perf_counter()
            answer = post(call) if method == "POST" else call("GET", f"/task/{task_id}")
            taken.append(time.perf_counter() - began)
            assert answer.status_code in {200, 202}
        return sorted(taken)[-2]

    usual = max(p99("POST"), p99("GET"))
    proxy.set_mode("blackhole")
    held = max(p99("POST"), p99("GET"))

    assert held < max(0.1, 3 * usual), (usual, held)


def test_many_at_once_in_a_black_hole_wait_once(
    limited: Any, valkey_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """Eight callers that meet the dead Redis together are all answered, and soon."""
    proxy = fault_proxy(valkey_url)
    api = limited(submit_rate="100000/second", redis_url=proxy.url_of(valkey_url))
    call = api.key()
    post(call)
    proxy.set_mode("blackhole")
    statuses: list[int] = []

    def go() -> None:
        client = api.app.test_client()
        answers = [client.post("/task", json=BODY, headers=call.headers) for _ in range(5)]
        statuses.extend(answer.status_code for answer in answers)

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert statuses == [202] * 40


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("redis://:p@h:1/0", "redis://:p@h:1/0"),
        ("rediss://h/0", "rediss://h/0"),
        ("unix:///run/redis.sock", "redis+unix:///run/redis.sock"),
        ("redis+socket:///run/redis.sock", "redis+unix:///run/redis.sock"),
    ],
)
def test_a_redis_url_is_said_in_the_limiters_words(given: str, expected: str) -> None:
    """Every URL that the settings take."""
    assert limits._storage_uri(given) == expected


# -- caps on what waits ---------------------------------------------------------------------------


def test_more_than_the_cap_is_queue_full(limited: Any) -> None:
    """Of this owner alone; a task that began makes room."""
    api = limited(max_queued=2)
    ada, bob = api.key("ada"), api.key("bob")
    first = post(ada).json["task_id"]
    assert post(ada).status_code == 202

    refused = post(ada)

    assert (refused.status_code, refused.json["code"]) == (429, "queue_full")
    assert int(refused.headers["Retry-After"]) >= 1
    assert post(bob).status_code == 202
    api.claim(first)
    assert post(ada).status_code == 202
    assert api.rows("tasks") == 4


def test_more_than_the_cap_of_all_is_queue_full(limited: Any) -> None:
    """Whoever sends it."""
    api = limited(max_queued_total=2)
    ada, bob = api.key("ada"), api.key("bob")

    assert [post(call).status_code for call in (ada, bob, ada, bob)] == [202, 202, 429, 429]


def test_a_key_may_have_a_cap_of_its_own(limited: Any) -> None:
    """0 is none. What waits is counted by owner all the same."""
    api = limited(max_queued=1)
    free, wide, usual = api.key(max_queued=0), api.key(max_queued=4), api.key()

    assert [post(free).status_code for _ in range(3)] == [202] * 3
    assert post(usual).status_code == 429
    assert [post(wide).status_code for _ in range(2)] == [202, 429]


def test_a_repeated_request_learns_that_it_was_taken(limited: Any) -> None:
    """Also when the queue is full by now: nothing more is recorded for it."""
    call = limited(max_queued=1).key()
    headers = {"Idempotency-Key": "once"}
    first = post(call, headers=headers)

    again = post(call, headers=headers)

    assert (again.status_code, again.json["task_id"]) == (202, first.json["task_id"])
    assert again.headers["Idempotency-Replayed"] == "true"
    assert post(call, headers={"Idempotency-Key": "other"}).status_code == 429
    other = call("POST", "/task", json={**BODY, "priority": "low"}, headers=headers)
    assert (other.status_code, other.json["code"]) == (422, "idempotency_key_reuse")


def test_retries_are_counted_too(limited: Any) -> None:
    """A task that is sent again waits like any other."""
    api = limited(max_queued=1)
    call = api.key()
    failed = post(call).json["task_id"]
    api.fail(failed)
    post(call)

    assert call("POST", f"/task/{failed}/retry").json["code"] == "queue_full"
    assert call("POST", "/task/retry", json={"status": "failed"}).json["code"] == "queue_full"


def test_the_cap_counts_far_away_by_the_second_and_near_it_exactly(
    limited: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most submissions cost the ledger no count."""
    api = limited(max_queued=1000, max_queued_total=0)
    call = api.key()
    counted: list[str | None] = []
    queued = api.service.ledger.queued

    def count(owner: str | None, limit: int) -> int:
        counted.append(owner)
        return int(queued(owner, limit))

    monkeypatch.setattr(admission, "_COUNT_AGE_S", 3600.0)
    monkeypatch.setattr(api.service.ledger, "queued", count)
    for _ in range(20):
        post(call)

    assert len(counted) == 1


def test_a_nearly_full_disk_takes_nothing_in(limited: Any) -> None:
    """Neither tasks nor files, and says so instead of failing later."""
    api = limited(min_free_bytes=2**62)
    call = api.key()

    for answer in (post(call), call("POST", "/storage/upload", data=b"")):
        assert (answer.status_code, answer.json["code"]) == (429, "queue_full")
        assert int(answer.headers["Retry-After"]) >= 1
    assert api.rows("tasks") == 0


def test_a_waiting_task_says_that_its_owner_is_at_the_limit(limited: Any) -> None:
    """``wait_reason`` in a code and in words."""
    api = limited(max_running=1)
    call = api.key()
    running, waiting = (call.submit() for _ in range(2))
    api.claim(running)

    reason = call("GET", f"/task/{waiting}").json["wait_reason"]

    assert reason["code"] == "owner_limit"
    assert "1 task" in reason["text"]
