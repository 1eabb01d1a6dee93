"""``/status`` and ``/ready``: open to strangers, so that they cost next to nothing, and still true."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from genpulse.errors import LedgerUnavailable
from genpulse.web import condition
from tests.support import wait_until

LOOKS = ("ping", "workers", "counts", "connections", "webhook_backlog")


@pytest.fixture
def asked(keyed_api: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the ledger and the broker were asked what."""
    found: Counter[str] = Counter()

    def counted(what: Any, name: str) -> Callable[..., Any]:
        real = getattr(what, name)

        def ask(*arguments: Any) -> Any:
            found[name] += 1
            return real(*arguments)

        return ask

    for name in LOOKS:
        monkeypatch.setattr(keyed_api.service.ledger, name, counted(keyed_api.service.ledger, name))
    monkeypatch.setattr(keyed_api.service.live, "is_up", counted(keyed_api.service.live, "is_up"))
    return found


def test_many_strangers_cost_one_look(
    keyed_api: Any, asked: Counter[str], bearer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both routes share it, and the one word asks for no more than it takes; an admin's look is remembered, too."""
    monkeypatch.setattr(condition, "REMEMBERED_S", 600)

    answers = [keyed_api.client.get(path) for path in ("/status", "/ready") * 20]

    assert {answer.json["status"] for answer in answers} == {"degraded"}
    assert asked == {"ping": 1, "workers": 1}  # nobody serves a queue: nothing else can change the word
    asked.clear()
    for _ in range(5):
        assert "queues" in keyed_api.client.get("/status", headers=bearer).json
    assert asked == dict.fromkeys((*LOOKS, "is_up"), 1)


def test_a_word_that_is_good_is_asked_to_the_end(
    keyed_api: Any, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing amiss in the ledger the broker has its say."""
    monkeypatch.setattr(keyed_api.service.registry, "queues", list)

    assert keyed_api.client.get("/status").json["status"] == "degraded"
    assert asked == dict.fromkeys(("ping", "workers", "webhook_backlog", "is_up"), 1)


def test_one_looks_and_the_others_are_told_what_was_seen(
    keyed_api: Any, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the ledger takes its time; whoever comes where nothing recent is known waits for the one look."""
    monkeypatch.setattr(condition, "REMEMBERED_S", 0)
    monkeypatch.setattr(condition, "MEANWHILE_S", 600)
    assert keyed_api.client.get("/ready").status_code == 200
    held, real = threading.Event(), keyed_api.service.ledger.ping

    def slow() -> Any:
        held.wait(30)
        return real()

    monkeypatch.setattr(keyed_api.service.ledger, "ping", slow)
    looking = threading.Thread(target=lambda: keyed_api.app.test_client().get("/ready"))
    looking.start()
    wait_until(keyed_api.service.conditions._short._looking.locked)

    assert [keyed_api.client.get("/ready").status_code for _ in range(5)] == [200] * 5

    monkeypatch.setattr(condition, "MEANWHILE_S", 0)
    monkeypatch.setattr(condition, "REMEMBERED_S", 600)
    keyed_api.service.conditions._short._seen = None
    waiting = [threading.Thread(target=lambda: keyed_api.app.test_client().get("/ready")) for _ in range(5)]
    for thread in waiting:
        thread.start()
    held.set()
    for thread in (looking, *waiting):
        thread.join(30)
    assert asked["ping"] == 2


def test_a_ledger_that_went_away_is_noticed(keyed_api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within about a second, and its return, too."""
    assert condition.REMEMBERED_S <= 1
    assert condition.MEANWHILE_S <= 2
    assert keyed_api.client.get("/ready").status_code == 200

    def away() -> None:
        raise LedgerUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(keyed_api.service.ledger, "ping", away)
        down = wait_until(lambda: (found := keyed_api.client.get("/ready")).status_code == 503 and found)
        assert keyed_api.client.get("/status").json["status"] == "down"
    assert (down.json["accepting"], down.headers["Retry-After"]) == (False, "2")
    wait_until(lambda: keyed_api.client.get("/ready").status_code == 200)


def test_a_process_that_stops_says_so_at_once(
    keyed_api: Any, bearer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is remembered."""
    monkeypatch.setattr(condition, "REMEMBERED_S", 600)
    assert keyed_api.client.get("/ready").status_code == 200

    keyed_api.service.is_stopping = lambda: True

    assert keyed_api.client.get("/ready").status_code == 503
    assert keyed_api.client.get("/status").json["status"] == "down"
    problems = keyed_api.client.get("/status", headers=bearer).json["problems"]
    assert problems[0] == "This process is stopping."
