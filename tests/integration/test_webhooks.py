"""Delivering webhooks: the schedule by a clock that is passed in, real receivers, and what goes wrong."""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from genpulse.config import Settings
from genpulse.egress import Egress
from genpulse.errors import LedgerUnavailable
from genpulse.ledger import Delivery, DeliveryStatus, Ledger
from genpulse.live import redis_client
from genpulse.model import TaskStatus
from genpulse.tasks import queues, webhooks
from genpulse.tasks.board import Board
from genpulse.tasks.producer import Producer, RunwayView
from genpulse.tasks.webhooks import (
    PER_HOST,
    PER_OWNER,
    TASK_NAME,
    THREADS,
    Bell,
    Deliverer,
    deliver_due,
    signing_keys,
    whsec,
)
from tests.support import wait_until
from tests.support.ledger import claim, open_ledger, output, submit
from tests.support.receiver import Behaviour, drip, read_request, serve

OLD, NEW = (whsec(bytes([n]) * 32) for n in (1, 2))
SAID = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def answer(status: int, body: bytes = b"", headers: str = "") -> bytes:
    """A whole HTTP answer."""
    return f"HTTP/1.1 {status} x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Receiver:
    """Notes what it is sent; answers what the test says, the last thing again and again."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.heard: list[tuple[dict[str, str], str]] = []

    def __call__(self, connection: socket.socket) -> None:
        _, headers, body = read_request(connection)
        self.heard.append((headers, body.decode()))
        connection.sendall(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])

    @property
    def ids(self) -> list[str]:
        """The ``webhook-id`` of each try."""
        return [headers["webhook-id"] for headers, _ in self.heard]


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """On both databases."""
    with open_ledger(ledger_url) as ledger:
        yield ledger


@pytest.fixture
def lone_ledger(sqlite_ledger_url: str) -> Iterator[Ledger]:
    """On SQLite, for what no database has a say in."""
    with open_ledger(sqlite_ledger_url, pool_size=4) as ledger:
        yield ledger


def settings(**more: Any) -> Settings:
    """Settings that let a test's receivers on loopback be reached."""
    values: dict[str, Any] = {
        "egress_allow": "127.0.0.0/8",
        "egress_http": True,
        "webhook_secret": NEW,
        "public_url": "https://pulse.example",
    }
    return Settings.build(**(values | more))


def announce(ledger: Ledger, port: int, path: str = "/", **values: Any) -> Delivery:
    """A completed task whose end is to be told to the receiver on *port*."""
    owner = values.pop("owner", "default")
    host = values.pop("host", "127.0.0.1")
    task = submit(ledger, owner=owner, callback_url=f"http://{host}:{port}{path}", **values)
    ledger.finish(claim(ledger, task).fence, TaskStatus.COMPLETED, outputs=[output("a.png")])
    (delivery,) = ledger.list_deliveries(task.owner, task_id=task.id)
    return delivery


def state(ledger: Ledger, delivery: Delivery) -> Delivery:
    """The delivery as it now is, with its log."""
    found = ledger.get_delivery(delivery.id, delivery.owner)
    assert found is not None
    return found


def wildcard() -> Egress:
    """A way out on which every name is this machine."""
    return Egress(hosts=[".example"], http=True, resolve=lambda _host, _port: ["127.0.0.1"])


def under_way(ledger: Ledger, owner: str) -> int:
    """How many tries of an owner there are just now."""
    waiting = ledger.list_deliveries(owner, status=DeliveryStatus.PENDING, limit=200)
    return sum(each.claim is not None for each in waiting)


class Clock:
    """A time that stands still until it is told to go on."""

    def __init__(self, at: dt.datetime) -> None:
        self.at = at

    def __call__(self) -> dt.datetime:
        return self.at


