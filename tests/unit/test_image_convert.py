"""The task type image-convert, on real pictures and a local storage."""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import pytest
from PIL import Image, ImageCms, PngImagePlugin, features

from genpulse.errors import InputRejected, InvalidRequest, TaskCanceled
from genpulse.model import NewOutput, OutputKind, Priority, Task, TaskStatus
from genpulse.storage import LocalStorage
from genpulse.tasks.handlers.image_convert import ImageConvertHandler

if TYPE_CHECKING:
    from genpulse.tasks.runner import AttemptContext

RED, BLUE = (255, 0, 0), (0, 0, 255)


@dataclass
class Context:
    """What the handler uses of an attempt's context, on a storage of its own; canceled after *checks*."""

    storage: LocalStorage
    checks: int = 1_000_000
    percents: list[float] = field(default_factory=list)
    rendered: int = 0

    def check(self) -> None:
        """Count down to the cancel."""
        self.checks -= 1
        if self.checks < 0:
            raise TaskCanceled

    def progress(self, percent: float, **detail: Any) -> None:
        """Note it."""
        self.percents.append(percent)

    def mark_rendered(self) -> None:
        """Note it."""
        self.rendered += 1

    @contextlib.contextmanager
    def open_input(self, reference: str) -> Iterator[BinaryIO]:
        """The object whose key is the reference's last part."""
        with self.storage.open(f"assets/{reference.partition(':')[2]}") as stream:
            yield stream

    def store(self, source: Path, *, name: str, content_type: str) -> NewOutput:
        """Put the file below ``outputs/``."""
        with source.open("rb") as stream:
            stored = self.storage.upload_file(
                f"outputs/{name}", stream, content_type=content_type, filename=name
            )
        return NewOutput(
            "", name, OutputKind.IMAGE, content_type, stored.size_bytes, stored.sha256 or "", stored.key
        )


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """An attempt that nobody cancels."""
    return Context(LocalStorage(tmp_path / "assets"))


def convert(context: Context, source: bytes, **params: Any) -> tuple[NewOutput, ...]:
    """Upload *source*, validate *params* as the API does, and execute."""
    context.storage.upload_file("assets/a", io.BytesIO(source), content_type="application/octet-stream")
    handler = ImageConvertHandler()
    valid = handler.validate_params({"source": "asset:a", **params})
    now = dt.datetime.now(dt.UTC)
    task = Task(
        "t", "o", "image-convert", "cpu", Priority.NORMAL, TaskStatus.PROCESSING, valid, 1, 3, 900, now, now
    )
    return handler.execute(task, cast("AttemptContext", context))


