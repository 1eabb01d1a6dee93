"""The command line: exit codes, what goes to which stream, and how ``submit`` talks to an API."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from flask import Flask, Response, request
from werkzeug.serving import BaseWSGIServer, make_server

from genpulse import cli as commands
from genpulse.cli import Exit, cli
from genpulse.terminal import describe, error_line
from genpulse.testing.services import free_port

GRAPH = {"1": {"class_type": "EmptyImage", "inputs": {}}}
PIXELS = b"not really a picture"


class FakeApi:
    """The few answers of the contract that the command line reads, and what it was asked."""

    def __init__(self) -> None:
        self.submitted: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.authorization: list[str | None] = []
        self.uploads: list[bytes] = []
        self.states = ["pending", "processing", "completed"]
        self.outputs = [self.output("picture.png")]
        self.error: dict[str, Any] | None = None
        self.refuse_with: tuple[int, dict[str, Any]] | None = None
        self.drop_answers = 0
        self.away = 0
        self.body = PIXELS
        self.streams: list[str] = []
        self.last_event_ids: list[str | None] = []
        self.app = Flask(__name__)
        self.app.add_url_rule("/task", view_func=self.submit, methods=["POST"])
        self.app.add_url_rule("/task/<task_id>", view_func=self.read)
        self.app.add_url_rule("/task/<task_id>/events", view_func=self.stream)
        self.app.add_url_rule("/task/<task_id>/outputs/<int:index>", view_func=self.download)
        self.app.add_url_rule("/storage/upload", view_func=self.upload, methods=["POST"])
        self.app.add_url_rule("/status", view_func=self.status)
        self.server: BaseWSGIServer = make_server("127.0.0.1", 0, self.app, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @staticmethod
    def output(name: str, body: bytes = PIXELS) -> dict[str, Any]:
        return {
            "index": 0, "node_id": "9", "name": name, "kind": "image", "content_type": "image/png",
            "size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(), "url": "/task/t1/outputs/0",
        }  # fmt: skip

    def submit(self) -> Any:
        self.authorization.append(request.headers.get("Authorization"))
        self.keys.append(request.headers.get("Idempotency-Key"))
        if self.refuse_with:
            status, problem = self.refuse_with
            return Response(json.dumps(problem), status, content_type="application/problem+json")
        self.submitted.append(request.get_json())
        if self.drop_answers:
            self.drop_answers -= 1
            return Response("lost", 502)
        return {"task_id": "t1", "status": "pending", "urls": {}}, 202

    def read(self, task_id: str) -> Any:
        if self.away:
            self.away -= 1
            return Response("restarting", 503)
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return {
            "task_id": task_id, "status": state, "progress": 50, "outputs": self.outputs, "error": self.error,
        }  # fmt: skip

    def stream(self, task_id: str) -> Any:
        del task_id
        self.last_event_ids.append(request.headers.get("Last-Event-ID"))
        return Response(self.streams.pop(0), content_type="text/event-stream")

    def download(self, task_id: str, index: int) -> Any:
        del task_id, index
        return Response(self.body, content_type="image/png")

    def upload(self) -> Any:
        with contextlib.closing(request.files["file"]) as file:
            self.uploads.append(file.read())
        return {"id": "a1", "url": "/x", "key": "k"}, 201

    def status(self) -> Any:
        return {
            "status": "degraded", "version": "1", "problems": ["no worker serves cpu"],
            "queues": [{"name": "comfy", "waiting": 3}],
        }  # fmt: skip


@pytest.fixture
def api() -> Iterator[FakeApi]:
    """A fake API on loopback."""
    fake = FakeApi()
    yield fake
    fake.close()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings but a test's own, in a folder of its own; what a command sets is taken back."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("GENPULSE_")]:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def workflow(tmp_path: Path) -> str:
    """A file with a small workflow."""
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(GRAPH))
    return str(path)


def run(*arguments: str, stdin: str | None = None, env: dict[str, str] | None = None) -> Result:
    """One command line, in this process."""
    return CliRunner().invoke(cli, arguments, input=stdin, env=env)


def test_help_names_every_exit_code() -> None:
    """The group's help is where a script's author looks the exit codes up."""
    shown = run("--help").output

    assert all(f"\n    {code.value} " in shown for code in Exit)


def test_help_is_quick() -> None:
    """Asking for help imports neither a database driver nor Celery nor Rich."""
    code = (
        "import sys; sys.argv = ['genpulse', '--help']; import genpulse.cli\n"
        "try: genpulse.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'sqlalchemy', 'celery', 'flask', 'rich', 'pydantic', 'boto3', 'requests', 'redis'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stderr.strip() == "[]"
    assert time.monotonic() - began < 5  # 0.1 s on a quiet machine


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_has_help(command: str) -> None:
    """Each command says what it does and takes -h."""
    result = run(command, "-h")

    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 4


def test_a_wrong_setting_is_one_line_and_exit_code_2(workflow: str) -> None:
    """A wrong variable names itself, and nothing else happens."""
    result = run("submit", workflow, env={"GENPULSE_PORT": "many"})

    assert result.exit_code == Exit.USAGE
    assert result.stderr.startswith("Error: GENPULSE_PORT")
    assert len(result.stderr.splitlines()) == 1


def test_submit_prints_the_id_on_standard_output(api: FakeApi, workflow: str) -> None:
    """Without --wait the id is all there is, ready for a script."""
    result = run("submit", workflow, "--url", api.url, "--priority", "high")

    assert (result.exit_code, result.stdout) == (Exit.OK, "t1\n")
    assert api.submitted == [{"task_type": "comfyui", "params": {"workflow": GRAPH}, "priority": "high"}]


def test_submit_reads_the_workflow_from_standard_input(api: FakeApi) -> None:
    """A dash means standard input."""
    result = run("submit", "-", "--url", api.url, stdin=json.dumps(GRAPH))

    assert result.exit_code == Exit.OK
    assert api.submitted[0]["params"]["workflow"] == GRAPH


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("prompt=a red fox", ("prompt", "a red fox")),
        ("6.text=a = b", ("6.text", "a = b")),
        ("seed=7", ("seed", 7)),
        ("cfg=7.5", ("cfg", 7.5)),
        ("tiled=true", ("tiled", True)),
        ("mask=null", ("mask", None)),
        ("text=", ("text", "")),
        ('text="quoted"', ("text", '"quoted"')),
        ("size:=[64, 64]", ("size", [64, 64])),
        ('text:="7"', ("text", "7")),
        ("at=@@home", ("at", "@home")),
    ],
)
def test_inputs_keep_their_type(given: str, sent: tuple[str, Any]) -> None:
    """What looks like a number is one; ``:=`` takes any JSON; ``@@`` is a text's own @."""
    assert commands.parse_input(given) == sent


