"""Following a prompt until its end, through everything ComfyUI's socket does to its clients."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import websocket

from genpulse.comfy import events, follower
from genpulse.comfy.client import ComfyClient, Place
from genpulse.comfy.events import Event
from genpulse.comfy.follower import Finished, Follower, SocketFrame
from genpulse.errors import (
    ComfyUnavailable,
    ExecutionFailed,
    OutOfMemory,
    PromptLost,
    ServerStalled,
)

if TYPE_CHECKING:
    from genpulse.testing.services import FaultProxy
    from genpulse.testing.simulator import Simulator


@pytest.fixture
def client(simulator: Simulator) -> Iterator[ComfyClient]:
    """A client of the simulator."""
    with ComfyClient(simulator.url, read_timeout_s=10) as client:
        yield client


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of all sockets that were opened."""
    opened: list[str] = []
    connect = websocket.create_connection

    def counted(url: str, **options: Any) -> Any:
        opened.append(url)
        return connect(url, **options)

    monkeypatch.setattr(websocket, "create_connection", counted)
    return opened


def new_id() -> str:
    """A prompt id."""
    return str(uuid.uuid4())


def image(count: int = 1) -> dict[str, Any]:
    """A workflow that saves pictures at once."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": count, "color": 7}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"t/{uuid.uuid4()}"}},
    }  # fmt: skip


def sleeper(seconds: float, steps: int = 4, **more: Any) -> dict[str, Any]:
    """A workflow that takes a while and tells its steps."""
    inputs = {"seconds": seconds, "steps": steps, "seed": uuid.uuid4().int % 2**32, **more}
    return {
        "1": {"class_type": "SimSleep", "inputs": inputs},
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": f"t/{uuid.uuid4()}"},
        },
    }


def to_socket(count: int = 3, seconds: float = 0.0) -> dict[str, Any]:
    """A workflow whose pictures go out on the socket alone, after a while."""
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": count, "color": 7},
        },
        "2": {"class_type": "SimSleep", "inputs": {"seconds": seconds, "image": ["1", 0], "steps": 10}},
        "3": {"class_type": "SaveImageWebsocket", "inputs": {"images": ["2", 0]}},
    }


class Run:
    """One prompt followed in a thread, with all that was heard of it."""

    def __init__(
        self,
        client: ComfyClient,
        workflow: dict[str, Any] | None,
        *,
        prompt_id: str = "",
        client_id: str = "",
        **options: Any,
    ) -> None:
        self.client = client
        self.prompt_id = prompt_id or new_id()
        self.client_id = client_id or uuid.uuid4().hex
        self.heard: list[Event] = []
        self.error: BaseException | None = None
        self.finished: Finished | None = None
        self.ended_at = 0.0
        self.checks: list[float] = []
        self.abandon: Exception | None = None
        self.freeze_s = 0.0
        """Stops the follower's thread for so long, once."""
        self._workflow = workflow
        self._options = {name: options.pop(name) for name in ("socket_nodes", "previews") if name in options}
        self._follow = options
        self._submitted = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._submitted.wait(10)

    def _check(self) -> None:
        self.checks.append(time.monotonic())
        if self.freeze_s:
            time.sleep(self.freeze_s)
            self.freeze_s = 0.0
        if self.abandon is not None:
            raise self.abandon

    def _run(self) -> None:
        try:
            with Follower(self.client, self.client_id, **self._options) as listener:
                if self._workflow is not None:
                    self.client.submit(self._workflow, prompt_id=self.prompt_id, client_id=self.client_id)
                self._submitted.set()
                self.finished = listener.follow(
                    self.prompt_id, check=self._check, on_event=self.heard.append, **self._follow
                )
                self.ended_at = time.time()
        except BaseException as error:  # noqa: BLE001 - told to the test
            self.error = error
        finally:
            self._submitted.set()
            self.client.release_thread()

    def end(self, within_s: float = 15.0) -> Finished:
        """Wait for the end; raises what following raised."""
        self._thread.join(within_s)
        if self._thread.is_alive():
            self.abandon = TimeoutError("still following")
            self._thread.join(2)
        if self.error is not None:
            raise self.error
        assert self.finished is not None
        return self.finished

    def heard_of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.heard if isinstance(event, kind)]

    def wait_for(self, condition: Callable[[], object], within_s: float = 10.0) -> None:
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            assert self._thread.is_alive() or condition(), f"ended before: {self.error or self.finished}"
            time.sleep(0.01)

    def wait_running(self) -> None:
        self.wait_for(lambda: self.heard_of(events.Running))


