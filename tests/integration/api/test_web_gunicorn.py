"""The API as it is served: gunicorn's own processes, sockets and signals."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from genpulse.ledger import Ledger
from genpulse.testing.services import free_port
from tests.support import wait_until

TASK = json.dumps({"task_type": "image-convert", "params": {}})


class Server:
    """One ``gunicorn`` with one worker process."""

    def __init__(
        self,
        port: int,
        log: Path,
        environment: dict[str, str],
        config: str = "python:genpulse.web.gunicorn_conf",
    ) -> None:
        self.port = port
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "gunicorn", "--config", config, "genpulse.web:create_app()",
                ],
                env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(
                method, path, body, {name.replace("_", "-"): text for name, text in headers.items()}
            )
            answer = connection.getresponse()
            return (
                answer.status,
                {name.lower(): value for name, value in answer.headers.items()},
                answer.read(),
            )
        finally:
            connection.close()

    def wait_until_ready(self) -> None:
        """Until ``/ready`` says 200."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.ask("GET", "/ready")[0] == 200:
                    return
            except OSError:
                time.sleep(0.05)
        pytest.fail(f"not ready: {self.log.read_text()}")


@contextmanager
def serving(ledger_url: str, valkey_url: str, folder: Path, *config: str, **more: str) -> Iterator[Server]:
    """A running server on a real ledger and broker."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GENPULSE_")} | {
        "GENPULSE_DATABASE_URL": ledger_url,
        "GENPULSE_REDIS_URL": valkey_url,
        "GENPULSE_DATA_DIR": str(folder / "data"),
        "GENPULSE_PORT": str(port),
        "GENPULSE_API_WORKERS": "1",
        "GENPULSE_API_THREADS": "8",
        "GENPULSE_MAX_BODY_BYTES": "65536",
        "GENPULSE_MAX_UPLOAD_BYTES": "1048576",
        **more,
    }
    running = Server(port, folder / "gunicorn.log", environment, *config)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.process.send_signal(signal.SIGTERM)
        try:
            running.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
            raise


@pytest.fixture
def server(ledger_url: str, valkey_url: str, tmp_path: Path) -> Iterator[Server]:
    """One with the patience of every day, on both databases in turn."""
    with serving(ledger_url, valkey_url, tmp_path) as running:
        yield running


HASTY = """\
from genpulse.web import pace
from genpulse.web.gunicorn_conf import *

