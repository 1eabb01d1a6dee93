"""One ComfyUI server over HTTP, against the simulator and against servers that are none."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from genpulse.comfy import client as client_module
from genpulse.comfy.client import ComfyClient, Place, QueueSnapshot, ServerFile, Whereabouts
from genpulse.errors import ComfyUnavailable, GenPulseError, InputRejected, PromptLost, WorkflowRejected

if TYPE_CHECKING:
    from genpulse.testing.services import FaultProxy
    from genpulse.testing.simulator import Simulator

SOME_ID = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
SECRET_WORDS = ("127.0.0.1", "localhost", "http:", "/tmp", "Errno")


@pytest.fixture
def client(simulator: Simulator) -> Iterator[ComfyClient]:
    """A client of the simulator."""
    with ComfyClient(simulator.url, read_timeout_s=10) as client:
        yield client


@pytest.fixture(params=["0.3.64", "newer"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Simulator, ComfyClient]]:
    """A simulator of the recorded version or of the newer one, and its client."""
    from genpulse.testing.simulator import Simulator

    with Simulator(tmp_path / "either", profile=request.param) as running, ComfyClient(running.url) as client:
        yield running, client


def new_id() -> str:
    """A prompt id."""
    return str(uuid.uuid4())


def image(color: int = 0, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """A workflow that saves one small picture, with further nodes."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": color}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"t/{uuid.uuid4()}"}},
        **(more or {}),
    }  # fmt: skip


def sleeper(seconds: float, kind: str = "SimSleep") -> dict[str, Any]:
    """A workflow that takes a while."""
    return {
        "1": {"class_type": kind, "inputs": {"seconds": seconds, "seed": uuid.uuid4().int % 2**32}},
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": f"t/{uuid.uuid4()}"},
        },
    }


def submit(client: ComfyClient, workflow: dict[str, Any]) -> str:
    """Submit under a new id; returns it."""
    prompt_id = new_id()
    client.submit(workflow, prompt_id=prompt_id, client_id=uuid.uuid4().hex)
    return prompt_id


