"""
Calls that nobody thought of, made from the published document alone.

A short round with every run of the tests; ``GENPULSE_FUZZ_EXAMPLES=300`` makes a long one, of so many
calls for each operation, and new ones each time.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    ignored_auth,
    negative_data_rejection,
    positive_data_acceptance,
)

KEY = "a-plain-key"
EXAMPLES = int(os.environ.get("GENPULSE_FUZZ_EXAMPLES", "0"))
WANTS_MORE_THAN_THE_DOCUMENT_SAYS = {"POST /task", "POST /task/batch"}
"""What a task type's params must be stands in ``/task-types``."""


@pytest.mark.timeout(240 + 40 * EXAMPLES)
@pytest.mark.parametrize("way", ["with the key", "without the key", "no key needed"])
def test_generated_calls_get_what_the_document_promises(
    build: Any, sqlite_ledger_url: str, tmp_path: Any, way: str
) -> None:
    """
    Schemathesis, all checks: status codes, media types, headers and bodies as documented, no 500.

    Good and bad calls for each operation, every other one about tasks, batches and outputs that exist.
    """
    # Watchers of tasks that nobody runs: not for long.
    needed = {} if way == "no key needed" else {"api_key": KEY}
    api = build(
        sqlite_ledger_url, tmp_path / "data", watch_s=0.05, wrong_keys=10**9, submit_rate="0", **needed
    )
    headers = {"Authorization": f"Bearer {KEY}"} if needed else {}
    there = _things(api, headers)
    schema = schemathesis.openapi.from_wsgi("/openapi.json", api.app, headers=headers)
    sent = headers if way != "without the key" else {}
    seen: Counter[str] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]  # an Err has none, which fails the test
        beyond: list[Any] = [] if needed else [ignored_auth, negative_data_rejection]
        if operation.label in WANTS_MORE_THAN_THE_DOCUMENT_SAYS or (not sent and needed):
            beyond.append(positive_data_acceptance)
        if not operation.body:
            # A query that nobody reads is no mistake, and an "invalid" one may lose its fault when it
            # is written as a query string. Other tests here have the queries that are refused.
            beyond.append(negative_data_rejection)
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and operation.path in {"/health", "/ready", "/status"}:
                continue  # they take nothing, so nothing can be wrong
            number = EXAMPLES or (10 if way == "with the key" else 3)
            _call_and_check(operation, mode, number, sent, there, beyond, seen)
    api.service.ledger.close()

    assert not [each for each in seen if each.endswith(" 500")]
    if way == "without the key":
        assert not [each for each in seen if "/task" in each and not each.endswith(" 401")]
    else:
        assert seen["GET /task 200"] > 0
        assert seen["POST /task 202"] + seen["POST /task 200"] > 0, seen
        assert seen["GET /batch/{batch_id} 200"] > 0, seen
        assert seen["POST /storage/upload 201"] > 0


def _things(api: Any, headers: dict[str, str]) -> dict[str, list[str]]:
    """Tasks in each state, and batches."""
    api.client.environ_base.update({f"HTTP_{name.upper()}": value for name, value in headers.items()})
    tasks = [api.submit()["task_id"] for _ in range(12)]
    for task_id in tasks[:4]:
        api.complete(task_id, ("a.png", b"png", "image/png"))
    for task_id in tasks[4:6]:
        api.fail(task_id)
    api.claim(tasks[6])
    body = {"template": {"task_type": "echo", "params": {}}, "grid": {"value": [1, 2, 3]}}
    batches = [api.client.post("/task/batch", json=body).json["batch_id"] for _ in range(2)]
    return {"task_id": tasks, "batch_id": batches}


def _call_and_check(  # what to call, how often, as whom, about what, and what to look at
    operation: Any,
    mode: Any,
    number: int,
    headers: dict[str, str],
    there: dict[str, list[str]],
    excluded: list[Any],
    seen: Counter[str],
) -> None:
    @settings(
        max_examples=number,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=not EXAMPLES,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        calls = seen.total()
        if calls % 2:
            for name, ids in there.items():
                if name in (case.path_parameters or {}):
                    case.path_parameters[name] = ids[calls // 2 % len(ids)]
        answer = case.call(headers=headers)
        seen[f"{case.operation.label} {answer.status_code}"] += 1
        # What these calls have deleted, or a key that they have used: the document cannot know.
        used = answer.status_code == 410 or "idempotency_key_reuse" in answer.text
        known = [positive_data_acceptance] if used else []
        case.validate_response(answer, headers=headers, excluded_checks=[*excluded, *known])

    call()
