"""Egress over real sockets: pinning, TLS, redirects, and servers that lie, drip, flood and hang."""

from __future__ import annotations

import gzip
import io
import ipaddress
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from genpulse.egress import Egress
from genpulse.errors import InputRejected, InputUnavailable, TaskCanceled, UnsafeUrl
from tests.support.receiver import Behaviour, authority, drip, read_request, respond, serve

LOOPBACK = [ipaddress.ip_network("127.0.0.0/8")]
OK = b"HTTP/1.1 200 OK\r\n"


def to(port: int, **options: Any) -> Egress:
    """Rules that let a test go to its own server on loopback."""
    values: dict[str, Any] = {"networks": LOOPBACK, "http": True, "ports": [port]}
    return Egress(**(values | options))


def fetch(rules: Egress, url: str, *, max_bytes: int = 1000, timeout_s: float = 20, **options: Any) -> bytes:
    """The body."""
    sink = io.BytesIO()
    assert rules.fetch(url, sink, max_bytes=max_bytes, timeout_s=timeout_s, **options) == len(sink.getvalue())
    return sink.getvalue()


def redirect(where: str, status: int = 302) -> Behaviour:
    """Send the caller on."""
    return respond(f"HTTP/1.1 {status} x\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n".encode())


def test_a_body_is_fetched_and_the_request_says_little() -> None:
    """Announced, chunked, or ended by the connection; the host is named, no compression is asked for."""
    seen: list[tuple[str, dict[str, str], bytes]] = []
    bodies = [
        OK + b"Content-Length: 5\r\n\r\nhello",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
        OK + b"\r\nhello",
    ]

    def behave(connection: socket.socket) -> None:
        seen.append(read_request(connection))
        connection.sendall(bodies[len(seen) - 1])

    with serve(behave) as port:
        for _ in bodies:
            assert fetch(to(port), f"http://127.0.0.1:{port}/a%20b?c=d#e") == b"hello"
    line, headers, _ = seen[0]
    assert line == "GET /a%20b?c=d HTTP/1.1"
    assert headers == {
        "host": f"127.0.0.1:{port}",
        "user-agent": "GenPulse",
        "accept": "*/*",
        "accept-encoding": "identity",
        "connection": "close",
    }


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    """A resolver that says something good first and something bad next is asked once."""
    asked: list[str] = []

    def rebind(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    with serve(respond(OK + b"Content-Length: 2\r\n\r\nhi")) as port:
        rules = to(port, networks=[ipaddress.ip_network("127.0.0.1/32")], resolve=rebind)
        assert fetch(rules, f"http://example.com:{port}/") == b"hi"
    assert asked == ["example.com"]


def test_an_address_inside_is_never_connected_to() -> None:
    """The server behind a refused address sees no connection at all."""
    seen: list[int] = []
    with serve(lambda connection: seen.append(1)) as port:
        rules = Egress(http=True, ports=[port], resolve=lambda host, asked: ["127.0.0.1", "::1"])
        with pytest.raises(UnsafeUrl):
            fetch(rules, f"http://example.com:{port}/")
        with pytest.raises(UnsafeUrl):
            rules.post(f"http://example.com:{port}/", b"", {}, timeout_s=5)
    assert seen == []


def test_the_next_address_is_tried_where_one_does_not_answer() -> None:
    """As browsers do; all of them passed the rules."""
    with serve(respond(OK + b"Content-Length: 2\r\n\r\nhi")) as port:
        rules = to(port, resolve=lambda host, asked: ["127.0.0.9", "127.0.0.1"])
        assert fetch(rules, f"http://example.com:{port}/") == b"hi"


def test_the_certificate_is_that_of_the_name_although_the_address_is_pinned(tmp_path: Path) -> None:
    """The right name passes; another name at the same address, or a stranger's certificate, does not."""
    server, client = authority(tmp_path / "a", "media.example.com")
    _, stranger = authority(tmp_path / "b", "media.example.com")
    with serve(respond(OK + b"Content-Length: 2\r\n\r\nhi"), tls=server) as port:
        rules = to(port, tls=client, resolve=lambda host, asked: ["127.0.0.1"])
        assert fetch(rules, f"https://media.example.com:{port}/") == b"hi"
        for url, tls in ((f"https://other.example.com:{port}/", client),
                         (f"https://127.0.0.1:{port}/", client),
                         (f"https://media.example.com:{port}/", stranger)):  # fmt: skip
            with pytest.raises(InputRejected, match="certificate"):
                fetch(to(port, tls=tls, resolve=lambda host, asked: ["127.0.0.1"]), url)


def test_a_redirect_is_followed_within_the_rules() -> None:
    """Relative and absolute ones; the last answer counts."""
    hops = [b"/two", b"three?x=1", b"?y=2"]
    lines: list[str] = []

    def behave(connection: socket.socket) -> None:
        lines.append(read_request(connection)[0].split()[1])
        if len(lines) <= len(hops):
            connection.sendall(b"HTTP/1.1 302 x\r\nLocation: " + hops[len(lines) - 1] + b"\r\n\r\n")
        else:
            connection.sendall(OK + b"Content-Length: 3\r\n\r\nend")

    with serve(behave) as port:
        assert fetch(to(port), f"http://127.0.0.1:{port}/a/one") == b"end"
    assert lines == ["/a/one", "/two", "/three?x=1", "/three?y=2"]


@pytest.mark.parametrize(
    "where",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:127.0.0.1]/",
        "http://2130706433/",
        "http://localhost/",
        "//10.0.0.1/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "http://user:secret@example.com/",
        "http://example.com:22/",
        "http://\\127.0.0.1/",
        "http://[::1",
        "",
    ],
)
def test_a_redirect_to_worse_is_refused(where: str) -> None:
    """Each hop is held to the rules of the first."""
    with serve(redirect(where)) as port, pytest.raises(InputRejected):
        fetch(to(port), f"http://127.0.0.1:{port}/")


