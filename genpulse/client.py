"""
A caller of GenPulse's own HTTP API: what ``genpulse submit``, ``status`` and the demo stand on.

It promises three things that a handful of ``requests`` calls would not:

- A submission carries an ``Idempotency-Key``, so that an answer that got lost can be asked for
  again without making a second task.
- Following a task outlives a short absence of the API, for the task goes on without it.
- A downloaded file is complete or not there: written beside its place, checked against the
  digest the API names, then renamed. It never leaves its folder and never overwrites another file.

It knows nothing of the server's code, only of the contract that the API publishes as ``/openapi.json``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mimetypes
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self
from urllib.parse import urljoin, urlsplit

import requests
from requests.auth import AuthBase

from genpulse import __version__

__all__ = ["ApiRefused", "ApiUnreachable", "Client", "DownloadDamaged", "Event", "WaitTimeout", "safe_name"]

FINAL = frozenset({"completed", "failed", "canceled"})
HOLD_S = 20.0
"""For how long the API is asked to hold an answer; below what proxies bear."""
SILENCE_S = 40.0
"""An event stream that says nothing for so long is dead: a comment comes each 15 s."""
_ANSWER_LIMIT = 300
"""How much of an answer that is no problem document is shown to a person."""


class ApiUnreachable(Exception):
    """Nobody answered, or what answered was no GenPulse (a proxy's 502, a restart's 503)."""


class ApiRefused(Exception):
    """
    The API said no. ``code`` is the problem's code, ``errors`` its ``(pointer, detail)`` pairs.

    ``str()`` of it is one sentence for a person.
    """

    def __init__(self, status: int, code: str, detail: str, errors: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.errors = errors


class WaitTimeout(Exception):
    """The task was not final in time. It goes on; only the waiting ended."""


class DownloadDamaged(Exception):
    """The bytes are not those that were stored, by size or digest. Nothing was kept on disk."""


class Event(NamedTuple):
    """One server-sent event: ``name`` is ``snapshot``, ``status``, ``progress``, …, ``data`` its JSON."""

    id: str
    name: str
    data: dict[str, Any]


class _Bearer(AuthBase):
    """The API key. An auth object and no plain header, or a ``.netrc`` would take its place."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Client:
    """
    One API at *url*. A context manager; use it from one thread.

    Args:
        url: Where the API is mounted, for example ``http://127.0.0.1:8000``.
        api_key: Sent as a bearer token to this origin and to nobody a redirect leads to.
    """

    def __init__(
        self, url: str, api_key: str = "", *, connect_timeout_s: float = 5.0, read_timeout_s: float = 60.0
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout = (connect_timeout_s, read_timeout_s)
        self._session = requests.Session()
        self._session.auth = _Bearer(api_key)
        self._session.headers["User-Agent"] = f"genpulse-client/{__version__}"
        host = urlsplit(self.url).hostname or ""
        if host in {"localhost", "::1"} or host.startswith("127."):
            self._session.trust_env = False  # a proxy of the environment cannot reach our loopback

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def submit(
        self, body: Mapping[str, Any], *, idempotency_key: str | None = None, tries: int = 3
    ) -> dict[str, Any]:
        """
        Hand in one task (``POST /task``).

        Args:
            body: As the contract has it: ``{"task_type": …, "params": {…}, …}``.
            idempotency_key: Chosen at random if not given; the same for every try.
            tries: How often to ask when no answer came.

        Returns:
            The answer of the 202: ``task_id``, ``status``, ``urls``, …

        Raises:
            ApiRefused: Nothing was recorded.
            ApiUnreachable: No answer to any try. The task may have been recorded.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._insist(tries, "POST", "/task", json=dict(body), headers=headers)

    def submit_batch(
        self, body: Mapping[str, Any], *, idempotency_key: str | None = None, tries: int = 3
    ) -> dict[str, Any]:
        """
        Hand in up to 1,000 tasks, all or none (``POST /task/batch``).

        Args:
            body: ``{"tasks": [{…}, …]}``, or ``{"template": {…}, "grid": {"inputs.seed": [1, 2, 3]}}``.

        Returns:
            ``batch_id``, ``task_ids`` in the order of the request, ``urls``, …

        Raises:
            ApiRefused: Nothing was recorded; the pointers say which task is to blame.
            ApiUnreachable: No answer to any try. The batch may have been recorded.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._insist(tries, "POST", "/task/batch", json=dict(body), headers=headers)

    def batch(self, batch_id: str, *, limit: int = 0, cursor: str | None = None) -> dict[str, Any]:
        """A batch as it is now, with a page of *limit* of its tasks."""
        query = {"limit": str(limit), **({"cursor": cursor} if cursor else {})}
        return self._json("GET", f"/batch/{batch_id}", params=query)

    def batch_tasks(self, batch_id: str) -> Iterator[dict[str, Any]]:
        """All tasks of a batch in the order of the request, read page by page."""
        cursor = None
        while True:
            page = self.batch(batch_id, limit=200, cursor=cursor)
            yield from page["tasks"]
            if (cursor := page["next_cursor"]) is None:
                return

    def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        """Cancel every task of a batch that is not final."""
        return self._json("POST", f"/batch/{batch_id}/cancel")

    def follow_batch(
        self,
        batch_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[dict[str, Any]], None] | None = None,
        poll_s: float = 1.0,
        patience_s: float = 30.0,
    ) -> dict[str, Any]:
        """
        Ask until every task of the batch is final.

        Args:
            timeout_s: How long to wait; for ever if ``None``.
            on_change: Called with every reading, the last one included.
            patience_s: How long the API may be away without this giving up.

        Raises:
            WaitTimeout: Not final within *timeout_s*.
            ApiUnreachable: Away for longer than *patience_s*.
            ApiRefused: No such batch (404), or the key is not accepted.
        """
        started = heard = time.monotonic()
        while True:
            try:
                batch = self.batch(batch_id)
            except ApiUnreachable:
                if time.monotonic() - heard > patience_s:
                    raise
            else:
                heard = time.monotonic()
                if on_change:
                    on_change(batch)
                if batch["status"] in FINAL:
                    return batch
            if timeout_s is not None and time.monotonic() - started >= timeout_s:
                msg = f"batch {batch_id} is not final after {timeout_s:g} s; it goes on"
                raise WaitTimeout(msg)
            time.sleep(poll_s)

    def tasks(self, **filters: str) -> Iterator[dict[str, Any]]:
        """
        One's own tasks, newest first, read page by page (``GET /task``).

        Args:
            filters: As the contract has them: ``status="failed,canceled"``, ``task_type``,
                ``batch_id``, ``created_after``, … and ``**{"metadata[key]": "value"}``.
        """
        query = {"limit": "200", **filters}
        while True:
            page = self._json("GET", "/task", params=query)
            yield from page["tasks"]
            if page["next_cursor"] is None:
                return
            query["cursor"] = page["next_cursor"]

    def retry(self, task_id: str, *, idempotency_key: str | None = None, tries: int = 3) -> dict[str, Any]:
        """
        Send a final task again, as a new one (``POST /task/{id}/retry``).

        Returns:
            As :meth:`submit`, with ``retry_of``.

        Raises:
            ApiRefused: No such task; not final; or a file that it needs is gone.
            ApiUnreachable: No answer to any try. The retry may have been recorded.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._insist(tries, "POST", f"/task/{task_id}/retry", headers=headers)

    def retry_matching(self, tries: int = 3, **filters: Any) -> dict[str, Any]:
        """
        Send final tasks again by filter (``POST /task/retry``), one page of them.

        Repeated safely after a lost answer: what was retried is not retried again.

        Args:
            filters: As the contract has them: ``status``, ``error_code``, ``dry_run``, …

        Returns:
            ``retried``, ``refused`` and ``next_cursor``.
        """
        return self._insist(tries, "POST", "/task/retry", json=filters)

    def delete(self, task_id: str) -> None:
        """Delete a final task and its outputs."""
        with self._ask("DELETE", f"{self.url}/task/{task_id}") as answer:
            _raise_for_problem(answer, (204,))

    def task(self, task_id: str, *, wait_s: float = 0) -> dict[str, Any]:
        """The task as it is now, or after at most *wait_s* seconds if it is not final earlier."""
        query = {"wait": str(wait_s)} if wait_s else {}
        return self._json("GET", f"/task/{task_id}", params=query)

    def cancel(self, task_id: str) -> dict[str, Any]:
        """Ask for an end of the task; harmless when it is final."""
        return self._json("POST", f"/task/{task_id}/cancel")

    def status(self) -> dict[str, Any]:
        """``GET /status``; more than one word of it only with a key where keys are used."""
        return self._json("GET", "/status", accept=(200, 503))

    def follow(
        self,
        task_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[dict[str, Any]], None] | None = None,
        poll_s: float = 0.25,
        patience_s: float = 30.0,
    ) -> dict[str, Any]:
        """
        Wait until the task is final and return it.

        The API holds each answer until something changed (a long poll); where it does not, because all
        its places are taken or it is an older one, this polls instead.

        Args:
            timeout_s: How long to wait; for ever if ``None``.
            on_change: Called with every new reading, the final one included.
            poll_s: Between two questions to an API that does not hold its answers.
            patience_s: How long the API may be away without this giving up.

        Raises:
            WaitTimeout: Not final within *timeout_s*.
            ApiUnreachable: Away for longer than *patience_s*.
            ApiRefused: No such task (404), or the key is not accepted.
        """
        started = heard = time.monotonic()
        etag = ""
        while True:
            asked = time.monotonic()
            left_s = HOLD_S if timeout_s is None else started + timeout_s - asked
            hold_s = max(0.0, min(HOLD_S, left_s)) if etag else 0.0
            task = None
            try:
                task, etag = self._read(task_id, etag, hold_s)
            except ApiUnreachable:
                hold_s = 0.0
                if asked - heard > patience_s:
                    raise
            else:
                heard = time.monotonic()
            if task is not None:
                if on_change:
                    on_change(task)
                if task["status"] in FINAL:
                    return task
            now = time.monotonic()
            if timeout_s is not None and now - started >= timeout_s:
                msg = f"task {task_id} is not final after {timeout_s:g} s; it goes on"
                raise WaitTimeout(msg)
            if task is not None and etag:
                time.sleep(min(poll_s, 0.05))  # ask again soon: the next answer will be held
            elif now - asked < hold_s / 2 or not hold_s:
                # Quick while a person watches the first seconds, gentle on a task of an hour.
                time.sleep(poll_s if now - started < 30 else max(poll_s, 1.0))

    def events(
        self, task_id: str, *, previews: bool = False, last_event_id: str = "", patience_s: float = 30.0
    ) -> Iterator[Event]:
        """
        The task's event stream (``GET /task/{id}/events``) until its final state.

        It outlives broken connections: it comes back with the id of the last event, and the API goes on
        from there. Where every place is taken it asks again when the API says.

        Args:
            last_event_id: Go on after this event of an earlier stream.
            patience_s: How long the API may be away, or full, without this giving up.

        Raises:
            ApiUnreachable: Away or full for longer than *patience_s*.
            ApiRefused: No such task (404), or the key is not accepted.
        """
        heard = time.monotonic()
        while True:
            headers = {"Accept": "text/event-stream"} | (
                {"Last-Event-ID": last_event_id} if last_event_id else {}
            )
            pause_s = 1.0
            try:
                with self._ask(
                    "GET", f"{self.url}/task/{task_id}/events", params={"preview": "1"} if previews else {},
                    stream=True, headers=headers, timeout=(self._timeout[0], SILENCE_S),
                ) as answer:  # fmt: skip
                    if answer.status_code == 204:
                        return
                    pause_s = float(answer.headers.get("Retry-After") or pause_s)
                    _raise_for_problem(answer, (200,))
                    for event in _parse_events(answer.iter_content(None)):
                        heard = time.monotonic()
                        last_event_id = event.id or last_event_id
                        yield event
                        if event.name == "done":
                            return
            except (ApiUnreachable, requests.RequestException) as error:
                if time.monotonic() - heard > patience_s:
                    if isinstance(error, ApiUnreachable):
                        raise
                    msg = f"the stream broke off: {_reason(error)}"
                    raise ApiUnreachable(msg) from error
            time.sleep(pause_s)

    def _read(self, task_id: str, etag: str, hold_s: float) -> tuple[dict[str, Any] | None, str]:
        """The task if it is not that of *etag*, else ``None`` after *hold_s* seconds; and its ETag."""
        query = {"wait": f"{hold_s:.1f}"} if hold_s >= 0.1 else {}
        headers = {"If-None-Match": etag} if etag else {}
        with self._ask("GET", f"{self.url}/task/{task_id}", params=query, headers=headers) as answer:
            if answer.status_code == 304:
                return None, etag
            return self._object(answer, (200,)), answer.headers.get("ETag", "")

    def upload(self, path: Path) -> dict[str, Any]:
        """
        Store a local file (``POST /storage/upload``), streamed, so its size needs no memory.

        Returns:
            The asset; ``"asset:" + answer["id"]`` is what a task's inputs take.
        """
        with path.open("rb") as file:
            form = _Multipart(file, path.name)
            return self._json(
                "POST", "/storage/upload", data=form, headers={"Content-Type": form.content_type}
            )

    def open_output(self, output: Mapping[str, Any]) -> contextlib.AbstractContextManager[Iterator[bytes]]:
        """The stored bytes of one entry of a task's ``outputs``, in pieces."""
        return self._bytes(self._here(str(output["url"])))

    def download(self, output: Mapping[str, Any], folder: Path) -> Path:
        """
        Save one output in *folder* and return where it lies.

        The name is the output's own, made safe. A file of this name with the same content is
        taken as it is; one with other content is left alone and a number is put in our name.

        Raises:
            DownloadDamaged: Size or digest differ from what the API named.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = safe_name(str(output.get("name") or f"output-{output['index']}"))
        part = folder / f".{name[:200]}.{uuid.uuid4().hex[:8]}.part"
        digest, size = hashlib.sha256(), 0
        try:
            with part.open("wb") as file, self.open_output(output) as pieces:
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
                file.flush()
                os.fsync(file.fileno())
            named = output.get("size_bytes"), output.get("sha256")
            if (named[0] is not None and named[0] != size) or (named[1] and named[1] != digest.hexdigest()):
                msg = f"{name}: got {size} bytes that are not the stored ones"
                raise DownloadDamaged(msg)
            return _settle(part, folder, name, digest.hexdigest())
        finally:
            part.unlink(missing_ok=True)

    def _here(self, url: str) -> str:
        """
        A link of an answer by the way we reach the API.

        The API writes links with its public address, which this caller may not reach and whose host,
        whatever it is, must not be sent our key.
        """
        path = urlsplit(url).path
        return (
            self.url + path[path.find("/task/") :]
            if "/task/" in path
            else urljoin(self.url + "/", path.lstrip("/"))
        )

    def _insist(self, tries: int, method: str, path: str, **request: Any) -> dict[str, Any]:
        """Ask again where no answer came; only for what may be asked twice."""
        for left in reversed(range(tries)):
            try:
                return self._json(method, path, **request)
            except ApiUnreachable:
                if not left:
                    raise
                time.sleep(0.5)
        msg = "tries must be at least 1"
        raise ValueError(msg)

    @contextlib.contextmanager
    def _bytes(self, url: str) -> Iterator[Iterator[bytes]]:
        with self._ask("GET", url, stream=True, headers={"Accept-Encoding": "identity"}) as answer:
            _raise_for_problem(answer, (200,))

            def pieces() -> Iterator[bytes]:
                try:
                    yield from answer.iter_content(256 * 1024)
                except requests.RequestException as error:
                    msg = f"the download broke off: {_reason(error)}"
                    raise ApiUnreachable(msg) from error

            yield pieces()

    def _json(
        self, method: str, path: str, *, accept: tuple[int, ...] = (200, 201, 202), **request: Any
    ) -> dict[str, Any]:
        with self._ask(method, self.url + path, **request) as answer:
            return self._object(answer, accept)

    def _object(self, answer: requests.Response, accept: tuple[int, ...]) -> dict[str, Any]:
        _raise_for_problem(answer, accept)
        try:
            body = answer.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            msg = f"{self.url} answered something that is not GenPulse's"
            raise ApiUnreachable(msg)
        return body

    def _ask(self, method: str, url: str, **request: Any) -> requests.Response:
        try:
            return self._session.request(method, url, **{"timeout": self._timeout, **request})
        except requests.RequestException as error:
            msg = f"no answer from {self.url}: {_reason(error)}"
            raise ApiUnreachable(msg) from error


def _parse_events(pieces: Iterable[bytes]) -> Iterator[Event]:
    """The events of a stream that arrives in pieces; comments and what is not JSON are left out."""
    rest = b""
    for piece in pieces:
        *blocks, rest = (rest + piece).split(b"\n\n")
        for block in blocks:
            fields = dict(line.partition(": ")[::2] for line in block.decode("utf-8", "replace").split("\n"))
            if "data" not in fields:
                continue
            with contextlib.suppress(ValueError):
                data = json.loads(fields["data"])
                if isinstance(data, dict):
                    yield Event(fields.get("id", ""), fields.get("event", "message"), data)


def safe_name(name: str) -> str:
    """
    A file name that stays in its folder, for every *name* that a server or a workflow may give.

    No separators, control characters or leading dots; at most 200 bytes, the ending kept.
    """
    base = re.split(r"[/\\]", name)[-1]
    base = re.sub(r'[\x00-\x1f\x7f<>:"|?*]+', "_", base).strip(" .").lstrip("-") or "output"
    stem, dot, ending = base.rpartition(".")
    if not dot or not stem or len(ending) > 16:
        stem, dot, ending = base, "", ""
    room = 200 - len((dot + ending).encode())
    return stem.encode()[:room].decode(errors="ignore") + dot + ending


def _settle(part: Path, folder: Path, name: str, sha256: str) -> Path:
    """Give a complete file its name; ``link`` refuses to overwrite where ``rename`` would."""
    stem, ending = Path(name).stem, Path(name).suffix
    for number in range(1, 10_000):
        target = folder / (name if number == 1 else f"{stem} ({number}){ending}")
        try:
            os.link(part, target)
        except FileExistsError:
            if target.is_file() and _sha256(target) == sha256:
                return target
        except OSError:  # a file system without hard links
            if not target.exists():
                part.replace(target)
                return target
        else:
            return target
    msg = f"{folder} holds too many files named {name}"
    raise FileExistsError(msg)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Multipart:
    """A multipart form with one file, read while it is sent; ``requests`` itself holds it in memory."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        boundary = uuid.uuid4().hex
        quoted = name.replace("\\", "_").replace('"', "%22").replace("\r", "").replace("\n", "")
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        self.content_type = f"multipart/form-data; boundary={boundary}"
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{quoted}"\r\n'
            f"Content-Type: {kind}\r\n\r\n"
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        self._file = file
        self._before, self._after = head, tail
        self._left = os.fstat(file.fileno()).st_size
        self._length = len(head) + self._left + len(tail)

    def __len__(self) -> int:
        return self._length

    def read(self, size: int = -1) -> bytes:
        """At most *size* bytes; never more of the file than its length was at the start."""
        size = self._length if size < 0 else size
        if self._before:
            piece, self._before = self._before[:size], self._before[size:]
            return piece
        if self._left:
            piece = self._file.read(min(size, self._left, 1 << 20))
            if not piece:
                msg = "the file became shorter while it was sent"
                raise OSError(msg)
            self._left -= len(piece)
            return piece
        piece, self._after = self._after[:size], self._after[size:]
        return piece


