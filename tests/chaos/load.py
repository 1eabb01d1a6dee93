"""Clients as a careful caller writes them: an idempotency key for each task, and patience."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import requests

from tests.chaos.schedule import Order
from tests.support.cluster import sleeping

__all__ = ["Clients"]

PATIENCE_S = 120.0
_PAUSE_S = 0.3


class Clients:
    """
    Threads that send the orders at their times, and cancel some of them.

    Args:
        url: The API.
        name: Part of every idempotency key.
    """

    def __init__(self, url: str, name: str, orders: Sequence[Order], *, threads: int = 6) -> None:
        self._url = url
        self._name = name
        self._orders = list(orders)
        self._lock = threading.Lock()
        self.accepted: dict[str, Order] = {}
        """By task id, what was answered with 202."""
        self.accepted_at: list[float] = []
        self.canceled_at: dict[str, float] = {}
        """When a cancel of a task was answered with 202 or 200."""
        self.trouble: list[str] = []
        """Answers that a client must never get."""
        self.given_up: list[int] = []
        self._next = 0
        self._began = 0.0
        self._threads = [threading.Thread(target=self._send_all, daemon=True) for _ in range(threads)]
        self._cancelers: list[threading.Thread] = []

    def start(self) -> None:
        """Begin; the orders' times count from here."""
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until everything was sent, and every cancel too."""
        for thread in [*self._threads, *self._cancelers]:
            thread.join()

    def _send_all(self) -> None:
        with requests.Session() as http:
            while True:
                with self._lock:
                    if self._next >= len(self._orders):
                        return
                    order = self._orders[self._next]
                    self._next += 1
                time.sleep(max(0.0, self._began + order.at_s - time.monotonic()))
                self._send(http, order)

    def _send(self, http: requests.Session, order: Order) -> None:
        task_id = self._submit(http, order)
        if task_id is None:
            self.given_up.append(order.index)
            return
        if order.sent_twice:
            again = self._submit(http, order)
            if again not in {task_id, None}:
                self.trouble.append(f"order {order.index} sent twice became {task_id} and {again}")
        if order.cancel_after_s is not None:
            thread = threading.Thread(target=self._cancel, args=(task_id, order.cancel_after_s), daemon=True)
            with self._lock:
                self._cancelers.append(thread)
            thread.start()

    def _submit(self, http: requests.Session, order: Order) -> str | None:
        body = {
            "task_type": "comfyui",
            "params": {"workflow": sleeping(order.seconds, order.color, size=16)},
            "priority": order.priority,
        }
        key = {"Idempotency-Key": f"{self._name}-{order.index}"}
        answer = self._insist(http, f"{self._url}/task", json=body, headers=key)
        if answer is None:
            return None
        if answer.status_code != requests.codes.accepted:
            self.trouble.append(f"order {order.index}: {answer.status_code} {answer.text[:200]}")
            return None
        task_id = str(answer.json()["task_id"])
        with self._lock:
            self.accepted[task_id] = order
            self.accepted_at.append(time.time())
        return task_id

    def _cancel(self, task_id: str, after_s: float) -> None:
        time.sleep(after_s)
        with requests.Session() as http:
            answer = self._insist(http, f"{self._url}/task/{task_id}/cancel")
        if answer is None:
            return
        if answer.status_code in {requests.codes.ok, requests.codes.accepted}:
            with self._lock:
                self.canceled_at[task_id] = time.time()
        elif answer.status_code != requests.codes.conflict:
            self.trouble.append(f"cancel of {task_id}: {answer.status_code} {answer.text[:200]}")

    def _insist(self, http: requests.Session, url: str, **request: Any) -> requests.Response | None:
        """POST until there is an answer that is no outage."""
        ends = time.monotonic() + PATIENCE_S
        while time.monotonic() < ends:
            try:
                answer = http.post(url, timeout=10, **request)
            except requests.RequestException:
                time.sleep(_PAUSE_S)
                continue
            if answer.status_code not in {429, 500, 502, 503, 504}:
                return answer
            if answer.status_code == requests.codes.server_error:
                self.trouble.append(f"POST {url}: 500 {answer.text[:200]}")
            time.sleep(_PAUSE_S)
        return None
