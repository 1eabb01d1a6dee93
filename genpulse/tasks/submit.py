"""
Turning a caller's words into a recorded task. Every surface of the API comes through here.

Only the ledger is touched: the row is its own outbox, and the relay takes it from there. A request
that also spoke to Redis would be three times slower, and would hang when Redis does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from genpulse.config import Settings
from genpulse.errors import InvalidRequest, UnsafeUrl
from genpulse.ledger import Ledger
from genpulse.model import NewTask, Priority, Task
from genpulse.tasks.inputs import open_egress
from genpulse.tasks.registry import Registry

__all__ = ["accept", "body_digest"]


def accept(  # the parts, the words, and who says them
    ledger: Ledger,
    registry: Registry,
    settings: Settings,
    body: Mapping[str, Any],
    *,
    owner: str,
    idempotency_key: str | None = None,
    body_hash: str | None = None,
) -> tuple[Task, bool]:
    """
    Check a request and record it as a task.

    Args:
        body: ``task_type`` and ``params``, and optionally ``priority``, ``callback_url``,
            ``timeout_s``, ``expires_in_s``, ``max_attempts``, ``metadata``; types as in API.md.
        idempotency_key: The caller's own key; the same key and body give the same task.
        body_hash: Digest of the whole request; by default that of *body*.

    Returns:
        The task, and whether it is a replay of an earlier request.

    Raises:
        InvalidRequest: The words make no task; nothing was recorded.
        IdempotencyConflict: The key was used with another body.
        LedgerUnavailable: Nothing is known to be recorded.
    """
    if (callback_url := body.get("callback_url")) is not None:
        _check_callback(settings, callback_url)
    handler = registry.get(body["task_type"])
    params = handler.validate_params(body["params"])
    _check_urls(settings, handler.referenced_urls(params))
    _find_references(ledger, owner, handler.referenced_assets(params), handler.referenced_outputs(params))
    new = NewTask(
        task_type=handler.task_type,
        queue=handler.queue,
        params=params,
        owner=owner,
        priority=Priority(body.get("priority") or Priority.NORMAL),
        timeout_s=body.get("timeout_s") or settings.timeout_s,
        expires_in_s=body.get("expires_in_s"),
        max_attempts=body.get("max_attempts") or settings.max_attempts,
        metadata=body.get("metadata") or {},
        callback_url=callback_url,
    )
    return ledger.submit(
        new,
        idempotency_key=idempotency_key,
        body_hash=body_hash or body_digest(body),
        idempotency_ttl_s=settings.idempotency_ttl_s,
    )


def body_digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON body whatever the order of its keys."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _check_callback(settings: Settings, url: str) -> None:
    """Refuse a webhook that could not be signed, or whose address we would not go to."""
    if not settings.webhook_keys:
        sentence = "Webhooks need GENPULSE_WEBHOOK_SECRET; poll GET /task/{id} instead."
        raise InvalidRequest("invalid_request", sentence, [("/callback_url", sentence)])
    _check_urls(settings, (("/callback_url", url),))


def _check_urls(settings: Settings, urls: tuple[tuple[str, str], ...]) -> None:
    """Refuse addresses that the worker would not go to, as far as that shows without the network."""
    rules = open_egress(settings)
    errors: list[tuple[str, str]] = []
    for pointer, url in urls:
        try:
            rules.check(url)
        except UnsafeUrl as error:
            errors.append((pointer, str(error)))
    if errors:
        raise InvalidRequest("unsafe_url", f"{errors[0][0]}: {errors[0][1]}.", errors)


def _find_references(
    ledger: Ledger, owner: str, assets: tuple[str, ...], outputs: tuple[tuple[str, int], ...]
) -> None:
    """Refuse what names a file that this owner does not have. Somebody else's is as missing as none."""
    missing = [
        f"asset:{asset_id}" for asset_id in dict.fromkeys(assets) if not _has_asset(ledger, asset_id, owner)
    ]
    for task_id, index in dict.fromkeys(outputs):
        task = ledger.get(task_id, owner)
        if task is None or not any(output.index == index for output in task.outputs):
            missing.append(f"output:{task_id}/{index}")
    if missing:
        sentence = f"There is no {' and no '.join(missing)}."
        raise InvalidRequest("missing_asset", sentence, [("/params", sentence)])


def _has_asset(ledger: Ledger, asset_id: str, owner: str) -> bool:
    return ledger.get_asset(asset_id, owner) is not None
