"""What a ComfyUI server says on its socket, read without I/O and without ever failing."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genpulse.comfy import events
from genpulse.comfy.events import ProgressMeter, parse_binary, parse_text

PNG = b"\x89PNG\r\n\x1a\n"


def text(kind: str, **data: Any) -> events.Event:
    """The event that a text message gives."""
    return parse_text(json.dumps({"type": kind, "data": data}))


def test_first_status_carries_the_client_id() -> None:
    """The first message of a socket says who the server thinks we are."""
    assert text("status", status={"exec_info": {"queue_remaining": 2}}, sid="me") == events.Status(2, "me")


def test_executing_null_is_the_end_and_keeps_its_prompt() -> None:
    """``executing`` with node null and our id is the very last message of a prompt."""
    assert text("executing", node=None, prompt_id="p") == events.Executing(None, "p")


def test_executing_after_a_reconnect_names_no_prompt() -> None:
    """The replay that a reconnecting client gets has no prompt id, and is an event all the same."""
    assert text("executing", node="3") == events.Executing("3", None)


def test_blocked_node_is_not_the_end() -> None:
    """An ``ExecutionBlocked`` error is not final: the prompt goes on and usually succeeds."""
    common = {"prompt_id": "p", "node_id": "1", "node_type": "X", "exception_message": ""}
    blocked = text("execution_error", exception_type="ExecutionBlocked", **common)
    raised = text("execution_error", exception_type="ValueError", **common)

    assert isinstance(blocked, events.ExecutionError)
    assert isinstance(raised, events.ExecutionError)
    assert not blocked.final
    assert raised.final


def test_bare_nan_in_a_message_is_read() -> None:
    """A node's UI values go through the server unchanged, bare NaN included."""
    event = parse_text(
        '{"type": "executed", "data": {"node": "1", "prompt_id": "p", "output": {"n": [NaN]}}}'
    )

    assert isinstance(event, events.Executed)


def test_nan_progress_is_not_progress() -> None:
    """A progress that is no number is nothing to show."""
    assert parse_text('{"type":"progress","data":{"value":NaN,"max":2,"node":"1"}}') == events.Unknown(
        "progress"
    )


def test_event_1_names_neither_node_nor_prompt() -> None:
    """The old binary preview is an image type and bytes from offset 8."""
    event = parse_binary(struct.pack(">II", 1, 2) + PNG)

    assert event == events.PreviewImage("image/png", PNG)


def test_event_4_names_node_and_prompt() -> None:
    """The preview with metadata carries JSON of announced length, then the bytes."""
    about = json.dumps({"node_id": "2", "prompt_id": "p", "display_node_id": "2", "image_type": "image/png"})
    event = parse_binary(struct.pack(">II", 4, len(about)) + about.encode() + PNG)

    assert event == events.PreviewImage("image/png", PNG, "2", "p", "2")


def test_text_frame_is_read() -> None:
    """Binary event 3 is a node id with its length, then text."""
    assert parse_binary(struct.pack(">II", 3, 1) + b"2working") == events.TextFrame("2", "working")


@pytest.mark.parametrize(
    "frame", [b"", b"\0\0\0\1", struct.pack(">II", 1, 9), struct.pack(">II", 4, 2**32 - 1)]
)
def test_broken_frames_are_unknown(frame: bytes) -> None:
    """A frame that ends too early or announces nonsense is unknown, not an error."""
    assert isinstance(parse_binary(frame), events.Unknown)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=15,
)
NAMES = st.sampled_from(
    ["node", "prompt_id", "value", "max", "nodes", "status", "sid", "output", "exception_type", "node_id"]
)


@given(st.sampled_from(sorted(events._READERS)), st.dictionaries(NAMES, JSON, max_size=6) | JSON)
def test_parse_text_never_raises_on_odd_data(kind: str, data: object) -> None:
    """Whatever stands in a message of a known type, reading it gives an event."""
    parse_text(json.dumps({"type": kind, "data": data}))


@given(st.text() | st.binary())
def test_parse_text_never_raises_on_noise(message: str | bytes) -> None:
    """Nor does noise in place of JSON."""
    assert isinstance(parse_text(message), events.Unknown)


@given(st.integers(0, 5), st.integers(0, 2**32 - 1) | st.integers(0, 40), st.binary(max_size=60))
def test_parse_binary_never_raises(kind: int, word: int, rest: bytes) -> None:
    """Whatever a binary frame holds, reading it gives an event."""
    parse_binary(struct.pack(">II", kind, word) + rest)


def test_deeply_nested_json_is_unknown() -> None:
    """A message that would exhaust the parser's stack is unknown."""
    assert parse_text("[" * 100_000) == events.Unknown("")


SAMPLER = {
    "1": {"class_type": "Loader", "inputs": {}},
    "2": {"class_type": "KSampler", "inputs": {"steps": 8, "model": ["1", 0]}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}},
}


def test_sampler_steps_weigh_more_than_loading() -> None:
    """Half of eight steps, after one of two other nodes, is half of ten parts."""
    meter = ProgressMeter(SAMPLER)
    meter.update(events.ExecutionCached("p", ("1",)))
    meter.update(events.Progress("2", 4, 8, "p"))

    assert meter.percent == 50.0
    assert meter.detail.as_dict() == {
        "node_id": "2",
        "class_type": "KSampler",
        "step": 4,
        "steps": 8,
        "nodes_done": 1,
        "nodes_total": 3,
    }


def test_only_success_is_a_hundred() -> None:
    """All nodes done is 99; the success message makes it 100."""
    meter = ProgressMeter(SAMPLER)
    meter.update(events.ExecutionCached("p", ("1", "2", "3")))
    before = meter.percent
    meter.update(events.ExecutionSuccess("p"))

    assert (before, meter.percent) == (99.0, 100.0)


def test_a_new_node_forgets_the_steps_of_the_last() -> None:
    """Steps belong to the node that runs, not to the one before it."""
    meter = ProgressMeter(SAMPLER)
    meter.update(events.Progress("2", 8, 8, "p"))
    meter.update(events.Executing("3", "p"))

    assert (meter.detail.node_id, meter.detail.step, meter.detail.steps) == ("3", None, None)


NODE = st.sampled_from(["1", "2", "3", "9", "1.0.0.2"])
EVENT = st.one_of(
    st.builds(events.Progress, NODE, st.floats(-5, 50), st.floats(-1, 20), st.just("p")),
    st.builds(events.Executing, NODE | st.none(), st.just("p"), NODE),
    st.builds(events.ExecutionCached, st.just("p"), st.lists(NODE).map(tuple)),
    st.builds(
        events.ProgressState,
        st.just("p"),
        st.lists(
            st.builds(events.NodeState, NODE, st.floats(0, 9), st.floats(0, 9), st.booleans(), NODE)
        ).map(tuple),
    ),
    st.just(events.ExecutionSuccess("p")),
    st.just(events.ExecutionStart("p")),
)


@given(st.lists(EVENT, max_size=30))
def test_percentage_never_falls(heard: list[events.Event]) -> None:
    """Whatever comes in whatever order, the percentage only rises and stays within 0 and 100."""
    meter = ProgressMeter(SAMPLER)
    seen = [0.0]
    for event in heard:
        meter.update(event)
        seen.append(meter.percent)

    assert seen == sorted(seen)
    assert seen[-1] <= 100.0
    assert meter.detail.nodes_done <= meter.detail.nodes_total
