"""
The one shape of a task, as callers read it and as webhooks carry it.

The published OpenAPI document is made from these models. They need no request: the caller passes in
how a view's address is made (:data:`Link`), so that a worker can show a task as the API does.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from genpulse.model import Output, OutputKind, Priority, Task, TaskStatus

__all__ = [
    "AttemptView",
    "ErrorView",
    "Link",
    "OutputView",
    "ProgressDetail",
    "Result",
    "TaskSummary",
    "TaskView",
    "Timings",
    "Urls",
    "WaitReason",
    "task_summary",
    "task_view",
    "urls",
]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Urls(_Answer):
    """Where to go from here."""

    self: str
    events: str
    cancel: str


class ErrorView(_Answer):
    """Why a task failed."""

    code: str
    message: str
    retryable: bool
    node_id: str | None = None
    class_type: str | None = None


class OutputView(_Answer):
    """One stored file."""

    index: int
    node_id: str
    name: str
    kind: OutputKind
    content_type: str
    size_bytes: int
    sha256: str
    width: int | None
    height: int | None
    url: str


class AttemptView(_Answer):
    """One try."""

    number: int
    worker: str
    server: str | None
    started_at: dt.datetime
    ended_at: dt.datetime | None
    outcome: str | None
    error_code: str | None
    progress: float | None = Field(description="How far it came, 0 to 100, where that is known.")


class ProgressDetail(_Answer):
    """What runs just now, as far as the server tells."""

    node_id: str | None = None
    class_type: str | None = None
    step: int | None = None
    steps: int | None = None
    nodes_done: int | None = None
    nodes_total: int | None = None


class Result(_Answer):
    """The short form, for callers of the original."""

    prompt_id: str | None
    images: list[str]
    image_url: str | None


class Timings(_Answer):
    """Seconds, as far as they are known."""

    queue_s: float | None
    run_s: float | None
    store_s: float | None


class WaitReason(_Answer):
    """Why a task waits."""

    code: Literal[
        "bound", "owner_limit", "no_worker", "no_server", "no_broker", "backoff", "queued", "next"
    ] = Field(
        description=(
            "`bound`: one server has what it needs. `owner_limit`: its owner has as many running as "
            "allowed. `no_worker`, `no_server`: nobody takes tasks of its queue, or none of their servers is "
            "well. `no_broker`: Redis is away. `backoff`: the last attempt failed, and the next is not due "
            "yet. `queued`: others go first. `next`: as soon as a worker is free."
        )
    )
    text: str


class TaskSummary(_Answer):
    """A task in a list."""

    task_id: str
    task_type: str
    status: TaskStatus
    priority: Priority
    queue: str
    error: ErrorView | None
    attempt: int
    max_attempts: int
    created_at: dt.datetime
    started_at: dt.datetime | None
    completed_at: dt.datetime | None
    updated_at: dt.datetime
    expires_at: dt.datetime | None = Field(
        description="Before the end: not begun by then, the task fails. After it: then it is deleted, outputs and all."
    )
    retry_of: str | None = Field(description="The task that this one is a retry of.")
    batch_id: str | None = Field(description="The batch that it was submitted with.")
    metadata: dict[str, str]
    urls: Urls


class TaskView(TaskSummary):
    """A task, whole; every task has every field."""

    queue_position: int | None
    wait_reason: WaitReason | None
    progress: float = Field(ge=0, le=100)
    progress_detail: ProgressDetail | None
    result: Result | None
    outputs: list[OutputView]
    attempts: list[AttemptView]
    timings: Timings


Link = Callable[..., str]
"""``link("read_output", task_id=…, index=…)`` is that view's address for this caller."""


