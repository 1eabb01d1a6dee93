"""
The image and value nodes of ComfyUI that the simulator really executes, with Pillow.

Declarations, ranges, file names and metadata follow ComfyUI 0.3.64 (``nodes.py``, ``comfy_extras``),
``/object_info`` of the recorded server and traces 01, 02, 15, 18 and 20. Pixels are eight-bit RGB all the
way, where the real nodes compute in floats; they agree on what these nodes can express.
"""

from __future__ import annotations

import json
import math
import random
import string
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo

from genpulse.testing.simulator.files import Directories, file_digest
from genpulse.testing.simulator.nodes.registry import Images, NodeContext, Outcome, node, server_file

MAX_SIDE = 16384
_SCALE_METHODS = ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]
_RESAMPLING = {
    "nearest-exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_METADATA = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}


def _int(default: int, low: int, high: int, **more: Any) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": low, "max": high, **more}


def _rgb(color: int) -> tuple[int, int, int]:
    return (color >> 16) & 255, (color >> 8) & 255, color & 255


def png_info(ctx: NodeContext) -> PngInfo:
    """The prompt and everything in ``extra_pnginfo`` as PNG text chunks."""
    info = PngInfo()
    info.add_text("prompt", json.dumps(ctx.prompt))
    for key, value in (ctx.extra_pnginfo or {}).items():
        info.add_text(key, json.dumps(value))
    return info


def temp_prefix() -> str:
    """``ComfyUI_temp_xlkag``: the prefix of preview files, new for each node object."""
    return "ComfyUI_temp_" + "".join(random.choices(string.ascii_lowercase, k=5))  # noqa: S311  a name, no secret


@node(
    "EmptyImage",
    required={
        "width": _int(512, 1, MAX_SIDE, step=1),
        "height": _int(512, 1, MAX_SIDE, step=1),
        "batch_size": _int(1, 1, 4096),
        "color": _int(0, 0, 0xFFFFFF, step=1, display="color"),
    },
    returns=("IMAGE",),
)
def empty_image(_ctx: NodeContext, width: int, height: int, batch_size: int, color: int) -> tuple[Any, ...]:
    # One picture serves the whole batch: nodes never change an image in place.
    return (Images([Image.new("RGB", (width, height), _rgb(color))] * batch_size),)


def _image_is_there(files: Directories, inputs: Mapping[str, Any]) -> str | None:
    image = inputs.get("image")
    if not isinstance(image, str) or files.input_path(image) is None:
        return f"Invalid image file: {image}"
    return None


def _image_digest(files: Directories, inputs: Mapping[str, Any]) -> object:
    path = files.input_path(str(inputs.get("image")))
    return file_digest(path) if path is not None else math.nan


@node(
    "LoadImage",
    required={"image": (["example.png"], {"image_upload": True})},
    returns=("IMAGE", "MASK"),
    display_name="Load Image",
    validate=_image_is_there,
    validated=("image",),
    fingerprint=_image_digest,
)
def load_image(ctx: NodeContext, image: str) -> tuple[Any, ...]:
    path = ctx.files.input_path(image)
    if path is None:
        raise FileNotFoundError(2, "No such file or directory", image)
    frames: list[Image.Image] = []
    masks: list[Image.Image] = []
    with Image.open(path) as opened:
        for frame in ImageSequence.Iterator(opened):
            upright = ImageOps.exif_transpose(frame)
            if frames and upright.size != frames[0].size:
                continue
            frames.append(upright.convert("RGB"))
            if "A" in upright.getbands():
                masks.append(ImageOps.invert(upright.getchannel("A")))
            else:
                masks.append(Image.new("L", (64, 64), 0))
    return Images(frames), Images(masks)


@node(
    "ImageScale",
    required={
        "image": ("IMAGE",),
        "upscale_method": (_SCALE_METHODS,),
        "width": _int(512, 0, MAX_SIDE, step=1),
        "height": _int(512, 0, MAX_SIDE, step=1),
        "crop": (["disabled", "center"],),
    },
    returns=("IMAGE",),
    display_name="Upscale Image",
    category="image/upscaling",
)
def image_scale(
    _ctx: NodeContext, image: Images, upscale_method: str, width: int, height: int, crop: str
) -> tuple[Any, ...]:
    if width == 0 and height == 0:
        return (image,)
    old_width, old_height = image[0].size
    # A side of 0 follows from the other one and the shape of the picture.
    width = width or max(1, round(old_width * height / old_height))
    height = height or max(1, round(old_height * width / old_width))
    return (Images(_scaled(item, width, height, upscale_method, crop) for item in image),)


def _scaled(image: Image.Image, width: int, height: int, method: str, crop: str = "disabled") -> Image.Image:
    if crop == "center":
        old_width, old_height = image.size
        old_aspect, new_aspect = old_width / old_height, width / height
        x = round((old_width - old_width * (new_aspect / old_aspect)) / 2) if old_aspect > new_aspect else 0
        y = round((old_height - old_height * (old_aspect / new_aspect)) / 2) if old_aspect < new_aspect else 0
        image = image.crop((x, y, old_width - x, old_height - y))
    return image.resize((width, height), _RESAMPLING[method])


@node(
    "ImageScaleBy",
    required={
        "image": ("IMAGE",),
        "upscale_method": (_SCALE_METHODS,),
        "scale_by": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 8.0, "step": 0.01}),
    },
    returns=("IMAGE",),
    display_name="Upscale Image By",
    category="image/upscaling",
)
def image_scale_by(_ctx: NodeContext, image: Images, upscale_method: str, scale_by: float) -> tuple[Any, ...]:
    width, height = (max(1, round(side * scale_by)) for side in image[0].size)
    return (Images(_scaled(item, width, height, upscale_method) for item in image),)


