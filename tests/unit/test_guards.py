"""What people forget, held by tests: the docs' tables, exported names, who reads the environment, the locks."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import genpulse
from genpulse.config import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "genpulse").rglob("*.py"))
NOT_OURS = {".git", ".venv", ".dev", "data", "libs", "dist", "build"}
CACHES = {"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".import_linter_cache", ".hypothesis"}


def tracked_files() -> Iterator[Path]:
    """The project's text files: what git tracks, or in a copy without git everything that is not ignored."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        found = [
            path for path in ROOT.rglob("*") if not (NOT_OURS | CACHES) & set(path.relative_to(ROOT).parts)
        ]
    return (
        path
        for path in found
        if path.is_file() and path.suffix not in {".png", ".webp", ".jpg", ".flac", ".wav"}
    )


def text_of(path: Path) -> str:
    """A file's text; binary files read as something harmless."""
    return path.read_text(encoding="utf-8", errors="replace")


def test_the_generated_pages_are_up_to_date() -> None:
    """docs/reference/settings.md says what genpulse/config.py says; `dev.py docs` writes it."""
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_setting_has_a_row_and_a_sentence() -> None:
    """No setting is undocumented, and the page names none that does not exist."""
    page = text_of(ROOT / "docs" / "reference" / "settings.md")
    documented = re.findall(rf"^\| `({PREFIX}\w+)` \|", page, re.MULTILINE)

    assert documented == [PREFIX + name.upper() for name in Settings.model_fields]
    assert all(field.description for field in Settings.model_fields.values())


def test_settings_named_anywhere_exist() -> None:
    """A variable in the docs, the compose file or a message is one that the settings know."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    switches = re.compile(rf"{PREFIX}(TEST|REQUIRE|DEV)_")
    unknown = {}
    for path in tracked_files():
        if path.suffix in {".md", ".yml", ".yaml", ".example"} or path.name == "Dockerfile":
            names = set(re.findall(rf"\b{PREFIX}[A-Z0-9_]*[A-Z0-9]\b", text_of(path)))
            if wrong := {name for name in names - known if not switches.match(name)}:
                unknown[str(path.relative_to(ROOT))] = sorted(wrong)
    assert unknown == {}


def reads_of_the_environment(tree: ast.AST) -> Iterator[int]:
    """Lines that read ``os.environ`` or ``os.getenv``; setting a variable for a program we become is no read."""
    stored = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {
            "os.environ",
            "os.environb",
            "os.getenv",
        }:
            if id(node) not in stored:
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for name in node.names if name.name in {"environ", "getenv"})


def test_only_config_reads_the_environment() -> None:
    """Settings enter in one place; what is started for tests passes the environment on and may read it."""
    allowed = {ROOT / "genpulse" / "config.py", *(ROOT / "genpulse" / "testing").rglob("*.py")}
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in [*SOURCES, ROOT / "celeryconfig.py"]
        if path not in allowed
        for line in reads_of_the_environment(ast.parse(text_of(path)))
    ]
    assert found == []


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(genpulse.__path__, "genpulse.")
    if not module.name.endswith(("__main__", ".env", "gunicorn_conf")) and ".versions." not in module.name
)


@pytest.mark.parametrize("name", ["genpulse", *MODULES])
def test_exported_names_exist(name: str) -> None:
    """Every name in a module's ``__all__`` is there, once."""
    module = importlib.import_module(name)
    exported = list(getattr(module, "__all__", ()))

    assert len(exported) == len(set(exported))
    assert [each for each in exported if not hasattr(module, each)] == []


def test_entry_points_load() -> None:
    """The console script and the built-in handlers are where pyproject.toml says."""
    for group in ("console_scripts", "genpulse.handlers"):
        ours = [point for point in entry_points(group=group) if point.module.partition(".")[0] == "genpulse"]
        assert ours
        assert all(point.load() for point in ours)


def test_no_registry_host_and_no_path_of_one_machine_in_the_tree() -> None:
    """The tree works with any mirror and on any machine."""
    hosts = [
        ".".join(parts)
        for parts in (("pypi", "org"), ("python" + "hosted", "org"), ("registry", "npmjs"), ("deb", "debian"))
    ]
    paths = ["/" + part for part in ("work/", "root/")]
    wrong = re.compile(
        "|".join([*map(re.escape, hosts), *(rf"(?<![\w.~*}}-]){re.escape(path)}" for path in paths)])
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked_files()
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if wrong.search(line)
    ]
    assert found == []


def test_every_silenced_check_names_its_code_and_its_reason() -> None:
    """`# noqa: CODE - reason` and `# type: ignore[code]  # reason`: nobody has to guess later."""
    marks = re.compile(r"#\s*(noqa|type:\s*ignore)(?P<rest>.*)$")
    explained = re.compile(r"^(: [A-Z]+\d+(, ?[A-Z]+\d+)*|\[[a-z, -]+\])(  |\s*[-–—#:,])\s*\S+")
    found = []
    for path in tracked_files():
        if path.suffix != ".py" or path == Path(__file__):
            continue
        for number, line in enumerate(text_of(path).splitlines(), 1):
            mark = marks.search(line)
            if mark and not explained.match(mark["rest"]):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


def versions_of(lock: Path) -> dict[str, str]:
    """Package and version (with its marker) by line of a lock; every one must have a hash."""
    pinned = re.findall(r"^(\S+?)==(.+?) \\\n +--hash=sha256:", text_of(lock), re.MULTILINE)
    assert len(pinned) == len(re.findall(r"^\S+", text_of(lock), re.MULTILINE)), "a package without a hash"
    return dict(pinned)


def test_the_locks_agree() -> None:
    """The tests run on the versions that users get, and the lock carries the tool that installs it."""
    runtime, dev = versions_of(ROOT / "requirements.lock"), versions_of(ROOT / "requirements-dev.lock")

    assert {name: dev.get(name) for name in runtime} == runtime
    assert "uv" in runtime


def test_every_dependency_is_in_a_lock() -> None:
    """A package added to pyproject.toml is locked: `dev.py lock` was run."""
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    asked = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["embedded"],
        *(package for group in project["dependency-groups"].values() for package in group),
    ]
    locked = versions_of(ROOT / "requirements-dev.lock")
    names = {re.split(r"[\[<>=; ]", package)[0].lower().replace("_", "-") for package in asked}

    assert names - set(locked) == set()
