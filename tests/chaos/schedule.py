"""What a run will do, drawn from its seed alone: when what breaks, and which tasks are sent."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass

__all__ = [
    "KINDS",
    "SERVED",
    "SERVERS",
    "SHARED",
    "Fault",
    "Order",
    "plan_faults",
    "plan_orders",
    "stall_limit_s",
]

SERVED = {"a": ("gpu1", "gpu2"), "b": ("gpu2", "gpu3"), "c": ("gpu4",)}
"""Which worker serves which ComfyUI servers; one of them is shared by two."""
SHARED = "gpu2"
SERVERS = ("gpu1", "gpu2", "gpu3", "gpu4")

KINDS = {
    "child killed": "kill -9 of the worker child that renders",
    "worker killed": "kill -9 of a worker's main process, started again",
    "child told to stop": "SIGTERM to the worker child that renders",
    "child frozen": "SIGSTOP of the rendering child past its lease; thawed while its prompt is adopted",
    "worker frozen": "the same of a worker and all its children",
    "parent frozen": "the same of a worker's main process alone",
    "deploy": "SIGTERM to one worker after the other (once, twice, to its group), each started again",
    "comfy killed": "kill -9 of a ComfyUI server that renders, started again on its port",
    "comfy crashed": "a ComfyUI server dies at one step of its next prompt, started again on its port",
    "comfy frozen": "SIGSTOP of a ComfyUI server that renders, then SIGCONT",
    "comfy stalled": "a prompt makes no progress for longer than the stall limit, HTTP is fine",
    "comfy zombie": "a ComfyUI server's worker thread dies with its prompt, HTTP is fine; restarted later",
    "prompt forgotten": "a ComfyUI server answers 200 and forgets the prompt",
    "answer lost": "a ComfyUI server takes a prompt and resets the connection instead of answering",
    "out of memory": "a prompt ends in out of memory",
    "sockets cut": "a ComfyUI server resets its WebSockets",
    "sockets muted": "a ComfyUI server's WebSockets stay open and say nothing",
    "network cut": "every TCP connection of all workers to a ComfyUI server is reset, three times",
    "network stalled": "one worker's network to one ComfyUI server is a black hole",
    "network refused": "all workers' connections to a ComfyUI server are cut and refused; it runs on",
    "network halved": "one of two workers is refused by the ComfyUI server that they share; it runs on",
    "api killed": "kill -9 of the API and its processes",
    "api answers lost": "requests to the API arrive, and their answers never do",
    "sweeper killed": "kill -9 of the separate sweeper",
    "valkey killed": "kill -9 of the broker, started again",
    "valkey wiped": "FLUSHALL",
    "valkey silent": "the broker's network is a black hole",
    "valkey refused": "the broker's connections are cut and refused",
    "runway flooded": "hundreds of foreign messages, garbage and tasks that do not exist, into the queue",
    "messages doubled": "three more messages for every task that is not final",
    "postgres killed": "kill -9 of PostgreSQL's main process, started again",
    "postgres crashed": "kill -9 of one of PostgreSQL's processes: it recovers by itself",
    "storage broken": "nothing can be stored",
}
"""The kinds of fault."""

FROZEN = frozenset({"child frozen", "worker frozen", "parent frozen"})
_STALLED = frozenset({"comfy stalled", "comfy zombie"})
_OUTAGES = frozenset({"api killed", "api answers lost"}) | {kind for kind in KINDS if "valkey" in kind}
_USED = 0.45
"""How much of the servers' time the tasks take, so that something always runs and little waits."""
_LONGEST_S = 60.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that breaks."""

    number: int
    at_s: float
    kind: str
    target: int
    """Which of several, to be taken modulo their number; an idle one gives way to one that works."""
    length_s: float
    """How long it lasts, or what is killed stays away."""


@dataclass(frozen=True, slots=True)
class Order:
    """One task that a client sends."""

    index: int
    at_s: float
    seconds: float
    color: int
    priority: str = "normal"
    form: str = "picture"
    """``picture``; ``socket``: its output goes over the WebSocket alone; ``failing``: a node raises."""
    sent_twice: bool = False
    """Two clients send it at the same moment, with the same key."""
    cancel_after_s: float | None = None


def plan_faults(
    seed: int, length_s: float, *, postgresql: bool, lease_s: float, kinds: Collection[str] = tuple(KINDS)
) -> list[Fault]:
    """Every kind in a shuffled deck, and the deck again, until the time is over."""
    rng = random.Random(f"faults {seed}")
    kinds = [kind for kind in kinds if postgresql or not kind.startswith("postgres")]
    faults: list[Fault] = []
    # A sweeper reaps only after one lease of unbroken connection: begin where things can recover.
    at_s = lease_s / 2
    ends_s = length_s - min(20.0, length_s / 4)
    deck: list[str] = []
    pause_s = min(6.0, max(4.5, length_s / len(kinds) / 2))
    while at_s < ends_s and kinds:
        if not deck:
            deck = rng.sample(kinds, len(kinds))
        kind = deck.pop()
        length = _length(rng, kind, lease_s)
        faults.append(Fault(len(faults), round(at_s, 2), kind, rng.randrange(1000), round(length, 2)))
        at_s += rng.uniform(0.4, 1.6) * pause_s
    return faults


def stall_limit_s(length_s: float) -> int:
    """
    ``GENPULSE_STALL_S`` of the workers: as short as a test wants it.

    A prompt that waits behind one and the same other for twice as long takes the server for dead too,
    so it is more than half of the longest task.
    """
    return 4 + math.ceil(max(25.0, _longest_s(length_s)) / 2)


def _longest_s(length_s: float) -> float:
    return min(_LONGEST_S, length_s / 3)


def _length(rng: random.Random, kind: str, lease_s: float) -> float:
    if kind in FROZEN:
        return lease_s + rng.uniform(1.5, 5)
    if kind in _STALLED:
        return rng.uniform(3, 6)  # beyond the stall limit
    if kind in {"valkey silent", "comfy frozen", "network stalled", "network halved"}:
        return rng.uniform(0.5, 16)
    return rng.uniform(0.3, 5)


def plan_orders(
    seed: int, length_s: float, tasks: int, faults: Collection[Fault] = (), *, lease_s: float = 15.0
) -> list[Order]:
    """
    Tasks of 0.05 to 60 s, many short and few long, evenly over the time; each with its own colour.

    Each fault gets one that is sent for it to hit. How many of the others may be long is what leaves the
    servers some time to spare; in a short run none is longer than a third of it.
    """
    rng = random.Random(f"orders {seed}")
    sent_for = [_victim(rng, fault, lease_s) for fault in faults][:tasks]
    spread, taken = tasks - len(sent_for), sum(seconds for _, seconds in sent_for)
    longest = _longest_s(length_s)
    lengths = _lengths(rng, spread, longest, _USED * len(SERVERS) * length_s - taken)
    between = (length_s - min(10.0, length_s / 4)) / max(1, spread)
    plans = [(at_s, seconds, False) for at_s, seconds in sent_for]
    plans += [(index * between + rng.uniform(0, 1), seconds, True) for index, seconds in enumerate(lengths)]
    first = rng.randrange(2**24)
    return [
        Order(
            index=index,
            at_s=round(max(0.0, at_s), 2),
            seconds=round(seconds, 3),
            color=(first + index * 7919) % 2**24,
            priority=rng.choice(["low", "normal", "normal", "high"]) if varied else "high",
            form=rng.choices(["picture", "socket", "failing"], [88, 8, 4])[0] if varied else "picture",
            sent_twice=rng.random() < 0.1,
            cancel_after_s=round(rng.uniform(0, 6), 2) if varied and rng.random() < 0.12 else None,
        )
        for index, (at_s, seconds, varied) in enumerate(sorted(plans))
    ]


def _victim(rng: random.Random, fault: Fault, lease_s: float) -> tuple[float, float]:
    """When the task for this fault is sent, and how long it renders."""
    if fault.kind in _OUTAGES:
        return fault.at_s + 0.7 * fault.length_s, rng.uniform(0.3, 2)
    if fault.kind in FROZEN:
        # It shall still render, by its adopter, when the frozen one thaws.
        return fault.at_s - 2, lease_s + rng.uniform(7, 10)
    return fault.at_s - 1.5, rng.uniform(3, 6)


def _lengths(rng: random.Random, number: int, longest: float, total_s: float) -> list[float]:
    """Log-uniform from 0.05 s to *longest* for as many as fit into *total_s*; the others up to 1 s."""
    shortest, short = 0.05, 1.0

    def mean(top: float) -> float:
        return (top - shortest) / math.log(top / shortest)

    share = (total_s / max(1, number) - mean(short)) / (mean(longest) - mean(short))
    return [
        math.exp(rng.uniform(math.log(shortest), math.log(longest if rng.random() < share else short)))
        for _ in range(number)
    ]
