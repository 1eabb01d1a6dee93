"""The relay's way into Redis and its view of the runway, on a real Valkey."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from genpulse.config import Settings
from genpulse.live import redis_client
from genpulse.tasks.producer import BrokerUnavailable, Message, Producer, RunwayView
from genpulse.tasks.queues import PERMANENT_KEYS, redis_key, redis_keys
from genpulse.testing.services import FaultProxy, Mode


def new_ids(count: int) -> list[str]:
    """Fresh task ids."""
    return [str(uuid.uuid4()) for _ in range(count)]


@pytest.fixture
def client(valkey_url: str) -> Iterator[Any]:
    """A plain client of the same Redis."""
    with redis.Redis.from_url(valkey_url) as found:
        yield found


@pytest.fixture
def producer(valkey_url: str) -> Iterator[Producer]:
    """What the relay sends with."""
    found = Producer(Settings.build(redis_url=valkey_url))
    yield found
    found.close()


def test_each_message_lies_in_the_list_of_its_queue_and_priority(producer: Producer, client: Any) -> None:
    """Names, priorities and server queues end where the workers look for them."""
    ids = new_ids(4)
    places = [("comfy", 0), ("comfy", 3), ("comfy", 6), ("comfy@gpu1", 3)]

    producer.publish(
        [Message(id_, "genpulse.comfyui", *place) for id_, place in zip(ids, places, strict=True)]
    )

    for id_, place in zip(ids, places, strict=True):
        (message,) = client.lrange(redis_key(*place), 0, -1)
        assert json.loads(message)["headers"]["id"] == id_


def test_a_message_is_only_a_hint(producer: Producer, client: Any) -> None:
    """It carries our id as Celery's, the task's name, and nothing of the task itself."""
    (task_id,) = new_ids(1)
    producer.publish([(task_id, "genpulse.image-convert", "cpu", 3)])

    message = json.loads(client.lindex(redis_key("cpu", 3), 0))
    assert message["headers"]["task"] == "genpulse.image-convert"
    assert message["headers"]["id"] == message["properties"]["correlation_id"] == task_id
    assert message["content-type"] == "application/json"
    assert (message["headers"]["argsrepr"], message["headers"]["kwargsrepr"]) == ("()", "{}")
    assert message["headers"]["eta"] is None


def test_a_batch_keeps_its_order(producer: Producer, client: Any) -> None:
    """Workers pop from the right end, so the first message sent is the first one taken."""
    ids = new_ids(50)
    producer.publish([(id_, "genpulse.comfyui", "comfy", 3) for id_ in ids])

    taken = [json.loads(client.rpop(redis_key("comfy", 3)))["headers"]["id"] for _ in ids]
    assert taken == ids


def test_a_batch_is_few_round_trips(producer: Producer, client: Any) -> None:
    """A hundred messages cost a hundred LPUSH in one pipeline and next to nothing besides."""
    producer.publish([(new_ids(1)[0], "genpulse.comfyui", "comfy", 3)])
    before = client.info("stats")["total_commands_processed"]
    reads = client.info("stats")["total_reads_processed"]

    producer.publish([(id_, "genpulse.comfyui", "comfy", 3) for id_ in new_ids(100)])

    after = client.info("stats")
    assert after["total_commands_processed"] - before <= 106
    assert after["total_reads_processed"] - reads < 20


def test_publishing_leaves_no_key_but_the_lists(producer: Producer, client: Any) -> None:
    """No bindings, no result channels: nothing stays when the messages are taken."""
    producer.publish(
        [(id_, "genpulse.comfyui", "comfy", step) for id_, step in zip(new_ids(2), (0, 3), strict=True)]
    )

    assert {key.decode() for key in client.scan_iter()} == {redis_key("comfy", 0), redis_key("comfy", 3)}
    assert client.pubsub_channels() == []


@pytest.mark.parametrize("mode", ["refuse", "blackhole", "reset"])
def test_a_redis_that_is_away_is_an_error_within_seconds(
    mode: Mode, valkey_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """Refused, black-holed or reset: the relay gets its answer, and the next call works again."""
    proxy = fault_proxy(valkey_url)
    producer = Producer(Settings.build(redis_url=proxy.url_of(valkey_url)), timeout_s=0.5)
    hint = [(new_ids(1)[0], "genpulse.comfyui", "comfy", 3)]
    producer.publish(hint)

    proxy.set_mode(mode)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            producer.publish(hint)
        assert time.monotonic() - began < 2.5

    proxy.set_mode("pass")
    producer.publish(hint)
    producer.close()


def test_an_idle_connection_that_went_stale_costs_no_error(
    valkey_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """Redis was restarted between two batches: the second one connects anew and arrives."""
    proxy = fault_proxy(valkey_url)
    producer = Producer(Settings.build(redis_url=proxy.url_of(valkey_url)))
    producer.publish([(new_ids(1)[0], "genpulse.comfyui", "comfy", 3)])

    proxy.cut()
    time.sleep(0.5)  # the proxy's threads let go of the socket only when they wake

    producer.publish([(new_ids(1)[0], "genpulse.comfyui", "comfy", 3)])
    producer.close()


def test_the_error_keeps_the_password(fault_proxy: Callable[[str], FaultProxy], valkey_url: str) -> None:
    """What goes to the log names no secret."""
    proxy = fault_proxy(valkey_url)
    proxy.set_mode("refuse")
    url = proxy.url_of(valkey_url).replace("redis://", "redis://user:hunter2@")

    with pytest.raises(BrokerUnavailable) as caught:
        Producer(Settings.build(redis_url=url)).publish([(new_ids(1)[0], "genpulse.comfyui", "comfy", 3)])

    assert "hunter2" not in str(caught.value)


# -- The runway ----------------------------------------------------------------------------------


def test_the_runway_is_seen_exactly(producer: Producer, client: Any) -> None:
    """Every priority of every asked queue is read, and nothing of another queue."""
    ids = new_ids(5)
    producer.publish([(ids[0], "t", "comfy", 0), (ids[1], "t", "comfy", 3), (ids[2], "t", "comfy", 9),
                      (ids[3], "t", "comfy@gpu1", 6), (ids[4], "t", "cpu", 3)])  # fmt: skip
    view = RunwayView(client)

    assert view.waiting_ids(["comfy", "comfy@gpu1"]) == set(ids[:4])
    assert view.waiting_ids(["comfy@gpu1"]) == {ids[3]}
    assert view.counts(["comfy", "cpu", "nowhere"]) == {"comfy": 3, "cpu": 1, "nowhere": 0}


def test_a_message_just_delivered_still_counts(producer: Producer, client: Any) -> None:
    """Between delivery and claim a task is not lost; 5 s after the delivery it is."""
    fresh, old = new_ids(2)
    producer.publish([(fresh, "t", "comfy", 3), (old, "t", "comfy", 3)])
    for age_s in (0, 6):  # what kombu's QoS.append writes
        message = json.loads(client.rpop(redis_key("comfy", 3)))
        tag = message["properties"]["delivery_tag"]
        client.zadd("unacked_index", {tag: time.time() - age_s})
        client.hset("unacked", tag, json.dumps([message, "", "comfy"]))

    assert RunwayView(client).waiting_ids(["comfy"]) == {fresh}


def test_a_delivery_that_nobody_acknowledged_is_dropped(producer: Producer, client: Any) -> None:
    """Ours, once it is old; a fresh one and another application's stay."""
    fresh, old = new_ids(2)
    producer.publish([(fresh, "genpulse.comfyui", "comfy", 3), (old, "genpulse.comfyui", "comfy", 3)])
    tags = []
    for age_s in (0, 60):  # what kombu's QoS.append writes
        message = json.loads(client.rpop(redis_key("comfy", 3)))
        tags.append(message["properties"]["delivery_tag"])
        client.zadd("unacked_index", {tags[-1]: time.time() - age_s})
        client.hset("unacked", tags[-1], json.dumps([message, "", "comfy"]))
    theirs = {"headers": {"id": old, "task": "shop.send_invoice"}}
    client.zadd("unacked_index", {"theirs": 1.0, "nothing": 1.0, "garbage": 1.0})
    client.hset("unacked", mapping={"theirs": json.dumps([theirs, "", "mail"]), "garbage": "3"})

    assert RunwayView(client).forget_stale_deliveries() == 2

    left = {tags[0], "theirs", "garbage"}
    assert {tag.decode() for tag in client.zrange("unacked_index", 0, -1)} == left
    assert {tag.decode() for tag in client.hkeys("unacked")} == left


