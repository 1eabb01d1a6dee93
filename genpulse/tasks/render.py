"""
One attempt on a ComfyUI server: choose, prepare, adopt or submit, follow, capture.

The prompt and client ids are in the ledger before they are sent, so that whoever comes after a
crash finds the prompt on its server instead of rendering it twice. An attempt that lost its lease
touches the server no more: its prompt may have been adopted.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import io
import mimetypes
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, cast

from genpulse.comfy import workflow as graph
from genpulse.comfy.client import ComfyClient, Place, ServerFile, Whereabouts
from genpulse.comfy.events import Event, PreviewImage, ProgressMeter, Running
from genpulse.comfy.follower import Finished, Follower
from genpulse.comfy.history import HistoryEntry, ServerOutput
from genpulse.errors import (
    ComfyUnavailable,
    DeadlineExceeded,
    Draining,
    ExecutionInterrupted,
    InputRejected,
    InputUnavailable,
    LeaseLost,
    NoOutputs,
    NoServer,
    OutOfMemory,
    PromptLost,
    ServerStalled,
    StorageUnavailable,
    TaskCanceled,
    WorkflowRejected,
)
from genpulse.model import Attempt, NewOutput, WorkerInfo
from genpulse.tasks import queues
from genpulse.tasks.runner import AttemptContext
from genpulse.telemetry import traces

__all__ = ["render"]

QUICK_S = 10.0
"""A prompt is posted behind a running one only where such tasks take less time than this."""
GONE_AFTER_S = 10.0
"""A server that is silent for so long is taken to have forgotten an earlier prompt."""
STOP_WITHIN_S = 2.0
SERVER_PATIENCE_S = 5.0
"""How long an attempt waits for a server of its worker to come back before it is handed back."""
OTHERS_S = 3.0
"""How long the other workers of a server may take to say what they see; they ask it every 2 s."""
OTHERS_BUSY_S = 14.0
"""The same of one that waits for an answer of another server first."""
ROADS_TRIED = 5
"""Attempts after which a prompt that none of them reached, although its server is well, is given up."""
FREE_S = 1.0
"""Between asking a server to free its memory and the next prompt: it does so when it is idle."""
_VIEW_TRIES_S = (0.2, 0.5, 1.0, 2.0)


def render(context: AttemptContext, workflow: graph.Workflow) -> tuple[NewOutput, ...]:
    """
    Render a bound workflow and store what it made.

    Args:
        workflow: API format, inputs bound, media still named by reference.

    Raises:
        NoServer: No healthy server now; the attempt is handed back.
        ComfyUnavailable: The server was lost.
        OutOfMemory: Twice on one server, the second time right after it was told to free its memory.
        WorkflowRejected, ExecutionFailed, OutOfMemory, NoOutputs, InputRejected: As they say.
        StopAttempt: From ``context.check()``.
    """
    attempt = _Render(context, workflow)
    with attempt.minding_the_road():
        with traces.span("comfyui render", kind="client") as told:
            try:
                finished = attempt.adopt() or attempt.submit()
            except OutOfMemory:
                attempt.free_server()
                finished = attempt.submit(again_on=attempt.server)
            if told is not None:
                told.set_attribute("genpulse.server", attempt.server)
                told.set_attribute("genpulse.prompt_id", attempt.prompt_id)
        with traces.span("comfyui capture"):
            return attempt.capture(finished)


class _Render:
    """The state of one attempt: which server, which prompt."""

    def __init__(self, context: AttemptContext, workflow: graph.Workflow) -> None:
        self.context = context
        self.workflow = workflow
        self.socket_nodes = graph.socket_output_nodes(workflow)
        self.server = ""
        self.prompt_id = ""
        self._post_uncertain = False
        self._adopted = False
        self._stopped: set[str] = set()
        """Prompts that this attempt stopped itself: their interruption is nobody's wish."""

    @property
    def client(self) -> ComfyClient:
        return self.context.pool.client(self.server)

    # -- the road to the server ---------------------------------------------------------------

    @contextlib.contextmanager
    def minding_the_road(self) -> Iterator[None]:
        """When the server is lost with our prompt on it, find out whether it is lost for all or for us alone."""
        try:
            yield
        except (PromptLost, ServerStalled):
            raise
        except ComfyUnavailable:
            if self.prompt_id and not self.context.reached_elsewhere and self._another_reaches(self.server):
                self.context.reached_elsewhere = self.server
            raise

    def _another_reaches(self, server: str) -> bool:
        """
        Whether another worker has found a server well since it became unreachable from here.

        A refused connection means that the server forgot its prompts, and a long silence is taken for
        it; not so if only the road from here is broken. What the others wrote before now may be older
        than that, so their next word counts. Nobody waits where no other worker serves the server.
        """
        context = self.context
        node, place = context.worker.rpartition(":")[0], (context.task.queue, server)

        def others() -> dict[str, WorkerInfo]:
            return {
                worker.name: worker
                for worker in context.insist(lambda: context.ledger.workers(OTHERS_BUSY_S))
                if worker.name != node and worker.consuming and place in queues.reach(worker)
            }

        old, began = others(), time.monotonic()
        waited_for = set(old)
        while waited_for:
            context.sleep(0.2)
            now = others()
            spoken = {
                name: worker
                for name, worker in now.items()
                if name not in old or worker.seen_at > old[name].seen_at
            }
            if any(queues.reach(worker)[place] for worker in spoken.values()):
                context.log.info("server_reached_by_another_worker", server=server)
                return True
            waited_s = time.monotonic() - began
            waited_for = {
                name
                for name in (waited_for & now.keys()) - spoken.keys()
                if waited_s < (OTHERS_BUSY_S if _waits_for_another(old[name], server) else OTHERS_S)
            }
        return False

    # -- adopt --------------------------------------------------------------------------------

    def adopt(self) -> Finished | None:
        """Find the prompt of an earlier attempt on its server and follow it, if there is one."""
        served = {server.name for server in self.context.pool.servers}
        seen: set[str] = set()
        for earlier in self.context.claim.predecessors:
            if earlier.prompt_id in seen or earlier.server not in served:
                continue
            seen.add(str(earlier.prompt_id))
            found = self._look_for(earlier)
            if found is None or found.place is Place.UNKNOWN:
                continue
            if self.socket_nodes and found.place is not Place.PENDING:
                # Its pictures went over a socket that died with its worker: render them again.
                self._stop(str(earlier.server), str(earlier.prompt_id))
                continue
            with contextlib.suppress(_ElsewhereError):
                return self._adopt(earlier, found)
        return None

    def _look_for(self, earlier: Attempt) -> Whereabouts | None:
        """
        Where an earlier prompt is; ``None`` if its server is gone or silent for long.

        Raises:
            NoServer: That is so from here, and another worker reaches the server: the task goes there,
                uncounted as long as it has not been passed on for too often.
        """
        client = self.context.pool.client(str(earlier.server))
        give_up_at = time.monotonic() + GONE_AFTER_S
        while True:
            try:
                return client.look(str(earlier.prompt_id), timeout_s=5.0)
            except ComfyUnavailable as error:
                self.context.log.info(
                    "earlier_prompt_unreachable", server=earlier.server, refused=error.refused
                )
                if error.refused or time.monotonic() > give_up_at:
                    self.context.pool.mark_away(str(earlier.server), "not reachable")
                    # A server may be well and never answer for this one prompt: passed on and on, the
                    # task would be no nearer to its end.
                    passed_on = self.context.claim.fence.attempt - earlier.number
                    if passed_on <= ROADS_TRIED and self._another_reaches(str(earlier.server)):
                        msg = "another worker reaches the server that has the prompt"
                        raise NoServer(msg, go_to=str(earlier.server)) from error
                    return None
                self.context.sleep(0.5)

    def _adopt(self, earlier: Attempt, found: Whereabouts) -> Finished:
        context = self.context
        self.server, self.prompt_id = str(earlier.server), str(earlier.prompt_id)
        with Follower(
            self.client, str(earlier.client_id), socket_nodes=self.socket_nodes, previews=True
        ) as follower:
            self._record(str(earlier.client_id), adopted=True, finished=found.place is Place.FINISHED)
            context.log.info(
                "prompt_adopted", server=self.server, prompt_id=self.prompt_id, of=earlier.number
            )
            self._adopted = True
            return self._follow(follower)

    # -- submit -------------------------------------------------------------------------------

    def submit(self, *, again_on: str = "") -> Finished:
        """
        Choose a server, prepare the workflow for it, post it and follow it.

        Args:
            again_on: The server to take if it is healthy, whatever happened there.
        """
        while True:
            self._choose(again_on)
            try:
                prepared = self._prepare()
                self._await_turn()
                return self._post_and_follow(prepared)
            except _ElsewhereError:
                again_on = ""
            except ComfyUnavailable as error:
                self.context.pool.mark_away(self.server, "not reachable")
                # Nothing was sent and nobody listens: the next server, at no cost.
                if not (error.refused and self.prompt_id == ""):
                    raise

    def free_server(self) -> None:
        """A node ran out of memory: let the server unload what it can, for the one more try there."""
        self.context.log.info("server_freed", server=self.server, reason="out of memory")
        with contextlib.suppress(ComfyUnavailable):
            self.client.free(unload_models=True, free_memory=True)
        self.context.sleep(FREE_S)

    def _choose(self, again_on: str = "") -> None:
        context = self.context
        self.prompt_id, self._adopted = "", False
        context.check()
        give_up_at = time.monotonic() + SERVER_PATIENCE_S
        while True:
            healthy = context.pool.healthy()
            if len(healthy) < len(context.pool.servers):
                healthy = context.pool.probe_all()
            if healthy:
                break
            if time.monotonic() > give_up_at:
                msg = "no ComfyUI server of this worker is healthy"
                raise NoServer(msg)
            context.sleep(0.5)  # a restart takes seconds; going back through the queue takes longer
        names = [server.name for server in healthy]
        names = [again_on] if again_on in names else self._with_memory(names)
        chosen = context.insist(lambda: context.ledger.assign_server(context.claim.fence, None, names))
        if chosen is None:
            raise LeaseLost
        self.server = chosen

    def _with_memory(self, names: list[str]) -> list[str]:
        """
        Leave out the servers whose memory did not suffice for this task, as long as there is another.

        Raises:
            NoServer: Another worker has one: the task goes there.
        """
        context = self.context
        exhausted = context.claim.exhausted
        if spared := [name for name in names if name not in exhausted]:
            return spared
        for worker in context.insist(context.ledger.workers):
            if not queues.takes(worker, context.task.queue):
                continue
            for server in worker.servers:
                if server["healthy"] and server["name"] not in exhausted:
                    msg = (
                        "no server of this worker has the memory for the task, and another worker's may have"
                    )
                    raise NoServer(msg, go_to=str(server["name"]))
        return names

    def _prepare(self) -> graph.Workflow:
        """Stage media on the chosen server, and give save nodes a prefix of this attempt's own."""
        values: dict[tuple[str, str], Any] = {}
        staged: dict[str, str] = {}
        for media in graph.media_inputs(self.workflow):
            self.context.check()
            if media.reference not in staged:
                with _media(self.context, media) as (stream, suffix):
                    staged[media.reference] = self._stage(stream, suffix).reference
            values[media.node_id, media.field] = staged[media.reference]
        fence = self.context.claim.fence
        prepared = graph.replace_values(self.workflow, values)
        return graph.with_prefixes(prepared, f"genpulse/{fence.task_id}/{fence.attempt}")

    def _stage(self, stream: IO[bytes], suffix: str) -> ServerFile:
        """Upload under a name made of the content: the same file twice is one file."""
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            self.context.check()
        stream.seek(0)
        return self.client.upload(
            stream, name=f"{digest.hexdigest()[:40]}{suffix}", subfolder="genpulse", overwrite=True
        )

    def _await_turn(self) -> None:
        """
        Hold a long task ready while another of ours renders on the server.

        Posted behind it, it could not move to a server that becomes free meanwhile.
        """
        context, fence = self.context, self.context.claim.fence
        usual = context.insist(lambda: context.ledger.usual_run_s(context.task.task_type))
        if usual is not None and usual < QUICK_S:
            return
        while context.insist(lambda: context.ledger.renders_elsewhere(fence, self.server)):
            context.sleep(0.25)
            for other in context.pool.healthy():
                name = other.name
                if name != self.server and not context.insist(
                    lambda name=name: context.ledger.renders_elsewhere(fence, name)  # type: ignore[misc]  # bound now
                ):
                    raise _ElsewhereError

    def _post_and_follow(self, prepared: graph.Workflow) -> Finished:
        context = self.context
        client_id = uuid.uuid4().hex
        with Follower(self.client, client_id, socket_nodes=self.socket_nodes, previews=True) as follower:
            context.check()
            prompt_id = str(uuid.uuid4())
            self.prompt_id = prompt_id
            self._record(client_id)
            context.confirm()
            try:
                accepted = self.client.deliver(prepared, prompt_id=prompt_id, client_id=client_id)
            except WorkflowRejected:
                context.leaves_prompt = False
                raise
            except ComfyUnavailable as error:
                if error.refused:  # nobody was there to take it
                    self.prompt_id, context.leaves_prompt = "", False
                raise
            finally:
                self._own_up()
            self._post_uncertain = accepted.number is None or accepted.repeated
            if accepted.node_errors:
                # The server runs the valid rest; a task is all of its workflow or nothing.
                self._stop(self.server, prompt_id)
                accepted.raise_for_node_errors()
            context.log.info("prompt_submitted", server=self.server, prompt_id=prompt_id)
            return self._follow(follower)

    def _own_up(self) -> None:
        """
        If the task was taken over while the prompt was on its way, leave word of it and no more.

        A process that was frozen right after it had made sure of its lease sends on its thaw what
        nobody follows: whoever took over has looked for the prompt, and found none.
        """
        context = self.context
        if not context.holds_lease():
            if self.prompt_id:
                context.log.warning("prompt_sent_too_late", server=self.server, prompt_id=self.prompt_id)
                context.note_stray(self.server, self.prompt_id)
            raise LeaseLost

    def _record(self, client_id: str, *, adopted: bool = False, finished: bool = False) -> None:
        context = self.context
        context.begin_prompt()
        if not context.insist(
            lambda: context.ledger.record_prompt(
                context.claim.fence,
                server=self.server,
                prompt_id=self.prompt_id,
                client_id=client_id,
                adopted=adopted,
                finished=finished,
            )
        ):
            raise LeaseLost

    # -- follow -------------------------------------------------------------------------------

    def _follow(self, follower: Follower, *, waits: bool = True) -> Finished:
        """
        Follow the prompt to its end, and judge it.

        Args:
            waits: It may still be waiting behind others; false if it was seen running or over.
        """
        context = self.context
        meter = ProgressMeter(self.workflow)

        def check() -> None:
            context.check()
            if waits and context.pool.is_stuck(self.server):
                raise _WaitsInVainError

        def on_event(event: Event) -> None:
            nonlocal waits
            if isinstance(event, Running):
                waits = False
                context.mark_running()
            elif isinstance(event, PreviewImage):
                context.preview(event.data, event.image_type, event.display_node_id or event.node_id)
            if meter.update(event):
                context.progress(meter.percent, **meter.detail.as_dict())

        try:
            finished = follower.follow(
                self.prompt_id, check=check, on_event=on_event, stall_s=context.settings.stall_s
            )
        except _WaitsInVainError:
            return self._withdraw(follower)
        except (TaskCanceled, DeadlineExceeded):
            self._stop(self.server, self.prompt_id)
            raise
        except (LeaseLost, Draining):
            raise  # the prompt is another's now, or the next worker's
        except ServerStalled as error:
            context.confirm()  # a process that was frozen for long has heard nothing, and may have lost the prompt
            context.pool.mark_bad(self.server, "no progress", stuck_on=error.stuck_on)
            if waits:
                return self._withdraw(follower)
            self._stop(self.server, self.prompt_id)
            raise
        except PromptLost:
            context.leaves_prompt = False
            raise
        except ComfyUnavailable:
            # Refused means forgotten, as far as this worker can tell; whoever reaches the server sees to it.
            context.pool.mark_away(self.server, "not reachable")
            raise
        context.leaves_prompt = False
        self._judge(finished.entry)
        self._insist_on_all(finished.entry)
        if self.socket_nodes and not finished.frames_complete:
            msg = "pictures were lost on the server's socket"
            raise PromptLost(msg)
        context.pool.mark_good(self.server)
        context.mark_rendered()
        return finished

    def _withdraw(self, follower: Follower) -> Finished:
        """
        Take a prompt back that waits on a server which makes no progress.

        It costs no attempt: nothing of it was rendered.

        Raises:
            _ElsewhereError: It is out of the queue; another server may have it.
            ServerStalled: It could not be taken back.
        """
        seen = self.client.look(self.prompt_id, timeout_s=5.0)
        if seen.place is Place.PENDING:
            self.context.log.info("prompt_withdrawn", server=self.server, prompt_id=self.prompt_id)
            self._stop(self.server, self.prompt_id)
            seen = self.client.look(self.prompt_id, timeout_s=5.0)
        if seen.place is Place.UNKNOWN or (seen.entry is not None and seen.entry.status == "interrupted"):
            self.context.leaves_prompt = False
            raise _ElsewhereError
        if seen.place is not Place.PENDING:
            return self._follow(follower, waits=False)  # it moved after all
        msg = "the server makes no progress"
        raise ServerStalled(msg)

    def _judge(self, entry: HistoryEntry) -> None:
        """Raise what the history says went wrong."""
        if entry.status != "success":
            self.context.after_win(functools.partial(self.client.forget, self.prompt_id))
        try:
            entry.raise_for_status()
        except ExecutionInterrupted as error:
            self.context.check()  # if it was our own cancel or deadline, that is what it is called
            if self._adopted or self.prompt_id in self._stopped:
                # Not the wish of a person, as far as one can tell: an attempt before this one may have
                # stopped it, or whoever cleared up after that one.
                msg = "the prompt was stopped before it could be adopted"
                raise PromptLost(msg) from error
            raise

    def _insist_on_all(self, entry: HistoryEntry) -> None:
        """
        A server runs the valid part of a workflow and calls that success; a task is all of it or nothing.

        The answer to the POST says so, and of an adopted prompt, or after a lost answer, nobody has read it.
        """
        if not (self._adopted or self._post_uncertain) or entry.requested is None:
            return
        if left_out := self.client.left_out(self.workflow, entry.requested):
            first = left_out[0]
            msg = f"parts of the workflow are not valid: the server left out {', '.join(left_out[:5])}"
            self.context.after_win(functools.partial(self.client.forget, self.prompt_id))
            raise WorkflowRejected(msg, node_id=first, class_type=str(self.workflow[first]["class_type"]))

    def _stop(self, server: str, prompt_id: str) -> None:
        """Stop a prompt by its id. If its end was not seen, somebody else will see to it."""
        self._stopped.add(prompt_id)
        try:
            seen = self.context.pool.client(server).stop(prompt_id, within_s=STOP_WITHIN_S)
            self.context.leaves_prompt = not seen.is_over
        except ComfyUnavailable:
            self.context.leaves_prompt = True

    # -- capture ------------------------------------------------------------------------------

    def capture(self, finished: Finished) -> tuple[NewOutput, ...]:
        """
        Put every output into storage.

        Temporary files (previews) count only where a workflow has no other output.
        """
        context = self.context
        wanted = [output for output in finished.entry.outputs if not output.is_temp]
        if not wanted and not finished.frames:
            wanted = list(finished.entry.outputs)
        stored: list[NewOutput] = []
        try:
            for output in wanted:
                stored.append(self._capture(output))
                context.progress(100.0, stored=len(stored), outputs=len(wanted))
            for number, frame in enumerate(finished.frames):
                suffix = mimetypes.guess_extension(frame.image_type) or ".png"
                stored.append(
                    context.store(
                        frame.data,
                        name=f"websocket_{number:05d}{suffix}",
                        node_id=frame.node_id,
                        content_type=frame.image_type,
                    )
                )
        except (StorageUnavailable, ComfyUnavailable):
            context.leaves_prompt = True
            raise
        if not stored and not graph.declares_no_outputs(self.workflow):
            msg = "the workflow ran to its end and made no output"
            raise NoOutputs(msg)
        if self._post_uncertain:
            # It was posted twice, perhaps, and the slower post came after every look at the queue.
            context.after_win(lambda: self.client.cancel(self.prompt_id))
        context.after_win(lambda: self.client.forget(self.prompt_id))
        return tuple(stored)

    def _capture(self, output: ServerOutput) -> NewOutput:
        context = self.context
        if output.file is None:
            text = (output.text or "").encode()
            return context.store(
                text,
                name=f"{output.key}_{output.node_id}_{output.index}.txt",
                node_id=output.node_id,
                content_type="text/plain; charset=utf-8",
            )
        file = output.file

        def view() -> contextlib.AbstractContextManager[BinaryIO]:
            return cast("contextlib.AbstractContextManager[BinaryIO]", self.client.view(file))

        for pause in (*_VIEW_TRIES_S, None):
            try:
                return context.store(view, name=file.filename, node_id=output.node_id)
            except PromptLost:
                raise
            except ComfyUnavailable as error:
                if pause is None or error.refused:
                    raise
                context.sleep(pause)
        raise AssertionError  # the loop returns or raises


