"""``genpulse demo`` from outside: a process, a folder, a picture."""

from __future__ import annotations

import re
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from genpulse.testing.demo import COLOR, HEIGHT, WIDTH
from genpulse.testing.services import free_port, start_simulator
from tests.support.stacks import StackProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def picture_of(said: str) -> Image.Image:
    """The picture at the place on disk that the demo named."""
    named = re.search(r"^Picture +(\S.*)$", said, re.MULTILINE)
    assert named, said
    return Image.open(Path(named[1]))


def statuses(data_dir: Path) -> list[str]:
    """The states of all tasks in the demo's ledger."""
    with closing(sqlite3.connect(data_dir / "genpulse.db")) as ledger:
        return [status for (status,) in ledger.execute("SELECT status FROM tasks")]


def test_demo_ends_with_a_picture_and_keeps_earlier_tasks(tmp_path: Path) -> None:
    """With --once exit code 0 means a right picture on disk. The next run stays until Ctrl-C and has both tasks."""
    with StackProcess(tmp_path, "--once", command="demo") as demo:
        demo.wait_for("POST .* -> 202")
        demo.descendants()

        assert demo.process.wait(120) == 0, demo.said()
        assert demo.survivors(20) == []
        with picture_of(demo.said()) as picture:
            assert picture.size == (WIDTH, HEIGHT)
            assert len(picture.getcolors(WIDTH * HEIGHT) or ()) > 16
        assert "SIMULATED" in demo.said()
        assert "/docs" in demo.said()
        assert "All of it is stopped now" in demo.said()
        assert statuses(demo.data_dir) == ["completed"]

    with StackProcess(tmp_path, command="demo") as demo:
        demo.wait_for("stays up until Ctrl-C")

        assert "Flower" in demo.said()
        assert demo.end(signal.SIGINT) == 0
        assert demo.survivors(0) == []
        assert statuses(demo.data_dir) == ["completed", "completed"]


def test_demo_runs_on_a_comfyui_of_yours(tmp_path: Path) -> None:
    """With --comfy the workflow has core nodes only, and every pixel is known."""
    folder = tmp_path / 'a "ß" folder'
    folder.mkdir()
    with (
        start_simulator(tmp_path / "comfyui") as comfy,
        StackProcess(folder, "--once", "--comfy", comfy.url, command="demo") as demo,
    ):
        demo.wait_for("POST .* -> 202")
        demo.descendants()

        assert demo.process.wait(120) == 0, demo.said()
        wanted = tuple((COLOR ^ 0xFFFFFF) >> shift & 255 for shift in (16, 8, 0))
        with picture_of(demo.said()) as picture:
            corner = picture.convert("RGB").getpixel((WIDTH - 1, HEIGHT - 1))
        assert isinstance(corner, tuple)
        assert all(abs(have - want) <= 2 for have, want in zip(corner, wanted, strict=True))
        assert "SIMULATED" not in demo.said()


def test_demo_names_a_comfyui_that_is_not_there(tmp_path: Path) -> None:
    """A wrong --comfy is told before anything is started."""
    with StackProcess(tmp_path, "--comfy", f"http://127.0.0.1:{free_port()}", command="demo") as demo:
        assert demo.process.wait(60) == 3
        assert "no ComfyUI answers" in demo.said()
        assert not demo.data_dir.exists()
