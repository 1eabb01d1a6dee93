"""
Two owners on every route: neither reads, changes, lists, downloads or guesses anything of the other.

The routes come from the application itself. One with parameters is attacked with the other's values
(:data:`VALUES`); one without must stand in :data:`WITHOUT_PARAMETERS`. A route that is in neither
fails the first test: say there what an owner has behind it.
"""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + b"\0" * 50
SECRET = "whsec_" + base64.b64encode(b"0" * 32).decode()
NOBODYS = "00000000-0000-7000-8000-000000000000"


@dataclass
class Belongings:
    """What an owner has, and the words by which somebody else's answer would give it away."""

    call: Any
    tasks: dict[str, str] = field(default_factory=dict)
    assets: list[dict[str, Any]] = field(default_factory=list)
    deliveries: list[str] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    idempotency_key: str = ""

    @property
    def marks(self) -> set[str]:
        """Ids, keys, names, digests: none may be in an answer to the other one."""
        found = {*self.tasks.values(), *self.keys, *self.deliveries, *self.batches}
        found |= {f"secret-of-{self.call.owner}", self.call.owner}
        for asset in self.assets:
            found |= {asset["id"], asset["key"], asset["name"]}
        return found

    def snapshot(self) -> list[tuple[int, Any]]:
        """All that the owner sees of it."""
        paths = [f"/task/{task_id}" for task_id in self.tasks.values()]
        paths += [f"/task/{self.tasks['done']}/outputs/0"]
        paths += [f"/static/assets/{key}" for key in self.keys]
        paths += [f"/webhooks/deliveries/{delivery}" for delivery in self.deliveries]
        paths += [f"/batch/{batch}" for batch in self.batches]
        answers = [self.call("GET", path) for path in paths]
        listed = {task["task_id"] for task in self.call("GET", "/task?limit=100").json["tasks"]}
        return [(answer.status_code, answer.data) for answer in answers] + [(200, listed)]


# What of an owner's goes into a route's parameter. A new parameter gets a line here.
VALUES: dict[str, Callable[[Belongings], list[str]]] = {
    "task_id": lambda has: list(has.tasks.values()),
    "index": lambda _: ["0"],
    "key": lambda has: has.keys,
    "name": lambda _: ["docs.js"],
    "delivery_id": lambda has: has.deliveries,
    "batch_id": lambda has: has.batches,
}
NOBODY = {
    "task_id": NOBODYS,
    "index": "0",
    "key": f"assets/nobody/{'0' * 64}.png",
    "name": "nothing.js",
    "delivery_id": NOBODYS,
    "batch_id": NOBODYS,
}

