"""
What a ComfyUI server says on its socket, as frozen values. Parsing only: no I/O, and never an error.

The socket is lossy and never replays, custom nodes and newer versions send types nobody knows, and a
node may put anything into its UI data. So whatever is not understood becomes :class:`Unknown`, and
a known type with a missing or odd field does too: no half-filled event reaches a caller.

Source: ComfyUI 0.3.64 ``server.py``, ``execution.py``, ``comfy_execution/progress.py``, and recordings.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

__all__ = [
    "Event",
    "Executed",
    "Executing",
    "ExecutionCached",
    "ExecutionError",
    "ExecutionInterrupted",
    "ExecutionStart",
    "ExecutionSuccess",
    "FeatureFlags",
    "NodeState",
    "PreviewImage",
    "Progress",
    "ProgressDetail",
    "ProgressMeter",
    "ProgressState",
    "Running",
    "Status",
    "TextFrame",
    "Unknown",
    "parse_binary",
    "parse_text",
    "prompt_of",
]


@dataclass(frozen=True, slots=True)
class Unknown:
    """A message this version does not know or cannot read. Ignore it."""

    type: str


@dataclass(frozen=True, slots=True)
class Status:
    """Sent to every socket whenever the queue changes, and first of all on a new socket."""

    queue_remaining: int
    """Pending and running prompts together."""
    sid: str | None = None
    """The client id as the server knows it; only in the first message of a socket."""


@dataclass(frozen=True, slots=True)
class FeatureFlags:
    """The server's answer to the client's own ``feature_flags``."""

    flags: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ExecutionStart:
    """The prompt left the queue and runs."""

    prompt_id: str


@dataclass(frozen=True, slots=True)
class ExecutionCached:
    """Comes once in every run, with no nodes if nothing was cached. Ends nothing."""

    prompt_id: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Executing:
    """
    A node starts; or, with ``node`` ``None``, the very last message of a prompt, however it ended.

    ``prompt_id`` is ``None`` only in the one message that a reconnecting client gets about its
    running prompt. ``node`` may be an ephemeral id like ``1.0.0.2`` of a node that expanded;
    ``display_node`` is then the node of the workflow it stands for.
    """

    node: str | None
    prompt_id: str | None
    display_node: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Step ``value`` of ``max`` in a node. Counts from 0 in ``SaveImageWebsocket``, from 1 in samplers."""

    node: str | None
    value: float
    max: float
    prompt_id: str | None


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node in a :class:`ProgressState`."""

    node_id: str
    value: float
    max: float
    finished: bool
    display_node_id: str


@dataclass(frozen=True, slots=True)
class ProgressState:
    """All nodes the prompt has touched so far."""

    prompt_id: str
    nodes: tuple[NodeState, ...]


@dataclass(frozen=True, slots=True)
class Executed:
    """A node with UI output ended. ``output`` is ``None`` for a cached node that had none."""

    node: str
    output: Mapping[str, Any] | None
    prompt_id: str


@dataclass(frozen=True, slots=True)
class ExecutionSuccess:
    """All nodes ran. *Not* the end: the history entry is written after this message."""

    prompt_id: str


@dataclass(frozen=True, slots=True)
class ExecutionError:
    """
    A node raised. The text may hold paths of the server.

    Not always the end: with ``exception_type`` ``ExecutionBlocked`` the prompt goes on, and usually
    succeeds; ``final`` is ``False`` then.
    """

    prompt_id: str
    node_id: str | None
    node_type: str | None
    exception_type: str
    exception_message: str

    @property
    def final(self) -> bool:
        """Whether the prompt ends with this error."""
        return self.exception_type != "ExecutionBlocked"


@dataclass(frozen=True, slots=True)
class ExecutionInterrupted:
    """Somebody interrupted the prompt."""

    prompt_id: str
    node_id: str | None
    node_type: str | None


@dataclass(frozen=True, slots=True)
class PreviewImage:
    """
    An encoded picture sent over the socket: a sampler's preview, or a result of ``SaveImageWebsocket``.

    Which of the two only the node's class tells. Binary event 1 names no node and no prompt (both are
    ``None`` here; take them from the last :class:`Executing`), event 4 names both.
    """

    image_type: str
    """``image/jpeg`` or ``image/png``."""
    data: bytes = field(repr=False)
    node_id: str | None = None
    prompt_id: str | None = None
    display_node_id: str | None = None


@dataclass(frozen=True, slots=True)
class TextFrame:
    """Text a node shows while it runs (binary event 3)."""

    node_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Running:
    """Ours, not ComfyUI's: the prompt was seen running for the first time, by socket or by polling."""

    prompt_id: str


Event: TypeAlias = (
    Unknown
    | Status
    | FeatureFlags
    | ExecutionStart
    | ExecutionCached
    | Executing
    | Progress
    | ProgressState
    | Executed
    | ExecutionSuccess
    | ExecutionError
    | ExecutionInterrupted
    | PreviewImage
    | TextFrame
    | Running
)


class _OddError(Exception):
    """A message of a known type does not have the shape of its type."""