pace.HEAD_S, pace.STALL_S, pace.GRACE_S = 1.5, 4.0, 1.0
"""


@pytest.fixture
def hasty(sqlite_ledger_url: str, valkey_url: str, tmp_path: Path) -> Iterator[Server]:
    """One that waits for nobody for long, and takes larger files."""
    config = tmp_path / "hasty.py"
    config.write_text(HASTY)
    size = {"GENPULSE_MAX_UPLOAD_BYTES": str(64 * 2**20)}
    with serving(sqlite_ledger_url, valkey_url, tmp_path, f"file:{config}", **size) as running:
        yield running


@pytest.fixture
def connect(hasty: Server) -> Iterator[Callable[[bytes], socket.socket]]:
    """Open a connection and send the beginning of something; it stays open until the test ends."""
    with ExitStack() as stack:

        def begin(text: bytes) -> socket.socket:
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", hasty.port), timeout=30))
            raw.sendall(text)
            return raw

        yield begin


def all_of(raw: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    text = b""
    while piece := raw.recv(65_536):
        text += piece
    return text


def test_a_submission_wakes_the_relay_of_its_own_process(
    server: Server, ledger_url: str, valkey_url: str
) -> None:
    """Upload, submit, and the message is in Redis though nobody swept."""
    import redis

    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n\x89PNG\r\n\x1a\n\r\n--b--\r\n'
    status, _, asset = server.ask(
        "POST", "/storage/upload", form, Content_Type="multipart/form-data; boundary=b"
    )
    assert status == 201, asset
    ledger = Ledger.connect(ledger_url)
    types = json.loads(server.ask("GET", "/task-types")[2])["task_types"]
    assert "image-convert" in [found["task_type"] for found in types]
    ledger.close()
    with redis.Redis.from_url(valkey_url) as client:
        task = {
            "task_type": "image-convert",
            "params": {"source": f"asset:{json.loads(asset)['id']}", "format": "png"},
        }

        status, headers, body = server.ask("POST", "/task", json.dumps(task), Content_Type="application/json")

        assert status == 202, body
        assert headers["location"].startswith(f"http://127.0.0.1:{server.port}/task/")
        deadline = time.monotonic() + 5
        while not client.llen("cpu\x06\x163") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.llen("cpu\x06\x163") == 1


def test_a_chunked_body_is_bounded_too(server: Server) -> None:
    """No length is told, so the limit has to hold while reading; and no beginning is taken for the whole."""
    small = iter([TASK.encode()[:10], TASK.encode()[10:]])
    exact = iter([TASK.encode(), b" " * (65_536 - len(TASK))])
    above = iter([TASK.encode(), b" " * (65_537 - len(TASK))])
    endless = (b"x" * 16_384 for _ in range(64))

    taken = server.ask("POST", "/task", small, Content_Type="application/json")
    refused = server.ask("POST", "/task", endless, Content_Type="application/json")

    assert taken[0] == 422, taken  # it was read: the params lack a source
    assert (refused[0], json.loads(refused[2])["code"]) == (413, "too_large")
    assert server.ask("POST", "/task", exact, Content_Type="application/json")[0] == 422
    assert server.ask("POST", "/task", above, Content_Type="application/json")[0] == 413
    assert server.ask("GET", "/health")[0] == 200


def test_a_chunked_upload_is_taken_and_bounded(server: Server) -> None:
    """Files of unknown length are streamed; above the limit they are refused on the way."""

    def form(megabytes: int) -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(megabytes * 16):
            yield b"\0" * 65_536
        yield b"\r\n--b--\r\n"

    taken = server.ask("POST", "/storage/upload", form(1), Content_Type="multipart/form-data; boundary=b")
    refused = server.ask("POST", "/storage/upload", form(3), Content_Type="multipart/form-data; boundary=b")

    assert taken[0] == 201, taken
    assert refused[0] == 413


def test_a_caller_that_goes_away_disturbs_nobody(server: Server) -> None:
    """Half a body and a closed socket: no row, no 500 in the log."""
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(
                b"POST /task HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b'Content-Length: 500\r\n\r\n{"task_type"'
            )

    assert server.ask("GET", "/health")[0] == 200
    assert json.loads(server.ask("GET", "/task")[2])["tasks"] == []
    assert "request_failed" not in server.log.read_text()


def test_sigterm_ends_the_server_within_seconds(server: Server) -> None:
    """Idle keep-alive connections and the background threads hold nothing up."""
    idle = http.client.HTTPConnection("127.0.0.1", server.port)
    idle.request("GET", "/health")
    idle.getresponse().read()
    begun = time.monotonic()

    server.process.send_signal(signal.SIGTERM)

    assert server.process.wait(15) == 0, server.log.read_text()
    assert time.monotonic() - begun < 8
    assert "Traceback" not in server.log.read_text()
    idle.close()


# -- Callers who are slow ---------------------------------------------------------------------------------------------


def test_whoever_sends_no_head_holds_no_thread(
    hasty: Server, connect: Callable[[bytes], socket.socket]
) -> None:
    """A byte on more connections than there are threads: others are served, and the log says nothing."""
    held = [connect(b"G") for _ in range(20)]

    assert hasty.ask("GET", "/health")[0] == 200

    assert [all_of(raw) for raw in held] == [b""] * 20
    assert "Traceback" not in hasty.log.read_text()


def test_whoever_does_not_hang_up_holds_nobody_up(
    hasty: Server, connect: Callable[[bytes], socket.socket]
) -> None:
    """Closing politely takes two seconds each where the caller does not close, and others are served meanwhile."""
    ask = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    held = [connect(ask) for _ in range(30)]
    assert all_of(held[0]).startswith(b"HTTP/1.1 200 ")

    assert hasty.ask("GET", "/health")[0] == 200

    assert all(all_of(raw).startswith(b"HTTP/1.1 200 ") for raw in held[1:])


def test_a_head_that_drips_ends(connect: Callable[[bytes], socket.socket]) -> None:
    """Each byte comes in time, and the whole does not; also where another request went before it."""
    raw = connect(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /health HTTP/1.1\r\nX-Slow: ")

    def drips() -> bool:
        try:
            raw.sendall(b"x")
        except OSError:
            return False
        return True

    wait_until(lambda: not drips(), 30, every_s=0.1, message="the server hangs up")


FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
BODIES = {
    "json": (b"POST /task HTTP/1.1", b"application/json", b"Content-Length: 50000", b'{"task_type"'),
    "chunks": (b"POST /task HTTP/1.1", b"application/json", b"Transfer-Encoding: chunked", b"C350\r\n{"),
    "batch": (b"POST /task/batch HTTP/1.1", b"application/json", b"Content-Length: 50000", b"{"),
    "upload": (
        b"POST /storage/upload HTTP/1.1",
        b"multipart/form-data; boundary=b",
        b"Content-Length: 50000",
        FORM,
    ),
}


@pytest.mark.parametrize("drip", [b"", b"x"], ids=["stalls", "drips"])
def test_a_body_that_does_not_come_is_408(
    hasty: Server, connect: Callable[[bytes], socket.socket], drip: bytes
) -> None:
    """Whether nothing comes any more or a byte now and then; the answer says so, and that the connection ends."""
    answers: dict[socket.socket, bytes] = {}
    for line, kind, length, beginning in BODIES.values():
        head = b"%s\r\nHost: 127.0.0.1\r\nContent-Type: %s\r\n%s\r\n\r\n" % (line, kind, length)
        raw = connect(head + beginning)
        raw.settimeout(0.1)
        answers[raw] = b""

    def answered() -> bool:
        for raw, text in answers.items():
            if not text.endswith(b"}"):
                with suppress(TimeoutError):
                    raw.sendall(drip)
                    answers[raw] += raw.recv(65_536)
        return all(text.endswith(b"}") for text in answers.values())

    wait_until(answered, 30, message="four answers")
    for text in answers.values():
        head, _, problem = text.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in head.lower()
        assert (json.loads(problem)["code"], json.loads(problem)["retryable"]) == ("request_timeout", True)
    assert hasty.ask("GET", "/health")[0] == 200
    assert "Traceback" not in hasty.log.read_text()


def test_a_slow_line_is_no_reason(hasty: Server) -> None:
    """A body that takes longer than any single wait may, but goes on."""

    def form() -> Iterator[bytes]:
        yield FORM
        for _ in range(14):
            time.sleep(0.4)
            yield b"\0" * 4096
        yield b"\r\n--b--\r\n"

    assert (
        hasty.ask("POST", "/storage/upload", form(), Content_Type="multipart/form-data; boundary=b")[0] == 201
    )


def in_flight(server: Server) -> float:
    """Requests that are being answered, this one not counted."""
    text = server.ask("GET", "/metrics")[2].decode()
    lines = [line for line in text.splitlines() if line.startswith("genpulse_http_requests_in_flight")]
    return sum(float(line.rpartition(" ")[2]) for line in lines) - 1


@pytest.fixture
def file(hasty: Server) -> tuple[str, bytes]:
    """The address of a file that no socket's buffers hold, and its bytes."""
    content = os.urandom(1024) * 24 * 1024
    status, headers, answer = hasty.ask(
        "POST",
        "/storage/upload",
        FORM + content + b"\r\n--b--\r\n",
        Content_Type="multipart/form-data; boundary=b",
    )
    assert status == 201, answer
    return headers["location"].partition(str(hasty.port))[2], content


