"""The published contract: valid, complete, and kept by every answer."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import validate

from genpulse.web import create_app, examples

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


def operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every operation, the webhooks too."""
    items = (*document["paths"].values(), *document["webhooks"].values())
    return [operation for item in items for operation in item.values()]


@pytest.fixture
def installed(lone_api: Any) -> dict[str, Any]:
    """The document with the task types that are installed."""
    app = create_app(lone_api.service.settings)
    document: dict[str, Any] = app.test_client().get("/openapi.json").get_json()
    app.extensions["genpulse"].ledger.close()
    return document


def test_every_body_and_parameter_has_an_example(installed: dict[str, Any]) -> None:
    """Whoever reads the page sees what is meant; bytes speak for themselves."""
    missing = []
    for operation in operations(installed):
        name = operation["operationId"]
        bodies = {"body": operation.get("requestBody", {}), **operation["responses"]}
        missing += [
            f"{name} {where} {kind}"
            for where, body in bodies.items()
            for kind, media in body.get("content", {}).items()
            if kind not in {"*/*", "multipart/form-data"} and not media.get("examples")
        ]
        if name != "task_webhook":
            missing += [
                f"{name} {parameter['name']}"
                for parameter in operation.get("parameters", [])
                if parameter.get("example") is None
            ]

    assert missing == []


def test_every_example_fits_its_schema(installed: dict[str, Any]) -> None:
    """What the document shows is what the document says."""
    document = installed

    def check(value: Any, schema: dict[str, Any], where: str) -> None:
        whole = {**schema, "components": document["components"]}
        checker = jsonschema.Draft202012Validator(
            whole, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        assert [error.message for error in checker.iter_errors(value)] == [], where

    for operation in operations(document):
        name = operation["operationId"]
        for parameter in operation.get("parameters", []):
            if "example" in parameter:
                check(parameter["example"], parameter["schema"], f"{name} {parameter['name']}")
        for body in (operation.get("requestBody", {}), *operation["responses"].values()):
            for media in body.get("content", {}).values():
                for shown in media.get("examples", {}).values():
                    check(shown["value"], media["schema"], name)
    for name, schema in document["components"]["schemas"].items():
        for shown in schema.get("examples", ()):
            check(shown, schema, name)


def test_an_example_has_the_fields_of_a_real_answer(lone_api: Any) -> None:
    """All of them, in their order."""
    document = lone_api.client.get("/openapi.json").json
    made = lone_api.submit()["task_id"]
    lone_api.complete(made, ("a.png", b"png", "image/png"))

    shown = document["components"]["schemas"]["TaskView"]["examples"][0]

    task = lone_api.client.get(f"/task/{made}").json
    assert list(task) == list(shown)
    assert list(task["outputs"][0]) == list(shown["outputs"][0])
    assert list(task["attempts"][0]) == list(shown["attempts"][0])


def test_every_word_for_a_problem_is_documented_somewhere(lone_api: Any) -> None:
    """And no operation names one without a sentence; that none answers another, each test here checks."""
    document = lone_api.client.get("/openapi.json").json
    documented = {
        code
        for operation in operations(document)
        for answer in operation["responses"].values()
        for code in answer.get("content", {}).get("application/problem+json", {}).get("examples", ())
    }

    assert documented == set(examples.PROBLEMS) - {"bad_request", "conflict"}


def test_lists_and_objects_in_a_query_are_written_as_they_are_read(lone_api: Any) -> None:
    """Several statuses with commas, an object with brackets."""
    document = lone_api.client.get("/openapi.json").json

    found = {each["name"]: each for each in document["paths"]["/task"]["get"]["parameters"]}

    assert (found["status"]["style"], found["status"]["explode"]) == ("form", False)
    assert (found["metadata"]["style"], found["metadata"]["explode"]) == ("deepObject", True)
