"""
Every error GenPulse raises on purpose::

    GenPulseError
    ├── Retryable                 the same task may succeed on another attempt
    │   ├── ComfyUnavailable        no answer, socket lost, HTTP 5xx
    │   │   ├── PromptLost            the server forgot the prompt (restart, or somebody deleted it)
    │   │   └── ServerStalled         the server answers but our prompt makes no progress
    │   ├── NoServer                no healthy server to run on: handed back, never counted
    │   ├── OutOfMemory             the GPU's memory did not suffice this time
    │   ├── InputUnavailable        an input could not be fetched just now
    │   └── StorageUnavailable      the object store did not take or give the bytes
    ├── LedgerUnavailable         the database did not answer
    ├── QueueFull                 nothing more is taken in just now
    ├── StopAttempt               this attempt must end now, whatever it was doing
    │   ├── LeaseLost               it was taken over: stop, write nothing, touch no server
    │   ├── TaskCanceled            the caller canceled the task
    │   ├── DeadlineExceeded        rendering took longer than ``timeout_s``
    │   └── Draining                the worker is told to stop: hand back
    └── Permanent                 another attempt would fail the same way
        ├── InvalidRequest          the caller's words make no task (never stored)
        ├── WorkflowRejected        ComfyUI refused the workflow (HTTP 400)
        ├── ExecutionFailed         a node raised
        ├── ExecutionInterrupted    somebody interrupted the prompt on its server
        ├── NoOutputs               the run ended well and made nothing
        ├── InputRejected           an input is there but is not usable
        │   └── UnsafeUrl             its URL, or the address behind it, is one we do not go to
        └── ObjectNotFound          storage holds no such key

The branch decides what the worker does; nobody reads messages to decide. Foreign errors become
ours where they enter, with ``raise … from``. ``code`` is the public word of API.md for a task's
``error.code``; messages carry no path, address or secret of a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

__all__ = [
    "ComfyUnavailable",
    "DeadlineExceeded",
    "Draining",
    "ExecutionFailed",
    "ExecutionInterrupted",
    "GenPulseError",
    "InputRejected",
    "InputUnavailable",
    "InvalidRequest",
    "LeaseLost",
    "LedgerUnavailable",
    "NoOutputs",
    "NoServer",
    "ObjectNotFound",
    "OutOfMemory",
    "Permanent",
    "PromptLost",
    "QueueFull",
    "Retryable",
    "ServerStalled",
    "StopAttempt",
    "StorageUnavailable",
    "TaskCanceled",
    "UnsafeUrl",
    "WorkflowRejected",
]


class GenPulseError(Exception):
    """The root. ``node_id`` and ``class_type`` are set where a node of the workflow is to blame."""

    code: ClassVar[str] = "internal"

    def __init__(
        self, message: str = "", *, node_id: str | None = None, class_type: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.node_id = node_id
        self.class_type = class_type


class Retryable(GenPulseError):
    """The same task may succeed on another attempt."""


class ComfyUnavailable(Retryable):
    """No answer in time, connection refused or lost, or HTTP 5xx from a ComfyUI server."""

    code = "server_lost"

    def __init__(self, message: str = "", *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused
        """True when nobody listens: the process is gone, and with it its queue and history."""


class PromptLost(ComfyUnavailable):
    """The prompt is neither in the server's queue nor in its history."""


class ServerStalled(ComfyUnavailable):
    """The server answers, yet our prompt made no progress for the stall limit."""

    def __init__(self, message: str = "", *, stuck_on: str = "") -> None:
        super().__init__(message)
        self.stuck_on = stuck_on
        """The prompt at the head of the server's queue that does not move, ours or another's."""


class NoServer(Retryable):
    """No healthy ComfyUI server to run on. Handed back without being counted."""

    code = "server_lost"

    def __init__(self, message: str = "", *, go_to: str | None = None) -> None:
        super().__init__(message)
        self.go_to = go_to
        """A server of another worker that the task should go to, if there is one."""


class OutOfMemory(Retryable):
    """A node ran out of memory; freeing the server or another server may help."""

    code = "out_of_memory"


class InputUnavailable(Retryable):
    """An input could not be fetched just now."""

    code = "input_unavailable"


class StorageUnavailable(Retryable):
    """The storage backend did not take or give the bytes."""

    code = "storage_failed"


class LedgerUnavailable(GenPulseError):
    """
    The database did not answer.

    Args:
        in_doubt: Whether something may have been written all the same: the answer to a commit was lost.
    """

    code = "internal"

    def __init__(self, message: str = "", *, in_doubt: bool = False) -> None:
        super().__init__(message)
        self.in_doubt = in_doubt


class QueueFull(GenPulseError):
    """Too much waits, or the disk has no room for more: nothing was recorded."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StopAttempt(GenPulseError):
    """This attempt must end now, whatever it was doing."""


class LeaseLost(StopAttempt):
    """The attempt was taken over: stop, write nothing, touch the ComfyUI server no more."""

    code = "worker_lost"


class TaskCanceled(StopAttempt):
    """The caller canceled the task."""

    code = "canceled"


class DeadlineExceeded(StopAttempt):
    """Rendering took longer than the task's ``timeout_s``."""

    code = "timeout"


class Draining(StopAttempt):
    """The worker is told to stop; the task goes back uncounted and its prompt runs on."""

    code = "worker_lost"


class Permanent(GenPulseError):
    """Another attempt would fail the same way."""


class InvalidRequest(Permanent):
    """
    The caller's words make no task; nothing was stored.

    Args:
        problem: The machine-readable code of API.md, for example ``unknown_input``.
        detail: One sentence for a person.
        errors: Where in the body, as ``(JSON pointer, sentence)`` pairs.
    """

    code = "invalid_workflow"

    def __init__(self, problem: str, detail: str, errors: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(detail)
        self.problem = problem
        self.detail = detail
        self.errors = tuple(errors)


class WorkflowRejected(Permanent):
    """ComfyUI refused the workflow; ``node_errors`` is its own report, by node id."""

    code = "invalid_workflow"

    def __init__(
        self,
        message: str,
        *,
        node_errors: dict[str, Any] | None = None,
        node_id: str | None = None,
        class_type: str | None = None,
    ) -> None:
        super().__init__(message, node_id=node_id, class_type=class_type)
        self.node_errors = node_errors or {}


class ExecutionFailed(Permanent):
    """A node raised while it ran."""

    code = "node_error"


class ExecutionInterrupted(Permanent):
    """Somebody interrupted the prompt on its server, and it was not us."""

    code = "canceled"


class NoOutputs(Permanent):
    """The run ended well and made nothing to store."""

    code = "no_outputs"


class InputRejected(Permanent):
    """An input is there but is not usable (not an image, too large, unsafe)."""

    code = "input_unavailable"


class UnsafeUrl(InputRejected):
    """The URL, or the address behind it, is one that GenPulse does not go to (``egress``)."""


class ObjectNotFound(Permanent):
    """The storage backend holds no object under this key."""

    code = "storage_failed"