def picture(context: Context, source: bytes, **params: Any) -> Image.Image:
    """The picture a conversion makes, decoded."""
    output = convert(context, source, **params)[0]
    with context.storage.open(output.key) as stream:
        image = Image.open(io.BytesIO(stream.read()))
    image.load()
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """*image* as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves(size: tuple[int, int] = (400, 200), mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def near(found: object, wanted: tuple[int, ...]) -> bool:
    """Whether a pixel has the wanted colour, give or take what lossy formats change."""
    assert isinstance(found, tuple)
    return len(found) == len(wanted) and all(abs(a - b) < 12 for a, b in zip(found, wanted, strict=True))


def png_header(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG that claims a size and has almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


class TestSizes:
    """Width, height and how a picture fits them."""

    @pytest.mark.parametrize(
        ("params", "size"),
        [
            ({}, (400, 200)),
            ({"width": 100}, (100, 50)),
            ({"height": 100}, (200, 100)),
            ({"width": 100, "height": 100}, (100, 50)),
            ({"width": 800, "height": 800}, (400, 200)),
            ({"width": 1}, (1, 1)),
            ({"width": 100, "height": 100, "fit": "contain"}, (100, 100)),
            ({"width": 100, "height": 100, "fit": "cover"}, (100, 100)),
            ({"width": 1000, "height": 1000, "fit": "cover"}, (1000, 1000)),
            ({"width": 30, "height": 700, "fit": "stretch"}, (30, 700)),
        ],
    )
    def test_the_picture_has_the_size_its_fit_says(
        self, context: Context, params: dict[str, Any], size: tuple[int, int]
    ) -> None:
        """Inside keeps proportions and never enlarges; the others give exactly what was asked for."""
        assert picture(context, encoded(halves()), **params).size == size

    def test_contain_pads_with_nothing_or_the_background(self, context: Context) -> None:
        """Above and below a wide picture there is transparency, or the colour that was given."""
        clear = picture(context, encoded(halves()), width=100, height=100, fit="contain")
        green = picture(context, encoded(halves()), width=100, height=100, fit="contain", background="#0f0")

        assert clear.getpixel((50, 5)) == (0, 0, 0, 0)
        assert near(clear.getpixel((10, 50)), (*RED, 255))
        assert green.mode == "RGB"
        assert green.getpixel((50, 95)) == (0, 255, 0)
        assert near(green.getpixel((90, 50)), BLUE)

    def test_cover_crops_around_the_middle(self, context: Context) -> None:
        """Of a wide picture both sides are cut alike: the border of the halves stays in the middle."""
        found = picture(context, encoded(halves()), width=100, height=100, fit="cover")

        assert near(found.getpixel((40, 50)), RED)
        assert near(found.getpixel((60, 50)), BLUE)

    def test_transparent_edges_do_not_darken(self, context: Context) -> None:
        """The colour of invisible pixels does not bleed into visible ones when scaling."""
        image = Image.new("RGBA", (400, 400), (0, 0, 0, 0))
        image.paste((255, 255, 255, 255), (0, 0, 201, 400))

        found = picture(context, encoded(image), width=40)

        visible = [found.getpixel((x, 20)) for x in range(40)]
        assert all(pixel[:3] == (255, 255, 255) for pixel in visible if pixel[3] > 8)  # type: ignore[index]  # a pixel of four bands


class TestFormats:
    """What comes out."""

    @pytest.mark.parametrize("form", ["png", "jpeg", "webp", "avif"])
    def test_each_format_is_what_it_says(self, context: Context, form: str) -> None:
        """Bytes, content type and file name agree."""
        if form == "avif" and not features.check("avif"):
            pytest.skip("this Pillow has no AVIF")
        output = convert(context, encoded(halves()), format=form)[0]

        with context.storage.open(output.key) as stream:
            found = Image.open(io.BytesIO(stream.read()))
        assert found.format == form.upper()
        assert output.content_type == f"image/{form}"
        assert output.name == ("image.jpg" if form == "jpeg" else f"image.{form}")
        assert near(found.convert("RGB").getpixel((10, 10)), RED)

    @pytest.mark.parametrize(
        ("source", "wanted"),
        [("JPEG", "JPEG"), ("PNG", "PNG"), ("WEBP", "WEBP"), ("GIF", "PNG"), ("BMP", "PNG")],
    )
    def test_without_a_format_the_sources_is_kept(self, context: Context, source: str, wanted: str) -> None:
        """A format that we do not write becomes PNG."""
        assert picture(context, encoded(halves(), source)).format == wanted

    def test_lower_quality_makes_smaller_files(self, context: Context) -> None:
        """Quality reaches the encoder."""
        noise = encoded(Image.effect_noise((256, 256), 80))

        sizes = [convert(context, noise, format="jpeg", quality=q)[0].size_bytes for q in (5, 50, 95)]

        assert sizes == sorted(sizes)
        assert sizes[0] * 3 < sizes[2]

    @pytest.mark.parametrize(("background", "wanted"), [(None, (255, 255, 255)), ("#00ff00", (0, 255, 0))])
    def test_jpeg_lays_transparency_on_a_background(
        self, context: Context, background: str | None, wanted: tuple[int, int, int]
    ) -> None:
        """White, if no other colour is given; never the black that invisible pixels happen to have."""
        source = encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 0)))

        found = picture(context, source, format="jpeg", background=background)

        assert near(found.getpixel((30, 30)), wanted)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
    @pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
    def test_every_kind_of_pixel_is_understood(self, context: Context, mode: str, form: str) -> None:
        """Palettes, grey, 16 bits and print colours all come out bright where they were bright."""
        image = Image.new("L", (64, 64), 255)
        source = (
            image.convert("I").point(lambda v: v * 257).convert("I;16")
            if mode == "I;16"
            else image.convert(mode)
        )
        kind = "TIFF" if mode == "CMYK" else "PNG"

        found = picture(context, encoded(source, kind), format=form, width=32)

        assert near(found.convert("RGB").getpixel((16, 16)), (255, 255, 255))

    def test_sixteen_bits_of_grey_keep_their_middle(self, context: Context) -> None:
        """Half bright stays half bright, instead of being clipped to white."""
        image = Image.new("I;16", (8, 8), 32768)

        assert picture(context, encoded(image)).getpixel((4, 4)) == 128

    def test_a_palette_keeps_its_transparency(self, context: Context) -> None:
        """The transparent colour of a GIF is still transparent."""
        image = Image.new("P", (8, 8), 1)
        image.putpalette([255, 0, 0, 0, 0, 255])

        found = picture(context, encoded(image, "GIF", transparency=1))

        assert found.convert("RGBA").getpixel((3, 3))[3] == 0  # type: ignore[index]  # a pixel of four bands

    def test_an_animation_gives_its_first_frame(self, context: Context) -> None:
        """One picture in, one picture out."""
        source = encoded(halves(), "GIF", save_all=True, append_images=[Image.new("RGB", (400, 200))])

        found = picture(context, source, format="webp")

        assert getattr(found, "n_frames", 1) == 1
        assert near(found.convert("RGB").getpixel((10, 10)), RED)

    def test_a_thumbnail_is_a_second_output(self, context: Context) -> None:
        """It shows what the picture shows, at most so large, in the same format."""
        outputs = convert(context, encoded(halves()), format="jpeg", thumbnail=64)

        assert [output.name for output in outputs] == ["image.jpg", "thumbnail.jpg"]
        with context.storage.open(outputs[1].key) as stream:
            assert Image.open(io.BytesIO(stream.read())).size == (64, 32)

    def test_a_plain_thumbnail_has_256_pixels(self, context: Context) -> None:
        """``true`` means the usual size."""
        outputs = convert(context, encoded(halves()), thumbnail=True)

        with context.storage.open(outputs[1].key) as stream:
            assert Image.open(io.BytesIO(stream.read())).size == (256, 128)

    def test_webp_that_is_too_long_is_refused_in_words(self, context: Context) -> None:
        """WebP ends at 16383 pixels a side, one short of our own limit."""
        with pytest.raises(InputRejected, match="16383"):
            convert(context, encoded(Image.new("L", (16384, 2))), format="webp")


class TestMetadata:
    """EXIF, text and colour profiles."""

    @pytest.fixture
    def turned(self) -> bytes:
        """A JPEG that says that it lies on its side."""
        exif = Image.Exif()
        exif[0x0112] = 6
        exif[0x010F] = "Secret Camera"
        return encoded(halves(), "JPEG", exif=exif, quality=95)

    def test_the_picture_is_turned_as_its_exif_says(self, context: Context, turned: bytes) -> None:
        """The pixels are turned, and nothing says so a second time."""
        found = picture(context, turned)

        assert found.size == (200, 400)
        assert near(found.getpixel((100, 20)), RED)
        assert 0x0112 not in found.getexif()

    def test_turning_can_be_declined(self, context: Context, turned: bytes) -> None:
        """Then the pixels stay, and kept EXIF still says how to hold them."""
        found = picture(context, turned, auto_orient=False, strip_metadata=False)

        assert found.size == (400, 200)
        assert found.getexif()[0x0112] == 6

    def test_metadata_is_left_out_unless_asked_for(self, context: Context, turned: bytes) -> None:
        """The camera's name goes only where it is wanted; when turned, the orientation goes anyhow."""
        assert not picture(context, turned).getexif()

        kept = picture(context, turned, strip_metadata=False)

        assert kept.getexif()[0x010F] == "Secret Camera"
        assert 0x0112 not in kept.getexif()

    def test_a_workflow_in_the_text_of_a_png_goes_the_same_way(self, context: Context) -> None:
        """ComfyUI writes its graph into pictures; a converted one carries it only if asked to."""
        text = PngImagePlugin.PngInfo()
        text.add_text("workflow", '{"1": {}}')
        source = encoded(halves(), pnginfo=text)

        assert "workflow" not in picture(context, source).info
        assert picture(context, source, strip_metadata=False).info["workflow"] == '{"1": {}}'

    def test_the_colour_profile_stays(self, context: Context) -> None:
        """Without its profile a picture would show other colours."""
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        source = encoded(halves(), icc_profile=profile)

        for params in ({}, {"width": 50}, {"format": "jpeg"}, {"format": "webp"}):
            assert picture(context, source, **params).info["icc_profile"] == profile

    def test_a_profile_that_fits_no_more_is_left_out(self, context: Context) -> None:
        """A profile for colours on a grey picture would be a lie."""
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

        assert "icc_profile" not in picture(context, encoded(halves(mode="L"), icc_profile=profile)).info


