"""
Where GenPulse goes on a caller's word: the one gate for inputs by URL and for webhooks.

A caller who chooses an address would otherwise have our network to look around in. So the URL is
read by one strict pattern, the name is resolved once, every address is held against the table
below, and the connection goes to an address that passed: there is no second resolution that could
say something else. TLS still checks the certificate of the *name*. Redirects are off, or each hop
is held to the same rules and may not step down from https. Proxies of the environment are not
used: behind one, the check of the address would mean nothing.

What the other side does is bounded as well. One clock runs over resolving, connecting, shaking
hands, sending and reading, so that a drip of single bytes ends too; bodies are read in pieces up to
a cap, and a compressed one, which nobody asked for, is refused instead of inflated.

Own code and not a library by decision record 0005; ``tests/unit/test_egress_rules.py`` and
``tests/integration/test_egress.py`` hold the list of tricks it stands against.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import urljoin

from genpulse.errors import InputRejected, InputUnavailable, UnsafeUrl

__all__ = ["Answer", "Egress", "Target", "is_public", "resolve_host"]

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_URL = 2048
MAX_REDIRECTS = 4
EXCERPT_BYTES = 512
"""What is kept of a webhook receiver's answer, for a person who looks for its mistake."""

_CONNECT_S = 5.0
_RESOLVE_S = 5.0
_MAX_ADDRESSES = 4
_CHUNK_BYTES = 64 * 1024
_TICK_S = 1.0
_EXCERPT_S = 1.0

# IANA's special-purpose registries, written out: `ipaddress.is_global` says different things in
# different Python versions. 6to4's relay, and Azure's host agent, which has a public address.
_REFUSED_4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
        "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
