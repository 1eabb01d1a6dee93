"""When a consumer counts as deaf: looks by looks, with a clock that the test moves."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from genpulse.tasks.consuming import WEDGED_S, ConsumerWatch, Pulse, Sight

FREE = Sight(free=True, broker=True)
WAITING = Sight(free=True, broker=True, waiting=1)


@dataclass
class Scene:
    """A consumer that is watched, and what was done about it."""

    now: float = 1000.0
    acts: list[str] = field(default_factory=list)
    pulse: Pulse = field(default_factory=Pulse)

    def __post_init__(self) -> None:
        self.watch = ConsumerWatch(
            self.pulse,
            reconnect=lambda: self.acts.append("reconnect"),
            restart=lambda: self.acts.append("restart"),
            clock=lambda: self.now,
        )

    def look(self, sight: Sight, times: int, *, answers: bool = False, delivers: bool = False) -> list[str]:
        """Look once a second, so often; the acts so far."""
        for _ in range(times):
            self.now += 1.0
            if answers:
                self.pulse.answered_at = self.now
            if delivers:
                self.pulse.delivered_at = self.now
            self.watch.look(sight)
        return self.acts


LONG = int(3 * WEDGED_S)


def test_a_consumer_that_gets_answers_and_has_nothing_to_do_is_well() -> None:
    """For hours."""
    assert Scene().look(FREE, 100 * LONG, answers=True) == []


def test_a_consumer_that_takes_messages_is_well() -> None:
    """However many wait behind them."""
    assert Scene().look(WAITING, LONG, answers=True, delivers=True) == []


@pytest.mark.parametrize("sight", [FREE, WAITING], ids=["idle", "messages-wait"])
def test_a_consumer_without_an_answer_connects_anew_and_then_the_worker_starts_again(sight: Sight) -> None:
    """Redis answers us and a child is free: first the cheap cure, and the other one if it did not help."""
    scene = Scene()

    assert scene.look(sight, int(WEDGED_S) - 2) == []
    assert scene.look(sight, 4) == ["reconnect"]
    assert scene.look(sight, int(WEDGED_S) + 4) == ["reconnect", "restart"]


def test_a_consumer_that_listens_to_the_wrong_queues_is_deaf_too() -> None:
    """It gets its answers, and what waits for it is not taken."""
    assert Scene().look(WAITING, int(WEDGED_S) + 4, answers=True) == ["reconnect"]


def test_what_helped_once_is_tried_first_the_next_time() -> None:
    """A reconnect that cured it stands for itself."""
    scene = Scene()
    scene.look(FREE, int(WEDGED_S) + 3)
    scene.look(FREE, 5, answers=True)

    assert scene.look(FREE, int(WEDGED_S) + 3) == ["reconnect", "reconnect"]


@pytest.mark.parametrize(
    "sight",
    [Sight(free=False, broker=True, waiting=9), Sight(free=True, broker=False)],
    ids=["no-child-is-free", "redis-is-away"],
)
def test_a_consumer_that_cannot_take_anything_is_not_judged(sight: Sight) -> None:
    """Busy, paused, told to stop, or without a broker: there is nothing to hear."""
    scene = Scene()

    assert scene.look(sight, LONG) == []
    assert scene.look(FREE, int(WEDGED_S) - 2) == []


def test_a_process_that_was_frozen_judges_nothing_by_that_time() -> None:
    """After it thaws every answer looks old, and the consumer needs its moment."""
    scene = Scene()
    scene.look(FREE, 5)
    scene.now += 600

    assert scene.look(FREE, int(WEDGED_S) - 2) == []
