"""Workflows in API format: checked, bound, and never changed in place."""

from __future__ import annotations

import copy
import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genpulse.comfy import workflow as wf
from genpulse.errors import InvalidRequest

GRAPH: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 7, "steps": 20, "cfg": 7, "sampler_name": "euler", "model": ["4", 0], "positive": ["6", 0]},
        "_meta": {"title": "INPUT_seed"},
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}, "_meta": {"title": "INPUT_prompt"}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "mine/%date%_cat"}},
}  # fmt: skip


def refused(source: object) -> InvalidRequest:
    """The error that loading gives."""
    with pytest.raises(InvalidRequest) as caught:
        wf.load(source, pointer="/params/workflow")
    return caught.value


def changed(**inputs: Any) -> dict[str, Any]:
    """The graph with other inputs in its sampler."""
    graph = copy.deepcopy(GRAPH)
    graph["3"]["inputs"] |= inputs
    return graph


class TestLoad:
    def test_api_format_passes_as_object_and_as_text(self) -> None:
        """A graph is taken as it is, or as JSON text or bytes."""
        assert wf.load(GRAPH) == wf.load(json.dumps(GRAPH)) == wf.load(json.dumps(GRAPH).encode()) == GRAPH

    def test_ui_format_is_told_how_to_be_exported(self) -> None:
        """The editor's own format is recognised, with the menu entry that gives the right one."""
        error = refused({"nodes": [{"id": 1, "type": "KSampler"}], "links": [], "version": 0.4})

        assert error.problem == "workflow_format_ui"
        assert "Workflow → Export (API)" in error.detail

    def test_body_of_post_prompt_is_recognised(self) -> None:
        """Who sends the whole request body of ComfyUI is told which part is wanted."""
        assert "POST /prompt" in refused({"prompt": GRAPH, "client_id": "x"}).detail

    @pytest.mark.parametrize(
        ("graph", "pointer"),
        [
            ([], ""),
            ({}, ""),
            ({"1": 5}, "/1"),
            ({"1": {"inputs": {}}}, "/1/class_type"),
            ({"1": {"class_type": "X"}}, "/1/inputs"),
            ({"a/b": {"class_type": "X", "inputs": {"y~": ["nowhere", 0]}}}, "/a~1b/inputs/y~0"),
            ({"1": {"class_type": "X", "inputs": {"y": ["1", "0"]}}}, "/1/inputs/y"),
            ({"1": {"class_type": "X", "inputs": {"y": ["1", True]}}}, "/1/inputs/y"),
            ({"1": {"class_type": "X", "inputs": {"y": [1, 0]}}}, "/1/inputs/y"),
            ({"1": {"class_type": "X", "inputs": {"y": float("nan")}}}, "/1/inputs/y"),
            ({"1": {"class_type": "X", "inputs": {"y": "a\x00b"}}}, "/1/inputs/y"),
            ({"1": {"class_type": "X", "inputs": {"y": "\ud800"}}}, "/1/inputs/y"),
            ({"1": {"class_type": "X", "inputs": {"y": object()}}}, "/1/inputs/y"),
            ({"1": {"class_type": "X", "inputs": {}, "_meta": []}}, "/1/_meta"),
        ],
    )
    def test_errors_point_at_their_place(self, graph: object, pointer: str) -> None:
        """Each error carries the JSON pointer of the caller's own body."""
        error = refused(graph)

        assert error.problem == "invalid_workflow"
        assert error.errors[0][0] == "/params/workflow" + pointer

    def test_text_that_is_no_json_is_refused(self) -> None:
        """Neither broken JSON nor bare NaN nor endless nesting gets in."""
        for source in ("{", b"\xff", '{"1": NaN}', "[" * 100_000):
            assert refused(source).problem == "invalid_workflow"

    def test_bounds_hold(self) -> None:
        """Too many nodes and too deep nesting are refused."""
        node = {"class_type": "X", "inputs": {}}
        deep: Any = 1
        for _ in range(50):
            deep = {"x": deep}

        assert "5001 nodes" in refused({str(n): node for n in range(5001)}).detail
        assert "nested" in refused({"1": {"class_type": "X", "inputs": {"y": deep}}}).detail

    def test_a_node_id_is_no_longer_than_an_outputs_record_takes(self) -> None:
        """Otherwise the task would be rendered, and its outputs could not be written down."""
        node = {"class_type": "SaveImage", "inputs": {}}

        assert wf.load({"n" * 200: node})
        assert refused({"n" * 201: node}).problem == "invalid_workflow"

    def test_twenty_errors_are_enough(self) -> None:
        """A hopeless graph gives a bounded answer."""
        assert len(refused({str(n): None for n in range(500)}).errors) == 20

    JSON = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["class_type", "inputs", "1", "_meta", "nodes", "x"]), inner, max_size=4
            )
        ),
        max_leaves=20,
    )

    @given(JSON)
    def test_no_input_breaks_it(self, source: object) -> None:
        """Any JSON is either taken or refused with a problem; what is taken can be worked with."""
        refusals: list[InvalidRequest] = []
        graph: wf.Workflow = {}
        try:
            graph = wf.load(source)
        except InvalidRequest as error:
            refusals.append(error)
        assert all(refusal.problem in {"invalid_workflow", "workflow_format_ui"} for refusal in refusals)
        assert all(refusal.errors for refusal in refusals)
        wf.input_names(graph)
        wf.output_nodes(graph)
        wf.media_inputs(graph)
        wf.with_prefixes(graph, "t/1")


