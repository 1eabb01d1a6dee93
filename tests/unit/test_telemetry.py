"""Counting in many processes, the worker's port, and the examples that name our metrics."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from genpulse.telemetry.metrics import METRICS

DOCS = Path(__file__).parents[2] / "docs"

PROCESSES = """
import os, sys, time, urllib.request
from genpulse.telemetry import metrics

directory = metrics.prepare()

def child(seconds):
    if (pid := os.fork()) == 0:
        metrics.start("api", "worker")
        metrics.MESSAGES_SENT.add(2)
        metrics.HTTP_IN_FLIGHT.add()
        time.sleep(seconds)
        os._exit(0)
    return pid

for _ in range(5):
    os.waitpid(child(0), 0)
staying = child(60)
metrics.start("api", "worker")
metrics.MESSAGES_SENT.add()
port = metrics.serve("127.0.0.1", 0)
deadline = time.monotonic() + 30
while time.monotonic() < deadline:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    if "genpulse_messages_sent_total 13.0" in text:
        break
    time.sleep(0.05)
print(text)
print("files", len(list(directory.glob("counter_*.db"))))
os.kill(staying, 9)
os.waitpid(staying, 0)
with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
    print(answer.read().decode().replace("in_flight", "in_flight_later"))
print("directory", directory)
"""


def run(program: str) -> str:
    """What a program of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=55, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_processes_count_together_and_dead_ones_leave_no_gauge() -> None:
    """Counts of ended processes stay, in no more files than processes lived at once; their gauges go."""
    said = run(PROCESSES)
    assert "\ngenpulse_messages_sent_total 13.0\n" in said
    assert "\nfiles 2\n" in said
    assert "\ngenpulse_http_requests_in_flight 1.0\n" in said
    assert "\ngenpulse_http_requests_in_flight_later 0.0\n" in said
    directory = Path(said.rpartition("directory ")[2].strip())
    assert directory.name.startswith("genpulse-metrics-")
    assert not directory.exists()


def test_what_is_off_is_not_even_imported() -> None:
    """A worker without a port and without a collector loads neither library."""
    program = """
import sys
from genpulse.tasks import app, runner, presence, render
from genpulse.telemetry import metrics, traces
metrics.SWEPT.add(work="reaped")
traces.start("", "worker")
with traces.span("nothing"):
    pass
ours = ("prometheus_client", "opentelemetry.exporter", "opentelemetry.instrumentation", "opentelemetry.sdk.trace")
print(sorted(name for name in sys.modules if name.startswith(ours)))  # redis brings the rest by itself
"""
    assert run(program).strip() == "[]"


def shown_names() -> set[str]:
    """Every name of a sample that a scrape can have."""
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    return {
        metric.name + suffix for metric in METRICS.values() for suffix in suffixes.get(metric.kind, ("",))
    } | {"up"}


def expressions() -> list[tuple[str, str]]:
    """Every PromQL expression of the examples, with where it stands."""
    dashboard = json.loads((DOCS / "observability/dashboard.json").read_text())
    found = [
        (f"dashboard: {panel['title']}", target["expr"])
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]
    alerts = yaml.safe_load((DOCS / "observability/alerts.yml").read_text())
    found += [(rule["alert"], rule["expr"]) for group in alerts["groups"] for rule in group["rules"]]
    keda: Any = yaml.safe_load((DOCS / "observability/keda.yml").read_text())
    return [*found, *(("keda", trigger["metadata"]["query"]) for trigger in keda["spec"]["triggers"])]


@pytest.mark.parametrize(("place", "expression"), expressions())
def test_the_examples_name_only_metrics_and_labels_that_exist(place: str, expression: str) -> None:
    """A dashboard with a wrong name shows an empty panel, and an alert with one never fires."""
    names = re.findall(r"\b(genpulse_\w+|up)\b", expression)
    assert names, place
    assert set(names) <= shown_names()
    labels = {label for name in names for label in labels_of(name)} | {"instance", "job"}
    used = re.findall(r"\bby \(([^)]*)\)|\bon \(([^)]*)\)|(\w+)(?:=|!=|=~|!~)\"", expression)
    for group in used:
        assert {word.strip() for part in group for word in part.split(",") if word.strip()} <= labels


def labels_of(name: str) -> set[str]:
    """The labels of a sample."""
    for metric in METRICS.values():
        if re.fullmatch(metric.name + "(_bucket|_sum|_count)?", name):
            return {*metric.labels, *({"le"} if name.endswith("_bucket") else ())}
    return set()


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    """What nobody looks at need not be measured."""
    used = " ".join(expression for _, expression in expressions())
    assert [name for name in METRICS if name not in used] == []
