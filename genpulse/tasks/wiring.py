"""Turns settings into the objects that the web and the workers share, in one place."""

from __future__ import annotations

from genpulse.config import Settings
from genpulse.ledger import Ledger
from genpulse.live import Live
from genpulse.storage import LocalStorage, StorageProvider

__all__ = ["open_ledger", "open_live", "open_storage"]


def open_ledger(settings: Settings, *, pool_size: int = 0) -> Ledger:
    """
    The ledger, not yet connected.

    Args:
        pool_size: Connections kept; 0 in a process that forks.
    """
    # A direct URL means that the other one goes through a transaction pooler.
    pooled_by_server = bool(settings.database_direct_url.get_secret_value())
    return Ledger.connect(settings.ledger_url, pool_size=pool_size, server_settings=not pooled_by_server)


def open_live(settings: Settings) -> Live:
    """Live progress and wake-up calls."""
    return Live(settings.redis_url.get_secret_value())


def open_storage(settings: Settings) -> StorageProvider:
    """Where outputs and assets are kept."""
    if settings.storage == "local":
        return LocalStorage(settings.assets_dir, base_url=settings.public_url)
    from genpulse.storage import S3Storage  # boto3 takes a second to import, and most need it not

    return S3Storage(
        bucket=settings.s3_bucket,
        provider=settings.s3_provider,
        region=settings.s3_region,
        endpoint_url=settings.s3_endpoint_url,
        access_key_id=settings.s3_access_key_id.get_secret_value(),
        secret_access_key=settings.s3_secret_access_key.get_secret_value(),
        prefix=settings.s3_prefix,
        signature_version=settings.s3_signature_version,
        multipart_bytes=settings.s3_multipart_bytes,
        presign_s=settings.s3_presign_s,
        redirects=settings.s3_redirect,
    )