class TestBind:
    def test_titled_nodes_give_plain_names(self) -> None:
        """``INPUT_seed`` on a sampler is its seed, ``INPUT_prompt`` on an encoder its only text."""
        assert wf.input_names(GRAPH) == {
            "seed": wf.InputTarget("3", "seed"),
            "prompt": wf.InputTarget("6", "text"),
        }

    def test_values_arrive_and_the_original_stays(self) -> None:
        """Binding gives a new graph; other nodes are shared and the given one is untouched."""
        before = copy.deepcopy(GRAPH)
        bound = wf.bind(GRAPH, {"seed": 2**64 - 1, "prompt": "a dog", "3.steps": 4})

        assert bound["3"]["inputs"]["seed"] == 2**64 - 1
        assert bound["3"]["inputs"]["steps"] == 4
        assert bound["6"]["inputs"]["text"] == "a dog"
        assert bound["4"] is GRAPH["4"]
        assert before == GRAPH

    def test_a_title_may_name_the_field_itself(self) -> None:
        """``INPUT_steps`` on a sampler means its steps, though it has a seed too."""
        graph = copy.deepcopy(GRAPH)
        graph["3"]["_meta"]["title"] = "INPUT_steps"

        assert wf.input_names(graph)["steps"] == wf.InputTarget("3", "steps")

    def test_links_are_never_overwritten(self) -> None:
        """Naming a linked field is an error that says where the link leads."""
        with pytest.raises(InvalidRequest, match="link to node 4"):
            wf.bind(GRAPH, {"3.model": "x"})

    def test_unknown_names_are_answered_with_the_names_that_exist(self) -> None:
        """The list holds the plain names and the fields."""
        with pytest.raises(InvalidRequest) as caught:
            wf.bind(GRAPH, {"sede": 1}, pointer="/params/inputs")

        assert caught.value.problem == "unknown_input"
        assert caught.value.errors[0][0] == "/params/inputs/sede"
        for name in ("seed", "prompt", "3.steps", "4.ckpt_name"):
            assert name in caught.value.detail
        assert "3.model" not in caught.value.detail

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("prompt", 5),
            ("prompt", {"a": 1}),
            ("prompt", ["4", 0]),
            ("prompt", None),
            ("seed", "5"),
            ("seed", True),
            ("seed", float("inf")),
            ("prompt", "a\x00"),
        ],
    )
    def test_contradicting_values_are_refused(self, name: str, value: object) -> None:
        """A value of another kind than the one it replaces is a mistake, and never a link."""
        with pytest.raises(InvalidRequest) as caught:
            wf.bind(GRAPH, {name: value})
        assert caught.value.problem == "invalid_request"

    def test_whole_and_broken_numbers_are_one_kind(self) -> None:
        """The editor writes a strength of 7.0 as 7, so a 7.5 must fit there; it stays a float."""
        assert wf.bind(GRAPH, {"3.cfg": 7.5})["3"]["inputs"]["cfg"] == 7.5

    def test_a_name_on_two_nodes_is_ambiguous(self) -> None:
        """Two nodes with one title are not merged silently; the answer names the ways out."""
        graph = copy.deepcopy(GRAPH)
        graph["4"]["_meta"] = {"title": "INPUT_seed"}
        with pytest.raises(InvalidRequest, match="ambiguous") as caught:
            wf.bind(graph, {"seed": 1})
        assert '"3.seed"' in caught.value.detail
        assert "seed" not in wf.input_names(graph)

    def test_two_names_for_one_field_contradict(self) -> None:
        """The same field by title and by id in one request is refused."""
        with pytest.raises(InvalidRequest, match="both set"):
            wf.bind(GRAPH, {"seed": 1, "3.seed": 2})

    def test_ids_and_fields_with_dots_are_found(self) -> None:
        """Subgraph ids and dynamic inputs hold dots themselves."""
        graph = {
            "1.2": {"class_type": "X", "inputs": {"a.b": 1}},
            "1": {"class_type": "X", "inputs": {"c": 2}},
        }

        assert wf.bind(graph, {"1.2.a.b": 5})["1.2"]["inputs"]["a.b"] == 5
        assert wf.bind(graph, {"1.c": 5})["1"]["inputs"]["c"] == 5

    SCALAR = st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False, allow_infinity=False) | st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20
    )  # fmt: skip
    NAME = st.text(string.ascii_lowercase + "_.", min_size=1, max_size=6)
    ONE_NODE = st.fixed_dictionaries(
        {"class_type": st.just("X"), "inputs": st.dictionaries(NAME, SCALAR, max_size=4)},
        optional={"_meta": st.fixed_dictionaries({"title": NAME.map("INPUT_{}".format) | NAME})},
    )

    @given(st.dictionaries(NAME, ONE_NODE, min_size=1, max_size=4), SCALAR, st.data())
    def test_binding_changes_the_named_field_and_nothing_else(
        self, graph: dict[str, Any], value: object, data: st.DataObject
    ) -> None:
        """For any graph and any literal field: the value arrives with its type, all else is equal."""
        graph = wf.load(graph)
        fields = [(node, field) for node, body in graph.items() for field in body["inputs"]]
        if not fields:
            return
        node, field = data.draw(st.sampled_from(fields))
        try:
            bound = wf.bind(graph, {f"{node}.{field}": value})
        except InvalidRequest:
            assert wf._kind(value) != wf._kind(graph[node]["inputs"][field])
            return
        differing = [
            place
            for place in fields
            if bound[place[0]]["inputs"][place[1]] is not graph[place[0]]["inputs"][place[1]]
        ]
        assert len(differing) <= 1
        for found_node, found_field in differing:
            assert f"{found_node}.{found_field}" == f"{node}.{field}"
            assert bound[found_node]["inputs"][found_field] is value