# Only global unicast is reachable at all: that leaves out loopback, link-local, unique-local,
# multicast, mapped and compatible IPv4, and NAT64. Inside it: Teredo and the other protocol
# assignments, documentation, 6to4.
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_6 = tuple(
    ipaddress.IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
# ISATAP puts an IPv4 address behind these halves of an interface's id, under any prefix.
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>[/?][!-\"$-\[\]-~]*)?(?:#[!-~]*)?",
    re.ASCII,
)
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
# Names that mean this machine or this network to somebody's resolver (RFC 6761, RFC 6762, RFC 8375).
_LOCAL_NAMES = ("localhost", "local", "internal", "intranet", "lan", "home.arpa", "onion", "invalid")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LATER = frozenset({408, 425, 429})
_DEFAULT_PORTS = {"https": 443, "http": 80}

Resolve = Callable[[str, int], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that passed the rules which need no network."""

    scheme: str
    host: str
    """In lower case; an IPv6 address without its brackets."""
    port: int
    path: str
    """With the query, never empty."""

    @property
    def url(self) -> str:
        """The same URL in one spelling, without a fragment."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a webhook's receiver said."""

    status: int
    excerpt: str
    """The first bytes of the body as text, without control characters."""


def is_public(address: IPAddress) -> bool:
    """Whether an address is an ordinary one of the Internet, and carries no other one inside."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _REFUSED_4)
    if address.scope_id is not None or address not in _GLOBAL_6:
        return False
    if (int(address) >> 32) & 0xFFFF_FFFF in _ISATAP:
        return False
    return not any(address in network for network in _REFUSED_6)


def resolve_host(host: str, port: int) -> list[str]:
    """
    Addresses of a name by the system's resolver.

    The name goes over as bytes: Python's IDNA codec has no say in what it means.

    Raises:
        OSError: ``socket.gaierror``.
    """
    found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class Egress:
    """
    The rules, and the only two ways out: :meth:`fetch` and :meth:`post`. Threads may share one.

    Args:
        hosts: Names the operator trusts, whatever they resolve to and on any port; ``.example.org``
            stands for every name below.
        networks: Addresses the operator trusts although they are not public; a URL that names one
            of them by number may name any port.
        http: Whether ``http:`` is allowed, too.
        ports: Where anything else may be.
        resolve: The resolver; a test passes one that lies.
        tls: The context for ``https:``; by default the system's trusted authorities.
    """

    def __init__(
        self,
        *,
        hosts: Collection[str] = (),
        networks: Collection[IPNetwork] = (),
        http: bool = False,
        ports: Collection[int] = (443, 8443),
        resolve: Resolve = resolve_host,
        tls: ssl.SSLContext | None = None,
        agent: str = "GenPulse",
    ) -> None:
        self._hosts = frozenset(hosts)
        self._networks = tuple(networks)
        self._schemes = frozenset({"https", "http"} if http else {"https"})
        self._ports = frozenset(ports)
        self._resolve = resolve
        self._tls = tls
        self._agent = agent

    # -- Rules --------------------------------------------------------------------------------

    def check(self, url: str) -> Target:
        """
        Hold a URL against every rule that needs no network.

        Raises:
            UnsafeUrl: With a sentence that does not repeat the URL, which may carry a secret.
        """
        match = _URL.fullmatch(url) if len(url) <= MAX_URL else None
        if match is None:
            raise UnsafeUrl(_why_not_a_url(url))
        scheme = match["scheme"].lower()
        if scheme not in self._schemes:
            words = " or ".join(sorted(f"{name}:" for name in self._schemes))
            raise UnsafeUrl(f"the URL must be an address that begins with {words}")
        host = match["host"].lower()
        address = _literal(host)
        if isinstance(address, ipaddress.IPv6Address):
            host = str(address)
        trusted = self._is_trusted_name(host) or (address is not None and self._is_trusted(address))
        if not trusted and (not is_public(address) if address is not None else _is_local_name(host)):
            raise UnsafeUrl("the URL must not name a private, local or reserved address")
        port = int(match["port"]) if match["port"] else _DEFAULT_PORTS[scheme]
        if not (0 < port < 65536 and (trusted or port in self._ports)):
            raise UnsafeUrl("the URL names a port that is not allowed here")
        path = match["path"] or "/"
        return Target(scheme, host, port, path if path.startswith("/") else f"/{path}")

    def addresses(self, target: Target, timeout_s: float = _RESOLVE_S) -> list[IPAddress]:
        """
        Resolve a name, once, and keep the addresses that may be connected to.

        Raises:
            UnsafeUrl: It has addresses, and all of them are refused.
            InputRejected: There is no such name.
            InputUnavailable: The resolver did not say in time.
        """
        literal = _literal(target.host)
        found = [literal] if literal is not None else self._look_up(target, timeout_s)
        if self._is_trusted_name(target.host):
            return found
        kept = [address for address in found if is_public(address) or self._is_trusted(address)]
        if not kept:
            raise UnsafeUrl(f"{target.host} has a private, local or reserved address")
        return kept

    def _look_up(self, target: Target, timeout_s: float) -> list[IPAddress]:
        # The system's resolver has no time-out one could set; a thread that hangs in it ends with it.
        said: queue.SimpleQueue[Sequence[str] | OSError | UnicodeError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                said.put(self._resolve(target.host, target.port))
            except (OSError, UnicodeError) as error:
                said.put(error)

        threading.Thread(target=ask, name="genpulse-resolve", daemon=True).start()
        try:
            answer = said.get(timeout=max(0.0, min(timeout_s, _RESOLVE_S)))
        except queue.Empty:
            raise InputUnavailable(f"the name {target.host} was not resolved in time") from None
        if isinstance(answer, UnicodeError) or (
            isinstance(answer, socket.gaierror) and answer.errno == socket.EAI_NONAME
        ):
            raise InputRejected(f"there is no host {target.host}") from answer
        if isinstance(answer, OSError):
            raise InputUnavailable(f"the name {target.host} cannot be resolved just now") from answer
        # A zone (fe80::1%eth0) stays in the address and is refused with it.
        return [ipaddress.ip_address(text) for text in answer]

    def _is_trusted_name(self, host: str) -> bool:
        return host in self._hosts or any(
            name.startswith(".") and host.endswith(name) for name in self._hosts
        )

    def _is_trusted(self, address: IPAddress) -> bool:
        return any(address.version == network.version and address in network for network in self._networks)

    # -- Ways out -----------------------------------------------------------------------------

    def fetch(
        self,
        url: str,
        sink: IO[bytes],
        *,
        max_bytes: int,
        timeout_s: float,
        check: Callable[[], None] = lambda: None,
    ) -> int:
        """
        Get what is behind a URL, piece by piece, and follow redirects within the rules.

        Args:
            sink: Takes the bytes; what it holds after an error is worth nothing.
            max_bytes: Cap on the body, announced or not.
            timeout_s: For all of it, redirects too.
            check: Called at least each second; what it raises ends the fetch.

        Returns:
            How many bytes there were.

        Raises:
            UnsafeUrl: The URL, a redirect or an address behind them is refused.
            InputRejected: The server says no for good (4xx), or the body is too large or compressed.
            InputUnavailable: No answer in time, connection lost, truncated, or 5xx: worth another try.
        """
        clock = _Clock(timeout_s, check)
        target = self.check(url)
        for _ in range(MAX_REDIRECTS + 1):
            with self._exchange(target, clock, "GET", None, {"Accept": "*/*"}) as answer:
                if answer.status in _REDIRECTS:
                    target = self._onward(target, answer.getheader("Location"))
                    continue
                _judge(target, answer)
                return _stream(target, answer, sink, max_bytes, clock)
        raise InputRejected(f"{target.host} redirects too often")

    def post(self, url: str, body: bytes, headers: dict[str, str], *, timeout_s: float) -> Answer:
        """
        Post a body and read the status, and a little of what comes with it. Follows no redirect.

        Raises:
            UnsafeUrl: The URL or the address behind it is refused.
            InputRejected, InputUnavailable: No status was received; the message says why.
        """
        clock = _Clock(timeout_s)
        target = self.check(url)
        with self._exchange(target, clock, "POST", body, headers) as answer:
            # The status is what counts: a body that hangs or breaks afterwards changes nothing.
            clock.ends_at = min(clock.ends_at, time.monotonic() + _EXCERPT_S)
            head = b""
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                while len(head) < EXCERPT_BYTES and (piece := answer.read1(EXCERPT_BYTES - len(head))):
                    head += piece
            return Answer(answer.status, _printable(head))

    def _onward(self, target: Target, location: str | None) -> Target:
        if not location:
            raise InputRejected(f"{target.host} redirects to nowhere")
        try:
            onward = self.check(urljoin(target.url, location))
        except (UnsafeUrl, ValueError) as error:
            raise UnsafeUrl(f"{target.host} redirects to an address that is not allowed") from error
        if target.scheme == "https" and onward.scheme != "https":
            raise UnsafeUrl(f"{target.host} redirects from https to http")
        return onward

    @contextlib.contextmanager
    def _exchange(
        self, target: Target, clock: _Clock, method: str, body: bytes | None, headers: dict[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        """One request on a connection of its own, and its answer up to the headers."""
        try:
            with contextlib.closing(self._connect(target, clock)) as sock:
                connection = _Pinned(target, sock, clock)
                connection.request(
                    method,
                    target.path,
                    body,
                    {
                        "User-Agent": self._agent,
                        "Accept-Encoding": "identity",
                        "Connection": "close",
                        **headers,
                    },
                )
                yield connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            raise InputRejected(
                f"the certificate of {target.host} is not valid: {error.verify_message}"
            ) from error
        except TimeoutError as error:
            raise InputUnavailable(f"{target.host} did not answer in time") from error
        except (OSError, http.client.HTTPException) as error:
            raise InputUnavailable(
                f"the connection to {target.host} failed: {type(error).__name__}"
            ) from error

    def _connect(self, target: Target, clock: _Clock) -> socket.socket:
        addresses = self.addresses(target, clock.left())[:_MAX_ADDRESSES]
        for number, address in enumerate(addresses, 1):
            clock.tick()
            family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(min(clock.left(), _CONNECT_S))
                sock.connect((str(address), target.port))
                sock.settimeout(clock.left())
                return self._secured(sock, target) if target.scheme == "https" else sock
            except BaseException as error:
                sock.close()
                if number == len(addresses) or not isinstance(error, OSError):
                    raise
        raise AssertionError  # there is at least one address

    def _secured(self, sock: socket.socket, target: Target) -> socket.socket:
        if self._tls is None:
            self._tls = _trusted_authorities()
        return self._tls.wrap_socket(sock, server_hostname=target.host)


# -- The pattern's fine print ---------------------------------------------------------------------


def _literal(host: str) -> IPAddress | None:
    """
    The address that *host* is, or ``None`` for a name.

    Raises:
        UnsafeUrl: It is neither: some readers take ``0x7f.1``, ``2130706433`` or ``0177.0.0.1`` for
            an address, and a resolver may be one of them.
    """
    try:
        if host.startswith("["):
            return ipaddress.IPv6Address(host[1:-1])
        if ":" in host:
            return ipaddress.IPv6Address(host)
        labels = host.split(".")
        if _NUMBER.fullmatch(labels[-1]):
            return ipaddress.IPv4Address(host)
    except ValueError:
        raise UnsafeUrl("the URL must not name an address in an unusual spelling") from None
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise UnsafeUrl("the URL must name a host by a usual name")
    return None


def _is_local_name(host: str) -> bool:
    return "." not in host or any(host == name or host.endswith(f".{name}") for name in _LOCAL_NAMES)


def _why_not_a_url(url: str) -> str:
    if len(url) > MAX_URL:
        return f"the URL must be {MAX_URL} characters at most"
    if not url.isascii():
        return "the URL must be ASCII: names in other scripts in their xn-- form, paths percent-encoded"
    if "@" in re.split(r"[/?#]", url.partition("//")[2])[0]:
        return "the URL must not carry a user name or a password"
    return "the URL must be a whole URL like https://host/path"


def _printable(head: bytes) -> str:
    text = head.decode("utf-8", "replace")
    return "".join(character if character.isprintable() else " " for character in text).strip()


# -- One bounded connection -----------------------------------------------------------------------


class _Clock:
    """One end for everything, and a look each second whether somebody wants it to end earlier."""

    def __init__(self, seconds: float, check: Callable[[], None] = lambda: None) -> None:
        self.ends_at = time.monotonic() + seconds
        self.tick = check

    def left(self) -> float:
        """Seconds left; raises :class:`TimeoutError` if there are none."""
        left = self.ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _Pinned(http.client.HTTPConnection):
    """An HTTP connection over a socket that is connected already; it never opens another one."""

    def __init__(self, target: Target, sock: socket.socket, clock: _Clock) -> None:
        super().__init__(target.host, target.port)
        self.default_port = _DEFAULT_PORTS[target.scheme]
        self.auto_open = 0
        self.sock: Any = _Timed(sock, clock)


class _Timed:
    """The little of a socket that ``http.client`` uses, with the clock before every wait."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        self._sock = sock
        self._clock = clock

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._clock.left())
        self._sock.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._sock, self._clock))

    def close(self) -> None:
        """Nothing: ``http.client`` closes before the body is read; ``_exchange`` closes the socket."""


