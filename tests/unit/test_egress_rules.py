"""The rules of egress that need no network: spellings of addresses, names, ports and schemes."""

from __future__ import annotations

import ipaddress

import pytest

from genpulse.egress import Egress, is_public
from genpulse.errors import InputRejected, InputUnavailable, UnsafeUrl

INSIDE = {
    "loopback": "127.0.0.1",
    "all of 127/8 is loopback": "127.255.255.254",
    "this host": "0.0.0.0",
    "this network": "0.1.2.3",
    "private 10/8": "10.0.0.1",
    "private 172.16/12, first": "172.16.0.1",
    "private 172.16/12, last": "172.31.255.254",
    "private 192.168/16": "192.168.1.1",
    "link-local": "169.254.1.1",
    "metadata of most clouds": "169.254.169.254",
    "metadata of ECS tasks": "169.254.170.2",
    "carrier-grade NAT": "100.64.0.1",
    "metadata of Alibaba Cloud": "100.100.100.200",
    "metadata of Oracle Cloud": "192.0.0.192",
    "host agent of Azure": "168.63.129.16",
    "documentation 1": "192.0.2.1",
    "documentation 2": "198.51.100.1",
    "documentation 3": "203.0.113.1",
    "benchmarks": "198.18.0.1",
    "6to4 relay": "192.88.99.1",
    "multicast": "224.0.0.1",
    "multicast, local scope": "239.255.255.250",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "IPv6 loopback": "::1",
    "IPv6 unspecified": "::",
    "IPv6 link-local": "fe80::1",
    "IPv6 site-local": "fec0::1",
    "IPv6 unique local": "fd00::1",
    "metadata of AWS by IPv6": "fd00:ec2::254",
    "metadata of Google Cloud by IPv6": "fd20:ce::254",
    "IPv6 multicast": "ff02::1",
    "IPv6 documentation": "2001:db8::1",
    "IPv6 documentation, the new one": "3fff::1",
    "IPv6 discard": "100::1",
    "IPv6 segment routing": "5f00::1",
    "mapped loopback": "::ffff:127.0.0.1",
    "mapped loopback in hex": "::ffff:7f00:1",
    "mapped metadata": "::ffff:169.254.169.254",
    "mapped public address": "::ffff:8.8.8.8",
    "translated (SIIT) loopback": "::ffff:0:127.0.0.1",
    "compatible loopback": "::127.0.0.1",
    "compatible private": "::a00:1",
    "6to4 loopback": "2002:7f00:1::",
    "6to4 private": "2002:a00:1::1",
    "NAT64 loopback": "64:ff9b::127.0.0.1",
    "NAT64 metadata": "64:ff9b::a9fe:a9fe",
    "NAT64, local prefix": "64:ff9b:1::a00:1",
    "Teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "ORCHID": "2001:20::1",
    "ISATAP private": "2400:cb00::5efe:10.0.0.1",
    "ISATAP, other bit": "2400:cb00::200:5efe:a00:1",
}
"""What must never be connected to, by the trick or range it stands for."""

OUTSIDE = [
    "1.1.1.1",
    "8.8.8.8",
    "172.15.0.1",
    "172.32.0.1",
    "100.63.255.255",
    "100.128.0.1",
    "2606:4700::1111",
]

SPELLINGS = {
    "decimal": "https://2130706433/",
    "hexadecimal": "https://0x7f000001/",
    "hexadecimal by parts": "https://0x7f.0x0.0x0.0x1/",
    "octal": "https://017700000001/",
    "octal by parts": "https://0177.0.0.1/",
    "leading zeros": "https://127.000.000.001/",
    "short": "https://127.1/",
    "zero": "https://0/",
    "too large a part": "https://127.0.0.256/",
    "too many parts": "https://127.0.0.1.1/",
    "overflowing decimal": "https://6425673729/",
    "trailing dot on an address": "https://127.0.0.1./",
    "trailing dot on a name": "https://example.com./",
    "two dots": "https://example..com/",
    "percent-encoded dots": "https://127%2e0%2e0%2e1/",
    "percent-encoded name": "https://%6cocalhost/",
    "full-width dots": "https://127。0。0。1/",
    "half-width dots": "https://127｡0｡0｡1/",
    "full-width digits": "https://１２７.0.0.1/",
    "circled digits": "https://①②⑦.⓪.⓪.①/",
    "other script": "https://bücher.example/",
    "soft hyphen": "https://local\u00adhost/",
    "user name": "https://example.com@127.0.0.1/",
    "user name and password": "https://a:b@example.com/",
    "user name that looks like a host": "https://example.com:443@127.0.0.1/",
    "backslash for a slash": "https://example.com\\@127.0.0.1/",
    "backslashes instead of slashes": "https:\\\\127.0.0.1/",
    "one slash": "https:/127.0.0.1/",
    "three slashes": "https:///127.0.0.1/",
    "no scheme": "//127.0.0.1/",
    "tab in the host": "https://127.0.0\t.1/",
    "line end and a header": "https://example.com/\r\nHost: 127.0.0.1",
    "space": "https://example.com /",
    "NUL": "https://example.com\x00.127.0.0.1/",
    "zone": "https://[fe80::1%25eth0]/",
    "zone, bare": "https://[fe80::1%eth0]/",
    "brackets around IPv4": "https://[127.0.0.1]/",
    "future address": "https://[v1.fe80::1]/",
    "localhost": "https://localhost/",
    "localhost in capitals": "https://LOCALHOST/",
    "below localhost": "https://a.localhost/",
    "one label": "https://redis/",
    "metadata by name": "https://metadata.google.internal/",
    "mDNS": "https://printer.local/",
    "home network": "https://router.home.arpa/",
    "ssh": "https://example.com:22/",
    "redis": "https://example.com:6379/",
    "port 0": "https://example.com:0/",
    "port beyond the end": "https://example.com:65979/",
    "port with a sign": "https://example.com:-443/",
    "two ports": "https://example.com:443:80/",
    "plain http": "http://example.com/",
    "file": "file:///etc/passwd",
    "gopher": "gopher://example.com/_x",
    "ftp": "ftp://example.com/",
    "data": "data:text/plain,x",
    "javascript": "javascript:alert(1)",
    "jar": "jar:https://example.com/x.jar!/",
    "empty": "",
    "endless": "https://example.com/" + "a" * 3000,
    "endless name": "https://" + "a." * 200 + "example.com/",
    "endless label": f"https://{'a' * 64}.example.com/",
}
"""URLs that some reader takes for something else than they seem."""