def test_the_whole_schedule_runs_by_the_clock(ledger: Ledger) -> None:
    """Tries at 0 s, 5 s, 1 min, 5 min, 30 min, 2 h, 8 h and 24 h; not a second before; then it ends."""
    receiver = Receiver(answer(500, b"broken"))
    with serve(receiver) as port:
        delivery = announce(ledger, port)
        clock = Clock(delivery.created_at)
        deliverer = Deliverer(settings(), ledger, clock=clock, jitter=lambda: 1.0)
        tried: list[float] = []
        for _ in range(30):  # to the time of the next try, and to just before it
            if deliverer.deliver_one() is not None:
                tried.append((clock.at - delivery.created_at).total_seconds())
            due = state(ledger, delivery).next_at
            if due is None:
                break
            clock.at = due - dt.timedelta(milliseconds=50)
            assert deliverer.deliver_one() is None
            clock.at = due

    assert tried == pytest.approx([0, 5, 60, 300, 1800, 7200, 28_800, 86_400], abs=0.1)
    found = state(ledger, delivery)
    assert (found.status, found.attempts) == (DeliveryStatus.FAILED, 8)
    assert [each.status_code for each in found.log] == [500] * 8
    assert {each.excerpt for each in found.log} == {"broken"}
    assert set(receiver.ids) == {delivery.id}
    times = [int(headers["webhook-timestamp"]) for headers, _ in receiver.heard]
    assert times[-1] - times[0] == pytest.approx(86_400, abs=2)


def test_an_hour_of_a_receiver_that_comes_back(lone_ledger: Ledger) -> None:
    """Looked at every five seconds for sixty minutes: five tries fall into it, the fifth is heard."""
    receiver = Receiver(*[answer(503)] * 4, answer(200))
    with serve(receiver) as port:
        delivery = announce(lone_ledger, port)
        clock = Clock(delivery.created_at)
        deliverer = Deliverer(settings(), lone_ledger, clock=clock, jitter=lambda: 1.0)
        tried = []
        for second in range(0, 3601, 5):
            clock.at = delivery.created_at + dt.timedelta(seconds=second)
            while deliverer.deliver_one() is not None:
                tried.append(second)
    assert tried == [0, 5, 60, 300, 1800]
    assert state(lone_ledger, delivery).status is DeliveryStatus.DELIVERED


def test_waits_are_spread(lone_ledger: Ledger) -> None:
    """Many receivers of one outage are not all tried again in the same second."""
    random.seed(7)
    waits = set()
    with serve(Receiver(answer(500))) as port:
        for _ in range(5):
            delivery = announce(lone_ledger, port)
            clock = Clock(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1))
            assert Deliverer(settings(), lone_ledger, clock=clock).deliver_one() is not None
            due = state(lone_ledger, delivery).next_at
            assert due is not None
            waits.add(round((due - clock.at).total_seconds(), 2))
    assert len(waits) > 1
    assert all(4.4 < wait < 5.6 for wait in waits)


def test_a_receiver_that_fails_seven_times_is_told_by_the_eighth(ledger: Ledger) -> None:
    """The real thing, with the schedule's hours made tenths of a second; each try verifies."""
    receiver = Receiver(
        answer(500), answer(404), answer(302, headers="Location: http://127.0.0.1:1/\r\n"), b"", b"nonsense\r\n\r\n",
        answer(429), answer(503), answer(204),
    )  # fmt: skip
    with serve(receiver) as port:
        delivery = announce(ledger, port)
        deliverer = Deliverer(settings(webhook_schedule_s="0,.1,.2,.3,.4,.5,.6,.7"), ledger)

        def done() -> bool:
            deliverer.run()
            return state(ledger, delivery).status is not DeliveryStatus.PENDING

        wait_until(done, 40, message="the eighth try")
    found = state(ledger, delivery)
    assert found.status is DeliveryStatus.DELIVERED
    assert [each.status_code for each in found.log] == [500, 404, 302, None, None, 429, 503, 204]
    assert receiver.ids == [delivery.id] * 8
    for headers, body in receiver.heard:
        event = Webhook(NEW).verify(body, headers)
    assert event["type"] == "task.completed"
    assert event["data"]["task_id"] == delivery.task_id
    assert event["data"]["urls"]["self"] == f"https://pulse.example/task/{delivery.task_id}"
    assert event["data"]["outputs"][0]["url"].endswith(f"/task/{delivery.task_id}/outputs/0")


def test_both_secrets_sign_while_they_are_rotated(lone_ledger: Ledger) -> None:
    """A receiver that has the old one or the new one is content; one with another is not."""
    receiver = Receiver(SAID)
    with serve(receiver) as port:
        announce(lone_ledger, port)
        Deliverer(settings(webhook_secret=f"{NEW},{OLD}"), lone_ledger).deliver_one()
    ((headers, body),) = receiver.heard
    for secret in (OLD, NEW):
        Webhook(secret).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(whsec(b"3" * 32)).verify(body, headers)


