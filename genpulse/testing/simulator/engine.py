"""
The worker: one thread that takes prompts from the queue and runs their nodes, one prompt at a time.

It sends the messages of ComfyUI in ComfyUI's order, keeps the results of the last prompt as a cache, and
dies of what kills the real worker: an exception outside a node ends the thread for good, while HTTP goes
on ("zombie").

Source: ComfyUI 0.3.64 ``execution.py``, ``comfy_execution/graph.py``, ``comfy_execution/progress.py`` and
``main.prompt_worker``; traces 01 to 08, 18, 20, 21, 24, 28, 37.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from genpulse.testing.simulator.faults import Faults
from genpulse.testing.simulator.files import Directories
from genpulse.testing.simulator.hub import (
    PREVIEW_IMAGE,
    PREVIEW_IMAGE_WITH_METADATA,
    TEXT,
    Hub,
    preview_frame,
    preview_frame_with_metadata,
    text_frame,
)
from genpulse.testing.simulator.journal import Journal
from genpulse.testing.simulator.nodes import NODES, Blocked, Outcome
from genpulse.testing.simulator.nodes.probes import SimulatedOutOfMemory
from genpulse.testing.simulator.prompts import Item, PromptQueue

__all__ = ["Engine"]

_OOM_TIPS = (
    "This error means you ran out of memory on your GPU.\n\n"
    "TIPS: If the workflow worked before you might have accidentally set the batch_size to a large number."
)
_CHECK_S = 0.05


class Interrupted(Exception):
    """Somebody interrupted the running prompt."""


class ServerGone(BaseException):
    """The server ends: the worker lets go of everything at once."""


class NodeMissing(Exception):
    """A link leads to a node that is not in the prompt, outside what validation looks at."""


class Engine:
    """The worker thread with its cache. ``kill`` ends it at once, as a crash would."""

    def __init__(
        self,
        files: Directories,
        hub: Hub,
        queue: PromptQueue,
        journal: Journal,
        faults: Faults,
        *,
        step_s: float,
        previews: bool,
        cache: str,
        at_event: Callable[[str], None],
    ) -> None:
        self.files = files
        self.hub = hub
        self.queue = queue
        self.journal = journal
        self.faults = faults
        self.step_s = step_s
        self.previews = previews
        self.at_event = at_event
        self.cache = _Cache(cache)
        self.killed = threading.Event()
        self._interrupt = threading.Event()
        self._thread = threading.Thread(target=self._work, name="simulator-worker", daemon=True)

    def start(self) -> None:
        """Begin to take prompts."""
        self._thread.start()

    def kill(self) -> None:
        """End the worker in the middle of whatever it does; nothing more is sent, written or logged."""
        self.killed.set()
        self.queue.wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2)

    @property
    def alive(self) -> bool:
        """False when the worker thread has died and the server is a zombie."""
        return self._thread.is_alive()

    def interrupt(self) -> None:
        """Ask the running prompt to end at its next check; nothing happens if none runs."""
        self._interrupt.set()

    def check(self) -> None:
        """Where a node lets itself be stopped: by the end of the server, a stall, or an interrupt."""
        while self.faults.stall and not self.killed.is_set():
            self.killed.wait(_CHECK_S)
        self.check_alive()
        if self._interrupt.is_set():
            self._interrupt.clear()
            raise Interrupted

    def check_alive(self) -> None:
        """Raise ``ServerGone`` when the server has been killed, so that a dead one writes nothing more."""
        if self.killed.is_set():
            raise ServerGone

    def _work(self) -> None:
        try:
            while not self.killed.is_set():
                taken = self.queue.get(1.0)
                self.check_alive()
                if taken is not None:
                    if self.faults.zombie:
                        self.journal.add("worker_died", taken[1][1])
                        return
                    self._run(*taken)
                flags = self.queue.take_flags()
                if flags.get("free_memory"):
                    self.cache.clear()
                    self.journal.add("freed")
        except ServerGone:
            return
        except Exception:  # noqa: BLE001  the real worker dies as quietly: its prompt stays "running" for ever
            self.journal.add("worker_died", error=traceback.format_exc(limit=3))

    def _run(self, slot: int, item: Item) -> None:
        _number, prompt_id, prompt, extra_data, outputs = item
        self._interrupt.clear()
        # No .get: what `in` does not work on kills the worker, a list does not [trace 28].
        self.hub.client_id = extra_data["client_id"] if "client_id" in extra_data else None  # noqa: SIM401 - as the server asks it, so that odd types fail alike
        client_id = self.hub.client_id
        self.journal.add("started", prompt_id, client_id)
        run = _Run(self, prompt_id, prompt, extra_data, outputs)
        run.execute()
        self.check_alive()
        if self.faults.history_gap_ms > 0:
            self.killed.wait(self.faults.history_gap_ms / 1000)
        status = {
            "status_str": "success" if run.success else "error",
            "completed": run.success,
            "messages": run.messages,
        }
        self.queue.done(slot, run.history(), status)
        if self.hub.client_id is not None:
            self.hub.post("executing", {"node": None, "prompt_id": prompt_id}, self.hub.client_id)
        self.journal.add(
            "finished" if not run.interrupted else "interrupted",
            prompt_id,
            client_id,
            status=status["status_str"],
            files=run.files_written,
            cached=run.cached,
        )


class _Cache:
    """Results by the meaning of a node: ``last`` prompt's only (0.3.64), ``lru``, or ``none``."""

    _LRU_ENTRIES = 500

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self._entries: OrderedDict[str, tuple[tuple[Any, ...], dict[str, Any] | None]] = OrderedDict()

    def begin(self, keys: set[str]) -> None:
        """A prompt with these keys starts."""
        if self.scope == "last":
            for key in [key for key in self._entries if key not in keys]:
                del self._entries[key]
        elif self.scope == "none":
            self._entries.clear()

    def get(self, key: str) -> tuple[tuple[Any, ...], dict[str, Any] | None] | None:
        """Values and ui entry of a node like this, if kept."""
        return self._entries.get(key)

    def put(self, key: str, values: tuple[Any, ...], ui: dict[str, Any] | None) -> None:
        """Keep what a node made."""
        self._entries[key] = (values, ui)
        self._entries.move_to_end(key)
        if self.scope == "lru" and len(self._entries) > self._LRU_ENTRIES:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget all of it (``POST /free`` with ``free_memory``)."""
        self._entries.clear()


class _Run:
    """One prompt from ``execution_start`` to its end: what ran, what was made, what was said."""

    def __init__(
        self, engine: Engine, prompt_id: str, prompt: Any, extra_data: Any, outputs: list[str]
    ) -> None:
        self.engine = engine
        self.prompt_id = prompt_id
        self.prompt = prompt
        self.extra_data = extra_data
        self.outputs = outputs
        self.client_id = engine.hub.client_id
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.success = False
        self.interrupted = False
        self.cached: list[str] = []
        self.files_written: list[str] = []
        self.failure = engine.faults.take_failure()
        self._nodes: dict[str, Any] = dict(prompt)
        self._parents: dict[str, str] = {}
        self._values: dict[str, tuple[Any, ...]] = {}
        self._ui: dict[str, dict[str, Any]] = {}
        self._executed: list[str] = []
        self._progress: dict[str, dict[str, Any]] = {}
        self._keys = _cache_keys(prompt, engine.files)
        self._expanded: dict[str, tuple[Any, ...]] = {}
        self._background: dict[str, _Background] = {}

    # -- what others see -------------------------------------------------------------------------

    def history(self) -> dict[str, Any]:
        """``outputs`` and ``meta`` of the history entry."""
        return {
            "outputs": {node_id: entry["output"] for node_id, entry in self._ui.items()},
            "meta": {node_id: entry["meta"] for node_id, entry in self._ui.items()},
        }

    def say(self, event: str, data: dict[str, Any], *, to_all: bool = False) -> None:
        """A message that is also kept for the history."""
        data = {**data, "timestamp": int(time.time() * 1000)}
        self.messages.append((event, data))
        if self.client_id is not None or to_all:
            self.engine.hub.post(event, data, self.client_id)

    def say_progress_state(self) -> None:
        """All nodes so far; this is what makes long workflows slow [trace 39]."""
        nodes = {
            node_id: {
                **state,
                "node_id": node_id,
                "prompt_id": self.prompt_id,
                "display_node_id": self.display_id(node_id),
                "parent_node_id": self._parents.get(node_id),
                "real_node_id": self.real_id(node_id),
            }
            for node_id, state in self._progress.items()
        }
        self.engine.hub.post("progress_state", {"prompt_id": self.prompt_id, "nodes": nodes}, self.client_id)

    def set_progress(self, node_id: str, value: float, maximum: float, state: str = "running") -> None:
        """Note the progress of a node, without sending it."""
        self._progress[node_id] = {"value": value, "max": maximum, "state": state}

    def real_id(self, node_id: str) -> str:
        """The node of the prompt as sent that an ephemeral node came from."""
        while node_id in self._parents:
            node_id = self._parents[node_id]
        return node_id

    display_id = real_id

    # -- the run ---------------------------------------------------------------------------------

    def execute(self) -> None:
        """Run every node the outputs need, in ComfyUI's order, until the end, an error or an interrupt."""
        engine = self.engine
        self.say("execution_start", {"prompt_id": self.prompt_id})
        engine.cache.begin(set(self._keys.values()))
        for node_id, key in self._keys.items():
            kept = engine.cache.get(key)
            if kept is not None:
                self._values[node_id] = kept[0]
                if kept[1] is not None:
                    self._ui[node_id] = kept[1]
        self.cached = [node_id for node_id in self.prompt if node_id in self._values]
        self.say("execution_cached", {"nodes": self.cached, "prompt_id": self.prompt_id})
        plan = _Plan(self._nodes, self._values)
        for output in self.outputs:
            plan.add(output)
        try:
            while plan:
                node_id = self._pick(plan)
                if not self._step(plan, node_id):
                    break
            else:
                self.success = True
                self.say("execution_success", {"prompt_id": self.prompt_id})
        finally:
            engine.hub.last_node_id = None

    def _pick(self, plan: _Plan) -> str:
        while (node_id := plan.pick()) is None:
            if not self._background:
                raise RuntimeError("dependency cycle")
            if self.engine.killed.wait(0.002):
                raise ServerGone
            for waiting, task in self._background.items():
                if task.done.is_set():
                    plan.unblock(waiting)
        return node_id

    def _step(self, plan: _Plan, node_id: str) -> bool:
        """Run one node as far as it goes now. False when the prompt ends with it."""
        spec = NODES[self._nodes[node_id]["class_type"]]
        if node_id in self._values:
            if self.client_id is not None:
                entry = self._ui.get(node_id)
                self._post_executed(node_id, entry["output"] if entry else None)
            self._finish_progress(node_id)
            plan.complete(node_id)
            return True
        inputs: dict[str, Any] = {}
        try:
            if node_id in self._expanded:
                outcome = Outcome(
                    values=tuple(self._resolved(value) for value in self._expanded.pop(node_id))
                )
            elif node_id in self._background:
                outcome = self._background.pop(node_id).result()
            else:
                self.set_progress(node_id, 0.0, 1.0)
                self.say_progress_state()
                inputs = self._inputs(node_id)
                if self.client_id is not None:
                    self.engine.hub.last_node_id = self.display_id(node_id)
                    data = {
                        "node": node_id,
                        "display_node": self.display_id(node_id),
                        "prompt_id": self.prompt_id,
                    }
                    self.engine.hub.post("executing", data, self.client_id)
                self.engine.at_event("node")
                if self._is_blocked(node_id, inputs):
                    outcome = Outcome(values=(Blocked(),) * len(spec.returns))
                else:
                    self.engine.check()
                    self._fail_if_told()
                    if spec.in_background:
                        self._background[node_id] = _Background(self, node_id, inputs)
                        plan.block(node_id)
                        return True
                    outcome = self.call(node_id, inputs)
            self.engine.check_alive()
            if outcome.expand is not None:
                self._expand(plan, node_id, outcome)
                return True
            self._keep(node_id, outcome)
        except Interrupted:
            facts = {
                "prompt_id": self.prompt_id,
                "node_id": self.real_id(node_id),
                "node_type": self._nodes[self.real_id(node_id)]["class_type"],
                "executed": list(self._executed),
            }
            self.interrupted = True
            self.say("execution_interrupted", facts, to_all=True)
            return False
        except Exception as exc:  # noqa: BLE001  whatever a node raises becomes an execution_error
            self._report(node_id, inputs, exc)
            return False
        self._finish_progress(node_id)
        self._executed.append(node_id)
        plan.complete(node_id)
        return True

    def call(self, node_id: str, inputs: dict[str, Any]) -> Outcome:
        """Run the function of a node."""
        spec = NODES[self._nodes[node_id]["class_type"]]
        declared = {name: value for name, value in inputs.items() if name not in spec.hidden}
        result = spec.run(_Context(self, node_id), **declared)
        return result if isinstance(result, Outcome) else Outcome(values=result)

    def _fail_if_told(self) -> None:
        if self.failure:
            kind, self.failure = self.failure, ""
            raise (
                SimulatedOutOfMemory("Allocation on device ")
                if kind == "oom"
                else RuntimeError("simulated failure")
            )

    def _inputs(self, node_id: str) -> dict[str, Any]:
        """Values for the inputs a node declares, links resolved, and the hidden ones."""
        entry = self._nodes[node_id]
        spec = NODES[entry["class_type"]]
        inputs: dict[str, Any] = {}
        for name, value in entry["inputs"].items():
            if spec.declared(name) is None:
                continue
            if _is_link(value):
                values = self._values.get(value[0])
                if values is not None and int(value[1]) < len(values):
                    inputs[name] = values[int(value[1])]
            else:
                inputs[name] = value
        for name, kind in spec.hidden.items():
            png_info = self.extra_data.get("extra_pnginfo")
            inputs[name] = (
                self.prompt if kind == "PROMPT" else png_info if kind == "EXTRA_PNGINFO" else node_id
            )
        return inputs

    def _is_blocked(self, node_id: str, inputs: Mapping[str, Any]) -> bool:
        for value in inputs.values():
            if isinstance(value, Blocked):
                if value.message is not None:
                    # Not final, not in the history, and without a timestamp [trace 21].
                    data = {
                        "prompt_id": self.prompt_id,
                        "node_id": node_id,
                        "node_type": self._nodes[node_id]["class_type"],
                        "executed": list(self._executed),
                        "exception_message": f"Execution Blocked: {value.message}",
                        "exception_type": "ExecutionBlocked",
                        "traceback": [],
                        "current_inputs": [],
                        "current_outputs": [],
                    }
                    self.engine.hub.post("execution_error", data, self.client_id)
                return True
        return False

    def _expand(self, plan: _Plan, node_id: str, outcome: Outcome) -> None:
        names = {local: f"{node_id}.0.0.{local}" for local in outcome.expand or {}}
        for local, entry in (outcome.expand or {}).items():
            inputs = {
                name: [names[value[0]], value[1]] if _is_link(value) and value[0] in names else value
                for name, value in entry["inputs"].items()
            }
            self._nodes[names[local]] = {"class_type": entry["class_type"], "inputs": inputs}
            self._parents[names[local]] = node_id
        links = tuple([names[v[0]], v[1]] if _is_link(v) and v[0] in names else v for v in outcome.values)
        self._expanded[node_id] = links
        for link in links:
            if _is_link(link):
                plan.add_link(link[0], node_id)

    def _resolved(self, value: Any) -> Any:
        return self._values[value[0]][int(value[1])] if _is_link(value) else value

    def _keep(self, node_id: str, outcome: Outcome) -> None:
        entry = None
        if outcome.ui:
            output = {key: list(items) for key, items in outcome.ui.items()}
            entry = {
                "meta": {
                    "node_id": node_id,
                    "display_node": self.display_id(node_id),
                    "parent_node": self._parents.get(node_id),
                    "real_node_id": self.real_id(node_id),
                },
                "output": output,
            }
            self._ui[node_id] = entry
            if self.client_id is not None:
                self._post_executed(node_id, output)
        self._values[node_id] = outcome.values
        if node_id in self._keys:
            self.engine.cache.put(self._keys[node_id], outcome.values, entry)

    def _post_executed(self, node_id: str, output: Any) -> None:
        data = {
            "node": node_id,
            "display_node": self.display_id(node_id),
            "output": output,
            "prompt_id": self.prompt_id,
        }
        self.engine.hub.post("executed", data, self.client_id)

    def _finish_progress(self, node_id: str) -> None:
        state = self._progress.setdefault(node_id, {"value": 0, "max": 1, "state": "pending"})
        self.set_progress(node_id, state["max"], state["max"], "finished")
        self.say_progress_state()

    def _report(self, node_id: str, inputs: Mapping[str, Any], exc: Exception) -> None:
        kind = type(exc)
        name = (
            kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        )
        message = f"{exc}\n"
        if isinstance(exc, SimulatedOutOfMemory):
            name, message = "torch.OutOfMemoryError", message + _OOM_TIPS
        real = self.real_id(node_id)
        data = {
            "prompt_id": self.prompt_id,
            "node_id": real,
            "node_type": self._nodes[real]["class_type"],
            "executed": list(self._executed),
            "exception_message": message,
            "exception_type": name,
            "traceback": traceback.format_tb(exc.__traceback__),
            "current_inputs": {key: [_as_text(value)] for key, value in inputs.items()},
            "current_outputs": list(self.prompt),
        }
        self.say("execution_error", data)


