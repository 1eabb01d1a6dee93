"""
Break the code on purpose, one way after the other, and see whether the tests notice.

``python -m tests.mutate`` copies the tree, runs the tests that are named in
:mod:`tests.mutate.mutations` on the unbroken copy, where all must pass, and then applies each patch and
runs the tests that claim to catch it, where every one must fail, by an assertion and not by falling
over. Exits with 1 if a breakage survived, if a test broke instead of failing, or if a patch does not
fit any more. The tree itself is never touched.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutate.mutations import MUTATIONS, Mutation, PatchMisfit
from tests.mutate.verdicts import FAILED, PASSED

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("genpulse", "tests", "celeryconfig.py", "pyproject.toml")
"""What the named tests need."""
BASELINE_S = 900.0
GIVE_UP_AFTER = 10
"""So many failures on the unbroken copy are one mistake, and not worth more time."""


@dataclass(frozen=True)
class Run:
    """What one run of pytest told."""

    verdicts: Mapping[str, str]
    """By node id: ``passed``, ``failed``, or that it broke and why."""
    problem: str = ""
    """Why the run as a whole says nothing."""
    output: str = ""
    seconds: float = 0.0

    def of(self, test: str) -> dict[str, str]:
        """The verdicts of one named test, of all its parameters unless it names some."""
        return {
            node: verdict
            for node, verdict in self.verdicts.items()
            if node == test or node.startswith(f"{test}[")
        }


@dataclass(frozen=True)
class Result:
    """What became of one mutation."""

    name: str
    caught: bool
    notes: tuple[str, ...]
    """A line for each of its tests, or the reason why it proves nothing."""
    seconds: float = 0.0
    output: str = field(default="", repr=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    options = _options(arguments)
    chosen = [each for each in MUTATIONS if not options.only or each.name in options.only]
    if options.list:
        for each in chosen:
            say(f"{each.name}\n    {each.meaning}")
            for test in each.tests:
                say(f"    - {test}")
        return 0
    began = time.monotonic()
    with copy_of_the_tree() as copy:
        whole = unbroken(copy, chosen)
        if whole.problem:
            return 1
        results = [attempt(copy, each, whole) for each in chosen]
    say("\n" + table(results))
    survived = [result.name for result in results if not result.caught]
    for result in results:
        if not result.caught and result.output:
            say(f"\n--- {result.name}\n{result.output}")
    say(
        f"\n{len(results) - len(survived)} of {len(results)} breakages were caught in "
        f"{time.monotonic() - began:.0f} s" + (f"; NOT: {', '.join(survived)}" if survived else "")
    )
    return 1 if survived else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mutate", description="Break the code on purpose and see whether the tests notice."
    )
    names = [each.name for each in MUTATIONS]
    parser.add_argument("--only", action="append", metavar="NAME", choices=names, help="may be repeated")
    parser.add_argument("--list", action="store_true", help="say what would be broken, and stop")
    return parser.parse_args(arguments)


def say(text: str) -> None:
    """Tell whoever waits."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    """A copy to break; gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="genpulse-mutate-")).resolve()
    try:
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, folder / name)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unbroken(copy: Path, chosen: Sequence[Mutation]) -> Run:
    """Run all named tests before anything is broken: one that fails anyway would prove nothing."""
    tests = sorted({test for each in chosen for test in each.tests})
    say(f"{len(tests)} tests on the unbroken copy …")
    run = pytest(copy, [f"--maxfail={GIVE_UP_AFTER}", *tests], BASELINE_S)
    wrong = sum(verdict != PASSED for verdict in run.verdicts.values())
    if run.problem or wrong:
        say(f"{run.output}\n{run.problem}")
    say(f"  {len(run.verdicts) - wrong} of {len(run.verdicts)} green, {run.seconds:.1f} s")
    return run


