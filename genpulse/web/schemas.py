"""
The shapes of API.md, as pydantic models: what a caller may send, and the one task there is to read.

The published OpenAPI document is made from these models, and answers are dumped from them, so the
two cannot differ. Requests are strict: an unknown field is a typing mistake, and ``"900"`` is no number.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from genpulse.model import Output, OutputKind, Priority, Task, TaskStatus

__all__ = [
    "Accepted",
    "AssetView",
    "Health",
    "ListQuery",
    "OutputPath",
    "ProblemView",
    "StatusView",
    "SubmitBody",
    "SubmitHeaders",
    "TaskList",
    "TaskPath",
    "TaskSummary",
    "TaskTypes",
    "TaskView",
    "task_summary",
    "task_view",
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _whole(value: Any) -> Any:
    """``900.0`` is a whole number in JSON; ``True`` is none."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _web_address(value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not value.isascii() or any(c <= " " or c == "\x7f" for c in value):
        msg = "must be an http:// or https:// URL"
        raise ValueError(msg)
    return value


def _instant(value: Any) -> Any:
    """An RFC 3339 time as aware UTC. Pydantic alone would take any number for a time, too."""
    if not isinstance(value, str) or not _RFC3339.match(value):
        msg = "must be a time like 2026-10-31T12:00:00Z"
        raise ValueError(msg)
    try:
        return dt.datetime.fromisoformat(value.upper()).astimezone(dt.UTC)
    except (ValueError, OverflowError):  # the 31st of February; a zone that leads before the year 1
        msg = "is not a time there is"
        raise ValueError(msg) from None


_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)\Z", re.ASCII)

Instant = Annotated[dt.datetime, BeforeValidator(_instant)]
Whole = Annotated[int, BeforeValidator(_whole)]
CallbackUrl = Annotated[
    str,
    Field(max_length=2048, pattern=r"^https?://", json_schema_extra={"format": "uri"}),
    AfterValidator(_web_address),
]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=500)]
UUID_PATTERN = r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"


class SubmitBody(_Request):
    """One task to be done."""

    task_type: str = Field(
        min_length=1, max_length=63, description="A type or alias that `GET /task-types` lists."
    )
    params: dict[str, Any] = Field(
        description="What the task type asks for; `GET /task-types` has the schema."
    )
    priority: Literal["low", "normal", "high"] = "normal"
    callback_url: CallbackUrl | None = Field(
        None, description="Told when the task is final. Refused by versions without webhooks."
    )
    timeout_s: Whole | None = Field(None, ge=1, le=86_400, description="How long rendering may take.")
    expires_in_s: Whole | None = Field(
        None, ge=1, le=30 * 86_400, description="The task fails with `expired` if it has not begun by then."
    )
    max_attempts: Whole | None = Field(
        None, ge=1, le=100, description="Attempts that may end in a retryable error."
    )
    metadata: dict[MetadataKey, MetadataValue] = Field(
        default_factory=dict, max_length=50, description="The caller's own labels, given back as they are."
    )


class SubmitHeaders(_Request):
    """Headers of a submission."""

    idempotency_key: str | None = Field(
        None,
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]*$",
        description="1 to 255 visible characters. The same key and body give the same task for 24 hours.",
    )


class TaskPath(BaseModel):
    """A task by id."""

    task_id: str = Field(description="The task's id.", json_schema_extra={"format": "uuid"})


class OutputPath(TaskPath):
    """One output of a task."""

    index: int = Field(ge=0, le=2**31 - 1, description="Its `index` in the task's `outputs`.")


class KeyPath(BaseModel):
    """A stored file by key."""

    key: str = Field(min_length=1, description="The storage key; it may hold slashes.")


class ListQuery(BaseModel):
    """Which of one's tasks to list."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["pending", "processing", "completed", "failed", "canceled"] | None = None
    task_type: str | None = Field(None, min_length=1, max_length=63)
    created_after: Instant | None = Field(None, description="RFC 3339, with a zone.")
    limit: int = Field(50, ge=1, le=200)
    cursor: str | None = Field(None, pattern=UUID_PATTERN, description="`next_cursor` of the page before.")


class ProblemError(_Answer):
    """One mistake in the input."""

    pointer: str
    detail: str


class ProblemView(BaseModel):
    """An RFC 9457 problem document."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    retryable: bool
    errors: list[ProblemError] | None = None


class Urls(_Answer):
    """Where to go from here."""

    self: str
    cancel: str


class Accepted(_Answer):
    """A task that is durably recorded."""

    task_id: str
    status: TaskStatus
    message: str
    created_at: dt.datetime
    queue: str
    queue_position: int | None
    urls: Urls


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

    code: str
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
    expires_at: dt.datetime | None
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


class TaskList(_Answer):
    """A page of tasks, newest first."""

    tasks: list[TaskSummary]
    next_cursor: str | None


class AssetView(_Answer):
    """An uploaded file; `asset:<id>` names it in a task's params."""

    id: str
    url: str
    key: str
    name: str
    content_type: str
    size_bytes: int
    sha256: str


class TaskTypeView(_Answer):
    """A registered task type."""

    task_type: str
    aliases: list[str]
    queue: str
    summary: str
    params_schema: dict[str, Any]


class TaskTypes(_Answer):
    """What this installation can do."""

    task_types: list[TaskTypeView]


class Health(_Answer):
    """The process answers."""

    status: Literal["ok"]


class StatusView(BaseModel):
    """What works. Queues, workers and servers are told to key holders only."""

    model_config = ConfigDict(extra="allow")

    status: Literal["ok", "degraded", "down"]
    version: str
    accepting: bool
    problems: list[str]


Link = Callable[..., str]
"""``link("read_output", task_id=…, index=…)`` is that view's address for this caller."""


def task_summary(task: Task, link: Link) -> dict[str, Any]:
    """The fields that lists and the whole task share."""
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
        "expires_at": task.expires_at,
        "metadata": dict(task.metadata),
        "urls": urls(task.id, link),
    }


def urls(task_id: str, link: Link) -> dict[str, str]:
    """Where a task is read and canceled."""
    return {"self": link("read_task", task_id=task_id), "cancel": link("cancel_task", task_id=task_id)}


def task_view(
    task: Task,
    link: Link,
    *,
    live: Mapping[str, Any] | None = None,
    position: int | None = None,
    reason: tuple[str, str] | None = None,
) -> TaskView:
    """
    The one shape of a task.

    Args:
        live: The newest progress, ``{"attempt", "percent", "detail"}``, if there is one. It informs, so
            whatever in it does not fit is left out.
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
        )
        for attempt in task.attempts
    ]
    return TaskView(
        **task_summary(task, link),
        queue_position=position,
        wait_reason=WaitReason(code=reason[0], text=reason[1]) if reason else None,
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
    if task.status is TaskStatus.PENDING or not live or live.get("attempt", task.attempt) != task.attempt:
        return 0.0, None
    percent = live.get("percent")
    known = min(100.0, max(0.0, float(percent))) if isinstance(percent, int | float) else 0.0
    found = live.get("detail")
    if task.status.is_final or not isinstance(found, Mapping):
        return known, None
    try:
        return known, ProgressDetail(**{name: found.get(name) for name in ProgressDetail.model_fields})
    except ValidationError:
        return known, None
