"""The API in this process, on a real ledger and a real local storage, with one small task type."""

from __future__ import annotations

import io
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import pydantic
import pytest
import sqlalchemy as sa
import structlog
from flask import Flask, Response, current_app, request
from flask.testing import FlaskClient
from werkzeug.serving import make_server

from genpulse.config import Settings
from genpulse.ledger import KeyText, mint
from genpulse.ledger.tables import metadata
from genpulse.model import Claim, ErrorInfo, NewOutput, OutputKind, TaskStatus
from genpulse.tasks.registry import BaseHandler, Registry
from genpulse.web import Service, create_app, problems
from genpulse.web.contract import Contract

KEY = "a key with spaces and ümlauts"


class EchoParams(pydantic.BaseModel):
    """What the test's task type takes."""

    model_config = pydantic.ConfigDict(extra="forbid")

    value: Any = None
    text: str = ""


class Echo(BaseHandler):
    """A task type that takes any JSON and is never run here."""

    task_type: ClassVar[str] = "echo"
    aliases: ClassVar[tuple[str, ...]] = ("repeat",)
    queue: ClassVar[str] = "cpu"
    params_model: ClassVar[type[pydantic.BaseModel]] = EchoParams
    summary: ClassVar[str] = "Give back what was given."

    def referenced_assets(self, params: Any) -> tuple[str, ...]:
        """A text ``asset:<id>``."""
        scheme, _, rest = params["text"].partition(":")
        return (rest,) if scheme == "asset" else ()

    def referenced_outputs(self, params: Any) -> tuple[tuple[str, int], ...]:
        """A text ``output:<task id>/<index>``."""
        scheme, _, rest = params["text"].partition(":")
        task_id, _, index = rest.partition("/")
        return ((task_id, int(index)),) if scheme == "output" else ()

    def execute(self, task: Any, context: Any) -> tuple[NewOutput, ...]:
        """Not run by these tests."""
        raise NotImplementedError


@dataclass
class Caller:
    """Calls with one API key."""

    api: Api
    owner: str
    key: KeyText

    @property
    def headers(self) -> dict[str, str]:
        """What shows the key."""
        return {"Authorization": f"Bearer {self.key.text}"}

    def __call__(self, method: str, path: str, **more: Any) -> Any:
        """Send a request."""
        headers = self.headers | dict(more.pop("headers", {}))
        return self.api.client.open(path, method=method, headers=headers, **more)

    def submit(self, **more: Any) -> str:
        """Submit a task; returns its id."""
        body = {"task_type": "echo", "params": {"text": "hi"}, **more}
        answer = self("POST", "/task", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json["task_id"])


@dataclass
class Api:
    """An application and the means to play the worker's part in the ledger."""

    app: Flask
    client: FlaskClient

    @property
    def service(self) -> Service:
        """What the views use."""
        found: Service = self.app.extensions["genpulse"]
        return found

    def submit(self, **more: Any) -> dict[str, Any]:
        """Submit a task; returns the 202's body."""
        answer = self.client.post("/task", json={"task_type": "echo", "params": {"text": "hi"}, **more})
        assert answer.status_code == 202, answer.text
        return dict(answer.get_json())

    def key(self, owner: str = "ada", scopes: tuple[str, ...] = ("submit", "read"), **more: Any) -> Caller:
        """Make an API key; returns what calls with it."""
        text = mint()
        self.service.ledger.add_key(text, **{"name": owner, "owner": owner, "scopes": scopes, **more})
        return Caller(self, owner, text)

    def claim(self, task_id: str) -> Claim:
        """Begin an attempt as a worker does."""
        found = self.service.ledger.claim(
            task_id,
            claim=secrets.token_hex(8),
            worker="node:1",
            session_key=1,
            servers=["gpu1"],
            lease_s=15,
        )
        assert found is not None
        return found

    def complete(self, task_id: str, *files: tuple[str, bytes, str]) -> None:
        """Run the task: store *files* (name, content, content type) and finish it."""
        self.finish(self.claim(task_id), *files)

    def finish(self, claim: Claim, *files: tuple[str, bytes, str]) -> None:
        """Store *files* and end the attempt as completed."""
        task_id = claim.fence.task_id
        outputs = []
        for number, (name, content, content_type) in enumerate(files):
            key = f"outputs/{task_id}/{claim.fence.attempt}/{number}"
            stored = self.service.storage.upload_file(
                key, io.BytesIO(content), content_type=content_type, filename=name
            )
            kind = OutputKind.IMAGE if content_type.startswith("image/") else OutputKind.FILE
            outputs.append(
                NewOutput(
                    node_id="9",
                    name=name,
                    kind=kind,
                    content_type=content_type,
                    size_bytes=stored.size_bytes,
                    sha256=str(stored.sha256),
                    key=key,
                )
            )
        ended = self.service.ledger.finish(claim.fence, TaskStatus.COMPLETED, outputs=outputs, run_s=1.50004)
        assert ended is TaskStatus.COMPLETED

    def fail(self, task_id: str) -> None:
        """Run the task and have it fail."""
        error = ErrorInfo(code="node_error", message="A node raised.", node_id="3", class_type="KSampler")
        assert self.service.ledger.finish(self.claim(task_id).fence, TaskStatus.FAILED, error=error)

    def rows(self, table: str) -> int:
        """How many rows a table has."""
        with self.service.ledger.engine.connect() as connection:
            count = sa.select(sa.func.count()).select_from(metadata.tables[table])
            return int(connection.execute(count).scalar_one())