@pytest.mark.parametrize("given", ["prompt", "=x", ":=1", "size:=[64"])
def test_a_malformed_input_is_wrong_usage(given: str) -> None:
    """The mistake is told before anything is sent."""
    with pytest.raises(click.UsageError, match="-i"):
        commands.parse_input(given)


def test_a_local_file_is_uploaded_and_named_as_asset(api: FakeApi, workflow: str, tmp_path: Path) -> None:
    """``@path`` streams the file first; the task's input names the asset."""
    (tmp_path / 'c"at.png').write_bytes(b"\0meow" * 100_000)

    result = run("submit", workflow, "--url", api.url, "-i", f'image=@{tmp_path}/c"at.png')

    assert result.exit_code == Exit.OK, result.output
    assert api.uploads == [b"\0meow" * 100_000]
    assert api.submitted[0]["params"]["inputs"] == {"image": "asset:a1"}


def test_a_missing_upload_is_wrong_usage(api: FakeApi, workflow: str) -> None:
    """A file that is not there ends the command before a task is made."""
    result = run("submit", workflow, "--url", api.url, "-i", "image=@nowhere.png")

    assert result.exit_code == Exit.USAGE
    assert api.submitted == []


def test_output_waits_saves_and_prints_paths(api: FakeApi, workflow: str, tmp_path: Path) -> None:
    """--output implies --wait; standard output holds the paths of complete files."""
    result = run("submit", workflow, "--url", api.url, "-o", str(tmp_path / "out"))

    assert result.exit_code == Exit.OK, result.output
    assert result.stdout == f"{tmp_path / 'out' / 'picture.png'}\n"
    assert (tmp_path / "out" / "picture.png").read_bytes() == PIXELS
    assert "processing" in result.stderr


def test_an_output_never_leaves_its_folder(api: FakeApi, workflow: str, tmp_path: Path) -> None:
    """A name is the server's word; only its last part counts, and no dot file is made."""
    api.outputs = [api.output("../../.bashrc")]

    result = run("submit", workflow, "--url", api.url, "-o", str(tmp_path / "deep" / "out"))

    assert result.exit_code == Exit.OK, result.output
    assert [path.name for path in tmp_path.rglob("*bashrc*")] == ["bashrc"]
    assert (tmp_path / "deep" / "out" / "bashrc").is_file()


