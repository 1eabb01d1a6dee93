"""
A plug-in of pytest that writes down how each test ended, and whether a failure is the test's own.

``pytest -p tests.mutate.verdicts --verdicts=FILE`` leaves ``{"package": …, "tests": {node id: verdict}}``.
A test that broke (a ``NameError``, a service that did not start, a time-out) has said nothing about the
claim it makes; one that failed by an assertion has, and so has one in which GenPulse raised an error of
its own where none was expected.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest

import genpulse
from genpulse.errors import GenPulseError, LedgerUnavailable

__all__ = ["BROKE", "FAILED", "PASSED"]

PASSED, FAILED, BROKE = "passed", "failed", "broke"
"""``broke`` is followed by the reason."""

_verdicts: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write."""
    parser.addoption("--verdicts", type=Path, required=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test's own failure counts more than what its teardown then finds."""
    report = yield
    error = call.excinfo.value if call.excinfo is not None else None
    if report.passed:
        verdict = PASSED
    elif report.when == "call" and error is not None and _is_own(error):
        verdict = FAILED
    else:
        reason = type(error).__name__ if error is not None else report.outcome
        verdict = f"{BROKE} in its {report.when}: {reason}"
    if _verdicts.get(item.nodeid, PASSED) == PASSED:
        _verdicts[item.nodeid] = verdict
    return report


def _is_own(error: BaseException) -> bool:
    if isinstance(error, pytest.fail.Exception):
        return not str(error).startswith("Timeout")  # that is pytest-timeout's
    return isinstance(error, AssertionError) or (
        isinstance(error, GenPulseError) and not isinstance(error, LedgerUnavailable)
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write all of it, and which copy of the package was tested."""
    found = {"package": genpulse.__file__, "tests": _verdicts}
    path: Path = session.config.getoption("--verdicts")
    path.write_text(json.dumps(found), encoding="utf-8")
