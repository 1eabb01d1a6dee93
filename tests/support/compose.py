"""Reads docker-compose.yml as an engine would: merge keys, variables, defaults, required ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["ROOT", "MissingVariable", "interpolate", "read_compose"]

ROOT = Path(__file__).resolve().parents[2]
_VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?:(?P<how>:-|:\?|-|\?)(?P<rest>[^}]*))?\}|(?P<bare>\w+))")


class MissingVariable(Exception):
    """A variable that the file requires is not set."""


def read_compose(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file's content; with *variables* put in if given (``x-`` keys are left out then)."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    if variables is None:
        return found
    return {key: interpolate(value, variables) for key, value in found.items() if not key.startswith("x-")}


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """
    Put variables into every string of *value*.

    Source: the Compose specification, chapter "Interpolation".

    Raises:
        MissingVariable: ``${NAME:?…}`` of a variable that is empty or not there.
    """
    if isinstance(value, Mapping):
        return {key: interpolate(part, variables) for key, part in value.items()}
    if isinstance(value, list):
        return [interpolate(part, variables) for part in value]
    if not isinstance(value, str):
        return value

    def put(match: re.Match[str]) -> str:
        name = match["name"] or match["bare"]
        if name is None:
            return "$"
        found = variables.get(name, "")
        if found or not match["how"]:
            return found
        if match["how"].endswith("?"):
            msg = f"{name}: {match['rest']}"
            raise MissingVariable(msg)
        return str(match["rest"])

    return _VARIABLE.sub(put, value)
