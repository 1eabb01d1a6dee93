"""
The words of the domain as plain, frozen values: tasks, attempts, outputs, assets and their states.

Nothing here knows a database, a broker or HTTP. Records are never changed, only read anew or
copied. Times are aware UTC, durations seconds (``*_s``), sizes bytes (``*_bytes``).
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from genpulse.errors import GenPulseError, Retryable

__all__ = [
    "SCOPES",
    "ApiKey",
    "Asset",
    "Attempt",
    "AttemptOutcome",
    "Batch",
    "Claim",
    "ErrorInfo",
    "Fence",
    "NewOutput",
    "NewTask",
    "Output",
    "OutputKind",
    "Priority",
    "Task",
    "TaskStatus",
    "WorkerInfo",
    "output_prefix",
]


class TaskStatus(enum.StrEnum):
    """``pending → processing → completed | failed | canceled``; the last three are final."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def is_final(self) -> bool:
        """Whether the task never changes again."""
        return self in _FINAL


_FINAL = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELED})


class Priority(enum.StrEnum):
    """What a caller may ask for. ``step`` is Redis' priority list, where 0 is served first."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"

    @property
    def step(self) -> int:
        """The broker's priority step: 0 (most urgent), 3 or 6."""
        return _STEPS[self]

    @classmethod
    def from_step(cls, step: int) -> Priority:
        """The inverse of :attr:`step`."""
        return next(priority for priority, value in _STEPS.items() if value == step)


_STEPS = {Priority.HIGH: 0, Priority.NORMAL: 3, Priority.LOW: 6}


class AttemptOutcome(enum.StrEnum):
    """How an attempt ended; decides what counts and what a later attempt may adopt."""

    COMPLETED = "completed"
    FAILED = "failed"
    """Ended in a permanent error, or in the last retryable one."""
    RETRY = "retry"
    """Ended in a retryable error; counted towards ``max_attempts``."""
    STORAGE_FAILED = "storage_failed"
    """Rendered, but could not be stored; counted, and the finished prompt may be adopted."""
    UNREACHABLE = "unreachable"
    """
    Its server could not be reached from its worker, and another worker reaches it; counted, and the
    prompt may be adopted there.
    """
    LOST = "lost"
    """Its worker vanished; counted towards ``GENPULSE_MAX_LOST``. The prompt may be adopted."""
    HANDED_BACK = "handed_back"
    """Given back on purpose; counted nowhere. The prompt may be adopted."""
    CANCELED = "canceled"

    @property
    def leaves_prompt(self) -> bool:
        """Whether a later attempt should look for this attempt's prompt on its server."""
        return self in _LEAVES_PROMPT


_LEAVES_PROMPT = frozenset(
    {
        AttemptOutcome.STORAGE_FAILED,
        AttemptOutcome.UNREACHABLE,
        AttemptOutcome.LOST,
        AttemptOutcome.HANDED_BACK,
    }
)


class OutputKind(enum.StrEnum):
    """What a stored output is, for a person and for a player."""

    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"
    TEXT = "text"
    MODEL3D = "model3d"
    LATENT = "latent"
    FILE = "file"


