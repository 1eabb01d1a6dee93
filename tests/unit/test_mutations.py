"""The breakages of ``dev.py mutate`` still fit the code, and its judgement of a run is right."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.mutate.__main__ import Run, judge
from tests.mutate.mutations import MUTATIONS, Edit, Mutation, PatchMisfit
from tests.mutate.verdicts import FAILED, PASSED

ROOT = Path(__file__).resolve().parents[2]
TEST = "tests/x/test_it.py::test_it"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_patch_still_fits_and_leaves_code_that_compiles(mutation: Mutation) -> None:
    """If this fails, you changed what the patch breaks: give it the new text in tests/mutate/mutations.py."""
    for path, text in mutation.patched(ROOT):
        compile(text, path, "exec")
        assert text != path.read_text(encoding="utf-8")


@functools.cache
def names_in(path: str) -> frozenset[str]:
    """The tests of a file, as their node ids end."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    found = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    for suite in body:
        if isinstance(suite, ast.ClassDef):
            found |= {
                f"{suite.name}::{node.name}" for node in suite.body if isinstance(node, ast.FunctionDef)
            }
    return frozenset(found)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_test_that_claims_to_catch_one_exists(mutation: Mutation) -> None:
    """If this fails, a test was renamed: name it anew in tests/mutate/mutations.py."""
    assert mutation.tests
    for test in mutation.tests:
        path, _, name = test.partition("::")
        assert name.partition("[")[0] in names_in(path), test


def test_names_are_distinct() -> None:
    """``--only NAME`` means one of them."""
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize(("text", "times"), [("b = 1", 0), ("a = 1\na = 1", 2)])
def test_a_patch_that_does_not_fit_says_so(tmp_path: Path, text: str, times: int) -> None:
    """Not there, or there twice: what would be broken is not what was meant."""
    (tmp_path / "it.py").write_text(text)
    mutation = Mutation("it", "", (Edit("it.py", "a = 1", "a = 2"),), (TEST,))

    with pytest.raises(PatchMisfit, match=rf"does not fit any more.*{times} times"):
        dict(mutation.patched(tmp_path))


def test_edits_of_one_file_add_up(tmp_path: Path) -> None:
    """A breakage may take several places."""
    (tmp_path / "it.py").write_text("a = 1\nb = 1\n")
    mutation = Mutation("it", "", (Edit("it.py", "a = 1", ""), Edit("it.py", "b = 1", "b = 2")), (TEST,))

    assert dict(mutation.patched(tmp_path)) == {tmp_path / "it.py": "\nb = 2\n"}


@pytest.mark.parametrize(
    ("run", "caught"),
    [
        (Run({TEST: FAILED, TEST + "2": FAILED}), True),
        (Run({TEST + "[sqlite]": PASSED, TEST + "[postgresql]": FAILED, TEST + "2": FAILED}), True),
        (Run({TEST: PASSED, TEST + "2": PASSED}), False),
        (Run({TEST: FAILED, TEST + "2": PASSED}), False),
        (Run({TEST: FAILED, TEST + "2": "broke in its call: NameError"}), False),
        (Run({TEST: FAILED}), False),
        (Run({}), False),
        (Run({TEST: FAILED, TEST + "2": FAILED}, "not through after 5 s"), False),
    ],
    ids=["both", "one-database", "survived", "one-of-two", "fell-over", "not-run", "nothing", "no-run"],
)
def test_caught_means_that_every_named_test_failed(run: Run, caught: bool) -> None:
    """One that passed, fell over or was not run makes a claim that it does not keep."""
    mutation = Mutation("it", "", (), (TEST, TEST + "2"))

    assert judge(mutation, run).caught is caught
