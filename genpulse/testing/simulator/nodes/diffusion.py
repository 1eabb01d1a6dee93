"""
Stand-ins for the usual text-to-image graph: they draw instead of denoising, and say so in the picture.

The picture is a pure function of prompt text, seed, steps, cfg, size and number in the batch, so a test
can tell whether two runs had the same inputs. A sampler takes ``step_s`` for each step and sends previews
that grow clearer, so progress bars have something to show. Model names are not checked.
"""

from __future__ import annotations

import hashlib
import random
import textwrap
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from genpulse.testing.simulator.nodes.images import MAX_SIDE
from genpulse.testing.simulator.nodes.registry import Images, NodeContext, node

_SAMPLERS = [
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "lms",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_sde",
    "ddim",
    "uni_pc",
]
_SCHEDULERS = ["simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal"]
_SEED = ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True})
_CHECKPOINTS = [
    "simulated.safetensors",
    "v1-5-pruned-emaonly.safetensors",
    "v1-5-pruned-emaonly-fp16.safetensors",
    "sd_xl_base_1.0.safetensors",
]
_PREVIEW_SIDE = 256


@dataclass(frozen=True)
class Model:
    """What a loader gives: only a name, and the LoRAs put on it."""

    name: str


@dataclass(frozen=True)
class Conditioning:
    """The text of a prompt."""

    text: str


@dataclass(frozen=True)
class Latent:
    """A picture that is not drawn yet: everything it depends on."""

    width: int
    height: int
    batch: int = 1
    recipe: tuple[str, ...] = ()
    """One line for each sampler it went through; all of them are in the picture."""
    text: str = ""
    seed: int = 0
    source: Images | None = None


def _any_model(name: str) -> dict[str, Any]:
    """Any file name is a model here, so workflows from elsewhere run unchanged."""
    return {"validated": (name,), "validate": lambda _files, _inputs: None}


@node(
    "CheckpointLoaderSimple",
    required={"ckpt_name": (_CHECKPOINTS, {"tooltip": "The name of the checkpoint (model) to load."})},
    returns=("MODEL", "CLIP", "VAE"),
    display_name="Load Checkpoint",
    category="loaders",
    **_any_model("ckpt_name"),
)
def checkpoint_loader(_ctx: NodeContext, ckpt_name: str) -> tuple[Any, ...]:
    model = Model(str(ckpt_name))
    return model, model, model


@node(
    "LoraLoader",
    required={
        "model": ("MODEL",),
        "clip": ("CLIP",),
        "lora_name": (["simulated_lora.safetensors"],),
        "strength_model": ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}),
        "strength_clip": ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}),
    },
    returns=("MODEL", "CLIP"),
    display_name="Load LoRA",
    category="loaders",
    **_any_model("lora_name"),
)
def lora_loader(
    _ctx: NodeContext, model: Model, clip: Model, lora_name: str, strength_model: float, strength_clip: float
) -> tuple[Any, ...]:
    return Model(f"{model.name} + {lora_name} x{strength_model:g}"), Model(
        f"{clip.name} + {lora_name} x{strength_clip:g}"
    )


@node(
    "VAELoader",
    required={"vae_name": (["simulated_vae.safetensors"],)},
    returns=("VAE",),
    display_name="Load VAE",
    category="loaders",
    **_any_model("vae_name"),
)
def vae_loader(_ctx: NodeContext, vae_name: str) -> tuple[Any, ...]:
    return (Model(str(vae_name)),)


@node(
    "CLIPTextEncode",
    required={"text": ("STRING", {"multiline": True, "dynamicPrompts": True}), "clip": ("CLIP",)},
    returns=("CONDITIONING",),
    display_name="CLIP Text Encode (Prompt)",
    category="conditioning",
)
def clip_text_encode(_ctx: NodeContext, text: str, clip: Model) -> tuple[Any, ...]:
    del clip
    return (Conditioning(text),)


