"""
What a node of the simulator is: a declaration as ``/object_info`` shows it, and a function that runs it.

A node function gets a :class:`NodeContext` and its inputs by name and returns an :class:`Outcome`, or
simply the tuple of its output values. Images are tuples of Pillow images, one for each item of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from genpulse.testing.simulator.files import Directories

__all__ = [
    "NODES",
    "Blocked",
    "Images",
    "NodeContext",
    "NodeFunction",
    "NodeSpec",
    "Outcome",
    "node",
    "server_file",
]


class Images(tuple[Image.Image, ...]):
    """A batch. Its text is short, since error messages carry the inputs of the node that failed."""

    __slots__ = ()

    def __str__(self) -> str:
        width, height = self[0].size if self else (0, 0)
        return f"tensor({len(self)}x{height}x{width}x3)"

    __repr__ = __str__


class NodeContext(Protocol):
    """What the engine offers to a running node."""

    node_id: str
    files: Directories
    prompt: Mapping[str, Any]
    extra_pnginfo: Mapping[str, Any] | None
    previews: bool
    step_s: float
    """How long a sampler step takes."""

    def progress(self, value: int, maximum: int, preview: tuple[str, Image.Image] | None = None) -> None:
        """
        Report a step: ``progress_state``, ``progress`` and the preview (a Pillow format and an image).

        Raises:
            Interrupted: Somebody asked for it since the last check.
        """

    def check_interrupt(self) -> None:
        """Raise ``Interrupted`` if somebody asked for it."""

    def sleep(self, seconds: float, *, interruptible: bool = True) -> None:
        """Wait; looks for an interrupt every 50 ms unless told not to. Ends at once with the server."""

    def send_text(self, text: str) -> None:
        """A text frame (binary event 3) for this node."""

    def written(self, path: Path) -> None:
        """Tell the execution log about a file this run really wrote."""


@dataclass(frozen=True)
class Blocked:
    """In place of an output value: nodes that get it do not run; with a message it is reported."""

    message: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a node made: output values, ui data for the history, or a subgraph to run in its place."""

    values: tuple[Any, ...] = ()
    ui: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    expand: Mapping[str, Any] | None = None
    """Nodes by local id; *values* may then hold links ``[local id, slot]`` into them."""


NodeFunction = Callable[..., "Outcome | tuple[Any, ...]"]


@dataclass(frozen=True)
class NodeSpec:
    """One class of nodes; the fields are those of ``/object_info``."""

    name: str
    run: NodeFunction
    required: Mapping[str, tuple[Any, ...]]
    optional: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    hidden: Mapping[str, str] = field(default_factory=dict)
    returns: tuple[str, ...] = ()
    output_node: bool = False
    display_name: str | None = None
    description: str = ""
    module: str = "nodes"
    category: str = "image"
    validate: Callable[[Directories, Mapping[str, Any]], str | None] | None = None
    """A check of its own, over the inputs in *validated*; returns what is wrong."""
    validated: tuple[str, ...] = ()
    fingerprint: Callable[[Directories, Mapping[str, Any]], object] | None = None
    """Part of the cache key beyond the inputs; a value that never equals itself means never cached."""
    in_background: bool = False
    """A coroutine node of ComfyUI: the next node starts before this one has finished."""

    def declared(self, name: str) -> tuple[Any, str, Mapping[str, Any]] | None:
        """Type, ``required`` or ``optional``, and options of an input; None if there is no such input."""
        for category, group in (("required", self.required), ("optional", self.optional)):
            if name in group:
                declaration = group[name]
                return declaration[0], category, declaration[1] if len(declaration) > 1 else {}
        return None

    def object_info(self, files: Directories) -> dict[str, Any]:
        """The description as ``GET /object_info/{class}`` gives it [trace 22]."""
        inputs: dict[str, Any] = {"required": {k: list(v) for k, v in self.required.items()}}
        if self.optional:
            inputs["optional"] = {k: list(v) for k, v in self.optional.items()}
        if self.hidden:
            inputs["hidden"] = dict(self.hidden)
        if self.name == "LoadImage":
            inputs["required"]["image"] = [files.input_names(), {"image_upload": True}]
        return {
            "input": inputs,
            "input_order": {group: list(names) for group, names in inputs.items()},
            "output": list(self.returns),
            "output_is_list": [False] * len(self.returns),
            "output_name": list(self.returns),
            "name": self.name,
            "display_name": self.display_name or self.name,
            "description": self.description,
            "python_module": self.module,
            "category": self.category,
            "output_node": self.output_node,
        }


NODES: dict[str, NodeSpec] = {}
"""Every node class this server knows, by name; filled by importing the modules of this package."""


def node(name: str, **declaration: Any) -> Callable[[NodeFunction], NodeFunction]:
    """Register the decorated function as the node class *name*; the keywords are those of NodeSpec."""

    def register(function: NodeFunction) -> NodeFunction:
        NODES[name] = NodeSpec(name=name, run=function, **declaration)
        return function

    return register


def server_file(path: Path, subfolder: str, kind: str) -> dict[str, str]:
    """A file item as it stands in the history."""
    return {"filename": path.name, "subfolder": subfolder, "type": kind}
