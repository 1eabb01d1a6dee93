"""How a worker starts, and how it refuses to: one clear line and an exit code, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from genpulse.config import Settings
from genpulse.tasks.app import EXIT_CONFIG, node_name, refusal

CELERY = Path(sys.executable).with_name("celery")


def celery(tmp_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Celery's own command in an empty folder, with nothing but *env* set for GenPulse."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GENPULSE_")}
    return subprocess.run(
        [CELERY, "-A", "genpulse", *args],
        cwd=tmp_path,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_a_wrong_setting_is_one_line(tmp_path: Path) -> None:
    """The variable is named, the value is not, and nobody has to read a traceback."""
    ended = celery(tmp_path, "worker", "-Q", "comfy", GENPULSE_REDIS_URL="http://hunter2")

    assert ended.returncode == EXIT_CONFIG
    assert ended.stderr.strip().splitlines()[-1].startswith("genpulse: GENPULSE_REDIS_URL: must start with")
    assert "Traceback" not in ended.stderr + ended.stdout
    assert "hunter2" not in ended.stderr + ended.stdout


def test_an_unknown_setting_is_one_line(tmp_path: Path) -> None:
    """A misspelled variable stops the start."""
    ended = celery(tmp_path, "worker", GENPULSE_REDIS_ULR="redis://127.0.0.1:1/0")

    assert ended.returncode == EXIT_CONFIG
    assert "GENPULSE_REDIS_ULR" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_sqlite_with_a_remote_broker_is_refused(tmp_path: Path) -> None:
    """A worker on another host would look into a ledger of its own and find no task, for ever."""
    ended = celery(
        tmp_path, "worker", "-Q", "comfy",
        GENPULSE_REDIS_URL="redis://:hunter2@redis.example.org:6379/0", GENPULSE_DATABASE_URL="sqlite:///x.db",
    )  # fmt: skip

    assert ended.returncode == EXIT_CONFIG
    assert "SQLite" in ended.stderr
    assert "redis.example.org" in ended.stderr
    assert "hunter2" not in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("redis_url", "database_url", "refused"),
    [
        ("redis://127.0.0.1:6379/0", "sqlite:///x.db", False),
        ("redis://localhost/0", "sqlite:///x.db", False),
        ("redis://[::1]:6379/0", "sqlite:///x.db", False),
        ("unix:///run/redis.sock", "sqlite:///x.db", False),
        ("redis://10.0.0.1/0", "sqlite:///x.db", True),
        ("rediss://u:p@redis.example.org/0", "", True),
        ("redis://10.0.0.1/0", "postgresql://u:p@10.0.0.2/genpulse", False),
    ],
)
def test_who_may_start(redis_url: str, database_url: str, refused: bool) -> None:
    """A ledger in a file serves one host, and so must its broker."""
    reason = refusal(Settings.build(redis_url=redis_url, database_url=database_url))

    assert (reason is not None) is refused
    assert "u:p" not in (reason or "")


def test_a_broken_plug_in_is_one_line(tmp_path: Path) -> None:
    """The worker says which plug-in it is."""
    info = tmp_path / "crooked-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crooked\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[genpulse.handlers]\ncrooked = not_there:Handler\n")

    ended = celery(tmp_path, "worker", PYTHONPATH=str(tmp_path))

    assert ended.returncode == EXIT_CONFIG
    assert "'crooked' (not_there:Handler)" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_importing_the_package_builds_nothing() -> None:
    """``import genpulse`` reads no setting and loads no Celery; ``genpulse.app`` does."""
    code = (
        "import sys, genpulse, genpulse.tasks.producer\n"
        "assert 'celeryconfig' not in sys.modules\n"
        "assert 'genpulse.tasks.app' not in sys.modules\n"
        "app = genpulse.app\n"
        "assert app.conf.worker_disable_prefetch and app is genpulse.app\n"
        "print(sorted(name for name in app.tasks if name.startswith('genpulse.')))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)

    assert ended.returncode == 0, ended.stderr
    assert "genpulse.comfyui" in ended.stdout
    assert "genpulse.image-convert" in ended.stdout


def test_the_producer_loads_no_worker_code() -> None:
    """The web sends messages without Celery's worker, the runner or the mirror in its process."""
    code = (
        "import sys, genpulse.tasks.producer\n"
        "loaded = {'genpulse.tasks.app', 'genpulse.tasks.runner', 'genpulse.tasks.mirror',"
        " 'celery.worker', 'celery.apps.worker', 'celeryconfig'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)

    assert ended.returncode == 0, ended.stderr


def test_a_node_is_named_after_its_queues_and_process() -> None:
    """What Flower shows tells workers apart at a glance."""
    assert node_name(("comfy", "cpu"), 4711, "host") == "genpulse-comfy+cpu-4711@host"
