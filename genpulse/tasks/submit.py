"""
Turning a caller's words into a recorded task. Every surface of the API comes through here.

Only the ledger is touched: the row is its own outbox, and the relay takes it from there. A request
that also spoke to Redis would be three times slower, and would hang when Redis does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from genpulse.config import Settings
from genpulse.errors import InvalidRequest, LedgerUnavailable, QueueFull, UnsafeUrl
from genpulse.ledger import Ledger, Shared, Source, SourceGone
from genpulse.model import NewTask, Priority, Task, TaskStatus
from genpulse.tasks.inputs import open_egress
from genpulse.tasks.registry import Checked, Registry
from genpulse.telemetry import metrics, traces

__all__ = [
    "Locate",
    "Refused",
    "Retries",
    "Room",
    "accept",
    "any_number",
    "body_digest",
    "prepare",
    "retry",
    "retry_matching",
]

Checkers: TypeAlias = dict[str, Callable[[Mapping[str, Any]], Checked]]
"""By task type; each may remember large parts that it has seen."""

Locate: TypeAlias = Callable[[int, str], str]
"""From the number of a request and a JSON pointer in it to the pointer that its sender understands."""

_RETRY_BATCH = 100
"""Tasks read, and recorded, in one transaction of a retry in bulk."""
_RETRY_BYTES = 16 * 2**20
"""About how much JSON these may have in hand, beside one part that a batch keeps for many."""

Room = Callable[[int], None]
"""Called with the number of tasks about to be recorded; raises :class:`QueueFull` if they are too many."""


def any_number(_: int) -> None:
    """There is room for everything."""


def accept(  # the parts, the words, and who says them
    ledger: Ledger,
    registry: Registry,
    settings: Settings,
    body: Mapping[str, Any],
    *,
    owner: str,
    idempotency_key: str | None = None,
    api_key: str = "",
    body_hash: str | None = None,
    room: Room = any_number,
) -> tuple[Task, bool]:
    """
    Check a request and record it as a task.

    Args:
        body: ``task_type`` and ``params``, and optionally ``priority``, ``callback_url``,
            ``timeout_s``, ``expires_in_s``, ``max_attempts``, ``metadata``; types as in API.md.
        idempotency_key: The caller's own key; the same key and body give the same task.
        api_key: The id of the API key whose idempotency key that is.
        body_hash: Digest of the whole request; by default that of *body*.
        room: Asked whether the owner may have one more task waiting.

    Returns:
        The task, and whether it is a replay of an earlier request.

    Raises:
        InvalidRequest: The words make no task; nothing was recorded.
        IdempotencyConflict: The key was used with another body.
        QueueFull: There is no room; nothing was recorded.
        LedgerUnavailable: Nothing was recorded, or it is in doubt.
    """
    (new,) = prepare(ledger, registry, settings, [body], owner=owner)
    digest = body_hash or body_digest(body)
    return _record(ledger, settings, new, idempotency_key, api_key, digest, room)


@dataclass(frozen=True, slots=True)
class Refused:
    """A task that cannot be sent again, and why, in the words of a problem document."""

    task_id: str
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Retries:
    """What a retry in bulk did, or would do."""

    matched: tuple[str, ...]
    """The tasks that the filter found, oldest first."""
    made: tuple[Task, ...]
    """The new tasks; each says by ``retry_of`` of what."""
    refused: tuple[Refused, ...]
    more: bool
    """Whether the filter finds further ones behind these."""


def retry(
    ledger: Ledger,
    registry: Registry,
    settings: Settings,
    task: Task,
    *,
    idempotency_key: str | None = None,
    api_key: str = "",
    room: Room = any_number,
) -> tuple[Task, bool]:
    """
    Record a final task once more, as a new one with ``retry_of``; the old one stays as it is.

    It is checked as if it were sent now: its files must still be there. An expiry time is not taken
    over, for it was counted from the first submission.

    Returns:
        As :func:`accept`.

    Raises:
        InvalidRequest: ``not_final``; ``missing_asset``; or what else :func:`accept` says by now.
        IdempotencyConflict: The key was used for something else.
        QueueFull: There is no room; nothing was recorded.
    """
    if not task.status.is_final:
        sentence = f"The task is {task.status}; only a final one can be sent again."
        raise InvalidRequest("not_final", sentence)
    new = _again(ledger, registry, settings, task)
    digest = body_digest({"retry_of": task.id})
    return _record(ledger, settings, new, idempotency_key, api_key, digest, room)


def retry_matching(  # each is one filter
    ledger: Ledger,
    registry: Registry,
    settings: Settings,
    *,
    owner: str,
    status: TaskStatus = TaskStatus.FAILED,
    error_code: str | None = None,
    task_type: str | None = None,
    created_after: dt.datetime | None = None,
    created_before: dt.datetime | None = None,
    after_id: str | None = None,
    again: bool = False,
    limit: int = 100,
    dry_run: bool = False,
    room: Room = any_number,
) -> Retries:
    """
    Send again what a filter finds, in transactions bounded by number and bytes, the oldest first.

    A task that has a retry is left alone unless *again* is asked for, so that this may be repeated,
    also after a lost answer, and done by many at once.

    Args:
        after_id: The last of ``matched`` of the call before.
        dry_run: Record nothing; ``matched`` and ``refused`` say what would happen.

    Raises:
        QueueFull: There is no room. Earlier transactions stand, and a repeated call passes over them.
        LedgerUnavailable: The same; in doubt if there are any.
    """
    if task_type is not None and task_type in registry:
        task_type = registry.get(task_type).task_type
    found = ledger.retryable(
        owner,
        status=status,
        error_code=error_code,
        task_type=task_type,
        created_after=created_after,
        created_before=created_before,
        after_id=after_id,
        again=again,
        limit=limit + 1,
    )
    more, found = len(found) > limit, found[:limit]
    made: list[Task] = []
    refused: list[Refused] = []
    left, again_of = found, _Again(ledger, registry, settings)
    while left:
        batch: list[NewTask] = []
        try:
            looked_at = again_of.read(left[:_RETRY_BATCH])
            for source in looked_at:
                if source is not None:
                    try:
                        batch.append(again_of.of(source))
                    except InvalidRequest as error:
                        refused.append(Refused(source.task.id, error.problem, error.detail))
            if not dry_run:
                room(len(batch))
                recorded = ledger.retry_all(batch, again=again)
                made += recorded
                for each in recorded:
                    metrics.TASKS_SUBMITTED.add(task_type=each.task_type)
        except LedgerUnavailable as error:
            raise LedgerUnavailable(str(error), in_doubt=error.in_doubt or bool(made)) from error
        left = left[len(looked_at) :]
    return Retries(tuple(found), tuple(made), tuple(refused), more)


class _Again:
    """
    Tasks that are to be sent again, read and checked in parts that fit into memory.

    What a batch keeps for its tasks is read and checked once for as long as one follows the other, and
    the retries use what the batch keeps: a thousand of them would otherwise store it a thousand times.
    """

    def __init__(self, ledger: Ledger, registry: Registry, settings: Settings) -> None:
        self._parts = (ledger, registry, settings)
        self._ledger = ledger
        self._known: dict[str, Shared] = {}
        self._checkers: Checkers = {}
        self._remembered = 0

    def read(self, task_ids: Sequence[str]) -> list[Source | None]:
        """The first of these tasks, as many as there is memory for; ``None`` for one that is gone."""
        found = self._ledger.retry_sources(task_ids, self._known, max_bytes=_RETRY_BYTES)
        last = next((source.shared for source in reversed(found) if source is not None), None)
        if len(self._known) > 1:
            self._known = {} if last is None else {last.batch_id: last}
        # A checker remembers every large part that it has seen.
        self._remembered += sum(source.size for source in found if source is not None)
        if self._remembered > _RETRY_BYTES:
            self._checkers, self._remembered = {}, 0
        return found

    def of(self, source: Source) -> NewTask:
        """
        The retry of a task.

        Raises:
            InvalidRequest: As :func:`retry`.
        """
        new = _again(*self._parts, source.task, self._checkers)
        if source.shared is None or (own := source.shared.rest_of(new.params)) is None:
            return new
        return dataclasses.replace(new, params=own, params_of=source.shared.batch_id)


def _again(
    ledger: Ledger, registry: Registry, settings: Settings, task: Task, checkers: Checkers | None = None
) -> NewTask:
    """The same request as *task* was; checked anew, for handlers, files and settings change."""
    body = {
        "task_type": task.task_type,
        "params": task.params,
        "priority": task.priority,
        "timeout_s": task.timeout_s,
        "max_attempts": task.max_attempts,
        "metadata": task.metadata,
        "callback_url": task.callback_url,
    }
    (new,) = prepare(ledger, registry, settings, [body], owner=task.owner, checkers=checkers)
    return dataclasses.replace(new, retry_of=task.id)


def _record(
    ledger: Ledger,
    settings: Settings,
    new: NewTask,
    idempotency_key: str | None,
    api_key: str,
    body_hash: str,
    room: Room,
) -> tuple[Task, bool]:
    try:
        room(1)
    except QueueFull:
        # Whoever repeats a request that was taken must learn so, and not that it was not.
        earlier = None
        if idempotency_key:
            earlier = ledger.find_replay(new.owner, idempotency_key, body_hash, api_key=api_key)
        if earlier is None:
            raise
        return earlier, True
    try:
        task, replayed = ledger.submit(
            new,
            idempotency_key=idempotency_key,
            api_key=api_key,
            body_hash=body_hash,
            idempotency_ttl_s=settings.idempotency_ttl_s,
        )
    except SourceGone as error:
        sentence = "Something that the task needs was deleted just now."
        raise InvalidRequest("missing_asset", sentence, [("/params", sentence)]) from error
    if not replayed:
        metrics.TASKS_SUBMITTED.add(task_type=new.task_type)
    return task, replayed


def prepare(
    ledger: Ledger,
    registry: Registry,
    settings: Settings,
    bodies: Sequence[Mapping[str, Any]],
    *,
    owner: str,
    locate: Locate | None = None,
    checkers: Checkers | None = None,
) -> list[NewTask]:
    """
    Check requests and make tasks of them, without recording anything.

    Parts that the params of several requests share as the same object are checked once, and shared by
    the results.

    Args:
        bodies: As for :func:`accept`.
        locate: Where in what the caller sent a place in one of the requests is.
        checkers: What earlier calls have checked; by default nothing is remembered of them.

    Raises:
        InvalidRequest: About the first request that makes no task.
    """
    checkers = {} if checkers is None else checkers
    prepared: list[tuple[NewTask, Checked]] = []
    for index, body in enumerate(bodies):
        with _located(index, locate):
            if "server_address" in body["params"]:
                # In the original system a caller could make the workers speak to any host by this.
                reason = "is not the caller's to choose"
                errors = [("/params/server_address", reason)]
                raise InvalidRequest("invalid_request", f"server_address {reason}.", errors)
            if (callback_url := body.get("callback_url")) is not None:
                _check_callback(settings, callback_url)
            handler = registry.get(body["task_type"])
            if handler.task_type not in checkers:
                checkers[handler.task_type] = handler.checker()
            check = checkers[handler.task_type]
            checked = check(body["params"])
            _check_urls(settings, checked.urls)
            new = NewTask(
                task_type=handler.task_type,
                queue=handler.queue,
                params=checked.params,
                owner=owner,
                priority=Priority(body.get("priority") or Priority.NORMAL),
                timeout_s=body.get("timeout_s") or settings.timeout_s,
                expires_in_s=body.get("expires_in_s"),
                max_attempts=body.get("max_attempts") or settings.max_attempts,
                metadata=body.get("metadata") or {},
                callback_url=callback_url,
                assets=frozenset(checked.assets),
                source_tasks=frozenset(task_id for task_id, _ in checked.outputs),
                **traces.origin(),
            )
        prepared.append((new, checked))
    _find_references(ledger, owner, [checked for _, checked in prepared], locate)
    return [new for new, _ in prepared]


@contextlib.contextmanager
def _located(index: int, locate: Locate | None) -> Iterator[None]:
    """Errors of one of several requests say where in all of them they are."""
    try:
        yield
    except InvalidRequest as error:
        if locate is None:
            raise
        errors = [(locate(index, where), what) for where, what in error.errors or [("", error.detail)]]
        raise InvalidRequest(error.problem, f"{errors[0][0]}: {error.detail}", errors) from error


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


def _find_references(ledger: Ledger, owner: str, checked: Sequence[Checked], locate: Locate | None) -> None:
    """Refuse what names a file that this owner does not have. Somebody else's is as missing as none."""
    assets = ledger.known_assets(owner, {each for one in checked for each in one.assets})
    outputs = ledger.known_outputs(owner, {each for one in checked for each in one.outputs})
    for index, one in enumerate(checked):
        missing = [f"asset:{each}" for each in dict.fromkeys(one.assets) if each not in assets]
        missing += [
            f"output:{task_id}/{index}"
            for task_id, index in dict.fromkeys(one.outputs)
            if (task_id, index) not in outputs
        ]
        if missing:
            sentence = f"There is no {' and no '.join(missing)}."
            with _located(index, locate):
                raise InvalidRequest("missing_asset", sentence, [("/params", sentence)])