def _waits_for_another(worker: WorkerInfo, server: str) -> bool:
    """Whether a worker has another server that does not answer, and so says late what it sees of this one."""
    return any(not state["healthy"] for state in worker.servers if state["name"] != server)


class _ElsewhereError(Exception):
    """Another server is to be had, or this one no more, and nothing of the attempt is on it."""


class _WaitsInVainError(Exception):
    """The prompt waits on a server that makes no progress."""


@contextlib.contextmanager
def _media(context: AttemptContext, media: graph.MediaInput) -> Iterator[tuple[IO[bytes], str]]:
    """A seekable stream of a media input, and the suffix its type asks for."""
    if media.kind == "data":
        header, _, encoded = media.reference.partition(",")
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            msg = "a data: input is not base64"
            raise InputRejected(msg, node_id=media.node_id) from error
        mime = header.removeprefix("data:").partition(";")[0]
        yield io.BytesIO(data), mimetypes.guess_extension(mime) or ".bin"
        return
    if media.kind == "url":
        with contextlib.ExitStack() as stack:
            try:
                copy = stack.enter_context(context.open_input(media.reference))
            except (InputRejected, InputUnavailable) as error:
                error.node_id = media.node_id
                raise
            yield copy, _suffix_of(copy)
        return
    with context.open_input(media.reference) as source, tempfile.TemporaryFile() as copy:
        while chunk := source.read(1 << 20):
            copy.write(chunk)
            context.check()
        copy.seek(0)
        yield cast("IO[bytes]", copy), _suffix_of(copy)


def _suffix_of(copy: Any) -> str:
    import filetype

    found = filetype.guess(copy.read(8192))
    copy.seek(0)
    return f".{found.extension}" if found is not None else ".bin"
