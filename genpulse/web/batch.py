"""Batches over HTTP: many tasks in one request, read and canceled by one id."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

from flask import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from genpulse.ledger import IdempotencyConflict
from genpulse.model import Batch, Task, TaskStatus
from genpulse.tasks.batch import MAX_TASKS, accept_grid, accept_tasks
from genpulse.tasks.views import TaskSummary
from genpulse.web import access, schemas
from genpulse.web.answers import json_answer, link, with_etag
from genpulse.web.api import POLL_S, ROUTES, TASK_CODES
from genpulse.web.contract import answer, empty_answer
from genpulse.web.problems import Problem
from genpulse.web.service import service

__all__ = ["MODELS"]

_FORMS: list[Any] = [{"required": ["tasks"]}, {"required": ["template", "grid"]}]


class BatchBody(BaseModel):
    """Many tasks: named one by one, or a template with a grid of values."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"oneOf": _FORMS})

    tasks: list[schemas.SubmitBody] = Field(
        default_factory=list, min_length=1, max_length=MAX_TASKS, description="The tasks, one by one."
    )
    template: schemas.SubmitBody | None = Field(None, description="What all tasks of the grid have.")
    grid: Annotated[
        dict[
            Annotated[str, Field(min_length=1, max_length=300)],
            Annotated[list[Any], Field(min_length=1, max_length=MAX_TASKS)],
        ],
        Field(min_length=1, max_length=20),
    ] = Field(
        default_factory=dict,
        description=(
            "Values by place in the template's `params`: a field (`width`), or one entry of a field that "
            "holds an object (`inputs.seed`, `inputs.6.text`). Each combination is a task, 1,000 at most; "
            "the last place varies fastest."
        ),
    )

    @model_validator(mode="after")
    def _is_one_form(self) -> BatchBody:
        given = self.model_fields_set
        if given not in ({"tasks"}, {"template", "grid"}) or (self.template is None) != bool(self.tasks):
            msg = "give either tasks, or template and grid"
            raise ValueError(msg)
        return self


class BatchPath(BaseModel):
    """A batch by id."""

    batch_id: str = Field(description="The batch's id.", json_schema_extra={"format": "uuid"})


