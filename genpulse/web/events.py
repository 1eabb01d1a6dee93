"""
A task as a stream of server-sent events: ``GET /task/{id}/events``.

The state of a task is always read from the ledger; Redis says when to look, and carries progress and
previews, which the ledger does not have. So a stream is right with Redis down, only slower: it then
sees a change within a second or two.

An event's id says how far its reader is: in the task's log, and in the states it has seen. A reader that
comes back with it gets what it missed. Where the log does not reach back so far there is a ``gap``,
and a snapshot in place of what is missing.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from flask import Response, stream_with_context
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from genpulse.errors import LedgerUnavailable
from genpulse.live import Entry, order
from genpulse.model import Task, TaskStatus
from genpulse.tasks.views import ProgressDetail
from genpulse.web import access, schemas
from genpulse.web.answers import link
from genpulse.web.api import ROUTES, _known, _task, _view, connection
from genpulse.web.contract import empty_answer, events_answer
from genpulse.web.problems import Problem
from genpulse.web.service import service
from genpulse.web.watch import News, Watch

__all__ = ["MODELS"]

HEARTBEAT_S = 15.0
FULL_RETRY_S = 5
"""``Retry-After`` where every place is taken."""
RECONNECT_MS = (1000, 3000)
"""Between these a browser waits before it comes back: a restart must not bring all of them at once."""

EXAMPLE = """\
retry: 1873

id: 1793448000100-0.p0
event: snapshot
data: {"task_id": "0199…", "status": "pending", "progress": 0, "outputs": [], …}

id: 1793448000342-0.r1
event: status
data: {"task_id": "0199…", "status": "processing", "attempt": 1, …}

id: 1793448001870-0.r1
event: progress
data: {"attempt": 1, "progress": 41.7, "progress_detail": {"node_id": "3", "class_type": "KSampler", "step": 8, "steps": 20, …}}

:

id: 1793448003011-0.r1
event: output
data: {"index": 0, "name": "fox_00001_.png", "kind": "image", "url": "https://…/task/0199…/outputs/0", …}

id: 1793448003011-0.c1
event: done
data: {"task_id": "0199…", "status": "completed", "progress": 100, "outputs": [{…}], …}

"""

RESUMED = """\
retry: 2210

event: gap
data: {"reason": "trimmed"}

id: 1793448003011-0.r1
event: snapshot
data: {"task_id": "0199…", "status": "processing", "progress": 63.2, …}

"""


class EventsQuery(BaseModel):
    """What to stream."""

    model_config = ConfigDict(extra="forbid")

    preview: bool = Field(
        False, description="Also `preview` events: unfinished pictures as base64, twice a second at most."
    )


class EventsHeaders(BaseModel):
    """From where to go on."""

    last_event_id: str | None = Field(
        None,
        alias="Last-Event-ID",
        description="The id of the last event that was received; browsers send it by themselves.",
    )


class ProgressEvent(BaseModel):
    """The data of a ``progress`` event; the numbers are those of `GET /task/{id}`."""

    attempt: int
    progress: float = Field(ge=0, le=100)
    progress_detail: ProgressDetail | None


class PreviewEvent(BaseModel):
    """The data of a ``preview`` event: an unfinished picture."""

    attempt: int
    node_id: str | None
    content_type: Literal["image/jpeg", "image/png"]
    data: str = Field(description="base64")


class GapEvent(BaseModel):
    """The data of a ``gap`` event: events are missing here, and a snapshot follows."""

    reason: Literal["trimmed", "unavailable", "slow"]


MODELS: tuple[type[BaseModel], ...] = (GapEvent, PreviewEvent, ProgressEvent)
"""What the events carry, for the published document."""


@ROUTES.add(
    "GET",
    "/task/<task_id>/events",
    tag="Tasks",
    answers={
        200: events_answer(
            "The events until the final state.", {"from the start": EXAMPLE, "resumed": RESUMED}
        ),
        204: empty_answer("`Last-Event-ID` says that the final state was seen: there is nothing more."),
    },
    refusals=(404, 422),
)
def watch_task(path: schemas.TaskPath, query: EventsQuery, header: EventsHeaders) -> Response:
    """
    Watch a task: server-sent events until it is final.

    | event | data |
    |---|---|
    | `snapshot` | the task as `GET /task/{id}` has it (`TaskView`); first, and after a `gap` |
    | `status` | the task began, goes back to wait, or begins again (`TaskSummary`) |
    | `progress` | how far the attempt is (`ProgressEvent`) |
    | `preview` | with `?preview=1`: an unfinished picture (`PreviewEvent`); never sent again |
    | `output` | one stored file (`OutputView`), right before `done` |
    | `done` | the final task (`TaskView`); the stream ends |
    | `gap` | events are missing (`GapEvent`); a `snapshot` follows |

    A comment comes at least each 15 seconds. With `Last-Event-ID` the stream goes on after that event.
    A process holds so many watchers (`GENPULSE_MAX_WATCHERS`), and with API keys half as many of one owner;
    beyond it this is 503 with `Retry-After`. A stream ends soon after its key was revoked or has expired.
    """
    here = service()
    seen = Position.parse(header.last_event_id)
    watch = here.watchers.enter(
        _known(path.task_id),
        owner=access.owner(),
        shared=access.shared(),
        after=seen.log if seen is not None else None,
        connection=connection(),
    )
    answer: Response | None = None
    try:
        task = _task(path.task_id)  # after the watch began, so that whatever comes later is told by it
        if query.preview and watch is not None and not task.status.is_final:
            watch.ask_for_previews()  # not before: it costs the worker something, and the task is the caller's
        answer = _begin(task, seen, watch)
    finally:
        if watch is not None:
            if answer is None or not answer.is_streamed:
                watch.close()
            else:
                # Not in the generator: one that was never started, as for HEAD, has no last line to run.
                answer.call_on_close(watch.close)
    return answer


def _begin(task: Task, seen: Position | None, watch: Watch | None) -> Response:
    if task.status.is_final:
        if seen is not None and seen.state == state_of(task):
            return Response(status=204, headers={"Cache-Control": "no-store"})
        return _answer(Telling(task.id, seen).begin(task))
    if watch is None:
        raise Problem(
            503,
            detail="This process has as many watchers as it takes, or as it takes of one owner. Read the task"
            " instead, or come again.",
            headers={"Retry-After": str(FULL_RETRY_S)},
            retryable=True,
        )
    watch.saw(task)
    telling = Telling(task.id, seen, watch)
    first = telling.begin(task)
    return _answer(stream_with_context(telling.run(first, service().settings.watch_s)))


def _answer(events: bytes | Iterator[bytes]) -> Response:
    return Response(
        events,
        content_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@dataclass(frozen=True, slots=True)
class Position:
    """How far a reader is: what an event's id says."""

    log: str | None
    """The last entry of the task's log that it knows; ``None`` where Redis did not answer."""
    state: str
    """The last state that it knows, see :func:`state_of`."""

    @classmethod
    def parse(cls, text: str | None) -> Self | None:
        """From ``Last-Event-ID``; what was not written by :meth:`__str__` is no position."""
        match = _POSITION.fullmatch(text or "")
        return cls(None if match[1] == "-" else match[1], match[2]) if match else None

    def __str__(self) -> str:
        return f"{self.log or '-'}.{self.state}"


