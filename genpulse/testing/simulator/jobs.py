"""
The jobs API of newer servers (``/api/jobs``): queue and history under one shape, and an atomic cancel.

Source: ``PROTOCOL`` section 11, read in ComfyUI's main branch around 0.38; not recorded from a running one.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

from aiohttp import web

from genpulse.testing.simulator.journal import Journal
from genpulse.testing.simulator.prompts import PromptQueue

__all__ = ["JobsApi"]

_STATUSES = ("pending", "in_progress", "completed", "failed", "cancelled")


class JobsApi:
    """Handlers for aiohttp; *interrupt* stops what runs."""

    def __init__(self, queue: PromptQueue, journal: Journal, interrupt: Callable[[], None]) -> None:
        self._queue = queue
        self._journal = journal
        self._interrupt = interrupt

    async def list(self, request: web.Request) -> web.Response:
        """``GET /api/jobs``: newest first, filtered and paged by the query."""
        query = request.rel_url.query
        wanted = [s.strip() for s in query["status"].split(",")] if query.get("status") else None
        if wanted and any(status not in _STATUSES for status in wanted):
            return web.json_response(
                {"error": f"Invalid status value(s). Must be one of: {list(_STATUSES)}"}, status=400
            )
        try:
            limit = int(query["limit"]) if "limit" in query else None
            offset = max(0, int(query.get("offset", "0")))
        except ValueError:
            return web.json_response({"error": "limit and offset must be integers"}, status=400)
        if limit is not None and limit <= 0:
            return web.json_response({"error": "limit must be positive"}, status=400)
        jobs = [job for job in self._jobs().values() if wanted is None or job["status"] in wanted]
        if query.get("workflow_id"):
            jobs = [job for job in jobs if job.get("workflow_id") == query["workflow_id"]]
        by = "execution_duration" if query.get("sort_by") == "execution_duration" else "created_at"
        jobs.sort(key=lambda job: _sort_value(job, by), reverse=query.get("sort_order", "desc") == "desc")
        page = jobs[offset:] if limit is None else jobs[offset : offset + limit]
        pagination = {
            "offset": offset,
            "limit": limit,
            "total": len(jobs),
            "has_more": offset + len(page) < len(jobs),
        }
        return web.json_response({"jobs": page, "pagination": pagination})

    async def get(self, request: web.Request) -> web.Response:
        """``GET /api/jobs/{id}``: one job with its outputs and workflow."""
        job_id = request.match_info["job_id"]
        job = self._jobs(full=True).get(job_id)
        if job is None:
            return web.json_response({"error": "Job not found"}, status=404)
        return web.json_response(job)

    async def cancel(self, request: web.Request) -> web.Response:
        """``POST /api/jobs/{id}/cancel``: pending or running; false when it is neither."""
        return web.json_response({"cancelled": self._cancel(request.match_info["job_id"])})

    async def cancel_many(self, request: web.Request) -> web.Response:
        """``POST /api/jobs/cancel``: all of ``job_ids``; 400 if one of them is no UUID."""
        try:
            job_ids = (await request.json())["job_ids"]
            for job_id in job_ids:
                uuid.UUID(job_id)
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            return web.json_response({"error": "job_ids must be a list of UUIDs"}, status=400)
        cancelled = [self._cancel(job_id) for job_id in job_ids]
        return web.json_response({"cancelled": any(cancelled)})

    def _cancel(self, job_id: str) -> bool:
        gone = self._queue.delete(job_id)
        if gone is not None:
            self._journal.add("deleted", job_id, gone[3].get("client_id"))
            return True
        if job_id in self._queue.running_ids():
            self._interrupt()
            return True
        return False

    def _jobs(self, *, full: bool = False) -> dict[str, dict[str, Any]]:
        running, pending = self._queue.listing()
        jobs = {job_id: _ended(job_id, entry, full=full) for job_id, entry in self._queue.history().items()}
        for items, status in ((pending, "pending"), (running, "in_progress")):
            for item in items:
                jobs[item[1]] = _waiting(item, status, full=full)
        return jobs


def _waiting(item: Any, status: str, *, full: bool) -> dict[str, Any]:
    job = {
        "id": item[1],
        "status": status,
        "priority": item[0],
        "create_time": item[3].get("create_time"),
        "outputs_count": 0,
        "workflow_id": _workflow_id(item[3]),
    }
    if full:
        job |= {"outputs": {}, "workflow": {"prompt": item[2], "extra_data": item[3]}}
    return {key: value for key, value in job.items() if value is not None}


def _ended(job_id: str, entry: dict[str, Any], *, full: bool) -> dict[str, Any]:
    number, _id, prompt, extra_data, _outputs = entry["prompt"]
    messages = dict(entry["status"]["messages"])
    error = messages.get("execution_error")
    status = "completed" if entry["status"]["completed"] else "failed"
    if "execution_interrupted" in messages:
        status = "cancelled"
    files = [
        item | {"nodeId": node_id, "mediaType": key}
        for node_id, outputs in entry["outputs"].items()
        for key, items in outputs.items()
        for item in items
        if isinstance(item, dict) and "filename" in item
    ]
    ends = [
        messages[m]
        for m in ("execution_success", "execution_error", "execution_interrupted")
        if m in messages
    ]
    job = {
        "id": job_id,
        "status": status,
        "priority": number,
        "create_time": extra_data.get("create_time"),
        "execution_start_time": messages.get("execution_start", {}).get("timestamp"),
        "execution_end_time": ends[0]["timestamp"] if ends else None,
        "execution_error": error,
        "outputs_count": len(files),
        "preview_output": files[0] if files else None,
        "workflow_id": _workflow_id(extra_data),
    }
    if full:
        job |= {
            "outputs": entry["outputs"],
            "execution_status": entry["status"],
            "workflow": {"prompt": prompt, "extra_data": extra_data},
        }
    return {key: value for key, value in job.items() if value is not None}


def _workflow_id(extra_data: dict[str, Any]) -> Any:
    info = extra_data.get("extra_pnginfo")
    workflow = info.get("workflow") if isinstance(info, dict) else None
    return workflow.get("id") if isinstance(workflow, dict) else None


def _sort_value(job: dict[str, Any], by: str) -> float:
    if by == "execution_duration":
        return float(job.get("execution_end_time", 0)) - float(job.get("execution_start_time", 0))
    return float(job.get("create_time", 0))
