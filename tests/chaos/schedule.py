"""What a run will do, drawn from its seed alone: when what breaks, and which tasks are sent."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

__all__ = ["KINDS", "Fault", "Order", "plan_faults", "plan_orders"]

KINDS = {
    "child killed": "kill -9 of the worker child that renders",
    "worker killed": "kill -9 of a worker's main process",
    "child told to stop": "SIGTERM to the worker child that renders",
    "child frozen": "SIGSTOP of the rendering child past its lease, then SIGCONT",
    "worker frozen": "the same of a worker and all its children",
    "parent frozen": "the same of a worker's main process alone",
    "deploy": "SIGTERM to one worker after the other (once, twice, to its group), each started again",
    "comfy killed": "kill -9 of a ComfyUI server that renders, started again on its port",
    "comfy crashed": "a ComfyUI server dies at one step of its next prompt, started again on its port",
    "comfy frozen": "SIGSTOP of a ComfyUI server that renders, then SIGCONT",
    "api killed": "kill -9 of the API and its processes",
    "valkey killed": "kill -9 of the broker, started again",
    "valkey wiped": "FLUSHALL",
    "valkey silent": "the broker's network is a black hole",
    "valkey refused": "the broker's connections are cut and refused",
    "postgres killed": "kill -9 of PostgreSQL's main process, started again",
    "postgres crashed": "kill -9 of one of PostgreSQL's processes: it recovers by itself",
    "sockets cut": "a ComfyUI server resets its WebSockets",
    "sockets muted": "a ComfyUI server's WebSockets stay open and say nothing",
    "answer lost": "a ComfyUI server takes a prompt and resets the connection instead of answering",
    "storage broken": "nothing can be stored",
}
"""The kinds of fault."""

_LONG = frozenset({"child frozen", "worker frozen", "parent frozen"})
_REST_S = 20.0


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
    priority: str
    sent_twice: bool
    cancel_after_s: float | None


def plan_faults(seed: int, length_s: float, *, postgresql: bool, lease_s: float) -> list[Fault]:
    """Every kind in a shuffled deck, and the deck again, until the time is over."""
    rng = random.Random(f"faults {seed}")
    kinds = [kind for kind in KINDS if postgresql or not kind.startswith("postgres")]
    faults: list[Fault] = []
    # A sweeper reaps only after one lease of unbroken connection: begin where things can recover.
    at_s = lease_s / 2
    deck: list[str] = []
    pause_s = min(8.0, max(3.0, (length_s - _REST_S) / len(kinds) / 2))
    while at_s < length_s - _REST_S:
        if not deck:
            deck = rng.sample(kinds, len(kinds))
        kind = deck.pop()
        length = lease_s + rng.uniform(1.5, 5) if kind in _LONG else rng.uniform(0.3, 5)
        if kind in {"valkey silent", "comfy frozen"}:
            length += rng.uniform(0, 12)
        faults.append(Fault(len(faults), round(at_s, 2), kind, rng.randrange(1000), round(length, 2)))
        at_s += rng.uniform(0.4, 1.6) * pause_s
    return faults


def plan_orders(seed: int, length_s: float, tasks: int) -> list[Order]:
    """Tasks of 0.05 to 10 s, many short and few long, evenly over the time; each with its own colour."""
    rng = random.Random(f"orders {seed}")
    first = rng.randrange(2**24)
    return [
        Order(
            index=index,
            at_s=round(index * (length_s - 10) / tasks + rng.uniform(0, 1), 2),
            seconds=round(math.exp(rng.uniform(math.log(0.05), math.log(10))), 3),
            color=(first + index * 7919) % 2**24,
            priority=rng.choice(["low", "normal", "normal", "high"]),
            sent_twice=rng.random() < 0.1,
            cancel_after_s=round(rng.uniform(0, 6), 2) if rng.random() < 0.1 else None,
        )
        for index in range(tasks)
    ]
