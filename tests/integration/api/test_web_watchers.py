"""Watchers as gunicorn serves them: real sockets, one process, signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from genpulse.client import Client
from genpulse.ledger import Ledger
from genpulse.model import NewTask
from genpulse.testing.services import free_port
from tests.integration.api.test_web_gunicorn import Server
from tests.support import wait_until

PLACES = 4


@pytest.fixture
def server(sqlite_ledger_url: str, valkey_url: str, tmp_path: Path) -> Iterator[Server]:
    """One process with places for four watchers."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GENPULSE_")} | {
        "GENPULSE_DATABASE_URL": sqlite_ledger_url,
        "GENPULSE_REDIS_URL": valkey_url,
        "GENPULSE_DATA_DIR": str(tmp_path / "data"),
        "GENPULSE_PORT": str(port),
        "GENPULSE_API_WORKERS": "1",
        "GENPULSE_API_THREADS": str(2 * PLACES),
    }
    running = Server(port, tmp_path / "gunicorn.log", environment)
    try:
        running.wait_until_ready()
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.process.send_signal(signal.SIGTERM)
        running.process.wait(30)


@pytest.fixture
def task_id(sqlite_ledger_url: str) -> Iterator[str]:
    """A task that waits for ever."""
    ledger = Ledger.connect(sqlite_ledger_url)
    new = NewTask(owner="default", task_type="comfyui", queue="comfy", params={}, timeout_s=9, max_attempts=1)
    yield ledger.submit(new)[0].id
    ledger.close()


def open_stream(server: Server, task_id: str) -> tuple[socket.socket, str]:
    """A raw socket on which the first events came, and what came."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(
        f"GET /task/{task_id}/events HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
    )
    text = b""
    while b"event: snapshot" not in text and b"application/problem+json" not in text:
        piece = connection.recv(65_536)
        assert piece, text
        text += piece
    return connection, text.decode()


def test_watchers_share_connections_and_hanging_up_frees_a_place(
    server: Server, task_id: str, valkey_url: str
) -> None:
    """One reader of Redis for all streams; beyond them 503; who goes away is soon noticed."""
    streams = [open_stream(server, task_id) for _ in range(PLACES)]

    def reading() -> list[str]:
        return [each["cmd"] for each in client.client_list() if each["cmd"] == "xread"]

    client = redis.Redis.from_url(valkey_url)
    wait_until(reading, message="somebody reads")
    refused, answer = open_stream(server, task_id)
    sent = server.ask(
        "POST", "/task", json.dumps({"task_type": "image-convert", "params": {}}),
        Content_Type="application/json", Prefer="wait=60",
    )  # fmt: skip

    assert reading() == ["xread"]
    assert answer.startswith("HTTP/1.1 503")
    assert "retry-after: " in answer.lower()
    assert sent[0] == 422  # it was judged: submitters are served while every place is taken
    refused.close()
    for connection, _ in streams:
        connection.close()

    def taken() -> bool:
        connection, text = open_stream(server, task_id)
        connection.close()
        return text.startswith("HTTP/1.1 200")

    wait_until(taken, 15, every_s=0.2, message="a place is free again")
    client.close()


def test_streams_and_long_polls_end_at_sigterm(server: Server, task_id: str) -> None:
    """Within a second, not at the end of the server's patience, and in order: the stream is complete."""
    held = [open_stream(server, task_id)[0] for _ in range(PLACES - 1)]
    polled: list[int] = []
    poll = threading.Thread(
        target=lambda: polled.append(server.ask("GET", f"/task/{task_id}?wait=60")[0]), daemon=True
    )
    poll.start()
    time.sleep(0.5)
    began = time.monotonic()

    server.process.send_signal(signal.SIGTERM)

    for connection in held:
        connection.settimeout(20)
        text = b""
        while piece := connection.recv(65_536):
            text += piece
        assert text.endswith(b"0\r\n\r\n"), text
        connection.close()
    poll.join(20)
    took = time.monotonic() - began
    assert polled == [200]
    assert took < 8  # gunicorn's own patience is 10 s; on a quiet machine it takes 0.3 s
    assert server.process.wait(20) == 0
    assert "Traceback" not in server.log.read_text()


def test_the_python_client_hears_of_changes(server: Server, task_id: str) -> None:
    """It asks a few times, not four times a second, and learns the end when it comes; by events, too."""
    readings: list[str] = []
    events: list[str] = []

    def listen() -> None:
        with Client(f"http://127.0.0.1:{server.port}") as client:
            events.extend(event.name for event in client.events(task_id))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    with Client(f"http://127.0.0.1:{server.port}") as client, Client(client.url) as other:
        threading.Timer(1.5, other.cancel, (task_id,)).start()

        task = client.follow(task_id, timeout_s=30, on_change=lambda found: readings.append(found["status"]))

    listener.join(20)
    assert task["status"] == "canceled"
    assert readings == ["pending", "canceled"]
    assert events == ["snapshot", "done"]
