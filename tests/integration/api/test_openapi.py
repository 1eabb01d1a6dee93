"""The published contract: valid, complete, and kept by every answer."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from openapi_spec_validator import validate

DOCUMENT_ONLY_FOR_PEOPLE = {"/", "/docs", "/docs/assets/{name}", "/openapi.json"}
"""Pages and the document itself, which the document does not describe."""


def rules(api: Any, prefix: str) -> set[tuple[str, str]]:
    """Method and path of every rule of a mount, as OpenAPI spells paths."""
    found = set()
    for rule in api.app.url_map.iter_rules():
        mount, _, _ = rule.endpoint.rpartition(".")
        if mount == ("v1" if prefix else "api"):
            path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule.removeprefix(prefix))
            found |= {(method, path) for method in rule.methods - {"HEAD", "OPTIONS"}}
    return found


def test_the_document_is_valid(lone_api: Any) -> None:
    """By the specification's own schema, every reference resolved."""
    document = lone_api.client.get("/openapi.json").json

    validate(document)
    assert document["openapi"] == "3.1.0"
    assert lone_api.client.get("/v1/openapi.json").json == document


def test_the_document_has_every_route_and_no_other(lone_api: Any) -> None:
    """What can be called is documented, at both mounts, and what is documented can be called."""
    document = lone_api.client.get("/openapi.json").json
    documented = {(method.upper(), path) for path, item in document["paths"].items() for method in item}

    routed = rules(lone_api, "")

    assert {call for call in routed if call[1] not in DOCUMENT_ONLY_FOR_PEOPLE} == documented
    assert rules(lone_api, "/v1") == routed
    assert {rule.endpoint.rpartition(".")[0] for rule in lone_api.app.url_map.iter_rules()} == {"api", "v1"}


def test_every_operation_is_named_and_tells_its_refusals(lone_api: Any) -> None:
    """A generated client has a method name, and knows the problem documents it may get."""
    document = lone_api.client.get("/openapi.json").json
    operations = [operation for item in document["paths"].values() for operation in item.values()]

    assert all(count == 1 for count in Counter(operation["operationId"] for operation in operations).values())
    for operation in operations:
        assert operation["summary"], operation["operationId"]
        for status, answer in operation["responses"].items():
            kinds = set(answer.get("content", {}))
            is_report = operation["operationId"] == "ready" and status == "503"
            assert (kinds == {"application/problem+json"}) is (int(status) >= 400 and not is_report)
        closed = "401" in operation["responses"]
        assert (operation.get("security") == [{"bearer": []}]) is closed


def test_every_state_of_a_task_fits_the_document(api: Any) -> None:
    """Also the states that generated calls never reach."""
    document = api.client.get("/openapi.json").json
    schema = {"$ref": "#/components/schemas/TaskView", "components": document["components"]}
    waiting, running, done, failed = (api.submit(expires_in_s=60)["task_id"] for _ in range(4))
    api.claim(running)
    api.complete(done, ("a.png", b"png", "image/png"))
    api.fail(failed)

    for task_id in (waiting, running, done, failed):
        jsonschema.validate(api.client.get(f"/task/{task_id}").json, schema)


def test_the_task_types_are_in_the_document(lone_api: Any) -> None:
    """A caller of this installation sees what this installation takes."""
    document = lone_api.client.get("/openapi.json").json

    assert document["components"]["schemas"]["SubmitBody"]["properties"]["task_type"]["enum"] == [
        "echo",
        "repeat",
    ]


def test_the_docs_page_needs_no_internet(lone_api: Any) -> None:
    """Every address on it is relative, and every file it asks for is here, at both mounts."""
    for prefix in ("", "/v1"):
        page = lone_api.client.get(f"{prefix}/docs")
        links = re.findall(r'(?:src|href)="([^"]+)"', page.text)

        assert page.status_code == 200
        assert "//" not in re.sub(r"<!doctype.*?>", "", page.text)
        assert len(links) >= 4
        for link in links:
            if link != "data:,":
                assert lone_api.client.get(f"{prefix}/{link}").status_code == 200, link
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]


@pytest.mark.timeout(240)
def test_generated_calls_get_what_the_document_promises(
    build: Any, sqlite_ledger_url: str, tmp_path: Any
) -> None:
    """
    Schemathesis, all checks: status codes, media types, headers and bodies as documented, no 500.

    It makes good and bad calls for each operation from the document alone.
    """
    import schemathesis
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

    # Watchers of tasks that nobody runs: not for long.
    api = build(sqlite_ledger_url, tmp_path / "data", api_key="a-plain-key", watch_s=0.05)
    schema = schemathesis.openapi.from_wsgi(
        "/openapi.json", api.app, headers={"Authorization": "Bearer a-plain-key"}
    )
    seen: Counter[str] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]  # an Err has none, which fails the test
        # What a task type's params must be stands in /task-types, not in this document.
        beyond = [positive_data_acceptance] if operation.label == "POST /task" else []
        if not operation.body:
            # A query that nobody reads is no mistake, and an "invalid" one may lose its fault when it
            # is written as a query string. test_api_tasks.py has the queries that are refused.
            beyond.append(negative_data_rejection)
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and operation.path in {"/health", "/ready", "/status"}:
                continue  # they take nothing, so nothing can be wrong

            _call_and_check(operation, mode, beyond, seen)
    api.service.ledger.close()
    assert seen["GET /task 200"] > 50
    assert seen["POST /task 202"] > 0, seen
    assert seen["POST /storage/upload 201"] > 0


def _call_and_check(operation: Any, mode: Any, excluded: list[Any], seen: Counter[str]) -> None:
    headers = {"Authorization": "Bearer a-plain-key"}

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        answer = case.call(headers=headers)
        seen[f"{case.operation.label} {answer.status_code}"] += 1
        case.validate_response(answer, headers=headers, excluded_checks=excluded)

    call()
