"""
The story of one attempt, in plain Python: claim, execute, finish.

The Celery message is only a hint; :func:`Runner.run` asks the ledger for the task and leaves if it
is not to be had. From the claim on, a heartbeat keeps the lease, and ``context.check()`` tells the
handler when to stop. However the handler ends, one fenced write says what became of the task.

Every function here survives the death of its process between any two lines (the sweeper takes the
task back when the lease is over) and a second delivery of the same message (the claim refuses it).
While the ledger is away the outcome is held and written when it is back, unless the lease was taken
over meanwhile; then nothing is written at all.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, TypeVar, cast

import filetype
import structlog

from genpulse.comfy.pool import ServerPool
from genpulse.config import Settings
from genpulse.errors import (
    ComfyUnavailable,
    Draining,
    GenPulseError,
    InputRejected,
    LeaseLost,
    LedgerUnavailable,
    NoServer,
    ObjectNotFound,
    Permanent,
    PromptLost,
    Retryable,
    StopAttempt,
    StorageUnavailable,
    TaskCanceled,
)
from genpulse.ledger import Ledger
from genpulse.live import Live
from genpulse.model import (
    AttemptOutcome,
    Claim,
    ErrorInfo,
    NewOutput,
    OutputKind,
    Task,
    TaskStatus,
    output_prefix,
)
from genpulse.storage import StorageProvider
from genpulse.tasks import queues, wiring
from genpulse.tasks.board import board
from genpulse.tasks.drain import is_draining
from genpulse.tasks.heartbeat import Heartbeat, Signals
from genpulse.tasks.inputs import is_url, open_url
from genpulse.tasks.presence import open_pool
from genpulse.tasks.registry import Registry, default_registry
from genpulse.tasks.retry import backoff_s
from genpulse.telemetry import metrics, traces

__all__ = ["AttemptContext", "Runner", "run_message", "start_child", "stop_child"]

log = structlog.get_logger("genpulse.runner")

T = TypeVar("T")

CLAIM_PATIENCE_S = 60.0
"""How long a message waits for the ledger. Afterwards the sweeper will send another one."""
NO_SERVER_DELAY_S = 2.0
NO_SERVER_PAUSE_S = 1.0
"""How long a child that found no server takes no other task."""
PROGRESS_EVERY_S = 0.25
PREVIEW_EVERY_S = 0.5
_LAST_WORDS_S = 0.5
"""Between the end of the last attempt of a child that was told to stop, and its own."""
_STORE_TRIES_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
_NODE_ID_CHARS = 200


@dataclass
class AttemptContext:
    """
    What a handler may use while it executes one attempt.

    Everything that writes to the ledger carries the attempt's fence and waits for a ledger that is
    away; any method may raise a :class:`~genpulse.errors.StopAttempt`, which must be let through.
    """

    settings: Settings
    ledger: Ledger
    storage: StorageProvider
    live: Live
    pool: ServerPool
    claim: Claim
    worker: str
    signals: Signals
    leaves_prompt: bool = False
    """A prompt of this attempt may still be on a server although the attempt ends."""
    reached_elsewhere: str = ""
    """The server that cannot be reached from here, but from another worker, which may adopt the prompt."""
    rendered: bool = False
    run_s: float | None = None
    _running_since: float | None = None
    _rendered_at: float | None = None
    _percent: float = 0.0
    _told_at: float = 0.0
    _previewed_at: float = 0.0
    _stored: int = 0
    _storing_since: float = 0.0
    _after_win: list[Callable[[], None]] = field(default_factory=list)

    @property
    def task(self) -> Task:
        """The task as it was claimed."""
        return self.claim.task

    @functools.cached_property
    def log(self) -> Any:
        """A logger with the ids of this attempt bound."""
        return log.bind(task_id=self.task.id, attempt=self.claim.fence.attempt)

    def check(self) -> None:
        """Raise the :class:`~genpulse.errors.StopAttempt` this attempt must end with, if any."""
        self.signals.check()

    def confirm(self) -> None:
        """
        Make sure that the lease is still ours, right before something that cannot be taken back.

        Costs nothing while the heartbeat is fresh. A process that was frozen past its lease asks the
        ledger before it posts a prompt that nobody would follow.
        """
        self.check()
        if not self.holds_lease():
            raise LeaseLost

    def holds_lease(self) -> bool:
        """Whether the task is still this attempt's: asks the ledger if the heartbeat is not fresh."""
        if self.signals.lost:
            return False
        if time.monotonic() - self.signals.renewed_at <= self.settings.lease_s / 2:
            return True
        try:
            return self.insist(lambda: self.ledger.still_held(self.claim.fence), checked=False)
        except LeaseLost:
            return False

    def note_stray(self, server: str, prompt_id: str) -> None:
        """Leave word of a prompt that was sent although the task is another's by now."""
        for pause in (*_STORE_TRIES_S, 0.0):
            try:
                self.ledger.note_stray(self.claim.fence, server, prompt_id)
            except LedgerUnavailable as error:
                self.log.warning("stray_not_noted", server=server, prompt_id=prompt_id, reason=str(error))
                time.sleep(pause)
            else:
                return

    def sleep(self, seconds: float) -> None:
        """Wait, but not past anything that :meth:`check` would raise."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            self.signals.stopped.wait(min(left, 0.25))
        self.check()

    def insist(self, write: Callable[[], T], *, checked: bool = True) -> T:
        """
        Do a ledger write until the ledger answers.

        While it is away nobody else can claim, so waiting is safe; when it is back, the fence
        decides. Ends early with what :meth:`check` raises, or only with a lost lease if not *checked*.
        """
        pause = 0.1
        while True:
            try:
                return write()
            except LedgerUnavailable as error:
                if checked:
                    self.check()
                elif self.signals.lost:
                    raise LeaseLost from error
                self.signals.stopped.wait(pause) if checked else time.sleep(pause)
                pause = min(2.0, pause * 2)

    def progress(self, percent: float, **detail: Any) -> None:
        """Show how far the attempt is, 0 to 100; never falls, and goes out a few times a second."""
        self._percent = max(self._percent, min(100.0, percent))
        if time.monotonic() - self._told_at >= PROGRESS_EVERY_S:
            self._told_at = time.monotonic()
            self.live.publish_progress(self.task.id, self.claim.fence.attempt, self._percent, detail)

    @property
    def traces(self) -> dict[str, Any]:
        """What the last write notes of an attempt that did not complete: how far it came, what it stored."""
        return {"progress": self._percent or None, "stored": self._stored > 0}

    def begin_prompt(self) -> None:
        """
        A prompt is about to be followed, the first of this attempt or another one: no clock runs yet.

        Whatever ends the attempt before the prompt's own end was seen leaves it on its server.
        """
        self._running_since = None
        self.leaves_prompt = True

    def preview(self, picture: bytes, content_type: str, node_id: str | None) -> None:
        """Show an unfinished picture to those who watch and asked for it, twice a second at most."""
        if time.monotonic() - self._previewed_at >= PREVIEW_EVERY_S:
            self._previewed_at = time.monotonic()
            self.live.publish_preview(self.task.id, self.claim.fence.attempt, picture, content_type, node_id)

    def mark_running(self) -> None:
        """Rendering has begun: the clock of ``timeout_s`` runs, once for a prompt."""
        if self._running_since is None:
            self._running_since = time.monotonic()
            if self.insist(lambda: self.ledger.record_running(self.claim.fence)) is None:
                raise LeaseLost

    def mark_rendered(self) -> None:
        """Rendering is over: its clock stops, and storing has a limit of its own."""
        self._rendered_at = time.monotonic()
        if self._running_since is not None:
            self.run_s = self._rendered_at - self._running_since
        if not self.insist(lambda: self.ledger.record_rendered(self.claim.fence)):
            raise LeaseLost
        self.rendered = True

    @property
    def store_s(self) -> float | None:
        """How long storing took so far, once rendering is over."""
        return None if self._rendered_at is None else time.monotonic() - self._rendered_at

    def _storing_is_late(self) -> bool:
        """Storing has a limit of its own, all outputs together."""
        since = self._storing_since if self._rendered_at is None else self._rendered_at
        return time.monotonic() - since > self.settings.store_timeout_s

    def _check_storing(self) -> None:
        """:meth:`check`, and end a store that takes its bytes too slowly."""
        self.check()
        if self._storing_is_late():
            msg = f"storing the outputs took longer than {self.settings.store_timeout_s:g} s"
            raise StorageUnavailable(msg)

    def after_win(self, act: Callable[[], None]) -> None:
        """Do *act* only if this attempt's ``finish`` matched. A loser touches nothing any more."""
        self._after_win.append(act)

    def clean_up(self) -> None:
        """Do what waited for the win. It cannot undo it: failures are logged and forgotten."""
        for act in self._after_win:
            try:
                act()
            except GenPulseError as error:
                self.log.info("clean_up_failed", error=str(error))
            except Exception:
                self.log.exception("clean_up_failed")

    @contextlib.contextmanager
    def open_input(self, reference: str) -> Iterator[BinaryIO]:
        """
        Open an input: ``asset:<id>`` or ``output:<task id>/<index>`` of the task's owner, or a URL.

        Raises:
            InputRejected: The owner has no such file (any more), or the URL leads to nothing usable.
            InputUnavailable, StorageUnavailable: Not readable just now.
        """
        if is_url(reference):
            with open_url(self.settings, reference, self.check) as stream:
                yield stream
            return
        key = self._input_key(reference)
        try:
            with self.storage.open(key) as stream:
                yield stream
        except ObjectNotFound as error:
            msg = f"the input {reference} is gone"
            raise InputRejected(msg) from error

    def _input_key(self, reference: str) -> str:
        scheme, _, rest = reference.partition(":")
        if scheme == "asset":
            asset = self.insist(lambda: self.ledger.get_asset(rest, self.task.owner))
            if asset is not None:
                return asset.key
        elif scheme == "output":
            task_id, _, index = rest.partition("/")
            task = self.insist(lambda: self.ledger.get(task_id, self.task.owner, with_params=False))
            for output in task.outputs if task is not None else ():
                if str(output.index) == index:
                    return output.key
        msg = f"there is no input {reference}"
        raise InputRejected(msg)

    def store(
        self,
        source: BinaryIO
        | IO[bytes]
        | Path
        | bytes
        | Callable[[], contextlib.AbstractContextManager[BinaryIO]],
        *,
        name: str,
        node_id: str = "",
        content_type: str | None = None,
    ) -> NewOutput:
        """
        Put one output into storage, under a key with task and attempt.

        Storage that fails is tried again with backoff, if *source* can be read again: bytes, a path,
        a seekable stream, or a function that opens it.

        Args:
            name: The file's own name, shown to people; only its last part is used.
            node_id: The node that made it; what a server calls one that it added itself is cut to what
                the ledger takes.
            content_type: By default what the name and the first bytes say.

        Raises:
            StorageUnavailable: It failed for long; the attempt ends as ``storage_failed``.
        """
        index = self._stored
        self._stored += 1
        safe = safe_name(name, f"output-{index}")
        key = f"{output_prefix(self.task.id, self.claim.fence.attempt)}{index:04d}-{safe}"
        self._storing_since = time.monotonic()
        for pause in (*_STORE_TRIES_S, None):
            self.check()
            try:
                with traces.span("storage put", kind="client", storage=self.settings.storage, key=key):
                    return self._store_once(source, key, safe, node_id, content_type)
            except StorageUnavailable as error:
                late = self._storing_is_late()
                if pause is None or late or not _can_read_again(source):
                    raise
                self.log.warning("storage_failed", key=key, error=str(error))
                self.sleep(pause)
        raise AssertionError  # the loop returns or raises

    def _store_once(
        self, source: Any, key: str, name: str, node_id: str, content_type: str | None
    ) -> NewOutput:
        with _opened(source) as stream:
            head = _peek(stream)
            kind_of_bytes = content_type or _guess(name, head.first)
            stored = self.storage.upload_file(
                key,
                cast("BinaryIO", _Checked(head, self._check_storing)),
                content_type=kind_of_bytes,
                filename=name,
            )
        width, height = _picture_size(head.first) if kind_of_bytes.startswith("image/") else (None, None)
        return NewOutput(
            node_id=_storable(node_id)[:_NODE_ID_CHARS],
            name=name,
            kind=kind_of(kind_of_bytes, name),
            content_type=stored.content_type,
            size_bytes=stored.size_bytes,
            sha256=stored.sha256 or "",
            key=key,
            width=width,
            height=height,
        )


