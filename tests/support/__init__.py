"""What tests of several folders share: waiting for a condition instead of for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["wait_until"]

T = TypeVar("T")


def wait_until(
    predicate: Callable[[], T | None], timeout_s: float = 10.0, *, every_s: float = 0.02, message: str = ""
) -> T:
    """
    Call *predicate* until it returns something true, and return that.

    Raises:
        AssertionError: It was still false after *timeout_s*; says *message* and the last value.
    """
    ends = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > ends:
            what = message or getattr(predicate, "__name__", "the condition")
            msg = f"{what} did not come true in {timeout_s:g} s (last value: {value!r})"
            raise AssertionError(msg)
        time.sleep(every_s)
