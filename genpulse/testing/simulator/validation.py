"""
What the server says to a prompt before it queues it: the same checks in the same words as ComfyUI.

Two things are easy to miss. Literals are converted *in place* to the declared type, so the prompt in queue
and history can differ from what was sent. And values of the wrong JSON type are not checked at all: they
raise here and become a plain 500.

Source: ComfyUI 0.3.64 ``execution.validate_prompt`` and ``validate_inputs``; trace 04, 05 and 36.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from typing import Any

from genpulse.testing.simulator.files import Directories
from genpulse.testing.simulator.nodes import NODES, NodeSpec

__all__ = ["Verdict", "validate_prompt"]

_CONVERSIONS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
_LONG_LIST = 20


@dataclass(frozen=True)
class Verdict:
    """Whether a prompt is taken: the output nodes that will run, and what is wrong with others."""

    outputs: list[str]
    error: dict[str, Any] | None
    node_errors: dict[str, Any]


def validate_prompt(prompt: Any, files: Directories, targets: Any = None, *, newer: bool = False) -> Verdict:
    """
    Check *prompt* and convert its literals in place.

    Args:
        prompt: Whatever stood under ``prompt`` in the body, of any JSON type.
        targets: ``partial_execution_targets``, or None for all output nodes.
        newer: Report unknown classes and cycles as newer servers do.

    Raises:
        Exception: Of many kinds, when the JSON types are wrong; the server answers 500.
    """
    outputs: list[str] = []
    for node_id in prompt:
        entry = prompt[node_id]
        if "class_type" not in entry:
            message = "Cannot execute because a node is missing the class_type property."
            return _refused(_unknown_node(message, node_id, None, entry, newer=newer))
        class_type = entry["class_type"]
        spec = NODES.get(class_type)
        if spec is None:
            message = f"Cannot execute because node {class_type} does not exist."
            return _refused(_unknown_node(message, node_id, class_type, entry, newer=newer))
        if spec.output_node and (targets is None or node_id in targets):
            outputs.append(node_id)
    if not outputs:
        return _refused(_error("prompt_no_outputs", "Prompt has no outputs", ""))

    check = _Check(prompt, files, newer=newer)
    good: list[str] = []
    top_level: list[str] = []
    for output in outputs:
        try:
            valid, errors = check.node(output)
        except Exception as exc:  # noqa: BLE001  reported in the answer, as the original does
            errors = [_exception("exception_during_validation", "Exception when validating node", exc)]
            valid = False
            check.validated[output] = (False, errors)
        if valid:
            good.append(output)
            continue
        top_level += [f"{error['message']}: {error['details']}" for error in errors]
        check.blame(output)
    if not good:
        message = "Prompt outputs failed validation"
        error = _error("prompt_outputs_failed_validation", message, "\n".join(top_level))
        return Verdict([], error, check.node_errors)
    return Verdict(good, None, check.node_errors)


class _Check:
    """One validation: results by node, so that shared nodes are checked once."""

    def __init__(self, prompt: Any, files: Directories, *, newer: bool) -> None:
        self.prompt = prompt
        self.files = files
        self.newer = newer
        self.validated: dict[str, tuple[bool, list[dict[str, Any]]]] = {}
        self.node_errors: dict[str, Any] = {}
        self._path: list[str] = []

    def blame(self, output: str) -> None:
        """Put every node found wrong so far on the list, as something *output* depends on."""
        # As in the original this names an output beside nodes it does not depend on, if those were
        # found wrong for an earlier output.
        for node_id, (valid, errors) in self.validated.items():
            if not valid and errors:
                entry = self.node_errors.setdefault(
                    node_id,
                    {
                        "errors": errors,
                        "dependent_outputs": [],
                        "class_type": self.prompt[node_id]["class_type"],
                    },
                )
                entry["dependent_outputs"].append(output)

    def node(self, node_id: str) -> tuple[bool, list[dict[str, Any]]]:
        """Validate one node and all above it. Recursive, so long chains fail as they do in ComfyUI."""
        if node_id in self.validated:
            return self.validated[node_id]
        if self.newer and node_id in self._path:
            cycle = " -> ".join([*self._path[self._path.index(node_id) :], node_id])
            return False, [_error("dependency_cycle", "Dependency cycle detected", cycle)]
        inputs = self.prompt[node_id]["inputs"]
        spec = NODES[self.prompt[node_id]["class_type"]]
        errors: list[dict[str, Any]] = []
        valid = True
        self._path.append(node_id)
        try:
            for name in (*spec.required, *spec.optional):
                if name not in inputs:
                    if name in spec.required:
                        errors.append(
                            _input_error("required_input_missing", "Required input is missing", name, name)
                        )
                    continue
                if isinstance(inputs[name], list):
                    valid = self._link(spec, name, inputs[name], errors) and valid
                else:
                    self._literal(spec, name, inputs, errors)
        finally:
            self._path.pop()
        if spec.validate is not None:
            # The check of the node's own sees literals only; linked values are not known yet.
            known = {n: inputs[n] for n in spec.validated if n in inputs and not isinstance(inputs[n], list)}
            wrong = spec.validate(self.files, known) if known else None
            if wrong is not None:
                for name in known:
                    message = "Custom validation failed for node"
                    errors.append(
                        _input_error("custom_validation_failed", message, f"{name} - {wrong}", name)
                    )
        result = (valid and not errors, errors)
        self.validated[node_id] = result
        return result

    def _link(self, spec: NodeSpec, name: str, link: list[Any], errors: list[dict[str, Any]]) -> bool:
        """Check a link; False if what it leads to is wrong, whose errors are reported there."""
        wanted, config = _config(spec, name)
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            more = {"input_config": config, "received_value": link}
            errors.append(_input_error("bad_linked_input", message, name, name, more))
            return True
        above = link[0]
        received = NODES[self.prompt[above]["class_type"]].returns[link[1]]
        if not _types_match(received, wanted):
            details = f"{name}, received_type({received}) mismatch input_type({wanted})"
            more = {"input_config": config, "received_type": received, "linked_node": link}
            message = "Return type mismatch between linked nodes"
            errors.append(_input_error("return_type_mismatch", message, details, name, more))
            return True
        try:
            valid, found = self.node(above)
        except Exception as exc:  # noqa: BLE001  as above, one node deeper
            more = {
                "input_name": name,
                "input_config": config,
                "exception_message": str(exc),
                "linked_node": link,
            }
            message = "Exception when validating inner node"
            self.validated[above] = (
                False,
                [_exception("exception_during_inner_validation", message, exc, more)],
            )
            return False
        if found and above not in self.validated:
            errors += found
        return valid

    def _literal(
        self, spec: NodeSpec, name: str, inputs: dict[str, Any], errors: list[dict[str, Any]]
    ) -> None:
        """Convert a literal in place and check its range or list."""
        wanted, config = _config(spec, name)
        options = config[1]
        value = inputs[name]
        try:
            if isinstance(value, dict) and "__value__" in value:
                value = inputs[name] = value["__value__"]
            convert = _CONVERSIONS.get(wanted) if isinstance(wanted, str) else None
            if convert is not None:
                value = inputs[name] = convert(value)
        except Exception as exc:  # noqa: BLE001  any failure to convert is the same error
            more = {"input_config": config, "received_value": value, "exception_message": str(exc)}
            message = f"Failed to convert an input value to a {wanted} value"
            errors.append(_input_error("invalid_input_type", message, f"{name}, {value}, {exc}", name, more))
            return
        if name in spec.validated:
            return
        more = {"input_config": config, "received_value": value}
        if "min" in options and value < options["min"]:
            message = f"Value {value} smaller than min of {options['min']}"
            errors.append(_input_error("value_smaller_than_min", message, name, name, more))
        elif "max" in options and value > options["max"]:
            message = f"Value {value} bigger than max of {options['max']}"
            errors.append(_input_error("value_bigger_than_max", message, name, name, more))
        elif isinstance(wanted, list) and value not in wanted:
            listed = str(wanted) if len(wanted) <= _LONG_LIST else f"(list of length {len(wanted)})"
            if len(wanted) > _LONG_LIST:
                more["input_config"] = None
            details = f"{name}: '{value}' not in {listed}"
            errors.append(_input_error("value_not_in_list", "Value not in list", details, name, more))


def _config(spec: NodeSpec, name: str) -> tuple[Any, tuple[Any, Any]]:
    declared = spec.declared(name)
    if declared is None:
        raise KeyError(name)
    wanted, _category, options = declared
    return wanted, (wanted, options)


def _types_match(received: Any, wanted: Any) -> bool:
    """Equal, either one a wildcard, or every offered type among the wanted ones ("INT,FLOAT")."""
    if received == wanted or "*" in (received, wanted):
        return True
    if not isinstance(received, str) or not isinstance(wanted, str):
        return False
    return {part.strip() for part in received.split(",")} <= {part.strip() for part in wanted.split(",")}


def _refused(error: dict[str, Any]) -> Verdict:
    return Verdict([], error, {})


def _error(kind: str, message: str, details: str, extra_info: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info or {}}


def _unknown_node(message: str, node_id: str, class_type: Any, entry: Any, *, newer: bool) -> dict[str, Any]:
    details = f"Node ID '#{node_id}'"
    if not newer:
        return _error("invalid_prompt", message, details)
    title = (entry.get("_meta") or {}).get("title") if isinstance(entry, dict) else None
    info = {"node_id": node_id, "class_type": class_type, "node_title": title or class_type}
    return _error("missing_node_type", message, details, info)


def _input_error(
    kind: str, message: str, details: str, name: str, more: dict[str, Any] | None = None
) -> dict[str, Any]:
    return _error(kind, message, details, {"input_name": name, **(more or {})})


def _exception(kind: str, message: str, exc: Exception, more: dict[str, Any] | None = None) -> dict[str, Any]:
    found = sys.exc_info()
    info = {
        **(more or {}),
        "exception_type": type(exc).__name__,
        "traceback": traceback.format_tb(found[2]),
    }
    return _error(kind, message, str(exc), info)
