"""Bad input: every body gets a clear answer below 500 and leaves no row behind."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genpulse.tasks.registry import Registry

TASK = {"task_type": "echo", "params": {}}

EXAMPLES = float(os.environ.get("GENPULSE_TEST_EXAMPLES", "1"))
"""How many times more examples to generate than in an everyday run."""


def generated(examples: int) -> settings:
    """Settings of a generated test whose fixtures may serve all of its examples."""
    return settings(
        max_examples=int(examples * EXAMPLES),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def post(api: Any, body: bytes | str, content_type: str = "application/json", **headers: str) -> Any:
    """POST raw bytes to ``/task``."""
    return api.client.post("/task", data=body, content_type=content_type, headers=headers)


def refused(api: Any, answer: Any, status: int, code: str) -> None:
    """The answer is this problem, and nothing was recorded."""
    assert (answer.status_code, answer.json["code"]) == (status, code), answer.text
    assert answer.content_type == "application/problem+json"
    assert {"type", "title", "status", "detail", "instance", "code", "retryable"} <= set(answer.json)
    assert api.rows("tasks") == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"task_type": "\xff"}',
        b"\xef\xbb\xbf{}",
        b"{'task_type': 'echo'}",
        b'{"task_type": "echo", "params": {"value": NaN}}',
        b'{"task_type": "echo", "params": {"value": -Infinity}}',
        b'{"task_type": "echo", "params": {}, "params": {"value": 1}}',
        b'{"task_type": "echo", "params": {"value": {"a": 1, "a": 1}}}',
        b'{"task_type": "echo", "params": {"text": "raw \x00"}}',
        b'{"task_type": "echo", "params": {}} {}',
    ],
)
def test_what_is_not_json_is_400(lone_api: Any, body: bytes) -> None:
    """Also what lenient readers take: constants, repeated keys, a byte-order mark."""
    refused(lone_api, post(lone_api, body), 400, "invalid_json")


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ('{"text": "\\u0000"}', "/params/text"),
        ('{"a\\u0000": 1}', "/params/a\ufffd"),
        ('{"text": "\\ud800"}', "/params/text"),
        ('{"value": ["\\udfff"]}', "/params/value/0"),
        ('{"value": {"a/b~c": "\\ud800x"}}', "/params/value/a~1b~0c"),
        ('{"value": 1e400}', "/params/value"),
        ('{"value": -1e999}', "/params/value"),
        ('{"value": 18446744073709551616}', "/params/value"),
        ('{"value": -9223372036854775809}', "/params/value"),
    ],
)
def test_json_that_cannot_be_kept_is_422_with_its_place(api: Any, value: str, where: str) -> None:
    """PostgreSQL keeps no NUL and no half surrogate, and no reader keeps numbers of any size."""
    answer = post(api, f'{{"task_type": "echo", "params": {value}}}')

    refused(api, answer, 422, "invalid_request")
    assert answer.json["errors"][0]["pointer"] == where


@pytest.mark.parametrize("number", ["9" * 100, "-" + "9" * 5000, "9" * 1_000, "1" + "0" * 60_000])
def test_a_number_of_thousands_of_digits_is_422(lone_api: Any, number: str) -> None:
    """Python refuses such numbers with an error of its own, and is slow just below that."""
    answer = post(lone_api, f'{{"task_type": "echo", "params": {{"value": {number}}}}}')

    refused(lone_api, answer, 422, "invalid_request")


@pytest.mark.parametrize("depth", [64, 200, 2_000, 30_000])
@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}")])
def test_a_body_nested_without_end_is_422(lone_api: Any, depth: int, left: str, right: str) -> None:
    """No recursion error, neither in the reader nor in anybody behind it."""
    depth = min(depth, 60_000 // (len(left) + 1))
    value = left * depth + "1" + right * depth

    answer = post(lone_api, f'{{"task_type": "echo", "params": {{"value": {value}}}}}')

    refused(lone_api, answer, 422, "invalid_request")


def test_a_body_of_allowed_depth_is_taken(api: Any) -> None:
    """The bound is above any workflow."""
    value = "[" * 61 + "]" * 61

    assert post(api, f'{{"task_type": "echo", "params": {{"value": {value}}}}}').status_code == 202


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_another_media_type_is_415(lone_api: Any, content_type: str) -> None:
    """A form on another page can send these without asking; JSON it cannot."""
    refused(lone_api, post(lone_api, json.dumps(TASK), content_type), 415, "unsupported_media_type")


def test_another_charset_or_encoding_is_415(lone_api: Any) -> None:
    """JSON is UTF-8, and nothing is unpacked on the way in."""
    latin = post(lone_api, json.dumps(TASK), "application/json; charset=latin-1")
    packed = post(lone_api, json.dumps(TASK), **{"Content-Encoding": "gzip"})

    refused(lone_api, latin, 415, "unsupported_media_type")
    refused(lone_api, packed, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=UTF-8", "application/vnd.x+json", "APPLICATION/JSON"]
)
def test_json_by_any_of_its_names_is_taken(lone_api: Any, content_type: str) -> None:
    """What clients really send."""
    assert post(lone_api, json.dumps(TASK), content_type).status_code == 202


def test_a_body_above_the_limit_is_413(lone_api: Any) -> None:
    """By its length, before it is read."""
    body = json.dumps({**TASK, "params": {"text": "x" * lone_api.service.settings.max_body_bytes}})

    refused(lone_api, post(lone_api, body), 413, "too_large")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"task_type": None}, "/task_type"),
        ({"task_type": ""}, "/task_type"),
        ({"params": []}, "/params"),
        ({"params": None}, "/params"),
        ({"priority": "urgent"}, "/priority"),
        ({"priority": 0}, "/priority"),
        ({"timeout_s": 0}, "/timeout_s"),
        ({"timeout_s": "900"}, "/timeout_s"),
        ({"timeout_s": True}, "/timeout_s"),
        ({"timeout_s": 1.5}, "/timeout_s"),
        ({"timeout_s": 10**9}, "/timeout_s"),
        ({"expires_in_s": -1}, "/expires_in_s"),
        ({"max_attempts": 0}, "/max_attempts"),
        ({"metadata": {"a": 1}}, "/metadata/a"),
        ({"metadata": {"a": "x" * 501}}, "/metadata/a"),
        ({"metadata": {str(n): "" for n in range(51)}}, "/metadata"),
        ({"metadata": []}, "/metadata"),
        ({"callback_url": "file:///etc/passwd"}, "/callback_url"),
        ({"callback_url": "http://[::1"}, "/callback_url"),
        ({"callback_url": "https://x.example/\n"}, "/callback_url"),
        ({"callback_url": "https://"}, "/callback_url"),
        ({"callback_url": 5}, "/callback_url"),
        ({"prompt": "a cat"}, "/prompt"),
        ({"params": {"unknown": 1}}, "/params/unknown"),
    ],
)
def test_a_wrong_field_is_422_and_named(lone_api: Any, change: dict[str, Any], where: str) -> None:
    """With a JSON pointer, and without the caller's value in the answer."""
    answer = lone_api.client.post("/task", json=TASK | change)

    refused(lone_api, answer, 422, "invalid_request")
    assert where in [error["pointer"] for error in answer.json["errors"]], answer.text