def test_another_file_of_that_name_is_left_alone(api: FakeApi, workflow: str, tmp_path: Path) -> None:
    """Nothing of the user's is overwritten, and the same bytes are not stored twice."""
    (tmp_path / "picture.png").write_bytes(b"mine")

    for _ in range(2):
        run("submit", workflow, "--url", api.url, "-o", str(tmp_path))

    assert (tmp_path / "picture.png").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["picture (2).png", "picture.png"]


def test_damaged_bytes_are_not_kept(api: FakeApi, workflow: str, tmp_path: Path) -> None:
    """A download that is not what was stored leaves no file and is a failure."""
    api.body = PIXELS[:-1]

    result = run("submit", workflow, "--url", api.url, "-o", str(tmp_path / "out"))

    assert result.exit_code == Exit.FAILED
    assert list((tmp_path / "out").iterdir()) == []


def test_waiting_outlives_a_restart_of_the_api(api: FakeApi, workflow: str) -> None:
    """The task goes on without the API, so a few unanswered questions are no end."""
    api.away = 3

    assert run("submit", workflow, "--url", api.url, "--wait").exit_code == Exit.OK


def test_a_failed_task_is_exit_code_1_with_its_reason(api: FakeApi, workflow: str) -> None:
    """The reason names code, node and message in one line."""
    api.states = ["failed"]
    api.error = {"code": "node_error", "node_id": "3", "class_type": "KSampler", "message": "no\nluck"}

    result = run("submit", workflow, "--url", api.url, "--wait")

    assert result.exit_code == Exit.FAILED
    assert "task t1 failed: node_error (node 3, KSampler): no luck" in result.stderr


def test_json_is_all_of_standard_output(api: FakeApi, workflow: str) -> None:
    """With --json a script gets the whole task, failed ones too."""
    api.states = ["canceled"]

    result = run("submit", workflow, "--url", api.url, "--wait", "--json")

    assert result.exit_code == Exit.FAILED
    assert json.loads(result.stdout)["status"] == "canceled"


def test_watch_prints_each_event(api: FakeApi, workflow: str) -> None:
    """With --json a script reads the stream line by line; it goes on by id where the connection broke."""
    del workflow
    api.streams = [
        ': hello\n\nid: 1\nevent: snapshot\ndata: {"status": "pending"}\n\nid: 2\nevent: progr',
        'id: 3\nevent: done\ndata: {"task_id": "t1", "status": "failed"}\n\n',
    ]

    result = run("watch", "t1", "--url", api.url, "--json")

    assert result.exit_code == Exit.FAILED
    assert [json.loads(line)["name"] for line in result.stdout.splitlines()] == ["snapshot", "done"]
    assert api.last_event_ids == [None, "1"]


def test_watch_waits_for_the_end(api: FakeApi, tmp_path: Path) -> None:
    """Without --json it shows progress, and can save what came out."""
    result = run("watch", "t1", "--url", api.url, "--output", str(tmp_path / "out"))

    assert (result.exit_code, result.stdout) == (Exit.OK, f"{tmp_path / 'out' / 'picture.png'}\n")


def test_waiting_ends_with_exit_code_4(api: FakeApi, workflow: str) -> None:
    """The task goes on, and the message says so."""
    api.states = ["pending"]

    result = run("submit", workflow, "--url", api.url, "--wait", "--timeout", "0.2")

    assert result.exit_code == Exit.TIMEOUT
    assert "it goes on" in result.stderr


def test_nobody_there_is_exit_code_3(workflow: str) -> None:
    """An API that does not answer is told apart from one that says no."""
    result = run("submit", workflow, "--url", f"http://127.0.0.1:{free_port()}")

    assert result.exit_code == Exit.UNREACHABLE
    assert "no answer from http://127.0.0.1" in result.stderr


def test_a_refusal_is_exit_code_5_with_what_is_wrong(api: FakeApi, workflow: str) -> None:
    """The problem document's own words reach the person."""
    problem = {
        "code": "unknown_input", "detail": "no such input",
        "errors": [{"pointer": "/params/inputs/x", "detail": "known: y"}],
    }  # fmt: skip
    api.refuse_with = (422, problem)

    result = run("submit", workflow, "--url", api.url)

    assert result.exit_code == Exit.REFUSED
    assert "no such input (unknown_input)" in result.stderr
    assert "/params/inputs/x: known: y" in result.stderr


