"""
The simulator says what ComfyUI says: recorded conversations are replayed, and the rules behind them tried.

With ``GENPULSE_TEST_COMFY_URL`` the same suite runs against that server; what needs nodes or faults which
only the simulator has is left out there, and says so. The server should be ComfyUI 0.3.64 and idle.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from genpulse.testing.simulator import Simulator
from tests.support.comfy_replay import Replay, Scenario, scenarios

REAL_URL = os.environ.get("GENPULSE_TEST_COMFY_URL", "").rstrip("/")


@dataclass(frozen=True)
class Target:
    """The server under test; *simulator* is None when it is a real one."""

    url: str
    simulator: Simulator | None

    @property
    def real(self) -> bool:
        """Whether this is somebody's ComfyUI."""
        return self.simulator is None

    def only_simulator(self, reason: str) -> Simulator:
        """The simulator; skips the test on a real server."""
        if self.simulator is None:
            pytest.skip(f"needs the simulator: {reason}")
        return self.simulator


@pytest.fixture
def comfy(tmp_path: Path) -> Iterator[Target]:
    """A fresh simulator, or the server that the environment names."""
    if REAL_URL:
        yield Target(REAL_URL, None)
    else:
        with Simulator(tmp_path / "comfy") as simulator:
            yield Target(simulator.url, simulator)


@pytest.mark.parametrize("scenario", scenarios(), ids=lambda scenario: scenario.name)
def test_the_server_answers_as_the_recorded_one_did(comfy: Target, scenario: Scenario) -> None:
    """Statuses, bodies and the order of messages equal those of ComfyUI 0.3.64, scenario by scenario."""
    if scenario.needs_sim and not scenario.independent:
        comfy.only_simulator("the scenario uses Sim nodes")

    Replay(scenario, comfy.url, real=comfy.real).run()