class Runner:
    """
    Everything one worker child needs to run attempts, passed in.

    Args:
        worker: The child's name in leases and attempts, ``node:pid``.
    """

    def __init__(  # the collaborators
        self,
        settings: Settings,
        *,
        ledger: Ledger,
        storage: StorageProvider,
        live: Live,
        pool: ServerPool,
        registry: Registry,
        heartbeat: Heartbeat,
        worker: str,
    ) -> None:
        self.settings = settings
        self.ledger = ledger
        self.storage = storage
        self.live = live
        self.pool = pool
        self.registry = registry
        self.heartbeat = heartbeat
        self.worker = worker
        self._found_no_server = False

    def run(self, task_id: str) -> dict[str, Any] | None:
        """
        Run one attempt of a task, if it can be claimed.

        Returns:
            What Celery's own tools may show of it, or ``None`` if there was nothing to do.
        """
        claim = self._claim(task_id)
        if claim is None:
            return None
        self.live.wake("claim")
        self.live.touch(task_id)
        signals = Signals()
        context = AttemptContext(
            settings=self.settings,
            ledger=self.ledger,
            storage=self.storage,
            live=self.live,
            pool=self.pool,
            claim=claim,
            worker=self.worker,
            signals=signals,
        )
        self.heartbeat.watch(claim.fence, signals)
        try:
            with _named(claim), _traced(claim) as told:
                traces.name_trace()
                status = self._attempt(context)
                if told is not None:
                    told.set_attribute("genpulse.status", status)
        finally:
            self.heartbeat.forget(claim.fence)
        self.live.wake("task")
        if self._found_no_server:
            self._rest()
        return {"task_id": task_id, "attempt": claim.fence.attempt, "status": status}

    def _rest(self) -> None:
        """
        Take nothing for a moment.

        Taking and handing back takes milliseconds: this child would go through the whole runway, away
        from workers that have a server, until its main process sees what it saw and stops consuming.
        """
        self._found_no_server = False
        ends = time.monotonic() + NO_SERVER_PAUSE_S
        while time.monotonic() < ends and not is_draining():
            time.sleep(0.1)

    def _claim(self, task_id: str) -> Claim | None:
        token = secrets.token_hex(16)
        deadline = time.monotonic() + CLAIM_PATIENCE_S
        while True:
            try:
                return self.ledger.claim(
                    task_id,
                    claim=token,
                    worker=self.worker,
                    session_key=self.heartbeat.session_key,
                    servers=[server.name for server in self.settings.servers],
                    lease_s=self.settings.lease_s,
                    max_running=self.settings.max_running,
                )
            except LedgerUnavailable as error:
                if time.monotonic() > deadline or is_draining():
                    log.warning("claim_given_up", task_id=task_id, reason=str(error))
                    return None
                time.sleep(0.5)

    def _attempt(self, context: AttemptContext) -> str:
        """Execute, and write what became of it. Returns a word for Celery's tools."""
        task = context.task
        context.log.info("task_started", task_type=task.task_type, worker=self.worker)
        try:
            context.check()
            handler = self.registry.get(task.task_type)
            if not queues.describe(handler.queue).on_servers:
                context.mark_running()
            outputs = handler.execute(task, context)
            context.check()
        except LeaseLost:
            return self._lost(context)
        except StopAttempt as stop:
            return self._stopped(context, stop)
        except NoServer as error:
            go_to, delay_s = error.go_to, NO_SERVER_DELAY_S if error.go_to is None else 0.0
            context.log.info("task_handed_back", reason=str(error), go_to=go_to)
            self._found_no_server = go_to is None
            return self._write(
                context,
                lambda: self.ledger.hand_back(
                    context.claim.fence, adopt_wait_s=None, delay_s=delay_s, go_to=go_to, **context.traces
                ),
                AttemptOutcome.HANDED_BACK,
            )
        except Retryable as error:
            return self._failed_for_now(context, error)
        except Permanent as error:
            context.log.info("task_failed", code=error.code, error=str(error))
            status = TaskStatus.CANCELED if error.code == TaskCanceled.code else TaskStatus.FAILED
            return self._finish(context, status, error=ErrorInfo.of(error))
        except Exception:
            # A handler's bug, or a library's: the traceback is for the log, not for the caller.
            context.log.exception("handler_raised")
            return self._failed_for_now(
                context, Retryable("The worker failed unexpectedly; its log has the reason.")
            )
        return self._finish(context, TaskStatus.COMPLETED, outputs=outputs)

    def _stopped(self, context: AttemptContext, stop: StopAttempt) -> str:
        if isinstance(stop, Draining):
            context.log.info("task_handed_back", reason="draining")
            wait_s = self.settings.adopt_wait_s
            return self._write(
                context,
                lambda: self.ledger.hand_back(context.claim.fence, adopt_wait_s=wait_s, **context.traces),
                AttemptOutcome.HANDED_BACK,
            )
        status = TaskStatus.CANCELED if isinstance(stop, TaskCanceled) else TaskStatus.FAILED
        context.log.info("task_stopped", code=stop.code)
        return self._finish(context, status, error=ErrorInfo.of(stop))

    def _failed_for_now(self, context: AttemptContext, error: GenPulseError) -> str:
        failures = sum(
            each.outcome in {AttemptOutcome.RETRY, AttemptOutcome.STORAGE_FAILED, AttemptOutcome.UNREACHABLE}
            for each in self._history(context)
        )
        delay_s = backoff_s(error, failures)
        # A picture that could not be fetched is on its server as well as one that could not be stored.
        stored_badly = context.rendered and (
            isinstance(error, StorageUnavailable | ComfyUnavailable) and not isinstance(error, PromptLost)
        )
        outcome = AttemptOutcome.STORAGE_FAILED if stored_badly else AttemptOutcome.RETRY
        if context.reached_elsewhere:
            outcome, delay_s = AttemptOutcome.UNREACHABLE, 0.0
        context.log.warning("attempt_failed", code=error.code, error=str(error), retry_in_s=round(delay_s, 1))
        return self._write(
            context,
            lambda: self.ledger.retry_later(
                context.claim.fence,
                ErrorInfo.of(error),
                delay_s=delay_s,
                outcome=outcome,
                leaves_prompt=context.leaves_prompt,
                bind_to=context.reached_elsewhere or None,
                **context.traces,
            ),
            outcome,
        )

    def _history(self, context: AttemptContext) -> tuple[Any, ...]:
        try:
            task = self.ledger.get(context.task.id, with_params=False)
        except LedgerUnavailable:
            return ()
        return task.attempts if task is not None else ()

    def _finish(
        self,
        context: AttemptContext,
        status: TaskStatus,
        *,
        outputs: tuple[NewOutput, ...] = (),
        error: ErrorInfo | None = None,
    ) -> str:
        def write() -> TaskStatus | None:
            return self.ledger.finish(
                context.claim.fence,
                status,
                outputs=outputs,
                error=error,
                run_s=context.run_s,
                store_s=context.store_s,
                leaves_prompt=context.leaves_prompt,
                **context.traces,
            )

        return self._write(context, write)

    def _write(
        self, context: AttemptContext, write: Callable[[], TaskStatus | None], outcome: str = ""
    ) -> str:
        """
        The last write of an attempt: held until the ledger answers, or somebody else has the task.

        What the ledger refuses for its own sake it would refuse each time, and an attempt that dies of
        it is taken for a lost worker and rendered anew: such a task fails at once, as ``internal``.
        """
        try:
            try:
                status = context.insist(write, checked=False)
            except GenPulseError:
                raise
            except Exception:
                context.log.exception("outcome_refused")
                outcome = str(TaskStatus.FAILED)
                status = context.insist(functools.partial(self._fail_plainly, context), checked=False)
        except LeaseLost:
            return self._lost(context)
        if status is None:
            return self._lost(context)
        context.log.info("attempt_ended", status=str(status))
        metrics.ATTEMPTS.add(task_type=context.task.task_type, outcome=outcome or str(status))
        if status.is_final:
            self.live.forget_progress(context.task.id)
            context.clean_up()
        else:
            self.live.touch(context.task.id)
        return str(status)

    def _fail_plainly(self, context: AttemptContext) -> TaskStatus | None:
        """End the task with nothing that came from a handler or a server."""
        return self.ledger.finish(
            context.claim.fence,
            TaskStatus.FAILED,
            error=ErrorInfo(
                "internal", "What became of the task could not be recorded; see the worker's log."
            ),
            leaves_prompt=context.leaves_prompt,
        )

    def _lost(self, context: AttemptContext) -> str:
        context.log.warning("attempt_fenced_off")
        metrics.ATTEMPTS.add(task_type=context.task.task_type, outcome="fenced_off")
        return "lost"


