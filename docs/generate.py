"""
Write the pages of the documentation that are made from the code.

``python3 dev.py docs`` writes them; ``--check`` only says whether they are up to date, as a test does.
"""

from __future__ import annotations

import argparse
import sys
import typing
from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from genpulse.config import PREFIX, Settings
from genpulse.telemetry.metrics import METRICS

PAGES = Path(__file__).resolve().parent


def settings_page() -> str:
    """Every setting with its default and meaning, in the order of the class."""
    rows = [
        f"| `{PREFIX}{name.upper()}` | {kind_of(field)} | {default_of(field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(
        [
            "# Settings",
            "",
            "<!-- Made from genpulse/config.py by `python3 dev.py docs`; edit there. -->",
            "",
            "Read once at the start from the environment and from a file `.env` beside it; the environment wins. A",
            "name that is not in this table, or a value that cannot be used, stops the start and is named. Secrets",
            "are never printed. Durations are in seconds, sizes in bytes.",
            "",
            "| variable | kind | default | meaning |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def metrics_page() -> str:
    """Every metric with its labels, and who answers for it."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels) or '–'} "
        f"| {metric.source} | {metric.help} |"
        for metric in METRICS.values()
    ]
    return "\n".join(
        [
            "# Metrics",
            "",
            "<!-- Made from genpulse/telemetry/metrics.py by `python3 dev.py docs`; edit there. -->",
            "",
            "*fleet*: read from the ledger by each API, the same at all of them, so take `max` over instances. *api*, *worker*:",
            "counted by the processes of that program, so take `sum`; a worker shows them on `GENPULSE_METRICS_PORT`. How to",
            "read them is in [Watch it run](../how-to/monitoring.md).",
            "",
            "| metric | kind | labels | of | meaning |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def kind_of(field: FieldInfo) -> str:
    """A word or the list of choices for a setting's type."""
    if typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(field.annotation))
    words = {
        bool: "yes or no",
        int: "whole number",
        float: "number",
        str: "text",
        Path: "path",
        SecretStr: "secret",
    }
    for kind, word in words.items():
        if field.annotation in {kind, kind | None}:
            return word
    msg = f"no word for {field.annotation}"
    raise TypeError(msg)


def default_of(field: FieldInfo) -> str:
    """A setting's default as one would write it; a secret's default is no secret."""
    value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
    return "none" if value is None or not str(value) else f"`{value}`"


GENERATED = {"reference/settings.md": settings_page, "reference/metrics.md": metrics_page}


def main() -> int:
    """Write, or check; the exit code is 1 if a page was out of date and only looked at."""
    parser = argparse.ArgumentParser(description="Write the pages that are made from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    check = parser.parse_args().check
    stale = 0
    for name, make in GENERATED.items():
        page = PAGES / name
        text = make()
        if page.exists() and page.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if check:
            print(f"docs/{name} is out of date: run `python3 dev.py docs`", file=sys.stderr)
        else:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
