"""
What the published document shows by example: each answer, each parameter, each problem.

A test holds every one of them against its schema.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ANSWERS", "PARAMETERS", "PROBLEMS"]

_TASK_ID = "019ab3c4-0000-7000-8000-000000000001"
_BATCH_ID = "019ab3c4-0000-7000-8000-0000000000b1"
_AT = "https://pulse.example"
_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_WORKFLOW = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 7, "steps": 20, "model": ["4", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "model.safetensors"}},
    "6": {
        "class_type": "CLIPTextEncode",
        "inputs": {"text": "a fox", "clip": ["4", 1]},
        "_meta": {"title": "INPUT_prompt"},
    },
}


def _urls(task_id: str) -> dict[str, str]:
    address = f"{_AT}/task/{task_id}"
    return {"self": address, "events": f"{address}/events", "cancel": f"{address}/cancel"}


_ACCEPTED = {
    "task_id": _TASK_ID,
    "status": "pending",
    "message": "The task is recorded.",
    "created_at": "2026-10-31T12:00:00Z",
    "queue": "comfy",
    "queue_position": 4,
    "urls": _urls(_TASK_ID),
}
_SUMMARY: dict[str, Any] = {
    "task_id": _TASK_ID,
    "task_type": "comfyui",
    "status": "completed",
    "priority": "normal",
    "queue": "comfy",
    "error": None,
    "attempt": 1,
    "max_attempts": 3,
    "created_at": "2026-10-31T12:00:00Z",
    "started_at": "2026-10-31T12:00:02Z",
    "completed_at": "2026-10-31T12:00:09Z",
    "updated_at": "2026-10-31T12:00:09Z",
    "expires_at": None,
    "retry_of": None,
    "batch_id": None,
    "metadata": {"project": "foxes"},
    "urls": _urls(_TASK_ID),
}
_TASK = _SUMMARY | {
    "queue_position": None,
    "wait_reason": None,
    "progress": 100.0,
    "progress_detail": None,
    "result": {
        "prompt_id": "5b8d7f6e-2f3c-4a1b-9c0d-1e2f3a4b5c6d",
        "images": [f"{_AT}/task/{_TASK_ID}/outputs/0"],
        "image_url": f"{_AT}/task/{_TASK_ID}/outputs/0",
    },
    "outputs": [
        {
            "index": 0,
            "node_id": "9",
            "name": "fox_00001_.png",
            "kind": "image",
            "content_type": "image/png",
            "size_bytes": 1_403_221,
            "sha256": _DIGEST,
            "width": 1024,
            "height": 1024,
            "url": f"{_AT}/task/{_TASK_ID}/outputs/0",
        }
    ],
    "attempts": [
        {
            "number": 1,
            "worker": "worker@gpu1:4711",
            "server": "gpu1",
            "started_at": "2026-10-31T12:00:02Z",
            "ended_at": "2026-10-31T12:00:09Z",
            "outcome": "completed",
            "error_code": None,
            "progress": None,
        }
    ],
    "timings": {"queue_s": 2.04, "run_s": 6.31, "store_s": 0.22},
}
_BODY = {
    "task_type": "comfyui",
    "params": {"workflow": _WORKFLOW, "inputs": {"prompt": "a red fox in the snow", "3.seed": 42}},
    "priority": "high",
    "metadata": {"project": "foxes"},
}
_BATCH_URLS = {
    "self": f"{_AT}/batch/{_BATCH_ID}",
    "tasks": f"{_AT}/task?batch_id={_BATCH_ID}",
    "cancel": f"{_AT}/batch/{_BATCH_ID}/cancel",
}

ANSWERS: dict[str, list[Any]] = {
    "Accepted": [_ACCEPTED],
    "AssetView": [
        {
            "id": "019ab3c4-0000-7000-8000-0000000000a1",
            "url": f"{_AT}/static/assets/assets/default/{_DIGEST}/019ab3c4-0000-7000-8000-0000000000a1.png",
            "key": f"assets/default/{_DIGEST}/019ab3c4-0000-7000-8000-0000000000a1.png",
            "name": "cat.png",
            "content_type": "image/png",
            "size_bytes": 48_112,
            "sha256": _DIGEST,
        }
    ],
    "BatchAccepted": [
        {
            "batch_id": _BATCH_ID,
            "status": "pending",
            "message": "The tasks are recorded.",
            "created_at": "2026-10-31T12:00:00Z",
            "total": 2,
            "task_ids": [_TASK_ID, "019ab3c4-0000-7000-8000-000000000002"],
            "urls": _BATCH_URLS,
        }
    ],
    "BatchBody": [
        {
            "template": {"task_type": "comfyui", "params": {"workflow": _WORKFLOW}},
            "grid": {"inputs.3.seed": [1, 2, 3], "inputs.prompt": ["a red fox", "a grey wolf"]},
        },
        {"tasks": [_BODY]},
    ],
    "BatchView": [
        {
            "batch_id": _BATCH_ID,
            "status": "processing",
            "created_at": "2026-10-31T12:00:00Z",
            "updated_at": "2026-10-31T12:00:09Z",
            "completed_at": None,
            "total": 2,
            "counts": {
                "pending": 1,
                "processing": 0,
                "completed": 1,
                "failed": 0,
                "canceled": 0,
                "deleted": 0,
            },
            "progress": 50.0,
            "grid": ["inputs.3.seed"],
            "tasks": [{**_SUMMARY, "batch_id": _BATCH_ID, "index": 0, "values": {"inputs.3.seed": 1}}],
            "next_cursor": "0",
            "next": f"{_AT}/batch/{_BATCH_ID}?limit=1&cursor=0",
            "urls": _BATCH_URLS,
        }
    ],
    "DeliveryList": [
        {
            "deliveries": [
                {
                    "id": "019ab3c4-5d6e-7f80-9123-456789abcdef",
                    "task_id": _TASK_ID,
                    "event_type": "task.completed",
                    "url": "https://example.org/hooks/genpulse",
                    "status": "delivered",
                    "tries": 1,
                    "attempts": 1,
                    "created_at": "2026-10-31T12:00:09Z",
                    "next_at": None,
                    "ended_at": "2026-10-31T12:00:10Z",
                }
            ],
            "next_cursor": None,
        }
    ],
    "Health": [{"status": "ok"}],
    "Retried": [{**_ACCEPTED, "task_id": "019ab3c4-0000-7000-8000-000000000002", "retry_of": _TASK_ID}],
    "RetryBody": [{"status": "failed", "error_code": "server_lost", "dry_run": True}],
    "RetryReport": [
        {
            "retried": [{"retry_of": _TASK_ID, "task_id": "019ab3c4-0000-7000-8000-000000000002"}],
            "refused": [],
            "next_cursor": None,
        }
    ],
    "StatusView": [{"status": "ok", "version": "1.0.0", "accepting": True, "problems": []}],
    "SubmitBody": [_BODY],
    "TaskList": [{"tasks": [_SUMMARY], "next_cursor": None, "next": None}],
    "TaskTypes": [
        {
            "task_types": [
                {
                    "task_type": "comfyui",
                    "aliases": ["comfy-workflow"],
                    "queue": "comfy",
                    "summary": "Run a ComfyUI workflow and store every picture, video, sound and text it makes.",
                    "params_schema": {"type": "object"},
                }
            ]
        }
    ],
    "TaskView": [_TASK],
    "WebhookEvent": [{"type": "task.completed", "timestamp": "2026-10-31T12:00:09Z", "data": _TASK}],
}
"""By the name of the model; a model may carry examples of its own instead."""

PARAMETERS: dict[str, Any] = {
    "Idempotency-Key": "order-4711",
    "Last-Event-ID": "1793448001870-0.r1",
    "Prefer": "wait=30",
    "batch_id": _BATCH_ID,
    "created_after": "2026-10-31T12:00:00Z",
    "created_before": "2026-11-01T12:00:00+01:00",
    "cursor": _TASK_ID,
    "delivery_id": "019ab3c4-5d6e-7f80-9123-456789abcdef",
    "index": 0,
    "key": f"assets/default/{_DIGEST}/019ab3c4-0000-7000-8000-0000000000a1.png",
    "limit": 50,
    "metadata": {"project": "foxes"},
    "preview": True,
    "status": "failed",
    "task_id": _TASK_ID,
    "task_type": "comfyui",
    "wait": 30,
}
"""By name, where the parameter's model gives none."""