def _named(claim: Claim) -> contextlib.AbstractContextManager[Any]:
    """Whatever is logged meanwhile says of which attempt, and of whose request, it is."""
    return structlog.contextvars.bound_contextvars(
        task_id=claim.task.id,
        attempt=claim.fence.attempt,
        owner=claim.task.owner,
        request_id=claim.task.request_id,
    )


def _traced(claim: Claim) -> contextlib.AbstractContextManager[Any]:
    task = claim.task
    return traces.span(
        f"attempt {task.task_type}",
        parent=task.traceparent,
        kind="consumer",
        task_id=task.id,
        task_type=task.task_type,
        queue=task.queue,
        attempt=claim.fence.attempt,
        request_id=task.request_id,
    )


class _Checked(io.RawIOBase):
    """A stream that asks ``check`` before each read, so that a cancel also ends a long upload."""

    def __init__(self, stream: _Head, check: Callable[[], None]) -> None:
        super().__init__()
        self._stream = stream
        self._check = check

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._check()
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Head:
    """A stream whose first bytes were looked at."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.first: bytes = stream.read(_HEAD_BYTES) or b""
        self._left = self.first

    def read(self, size: int) -> bytes:
        if self._left:
            data, self._left = self._left[:size], self._left[size:]
            return data
        return self._stream.read(size) or b""


_HEAD_BYTES = 64 * 1024
_peek = _Head


def _storable(text: str) -> str:
    """Without what PostgreSQL keeps in no text."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[Any]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif isinstance(source, Path):
        with source.open("rb") as stream:
            yield stream
    elif callable(source):
        with source() as stream:
            yield stream
    else:
        if source.seekable():
            source.seek(0)
        yield source


