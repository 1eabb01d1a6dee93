"""A task's events in a real browser: what ``EventSource`` makes of the stream, its ends and its ids."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from flask import request
from werkzeug.serving import make_server

from genpulse.config import Settings
from genpulse.live import Live
from genpulse.model import NewTask, TaskStatus
from genpulse.web import create_app
from genpulse.web.service import OWNER, Service

if TYPE_CHECKING:
    from playwright.sync_api import Browser

WATCH = """id => new Promise(resolve => {
    window.seen = [];
    const events = new EventSource(`/task/${id}/events`);
    for (const name of ["snapshot", "status", "progress", "output", "done", "gap"])
        events.addEventListener(name, event => window.seen.push(name));
    events.onerror = () => { if (events.readyState === EventSource.CLOSED) window.seen.push("closed"); };
    resolve();
})"""


class Site:
    """The API on a port of this machine, whose streams live for a second."""

    def __init__(self, ledger_url: str, valkey_url: str, data_dir: Path) -> None:
        self.app = create_app(
            Settings.build(database_url=ledger_url, redis_url=valkey_url, data_dir=data_dir, watch_s=1.0)
        )
        self.came_with: list[str | None] = []
        self.app.before_request(self._note)
        self.server = make_server("127.0.0.1", 0, self.app, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.service: Service = self.app.extensions["genpulse"]
        self.live = Live(valkey_url)

    def _note(self) -> None:
        if request.path.endswith("/events"):
            self.came_with.append(request.headers.get("Last-Event-ID"))


@pytest.fixture
def site(sqlite_ledger_url: str, valkey_url: str, tmp_path: Path) -> Iterator[Site]:
    """A running :class:`Site`."""
    made = Site(sqlite_ledger_url, valkey_url, tmp_path / "data")
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.service.watchers.close()
    made.server.shutdown()
    thread.join()
    made.server.server_close()
    made.service.ledger.close()
    made.live.close()


def test_a_browser_comes_back_where_it_was_and_stops_at_the_end(browser: Browser, site: Site) -> None:
    """The stream ends again and again; the page sees each event once, and asks no more after the end."""
    ledger = site.service.ledger
    task, _ = ledger.submit(
        NewTask(owner=OWNER, task_type="comfyui", queue="comfy", params={}, timeout_s=9, max_attempts=1)
    )
    page = browser.new_page(bypass_csp=True)  # no page of ours is about events yet
    page.goto(f"{site.url}/health")
    page.evaluate(WATCH, task.id)
    page.wait_for_function("seen.length >= 1")
    claim = ledger.claim(
        task.id, claim=secrets.token_hex(8), worker="w", session_key=1, servers=[], lease_s=60
    )
    assert claim is not None
    site.live.touch(task.id)
    site.live.publish_progress(task.id, 1, 25.0, {})
    page.wait_for_function("seen.includes('progress')")
    while len(site.came_with) < 3:  # it came back by itself
        page.wait_for_timeout(100)

    ledger.finish(claim.fence, TaskStatus.COMPLETED)
    site.live.forget_progress(task.id)
    page.wait_for_function("seen.includes('closed')")
    seen = page.evaluate("seen")
    page.close()

    assert seen == ["snapshot", "status", "progress", "done", "closed"]
    assert site.came_with[0] is None
    assert None not in site.came_with[1:]
