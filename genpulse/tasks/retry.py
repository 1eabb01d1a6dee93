"""How long to wait before the next attempt, by what the last one ended in."""

from __future__ import annotations

import random

from genpulse.errors import ComfyUnavailable, GenPulseError

__all__ = ["backoff_s"]

_FIRST_S = 2.0
_LONGEST_S = 120.0


def backoff_s(error: GenPulseError, failures: int, *, chance: float | None = None) -> float:
    """
    Seconds until the next attempt: exponential, with jitter so that a crowd does not come back at once.

    The first time a server was lost costs no wait: another server, or the restarted one, may be
    ready now.

    Args:
        failures: How many attempts ended in a retryable error before this one.
        chance: A number from 0 to 1 instead of a random one.
    """
    if isinstance(error, ComfyUnavailable) and failures == 0:
        return 0.0
    longest: float = min(_LONGEST_S, _FIRST_S * 2.0**failures)
    return longest * (0.5 + 0.5 * (random.random() if chance is None else chance))  # noqa: S311  # no secret
