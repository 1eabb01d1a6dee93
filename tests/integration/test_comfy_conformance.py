"""
The simulator says what ComfyUI says: recorded conversations are replayed, and the rules behind them tried.

With ``GENPULSE_TEST_COMFY_URL`` the same suite runs against that server; what needs nodes or faults which
only the simulator has is left out there, and says so. The server should be ComfyUI 0.3.64 and idle.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from PIL import Image

from genpulse.testing.simulator import Simulator
from tests.support.comfy_replay import Listener, Replay, Scenario, scenarios

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


# Rules whose records cannot be replayed, because the requests carry files or the server ends ---------------


def png(color: tuple[int, ...] = (200, 30, 30), size: tuple[int, int] = (32, 24)) -> bytes:
    """A small picture; three numbers make it RGB, four RGBA."""
    buffer = io.BytesIO()
    Image.new("RGB" if len(color) == 3 else "RGBA", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


def upload(
    comfy: Target, name: str | None, content: bytes, route: str = "image", field: str = "image", **form: str
) -> requests.Response:
    """``POST /upload/...`` of one file."""
    files = {field: (name, content)} if name is not None else {"nothing": ("", b"")}
    return requests.post(f"{comfy.url}/upload/{route}", files=files, data=form, timeout=10)


def view(comfy: Target, name: str, **query: str) -> requests.Response:
    """``GET /view``."""
    return view_if(comfy, {}, {"name": name, **query})


def view_if(comfy: Target, headers: Mapping[str, str], place: Mapping[str, str]) -> requests.Response:
    """``GET /view`` with headers."""
    query = {"filename" if key == "name" else key: value for key, value in place.items()}
    return requests.get(f"{comfy.url}/view", params=query, headers=dict(headers), timeout=10)


def submit(comfy: Target, prompt: Any, **body: Any) -> requests.Response:
    """``POST /prompt``."""
    return requests.post(f"{comfy.url}/prompt", json={"prompt": prompt, **body}, timeout=10)


def history(comfy: Target, prompt_id: str, patience_s: float = 10) -> Any:
    """The history entry of a prompt, as soon as there is one."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        found = requests.get(f"{comfy.url}/history/{prompt_id}", timeout=10).json()
        if found:
            return found[prompt_id]
        time.sleep(0.01)
    raise AssertionError(f"{prompt_id} did not end")


def finished(comfy: Target, prompt: Any, **body: Any) -> Any:
    """Submit and wait for the history entry."""
    answer = submit(comfy, prompt, **body)
    assert answer.status_code == 200, answer.text
    return history(comfy, answer.json()["prompt_id"])


def saved(prefix: str, **image: int) -> dict[str, Any]:
    """One picture of one colour, saved."""
    size = {"width": 64, "height": 64, "batch_size": 1, "color": random.randrange(1 << 24)}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {**size, **image}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def slow() -> dict[str, Any]:
    """Twenty seconds of nothing, then a picture that nobody should ever see. Only the simulator has it."""
    prompt = saved("never")
    prompt["1"] = {"class_type": "SimSleep", "inputs": {"seconds": 20}}
    return prompt


def unique(stem: str) -> str:
    """A name nobody has used on this server."""
    return f"{stem}-{uuid.uuid4().hex[:8]}"


def test_uploads_are_renamed_unless_the_bytes_are_the_same(comfy: Target) -> None:
    """A name is given again only for the same content; other content gets ``(1)``, ``(2)``, ... [15]"""
    stem = unique("t")
    a, b, c = png((1, 2, 3)), png((4, 5, 6)), png((7, 8, 9))

    def name(content: bytes, **form: str) -> str:
        answer = upload(comfy, f"{stem}.png", content, **form)
        assert answer.status_code == 200
        assert (answer.json()["subfolder"], answer.json()["type"]) == ("", "input")
        return str(answer.json()["name"])

    assert name(a) == f"{stem}.png"
    assert name(a) == f"{stem}.png"
    assert name(b) == f"{stem} (1).png"
    assert name(c) == f"{stem} (2).png"
    assert name(b, overwrite="true") == f"{stem}.png"
    assert name(b, overwrite="1") == f"{stem}.png"
    assert name(a, overwrite="false") == f"{stem} (3).png"
    assert name(a, overwrite="True") == f"{stem} (3).png"