def attempt(copy: Path, mutation: Mutation, whole: Run) -> Result:
    """Break the copy, run the tests that claim to notice, mend it again."""
    say(f"{mutation.name}: {mutation.meaning}")
    if unfit := [test for test in mutation.tests if set(whole.of(test).values()) != {PASSED}]:
        notes = tuple(f"{test.rpartition('::')[2]}: not green before anything was broken" for test in unfit)
        say(f"  NOT TRIED: {'; '.join(notes)}")
        return Result(mutation.name, caught=False, notes=notes)
    try:
        with broken(copy, mutation):
            result = judge(mutation, pytest(copy, mutation.tests, mutation.timeout_s))
    except PatchMisfit as error:
        result = Result(mutation.name, caught=False, notes=(str(error),))
    say(
        f"  {'caught' if result.caught else 'NOT CAUGHT: ' + '; '.join(result.notes)}, {result.seconds:.1f} s"
    )
    return result


@contextlib.contextmanager
def broken(copy: Path, mutation: Mutation) -> Iterator[None]:
    """The copy with the patch in it; mended at the end."""
    patched = dict(mutation.patched(copy))
    whole = {path: path.read_text(encoding="utf-8") for path in patched}
    try:
        for path, text in patched.items():
            _write(path, text)
        yield
    finally:
        for path, text in whole.items():
            _write(path, text)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    # Its compiled form is known by size and by whole seconds: two quick changes may look the same.
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def judge(mutation: Mutation, run: Run) -> Result:
    """Caught is a breakage if every test that claims so failed, in at least one of its parameters."""
    if run.problem:
        return Result(mutation.name, False, (run.problem,), run.seconds, run.output)
    notes = []
    caught = True
    for test in mutation.tests:
        found = run.of(test)
        failed = sum(verdict == FAILED for verdict in found.values())
        caught = caught and failed > 0
        others = sorted({verdict for verdict in found.values() if verdict not in {FAILED, PASSED}})
        said = f"{failed} of {len(found)} failed" if found else "was not run"
        notes.append(f"{test.rpartition('::')[2]}: {', '.join([said, *others])}")
    return Result(mutation.name, caught, tuple(notes), run.seconds, "" if caught else run.output)


def pytest(copy: Path, arguments: Sequence[str], timeout_s: float) -> Run:
    """Run tests of the copy, on real services, in a session of their own."""
    verdicts = copy / "verdicts.json"
    verdicts.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-q", "-rN", "--tb=short", "-p", "no:randomly", "-p", "no:cacheprovider",
        "-n0", "-p", "tests.mutate.verdicts", f"--verdicts={verdicts}", *arguments,
    ]  # fmt: skip
    environ = {
        **os.environ,
        # In front of the development install, also for what the tests start.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(copy), os.environ.get("PYTHONPATH")])),
        "GENPULSE_REQUIRE_SERVICES": "1",  # a test that was skipped has noticed nothing
    }
    began = time.monotonic()
    with (copy / "output").open("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=copy, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said = output.read()[-4000:]
    seconds = time.monotonic() - began
    if code is None:
        return Run({}, f"not through after {timeout_s:g} s", said, seconds)
    if code not in {0, 1} or not verdicts.exists():  # 2 and 4: nothing was even collected
        return Run({}, f"pytest itself failed, with exit code {code}", said, seconds)
    found = json.loads(verdicts.read_text(encoding="utf-8"))
    if not Path(found["package"]).is_relative_to(copy):
        return Run({}, f"the tests ran on {found['package']}, not on the copy", said, seconds)
    return Run(found["tests"], "", said, seconds)


def table(results: Sequence[Result]) -> str:
    """Every mutation, its tests and their verdicts, and how long they took."""
    width = max(len(each.name) for each in results)
    lines = [f"{'mutation':<{width}}  {'caught':<6}  {'s':>5}  by", "-" * (width + 60)]
    for each in results:
        first, *more = each.notes or ("",)
        lines.append(
            f"{each.name:<{width}}  {'yes' if each.caught else 'NO':<6}  {each.seconds:>5.1f}  {first}"
        )
        lines += [f"{'':<{width}}  {'':<6}  {'':>5}  {note}" for note in more]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
