"""
The drain flag: one byte that a worker's main process shares with its children.

A signal handler may set it, and every child sees it at its next look, twice a second. No message,
no lock and no database stand between a SIGTERM and the last attempt that must be handed back.
"""

from __future__ import annotations

import mmap

import structlog

__all__ = ["begin_drain", "is_draining", "prepare_drain"]

log = structlog.get_logger("genpulse.worker")

_shared: mmap.mmap | None = None


def prepare_drain() -> None:
    """Make the shared flag. Called before the first fork, so that every child sees the same byte."""
    global _shared  # noqa: PLW0603  # one per worker, inherited by its children
    if _shared is None:
        _shared = mmap.mmap(-1, mmap.PAGESIZE)


def begin_drain() -> None:
    """Tell this worker and its children to take no more and to hand back what they have."""
    prepare_drain()
    assert _shared is not None
    if not _shared[0]:
        log.info("draining")
    _shared[0] = 1


def is_draining() -> bool:
    """Whether this worker was told to stop."""
    return _shared is not None and bool(_shared[0])
