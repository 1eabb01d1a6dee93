"""
Nodes made for tests, all named ``Sim...``: they sleep, fail, block, expand or answer odd ui data at will.

They do what the ``Probe...`` nodes of the recording server did, so its traces can be replayed, under
names that no real server has.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from genpulse.testing.simulator.files import Directories
from genpulse.testing.simulator.nodes.registry import (
    Blocked,
    Images,
    NodeContext,
    NodeFunction,
    Outcome,
    node,
    server_file,
)

_MODULE = "custom_nodes.genpulse_simulator"
_IMAGE = {"image": ("IMAGE",)}
_SECONDS = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 3600.0, "step": 0.01})
_SEED = ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF})


class SimulatedOutOfMemory(Exception):
    """Raised where torch would raise; reported under torch's name, with the tips ComfyUI adds [trace 06]."""


class Unserialisable:
    """A ui value that JSON cannot express; on the wire it kills the server [trace 42]."""


def _passed_on(image: Images | None) -> Images:
    return image if image is not None else Images([Image.new("RGB", (64, 64), (128, 128, 128))])


def _sim(name: str, **declaration: Any) -> Callable[[NodeFunction], NodeFunction]:
    return node(name, **{"module": _MODULE, "category": "simulator", **declaration})


@_sim(
    "SimSleep",
    required={"seconds": _SECONDS},
    optional={
        "image": ("IMAGE",),
        "steps": ("INT", {"default": 4, "min": 1, "max": 10000}),
        "preview": ("BOOLEAN", {"default": False}),
        "seed": _SEED,
    },
    returns=("IMAGE",),
)
def sim_sleep(
    ctx: NodeContext,
    seconds: float,
    image: Images | None = None,
    steps: int = 4,
    preview: bool = False,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Sleep in steps with progress, then pass the image on (a grey one if none); *seed* defeats the cache."""
    del seed
    image = _passed_on(image)
    for step in range(1, steps + 1):
        ctx.sleep(seconds / steps)
        ctx.progress(step, steps, ("JPEG", image[0]) if preview else None)
    return (image,)


@_sim(
    "SimUninterruptible",
    required={"seconds": _SECONDS},
    optional={"image": ("IMAGE",), "steps": ("INT", {"default": 1, "min": 1, "max": 10000}), "seed": _SEED},
    returns=("IMAGE",),
)
def sim_uninterruptible(
    ctx: NodeContext, seconds: float, image: Images | None = None, steps: int = 1, seed: int = 0
) -> tuple[Any, ...]:
    """Sleep without ever looking for an interrupt or reporting progress [trace 07]."""
    del steps, seed
    ctx.sleep(seconds, interruptible=False)
    return (_passed_on(image),)


@_sim(
    "SimFail",
    required={"message": ("STRING", {"default": "simulated failure"})},
    optional={
        "image": ("IMAGE",),
        "kind": (["ValueError", "RuntimeError", "OOM", "MemoryError"], {"default": "ValueError"}),
    },
    returns=("IMAGE",),
)
def sim_fail(
    _ctx: NodeContext, message: str, image: Images | None = None, kind: str = "ValueError"
) -> tuple[Any, ...]:
    """Raise an exception of the named kind [trace 06]."""
    del image
    kinds = {
        "ValueError": ValueError,
        "RuntimeError": RuntimeError,
        "OOM": SimulatedOutOfMemory,
        "MemoryError": MemoryError,
    }
    raise kinds[kind](message)


@_sim(
    "SimOOM",
    required={},
    optional={"image": ("IMAGE",), "message": ("STRING", {"default": "Allocation on device "})},
    returns=("IMAGE",),
)
def sim_oom(
    _ctx: NodeContext, image: Images | None = None, message: str = "Allocation on device "
) -> tuple[Any, ...]:
    """Run out of GPU memory."""
    del image
    raise SimulatedOutOfMemory(message)


@_sim("SimText", required={"text": ("STRING", {"default": "hello"})}, returns=("STRING",), output_node=True)
def sim_text(_ctx: NodeContext, text: str) -> Outcome:
    """A text output, in the history under ``text``."""
    return Outcome(values=(text,), ui={"text": [text]})


@_sim("SimUi", required={"ui_json": ("STRING", {"default": "{}", "multiline": True})}, output_node=True)
def sim_ui(_ctx: NodeContext, ui_json: str) -> Outcome:
    """Any ui data, as custom nodes give them; also NaN, and bare strings, which fall apart into letters."""
    return Outcome(ui={key: list(value) for key, value in json.loads(ui_json).items()})


@_sim("SimUiObject", required={"text": ("STRING", {"default": "a"})}, output_node=True)
def sim_ui_object(_ctx: NodeContext, text: str) -> Outcome:
    """A ui value that is no JSON: the server dies, or its history is stuck at 500 [trace 42]."""
    return Outcome(ui={"text": [text], "broken": [Unserialisable()]})


@_sim(
    "SimFile",
    required={
        "filename_prefix": ("STRING", {"default": "ComfyUI"}),
        "extension": ("STRING", {"default": "mp4"}),
        "key": ("STRING", {"default": "gifs"}),
        "content": ("STRING", {"default": "simulated", "multiline": True}),
    },
    optional={
        "kind": (["output", "temp"], {"default": "output"}),
        "seed": _SEED,
        "zeros": ("INT", {"default": 0, "min": 0, "max": 2**40}),
    },
    output_node=True,
)
def sim_file(
    ctx: NodeContext,
    filename_prefix: str,
    extension: str,
    key: str,
    content: str,
    kind: str = "output",
    seed: int = 0,
    zeros: int = 0,
) -> Outcome:
    """A file of any name, bytes and size under any key of the history, as custom nodes make them."""
    del seed
    place = ctx.files.save_path(filename_prefix, temp=kind == "temp")
    path = place.next_file(f".{extension}")
    path.write_bytes(content.encode())
    if zeros:
        os.truncate(path, path.stat().st_size + zeros)  # a hole: it takes no room on the disk
    ctx.written(path)
    return Outcome(ui={key: [server_file(path, place.subfolder, kind)]})


def _not_negative(_files: Directories, inputs: Mapping[str, Any]) -> str | None:
    return "n must not be negative" if inputs["n"] < 0 else None


@_sim(
    "SimValidate",
    required={"n": ("INT", {"default": 0, "min": -10, "max": 10})},
    output_node=True,
    validate=_not_negative,
    validated=("n",),
)
def sim_validate(_ctx: NodeContext, n: int) -> Outcome:
    """A node with a check of its own: negative numbers are refused with ``custom_validation_failed``."""
    return Outcome(ui={"text": [str(n)]})


@_sim("SimBlock", required={**_IMAGE, "message": ("STRING", {"default": ""})}, returns=("IMAGE",))
def sim_block(_ctx: NodeContext, image: Images, message: str) -> tuple[Any, ...]:
    """Block what depends on it; with a message, an ``execution_error`` that is not final [trace 21]."""
    del image
    return (Blocked(message or None),)


@_sim("SimExpand", required={"color": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFF})}, returns=("IMAGE",))
def sim_expand(_ctx: NodeContext, color: int) -> Outcome:
    """Expand into two nodes with ephemeral ids [trace 21]."""
    empty = {"width": 32, "height": 32, "batch_size": 1, "color": color}
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": empty},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    }
    return Outcome(values=(["2", 0],), expand=graph)


@_sim(
    "SimAsync",
    required={**_IMAGE, "seconds": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 600.0, "step": 0.01})},
    returns=("IMAGE",),
    in_background=True,
)
def sim_async(ctx: NodeContext, image: Images, seconds: float) -> tuple[Any, ...]:
    """A coroutine node: the next one starts while this one sleeps [trace 21]."""
    ctx.sleep(seconds)
    return (image,)


@_sim("SimStatusText", required={**_IMAGE, "text": ("STRING", {"default": "working"})}, returns=("IMAGE",))
def sim_status_text(ctx: NodeContext, image: Images, text: str) -> tuple[Any, ...]:
    """Send a text frame, binary event 3."""
    ctx.send_text(text)
    return (image,)


@_sim(
    "SimNoise",
    required={
        "width": ("INT", {"default": 512, "min": 1, "max": 8192}),
        "height": ("INT", {"default": 512, "min": 1, "max": 8192}),
        "batch": ("INT", {"default": 1, "min": 1, "max": 256}),
    },
    optional={"seed": _SEED},
    returns=("IMAGE",),
)
def sim_noise(_ctx: NodeContext, width: int, height: int, batch: int, seed: int = 0) -> tuple[Any, ...]:
    """Random pixels, which no compression makes smaller."""
    dice = random.Random(seed)  # noqa: S311  pixels, no secret
    size = width * height * 3
    return (Images(Image.frombytes("RGB", (width, height), dice.randbytes(size)) for _ in range(batch)),)


@_sim("SimNeverCached", required=_IMAGE, returns=("IMAGE",), fingerprint=lambda _files, _inputs: math.nan)
def sim_never_cached(_ctx: NodeContext, image: Images) -> tuple[Any, ...]:
    """Pass the image on; runs each time."""
    return (image,)
