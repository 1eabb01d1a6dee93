"""API keys over HTTP: what opens, for how long, and what somebody who guesses gets."""

from __future__ import annotations

import base64
import datetime as dt
import hmac
from types import SimpleNamespace
from typing import Any

import pytest

from genpulse.ledger import mint
from genpulse.model import ApiKey, NewTask
from genpulse.web import callers
from tests.support import wait_until


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are remembered for a fifth of a second."""
    monkeypatch.setattr(callers, "REMEMBERED_S", 0.2)


def get(api: Any, token: str = "", address: str = "127.0.0.1", **headers: str) -> Any:
    """List the tasks."""
    shown = {"Authorization": f"Bearer {token}"} if token else {}
    return api.client.get("/task", headers=shown | headers, environ_base={"REMOTE_ADDR": address})


def test_the_first_key_closes_a_running_server(hasty: None, lone_api: Any) -> None:
    """Without a restart; what was made before belongs to the owner `default`."""
    task_id = lone_api.submit()["task_id"]

    call = lone_api.key("default")

    wait_until(lambda: get(lone_api).status_code == 401)
    assert call("GET", f"/task/{task_id}").status_code == 200


def test_a_key_opens_and_names_its_owner(api: Any) -> None:
    """On both databases; the docs and the single key of the settings are another test."""
    call = api.key("ada")
    task_id = call.submit()

    assert api.service.ledger.get(task_id).owner == "ada"
    assert call("GET", "/task").status_code == 200


def test_a_revoked_key_stops_within_seconds(hasty: None, api: Any) -> None:
    """The row is believed for a moment, and no longer; the answer says why."""
    call = api.key()
    assert call("GET", "/task").status_code == 200

    api.service.ledger.revoke_key(call.key.id)

    wait_until(lambda: call("GET", "/task").status_code == 401)
    assert "revoked" in call("GET", "/task").json["detail"]


def test_the_memory_of_a_key_is_short() -> None:
    """What "within seconds" means."""
    assert callers.REMEMBERED_S <= 3


def test_an_expired_key_opens_nothing(lone_api: Any) -> None:
    """By the database's clock."""
    answer = lone_api.key(expires_in_s=0)("GET", "/task")

    assert (answer.status_code, answer.json["code"]) == (401, "unauthenticated")
    assert "expired" in answer.json["detail"]


def test_an_installation_whose_last_key_is_revoked_stays_closed(lone_api: Any) -> None:
    """Also after a restart."""
    lone_api.service.ledger.revoke_key(lone_api.key().key.id)

    assert get(lone_api).status_code == 401


def test_the_single_key_works_beside_the_ledgers(keyed_api: Any, bearer: dict[str, str]) -> None:
    """A small deployment may grow."""
    assert keyed_api.client.get("/task", headers=bearer).status_code == 200
    assert keyed_api.key()("GET", "/task").status_code == 200


@pytest.mark.parametrize("change", ["id", "secret", "none"])
def test_a_wrong_secret_and_a_wrong_id_get_the_same_answer(lone_api: Any, change: str) -> None:
    """An answer that told them apart would tell which ids there are."""
    key, other = lone_api.key().key, mint()
    tokens = {
        "id": key.text.replace(key.id, other.id),
        "secret": f"gp_{key.id}_{other.text.rpartition('_')[2]}",
        "none": "gp_nothing",
    }

    answer = get(lone_api, tokens[change])

    assert (answer.status_code, answer.json["detail"]) == (401, "The API key is not known here.")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_only_admins_see_the_fleet(lone_api: Any) -> None:
    """A caller of tasks learns whether it works, and not what it is made of."""
    reader, admin = lone_api.key(), lone_api.key("ops", ("admin",))

    assert "workers" not in reader("GET", "/status").json
    assert "workers" in admin("GET", "/status").json
    assert reader("GET", "/ready").json["problems"] == []


def test_the_pages_take_the_key_from_a_browser(lone_api: Any) -> None:
    """HTTP Basic with the key as password, on the pages for people and nowhere else."""
    key = lone_api.key().key
    basic = {"Authorization": "Basic " + base64.b64encode(f"me:{key.text}".encode()).decode()}

    for page in ("/docs", "/docs/assets/docs.js", "/openapi.json"):
        asked = lone_api.client.get(page)
        assert (asked.status_code, asked.headers["WWW-Authenticate"]) == (401, 'Basic realm="genpulse"'), page
        assert lone_api.client.get(page, headers=basic).status_code == 200, page
        assert lone_api.client.get(page, headers={"Authorization": "Basic ???"}).status_code == 401
    assert lone_api.client.get("/task", headers=basic).status_code == 401