class _Context:
    """What a node function is given; see ``NodeContext``."""

    def __init__(self, run: _Run, node_id: str) -> None:
        self._run = run
        self._engine = run.engine
        self.node_id = node_id
        self.files = run.engine.files
        self.prompt: Mapping[str, Any] = run.prompt
        info = run.extra_data.get("extra_pnginfo")
        self.extra_pnginfo: Mapping[str, Any] | None = info if isinstance(info, dict) else None
        self.previews = run.engine.previews and run.extra_data.get("preview_method") != "none"
        self.step_s = run.engine.step_s

    def progress(self, value: int, maximum: int, preview: tuple[str, Image.Image] | None = None) -> None:
        engine, run = self._engine, self._run
        engine.check()
        run.set_progress(self.node_id, value, maximum)
        run.say_progress_state()
        client = run.client_id
        wants_metadata = preview is not None and engine.hub.supports_metadata(client)
        if preview is not None and wants_metadata:
            metadata = {
                "node_id": self.node_id,
                "prompt_id": run.prompt_id,
                "display_node_id": run.display_id(self.node_id),
                "parent_node_id": None,
                "real_node_id": run.real_id(self.node_id),
            }
            frame = preview_frame_with_metadata(*preview, metadata)
            engine.hub.post(PREVIEW_IMAGE_WITH_METADATA, frame, client)
        data = {"value": value, "max": maximum, "prompt_id": run.prompt_id, "node": self.node_id}
        engine.hub.post("progress", data, client)
        if preview is not None and not wants_metadata:
            engine.hub.post(PREVIEW_IMAGE, preview_frame(*preview), client)

    def check_interrupt(self) -> None:
        self._engine.check()

    def sleep(self, seconds: float, *, interruptible: bool = True) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if interruptible:
                self._engine.check()
            if self._engine.killed.wait(min(left, _CHECK_S)):
                raise ServerGone

    def send_text(self, text: str) -> None:
        self._engine.hub.post(TEXT, text_frame(self.node_id, text), self._run.client_id)

    def written(self, path: Path) -> None:
        self._engine.check_alive()
        self._run.files_written.append(str(path.relative_to(self.files.root)))


