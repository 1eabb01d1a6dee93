"""
The server's directories and the rules by which names in them are given out and checked.

Everything a client can name (uploads, ``/view``, ``LoadImage``, a save prefix) goes through here, with
the answers the recorded server gave, also the odd ones: a name with ``..`` anywhere is refused, a
repeated upload is renamed ``name (1).png``, numbering goes on after a restart.

Sources: ComfyUI 0.3.64 ``folder_paths.py`` and ``server.py``; traces 15, 17, 20.
"""

# Paths are joined and compared as text, because the original does, down to its oddities.
# ruff: noqa: PTH100, PTH103, PTH118, PTH119, PTH122, PTH208

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from pathlib import Path
from typing import IO

from PIL import Image, ImageDraw

__all__ = ["Directories", "OutsideOutput", "SavePath"]

_ANNOTATION = re.compile(r"^(?P<name>.*) \[(?P<kind>input|output|temp)\]$", re.DOTALL)


class OutsideOutput(Exception):
    """A save prefix points out of the output directory; becomes an ``execution_error``."""


class SavePath:
    """Where a save node writes: ``folder / f"{stem}_{counter:05}_.ext"``, and *subfolder* for the answer."""

    def __init__(self, folder: Path, stem: str, counter: int, subfolder: str) -> None:
        self.folder = folder
        self.stem = stem
        self.counter = counter
        self.subfolder = subfolder

    def next_file(self, extension: str, *, batch_number: int = 0) -> Path:
        """The path of the next file; each call counts one up."""
        stem = self.stem.replace("%batch_num%", str(batch_number))
        path = self.folder / f"{stem}_{self.counter:05}_{extension}"
        self.counter += 1
        return path


class Directories:
    """
    ``input``, ``output`` and ``temp`` below one root; ``temp`` is emptied when a server starts.

    All paths are absolute and resolved, because every check compares them as text, as the real
    server does.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.input = self.root / "input"
        self.output = self.root / "output"
        self.temp = self.root / "temp"
        shutil.rmtree(self.temp, ignore_errors=True)
        for directory in (self.input, self.output, self.temp):
            directory.mkdir(parents=True, exist_ok=True)
        example = self.input / "example.png"
        if not example.exists():
            _draw_example(example)

    def by_type(self, kind: str) -> Path | None:
        """The directory of a file type; None for an unknown one."""
        return {"input": self.input, "output": self.output, "temp": self.temp}.get(kind)

    def annotated(self, name: str) -> tuple[str, Path | None]:
        """Split ``"x.png [output]"`` into name and directory; the directory is None without annotation."""
        match = _ANNOTATION.match(name)
        if match is None:
            return name, None
        return match["name"], self.by_type(match["kind"])

    def input_path(self, name: str) -> Path | None:
        """The file a ``LoadImage`` means, or None if it is not there or would lie outside."""
        bare, directory = self.annotated(name)
        directory = directory or self.input
        try:
            path = (directory / bare).resolve()
            inside = path.is_relative_to(directory)
            return path if inside and path.is_file() else None
        except (ValueError, OSError):
            return None

    def input_names(self) -> list[str]:
        """What ``object_info`` offers for ``LoadImage``: files at the top of ``input``, sorted."""
        with os.scandir(self.input) as entries:
            return sorted(entry.name for entry in entries if entry.is_file())

    def save_path(self, prefix: str, *, width: int = 0, height: int = 0, temp: bool = False) -> SavePath:
        """
        Resolve a save prefix and find the next number by listing the directory.

        Raises:
            OutsideOutput: The prefix leaves the directory.

        Source: ``folder_paths.get_save_image_path``; [trace 20] for placeholders and traversal.
        """
        root = self.temp if temp else self.output
        if "%" in prefix:
            prefix = _fill_in(prefix, width, height)
        normal = os.path.normpath(prefix)
        subfolder, stem = os.path.split(normal)
        folder = os.path.abspath(os.path.join(root, subfolder))
        common = os.path.commonpath((str(root), folder))
        if common != str(root):
            raise OutsideOutput(
                "**** ERROR: Saving image outside the output folder is not allowed."
                f"\n full_output_folder: {folder}\n         output_dir: {root}\n         commonpath: {common}"
            )
        # As in the original, the length of the *unnormalised* prefix' last part is what is cut off.
        cut = len(os.path.basename(prefix))
        highest = 0
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            os.makedirs(folder, exist_ok=True)
            names = []
        for name in names:
            if name[:cut] == stem and name[cut : cut + 1] == "_":
                try:
                    highest = max(highest, int(name[cut + 1 :].split("_")[0]))
                except ValueError:
                    continue
        return SavePath(Path(folder), stem, highest + 1, subfolder)

    def upload_path(self, kind: str | None, subfolder: str, name: str) -> tuple[Path, Path] | None:
        """
        Directory and full path for an upload, or None when it would lie outside [trace 15].

        Raises:
            LookupError: Unknown *kind*, which the real server answers with 500.
        """
        root = self.by_type("input" if kind is None else kind)
        if root is None:
            raise LookupError(kind)
        folder = os.path.join(root, os.path.normpath(subfolder))
        path = os.path.abspath(os.path.join(folder, name))
        if os.path.commonpath((str(root), path)) != str(root):
            return None
        return Path(folder), Path(path)

    def free_name(self, folder: Path, name: str, content: IO[bytes]) -> tuple[str, bool]:
        """
        The name an upload gets without ``overwrite``: its own if free or if the same bytes are there,
        else ``stem (1).ext``, ``stem (2).ext``, ...

        Returns:
            The name, and whether a file with the same bytes is already stored under it.
        """
        digest: str | None = None
        stem, extension = os.path.splitext(name)
        path = folder / name
        number = 1
        while path.exists():
            if digest is None:
                digest = hashlib.sha256(content.read()).hexdigest()
                content.seek(0)
            if file_digest(path) == digest:
                return name, True
            name = f"{stem} ({number}){extension}"
            path = folder / name
            number += 1
        return name, False


def file_digest(path: Path) -> str:
    """SHA-256 of a file, which is the part of a ``LoadImage`` in the cache key."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fill_in(prefix: str, width: int, height: int) -> str:
    now = time.localtime()
    values = {
        "%width%": str(width),
        "%height%": str(height),
        "%year%": str(now.tm_year),
        "%month%": f"{now.tm_mon:02}",
        "%day%": f"{now.tm_mday:02}",
        "%hour%": f"{now.tm_hour:02}",
        "%minute%": f"{now.tm_min:02}",
        "%second%": f"{now.tm_sec:02}",
    }
    for placeholder, value in values.items():
        prefix = prefix.replace(placeholder, value)
    return prefix


def _draw_example(path: Path) -> None:
    """The ``example.png`` that a fresh ComfyUI has in its input directory; ours is a chequered square."""
    image = Image.new("RGB", (256, 256), (244, 240, 232))
    draw = ImageDraw.Draw(image)
    for row in range(8):
        for column in range(8):
            if (row + column) % 2:
                draw.rectangle(
                    (column * 32, row * 32, column * 32 + 31, row * 32 + 31),
                    fill=(40 + 20 * row, 90, 200 - 20 * column),
                )
    partial = path.with_suffix(f".{os.getpid()}.partial")
    image.save(partial, format="PNG")
    partial.replace(path)
