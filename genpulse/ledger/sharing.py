"""
What the params of a batch's tasks have in common, taken out and put back.

A thousand tasks of one workflow would otherwise store it a thousand times. Two levels are looked
at: a field of the params that is the same for all, and, in a field that holds an object with the
same keys for all, each key. So a batch shares its workflow down to the nodes, and a large picture
among inputs that vary otherwise. :func:`join` gives back exactly what went in, order included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Shared", "join", "split"]


def split(params: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    Take out what all *params* have in common.

    Quick where they hold the same objects; equal ones are found too.

    Returns:
        The shared part, and for each task what is left. A key of the shared part that varies keeps
        its place there with the value ``None``.
    """
    first = params[0]
    shared: dict[str, Any] = {}
    varying: dict[str, list[str] | None] = {}
    if any(list(each) != list(first) for each in params):
        return {}, [dict(each) for each in params]
    for name, value in first.items():
        if all(_same(each[name], value) for each in params):
            shared[name] = value
        elif _have_same_keys([each[name] for each in params]):
            keys = [key for key in value if not all(_same(each[name][key], value[key]) for each in params)]
            shared[name] = {**value, **dict.fromkeys(keys)}
            varying[name] = keys
        else:
            shared[name] = None
            varying[name] = None
    own = [
        {
            name: each[name] if keys is None else {key: each[name][key] for key in keys}
            for name, keys in varying.items()
        }
        for each in params
    ]
    return shared, own


def join(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """One task's params again."""
    whole = {**shared, **own}
    for name, value in own.items():
        common = shared.get(name)
        if isinstance(common, dict) and isinstance(value, dict):
            whole[name] = {**common, **value}
    return whole


class Shared:
    """
    The shared part of some tasks, read once for all of them.

    Args:
        batch_id: The batch that keeps it.
    """

    def __init__(self, batch_id: str, params: Mapping[str, Any]) -> None:
        self.batch_id = batch_id
        self.params = params
        self._sizes: dict[str, int] = {}
        self._compared: dict[str, tuple[object, bool]] = {}

    @property
    def size(self) -> int:
        """About how many bytes it has as JSON."""
        return sum(map(self._size_of, self.params))

    def copied(self, own: Mapping[str, Any]) -> int:
        """About how many bytes of it :func:`join` copies for a task, instead of handing the same object on."""
        return sum(
            self._size_of(name)
            for name, value in own.items()
            if isinstance(value, dict) and isinstance(self.params.get(name), dict)
        )

    def rest_of(self, params: Mapping[str, Any]) -> dict[str, Any] | None:
        """
        What is left of *params* without it: :func:`join` gives back exactly what went in.

        Quick for a field that is the same object as the time before.

        Returns:
            ``None`` if these params cannot be made of it.
        """
        own: dict[str, Any] = {}
        for name, value in params.items():
            common = self.params.get(name)
            if name not in self.params or not isinstance(common, dict) or not isinstance(value, dict):
                if name not in self.params or not _same(value, common):
                    own[name] = value
            elif list(value) != list(common):
                return None
            elif not self._is_same(name, value):
                own[name] = {key: value[key] for key in value if not _same(value[key], common[key])}
        return own if list(join(self.params, own)) == list(params) else None

    def _is_same(self, name: str, value: object) -> bool:
        former, answer = self._compared.get(name, (None, False))
        if former is not value:
            answer = _same(value, self.params[name])
            self._compared[name] = (value, answer)
        return answer

    def _size_of(self, name: str) -> int:
        if name not in self._sizes:
            self._sizes[name] = len(json.dumps(self.params[name]))
        return self._sizes[name]


def _same(one: object, other: object) -> bool:
    """Equal and of one kind: ``1``, ``1.0`` and ``True`` are different JSON."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float):
        return repr(one) == repr(other)  # 0.0 and -0.0 are equal, and not the same
    return one == other


def _have_same_keys(values: Sequence[object]) -> bool:
    first = values[0]
    return (
        isinstance(first, dict)
        and bool(first)
        and all(isinstance(each, dict) and list(each) == list(first) for each in values)
    )
