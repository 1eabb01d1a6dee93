"""
ComfyUI workflows in API format, as pure functions: check, bind inputs, find outputs, name files.

A workflow is ``{node_id: {"class_type": str, "inputs": {name: value | [node_id, slot]}}}``. Nothing
here changes its argument, does I/O, or knows which nodes a server has; that part only the server can
check, and does.

What a caller may get wrong ends as :class:`~genpulse.errors.InvalidRequest` with JSON pointers.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

from genpulse.errors import InvalidRequest

__all__ = [
    "Bindings",
    "InputTarget",
    "MediaInput",
    "Workflow",
    "bind",
    "check_structure",
    "declares_no_outputs",
    "input_names",
    "load",
    "media_inputs",
    "output_nodes",
    "replace_values",
    "socket_output_nodes",
    "with_prefixes",
]

Workflow: TypeAlias = dict[str, dict[str, Any]]

MAX_NODES = 5000
MAX_DEPTH = 32
MAX_VALUES = 500_000
MAX_NAME = 256
MAX_NODE_ID = 200
"""Each output is recorded with its node's id; servers themselves name nodes by numbers."""
MAX_ERRORS = 20
MAX_NAMES_SHOWN = 40

TITLE_PREFIX = "INPUT_"
PRIMARY_FIELDS = (
    "value", "text", "string", "prompt", "seed", "noise_seed", "image", "audio", "video", "file",
    "mask", "int", "float", "number", "boolean", "ckpt_name", "lora_name", "url",
)  # fmt: skip
"""Fields a plain name may mean in a node with several literals, if exactly one of them is there."""

_EXPORT_HINT = (
    "this is a workflow in UI format; export it in API format: in ComfyUI choose "
    '"Workflow → Export (API)" (in old versions switch on the dev mode options first, '
    'then "Save (API Format)")'
)


@dataclass(frozen=True, slots=True)
class InputTarget:
    """The field of a node that an input name stands for."""

    node_id: str
    field: str


@dataclass(frozen=True, slots=True)
class MediaInput:
    """A literal that names a file from outside ComfyUI, to be staged on the server first."""

    node_id: str
    field: str
    reference: str
    """``asset:<id>``, ``output:<task_id>/<n>``, ``data:<mime>;base64,…`` or ``https://…``."""
    kind: Literal["asset", "output", "data", "url"]