def test_owners_have_keys_of_their_own(lone_ledger: Ledger) -> None:
    """Who knows their own secret cannot sign for somebody else's receiver."""
    receiver = Receiver(SAID)
    with serve(receiver) as port:
        announce(lone_ledger, port, owner="eve")
        Deliverer(settings(), lone_ledger).deliver_one()
    ((headers, body),) = receiver.heard
    (own,) = signing_keys(settings(), "eve")
    Webhook(whsec(own)).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(NEW).verify(body, headers)
    assert signing_keys(settings(), "default") == settings().webhook_keys


def test_410_stops_it(lone_ledger: Ledger) -> None:
    """The receiver wants no more of this."""
    with serve(Receiver(answer(410))) as port:
        delivery = announce(lone_ledger, port)
        deliverer = Deliverer(settings(), lone_ledger)
        assert deliverer.deliver_one() is not None
    assert state(lone_ledger, delivery).status is DeliveryStatus.GONE
    assert deliverer.deliver_one() is None


def hang(connection: socket.socket) -> None:
    """Take everything, answer nothing."""
    while connection.recv(1 << 16):
        pass


@pytest.mark.parametrize(
    ("behave", "status_code"),
    [
        (hang, None),
        (drip(b"", b"H", 0.05), None),
        (drip(b"HTTP/1.1 500 x\r\n", b"A: b\r\n", 0.05), None),
        (drip(b"HTTP/1.1 500 x\r\nContent-Length: 10737418240\r\n\r\n", b"x" * 65536, 0), 500),
        (drip(b"HTTP/1.1 500 x\r\nContent-Length: 5\r\n\r\n", b"x", 0.3), 500),
        (Receiver(answer(307, headers="Location: http://169.254.169.254/\r\n")), 307),
        (Receiver(b"HTTP/1.1 500 x\r\nContent-Length: -5\r\n\r\n"), 500),
        (lambda connection: connection.close(), None),
    ],
    ids=["hangs", "drips", "endless headers", "10 GB", "drips a body", "redirects", "lies", "closes"],
)
def test_a_bad_receiver_costs_one_bounded_try(
    lone_ledger: Ledger, behave: Behaviour, status_code: int | None
) -> None:
    """In time, in memory and in what the log keeps of it; and the delivery waits for its next try."""
    with serve(behave) as port:
        delivery = announce(lone_ledger, port)
        began = time.monotonic()
        Deliverer(settings(webhook_timeout_s=1), lone_ledger).deliver_one()
        assert time.monotonic() - began < 15
    found = state(lone_ledger, delivery)
    assert (found.status, found.tries) == (DeliveryStatus.PENDING, 1)
    (tried,) = found.log
    assert tried.status_code == status_code
    assert tried.duration_s is not None
    assert len(tried.excerpt or "") <= 512
    assert tried.error or status_code == 500


@pytest.fixture
def deliver() -> Iterator[Callable[[Deliverer], None]]:
    """Deliver in a thread until the test's receivers are gone, and with them every try under way."""
    over = threading.Event()
    threads: list[threading.Thread] = []

    def start(deliverer: Deliverer) -> None:
        threads.append(threading.Thread(target=lambda: deliverer.run(over.is_set), daemon=True))
        threads[-1].start()

    yield start
    over.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_receivers_that_hang_do_not_hold_up_others(
    lone_ledger: Ledger, deliver: Callable[[Deliverer], None]
) -> None:
    """Twenty deliveries to one that hangs, then one to a good one: that is told while the others wait."""
    deliverer = Deliverer(settings(webhook_timeout_s=20), lone_ledger, wildcard())
    with serve(hang) as stuck, serve(Receiver(SAID)) as port:
        for _ in range(20):
            announce(lone_ledger, stuck, host="stuck.example")
        delivery = announce(lone_ledger, port, host="good.example")
        deliver(deliverer)
        wait_until(lambda: state(lone_ledger, delivery).status is DeliveryStatus.DELIVERED, 15)
        assert under_way(lone_ledger, "default") == PER_HOST


