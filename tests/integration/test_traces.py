"""Traces: from the request through the ledger to the attempt, ComfyUI and storage, at a real OTLP receiver."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import wait_until
from tests.support.receiver import read_request, serve

# The request and its attempt in processes of their own, as they are: tracing is a process's.
REQUEST = """
import sys
from genpulse.config import Settings
from genpulse.telemetry import setup_logging, traces
from genpulse.web import create_app

settings = Settings.from_env()
setup_logging("INFO", "json")
app = create_app(settings)
sent = {"task_type": "comfyui", "params": {"workflow": {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "a secret wish"}},
}}}
answer = app.test_client().post("/task", json=sent, headers={"X-Request-ID": "order-4711"})
assert answer.status_code == 202, answer.text
print(answer.json["task_id"])
traces.stop()
"""

ATTEMPT = """
import sys
from genpulse.telemetry import setup_logging
from genpulse.tasks import runner

setup_logging("INFO", "json")
runner.start_child("node")
print(runner.run_message(sys.argv[1])["status"])
runner.stop_child()
"""


@pytest.fixture
def received() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP receiver: its base URL, and every span that came, with its service."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    def take(connection: socket.socket) -> None:
        line, headers, body = read_request(connection)
        assert line.startswith("POST /v1/traces ")
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        message = ExportTraceServiceRequest.FromString(body)
        for group in message.resource_spans:
            names = {each.key: each.value.string_value for each in group.resource.attributes}
            spans.extend((names["service.name"], span) for scope in group.scope_spans for span in scope.spans)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with serve(take) as port:
        yield f"http://127.0.0.1:{port}", spans


def run(program: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """A program of its own with these settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GENPULSE_")}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**environment, **settings},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def attributes(span: Any) -> dict[str, str]:
    """The text attributes of a span."""
    return {each.key: each.value.string_value for each in span.attributes}


@pytest.mark.timeout(150)
def test_one_trace_from_the_request_to_the_storage(
    sqlite_ledger_url: str,
    valkey_url: str,
    simulator: Any,
    tmp_path: Path,
    received: tuple[str, list[Any]],
) -> None:
    """Another process runs the attempt, and its spans hang below the request's; its log has the request's id."""
    endpoint, spans = received
    settings = {
        "GENPULSE_DATABASE_URL": sqlite_ledger_url,
        "GENPULSE_REDIS_URL": valkey_url,
        "GENPULSE_DATA_DIR": str(tmp_path),
        "GENPULSE_COMFY_URLS": f"gpu1={simulator.url}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
    }
    request = run(REQUEST, **settings)
    task_id = request.stdout.strip()
    attempt = run(ATTEMPT, task_id, **settings)
    assert attempt.stdout.strip() == "completed", attempt.stderr
    wait_until(lambda: len(spans) >= 5)

    found = {span.name: (service, span) for service, span in spans}
    assert found.keys() == {
        "POST /task",
        "attempt comfyui",
        "comfyui render",
        "comfyui capture",
        "storage put",
    }
    assert {span.trace_id for _, span in spans} == {found["POST /task"][1].trace_id}
    assert found["POST /task"][0] == "genpulse-api"
    assert found["attempt comfyui"][0] == "genpulse-worker"
    below = {
        "attempt comfyui": "POST /task",
        "comfyui render": "attempt comfyui",
        "comfyui capture": "attempt comfyui",
        "storage put": "comfyui capture",
    }
    for name, parent in below.items():
        assert found[name][1].parent_span_id == found[parent][1].span_id, name
    assert attributes(found["attempt comfyui"][1])["genpulse.task_id"] == task_id
    assert attributes(found["attempt comfyui"][1])["genpulse.status"] == "completed"
    assert attributes(found["comfyui render"][1])["genpulse.server"] == "gpu1"
    assert "a secret wish" not in "".join(map(str, spans)) + request.stderr + attempt.stderr

    lines = [json.loads(line) for line in attempt.stderr.splitlines() if line.startswith("{")]
    of_the_attempt = [
        line for line in lines if line["event"] in {"task_started", "prompt_submitted", "attempt_ended"}
    ]
    assert len(of_the_attempt) == 3
    for line in of_the_attempt:
        assert (line["task_id"], line["attempt"], line["owner"]) == (task_id, 1, "default")
        assert line["request_id"] == "order-4711"
        assert line["trace_id"] == found["POST /task"][1].trace_id.hex()


@pytest.mark.timeout(90)
def test_a_collector_that_hangs_holds_nobody_up(
    sqlite_ledger_url: str, valkey_url: str, tmp_path: Path
) -> None:
    """It takes the connection and says nothing: the request is answered, and the process ends."""

    def hang(_: socket.socket) -> None:
        time.sleep(50)

    with serve(hang) as port:
        began = time.monotonic()
        done = run(
            REQUEST,
            GENPULSE_DATABASE_URL=sqlite_ledger_url,
            GENPULSE_REDIS_URL=valkey_url,
            GENPULSE_DATA_DIR=str(tmp_path),
            GENPULSE_OTLP_ENDPOINT=f"http://127.0.0.1:{port}",
        )
    assert time.monotonic() - began < 40
    line = next(each for each in done.stderr.splitlines() if '"request"' in each)
    assert json.loads(line)["ms"] < 5000
