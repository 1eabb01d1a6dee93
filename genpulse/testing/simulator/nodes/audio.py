"""
Audio nodes, with small encoders of their own, since nothing here may need an audio library.

FLAC carries the real samples. MP3 and Opus are valid files of the right length that hold silence: enough
for everything that stores, counts and serves files. Names and keys as in trace 20.
"""

from __future__ import annotations

import array
import hashlib
import json
import math
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from genpulse.testing.simulator.nodes.images import temp_prefix
from genpulse.testing.simulator.nodes.registry import NodeContext, Outcome, node, server_file

_METADATA = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
_EXTRAS = "comfy_extras.nodes_audio"
_BLOCK = 4096


@dataclass(frozen=True)
class Audio:
    """Samples of 16 bits, one array for each channel; an empty tone is silence."""

    sample_rate: int
    channels: tuple[array.array[int], ...]

    @property
    def samples(self) -> int:
        """Samples in each channel."""
        return len(self.channels[0]) if self.channels else 0

    def __repr__(self) -> str:
        return f"audio({len(self.channels)}x{self.samples}@{self.sample_rate})"


@node(
    "EmptyAudio",
    required={
        "duration": ("FLOAT", {"default": 60.0, "min": 0.0, "max": 0xFFFFFFFFFFFFFFFF, "step": 0.01}),
        "sample_rate": ("INT", {"default": 44100}),
        "channels": ("INT", {"default": 2, "min": 1, "max": 2}),
    },
    returns=("AUDIO",),
    display_name="Empty Audio",
    module=_EXTRAS,
    category="audio",
)
def empty_audio(_ctx: NodeContext, duration: float, sample_rate: int, channels: int) -> tuple[Any, ...]:
    silence = array.array("h", bytes(2 * max(1, round(duration * sample_rate))))
    return (Audio(sample_rate, (silence,) * channels),)


@node(
    "SimAudio",
    required={
        "seconds": ("FLOAT", {"default": 0.5, "min": 0.01, "max": 60.0, "step": 0.01}),
        "frequency": ("FLOAT", {"default": 440.0, "min": 20.0, "max": 20000.0}),
    },
    returns=("AUDIO",),
    module="custom_nodes.genpulse_simulator",
    category="simulator",
)
def sim_audio(_ctx: NodeContext, seconds: float, frequency: float) -> tuple[Any, ...]:
    """A tone of one channel at 22.05 kHz."""
    rate = 22050
    step = 2 * math.pi * frequency / rate
    tone = array.array("h", (round(12000 * math.sin(step * i)) for i in range(max(1, round(seconds * rate)))))
    return (Audio(rate, (tone,)),)


def _save(
    ctx: NodeContext,
    audio: Audio,
    prefix: str,
    extension: str,
    encode: Callable[[Audio, str], bytes],
    *,
    temp: bool = False,
) -> Outcome:
    place = ctx.files.save_path(prefix, temp=temp)
    path = place.next_file(extension)
    path.write_bytes(encode(audio, json.dumps(ctx.prompt)))
    ctx.written(path)
    return Outcome(ui={"audio": [server_file(path, place.subfolder, "temp" if temp else "output")]})


_AUDIO_INPUTS = {"audio": ("AUDIO",), "filename_prefix": ("STRING", {"default": "audio/ComfyUI"})}


@node(
    "SaveAudio",
    required=_AUDIO_INPUTS,
    hidden=_METADATA,
    output_node=True,
    display_name="Save Audio (FLAC)",
    module=_EXTRAS,
    category="audio",
)
def save_audio(ctx: NodeContext, audio: Audio, filename_prefix: str) -> Outcome:
    return _save(ctx, audio, filename_prefix, ".flac", flac)


@node(
    "SaveAudioMP3",
    required={**_AUDIO_INPUTS, "quality": (["V0", "128k", "320k"], {"default": "V0"})},
    hidden=_METADATA,
    output_node=True,
    display_name="Save Audio (MP3)",
    module=_EXTRAS,
    category="audio",
)
def save_audio_mp3(ctx: NodeContext, audio: Audio, filename_prefix: str, quality: str = "V0") -> Outcome:
    del quality
    return _save(ctx, audio, filename_prefix, ".mp3", mp3)


@node(
    "SaveAudioOpus",
    required={**_AUDIO_INPUTS, "quality": (["64k", "96k", "128k", "192k", "320k"], {"default": "128k"})},
    hidden=_METADATA,
    output_node=True,
    display_name="Save Audio (Opus)",
    module=_EXTRAS,
    category="audio",
)
def save_audio_opus(ctx: NodeContext, audio: Audio, filename_prefix: str, quality: str = "128k") -> Outcome:
    del quality
    return _save(ctx, audio, filename_prefix, ".opus", opus)


@node(
    "PreviewAudio",
    required={"audio": ("AUDIO",)},
    hidden=_METADATA,
    output_node=True,
    display_name="Preview Audio",
    module=_EXTRAS,
    category="audio",
)
def preview_audio(ctx: NodeContext, audio: Audio) -> Outcome:
    return _save(ctx, audio, temp_prefix(), ".flac", flac, temp=True)


def _crc_table(polynomial: int, bits: int) -> list[int]:
    top, mask = 1 << (bits - 1), (1 << bits) - 1
    table = []
    for byte in range(256):
        value = byte << (bits - 8)
        for _ in range(8):
            value = ((value << 1) ^ polynomial if value & top else value << 1) & mask
        table.append(value)
    return table


