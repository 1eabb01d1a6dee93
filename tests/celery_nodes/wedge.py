"""
Wedges the consumer of the worker's main process when told to; runs as ``sitecustomize`` in it.

``deaf``: a poller without its channel, as after a reconnect that failed half way. ``leak``: slots that
stay taken. ``lame``: the same as deaf, and no reconnect helps. ``hang``: a loop that never returns.
"""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


def wedge(order: Path) -> None:
    """Wait for the file that names the way, and do so once."""
    while not order.exists() or "celery.worker.state" not in sys.modules:
        time.sleep(0.1)
    how = order.read_text()
    order.unlink()

    import gc

    from celery.worker import state
    from kombu.asynchronous import get_event_loop
    from kombu.transport import redis

    poller: Any = redis.MultiChannelPoller
    loop: Any = get_event_loop()
    if how == "lame":
        poller.on_poll_start = lambda _: None
    if how in {"deaf", "lame"}:
        for found in gc.get_objects():
            if type(found) is poller:
                found._channels.clear()
    elif how == "leak":
        kept.extend(Taken() for _ in range(2))  # the set alone would not keep them
        for taken in kept:
            state.reserved_requests.add(taken)
    elif how == "hang":
        loop.call_soon(time.sleep, 3600)


class Taken:
    """Stands for a request that ended and is still counted."""

    id = "taken"


kept: list[Taken] = []


def hurry() -> None:
    """The product waits for 15 s; a test need not."""
    while not hasattr(sys.modules.get("genpulse.tasks.consuming"), "sees_free"):  # imported to its end
        time.sleep(0.1)
    consuming: Any = sys.modules["genpulse.tasks.consuming"]
    consuming.WEDGED_S, consuming.ENDS_WITHIN_S = 2.5, 2.0


if "TEST_WEDGE" in os.environ and "worker" in sys.argv + sys.orig_argv:
    threading.Thread(target=wedge, args=(Path(os.environ["TEST_WEDGE"]),), daemon=True).start()
    threading.Thread(target=hurry, daemon=True).start()
