"""Keys, file names and the Content-Disposition header: what strangers' words may become."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.http import parse_options_header

from genpulse.errors import Permanent
from genpulse.storage import InvalidKey, check_key, clean_filename, content_disposition, shows_inline


class TestKeys:
    """What may be a key."""

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "/",
            "/etc/passwd",
            "a/",
            "a//b",
            ".",
            "..",
            "a/..",
            "a/./b",
            "../a",
            "a\\b",
            "C:\\a",
            "a\0",
            "a\x1f",
            "a\x7f",
            "a\x85b",
            "a\u2028b",
            "a\ufffe",
            "\ud800",
            "x" * 256,
            "é" * 128,
            "/".join(["abcdefgh"] * 101),
            ".genpulse/tmp/x",
            ".GenPulse/tmp/x",
            ".genpulse",
        ],
    )
    def test_a_key_that_could_mean_another_place_is_refused(self, key: str) -> None:
        """Refused for good: no attempt will make it right, and it is a ValueError to whoever passed it."""
        with pytest.raises(InvalidKey) as caught:
            check_key(key)

        assert isinstance(caught.value, Permanent)
        assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize(
        "key", ["a", "a/b.png", "...", ".hidden", "a/.genpulse", "a b/%2e%2e/?#&+;=", "画像/é", "x" * 255]
    )
    def test_a_key_is_any_other_relative_path(self, key: str) -> None:
        """And it is given back unchanged."""
        assert check_key(key) == key


class TestFileNames:
    """What a file may be called when it is downloaded."""

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("cat.png", "cat.png"),
            ("/etc/passwd", "passwd"),
            ("C:\\Users\\me\\cat.png", "cat.png"),
            ("../../cat.png", "cat.png"),
            ("a\r\nSet-Cookie: x.png", "a__Set-Cookie: x.png"),
            ("photo\u202egnp.exe", "photognp.exe"),
            (" cat.png ", "cat.png"),
            ("Größe „画“.png", "Größe „画“.png"),
            ("👩\u200d🚀.png", "👩\u200d🚀.png"),
            ("", None),
            (None, None),
            ("..", None),
            ("a/", None),
        ],
    )
    def test_only_the_last_part_and_no_tricks(self, name: str | None, wanted: str | None) -> None:
        """No path, no control characters, nothing that turns the reading direction round."""
        assert clean_filename(name) == wanted

    @given(st.text(max_size=400))
    def test_a_clean_name_stays_as_it_is(self, name: str) -> None:
        """Cleaning twice changes nothing more, and the name always fits."""
        clean = clean_filename(name)

        if clean is not None:
            assert clean_filename(clean) == clean
            assert 0 < len(clean.encode()) <= 200
            assert "/" not in clean
            assert clean.isprintable() or any(char not in "\r\n\0" for char in clean)

    def test_a_long_name_keeps_its_extension(self) -> None:
        """What a file is must not be lost by shortening."""
        assert clean_filename("画" * 300 + ".webp") == "画" * 65 + ".webp"


class TestContentDisposition:
    """The header is plain ASCII, cannot be broken out of, and says the name."""

    @pytest.mark.parametrize(
        ("name", "header"),
        [
            (None, "attachment"),
            ("cat.png", 'attachment; filename="cat.png"'),
            ("my cat.png", 'attachment; filename="my cat.png"'),
            ('a"b.png', "attachment; filename=\"a_b.png\"; filename*=UTF-8''a%22b.png"),
            ("é.png", "attachment; filename=\"e.png\"; filename*=UTF-8''%C3%A9.png"),
            ("画.png", "attachment; filename=\"file.png\"; filename*=UTF-8''%E7%94%BB.png"),
            ("100%.png", "attachment; filename=\"100_.png\"; filename*=UTF-8''100%25.png"),
        ],
    )
    def test_the_usual_names(self, name: str | None, header: str) -> None:
        """RFC 6266: a plain name where that suffices, otherwise both forms."""
        assert content_disposition(name) == header

    def test_inline_is_asked_for(self) -> None:
        """A download is the safe default."""
        assert content_disposition("a.png", inline=True) == 'inline; filename="a.png"'
        assert content_disposition(None, inline=True) == "inline"

    @given(st.text(max_size=100))
    def test_any_name_arrives(self, name: str) -> None:
        """A parser of somebody else reads back the cleaned name, and no second header or parameter."""
        header = content_disposition(name)

        assert header.isascii()
        assert header.isprintable()
        kind, options = parse_options_header(header)
        assert kind == "attachment"
        assert options.get("filename") == clean_filename(name)
        assert set(options) <= {"filename"}


class TestShowsInline:
    """What a browser may show in its window."""

    @pytest.mark.parametrize(
        "kind", ["image/png", "IMAGE/PNG", "video/mp4", "audio/flac", "text/plain; charset=utf-8"]
    )
    def test_media_are_shown(self, kind: str) -> None:
        """Pictures, films, sounds and plain text."""
        assert shows_inline(kind)

    @pytest.mark.parametrize(
        "kind",
        [
            "text/html",
            "image/svg+xml",
            "application/xhtml+xml",
            "text/xml",
            "application/pdf",
            "text/javascript",
            "",
            "x",
        ],
    )
    def test_what_can_hold_script_is_not(self, kind: str) -> None:
        """Nor what we do not know."""
        assert not shows_inline(kind)


def test_a_local_storage_does_without_boto3() -> None:
    """Importing the package loads boto3 only when S3Storage is asked for."""
    code = """if True:
        import sys, genpulse.storage
        assert "boto3" not in sys.modules
        assert genpulse.storage.S3Storage
        assert "boto3" in sys.modules
    """

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
