"""docker-compose.yml, Dockerfile and .env.example: no engine runs here, so they are judged by reading."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from genpulse.cli import cli
from genpulse.config import PREFIX, Settings
from tests.support.compose import ROOT, MissingVariable, read_compose

SECRETS = {
    "GENPULSE_API_KEY": "k" * 40,
    "GENPULSE_FLOWER_BASIC_AUTH": "ops:pass",
    "GENPULSE_COMFY_URLS": "gpu1=http://host.docker.internal:8188",
    "POSTGRES_PASSWORD": "pg",
    "VALKEY_PASSWORD": "vk",
    "S3_ACCESS_KEY": "ak",
    "S3_SECRET_KEY": "sk",
}
OURS = ("api", "worker", "worker-cpu", "flower", "migrate")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file with every variable put in."""
    return read_compose(SECRETS)


def test_the_file_fits_the_compose_specification() -> None:
    """The published schema finds nothing wrong, not even a property that it does not know."""
    checked = subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"),
            str(ROOT / "docker-compose.yml"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_name_used_is_declared(compose: dict[str, Any]) -> None:
    """Networks, volumes and dependencies exist."""
    for service in compose["services"].values():
        assert set(service.get("networks", ())) <= set(compose["networks"])
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        assert {volume.partition(":")[0] for volume in service.get("volumes", ())} <= set(compose["volumes"])


def test_what_is_waited_for_can_become_true(compose: dict[str, Any]) -> None:
    """``service_healthy`` needs a health check, and a job must not be restarted when it ended well."""
    for service in compose["services"].values():
        for name, wait in service.get("depends_on", {}).items():
            other = compose["services"][name]
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in other
            if wait["condition"] == "service_completed_successfully":
                assert other["restart"].startswith(("no", "on-failure"))


def test_everything_that_stays_up_has_a_health_check(compose: dict[str, Any]) -> None:
    """Only the job has none."""
    without = {name for name, service in compose["services"].items() if "healthcheck" not in service}

    assert without == {"migrate"}


@pytest.mark.parametrize("missing", sorted(SECRETS))
def test_nothing_secret_has_a_default(missing: str) -> None:
    """The file refuses to be used while one secret is not set."""
    with pytest.raises(MissingVariable, match=missing):
        read_compose({name: value for name, value in SECRETS.items() if name != missing})


def test_env_example_names_what_must_be_set() -> None:
    """Copying .env.example and filling it in is all that is asked for; it sets nothing itself."""
    lines = re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)

    assert {name for name, _ in lines} == set(SECRETS)
    assert all(value == "" for _, value in lines)


def test_env_example_is_a_good_dotenv_for_the_program_too() -> None:
    """``genpulse`` reads the same .env: every variable with its prefix is a setting."""
    names = re.findall(rf"^(?:# )?({PREFIX}\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)

    assert {name.removeprefix(PREFIX).lower() for name in names} <= set(Settings.model_fields)


def test_only_the_api_is_published_beyond_this_machine(compose: dict[str, Any]) -> None:
    """Everything else is on loopback or not published."""
    published = {
        name: service["ports"]
        for name, service in compose["services"].items()
        if any(not port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    }

    assert published == {"api": ["8000:8000"]}


def test_stores_are_in_a_network_without_a_way_out(compose: dict[str, Any]) -> None:
    """Database, broker and object store cannot reach, and be reached from, anything but our services."""
    assert compose["networks"]["back"] == {"internal": True}
    assert {name: compose["services"][name]["networks"] for name in ("postgres", "valkey", "s3")} == {
        name: ["back"] for name in ("postgres", "valkey", "s3")
    }


def test_images_are_pinned_and_still_published(compose: dict[str, Any]) -> None:
    """A version each, never ``latest``; no MinIO, which publishes no images any more."""
    images = {service["image"] for name, service in compose["services"].items() if name not in OURS}

    assert all(re.search(r":\d+\.\d+", image) for image in images), images
    assert not any("minio" in image for image in images)


@pytest.mark.parametrize("name", OURS)
def test_our_services_have_good_settings(name: str, compose: dict[str, Any]) -> None:
    """The very environment of the service makes a :class:`Settings`."""
    environment = compose["services"][name]["environment"]

    settings = Settings.from_env(environment)

    assert settings.storage == "s3"
    assert not settings.uses_sqlite


@pytest.mark.parametrize("name", OURS)
def test_our_commands_exist(name: str, compose: dict[str, Any]) -> None:
    """Each command line parses: the command is there and knows its options."""
    command, *arguments = compose["services"][name]["command"]

    # With the parent that it has in life: a command keeps the help options of its first context.
    parent = cli.make_context("genpulse", [], resilient_parsing=True)
    cli.commands[command].make_context(command, list(arguments), parent=parent)


def test_routed_queues_are_served(compose: dict[str, Any]) -> None:
    """Every queue of the one table has a worker."""
    from genpulse.tasks.queues import QUEUES

    commands = [service.get("command", []) for service in compose["services"].values()]
    served = {
        queue
        for command in commands
        if "--queues" in command
        for queue in command[command.index("--queues") + 1].split(",")
    }

    assert served == set(QUEUES)


def test_our_services_give_up_what_they_do_not_need(compose: dict[str, Any]) -> None:
    """No capabilities, no new privileges, and a user of their own in the image."""
    for name in OURS:
        assert compose["services"][name]["cap_drop"] == ["ALL"]
        assert compose["services"][name]["security_opt"] == ["no-new-privileges:true"]


def test_workers_may_drain_before_they_are_killed(compose: dict[str, Any]) -> None:
    """The grace of the engine is longer than the drain."""
    drain_s = Settings.model_fields["drain_s"].default

    for name in ("worker", "worker-cpu"):
        assert int(compose["services"][name]["stop_grace_period"].removesuffix("s")) > 2 * drain_s


def test_the_image_runs_as_a_user_from_a_locked_install() -> None:
    """Pinned base, hash-checked packages, nobody's root, signals that reach the program."""
    lines = (ROOT / "Dockerfile").read_text()
    bases = set(re.findall(r"^FROM (\S+)", lines, re.MULTILINE))

    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases.pop())
    assert "--require-hashes" in lines
    assert re.search(r"^USER \d+:\d+$", lines, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["genpulse"\]$', lines, re.MULTILINE)


def test_what_the_image_copies_is_sent_to_the_engine() -> None:
    """.dockerignore lets through exactly what Dockerfile copies."""
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    }
    let_through = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))

    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_can_build_the_package(tmp_path: Path) -> None:
    """The files that the image copies, and no others, make a wheel with all that is run from it."""
    for name in re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)

    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip

    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next((tmp_path / "out").glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert {"celeryconfig.py", "genpulse/py.typed", "genpulse/ledger/migrations/env.py"} <= set(names)
    assert any(name.startswith("genpulse/ledger/migrations/versions/") for name in names)
    assert any(name.startswith("genpulse/web/templates/") for name in names)