class TestOutputs:
    @pytest.mark.parametrize(
        "class_type",
        ["SaveImage", "PreviewImage", "SaveAnimatedWEBP", "PreviewAny", "VHS_VideoCombine", "SaveVideo", "Image Save", "ImpactPreviewX_Save"],
    )  # fmt: skip
    def test_saving_and_previewing_nodes_are_outputs(self, class_type: str) -> None:
        """Known names, and the custom of naming such nodes."""
        graph = {"1": {"class_type": class_type, "inputs": {}}}

        assert wf.output_nodes(graph) == ("1",)
        assert not wf.declares_no_outputs(graph)

    @pytest.mark.parametrize("class_type", ["KSampler", "LoadImage", "EmptyLatentImage", "VAEDecode"])
    def test_other_nodes_are_not(self, class_type: str) -> None:
        """A graph without such a node promises nothing to store."""
        assert wf.declares_no_outputs({"1": {"class_type": class_type, "inputs": {}}})

    def test_what_the_server_declares_counts_more(self) -> None:
        """With the server's own list, names mean nothing."""
        assert wf.output_nodes(GRAPH, {"KSampler"}) == ("3",)

    def test_socket_nodes_are_found(self) -> None:
        """Results that go out on the socket alone must be known beforehand."""
        assert wf.socket_output_nodes({"5": {"class_type": "SaveImageWebsocket", "inputs": {}}}) == ("5",)


