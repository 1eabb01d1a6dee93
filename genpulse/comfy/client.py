"""
One ComfyUI server over HTTP: each method is one call, bounded in time and size.

What this module promises: whatever the network, the server or its JSON does, a caller sees one of
``genpulse.errors`` and nothing else; no message names an address or a path of the server; no
redirect is followed and no proxy from the environment is used; ``/interrupt`` is never called
without an id, for that would kill whatever runs; ids and JSON types are checked before they are
sent, for ComfyUI's process dies of some wrong ones.

What a server can do is found out by asking it (a 404 or 405 on the jobs API means that it has
none), never by its version.

Source of all protocol facts: ComfyUI 0.3.64 ``server.py``, observed, and newer ones by reading.
"""

from __future__ import annotations

import contextlib
import enum
import io
import json
import math
import re
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.cookiejar import DefaultCookiePolicy
from typing import IO, Any, Self, cast
from urllib.parse import quote, urlsplit, urlunsplit

import requests
import urllib3

from genpulse.comfy.history import HistoryEntry, ServerFile, parse_history, scrub
from genpulse.errors import (
    ComfyUnavailable,
    ExecutionFailed,
    InputRejected,
    PromptLost,
    WorkflowRejected,
)

__all__ = [
    "Accepted",
    "ComfyClient",
    "HistoryEntry",
    "Place",
    "QueueSnapshot",
    "ServerFile",
    "ViewedFile",
    "Whereabouts",
]

JSON_LIMIT_BYTES = 256 * 2**20
_CHUNK_BYTES = 64 * 1024
_TEXT_LIMIT_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Accepted:
    """
    The server took a prompt into its queue; it was there before this answer came.

    ``number`` is the server's ordering number, not a place in the line; ``None`` if the prompt was
    found in the queue after an uncertain answer. With several output nodes the invalid ones are
    left out and the rest runs: then ``node_errors`` says which (by node id), although the server
    answered 200.
    """

    prompt_id: str
    number: float | None = None
    node_errors: Mapping[str, Any] = field(default_factory=dict)
    repeated: bool = False
    """It was posted twice, because the first answer was lost and the prompt was nowhere to be seen."""

    def raise_for_node_errors(self) -> None:
        """Raise :class:`WorkflowRejected` if the server left parts of the workflow out."""
        if self.node_errors:
            raise _rejected("parts of the workflow are not valid", dict(self.node_errors))


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """Prompt ids on a server. ``pending`` is in the order in which they will run."""

    running: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.running) + len(self.pending)


class Place(enum.Enum):
    """Where a prompt is on a server."""

    RUNNING = "running"
    PENDING = "pending"
    FINISHED = "finished"
    UNKNOWN = "unknown"
    """Neither in the queue nor, asked afterwards, in the history: lost, deleted or never there."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """What :meth:`ComfyClient.look` saw."""

    place: Place
    entry: HistoryEntry | None = None
    """Set when finished."""
    copies: int = 0
    """How often the prompt is in the queue. Two mean that it was posted twice and will run twice."""
    ahead: int | None = None
    """Prompts that run before it, when pending."""
    running: tuple[str, ...] = ()
    """What runs on the server now, whoever's it is. Unchanged for very long, its worker may be dead."""
    queue_length: int = 0
    """Prompts in the queue, running and pending, whoever's they are."""

    @property
    def is_over(self) -> bool:
        """Whether the server will not work on the prompt any more."""
        return self.place in (Place.FINISHED, Place.UNKNOWN)


class ViewedFile(io.RawIOBase):
    """
    The bytes of a server file while they arrive. Reads block at most the read time-out.

    A short answer is an error, not an end: :meth:`read` raises :class:`ComfyUnavailable` if the
    connection ends before ``length`` bytes came.
    """

    def __init__(self, response: requests.Response) -> None:
        super().__init__()
        self._response = response
        self.content_type = (
            response.headers.get("Content-Type", "application/octet-stream").split(";")[0].strip()
        )
        self.length = _length(response)
        """Size in bytes as the server announced it; ``None`` if it did not."""

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill *buffer*; 0 means the end. Raises :class:`ComfyUnavailable` on any failure."""
        view = memoryview(buffer).cast("B")
        if not len(view):
            return 0
        with _our_errors():
            data = self._response.raw.read(len(view), decode_content=True)
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Give the connection back."""
        if not self.closed:
            self._response.close()
        super().close()


