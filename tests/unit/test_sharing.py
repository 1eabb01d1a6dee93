"""What a batch's tasks share is stored once, and what comes back is exactly what went in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genpulse.ledger.labels import label
from genpulse.ledger.sharing import Shared, join, split

SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, -0.0, 1.0]) | st.text("ab")
KEYS = st.sampled_from("abc")
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(KEYS, SCALARS, max_size=3)
PARAMS = st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=3), max_size=3)


@given(st.lists(PARAMS, min_size=1, max_size=4))
def test_what_comes_back_is_what_went_in(params: list[dict[str, Any]]) -> None:
    """Types, signs of zero and the order of keys included, whatever the tasks have in common."""
    shared, own = split(params)

    stored = json.loads(json.dumps([shared, own]))

    assert [json.dumps(join(stored[0], each)) for each in stored[1]] == [json.dumps(each) for each in params]


@given(st.lists(PARAMS, min_size=1, max_size=4), st.lists(PARAMS, min_size=1, max_size=4))
def test_a_rest_and_what_is_shared_are_the_whole(
    kept: list[dict[str, Any]], others: list[dict[str, Any]]
) -> None:
    """Of those that shared it always, and of any others where it can be said at all."""
    params, _ = split(kept)
    shared = Shared("batch", json.loads(json.dumps(params)))

    for each in kept:
        assert shared.rest_of(each) is not None
    for each in [*kept, *others, *kept]:
        rest = shared.rest_of(each)
        if rest is not None:
            assert json.dumps(join(shared.params, json.loads(json.dumps(rest)))) == json.dumps(each)


@pytest.mark.parametrize("pair", [(1, True), (1, 1.0), (0.0, -0.0), ([1], [True]), ({"a": 0}, {"a": False})])
def test_equal_is_not_the_same(pair: tuple[Any, Any]) -> None:
    """JSON tells apart what Python calls equal."""
    params = [{"x": {"y": value}} for value in pair]

    shared, own = split(params)

    assert [json.dumps(join(shared, each)) for each in own] == [json.dumps(each) for each in params]


def test_a_workflow_is_stored_once_down_to_its_nodes() -> None:
    """Also where each task brought its own copy, and only a seed in one node differs."""
    nodes = {str(number): {"class_type": "A", "inputs": {"text": "x" * 100}} for number in range(50)}
    params = [{"workflow": {**nodes, "7": {"class_type": "B", "inputs": {"seed": n}}}} for n in range(20)]

    _, own = split(json.loads(json.dumps(params)))

    assert own[3] == {"workflow": {"7": {"class_type": "B", "inputs": {"seed": 3}}}}


def test_an_input_that_all_have_is_stored_once() -> None:
    """A picture as a data URI among inputs that vary otherwise."""
    params = [{"inputs": {"seed": n, "image": "data:image/png;base64," + "A" * 1000}} for n in range(3)]

    _, own = split(params)

    assert own == [{"inputs": {"seed": n}} for n in range(3)]


def test_labels_do_not_run_into_one_another() -> None:
    """Owner, key and value stay apart in the digest."""
    assert len({label("a", "b", "c"), label("ab", "", "c"), label("a", "bc", ""), label("", "ab", "c")}) == 4