class TestPrefixes:
    def test_tail_and_tokens_are_kept(self) -> None:
        """The caller's own prefix stays behind ours, tokens included; the original is untouched."""
        named = wf.with_prefixes(GRAPH, "genpulse/task-1/2")

        assert named["9"]["inputs"]["filename_prefix"] == "genpulse/task-1/2/mine/%date%_cat"
        assert GRAPH["9"]["inputs"]["filename_prefix"] == "mine/%date%_cat"

    def test_links_stay(self) -> None:
        """A prefix that comes from another node is not ours to change."""
        graph = {"9": {"class_type": "SaveImage", "inputs": {"filename_prefix": ["4", 0]}}}

        assert wf.with_prefixes(graph, "t") == graph

    @given(st.text(max_size=60) | st.text("./\\%aC:", max_size=20))
    def test_no_tail_climbs_out(self, tail: str) -> None:
        """Whatever the caller wrote, the name stays below our prefix and has no double dot."""
        graph = {"9": {"class_type": "SaveImage", "inputs": {"filename_prefix": tail}}}
        name = wf.with_prefixes(graph, "t/1")["9"]["inputs"]["filename_prefix"]

        assert name.startswith("t/1/")
        assert ".." not in name
        assert "\\" not in name
        assert all(part.strip(". ") for part in name.split("/"))
        assert all(len(part.encode()) <= 150 for part in name.split("/"))


class TestMedia:
    def test_references_are_found_with_their_place(self) -> None:
        """Assets, outputs and data in any field, web addresses only where a loader expects a file."""
        graph = {
            "1": {"class_type": "LoadImage", "inputs": {"image": "asset:0198c-x"}},
            "2": {"class_type": "VHS_LoadVideo", "inputs": {"video": "https://example.org/a.mp4"}},
            "3": {
                "class_type": "Custom",
                "inputs": {"any": "output:0198c/2", "url": "https://example.org/a"},
            },
            "4": {"class_type": "LoadAudio", "inputs": {"audio": "data:audio/flac;base64,AAAA"}},
            "5": {"class_type": "CLIPTextEncode", "inputs": {"text": "asset: a pot of gold, output:many"}},
            "6": {"class_type": "LoadImage", "inputs": {"image": "plain.png"}},
            "7": {"class_type": "LoadImage", "inputs": {"image": "HTTP://example.org/a.png"}},
        }

        assert [(m.node_id, m.field, m.kind) for m in wf.media_inputs(graph)] == [
            ("1", "image", "asset"),
            ("2", "video", "url"),
            ("3", "any", "output"),
            ("4", "audio", "data"),
            ("7", "image", "url"),
        ]

    def test_references_can_be_replaced(self) -> None:
        """The name on the server takes the place of the reference."""
        graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "asset:x"}}}

        assert wf.replace_values(graph, {("1", "image"): "s/a.png"})["1"]["inputs"] == {"image": "s/a.png"}
