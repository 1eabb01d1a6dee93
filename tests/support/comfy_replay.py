"""
Replays a recorded conversation with ComfyUI against a server and compares what it says with the record.

The records in ``tests/data/comfy`` are JSON lines made from traces of a real ComfyUI 0.3.64. The first line
describes the scenario, each further one is a step: what the client did (``connect``, ``send``, ``close``,
``http``) or what it heard (``on`` a socket: ``message``, ``status``, ``progress_state``, ``frame``). Before
the client does something it waits until it has heard what the record has before that point.

Values that differ from run to run are variables, bound where they are first seen:

==================  ==========================================================================
``$prompt1``        a prompt id, from the first answer that has it, or made up if we send it first
``$client1``        a client id, made up; ``$sid_C`` one that the server made up
``$number3``        the first number seen in this scenario plus 3 (``$-number3``: its negative)
``$color1``         a colour, made up, so that nothing is in a real server's cache by chance
``$run``            a directory for save prefixes, made up
``$file:p:2:png``   ``p_00007_.png`` where the first such file had the number 5; ``*`` is any number
``$temp:1:png``     a preview file with its random prefix
``$any``            anything; ``{"$set": [...]}`` these in any order; ``{"$like": "a*b"}`` a pattern
==================  ==========================================================================
"""

from __future__ import annotations

import fnmatch
import json
import random
import re
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import websocket

DATA = Path(__file__).parent.parent / "data" / "comfy"
_VARIABLE = re.compile(r"\$(?:prompt|client|sid_|color|run)\w*")
_PATIENCE_S = 15.0
_QUIET_S = 0.15


class Mismatch(AssertionError):
    """The server said something else than the record."""


@dataclass(frozen=True)
class Scenario:
    """One record. ``independent``: its requests do not build on each other, so some can be left out."""

    name: str
    note: str
    needs_sim: bool
    independent: bool
    soft_progress: bool
    statuses: bool
    count_up: int
    """So many numbers are used up first, where the order against fixed numbers matters."""
    steps: list[dict[str, Any]]

    @classmethod
    def load(cls, path: Path) -> Scenario:
        """Read a record."""
        head, *steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return cls(
            name=head["scenario"],
            note=head["note"],
            needs_sim=head.get("needs_sim", False),
            independent=head.get("independent", False),
            soft_progress=head.get("soft_progress", False),
            statuses=head.get("statuses", False),
            count_up=head.get("count_up", 0),
            steps=steps,
        )