@node("ImageInvert", required={"image": ("IMAGE",)}, returns=("IMAGE",), display_name="Invert Image")
def image_invert(_ctx: NodeContext, image: Images) -> tuple[Any, ...]:
    return (Images(ImageOps.invert(item) for item in image),)


@node(
    "ImageBatch",
    required={"image1": ("IMAGE",), "image2": ("IMAGE",)},
    returns=("IMAGE",),
    display_name="Batch Images",
)
def image_batch(_ctx: NodeContext, image1: Images, image2: Images) -> tuple[Any, ...]:
    width, height = image1[0].size
    second = [
        item if item.size == (width, height) else _scaled(item, width, height, "bilinear", "center")
        for item in image2
    ]
    return (Images([*image1, *second]),)


@node(
    "ImageCrop",
    required={
        "image": ("IMAGE",),
        "width": _int(512, 1, MAX_SIDE, step=1),
        "height": _int(512, 1, MAX_SIDE, step=1),
        "x": _int(0, 0, MAX_SIDE, step=1),
        "y": _int(0, 0, MAX_SIDE, step=1),
    },
    returns=("IMAGE",),
    display_name="Image Crop",
    module="comfy_extras.nodes_images",
    category="image/transform",
)
def image_crop(_ctx: NodeContext, image: Images, width: int, height: int, x: int, y: int) -> tuple[Any, ...]:
    old_width, old_height = image[0].size
    x, y = min(x, old_width - 1), min(y, old_height - 1)
    box = (x, y, min(x + width, old_width), min(y + height, old_height))
    return (Images(item.crop(box) for item in image),)


@node(
    "SolidMask",
    required={
        "value": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
        "width": _int(512, 1, MAX_SIDE, step=1),
        "height": _int(512, 1, MAX_SIDE, step=1),
    },
    returns=("MASK",),
    module="comfy_extras.nodes_mask",
    category="mask",
)
def solid_mask(_ctx: NodeContext, value: float, width: int, height: int) -> tuple[Any, ...]:
    return (Images([Image.new("L", (width, height), round(value * 255))]),)


def _save_pngs(ctx: NodeContext, images: Images, prefix: str, *, temp: bool, compress_level: int) -> Outcome:
    width, height = images[0].size
    place = ctx.files.save_path(prefix, width=width, height=height, temp=temp)
    info = png_info(ctx)
    items = []
    for number, image in enumerate(images):
        path = place.next_file(".png", batch_number=number)
        image.save(path, format="PNG", pnginfo=info, compress_level=compress_level)
        ctx.written(path)
        items.append(server_file(path, place.subfolder, "temp" if temp else "output"))
    return Outcome(ui={"images": items})


@node(
    "SaveImage",
    required={
        "images": ("IMAGE", {"tooltip": "The images to save."}),
        "filename_prefix": (
            "STRING",
            {
                "default": "ComfyUI",
                "tooltip": "The prefix for the file to save. This may include formatting information such as "
                "%date:yyyy-MM-dd% or %Empty Latent Image.width% to include values from nodes.",
            },
        ),
    },
    hidden=_METADATA,
    output_node=True,
    display_name="Save Image",
    description="Saves the input images to your ComfyUI output directory.",
)
def save_image(ctx: NodeContext, images: Images, filename_prefix: str = "ComfyUI") -> Outcome:
    return _save_pngs(ctx, images, filename_prefix, temp=False, compress_level=4)


@node(
    "PreviewImage",
    required={"images": ("IMAGE",)},
    hidden=_METADATA,
    output_node=True,
    display_name="Preview Image",
    description="Saves the input images to your ComfyUI output directory.",
)
def preview_image(ctx: NodeContext, images: Images) -> Outcome:
    return _save_pngs(ctx, images, temp_prefix(), temp=True, compress_level=1)