def _can_read_again(source: Any) -> bool:
    return isinstance(source, bytes | Path) or callable(source) or bool(source.seekable())


def safe_name(name: str, otherwise: str) -> str:
    """The last part of a file name, of characters that every storage and browser takes."""
    last = PurePosixPath(name.replace("\\", "/")).name
    kept = "".join(character if character.isalnum() or character in "._-" else "_" for character in last)
    kept = kept.encode("ascii", "ignore").decode().lstrip(".")
    return kept[-120:] or otherwise


_KINDS = {
    "image": OutputKind.IMAGE,
    "video": OutputKind.VIDEO,
    "audio": OutputKind.AUDIO,
    "text": OutputKind.TEXT,
    "model": OutputKind.MODEL3D,
}
_BY_SUFFIX = {
    ".glb": ("model/gltf-binary", OutputKind.MODEL3D),
    ".gltf": ("model/gltf+json", OutputKind.MODEL3D),
    ".obj": ("model/obj", OutputKind.MODEL3D),
    ".latent": ("application/octet-stream", OutputKind.LATENT),
    ".safetensors": ("application/octet-stream", OutputKind.FILE),
    ".txt": ("text/plain; charset=utf-8", OutputKind.TEXT),
    ".json": ("application/json", OutputKind.FILE),
    ".opus": ("audio/ogg", OutputKind.AUDIO),
}