_CRC8 = _crc_table(0x07, 8)
_CRC16 = _crc_table(0x8005, 16)
_CRC32 = _crc_table(0x04C11DB7, 32)


def _crc(data: bytes, table: list[int], bits: int) -> int:
    value, shift, mask = 0, bits - 8, (1 << bits) - 1
    for byte in data:
        value = ((value << 8) & mask) ^ table[(value >> shift) ^ byte]
    return value


def _big_endian(samples: array.array[int]) -> bytes:
    swapped = array.array("h", samples)
    if sys.byteorder == "little":
        swapped.byteswap()
    return swapped.tobytes()


def flac(audio: Audio, prompt: str) -> bytes:
    """A FLAC file (RFC 9639) without compression, but for constant blocks, so silence is small."""
    depth, count = 16, len(audio.channels)
    interleaved = array.array("h", bytes(2 * count * audio.samples))
    for number, channel in enumerate(audio.channels):
        interleaved[number::count] = channel
    if sys.byteorder == "big":
        interleaved.byteswap()
    digest = hashlib.md5(interleaved.tobytes(), usedforsecurity=False).digest()
    packed = audio.sample_rate << 44 | (count - 1) << 41 | (depth - 1) << 36 | audio.samples
    stream_info = struct.pack(">HH", _BLOCK, _BLOCK) + bytes(6) + packed.to_bytes(8, "big") + digest
    comment = f"prompt={prompt}".encode()
    vendor = b"genpulse"
    comments = struct.pack(f"<I{len(vendor)}sII", len(vendor), vendor, 1, len(comment)) + comment
    parts = [b"fLaC\x00", len(stream_info).to_bytes(3, "big"), stream_info]
    parts += [b"\x84", len(comments).to_bytes(3, "big"), comments]
    for number, start in enumerate(range(0, audio.samples, _BLOCK)):
        blocks = [channel[start : start + _BLOCK] for channel in audio.channels]
        # 0x70: the block size follows in 16 bits. Low half: channels, and 16 bits for each sample.
        head = b"\xff\xf8\x70" + bytes([(count - 1) << 4 | 0x08]) + _utf8_like(number)
        head += (len(blocks[0]) - 1).to_bytes(2, "big")
        frame = head + bytes([_crc(head, _CRC8, 8)])
        for block in blocks:
            constant = block.count(block[0]) == len(block)
            frame += b"\x00" + _big_endian(block[:1]) if constant else b"\x02" + _big_endian(block)
        parts.append(frame + _crc(frame, _CRC16, 16).to_bytes(2, "big"))
    return b"".join(parts)


def _utf8_like(number: int) -> bytes:
    """FLAC numbers its frames in the code of UTF-8, which Python offers for what we need."""
    return (
        chr(number).encode()
        if not 0xD800 <= number < 0xE000
        else b"\xed" + bytes([0x80 | number >> 6 & 0x3F, 0x80 | number & 0x3F])
    )


def mp3(audio: Audio, prompt: str) -> bytes:
    """Silent MPEG-1 layer III frames of 128 kbit/s behind an ID3 tag with the prompt."""
    text = b"\x03prompt\x00" + prompt.encode()
    frame = b"TXXX" + _syncsafe(len(text)) + b"\x00\x00" + text
    tag = b"ID3\x04\x00\x00" + _syncsafe(len(frame)) + frame
    # Header: MPEG-1, layer III, no CRC, 128 kbit/s, 44.1 kHz, stereo. All-zero side information is silence.
    silent = b"\xff\xfb\x90\x00" + bytes(413)
    seconds = audio.samples / audio.sample_rate
    return tag + silent * max(1, math.ceil(seconds * 44100 / 1152))


def _syncsafe(number: int) -> bytes:
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))


def opus(audio: Audio, prompt: str) -> bytes:
    """Silent Opus packets of 20 ms in Ogg pages (RFC 7845)."""
    count = len(audio.channels)
    head = b"OpusHead" + struct.pack("<BBHIhB", 1, count, 0, 48000, 0, 0)
    comment = f"prompt={prompt}".encode()
    tags = b"OpusTags" + struct.pack("<I8sII", 8, b"genpulse", 1, len(comment)) + comment
    packets = max(1, math.ceil(audio.samples / audio.sample_rate * 50))
    pages = [_ogg_page([head], 0, 0, 2), _ogg_page([tags], 0, 1, 0)]
    silence = b"\xfc\xff\xfe" if count == 2 else b"\xf8\xff\xfe"
    for number, start in enumerate(range(0, packets, 50)):
        here = min(50, packets - start)
        last = start + here >= packets
        pages.append(_ogg_page([silence] * here, (start + here) * 960, number + 2, 4 if last else 0))
    return b"".join(pages)


def _ogg_page(packets: list[bytes], position: int, sequence: int, flags: int) -> bytes:
    lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
    # A page has at most 255 lacing values, so a very long comment is cut rather than continued.
    body = b"".join(packets)
    if len(lacing) > 255:
        body, lacing = body[: 254 * 255 + 10], b"\xff" * 254 + b"\x0a"
    head = struct.pack("<4sBBqIII", b"OggS", 0, flags, position, 0x47504C53, sequence, 0)
    page = head + bytes([len(lacing)]) + lacing + body
    return page[:22] + struct.pack("<I", _crc(page, _CRC32, 32)) + page[26:]
