"""
How busy this machine is: the measure that tells a slow product from a machine that has no time.

A process of its own (``python -m tests.chaos.lateness FILE``) sleeps 20 ms at a time and writes down
every second how much the worst sleep was late, so that the program's own threads do not count; and
beside it, where Linux tells it, for how much of the last 10 s some process waited for a core.

Source: the kernel's ``Documentation/accounting/psi.rst``.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from pathlib import Path

from genpulse.testing.services import Service, start_python

__all__ = ["Lateness"]

_SLEEP_S = 0.02
_PRESSURE = Path("/proc/pressure/cpu")


class Lateness:
    """The probe, running until it is closed. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "lateness.txt"
        self._service: Service = start_python(
            ["-m", "tests.chaos.lateness", self._file],
            directory,
            name="lateness",
            env={"PYTHONPATH": str(Path(__file__).parents[2])},
        )

    def close(self) -> None:
        """Stop measuring; what was measured can still be asked for."""
        self._service.stop()

    def worst_s(self, since: float = 0.0, until: float = float("inf")) -> float:
        """The worst lateness in a time, to the second."""
        return max((late for at, late, _ in self._read() if since - 1 <= at <= until + 1), default=0.0)

    def median_s(self) -> float:
        """The median of every second's worst."""
        return statistics.median([late for _, late, _ in self._read()] or [0.0])

    def waiting(self, since: float = 0.0, until: float = float("inf")) -> float:
        """Percent of a time in which some process waited for a core; 0 where the kernel does not tell."""
        found = [waiting for at, _, waiting in self._read() if since - 1 <= at <= until + 1]
        return statistics.mean(found or [0.0])

    def _read(self) -> list[tuple[float, float, float]]:
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last line may be half written
                at, late, waiting = map(float, line.split())
                found.append((at, late, waiting))
        return found


def _measure(path: Path) -> None:
    with path.open("w") as file:
        while True:
            worst, ends = 0.0, time.monotonic() + 1
            while (began := time.monotonic()) < ends:
                time.sleep(_SLEEP_S)
                worst = max(worst, time.monotonic() - began - _SLEEP_S)
            file.write(f"{time.time():.3f} {worst:.4f} {_pressure():.1f}\n")
            file.flush()


def _pressure() -> float:
    """``some avg10``: percent of the last 10 s."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return float(_PRESSURE.read_text().split()[1].partition("=")[2])
    return 0.0


if __name__ == "__main__":
    _measure(Path(sys.argv[1]))