# Routes without parameters: what the other one sends. All that matters is what the answers say.
# A new route gets a line here, or a reason in HAS_NO_OWNER.
Attack = Callable[[Belongings, Any], Iterator[Any]]
WITHOUT_PARAMETERS: dict[tuple[str, str], Attack] = {}
HAS_NO_OWNER = {
    ("GET", "/"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/status"),
    ("GET", "/metrics"),
    ("GET", "/task-types"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/docs/assets/<name>"),
}
"""Say the same to everybody."""


def case(method: str, rule: str) -> Callable[[Attack], Attack]:
    """Register what to send to a route without parameters."""

    def register(send: Attack) -> Attack:
        WITHOUT_PARAMETERS[method, rule] = send
        return send

    return register


@case("GET", "/task")
def list_tasks(has: Belongings, call: Any) -> Iterator[Any]:
    """The list, with every filter, and with the other's id as the cursor."""
    query = [
        "",
        "?limit=100",
        "?status=completed",
        "?status=pending",
        "?status=processing",
        "?task_type=echo",
    ]
    query += [f"?cursor={task_id}" for task_id in has.tasks.values()]
    query += [f"?metadata[who]=secret-of-{has.call.owner}"]
    query += [f"?batch_id={batch}" for batch in has.batches]
    for each in query:
        yield call("GET", f"/task{each}")


@case("POST", "/task")
def submit(has: Belongings, call: Any) -> Iterator[Any]:
    """The other's files as inputs, and the other's idempotency key: neither is there."""
    for reference in (*(f"asset:{asset['id']}" for asset in has.assets), f"output:{has.tasks['done']}/0"):
        answer = call("POST", "/task", json={"task_type": "echo", "params": {"text": reference}})
        assert (answer.status_code, answer.json["code"]) == (422, "missing_asset")
    body = {"task_type": "echo", "params": {"text": "hi"}}
    answer = call("POST", "/task", json=body, headers={"Idempotency-Key": has.idempotency_key})
    assert answer.status_code == 202
    assert "Idempotency-Replayed" not in answer.headers
    call("POST", f"/task/{answer.json['task_id']}/cancel")
    yield answer


@case("POST", "/task/batch")
def submit_batch(has: Belongings, call: Any) -> Iterator[Any]:
    """As one task: the other's files are not there, and the other's idempotency key is free."""
    for reference in (f"asset:{has.assets[0]['id']}", f"output:{has.tasks['done']}/0"):
        body = {"tasks": [{"task_type": "echo", "params": {"text": reference}}]}
        answer = call("POST", "/task/batch", json=body)
        assert (answer.status_code, answer.json["code"]) == (422, "missing_asset")
    body = {"tasks": [{"task_type": "echo", "params": {"text": "hi"}}]}
    answer = call(
        "POST", "/task/batch", json=body, headers={"Idempotency-Key": f"batch-{has.idempotency_key}"}
    )
    assert answer.status_code == 202
    assert "Idempotency-Replayed" not in answer.headers
    call("POST", f"/batch/{answer.json['batch_id']}/cancel")
    yield answer


@case("GET", "/webhooks/deliveries")
def list_deliveries(has: Belongings, call: Any) -> Iterator[Any]:
    """The list, by the other's task, and with the other's delivery as the cursor."""
    assert has.deliveries
    query = ["", "?limit=100", "?status=pending"]
    query += [f"?task_id={task_id}" for task_id in has.tasks.values()]
    query += [f"?cursor={delivery}" for delivery in has.deliveries]
    for each in query:
        yield call("GET", f"/webhooks/deliveries{each}")


@case("POST", "/task/retry")
def retry_by_filter(has: Belongings, call: Any) -> Iterator[Any]:
    """Every filter, and the other's ids as the cursor: only one's own are found, looking or doing."""
    for body in ({"status": "failed"}, {"status": "canceled"}, {"status": "completed", "again": True}):
        yield call("POST", "/task/retry", json={**body, "dry_run": True})
    for task_id in has.tasks.values():
        yield call("POST", "/task/retry", json={"status": "failed", "cursor": task_id, "again": True})


@case("POST", "/storage/upload")
def upload(has: Belongings, call: Any) -> Iterator[Any]:
    """The very same bytes: an asset of one's own, under a key of one's own."""
    answer = call("POST", "/storage/upload", data={"file": (io.BytesIO(PNG), "mine.png")})
    assert answer.status_code == 201
    assert answer.json["sha256"] == has.assets[0]["sha256"]
    yield answer


# ---------------------------------------------------------------------------------------------------------------------


def routes(app: Any) -> list[tuple[str, str]]:
    """Method and rule of all there is at the root."""
    return sorted(
        (method, rule.rule)
        for rule in app.url_map.iter_rules()
        if rule.endpoint.startswith("api.")
        for method in rule.methods - {"HEAD", "OPTIONS"}
    )


def parameters(rule: str) -> list[str]:
    """Names of a rule's parameters."""
    return re.findall(r"<(?:\w+:)?(\w+)>", rule)


def filled(rule: str, values: dict[str, str]) -> str:
    """A path of the rule."""
    return re.sub(r"<(?:\w+:)?(\w+)>", lambda match: values[match[1]], rule)


@pytest.fixture
def world(build: Any, ledger_url: str, tmp_path: Path) -> Iterator[tuple[Belongings, Belongings]]:
    """Ada and Bob, each with tasks in every state, outputs, files and webhooks."""
    api = build(ledger_url, tmp_path / "data", webhook_secret=SECRET, public_url="https://pulse.example")
    yield furnish(api, "ada"), furnish(api, "bob")
    api.service.ledger.close()


def furnish(api: Any, owner: str) -> Belongings:
    """Give an owner one of everything."""
    has = Belongings(api.key(owner), idempotency_key=f"idem-of-{owner}")
    for name in ("waiting", "running", "done", "failed", "canceled"):
        headers = {"Idempotency-Key": has.idempotency_key} if name == "waiting" else {}
        body: dict[str, Any] = {"task_type": "echo", "params": {"text": "hi"}}
        if not headers:
            body["callback_url"] = f"https://hooks-of-{owner}.example.com/x"
            body["metadata"] = {"who": f"secret-of-{owner}"}
        has.tasks[name] = has.call("POST", "/task", json=body, headers=headers).json["task_id"]
    api.claim(has.tasks["running"])
    api.complete(has.tasks["done"], ("of-all.png", PNG + b"out", "image/png"))
    api.fail(has.tasks["failed"])
    assert has.call("POST", f"/task/{has.tasks['canceled']}/cancel").status_code == 200
    answer = has.call("POST", "/storage/upload", data={"file": (io.BytesIO(PNG), f"file-of-{owner}.png")})
    has.assets.append(answer.json)
    has.deliveries = [each.id for each in api.service.ledger.list_deliveries(owner)]
    assert has.deliveries
    if ("POST", "/task/batch") in routes(api.app):
        body = {"tasks": [{"task_type": "echo", "params": {"text": "hi"}}] * 2}
        headers = {"Idempotency-Key": f"batch-{has.idempotency_key}"}
        has.batches = [has.call("POST", "/task/batch", json=body, headers=headers).json["batch_id"]]
    has.keys = [answer.json["key"], f"outputs/{has.tasks['done']}/1/0"]
    assert {status for status, _ in has.snapshot()} == {200}
    return has


def same(answer: Any) -> tuple[Any, ...]:
    """What an answer says, without what differs from request to request."""
    body = {name: value for name, value in (answer.json or {}).items() if name != "instance"}
    return answer.status_code, body, answer.headers.get("Content-Type")


def test_every_route_has_a_case(lone_api: Any) -> None:
    """A route that nobody thought of here could show one owner's things to the other."""
    unknown = [
        (method, rule)
        for method, rule in routes(lone_api.app)
        if (method, rule) not in HAS_NO_OWNER
        and (method, rule) not in WITHOUT_PARAMETERS
        and not (parameters(rule) and set(parameters(rule)) <= VALUES.keys())
    ]
    assert not unknown, f"say in {Path(__file__).name} what an owner has behind {unknown}"


def test_neither_owner_reaches_anything_of_the_other(world: tuple[Belongings, Belongings]) -> None:
    """Each answer is the one for an id that never was, gives nothing away, and changes nothing."""
    app = world[0].call.api.app
    for has, other in (world, world[::-1]):
        before = has.snapshot()
        call = other.call
        for (method, rule), prefix in itertools.product(routes(app), ("", "/v1")):
            where = f"{method} {prefix}{rule}"
            if (method, rule) in WITHOUT_PARAMETERS and not prefix:
                for answer in WITHOUT_PARAMETERS[method, rule](has, call):
                    assert_tells_nothing(has, answer, where)
            if not parameters(rule) or (method, rule) in HAS_NO_OWNER:
                continue
            more: dict[str, Any] = {} if method in {"GET", "DELETE"} else {"json": {}}
            names = parameters(rule)
            unknown = call(method, prefix + filled(rule, {name: NOBODY[name] for name in names}), **more)
            assert unknown.status_code == 404, where
            for values in itertools.product(*(VALUES[name](has) for name in names)):
                path = prefix + filled(rule, dict(zip(names, values, strict=True)))
                answer = call(method, path, **more)
                assert same(answer) == same(unknown), where
                assert_tells_nothing(has, answer, where)
                if method == "GET":
                    assert call("HEAD", path).status_code == 404, where
                    assert call("GET", path, headers={"Range": "bytes=0-1"}).status_code == 404, where
                    assert call("GET", path, headers={"If-None-Match": "*"}).status_code == 404, where
        assert has.snapshot() == before


def assert_tells_nothing(has: Belongings, answer: Any, where: str) -> None:
    """No id, key or name of the owner is in the answer, its headers included."""
    text = f"{answer.text} {answer.headers}"
    # "ada" alone would be found in other words.
    found = [mark for mark in has.marks if re.search(rf"(?<![\w-]){re.escape(mark)}(?![\w-])", text)]
    assert not found, (where, found)


def test_an_id_with_a_line_break_is_no_id(world: tuple[Belongings, Belongings]) -> None:
    """404 on every route that takes one; PostgreSQL would call the comparison an error."""
    has = world[0]
    ids = {"task_id", "batch_id", "delivery_id"}
    asked = set()
    for (method, rule), end in itertools.product(routes(has.call.api.app), ("%0A", "%0D%0A", "%00", "%20")):
        for name in ids.intersection(parameters(rule)):
            asked.add(name)
            for value in VALUES[name](has):
                path = filled(rule, NOBODY | {name: value + end})
                more: dict[str, Any] = {} if method in {"GET", "DELETE"} else {"json": {}}
                assert has.call(method, path, **more).status_code == 404, (method, path)
    assert asked == ids


def test_keys_of_one_owner_share(lone_api: Any) -> None:
    """Ownership is the owner's, not the key's: a rotated key finds everything."""
    old, new = lone_api.key("ada"), lone_api.key("ada")
    task_id = old.submit()

    assert new("GET", f"/task/{task_id}").status_code == 200
    assert new("POST", f"/task/{task_id}/cancel").status_code == 200


def test_a_key_without_the_scope_is_403(lone_api: Any) -> None:
    """On every route: read to look, submit to change, and no scope opens the other."""
    keys = {scope: lone_api.key("ada", (scope,)) for scope in ("submit", "read", "admin")}
    task_id = keys["submit"].submit()
    open_to_all = {("GET", "/"), ("GET", "/health"), ("GET", "/ready"), ("GET", "/status")}
    needs_admin = {("GET", "/metrics")}
    for method, rule in routes(lone_api.app):
        if (method, rule) in open_to_all:
            continue
        needed = "admin" if (method, rule) in needs_admin else "read" if method == "GET" else "submit"
        path = filled(rule, NOBODY | {"task_id": task_id})
        for scope, call in keys.items():
            answer = call(method, path)
            answer.close()  # a stream would go on
            refused = answer.status_code == 403
            assert refused is (scope != needed), (method, rule, scope, answer.status_code)
            if refused:
                assert (answer.json["code"], answer.content_type) == ("forbidden", "application/problem+json")
