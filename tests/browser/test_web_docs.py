"""The contract's page in a real browser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from werkzeug.serving import make_server

from genpulse.config import Settings
from genpulse.web import create_app

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture
def url(sqlite_ledger_url: str, tmp_path: Path) -> Iterator[str]:
    """The API on a port of this machine."""
    app = create_app(Settings.build(database_url=sqlite_ledger_url, data_dir=tmp_path / "data"))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
    app.extensions["genpulse"].ledger.close()


@pytest.mark.parametrize("mount", ["", "/v1"])
def test_the_docs_page_shows_the_contract_without_the_internet(
    browser: Browser, url: str, mount: str
) -> None:
    """All operations are listed, nobody else is asked, and the page's own policy forbids nothing it needs."""
    page = browser.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))

    page.goto(f"{url}{mount}/docs")
    page.wait_for_selector(".opblock")
    shown = page.locator(".opblock-summary-path").all_inner_texts()
    page.locator(".opblock", has_text="Submit a task").first.locator("button").first.click()
    page.wait_for_selector(".opblock-body")
    document = page.request.get(f"{url}{mount}/openapi.json").json()
    page.close()

    assert sorted(set(shown)) == sorted([*document["paths"], *document["webhooks"]])
    assert [one for one in asked if not one.startswith((url, "data:"))] == []
    assert complaints == []