def test_downloads_end_in_every_way(hasty: Server, file: tuple[str, bytes]) -> None:
    """Read to the end, in part, only looked at, or left in the middle: none is counted as under way any more."""
    path, content = file

    whole, part = hasty.ask("GET", path), hasty.ask("GET", path, Range="bytes=-70000")
    looked = hasty.ask("HEAD", path)
    for _ in range(3):
        with closing(http.client.HTTPConnection("127.0.0.1", hasty.port, timeout=20)) as connection:
            connection.request("GET", path)
            connection.getresponse().read(10)

    assert (whole[0], whole[2] == content, part[0], part[2] == content[-70_000:]) == (200, True, 206, True)
    assert (looked[0], looked[1]["content-length"], looked[2]) == (200, str(len(content)), b"")
    wait_until(lambda: in_flight(hasty) == 0, 20, every_s=0.1, message="all are over")


def test_whoever_does_not_read_holds_no_thread(
    hasty: Server, connect: Callable[[bytes], socket.socket], file: tuple[str, bytes]
) -> None:
    """A download that nobody takes ends, and more of them than there are threads keep nobody out."""
    path, content = file
    held = [connect(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()) for _ in range(12)]

    wait_until(lambda: in_flight(hasty) == 0, 40, every_s=0.5, message="all are over")

    assert all(0 < len(all_of(raw)) < len(content) for raw in held)
    assert "Traceback" not in hasty.log.read_text()
