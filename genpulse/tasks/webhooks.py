"""
Webhooks: tell the ``callback_url`` of a task that it has ended, in the way of Standard Webhooks.

The ledger holds what is due. A message on the queue ``webhooks`` is a hint that something is: the
:class:`Bell` sends one when none waits, and the worker's child that gets it delivers until nothing
is due any more. A lost hint is sent again within seconds, one too many finds nothing to do.

A receiver is a stranger's machine. Each try is bounded in time and in what is read of its answer,
goes out by the rules of :mod:`genpulse.egress`, and follows no redirect. Only a few go to one host at a
time, and of one owner only half as many as a child has places for, because a name with a wildcard
is any number of hosts that hang. The places go by turns of the owners, so a long backlog is its
owner's own. Whatever vanishes in the middle of a try, the delivery is due again when its claim is
over, under the same id.

A hint goes before every other message: webhooks that waited behind a full queue would be whoever's
filled it. But a child spends most of a round waiting for receivers, and with enough that hang each
child in turn would take a hint, wait, and leave the other queues to starve. So a worker that serves
other queues too delivers in one child at a time (:func:`deliver_due`); a worker of the queue
``webhooks`` alone does in all.

Source: the Standard Webhooks specification; the library ``standardwebhooks`` signs.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hmac
import json
import random
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import structlog
from standardwebhooks import Webhook

from genpulse.config import Settings, is_loopback
from genpulse.egress import Answer, Egress
from genpulse.errors import GenPulseError, LedgerUnavailable
from genpulse.ledger import Delivery, DeliveryStatus, Ledger
from genpulse.model import Task
from genpulse.tasks import queues
from genpulse.tasks.board import MAX_CHILDREN, board
from genpulse.tasks.drain import is_draining
from genpulse.tasks.inputs import open_egress
from genpulse.tasks.producer import BrokerUnavailable, Message, Producer, RunwayView
from genpulse.tasks.views import task_view
from genpulse.telemetry import metrics

__all__ = [
    "OWN_OWNER",
    "PATHS",
    "TASK_NAME",
    "Bell",
    "Deliverer",
    "deliver_due",
    "payload",
    "signing_keys",
    "whsec",
]

log = structlog.get_logger("genpulse.webhooks")

TASK_NAME = "genpulse.webhooks"
"""The Celery task's name."""
OWN_OWNER = "default"
"""Whose webhooks the configured keys sign as they are; another owner's have keys derived from them."""

PER_HOST = 8
THREADS = 32
PER_OWNER = THREADS // 2
RING_AGAIN_S = 2.0
"""Between two hints of one bell while there is something due. One that is dropped, because every
place is taken, is a task to Celery all the same, and its children are renewed after so many."""
ROUND_S = 60.0
"""How long a child goes on taking deliveries for one hint."""
_LEASE_MARGIN_S = 5.0
_JITTER = 0.1
_WORDS_BEYOND_SCHEDULE = 2
"""Tries that ended with their process are not held against a delivery, but not without end."""
_IDLE_S = 0.2

PATHS = {
    "read_task": "/task/{task_id}",
    "cancel_task": "/task/{task_id}/cancel",
    "watch_task": "/task/{task_id}/events",
    "read_output": "/task/{task_id}/outputs/{index}",
}
"""The views that a task's links name; a test holds them against the API's routes."""


def payload(delivery: Delivery, task: Task, settings: Settings) -> str:
    """
    The body: ``{"type", "timestamp", "data": <the task as GET /task/{id} shows it>}``. Links, no bytes.

    A final task does not change, so every try of a delivery says the same.
    """
    base = settings.public_url
    if not base and is_loopback(settings.host):
        base = f"http://{settings.host}:{settings.port}"

    def link(view: str, **values: Any) -> str:
        path = PATHS.get(view, PATHS["read_task"])
        return base + path.format(**{name: quote(str(value), safe="") for name, value in values.items()})

    ended = task.completed_at or delivery.created_at
    body = {
        "type": delivery.event_type,
        "timestamp": ended.isoformat(),
        "data": task_view(task, link, retention=settings.retention).model_dump(mode="json"),
    }
    return json.dumps(body, separators=(",", ":"))


def signing_keys(settings: Settings, owner: str) -> tuple[bytes, ...]:
    """
    The keys for an owner's webhooks, one for each configured secret.

    A key that all owners shared would let each of them sign in GenPulse's name for the others'
    receivers. So only the deployment's own owner has the secret itself.
    """
    if owner == OWN_OWNER:
        return settings.webhook_keys
    return tuple(
        hmac.digest(key, f"genpulse webhook key of {owner}".encode(), "sha256")
        for key in settings.webhook_keys
    )