def test_a_sentence_is_not_said_twice(api: FakeApi, workflow: str) -> None:
    """Where the one mistake is all there is to say, its place is enough."""
    problem = {
        "code": "unknown_input", "detail": "there is no x",
        "errors": [{"pointer": "/params/inputs/x", "detail": "there is no x"}],
    }  # fmt: skip
    api.refuse_with = (422, problem)

    result = run("submit", workflow, "--url", api.url)

    assert result.stderr.count("there is no x") == 1
    assert "  /params/inputs/x\n" in result.stderr


def test_a_lost_answer_is_asked_for_under_the_same_key(api: FakeApi, workflow: str) -> None:
    """A second try cannot make a second task."""
    api.drop_answers = 1

    result = run("submit", workflow, "--url", api.url)

    assert result.exit_code == Exit.OK, result.output
    assert len(api.keys) == 2
    assert len(set(api.keys)) == 1


def test_the_key_comes_from_the_environment(api: FakeApi, workflow: str) -> None:
    """No key on the command line is needed, where every user of the machine could read it."""
    run("submit", workflow, "--url", api.url, env={"GENPULSE_API_KEY": "s3cret"})

    assert api.authorization == ["Bearer s3cret"]


def test_no_workflow_is_wrong_usage(tmp_path: Path) -> None:
    """JSON that is no object, no JSON, no file: all told before anything is sent."""
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bad.json").write_text("{")

    codes = [run("submit", str(tmp_path / name)).exit_code for name in ("list.json", "bad.json", "none.json")]

    assert codes == [Exit.USAGE] * 3


def test_status_shows_what_is_wrong(api: FakeApi) -> None:
    """Degraded is exit code 1 and says why; queues are a table."""
    result = run("status", "--url", api.url)

    assert result.exit_code == Exit.FAILED
    assert "no worker serves cpu" in result.stdout
    assert "waiting" in result.stdout


def test_status_as_json(api: FakeApi) -> None:
    """The answer as it is."""
    assert json.loads(run("status", "--url", api.url, "--json").stdout)["version"] == "1"


def test_ctrl_c_is_exit_code_130(api: FakeApi, workflow: str) -> None:
    """Ctrl-C while waiting leaves the task alone and says how to look at it."""
    api.states = ["pending"]
    process = subprocess.Popen(
        [sys.executable, "-m", "genpulse", "submit", workflow, "--url", api.url, "--wait"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    lines = [process.stderr.readline(), process.stderr.readline()]  # the task's id, its first state
    process.send_signal(2)
    _, rest = process.communicate(timeout=10)

    assert process.returncode == Exit.INTERRUPTED
    assert "t1" in lines[0]
    assert "the task goes on" in rest


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that a command would turn into."""
    seen: list[list[str]] = []

    def note(module: str, *arguments: str) -> None:
        seen.append([module, *arguments])

    monkeypatch.setattr(commands, "execute", note)
    return seen


def test_start_api_becomes_gunicorn_with_our_configuration(executed: list[list[str]]) -> None:
    """Options reach it as settings."""
    assert run("start-api", "--port", "8123").exit_code == Exit.OK

    assert executed == [
        ["gunicorn", "--config", "python:genpulse.web.gunicorn_conf", "genpulse.web:create_app()"]
    ]
    assert os.environ["GENPULSE_PORT"] == "8123"


def test_start_api_refuses_other_addresses_without_a_key(executed: list[list[str]]) -> None:
    """Nobody opens the API to a network by accident."""
    result = run("start-api", "--host", "0.0.0.0")

    assert result.exit_code == Exit.USAGE
    assert "GENPULSE_API_KEY" in result.stderr
    assert executed == []


def test_start_worker_serves_comfy_only_with_a_server(executed: list[list[str]]) -> None:
    """A worker without a ComfyUI would take tasks it cannot do."""
    run("start-worker")
    run("start-worker", "--comfy", "gpu1=http://127.0.0.1:8188")

    assert [line[line.index("-Q") + 1] for line in executed] == [
        "cpu,webhooks",
        "comfy,cpu,webhooks",
    ]


def test_start_worker_hands_on_celerys_options(executed: list[list[str]]) -> None:
    """Everything behind ``--`` is Celery's."""
    run("start-worker", "-Q", "cpu", "-n", "a@%h", "-c", "3", "--", "--max-tasks-per-child", "7")

    assert executed[0][:4] == ["celery", "-A", "genpulse", "worker"]
    assert executed[0][-2:] == ["--max-tasks-per-child", "7"]
    assert {"a@%h", "3", "cpu"} <= set(executed[0])


def test_flowers_password_is_on_no_command_line(executed: list[list[str]]) -> None:
    """Every user of a machine may read command lines."""
    run("start-flower", env={"GENPULSE_FLOWER_BASIC_AUTH": "ops:hunter2"})

    assert "hunter2" not in " ".join(executed[0])
    assert {"--address=127.0.0.1", "--port=5555", "--url_prefix=flower"} <= set(executed[0])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://gpu-box:8188", [("gpu-box:8188", "http://gpu-box:8188")]),
        ("127.0.0.1:8188", [("127.0.0.1:8188", "http://127.0.0.1:8188")]),
        ("a=http://x:1, http://y:2/", [("a", "http://x:1"), ("y:2", "http://y:2")]),
    ],
)
def test_comfy_servers_need_no_name_on_one_machine(given: str, meant: list[tuple[str, str]]) -> None:
    """The address names a server where nobody else has to agree on it."""
    from genpulse.config import parse_servers

    assert [tuple(server) for server in parse_servers(commands.named_servers(given) or "")] == meant


def test_links_are_followed_where_the_api_was_reached() -> None:
    """A link with the public address is asked for at ours; no other host ever gets the key."""
    from genpulse.client import Client

    with Client("http://127.0.0.1:8000/v1", "key") as client:
        assert (
            client._here("https://public.example/task/t/outputs/0")
            == "http://127.0.0.1:8000/v1/task/t/outputs/0"
        )
        assert client._here("https://elsewhere.example/x").startswith("http://127.0.0.1:8000/v1/")


def test_migrate_makes_the_tables_and_may_be_repeated(tmp_path: Path) -> None:
    """The first run makes the database file, the second finds nothing to do."""
    env = {"GENPULSE_DATA_DIR": str(tmp_path / "data")}

    assert [run("migrate", env=env).exit_code for _ in range(2)] == [Exit.OK, Exit.OK]
    assert (tmp_path / "data" / "genpulse.db").is_file()


def test_migrate_gives_up_on_a_database_that_is_not_there() -> None:
    """Exit code 3 after the time given."""
    url = f"postgresql://x:y@127.0.0.1:{free_port()}/z"

    result = run("migrate", "--wait", "0.1", env={"GENPULSE_DATABASE_URL": url})

    assert result.exit_code == Exit.UNREACHABLE
    assert "does not answer" in result.stderr


def test_the_upload_form_is_exact() -> None:
    """The streamed form is what a parser expects, to the byte of its declared length."""
    from werkzeug.test import EnvironBuilder
    from werkzeug.wrappers import Request

    from genpulse.client import _Multipart

    path = Path("a.bin")
    path.write_bytes(b"x" * 70_000)
    with path.open("rb") as file:
        form = _Multipart(file, "a.bin")
        length = len(form)
        body = b"".join(iter(lambda: form.read(4096), b""))

    assert len(body) == length
    environ = EnvironBuilder(
        method="POST", input_stream=io.BytesIO(body), content_type=form.content_type, content_length=length
    ).get_environ()
    with Request(environ) as read:
        assert read.files["file"].read() == b"x" * 70_000


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ({"status": "pending", "wait_reason": {"code": "next", "text": "Next."}}, "pending: Next."),
        ({"status": "pending", "queue_position": 3}, "pending, number 3 in line"),
        ({"status": "processing", "progress_detail": {"class_type": "KSampler"}}, "processing KSampler"),
        ({"status": "completed"}, "completed"),
    ],
)
def test_a_state_is_told_in_a_few_words(task: dict[str, Any], line: str) -> None:
    """The API's own reason comes first; the place in line is the second best."""
    assert describe(task) == line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ({"code": "timeout", "message": "too\n late"}, "timeout: too late"),
        ({"code": "node_error", "node_id": "3", "class_type": "KSampler"}, "node_error (node 3, KSampler)"),
        ({"code": "invalid_workflow", "node_id": "3", "class_type": None}, "invalid_workflow (node 3)"),
    ],
)
def test_an_error_is_one_line(error: dict[str, Any], line: str) -> None:
    """With the node where it is known, and nothing in place of what is not."""
    assert error_line({"status": "failed", "error": error}) == line
