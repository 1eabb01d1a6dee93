"""
The task type ``image-convert``: resize a picture, change its format, make a thumbnail.

It takes an asset, an output of a former task, or a picture by URL. What it reads was made by strangers, so it trusts
neither name nor type: the bytes must be one of a few formats, the header is believed only within
limits, and nothing is decoded before they were checked.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from genpulse.errors import ExecutionFailed, InputRejected, InvalidRequest, OutOfMemory
from genpulse.tasks.registry import BaseHandler, handler

if TYPE_CHECKING:
    from PIL import Image

    from genpulse.model import NewOutput, Task
    from genpulse.tasks.runner import AttemptContext

__all__ = ["ImageConvertHandler", "ImageConvertParams"]

MAX_SIDE = 16_384
MAX_PIXELS = 64_000_000
MAX_INPUT_BYTES = 512 * 2**20
_CHUNK_BYTES = 1024 * 1024

# Only what Pillow decodes in its own process: EPS, for one, would be handed to Ghostscript.
_READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_FORMATS = {
    "png": ("PNG", "image/png"),
    "jpeg": ("JPEG", "image/jpeg"),
    "webp": ("WEBP", "image/webp"),
    "avif": ("AVIF", "image/avif"),
}
_NO_PICTURE = "the input is no picture that can be read (PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF)"
_DAMAGED = "the picture is damaged, cut off, or of a kind that cannot be read"
_MAX_WEBP_SIDE = 16_383  # 14 bits in its header
_ASSET = re.compile(r"asset:([A-Za-z0-9_-]{1,100})")
_OUTPUT = re.compile(r"output:([A-Za-z0-9_-]{1,100})/([0-9]{1,6})")
_URL = re.compile(r"[Hh][Tt][Tt][Pp][Ss]?://[!-~]{1,2040}")
_SOURCE = rf"^({_ASSET.pattern}|{_OUTPUT.pattern}|{_URL.pattern})$"
_COLOUR = r"^#([0-9a-fA-F]{3}|[0-9a-fA-F]{6}|[0-9a-fA-F]{8})$"

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class ImageConvertParams(BaseModel):
    """What a caller may ask for. Without width, height and format the picture is written anew as it is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source: Annotated[str, Field(pattern=_SOURCE)] = Field(
        description="`asset:<id>` of an uploaded file, `output:<task_id>/<index>` of a completed task, or an "
        "`https:` URL that the worker fetches."
    )
    width: Side | None = Field(None, description="Pixels.")
    height: Side | None = Field(None, description="Pixels.")
    fit: Literal["inside", "contain", "cover", "stretch"] = Field(
        "inside",
        description="`inside`: keeps the proportions, at most width x height, never enlarged. `contain`: "
        "exactly width x height, padded. `cover`: exactly width x height, cropped around the middle. "
        "`stretch`: exactly width x height, proportions lost.",
    )
    format: Literal["png", "jpeg", "webp", "avif"] | None = Field(
        None, description="Empty: the source's, or PNG where the source's cannot be written."
    )
    quality: int = Field(85, ge=1, le=100, description="For JPEG, WebP and AVIF.")
    background: Annotated[str, Field(pattern=_COLOUR)] | None = Field(
        None,
        description="`#rgb`, `#rrggbb` or `#rrggbbaa`. Behind transparency where the format has none "
        "(white by default), and for the padding of `contain` (by default transparent where possible).",
    )
    thumbnail: bool | Annotated[int, Field(ge=16, le=1024)] = Field(
        False, description="Make a second, small picture as well: `true` (256) or its longest side."
    )
    strip_metadata: bool = Field(
        True, description="Leave out EXIF and text, a ComfyUI workflow among it. Colour profiles stay."
    )
    auto_orient: bool = Field(True, description="Turn the picture as its EXIF says.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.fit != "inside" and not (self.width and self.height):
            msg = f"fit {self.fit!r} needs both width and height"
            raise ValueError(msg)
        if self.width and self.height and self.fit != "inside" and self.width * self.height > MAX_PIXELS:
            msg = f"width x height may be {MAX_PIXELS} pixels at most"
            raise ValueError(msg)
        return self


@handler
class ImageConvertHandler(BaseHandler):
    """Resize, re-encode and thumbnail one picture with Pillow; an animation gives its first frame."""

    task_type = "image-convert"
    queue = "cpu"
    params_model = ImageConvertParams
    summary = "Resize a picture, change its format or quality, make a thumbnail."

    def validate_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """
        Check the params; AVIF is refused where this installation's Pillow cannot write it.

        Raises:
            InvalidRequest: ``invalid_request``.
        """
        found = super().validate_params(params)
        if found["format"] == "avif" and not _writes_avif():
            sentence = "AVIF is not available in this installation."
            raise InvalidRequest("invalid_request", sentence, [("/params/format", sentence)])
        return found

    def referenced_assets(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """The source, if it is an uploaded file."""
        found = _ASSET.fullmatch(params["source"])
        return (found[1],) if found else ()

    def referenced_outputs(self, params: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
        """The source, if it is an output of another task."""
        found = _OUTPUT.fullmatch(params["source"])
        return ((found[1], int(found[2])),) if found else ()

    def referenced_urls(self, params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """The source, if it is a web address."""
        return (("/params/source", params["source"]),) if _URL.fullmatch(params["source"]) else ()

    def execute(self, task: Task, context: AttemptContext) -> tuple[NewOutput, ...]:
        """
        Fetch, check, decode, convert, store.

        Raises:
            InputRejected: The source is no picture, is damaged, or is larger than the limits.
            OutOfMemory: This process could not hold the picture just now.
        """
        params = ImageConvertParams.model_validate(dict(task.params))
        with tempfile.TemporaryDirectory(prefix="genpulse-convert-") as folder:
            received = Path(folder, "input")
            _receive(context, params.source, received)
            context.progress(10)
            made = _convert(context, params, received)
            context.mark_rendered()
            outputs = []
            for path, content_type in made:
                context.check()
                outputs.append(context.store(path, name=path.name, content_type=content_type))
            context.progress(100)
            return tuple(outputs)


def _receive(context: AttemptContext, source: str, path: Path) -> None:
    """Copy the source to a file: decoders want to seek, and a cancel wants to be heard meanwhile."""
    size = 0
    with context.open_input(source) as stream, path.open("wb") as file:
        while chunk := stream.read(_CHUNK_BYTES):
            context.check()
            size += len(chunk)
            if size > MAX_INPUT_BYTES:
                msg = f"the input is larger than {MAX_INPUT_BYTES // 2**20} MiB"
                raise InputRejected(msg)
            file.write(chunk)


def _convert(
    context: AttemptContext, params: ImageConvertParams, received: Path
) -> Iterator[tuple[Path, str]]:
    """Write the wanted pictures beside *received*; gives their paths and types."""
    with _decoded(received) as image:
        context.check()
        context.progress(40)
        target = params.format or _same_format(image)
        kept = {} if params.strip_metadata else _metadata(image, target, params)
        picture = _plain(_upright(image) if params.auto_orient else image)
    resized = _resize(picture, params, alpha=target != "jpeg")
    context.check()
    context.progress(60)
    jobs = [("image", resized)]
    if params.thumbnail:
        side = 256 if params.thumbnail is True else params.thumbnail
        jobs.append(("thumbnail", _inside(resized, side, side)))
    made = []
    for name, job in jobs:
        path = received.with_name(f"{name}.{'jpg' if target == 'jpeg' else target}")
        _encode(job, path, target, params, kept if name == "image" else {})
        context.check()
        made.append((path, _FORMATS[target][1]))
    context.progress(80)
    return iter(made)


@contextlib.contextmanager
def _decoded(path: Path) -> Iterator[Image.Image]:
    """
    The picture in *path*, decoded. Only its header is read before the limits are checked.

    Raises:
        InputRejected: Not a picture, damaged, or too large.
    """
    from PIL import Image

    with contextlib.ExitStack() as stack:
        with _refusing(_NO_PICTURE):
            Image.init()
            known = [name for name in _READABLE if name in Image.OPEN]
            image = stack.enter_context(Image.open(path, formats=known))
        _check_size(image.width, image.height)
        with _refusing(_DAMAGED):
            image.load()
        # Some formats learn their true size only while decoding.
        _check_size(image.width, image.height)
        yield image


@contextlib.contextmanager
def _refusing(sentence: str) -> Iterator[None]:
    """Whatever a decoder raises about hostile bytes means that the input is refused."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Pillow's own limit only warns until twice its size; ours is lower and is checked next.
            warnings.simplefilter("ignore")
            yield
    except MemoryError as error:
        msg = "there is not enough memory for this picture now"
        raise OutOfMemory(msg) from error
    except Image.DecompressionBombError as error:
        raise InputRejected(_too_large()) from error
    except Exception as error:
        # A decoder's OSError has no number; one with a number is about this host's disk.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputRejected(sentence) from error


def _check_size(width: int, height: int) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        msg = f"the picture has {width} x {height} pixels: {_too_large()}"
        raise InputRejected(msg)


def _too_large() -> str:
    return f"pictures may have {MAX_SIDE} pixels a side and {MAX_PIXELS // 10**6} million in all"


def _same_format(image: Image.Image) -> str:
    name = {"MPO": "jpeg"}.get(image.format or "", (image.format or "").lower())
    return name if name in _FORMATS and (name != "avif" or _writes_avif()) else "png"


def _writes_avif() -> bool:
    from PIL import features

    return bool(features.check("avif"))


def _metadata(image: Image.Image, target: str, params: ImageConvertParams) -> dict[str, Any]:
    """EXIF for every format; a PNG's text goes along into a PNG."""
    from PIL import ExifTags, PngImagePlugin

    kept: dict[str, Any] = {}
    with _refusing(_DAMAGED):
        exif = image.getexif()
        if params.auto_orient:
            exif.pop(ExifTags.Base.Orientation, None)  # it was applied
        if exif:
            kept["exif"] = exif.tobytes()
        if target == "png" and isinstance(image, PngImagePlugin.PngImageFile):
            text = PngImagePlugin.PngInfo()
            for name, value in image.text.items():
                text.add_itxt(name, value)
            kept["pnginfo"] = text
    return kept


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    with _refusing(_DAMAGED):
        return ImageOps.exif_transpose(image)


def _plain(image: Image.Image) -> Image.Image:
    """As L, LA, RGB or RGBA, which every step here can handle; the profile stays if it still fits."""
    mode = image.mode
    profile = image.info.get("icc_profile")
    with _refusing(_DAMAGED):
        if mode in {"L", "LA", "RGB", "RGBA"}:
            plain = image.convert("RGBA") if "transparency" in image.info else image.copy()
        elif mode.startswith("I"):
            # 16 bits of grey; Pillow's own conversion would clip all above 255 to white.
            plain = image.convert("I").point(lambda value: value / 256).convert("L")
        elif mode == "1":
            plain = image.convert("L")
        elif mode == "CMYK" and profile:
            plain, profile = _to_srgb(image, profile), None
        else:
            has_alpha = mode in {"PA", "La", "RGBa"} or "transparency" in image.info
            plain = image.convert("RGBA" if has_alpha else "RGB")
    plain.info = {}
    space = b"GRAY" if plain.mode in {"L", "LA"} else b"RGB "
    if isinstance(profile, bytes) and profile[16:20] == space:
        plain.info["icc_profile"] = profile
    return plain


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    import io

    from PIL import ImageCms

    try:
        found = ImageCms.profileToProfile(
            image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except ImageCms.PyCMSError:
        found = None
    return found or image.convert("RGB")


def _resize(image: Image.Image, params: ImageConvertParams, *, alpha: bool) -> Image.Image:
    from PIL import Image, ImageColor

    width, height = params.width, params.height
    if params.fit == "inside" or width is None or height is None:
        return _inside(image, width or MAX_SIDE, height or MAX_SIDE)
    if params.fit == "stretch":
        return _scaled(image, (width, height))
    if params.fit == "cover":
        scale = max(width / image.width, height / image.height)
        # Only the part that will be seen is scaled, so that nothing larger than the result is ever made.
        across, down = min(image.width, width / scale), min(image.height, height / scale)
        left, top = (image.width - across) / 2, (image.height - down) / 2
        return _scaled(image, (width, height), (left, top, left + across, top + down))
    scale = min(width / image.width, height / image.height)
    inner = _scaled(image, _size(image, scale))
    see_through = params.background is None and alpha
    colour = (0, 0, 0, 0) if see_through else ImageColor.getcolor(params.background or "#fff", "RGBA")
    canvas = Image.new("RGBA", (width, height), colour)
    canvas.paste(inner.convert("RGBA"), ((width - inner.width) // 2, (height - inner.height) // 2))
    if canvas.getchannel("A").getextrema() == (255, 255):
        canvas = canvas.convert("RGB")
    if inner.mode in {"RGB", "RGBA"}:  # a profile for grey does not fit any more
        canvas.info = dict(inner.info)
    return canvas


def _inside(image: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / image.width, height / image.height)
    return image if scale >= 1 else _scaled(image, _size(image, scale))


def _size(image: Image.Image, scale: float) -> tuple[int, int]:
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _scaled(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    from PIL import Image

    found = image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    found.info = dict(image.info)
    return found


def _encode(
    image: Image.Image, path: Path, target: str, params: ImageConvertParams, kept: Mapping[str, Any]
) -> None:
    if target == "webp" and max(image.size) > _MAX_WEBP_SIDE:
        msg = f"WebP pictures have at most {_MAX_WEBP_SIDE} pixels a side"
        raise InputRejected(msg)
    if target == "jpeg":
        image = _opaque(image, params.background or "#fff")
    options: dict[str, Any] = dict(kept)
    if profile := image.info.get("icc_profile"):
        options["icc_profile"] = profile
    if target != "png":
        options["quality"] = params.quality
    try:
        image.save(path, _FORMATS[target][0], **options)
    except MemoryError as error:
        msg = "there is not enough memory for this picture now"
        raise OutOfMemory(msg) from error
    except (ValueError, KeyError) as error:
        msg = f"the picture cannot be written as {target}"
        raise ExecutionFailed(msg) from error


def _opaque(image: Image.Image, background: str) -> Image.Image:
    """Without alpha, laid on *background*."""
    from PIL import Image, ImageColor

    if image.mode in {"L", "RGB"}:
        return image
    red, green, blue = ImageColor.getrgb(background)[:3]
    canvas = Image.new("RGBA", image.size, (red, green, blue, 255))
    canvas.alpha_composite(image.convert("RGBA"))
    plain = canvas.convert("RGB")
    if image.mode == "RGBA":
        plain.info = dict(image.info)
    return plain