def ended_on_server(simulator: Simulator, prompt_id: str) -> float:
    """When the server says that it ended."""
    return max(float(line["t"]) for line in simulator.log if line.get("prompt_id") == prompt_id)


class TestTheUsualWay:
    def test_the_end_is_found_at_once(self, simulator: Simulator, client: ComfyClient) -> None:
        """With a working socket the result is there within 50 ms of the end (in most of five)."""
        delays = []
        for _ in range(5):
            run = Run(client, sleeper(0.3))
            run.end().entry.raise_for_status()
            delays.append(run.ended_at - ended_on_server(simulator, run.prompt_id))

        assert sorted(delays)[1] < 0.05

    def test_events_come_in_order_and_running_is_told_once(self, client: ComfyClient) -> None:
        """First ``Running``, last the end; steps only rise."""
        run = Run(client, sleeper(0.3, steps=6))
        finished = run.end()

        assert finished.heard_from_start
        assert len(run.heard_of(events.Running)) == 1
        assert isinstance(run.heard[0], events.Running)
        steps = [event.value for event in run.heard_of(events.Progress)]
        assert steps == sorted(steps)
        assert steps[-1] == 6

    def test_success_is_not_the_end(self, simulator: Simulator, client: ComfyClient) -> None:
        """The history is written after ``execution_success``; the gap is waited for."""
        simulator.faults(history_gap_ms=300)
        run = Run(client, image(2))

        assert len(run.end().entry.files) == 2

    def test_a_blocked_node_does_not_end_the_prompt(self, client: ComfyClient) -> None:
        """``execution_error`` with ``ExecutionBlocked`` is not final."""
        workflow = image()
        workflow["3"] = {"class_type": "SimBlock", "inputs": {"image": ["1", 0], "message": "blocked"}}
        workflow["4"] = {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "b"}}
        run = Run(client, workflow)
        finished = run.end()

        assert [event.final for event in run.heard_of(events.ExecutionError)] == [False]
        assert finished.entry.status == "success"
        assert len(finished.entry.files) == 1

    @pytest.mark.parametrize(("kind", "error"), [("exception", ExecutionFailed), ("oom", OutOfMemory)])
    def test_failures_are_told_apart(
        self, simulator: Simulator, client: ComfyClient, kind: str, error: type[Exception]
    ) -> None:
        """A node that raised is permanent, memory that did not suffice is not."""
        simulator.faults(fail_next=kind)
        finished = Run(client, image()).end()

        assert finished.entry.status == "error"
        with pytest.raises(error):
            finished.entry.raise_for_status()

    def test_an_interrupt_is_told_apart_from_a_failure(self, client: ComfyClient) -> None:
        """Somebody else's interrupt is neither an error of a node nor a lost prompt."""
        run = Run(client, sleeper(20))
        run.wait_running()
        client.stop(run.prompt_id)

        assert run.end().entry.status == "interrupted"

    def test_a_prompt_deleted_from_the_queue_is_lost(self, client: ComfyClient) -> None:
        """A pending prompt that is deleted leaves no trace: looked for twice, then lost."""
        first = Run(client, sleeper(20))
        first.wait_running()
        run = Run(client, image())
        client.stop(run.prompt_id)
        with pytest.raises(PromptLost):
            run.end(3)
        client.stop(first.prompt_id)
        first.end()

    def test_abandoning_leaves_the_prompt_alone(self, simulator: Simulator, client: ComfyClient) -> None:
        """What ``check`` raises comes out at once, and the prompt runs on to its end."""
        run = Run(client, sleeper(1.0))
        run.wait_running()
        run.abandon = RuntimeError("enough")
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="enough"):
            run.end()
        assert time.monotonic() - began < 0.5
        Run(client, None, prompt_id=run.prompt_id).end().entry.raise_for_status()

    def test_check_is_asked_all_the_time(self, client: ComfyClient) -> None:
        """At least every 0.25 s (with slack for a busy machine)."""
        run = Run(client, sleeper(1.5, steps=1))
        run.end()
        gaps = [later - earlier for earlier, later in zip(run.checks, run.checks[1:], strict=False)]

        assert max(gaps) < 0.5