@pytest.mark.parametrize(
    ("name", "form", "status", "answer"),
    [
        (
            "x.png",
            {"subfolder": "sub/deep"},
            200,
            {"name": "x.png", "subfolder": "sub/deep", "type": "input"},
        ),
        ("x.png", {"type": "temp"}, 200, {"name": "x.png", "subfolder": "", "type": "temp"}),
        ("x.png", {"type": "output"}, 200, {"name": "x.png", "subfolder": "", "type": "output"}),
        ("x ü 文.png", {}, 200, {"name": "x ü 文.png", "subfolder": "", "type": "input"}),
        ("x.bin", {}, 200, {"name": "x.bin", "subfolder": "", "type": "input"}),
        ("x.png", {"subfolder": "../../x"}, 400, None),
        ("x.png", {"subfolder": "/etc"}, 400, None),
        ("../x.png", {}, 400, None),
        ("x.png", {"type": "bogus"}, 500, None),
        ("a/x.png", {}, 500, None),
        ("/etc/x.png", {}, 500, None),
        (None, {}, 400, None),
    ],
)
def test_uploads_stay_inside_their_directory(
    comfy: Target, name: str | None, form: dict[str, str], status: int, answer: dict[str, str] | None
) -> None:
    """Subfolders are made, types chosen; what would lie outside is 400, odd names and types 500 [15]."""
    found = upload(comfy, name, png(), overwrite="true", **form)

    assert found.status_code == status
    if answer is not None:
        assert found.json() == answer


def test_uploads_of_no_file_are_refused(comfy: Target) -> None:
    """A wrong field or a JSON body is 400; a text field named image is a 500 [15]."""
    url = f"{comfy.url}/upload/image"

    assert upload(comfy, "x.png", png(), field="file").status_code == 400
    assert requests.post(url, json={"a": 1}, timeout=10).status_code == 400
    assert requests.post(url, data={"image": "text"}, timeout=10).status_code == 500


def test_uploaded_files_are_loaded_and_overwriting_is_noticed(comfy: Target) -> None:
    """LoadImage finds names, subfolders and annotations, and its cache key holds the content [15]."""
    name = f"{unique('u')}.png"
    prefix = unique("loaded")
    for form in ({}, {"subfolder": "sub/deep"}, {"type": "temp"}, {"type": "output"}):
        upload(comfy, name, png((10, 20, 30)), overwrite="true", **form)

    def load(image: str) -> Any:
        prompt = {
            "1": {"class_type": "LoadImage", "inputs": {"image": image}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
        }
        return finished(comfy, prompt)

    for image in (f"sub/deep/{name}", f"{name} [temp]", f"{name} [output]", name):
        entry = load(image)
        assert entry["status"]["status_str"] == "success", image
        content = view(comfy, **_place(entry["outputs"]["2"]["images"][0])).content
        assert _pixel(content) == (10, 20, 30)
    again = load(name)
    upload(comfy, name, png((90, 80, 70)), overwrite="true")
    changed = load(name)
    assert again["status"]["messages"][1][1]["nodes"] == ["1", "2"]
    assert changed["status"]["messages"][1][1]["nodes"] == []


def test_a_file_that_is_no_image_fails_when_it_runs(comfy: Target) -> None:
    """Content is not looked at on upload; the node raises PIL.UnidentifiedImageError [15]."""
    name = f"{unique('text')}.png"
    upload(comfy, name, b"this is no image.", overwrite="true")

    entry = finished(
        comfy,
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": name}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
        },
    )

    kind, data = entry["status"]["messages"][-1]
    assert (kind, data["exception_type"]) == ("execution_error", "PIL.UnidentifiedImageError")
    assert data["current_inputs"] == {"image": [name]}
    assert entry["status"]["completed"] is False