@pytest.mark.parametrize("body", [[], "text", 5, None, True])
def test_a_body_that_is_no_object_is_422(lone_api: Any, body: Any) -> None:
    """In the caller's words: none of our own names is in the sentence."""
    answer = lone_api.client.post("/task", data=json.dumps(body), content_type="application/json")

    refused(lone_api, answer, 422, "invalid_request")
    assert answer.json["detail"] == "body: must be a JSON object"


def test_a_caller_cannot_choose_the_server(lone_api: Any) -> None:
    """No task type is even asked: in the original system this word led the workers to any host."""
    answer = lone_api.client.post("/task", json=TASK | {"params": {"server_address": "10.0.0.1:8188"}})

    refused(lone_api, answer, 422, "invalid_request")
    assert answer.json["errors"] == [
        {"pointer": "/params/server_address", "detail": "is not the caller's to choose"}
    ]


def test_an_unknown_task_type_is_422_and_lists_what_there_is(lone_api: Any) -> None:
    """A typing mistake is seen at once."""
    answer = lone_api.client.post("/task", json={"task_type": "comfyuii", "params": {}})

    refused(lone_api, answer, 422, "unknown_task_type")
    assert "echo" in answer.json["detail"]


def test_a_million_mistakes_get_an_answer_of_readable_size(lone_api: Any) -> None:
    """The list of errors is cut."""
    answer = lone_api.client.post("/task", json=TASK | {f"field{n}": 1 for n in range(3_000)})

    refused(lone_api, answer, 422, "invalid_request")
    assert len(answer.json["errors"]) == 50