def task_summary(task: Task, link: Link, retention: dt.timedelta | None = None) -> dict[str, Any]:
    """
    The fields that lists and the whole task share.

    Args:
        retention: How long a task is kept after its end; ``None`` for ever.
    """
    return {
        "task_id": task.id,
        "task_type": task.task_type,
        "status": task.status,
        "priority": task.priority,
        "queue": task.queue,
        "error": task.error.as_dict() if task.error else None,
        "attempt": task.attempt,
        "max_attempts": task.max_attempts,
        "created_at": task.created_at,
        "started_at": task.started_at,
        "completed_at": task.completed_at,
        "updated_at": task.updated_at,
        "expires_at": (task.completed_at + retention if task.completed_at and retention else task.expires_at),
        "retry_of": task.retry_of,
        "batch_id": task.batch_id,
        "metadata": dict(task.metadata),
        "urls": urls(task.id, link),
    }


def urls(task_id: str, link: Link) -> dict[str, str]:
    """Where a task is read, watched and canceled."""
    views = {"self": "read_task", "events": "watch_task", "cancel": "cancel_task"}
    return {name: link(view, task_id=task_id) for name, view in views.items()}


def task_view(
    task: Task,
    link: Link,
    *,
    live: Mapping[str, Any] | None = None,
    position: int | None = None,
    reason: tuple[str, str] | None = None,
    retention: dt.timedelta | None = None,
) -> TaskView:
    """
    The one shape of a task.

    Args:
        live: The newest progress, ``{"attempt", "percent", "detail"}``, if there is one. It informs, so
            whatever in it does not fit is left out.
        retention: As in :func:`task_summary`.
    """
    percent, detail = _progress(task, live)
    outputs = [_output(output, task.id, link) for output in task.outputs]
    attempts = [
        AttemptView(
            number=attempt.number,
            worker=attempt.worker,
            server=attempt.server,
            started_at=attempt.started_at,
            ended_at=attempt.ended_at,
            outcome=attempt.outcome,
            error_code=attempt.error.code if attempt.error else None,
            progress=attempt.progress,
        )
        for attempt in task.attempts
    ]
    return TaskView(
        **task_summary(task, link, retention),
        queue_position=position,
        wait_reason=WaitReason.model_validate(dict(zip(("code", "text"), reason, strict=True)))
        if reason
        else None,
        progress=percent,
        progress_detail=detail,
        result=_result(task, outputs),
        outputs=outputs,
        attempts=attempts,
        timings=Timings(
            queue_s=_seconds(
                (task.started_at - task.created_at).total_seconds() if task.started_at else None
            ),
            run_s=_seconds(task.run_s),
            store_s=_seconds(task.store_s),
        ),
    )


def _seconds(value: float | None) -> float | None:
    """To the millisecond: what lies below is noise."""
    return None if value is None else round(value, 3)


def _output(output: Output, task_id: str, link: Link) -> OutputView:
    return OutputView(
        index=output.index,
        node_id=output.node_id,
        name=output.name,
        kind=output.kind,
        content_type=output.content_type,
        size_bytes=output.size_bytes,
        sha256=output.sha256,
        width=output.width,
        height=output.height,
        url=link("read_output", task_id=task_id, index=output.index),
    )


def _result(task: Task, outputs: list[OutputView]) -> Result | None:
    if task.status is not TaskStatus.COMPLETED:
        return None
    images = [output.url for output in outputs if output.kind is OutputKind.IMAGE]
    prompt_id = task.attempts[-1].prompt_id if task.attempts else None
    return Result(prompt_id=prompt_id, images=images, image_url=images[0] if images else None)


def _progress(task: Task, live: Mapping[str, Any] | None) -> tuple[float, ProgressDetail | None]:
    if task.status is TaskStatus.COMPLETED:
        return 100.0, None
    if task.status.is_final:  # as far as the last attempt came that is known to have begun
        return next((each.progress for each in reversed(task.attempts) if each.progress), 0.0), None
    if task.status is TaskStatus.PENDING or not live or live.get("attempt", task.attempt) != task.attempt:
        return 0.0, None
    percent = live.get("percent")
    known = min(100.0, max(0.0, float(percent))) if isinstance(percent, int | float) else 0.0
    found = live.get("detail")
    if not isinstance(found, Mapping):
        return known, None
    try:
        return known, ProgressDetail(**{name: found.get(name) for name in ProgressDetail.model_fields})
    except ValidationError:
        return known, None