_REGISTERED = {"audio/x-flac": "audio/flac", "audio/x-wav": "audio/wav", "audio/m4a": "audio/mp4"}
"""Types by the names that IANA registered meanwhile."""


def kind_of(content_type: str, name: str) -> OutputKind:
    """What an output is for a person."""
    known = _BY_SUFFIX.get(PurePosixPath(name).suffix.lower())
    return known[1] if known else _KINDS.get(content_type.partition("/")[0], OutputKind.FILE)


def _guess(name: str, head: bytes) -> str:
    """The content type by what the bytes say, then by the name."""
    known = _BY_SUFFIX.get(PurePosixPath(name).suffix.lower())
    if known:
        return known[0]
    found = filetype.guess(head)
    mime = str(found.mime) if found is not None else "application/octet-stream"
    return _REGISTERED.get(mime, mime)


def _picture_size(head: bytes) -> tuple[int | None, int | None]:
    """Width and height out of a picture's header; nothing is decoded."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(head)) as image:
            return image.size
    except Exception:  # noqa: BLE001  # a size is a courtesy; Pillow raises what it likes on strange files
        return None, None


# -- The child process ----------------------------------------------------------------------------

_runner: Runner | None = None


def start_child(node: str) -> None:
    """
    Set up this worker child: connections and heartbeat.

    Called after the fork, never before. The prefork pool's children die with their parent.

    Args:
        node: The worker's node name, for example ``genpulse-comfy-4711@host``.
    """
    settings = Settings.from_env()
    if settings.metrics_port:
        metrics.start("worker")
    traces.start(settings.otlp_endpoint, "genpulse-worker")
    heartbeat = Heartbeat(settings, is_draining)
    heartbeat.start()
    global _runner  # noqa: PLW0603  # one per child process
    _runner = Runner(
        settings,
        ledger=wiring.open_ledger(settings, pool_size=1),
        storage=wiring.open_storage(settings),
        live=wiring.open_live(settings),
        pool=open_pool(settings),
        registry=default_registry(),
        heartbeat=heartbeat,
        worker=f"{node}:{os.getpid()}",
    )
    if (page := board()) is not None:
        page.enter()


def stop_child() -> None:
    """The child ends in order: let go of its session at once."""
    if _runner is not None:
        _runner.heartbeat.stop()
    traces.stop()


def run_message(task_id: str) -> dict[str, Any] | None:
    """Run one attempt of a task in this child; ``None`` if there is nothing to do for it."""
    global _at_work  # noqa: PLW0603  # one per child process
    if _runner is None:  # an in-process worker, as tests start: it has no child set-up of its own
        start_child(f"inline@{socket.gethostname()}")
    assert _runner is not None
    page = board()
    if page is not None:
        page.set_busy(True)
    _at_work = True
    try:
        # Here and not in start_child: the pool sets handlers of its own after that, and theirs raise
        # SystemExit at any line.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _on_sigterm)
        return None if is_draining() or _told_to_end else _runner.run(task_id)
    finally:
        _at_work = False
        if page is not None:
            page.set_busy(False)
        if _told_to_end:
            _end_soon()


_at_work = False
_told_to_end = False


def _on_sigterm(number: int, _frame: object) -> None:
    """
    A child hit by SIGTERM itself hands its attempt back as a draining worker does, and ends then.

    One that has just claimed counts as at work already: to die before the heartbeat knows of the
    attempt would be a loss. An idle one dies as it would have.
    """
    global _told_to_end  # noqa: PLW0603  # one per child process
    if _runner is not None and _at_work:
        _told_to_end = True
        _runner.heartbeat.drain()
    else:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _end_soon() -> None:
    """Whoever sent SIGTERM waits for our end; the result of the attempt goes out before it."""
    end = threading.Timer(_LAST_WORDS_S, os.kill, (os.getpid(), signal.SIGTERM))
    end.daemon = True
    end.start()
