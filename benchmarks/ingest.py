"""How fast tasks are taken: POST /task, durably recorded, beside ComfyUI's own POST /prompt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import requests

from benchmarks._bench import Lean, arguments, bench, figures, show, simple


def storm(
    clients: int, requests_each: int, send: Callable[[requests.Session, int], None]
) -> tuple[float, list[float]]:
    """Send from *clients* threads at once; returns the requests per second and each one's seconds."""
    taken: list[float] = []
    lock = threading.Lock()

    def client(number: int) -> None:
        own: list[float] = []
        with requests.Session() as session:
            for each in range(requests_each):
                began = time.perf_counter()
                send(session, number * requests_each + each)
                own.append(time.perf_counter() - began)
        with lock:
            taken.extend(own)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(taken) / (time.perf_counter() - began), taken


def main() -> None:
    """Run it and print the table."""
    options = arguments(__doc__, clients=8, requests=40)
    with bench(options) as running:
        api, lean = running.cluster.url, running.lean

        def to_genpulse(session: requests.Session, number: int) -> None:
            body = {"task_type": "comfyui", "params": {"workflow": simple(30_000 + number)}}
            answer = session.post(f"{api}/task", json=body, timeout=60)
            answer.raise_for_status()

        def to_comfy(session: requests.Session, number: int) -> None:
            body = {"prompt": simple(60_000 + number), "client_id": lean.client_id}
            session.post(f"{lean.url}/prompt", json=body, timeout=60).raise_for_status()

        results = {
            "ComfyUI, POST /prompt": storm(options.clients, options.requests, to_comfy),
            "GenPulse, POST /task": storm(options.clients, options.requests, to_genpulse),
        }
    floor = results["ComfyUI, POST /prompt"][0]
    rows = []
    for name, (rate, seconds) in results.items():
        median, high = figures(seconds)
        rows.append(
            (name, f"{rate:.0f}", f"{1000 * median:.1f}", f"{1000 * high:.1f}", f"{rate / floor:.2f}")
        )
    show(
        f"ingest, {options.clients} clients, {options.clients * options.requests} requests, {options.database}",
        ("", "requests/s", "median ms", "p95 ms", "ratio"),
        rows,
        "GenPulse's answer means recorded in the database; ComfyUI's means held in memory.",
    )


__all__ = ["Lean", "main", "storm"]

if __name__ == "__main__":
    main()