class TestHostileInput:
    """Nothing is decoded before it was checked, and refusals have clear words."""

    @pytest.mark.parametrize(
        "size", [(50_000, 50_000), (9_000, 9_000), (16_385, 1), (1, 100_000), (2**31 - 1, 2**31 - 1)]
    )
    def test_a_bomb_is_refused_by_its_header(self, context: Context, size: tuple[int, int]) -> None:
        """A few bytes that claim to be gigabytes cost nothing, and no warning either."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(InputRejected, match="64 million"):
                convert(context, png_header(*size))

    def test_the_largest_picture_is_taken(self, context: Context) -> None:
        """The limit itself is allowed."""
        found = picture(context, encoded(Image.new("1", (16_384, 3_906))), width=64)

        assert found.size == (64, 15)

    @pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    @pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
    def test_a_file_cut_off_is_refused(self, context: Context, form: str, part: float) -> None:
        """Half a picture is not quietly completed with grey."""
        whole = encoded(Image.effect_noise((128, 128), 90).convert("RGB"), form)

        with pytest.raises(InputRejected, match=r"damaged|no picture"):
            convert(context, whole[: int(len(whole) * part)])

    def test_a_picture_that_lies_about_its_size_is_refused(self, context: Context) -> None:
        """A header that promises more pixels than there are."""
        with pytest.raises(InputRejected, match="damaged"):
            convert(context, png_header(4_000, 4_000))

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"hello",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
            b"%PDF-1.4\n",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff\xe0",
            b"RIFF\x04\x00\x00\x00WEBP",
            b"8BPS\0\1\0\0\0\0\0\0\0\3\0\0\0\1\0\0\0\1\0\x08\0\3",
            b"P6 1 1 255\n\0\0\0",
        ],
    )
    def test_what_is_no_picture_is_refused(self, context: Context, data: bytes) -> None:
        """Also formats that Pillow would hand to other programs, or that nobody needs here."""
        with pytest.raises(InputRejected, match=r"no picture|damaged"):
            convert(context, data)

    def test_damaged_bytes_never_raise_anything_else(self, context: Context) -> None:
        """Bytes of the header turned round: a picture comes out or the input is refused."""
        for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
            exif = Image.Exif()
            exif[0x0112] = 6
            whole = encoded(halves((20, 10)), form, **({} if form == "GIF" else {"exif": exif}))
            for place in range(0, min(120, len(whole)), 5):
                broken = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
                with contextlib.suppress(InputRejected):
                    convert(context, broken, strip_metadata=False, format="png")

    def test_a_huge_file_is_not_copied_to_its_end(
        self, context: Context, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An input beyond the limit is refused as soon as the limit is passed."""
        monkeypatch.setattr("genpulse.tasks.handlers.image_convert.MAX_INPUT_BYTES", 1000)

        with pytest.raises(InputRejected, match="larger than"):
            convert(context, encoded(halves(), "BMP"))


