"""Who may call: the key, and what keeps other web pages out where there is no key."""

from __future__ import annotations

from typing import Any

import pytest

OPEN = ["/health", "/ready", "/status", "/"]
PAGES = ["/openapi.json", "/docs", "/docs/assets/docs.js"]
CLOSED = [
    ("GET", "/task"),
    ("POST", "/task"),
    ("GET", "/task/00000000-0000-0000-0000-000000000000"),
    ("POST", "/task/00000000-0000-0000-0000-000000000000/cancel"),
    ("GET", "/task/00000000-0000-0000-0000-000000000000/outputs/0"),
    ("POST", "/storage/upload"),
    ("GET", "/static/assets/x"),
    ("GET", "/task-types"),
]


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_every_route_asks_for_the_key_but_the_open_ones(keyed_api: Any, prefix: str) -> None:
    """A route that is forgotten in the list below is closed; the list of open ones is complete."""
    rules = [
        rule for rule in keyed_api.app.url_map.iter_rules() if rule.rule.startswith("/v1") == bool(prefix)
    ]
    for rule in rules:
        path = rule.rule.replace("<path:key>", "x").replace("<index>", "0").replace("<name>", "docs.js")
        path = path.replace("<task_id>", "00000000-0000-0000-0000-000000000000")
        for method in rule.methods - {"OPTIONS", "HEAD"}:
            answer = keyed_api.client.open(path, method=method)
            is_open = path.removeprefix(prefix) in OPEN
            assert (answer.status_code == 401) is not is_open, (method, path, answer.status_code)
    assert {(method, prefix + path) for method, path in CLOSED} <= {
        (
            method,
            rule.rule.replace("<path:key>", "x")
            .replace("<index>", "0")
            .replace("<task_id>", "00000000-0000-0000-0000-000000000000"),
        )
        for rule in rules
        for method in rule.methods
    }


@pytest.mark.parametrize(
    "sent", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic {key}", "{key}", "Bearer {key}x"]
)
def test_a_wrong_key_is_401(keyed_api: Any, bearer: dict[str, str], sent: str) -> None:
    """With ``WWW-Authenticate``, before any body is looked at, and without a word about the key."""
    key = bearer["Authorization"].removeprefix("Bearer ")

    answer = keyed_api.client.post("/task", data=b"{", headers={"Authorization": sent.format(key=key)})

    assert (answer.status_code, answer.json["code"]) == (401, "unauthenticated")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert keyed_api.rows("tasks") == 0


def test_the_key_opens(keyed_api: Any, bearer: dict[str, str]) -> None:
    """The scheme's letters may be of any size; a key may have any characters."""
    lower = {"Authorization": bearer["Authorization"].replace("Bearer", "bearer")}

    for headers in (bearer, lower):
        assert keyed_api.client.get("/task", headers=headers).status_code == 200


def test_strangers_learn_the_state_and_nothing_of_the_fleet(keyed_api: Any, bearer: dict[str, str]) -> None:
    """Queues, workers, servers and reasons are for key holders."""
    stranger, holder = (
        keyed_api.client.get("/status").json,
        keyed_api.client.get("/status", headers=bearer).json,
    )

    assert stranger["status"] == holder["status"] == "degraded"
    assert set(stranger) == {"status", "version", "accepting", "problems"}
    assert stranger["problems"] == []
    assert set(holder) >= {"queues", "workers", "servers"}
    assert holder["problems"]


def test_with_a_key_any_host_name_is_fine(keyed_api: Any, bearer: dict[str, str]) -> None:
    """The key is not ambient: no other page's script has it."""
    headers = bearer | {"Host": "pulse.example", "Origin": "https://elsewhere.example"}

    assert keyed_api.client.get("/task", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "",
        "[::2]",
        "a b",
    ],
)
def test_without_a_key_only_loopback_names_are_answered(lone_api: Any, host: str) -> None:
    """A page that points its own name at 127.0.0.1 (DNS rebinding) still says its own name."""
    answer = lone_api.client.get("/task", headers={"Host": host})

    assert answer.status_code in {400, 403}
    assert answer.content_type == "application/problem+json"


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "LOCALHOST"]
)
def test_every_loopback_name_is_answered(lone_api: Any, host: str) -> None:
    """With and without a port, in both families."""
    assert lone_api.client.get("/task", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:3000", "http://127.0.0.1"]
)
def test_without_a_key_other_pages_cannot_submit(lone_api: Any, origin: str) -> None:
    """A browser sends the page's origin along with a post; ours is the only one that may."""
    body = {"task_type": "echo", "params": {}}

    foreign = lone_api.client.post("/task", json=body, headers={"Origin": origin})
    own = lone_api.client.post("/task", json=body, headers={"Origin": "http://localhost"})

    assert (foreign.status_code, foreign.json["code"]) == (403, "forbidden")
    assert own.status_code == 202


def test_without_a_key_other_pages_cannot_embed_results(lone_api: Any) -> None:
    """An ``<img>`` on another page says ``Sec-Fetch-Site``; following a link is fine."""
    embedded = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}

    assert lone_api.client.get("/task", headers=embedded).status_code == 403
    assert lone_api.client.get("/task", headers=followed).status_code == 200
    assert lone_api.client.post("/task", json={}, headers=followed).status_code == 403


def test_every_answer_is_hardened(lone_api: Any) -> None:
    """Pages, problems and files alike."""
    for path in (*OPEN, *PAGES, "/nothing", "/task/x"):
        headers = lone_api.client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff", path
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"], path
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin", path
        assert "Access-Control-Allow-Origin" not in headers
