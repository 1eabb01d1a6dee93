"""
Where assets and outputs are kept: a directory of this host, or an object store that speaks S3.

Backends know nothing of tasks. They promise that readers never see half an object, that what was
taken was verified, and that every failure is one of :mod:`genpulse.errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from genpulse.storage.base import (
    InvalidKey,
    StorageProvider,
    StoredObject,
    check_key,
    clean_filename,
    content_disposition,
    shows_inline,
)
from genpulse.storage.local import LocalStorage

if TYPE_CHECKING:
    from genpulse.storage.s3 import S3Storage

__all__ = [
    "InvalidKey",
    "LocalStorage",
    "S3Storage",
    "StorageProvider",
    "StoredObject",
    "check_key",
    "clean_filename",
    "content_disposition",
    "shows_inline",
]


def __getattr__(name: str) -> object:
    # boto3 takes a third of a second to import; a local storage does without it.
    if name == "S3Storage":
        from genpulse.storage.s3 import S3Storage

        return S3Storage
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