def test_masks_are_put_into_the_original(comfy: Target) -> None:
    """The result has the original's colours and the mask's alpha; an unknown original writes nothing [16]."""
    original, mask = f"{unique('o')}.png", f"{unique('m')}.png"
    upload(comfy, original, png((9, 8, 7)))
    reference = json.dumps({"filename": original, "type": "input", "subfolder": ""})

    made = upload(
        comfy, mask, png((0, 0, 0, 100)), route="mask", original_ref=reference, subfolder="clipspace"
    )
    nothing = upload(
        comfy, f"2{mask}", png((0, 0, 0, 9)), route="mask", original_ref='{"filename": "nope.png"}'
    )
    outside = upload(
        comfy, f"3{mask}", png((0, 0, 0, 9)), route="mask", original_ref='{"filename": "../../x.png"}'
    )
    unnamed = upload(comfy, f"4{mask}", png((0, 0, 0, 9)), route="mask")
    misfit = upload(comfy, f"5{mask}", png((0, 0, 0, 9), (5, 5)), route="mask", original_ref=reference)

    assert made.json() == {"name": mask, "subfolder": "clipspace", "type": "input"}
    assert _pixel(view(comfy, mask, type="input", subfolder="clipspace").content) == (9, 8, 7, 100)
    assert [a.status_code for a in (nothing, outside, unnamed, misfit)] == [200, 200, 500, 500]
    assert view(comfy, f"2{mask}", type="input").status_code == 404


def _place(item: dict[str, str]) -> dict[str, str]:
    return {"name": item["filename"], "subfolder": item["subfolder"], "type": item["type"]}


def _pixel(content: bytes) -> tuple[int, ...]:
    with Image.open(io.BytesIO(content)) as image:
        pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


def test_files_are_served_with_ranges_and_conditions(comfy: Target) -> None:
    """Single ranges are 206, bad and several ones 416, known versions 304, HEAD has no body [17]."""
    item = finished(comfy, saved(unique("view"), width=256, height=256))["outputs"]["2"]["images"][0]
    place = _place(item)
    whole = view(comfy, **place)
    size = len(whole.content)

    assert whole.headers["Content-Type"] == "image/png"
    assert whole.headers["Content-Disposition"] == f'filename="{item["filename"]}"'
    assert whole.headers["Accept-Ranges"] == "bytes"
    first = view_if(comfy, {"Range": "bytes=0-9"}, place)
    rest = view_if(comfy, {"Range": "bytes=100-"}, place)
    last = view_if(comfy, {"Range": "bytes=-10"}, place)
    assert [a.status_code for a in (first, rest, last)] == [206] * 3
    assert first.content + whole.content[10:100] + rest.content == whole.content
    assert last.headers["Content-Range"] == f"bytes {size - 10}-{size - 1}/{size}"
    for bad in (f"bytes={size + 5}-", "bytes=0-1,3-4", "bytes=x"):
        refused = view_if(comfy, {"Range": bad}, place)
        assert (refused.status_code, refused.headers["Content-Range"]) == (416, f"bytes */{size}")
    assert view_if(comfy, {"If-None-Match": whole.headers["ETag"]}, place).status_code == 304
    assert view_if(comfy, {"If-Modified-Since": whole.headers["Last-Modified"]}, place).status_code == 304
    head = requests.head(f"{comfy.url}/view", params={"filename": place["name"], "subfolder": ""}, timeout=10)
    assert (head.status_code, head.content, int(head.headers["Content-Length"])) == (200, b"", size)
    assert requests.get(whole.url.replace("/view", "/api/view"), timeout=10).content == whole.content


