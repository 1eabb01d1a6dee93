"""
What can be made to go wrong in the simulator while it runs, and the words for it.

A real ComfyUI fails in ways that a client must survive: messages that come before the history is
written, sockets that fall silent, workers that die while HTTP goes on, answers that get lost after the
work was accepted. Each is one field of :class:`Faults`, switched by ``POST /simulator/faults`` with a
JSON object of the fields to change, or by ``Simulator.faults(...)`` in a test. Everything else stays.

Sources: ``PROTOCOL`` sections 0, 9 and 14; the traces named beside each field.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["Faults", "UnknownFault"]

_ACTIONS = frozenset({"drop_sockets", "exit"})
"""Names that do something at once instead of changing a field."""


class UnknownFault(ValueError):
    """The caller named a fault that does not exist or gave it a value of the wrong type."""


@dataclass
class Faults:
    """
    The switches, all off by default. Counters (``..._next``) count down and then stop by themselves.

    Two fields describe behaviour that the recorded server has and newer ones may not, so they are on:
    ``client_id_trap`` and ``shared_send_loop``.

    Two more names are actions, not fields: ``drop_sockets`` (true) resets every open WebSocket now,
    without a close frame; ``exit`` (a code) ends the process now, as a crash does.
    """

    history_gap_ms: float = 0.0
    """Time between ``execution_success`` and the history entry; 0 to 50 is realistic [trace 29]."""

    mute_sockets: bool = False
    """Sockets stay open and answer pings, but no message is delivered any more [trace 13]."""

    drop_after_messages: int = 0
    """Reset all sockets once, after this many further messages."""

    stall: bool = False
    """The worker hangs at the next node or step: HTTP is fine, nothing progresses, interrupts wait."""

    zombie: bool = False
    """The worker thread dies with the next prompt, which then runs for ever [trace 28]."""

    refuse_http: int = 0
    """Answer requests with this HTTP status (500, 503, ...) and do nothing else."""

    refuse_paths: list[str] = field(default_factory=list)
    """Only refuse or slow down paths that begin so (without ``/api``); empty means all."""

    refuse_next: int = 0
    """Stop refusing after this many requests; 0 means go on until switched off."""

    slow_http_ms: float = 0.0
    """Wait this long before a request is looked at [trace 40 has 190 ms of it]."""

    lose_answers_next: int = 0
    """Do what ``POST /prompt`` asks, then reset the connection instead of answering."""

    lose_prompt_next: int = 0
    """Answer 200 to ``POST /prompt`` and forget the prompt: neither in queue nor in history."""

    fail_next: str = ""
    """Make coming prompts fail in their first node: ``exception`` or ``oom`` [trace 06]."""

    fail_times: int = 1
    """How many prompts ``fail_next`` hits before it switches itself off."""

    interrupt_lost_next: int = 0
    """Answer 200 to this many interrupts without interrupting (the race of ``PROTOCOL`` section 8)."""

    lose_outputs: bool = False
    """``GET /view`` answers 404 for outputs, as it does for a cached name of a deleted file [trace 03]."""

    cut_view_next: int = 0
    """Reset the connection in the middle of the body of this many ``GET /view``."""

    exit_at: str = ""
    """Crash when this event has been logged: ``submitted``, ``started``, ``node`` or ``finished``."""

    client_id_trap: bool = True
    """When an old socket with the same clientId ends, the new one goes deaf as well [trace 13]."""

    shared_send_loop: bool = True
    """One socket that does not read holds up the messages of all [trace 30]."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def change(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """
        Set fields by name; all or none of them.

        Returns:
            The actions among *changes* (see the class), for the server to carry out.

        Raises:
            UnknownFault: A name or the type of a value is wrong; nothing was changed.
        """
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in changes.items():
            if name in _ACTIONS:
                continue
            if name not in known:
                raise UnknownFault(
                    f"no such fault: {name} (there are: {', '.join(sorted({*known, *_ACTIONS}))})"
                )
            old = known[name]
            if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
                continue
            if type(value) is not type(old):
                raise UnknownFault(f"{name} must be {type(old).__name__}, not {value!r}")
        if changes.get("fail_next") not in (None, "", "exception", "oom"):
            raise UnknownFault("fail_next must be exception, oom or empty")
        if changes.get("exit_at") not in (None, "", "submitted", "started", "node", "finished"):
            raise UnknownFault("exit_at must be submitted, started, node, finished or empty")
        with self._lock:
            for name, value in changes.items():
                if name not in _ACTIONS:
                    setattr(self, name, value)
        return {name: value for name, value in changes.items() if name in _ACTIONS}

    def take(self, name: str) -> bool:
        """Use up one of a counter; False when it has run out."""
        with self._lock:
            left = int(getattr(self, name))
            if left <= 0:
                return False
            setattr(self, name, left - 1)
            return True

    def take_failure(self) -> str:
        """The kind of failure the starting prompt shall end with, or an empty string."""
        with self._lock:
            kind = self.fail_next
            if kind:
                self.fail_times -= 1
                if self.fail_times <= 0:
                    self.fail_next, self.fail_times = "", 1
            return kind

    def refusal(self, path: str) -> int:
        """The HTTP status with which a request for *path* is refused, or 0."""
        with self._lock:
            if not self.refuse_http or not self.concerns(path):
                return 0
            status = self.refuse_http
            if self.refuse_next > 0:
                self.refuse_next -= 1
                if self.refuse_next == 0:
                    self.refuse_http = 0
            return status

    def concerns(self, path: str) -> bool:
        """Whether ``refuse_paths`` covers *path* (given without its ``/api`` prefix)."""
        return not self.refuse_paths or any(path.startswith(prefix) for prefix in self.refuse_paths)

    def as_dict(self) -> dict[str, Any]:
        """The fields as they are now, for ``GET /simulator/faults``."""
        return asdict(self)