_POSITION = re.compile(r"(-|[0-9]{1,15}-[0-9]{1,15})\.([prcfx][0-9]{1,9})")
_LETTERS = {
    TaskStatus.PENDING: "p",
    TaskStatus.PROCESSING: "r",
    TaskStatus.COMPLETED: "c",
    TaskStatus.FAILED: "f",
    TaskStatus.CANCELED: "x",
}


def state_of(task: Task) -> str:
    """Status and attempt in a few letters, like ``r2``: what a ``status`` event is about."""
    return f"{_LETTERS[task.status]}{task.attempt}"


class Telling:
    """
    What one reader was told, and what to tell it next.

    Args:
        seen: Where the reader says it is.
        watch: Its news; none for a task that is final.
    """

    def __init__(self, task_id: str, seen: Position | None, watch: Watch | None = None) -> None:
        self.task_id = task_id
        self._seen = seen
        self._watch = watch
        self._log: str | None = None
        self._state = ""
        self._attempt = 0
        self._percent = 0.0
        self._owes_look = False
        self._last_progress: ProgressEvent | None = None
        self._last_preview: str | None = None
        self.is_done = False

    def begin(self, task: Task) -> bytes:
        """The first events: a snapshot, or what the reader missed since it was here."""
        told = [f"retry: {random.randint(*RECONNECT_MS)}\n\n"]  # noqa: S311 - spread, no secret
        seen, past = self._seen, self._watch.past if self._watch is not None else None
        if seen is not None and task.status.is_final:
            self._log, self._state = seen.log, seen.state
            told += self._tell_state(task)
        elif seen is not None and seen.log is not None and past is not None and past.complete:
            self._log, self._state = seen.log, seen.state
            self._attempt = task.attempt
            told += self._tell_state(task)
            for entry in past.entries:
                told += self._tell_entry(entry)
            self._log = past.newest
        else:
            self._log = past.newest if past is not None else None
            if seen is not None:
                reason: Literal["trimmed", "unavailable"] = (
                    "trimmed" if past is not None and seen.log is not None else "unavailable"
                )
                told.append(self._event("gap", GapEvent(reason=reason), with_id=False))
            told += self._tell_snapshot(task)
        return "".join(told).encode()

    def run(self, first: bytes, life_s: float) -> Iterator[bytes]:
        """Everything from the first events to the end of the stream, as it happens."""
        watch = self._watch
        assert watch is not None
        ends = time.monotonic() + life_s
        yield first
        heartbeat = ask_again = time.monotonic() + HEARTBEAT_S
        while not self.is_done and (now := time.monotonic()) < ends:
            if now >= ask_again:
                if not access.is_still_welcome():
                    return
                ask_again = now + HEARTBEAT_S
            wait_s = min(heartbeat, ask_again, ends) - now
            news = watch.wait(min(wait_s, 1.0) if self._owes_look else wait_s)
            if news.over:
                return
            try:
                told = self._tell(news)
            except LedgerUnavailable:
                return  # in the middle of a snapshot; the reader comes back for it
            if not told and time.monotonic() >= heartbeat:
                told.append(":\n\n")
            if told:
                yield "".join(told).encode()
                heartbeat = time.monotonic() + HEARTBEAT_S

    def _tell(self, news: News) -> list[str]:
        told: list[str] = []
        if news.lost:
            told += self._tell_gap()
        for entry in news.entries:
            told += self._tell_entry(entry)
        if (news.look or self._owes_look) and not self.is_done:
            told += self._look()
        return told

    def _tell_entry(self, entry: Entry) -> list[str]:
        if self.is_done:
            return []
        if entry.kind == "preview":
            return self._tell_preview(entry)
        if self._log is not None and order(entry.id) <= order(self._log):
            return []
        self._log = entry.id
        if entry.kind == "change":
            return self._look()
        if entry.kind != "progress":
            return []
        told = []
        attempt = entry.data.get("attempt")
        if isinstance(attempt, int) and attempt > self._attempt:
            told = self._look()  # its beginning was not heard of
        if attempt == self._attempt and self._state.startswith("r"):
            told += self._tell_progress(entry.data)
        return told

    def _tell_progress(self, data: Mapping[str, Any]) -> list[str]:
        percent, found = data.get("percent"), data.get("detail")
        try:
            detail = (
                ProgressDetail(**{name: found.get(name) for name in ProgressDetail.model_fields})
                if isinstance(found, Mapping)
                else None
            )
            progress = ProgressEvent(attempt=self._attempt, progress=percent, progress_detail=detail)
        except ValidationError:
            return []
        if progress.progress < self._percent or progress == self._last_progress:
            return []  # the snapshot had it, or a late one
        service().farthest.of(
            self.task_id, self._attempt, data
        )  # a read of the task shows no less from now on
        self._percent, self._last_progress = progress.progress, progress
        return [self._event("progress", progress)]

    def _tell_preview(self, entry: Entry) -> list[str]:
        if entry.data.get("attempt") != self._attempt or entry.id == self._last_preview:
            return []
        self._last_preview = entry.id
        try:
            return [self._event("preview", PreviewEvent(**entry.data), with_id=False)]
        except ValidationError:
            return []

    def _tell_gap(self) -> list[str]:
        told = [self._event("gap", GapEvent(reason="slow"), with_id=False)]
        task = self._read()
        return told + (self._tell_snapshot(task) if task is not None else [])

    def _look(self) -> list[str]:
        task = self._read()
        return self._tell_state(task) if task is not None else []

    def _read(self) -> Task | None:
        """The task now; ``None`` if that cannot be told, or if it was deleted, which ends the stream."""
        assert self._watch is not None
        try:
            task = self._watch.task()
        except LedgerUnavailable:
            self._owes_look = True
            return None
        self._owes_look = False
        if task is None:
            self.is_done = True
        return task

    def _tell_state(self, task: Task) -> list[str]:
        """What changed since the state that the reader knows."""
        if state_of(task) == self._state:
            return []
        if not task.status.is_final:
            self._note(task)
            summary = schemas.task_summary(task, link, service().settings.retention)
            return [self._event("status", schemas.TaskSummary(**summary))]
        view = _view(task)
        told = [self._event("output", output) for output in view.outputs]
        self._note(task)
        return [*told, self._event("done", view)]

    def _tell_snapshot(self, task: Task) -> list[str]:
        self._note(task)
        view = _view(task)
        if not task.status.is_final:
            self._percent = view.progress
            self._last_progress = ProgressEvent(
                attempt=task.attempt, progress=view.progress, progress_detail=view.progress_detail
            )
            return [self._event("snapshot", view)]
        # Only with the second event the reader has seen the end.
        position = Position(self._log, f"p{task.attempt}")
        return [self._event("snapshot", view, position=position), self._event("done", view)]

    def _note(self, task: Task) -> None:
        if task.attempt != self._attempt:
            self._percent = 0.0
        self._state, self._attempt, self.is_done = state_of(task), task.attempt, task.status.is_final

    def _event(
        self, name: str, data: BaseModel, *, with_id: bool = True, position: Position | None = None
    ) -> str:
        at = position or Position(self._log, self._state)
        mark = f"id: {at}\n" if with_id else ""
        return f"{mark}event: {name}\ndata: {data.model_dump_json()}\n\n"
