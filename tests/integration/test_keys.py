"""API keys in the ledger, and the caps on what an owner may have waiting and running."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest

from genpulse.ledger import KeyText, Ledger, mint
from genpulse.model import Priority, TaskStatus
from genpulse.tasks import schedule
from tests.support.ledger import at_once, claim, open_ledger, row_of, submit, try_claim


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """A ledger, on both databases in turn."""
    with open_ledger(ledger_url) as opened:
        yield opened


def add(ledger: Ledger, owner: str = "ada", **values: Any) -> KeyText:
    """A new key."""
    key = mint()
    ledger.add_key(key, **{"name": "k", "owner": owner, "scopes": ("read",), **values})
    return key


def next_owners(ledger: Ledger, max_running: int = 0, slots: int = 4) -> list[str]:
    """The owners of the tasks that go to the broker now."""
    batch = schedule.next_batch(ledger, {"comfy": slots}, (), max_running)
    return [row_of(ledger, each.task_id)["owner"] for each in batch]


# -- keys -----------------------------------------------------------------------------------------


def test_the_ledger_keeps_a_digest_and_no_secret(ledger: Ledger) -> None:
    """Who reads the database, or a record in a log, has no key."""
    key = add(ledger)

    found = ledger.find_key(key.id)

    assert found is not None
    assert found.digest == hashlib.sha256(key.text.encode()).hexdigest()
    assert key.fits(found)
    secret = key.text.rpartition("_")[2]
    assert secret not in repr(key)
    assert found.digest not in repr(found)


def test_only_the_whole_text_fits() -> None:
    """A key of the right id with one other character, or for no key at all, does not."""
    key = mint()
    other = KeyText(key.id, key.text[:-1] + ("a" if key.text[-1] != "a" else "b"))

    assert not key.fits(None)
    assert KeyText.parse(key.text) == key
    assert other.digest != key.digest
    for text in ("", "gp_", key.text + "x", key.text[:-1], key.text.upper(), f" {key.text}", key.text + "\n"):
        assert KeyText.parse(text) is None, text


def test_minted_keys_differ() -> None:
    """Ids and secrets come from the system's randomness."""
    assert len({mint().id for _ in range(200)}) == len({mint().text for _ in range(200)}) == 200


def test_a_revoked_or_expired_key_is_not_usable(ledger: Ledger) -> None:
    """Both keep their rows: what had a key once does not become open to all."""
    revoked, expired, good = add(ledger), add(ledger, expires_in_s=0), add(ledger, expires_in_s=600)

    assert ledger.revoke_key(revoked.id) is not None
    first = ledger.find_key(revoked.id)
    ledger.revoke_key(revoked.id)

    assert first == ledger.find_key(revoked.id)
    usable = {key.id for key in ledger.list_keys() if key.is_usable}
    assert usable == {good.id}
    assert len(ledger.list_keys()) == 3
    assert expired.id in {key.id for key in ledger.list_keys() if key.is_expired}


def test_an_unknown_key_is_none_and_cannot_be_revoked(ledger: Ledger) -> None:
    """Nothing is made up, and without any key the ledger says so."""
    assert not ledger.has_keys()
    assert ledger.find_key("nothing") is None
    assert ledger.revoke_key("nothing") is None
    add(ledger)
    assert ledger.has_keys()


def test_the_last_use_is_written_once_a_minute(ledger: Ledger) -> None:
    """However many processes see the key."""
    key = add(ledger)

    ledger.note_key_use(key.id)
    first = ledger.find_key(key.id)
    ledger.note_key_use(key.id)

    assert first is not None
    assert first.last_used_at is not None
    assert ledger.find_key(key.id) == first


# -- caps on running tasks ------------------------------------------------------------------------


def test_an_owner_at_the_cap_does_not_hold_up_others(ledger: Ledger) -> None:
    """Ada's older tasks wait in the ledger; Bob's younger one passes them."""
    for _ in range(5):
        submit(ledger, owner="ada")
    submit(ledger, owner="bob")

    assert next_owners(ledger, max_running=2) == ["ada", "ada", "bob"]
    assert next_owners(ledger, max_running=2) == []


def test_a_waiting_task_goes_when_one_of_its_owner_ends(ledger: Ledger) -> None:
    """The cap counts what is sent and what runs, until it ends."""
    tasks = [submit(ledger, owner="ada") for _ in range(2)]
    assert next_owners(ledger, max_running=1) == ["ada"]
    held = claim(ledger, tasks[0], max_running=1)
    assert next_owners(ledger, max_running=1) == []

    ledger.finish(held.fence, TaskStatus.COMPLETED)

    assert next_owners(ledger, max_running=1) == ["ada"]