@pytest.mark.parametrize("address", INSIDE.values(), ids=INSIDE.keys())
def test_an_address_inside_is_refused_however_it_is_reached(address: str) -> None:
    """By number in the URL, and as what a name resolves to."""
    assert not is_public(ipaddress.ip_address(address))
    literal = f"[{address}]" if ":" in address else address
    with pytest.raises(UnsafeUrl):
        Egress(http=True).check(f"https://{literal}/")
    rules = Egress(resolve=lambda host, port: [address])
    with pytest.raises(UnsafeUrl):
        rules.addresses(rules.check("https://rebound.example.com/"))


@pytest.mark.parametrize("address", OUTSIDE)
def test_an_address_outside_is_allowed(address: str) -> None:
    """The neighbours of refused ranges are public."""
    assert is_public(ipaddress.ip_address(address))
    rules = Egress(resolve=lambda host, port: [address])
    target = rules.check("https://example.com/a?b#c")
    assert [str(found) for found in rules.addresses(target)] == [address]
    assert (target.host, target.port, target.path) == ("example.com", 443, "/a?b")


@pytest.mark.parametrize("url", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_a_url_that_can_be_read_in_two_ways_is_refused(url: str) -> None:
    """Whatever another reader would take it for, nothing is resolved and nothing connected to."""
    rules = Egress(resolve=lambda host, port: pytest.fail("it was resolved"))
    with pytest.raises(UnsafeUrl) as refused:
        rules.check(url)
    assert not url or url not in str(refused.value)


def test_the_good_addresses_of_a_name_are_kept_and_the_bad_ones_dropped() -> None:
    """A name with an address inside and one outside is only ever connected to outside."""
    rules = Egress(resolve=lambda host, port: ["127.0.0.1", "1.1.1.1", "::1"])
    assert [str(found) for found in rules.addresses(rules.check("https://example.com/"))] == ["1.1.1.1"]


def test_what_the_operator_trusts_is_allowed_and_nothing_beside_it() -> None:
    """By name on any port, by name below a domain, and by range."""
    rules = Egress(
        hosts=["redis", ".corp.internal"],
        networks=[ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("::1/128")],
        resolve=lambda host, port: ["10.1.2.3", "10.2.2.3"],
    )

    assert [str(a) for a in rules.addresses(rules.check("https://redis:6379/"))] == ["10.1.2.3", "10.2.2.3"]
    assert rules.check("https://hooks.corp.internal/").host == "hooks.corp.internal"
    assert [str(a) for a in rules.addresses(rules.check("https://example.com/"))] == ["10.1.2.3"]
    assert rules.check("https://10.1.0.9:9000/").port == 9000
    assert rules.check("https://[::1]/").url == "https://[::1]/"
    for other in ("http://redis/", "https://rediss/", "https://10.2.0.9/", "https://evilcorp.internal/"):
        with pytest.raises(UnsafeUrl):
            rules.check(other)


def test_a_fragment_is_nobodys_host() -> None:
    """What stands behind ``#`` is dropped, whatever it looks like."""
    assert Egress().check("https://example.com#@127.0.0.1/@x").url == "https://example.com/"


def test_http_is_allowed_where_the_operator_says_so() -> None:
    """The setting adds a scheme and lifts no other rule."""
    rules = Egress(http=True, ports=[80, 443])
    assert rules.check("HTTP://Example.COM?q").url == "http://example.com/?q"
    with pytest.raises(UnsafeUrl):
        rules.check("http://127.0.0.1/")


def test_a_name_that_does_not_exist_is_final_and_a_silent_resolver_is_not() -> None:
    """The one is the caller's mistake, the other passes."""
    import socket

    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    def later(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "later")

    for resolve, kind in ((unknown, InputRejected), (later, InputUnavailable)):
        rules = Egress(resolve=resolve)
        with pytest.raises(kind):
            rules.addresses(rules.check("https://example.com/"))


def test_a_resolver_that_hangs_is_left_behind() -> None:
    """The time-out is ours, not the resolver's."""
    import threading
    import time

    hang = threading.Event()
    rules = Egress(resolve=lambda host, port: ["1.1.1.1"] * hang.wait(30))
    began = time.monotonic()
    with pytest.raises(InputUnavailable):
        rules.addresses(rules.check("https://example.com/"), timeout_s=0.1)
    hang.set()
    assert time.monotonic() - began < 5