@dataclass
class Bindings:
    """What the variables of one replay stand for."""

    values: dict[str, Any] = field(default_factory=dict)
    number: int | None = None
    files: dict[str, int] = field(default_factory=dict)

    def fill(self, value: Any) -> Any:
        """*value* with its variables replaced, for sending; unbound ones are made up."""
        if isinstance(value, dict):
            return {self.fill(key): self.fill(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.fill(item) for item in value]
        if not isinstance(value, str) or "$" not in value:
            return value
        if value.startswith("$file:"):
            _, prefix, offset, extension = value.split(":")
            return f"{prefix}_{self.files[prefix] + int(offset):05}_.{extension}"
        if value.startswith("$color"):
            return self._made(value)
        return _VARIABLE.sub(lambda match: str(self._made(match[0])), value)

    def _made(self, name: str) -> Any:
        if name not in self.values:
            if name.startswith("$color"):
                self.values[name] = random.randrange(1 << 24)
            elif name == "$run":
                self.values[name] = f"conformance-{uuid.uuid4().hex[:8]}"
            else:
                self.values[name] = str(uuid.uuid4())
        return self.values[name]

    def match(self, expected: Any, actual: Any, where: str) -> None:
        """Compare, binding variables that are seen for the first time; raise Mismatch with the place."""
        if expected == "$any":
            return
        if isinstance(expected, dict):
            self._match_dict(expected, actual, where)
        elif isinstance(expected, list):
            if not isinstance(actual, list) or len(actual) != len(expected):
                raise Mismatch(f"{where}: {actual!r} instead of {expected!r}")
            for place, (theirs, ours) in enumerate(zip(expected, actual, strict=True)):
                self.match(theirs, ours, f"{where}[{place}]")
        elif isinstance(expected, str) and expected.startswith("$"):
            self._match_variable(expected, actual, where)
        elif isinstance(expected, str):
            if self.fill(expected) != actual:
                raise Mismatch(f"{where}: {actual!r} instead of {self.fill(expected)!r}")
        elif type(expected) is not type(actual) or expected != actual:
            raise Mismatch(f"{where}: {actual!r} instead of {expected!r}")

    def _match_dict(self, expected: dict[str, Any], actual: Any, where: str) -> None:
        if "$set" in expected:
            wanted = sorted(self.fill(item) for item in expected["$set"])
            if not isinstance(actual, list) or sorted(actual) != wanted:
                raise Mismatch(f"{where}: {actual!r} instead of {wanted!r} in any order")
        elif "$like" in expected:
            if not isinstance(actual, str) or not fnmatch.fnmatchcase(actual, expected["$like"]):
                raise Mismatch(f"{where}: {actual!r} is not like {expected['$like']!r}")
        else:
            wanted_keys = {self.fill(key) for key in expected}
            if not isinstance(actual, dict) or set(actual) != wanted_keys:
                raise Mismatch(f"{where}: {actual!r} instead of {expected!r}")
            for key, value in expected.items():
                self.match(value, actual[self.fill(key)], f"{where}.{key}")

    def _match_variable(self, name: str, actual: Any, where: str) -> None:
        if name.startswith(("$number", "$-number")):
            sign = -1 if name.startswith("$-") else 1
            offset = int(name.split("number")[1])
            if type(actual) is not int:
                raise Mismatch(f"{where}: {actual!r} is no counted number")
            if self.number is None:
                self.number = sign * actual - offset
            if actual != sign * (self.number + offset):
                raise Mismatch(f"{where}: number {actual} instead of {sign * (self.number + offset)}")
        elif name.startswith("$file:"):
            _, prefix, offset_text, extension = name.split(":")
            found = re.fullmatch(rf"{re.escape(prefix)}_(\d{{5}})_\.{extension}", str(actual))
            if found is None:
                raise Mismatch(f"{where}: {actual!r} is not {prefix}_#####_.{extension}")
            if offset_text != "*":
                first = self.files.setdefault(prefix, int(found[1]) - int(offset_text))
                if int(found[1]) != first + int(offset_text):
                    raise Mismatch(f"{where}: {actual!r} is not number {first + int(offset_text)}")
        elif name.startswith("$temp:"):
            _, number, extension = name.split(":")
            if not re.fullmatch(rf"ComfyUI_temp_[a-z]{{5}}_{int(number):05}_\.{extension}", str(actual)):
                raise Mismatch(f"{where}: {actual!r} is no preview file {number}")
        elif name in ("$NaN", "$Infinity"):
            if json.dumps(actual) != name[1:]:
                raise Mismatch(f"{where}: {actual!r} instead of {name[1:]}")
        elif _VARIABLE.fullmatch(name) and name not in self.values:
            self.values[name] = actual
        elif self.fill(name) != actual:
            raise Mismatch(f"{where}: {actual!r} instead of {self.fill(name)!r}")


class Listener:
    """A WebSocket that is always read, by a thread; ``heard`` is everything, decoded."""

    def __init__(self, url: str) -> None:
        self.heard: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._socket = websocket.create_connection(url, timeout=_PATIENCE_S)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                opcode, data = self._socket.recv_data()
            except (OSError, websocket.WebSocketException):
                return
            if opcode == websocket.ABNF.OPCODE_TEXT:
                message = _decoded(json.loads(data))
            elif opcode == websocket.ABNF.OPCODE_BINARY:
                message = {"frame": decoded_frame(data)}
            else:
                return
            with self._changed:
                self.heard.append(message)
                self._changed.notify_all()

    def send(self, text: str) -> None:
        """Send a text message."""
        self._socket.send(text)

    def wait_for(self, count: int, key: Any, patience_s: float = _PATIENCE_S) -> bool:
        """Wait until *count* messages for which *key* holds have been heard; False if they do not come."""
        with self._changed:
            return self._changed.wait_for(lambda: sum(1 for m in self.heard if key(m)) >= count, patience_s)

    def ended(self, patience_s: float) -> bool:
        """Whether the server has ended the connection, waiting a while for it."""
        self._thread.join(patience_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Close the socket and wait for its end, so that the id is free for another one."""
        self._socket.close()
        self._thread.join(5)


def _decoded(message: dict[str, Any]) -> dict[str, Any]:
    """A text message in the short form of the records."""
    kind, data = message["type"], message["data"]
    if kind == "status":
        found = {"status": data["status"]["exec_info"]["queue_remaining"]}
        return found | ({"sid": data["sid"]} if "sid" in data else {})
    if kind == "progress_state":
        parts = []
        for node_id, node in data["nodes"].items():
            part = f"{node_id}:{node['value']}/{node['max']}:{node['state']}"
            shown = node["display_node_id"], node["parent_node_id"], node["real_node_id"]
            parts.append(
                part if shown == (node_id, None, node_id) else part + ":" + ":".join(map(str, shown))
            )
        return {"progress_state": data["prompt_id"], "nodes": " ".join(parts)}
    return {"message": kind, "data": data}


def decoded_frame(data: bytes) -> dict[str, Any]:
    """A binary frame in the short form of the records; the image itself is only checked to be one."""
    (event,) = struct.unpack_from(">I", data)
    if event == 1:
        (image_type,) = struct.unpack_from(">I", data, 4)
        assert data[8:].startswith(b"\x89PNG" if image_type == 2 else b"\xff\xd8")
        return {"event": event, "image_type": image_type}
    (length,) = struct.unpack_from(">I", data, 4)
    if event == 4:
        metadata = json.loads(data[8 : 8 + length])
        magic = b"\x89PNG" if metadata["image_type"] == "image/png" else b"\xff\xd8"
        assert data[8 + length :].startswith(magic)
        return {"event": event, "metadata": metadata}
    return {"event": event, "node_id": data[8 : 8 + length].decode(), "text": data[8 + length :].decode()}


class Replay:
    """One run of a scenario against the server at *url*; ``real`` leaves out what only we have."""

    def __init__(self, scenario: Scenario, url: str, *, real: bool = False) -> None:
        self.scenario = scenario
        self.url = url
        self.real = real
        self.bindings = Bindings()
        self._http = requests.Session()
        self._sockets: dict[str, Listener] = {}
        self._expected: dict[str, list[dict[str, Any]]] = {}
        self._unordered: set[str] = set()

    def run(self) -> None:
        """
        Play all steps and compare.

        Raises:
            Mismatch: With the place in the record and both values.
        """
        for _ in range(self.scenario.count_up):
            self._http.post(f"{self.url}/prompt", json={})  # refused, but counted
        with self._open():
            for line, step in enumerate(self.scenario.steps, 2):
                where = f"{self.scenario.name}:{line}"
                if "on" in step and "send" not in step:
                    if self._counts(step):
                        self._expected[step["on"]].append(step)
                elif "note" not in step:
                    self._catch_up(where)
                    time.sleep(step.get("pause_s", 0))
                    self._act(step, where)
            self._catch_up(f"{self.scenario.name}:end")
            time.sleep(_QUIET_S)
            for who in list(self._sockets):
                self._compare(who)

    @contextmanager
    def _open(self) -> Iterator[None]:
        try:
            yield
        finally:
            for socket in self._sockets.values():
                socket.close()
            self._http.close()

    def _act(self, step: dict[str, Any], where: str) -> None:
        if "connect" in step:
            if step["connect"] in self._sockets:
                self._end(step["connect"])
            query = f"?clientId={self.bindings.fill(step['client'])}" if step["client"] else ""
            self._sockets[step["connect"]] = Listener(f"ws{self.url[4:]}{step['path']}{query}")
            self._expected[step["connect"]] = []
        elif "send" in step:
            self._sockets[step["on"]].send(step["send"])
        elif "close" in step:
            if step["close"] in self._sockets:
                self._end(step["close"])
        elif not (self.real and step.get("sim")):
            self._request(step, where)

    def _end(self, who: str) -> None:
        """Compare what a socket has heard, then close it."""
        time.sleep(_QUIET_S)
        self._compare(who)
        self._sockets.pop(who).close()

    def _request(self, step: dict[str, Any], where: str) -> None:
        fill = self.bindings.fill
        body = (
            step["raw"].encode()
            if "raw" in step
            else json.dumps(fill(step["json"]))
            if "json" in step
            else None
        )
        answer = self._ask(step, body)
        where = f"{where} {step['http']} {step['path']}"
        if answer.status_code != step["expect"]:
            raise Mismatch(f"{where}: {answer.status_code} instead of {step['expect']}: {answer.text[:500]}")
        for name, value in step.get("headers", {}).items():
            if answer.headers.get(name) != value:
                raise Mismatch(f"{where}: {name}: {answer.headers.get(name)} instead of {value}")
        if "text" in step and answer.text != step["text"]:
            raise Mismatch(f"{where}: {answer.text[:500]!r} instead of {step['text']!r}")
        if "body" in step:
            expected = step["body"]
            if (
                self.real
                and self.scenario.independent
                and isinstance(expected, dict)
                and "number" in expected
            ):
                expected = expected | {"number": "$any"}  # the requests left out would have counted
            self.bindings.match(expected, answer.json(), where)
        if "unordered" in step:
            self._unordered.add(self.bindings.fill(step["unordered"]))

    def _ask(self, step: dict[str, Any], body: str | bytes | None) -> requests.Response:
        """
        Send one request; ask again for a history that the record had and this server has not yet.

        A scenario in which no socket hears the end (13) can only wait for a time, and a busy machine needs more of it.
        """
        fill = self.bindings.fill
        awaited = step["http"] == "GET" and step["path"].startswith("/history/") and step.get("body")
        end = time.monotonic() + _PATIENCE_S
        while True:
            answer = self._http.request(
                step["http"],
                self.url + fill(step["path"]),
                params=fill(step.get("query")),
                data=body,
                timeout=_PATIENCE_S,
            )
            if not awaited or answer.text != "{}" or time.monotonic() > end:
                return answer
            time.sleep(0.02)

    def _counts(self, message: dict[str, Any]) -> bool:
        """Whether this message, expected or heard, is one that the scenario compares."""
        if "status" in message:
            return self.scenario.statuses or "sid" in message
        if self.scenario.soft_progress:
            return not _is_progress(message)
        return True

    def _catch_up(self, where: str) -> None:
        """Wait for all that the record has heard by now."""
        if self.real and self.scenario.independent:
            return
        for who, expected in self._expected.items():
            socket = self._sockets.get(who)
            if socket is not None and not socket.wait_for(len(expected), self._counts):
                heard = [m for m in socket.heard if self._counts(m)]
                missing = expected[len(heard)] if len(heard) < len(expected) else None
                raise Mismatch(
                    f"{where}: {who} heard {len(heard)} of {len(expected)} messages; next: {missing}"
                )
            if socket is not None and expected and "sid" in expected[0]:
                # Bound now, because a later request may use it.
                self.bindings.match(expected[0]["sid"], socket.heard[0].get("sid"), f"{where} {who}'s sid")

    def _compare(self, who: str) -> None:
        if self.real and self.scenario.independent:
            return
        heard = [m for m in self._sockets[who].heard if self._counts(m)]
        expected = [{k: v for k, v in m.items() if k not in ("on", "pause_s")} for m in self._expected[who]]
        if len(heard) != len(expected):
            extra = heard[len(expected) :][:3]
            raise Mismatch(
                f"{self.scenario.name}: {who} heard {len(heard)} messages, not {len(expected)}: {extra}"
            )
        pairs = zip(self._sorted(expected), self._sorted(heard), strict=True)
        for place, (theirs, ours) in enumerate(pairs):
            self.bindings.match(theirs, ours, f"{self.scenario.name}: {who}'s message {place}")

    def _sorted(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages, those of prompts with several outputs in an order that does not depend on luck."""
        result: list[dict[str, Any]] = []
        group: list[dict[str, Any]] = []
        for message in messages:
            data = message.get("data") or {}
            prompt_id = self.bindings.fill(data.get("prompt_id") or message.get("progress_state") or "")
            if prompt_id in self._unordered and not message.get("message", "").startswith("execution_"):
                if "progress_state" not in message:
                    group.append(message)
            else:
                result += sorted(group, key=lambda m: (m["message"], str(m["data"]["node"]))) if group else []
                group = []
                result.append(message)
        return result + group


def _is_progress(message: dict[str, Any]) -> bool:
    return "progress_state" in message or "frame" in message or message.get("message") == "progress"


def scenarios() -> list[Scenario]:
    """All records, by name."""
    return [Scenario.load(path) for path in sorted(DATA.glob("*.jsonl"))]