def test_a_claim_over_the_cap_goes_back_to_the_outbox(ledger: Ledger) -> None:
    """A message that got through all the same (a cap that was lowered) is not lost and does not run."""
    one, two = submit(ledger), submit(ledger)
    assert next_owners(ledger) == ["ada", "ada"]
    held = claim(ledger, one, max_running=1)

    assert try_claim(ledger, two, max_running=1) is None
    assert row_of(ledger, two)["dispatched_at"] is None

    ledger.finish(held.fence, TaskStatus.COMPLETED)
    assert next_owners(ledger, max_running=1) == ["ada"]
    claim(ledger, two, max_running=1)


def test_claims_at_once_never_pass_the_cap(ledger: Ledger) -> None:
    """Six workers at the same moment, one place: one of them gets it."""
    tasks = [submit(ledger) for _ in range(6)]

    found = at_once(6, lambda index: try_claim(ledger, tasks[index], max_running=1, claim=f"c{index}"))

    assert sum(each is not None for each in found) == 1


def test_a_claim_may_be_repeated_at_the_cap(ledger: Ledger) -> None:
    """A lost answer: the attempt that has the owner's last place is found again."""
    task = submit(ledger)
    first = claim(ledger, task, claim="mine", max_running=1)

    assert try_claim(ledger, task, claim="mine", max_running=1) == first


def test_a_bound_task_is_followed_whatever_the_cap(ledger: Ledger) -> None:
    """Its prompt renders already; leaving it unfollowed would save nothing."""
    bound, other = submit(ledger), submit(ledger)
    held = claim(ledger, bound, servers=["gpu1"])
    assert ledger.record_prompt(held.fence, server="gpu1", prompt_id="0" * 8 + "-0000" * 3 + "-" + "0" * 12,
                                client_id="c")  # fmt: skip
    ledger.hand_back(held.fence, adopt_wait_s=60)
    claim(ledger, other, max_running=1)

    claim(ledger, bound, servers=["gpu1"], max_running=1)


def test_a_key_overrides_the_cap_for_its_owner(ledger: Ledger) -> None:
    """The most generous of an owner's usable keys counts; 0 is no cap; a revoked key says nothing."""
    add(ledger, "ada", max_running=1)
    wide = add(ledger, "ada", max_running=3)
    add(ledger, "bob", max_running=0)
    assert ledger.running_of("ada", 2) == (0, 3)
    assert ledger.running_of("bob", 2) == (0, 0)
    assert ledger.running_of("eve", 2) == (0, 2)

    ledger.revoke_key(wide.id)

    assert ledger.running_of("ada", 2) == (0, 1)
    for owner in ("ada", "bob", "ada", "bob", "bob"):
        submit(ledger, owner=owner)
    assert sorted(next_owners(ledger, slots=9)) == ["ada", "bob", "bob", "bob"]


def test_an_urgent_task_passes_everything_that_waits(ledger: Ledger) -> None:
    """Also a runway that is full, and owners at their cap; order among the urgent is age."""
    submit(ledger, owner="eve", priority=Priority.HIGH)
    assert next_owners(ledger, max_running=1) == ["eve"]
    for owner in ("a", "b", "c", "d", "e", "f"):
        submit(ledger, owner=owner, priority=Priority.LOW)
        submit(ledger, owner=owner)
    while next_owners(ledger, max_running=1, slots=2):
        pass
    submit(ledger, owner="eve", priority=Priority.HIGH)
    first, second = (submit(ledger, owner=owner, priority=Priority.HIGH) for owner in ("x", "y"))

    batch = schedule.next_batch(ledger, {"comfy": 2}, (), 1)

    # Eve's first message is still on the runway, and her second one has to wait for it.
    assert [each.task_id for each in batch] == [first.id]
    assert {each.priority for each in batch} == {Priority.HIGH.step}
    claim(ledger, first)
    assert [each.task_id for each in schedule.next_batch(ledger, {"comfy": 2}, (), 1)] == [second.id]


def test_waiting_tasks_are_counted_up_to_a_limit(ledger: Ledger) -> None:
    """By owner and in all; what runs or has ended does not count."""
    tasks = [submit(ledger, owner=owner) for owner in ("ada", "ada", "ada", "bob")]
    claim(ledger, tasks[0])

    assert [ledger.queued(owner, 10) for owner in ("ada", "bob", "eve", None)] == [2, 1, 0, 3]
    assert ledger.queued(None, 2) == 2
