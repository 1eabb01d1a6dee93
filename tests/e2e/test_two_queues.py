"""A picture rendered on one queue and converted on the other, by the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.cluster import Cluster, simple


@pytest.mark.timeout(120)
def test_an_output_is_converted_by_the_command_line(cluster: Cluster, tmp_path: Path) -> None:
    """`genpulse submit --type image-convert` takes the params as JSON and -i on top of it."""
    cluster.start_worker("cpu", queues="cpu", concurrency=1)
    rendered = cluster.submit(simple(0x00FF00, size=128))
    assert cluster.wait(rendered)["status"] == "completed"

    done = subprocess.run(
        [
            *(sys.executable, "-m", "genpulse", "submit", "-", "--type", "image-convert"),
            *("-i", f"source=output:{rendered}/0", "-i", "width=32"),
            *("--url", cluster.url, "-o", str(tmp_path)),
        ],
        input='{"format": "webp", "height": 32}',
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    with Image.open(done.stdout.strip()) as picture:
        assert (picture.format, picture.size) == ("WEBP", (32, 32))
        assert picture.convert("RGB").getpixel((16, 16))[1] > 200  # type: ignore[index]  # three bands
