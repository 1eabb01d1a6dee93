"""The main job on a ComfyUI of yours: ``GENPULSE_TEST_COMFY_URL=http://127.0.0.1:8188``."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.support.cluster import Cluster, save_image, simple

URL = os.environ.get("GENPULSE_TEST_COMFY_URL", "")

pytestmark = [
    pytest.mark.skipif(not URL, reason="GENPULSE_TEST_COMFY_URL names no server"),
    pytest.mark.timeout(180),
]


@dataclass(frozen=True)
class Yours:
    """A server that was not started here."""

    url: str


@pytest.fixture
def real(tmp_path: Path, sqlite_ledger_url: str) -> Iterator[Cluster]:
    """An API and a worker for the named server."""
    with Cluster(tmp_path / "cluster", sqlite_ledger_url) as running:
        running.simulators["yours"] = Yours(URL)  # type: ignore[assignment]  # only its address is used
        running.start_worker("one", ["yours"])
        yield running


def test_pictures_come_back_as_they_were_rendered(real: Cluster) -> None:
    """A batch of two: both stored, of the colour asked for."""
    done = real.wait(real.submit(simple(0x3366CC, batch=2)), 120)

    assert done["status"] == "completed", done
    assert len(done["outputs"]) == 2
    with Image.open(io.BytesIO(real.output(done["task_id"]))) as picture:
        assert picture.convert("RGB").getpixel((1, 1)) == (0x33, 0x66, 0xCC)


def test_an_upload_is_scaled(real: Cluster) -> None:
    """`asset:<id>` is staged on the server, and the workflow uses it."""
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), (10, 200, 30)).save(picture, "PNG")
    answer = real.http.post(
        f"{real.url}/storage/upload", files={"file": ("in.png", picture.getvalue())}, timeout=30
    )
    scale = {"image": ["1", 0], "upscale_method": "bilinear", "width": 64, "height": 48, "crop": "disabled"}
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": f"asset:{answer.json()['id']}"}},
        "2": {"class_type": "ImageScale", "inputs": scale},
        "3": save_image("2"),
    }
    done = real.wait(real.submit(workflow), 120)

    assert done["status"] == "completed", done
    assert (done["outputs"][0]["width"], done["outputs"][0]["height"]) == (64, 48)


def test_a_value_out_of_range_is_refused_by_the_server(real: Cluster) -> None:
    """The task fails as an invalid workflow, at once and for good."""
    done = real.wait(real.submit(simple(1, size=-5)), 60)

    assert done["status"] == "failed"
    assert done["error"]["code"] == "invalid_workflow"
    assert done["attempt"] == 1
