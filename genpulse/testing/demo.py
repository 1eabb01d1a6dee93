"""
``genpulse demo``: from nothing to a picture that took the whole way, shown as it happens.

The stack is the one of ``start-all``, the workflow goes in through ``POST /task`` like anybody's,
and the end is checked: the downloaded bytes are those on disk, they open as an image of the asked
size, and its pixels are what was asked for. Only then is the exit code 0.
"""

from __future__ import annotations

import io
import json
import secrets
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpulse.client import ApiRefused, ApiUnreachable, Client, DownloadDamaged, WaitTimeout
from genpulse.config import Settings
from genpulse.terminal import error_line, showing
from genpulse.testing.embedded import (
    EmbeddedStack,
    StackError,
    StackOptions,
    comfy_at,
    exit_code,
    show_stack,
    speaker,
    until_signaled,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CORE_WORKFLOW", "TEXT_TO_IMAGE", "check_picture", "run_demo"]

PICTURE_S = 300.0
"""How long the one picture may take, a real ComfyUI's first steps included."""
WIDTH, HEIGHT = 640, 384
COLOR = 0x1F6FB2
"""What ``EmptyImage`` is filled with in the workflow for real servers; the picture is its inverse."""

TEXT_TO_IMAGE: dict[str, dict[str, Any]] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 1, "steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
        "_meta": {"title": "INPUT_seed"},
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": WIDTH, "height": HEIGHT, "batch_size": 1}},
    "6": {
        "class_type": "CLIPTextEncode",
        "inputs": {"text": "a lighthouse at dawn", "clip": ["4", 1]},
        "_meta": {"title": "INPUT_prompt"},
    },
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "genpulse/demo", "images": ["8", 0]}},
}  # fmt: skip
"""The usual text-to-image graph. On the simulator it draws a stand-in from text and seed."""

CORE_WORKFLOW: dict[str, dict[str, Any]] = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": WIDTH // 2, "height": HEIGHT // 2, "batch_size": 1, "color": COLOR},
    },
    "2": {
        "class_type": "ImageScale",
        "inputs": {
            "image": ["1", 0], "upscale_method": "nearest-exact", "width": WIDTH, "height": HEIGHT, "crop": "disabled",
        },
    },
    "3": {"class_type": "ImageInvert", "inputs": {"image": ["2", 0]}},
    "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "genpulse/demo"}},
}  # fmt: skip
"""Nodes that every ComfyUI has and that need no model; one colour, known to the bit."""


class DemoFailed(Exception):
    """The picture did not come, or is not the right one."""


@dataclass(frozen=True, slots=True)
class _Picture:
    """Where the checked picture is."""

    task_id: str
    path: Path
    url: str
    size: tuple[int, int]


def run_demo(settings: Settings, options: StackOptions, console: Console, *, once: bool) -> int:
    """
    Start the stack, make one picture, say where it is; stay up unless *once*.

    Returns:
        0 when the picture was checked, 1 when it failed, 130 for Ctrl-C before the end of that.

    Raises:
        StackError: The stack cannot start, or the named ComfyUI does not answer.
    """
    say = speaker(console)
    for server in settings.servers:
        if not comfy_at(server.url):
            msg = f"no ComfyUI answers at {server.url}; is it running there?"
            raise StackError(msg, exit_code=3)
    stack = EmbeddedStack(settings, options, say=say)
    code = 1
    done = False
    with until_signaled(stack, console) as signaled:
        say("starting Valkey, ComfyUI or its simulator, the API and a worker …")
        stack.start()
        show_stack(stack, console)
        try:
            with Client(stack.api_url, stack.settings.api_key.get_secret_value()) as client:
                picture = _make(stack, client, console)
        except (ApiRefused, ApiUnreachable, DownloadDamaged, WaitTimeout, DemoFailed) as error:
            say(f"no picture: {error}  (logs: {stack.data_dir / 'logs'})")
        else:
            code, done = 0, True
            if not once:
                stack.start_rest()
            _tell(stack, picture, console)
            if once:
                say("All of it is stopped now, and kept for the next run; without --once it stays up.")
        if not once and done:
            say("Everything stays up until Ctrl-C.")
            signaled.wait()
    return exit_code(signaled, was_up=done) if signaled.by else code


