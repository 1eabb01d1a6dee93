"""Clients as a careful caller writes them: an idempotency key for each task, and patience."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import requests

from tests.chaos.schedule import Order
from tests.support.cluster import Workflow, save_image

__all__ = ["Clients", "workflow_of"]

PATIENCE_S = 120.0
_PAUSE_S = 0.3


def workflow_of(order: Order) -> Workflow:
    """What an order asks for: a small picture of its own colour, rendered for as long as it says."""
    size = {"width": 16, "height": 16, "batch_size": 1}
    graph: Workflow = {
        "1": {"class_type": "EmptyImage", "inputs": {**size, "color": order.color}},
        "2": {
            "class_type": "SimSleep",
            "inputs": {
                "image": ["1", 0],
                "seconds": order.seconds,
                "seed": order.color,
                "steps": max(4, math.ceil(2 * order.seconds)),  # progress keeps the stall clock quiet
            },
        },
        "3": save_image("2"),
    }
    if order.form == "socket":
        graph["3"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["2", 0]}}
    elif order.form == "failing":
        graph["4"] = {"class_type": "SimFail", "inputs": {"image": ["2", 0], "message": f"as {order.index}"}}
        graph["3"] = save_image("4")
    return graph


class Clients:
    """
    Threads that send the orders at their times, and cancel some of them.

    Args:
        url: The API.
        name: Part of every idempotency key.
    """

    def __init__(self, url: str, name: str, orders: Sequence[Order], *, threads: int = 8) -> None:
        self._url = url
        self._name = name
        self._orders = list(orders)
        self._lock = threading.Lock()
        self.accepted: dict[str, Order] = {}
        """By task id, what was answered with 202."""
        self.accepted_at: list[float] = []
        self.canceled_at: dict[str, float] = {}
        """When a cancel of a task was answered with 202."""
        self.trouble: list[str] = []
        """Answers that a client must never get."""
        self.given_up: list[int] = []
        self.sent_again = 0
        """How often a POST was repeated because its answer did not come."""
        self._next = 0
        self._extra = 0
        self._began = 0.0
        self._threads = [threading.Thread(target=self._send_all, daemon=True) for _ in range(threads)]
        self._others: list[threading.Thread] = []
        """Cancels, and what was sent besides."""

    def start(self) -> None:
        """Begin; the orders' times count from here."""
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until everything was sent, and every cancel too."""
        for thread in self._threads:
            thread.join()
        for thread in self._others:
            thread.join()

    def left_s(self, task_id: str, submitted_at: float) -> float:
        """How long a task renders on, if its prompt was submitted at that time; 0 for an unknown one."""
        order = self.accepted.get(task_id)
        return 0.0 if order is None else order.seconds - (time.time() - submitted_at)

    def feed(self, seconds: float) -> None:
        """Send one task more, in the background: a fault finds nothing that it could hit."""
        with self._lock:
            index = len(self._orders) + self._extra
            self._extra += 1
        color = ((self._orders[0].color if self._orders else 0) + index * 7919) % 2**24
        order = Order(index=index, at_s=0.0, seconds=seconds, color=color, priority="high")
        thread = threading.Thread(target=lambda: self.send(order), daemon=True)
        with self._lock:
            self._others.append(thread)
        thread.start()

    def send(self, order: Order) -> str | None:
        """Send one order now, with patience; the task's id."""
        with requests.Session() as http:
            return self._submit(http, order)

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
        again: list[str | None] = []
        twin = threading.Thread(target=lambda: again.append(self._submit(requests.Session(), order)))
        if order.sent_twice:
            twin.start()
        task_id = self._submit(http, order)
        if order.sent_twice:
            twin.join()
            if again and not {task_id, None} >= {again[0]}:
                self.trouble.append(f"order {order.index} sent twice became {task_id} and {again[0]}")
        if task_id is None:
            self.given_up.append(order.index)
            return
        if order.cancel_after_s is not None:
            thread = threading.Thread(target=self._cancel, args=(task_id, order.cancel_after_s), daemon=True)
            with self._lock:
                self._others.append(thread)
            thread.start()

    def _submit(self, http: requests.Session, order: Order) -> str | None:
        body = {
            "task_type": "comfyui",
            "params": {"workflow": workflow_of(order)},
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
        self.cancel(task_id)

    def cancel(self, task_id: str) -> None:
        """Ask for a cancel, with patience."""
        with requests.Session() as http:
            answer = self._insist(http, f"{self._url}/task/{task_id}/cancel")
        if answer is None:
            return
        if answer.status_code == requests.codes.accepted:
            with self._lock:
                self.canceled_at[task_id] = time.time()
        elif answer.status_code not in {requests.codes.ok, requests.codes.conflict}:
            self.trouble.append(f"cancel of {task_id}: {answer.status_code} {answer.text[:200]}")

    def _insist(self, http: requests.Session, url: str, **request: Any) -> requests.Response | None:
        """POST until there is an answer that is no outage."""
        ends = time.monotonic() + PATIENCE_S
        while time.monotonic() < ends:
            try:
                answer = http.post(url, timeout=10, **request)
            except requests.RequestException:
                with self._lock:
                    self.sent_again += 1
                time.sleep(_PAUSE_S)
                continue
            if answer.status_code not in {429, 500, 502, 503, 504}:
                return answer
            if answer.status_code == requests.codes.server_error:
                self.trouble.append(f"POST {url}: 500 {answer.text[:200]}")
            time.sleep(_PAUSE_S)
        return None