class BatchQuery(BaseModel):
    """Which of the batch's tasks to show."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(50, ge=0, le=200, description="Tasks of a page; 0 for the counts alone.")
    cursor: str | None = Field(
        None, pattern="^[0-9]{1,3}$", examples=["49"], description="`next_cursor` of the page before."
    )


class BatchUrls(BaseModel):
    """Where to go from here."""

    model_config = ConfigDict(extra="forbid")

    self: str
    tasks: str = Field(description="Its tasks as a list that takes filters.")
    cancel: str


class BatchAccepted(BaseModel):
    """Tasks that are durably recorded, all of them."""

    model_config = ConfigDict(extra="forbid")

    batch_id: str
    status: TaskStatus
    message: str
    created_at: dt.datetime
    total: int
    task_ids: list[str] = Field(description="In the order of the request; of a grid, row by row.")
    urls: BatchUrls


class BatchCounts(BaseModel):
    """Tasks by status."""

    model_config = ConfigDict(extra="forbid")

    pending: int
    processing: int
    completed: int
    failed: int
    canceled: int
    deleted: int


class BatchTask(TaskSummary):
    """A task of a batch."""

    index: int = Field(description="Its place in the request, from 0.")
    values: dict[str, Any] | None = Field(description="What the grid gave this task; `null` without a grid.")


class BatchView(BaseModel):
    """A batch as it stands now."""

    model_config = ConfigDict(extra="forbid")

    batch_id: str
    status: TaskStatus = Field(
        description=(
            "`pending` until a task begins or ends, `processing` until all are final; then `failed` if any "
            "failed, else `canceled` if any was canceled, else `completed`."
        )
    )
    created_at: dt.datetime
    updated_at: dt.datetime | None = Field(description="When one of its tasks changed last.")
    completed_at: dt.datetime | None = Field(description="When the last of its tasks became final.")
    total: int
    counts: BatchCounts
    progress: float = Field(ge=0, le=100, description="Percent of the tasks that are final.")
    grid: list[str] = Field(description="The places that its grid varied; empty without one.")
    tasks: list[BatchTask]
    next_cursor: str | None
    next: str | None = Field(description="The next page's address.")
    urls: BatchUrls


MODELS: tuple[type[BaseModel], ...] = (BatchAccepted, BatchBody, BatchView)


@ROUTES.add(
    "POST",
    "/task/batch",
    tag="Batches",
    answers={
        202: answer(
            BatchAccepted,
            "All tasks are durably recorded.",
            Location="Where the batch is read.",
            Retry_After="Seconds after which it is worth asking.",
            Idempotency_Replayed="`true` where the key brought back an earlier batch.",
        )
    },
    refusals=(400, 413, 415, 422, 429),
    codes=TASK_CODES,
)
def submit_batch(header: schemas.SubmitHeaders, body: BatchBody) -> Response:
    """
    Submit up to 1,000 tasks, all or none.

    Each is checked like a single submission; the pointers of errors begin with `/tasks/<n>`, `/template` or
    `/grid/<place>/<n>`. What the tasks have in common is checked and stored once.
    """
    here = service()
    who, key = access.owner(), header.idempotency_key
    parts = (here.ledger, here.registry, here.settings)
    try:
        if body.template is not None:
            template = body.template.model_dump(exclude_unset=True)
            batch, replayed = accept_grid(
                *parts,
                template,
                body.grid,
                owner=who,
                idempotency_key=key,
                api_key=access.caller().key_id,
                room=access.room,
            )
        else:
            tasks = [each.model_dump(exclude_unset=True) for each in body.tasks]
            batch, replayed = accept_tasks(
                *parts,
                tasks,
                owner=who,
                idempotency_key=key,
                api_key=access.caller().key_id,
                room=access.room,
            )
    except IdempotencyConflict:
        detail = "This Idempotency-Key was used before with another body."
        raise Problem(422, "idempotency_key_reuse", detail) from None
    if not replayed:
        here.wake()
    urls = _urls(batch.id)
    view = BatchAccepted(
        batch_id=batch.id,
        status=batch.status,
        message="The tasks were recorded before." if replayed else "The tasks are recorded.",
        created_at=batch.created_at,
        total=batch.size,
        # What is recorded is accepted, whether the ledger answers once more or not.
        task_ids=list(batch.task_ids) or here.ledger.batch_task_ids(batch.id, who),
        urls=urls,
    )
    headers = {"Location": urls.self, "Retry-After": str(POLL_S)}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    return json_answer(view, 202, headers)


@ROUTES.add(
    "GET",
    "/batch/<batch_id>",
    tag="Batches",
    answers={
        200: answer(BatchView, "The batch as it is now.", ETag="Changes with the batch."),
        304: empty_answer("Nothing changed since `If-None-Match`."),
    },
    refusals=(404, 422),
)
def read_batch(path: BatchPath, query: BatchQuery) -> Response:
    """Read a batch: how far it is, and its tasks in the order of the request."""
    batch = service().ledger.get_batch(path.batch_id, access.owner())
    if batch is None:
        raise _unknown()
    return with_etag(json_answer(_view(batch, query)))


@ROUTES.add(
    "POST",
    "/batch/<batch_id>/cancel",
    tag="Batches",
    answers={
        200: answer(BatchView, "All its tasks are final: canceled now, or ended before."),
        202: answer(BatchView, "Some of its tasks are being stopped.", Retry_After="Seconds."),
    },
    refusals=(404,),
)
def cancel_batch(path: BatchPath) -> Response:
    """Cancel every task of a batch that is not final; safe to repeat."""
    here = service()
    batch = here.ledger.cancel_batch(path.batch_id, access.owner())
    if batch is None:
        raise _unknown()
    view = _view(batch, BatchQuery(limit=50, cursor=None))
    if not batch.live:
        return json_answer(view)
    here.announce_cancel()
    return json_answer(view, 202, {"Retry-After": str(POLL_S)})


def _view(batch: Batch, query: BatchQuery) -> BatchView:
    after = -1 if query.cursor is None else int(query.cursor)
    found = (
        service().ledger.batch_tasks(batch.id, batch.owner, after_index=after, limit=query.limit + 1)
        if query.limit
        else []
    )
    page = found[: query.limit]
    cursor = str(page[-1].batch_index) if len(found) > len(page) else None
    counts = {str(status): number for status, number in batch.counts.items()}
    return BatchView(
        batch_id=batch.id,
        status=batch.status,
        created_at=batch.created_at,
        updated_at=batch.updated_at,
        completed_at=batch.ended_at,
        total=batch.size,
        counts=BatchCounts(**counts, deleted=batch.size - sum(counts.values())),
        progress=batch.progress,
        grid=list(batch.grid),
        tasks=[_task(task, batch) for task in page],
        next_cursor=cursor,
        next=cursor and link("read_batch", batch_id=batch.id, limit=query.limit, cursor=cursor),
        urls=_urls(batch.id),
    )


def _task(task: Task, batch: Batch) -> BatchTask:
    return BatchTask(
        **schemas.task_summary(task, link, service().settings.retention),
        index=task.batch_index or 0,
        values={place: _value(task, place) for place in batch.grid} if batch.grid else None,
    )


def _value(task: Task, place: str) -> Any:
    field, dot, key = place.partition(".")
    value = task.params.get(field)
    return value.get(key) if dot and isinstance(value, dict) else value


def _urls(batch_id: str) -> BatchUrls:
    return BatchUrls(
        self=link("read_batch", batch_id=batch_id),
        tasks=link("list_tasks", batch_id=batch_id),
        cancel=link("cancel_batch", batch_id=batch_id),
    )


def _unknown() -> Problem:
    # The same for somebody else's: its very existence is not the caller's business.
    return Problem(404, detail="There is no batch of this id.")