class _Background:
    """A coroutine node, here a thread, whose result is taken when it is there."""

    def __init__(self, run: _Run, node_id: str, inputs: dict[str, Any]) -> None:
        self.done = threading.Event()
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._call: Callable[[], Outcome] = lambda: run.call(node_id, inputs)
        threading.Thread(target=self._run, name=f"simulator-node-{node_id}", daemon=True).start()

    def _run(self) -> None:
        try:
            self._outcome = self._call()
        except BaseException as exc:  # noqa: BLE001  handed on to the worker, which knows what to do
            self._error = exc
        self.done.set()

    def result(self) -> Outcome:
        if self._error is not None:
            raise self._error
        return self._outcome or Outcome()


class _Plan:
    """
    The nodes that still have to run and who waits for whom.

    Ready nodes are taken in the order ComfyUI takes them: outputs first, then what leads to an output in
    one step, then in two, then the first that came.
    """

    def __init__(self, nodes: Mapping[str, Any], done: Mapping[str, Any]) -> None:
        self._nodes = nodes
        self._done = done
        self._waiting: dict[str, int] = {}
        self._blocking: dict[str, dict[str, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, node_id: str) -> None:
        """Put a node and all it needs on the plan, but for what is cached."""
        stack = [node_id]
        links: list[tuple[str, str]] = []
        while stack:
            current = stack.pop()
            if current in self._waiting:
                continue
            if current not in self._nodes:
                raise NodeMissing(current)
            self._waiting[current] = 0
            self._blocking[current] = {}
            for value in self._nodes[current]["inputs"].values():
                if _is_link(value) and value[0] not in self._done:
                    stack.append(value[0])
                    links.append((value[0], current))
        for above, below in links:
            self._link(above, below)

    def add_link(self, above: str, below: str) -> None:
        """Make *below* wait for *above*, which is put on the plan."""
        self.add(above)
        self._link(above, below)

    def _link(self, above: str, below: str) -> None:
        if above not in self._done and below not in self._blocking[above]:
            self._blocking[above][below] = None
            self._waiting[below] += 1

    def block(self, node_id: str) -> None:
        """The node waits for something outside the graph."""
        self._waiting[node_id] += 1

    def unblock(self, node_id: str) -> None:
        """What the node waited for is there."""
        self._waiting[node_id] -= 1

    def complete(self, node_id: str) -> None:
        """The node has run."""
        del self._waiting[node_id]
        for below in self._blocking.pop(node_id):
            self._waiting[below] -= 1

    def pick(self) -> str | None:
        """The next node to run, or None when all of them wait."""
        ready = [node_id for node_id, count in self._waiting.items() if count == 0]
        if not ready:
            return None

        def is_output(node_id: str) -> bool:
            spec = NODES[self._nodes[node_id]["class_type"]]
            return spec.output_node or spec.in_background

        for node_id in ready:
            if is_output(node_id):
                return node_id
        for node_id in ready:
            if any(is_output(below) for below in self._blocking[node_id]):
                return node_id
        for node_id in ready:
            if any(is_output(next_) for below in self._blocking[node_id] for next_ in self._blocking[below]):
                return node_id
        return ready[0]


def _is_link(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and type(value[1]) in (int, float)
    )


def _cache_keys(prompt: Mapping[str, Any], files: Directories) -> dict[str, str]:
    """
    A digest for each node of its class, inputs and fingerprint, and those of all nodes above it.

    Works without recursion, since a chain of 983 nodes is a valid prompt.
    """
    keys: dict[str, str] = {}
    for first in prompt:
        stack = [first]
        open_nodes: set[str] = set()
        while stack:
            node_id = stack[-1]
            if node_id in keys:
                stack.pop()
                continue
            inputs = prompt[node_id]["inputs"]
            above = [value[0] for value in inputs.values() if _is_link(value)]
            missing = [a for a in above if a in prompt and a not in keys and a not in open_nodes]
            if missing and node_id not in open_nodes:
                open_nodes.add(node_id)
                stack += missing
                continue
            stack.pop()
            keys[node_id] = _cache_key(prompt[node_id], inputs, keys, files)
    return keys


def _cache_key(
    entry: Mapping[str, Any], inputs: Mapping[str, Any], keys: Mapping[str, str], files: Directories
) -> str:
    spec = NODES[entry["class_type"]]
    parts: list[Any] = [entry["class_type"]]
    if spec.fingerprint is not None:
        fingerprint = spec.fingerprint(files, inputs)
        if isinstance(fingerprint, float) and math.isnan(fingerprint):
            fingerprint = f"never {time.monotonic_ns()} {id(entry)}"
        parts.append(fingerprint)
    for name in sorted(inputs):
        value = inputs[name]
        parts.append([name, keys.get(value[0], ""), value[1]] if _is_link(value) else [name, value])
    return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()


def _as_text(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
