"""Inputs by URL: what the API refuses at once, what the worker fetches, and how a fetch may fail."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from genpulse.config import Settings
from genpulse.errors import InvalidRequest
from genpulse.ledger import Ledger
from genpulse.model import NewTask, Task, TaskStatus
from genpulse.storage import LocalStorage
from genpulse.tasks import runner, wiring
from genpulse.tasks.heartbeat import Heartbeat
from genpulse.tasks.presence import open_pool
from genpulse.tasks.registry import default_registry
from genpulse.tasks.submit import accept
from tests.support.ledger import open_ledger
from tests.support.receiver import respond, serve

if TYPE_CHECKING:
    from genpulse.testing.simulator import Simulator


def picture() -> bytes:
    """A small PNG."""
    made = io.BytesIO()
    Image.new("RGB", (8, 4), (255, 0, 0)).save(made, "PNG")
    return made.getvalue()


def found(body: bytes) -> bytes:
    """A good answer whose type is told wrong: the content counts."""
    return (
        f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )


def load_image(url: str) -> dict[str, Any]:
    """A workflow that shows the picture at *url*."""
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": url}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }


@pytest.fixture
def ledger(sqlite_ledger_url: str) -> Iterator[Ledger]:
    """On SQLite: what is tried here is between the worker and the web."""
    with open_ledger(sqlite_ledger_url, pool_size=2) as ledger:
        yield ledger


Run = Callable[..., Task]


@pytest.fixture
def run(ledger: Ledger, sqlite_ledger_url: str, valkey_url: str, tmp_path: Path) -> Run:
    """Run one attempt of a task as a worker's child does: ``run("image-convert", params)``."""

    def work(task_type: str, params: dict[str, Any], **more: Any) -> Task:
        values: dict[str, Any] = {
            "data_dir": tmp_path,
            "database_url": sqlite_ledger_url,
            "redis_url": valkey_url,
            "egress_allow": "127.0.0.0/8",
            "egress_http": True,
        }
        settings = Settings.build(**(values | more))
        registry = default_registry()
        pool = open_pool(settings)
        pool.probe_all()
        child = runner.Runner(
            settings,
            ledger=ledger,
            storage=LocalStorage(settings.assets_dir),
            live=wiring.open_live(settings),
            pool=pool,
            registry=registry,
            heartbeat=Heartbeat(settings, lambda: False),
            worker="w:1",
        )
        handler = registry.get(task_type)
        task, _ = ledger.submit(
            NewTask(task_type, handler.queue, handler.validate_params(params), owner="ada")
        )
        child.run(task.id)
        pool.close()
        ended = ledger.get(task.id)
        assert ended is not None
        return ended

    return work


def test_a_picture_by_url_is_converted(run: Run) -> None:
    """Type by content, whatever the server called it."""
    with serve(respond(found(picture()))) as port:
        task = run("image-convert", {"source": f"http://127.0.0.1:{port}/a?token=secret", "format": "jpeg"})
    assert task.status is TaskStatus.COMPLETED, task.error
    assert [(each.content_type, each.width, each.height) for each in task.outputs] == [("image/jpeg", 8, 4)]


def test_a_picture_by_url_is_rendered(run: Run, simulator: Simulator) -> None:
    """Staged on the ComfyUI server as an uploaded file is."""
    with serve(respond(found(picture()))) as port:
        params = {"workflow": load_image("asset:x"), "inputs": {"1.image": f"http://127.0.0.1:{port}/a"}}
        task = run("comfyui", params, comfy_urls=f"gpu1={simulator.url}")
    assert task.status is TaskStatus.COMPLETED, task.error
    assert [(each.width, each.height) for each in task.outputs] == [(8, 4)]


@pytest.mark.parametrize(
    ("answer", "status", "retryable"),
    [
        (b"HTTP/1.1 404 x\r\n\r\n", TaskStatus.FAILED, False),
        (b"HTTP/1.1 302 x\r\nLocation: http://169.254.169.254/\r\n\r\n", TaskStatus.FAILED, False),
        (b"HTTP/1.1 200 x\r\nContent-Length: 9999\r\n\r\n", TaskStatus.FAILED, False),
        (b"HTTP/1.1 503 x\r\n\r\n", TaskStatus.PENDING, True),
        (b"HTTP/1.1 200 x\r\nContent-Length: 50\r\n\r\nshort", TaskStatus.PENDING, True),
        (b"", TaskStatus.PENDING, True),
    ],
    ids=["404", "redirect inside", "too large", "503", "cut off", "closed"],
)
def test_a_fetch_that_fails_is_input_unavailable(
    run: Run, simulator: Simulator, answer: bytes, status: TaskStatus, retryable: bool
) -> None:
    """Final where the server or the rules say no; tried again where it may be better later."""
    with serve(respond(answer)) as port:
        params = {"workflow": load_image(f"http://127.0.0.1:{port}/a?token=secret")}
        task = run("comfyui", params, comfy_urls=f"gpu1={simulator.url}", input_max_bytes=1000)
    assert task.status is status
    (attempt,) = task.attempts
    assert attempt.error is not None
    assert (attempt.error.code, attempt.error.retryable) == ("input_unavailable", retryable)
    assert attempt.error.node_id == "1"
    assert "secret" not in attempt.error.message


def test_an_address_inside_is_refused_by_the_worker_too(run: Run) -> None:
    """A name can resolve to anything by then; nobody is connected to."""
    heard: list[int] = []
    with serve(lambda connection: heard.append(1)) as port:
        source = f"http://127.0.0.1:{port}/a.png"
        task = run("image-convert", {"source": source}, egress_allow="", egress_ports=str(port))
    assert (task.status, heard) == (TaskStatus.FAILED, [])
    assert task.error is not None
    assert (task.error.code, task.error.retryable) == ("input_unavailable", False)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.png",
        "https://127.0.0.1/a.png",
        "https://[::ffff:10.0.0.1]/a.png",
        "https://0x7f000001/a.png",
        "https://user@example.com/a.png",
        "https://example.com:6379/a.png",
        "https://metadata.google.internal/computeMetadata/v1/",
    ],
)
def test_an_unsafe_url_is_refused_at_submit(ledger: Ledger, url: str) -> None:
    """With its place, before anything is recorded; the network is not asked."""
    given: list[tuple[str, dict[str, Any], str]] = [
        ("comfyui", {"workflow": load_image(url)}, "/params/workflow/1/inputs/image"),
        ("image-convert", {"source": url}, "/params/source"),
    ]
    for task_type, params, pointer in given:
        body = {"task_type": task_type, "params": params}
        with pytest.raises(InvalidRequest) as refused:
            accept(ledger, default_registry(), Settings.build(), body, owner="ada")
        assert refused.value.problem == "unsafe_url"
        assert refused.value.errors[0][0] == pointer
    assert ledger.counts() == {}


def test_a_good_url_is_accepted_at_submit(ledger: Ledger) -> None:
    """What it shows is the worker's to find out."""
    body = {"task_type": "image-convert", "params": {"source": "https://example.com/a.png"}}
    task, _ = accept(ledger, default_registry(), Settings.build(), body, owner="ada")
    assert task.params["source"] == "https://example.com/a.png"
