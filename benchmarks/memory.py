"""How much memory a big file takes on its way in and out: nothing of it, whatever its size."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks._bench import arguments, show
from genpulse.config import Settings
from genpulse.ledger import Ledger
from tests.support.cluster import Cluster

__all__ = ["Growth", "grow"]

CHUNK = bytes(2**20)
FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="zeros.bin"\r\n\r\n'
END = b"\r\n--b--\r\n"
WARM_MB = 8


@dataclass(frozen=True)
class Growth:
    """By how many bytes the largest process of each kind grew, at its peak; and how long it took."""

    api: int
    worker: int
    seconds: float


def grow(cluster: Cluster, size_mb: int) -> dict[str, Growth]:
    """
    Send a file of so many MB in, out again, and through a task, and watch the processes meanwhile.

    A small one goes first, so that what is made once (threads, connections, buffers) is made.

    Raises:
        RuntimeError: A byte was lost on the way.
    """
    _upload(cluster, WARM_MB)
    _download(cluster, f"/task/{_render(cluster, WARM_MB)}/outputs/0", WARM_MB)
    found: dict[str, Growth] = {}
    with _watching(cluster, found, "upload"):
        link = _upload(cluster, size_mb)
    with _watching(cluster, found, "download of an asset"):
        _download(cluster, link, size_mb)
    with _watching(cluster, found, "a task's output, ComfyUI to storage"):
        task_id = _render(cluster, size_mb)
    with _watching(cluster, found, "download of the output"):
        _download(cluster, f"/task/{task_id}/outputs/0", size_mb)
    return found


def _upload(cluster: Cluster, size_mb: int) -> str:
    """Upload zeros; returns the path of the asset."""
    with _connection(cluster) as connection:
        connection.putrequest("POST", "/storage/upload")
        connection.putheader("Content-Type", "multipart/form-data; boundary=b")
        connection.putheader("Content-Length", str(len(FORM) + size_mb * len(CHUNK) + len(END)))
        connection.endheaders(FORM)
        for _ in range(size_mb):
            connection.send(CHUNK)
        connection.send(END)
        answer = connection.getresponse()
        body = answer.read().decode()
        if answer.status != http.client.CREATED or _digest(size_mb) not in body:
            msg = f"the upload was answered {answer.status}: {body}"
            raise RuntimeError(msg)
        return urlsplit(answer.headers["Location"]).path


def _download(cluster: Cluster, path: str, size_mb: int) -> None:
    digest = hashlib.sha256()
    with _connection(cluster) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        while chunk := answer.read(len(CHUNK)):
            digest.update(chunk)
    if digest.hexdigest() != _digest(size_mb):
        msg = f"{path} was answered {answer.status}, with other bytes than were stored"
        raise RuntimeError(msg)


def _render(cluster: Cluster, size_mb: int) -> str:
    """Have a server make a file of zeros; returns the task's id."""
    inputs = {
        "filename_prefix": f"zeros-{size_mb}-{time.monotonic_ns()}",
        "extension": "bin",
        "key": "files",
        "content": "",
        "zeros": size_mb * len(CHUNK),
    }
    task_id = cluster.submit({"1": {"class_type": "SimFile", "inputs": inputs}})
    found = cluster.wait(task_id, 600)
    if found["status"] != "completed" or found["outputs"][0]["sha256"] != _digest(size_mb):
        msg = f"the task ended {found['status']}: {found['error']}"
        raise RuntimeError(msg)
    return task_id


def _digest(size_mb: int) -> str:
    digest = hashlib.sha256()
    for _ in range(size_mb):
        digest.update(CHUNK)
    return digest.hexdigest()


@contextlib.contextmanager
def _connection(cluster: Cluster) -> Iterator[http.client.HTTPConnection]:
    parts = urlsplit(cluster.url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=600)
    try:
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def _watching(cluster: Cluster, found: dict[str, Growth], name: str) -> Iterator[None]:
    """Look at every process twenty times a second while the block lasts."""
    groups = {
        "api": _family(cluster.api.pid),
        "worker": [process for worker in cluster.workers.values() for process in _family(worker.pid)],
    }
    before = {process.pid: _rss(process) for group in groups.values() for process in group}
    peaks = dict(before)
    stopping = threading.Event()

    def look() -> None:
        while not stopping.wait(0.05):
            for group in groups.values():
                for process in group:
                    peaks[process.pid] = max(peaks[process.pid], _rss(process))

    thread = threading.Thread(target=look)
    thread.start()
    began = time.monotonic()
    try:
        yield
    finally:
        took = time.monotonic() - began
        stopping.set()
        thread.join()
    grown = {
        kind: max((peaks[process.pid] - before[process.pid] for process in group), default=0)
        for kind, group in groups.items()
    }
    found[name] = Growth(grown["api"], grown["worker"], took)


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    """Run it and print the table."""
    options = arguments(__doc__, mb=2048)
    with tempfile.TemporaryDirectory(prefix="genpulse-bench-") as folder:
        url = f"sqlite:///{folder}/genpulse.db"
        ledger = Ledger.connect(Settings.build(database_url=url).ledger_url)
        ledger.migrate()
        ledger.close()
        limits = {"GENPULSE_MAX_UPLOAD_BYTES": str((options.mb + 1) * len(CHUNK))}
        with Cluster(Path(folder) / "cluster", url, env=limits) as cluster:
            cluster.start_simulator("sim")
            cluster.start_worker("bench", ["sim"])
            found = grow(cluster, options.mb)
    rows = [
        (name, f"{each.api / 2**20:.1f}", f"{each.worker / 2**20:.1f}", f"{options.mb / each.seconds:.0f}")
        for name, each in found.items()
    ]
    show(
        f"memory, a file of {options.mb} MB: growth of the largest process at its peak",
        ("", "API MB", "worker MB", "MB/s"),
        rows,
    )


if __name__ == "__main__":
    main()