def test_a_redirect_to_a_name_that_resolves_inside_is_refused() -> None:
    """The check of addresses is made at every hop."""
    with serve(redirect("http://inside.example.com/")) as port:
        rules = to(port, ports=[port, 80], resolve=lambda host, asked: ["10.0.0.1"])
        with pytest.raises(UnsafeUrl):
            fetch(rules, f"http://127.0.0.1:{port}/")


def test_a_redirect_from_https_to_http_is_refused(tmp_path: Path) -> None:
    """Also where http: is allowed: who asked for https gets it to the end."""
    server, client = authority(tmp_path, "127.0.0.1")
    with (
        serve(respond(OK + b"Content-Length: 2\r\n\r\nhi")) as plain,
        serve(redirect(f"http://127.0.0.1:{plain}/"), tls=server) as port,
        pytest.raises(UnsafeUrl, match="https to http"),
    ):
        fetch(to(port, tls=client), f"https://127.0.0.1:{port}/")


def test_redirects_come_to_an_end() -> None:
    """A circle is left after a few turns."""
    with serve(redirect("/again")) as port, pytest.raises(InputRejected, match="too often"):
        fetch(to(port), f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (OK + b"Content-Length: 1001\r\n\r\n", InputRejected),
        (OK + b"Content-Length: 99999999999999999999999\r\n\r\n", InputRejected),
        (OK + b"\r\n" + b"x" * 1001, InputRejected),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n", InputRejected),
        (OK + b"Content-Length: 50\r\n\r\nshort", InputUnavailable),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n50\r\nshort", InputUnavailable),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", InputUnavailable),
        (OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"\0" * 10**6), InputRejected),
        (OK + b"Content-Encoding: br\r\n\r\nx", InputRejected),
        (b"HTTP/1.1 204 No Content\r\n\r\n", InputRejected),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 1\r\n\r\nx", InputRejected),
        (b"HTTP/1.1 304 x\r\n\r\n", InputRejected),
        (b"HTTP/1.1 401 x\r\n\r\n", InputRejected),
        (b"HTTP/1.1 404 x\r\n\r\n", InputRejected),
        (b"HTTP/1.1 408 x\r\n\r\n", InputUnavailable),
        (b"HTTP/1.1 429 x\r\n\r\n", InputUnavailable),
        (b"HTTP/1.1 500 x\r\n\r\n", InputUnavailable),
        (b"HTTP/1.1 503 x\r\n\r\n", InputUnavailable),
        (b"SSH-2.0-OpenSSH_9\r\n", InputUnavailable),
        (b"", InputUnavailable),
        (b"HTTP/1.1 200 " + b"x" * 70_000, InputUnavailable),
        (OK + b"A: b\r\n" * 200 + b"\r\n", InputUnavailable),
    ],
)
def test_an_answer_that_is_no_good_has_its_kind(answer: bytes, error: type[Exception]) -> None:
    """Too large, cut off, compressed, refused for good (permanent), or only just now (retryable)."""
    with serve(respond(answer)) as port, pytest.raises(error) as raised:
        fetch(to(port), f"http://127.0.0.1:{port}/secret-path")
    assert type(raised.value) is error
    assert "secret-path" not in str(raised.value)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"", b"H"),
        (OK, b"X-A: b\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (OK + b"Content-Length: 1000\r\n\r\n", b"x"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    ],
)
def test_a_drip_ends_with_the_clock(head: bytes, piece: bytes) -> None:
    """Single bytes that always come in time are no way to hold a connection."""
    began = time.monotonic()
    with serve(drip(head, piece, 0.05)) as port, pytest.raises(InputUnavailable):
        fetch(to(port), f"http://127.0.0.1:{port}/", timeout_s=0.7)
    assert time.monotonic() - began < 10