@node(
    "MaskPreview",
    required={"mask": ("MASK",)},
    hidden=_METADATA,
    output_node=True,
    display_name="Preview Mask",
    module="comfy_extras.nodes_mask",
    category="mask",
)
def mask_preview(ctx: NodeContext, mask: Images) -> Outcome:
    shown = Images(item.convert("RGB") for item in mask)
    return _save_pngs(ctx, shown, temp_prefix(), temp=True, compress_level=1)


@node(
    "SaveAnimatedWEBP",
    required={
        "images": ("IMAGE",),
        "filename_prefix": ("STRING", {"default": "ComfyUI"}),
        "fps": ("FLOAT", {"default": 6.0, "min": 0.01, "max": 1000.0, "step": 0.01}),
        "lossless": ("BOOLEAN", {"default": True}),
        "quality": _int(80, 0, 100),
        "method": (["default", "fastest", "slowest"],),
    },
    hidden=_METADATA,
    output_node=True,
    module="comfy_extras.nodes_images",
    category="image/animation",
)
def save_animated_webp(
    ctx: NodeContext,
    images: Images,
    fps: float,
    filename_prefix: str,
    lossless: bool,
    quality: int,
    method: str,
) -> Outcome:
    place = ctx.files.save_path(filename_prefix, width=images[0].width, height=images[0].height)
    path = place.next_file(".webp")
    exif = images[0].getexif()
    exif[0x0110] = f"prompt:{json.dumps(ctx.prompt)}"
    images[0].save(
        path,
        format="WEBP",
        save_all=True,
        duration=int(1000.0 / fps),
        append_images=_distinct(images),
        exif=exif,
        lossless=lossless,
        quality=quality,
        method={"default": 4, "fastest": 0, "slowest": 6}[method],
    )
    ctx.written(path)
    return Outcome(ui={"images": [server_file(path, place.subfolder, "output")], "animated": (True,)})


@node(
    "SaveAnimatedPNG",
    required={
        "images": ("IMAGE",),
        "filename_prefix": ("STRING", {"default": "ComfyUI"}),
        "fps": ("FLOAT", {"default": 6.0, "min": 0.01, "max": 1000.0, "step": 0.01}),
        "compress_level": _int(4, 0, 9),
    },
    hidden=_METADATA,
    output_node=True,
    module="comfy_extras.nodes_images",
    category="image/animation",
)
def save_animated_png(
    ctx: NodeContext, images: Images, fps: float, filename_prefix: str, compress_level: int
) -> Outcome:
    place = ctx.files.save_path(filename_prefix, width=images[0].width, height=images[0].height)
    path = place.next_file(".png")
    images[0].save(
        path,
        format="PNG",
        pnginfo=png_info(ctx),
        compress_level=compress_level,
        save_all=True,
        duration=int(1000.0 / fps),
        append_images=_distinct(images),
    )
    ctx.written(path)
    return Outcome(ui={"images": [server_file(path, place.subfolder, "output")], "animated": (True,)})


def _distinct(images: Images) -> list[Image.Image]:
    """The frames after the first; Pillow would skip a frame that is the very same object."""
    return [image.copy() for image in images[1:]]


@node(
    "SaveImageWebsocket",
    required={"images": ("IMAGE",)},
    output_node=True,
    module="custom_nodes.websocket_image_save",
    category="api/image",
    fingerprint=lambda _files, _inputs: math.nan,
)
def save_image_websocket(ctx: NodeContext, images: Images) -> Outcome:
    # The frames of this node are its only result: nothing is in the history [trace 18].
    for step, image in enumerate(images):
        ctx.progress(step, len(images), ("PNG", image))
    return Outcome()


def _primitive(name: str, declaration: tuple[Any, ...], display_name: str) -> None:
    @node(
        name,
        required={"value": declaration},
        returns=(declaration[0],),
        display_name=display_name,
        module="comfy_extras.nodes_primitive",
        category="utils/primitive",
    )
    def primitive(_ctx: NodeContext, value: Any) -> tuple[Any, ...]:
        return (value,)


_LARGEST = 9223372036854775807
_primitive(
    "PrimitiveInt", ("INT", {"min": -_LARGEST, "max": _LARGEST, "control_after_generate": True}), "Int"
)
_primitive("PrimitiveFloat", ("FLOAT", {"min": -_LARGEST, "max": _LARGEST}), "Float")
_primitive("PrimitiveString", ("STRING", {"multiline": False}), "String")
_primitive("PrimitiveBoolean", ("BOOLEAN", {}), "Boolean")


@node(
    "PreviewAny",
    required={"source": ("*", {})},
    output_node=True,
    display_name="Preview Any",
    module="comfy_extras.nodes_preview_any",
    category="utils",
)
def preview_any(_ctx: NodeContext, source: Any = None) -> Outcome:
    if isinstance(source, str):
        text = source
    elif isinstance(source, (int, float, bool)):
        text = str(source)
    elif source is None:
        text = "None"
    else:
        try:
            text = json.dumps(source)
        except TypeError:
            text = str(source)
    return Outcome(ui={"text": (text,)})