class TestSilence:
    def test_a_mute_socket_delays_a_result_by_three_seconds_at_most(
        self, simulator: Simulator, client: ComfyClient
    ) -> None:
        """The socket stays open and says nothing: polling finds the running and the end."""
        simulator.faults(mute_sockets=True)
        run = Run(client, sleeper(1.0))
        run.end().entry.raise_for_status()

        assert run.ended_at - ended_on_server(simulator, run.prompt_id) < 3.0
        assert len(run.heard_of(events.Running)) == 1

    def test_a_socket_that_falls_silent_in_the_middle_delays_no_more(
        self, simulator: Simulator, client: ComfyClient
    ) -> None:
        """Also if it worked at first, when polling is relaxed."""
        run = Run(client, sleeper(2.0, steps=20))
        run.wait_for(lambda: len(run.heard_of(events.Progress)) > 3)
        simulator.faults(mute_sockets=True)
        run.end().entry.raise_for_status()

        assert run.ended_at - ended_on_server(simulator, run.prompt_id) < 3.0

    def test_a_silent_socket_is_opened_again_but_not_in_a_storm(
        self, simulator: Simulator, client: ComfyClient, sockets: list[str]
    ) -> None:
        """Silence that no new socket cures: after 2, 4, 8 s more each, always the same client id."""
        simulator.faults(mute_sockets=True)
        run = Run(client, sleeper(7.0))
        run.end().entry.raise_for_status()

        assert 2 <= len(sockets) <= 3
        assert len(set(sockets)) == 1

    def test_a_dropped_socket_is_opened_again_and_hears_the_rest(
        self, simulator: Simulator, client: ComfyClient, sockets: list[str]
    ) -> None:
        """After a reset the same client id hears the later steps and the end."""
        run = Run(client, sleeper(2.0, steps=20))
        run.wait_for(lambda: len(run.heard_of(events.Progress)) > 3)
        simulator.faults(drop_sockets=True)
        finished = run.end()

        assert len(sockets) == 2
        assert max(event.value for event in run.heard_of(events.Progress)) == 20
        assert not finished.heard_from_start

    def test_a_client_id_that_went_deaf_is_cured(
        self, simulator: Simulator, client: ComfyClient, sockets: list[str]
    ) -> None:
        """
        An old socket with our client id ends after ours was opened, and the server forgets ours too.

        So it is when a worker's host vanished and another one adopts its prompt.
        """
        run_id, client_id = new_id(), uuid.uuid4().hex
        with Follower(client, client_id) as old:
            client.submit(sleeper(6.0, steps=60), prompt_id=run_id, client_id=client_id)
            run = Run(client, None, prompt_id=run_id, client_id=client_id)
            run.wait_for(lambda: run.heard_of(events.Executing))
            assert old.connected
        heard = len(run.heard_of(events.Progress))
        run.wait_for(lambda: len(run.heard_of(events.Progress)) > heard + 3)
        run.end().entry.raise_for_status()

        assert len(sockets) >= 3

    def test_a_client_that_does_not_read_delays_nothing_but_messages(
        self, simulator: Simulator, client: ComfyClient
    ) -> None:
        """Another client's full socket stops the messages of all; the result comes by polling."""
        graph: dict[str, Any] = {
            str(n): {
                "class_type": "SimSleep",
                "inputs": {"seconds": 0, "image": [str(n - 1), 0], "steps": 20},
            }
            for n in range(1, 60)
        }
        graph["0"] = {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0},
        }
        graph["99"] = {"class_type": "SaveImage", "inputs": {"images": ["59", 0], "filename_prefix": "x"}}
        narrow = ((socket.SOL_SOCKET, socket.SO_RCVBUF, 4096),)
        address = simulator.url.replace("http", "ws") + "/ws?clientId=slow"
        slow = websocket.create_connection(address, sockopt=narrow, suppress_origin=True)
        try:
            client.submit(graph, prompt_id=new_id(), client_id="slow")
            run = Run(client, sleeper(0.5))
            finished = run.end()
        finally:
            if slow.sock is not None:
                slow.sock.close()

        assert finished.entry.status == "success"
        assert not finished.heard_from_start
        assert run.ended_at - ended_on_server(simulator, run.prompt_id) < 3.0

    def test_without_a_socket_polling_does_it_alone(
        self, client: ComfyClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A proxy that lets no WebSocket through costs speed, not results."""

        def refuse(*_: object, **__: object) -> None:
            raise websocket.WebSocketBadStatusException("no %s %s", 400)

        monkeypatch.setattr(websocket, "create_connection", refuse)
        run = Run(client, sleeper(0.5))
        finished = run.end()

        assert finished.entry.status == "success"
        assert len(run.heard_of(events.Running)) == 1


class TestAdoption:
    def test_a_prompt_that_is_over_is_found_at_once(self, client: ComfyClient) -> None:
        """Following somebody else's finished prompt reads its end."""
        first = Run(client, image())
        first.end()
        began = time.monotonic()
        finished = Run(client, None, prompt_id=first.prompt_id, client_id=first.client_id).end()

        assert finished.entry.status == "success"
        assert time.monotonic() - began < 0.5

    def test_a_pending_prompt_is_waited_for(self, client: ComfyClient) -> None:
        """It is no running prompt before it runs, and no lost one either."""
        first = Run(client, sleeper(1.5))
        first.wait_running()
        prompt_id = new_id()
        client.submit(image(), prompt_id=prompt_id, client_id="theirs")
        run = Run(client, None, prompt_id=prompt_id, client_id="theirs")
        time.sleep(0.8)
        assert run.heard == []
        first.end()
        finished = run.end()

        assert finished.entry.status == "success"
        assert finished.heard_from_start

    def test_a_running_prompt_is_heard_with_its_own_client_id(self, client: ComfyClient) -> None:
        """The same client id hears the node that runs and all that follows; another one would not."""
        prompt_id, client_id = new_id(), uuid.uuid4().hex
        client.submit(sleeper(1.5, steps=15), prompt_id=prompt_id, client_id=client_id)
        while client.look(prompt_id).place is not Place.RUNNING:
            time.sleep(0.01)
        run = Run(client, None, prompt_id=prompt_id, client_id=client_id)
        finished = run.end()

        assert run.heard_of(events.Executing)[0].prompt_id is None
        assert max(event.value for event in run.heard_of(events.Progress)) == 15
        assert not finished.heard_from_start

    def test_a_prompt_that_nobody_knows_is_lost(self, client: ComfyClient) -> None:
        """Neither in the queue nor in the history, twice."""
        began = time.monotonic()
        with pytest.raises(PromptLost):
            Run(client, None).end()
        assert 0.25 < time.monotonic() - began < 2.0


class TestServersThatFail:
    def test_a_restart_loses_the_prompt(self, simulator: Simulator, client: ComfyClient) -> None:
        """Queue and history are memory: after a restart the prompt is lost, found within 3 s."""
        run = Run(client, sleeper(30))
        run.wait_running()
        simulator.restart()
        began = time.monotonic()
        with pytest.raises(ComfyUnavailable):
            run.end()
        assert time.monotonic() - began < 3.0

    def test_a_server_that_is_gone_refuses(self, simulator: Simulator, client: ComfyClient) -> None:
        """Nobody listens: after one confirmation the prompt is known to be gone with its server."""
        run = Run(client, sleeper(30))
        run.wait_running()
        simulator.stop()
        began = time.monotonic()
        with pytest.raises(ComfyUnavailable) as caught:
            run.end()

        assert caught.value.refused
        assert time.monotonic() - began < 3.0

    def test_a_prompt_swallowed_by_the_server_is_lost(
        self, simulator: Simulator, client: ComfyClient
    ) -> None:
        """Accepted with 200 and seen nowhere afterwards."""
        simulator.faults(lose_prompt_next=1)
        with pytest.raises(PromptLost):
            Run(client, image()).end(3)

    def test_an_unreachable_server_is_tolerated_for_a_while(
        self,
        simulator: Simulator,
        fault_proxy: Callable[[str], FaultProxy],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Silence is no refusal: following goes on when it ends, and ``check`` is asked meanwhile."""
        proxy = fault_proxy(simulator.url)
        with ComfyClient(proxy.url_of(simulator.url)) as client:
            run = Run(client, sleeper(1.0))
            run.wait_running()
            proxy.set_mode("blackhole")
            time.sleep(3.0)
            checked = len(run.checks)
            proxy.set_mode("pass")
            run.end().entry.raise_for_status()

        assert checked > 10

    def test_an_unreachable_server_is_given_up(
        self,
        simulator: Simulator,
        fault_proxy: Callable[[str], FaultProxy],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """After the limit (10 s, shortened here) of unbroken silence it counts as unavailable."""
        monkeypatch.setattr(follower, "SILENT_SERVER_S", 2.0)
        proxy = fault_proxy(simulator.url)
        with ComfyClient(proxy.url_of(simulator.url), connect_timeout_s=0.5, read_timeout_s=0.5) as client:
            run = Run(client, sleeper(30))
            run.wait_running()
            proxy.set_mode("blackhole")
            began = time.monotonic()
            with pytest.raises(ComfyUnavailable) as caught:
                run.end()
            assert not caught.value.refused
            assert 1.9 < time.monotonic() - began < 6.0

    def test_errors_of_the_server_are_tolerated_too(self, simulator: Simulator, client: ComfyClient) -> None:
        """A few 500s while it collects garbage are no end."""
        run = Run(client, sleeper(1.0))
        run.wait_running()
        simulator.faults(refuse_http=500, refuse_paths=["/queue", "/history"], refuse_next=4)

        assert run.end().entry.status == "success"

    def test_a_prompt_without_progress_stalls(self, simulator: Simulator, client: ComfyClient) -> None:
        """It was heard and then nothing more: stalled, whatever reopening the socket tells."""
        run = Run(client, sleeper(2.0, steps=20), stall_s=5.0)
        run.wait_for(lambda: len(run.heard_of(events.Progress)) > 3)
        simulator.faults(stall=True)
        began = time.monotonic()
        with pytest.raises(ServerStalled):
            run.end()
        assert 4.0 < time.monotonic() - began < 8.0
        simulator.faults(stall=False)

    def test_a_freeze_of_the_follower_is_no_stall(
        self, simulator: Simulator, client: ComfyClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While this process was stopped nobody listened: silence then says nothing about the server."""
        monkeypatch.setattr(follower, "FROZEN_S", 1.0)
        run = Run(client, sleeper(1.0, steps=4), stall_s=2.5)
        run.wait_for(lambda: len(run.heard_of(events.Progress)) > 0)
        simulator.faults(stall=True)
        run.freeze_s = 3.0
        run.wait_for(lambda: run.freeze_s == 0)
        time.sleep(0.5)
        simulator.faults(stall=False)

        assert run.end().entry.status == "success"

    def test_what_cannot_be_heard_is_no_stall(self, simulator: Simulator, client: ComfyClient) -> None:
        """The socket is gone and does not come back: the clock stands still, and polling finds the end."""
        run = Run(client, sleeper(4.0, steps=20), stall_s=1.0)
        run.wait_for(lambda: len(run.heard_of(events.Progress)) > 2)
        simulator.faults(refuse_http=503, refuse_paths=["/ws"], drop_sockets=True)

        assert run.end().entry.status == "success"

    def test_waiting_in_the_line_is_no_stall(self, client: ComfyClient) -> None:
        """The stall clock starts with the first event of this prompt; the line may take longer."""
        first, second = (Run(client, sleeper(0.8, steps=8)) for _ in range(2))
        first.wait_running()
        run = Run(client, image(), stall_s=0.7)

        assert run.end().entry.status == "success"
        first.end()
        second.end()

    def test_what_was_never_heard_cannot_stall(self, simulator: Simulator, client: ComfyClient) -> None:
        """Where no socket works, silence says nothing about the prompt."""
        simulator.faults(mute_sockets=True)

        assert Run(client, sleeper(1.5), stall_s=0.3).end().entry.status == "success"

    def test_a_worker_thread_that_died_with_our_prompt_stalls(
        self, simulator: Simulator, client: ComfyClient
    ) -> None:
        """HTTP answers, the prompt "runs", and a new socket is greeted and told of no node: it is dead."""
        simulator.faults(zombie=True)
        run = Run(client, image(), stall_s=0.5)
        with pytest.raises(ServerStalled) as stalled:
            run.end(15)
        assert stalled.value.stuck_on == run.prompt_id

    def test_a_line_that_never_moves_stalls(self, simulator: Simulator, client: ComfyClient) -> None:
        """A prompt that killed the server's worker thread stays at the head for ever."""
        simulator.faults(zombie=True)
        poison = new_id()
        client.submit(image(), prompt_id=poison, client_id="poison")
        with pytest.raises(ServerStalled) as stalled:
            Run(client, image(), stall_s=0.5).end(5)
        assert stalled.value.stuck_on == poison


class TestResultsOnTheSocket:
    def test_all_frames_are_captured(self, client: ComfyClient) -> None:
        """``SaveImageWebsocket`` pictures come complete, in order, with their node."""
        finished = Run(client, to_socket(3), socket_nodes=["3"]).end()

        assert finished.frames_complete
        assert finished.entry.outputs == ()
        assert [(frame.node_id, frame.image_type) for frame in finished.frames] == [("3", "image/png")] * 3
        assert all(frame.data.startswith(b"\x89PNG") for frame in finished.frames)

    def test_a_gap_makes_them_incomplete(self, simulator: Simulator, client: ComfyClient) -> None:
        """A socket lost in the middle may have lost frames, even if as many came as announced."""
        run = Run(client, to_socket(2, seconds=1.5), socket_nodes=["3"])
        run.wait_running()
        simulator.faults(drop_sockets=True)
        finished = run.end()

        assert finished.entry.status == "success"
        assert not finished.frames_complete

    def test_an_adopted_prompt_has_none(self, client: ComfyClient) -> None:
        """Frames are never sent again: who adopts knows that they are missing."""
        first = Run(client, to_socket(), socket_nodes=["3"])
        first.end()
        finished = Run(
            client, None, prompt_id=first.prompt_id, client_id=first.client_id, socket_nodes=["3"]
        ).end()

        assert finished.frames == ()
        assert not finished.frames_complete

    def test_too_many_bytes_are_incomplete_not_fatal(self, client: ComfyClient) -> None:
        """Frames are kept up to a bound."""
        client_id, prompt_id = uuid.uuid4().hex, new_id()
        with Follower(client, client_id, socket_nodes=["3"], max_frame_bytes=400) as listener:
            client.submit(to_socket(5), prompt_id=prompt_id, client_id=client_id)
            finished = listener.follow(prompt_id)

        assert len(finished.frames) < 5
        assert not finished.frames_complete

    def test_what_did_not_fit_is_known_even_if_enough_came(self, client: ComfyClient) -> None:
        """A node that runs several times sends more frames than it announces at once."""
        reader = Follower(client, "c", socket_nodes=["3"], max_frame_bytes=10)._reader
        for size in (8, 8):
            reader._keep_frame(SocketFrame("3", "p", "image/png", bytes(size)))

        assert len(reader.frames_of("p")) == 1
        assert reader.overflowed

    def test_frames_wait_for_a_slow_socket(
        self, client: ComfyClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The history may be complete before the last frame arrives: the frames are waited for."""
        take = follower._Reader._take_message

        def slowly(*arguments: Any, **options: Any) -> None:
            time.sleep(0.03)
            take(*arguments, **options)

        monkeypatch.setattr(follower._Reader, "_take_message", slowly)
        finished = Run(client, to_socket(20), socket_nodes=["3"], poll_s=0.01).end(30)

        assert len(finished.frames) == 20
        assert finished.frames_complete

    def test_a_quiet_socket_with_results_is_not_opened_again(
        self, client: ComfyClient, sockets: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While it was opened again frames would be lost: a slow node is no reason."""
        monkeypatch.setattr(follower, "QUIET_S", 0.3)
        workflow = to_socket(1, seconds=2.0)
        workflow["2"]["inputs"]["steps"] = 1
        finished = Run(client, workflow, socket_nodes=["3"]).end()

        assert len(sockets) == 1
        assert finished.frames_complete

    def test_previews_are_no_results(self, client: ComfyClient) -> None:
        """A sampler's previews go to ``on_event`` if asked for, and never among the frames."""
        workflow = sleeper(0.5, steps=5, preview=True)
        workflow["3"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
        run = Run(client, workflow, socket_nodes=["3"], previews=True)
        finished = run.end()

        assert len(finished.frames) == 1
        previews = run.heard_of(events.PreviewImage)
        assert previews
        assert {(preview.node_id, preview.image_type) for preview in previews} == {("1", "image/jpeg")}
        assert previews[0].display_node_id == "1", "the server was not told that we take event 4"

    def test_previews_stay_away_unless_asked_for(self, client: ComfyClient) -> None:
        """By default they cost nothing."""
        run = Run(client, sleeper(0.3, preview=True))
        run.end()

        assert run.heard_of(events.PreviewImage) == []

    def test_an_old_servers_frames_belong_to_the_node_that_runs(self, client: ComfyClient) -> None:
        """Binary event 1 says neither node nor prompt; without a running node it is somebody else's."""
        reader = Follower(client, "c", socket_nodes=["3"])._reader
        frame = b"\0\0\0\1\0\0\0\2\x89PNG"
        reader._take_message(1, frame, binary=True)
        reader._take_message(1, b'{"type":"executing","data":{"node":"2","prompt_id":"p"}}', binary=False)
        reader._take_message(1, frame, binary=True)
        reader._take_message(1, b'{"type":"executing","data":{"node":"3","prompt_id":"p"}}', binary=False)
        reader._take_message(1, frame, binary=True)

        assert [(kept.node_id, kept.prompt_id) for kept in reader.frames_of("p")] == [("3", "p")]


def test_no_socket_sends_an_origin(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign Origin is 403 there, so none is sent; no redirect is followed, no proxy used."""
    seen: list[dict[str, Any]] = []

    def record(_url: str, **options: Any) -> None:
        seen.append(options)
        raise OSError

    monkeypatch.setattr(websocket, "create_connection", record)
    with ComfyClient(simulator.url) as client, Follower(client, "c"):
        pass

    assert seen[0]["suppress_origin"] is True
    assert seen[0]["redirect_limit"] == 0
    assert seen[0]["http_no_proxy"] == ["*"]


def test_threads_and_sockets_end_with_the_follower(client: ComfyClient) -> None:
    """Nothing is left behind: no thread, no connection."""
    before = threading.active_count()
    for _ in range(5):
        Run(client, image()).end()
    end = time.monotonic() + 3
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)

    assert threading.active_count() <= before
    assert len(client._sessions) <= 1