@node(
    "EmptyLatentImage",
    required={
        "width": ("INT", {"default": 512, "min": 16, "max": MAX_SIDE, "step": 8}),
        "height": ("INT", {"default": 512, "min": 16, "max": MAX_SIDE, "step": 8}),
        "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
    },
    returns=("LATENT",),
    display_name="Empty Latent Image",
    category="latent",
)
def empty_latent(_ctx: NodeContext, width: int, height: int, batch_size: int) -> tuple[Any, ...]:
    return (Latent(width // 8 * 8, height // 8 * 8, batch_size),)


@node(
    "VAEEncode",
    required={"pixels": ("IMAGE",), "vae": ("VAE",)},
    returns=("LATENT",),
    display_name="VAE Encode",
    category="latent",
)
def vae_encode(_ctx: NodeContext, pixels: Images, vae: Model) -> tuple[Any, ...]:
    del vae
    width, height = pixels[0].size
    return (Latent(max(8, width // 8 * 8), max(8, height // 8 * 8), len(pixels), source=pixels),)


@node(
    "KSampler",
    required={
        "model": ("MODEL",),
        "seed": _SEED,
        "steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
        "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}),
        "sampler_name": (_SAMPLERS,),
        "scheduler": (_SCHEDULERS,),
        "positive": ("CONDITIONING",),
        "negative": ("CONDITIONING",),
        "latent_image": ("LATENT",),
        "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
    },
    returns=("LATENT",),
    category="sampling",
)
def ksampler(
    ctx: NodeContext,
    model: Model,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent_image: Latent,
    denoise: float = 1.0,
) -> tuple[Any, ...]:
    line = f"{model.name} {sampler_name}/{scheduler} seed {seed} steps {steps} cfg {cfg:g} denoise {denoise:g} -{negative.text}"
    return (_sample(ctx, latent_image, positive, line, seed, steps),)


@node(
    "KSamplerAdvanced",
    required={
        "model": ("MODEL",),
        "add_noise": (["enable", "disable"],),
        "noise_seed": _SEED,
        "steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
        "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}),
        "sampler_name": (_SAMPLERS,),
        "scheduler": (_SCHEDULERS,),
        "positive": ("CONDITIONING",),
        "negative": ("CONDITIONING",),
        "latent_image": ("LATENT",),
        "start_at_step": ("INT", {"default": 0, "min": 0, "max": 10000}),
        "end_at_step": ("INT", {"default": 10000, "min": 0, "max": 10000}),
        "return_with_leftover_noise": (["disable", "enable"],),
    },
    returns=("LATENT",),
    display_name="KSampler (Advanced)",
    category="sampling",
)
def ksampler_advanced(
    ctx: NodeContext,
    model: Model,
    add_noise: str,
    noise_seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent_image: Latent,
    start_at_step: int,
    end_at_step: int,
    return_with_leftover_noise: str,
) -> tuple[Any, ...]:
    line = (
        f"{model.name} {sampler_name}/{scheduler} seed {noise_seed} steps {start_at_step}-{end_at_step} of {steps} "
        f"cfg {cfg:g} noise {add_noise}/{return_with_leftover_noise} -{negative.text}"
    )
    done = max(1, min(steps, end_at_step) - start_at_step)
    return (_sample(ctx, latent_image, positive, line, noise_seed, done),)


def _sample(
    ctx: NodeContext, latent: Latent, positive: Conditioning, line: str, seed: int, steps: int
) -> Latent:
    """Take the time, report each step, and return what the picture will depend on."""
    result = replace(latent, recipe=(*latent.recipe, line), text=positive.text, seed=seed)
    small = _shrunk(draw(result, 0)) if ctx.previews else None
    for step in range(1, steps + 1):
        ctx.sleep(ctx.step_s)
        preview = None
        if small is not None:
            blurred = (
                small.filter(ImageFilter.GaussianBlur(12 * (steps - step) / steps)) if step < steps else small
            )
            preview = ("JPEG", blurred)
        ctx.progress(step, steps, preview)
    return result


@node(
    "VAEDecode",
    required={"samples": ("LATENT",), "vae": ("VAE",)},
    returns=("IMAGE",),
    display_name="VAE Decode",
    category="latent",
)
def vae_decode(_ctx: NodeContext, samples: Latent, vae: Model) -> tuple[Any, ...]:
    del vae
    return (Images(draw(samples, number) for number in range(samples.batch)),)


def draw(latent: Latent, number: int) -> Image.Image:
    """
    The simulated picture: a sky, hills and discs in colours from the inputs, the prompt, and the word
    "simulated".

    Equal inputs give equal pixels on one version of Pillow; any other seed or text looks different.
    """
    width, height = latent.width, latent.height
    key = "\n".join([latent.text, *latent.recipe, f"{width}x{height}#{number}"])
    dice = random.Random(hashlib.sha256(key.encode()).digest())  # noqa: S311  a picture, no secret
    if latent.source is not None:
        image = latent.source[number % len(latent.source)].resize((width, height))
        tint = Image.new("RGB", image.size, _colour(dice))
        image = Image.blend(image, tint, 0.25)
    else:
        image = _landscape(dice, width, height)
    _caption(ImageDraw.Draw(image), latent, width, height)
    return image


def _colour(dice: random.Random, low: int = 30, high: int = 230) -> tuple[int, int, int]:
    return dice.randint(low, high), dice.randint(low, high), dice.randint(low, high)


def _landscape(dice: random.Random, width: int, height: int) -> Image.Image:
    top, bottom = _colour(dice), _colour(dice, 120, 250)
    sky = Image.new("RGB", (1, 64))
    for y in range(64):
        share = y / 63
        sky.putpixel((0, y), tuple(round(a + (b - a) * share) for a, b in zip(top, bottom, strict=True)))
    image = sky.resize((width, height), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    for _ in range(dice.randint(3, 7)):
        radius = dice.uniform(0.03, 0.16) * min(width, height)
        left, top_edge = dice.uniform(0, width) - radius, dice.uniform(0, height * 0.6) - radius
        box = (left, top_edge, left + 2 * radius, top_edge + 2 * radius)
        pen.ellipse(box, fill=_colour(dice, 80, 255))
    for layer in range(3):
        base = height * (0.55 + 0.13 * layer)
        ridge = [base + dice.uniform(-0.1, 0.1) * height for _ in range(6)]
        points = [(width * i / 5, level) for i, level in enumerate(ridge)]
        pen.polygon([(0, height), *points, (width, height)], fill=_colour(dice, 10, 150))
    return image


def _caption(pen: ImageDraw.ImageDraw, latent: Latent, width: int, height: int) -> None:
    size = max(8, min(width, height) // 22)
    font = ImageFont.load_default(size)
    pen.rectangle((0, 0, width, size * 1.6), fill=(20, 20, 24))
    pen.text((size * 0.5, size * 0.15), f"simulated · seed {latent.seed}", font=font, fill=(255, 214, 90))
    lines = textwrap.wrap(latent.text, max(8, int(width / size * 1.8)))[:3]
    if lines:
        depth = size * (1.3 * len(lines) + 0.5)
        pen.rectangle((0, height - depth, width, height), fill=(20, 20, 24))
        for row, line in enumerate(lines):
            place = (size * 0.5, height - depth + size * (0.15 + 1.3 * row))
            pen.text(place, line, font=font, fill=(235, 235, 235))


def _shrunk(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    return small