@pytest.mark.parametrize(
    ("query", "content_type"),
    [
        ({"preview": "webp"}, "image/webp"),
        ({"preview": "jpeg"}, "image/jpeg"),
        ({"preview": "jpeg;90"}, "image/jpeg"),
        ({"preview": "png"}, "image/webp"),
        ({"preview": "webp;abc"}, "image/webp"),
        ({"preview": "jpeg", "channel": "a"}, "image/webp"),
        ({"channel": "rgb"}, "image/png"),
        ({"channel": "a"}, "image/png"),
    ],
)
def test_files_are_re_encoded_on_demand(comfy: Target, query: dict[str, str], content_type: str) -> None:
    """``preview`` and ``channel`` make a new picture without ETag and ranges [17]."""
    name = upload(comfy, f"{unique('p')}.png", png()).json()["name"]

    answer = view(comfy, name, type="input", **query)

    assert (answer.status_code, answer.headers["Content-Type"]) == (200, content_type)
    assert "ETag" not in answer.headers
    with Image.open(io.BytesIO(answer.content)) as image:
        assert f"image/{(image.format or '').lower()}" == content_type


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({}, 404),
        ({"filename": ""}, 400),
        ({"filename": "nope.png"}, 404),
        ({"filename": "nope.png", "type": "bogus"}, 400),
        ({"filename": "../x.png"}, 400),
        ({"filename": "a..b.png"}, 400),
        ({"filename": "/etc/passwd"}, 400),
        ({"filename": "passwd", "subfolder": "../../../../../../etc"}, 403),
        ({"filename": "passwd", "subfolder": "/etc"}, 403),
        ({"filename": "..%2f..%2fetc%2fpasswd"}, 400),
        ({"filename": "a\0b.png"}, 404),
        ({"filename": "b.png", "subfolder": "a\0"}, 404),
        ({"filename": "a" * 300 + ".png"}, 404),
    ],
)
def test_files_outside_are_not_served(comfy: Target, query: dict[str, str], status: int) -> None:
    """Missing names, traversal and odd names have the recorded statuses and empty bodies [17]."""
    answer = requests.get(f"{comfy.url}/view", params=query, timeout=10)

    assert (answer.status_code, answer.content) == (status, b"")


@pytest.mark.parametrize(
    ("extension", "content_type"),
    [("html", "application/octet-stream"), ("svg", "image/svg+xml"), ("json", "application/json")],
)
def test_files_have_the_type_of_their_extension(comfy: Target, extension: str, content_type: str) -> None:
    """Pages are turned into downloads, the rest goes by its name [17]."""
    name = upload(comfy, f"{unique('f')}.{extension}", b"{}").json()["name"]

    assert view(comfy, name, type="input").headers["Content-Type"] == content_type
    assert view(comfy, name, type="input", preview="webp").status_code == 500


def test_saved_pictures_carry_the_prompt(comfy: Target) -> None:
    """PNG text chunks hold the prompt and everything in ``extra_pnginfo``."""
    prompt = saved(unique("meta"))
    entry = finished(comfy, prompt, extra_data={"extra_pnginfo": {"workflow": {"id": 7}}})

    content = view(comfy, **_place(entry["outputs"]["2"]["images"][0])).content
    with Image.open(io.BytesIO(content)) as image:
        texts = dict(image.info)

    assert json.loads(texts["prompt"]) == prompt
    assert json.loads(texts["workflow"]) == {"id": 7}


def test_save_prefixes_are_filled_in_and_kept_inside(comfy: Target) -> None:
    """``%width%`` and folders work, foreign placeholders stay, and ``..`` is an execution error [20]."""
    folder = unique("deep")
    good = finished(comfy, saved(f"{folder}/b/%date:yyyy%_%width%x%height%_%1.color%"))
    bad = finished(comfy, saved("../outside"))

    item = good["outputs"]["2"]["images"][0]
    assert item["filename"] == "%date:yyyy%_64x64_%1.color%_00001_.png"
    assert item["subfolder"] == f"{folder}/b"
    assert view(comfy, **_place(item)).status_code == 200
    data = bad["status"]["messages"][-1][1]
    assert data["exception_type"].endswith(("Exception", "OutsideOutput"))
    assert data["exception_message"].startswith(
        "**** ERROR: Saving image outside the output folder is not allowed."
    )


def test_pages_of_other_origins_are_refused(comfy: Target) -> None:
    """An Origin header of another host is a bare 403 on loopback [04]."""
    answer = requests.get(f"{comfy.url}/prompt", headers={"Origin": "http://example.org"}, timeout=10)

    assert (answer.status_code, answer.content) == (403, b"")
    assert requests.get(f"{comfy.url}/prompt", headers={"Origin": comfy.url}, timeout=10).status_code == 200


@pytest.mark.parametrize(("length", "status"), [(300, 200), (1000, 400)])
def test_long_chains_are_refused(comfy: Target, length: int, status: int) -> None:
    """Validation is recursive: a chain of about a thousand nodes is 400, one of hundreds runs [36]."""
    chain: dict[str, Any] = saved(unique("chain"))
    for step in range(length):
        above = "1" if step == 0 else f"i{step - 1}"
        chain[f"i{step}"] = {"class_type": "ImageInvert", "inputs": {"image": [above, 0]}}
    chain["2"]["inputs"]["images"] = [f"i{length - 1}", 0]

    answer = submit(comfy, chain)

    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["type"] == "prompt_outputs_failed_validation"
    else:
        requests.post(f"{comfy.url}/interrupt", json={"prompt_id": answer.json()["prompt_id"]}, timeout=10)
        history(comfy, answer.json()["prompt_id"])