class TestAttempt:
    """How it behaves as an attempt."""

    @pytest.mark.parametrize("after", range(6))
    def test_a_cancel_is_heard_between_the_steps(self, context: Context, after: int) -> None:
        """The task's cancel goes through as it is, and leaves no temporary file of the conversion."""
        context.checks = after

        with pytest.raises(TaskCanceled):
            convert(context, encoded(halves()), thumbnail=True)

    def test_a_cancel_is_heard_while_the_source_arrives(
        self, context: Context, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A large input from a slow store is not waited for."""
        monkeypatch.setattr("genpulse.tasks.handlers.image_convert._CHUNK_BYTES", 1000)
        context.checks = 3

        with pytest.raises(TaskCanceled):
            convert(context, encoded(halves(), "BMP"))

        assert context.percents == []

    def test_progress_rises_to_the_end(self, context: Context) -> None:
        """It never falls and ends at 100; rendering is over before storing begins."""
        convert(context, encoded(halves()))

        assert context.percents == sorted(context.percents)
        assert context.percents[-1] == 100
        assert context.rendered == 1

    def test_temporary_files_are_gone(
        self, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After success and after failure alike."""
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))

        convert(context, encoded(halves()))
        with pytest.raises(InputRejected):
            convert(context, b"nothing")

        assert list((tmp_path / "tmp").iterdir()) == []

    def test_the_declaration_does_not_load_pillow(self) -> None:
        """The web knows the task type without paying for its work."""
        code = "import sys, genpulse.tasks.handlers.image_convert; sys.exit('PIL.Image' in sys.modules)"

        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestParams:
    """What callers may ask for."""

    def check(self, **params: Any) -> dict[str, Any]:
        """Validate as the API does."""
        return ImageConvertHandler().validate_params({"source": "asset:a", **params})

    @pytest.mark.parametrize(
        ("params", "pointer"),
        [
            ({"source": "ftp://example.com/a.png"}, "/params/source"),
            ({"source": "https://example.com/ä.png"}, "/params/source"),
            ({"source": "asset:../a"}, "/params/source"),
            ({"source": "asset:ü"}, "/params/source"),
            ({"source": "asset:a\n"}, "/params/source"),
            ({"source": "output:t"}, "/params/source"),
            ({"source": None}, "/params/source"),
            ({"width": 0}, "/params/width"),
            ({"width": 16_385}, "/params/width"),
            ({"width": "100"}, "/params/width"),
            ({"width": 1.5}, "/params/width"),
            ({"format": "gif"}, "/params/format"),
            ({"quality": 0}, "/params/quality"),
            ({"quality": 101}, "/params/quality"),
            ({"background": "red"}, "/params/background"),
            ({"fit": "cover", "width": 5}, "/params"),
            ({"fit": "stretch", "width": 16_384, "height": 16_384}, "/params"),
            ({"heigth": 5}, "/params/heigth"),
        ],
    )
    def test_a_mistake_is_pointed_at(self, params: dict[str, Any], pointer: str) -> None:
        """The problem names the place; unknown names are mistakes too."""
        with pytest.raises(InvalidRequest) as caught:
            self.check(**params)

        assert caught.value.problem == "invalid_request"
        assert pointer in [where for where, _ in caught.value.errors]

    def test_defaults_are_filled_in(self) -> None:
        """What is recorded says all of it, and validates to itself again."""
        found = self.check(width=10)

        assert found["fit"] == "inside"
        assert found["quality"] == 85
        assert ImageConvertHandler().validate_params(found) == found

    def test_thumbnail_is_yes_no_or_a_size(self) -> None:
        """``true`` is not the size 1."""
        assert [self.check(thumbnail=value)["thumbnail"] for value in (True, False, 64)] == [True, False, 64]
        for value in (1, 15, 1025, "yes"):
            with pytest.raises(InvalidRequest):
                self.check(thumbnail=value)

    def test_the_source_is_declared(self) -> None:
        """The ledger can tell what a task needs before it runs."""
        handler = ImageConvertHandler()

        assert handler.referenced_assets({"source": "asset:0190-ab"}) == ("0190-ab",)
        assert handler.referenced_outputs({"source": "asset:0190-ab"}) == ()
        assert handler.referenced_assets({"source": "output:t-1/3"}) == ()
        assert handler.referenced_outputs({"source": "output:t-1/3"}) == (("t-1", 3),)
