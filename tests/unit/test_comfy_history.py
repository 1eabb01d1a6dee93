"""A finished prompt as the history tells it, and messages that give nothing of the server away."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genpulse.comfy.history import HistoryEntry, ServerFile, parse_history, scrub
from genpulse.errors import ExecutionFailed, ExecutionInterrupted, OutOfMemory


def entry(status: str, *messages: tuple[str, dict[str, Any]], **outputs: Any) -> HistoryEntry:
    """The entry that a server would have written."""
    found = {"status": {"status_str": status, "messages": [list(m) for m in messages]}, "outputs": outputs}
    return parse_history("p", found)


def failure(kind: str, message: str) -> HistoryEntry:
    """The entry of a prompt whose sampler raised."""
    data = {"node_id": "2", "node_type": "KSampler", "exception_type": kind, "exception_message": message}
    return entry("error", ("execution_start", {}), ("execution_error", data))


def test_interrupted_is_told_from_failed_by_the_last_message() -> None:
    """Both are ``status_str: error``; only the messages tell them apart."""
    stopped = entry("error", ("execution_interrupted", {"node_id": "2", "node_type": "KSampler"}))

    assert stopped.status == "interrupted"
    with pytest.raises(ExecutionInterrupted) as caught:
        stopped.raise_for_status()
    assert (caught.value.node_id, caught.value.class_type) == ("2", "KSampler")


def test_node_error_names_its_node() -> None:
    """A node that raised is a permanent failure that says where and why."""
    with pytest.raises(ExecutionFailed, match="ValueError: no") as caught:
        failure("ValueError", "no").raise_for_status()
    assert (caught.value.node_id, caught.value.class_type) == ("2", "KSampler")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("torch.OutOfMemoryError", "Allocation on device"),
        ("torch.cuda.OutOfMemoryError", ""),
        ("RuntimeError", "CUDA error: out of memory"),
    ],
)
def test_out_of_memory_can_be_tried_again(kind: str, message: str) -> None:
    """Every way in which torch says that the GPU is full is retryable."""
    with pytest.raises(OutOfMemory):
        failure(kind, message).raise_for_status()


def test_a_blocked_branch_does_not_fail_a_success() -> None:
    """A success is one even if messages of blocked nodes stand in its history."""
    blocked = ("execution_error", {"exception_type": "ExecutionBlocked"})

    entry("success", blocked).raise_for_status()
    assert entry("success", blocked).error is None


def test_a_blocked_branch_does_not_hide_an_interrupt() -> None:
    """What ended the prompt counts, not a blocked node reported after it."""
    stopped = ("execution_interrupted", {"node_id": "2"})
    blocked = ("execution_error", {"exception_type": "ExecutionBlocked"})

    assert entry("error", stopped, blocked).status == "interrupted"


def test_every_key_of_every_node_is_collected() -> None:
    """Files are found under any key and texts are kept; ``animated`` is a flag and no output."""
    found = entry(
        "success",
        **{
            "1": {"images": [{"filename": "a.webp", "subfolder": "s", "type": "output"}], "animated": [True]},
            "2": {
                "gifs": [
                    {"filename": "b.mp4", "subfolder": "", "type": "temp", "fullpath": "/x", "frame_rate": 8}
                ]
            },
            "3": {"text": ["hello"], "anything": [{"no": "file"}, 3, None]},
        },
    )

    assert [output.file for output in found.files] == [
        ServerFile("a.webp", "s", "output"),
        ServerFile("b.mp4", "", "temp"),
    ]
    assert found.files[1].is_temp
    assert found.files[1].extra == {"frame_rate": 8}
    assert [output.text for output in found.texts] == ["hello"]


def test_a_bare_string_is_put_together_again() -> None:
    """The server lists the characters of a UI value that is a bare string."""
    assert [output.text for output in entry("success", **{"1": {"text": list("hello")}}).texts] == ["hello"]


def test_outputs_before_an_error_are_kept() -> None:
    """Nodes that ended before another one raised have outputs all the same."""
    data = {"node_id": "2", "node_type": "X", "exception_type": "ValueError", "exception_message": "no"}
    found = entry("error", ("execution_error", data), **{"1": {"images": [{"filename": "a.png"}]}})

    assert found.status == "error"
    assert found.files[0].file == ServerFile("a.png", "", "output")


def test_a_file_in_the_output_folder_is_annotated_in_a_reference() -> None:
    """A loader node finds files of the other folders by their annotation."""
    assert ServerFile("a.png", "sub", "input").reference == "sub/a.png"
    assert ServerFile("a.png", "sub", "output").reference == "sub/a.png [output]"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "outputs": st.dictionaries(st.text(max_size=3), st.dictionaries(st.text(max_size=6), JSON))
            | JSON,
            "status": st.fixed_dictionaries(
                {},
                optional={
                    "status_str": st.sampled_from(["success", "error"]) | JSON,
                    "messages": st.lists(
                        st.tuples(st.sampled_from(["execution_error", "execution_cached"]), JSON).map(list)
                    )
                    | JSON,
                },
            )
            | JSON,
        },
    )
)
def test_no_history_entry_is_too_odd(found: dict[str, Any]) -> None:
    """Whatever a custom node put into its UI data, the entry is read."""
    parse_history("p", found)


@pytest.mark.parametrize(
    ("said", "public"),
    [
        ("No such file: '/home/comfy/models/x.safetensors'", "No such file: '<path>/x.safetensors'"),
        (r"cannot open C:\ComfyUI\models\x.pt now", "cannot open <path>/x.pt now"),
        ("see http://10.0.0.7:8188/view?x=1 for more", "see <url> for more"),
        ("connect to 192.168.1.4:5432 failed", "connect to <address> failed"),
        ("steps: 3/4 of 1/2", "steps: 3/4 of 1/2"),
        (
            "Value not in list: 'a' not in ['b', 'sd/c.ckpt']",
            "Value not in list: 'a' not in ['b', 'sd/c.ckpt']",
        ),
    ],
)
def test_messages_lose_paths_and_addresses_only(said: str, public: str) -> None:
    """What a server says is shown without its paths, addresses and URLs, and otherwise as it is."""
    assert scrub(said) == public


def test_messages_are_short() -> None:
    """A message of a megabyte becomes one of at most the limit."""
    assert len(scrub("x" * 1_000_000)) == 500


@given(st.text())
def test_scrubbed_text_can_be_shown_anywhere(said: str) -> None:
    """No control characters and no failure, whatever was said."""
    assert "\x00" not in scrub(said)
    json.dumps(scrub(said))