@pytest.mark.parametrize("client_id", [None, "somebody-else"])
def test_progress_of_nobodys_prompts_goes_to_everyone(comfy: Target, client_id: str | None) -> None:
    """Without client_id all sockets get progress and previews, and nothing else; with one nobody else does [11]."""
    listener = Listener(f"ws{comfy.url[4:]}/ws?clientId={uuid.uuid4()}")
    prompt = saved("x")
    prompt["2"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
    finished(comfy, prompt, **({"client_id": client_id} if client_id else {}))
    listener.wait_for(1, lambda m: m.get("status") == 0 and "sid" not in m)

    kinds = {m.get("message") or next(iter(m)) for m in listener.heard}

    assert kinds == ({"status", "progress_state", "progress", "frame"} if client_id is None else {"status"})
    listener.close()


# What only the simulator can show: faults, endings, the newer profile ----------------------------------------


def test_a_cached_output_names_a_file_that_may_be_gone(comfy: Target) -> None:
    """A cached run writes nothing: after the file was deleted, its name leads to 404 [03]."""
    simulator = comfy.only_simulator("deletes a file on the server's disk")
    prompt = saved("cached")
    first = finished(comfy, prompt)["outputs"]["2"]["images"][0]
    (simulator.server.files.output / first["filename"]).unlink()

    second = finished(comfy, prompt)["outputs"]["2"]["images"][0]

    assert second == first
    assert view(comfy, **_place(second)).status_code == 404


def test_without_cache_everything_runs_again(tmp_path: Path) -> None:
    """``--cache-none``: the same prompt twice gives two files [38]."""
    with Simulator(tmp_path, cache="none") as simulator:
        comfy = Target(simulator.url, simulator)
        prompt = saved("again")
        names = [finished(comfy, prompt)["outputs"]["2"]["images"][0]["filename"] for _ in range(2)]

    assert names == ["again_00001_.png", "again_00002_.png"]


def test_the_newer_cache_lasts_over_prompts(tmp_path: Path) -> None:
    """A, B, A: the third names the first one's file in newer servers, and a new one in 0.3.64 [37]."""
    for profile, expected in (("newer", "a_00001_.png"), ("0.3.64", "a_00002_.png")):
        with Simulator(tmp_path / profile, profile=profile) as simulator:  # type: ignore[arg-type]  # both are profiles
            comfy = Target(simulator.url, simulator)
            a, b = saved("a"), saved("b")
            finished(comfy, a)
            finished(comfy, b)
            assert finished(comfy, a)["outputs"]["2"]["images"][0]["filename"] == expected


def test_bodies_over_the_limit_are_413(tmp_path: Path) -> None:
    """The limit counts for uploads and prompts, and ``/features`` tells it [33]."""
    with Simulator(tmp_path, upload_limit_bytes=1 << 20) as simulator:
        comfy = Target(simulator.url, simulator)
        fits = upload(comfy, "big.bin", bytes(900_000))
        big = upload(comfy, "big.bin", bytes(1_200_000))
        prompt = submit(comfy, saved("x" * 1_200_000))
        features = requests.get(f"{comfy.url}/features", timeout=10).json()

    assert fits.status_code == 200
    assert (big.status_code, prompt.status_code) == (413, 413)
    assert big.text == "Maximum request body size 1048576 exceeded."
    assert features["max_upload_size"] == 1 << 20


def test_a_restart_forgets_all_but_files(comfy: Target) -> None:
    """Queue, history and numbers are gone, outputs stay and are counted on, temp is empty [26]."""
    simulator = comfy.only_simulator("restarts the server")
    done = submit(comfy, saved("k9")).json()["prompt_id"]
    item = history(comfy, done)["outputs"]["2"]["images"][0]
    preview = saved("x")
    preview["2"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    temp = finished(comfy, preview)["outputs"]["2"]["images"][0]
    submit(comfy, slow())
    submit(comfy, saved("queued"))
    listener = Listener(f"ws{comfy.url[4:]}/ws?clientId=a")

    simulator.restart()

    assert listener.ended(5)
    listener.close()
    assert requests.get(f"{comfy.url}/queue", timeout=10).json() == {"queue_running": [], "queue_pending": []}
    assert requests.get(f"{comfy.url}/history", timeout=10).json() == {}
    assert view(comfy, **_place(item)).status_code == 200
    assert view(comfy, **_place(temp)).status_code == 404
    again = submit(comfy, saved("k9")).json()
    assert again["number"] == 0
    assert history(comfy, again["prompt_id"])["outputs"]["2"]["images"][0]["filename"] == "k9_00002_.png"


def test_a_socket_that_does_not_read_silences_all(comfy: Target) -> None:
    """Prompts go on and history is complete, but nobody hears anything until that socket ends [30]."""
    comfy.only_simulator("uses SimNoise, and the recorded server needs 15 s for it")
    listener = Listener(f"ws{comfy.url[4:]}/ws?clientId=a")
    deaf = socket.create_connection((urlsplit(comfy.url).hostname, urlsplit(comfy.url).port or 0))
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.sendall(
        b"GET /ws?clientId=deaf HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    noise = {
        "1": {"class_type": "SimNoise", "inputs": {"width": 1024, "height": 1024, "batch": 4}},
        "2": {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}},
    }
    wait_until(lambda: comfy.only_simulator("").server.hub.open_sockets == 2)
    finished(comfy, noise, client_id="deaf")
    entry = finished(comfy, saved("heard"), client_id="a")

    assert entry["status"]["status_str"] == "success"
    assert not listener.wait_for(1, lambda m: m.get("message") == "execution_success", 1.5)
    deaf.close()
    assert listener.wait_for(1, lambda m: m.get("message") == "execution_success", 10)
    listener.close()


@pytest.mark.parametrize("client_id", [["x"], {"a": 1}])
def test_a_client_id_that_is_no_text_kills_the_process(comfy: Target, client_id: Any) -> None:
    """A list or object as client_id is accepted with 200 and ends the server [42]; a number does not."""
    simulator = comfy.only_simulator("kills the server")
    assert finished(comfy, saved("number"), client_id=5)["status"]["completed"]

    assert submit(comfy, saved("poison"), client_id=client_id).status_code == 200

    wait_until(lambda: simulator.exit_code is not None)
    wait_until(lambda: _refuses(comfy.url))


def test_a_ui_value_that_is_no_json_kills_the_process_or_its_history(comfy: Target) -> None:
    """Without a socket the history answers 500 from then on; with one the process ends [42]."""
    simulator = comfy.only_simulator("uses SimUiObject, which kills the server")
    prompt_id = submit(comfy, {"1": {"class_type": "SimUiObject", "inputs": {"text": "b"}}}).json()[
        "prompt_id"
    ]
    wait_until(lambda: requests.get(f"{comfy.url}/history/{prompt_id}", timeout=10).status_code == 500)
    assert simulator.exit_code is None
    listener = Listener(f"ws{comfy.url[4:]}/ws?clientId=a")

    submit(comfy, {"1": {"class_type": "SimUiObject", "inputs": {"text": "a"}}}, client_id="a")

    assert listener.ended(5)
    wait_until(lambda: simulator.exit_code is not None)
    listener.close()


def test_bare_nan_goes_through(comfy: Target) -> None:
    """NaN and Infinity in ui values are written as bare tokens [42]."""
    comfy.only_simulator("uses SimUi")
    prompt_id = submit(
        comfy, {"1": {"class_type": "SimUi", "inputs": {"ui_json": '{"v": [NaN, Infinity]}'}}}
    ).json()
    history(comfy, prompt_id["prompt_id"])

    text = requests.get(f"{comfy.url}/history/{prompt_id['prompt_id']}", timeout=10).text

    assert '"v": [NaN, Infinity]' in text


def test_sigterm_ends_at_once(tmp_path: Path) -> None:
    """SIGTERM in the middle of a run: sockets are reset, nothing is drained, the log says how far it was [27]."""
    log = tmp_path / "executions.jsonl"
    arguments = ["--port", "0", "--data-dir", str(tmp_path), "--log", str(log)]
    command = [sys.executable, "-m", "genpulse.testing.simulator", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        comfy = Target(process.stdout.readline().split()[-1], None)
        listener = Listener(f"ws{comfy.url[4:]}/ws?clientId=a")
        prompt_id = submit(comfy, slow(), client_id="a").json()["prompt_id"]
        assert listener.wait_for(1, lambda m: m.get("message") == "executing")

        process.terminate()
        code = process.wait(2)

    assert code == -signal.SIGTERM
    assert listener.ended(2)
    listener.close()
    events = [(e["event"], e.get("prompt_id")) for e in map(json.loads, log.read_text().splitlines())]
    about_prompts = [event for event in events if event[1] is not None]
    assert about_prompts == [("submitted", prompt_id), ("started", prompt_id)]


@pytest.fixture
def newer(tmp_path: Path) -> Iterator[Target]:
    """A simulator that behaves as ComfyUI 0.38 does, by reading."""
    with Simulator(tmp_path / "newer", profile="newer") as simulator:
        yield Target(simulator.url, simulator)


def test_newer_servers_want_canonical_ids(newer: Target) -> None:
    """Only a canonical lower-case UUID is taken; null or nothing makes one."""
    good = str(uuid.uuid4())

    assert submit(newer, saved("a"), prompt_id=good).json()["prompt_id"] == good
    made = submit(newer, saved("a"), prompt_id=None).json()["prompt_id"]
    assert str(uuid.UUID(made)) == made
    for bad in ("job 1", good.upper(), good.replace("-", ""), 12, {"a": 1}):
        answer = submit(newer, saved("a"), prompt_id=bad)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_prompt_id")
    assert submit(newer, saved("a"), extra_data=None).status_code == 500
    unknown = submit(newer, {"1": {"class_type": "Nope", "inputs": {}, "_meta": {"title": "T"}}}).json()[
        "error"
    ]
    assert (unknown["type"], unknown["extra_info"]["node_title"]) == ("missing_node_type", "T")


def test_newer_servers_list_and_cancel_jobs(newer: Target) -> None:
    """One shape for waiting, running and ended prompts; cancel covers waiting and running ones."""
    done, running, waiting = (str(uuid.uuid4()) for _ in range(3))
    finished(newer, saved("job"), prompt_id=done)
    submit(newer, slow(), prompt_id=running)
    submit(newer, saved("job"), prompt_id=waiting)
    jobs = f"{newer.url}/api/jobs"

    def status(job_id: str) -> Any:
        answer = requests.get(f"{jobs}/{job_id}", timeout=10)
        return answer.json()["status"] if answer.ok else answer.status_code

    wait_until(lambda: status(running) == "in_progress")
    assert (status(done), status(waiting), status(str(uuid.uuid4()))) == ("completed", "pending", 404)
    page = requests.get(jobs, params={"status": "completed", "limit": "1"}, timeout=10).json()
    assert [job["id"] for job in page["jobs"]] == [done]
    assert page["pagination"] == {"offset": 0, "limit": 1, "total": 1, "has_more": False}
    for job_id, cancelled in ((waiting, True), (running, True), (done, False)):
        assert requests.post(f"{jobs}/{job_id}/cancel", timeout=10).json() == {"cancelled": cancelled}
    wait_until(lambda: status(running) == "cancelled")
    assert status(waiting) == 404
    assert requests.post(f"{jobs}/cancel", json={"job_ids": ["x"]}, timeout=10).status_code == 400


def test_the_recorded_version_has_no_jobs_api(comfy: Target) -> None:
    """0.3.64 answers 404 and 405, by which a client can tell."""
    comfy.only_simulator("a real server may be newer")

    assert requests.get(f"{comfy.url}/api/jobs", timeout=10).status_code == 404
    assert requests.post(f"{comfy.url}/api/jobs/x/cancel", timeout=10).status_code == 405


def wait_until(condition: Callable[[], bool], patience_s: float = 10) -> None:
    """Wait for a condition instead of a time."""
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


def _refuses(url: str) -> bool:
    try:
        requests.get(url, timeout=1)
    except requests.ConnectionError:
        return True
    return False