def test_garbage_on_the_runway_is_no_task(client: Any, valkey_url: str) -> None:
    """Whatever lies in the lists, reading them works."""
    client.lpush("comfy", b"\xff", "garbage", "[]", "{}", '{"headers": 3}', "null")
    client.zadd("unacked_index", {"a": time.time(), "gone": time.time()})
    client.hset("unacked", "a", "3")

    assert RunwayView(client).waiting_ids(["comfy"]) == set()
    # The client of the sweeper decodes what it reads.
    assert RunwayView(redis_client(valkey_url, timeout_s=5)).waiting_ids(["comfy"]) == set()


def test_a_wiped_redis_shows(client: Any) -> None:
    """The epoch is the same for everybody who asks, until somebody flushes Redis."""
    view = RunwayView(client)
    first = view.epoch()
    assert RunwayView(client).epoch() == first
    assert first.run_id

    client.flushall()

    second = view.epoch()
    assert second.run_id == first.run_id
    assert second.token != first.token


def test_the_epoch_key_is_listed_as_permanent(client: Any) -> None:
    """A key without an expiry is on the list of those that may stay."""
    RunwayView(client).epoch()

    assert {key.decode() for key in client.scan_iter() if client.ttl(key) == -1} <= set(PERMANENT_KEYS)


@pytest.mark.parametrize("ask", ["waiting_ids", "counts", "epoch", "run_id", "forget_stale_deliveries"])
def test_a_silent_redis_is_one_kind_of_error(
    ask: str, valkey_url: str, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """The sweeper sees ``BrokerUnavailable`` and nothing else, within the client's time-out."""
    proxy = fault_proxy(valkey_url)
    proxy.set_mode("blackhole")
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    with redis.Redis.from_url(
        proxy.url_of(valkey_url), socket_timeout=0.3, socket_connect_timeout=0.3, retry=Retry(NoBackoff(), 0)
    ) as silent:
        arguments = [["comfy"]] if ask in {"waiting_ids", "counts"} else []
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            getattr(RunwayView(silent), ask)(*arguments)
    assert time.monotonic() - began < 2


def test_the_lists_of_a_queue_are_all_its_steps() -> None:
    """Nobody can send to a list that the runway view does not read."""
    assert len(redis_keys("comfy")) == len(set(redis_keys("comfy"))) == 4