def parse_text(message: str | bytes) -> Event:
    """
    Read one text message. Never raises: what cannot be read is :class:`Unknown`.

    Bare ``NaN`` and ``Infinity`` are taken, since a node's UI values go through the server unchanged.
    """
    try:
        found = json.loads(message)
    except (ValueError, RecursionError):
        return Unknown("")
    if not isinstance(found, dict) or not isinstance(found.get("type"), str):
        return Unknown("")
    kind: str = found["type"]
    data = found.get("data")
    reader = _READERS.get(kind)
    if reader is None or not isinstance(data, dict):
        return Unknown(kind)
    try:
        return reader(data)
    except _OddError:
        return Unknown(kind)


def parse_binary(frame: bytes) -> Event:
    """
    Read one binary message: events 1 and 4 are pictures, 3 is text. Never raises.

    Source: ComfyUI ``server.py`` ``encode_bytes``, ``send_image``, ``send_image_with_metadata``;
    all numbers are big-endian ``u32``.
    """
    if len(frame) < 8:
        return Unknown("binary")
    kind, word = struct.unpack_from(">II", frame)
    if kind == 1 and word in _IMAGE_TYPES:
        return PreviewImage(image_type=_IMAGE_TYPES[word], data=frame[8:])
    if kind == 3:
        return _text_frame(frame, word)
    if kind == 4:
        return _picture_with_metadata(frame, word)
    return Unknown(f"binary {kind}")


def prompt_of(event: Event) -> str | None:
    """The prompt an event belongs to; ``None`` if it does not say."""
    return getattr(event, "prompt_id", None)


_IMAGE_TYPES = {1: "image/jpeg", 2: "image/png"}


def _text_frame(frame: bytes, length: int) -> Event:
    end = 8 + length
    if end > len(frame):
        return Unknown("binary 3")
    return TextFrame(
        node_id=frame[8:end].decode("utf-8", "replace"), text=frame[end:].decode("utf-8", "replace")
    )


def _picture_with_metadata(frame: bytes, length: int) -> Event:
    end = 8 + length
    if end > len(frame):
        return Unknown("binary 4")
    try:
        about = json.loads(frame[8:end])
    except (ValueError, RecursionError):
        return Unknown("binary 4")
    if not isinstance(about, dict):
        return Unknown("binary 4")
    try:
        return PreviewImage(
            image_type=_str(about, "image_type"),
            data=frame[end:],
            node_id=_str_or_none(about, "node_id"),
            prompt_id=_str_or_none(about, "prompt_id"),
            display_node_id=_str_or_none(about, "display_node_id"),
        )
    except _OddError:
        return Unknown("binary 4")


def _str(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise _OddError(name)
    return value


def _str_or_none(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    return value if isinstance(value, str) else None


def _number(data: Mapping[str, Any], name: str) -> float:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _OddError(name)
    try:
        number = float(value)
    except OverflowError:
        raise _OddError(name) from None
    if not math.isfinite(number):
        raise _OddError(name)
    return number


def _status(data: Mapping[str, Any]) -> Event:
    status = data.get("status")
    info = status.get("exec_info") if isinstance(status, dict) else None
    if not isinstance(info, dict):
        raise _OddError("status")
    return Status(queue_remaining=int(_number(info, "queue_remaining")), sid=_str_or_none(data, "sid"))


def _cached(data: Mapping[str, Any]) -> Event:
    nodes = data.get("nodes")
    if not isinstance(nodes, list):
        raise _OddError("nodes")
    return ExecutionCached(_str(data, "prompt_id"), tuple(node for node in nodes if isinstance(node, str)))


def _executing(data: Mapping[str, Any]) -> Event:
    node = data.get("node")
    if node is not None and not isinstance(node, str):
        raise _OddError("node")
    return Executing(
        node=node,
        prompt_id=_str_or_none(data, "prompt_id"),
        display_node=_str_or_none(data, "display_node"),
    )


def _progress(data: Mapping[str, Any]) -> Event:
    return Progress(
        node=_str_or_none(data, "node"),
        value=_number(data, "value"),
        max=_number(data, "max"),
        prompt_id=_str_or_none(data, "prompt_id"),
    )


def _progress_state(data: Mapping[str, Any]) -> Event:
    nodes = data.get("nodes")
    if not isinstance(nodes, dict):
        raise _OddError("nodes")
    states = []
    for node_id, state in nodes.items():
        if not isinstance(state, dict):
            continue
        try:
            value, maximum = _number(state, "value"), _number(state, "max")
        except _OddError:
            continue
        states.append(
            NodeState(
                node_id=node_id,
                value=value,
                max=maximum,
                finished=state.get("state") == "finished",
                display_node_id=_str_or_none(state, "display_node_id") or node_id,
            )
        )
    return ProgressState(_str(data, "prompt_id"), tuple(states))


def _executed(data: Mapping[str, Any]) -> Event:
    output = data.get("output")
    return Executed(
        node=_str(data, "node"),
        output=output if isinstance(output, dict) else None,
        prompt_id=_str(data, "prompt_id"),
    )


def _error(data: Mapping[str, Any]) -> Event:
    return ExecutionError(
        prompt_id=_str(data, "prompt_id"),
        node_id=_str_or_none(data, "node_id"),
        node_type=_str_or_none(data, "node_type"),
        exception_type=_str_or_none(data, "exception_type") or "",
        exception_message=_str_or_none(data, "exception_message") or "",
    )


def _interrupted(data: Mapping[str, Any]) -> Event:
    return ExecutionInterrupted(
        _str(data, "prompt_id"), _str_or_none(data, "node_id"), _str_or_none(data, "node_type")
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], Event]] = {
    "status": _status,
    "feature_flags": FeatureFlags,
    "execution_start": lambda data: ExecutionStart(_str(data, "prompt_id")),
    "execution_cached": _cached,
    "executing": _executing,
    "progress": _progress,
    "progress_state": _progress_state,
    "executed": _executed,
    "execution_success": lambda data: ExecutionSuccess(_str(data, "prompt_id")),
    "execution_error": _error,
    "execution_interrupted": _interrupted,
}