def wait_for(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait until the condition holds, and fail if it never does."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def finished(client: ComfyClient, prompt_id: str) -> None:
    """Wait until a prompt is over."""
    wait_for(lambda: client.look(prompt_id).place is Place.FINISHED)


def starts(simulator: Simulator, prompt_id: str) -> int:
    """How often a prompt was executed."""
    return sum(line["event"] == "started" and line["prompt_id"] == prompt_id for line in simulator.log)


class TestPrompts:
    def test_a_prompt_is_seen_wherever_it_is(self, client: ComfyClient) -> None:
        """Running, pending with its place in the line, finished, and never heard of."""
        running, first, second = (submit(client, sleeper(seconds)) for seconds in (1.0, 0.01, 0.01))
        wait_for(lambda: client.look(running).place is Place.RUNNING)

        assert (client.look(first).place, client.look(first).ahead) == (Place.PENDING, 1)
        assert client.look(second).ahead == 2
        assert client.queue_remaining() == 3
        assert client.look(new_id()).place is Place.UNKNOWN
        finished(client, second)
        entry = client.look(second).entry
        assert entry is not None
        assert entry.status == "success"
        assert len(entry.files) == 1

    def test_pending_prompts_are_in_the_order_in_which_they_run(self, client: ComfyClient) -> None:
        """The server lists its heap, which after the first of them left is in no order; we sort it."""
        first = submit(client, sleeper(0.3))
        second = submit(client, sleeper(2.0))
        pending = [submit(client, image(color)) for color in range(7)]
        finished(client, first)
        wait_for(lambda: client.look(second).place is Place.RUNNING)

        assert client.queue().pending == tuple(pending)

    def test_a_prompt_that_ends_between_two_questions_is_not_missed(self, simulator: Simulator) -> None:
        """The queue is asked first: the other order would find it in neither."""

        class Slow(ComfyClient):
            def queue(self, *, timeout_s: float | None = None) -> QueueSnapshot:
                wait_for(lambda: self.history(prompt_id) is not None)
                return super().queue(timeout_s=timeout_s)

        with Slow(simulator.url) as client:
            prompt_id = submit(client, sleeper(0.3))

            assert client.look(prompt_id).place is Place.FINISHED

    def test_a_rejected_workflow_names_its_node(self, client: ComfyClient) -> None:
        """HTTP 400 becomes one sentence with the node, and the report by node id."""
        workflow = image()
        workflow["1"]["inputs"]["width"] = 10**6
        with pytest.raises(WorkflowRejected, match=r"node 1 \(EmptyImage\)") as caught:
            submit(client, workflow)
        assert caught.value.node_id == "1"
        assert caught.value.node_errors["1"]["errors"][0]["type"] == "value_bigger_than_max"

    def test_an_unknown_node_is_rejected(self, either: tuple[Simulator, ComfyClient]) -> None:
        """Also where the server gives no report by node."""
        with pytest.raises(WorkflowRejected, match="NoSuchNode") as caught:
            submit(either[1], image(more={"3": {"class_type": "NoSuchNode", "inputs": {}}}))
        assert caught.value.node_id == "3"

    def test_a_partly_valid_workflow_is_told(self, client: ComfyClient) -> None:
        """The server answers 200 and leaves the invalid outputs out; the caller decides."""
        broken = {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}
        accepted = client.submit(image(more={"3": broken}), prompt_id=new_id(), client_id="c")

        assert accepted.number is not None
        with pytest.raises(WorkflowRejected, match="node 3") as caught:
            accepted.raise_for_node_errors()
        assert caught.value.node_id == "3"

    @pytest.mark.parametrize("prompt_id", ["", "x", SOME_ID.upper(), SOME_ID.replace("-", ""), None, 5])
    def test_only_canonical_uuids_are_sent(self, client: ComfyClient, prompt_id: Any) -> None:
        """Newer servers take nothing else, and a type error could kill an old one."""
        with pytest.raises(ValueError, match="UUID"):
            client.submit(image(), prompt_id=prompt_id, client_id="c")

    @pytest.mark.parametrize("client_id", [[], {}, None, "", "a\nb", 5])
    def test_only_texts_are_client_ids(self, client: ComfyClient, client_id: Any) -> None:
        """A list here ends the server's process."""
        with pytest.raises(ValueError, match="client id"):
            client.submit(image(), prompt_id=new_id(), client_id=client_id)

    @pytest.mark.parametrize("extra", [None, [], "x"])
    def test_extra_data_is_an_object_or_left_out(
        self, simulator: Simulator, client: ComfyClient, extra: Any
    ) -> None:
        """``null`` and others kill the server's worker thread; none of them is ever sent."""
        prompt_id = new_id()
        try:
            client.submit(image(), prompt_id=prompt_id, client_id="c", extra_data=extra)
        except WorkflowRejected:
            assert extra is not None
        else:
            finished(client, prompt_id)
        assert simulator.exit_code is None

    def test_nan_is_never_sent(self, client: ComfyClient) -> None:
        """A value that is no JSON is refused here."""
        with pytest.raises(WorkflowRejected):
            submit(client, image(color=cast("int", float("nan"))))

    def test_an_uncertain_post_is_not_repeated(self, simulator: Simulator, client: ComfyClient) -> None:
        """The answer is lost, the prompt is there: it is found and not posted again."""
        simulator.faults(lose_answers_next=1)
        prompt_id = new_id()
        client.deliver(image(), prompt_id=prompt_id, client_id="c")
        finished(client, prompt_id)
        time.sleep(0.5)

        assert starts(simulator, prompt_id) == 1

    def test_the_uncertainty_is_shown_to_who_only_submits(
        self, simulator: Simulator, client: ComfyClient
    ) -> None:
        """An answer that was lost is unavailable but not refused: it may have arrived."""
        simulator.faults(lose_answers_next=1)
        with pytest.raises(ComfyUnavailable) as caught:
            submit(client, image())
        assert not caught.value.refused

    def test_a_post_that_never_arrived_is_repeated(self, simulator: Simulator, client: ComfyClient) -> None:
        """HTTP 500 and neither in queue nor history: posted once more, under the same id."""
        simulator.faults(refuse_http=500, refuse_paths=["/prompt"], refuse_next=1)
        prompt_id = new_id()
        client.deliver(image(), prompt_id=prompt_id, client_id="c")
        finished(client, prompt_id)

        assert starts(simulator, prompt_id) == 1

    def test_of_two_copies_one_is_deleted(
        self, simulator: Simulator, client: ComfyClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first post was slow and is nowhere to be seen; it arrives together with the second."""
        client.submit(sleeper(1.0), prompt_id=new_id(), client_id="before")
        simulator.faults(lose_answers_next=1)
        seen = iter([False, False])
        look = client.look

        def blind(prompt_id: str, **options: Any) -> Whereabouts:
            return look(prompt_id, **options) if next(seen, True) else Whereabouts(Place.UNKNOWN)

        monkeypatch.setattr(client, "look", blind)
        prompt_id = new_id()
        accepted = client.deliver(image(), prompt_id=prompt_id, client_id="c")

        assert accepted.repeated
        assert client.queue().pending.count(prompt_id) == 1

    def test_copies_are_counted(self, client: ComfyClient) -> None:
        """The same id twice runs twice; both copies can be found by it."""
        submit(client, sleeper(1.0))
        prompt_id = new_id()
        for _ in range(2):
            client.submit(image(), prompt_id=prompt_id, client_id="c")

        assert client.look(prompt_id).copies == 2

    def test_a_forgotten_prompt_is_unknown(self, client: ComfyClient) -> None:
        """Deleting from the history leaves nothing of a finished prompt."""
        prompt_id = submit(client, image())
        finished(client, prompt_id)
        client.forget(prompt_id)

        assert client.look(prompt_id).place is Place.UNKNOWN


class TestCancel:
    def test_a_pending_prompt_is_gone(self, either: tuple[Simulator, ComfyClient]) -> None:
        """It never starts, and the one that runs is not touched."""
        simulator, client = either
        other = submit(client, sleeper(1.0))
        prompt_id = submit(client, image())
        wait_for(lambda: client.look(other).place is Place.RUNNING)
        seen = client.stop(prompt_id)
        finished(client, other)
        entry = client.history(other)

        # The newer server keeps a record of a cancelled job, the recorded one leaves no trace.
        assert seen.is_over
        assert entry is not None
        assert entry.status == "success"
        assert starts(simulator, prompt_id) == 0

    def test_a_running_prompt_is_interrupted(self, either: tuple[Simulator, ComfyClient]) -> None:
        """It ends within the time, as interrupted, and the next one runs."""
        _, client = either
        prompt_id = submit(client, sleeper(30))
        after = submit(client, image())
        wait_for(lambda: client.look(prompt_id).place is Place.RUNNING)
        began = time.monotonic()
        seen = client.stop(prompt_id)

        assert time.monotonic() - began < 2.0
        assert seen.place is Place.FINISHED
        assert seen.entry is not None
        assert seen.entry.status == "interrupted"
        finished(client, after)

    def test_a_finished_prompt_and_an_unknown_one_disturb_nobody(
        self, either: tuple[Simulator, ComfyClient]
    ) -> None:
        """Stopping what is over already leaves the running prompt of somebody else alone."""
        _, client = either
        done = submit(client, image())
        finished(client, done)
        other = submit(client, sleeper(0.5))
        wait_for(lambda: client.look(other).place is Place.RUNNING)

        assert client.stop(done).place is Place.FINISHED
        assert client.stop(new_id()).place is Place.UNKNOWN
        finished(client, other)
        entry = client.history(other)
        assert entry is not None
        assert entry.status == "success"

    def test_a_lost_interrupt_is_repeated(self, simulator: Simulator, client: ComfyClient) -> None:
        """The instant between queue and start loses an interrupt; it is sent again."""
        simulator.faults(interrupt_lost_next=2)
        prompt_id = submit(client, sleeper(30))
        wait_for(lambda: client.look(prompt_id).place is Place.RUNNING)

        assert client.stop(prompt_id).place is Place.FINISHED

    def test_a_node_that_does_not_look_is_told_as_running(self, client: ComfyClient) -> None:
        """``stop`` gives up in time and says that the prompt still runs."""
        prompt_id = submit(client, sleeper(3.0, "SimUninterruptible"))
        wait_for(lambda: client.look(prompt_id).place is Place.RUNNING)
        began = time.monotonic()

        assert client.stop(prompt_id, within_s=0.5).place is Place.RUNNING
        assert time.monotonic() - began < 1.5

    @pytest.mark.parametrize("prompt_id", ["", " ", None])
    def test_no_interrupt_without_an_id(self, client: ComfyClient, prompt_id: Any) -> None:
        """An empty id would kill whatever runs: it never leaves this process."""
        other = submit(client, sleeper(0.5))
        wait_for(lambda: client.look(other).place is Place.RUNNING)
        for call in (client.cancel, client.stop):
            with pytest.raises(ValueError, match="prompt id"):
                call(prompt_id)
        finished(client, other)
        entry = client.history(other)
        assert entry is not None
        assert entry.status == "success"


class CountingFile(io.RawIOBase):
    """A large file of zeros that knows how much of it was asked for at once."""

    def __init__(self, size: int) -> None:
        self.size, self.place, self.largest = size, 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = offset + (self.size if whence == io.SEEK_END else 0)
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, size: int = -1) -> bytes:
        self.largest = max(self.largest, size if size >= 0 else self.size)
        count = min(size if size >= 0 else self.size, self.size - self.place)
        self.place += count
        return bytes(count)


class TestFiles:
    def test_an_upload_can_be_used_by_its_returned_name(self, client: ComfyClient) -> None:
        """What was uploaded is what the loader node reads and what comes back."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.new("RGB", (20, 10), (1, 2, 3)).save(buffer, "PNG")
        buffer.seek(0)
        stored = client.upload(buffer, name='ein "Bild" ä.png', subfolder="genpulse/x")
        workflow = image()
        workflow["1"] = {"class_type": "LoadImage", "inputs": {"image": stored.reference}}
        prompt_id = submit(client, workflow)
        finished(client, prompt_id)
        entry = client.history(prompt_id)
        assert entry is not None
        entry.raise_for_status()
        file = entry.files[0].file
        assert file is not None

        with client.view(file) as viewed:
            assert viewed.content_type == "image/png"
            found = Image.open(io.BytesIO(viewed.read()))
        assert (found.size, found.getpixel((0, 0))) == ((20, 10), (1, 2, 3))

    def test_a_big_upload_is_streamed(self, client: ComfyClient) -> None:
        """30 MB go through in small pieces, with their length announced."""
        file = CountingFile(30 * 2**20)
        stored = client.upload(cast("Any", file), name="big.bin")
        with client.view(stored) as viewed:
            size = sum(len(chunk) for chunk in iter(lambda: viewed.read(2**20), b""))

        assert size == 30 * 2**20
        assert file.largest <= 2**17

    def test_a_stream_without_an_end_in_sight_is_uploaded(self, client: ComfyClient) -> None:
        """A pipe cannot tell its size; it is sent in chunks."""

        class Pipe(io.BytesIO):
            def seekable(self) -> bool:
                return False

            def tell(self) -> int:
                raise OSError

        stored = client.upload(Pipe(b"x" * 200_000), name="pipe.bin")
        with client.view(stored) as viewed:
            assert len(viewed.read()) == 200_000

    def test_without_overwrite_the_server_chooses_another_name(self, client: ComfyClient) -> None:
        """The name that counts is the one that comes back."""
        client.upload(io.BytesIO(b"a"), name="same.png")

        assert client.upload(io.BytesIO(b"b"), name="same.png", overwrite=False).filename == "same (1).png"
        assert client.upload(io.BytesIO(b"b"), name="same.png").filename == "same.png"

    def test_too_large_is_permanent(self, tmp_path: Path) -> None:
        """The server's limit makes the input unusable, not the server unavailable."""
        from genpulse.testing.simulator import Simulator

        with Simulator(tmp_path, upload_limit_bytes=100_000) as small, ComfyClient(small.url) as client:
            for size in (150_000, 20 * 2**20):
                with pytest.raises(InputRejected, match="larger"):
                    client.upload(io.BytesIO(bytes(size)), name="big.bin")

    @pytest.mark.parametrize(("name", "folder"), [("a/b.png", ""), ("..", ""), ("", ""), ("a.png", "../x"), ("a\r\nb", ""), ("a.png", "/etc")])  # fmt: skip
    def test_unusable_names_are_refused_here(self, client: ComfyClient, name: str, folder: str) -> None:
        """A slash in a name is HTTP 500 there; none of these is sent."""
        with pytest.raises(InputRejected):
            client.upload(io.BytesIO(b"a"), name=name, subfolder=folder)

    def test_an_output_that_is_gone_means_run_again(self, simulator: Simulator, client: ComfyClient) -> None:
        """A cached name of a deleted file is 404: retryable."""
        prompt_id = submit(client, image())
        finished(client, prompt_id)
        entry = client.history(prompt_id)
        assert entry is not None
        file = entry.files[0].file
        assert file is not None
        simulator.faults(lose_outputs=True)
        with pytest.raises(PromptLost), client.view(file):
            pass

    def test_an_output_cut_in_the_middle_is_no_output(
        self, simulator: Simulator, client: ComfyClient
    ) -> None:
        """Half a file never passes for a whole one."""
        stored = client.upload(io.BytesIO(bytes(2**20)), name="whole.bin")
        simulator.faults(cut_view_next=1)
        with pytest.raises(ComfyUnavailable), client.view(stored) as viewed:
            viewed.read()
        with client.view(stored) as viewed:
            assert len(viewed.read()) == 2**20

    def test_a_traversing_name_is_not_found(self, client: ComfyClient) -> None:
        """The server refuses such names for good."""
        with pytest.raises(GenPulseError), client.view(ServerFile("../../etc/passwd")):
            pass


class TestServer:
    def test_small_questions_are_answered(self, either: tuple[Simulator, ComfyClient]) -> None:
        """Features, statistics, declarations, and the call to free memory."""
        _, client = either
        client.free()

        assert client.features()["supports_preview_metadata"] is True
        assert "system" in client.system_stats()
        assert client.object_info("SaveImage")["SaveImage"]["output_node"] is True
        assert client.object_info("No/Such") == {}
        assert "KSampler" in client.object_info()

    def test_a_server_that_is_not_there_refuses(self) -> None:
        """Nobody listens: that is told apart from silence."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with ComfyClient(f"http://127.0.0.1:{port}") as client, pytest.raises(ComfyUnavailable) as caught:
            client.queue_remaining()
        assert caught.value.refused
        assert str(port) not in str(caught.value)

    @pytest.mark.parametrize("url", ["", "host:8188", "ftp://host", "http://", "http://host:port"])
    def test_an_address_that_is_none_is_refused(self, url: str) -> None:
        """A wrong address is a mistake of who configures it, found at once."""
        with pytest.raises(ValueError, match="address"):
            ComfyClient(url)

    def test_credentials_do_not_show(self) -> None:
        """User and password in the address become basic auth and appear nowhere."""
        client = ComfyClient("http://user:secret@host:8188/")

        assert "secret" not in repr(client) + client.base_url
        assert client.basic_auth == ("user", "secret")


def _request(connection: socket.socket) -> str:
    """One request with its body; headers and body may come apart."""
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
        head, end, body = data.partition(b"\r\n\r\n")
        announced = re.search(rb"content-length: (\d+)", head.lower())
        if end and len(body) >= (min(int(announced[1]), 65536) if announced else 0):
            break
    return data.decode("latin-1")


class Stub:
    """A server that gives one raw answer to everything and remembers what it was asked."""

    def __init__(
        self,
        answer: bytes,
        *,
        drip_s: float = 0.0,
        others: dict[str, bytes] | None = None,
        resets: int = 0,
    ) -> None:
        self.answer, self.drip_s, self.resets = answer, drip_s, resets
        self.others = others or {}
        self.heads: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(5)
                self.heads.append(_request(connection))
                if len(self.heads) <= self.resets:
                    return
                if self.drip_s:
                    for byte in self.answer:
                        connection.sendall(bytes([byte]))
                        time.sleep(self.drip_s)
                else:
                    path = self.heads[-1].split(" ")[1]
                    connection.sendall(self.others.get(path, self.answer))
            except OSError:
                return


@pytest.fixture
def stub() -> Iterator[Callable[..., Stub]]:
    """Make servers that are no ComfyUI."""
    made: list[Stub] = []

    def make(answer: bytes, **options: Any) -> Stub:
        made.append(Stub(answer, **options))
        return made[-1]

    yield make
    for server in made:
        server.close()


def response(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    """A raw HTTP response that ends its connection."""
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
    return head.encode() + body


def _read_view(client: ComfyClient) -> bytes:
    with client.view(ServerFile("a.png")) as viewed:
        return viewed.read()


CALLS: dict[str, Callable[[ComfyClient], object]] = {
    "submit": lambda client: client.submit(image(), prompt_id=new_id(), client_id="c"),
    "deliver": lambda client: client.deliver(image(), prompt_id=new_id(), client_id="c"),
    "queue": lambda client: client.queue(),
    "history": lambda client: client.history(new_id()),
    "look": lambda client: client.look(new_id()),
    "cancel": lambda client: client.cancel(new_id()),
    "stop": lambda client: client.stop(new_id(), within_s=0.2),
    "forget": lambda client: client.forget(new_id()),
    "upload": lambda client: client.upload(io.BytesIO(b"x"), name="x.png"),
    "view": _read_view,
    "queue_remaining": lambda client: client.queue_remaining(),
    "free": lambda client: client.free(),
    "system_stats": lambda client: client.system_stats(),
    "features": lambda client: client.features(),
    "object_info": lambda client: client.object_info(),
}

ANSWERS: dict[str, bytes] = {
    "reset": b"",
    "garbage": b"\x00\xff not http\r\n\r\n",
    "half": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{",
    "odd status": b"HTTP/1.1 abc\r\n\r\n",
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "bad gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    "html": response(b"<html>"),
    "list": response(b"[1, NaN]"),
    "null": response(b"null"),
    "odd object": response(b'{"queue_running": 5, "queue_pending": [[null], 7, [1, 2]], "exec_info": [], "name": 3}'),
    "odd errors": response(b'{"error": [], "node_errors": {"1": {"errors": [7, {}]}, "2": 5}}', "400 Bad Request"),
    "nested": response(b"[" * 100_000),
    "not utf-8": response(b'{"a": "\xff"}'),
    "500": response(b"500 Internal Server Error\n\nServer got itself in trouble", "500 Internal Server Error"),
    "403": response(b"", "403 Forbidden"),
    "redirect": response(b"", "302 Found", "Location: http://127.0.0.1:1/elsewhere\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("call", sorted(CALLS))
@pytest.mark.parametrize("answer", sorted(ANSWERS))
def test_foreign_failures_become_ours_at_the_door(stub: Callable[..., Stub], call: str, answer: str) -> None:
    """Whatever a server answers to whatever call: a value or one of our errors, without its address."""
    server = stub(ANSWERS[answer])
    with ComfyClient(server.url, read_timeout_s=3) as client:
        try:
            CALLS[call](client)
        except GenPulseError as error:
            said = str(error)
        else:
            said = ""
    assert not [word for word in (*SECRET_WORDS, str(server.port)) if word in said]


def test_no_origin_no_cookies_no_proxy(stub: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign Origin is 403 there; the environment's proxy and a server's cookies are not used."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server = stub(response(b"{}", headers="Set-Cookie: a=b\r\n"))
    with ComfyClient(server.url) as client:
        client.features()
        client.features()
    head = server.heads[1].lower()

    assert "origin:" not in head
    assert "cookie:" not in head
    assert "accept-encoding: identity" in head


def test_a_server_that_hangs_up_on_a_large_file_finds_it_too_large(stub: Callable[..., Stub]) -> None:
    """It need not read to the end before it answers; its declared limit tells why it hung up."""
    server = stub(b"", others={"/features": response(b'{"max_upload_size": 1048576.0}')})
    with ComfyClient(server.url) as client:
        with pytest.raises(InputRejected, match="larger"):
            client.upload(io.BytesIO(bytes(2**21)), name="big.bin")
        with pytest.raises(ComfyUnavailable):
            client.upload(io.BytesIO(bytes(2**10)), name="small.bin")


@pytest.mark.parametrize("sent", [b"", b"x" * 999])
def test_a_file_that_ends_early_is_no_file(stub: Callable[..., Stub], sent: bytes) -> None:
    """Fewer bytes than announced are a failure, even if the connection ends in good order."""
    server = stub(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + sent)
    with (
        ComfyClient(server.url) as client,
        pytest.raises(ComfyUnavailable),
        client.view(ServerFile("a.png")) as viewed,
    ):
        list(iter(lambda: viewed.read(100), b""))


def test_a_redirect_is_not_followed(stub: Callable[..., Stub]) -> None:
    """A server must not send us elsewhere."""
    target = stub(response(b'{"exec_info": {"queue_remaining": 0}}'))
    server = stub(response(b"", "307 Moved", f"Location: {target.url}/prompt\r\n"))
    with ComfyClient(server.url) as client, pytest.raises(ComfyUnavailable, match="redirect"):
        client.queue_remaining()
    assert target.heads == []


def test_an_endless_answer_is_cut(stub: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON is read up to a bound, not until memory ends."""
    monkeypatch.setattr(client_module, "JSON_LIMIT_BYTES", 100_000)
    server = stub(response(b'{"a": "' + b"x" * 200_000 + b'"}'))
    with ComfyClient(server.url) as client, pytest.raises(ComfyUnavailable, match="too large"):
        client.queue()


def test_a_silent_server_is_given_up_in_time(stub: Callable[..., Stub]) -> None:
    """Silence ends with the read time-out, and is not taken for a refusal."""
    server = stub(response(b"{}"), drip_s=3)
    began = time.monotonic()
    with ComfyClient(server.url, read_timeout_s=0.3) as client, pytest.raises(ComfyUnavailable) as caught:
        client.queue_remaining()

    assert not caught.value.refused
    assert time.monotonic() - began < 2.0


def test_a_server_that_ignores_our_id_is_told_apart(stub: Callable[..., Stub]) -> None:
    """A prompt id of the server's own could never be found again: the server is too old."""
    body = json.dumps({"prompt_id": new_id(), "number": 1, "node_errors": {}}).encode()
    server = stub(response(body))
    with ComfyClient(server.url) as client, pytest.raises(ComfyUnavailable, match="too old"):
        submit(client, image())
    bodies = [head for head in server.heads if "POST /interrupt" in head]

    assert bodies
    assert all('"prompt_id"' in head for head in bodies)


def test_connections_are_kept(simulator: Simulator, fault_proxy: Callable[[str], FaultProxy]) -> None:
    """Twenty calls, one connection: answers are read to their end."""
    proxy = fault_proxy(simulator.url)
    with ComfyClient(proxy.url_of(simulator.url)) as client:
        for _ in range(10):
            client.queue_remaining()
            client.look(new_id())

    assert proxy.accepted == 1


def test_a_question_cut_off_is_asked_again_once(stub: Callable[..., Stub]) -> None:
    """A kept connection that the server closes just then costs nothing; a POST is never repeated."""
    answer = response(b'{"exec_info": {"queue_remaining": 4}}')
    server = stub(answer, resets=1)
    with ComfyClient(server.url) as client:
        assert client.queue_remaining() == 4
    server = stub(answer, resets=1)
    with ComfyClient(server.url) as client, pytest.raises(ComfyUnavailable):
        client.free()


def test_threads_share_a_client(client: ComfyClient) -> None:
    """Each thread has its own connections, and gives them back when it says so."""
    seen: list[int] = []

    def ask() -> None:
        seen.extend(client.queue_remaining() for _ in range(10))
        client.release_thread()

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert seen == [0] * 50
    assert client._sessions == []