def test_an_owner_with_any_number_of_hosts_that_hang_does_not_hold_up_others(
    ledger: Ledger, deliver: Callable[[Deliverer], None]
) -> None:
    """A name with a wildcard, each of its hosts silent: half of the places are left for other owners."""
    deliverer = Deliverer(settings(webhook_timeout_s=30), ledger, wildcard())
    with serve(hang) as stuck, serve(Receiver(SAID)) as port:
        for n in range(THREADS + 8):
            announce(ledger, stuck, owner="eve", host=f"a{n}.eve.example")
        deliver(deliverer)
        wait_until(lambda: under_way(ledger, "eve") == PER_OWNER, 20)
        delivery = announce(ledger, port, host="ada.example")
        wait_until(lambda: state(ledger, delivery).status is DeliveryStatus.DELIVERED, 20)
        assert under_way(ledger, "eve") == PER_OWNER


def test_an_owner_with_a_long_backlog_does_not_hold_up_others(ledger: Ledger) -> None:
    """Sixty of one owner are due for longer, and their receiver is quick: the other's goes second."""
    with serve(Receiver(SAID)) as port:
        backlog = [announce(ledger, port, owner="eve", host=f"a{n}.eve.example") for n in range(60)]
        delivery = announce(ledger, port, host="ada.example")
        Deliverer(settings(), ledger, wildcard()).run()
        began = state(ledger, delivery).log[0].started_at
        before = [each for each in backlog if state(ledger, each).log[0].started_at < began]
    assert len(before) <= 1