def output_prefix(task_id: str, attempt: int | None = None) -> str:
    """What the storage keys begin with that an attempt, or all of a task's, writes; ends with a slash."""
    return f"outputs/{task_id}/" if attempt is None else f"outputs/{task_id}/{attempt}/"


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """Why a task or an attempt did not complete. Carries no path or secret of a server."""

    code: str
    message: str
    retryable: bool = False
    node_id: str | None = None
    class_type: str | None = None

    @classmethod
    def of(cls, error: GenPulseError) -> ErrorInfo:
        """The public words for one of our own errors."""
        return cls(
            code=error.code,
            message=error.message or type(error).__name__,
            retryable=isinstance(error, Retryable),
            node_id=error.node_id,
            class_type=error.class_type,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON shape: ``node_id`` and ``class_type`` only where they are known."""
        found = {"node_id": self.node_id, "class_type": self.class_type}
        return {
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            **{name: value for name, value in found.items() if value is not None},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> ErrorInfo | None:
        """The inverse of :meth:`as_dict`; ``None`` stays ``None``."""
        return None if data is None else cls(**data)


@dataclass(frozen=True, slots=True)
class NewTask:
    """A validated request, ready to be recorded."""

    task_type: str
    queue: str
    params: Mapping[str, Any]
    owner: str
    priority: Priority = Priority.NORMAL
    timeout_s: int = 900
    expires_in_s: int | None = None
    max_attempts: int = 3
    callback_url: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_of: str | None = None
    assets: frozenset[str] = frozenset()
    """Ids of the uploaded files it names."""
    params_of: str | None = None
    """The batch that keeps the rest of its params, which then are not whole."""
    source_tasks: frozenset[str] = frozenset()
    """Ids of the tasks whose outputs it names."""
    request_id: str | None = None
    """Of the request that sent it."""
    traceparent: str | None = None
    """The request's place in a trace (W3C Trace Context); ``None`` while nothing is traced."""


@dataclass(frozen=True, slots=True)
class NewOutput:
    """One stored file an attempt made, before it belongs to a completed task."""

    node_id: str
    name: str
    kind: OutputKind
    content_type: str
    size_bytes: int
    sha256: str
    key: str
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True, slots=True)
class Output(NewOutput):
    """A :class:`NewOutput` with its place (from 0) in its task's list."""

    index: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a task, numbered from 1; its number and claim token fence its writes."""

    task_id: str
    number: int
    worker: str
    started_at: dt.datetime
    server: str | None = None
    prompt_id: str | None = None
    client_id: str | None = None
    submitted_at: dt.datetime | None = None
    """When the prompt ids were written down, which is *before* they were sent."""
    ended_at: dt.datetime | None = None
    outcome: AttemptOutcome | None = None
    error: ErrorInfo | None = None
    progress: float | None = None
    """How far it came, 0 to 100, as far as it was known when it ended."""


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of requested work as the ledger knows it."""

    id: str
    owner: str
    task_type: str
    queue: str
    priority: Priority
    status: TaskStatus
    params: Mapping[str, Any]
    attempt: int
    """Number of the newest attempt; 0 before the first."""
    max_attempts: int
    timeout_s: int
    created_at: dt.datetime
    updated_at: dt.datetime
    metadata: Mapping[str, str] = field(default_factory=dict)
    callback_url: str | None = None
    retry_of: str | None = None
    started_at: dt.datetime | None = None
    completed_at: dt.datetime | None = None
    expires_at: dt.datetime | None = None
    """The task is not started after this time; it plays no part once an attempt was made."""
    available_at: dt.datetime | None = None
    cancel_requested_at: dt.datetime | None = None
    bound_server: str | None = None
    """The server that may still have this task's prompt; only its workers may claim."""
    error: ErrorInfo | None = None
    run_s: float | None = None
    store_s: float | None = None
    batch_id: str | None = None
    batch_index: int | None = None
    """Its place in the batch, from 0."""
    request_id: str | None = None
    traceparent: str | None = None
    outputs: tuple[Output, ...] = ()
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """Tasks that were submitted together, as they stand now."""

    id: str
    owner: str
    size: int
    """Tasks when it was submitted; those deleted since are in no count."""
    created_at: dt.datetime
    counts: Mapping[TaskStatus, int]
    grid: tuple[str, ...] = ()
    """What its grid varied; empty for tasks that were named one by one."""
    stopping: int = 0
    """Running tasks that were asked to stop."""
    updated_at: dt.datetime | None = None
    """When one of its tasks changed last."""
    ended_at: dt.datetime | None = None
    """When its last task ended; ``None`` while one is not final."""
    task_ids: tuple[str, ...] = ()
    """In the order of the request; only what has just recorded them knows them without asking."""

    @property
    def live(self) -> int:
        """Tasks that are not final."""
        return self.counts[TaskStatus.PENDING] + self.counts[TaskStatus.PROCESSING]

    @property
    def status(self) -> TaskStatus:
        """
        One word for all: ``pending`` until the first begins or ends, ``processing`` until the last ends.

        Then ``failed`` if any failed, else ``canceled`` if any was canceled, else ``completed``.
        """
        if self.live:
            untouched = self.counts[TaskStatus.PENDING] == self.size
            return TaskStatus.PENDING if untouched else TaskStatus.PROCESSING
        for status in (TaskStatus.FAILED, TaskStatus.CANCELED):
            if self.counts[status]:
                return status
        return TaskStatus.COMPLETED

    @property
    def progress(self) -> float:
        """Percent of the tasks that are final; never falls."""
        return round(100.0 * (self.size - self.live) / self.size, 1)


@dataclass(frozen=True, slots=True)
class Fence:
    """What every write of an attempt carries: only the newest attempt's own token matches."""

    task_id: str
    attempt: int
    claim: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A task that this worker may run now, with the fence of the new attempt."""

    task: Task
    fence: Fence
    predecessors: tuple[Attempt, ...]
    """Earlier attempts that may have left a prompt on a server, newest first."""
    deadline_at: dt.datetime | None = None
    """Set when an earlier attempt's prompt was already seen running."""
    exhausted: frozenset[str] = frozenset()
    """Servers whose memory did not suffice for this task in earlier attempts."""


@dataclass(frozen=True, slots=True)
class Asset:
    """A file that a caller uploaded."""

    id: str
    owner: str
    key: str
    name: str
    content_type: str
    size_bytes: int
    sha256: str
    created_at: dt.datetime


SCOPES = ("submit", "read", "admin")
"""What a key may do: change tasks and files, look at them, and see how the whole service is doing."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Who may call, on whose behalf. The secret itself is nowhere: only its digest is kept."""

    id: str
    name: str
    owner: str
    """Whose tasks and files it works on; several keys may have one owner."""
    digest: str = field(repr=False)
    scopes: tuple[str, ...]
    created_at: dt.datetime
    rate: str | None = None
    """Submissions, like ``10/second``; ``0`` is no limit, ``None`` what the settings say."""
    max_queued: int | None = None
    max_running: int | None = None
    """The same for the owner's tasks that wait, and that run."""
    expires_at: dt.datetime | None = None
    revoked_at: dt.datetime | None = None
    last_used_at: dt.datetime | None = None
    """To the minute, and possibly late: it is written behind the answers."""
    is_expired: bool = False
    """By the database's clock, when it was read."""

    @property
    def is_usable(self) -> bool:
        """Whether it opens anything now."""
        return self.revoked_at is None and not self.is_expired


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A live Celery worker process as its last heartbeat described it."""

    name: str
    host: str
    pid: int
    queues: tuple[str, ...]
    servers: tuple[Mapping[str, Any], ...]
    """``{"name": str, "healthy": bool, "reason": str}`` for each ComfyUI server it serves."""
    slots: int
    consuming: bool
    version: str
    started_at: dt.datetime
    seen_at: dt.datetime
