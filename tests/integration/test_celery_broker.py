"""The door through which messages come in: what is no task message is dropped, and the worker lives."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import Celery
from kombu import Connection, Consumer

from genpulse.config import Settings
from genpulse.tasks.broker import WorkerAMQP, WorkerConnection, WorkerTransport
from genpulse.tasks.producer import Producer, celery_queue
from genpulse.tasks.queues import redis_key
from genpulse.testing.services import FaultProxy


@pytest.fixture
def client(valkey_url: str) -> Iterator[Any]:
    """A plain client of the same Redis."""
    with redis.Redis.from_url(valkey_url) as found:
        yield found


@pytest.fixture
def connection(valkey_url: str) -> Iterator[WorkerConnection]:
    """The worker's own connection."""
    with WorkerConnection(valkey_url) as found:
        yield found


def sound_message(client: Any, url: str) -> dict[str, Any]:
    """A message as the relay sends it, taken out of the list again."""
    with_url = Producer(Settings.build(redis_url=url))
    with_url.publish([(str(uuid.uuid4()), "genpulse.comfyui", "comfy", 0)])
    with_url.close()
    found: dict[str, Any] = json.loads(client.rpop(redis_key("comfy", 0)))
    return found


def receive(connection: WorkerConnection, count: int) -> list[str]:
    """Ids of the next *count* messages that come through the door."""
    got: list[str] = []

    def take(message: Any) -> None:
        got.append(message.headers["id"])
        message.ack()

    with Consumer(connection, [celery_queue("comfy")], on_message=take, auto_declare=False):
        while len(got) < count:
            connection.drain_events(timeout=5)
    return got


GARBAGE = [
    b"\xff\xfe",
    b"garbage",
    b"null",
    b"3",
    b'"text"',
    b"[]",
    b"{}",
    b'{"properties": {}}',
    b'{"properties": {"delivery_tag": "x"}}',
    b'{"properties": {"delivery_tag": "x", "delivery_info": {}}, "headers": []}',
    b'{"properties": {"delivery_tag": "x", "delivery_info": {}}, "headers": {"task": "genpulse.comfyui"}}',
    b'{"properties": {"delivery_tag": "x", "delivery_info": {}, "body_encoding": "odd"}, "body": "x"}',
    b'{"properties": {"delivery_tag": "x", "delivery_info": {}}, "headers": {"task": "a", "id": "x", "timelimit": 3}}',
    *(
        b'{"properties": {"delivery_tag": "x", "delivery_info": {}}, "headers": {"task": "a", "id": "x"},'
        b' "content-type": "application/json", "body": ' + json.dumps(body).encode() + b"}"
        for body in ("3", "null", "[]", "[[], {}]", '{"args": 1}', "[1, 2, 3]", "{", "\x00", 7, None)
    ),
    (
        b'{"properties": {"delivery_tag": "x", "delivery_info": {}}, "headers": {"task": "a", "id": "x"},'
        b' "content-type": "application/x-python-serialize", "body": "[[], {}, {}]"}'
    ),
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_is_dropped_and_the_next_message_taken(
    garbage: bytes, connection: WorkerConnection, client: Any, valkey_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Anybody who can write to Redis can write nonsense; it ends no worker and says so once."""
    sound = sound_message(client, valkey_url)
    client.lpush("comfy", garbage)
    client.lpush("comfy", json.dumps(sound))

    with caplog.at_level(logging.WARNING, "genpulse.broker"):
        assert receive(connection, 1) == [sound["headers"]["id"]]

    assert [record.message.startswith("message_dropped") for record in caplog.records] == [True]
    assert client.llen("comfy") == 0


@pytest.mark.parametrize("error", [KeyError("id"), TypeError("x"), ValueError("x"), IndexError("x")])
def test_a_message_that_breaks_celerys_handler_is_dropped(
    error: Exception, connection: WorkerConnection, client: Any, valkey_url: str
) -> None:
    """Whatever Celery stumbles over in a message, the loop of the worker goes on, and stays connected."""
    sound = sound_message(client, valkey_url)
    client.lpush("comfy", json.dumps(sound), json.dumps(sound))
    got: list[str] = []

    def take(message: Any) -> None:
        got.append(message.headers["id"])
        if len(got) == 1:
            raise error

    with Consumer(connection, [celery_queue("comfy")], on_message=take, auto_declare=False):
        for _ in range(2):
            connection.drain_events(timeout=5)
    assert len(got) == 2


def test_a_lost_connection_is_not_taken_for_a_strange_message(
    connection: WorkerConnection, client: Any, valkey_url: str
) -> None:
    """Celery must hear of it, to connect anew."""
    client.lpush("comfy", json.dumps(sound_message(client, valkey_url)))

    def lose(_message: Any) -> None:
        raise redis.ConnectionError

    with (
        Consumer(connection, [celery_queue("comfy")], on_message=lose, auto_declare=False),
        pytest.raises(redis.ConnectionError),
    ):
        connection.drain_events(timeout=5)


def test_the_worker_connects_through_the_cured_classes(valkey_url: str) -> None:
    """Every connection that Celery makes for the worker is ours, and so is its transport."""
    app = Celery("test", broker=valkey_url, set_as_current=False, amqp=WorkerAMQP)

    with app.connection_for_read() as found:
        assert isinstance(found, WorkerConnection)
        assert isinstance(found.transport, WorkerTransport)
    with app.connection_for_read().clone() as cloned:
        assert isinstance(cloned, WorkerConnection)


def test_another_broker_keeps_its_own_transport() -> None:
    """Only Redis' transport is replaced."""
    plain = Connection("memory://").get_transport_cls()

    assert WorkerConnection("memory://").get_transport_cls() is plain


def test_the_broker_is_asked_at_least_every_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it was away, a worker is back two seconds after the broker."""
    pauses: list[float] = []

    def note(_error: Exception, pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr("kombu.utils.functional.sleep", lambda _seconds: None)
    with pytest.raises(KeyboardInterrupt):
        WorkerConnection("redis://127.0.0.1:1/0").ensure_connection(note)
    assert max(pauses) == 2.0
    assert pauses[0] < 0.5


def lose_redis(connection: Any, proxy: FaultProxy, client: Any, url: str) -> None:
    """
    What Celery's consumer does when Redis goes away, with two channels waiting in BRPOP.

    The second one (remote control's, in a worker) fails first, so the default channel, which has a
    message that is not acknowledged, stays half closed.
    """
    client.lpush("comfy", json.dumps(sound_message(client, url)))
    channels = [connection.default_channel, connection.channel()]
    for channel, queue in zip(channels, ("comfy", "other"), strict=True):
        Consumer(channel, [celery_queue(queue)], on_message=lambda _: None, auto_declare=False).consume()
    connection.drain_events(timeout=5)
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.1)
    proxy.set_mode("refuse")
    try:
        connection.collect()
        connection.close()
    finally:
        for channel in channels:
            channel.qos._on_collect.cancel()  # kombu would try once more when the interpreter ends


def test_losing_redis_with_a_free_slot_ends_no_worker(
    client: Any, valkey_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """The second close, which Celery 5.7.0 added, finds nothing that is half closed."""
    proxy = fault_proxy(valkey_url)

    lose_redis(WorkerConnection(proxy.url_of(valkey_url)), proxy, client, valkey_url)


def test_the_cure_is_still_needed(
    client: Any, valkey_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """The connection of kombu raises what ends the worker. If this fails, take the cure out."""
    proxy = fault_proxy(valkey_url)

    with pytest.raises(AttributeError, match="hostname"):
        lose_redis(Connection(proxy.url_of(valkey_url)), proxy, client, valkey_url)
