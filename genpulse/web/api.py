"""
The native API of API.md: thin views over ``tasks.submit``, the ledger and the storage.

A request that submits or cancels touches the ledger only. Redis may tell a reader how far a task
is, within 50 ms; nothing waits for it and nothing depends on it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from typing import Any, cast

from flask import Response, current_app, request
from pydantic import BaseModel

from genpulse import __version__
from genpulse.errors import LedgerUnavailable, ObjectNotFound
from genpulse.ledger import IdempotencyConflict, SourceGone
from genpulse.model import Output, Task, TaskStatus
from genpulse.storage import InvalidKey, check_key
from genpulse.tasks.submit import accept, retry, retry_matching
from genpulse.web import access, schemas
from genpulse.web.answers import etag as _etag
from genpulse.web.answers import json_answer as _json
from genpulse.web.answers import link as _link
from genpulse.web.answers import with_etag as _with_etag
from genpulse.web.bodies import read_upload
from genpulse.web.contract import Contract, Routes, answer, bytes_answer, empty_answer
from genpulse.web.files import send_stored
from genpulse.web.problems import Problem, unavailable
from genpulse.web.service import service
from genpulse.web.waiting import wait_reason

__all__ = ["MODELS", "ROUTES", "await_task", "connection"]

ROUTES = Routes()

MODELS: tuple[type[BaseModel], ...] = (
    schemas.Accepted,
    schemas.AssetView,
    schemas.Health,
    schemas.ProblemView,
    schemas.Retried,
    schemas.RetryBody,
    schemas.RetryReport,
    schemas.StatusView,
    schemas.SubmitBody,
    schemas.TaskList,
    schemas.TaskTypes,
    schemas.TaskView,
)
"""Every model that the published document names."""

POLL_S = 1
"""``Retry-After`` of a 202: when it is worth asking again."""

TASK_CODES = {
    422: (
        "invalid_request",
        "invalid_workflow",
        "workflow_format_ui",
        "unknown_task_type",
        "unknown_input",
        "missing_asset",
        "unsafe_url",
        "idempotency_key_reuse",
    ),
    409: ("not_final",),
}
"""Problems of what makes a task of words."""

_UUID = re.compile(schemas.UUID_PATTERN)


@ROUTES.add(
    "POST",
    "/task",
    tag="Tasks",
    answers={
        200: answer(
            schemas.TaskView,
            "With `Prefer: wait=N`: the task is durably recorded, and final by now.",
            Location="Where the task is read.",
            Idempotency_Replayed="`true` where the key brought back an earlier task.",
            Preference_Applied="`wait=N`, as long as it was willing to wait.",
        ),
        202: answer(
            schemas.Accepted,
            "The task is durably recorded.",
            Location="Where the task is read.",
            Retry_After="Seconds after which it is worth asking.",
            Idempotency_Replayed="`true` where the key brought back an earlier task.",
            Preference_Applied="`wait=N` if it waited so long, and the task is not final.",
        ),
    },
    refusals=(400, 413, 415, 422, 429),
    codes=TASK_CODES,
)
def submit_task(header: schemas.WaitingHeaders, body: schemas.SubmitBody) -> Response:
    """
    Submit a task.

    With `Prefer: wait=N` the answer is held until the task is final, for at most N seconds. Where all
    places of watchers are taken it is not held, and says so by the lack of `Preference-Applied`.
    """
    here = service()
    if body.task_type not in here.registry:
        detail = f"There is no such task type; there are: {', '.join(here.registry.types())}."
        raise Problem(422, "unknown_task_type", detail, errors=[("/task_type", "is not registered")])
    try:
        task, replayed = accept(
            here.ledger,
            here.registry,
            here.settings,
            body.model_dump(exclude_unset=True),
            owner=access.owner(),
            idempotency_key=header.idempotency_key,
            api_key=access.caller().key_id,
            room=access.room,
        )
    except IdempotencyConflict:
        raise _key_reused() from None
    if not replayed:
        here.wake()
    if not header.wait_s:
        return _accepted(schemas.Accepted, task, replayed=replayed)
    try:
        # An earlier one may be final, and came without its outputs.
        now = _task(task.id) if replayed else task
        found, waited = await_task(now, header.wait_s, _is_final)
    except LedgerUnavailable:  # to wait is a courtesy: what is recorded is accepted
        return _accepted(schemas.Accepted, task, replayed=replayed)
    given = (
        _json(_view(found), 200, {"Location": _link("read_task", task_id=task.id)})
        if _is_final(found)
        else _accepted(schemas.Accepted, found, replayed=replayed)
    )
    if replayed:
        given.headers["Idempotency-Replayed"] = "true"
    if waited:
        given.headers["Preference-Applied"] = f"wait={header.wait_s}"
    return given


def _accepted(shape: type[schemas.Accepted], task: Task, *, replayed: bool, **more: Any) -> Response:
    """202 for a task that is recorded now, or was before."""
    links = schemas.urls(task.id, _link)
    position = None
    with contextlib.suppress(LedgerUnavailable):  # a courtesy, and no reason to send the task again
        position = _position(task)
    view = shape(
        task_id=task.id,
        status=task.status,
        message="The task was recorded before." if replayed else "The task is recorded.",
        created_at=task.created_at,
        queue=task.queue,
        queue_position=position,
        urls=schemas.Urls(**links),
        **more,
    )
    headers = {"Location": links["self"], "Retry-After": str(POLL_S)}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    return _json(view, 202, headers)


@ROUTES.add(
    "GET",
    "/task",
    tag="Tasks",
    answers={
        200: answer(schemas.TaskList, "A page of tasks, newest first.", ETag="Changes with the page."),
        304: empty_answer("Nothing changed since `If-None-Match`."),
    },
    refusals=(422,),
)
def list_tasks(query: schemas.ListQuery) -> Response:
    """
    List one's own tasks, newest first.

    The filters are joined by "and"; several statuses by "or". Where filters leave little, a page may be
    short or even empty and still have a `next_cursor`: no page looks at more than 10,000 tasks.
    """
    here = service()
    task_type = query.task_type
    if task_type is not None and task_type in here.registry:
        task_type = here.registry.get(task_type).task_type
    page = here.ledger.list_tasks(
        access.owner(),
        statuses=[TaskStatus(each) for each in query.status],
        task_type=task_type,
        labels=query.metadata,
        batch_id=query.batch_id,
        created_after=query.created_after,
        created_before=query.created_before,
        before_id=query.cursor,
        limit=query.limit,
    )
    view = schemas.TaskList(
        tasks=[
            schemas.TaskSummary(**schemas.task_summary(task, _link, here.settings.retention))
            for task in page.tasks
        ],
        next_cursor=page.next_id,
        next=page.next_id and _link("list_tasks", **{**request.args, "cursor": page.next_id}),
    )
    return _with_etag(_json(view))


@ROUTES.add(
    "GET",
    "/task/<task_id>",
    tag="Tasks",
    answers={
        200: answer(schemas.TaskView, "The task as it is now.", ETag="Changes with the task."),
        304: empty_answer("Nothing changed since `If-None-Match`."),
    },
    refusals=(404, 422),
)
def read_task(path: schemas.TaskPath, query: schemas.ReadQuery) -> Response:
    """
    Read a task.

    With `wait` it is a long poll: the answer comes when the task is final or the time is over. With
    `If-None-Match`, too, it comes as soon as state or progress differ from that, and is 304 if they do not.
    Where all places of watchers are taken it answers at once.
    """
    task = _task(path.task_id)
    if query.wait:
        known = request.if_none_match
        task, _ = await_task(
            task,
            query.wait,
            lambda found: not known.contains_weak(_etag(_json(_view(found)))) if known else _is_final(found),
        )
    return _with_etag(_json(_view(task)))


@ROUTES.add(
    "POST",
    "/task/<task_id>/cancel",
    tag="Tasks",
    answers={
        200: answer(schemas.TaskView, "The task is final: canceled now, or ended before."),
        202: answer(schemas.TaskView, "The task is being stopped.", Retry_After="Seconds."),
    },
    refusals=(404,),
)
def cancel_task(path: schemas.TaskPath) -> Response:
    """Cancel a task; safe to repeat."""
    task = service().ledger.cancel(_known(path.task_id), access.owner())
    if task is None:
        raise _unknown_task()
    if task.status.is_final:
        service().live.touch(task.id)
        return _json(_view(task))
    service().announce_cancel()
    return _json(_view(task), 202, {"Retry-After": str(POLL_S)})


@ROUTES.add(
    "POST",
    "/task/<task_id>/retry",
    tag="Tasks",
    answers={
        202: answer(
            schemas.Retried,
            "The new task is durably recorded; the old one stays as it is.",
            Location="Where the new task is read.",
            Retry_After="Seconds after which it is worth asking.",
            Idempotency_Replayed="`true` where the key brought back an earlier task.",
        )
    },
    refusals=(404, 409, 422, 429),
    codes=TASK_CODES,
)
def retry_task(path: schemas.TaskPath, header: schemas.SubmitHeaders) -> Response:
    """
    Send a final task again, as a new one.

    Type, params, priority, timeout, attempts, metadata and callback are the old one's.
    """
    here = service()
    former = _task(path.task_id, with_params=True)
    try:
        task, replayed = retry(
            here.ledger,
            here.registry,
            here.settings,
            former,
            idempotency_key=header.idempotency_key,
            api_key=access.caller().key_id,
            room=access.room,
        )
    except IdempotencyConflict:
        raise _key_reused() from None
    if not replayed:
        here.wake()
    return _accepted(schemas.Retried, task, replayed=replayed, retry_of=former.id)


@ROUTES.add(
    "POST",
    "/task/retry",
    tag="Tasks",
    answers={
        200: answer(schemas.RetryReport, "A dry run: what would be sent again."),
        202: answer(schemas.RetryReport, "The new tasks are durably recorded."),
    },
    refusals=(400, 413, 415, 422, 429),
)
def retry_tasks(body: schemas.RetryBody) -> Response:
    """
    Send final tasks again by filter, the oldest first.

    A task that has a retry already is left alone, so that the call may be repeated safely.
    """
    here = service()
    found = retry_matching(
        here.ledger,
        here.registry,
        here.settings,
        owner=access.owner(),
        status=TaskStatus(body.status),
        error_code=body.error_code,
        task_type=body.task_type,
        created_after=body.created_after,
        created_before=body.created_before,
        after_id=body.cursor,
        again=body.again,
        limit=body.limit,
        dry_run=body.dry_run,
        room=access.room,
    )
    if found.made:
        here.wake()
    refused = {each.task_id for each in found.refused}
    pairs = (
        [(former, None) for former in found.matched if former not in refused]
        if body.dry_run
        else [(task.retry_of, task.id) for task in found.made]
    )
    report = schemas.RetryReport(
        retried=[schemas.RetryPair(retry_of=str(former), task_id=new) for former, new in pairs],
        refused=[
            schemas.RetryRefusal(task_id=each.task_id, code=each.code, detail=each.detail)
            for each in found.refused
        ],
        next_cursor=found.matched[-1] if found.more else None,
    )
    return _json(report, 200 if body.dry_run else 202)


@ROUTES.add(
    "DELETE",
    "/task/<task_id>",
    tag="Tasks",
    answers={204: empty_answer("The task is gone, and its files go with it.")},
    refusals=(404, 409),
    codes={409: ("not_final",)},
)
def delete_task(path: schemas.TaskPath) -> Response:
    """Delete a final task and its outputs."""
    status = service().ledger.delete_task(_known(path.task_id), access.owner())
    if status is None:
        raise _unknown_task()
    if not status.is_final:
        raise Problem(409, "not_final", f"The task is {status}; cancel it first.")
    return Response(status=204)


@ROUTES.add(
    "GET",
    "/task/<task_id>/outputs/<index>",
    tag="Outputs",
    answers={
        200: bytes_answer("The bytes.", ETag="The content's digest.", Content_Disposition="The file's name."),
        206: bytes_answer("The range that was asked for.", Content_Range="Which bytes these are."),
        302: empty_answer("A freshly signed link of the object store.", Location="The link."),
        304: empty_answer("The bytes are those of `If-None-Match`."),
    },
    refusals=(404, 410, 412, 416),
)
def read_output(path: schemas.OutputPath) -> Response:
    """Read the bytes of an output; the address is stable as long as the task exists."""
    here = service()
    task = here.ledger.get(_known(path.task_id), access.owner(), with_params=False)
    if task is None:
        if here.ledger.was_deleted(_known(path.task_id), access.owner()):
            raise Problem(410, detail="The task was deleted, and its files with it.")
        raise _unknown_task()
    output = next((output for output in task.outputs if output.index == path.index), None)
    if output is None:
        raise Problem(404, detail="The task has no output of this number.")
    return _stored(output)


@ROUTES.add(
    "POST",
    "/storage/upload",
    tag="Assets",
    answers={201: answer(schemas.AssetView, "The file is stored.", Location="Where its bytes are.")},
    refusals=(400, 413, 415, 422),
    codes={400: ("invalid_form",), 422: ("invalid_request", "missing_asset")},
    request_body={
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary", "minLength": 1}},
                }
            }
        },
    },
)
def upload_asset() -> Response:
    """Store a file for use in tasks, as `asset:<id>`."""
    here = service()
    owner = access.owner()
    here.admission.check_disk()
    with read_upload(here.settings.max_upload_bytes) as upload:
        asset = here.ledger.reuse_asset(
            owner=owner, name=upload.name, content_type=upload.content_type, sha256=upload.sha256
        )
        if asset is None:
            asset_id, key = here.ledger.expect_asset(owner, upload.sha256, upload.extension)
            here.storage.upload_file(
                key, upload.stream, content_type=upload.content_type, filename=upload.name
            )
            try:
                asset = here.ledger.add_asset(
                    asset_id=asset_id,
                    owner=owner,
                    key=key,
                    name=upload.name,
                    content_type=upload.content_type,
                    size_bytes=upload.size_bytes,
                    sha256=upload.sha256,
                )
            except SourceGone:
                raise unavailable("The storage took too long to take the file; send it again.") from None
        elif not _is_stored(asset.key):  # somebody took the bytes away; here they are again
            here.storage.upload_file(
                asset.key, upload.stream, content_type=upload.content_type, filename=upload.name
            )
    url = (
        here.storage.get_url(asset.key, filename=asset.name)
        if here.storage.signs_urls
        else _link("read_asset", key=asset.key)
    )
    view = schemas.AssetView(
        id=asset.id,
        url=url,
        key=asset.key,
        name=asset.name,
        content_type=asset.content_type,
        size_bytes=asset.size_bytes,
        sha256=asset.sha256,
    )
    return _json(view, 201, {"Location": url})


@ROUTES.add(
    "GET",
    "/static/assets/<path:key>",
    tag="Assets",
    answers={
        200: bytes_answer("The bytes.", ETag="The content's digest."),
        206: bytes_answer("The range that was asked for.", Content_Range="Which bytes these are."),
        304: empty_answer("The bytes are those of `If-None-Match`."),
    },
    refusals=(404, 410, 412, 416),
)
def read_asset(path: schemas.KeyPath) -> Response:
    """Read a file of the local storage: one's own asset, or an output of one's own task."""
    here = service()
    unknown = Problem(404, detail="There is no such file.")
    try:
        key = check_key(path.key)
    except InvalidKey:
        raise unknown from None
    if here.storage.signs_urls:
        raise unknown
    if (asset := here.ledger.find_asset(key)) and asset.owner == access.owner():
        return _send(key, asset.content_type, asset.size_bytes, asset.sha256, asset.name)
    # An attempt that lost its lease leaves files that no task names; those are nobody's.
    if (found := here.ledger.find_output(key)) and found[0] == access.owner():
        return _stored(found[1])
    raise unknown


@ROUTES.add(
    "GET", "/task-types", tag="System", answers={200: answer(schemas.TaskTypes, "The registered task types.")}
)
def list_task_types() -> Response:
    """List the task types, their queues and the schema of their params."""
    found = [
        schemas.TaskTypeView(
            task_type=handler.task_type,
            aliases=list(handler.aliases),
            queue=handler.queue,
            summary=handler.summary,
            params_schema=handler.params_model.model_json_schema(),
        )
        for handler in service().registry
    ]
    return _json(schemas.TaskTypes(task_types=found))


@ROUTES.add(
    "GET",
    "/health",
    tag="System",
    answers={200: answer(schemas.Health, "The process answers.")},
    is_open=True,
)
def health() -> Response:
    """Tell that this process lives; asks nobody else."""
    return _json(schemas.Health(status="ok"))


@ROUTES.add(
    "GET",
    "/ready",
    tag="System",
    answers={
        200: answer(schemas.StatusView, "This process accepts tasks."),
        503: answer(
            schemas.StatusView, "The ledger is away, or the process is stopping.", Retry_After="Seconds."
        ),
    },
    is_open=True,
)
def ready() -> Response:
    """Tell whether this process can accept; 202 goes on without broker and workers."""
    view = _status(full=access.may("admin"))
    return _json(view) if view.accepting else _json(view, 503, {"Retry-After": "2"})


@ROUTES.add(
    "GET",
    "/status",
    tag="System",
    answers={200: answer(schemas.StatusView, "What works and what does not.")},
    is_open=True,
)
def status() -> Response:
    """Tell what works; queues, workers and servers are for keys with the scope `admin` only."""
    return _json(_status(full=access.may("admin")))


@ROUTES.add("GET", "/openapi.json", documented=False, for_people=True)
def openapi() -> Response:
    """Answer the contract."""
    document = cast("Contract", current_app).api_doc
    return Response(json.dumps(document), content_type="application/json")


@ROUTES.add("GET", "/", is_open=True, documented=False)
def index() -> Response:
    """Point on."""
    pages = {name: _link(name) for name in ("docs", "openapi", "status")}
    return Response(
        json.dumps({"name": "GenPulse", "version": __version__, **pages}), content_type="application/json"
    )


def _known(task_id: str) -> str:
    # Not match: "$" is also fulfilled before a line break at the end.
    if not _UUID.fullmatch(task_id):
        raise _unknown_task()
    return task_id.lower()


def _task(task_id: str, *, with_params: bool = False) -> Task:
    task = service().ledger.get(_known(task_id), access.owner(), with_params=with_params)
    if task is None:
        raise _unknown_task()
    return task


def _key_reused() -> Problem:
    detail = "This Idempotency-Key was used before with another body."
    return Problem(422, "idempotency_key_reuse", detail)


def _unknown_task() -> Problem:
    # The same for somebody else's task: its very existence is not the caller's business.
    return Problem(404, detail="There is no task of this id.")


def _position(task: Task) -> int | None:
    return service().ledger.queue_position(task)


def _view(task: Task) -> schemas.TaskView:
    here = service()
    live = None
    if task.status is TaskStatus.PROCESSING:
        live = here.farthest.of(task.id, task.attempt, here.live.progress(task.id))
    elif task.status.is_final:
        here.farthest.forget(task.id)
    position = _position(task)
    return schemas.task_view(
        task,
        _link,
        live=live,
        position=position,
        reason=wait_reason(task, position),
        retention=here.settings.retention,
    )


def _stored(output: Output) -> Response:
    here = service()
    if here.storage.signs_urls:
        signed = here.storage.get_url(output.key, filename=output.name, content_type=output.content_type)
        return Response(status=302, headers={"Location": signed, "Cache-Control": "no-store"})
    return _send(output.key, output.content_type, output.size_bytes, output.sha256, output.name)


def _is_stored(key: str) -> bool:
    with contextlib.suppress(ObjectNotFound):
        return service().storage.stat(key).key == key
    return False


def _send(key: str, content_type: str, size_bytes: int, sha256: str, name: str) -> Response:
    try:
        return send_stored(
            service().storage, key, content_type=content_type, size_bytes=size_bytes, sha256=sha256, name=name
        )
    except ObjectNotFound:
        raise Problem(410, detail="The file was deleted.") from None


def _status(*, full: bool) -> schemas.StatusView:
    here = service()
    found = here.conditions.now(closely=full)
    # Never remembered: whoever sends requests here has to learn of it at once.
    stopping = here.is_stopping()
    accepting = found.accepting and not stopping
    problems = [*(["This process is stopping."] if stopping else []), *found.problems]
    return schemas.StatusView(
        status="down" if not accepting else "degraded" if problems else "ok",
        version=__version__,
        accepting=accepting,
        problems=problems if full else [],
        **(found.details if full else {}),
    )


def await_task(task: Task, wait_s: float, enough: Callable[[Task], bool]) -> tuple[Task, bool]:
    """
    The task as soon as it is *enough*, or as it is after *wait_s* seconds; and whether that was waited for.

    It is not where every place of a watcher is taken, or all that the caller's owner may have.
    """
    if enough(task):
        return task, True
    here = service()
    watch = here.watchers.enter(
        task.id, owner=access.owner(), shared=access.shared(), connection=connection()
    )
    if watch is None:
        return task, False
    with watch:
        found = watch.until(enough, min(wait_s, here.settings.watch_s))
    if found is None:
        raise _unknown_task()
    return found, True


def connection() -> Any:
    """The caller's socket, where the server shows it."""
    return request.environ.get("gunicorn.socket")


def _is_final(task: Task) -> bool:
    return task.status.is_final