class TestOnAWorker:
    """The Celery task of a child, beside its siblings."""

    OTHER = 1  # a process that is always there

    @pytest.fixture
    def page(self, lone_ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Board:
        """The worker's page, with this child and another one; both are free."""
        page = Board()
        page.enter()
        page.enter(self.OTHER)
        values = {
            "GENPULSE_DATABASE_URL": lone_ledger.engine.url.render_as_string(),
            "GENPULSE_EGRESS_ALLOW": "127.0.0.0/8",
            "GENPULSE_EGRESS_HTTP": "true",
            "GENPULSE_WEBHOOK_SECRET": NEW,
        }
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(webhooks, "board", lambda: page)
        monkeypatch.setattr(webhooks, "_rests_until", 0.0)
        return page

    def other_delivers(self, page: Board, monkeypatch: pytest.MonkeyPatch) -> None:
        """The other child is in a round."""
        with monkeypatch.context() as patched:
            patched.setattr("genpulse.tasks.board.os.getpid", lambda: self.OTHER)
            assert page.begin_round(1)

    def test_one_child_at_a_time_delivers_where_others_are_served(
        self, lone_ledger: Ledger, page: Board, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The hint of a second one is dropped, and it is free for the other queues."""
        self.other_delivers(page, monkeypatch)
        with serve(Receiver(SAID)) as port:
            delivery = announce(lone_ledger, port)
            assert deliver_due(shares=True) == 0
            assert not page.children()[os.getpid()]
            assert state(lone_ledger, delivery).attempts == 0
            assert deliver_due() == 1  # a worker of this queue alone uses every child

    def test_a_child_that_delivers_counts_as_at_work(self, lone_ledger: Ledger, page: Board) -> None:
        """Else its worker, all of whose children wait for receivers, would be taken for a deaf one."""
        seen: list[bool] = []

        def behave(connection: socket.socket) -> None:
            seen.append(page.children()[os.getpid()])
            Receiver(SAID)(connection)

        with serve(behave) as port:
            announce(lone_ledger, port)
            assert deliver_due(shares=True) == 1
        assert seen == [True]
        assert not page.children()[os.getpid()]

    def test_a_child_that_waits_for_its_last_receivers_makes_room(
        self, lone_ledger: Ledger, page: Board, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It takes no more, so the next one may, although it is still at work itself."""
        seen: list[bool] = []
        monkeypatch.setattr(webhooks, "is_draining", lambda: True)
        run = Deliverer.run

        def watched(
            deliverer: Deliverer, *args: Any, takes_no_more: Callable[[], None], **kwargs: Any
        ) -> int:
            def told() -> None:
                takes_no_more()
                self.other_delivers(page, monkeypatch)
                seen.append(page.children()[os.getpid()])

            return run(deliverer, *args, takes_no_more=told, **kwargs)

        monkeypatch.setattr(Deliverer, "run", watched)
        deliver_due(shares=True)
        assert seen == [True]

    def test_a_child_that_is_alone_rests_between_rounds(
        self, lone_ledger: Ledger, page: Board, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As long as the round took, so that the other queues have half of its time."""
        alone = Board()
        alone.enter()
        monkeypatch.setattr(webhooks, "board", lambda: alone)
        slow = 0.5

        def behave(connection: socket.socket) -> None:
            time.sleep(slow)
            Receiver(SAID)(connection)

        with serve(behave) as port:
            announce(lone_ledger, port)
            began = time.monotonic()
            assert deliver_due(shares=True) == 1
            assert webhooks._rests_until >= began + 2 * slow
            monkeypatch.setattr(webhooks, "_rests_until", time.monotonic() + 60)
            announce(lone_ledger, port)
            assert deliver_due(shares=True) == 0
            monkeypatch.setattr(webhooks, "_rests_until", 0.0)
            assert deliver_due(shares=True) == 1


def test_an_address_inside_is_not_told(lone_ledger: Ledger) -> None:
    """A callback that resolves inside by the time of its delivery is a failed try; nobody is connected to."""
    heard = Receiver(SAID)
    with serve(heard) as port:
        delivery = announce(lone_ledger, port)
        Deliverer(settings(egress_allow="", egress_ports=str(port)), lone_ledger).deliver_one()
    assert heard.heard == []
    (tried,) = state(lone_ledger, delivery).log
    assert "private" in str(tried.error)


def test_an_outcome_is_kept_while_the_ledger_is_away(
    lone_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver has heard it: it is written when the ledger is back, and not told again."""
    receiver = Receiver(SAID)
    record: Callable[..., bool] = lone_ledger.record_delivery
    outages = iter([True, True, False])

    def away(*args: Any, **kwargs: Any) -> bool:
        if next(outages):
            raise LedgerUnavailable("away")
        return record(*args, **kwargs)

    with serve(receiver) as port:
        delivery = announce(lone_ledger, port)
        monkeypatch.setattr(lone_ledger, "record_delivery", away)
        Deliverer(settings(), lone_ledger).deliver_one()
    assert len(receiver.heard) == 1
    assert state(lone_ledger, delivery).status is DeliveryStatus.DELIVERED


def test_the_bell_rings_once_for_what_is_due(
    lone_ledger: Ledger, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hint, and no other while it waits; none without anything to deliver; silence if Redis is away."""
    monkeypatch.setattr(webhooks, "RING_AGAIN_S", 0.0)
    found = settings(redis_url=valkey_url)
    client = redis_client(valkey_url, timeout_s=5)
    bell = Bell(lone_ledger, Producer(found), RunwayView(client))
    assert not bell.ring()
    announce(lone_ledger, 1)
    assert [bell.ring() for _ in range(3)] == [True, False, False]
    (message,) = client.lrange(queues.WEBHOOKS, 0, -1)
    assert json.loads(message)["headers"]["task"] == TASK_NAME
    client.delete(queues.WEBHOOKS)
    assert bell.ring()  # nobody has delivered it

    gone = settings(redis_url="redis://127.0.0.1:1/0")
    away = Bell(
        lone_ledger,
        Producer(gone, timeout_s=0.2),
        RunwayView(redis_client("redis://127.0.0.1:1/0", timeout_s=1)),
    )
    assert not away.ring()


def test_the_bell_does_not_ring_on_and_on(
    lone_ledger: Ledger, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hint that was taken and dropped is sent again after a while; what is newly due, at once."""
    monkeypatch.setattr(webhooks, "RING_AGAIN_S", 3600.0)
    client = redis_client(valkey_url, timeout_s=5)
    bell = Bell(lone_ledger, Producer(settings(redis_url=valkey_url)), RunwayView(client))
    announce(lone_ledger, 1)
    assert bell.ring()
    client.delete(queues.WEBHOOKS)
    assert not bell.ring()

    Deliverer(settings(webhook_schedule_s="0,3600"), lone_ledger).deliver_one()
    assert not bell.ring()
    announce(lone_ledger, 1)
    assert bell.ring()


PROGRAM = """
import sys
from genpulse.config import Settings
from genpulse.ledger import Ledger
from genpulse.tasks.webhooks import Deliverer
settings = Settings.from_env(env_file=None)
print("ready", flush=True)
Deliverer(settings, Ledger.connect(settings.ledger_url)).run()
"""


def test_a_deliverer_killed_in_the_middle_is_replaced(ledger_url: str, tmp_path: Path) -> None:
    """The receiver has the message and kill -9 comes before the record: it is told again, under the same id."""
    from genpulse.testing.services import start_python

    heard: list[str] = []
    first_heard, let_go = threading.Event(), threading.Event()

    def behave(connection: socket.socket) -> None:
        _, headers, _ = read_request(connection)
        heard.append(headers["webhook-id"])
        if len(heard) == 1:
            first_heard.set()
            let_go.wait(30)
        connection.sendall(SAID)

    with open_ledger(ledger_url) as ledger, serve(behave) as port:
        delivery = announce(ledger, port)
        env = {
            "GENPULSE_DATABASE_URL": ledger_url,
            "GENPULSE_EGRESS_ALLOW": "127.0.0.0/8",
            "GENPULSE_EGRESS_HTTP": "true",
            "GENPULSE_WEBHOOK_SECRET": NEW,
        }
        with start_python(["-c", PROGRAM], tmp_path, env=env) as process:
            assert first_heard.wait(30)
            process.kill()
        let_go.set()
        assert Deliverer(settings(), ledger).deliver_one() is None  # its claim is not over yet
        clock = Clock(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=50))
        assert Deliverer(settings(), ledger, clock=clock).deliver_one() is not None
        found = state(ledger, delivery)
    assert heard == [delivery.id] * 2
    assert found.status is DeliveryStatus.DELIVERED
    assert [each.status_code for each in found.log] == [None, 200]
    assert "vanished" in str(found.log[0].error)


def test_two_deliverers_never_tell_the_same_thing_at_once(ledger: Ledger) -> None:
    """Fifteen deliveries, three deliverers: each is heard once."""
    receiver = Receiver(SAID)
    with serve(receiver) as port:
        told = {announce(ledger, port).id for _ in range(15)}
        threads = [
            threading.Thread(target=Deliverer(settings(), Ledger(ledger.engine)).run) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(50)
    assert sorted(receiver.ids) == sorted(told)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("webhook_secret", "hunter2"),
        ("webhook_secret", "whsec_" + base64.b64encode(b"short").decode()),
        ("webhook_secret", f"{NEW},whsec_%%%"),
        ("webhook_schedule_s", ""),
        ("webhook_schedule_s", "5,60"),
        ("webhook_schedule_s", "0,60,5"),
        ("webhook_schedule_s", "0,x"),
        ("egress_allow", "10.0.0.0/33"),
        ("egress_allow", "https://x"),
        ("egress_allow", "10.1.2.3/8"),
        ("egress_ports", "0"),
        ("egress_ports", "http"),
    ],
)
def test_a_setting_that_cannot_be_used_names_itself_and_not_its_value(name: str, value: str) -> None:
    """The start stops; a secret is not in the message."""
    from genpulse.config import SettingsError

    with pytest.raises(SettingsError, match=f"GENPULSE_{name.upper()}") as refused:
        Settings.build(**{name: value})
    assert name != "webhook_secret" or value not in str(refused.value)


def test_the_secrets_can_be_shown_and_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``genpulse webhook-secret`` prints is what the receivers' libraries want."""
    from click.testing import CliRunner

    from genpulse.cli import cli

    def said(*arguments: str) -> list[str]:
        done = CliRunner().invoke(cli, ["webhook-secret", *arguments])
        assert done.exit_code == 0, done.output
        return done.output.split()

    monkeypatch.delenv("GENPULSE_WEBHOOK_SECRET", raising=False)
    (made,) = said("--new")
    assert CliRunner().invoke(cli, ["webhook-secret"]).exit_code == 2
    monkeypatch.setenv("GENPULSE_WEBHOOK_SECRET", f"{made},{OLD}")
    assert said() == [made, OLD]
    both = Settings.build(webhook_secret=f"{made},{OLD}")
    assert said("--owner", "eve") == [whsec(key) for key in signing_keys(both, "eve")]