def _raise_for_problem(answer: requests.Response, accept: tuple[int, ...]) -> None:
    if answer.status_code in accept:
        return
    try:
        problem = answer.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict) or "code" not in problem:
        shown = " ".join(answer.text.split())[:_ANSWER_LIMIT]
        if answer.status_code >= 500:
            msg = f"HTTP {answer.status_code} from {answer.url}: {shown}"
            raise ApiUnreachable(msg)
        raise ApiRefused(answer.status_code, "unknown", f"HTTP {answer.status_code}: {shown}")
    detail = str(problem.get("detail") or problem.get("title") or problem["code"])
    if answer.status_code in {502, 503, 504}:
        raise ApiUnreachable(detail)
    errors = tuple(
        (str(error.get("pointer", "")), str(error.get("detail", "")))
        for error in problem.get("errors") or ()
        if isinstance(error, dict)
    )
    raise ApiRefused(answer.status_code, str(problem["code"]), detail, errors)


def _reason(error: BaseException) -> str:
    """The innermost cause in few words; urllib3 wraps the plain one several times."""
    if isinstance(error, requests.ConnectTimeout):
        return "timed out while connecting"
    if isinstance(error, requests.Timeout):
        return "timed out"
    seen: BaseException = error
    while (inner := seen.__cause__ or seen.__context__) is not None:
        seen = inner
    if isinstance(seen, OSError) and seen.strerror:
        return seen.strerror.lower()
    return type(seen).__name__