class _Reader(io.RawIOBase):
    """Reads from the socket, never past the clock."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        super().__init__()
        self._sock = sock
        self._clock = clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            self._clock.tick()
            self._sock.settimeout(min(self._clock.left(), _TICK_S))
            try:
                return self._sock.recv_into(buffer)
            except TimeoutError:
                self._clock.left()


def _judge(target: Target, answer: http.client.HTTPResponse) -> None:
    """Raise unless this is a body worth reading."""
    if answer.status >= 500 or answer.status in _LATER:
        raise InputUnavailable(f"{target.host} answered {answer.status}")
    if answer.status not in {200, 203}:
        raise InputRejected(f"{target.host} answered {answer.status}")
    encoding = (answer.getheader("Content-Encoding") or "identity").strip().lower()
    if encoding not in {"", "identity"}:
        raise InputRejected(f"{target.host} sent a compressed body, which was not asked for")


def _stream(
    target: Target, answer: http.client.HTTPResponse, sink: IO[bytes], max_bytes: int, clock: _Clock
) -> int:
    announced = answer.length  # None for a chunked body, or one that ends with the connection
    too_large = InputRejected(f"the file at {target.host} is larger than {max_bytes} bytes")
    if announced is not None and announced > max_bytes:
        raise too_large
    total = 0
    while announced is None or total < announced:
        clock.tick()
        size = _CHUNK_BYTES if announced is None else min(_CHUNK_BYTES, announced - total)
        piece = answer.read1(size)
        if not piece:
            break
        total += len(piece)
        if total > max_bytes:
            raise too_large
        sink.write(piece)
    if announced is not None and total < announced:
        raise InputUnavailable(f"{target.host} sent less than it announced")
    return total


def _trusted_authorities() -> ssl.SSLContext:
    paths = ssl.get_default_verify_paths()
    if paths.cafile or paths.capath:
        return ssl.create_default_context()
    import certifi  # a Python that came without the system's list, as some on macOS

    return ssl.create_default_context(cafile=certifi.where())
