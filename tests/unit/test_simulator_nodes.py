"""What the simulator's nodes make: the right pixels, the same picture for the same inputs, valid files."""

from __future__ import annotations

import hashlib
import io
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image, ImageSequence

from genpulse.testing.simulator import Simulator


@pytest.fixture
def simulator(tmp_path: Path) -> Any:
    """A simulator that takes no time for its steps."""
    with Simulator(tmp_path, step_s=0) as running:
        yield running


def run(simulator: Simulator, prompt: dict[str, Any]) -> Any:
    """Run a prompt and return its history entry."""
    answer = requests.post(f"{simulator.url}/prompt", json={"prompt": prompt}, timeout=10).json()
    assert answer.get("node_errors") == {}, answer
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = requests.get(f"{simulator.url}/history/{answer['prompt_id']}", timeout=10).json()
        if found:
            return found[answer["prompt_id"]]
        time.sleep(0.005)
    raise AssertionError("the prompt did not end")


def outputs(simulator: Simulator, prompt: dict[str, Any], key: str = "images") -> list[bytes]:
    """The files of a successful prompt."""
    entry = run(simulator, prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    items = [item for node in entry["outputs"].values() for item in node[key]]
    return [requests.get(f"{simulator.url}/view", params=item, timeout=10).content for item in items]


def picture(content: bytes) -> Image.Image:
    """A file as an RGB image."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of a prompt."""
    return {"class_type": class_type, "inputs": inputs}


def empty(color: int, width: int = 40, height: int = 20, batch: int = 1) -> dict[str, Any]:
    """EmptyImage."""
    return node("EmptyImage", width=width, height=height, batch_size=batch, color=color)


def save(above: str) -> dict[str, Any]:
    """SaveImage."""
    return node("SaveImage", images=[above, 0], filename_prefix="x")


@pytest.mark.parametrize(
    ("middle", "size", "color"),
    [
        (node("ImageInvert", image=["1", 0]), (40, 20), (0xEF, 0xDF, 0xCF)),
        (
            node("ImageScale", image=["1", 0], upscale_method="lanczos", width=8, height=8, crop="center"),
            (8, 8),
            (0x10, 0x20, 0x30),
        ),
        (
            node("ImageScale", image=["1", 0], upscale_method="area", width=20, height=0, crop="disabled"),
            (20, 10),
            (0x10, 0x20, 0x30),
        ),
        (
            node("ImageScaleBy", image=["1", 0], upscale_method="nearest-exact", scale_by=2.5),
            (100, 50),
            (0x10, 0x20, 0x30),
        ),
        (node("ImageCrop", image=["1", 0], width=500, height=5, x=30, y=2), (10, 5), (0x10, 0x20, 0x30)),
    ],
    ids=lambda value: value.get("class_type") if isinstance(value, dict) else None,
)
def test_image_nodes_compute_the_right_pixels(
    simulator: Simulator, middle: dict[str, Any], size: tuple[int, int], color: tuple[int, int, int]
) -> None:
    """Size and colour follow from the inputs."""
    (content,) = outputs(simulator, {"1": empty(0x102030), "2": middle, "3": save("2")})

    image = picture(content)

    assert image.size == size
    assert image.getcolors() == [(size[0] * size[1], color)]


def test_batches_become_several_files(simulator: Simulator) -> None:
    """ImageBatch joins batches, the second scaled to the first, and each item is a file of its own."""
    prompt = {
        "1": empty(0xFF0000, 40, 20, 2),
        "2": empty(0x00FF00, 9, 9),
        "3": node("ImageBatch", image1=["1", 0], image2=["2", 0]),
        "4": save("3"),
    }

    images = [picture(content) for content in outputs(simulator, prompt)]

    assert [image.size for image in images] == [(40, 20)] * 3
    assert [image.getpixel((20, 10)) for image in images] == [(255, 0, 0), (255, 0, 0), (0, 255, 0)]


def test_animations_have_all_frames(simulator: Simulator) -> None:
    """SaveAnimatedWEBP writes one file with a frame for each item of the batch."""
    prompt: dict[str, Any] = {
        "1": empty(0xFF0000),
        "2": empty(0x0000FF),
        "3": node("ImageBatch", image1=["1", 0], image2=["2", 0]),
        "4": node(
            "SaveAnimatedWEBP",
            images=["3", 0],
            filename_prefix="a",
            fps=5.0,
            lossless=True,
            quality=80,
            method="fastest",
        ),
    }

    (content,) = outputs(simulator, prompt)

    with Image.open(io.BytesIO(content)) as image:
        frames = [frame.convert("RGB").getpixel((0, 0)) for frame in ImageSequence.Iterator(image)]
    assert frames == [(255, 0, 0), (0, 0, 255)]


def text_to_image(text: str = "a fox", seed: int = 1, **sampler: Any) -> dict[str, Any]:
    """The usual graph."""
    settings = {"steps": 3, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": node("KSampler", seed=seed, **{**settings, **sampler}, **links),
        "4": node("CheckpointLoaderSimple", ckpt_name="any-model.safetensors"),
        "5": node("EmptyLatentImage", width=256, height=128, batch_size=2),
        "6": node("CLIPTextEncode", text=text, clip=["4", 1]),
        "7": node("CLIPTextEncode", text="blurry", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": save("8"),
    }


def test_the_simulated_picture_depends_on_its_inputs_alone(simulator: Simulator) -> None:
    """Text, seed, settings and number in the batch decide every pixel; nothing else does."""

    def digests(prompt: dict[str, Any]) -> list[str]:
        requests.post(f"{simulator.url}/free", json={"free_memory": True}, timeout=10)
        return [hashlib.sha256(picture(c).tobytes()).hexdigest() for c in outputs(simulator, prompt)]

    first = digests(text_to_image())

    assert digests(text_to_image()) == first
    assert len(set(first)) == 2
    others = [text_to_image("a hen"), text_to_image(seed=2), text_to_image(steps=4), text_to_image(cfg=3.0)]
    for other in others:
        assert not {*digests(other)} & {*first}


def test_flac_files_hold_the_samples(simulator: Simulator) -> None:
    """The stream information names rate, channels, length and the digest of the samples."""
    prompt = {
        "1": node("SimAudio", seconds=0.5, frequency=440.0),
        "2": node("SaveAudio", audio=["1", 0], filename_prefix="audio/t"),
    }

    (content,) = outputs(simulator, prompt, "audio")

    assert content[:4] == b"fLaC"
    packed = int.from_bytes(content[18:26], "big")
    rate, channels, depth, samples = (
        packed >> 44,
        (packed >> 41 & 7) + 1,
        (packed >> 36 & 31) + 1,
        packed & (1 << 36) - 1,
    )
    assert (rate, channels, depth, samples) == (22050, 1, 16, 11025)
    assert content[26:42] == hashlib.md5(_verbatim_samples(content)).digest()


def _verbatim_samples(content: bytes) -> bytes:
    """Samples of a mono FLAC file of verbatim blocks, as little-endian bytes."""
    place = 4
    last = False
    while not last:
        last, length = content[place] & 0x80 != 0, int.from_bytes(content[place + 1 : place + 4], "big")
        place += 4 + length
    samples = b""
    while place < len(content):
        assert content[place : place + 3] == b"\xff\xf8\x70"
        (size,) = struct.unpack_from(">H", content, place + 5)
        block = content[place + 9 : place + 9 + 2 * (size + 1)]
        samples += struct.pack(f"<{size + 1}h", *struct.unpack(f">{size + 1}h", block))
        place += 9 + len(block) + 2
    return samples


@pytest.mark.parametrize(("class_type", "magic"), [("SaveAudioMP3", b"ID3"), ("SaveAudioOpus", b"OggS")])
def test_other_audio_files_are_what_they_say(simulator: Simulator, class_type: str, magic: bytes) -> None:
    """MP3 and Opus files begin as such and grow with the length of the sound."""

    def content(seconds: float) -> bytes:
        audio = node("EmptyAudio", duration=seconds, sample_rate=44100, channels=2)
        saved = node(class_type, audio=["1", 0], filename_prefix="audio/t", quality="128k")
        return outputs(simulator, {"1": audio, "2": saved}, "audio")[0]

    short, long = content(1.0), content(4.0)

    assert short.startswith(magic)
    assert len(long) > len(short)


def test_files_of_any_kind_can_be_made(simulator: Simulator) -> None:
    """SimFile puts any bytes under any key, for tests of collectors."""
    prompt = {"1": node("SimFile", filename_prefix="v/clip", extension="mp4", key="gifs", content="bytes")}

    entry = run(simulator, prompt)

    assert entry["outputs"] == {
        "1": {"gifs": [{"filename": "clip_00001_.mp4", "subfolder": "v", "type": "output"}]}
    }


def test_every_node_describes_itself(simulator: Simulator) -> None:
    """``/object_info`` lists all nodes with inputs, order and outputs in ComfyUI's shape."""
    described = requests.get(f"{simulator.url}/object_info", timeout=10).json()

    assert {"KSampler", "LoadImage", "SaveImage", "SimSleep"} <= set(described)
    for name, info in described.items():
        assert info["name"] == name
        assert len(info["output"]) == len(info["output_name"]) == len(info["output_is_list"])
        for group, names in info["input_order"].items():
            assert list(info["input"][group]) == names
