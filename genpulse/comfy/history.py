"""
A finished prompt as ComfyUI's history tells it: how it ended, and every output of every node.

Pure values and parsing. Public messages made here carry no path or address of the server:
:func:`scrub` sees to that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from genpulse.errors import ExecutionFailed, ExecutionInterrupted, OutOfMemory

__all__ = ["HistoryEntry", "NodeFailure", "ServerFile", "ServerOutput", "parse_history", "scrub"]

MESSAGE_LIMIT = 500

_URL = re.compile(r"\b[a-z][a-z0-9+.-]{1,15}://[^\s'\"<>)\]]+", re.IGNORECASE)
_WINDOWS_PATH = re.compile(r"(?:\b[A-Za-z]:|\\)\\[^\s'\"<>|:*?]+")
_UNIX_PATH = re.compile(r"(?<![\w.%<])~?(?:/[^\s/'\"<>:,;()\[\]]+){2,}/?")
_IPV4 = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}(?::\d{1,5})?\b")
_IPV6 = re.compile(r"\[?(?<![\w:])(?:[0-9a-fA-F]{0,4}:){3,7}[0-9a-fA-F]{1,4}\]?(?::\d{1,5})?")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]+")


def scrub(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """
    *text* without URLs, paths and addresses, at most *limit* characters.

    Of a path its last part stays (``<path>/model.safetensors``), since that is what a person needs.
    """
    text = _CONTROL.sub(" ", text[: 20 * limit]).strip()
    text = _URL.sub("<url>", text)
    text = _WINDOWS_PATH.sub(lambda found: _last_part(re.split(r"[\\/]", found.group())), text)
    text = _UNIX_PATH.sub(lambda found: _last_part(found.group().rstrip("/").split("/")), text)
    text = _IPV4.sub("<address>", text)
    text = _IPV6.sub("<address>", text)
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _last_part(parts: list[str]) -> str:
    return "<path>/" + parts[-1]


@dataclass(frozen=True, slots=True)
class ServerFile:
    """A file in one of a server's three folders. Not ours: it can vanish or be written over."""

    filename: str
    subfolder: str = ""
    type: str = "output"
    """``input``, ``output`` or ``temp``; ``temp`` is scratch and wiped at every start of the server."""

    @property
    def reference(self) -> str:
        """How a loader node names this file, for example ``sub/name.png`` or ``name.png [output]``."""
        name = f"{self.subfolder}/{self.filename}" if self.subfolder else self.filename
        return name if self.type == "input" else f"{name} [{self.type}]"


@dataclass(frozen=True, slots=True)
class ServerOutput:
    """One item of a node's UI output: a file, or a text. Exactly one of the two is set."""

    node_id: str
    key: str
    """The node's own word: ``images`` (also videos), ``audio``, ``gifs``, ``text``, …"""
    index: int
    """Place under its key, from 0."""
    file: ServerFile | None = None
    text: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else the item said, for example ``format`` and ``frame_rate``; never a path."""

    @property
    def is_temp(self) -> bool:
        """Whether this is a preview in the server's scratch folder."""
        return self.file is not None and self.file.type == "temp"


@dataclass(frozen=True, slots=True)
class NodeFailure:
    """Which node ended the prompt, and why. ``message`` is scrubbed."""

    node_id: str | None
    class_type: str | None
    exception_type: str
    message: str

    @property
    def out_of_memory(self) -> bool:
        """
        Whether the GPU's memory did not suffice.

        ``torch.OutOfMemoryError``, older ``torch.cuda.OutOfMemoryError``, and the ``RuntimeError`` that
        some extensions raise. A plain ``MemoryError`` is the host's and counts as the node's failure.
        """
        if self.exception_type.rsplit(".", 1)[-1] == "OutOfMemoryError":
            return True
        words = self.message.lower()
        return "out of memory" in words and any(
            name in words for name in ("cuda", "hip", "mps", "xpu", "gpu")
        )


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """How a prompt ended and what it made. Written by the server once, at the very end."""

    prompt_id: str
    status: Literal["success", "error", "interrupted"]
    outputs: tuple[ServerOutput, ...] = ()
    """Files and texts of every node under every key; those of nodes that ended before an error too."""
    error: NodeFailure | None = None
    cached_nodes: tuple[str, ...] = ()
    raw_outputs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    requested: tuple[str, ...] | None = None
    """The output nodes that the server set out to run: without those that were not valid. ``None``: unknown."""

    @property
    def files(self) -> tuple[ServerOutput, ...]:
        """The outputs that are files."""
        return tuple(output for output in self.outputs if output.file is not None)

    @property
    def texts(self) -> tuple[ServerOutput, ...]:
        """The outputs that are texts."""
        return tuple(output for output in self.outputs if output.text is not None)

    def raise_for_status(self) -> None:
        """
        Return if the prompt succeeded.

        Raises:
            OutOfMemory: The GPU's memory did not suffice. Retryable.
            ExecutionFailed: A node raised. Permanent.
            ExecutionInterrupted: Somebody interrupted the prompt. Permanent, unless it was us.
        """
        if self.status == "success":
            return
        failure = self.error
        node_id = failure.node_id if failure else None
        class_type = failure.class_type if failure else None
        if self.status == "interrupted":
            raise ExecutionInterrupted(
                "the prompt was interrupted on its server", node_id=node_id, class_type=class_type
            )
        if failure is None:
            msg = "the prompt failed, and its server does not say why"
            raise ExecutionFailed(msg)
        message = (
            f"{failure.exception_type}: {failure.message}" if failure.message else failure.exception_type
        )
        kind = OutOfMemory if failure.out_of_memory else ExecutionFailed
        raise kind(message or "a node failed", node_id=node_id, class_type=class_type)