def build(ledger_url: str, data_dir: Path, *, registry: Registry | None = None, **settings: Any) -> Api:
    """An application of its own; with the small task type alone if no *registry* is given."""
    known = {"redis_url": "redis://127.0.0.1:1/0", "max_upload_bytes": 4 * 2**20, "max_body_bytes": 64 * 1024}
    made = Settings.build(database_url=ledger_url, data_dir=data_dir, **known | settings)
    app = create_app(made, registry=registry or Registry([Echo]))
    app.after_request(_note_undocumented)
    return Api(app, app.test_client())


_undocumented: list[str] = []


def _note_undocumented(answer: Response) -> Response:
    """Hold each problem that any of these tests brings about against the published document."""
    if answer.content_type == problems.CONTENT_TYPE and request.url_rule is not None:
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", request.url_rule.rule).removeprefix("/v1")
        paths = cast("Contract", current_app).api_doc["paths"]
        operation = paths.get(path, {}).get(request.method.lower())
        if operation is not None:
            documented = operation["responses"].get(str(answer.status_code), {}).get("content", {})
            code = answer.get_json()["code"]
            if code not in documented.get(problems.CONTENT_TYPE, {}).get("examples", {}):
                _undocumented.append(f"{request.method} {path}: {answer.status_code} {code}")
    return answer


@pytest.fixture(autouse=True)
def _documented_problems_only() -> Iterator[None]:
    """No operation answers a problem that its place in the document does not name."""
    _undocumented.clear()
    yield
    assert _undocumented == []


@pytest.fixture
def api(ledger_url: str, tmp_path: Path) -> Iterator[Api]:
    """The API without a key, on both databases in turn."""
    made = build(ledger_url, tmp_path / "data")
    yield made
    made.service.ledger.close()


@pytest.fixture
def lone_api(sqlite_ledger_url: str, tmp_path: Path) -> Iterator[Api]:
    """The API without a key, on SQLite: for what no database has a say in."""
    made = build(sqlite_ledger_url, tmp_path / "data")
    yield made
    made.service.ledger.close()


@pytest.fixture
def keyed_api(sqlite_ledger_url: str, tmp_path: Path) -> Iterator[Api]:
    """The API with :data:`KEY`, on SQLite; its client sends no key by itself."""
    made = build(sqlite_ledger_url, tmp_path / "data", api_key=KEY)
    yield made
    made.service.ledger.close()


@pytest.fixture
def bearer() -> dict[str, str]:
    """The header of a key holder, as a client sends the key's UTF-8 bytes."""
    return {"Authorization": "Bearer " + KEY.encode().decode("latin-1")}


@pytest.fixture(name="build")
def build_fixture() -> Any:
    """Build another application: ``build(ledger_url, data_dir, **settings)``."""
    return build


@pytest.fixture
def url(lone_api: Any) -> Iterator[str]:
    """The API over a real socket. What it logs is not part of what the command prints."""
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    server = make_server("127.0.0.1", 0, lone_api.app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
    structlog.configure(**before)
