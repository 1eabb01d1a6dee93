"""The queue ``webhooks`` on a real worker: hints arrive, deliveries go out, a killed child harms nothing."""

from __future__ import annotations

import base64
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from standardwebhooks import Webhook

from genpulse.ledger import DeliveryStatus
from genpulse.ledger import tables as t
from genpulse.model import TaskStatus
from genpulse.tasks.webhooks import PER_OWNER, THREADS
from tests.celery_nodes.conftest import Story
from tests.celery_nodes.nodes import GenPulseWorker, children
from tests.support import wait_until
from tests.support.ledger import claim, output, rows, submit
from tests.support.receiver import read_request, serve

SECRET = "whsec_" + base64.b64encode(b"7" * 32).decode()
SAID = b"HTTP/1.1 204 x\r\n\r\n"


@pytest.mark.timeout(120)
def test_webhooks_go_out_and_a_killed_child_is_made_up_for(
    story: Story, start_worker: Callable[..., GenPulseWorker]
) -> None:
    """Kill -9 of the child with a try under way: when its claim is over, another child tells it again."""
    heard: list[tuple[dict[str, str], str]] = []
    first, let_go = threading.Event(), threading.Event()

    def behave(connection: socket.socket) -> None:
        _, headers, body = read_request(connection)
        heard.append((headers, body.decode()))
        if len(heard) == 1:
            first.set()
            let_go.wait(60)
        connection.sendall(SAID)

    with serve(behave) as port:
        task = submit(story.ledger, owner="default", callback_url=f"http://127.0.0.1:{port}/hook")
        story.ledger.finish(claim(story.ledger, task).fence, TaskStatus.COMPLETED, outputs=[output()])
        worker = start_worker(
            "hooks", "-Q", "webhooks", "-c", "1",
            GENPULSE_WEBHOOK_SECRET=SECRET, GENPULSE_EGRESS_ALLOW="127.0.0.1", GENPULSE_EGRESS_HTTP="true",
            GENPULSE_WEBHOOK_TIMEOUT_S="1",
        )  # fmt: skip
        assert first.wait(40)
        for pid in children(worker.service):
            os.kill(pid, signal.SIGKILL)
        let_go.set()

        def done() -> Any:
            (delivery,) = story.ledger.list_deliveries("default")
            return delivery.status is DeliveryStatus.DELIVERED

        wait_until(done, 60, message="the second try")
    assert len({headers["webhook-id"] for headers, _ in heard}) == 1
    assert len(heard) == 2
    event = Webhook(SECRET).verify(heard[1][1], heard[1][0])
    assert event["data"]["task_id"] == task.id


@pytest.mark.timeout(120)
def test_receivers_that_hang_leave_a_child_for_the_other_queue(
    story: Story, start_worker: Callable[..., GenPulseWorker]
) -> None:
    """Of two children one is full of tries that hang, more are due, and the other one still takes tasks."""

    def hang(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            pass

    def tries() -> int:
        return sum(row["claim"] is not None for row in rows(story.ledger, t.webhook_deliveries))

    with serve(hang, host="0.0.0.0") as port:
        for network, owner in enumerate(("ada", "bob", "eve")):
            for n in range(PER_OWNER):
                url = f"http://127.0.{network}.{1 + n}:{port}/"
                task = submit(story.ledger, owner=owner, callback_url=url)
                story.ledger.finish(claim(story.ledger, task).fence, TaskStatus.COMPLETED, outputs=[output()])
        worker = start_worker(
            "shared", "-Q", "comfy,webhooks", "-c", "2",
            GENPULSE_WEBHOOK_SECRET=SECRET, GENPULSE_EGRESS_ALLOW="127.0.0.0/8", GENPULSE_EGRESS_HTTP="true",
            GENPULSE_WEBHOOK_TIMEOUT_S="300",
        )  # fmt: skip
        wait_until(lambda: tries() >= THREADS, 40, message="a full child")
        ids = [story.submit() for _ in range(3)]
        assert {story.ended(task_id, 40).status for task_id in ids} == {TaskStatus.COMPLETED}
        assert tries() == THREADS < 3 * PER_OWNER
        worker.service.kill()