@dataclass(frozen=True, slots=True)
class ProgressDetail:
    """Where a prompt is. ``step`` and ``steps`` belong to the node, and are ``None`` without steps."""

    nodes_total: int
    nodes_done: int = 0
    node_id: str | None = None
    class_type: str | None = None
    step: int | None = None
    steps: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON shape of API.md's ``progress_detail``."""
        return {
            "node_id": self.node_id,
            "class_type": self.class_type,
            "step": self.step,
            "steps": self.steps,
            "nodes_done": self.nodes_done,
            "nodes_total": self.nodes_total,
        }


class ProgressMeter:
    """
    Turns the events of one prompt into a percentage that never falls. Pure; feed it every event.

    A node counts one, a node with a literal ``steps`` counts its steps, so that twenty sampler steps
    are not the same as loading a prompt. Cached nodes count as done. 100 only after ``ExecutionSuccess``.
    """

    def __init__(self, workflow: Mapping[str, Any]) -> None:
        self._classes: dict[str, str] = {}
        self._weights: dict[str, float] = {}
        for node_id, node in workflow.items():
            inputs = node.get("inputs") if isinstance(node, Mapping) else None
            steps = inputs.get("steps") if isinstance(inputs, Mapping) else None
            is_count = isinstance(steps, int) and not isinstance(steps, bool)
            self._weights[node_id] = float(max(1, min(steps, 200))) if is_count and steps else 1.0
            kind = node.get("class_type") if isinstance(node, Mapping) else None
            self._classes[node_id] = kind if isinstance(kind, str) else ""
        self._total = sum(self._weights.values()) or 1.0
        self._shares: dict[str, float] = {}
        self._done: set[str] = set()
        self.percent = 0.0
        """0 to 100, never less than before."""
        self.detail = ProgressDetail(nodes_total=len(self._weights))

    def update(self, event: Event) -> bool:
        """Take in one event; returns whether ``percent`` or ``detail`` changed."""
        before = (self.percent, self.detail)
        match event:
            case ExecutionCached(nodes=nodes):
                self._done |= set(nodes) & self._weights.keys()
            case Executing(node=str(node), display_node=display):
                self._enter(display if display in self._weights else node)
            case Progress(node=str(node), value=value, max=maximum):
                self._step(node, value, maximum)
            case ProgressState(nodes=nodes):
                self._take_states(nodes)
            case Executed(node=node) if node in self._weights:
                self._done.add(node)
            case ExecutionSuccess():
                self._done |= self._weights.keys()
                self.percent = 100.0
            case _:
                return False
        if self.percent < 100.0:
            self.percent = max(self.percent, min(99.0, self._sum()))
        self.detail = replace(self.detail, nodes_done=len(self._done))
        return (self.percent, self.detail) != before

    def _sum(self) -> float:
        parts = (
            weight * (1.0 if node in self._done else self._shares.get(node, 0.0))
            for node, weight in self._weights.items()
        )
        return round(100.0 * sum(parts) / self._total, 1)

    def _enter(self, node: str) -> None:
        if node == self.detail.node_id:
            return
        self.detail = replace(
            self.detail, node_id=node, class_type=self._classes.get(node), step=None, steps=None
        )

    def _step(self, node: str, value: float, maximum: float) -> None:
        share = min(1.0, max(0.0, value / maximum)) if maximum > 0 else 0.0
        if node in self._weights:
            self._enter(node)
            self._shares[node] = max(share, self._shares.get(node, 0.0))
        if maximum > 1:
            self.detail = replace(self.detail, step=int(value), steps=int(maximum))

    def _take_states(self, states: tuple[NodeState, ...]) -> None:
        for state in states:
            node = state.node_id
            if node not in self._weights:
                continue
            if state.finished:
                self._done.add(node)
            elif state.max > 0:
                share = min(1.0, max(0.0, state.value / state.max))
                self._shares[node] = max(share, self._shares.get(node, 0.0))
