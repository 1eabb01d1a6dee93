"""Progress as it is shown: it never falls within an attempt, whatever Redis says or forgets."""

from __future__ import annotations

from typing import Any

import pytest

from genpulse.live import PROGRESS_TTL_S, Farthest
from genpulse.tasks.queues import HARD_LIMIT_S

TASK = "0190-task"


def told(percent: Any, attempt: int = 1) -> dict[str, Any]:
    """What Redis tells."""
    return {"attempt": attempt, "percent": percent, "detail": {"node_id": "3"}}


def test_a_silent_redis_takes_nothing_away() -> None:
    """Number and detail stay what they were, so that nobody who waits for news is told of any."""
    farthest = Farthest()
    farthest.of(TASK, 1, told(63.0))

    assert farthest.of(TASK, 1, None) == told(63.0)


def test_progress_goes_up_and_not_down() -> None:
    """A late word of the same attempt changes nothing; the same number with another detail does."""
    farthest = Farthest()
    shown = [farthest.of(TASK, 1, told(percent)) for percent in (10, 40, 20, 40.5)]
    again = {**told(40.5), "detail": {"node_id": "4"}}

    assert [each and each["percent"] for each in shown] == [10, 40, 40, 40.5]
    assert farthest.of(TASK, 1, again) == again


def test_another_attempt_begins_anew() -> None:
    """It has numbers of its own; a row that was read before it began does not bring the old ones back."""
    farthest = Farthest()
    farthest.of(TASK, 1, told(90))

    assert farthest.of(TASK, 2, told(90)) is None
    assert farthest.of(TASK, 2, told(5, attempt=2)) == told(5, attempt=2)
    assert farthest.of(TASK, 1, None) is None
    assert farthest.of(TASK, 2, None) == told(5, attempt=2)


@pytest.mark.parametrize("percent", [None, "63", float("nan"), -1, 101, []])
def test_what_is_no_percentage_is_not_shown(percent: Any) -> None:
    """Anybody's garbage may lie in Redis; it must not stay."""
    farthest = Farthest()

    assert farthest.of(TASK, 1, told(percent)) is None
    assert farthest.of(TASK, 1, told(7)) == told(7)


def test_it_remembers_so_many_and_forgets_at_the_end() -> None:
    """Those that were asked for last; of a final task nothing."""
    farthest = Farthest(kept=2)
    for task_id in ("a", "b"):
        farthest.of(task_id, 1, told(50))
    farthest.of("a", 1, None)
    farthest.of("c", 1, told(50))

    assert [farthest.of(task_id, 1, None) is not None for task_id in ("a", "b", "c")] == [True, False, True]
    farthest.forget("c")
    assert farthest.of("c", 1, None) is None


def test_redis_keeps_it_for_longer_than_an_attempt_can_be() -> None:
    """A node may say nothing for hours; the number must not fall for that."""
    assert PROGRESS_TTL_S > HARD_LIMIT_S