def parse_history(prompt_id: str, entry: Mapping[str, Any]) -> HistoryEntry:
    """
    Read one entry of ``GET /history/{id}``. Never raises; odd parts are left out.

    An interrupt is ``status_str: "error"`` too; only the last message tells the two apart, and an
    ``ExecutionBlocked`` error is not the end.
    """
    raw_outputs = entry.get("outputs")
    outputs = raw_outputs if isinstance(raw_outputs, Mapping) else {}
    status = entry.get("status")
    status = status if isinstance(status, Mapping) else {}
    cached: tuple[str, ...] = ()
    ended_by: str | None = None
    failure: NodeFailure | None = None
    for kind, data in _messages(status.get("messages")):
        if kind == "execution_cached":
            nodes = data.get("nodes")
            cached = tuple(node for node in nodes if isinstance(node, str)) if isinstance(nodes, list) else ()
        elif kind == "execution_interrupted" or (
            kind == "execution_error" and data.get("exception_type") != "ExecutionBlocked"
        ):
            ended_by, failure = kind, _failure(data)
    word = status.get("status_str")
    # Very old servers have no status at all; there an entry with outputs is a success.
    if word == "success" or (word is None and outputs):
        verdict: Literal["success", "error", "interrupted"] = "success"
        failure = None
    else:
        verdict = "interrupted" if ended_by == "execution_interrupted" else "error"
    return HistoryEntry(
        prompt_id=prompt_id,
        status=verdict,
        outputs=tuple(_outputs(outputs)),
        error=failure,
        cached_nodes=cached,
        raw_outputs=outputs,
        requested=_requested(entry.get("prompt")),
    )


def _requested(prompt: object) -> tuple[str, ...] | None:
    # [number, id, workflow, extra_data, output nodes]; older and newer servers add to its end.
    nodes = prompt[4] if isinstance(prompt, list) and len(prompt) > 4 else None
    if not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes):
        return None
    return tuple(nodes)


def _messages(found: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for message in found if isinstance(found, list) else ():
        if isinstance(message, list) and len(message) == 2:
            kind, data = message
            if isinstance(kind, str) and isinstance(data, Mapping):
                yield kind, data


def _failure(data: Mapping[str, Any]) -> NodeFailure:
    def text(name: str) -> str | None:
        value = data.get(name)
        return value if isinstance(value, str) else None

    return NodeFailure(
        node_id=text("node_id"),
        class_type=text("node_type"),
        exception_type=scrub(text("exception_type") or "", 100),
        message=scrub(text("exception_message") or ""),
    )


def _outputs(nodes: Mapping[str, Any]) -> Iterator[ServerOutput]:
    for node_id, output in nodes.items():
        if not isinstance(output, Mapping):
            continue
        for key, items in output.items():
            # Flags beside files, like `animated: [true]`, are neither files nor texts.
            if isinstance(key, str) and isinstance(items, list):
                yield from _items(node_id, key, items)


def _items(node_id: str, key: str, items: list[Any]) -> Iterator[ServerOutput]:
    # The server turns a UI value that is a bare string into a list of its characters.
    if len(items) > 1 and all(isinstance(item, str) and len(item) == 1 for item in items):
        items = ["".join(items)]
    for index, item in enumerate(items):
        if isinstance(item, str):
            yield ServerOutput(node_id, key, index, text=item)
        elif isinstance(item, Mapping) and (file := _file(item)) is not None:
            extra = {
                name: value
                for name, value in item.items()
                if name not in {"filename", "subfolder", "type", "fullpath"} and isinstance(name, str)
            }
            yield ServerOutput(node_id, key, index, file=file, extra=extra)


def _file(item: Mapping[str, Any]) -> ServerFile | None:
    filename, subfolder, kind = item.get("filename"), item.get("subfolder"), item.get("type")
    if not isinstance(filename, str) or not filename:
        return None
    return ServerFile(
        filename=filename,
        subfolder=subfolder if isinstance(subfolder, str) else "",
        type=kind if isinstance(kind, str) and kind else "output",
    )