def whsec(key: bytes) -> str:
    """A key as the receivers' libraries want it."""
    return "whsec_" + base64.b64encode(key).decode()


class Bell:
    """Sends the hint that deliveries are due. One for each thread that uses it."""

    def __init__(self, ledger: Ledger, producer: Producer, view: RunwayView) -> None:
        self._ledger = ledger
        self._producer = producer
        self._view = view
        self._rings_again_at = 0.0

    def ring(self) -> bool:
        """
        Send one hint, if there is something to deliver and no hint waits already.

        Raises:
            LedgerUnavailable: Nobody knows what is due.
        """
        if not self._ledger.webhook_due(per_host=PER_HOST, per_owner=PER_OWNER):
            self._rings_again_at = 0.0
            return False
        if time.monotonic() < self._rings_again_at:
            return False
        try:
            if self._view.counts([queues.WEBHOOKS])[queues.WEBHOOKS]:
                return False
            self._producer.publish(
                [Message(str(uuid.uuid4()), TASK_NAME, queues.WEBHOOKS, queues.PRIORITY_STEPS[0])]
            )
        except BrokerUnavailable:
            return False
        self._rings_again_at = time.monotonic() + RING_AGAIN_S
        return True


class Deliverer:
    """
    Delivers what is due. Threads may share one.

    Args:
        clock: The time, for signatures and for what is due; by default the host's for the first and
            the database's for the second.
        jitter: The factor on each wait of the schedule.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        egress: Egress | None = None,
        *,
        clock: Callable[[], dt.datetime] | None = None,
        jitter: Callable[[], float] = lambda: random.uniform(1 - _JITTER, 1 + _JITTER),  # noqa: S311 - spreads load, keeps no secret
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._egress = egress or open_egress(settings)
        self._clock = clock
        self._jitter = jitter
        self._lease_s = 2 * settings.webhook_timeout_s + _LEASE_MARGIN_S
        self._last_owner = ""

    def deliver_one(self) -> Delivery | None:
        """
        Try a delivery that is due: of the owner whose turn it is, the one that is due for longest.

        Returns:
            It, as it was claimed, or ``None`` if nothing is due.

        Raises:
            LedgerUnavailable: Nothing was claimed. (An outcome that cannot be written is kept for as
                long as the claim lasts; after that the delivery is tried again.)
        """
        delivery = self._claim()
        if delivery is not None:
            self._try(delivery)
        return delivery

    def run(
        self,
        is_stopping: Callable[[], bool] = lambda: False,
        *,
        seconds: float = ROUND_S,
        takes_no_more: Callable[[], None] = lambda: None,
    ) -> int:
        """
        Deliver until nothing is due, or for so many seconds, many at a time.

        Told to stop, it takes no more and waits for the tries under way as long as a draining worker
        may; those that take longer are tried again by somebody else.

        Args:
            takes_no_more: Called when only tries under way are left to wait for.

        Returns:
            How many tries there were.
        """
        ends = time.monotonic() + seconds
        tries = 0
        running: set[threading.Event] = set()
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="genpulse-webhook")
        try:
            while not is_stopping() and time.monotonic() < ends:
                running = {over for over in running if not over.is_set()}
                delivery = self._claim_if_any() if len(running) < THREADS else None
                if delivery is not None:
                    over = threading.Event()
                    running.add(over)
                    pool.submit(self._try_and_tell, delivery, over)
                    tries += 1
                elif not running:
                    break
                else:
                    next(iter(running)).wait(_IDLE_S)
            takes_no_more()
            patience = self._settings.webhook_timeout_s + _LEASE_MARGIN_S
            if is_stopping():
                patience = self._settings.drain_s
            ends = time.monotonic() + patience
            for over in running:
                over.wait(max(0.0, ends - time.monotonic()))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return tries

    def _claim(self) -> Delivery | None:
        delivery = self._ledger.claim_delivery(
            lease_s=self._lease_s,
            per_host=PER_HOST,
            per_owner=PER_OWNER,
            after_owner=self._last_owner,
            at=self._clock() if self._clock else None,
        )
        if delivery is not None:
            self._last_owner = delivery.owner
        return delivery

    def _claim_if_any(self) -> Delivery | None:
        try:
            return self._claim()
        except LedgerUnavailable as error:
            log.warning("ledger_away", part="webhooks", reason=str(error))
            return None

    def _try_and_tell(self, delivery: Delivery, over: threading.Event) -> None:
        try:
            self._try(delivery)
        except Exception:
            # The claim runs out and somebody tries again; the reason is for the log.
            log.exception("webhook_try_failed", delivery_id=delivery.id, task_id=delivery.task_id)
        finally:
            over.set()

    def _try(self, delivery: Delivery) -> None:
        schedule = self._settings.webhook_schedule
        began = time.monotonic()
        gives_up_at = began + self._lease_s
        answer, error = None, None
        if delivery.tries > len(schedule) + _WORDS_BEYOND_SCHEDULE:
            error = "every process that tried vanished"
        else:
            task = self._insist(
                lambda: self._ledger.get(delivery.task_id, delivery.owner, with_params=False), gives_up_at
            )
            if task is None:  # deleted, and the delivery with it
                return
            answer, error = self._send(delivery, payload(delivery, task, self._settings))
        status, retry_in_s = self._judge(delivery, answer)
        duration_s = round(time.monotonic() - began, 3)
        recorded = self._insist(
            lambda: self._ledger.record_delivery(
                delivery,
                status,
                duration_s=duration_s,
                status_code=answer.status if answer else None,
                error=error,
                excerpt=answer.excerpt if answer and status is not DeliveryStatus.DELIVERED else None,
                retry_in_s=retry_in_s,
                at=self._clock() if self._clock else None,
            ),
            gives_up_at,
        )
        metrics.WEBHOOK_TRIES.add(outcome=str(status))
        log.info(
            "webhook_tried",
            delivery_id=delivery.id,
            task_id=delivery.task_id,
            attempt=delivery.attempts,
            outcome=str(status),
            status_code=answer.status if answer else None,
            error=error,
            duration_s=duration_s,
            recorded=recorded,
        )

    def _send(self, delivery: Delivery, body: str) -> tuple[Answer | None, str | None]:
        """Post, and say what went wrong if no status came back. Repeats nothing of the URL but its host."""
        at = self._clock() if self._clock else dt.datetime.now(dt.UTC)
        signatures = " ".join(
            Webhook(key).sign(delivery.id, at, body) for key in signing_keys(self._settings, delivery.owner)
        )
        headers = {
            "Content-Type": "application/json",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": signatures,
        }
        try:
            answer = self._egress.post(
                delivery.url, body.encode(), headers, timeout_s=self._settings.webhook_timeout_s
            )
        except GenPulseError as error:
            return None, str(error)
        if 300 <= answer.status < 400:
            return answer, "redirects are not followed"
        return answer, None

    def _judge(self, delivery: Delivery, answer: Answer | None) -> tuple[DeliveryStatus, float]:
        """What becomes of the delivery, and the seconds to the next try."""
        if answer is not None and 200 <= answer.status < 300:
            return DeliveryStatus.DELIVERED, 0.0
        if answer is not None and answer.status == 410:
            return DeliveryStatus.GONE, 0.0
        schedule = self._settings.webhook_schedule
        if delivery.tries >= len(schedule):
            return DeliveryStatus.FAILED, 0.0
        # From this try to the next, not from the event: after an outage of ours they would all come at once.
        wait_s = schedule[delivery.tries] - schedule[delivery.tries - 1]
        return DeliveryStatus.PENDING, wait_s * self._jitter()

    def _insist(self, act: Callable[[], Any], gives_up_at: float) -> Any:
        """Ask a ledger that is away again, for as long as the claim may still be ours."""
        while True:
            try:
                return act()
            except LedgerUnavailable:
                if time.monotonic() > gives_up_at:
                    raise
                time.sleep(0.5)


def deliver_due(*, shares: bool = False) -> int:
    """
    What the Celery task does: deliver what is due, with this process's settings.

    Args:
        shares: Other queues are served by this worker too. Then one child at a time takes deliveries,
            and the hint of another is dropped; while a child only waits for its last receivers, the
            next one may begin. A child that is all there is rests after a round for as long as it took.

    Returns:
        How many tries there were.
    """
    global _rests_until  # noqa: PLW0603  # one per child process
    settings = Settings.from_env()
    if not settings.webhook_keys:
        log.error("webhook_secret_missing", hint="this worker serves the queue webhooks without the secret")
        return 0
    page = board()
    began = time.monotonic()
    if began < _rests_until or (page is not None and not page.begin_round(1 if shares else MAX_CHILDREN)):
        return 0
    from genpulse.tasks import wiring

    def takes_no_more() -> None:
        if page is not None:
            page.set_busy(True)

    try:
        with contextlib.closing(wiring.open_ledger(settings, pool_size=4)) as ledger:
            return Deliverer(settings, ledger).run(is_draining, takes_no_more=takes_no_more)
    finally:
        if page is not None:
            if shares and len(page.children()) == 1:
                _rests_until = 2 * time.monotonic() - began
            page.set_busy(False)


_rests_until = 0.0