def test_an_unexpected_error_says_nothing_but_its_number(
    lone_api: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The traceback is in the log under the id that the caller can quote; the answer has none of it."""

    def broken(*_: object, **__: object) -> None:
        message = "password=hunter2 in /srv/genpulse"
        raise ZeroDivisionError(message)

    monkeypatch.setattr(type(lone_api.service.ledger), "get", broken)

    answer = lone_api.client.get("/task/00000000-0000-0000-0000-000000000000")

    assert (answer.status_code, answer.json["code"]) == (500, "internal")
    assert "hunter2" not in answer.text
    assert "ZeroDivisionError" not in answer.text
    log = "".join(capsys.readouterr())  # where to is set once in a process, by whoever set up logging before
    assert "ZeroDivisionError" in log
    assert answer.json["instance"].removeprefix("urn:uuid:") in log


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE", "BREW"])
def test_another_method_is_405_with_what_there_is(lone_api: Any, method: str) -> None:
    """``Allow`` names the methods of this address."""
    answer = lone_api.client.open("/task", method=method)

    assert (answer.status_code, answer.json["code"]) == (405, "method_not_allowed")
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/task/", "/docs//assets/docs.js", "/v2/task", "/task/x/y/z", "/%ff%fe", "/" + "x" * 3000],
)
def test_an_address_that_is_none_is_404(lone_api: Any, path: str) -> None:
    """A problem document there too, and no redirect to something like it."""
    answer = lone_api.client.get(path)

    assert (answer.status_code, answer.content_type) == (404, "application/problem+json")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [
        "task_type",
        "params",
        "priority",
        "callback_url",
        "timeout_s",
        "expires_in_s",
        "max_attempts",
        "metadata",
        "x",
    ]
)


@pytest.mark.timeout(180 * max(1, EXAMPLES))
@generated(250)
@given(change=st.dictionaries(FIELDS, JSON, max_size=3), drop=st.sets(FIELDS, max_size=1))
def test_generated_bodies_are_taken_or_refused(api: Any, change: dict[str, Any], drop: set[str]) -> None:
    """Any JSON in any field: 202 and one row more, or below 500 and none."""
    before = api.rows("tasks")
    body = {name: value for name, value in (TASK | change).items() if name not in drop}

    answer = post(api, json.dumps(body))

    assert answer.status_code in {202, 400, 422}, answer.text
    assert api.rows("tasks") - before == (answer.status_code == 202)


@pytest.mark.timeout(180 * max(1, EXAMPLES))
@generated(60)
@given(params=JSON.filter(lambda value: isinstance(value, dict)), text=st.text(max_size=40))
def test_whatever_is_taken_comes_back_unchanged(api: Any, params: dict[str, Any], text: str) -> None:
    """What the ledger recorded is what was sent, bit for bit, on both databases."""
    answer = post(api, json.dumps({**TASK, "params": {"value": params, "text": text}}))

    if answer.status_code == 202:
        kept = api.service.ledger.get(answer.json["task_id"]).params
        assert json.dumps(kept["value"], sort_keys=True) == json.dumps(params, sort_keys=True)


@generated(800)
@given(body=st.binary(max_size=200))
def test_generated_bytes_are_refused(lone_api: Any, body: bytes) -> None:
    """No string of bytes is an error of ours."""
    assert post(lone_api, body).status_code in {400, 422}


@generated(500)
@given(seed=st.integers(0, 2**32), path=st.sampled_from(["/task", "/storage/upload"]))
def test_damaged_bodies_are_refused_or_taken(lone_api: Any, seed: int, path: str) -> None:
    """A good body with bytes changed, dropped and doubled, of both kinds."""
    chance = random.Random(seed)
    good = (
        json.dumps(
            {**TASK, "metadata": {"a": "b"}, "params": {"value": [1, {"x": None}], "text": "é\n"}}
        ).encode()
        if path == "/task"
        else b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n\x89PNG\r\n--b--\r\n'
    )
    body = bytearray(good)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(body) + 1)
        body[place : place + chance.randint(0, 3)] = bytes(
            chance.choices(b'\x00"{}[],:\\-e9\xff\r\n\x80b', k=chance.randint(0, 3))
        )
    kind = "application/json" if path == "/task" else "multipart/form-data; boundary=b"

    answer = lone_api.client.post(path, data=bytes(body), content_type=kind)

    assert answer.status_code < 500, answer.text


NODES = st.dictionaries(
    st.sampled_from(["1", "2", "3", "9", "", "x" * 50]),
    st.fixed_dictionaries(
        {},
        optional={
            "class_type": st.sampled_from(["KSampler", "SaveImage", "LoadImage", "", None, 5]) | JSON,
            "inputs": st.dictionaries(
                st.sampled_from(["image", "text", "seed", "images"]),
                JSON | st.tuples(st.sampled_from(["1", "2", "7"]), st.integers(-1, 3)).map(list),
                max_size=3,
            )
            | JSON,
            "_meta": st.fixed_dictionaries({"title": st.sampled_from(["INPUT_prompt", "INPUT_", "x"]) | JSON})
            | JSON,
        },
    )
    | JSON,
    max_size=4,
)
INPUTS = st.dictionaries(
    st.sampled_from(["prompt", "1.text", "9.image", "1.", ".", "seed"]) | st.text(max_size=4),
    JSON,
    max_size=3,
)


@pytest.mark.timeout(180 * max(1, EXAMPLES))
@generated(100)
@given(
    task_type=st.sampled_from(["comfyui", "comfy-workflow", "image-convert"]),
    workflow=NODES | JSON,
    inputs=INPUTS | JSON,
    more=st.dictionaries(
        st.sampled_from(["source", "asset", "width", "format", "options"]), JSON, max_size=2
    ),
)
def test_generated_workflows_are_taken_or_refused(
    api: Any, task_type: str, workflow: Any, inputs: Any, more: dict[str, Any]
) -> None:
    """The real task types, through the whole way in."""
    api.service.registry = Registry.load()
    before = api.rows("tasks")
    body = {"task_type": task_type, "params": {"workflow": workflow, "inputs": inputs, **more}}

    answer = post(api, json.dumps(body))

    assert answer.status_code in {202, 400, 422}, answer.text
    assert api.rows("tasks") - before == (answer.status_code == 202)