def _make(stack: EmbeddedStack, client: Client, console: Console) -> _Picture:
    """Submit, follow, check."""
    simulated = stack.comfy_kind == "simulator"
    params: dict[str, Any] = {"workflow": TEXT_TO_IMAGE if simulated else CORE_WORKFLOW}
    if simulated:
        params["inputs"] = {
            "prompt": "a lighthouse at dawn, drawn by a simulator",
            "seed": secrets.randbelow(2**32),
        }
    body = {"task_type": "comfyui", "params": params, "metadata": {"from": "genpulse demo"}}
    task_id = str(client.submit(body)["task_id"])
    speaker(console)(f"POST {client.url}/task -> 202, task {task_id}")
    with showing(console) as show:

        def look(now: Mapping[str, Any]) -> None:
            show(now)
            if stack.given_up:
                msg = f"{', '.join(stack.given_up)} cannot run"
                raise DemoFailed(msg)

        task = client.follow(task_id, timeout_s=PICTURE_S, on_change=look)
    if task["status"] != "completed":
        msg = f"task {task_id} {task['status']}: {error_line(task)}"
        raise DemoFailed(msg)
    images = [output for output in task.get("outputs") or () if output["kind"] == "image"]
    if not images:
        msg = f"task {task_id} completed without an image"
        raise DemoFailed(msg)
    path = _where(stack, client, task_id, images[0])
    downloaded = _bytes(client, images[0])
    if downloaded != path.read_bytes():
        msg = f"the bytes of {images[0]['url']} are not those of {path}"
        raise DemoFailed(msg)
    size = check_picture(downloaded, None if simulated else COLOR ^ 0xFFFFFF)
    return _Picture(task_id, path, str(images[0]["url"]), size)


def check_picture(data: bytes, color: int | None) -> tuple[int, int]:
    """
    The size of the demo's picture, once its pixels are known to be right.

    Args:
        color: The one colour of all pixels (``0xRRGGBB``, off by at most 2 for rounding); ``None``
            for a drawn picture, which has many.

    Raises:
        DemoFailed: Not an image, of another size, or of other pixels.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            picture = image.convert("RGB")
    except OSError as error:
        msg = f"what came is no image ({error})"
        raise DemoFailed(msg) from error
    if picture.size != (WIDTH, HEIGHT):
        msg = f"the picture is {picture.width}x{picture.height} instead of {WIDTH}x{HEIGHT}"
        raise DemoFailed(msg)
    extremes = [band.getextrema() for band in picture.split()]
    if color is None:
        right = any(high - low > 16 for low, high in extremes)  # type: ignore[operator]  # bands are of integers
    else:
        wanted = [color >> 16 & 255, color >> 8 & 255, color & 255]
        right = all(
            abs(low - want) <= 2 and abs(high - want) <= 2  # type: ignore[operator]  # the same
            for (low, high), want in zip(extremes, wanted, strict=True)
        )
    if not right:
        msg = f"the picture's pixels are wrong (from, to by band: {extremes})"
        raise DemoFailed(msg)
    return picture.size


def _bytes(client: Client, output: Mapping[str, Any]) -> bytes:
    """What the API answers for an output, checked against the digest it names."""
    with tempfile.TemporaryDirectory(prefix="genpulse-demo-") as folder:
        return client.download(output, Path(folder)).read_bytes()


def _where(stack: EmbeddedStack, client: Client, task_id: str, output: Mapping[str, Any]) -> Path:
    """The stored file; a copy of it where storage is a bucket."""
    if stack.settings.storage != "local":
        return client.download(output, stack.data_dir / "demo")
    from genpulse.ledger import Ledger

    task = Ledger.connect(stack.settings.ledger_url).get(task_id)
    if task is None:
        msg = f"the ledger knows no task {task_id}"
        raise DemoFailed(msg)
    return stack.settings.assets_dir / task.outputs[int(output["index"])].key


def _tell(stack: EmbeddedStack, picture: _Picture, console: Console) -> None:
    """Where the picture is and how to go on."""
    sample = stack.data_dir / "demo" / "text-to-image.json"
    sample.parent.mkdir(parents=True, exist_ok=True)
    sample.write_text(json.dumps(TEXT_TO_IMAGE, indent=1))
    simulated = stack.comfy_kind == "simulator"
    width, height = picture.size
    kind = "simulated" if simulated else "rendered by your ComfyUI"
    genpulse = Path(sys.executable).with_name("genpulse")
    program = str(genpulse) if genpulse.exists() else f"{sys.executable} -m genpulse"
    lines = [
        ("Picture", f"{picture.path}"),
        ("", f"{width}x{height}, {kind}; downloaded and compared byte by byte, pixels checked"),
        ("URL", picture.url),
        ("Task", f"{stack.api_url}/task/{picture.task_id}"),
        ("API", f"{stack.api_url}   (its page: {stack.api_url}/docs)"),
    ]
    if "flower" in stack.parts:
        lines.append(("Flower", f"{stack.flower_url}   (user and password: {stack.flower_login})"))
    if simulated:
        again = [program, "submit", shlex.quote(str(sample)), "-i", "prompt='a red fox'", "-i", "seed=7"]
        lines.append(("Another one", " ".join([*again, "--url", stack.api_url, "-o", "pictures"])))
        lines.append(("A real ComfyUI", f"{program} start-all --comfy http://127.0.0.1:8188"))
    say = speaker(console)
    say("")
    for what, where in lines:
        say(f"{what:<15} {where}".rstrip())
    say("")
