"""
Many tasks in one request: named one by one, or as a template and a grid of values.

A grid names places in the template's params and the values to put there; the tasks are all its
combinations. A place is a field, ``width``, or one entry of a field that holds an object,
``inputs.seed``; what follows the first dot is one name, dots included (``inputs.6.text``).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from genpulse.config import Settings
from genpulse.errors import InvalidRequest, QueueFull
from genpulse.ledger import Ledger, SourceGone
from genpulse.model import Batch
from genpulse.tasks.registry import Registry
from genpulse.tasks.submit import Locate, Room, any_number, body_digest, prepare
from genpulse.telemetry import metrics

__all__ = ["MAX_TASKS", "Grid", "accept_grid", "accept_tasks"]

MAX_TASKS = 1000
"""Tasks of one batch."""
MAX_COPIED = 1_000_000
"""
JSON values in all the copies that a grid makes of the fields its places lie in.

Each copy is checked and compared by itself, which takes about 4 µs and 140 bytes for each value: a
grid below a workflow of 5,000 nodes would otherwise keep a process busy for minutes, with gigabytes.
"""
_TEXT_AS_VALUE = 8192
"""Characters of a text that take as long as one value: it is looked through, but not copied."""


class Grid:
    """
    A request whose params take every combination of some values.

    The last place varies fastest. What does not vary is the same object in every request.

    Args:
        template: A request as for a single task.
        values: By place, at least one each.

    Raises:
        InvalidRequest: Too many combinations, or a place that cannot be one; with JSON pointers
            below ``/grid``.
    """

    def __init__(self, template: Mapping[str, Any], values: Mapping[str, Sequence[Any]]) -> None:
        self._template = template
        self._values = values
        size = math.prod(len(each) for each in values.values())
        if size > MAX_TASKS:
            sentence = f"The grid makes {size} tasks; a batch has at most {MAX_TASKS}."
            raise InvalidRequest("invalid_request", sentence, [("/grid", sentence)])
        self._places = {name: _place(name) for name in values}
        fields = [field for field, key in self._places.values() if key is None]
        for name, (field, key) in self._places.items():
            problem = None
            if not field or key == "":
                problem = "a place is a field of the params, or <field>.<name>"
            elif key is not None and not isinstance(template["params"].get(field, {}), dict):
                problem = f"the template's {field} is no object, so there is no place in it"
            elif key is not None and field in fields:
                problem = f"the grid varies all of {field} already"
            if problem is not None:
                raise InvalidRequest("invalid_request", problem, [(f"/grid/{_escape(name)}", problem)])

    @property
    def stored_bytes(self) -> int:
        """About what the tasks need beyond what they share, as JSON."""
        size = math.prod(len(each) for each in self._values.values())
        varying = sum(
            size // len(values) * sum(len(json.dumps(value)) for value in values)
            for values in self._values.values()
        )
        own = {name: value for name, value in self._template.items() if name != "params"}
        return varying + size * len(json.dumps(own))

    def check_copies(self) -> None:
        """
        Refuse a grid whose places lie in fields too large to have a copy of in each task.

        Raises:
            InvalidRequest: ``too_large``.
        """
        size = math.prod(len(each) for each in self._values.values())
        params = self._template["params"]
        fields = {field: name for name, (field, key) in self._places.items() if key is not None}
        values = {field: _number_of_values(params.get(field)) for field in fields}
        if size * sum(values.values()) > MAX_COPIED:
            field = max(fields, key=lambda each: values[each])
            sentence = (
                f"{size} copies of {field}, which holds {values[field]} values, are too many: a grid below it "
                f"may make {max(1, MAX_COPIED // sum(values.values()))} tasks. Vary a value of inputs instead, "
                "for which a workflow is not copied."
            )
            raise InvalidRequest("too_large", sentence, [(f"/grid/{_escape(fields[field])}", sentence)])

    def requests(self) -> list[dict[str, Any]]:
        """The template once for each combination."""
        found = []
        for values in itertools.product(*self._values.values()):
            params = dict(self._template["params"])
            objects: dict[str, dict[str, Any]] = {}
            for (field, key), value in zip(self._places.values(), values, strict=True):
                if key is None:
                    params[field] = value
                else:
                    if field not in objects:
                        params[field] = objects[field] = dict(params.get(field, {}))
                    objects[field][key] = value
            found.append({**self._template, "params": params})
        return found

    def locate(self, index: int, pointer: str) -> str:
        """Which value of the grid, or else what in the template, a place in a request comes from."""
        for name, (field, key) in self._places.items():
            place = f"/params/{_escape(field)}"
            if key is not None and (field in self._template["params"] or len(pointer) > len(place)):
                place += f"/{_escape(key)}"
            if pointer == place or pointer.startswith(place + "/"):
                return f"/grid/{_escape(name)}/{self._number(name, index)}{pointer.removeprefix(place)}"
        return f"/template{pointer}"

    def _number(self, name: str, index: int) -> int:
        """Which value of a place the request of this number has."""
        faster = itertools.dropwhile(lambda each: each != name, self._values)
        next(faster)
        return index // math.prod(len(self._values[each]) for each in faster) % len(self._values[name])


def accept_grid(
    ledger: Ledger,
    registry: Registry,
    settings: Settings,
    template: Mapping[str, Any],
    values: Mapping[str, Sequence[Any]],
    *,
    owner: str,
    idempotency_key: str | None = None,
    api_key: str = "",
    room: Room = any_number,
) -> tuple[Batch, bool]:
    """
    Check a grid of tasks and record all of them, or none.

    Args:
        room: Asked whether the owner may have so many more tasks waiting.

    Returns:
        The batch, and whether it is a replay of an earlier request.

    Raises:
        InvalidRequest: One of them makes no task; its pointers are below ``/template`` and ``/grid``.
            ``too_large`` if the tasks differ by more bytes than a request may have, or if a place lies
            in a field too large to be copied for each of them.
        QueueFull: There is no room for so many; nothing was recorded.
        IdempotencyConflict: The key was used with another body.
        LedgerUnavailable: Nothing was recorded, or it is in doubt.
    """
    grid = Grid(template, values)
    if grid.stored_bytes > settings.max_body_bytes:
        sentence = f"What the tasks do not share is more than {settings.max_body_bytes} bytes."
        raise InvalidRequest("too_large", sentence, [("/grid", sentence)])
    grid.check_copies()
    return _accept(
        ledger,
        registry,
        settings,
        grid.requests(),
        grid.locate,
        owner=owner,
        grid=list(values),
        idempotency_key=idempotency_key,
        api_key=api_key,
        room=room,
        # In this order, for the order of the grid's names decides the order of the tasks.
        body_hash=body_digest({"template": template, "grid": list(values.items())}),
    )


def accept_tasks(
    ledger: Ledger,
    registry: Registry,
    settings: Settings,
    tasks: Sequence[Mapping[str, Any]],
    *,
    owner: str,
    idempotency_key: str | None = None,
    api_key: str = "",
    room: Room = any_number,
) -> tuple[Batch, bool]:
    """As :func:`accept_grid`, for tasks named one by one; the pointers are below ``/tasks``."""
    return _accept(
        ledger,
        registry,
        settings,
        _sharing(tasks),
        lambda index, pointer: f"/tasks/{index}{pointer}",
        owner=owner,
        grid=[],
        idempotency_key=idempotency_key,
        api_key=api_key,
        room=room,
        body_hash=body_digest({"tasks": tasks}),
    )


def _accept(
    ledger: Ledger,
    registry: Registry,
    settings: Settings,
    requests: Sequence[Mapping[str, Any]],
    locate: Locate,
    *,
    owner: str,
    grid: Sequence[str],
    idempotency_key: str | None,
    api_key: str,
    body_hash: str,
    room: Room,
) -> tuple[Batch, bool]:
    tasks = prepare(ledger, registry, settings, requests, owner=owner, locate=locate)
    try:
        room(len(tasks))
    except QueueFull:
        # Whoever repeats a request that was taken must learn so, and not that it was not.
        earlier = None
        if idempotency_key:
            earlier = ledger.find_batch_replay(owner, idempotency_key, body_hash, api_key=api_key)
        if earlier is None:
            raise
        return earlier, True
    try:
        batch, replayed = ledger.submit_batch(
            tasks,
            grid=grid,
            idempotency_key=idempotency_key,
            api_key=api_key,
            body_hash=body_hash,
            idempotency_ttl_s=settings.idempotency_ttl_s,
        )
    except SourceGone:
        sentence = "A file that one of the tasks names was deleted just now."
        raise InvalidRequest("missing_asset", sentence, [("", sentence)]) from None
    if not replayed:
        for each in tasks:
            metrics.TASKS_SUBMITTED.add(task_type=each.task_type)
    return batch, replayed


def _sharing(tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The requests with fields of their params that are equal made one object, to be checked once."""
    known: dict[str, Any] = {}
    return [
        {
            **task,
            "params": {
                name: known.setdefault(json.dumps(value), value) if isinstance(value, dict) else value
                for name, value in task["params"].items()
            },
        }
        for task in tasks
    ]


def _number_of_values(value: object) -> int:
    """The size of a JSON value: itself and all that it holds."""
    number, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        number += 1
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            number += len(item) // _TEXT_AS_VALUE
    return number


def _place(name: str) -> tuple[str, str | None]:
    field, dot, key = name.partition(".")
    return field, key if dot else None


def _escape(part: str) -> str:
    """One part of a JSON pointer (RFC 6901)."""
    return part.replace("~", "~0").replace("/", "~1")