def hold(connection: socket.socket) -> None:
    """Take everything, say nothing, until the other side has gone."""
    while connection.recv(1 << 16):
        pass


def test_a_server_that_accepts_and_says_nothing_ends_with_the_clock() -> None:
    """In plain, and in the middle of a TLS handshake."""
    with serve(hold) as port:
        for scheme in ("http", "https"):
            began = time.monotonic()
            with pytest.raises(InputUnavailable):
                fetch(to(port), f"{scheme}://127.0.0.1:{port}/", timeout_s=0.5)
            assert time.monotonic() - began < 10


def test_a_flood_is_cut_off() -> None:
    """A server that sends without end costs the cap and no more."""
    with serve(drip(OK + b"\r\n", b"x" * 65536, 0)) as port, pytest.raises(InputRejected, match="larger"):
        fetch(to(port), f"http://127.0.0.1:{port}/", max_bytes=1 << 20)


def test_a_cancel_ends_a_fetch_that_hangs() -> None:
    """``check`` is asked at least each second."""
    calls: list[float] = []

    def check() -> None:
        calls.append(time.monotonic())
        if len(calls) > 5:
            raise TaskCanceled

    with serve(drip(OK + b"Content-Length: 9\r\n\r\nx", b"", 0.2)) as port, pytest.raises(TaskCanceled):
        fetch(to(port), f"http://127.0.0.1:{port}/", timeout_s=50, check=check)


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would resolve the name itself, and what we checked would be nothing."""
    with serve(respond(OK + b"Content-Length: 5\r\n\r\nproxy")) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy}")
        with serve(respond(OK + b"Content-Length: 2\r\n\r\nhi")) as port:
            assert fetch(to(port), f"http://127.0.0.1:{port}/") == b"hi"


def test_a_post_follows_no_redirect_and_reads_a_little() -> None:
    """The status counts; of the body a short excerpt is kept, without control characters."""
    seen: list[tuple[str, dict[str, str], bytes]] = []

    def behave(connection: socket.socket) -> None:
        seen.append(read_request(connection))
        connection.sendall(
            b"HTTP/1.1 307 x\r\nLocation: http://127.0.0.1:1/\r\n\r\nno\x00\x1b[31m" + b"y" * 900
        )

    with serve(behave) as port:
        answer = to(port).post(f"http://127.0.0.1:{port}/hook", b"{}", {"X-A": "b"}, timeout_s=20)
    assert answer.status == 307
    assert answer.excerpt.startswith("no")
    assert len(answer.excerpt) <= 512
    assert "\x00" not in answer.excerpt
    assert "\x1b" not in answer.excerpt
    (line, headers, body) = seen[0]
    assert (line, headers["x-a"], body) == ("POST /hook HTTP/1.1", "b", b"{}")


@pytest.mark.parametrize(
    "rest", [b"Content-Length: 99999999999\r\n\r\n", b"\r\n", b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"]
)
def test_a_post_is_not_held_by_what_follows_the_status(rest: bytes) -> None:
    """A body that hangs, lies about its length or is malformed does not undo a 200."""
    began = time.monotonic()
    with serve(drip(OK + rest, b"x", 0.05)) as port:
        assert to(port).post(f"http://127.0.0.1:{port}/", b"{}", {}, timeout_s=20).status == 200
    assert time.monotonic() - began < 10


def test_a_post_to_a_flood_reads_the_excerpt_only() -> None:
    """10 GB cost half a kilobyte."""
    with serve(drip(OK + b"Content-Length: 10737418240\r\n\r\n", b"x" * 65536, 0)) as port:
        answer = to(port).post(f"http://127.0.0.1:{port}/", b"{}", {}, timeout_s=20)
    assert (answer.status, answer.excerpt) == (200, "x" * 512)
