"""
Which tasks go to the broker next, and to which queue. The one place where order is decided.

Now: priority, then age, late, out of the ledger with everything in view. The broker holds only a
short *runway*, so this order holds for all but the few messages that are already there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from genpulse.ledger import Dispatch, Ledger

__all__ = ["next_batch", "room"]

FLOOR = 2
"""A queue's runway is at least this long, also while no worker is known."""


def next_batch(
    ledger: Ledger, slots: Mapping[str, int], served: Collection[tuple[str, str]], max_running: int = 0
) -> list[Dispatch]:
    """
    Take what the broker should hold next out of the outbox.

    A task whose owner has as many running as they may waits in the ledger, and others pass it: on the
    runway it would take a place and could not be claimed.

    Args:
        slots: Live worker slots by queue.
        served: The (queue, server) that a live worker consumes; only their bound tasks go.
        max_running: Cap on the running tasks of one owner where no key says otherwise; 0 is none.

    Returns:
        The taken tasks, most urgent first. The caller sends them or puts them back.
    """
    waiting = ledger.waiting()
    batch = ledger.take_bound(waiting.bound.intersection(served))
    if not waiting.priorities:
        return batch
    runway = ledger.runway()
    owners = ledger.owner_room(max_running)
    for queue, priorities in waiting.priorities.items():
        held = dict(runway.get(queue, {}))
        for priority in sorted(priorities):
            free = room(held, priority, max(FLOOR, slots.get(queue, 0)))
            if free > 0:
                taken = ledger.take(queue, priority, free, owners)
                held[priority] = held.get(priority, 0) + len(taken)
                batch += taken
    return batch


def room(held: Mapping[int, int], priority: int, limit: int) -> int:
    """
    How many messages of *priority* still fit on a runway of *limit*.

    Only what is at least as urgent counts, so a more urgent task passes a runway full of others.
    """
    return limit - sum(number for step, number in held.items() if step <= priority)