class ComfyClient:
    """
    HTTP calls to one ComfyUI server. Threads may share it: each gets its own connections.

    Args:
        base_url: ``http(s)://host[:port][/prefix]``; user and password in it become basic auth.
        connect_timeout_s: How long to wait for a connection.
        read_timeout_s: How long the server may be silent. Loading a model can block it for seconds.
    """

    def __init__(
        self, base_url: str, *, connect_timeout_s: float = 3.0, read_timeout_s: float = 30.0
    ) -> None:
        parts = urlsplit(base_url.strip())
        try:
            valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            msg = "a ComfyUI address looks like http://host:8188"
            raise ValueError(msg)
        host = parts.netloc.rpartition("@")[2]
        self.base_url = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        self.basic_auth: tuple[str, str] | None = (
            (parts.username or "", parts.password or "") if parts.username or parts.password else None
        )
        self.connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self._local = threading.local()
        self._sessions: list[requests.Session] = []
        self._lock = threading.Lock()
        self._jobs_cancel: bool | None = None

    def __repr__(self) -> str:
        return f"ComfyClient({self.base_url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close idle connections. The client can still be used."""
        with self._lock:
            sessions, self._sessions = self._sessions, []
            self._local = threading.local()
        for session in sessions:
            session.close()

    def release_thread(self) -> None:
        """Close the calling thread's own connections; a thread that ends does so first."""
        session = getattr(self._local, "session", None)
        if session is not None:
            self._local.session = None
            with self._lock, contextlib.suppress(ValueError):
                self._sessions.remove(session)
            session.close()

    # Prompts

    def submit(
        self,
        workflow: Mapping[str, Any],
        *,
        prompt_id: str,
        client_id: str,
        extra_data: Mapping[str, Any] | None = None,
    ) -> Accepted:
        """
        Hand a workflow to this server. Not idempotent: the same id twice runs twice.

        The caller chooses *prompt_id*, so that after a crash or an uncertain answer it can look for
        its own prompt before it posts again (:meth:`deliver` does).

        Args:
            workflow: API-format graph, ``{node_id: {"class_type": str, "inputs": {…}}}``.
            prompt_id: Canonical lower-case UUID text; newer servers take nothing else.
            client_id: Whose socket hears of it. Anything but a string kills the server's process.
            extra_data: Kept with the prompt; ``extra_pnginfo`` in it is written into saved files.

        Raises:
            WorkflowRejected: HTTP 400 or 413, with the errors by node id. Permanent.
            ComfyUnavailable: Anything else. Unless ``refused``, the prompt may have arrived.

        Source: ComfyUI ``server.py``, ``POST /prompt``.
        """
        _check_ids(prompt_id, client_id)
        body: dict[str, Any] = {"prompt": workflow, "client_id": client_id, "prompt_id": prompt_id}
        if extra_data is not None:
            _check_object(extra_data, "extra_data is not an object")
            body["extra_data"] = dict(extra_data)
        _check_object(workflow, "the workflow is not in API format")
        try:
            data = json.dumps(body, allow_nan=False, default=_as_dict).encode()
        except (TypeError, ValueError, RecursionError) as error:
            msg = "the workflow cannot be written as JSON"
            raise WorkflowRejected(msg) from error
        status, answer = self._json(
            "POST", "/prompt", data=data, headers={"Content-Type": "application/json"}, accept=(400, 413)
        )
        if status == 413:
            msg = "the workflow is larger than the ComfyUI server takes"
            raise WorkflowRejected(msg)
        if status == 400:
            raise _rejection(answer)
        if not isinstance(answer, dict) or not isinstance(answer.get("prompt_id"), str):
            msg = "the server's answer is not ComfyUI's"
            raise ComfyUnavailable(msg)
        if answer["prompt_id"] != prompt_id:
            self._withdraw(answer["prompt_id"])
            msg = "the ComfyUI server is too old: it does not take the caller's prompt id"
            raise ComfyUnavailable(msg)
        number, errors = answer.get("number"), answer.get("node_errors")
        return Accepted(
            prompt_id=prompt_id,
            number=float(number) if isinstance(number, int | float) else None,
            node_errors=_public_node_errors(errors),
        )

    def deliver(
        self,
        workflow: Mapping[str, Any],
        *,
        prompt_id: str,
        client_id: str,
        extra_data: Mapping[str, Any] | None = None,
    ) -> Accepted:
        """
        :meth:`submit`, and after an uncertain answer look before posting again, once.

        If two copies are seen nevertheless, one of them is deleted.

        Raises:
            WorkflowRejected: As in :meth:`submit`.
            ComfyUnavailable: The server is away, or would not take the prompt twice. ``refused`` only if
                nobody was there from the start: after that the prompt may have arrived.
        """
        try:
            return self.submit(workflow, prompt_id=prompt_id, client_id=client_id, extra_data=extra_data)
        except ComfyUnavailable as error:
            if error.refused:
                raise
        try:
            return self._deliver_again(workflow, prompt_id, client_id, extra_data)
        except ComfyUnavailable as error:
            if error.refused:
                raise ComfyUnavailable(error.message) from error
            raise

    def _deliver_again(
        self,
        workflow: Mapping[str, Any],
        prompt_id: str,
        client_id: str,
        extra_data: Mapping[str, Any] | None,
    ) -> Accepted:
        if self.look(prompt_id).place is not Place.UNKNOWN:
            return Accepted(prompt_id)
        # A slow POST may still be on its way through the server: give it a moment before a second one.
        time.sleep(0.3)
        if self.look(prompt_id).place is not Place.UNKNOWN:
            return Accepted(prompt_id)
        accepted = self.submit(workflow, prompt_id=prompt_id, client_id=client_id, extra_data=extra_data)
        if self.look(prompt_id).copies > 1:
            self._post("/queue", {"delete": [prompt_id]})
        return replace(accepted, repeated=True)

    def queue(self, *, timeout_s: float | None = None) -> QueueSnapshot:
        """
        The ids in the queue. Costly with many prompts waiting, since whole prompts are in the answer.

        The server gives pending prompts in heap order; they run by ``(number, prompt_id)``.
        """
        _, answer = self._json("GET", "/queue", timeout_s=timeout_s)
        if not isinstance(answer, dict):
            msg = "the server's answer is not ComfyUI's"
            raise ComfyUnavailable(msg)
        running = _queue_items(answer.get("queue_running"))
        pending = sorted(_queue_items(answer.get("queue_pending")))
        return QueueSnapshot(tuple(name for _, name in running), tuple(name for _, name in pending))

    def history(self, prompt_id: str, *, timeout_s: float | None = None) -> HistoryEntry | None:
        """The entry of a prompt that ended, or ``None`` (unknown, pending, running, or long ago)."""
        path = f"/history/{quote(_checked_id(prompt_id), safe='')}"
        _, answer = self._json("GET", path, timeout_s=timeout_s)
        entry = answer.get(prompt_id) if isinstance(answer, dict) else None
        return parse_history(prompt_id, entry) if isinstance(entry, dict) else None

    def look(self, prompt_id: str, *, timeout_s: float | None = None) -> Whereabouts:
        """
        Where a prompt is: the queue is asked first and the history second.

        The other order could miss a prompt that ends in between, and so call a success lost.
        """
        queue = self.queue(timeout_s=timeout_s)
        copies = queue.running.count(prompt_id) + queue.pending.count(prompt_id)
        if prompt_id in queue.running:
            return Whereabouts(Place.RUNNING, copies=copies, running=queue.running, queue_length=len(queue))
        if prompt_id in queue.pending:
            ahead = len(queue.running) + queue.pending.index(prompt_id)
            return Whereabouts(
                Place.PENDING,
                copies=copies,
                ahead=ahead,
                running=queue.running,
                queue_length=len(queue),
            )
        entry = self.history(prompt_id, timeout_s=timeout_s)
        place = Place.UNKNOWN if entry is None else Place.FINISHED
        return Whereabouts(place, entry=entry, running=queue.running, queue_length=len(queue))

    def cancel(self, prompt_id: str, *, timeout_s: float | None = None) -> None:
        """
        Ask the server to drop a pending or stop a running prompt; says nothing about the effect.

        Servers with the jobs API do both at once. Others get a delete from the queue first and then
        an interrupt *by id*: in the other order a prompt that starts in between would run on.
        """
        _checked_id(prompt_id)
        if self._jobs_cancel is not False:
            path = f"/api/jobs/{quote(prompt_id, safe='')}/cancel"
            status, answer = self._json(
                "POST", path, accept=(400, 404, 405, 500, 501), timeout_s=timeout_s, lenient=True
            )
            if status == 200 and isinstance(answer, dict) and isinstance(answer.get("cancelled"), bool):
                self._jobs_cancel = True
                return
            if status in (404, 405) and not isinstance(answer, dict):
                self._jobs_cancel = False
        self._post("/queue", {"delete": [prompt_id]}, timeout_s=timeout_s)
        self._post("/interrupt", {"prompt_id": prompt_id}, timeout_s=timeout_s)

    def stop(self, prompt_id: str, *, within_s: float = 2.0) -> Whereabouts:
        """
        Cancel and watch until the prompt is over, repeating the interrupt while it still runs.

        Returns:
            Where it was seen last. Still ``RUNNING`` after *within_s* means that its node does not
            look for interrupts; ``FINISHED`` with success means that the cancel came too late.

        Raises:
            ComfyUnavailable: The server did not answer in time.
        """
        end = time.monotonic() + within_s
        pause = 0.05
        while True:
            left = max(0.5, end - time.monotonic())
            self.cancel(prompt_id, timeout_s=left)
            seen = self.look(prompt_id, timeout_s=left)
            for _ in range(3):
                if seen.is_over or time.monotonic() >= end:
                    return seen
                time.sleep(pause)
                seen = self.look(prompt_id, timeout_s=max(0.5, end - time.monotonic()))
            pause = min(0.25, pause * 2)

    def forget(self, prompt_id: str) -> None:
        """Delete a finished prompt from the history. Its files stay: no server deletes files."""
        self._post("/history", {"delete": [_checked_id(prompt_id)]})

    # Files

    def upload(
        self,
        stream: IO[bytes],
        *,
        name: str,
        subfolder: str = "",
        overwrite: bool = True,
        kind: str = "input",
    ) -> ServerFile:
        """
        Put a file into the server's input folder, streamed; use the name that comes back.

        Without *overwrite* other bytes under a taken name are stored as ``name (1).png``.

        Raises:
            InputRejected: The name cannot be used, or the file is larger than the server takes.
            ComfyUnavailable: The server did not take it; doing it again is harmless with *overwrite*.

        Source: ComfyUI ``server.py``, ``POST /upload/image``; the content is not looked at.
        """
        # A slash in the name is HTTP 500, and ".." in either is refused.
        if not name or "/" in name or "\\" in name or _CONTROL.search(name + subfolder) or ".." in name:
            msg = "the file name cannot be used on a ComfyUI server"
            raise InputRejected(msg)
        if kind not in {"input", "temp", "output"} or subfolder.startswith("/") or ".." in subfolder:
            msg = "the folder cannot be used on a ComfyUI server"
            raise InputRejected(msg)
        fields = {"type": kind, "subfolder": subfolder, "overwrite": "true" if overwrite else "false"}
        form = _Multipart(stream, name=name, fields=fields)
        try:
            status, answer = self._json(
                "POST",
                "/upload/image",
                data=form.body(),
                headers={"Content-Type": form.content_type},
                accept=(400, 413),
            )
        except ComfyUnavailable as error:
            # A server that finds the body too large may hang up before it has read it all.
            if not error.refused and self._exceeds_limit(form.size_bytes):
                raise InputRejected(_TOO_LARGE) from error
            raise
        if status == 413:
            raise InputRejected(_TOO_LARGE)
        if status == 400:
            msg = "the ComfyUI server refuses the file's name or folder"
            raise InputRejected(msg)
        if not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
            msg = "the server's answer is not ComfyUI's"
            raise ComfyUnavailable(msg)
        return ServerFile(
            filename=answer["name"],
            subfolder=str(answer.get("subfolder") or ""),
            type=str(answer.get("type") or kind),
        )

    @contextlib.contextmanager
    def view(self, file: ServerFile) -> Iterator[ViewedFile]:
        """
        Read a file of the server, streamed.

        Raises:
            PromptLost: The file is gone (404): the name came from the server's cache. Run again.
            ExecutionFailed: The server never gives out a file of this name (400, 403).
            ComfyUnavailable: No answer, or it broke off.

        Source: ComfyUI ``server.py``, ``GET /view``.
        """
        params = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        response = self._send("GET", "/view", params=params, stream=True)
        try:
            if response.status_code == 404:
                msg = "an output is no longer on the ComfyUI server"
                raise PromptLost(msg)
            if response.status_code in (400, 403):
                msg = "the ComfyUI server does not give out a file of this name"
                raise ExecutionFailed(msg)
            _check_status(response)
            with ViewedFile(response) as viewed:
                yield viewed
        finally:
            response.close()

    # The server itself

    def queue_remaining(self, *, timeout_s: float | None = None) -> int:
        """Prompts pending and running together; the cheapest call there is."""
        _, answer = self._json("GET", "/prompt", timeout_s=timeout_s)
        info = answer.get("exec_info") if isinstance(answer, dict) else None
        remaining = info.get("queue_remaining") if isinstance(info, dict) else None
        if isinstance(remaining, bool) or not isinstance(remaining, int):
            msg = "the server's answer is not ComfyUI's"
            raise ComfyUnavailable(msg)
        return remaining

    def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """Ask the server to give up memory; it does so when it is idle next."""
        self._post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def system_stats(self) -> dict[str, Any]:
        """Versions and devices. Never show it: ``argv`` holds paths."""
        return self._object("/system_stats")

    def features(self) -> dict[str, Any]:
        """What the server declares, for example ``max_upload_size`` in bytes; ``{}`` on old ones."""
        status, answer = self._json("GET", "/features", accept=(404, 405), lenient=True)
        return answer if status == 200 and isinstance(answer, dict) else {}

    def object_info(self, class_type: str | None = None) -> dict[str, Any]:
        """Declarations by class: of one class (``{}`` if unknown), or all of them (slow, large)."""
        path = "/object_info" if class_type is None else f"/object_info/{quote(class_type, safe='')}"
        return self._object(path)

    def left_out(self, workflow: Mapping[str, Any], requested: Collection[str]) -> tuple[str, ...]:
        """
        The output nodes of a workflow that this server did not set out to run, as they were not valid.

        Its answer to the POST says so and why. This is for a prompt whose answer nobody has read.

        Args:
            requested: :attr:`HistoryEntry.requested`.

        Raises:
            ComfyUnavailable: The server could not say which classes have outputs.
        """
        others = {
            node_id: str(node.get("class_type"))
            for node_id, node in workflow.items()
            if node_id not in requested
        }
        makes_output = {
            name: bool((self.object_info(name).get(name) or {}).get("output_node"))
            for name in sorted(set(others.values()))
        }
        return tuple(node_id for node_id, name in others.items() if makes_output[name])

    # The door: everything foreign becomes ours below this line

    def _object(self, path: str) -> dict[str, Any]:
        _, answer = self._json("GET", path)
        if not isinstance(answer, dict):
            msg = "the server's answer is not ComfyUI's"
            raise ComfyUnavailable(msg)
        return answer

    def _post(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> None:
        data = json.dumps(body).encode()
        response = self._send(
            "POST", path, data=data, headers={"Content-Type": "application/json"}, timeout_s=timeout_s
        )
        with contextlib.closing(response):
            _check_status(response)
            self._read(response, _TEXT_LIMIT_BYTES)

    def _withdraw(self, prompt_id: str) -> None:
        with contextlib.suppress(ComfyUnavailable):
            self._post("/queue", {"delete": [prompt_id]})
        if prompt_id:
            with contextlib.suppress(ComfyUnavailable):
                self._post("/interrupt", {"prompt_id": prompt_id})

    def _exceeds_limit(self, size_bytes: int | None) -> bool:
        if size_bytes is None:
            return False
        with contextlib.suppress(ComfyUnavailable):
            limit = self.features().get("max_upload_size")
            return isinstance(limit, int | float) and size_bytes > limit
        return False

    def _json(
        self,
        method: str,
        path: str,
        *,
        accept: tuple[int, ...] = (),
        timeout_s: float | None = None,
        lenient: bool = False,
        **kwargs: Any,
    ) -> tuple[int, Any]:
        """Status and parsed body. *accept*: statuses beside 200 that are no error here."""
        response = self._send(method, path, timeout_s=timeout_s, **kwargs)
        with contextlib.closing(response):
            if response.status_code not in accept:
                _check_status(response)
            body = self._read(response, JSON_LIMIT_BYTES if response.status_code == 200 else 2**20)
        try:
            # Bare NaN and Infinity are taken: a node's UI values reach the history unchanged.
            return response.status_code, json.loads(body)
        except (ValueError, RecursionError) as error:
            if lenient or response.status_code in accept:
                return response.status_code, None
            msg = "the ComfyUI server's answer is not JSON"
            raise ComfyUnavailable(msg) from error

    def _send(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> requests.Response:
        read_s = self.read_timeout_s if timeout_s is None else min(timeout_s, self.read_timeout_s)
        timeout = (min(self.connect_timeout_s, read_s), read_s)
        with _our_errors():
            kwargs.setdefault("stream", True)
            session = self._session()

            def send() -> requests.Response:
                return session.request(
                    method, self.base_url + path, timeout=timeout, allow_redirects=False, **kwargs
                )

            try:
                return send()
            except requests.ConnectionError as error:
                # A kept-alive connection that the server closed meanwhile; a GET may simply be repeated.
                if method != "GET" or isinstance(error, requests.Timeout) or _refused(error):
                    raise
                return send()

    def _read(self, response: requests.Response, limit_bytes: int) -> bytes:
        # A read time-out bounds each silence; this bounds a server that drips.
        end = time.monotonic() + max(10.0, 2 * self.read_timeout_s)
        parts: list[bytes] = []
        size = 0
        with _our_errors():
            for chunk in response.iter_content(_CHUNK_BYTES):
                size += len(chunk)
                if size > limit_bytes:
                    msg = "the ComfyUI server's answer is too large"
                    raise ComfyUnavailable(msg)
                if time.monotonic() > end:
                    msg = "the ComfyUI server did not answer in time"
                    raise ComfyUnavailable(msg)
                parts.append(chunk)
        return b"".join(parts)

    def _session(self) -> requests.Session:
        session = getattr(self._local, "session", None)
        if session is None:
            session = requests.Session()
            session.trust_env = False
            session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
            # No compression: it costs the server's event loop, and a bound on bytes stays a bound.
            session.headers["Accept-Encoding"] = "identity"
            session.headers["User-Agent"] = "genpulse"
            session.auth = self.basic_auth
            self._local.session = session
            with self._lock:
                self._sessions.append(session)
        return cast("requests.Session", session)


_TOO_LARGE = "the file is larger than the ComfyUI server takes"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NODE_ID = re.compile(r"Node ID '#(.{1,200})'")


@contextlib.contextmanager
def _our_errors() -> Iterator[None]:
    """Everything requests, urllib3 and the socket layer raise becomes :class:`ComfyUnavailable`."""
    try:
        yield
    except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError) as error:
        msg = "the ComfyUI server did not answer in time"
        raise ComfyUnavailable(msg) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        if _refused(error):
            msg = "nothing listens where the ComfyUI server should be"
            raise ComfyUnavailable(msg, refused=True) from error
        msg = "the connection to the ComfyUI server failed"
        raise ComfyUnavailable(msg) from error


def _refused(error: BaseException) -> bool:
    """Whether the kernel refused the connection: requests and urllib3 wrap that three deep."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        item = waiting.pop()
        if isinstance(item, ConnectionRefusedError):
            return True
        if not isinstance(item, BaseException) or id(item) in seen:
            continue
        seen.add(id(item))
        waiting += [item.__cause__, item.__context__, getattr(item, "reason", None), *item.args]
    return False


def _check_status(response: requests.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    if 300 <= status < 400:
        msg = "the ComfyUI server redirects; redirects are not followed"
    elif status in (401, 403, 407):
        msg = f"the ComfyUI server refuses access (HTTP {status})"
    else:
        msg = f"the ComfyUI server answered HTTP {status}"
    response.close()
    raise ComfyUnavailable(msg)


def _length(response: requests.Response) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isascii() and value.isdigit() else None


def _as_dict(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(type(value).__name__)


def _check_object(value: object, problem: str) -> None:
    """``extra_data`` that is no object can kill the server's worker thread."""
    if not isinstance(value, Mapping):
        raise WorkflowRejected(problem)


def _checked_id(prompt_id: object) -> str:
    """An empty id would make ``/interrupt`` kill whatever runs."""
    if not isinstance(prompt_id, str) or not prompt_id.strip():
        msg = "a prompt id is a non-empty text"
        raise ValueError(msg)
    return prompt_id


def _check_ids(prompt_id: object, client_id: object) -> None:
    try:
        canonical = isinstance(prompt_id, str) and str(uuid.UUID(prompt_id)) == prompt_id
    except ValueError:
        canonical = False
    if not canonical:
        msg = "a prompt id is a canonical lower-case UUID"
        raise ValueError(msg)
    if not isinstance(client_id, str) or not client_id or _CONTROL.search(client_id):
        msg = "a client id is a non-empty text"
        raise ValueError(msg)


def _queue_items(found: object) -> list[tuple[float, str]]:
    items = []
    for item in found if isinstance(found, list) else ():
        if isinstance(item, list) and len(item) >= 2 and isinstance(item[1], str):
            number = item[0]
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            items.append((float(number) if is_number and math.isfinite(number) else 0.0, item[1]))
    return items


def _public_node_errors(found: object) -> dict[str, Any]:
    """ComfyUI's errors by node id without tracebacks and paths, in its own words otherwise."""
    public: dict[str, Any] = {}
    for node_id, report in found.items() if isinstance(found, dict) else ():
        if not isinstance(report, dict):
            continue
        errors = report.get("errors")
        public[str(node_id)] = {
            "class_type": report.get("class_type") if isinstance(report.get("class_type"), str) else None,
            "errors": [
                {
                    "type": scrub(str(error.get("type", "")), 100),
                    "message": scrub(str(error.get("message", ""))),
                    "details": scrub(str(error.get("details", ""))),
                }
                for error in (errors if isinstance(errors, list) else ())
                if isinstance(error, dict)
            ],
        }
    return public


def _rejection(answer: object) -> WorkflowRejected:
    error = answer.get("error") if isinstance(answer, dict) else None
    error = error if isinstance(error, dict) else {}
    message = scrub(str(error.get("message") or "the ComfyUI server refused the workflow"))
    node_errors = _public_node_errors(answer.get("node_errors") if isinstance(answer, dict) else None)
    details = scrub(str(error.get("details") or ""))
    if details and not node_errors:
        message = f"{message.rstrip('.')}: {details}"
    extra = error.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    rejected = _rejected(message, node_errors)
    if rejected.node_id is None and isinstance(extra.get("node_id"), str):
        rejected.node_id = extra["node_id"]
        rejected.class_type = extra.get("class_type") if isinstance(extra.get("class_type"), str) else None
    elif rejected.node_id is None and (named := _NODE_ID.fullmatch(details)):
        # 0.3.64 names an unknown node's id in words only.
        rejected.node_id = named[1]
    return rejected


def _rejected(message: str, node_errors: dict[str, Any]) -> WorkflowRejected:
    """The first node's first error belongs into the sentence: ``error.details`` is often empty."""
    node_id = class_type = None
    for node_id, report in node_errors.items():
        class_type = report.get("class_type")
        first = next(iter(report["errors"]), None) if isinstance(report.get("errors"), list) else None
        if first:
            text = ": ".join(part for part in (first["message"], first["details"]) if part)
            message = scrub(f"{message.rstrip('.')}: node {node_id} ({class_type}): {text}")
        break
    return WorkflowRejected(message, node_errors=node_errors, node_id=node_id, class_type=class_type)


class _Multipart:
    """A form with one file, sent as it is read: requests' own would hold the file in memory."""

    def __init__(self, stream: IO[bytes], *, name: str, fields: Mapping[str, str]) -> None:
        boundary = uuid.uuid4().hex
        self.content_type = f"multipart/form-data; boundary={boundary}"
        quoted = name.replace("\\", "\\\\").replace('"', "%22")
        head = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
            for key, value in fields.items()
        )
        head += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{quoted}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        self._parts: list[IO[bytes]] = [
            io.BytesIO(head.encode()),
            stream,
            io.BytesIO(f"\r\n--{boundary}--\r\n".encode()),
        ]
        self.size_bytes = _remaining(stream)
        """Of the file; ``None`` if the stream cannot tell."""
        self._extra = len(head.encode()) + len(boundary) + 8

    def body(self) -> Iterator[bytes] | _SizedBody:
        """For requests: with a length if the file has one, else in chunks."""
        if self.size_bytes is None:
            return self._chunks()
        return _SizedBody(self._chunks(), self.size_bytes + self._extra)

    def _chunks(self) -> Iterator[bytes]:
        for part in self._parts:
            while chunk := part.read(_CHUNK_BYTES):
                yield chunk


class _SizedBody:
    """An iterable with a length: requests then sends ``Content-Length`` and streams it."""

    def __init__(self, chunks: Iterator[bytes], size: int) -> None:
        self._chunks = chunks
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks


def _remaining(stream: IO[bytes]) -> int | None:
    try:
        here = stream.tell()
        end = stream.seek(0, io.SEEK_END)
        stream.seek(here)
    except (OSError, AttributeError, ValueError):
        return None
    return end - here
