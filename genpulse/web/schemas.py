"""
The shapes of API.md, as pydantic models: what a caller may send and get (a task: ``tasks.views``).

The published OpenAPI document is made from these models, and answers are dumped from them, so the
two cannot differ. Requests are strict: an unknown field is a typing mistake, and ``"900"`` is no number.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
)

from genpulse.model import TaskStatus
from genpulse.tasks.views import (
    TaskSummary,
    TaskView,
    Urls,
    task_summary,
    task_view,
    urls,
)

__all__ = [
    "Accepted",
    "AssetView",
    "Health",
    "ListQuery",
    "OutputPath",
    "ProblemView",
    "ReadQuery",
    "Retried",
    "RetryBody",
    "RetryReport",
    "StatusView",
    "SubmitBody",
    "SubmitHeaders",
    "TaskList",
    "TaskPath",
    "TaskSummary",
    "TaskTypes",
    "TaskView",
    "Urls",
    "WaitingHeaders",
    "task_summary",
    "task_view",
    "urls",
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
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00]{1,64}$")]
_ONLY_SUCH_KEYS: dict[str, Any] = {"additionalProperties": False}
"""Beside the ``patternProperties`` that a pattern of keys becomes, which lets all other keys pass."""
MetadataValue = Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00]*$")]
MAX_WAIT_S = 60
"""The longest long poll; proxies give up at about this age."""
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
        None, description="Told when the task is final: a webhook, see `webhooks` in this document."
    )
    timeout_s: Whole | None = Field(None, ge=1, le=86_400, description="How long rendering may take.")
    expires_in_s: Whole | None = Field(
        None, ge=1, le=30 * 86_400, description="The task fails with `expired` if it has not begun by then."
    )
    max_attempts: Whole | None = Field(
        None, ge=1, le=100, description="Attempts that may end in a retryable error."
    )
    metadata: dict[MetadataKey, MetadataValue] = Field(
        default_factory=dict,
        max_length=50,
        json_schema_extra=_ONLY_SUCH_KEYS,
        description="The caller's own labels, given back as they are.",
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


class WaitingHeaders(SubmitHeaders):
    """Headers of a submission that may wait for the end."""

    prefer: str | None = Field(
        None,
        alias="Prefer",
        description="RFC 7240: `wait=N` holds the answer for up to 60 seconds, until the task is final.",
        json_schema_extra={"examples": ["wait=30"]},
    )

    @property
    def wait_s(self) -> int:
        """Seconds that the caller would wait, 0 to 60. What is not understood is no preference."""
        for preference in (self.prefer or "").split(","):
            name, _, value = preference.partition(";")[0].partition("=")
            value = value.strip().strip('"')
            if name.strip().lower() == "wait" and re.fullmatch("[0-9]{1,9}", value):
                return min(int(value), MAX_WAIT_S)
        return 0


class ReadQuery(BaseModel):
    """How to read a task."""

    model_config = ConfigDict(extra="forbid")

    wait: float = Field(
        0,
        ge=0,
        le=MAX_WAIT_S,
        allow_inf_nan=False,
        description="Long poll: answer when the task is final, or after so many seconds. With `If-None-Match` any change of state or progress ends it.",
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


def _listed(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


Status = Literal["pending", "processing", "completed", "failed", "canceled"]


class ListQuery(BaseModel):
    """Which of one's tasks to list."""

    model_config = ConfigDict(extra="forbid")

    status: Annotated[list[Status], BeforeValidator(_listed)] = Field(
        default_factory=list, min_length=1, max_length=5, description="One or several, separated by commas."
    )
    task_type: str | None = Field(
        None, min_length=1, max_length=63, pattern=r"^[^\x00]*$", description="A type or an alias."
    )
    metadata: dict[MetadataKey, MetadataValue] = Field(
        default_factory=dict,
        max_length=5,
        json_schema_extra=_ONLY_SUCH_KEYS,
        description="`metadata[key]=value`: tasks whose metadata has all of these entries.",
    )
    batch_id: str | None = Field(None, pattern=UUID_PATTERN, description="Tasks of this batch.")
    created_after: Instant | None = Field(None, description="RFC 3339, with a zone.")
    created_before: Instant | None = Field(None, description="RFC 3339, with a zone.")
    limit: int = Field(50, ge=1, le=200, description="Tasks of a page, at most.")
    cursor: str | None = Field(None, pattern=UUID_PATTERN, description="`next_cursor` of the page before.")


class RetryBody(_Request):
    """Which of one's final tasks to send again."""

    status: Literal["failed", "canceled", "completed"] = "failed"
    error_code: str | None = Field(
        None, pattern=r"^[a-z_]{1,63}$", description="Only tasks with this `error.code`."
    )
    task_type: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    created_after: Instant | None = Field(None, description="RFC 3339, with a zone.")
    created_before: Instant | None = Field(None, description="RFC 3339, with a zone.")
    again: bool = Field(False, description="Also tasks that were retried already.")
    limit: Whole = Field(100, ge=1, le=1000, description="How many tasks to look at, the oldest first.")
    cursor: str | None = Field(None, pattern=UUID_PATTERN, description="`next_cursor` of the call before.")
    dry_run: bool = Field(False, description="Only tell what would be sent again.")


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


class Accepted(_Answer):
    """A task that is durably recorded."""

    task_id: str
    status: TaskStatus
    message: str
    created_at: dt.datetime
    queue: str
    queue_position: int | None
    urls: Urls


class TaskList(_Answer):
    """A page of tasks, newest first."""

    tasks: list[TaskSummary]
    next_cursor: str | None = Field(
        description="There may be more behind it, also where this page is short or empty."
    )
    next: str | None = Field(description="The next page's address.")


class Retried(Accepted):
    """A retry that is durably recorded."""

    retry_of: str


class RetryPair(_Answer):
    """A task and its retry; `null` in a dry run."""

    retry_of: str
    task_id: str | None


class RetryRefusal(_Answer):
    """A task that cannot be sent again."""

    task_id: str
    code: str
    detail: str


class RetryReport(_Answer):
    """What a retry by filter did."""

    retried: list[RetryPair]
    refused: list[RetryRefusal]
    next_cursor: str | None = Field(description="Go on behind these; `null` at the end.")


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
