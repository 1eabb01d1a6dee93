"""
Inputs by URL: fetched by the worker under the egress rules, into a file that vanishes with its use.

Nothing of it is kept between attempts: what a URL shows may change, and a task that runs again
asks again. The caller's URL may carry a secret, so no message repeats more of it than the host.
"""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

from genpulse import __version__
from genpulse.config import Settings, parse_allowed
from genpulse.egress import Egress

__all__ = ["is_url", "open_egress", "open_url"]

_URL = re.compile(r"https?://", re.IGNORECASE)


def is_url(reference: str) -> bool:
    """Whether an input names a web address."""
    return bool(_URL.match(reference))


def open_egress(settings: Settings) -> Egress:
    """The operator's rules for going out, built once for each set of settings."""
    return _egress(settings.egress_allow, settings.egress_http, settings.egress_ports)


@functools.lru_cache(maxsize=8)
def _egress(allow: str, http: bool, ports: str) -> Egress:
    hosts, networks = parse_allowed(allow)
    return Egress(
        hosts=hosts,
        networks=networks,
        http=http,
        ports=[int(port) for port in ports.split(",") if port.strip()],
        agent=f"GenPulse/{__version__}",
    )


@contextlib.contextmanager
def open_url(settings: Settings, url: str, check: Callable[[], None]) -> Iterator[BinaryIO]:
    """
    Fetch *url* into a temporary file, open at its start for as long as the block lasts.

    Args:
        check: Asked at least each second; what it raises ends the fetch.

    Raises:
        InputRejected: Refused by the rules, or by the server for good, or too large.
        InputUnavailable: Not to be had just now.
    """
    with tempfile.TemporaryFile(prefix="genpulse-input-") as file:
        open_egress(settings).fetch(
            url,
            file,
            max_bytes=settings.input_max_bytes,
            timeout_s=settings.input_timeout_s,
            check=check,
        )
        file.seek(0)
        yield cast("BinaryIO", file)