def test_the_last_use_is_written_after_the_answer(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a while, and a ledger that fails then fails no request."""
    call = api.key()
    asked: list[str] = []
    note = api.service.ledger.note_key_use

    def noted(key_id: str) -> None:
        asked.append(key_id)
        note(key_id)

    monkeypatch.setattr(api.service.ledger, "note_key_use", noted)

    for _ in range(3):
        call("GET", "/task").close()

    assert asked == [call.key.id]
    assert api.service.ledger.find_key(call.key.id).last_used_at is not None


def test_a_download_is_a_use_too(lone_api: Any) -> None:
    """Also where the key opens nothing else in that minute, and the file is left in the middle."""
    owner, reader = lone_api.key("ada"), lone_api.key("ada", ("read",))
    task_id = owner.submit()
    lone_api.complete(task_id, ("a.png", bytes(2**20), "image/png"))

    answer = reader("GET", f"/task/{task_id}/outputs/0", buffered=False)
    next(answer.iter_encoded())
    answer.close()

    assert lone_api.service.ledger.find_key(reader.key.id).last_used_at is not None


def test_a_ledger_that_cannot_note_a_use_fails_no_request(
    lone_api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The use is lost, the answer is not."""
    from genpulse.errors import LedgerUnavailable

    call = lone_api.key()

    def fail(_: str) -> None:
        raise LedgerUnavailable("away")

    monkeypatch.setattr(lone_api.service.ledger, "note_key_use", fail)
    answer = call("GET", "/task")
    answer.close()

    assert answer.status_code == 200


# -- guessing -------------------------------------------------------------------------------------


def test_an_address_that_guesses_is_refused_for_a_while(lone_api: Any) -> None:
    """429 with Retry-After, also for a right key: it is not even looked at. Other addresses go on."""
    call = lone_api.key()
    for _ in range(10):
        assert get(lone_api, "gp_guess", "203.0.113.7").status_code == 401

    refused = get(lone_api, call.key.text, "203.0.113.7")

    assert (refused.status_code, refused.json["code"]) == (429, "rate_limited")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert get(lone_api, call.key.text, "203.0.113.8").status_code == 200


def test_a_callers_neighbours_cannot_lock_it_out(lone_api: Any) -> None:
    """Behind one address, what opened before still does."""
    call = lone_api.key()
    assert get(lone_api, call.key.text, "203.0.113.7").status_code == 200
    for _ in range(12):
        get(lone_api, "gp_guess", "203.0.113.7")

    assert get(lone_api, "gp_guess", "203.0.113.7").status_code == 429
    assert get(lone_api, call.key.text, "203.0.113.7").status_code == 200


def test_no_key_at_all_is_no_guess(lone_api: Any) -> None:
    """A browser that opens the page, or a probe, does not lock its host out."""
    call = lone_api.key()
    for _ in range(20):
        assert get(lone_api).status_code == 401

    assert get(lone_api, call.key.text).status_code == 200


def test_an_open_route_is_no_way_to_guess(lone_api: Any) -> None:
    """/status says more to an admin, so wrong keys count there, too; the route itself stays open."""
    admin = lone_api.key("ops", ("admin",))
    where = {"REMOTE_ADDR": "203.0.113.9"}
    for _ in range(12):
        wrong = lone_api.client.get(
            "/status", headers={"Authorization": "Bearer gp_guess"}, environ_base=where
        )
        assert wrong.status_code == 200

    assert "workers" not in lone_api.client.get("/status", headers=admin.headers, environ_base=where).json
    assert get(lone_api, admin.key.text, "203.0.113.9").status_code == 429


def test_an_ipv6_network_counts_as_one_address(lone_api: Any) -> None:
    """Whoever has one address of it has all 2^64."""
    lone_api.key()
    for number in range(10):
        get(lone_api, "gp_guess", f"2001:db8::{number:x}")

    assert get(lone_api, "gp_guess", "2001:db8::ffff").status_code == 429
    assert get(lone_api, "gp_guess", "2001:db8:0:1::1").status_code == 401


def test_processes_count_wrong_keys_together(
    build: Any, sqlite_ledger_url: str, tmp_path: Any, valkey_url: str
) -> None:
    """Through Redis; without it each counts for itself, which the other tests show."""
    one, two = (build(sqlite_ledger_url, tmp_path / "data", redis_url=valkey_url) for _ in range(2))
    one.key()
    for number in range(10):
        get((one, two)[number % 2], "gp_guess")

    assert [get(each, "gp_guess").status_code for each in (one, two)] == [429, 429]
    for each in (one, two):
        each.service.ledger.close()


def test_behind_proxies_the_callers_own_address_counts(
    build: Any, sqlite_ledger_url: str, tmp_path: Any
) -> None:
    """As many entries as there are proxies; what a caller writes in front of them is not believed."""
    api = build(sqlite_ledger_url, tmp_path / "data", proxies=1)
    call = api.key()
    for number in range(10):
        get(api, "gp_guess", **{"X-Forwarded-For": f"10.0.0.{number}, 198.51.100.1"})

    assert get(api, call.key.text, **{"X-Forwarded-For": "1.2.3.4, 198.51.100.1"}).status_code == 429
    assert get(api, call.key.text, **{"X-Forwarded-For": "198.51.100.2"}).status_code == 200
    api.service.ledger.close()


def test_a_key_that_is_there_and_one_that_is_not_are_compared_alike(
    lone_api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One comparison of two digests, in constant time, whether the id exists or not."""
    known, unknown = lone_api.key().key, mint()
    compared: list[tuple[int, int]] = []

    def compare(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr("genpulse.ledger.keys.hmac", SimpleNamespace(compare_digest=compare))

    assert known.fits(lone_api.service.ledger.find_key(known.id))
    assert not unknown.fits(lone_api.service.ledger.find_key(unknown.id))
    assert compared == [(64, 64), (64, 64)]


def test_an_idempotency_key_is_that_of_an_api_key(api: Any) -> None:
    """Two programs of one owner count their orders independently of each other; each finds its own again."""
    one, two = api.key("ada"), api.key("ada")
    headers = {"Idempotency-Key": "order-1"}
    body = {"task_type": "echo", "params": {"text": "hi"}}
    batch = {"tasks": [body]}

    def ids(call: Any) -> tuple[str, str]:
        task = call("POST", "/task", json=body, headers=headers)
        many = call("POST", "/task/batch", json=batch, headers={"Idempotency-Key": "batch-1"})
        assert (task.status_code, many.status_code) == (202, 202), (task.text, many.text)
        return task.json["task_id"], many.json["batch_id"]

    first, second = ids(one), ids(two)
    other = two("POST", "/task", json={**body, "priority": "low"}, headers=headers)

    assert not set(first) & set(second)
    assert (ids(one), ids(two)) == (first, second)
    assert (other.status_code, other.json["code"]) == (422, "idempotency_key_reuse")
    assert api.rows("tasks") == 4
    retried = []
    for call, (task_id, _) in ((one, first), (two, second)):
        call("POST", f"/task/{task_id}/cancel")
        key = {"Idempotency-Key": "again"}
        answers = [call("POST", f"/task/{task_id}/retry", headers=key) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [202, 202]
        retried += [answer.json["task_id"] for answer in answers]
    assert len(set(retried)) == 2


def test_idempotency_keys_end_one_by_one(api: Any) -> None:
    """What one API key took stays when the same words of another one are past their time."""
    new = NewTask(task_type="echo", queue="cpu", params={}, owner="ada")
    ledger = api.service.ledger
    old, _ = ledger.submit(new, idempotency_key="k", api_key="a", body_hash="h", idempotency_ttl_s=-1)
    kept, _ = ledger.submit(new, idempotency_key="k", api_key="b", body_hash="h")

    assert ledger.forget_expired_keys() == 1

    assert ledger.find_replay("ada", "k", "h", api_key="a") is None
    found = ledger.find_replay("ada", "k", "h", api_key="b")
    assert found is not None
    assert found.id == kept.id != old.id


def test_the_single_key_and_those_without_one_have_words_of_their_own() -> None:
    """An installation that gets its first key keeps the two apart."""
    key = ApiKey("abc", "n", "ada", "", (), created_at=dt.datetime.now(dt.UTC))

    assert callers.EVERYBODY.key_id == ""
    assert callers.Caller("default", frozenset()).key_id == "single"
    assert callers.Caller("ada", frozenset(), key).key_id == "abc"
