"""What a caller may know and do about webhooks: the deliveries to their own ``callback_url``s."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any, Literal

from flask import Response
from pydantic import BaseModel, ConfigDict, Field

from genpulse.ledger import Delivery, DeliveryStatus
from genpulse.tasks.views import TaskView
from genpulse.web import access
from genpulse.web.api import ROUTES
from genpulse.web.contract import answer
from genpulse.web.problems import Problem
from genpulse.web.schemas import UUID_PATTERN
from genpulse.web.service import service

__all__ = ["MODELS", "WEBHOOKS"]

_UUID = re.compile(UUID_PATTERN)
_EXAMPLE: dict[str, Any] = {
    "id": "019ab3c4-5d6e-7f80-9123-456789abcdef",
    "task_id": "019ab3c4-0000-7000-8000-000000000001",
    "event_type": "task.completed",
    "url": "https://example.org/hooks/genpulse",
    "status": "pending",
    "tries": 1,
    "attempts": 1,
    "created_at": "2026-10-31T12:00:00Z",
    "next_at": "2026-10-31T12:00:05Z",
    "ended_at": None,
}
_EXAMPLE_TRY: dict[str, Any] = {
    "number": 1,
    "started_at": "2026-10-31T12:00:00Z",
    "duration_s": 0.12,
    "status_code": 503,
    "error": None,
    "excerpt": "try later",
}


class DeliveryPath(BaseModel):
    """A delivery by id."""

    delivery_id: str = Field(
        description="The delivery's id: the `webhook-id` of its tries.", json_schema_extra={"format": "uuid"}
    )


class DeliveryQuery(BaseModel):
    """Which of one's deliveries to list."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["pending", "delivered", "failed", "gone"] | None = None
    task_id: str | None = Field(None, pattern=UUID_PATTERN)
    limit: int = Field(50, ge=1, le=200)
    cursor: str | None = Field(None, pattern=UUID_PATTERN, description="`next_cursor` of the page before.")


class DeliveryTryView(BaseModel):
    """One try. One that has neither a status nor an error is under way."""

    model_config = ConfigDict(extra="forbid")

    number: int
    started_at: dt.datetime
    duration_s: float | None = Field(description="Seconds until it was over.")
    status_code: int | None = Field(description="What the receiver answered.")
    error: str | None = Field(description="Why there was no answer, or why it did not count.")
    excerpt: str | None = Field(description="The beginning of an answer that was not 2xx.")


class DeliveryView(BaseModel):
    """One event on its way to a `callback_url`."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [_EXAMPLE]})

    id: str
    task_id: str
    event_type: str
    url: str
    status: DeliveryStatus = Field(
        description="`failed`: tried as often as the schedule says. `gone`: the receiver answered 410."
    )
    tries: int = Field(description="In the schedule that runs now.")
    attempts: int = Field(description="Of all time.")
    created_at: dt.datetime
    next_at: dt.datetime | None = Field(description="When it will be tried next.")
    ended_at: dt.datetime | None


class DeliveryDetail(DeliveryView):
    """A delivery with the log of its tries."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{**_EXAMPLE, "log": [_EXAMPLE_TRY]}]}
    )

    log: list[DeliveryTryView]


class DeliveryList(BaseModel):
    """A page of deliveries, newest first."""

    model_config = ConfigDict(extra="forbid")

    deliveries: list[DeliveryView]
    next_cursor: str | None


class WebhookEvent(BaseModel):
    """The body of a webhook."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["task.completed", "task.failed", "task.canceled"]
    timestamp: dt.datetime = Field(description="When the task ended.")
    data: TaskView


MODELS: tuple[type[BaseModel], ...] = (DeliveryDetail, DeliveryList, DeliveryView, WebhookEvent)

_HEADER = {"in": "header", "required": True, "schema": {"type": "string"}}
WEBHOOKS: dict[str, Any] = {
    "task": {
        "post": {
            "summary": "A task with a `callback_url` has ended",
            "description": (
                "Sent by Standard Webhooks, at least once, to the task's `callback_url`. Answer with any 2xx "
                "within 15 s; 410 stops it; anything else, a redirect too, is tried again."
            ),
            "operationId": "task_webhook",
            "tags": ["Webhooks"],
            "parameters": [
                {**_HEADER, "name": "webhook-id", "description": "The same on every try."},
                {**_HEADER, "name": "webhook-timestamp", "description": "Seconds since 1970, of this try."},
                {
                    **_HEADER,
                    "name": "webhook-signature",
                    "description": "`v1,<base64>` for each secret, separated by spaces.",
                },
            ],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/WebhookEvent"}}},
            },
            "responses": {
                "2XX": {"description": "Received."},
                "410": {"description": "Send no more of this."},
            },
        }
    }
}
"""The document's ``webhooks``: what a receiver is sent."""


@ROUTES.add(
    "GET",
    "/webhooks/deliveries",
    tag="Webhooks",
    answers={200: answer(DeliveryList, "A page of deliveries, newest first.")},
    refusals=(422,),
)
def list_deliveries(query: DeliveryQuery) -> Response:
    """List the deliveries of one's own tasks, newest first."""
    found = service().ledger.list_deliveries(
        access.owner(),
        status=DeliveryStatus(query.status) if query.status else None,
        task_id=query.task_id,
        before_id=query.cursor,
        limit=query.limit + 1,
    )
    page = found[: query.limit]
    more = len(found) > len(page)
    return _json(
        DeliveryList(
            deliveries=[DeliveryView(**_fields(each)) for each in page],
            next_cursor=page[-1].id if more else None,
        )
    )


@ROUTES.add(
    "GET",
    "/webhooks/deliveries/<delivery_id>",
    tag="Webhooks",
    answers={200: answer(DeliveryDetail, "The delivery and its tries.")},
    refusals=(404,),
)
def read_delivery(path: DeliveryPath) -> Response:
    """Read a delivery with the log of its tries."""
    found = service().ledger.get_delivery(_known(path.delivery_id), access.owner())
    if found is None:
        raise _unknown()
    return _json(_detail(found))


@ROUTES.add(
    "POST",
    "/webhooks/deliveries/<delivery_id>/redeliver",
    tag="Webhooks",
    answers={202: answer(DeliveryDetail, "It will be tried at once, or is being tried this moment.")},
    refusals=(404,),
)
def redeliver(path: DeliveryPath) -> Response:
    """Deliver again, under the same id and with the schedule from its start; safe to repeat."""
    found = service().ledger.redeliver(_known(path.delivery_id), access.owner())
    if found is None:
        raise _unknown()
    service().wake()
    return _json(_detail(found), 202)


def _known(delivery_id: str) -> str:
    if not _UUID.fullmatch(delivery_id):
        raise _unknown()
    return delivery_id.lower()


def _unknown() -> Problem:
    # The same for somebody else's: its very existence is not the caller's business.
    return Problem(404, detail="There is no delivery of this id.")


def _fields(delivery: Delivery) -> dict[str, Any]:
    return {name: getattr(delivery, name) for name in DeliveryView.model_fields}


def _detail(delivery: Delivery) -> DeliveryDetail:
    log = [
        DeliveryTryView(**{name: getattr(each, name) for name in DeliveryTryView.model_fields})
        for each in delivery.log
    ]
    return DeliveryDetail(**_fields(delivery), log=log)


def _json(view: BaseModel, status: int = 200) -> Response:
    return Response(view.model_dump_json(), status=status, content_type="application/json")