PROBLEMS: dict[str, str] = {
    "bad_request": "The request could not be understood.",
    "conflict": "The request does not fit the state of what it is about.",
    "forbidden": "This takes a key with the scope submit.",
    "gone": "The file was deleted.",
    "idempotency_key_reuse": "This Idempotency-Key was used before with another body.",
    "internal": "Something went wrong here, and it was logged.",
    "invalid_form": "The multipart form is broken.",
    "invalid_json": "The body is not JSON: Expecting value at line 1, column 1.",
    "invalid_request": "query:limit: Input should be less than or equal to 200",
    "invalid_workflow": 'the workflow is not valid: /3/inputs/model: is a link to node "9", which is not there',
    "missing_asset": "There is no asset:019ab3c4-0000-7000-8000-0000000000a1.",
    "not_final": "The task is processing; only a final one can be sent again.",
    "not_found": "There is no task of this id.",
    "precondition_failed": "The file is not the one that If-Match names.",
    "queue_full": "This owner has 10000 tasks waiting at most; send more when some are done.",
    "range_not_satisfiable": "The file has 1403221 bytes.",
    "rate_limited": "This owner may submit 100 per 1 second.",
    "request_timeout": "The body came too slowly.",
    "too_large": "The body is larger than 16777216 bytes.",
    "unauthenticated": "Send the API key as Authorization: Bearer <key>.",
    "unavailable": "The ledger does not answer just now; nothing was accepted.",
    "unknown_input": 'there is no input "promt"; the inputs are: prompt, 3.seed, 3.steps',
    "unknown_task_type": "There is no such task type; there are: comfyui, image-convert.",
    "unsafe_url": "/callback_url: the address is not one that GenPulse goes to.",
    "unsupported_media_type": "Send the body as application/json.",
    "workflow_format_ui": "this is a workflow in UI format; export it in API format",
}
"""A sentence of each problem, by its code: every code there is."""
