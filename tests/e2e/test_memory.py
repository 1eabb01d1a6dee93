"""Big files take no memory, in the API and in the worker. `dev.py bench memory` does it with 2 GB."""

from __future__ import annotations

import pytest

from benchmarks.memory import grow
from tests.support.cluster import Cluster

SIZE_MB = 192


@pytest.mark.timeout(150)
@pytest.mark.parametrize("cluster", ["sqlite"], indirect=True)
def test_a_big_file_takes_no_memory(cluster: Cluster) -> None:
    """In, out, and from ComfyUI to storage: no process grows by more than a sixth of the file."""
    found = grow(cluster, SIZE_MB)

    assert len(found) == 4
    for name, growth in found.items():
        assert growth.api < SIZE_MB / 6 * 2**20, (name, growth)
        assert growth.worker < SIZE_MB / 6 * 2**20, (name, growth)