def load(source: object, *, pointer: str = "") -> Workflow:
    """
    Take a workflow as an object or as JSON text, checked as :func:`check_structure` does.

    Args:
        source: The graph, or its JSON as ``str`` or ``bytes``.
        pointer: Where it stands in the caller's body, put before the pointers of errors.

    Raises:
        InvalidRequest: ``workflow_format_ui`` for the editor's own format, else ``invalid_workflow``.
    """
    if isinstance(source, str | bytes | bytearray):
        try:
            source = json.loads(source, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            detail = "the workflow is not JSON"
            raise InvalidRequest("invalid_workflow", detail, [(pointer, detail)]) from error
    check_structure(source, pointer=pointer)
    assert isinstance(source, Mapping)
    return {node_id: dict(node) for node_id, node in source.items()}


def check_structure(workflow: object, *, pointer: str = "") -> None:
    """
    Check what can be checked without a server: shapes, links to nodes that exist, bounds.

    At most 5,000 nodes, nesting to depth 32; no NaN or infinity, no NUL or lone surrogate in texts.

    Raises:
        InvalidRequest: With up to 20 errors, each with its JSON pointer.
    """
    if _is_ui_format(workflow):
        raise InvalidRequest("workflow_format_ui", _EXPORT_HINT, [(pointer, _EXPORT_HINT)])
    errors = _Errors(pointer)
    with contextlib.suppress(_EnoughError):
        _check_nodes(workflow, errors)
    if errors.found:
        where, what = errors.found[0]
        more = f" (and {len(errors.found) - 1} more)" if len(errors.found) > 1 else ""
        detail = f"the workflow is not valid: {where.removeprefix(pointer) or '/'}: {what}{more}"
        raise InvalidRequest("invalid_workflow", detail, errors.found)


def input_names(workflow: Mapping[str, Any]) -> dict[str, InputTarget]:
    """
    The plain input names of a workflow and the field each stands for.

    A node titled ``INPUT_<name>`` gives the name ``<name>``. It stands for the node's field called
    ``<name>`` if that is a literal; else for its only literal; else for the only one of
    ``PRIMARY_FIELDS`` among its literals. A name that stays ambiguous, or that two nodes carry, is
    not in the result; ``<node_id>.<field>`` reaches every literal regardless.
    """
    names, _ = _plain_names(workflow)
    return names


def bind(workflow: Mapping[str, Any], inputs: Mapping[str, Any], *, pointer: str = "") -> Workflow:
    """
    Put values into a workflow by name; returns a new one.

    ``<node_id>.<field>`` is tried first, then the plain names of :func:`input_names`. Values keep
    their type: a text stays a text, and a value of another kind than the one it replaces is refused
    (whole and broken numbers are one kind, since JavaScript writes ``7.0`` as ``7``). Links are never
    written over.

    Args:
        workflow: Checked by :func:`load`.
        inputs: Values by name.
        pointer: Where *inputs* stands in the caller's body.

    Raises:
        InvalidRequest: ``unknown_input`` with the names that exist, or ``invalid_request``.
    """
    return replace_values(workflow, Bindings(workflow).values(inputs, pointer=pointer))


class Bindings:
    """
    The inputs of one workflow by name, looked up once for any number of sets of values.

    Args:
        workflow: Checked by :func:`load`; not changed while this is used.
    """

    def __init__(self, workflow: Mapping[str, Any]) -> None:
        self.workflow = workflow
        self._plain: tuple[dict[str, InputTarget], dict[str, str]] | None = None

    def values(self, inputs: Mapping[str, Any], *, pointer: str = "") -> dict[tuple[str, str], Any]:
        """
        The values by ``(node_id, field)``, for :func:`replace_values`.

        Raises:
            InvalidRequest: As :func:`bind`.
        """
        values: dict[tuple[str, str], Any] = {}
        given: dict[tuple[str, str], str] = {}
        for name, value in inputs.items():
            where = f"{pointer}/{_escape(str(name))}"
            target = self._find(name, where)
            place = (target.node_id, target.field)
            _check_value(self.workflow[target.node_id]["inputs"][target.field], value, name, where)
            if place in given:
                detail = f'"{given[place]}" and "{name}" both set {target.node_id}.{target.field}'
                raise InvalidRequest("invalid_request", detail, [(where, detail)])
            values[place] = value
            given[place] = name
        return values

    def _find(self, name: str, where: str) -> InputTarget:
        for target in _dotted(self.workflow, name):
            value = self.workflow[target.node_id]["inputs"].get(target.field, _MISSING)
            if _is_link(value):
                detail = f'"{name}" is a link to node {value[0]}; links are never overwritten'
                raise InvalidRequest("invalid_request", detail, [(where, detail)])
            if value is not _MISSING:
                return target
        if self._plain is None:
            self._plain = _plain_names(self.workflow)
        names, reasons = self._plain
        if name in names:
            return names[name]
        if name in reasons:
            detail = f'"{name}" is ambiguous: {reasons[name]}'
        else:
            detail = f'there is no input "{name[:100]}"; {_what_exists(self.workflow, names)}'
        raise InvalidRequest("unknown_input", detail, [(where, detail)])


def replace_values(workflow: Mapping[str, Any], values: Mapping[tuple[str, str], Any]) -> Workflow:
    """A copy with other values in the fields ``(node_id, field)``; nodes without one are shared."""
    changed: Workflow = dict(workflow)
    for (node_id, field), value in values.items():
        node = changed[node_id]
        changed[node_id] = {**node, "inputs": {**node["inputs"], field: value}}
    return changed


OUTPUT_CLASSES = frozenset({
    "PreviewAny", "SaveGLB", "Preview3D", "Preview3DAnimation", "SaveSVGNode", "SaveLatent",
    "SaveImageWebsocket", "ETN_SendImageWebSocket", "VHS_VideoCombine", "Image Save",
    "ShowText|pysssss", "Display Any (rgthree)", "CR Image Output", "DF_Text_Box", "easy showAnything",
    "LayerUtility: SaveImagePlus",
})  # fmt: skip
"""Output nodes whose class name does not begin with ``Save`` or ``Preview``, or is worth naming."""

SOCKET_CLASSES = frozenset({"SaveImageWebsocket", "ETN_SendImageWebSocket"})
"""Nodes whose results go out on the socket alone and never stand in the history."""

_OUTPUT_NAME = re.compile(
    r"^(?:VHS_)?(?:Save|Preview)|(?:^|[\s_|:])(?:Save|Preview)(?:$|[A-Z\s_|])|Show(?:Text|Any)"
)


def output_nodes(
    workflow: Mapping[str, Any], output_classes: Collection[str] | None = None
) -> tuple[str, ...]:
    """
    The nodes that make something a caller could want, in the workflow's order.

    Args:
        workflow: Checked by :func:`load`.
        output_classes: The classes a server declares as ``output_node``. Without them known names
            and the custom of calling such nodes ``Save…`` or ``Preview…`` must do.
    """
    return tuple(
        node_id
        for node_id, node in workflow.items()
        if (
            node["class_type"] in output_classes
            if output_classes is not None
            else node["class_type"] in OUTPUT_CLASSES or _OUTPUT_NAME.search(node["class_type"])
        )
    )


def declares_no_outputs(workflow: Mapping[str, Any], output_classes: Collection[str] | None = None) -> bool:
    """Whether a run that stores nothing is all that this workflow promises."""
    return not output_nodes(workflow, output_classes)


def socket_output_nodes(workflow: Mapping[str, Any]) -> tuple[str, ...]:
    """The nodes whose results only the follower's socket gets."""
    return tuple(node_id for node_id, node in workflow.items() if node["class_type"] in SOCKET_CLASSES)


_ASSET = re.compile(r"asset:[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_OUTPUT = re.compile(r"output:[A-Za-z0-9][A-Za-z0-9-]{0,63}/\d{1,6}\Z")
_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[^;,]{0,100})*;base64,", re.ASCII)
_WEB = re.compile(r"https?://", re.IGNORECASE)
_LOADER = re.compile(r"(?:^|[\s_|])(?:VHS_)?Load", re.ASCII)
_LOADER_FIELDS = frozenset({"image", "mask", "audio", "video", "file", "model_file"})


def media_inputs(workflow: Mapping[str, Any]) -> tuple[MediaInput, ...]:
    """
    The literals that name a file from outside, in the workflow's order.

    ``asset:``, ``output:`` and ``data:`` are recognised in any field; a web address only where a
    loader node (``Load…``) expects a file, since elsewhere it may be meant for the node itself.
    """
    found = []
    for node_id, node in workflow.items():
        for field, value in node["inputs"].items():
            kind = _media_kind(node["class_type"], field, value)
            if kind is not None:
                found.append(MediaInput(node_id, field, value, kind))
    return tuple(found)


def with_prefixes(workflow: Mapping[str, Any], prefix: str) -> Workflow:
    """
    A copy in which every literal ``filename_prefix`` lies under *prefix*.

    With a prefix unique to task and attempt no two servers, tasks or attempts share a file name, and
    no save node is served from the server's cache with the name of an old file. The caller's own
    prefix stays as the tail, with its ``%…%`` tokens; parts that would climb out (``..``, a drive, a
    leading slash) do not, since the server fails on them.
    """
    root = _safe_tail(prefix)
    values = {
        (node_id, "filename_prefix"): f"{root}/{_safe_tail(tail)}"
        for node_id, node in workflow.items()
        if isinstance(tail := node["inputs"].get("filename_prefix"), str)
    }
    return replace_values(workflow, values)


def _media_kind(
    class_type: str, field: str, value: object
) -> Literal["asset", "output", "data", "url"] | None:
    if not isinstance(value, str):
        return None
    if _ASSET.match(value):
        return "asset"
    if _OUTPUT.match(value):
        return "output"
    if _DATA.match(value[:1000]):
        return "data"
    if _WEB.match(value) and field in _LOADER_FIELDS and _LOADER.search(class_type):
        return "url"
    return None


def _safe_tail(tail: str) -> str:
    tail = re.sub(r"[\x00-\x1f\x7f]", "", tail).replace("\\", "/")
    tail = re.sub(r"^[A-Za-z]:", "", tail)
    parts = (re.sub(r"\.{2,}", ".", part).strip(" ") for part in tail.split("/"))
    # File systems stop at 255 bytes, and the server appends its counter.
    kept = [part.encode()[:150].decode(errors="ignore") for part in parts if part.strip(". ")]
    return "/".join(kept[-8:]) or "output"


def _is_ui_format(workflow: object) -> bool:
    if not isinstance(workflow, Mapping):
        return False
    nodes = workflow.get("nodes")
    return isinstance(nodes, list) and (
        any(name in workflow for name in ("links", "last_node_id", "last_link_id", "groups", "version"))
        or all(isinstance(node, Mapping) and "type" in node for node in nodes)
    )


class _EnoughError(Exception):
    """So many errors that more would not help."""


class _Errors:
    def __init__(self, pointer: str) -> None:
        self._pointer = pointer
        self.found: list[tuple[str, str]] = []
        self.values = 0

    def add(self, path: tuple[str, ...], what: str) -> None:
        self.found.append((self._pointer + "".join("/" + _escape(part) for part in path), what))
        if len(self.found) >= MAX_ERRORS:
            raise _EnoughError


def _check_nodes(workflow: object, errors: _Errors) -> None:
    if not isinstance(workflow, Mapping):
        errors.add((), "must be an object of nodes by id")
        return
    if not workflow:
        errors.add((), "has no nodes")
        return
    if len(workflow) > MAX_NODES:
        errors.add((), f"has {len(workflow)} nodes; at most {MAX_NODES} are taken")
        return
    if (
        "prompt" in workflow
        and isinstance(workflow["prompt"], Mapping)
        and "class_type" not in workflow["prompt"]
    ):
        errors.add(("prompt",), 'this is the body of a POST /prompt; send what stands under "prompt"')
        return
    for node_id, node in workflow.items():
        if not isinstance(node_id, str) or not _is_name(node_id) or len(node_id) > MAX_NODE_ID:
            errors.add(
                (str(node_id)[:MAX_NODE_ID],), f"node ids are texts of 1 to {MAX_NODE_ID} visible characters"
            )
        elif not isinstance(node, Mapping):
            errors.add((node_id,), "a node must be an object with class_type and inputs")
        else:
            _check_node(workflow, node_id, node, errors)


def _check_node(workflow: Mapping[Any, Any], node_id: str, node: Mapping[Any, Any], errors: _Errors) -> None:
    class_type = node.get("class_type")
    if not isinstance(class_type, str) or not _is_name(class_type):
        errors.add((node_id, "class_type"), "must name the node's class")
    inputs = node.get("inputs")
    if not isinstance(inputs, Mapping):
        errors.add((node_id, "inputs"), "must be an object of values and links by name")
        return
    for name, value in inputs.items():
        if not isinstance(name, str) or not _is_name(name):
            errors.add(
                (node_id, "inputs", str(name)[:MAX_NAME]), "input names are texts of visible characters"
            )
        elif isinstance(value, list) and len(value) == 2:
            _check_link(workflow, (node_id, "inputs", name), value, errors)
        else:
            _check_plain(value, (node_id, "inputs", name), errors)
    for name, value in node.items():
        if not isinstance(name, str):
            errors.add((node_id,), "names must be texts")
        elif name not in {"class_type", "inputs"}:
            _check_plain(value, (node_id, name), errors)
    meta = node.get("_meta")
    if meta is not None and not isinstance(meta, Mapping):
        errors.add((node_id, "_meta"), "must be an object")


def _check_link(workflow: Mapping[Any, Any], path: tuple[str, ...], link: list[Any], errors: _Errors) -> None:
    source, slot = link
    if not isinstance(source, str) or source not in workflow:
        shown = json.dumps(source, default=str)[:60]
        errors.add(path, f"is a link to node {shown}, which is not there (a list of two is always a link)")
    elif isinstance(slot, bool) or not isinstance(slot, int) or not 0 <= slot < 10_000:
        errors.add(path, "the second part of a link is the number of an output, from 0")


def _check_plain(value: object, path: tuple[str, ...], errors: _Errors) -> None:
    problem = _problem_with(value, errors)
    if problem:
        errors.add(path, problem)


def _problem_with(value: object, errors: _Errors | None = None) -> str | None:
    """What is wrong with a literal, however deep; ``None`` if nothing is."""
    waiting: list[tuple[object, int]] = [(value, 0)]
    count = errors.values if errors else 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if count > MAX_VALUES:
            return "the workflow holds too many values"
        if depth > MAX_DEPTH:
            return f"is nested deeper than {MAX_DEPTH} levels"
        match item:
            case None | bool():
                pass
            case str():
                if not _is_clean(item):
                    return "holds a NUL or half a surrogate pair, which no text may"
            case int():
                if item.bit_length() > 1024:
                    return "is too large a number"
            case float():
                if not math.isfinite(item):
                    return "is not a finite number"
            case list():
                waiting += [(part, depth + 1) for part in item]
            case Mapping():
                for name, part in item.items():
                    if not isinstance(name, str) or not _is_clean(name):
                        return "names must be clean texts"
                    waiting.append((part, depth + 1))
            case _:
                return "is no JSON value"
    if errors:
        errors.values = count
    return None


def _is_clean(text: str) -> bool:
    if "\x00" in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_NAME and _is_clean(text) and not re.search(r"[\x00-\x1f\x7f]", text)


def _is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _escape(part: str) -> str:
    """One part of a JSON pointer (RFC 6901)."""
    return part.replace("~", "~0").replace("/", "~1")


def _titled(workflow: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for node_id, node in workflow.items():
        meta = node.get("_meta")
        title = meta.get("title") if isinstance(meta, Mapping) else None
        if isinstance(title, str) and title.strip().startswith(TITLE_PREFIX):
            name = title.strip().removeprefix(TITLE_PREFIX).strip()
            if name:
                yield name, node_id


def _plain_names(workflow: Mapping[str, Any]) -> tuple[dict[str, InputTarget], dict[str, str]]:
    """The names that mean one field, and for the others the reason why they do not."""
    nodes: dict[str, list[str]] = {}
    for name, node_id in _titled(workflow):
        nodes.setdefault(name, []).append(node_id)
    names: dict[str, InputTarget] = {}
    reasons: dict[str, str] = {}
    for name, node_ids in nodes.items():
        if len(node_ids) > 1:
            reasons[name] = f"{len(node_ids)} nodes have this title; use " + _alternatives(workflow, node_ids)
            continue
        node_id = node_ids[0]
        field = _primary_field(workflow[node_id]["inputs"], name)
        if field is None:
            has = _alternatives(workflow, node_ids)
            reasons[name] = (
                f"its node has no single input to set; use {has}" if has else "its node has only links"
            )
        else:
            names[name] = InputTarget(node_id, field)
    return names, reasons


def _primary_field(inputs: Mapping[str, Any], name: str) -> str | None:
    literals = [field for field, value in inputs.items() if not _is_link(value)]
    if name in literals:
        return name
    if len(literals) == 1:
        return literals[0]
    primary = [field for field in PRIMARY_FIELDS if field in literals]
    return primary[0] if len(primary) == 1 else None


def _alternatives(workflow: Mapping[str, Any], node_ids: Collection[str]) -> str:
    fields = [
        f'"{node_id}.{field}"'
        for node_id in node_ids
        for field, value in workflow[node_id]["inputs"].items()
        if not _is_link(value)
    ]
    return " or ".join([", ".join(fields[:-1]), fields[-1]] if len(fields) > 1 else fields)


_MISSING = object()


def _dotted(workflow: Mapping[str, Any], name: str) -> Iterator[InputTarget]:
    """Every way to read ``<node_id>.<field>``: ids and fields may hold dots themselves."""
    for place, letter in enumerate(name):
        if letter == "." and name[:place] in workflow:
            yield InputTarget(name[:place], name[place + 1 :])


def _what_exists(workflow: Mapping[str, Any], names: Collection[str]) -> str:
    fields = [
        f"{node_id}.{field}"
        for node_id, node in workflow.items()
        for field, value in node["inputs"].items()
        if not _is_link(value)
    ]
    shown = [*names, *fields]
    if not shown:
        return "this workflow has no input that can be set"
    more = f" and {len(shown) - MAX_NAMES_SHOWN} more" if len(shown) > MAX_NAMES_SHOWN else ""
    return "the inputs are: " + ", ".join(shown[:MAX_NAMES_SHOWN]) + more


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "true or false"),
    ((int, float), "a number"),
    (str, "a text"),
    (list, "a list"),
    (Mapping, "an object"),
)


def _kind(value: object) -> str:
    return next((word for types, word in _KINDS if isinstance(value, types)), "null")


def _check_value(old: object, new: object, name: str, where: str) -> None:
    problem = _problem_with(new)
    if problem is None and old is not None and _kind(old) != _kind(new):
        problem = f"must be {_kind(old)}, not {_kind(new)}"
    if problem is None and _is_link(new):
        problem = "a list of two would be a link; inputs set values only"
    if problem is not None:
        detail = f'"{name}" {problem}'
        raise InvalidRequest("invalid_request", detail, [(where, detail)])
