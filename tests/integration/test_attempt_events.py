"""What an attempt tells those who watch it, from ComfyUI's socket to the log in Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from genpulse.ledger import Ledger
from genpulse.live import Entry, EventReader
from genpulse.testing.simulator import Simulator
from tests.integration import test_attempt
from tests.support import wait_until
from tests.support.cluster import save_image
from tests.support.ledger import open_ledger

hire = test_attempt.hire


@pytest.fixture
def ledger(sqlite_ledger_url: str) -> Iterator[Ledger]:
    """A migrated ledger of this test alone."""
    with open_ledger(sqlite_ledger_url, pool_size=2) as found:
        yield found


@pytest.mark.parametrize("wanted", [False, True])
def test_an_attempt_tells_its_progress_and_shows_previews_on_request(
    ledger: Ledger, simulator: Simulator, hire: Callable[..., Any], valkey_url: str, wanted: bool
) -> None:
    """Beginning, progress and end are in the log; pictures only for somebody who asked."""
    del simulator  # `hire` serves it
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 9}},
        "2": {
            "class_type": "SimSleep",
            "inputs": {"image": ["1", 0], "seconds": 1.5, "steps": 15, "seed": 1, "preview": True},
        },
        "3": save_image("2"),
    }
    task = test_attempt.order(ledger, workflow)
    heard: list[Entry] = []
    lock = threading.Lock()

    def hear(_task_id: str, entry: Entry) -> None:
        with lock:
            heard.append(entry)

    reader = EventReader(valkey_url, hear)
    assert reader.follow(task.id) is not None
    if wanted:
        reader.want_previews([task.id])

    child = hire(ledger)
    child.start(task)
    assert child.end(30) == "completed"

    wait_until(lambda: [entry.kind for entry in heard].count("change") == 2)
    reader.stop()
    told = [entry for entry in heard if entry.kind != "preview"]
    percents = [entry.data["percent"] for entry in told if entry.kind == "progress"]
    assert (told[0].kind, told[-1].kind) == ("change", "change")
    assert percents == sorted(percents)
    assert percents
    pictures = [entry.data for entry in heard if entry.kind == "preview"]
    assert bool(pictures) is wanted
    assert all((picture["node_id"], picture["content_type"]) == ("2", "image/jpeg") for picture in pictures)
