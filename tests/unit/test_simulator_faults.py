"""Each fault does what it says, and no more; the execution log tells what really happened."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from genpulse.testing.simulator import Faults, Simulator, UnknownFault
from tests.support.comfy_replay import Listener


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Simulator]:
    """A simulator with its execution log in a file."""
    with Simulator(tmp_path / "data", log_path=tmp_path / "log.jsonl", name="gpu1") as running:
        yield running


def prompt(seconds: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """A prompt that sleeps and then previews a picture."""
    return {
        "1": {"class_type": "SimSleep", "inputs": {"seconds": seconds, "seed": seed, "steps": 10}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }


def submit(simulator: Simulator, seconds: float = 0.0, **body: Any) -> str:
    """Submit and return the prompt id."""
    body = {"prompt": prompt(seconds, time.monotonic_ns() % 1000000007), **body}
    answer = requests.post(f"{simulator.url}/prompt", json=body, timeout=10)
    return str(answer.json()["prompt_id"])


def history(simulator: Simulator, prompt_id: str) -> Any:
    """The history entry, or None."""
    return requests.get(f"{simulator.url}/history/{prompt_id}", timeout=10).json().get(prompt_id)


def queue(simulator: Simulator) -> tuple[list[str], list[str]]:
    """Ids of what runs and what waits."""
    found = requests.get(f"{simulator.url}/queue", timeout=10).json()
    return [item[1] for item in found["queue_running"]], [item[1] for item in found["queue_pending"]]


def wait_until(condition: Callable[[], Any], patience_s: float = 10) -> None:
    """Wait for a condition instead of a time."""
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


def listen(simulator: Simulator, client_id: str = "a") -> Listener:
    """An open socket."""
    return Listener(f"ws{simulator.url[4:]}/ws?clientId={client_id}")


def is_message(kind: str) -> Callable[[Any], bool]:
    """Whether a message is of this kind."""
    return lambda message: message.get("message") == kind


def test_faults_are_checked_before_any_is_set() -> None:
    """A wrong name or type changes nothing and says what there is."""
    faults = Faults()
    for wrong in ({"nonsense": 1}, {"stall": 1}, {"stall": True, "fail_next": "magic"}, {"exit_at": "never"}):
        with pytest.raises(UnknownFault):
            faults.change(wrong)

    assert faults.as_dict() == Faults().as_dict()
    assert faults.change({"history_gap_ms": 5, "exit": 3}) == {"exit": 3}
    assert faults.history_gap_ms == 5


def test_the_control_route_sets_and_tells(simulator: Simulator) -> None:
    """``POST /simulator/faults`` takes the fields to change; a bad body is 400."""
    url = f"{simulator.url}/simulator/faults"

    assert requests.post(url, json={"slow_http_ms": 1}, timeout=10).json()["slow_http_ms"] == 1
    assert requests.get(url, timeout=10).json()["slow_http_ms"] == 1
    assert requests.post(url, json={"nonsense": 1}, timeout=10).status_code == 400
    assert requests.post(url, data="[1]", timeout=10).status_code == 400


def test_the_log_tells_who_follows(simulator: Simulator) -> None:
    """Opening a socket and reading a finished prompt's history are entries of their own."""
    listener = listen(simulator, "follower")
    prompt_id = submit(simulator, client_id="follower")
    wait_until(lambda: history(simulator, prompt_id))
    listener.close()

    seen = [(e["event"], e.get("prompt_id"), e.get("client_id")) for e in simulator.log]
    assert seen.count(("listening", None, "follower")) == 1
    assert seen.count(("read", prompt_id, None)) == 1


def test_history_can_come_late(simulator: Simulator) -> None:
    """``history_gap_ms``: the entry is missing at ``execution_success`` and there at ``executing null``."""
    simulator.faults(history_gap_ms=150.0)
    listener = listen(simulator)
    prompt_id = submit(simulator, client_id="a")

    assert listener.wait_for(1, is_message("execution_success"))
    at_success = history(simulator, prompt_id)
    assert listener.wait_for(1, lambda m: is_message("executing")(m) and m["data"]["node"] is None)
    listener.close()

    assert at_success is None
    assert history(simulator, prompt_id) is not None


def test_sockets_can_be_muted_and_dropped(simulator: Simulator) -> None:
    """``mute_sockets`` keeps them open and silent; ``drop_sockets`` resets them without a close frame."""
    listener = listen(simulator)
    assert listener.wait_for(1, lambda _m: True)
    simulator.faults(mute_sockets=True)
    prompt_id = submit(simulator, client_id="a")
    wait_until(lambda: history(simulator, prompt_id))

    assert len(listener.heard) == 1
    assert not listener.ended(0)
    simulator.faults(mute_sockets=False, drop_sockets=True)
    assert listener.ended(5)
    listener.close()


def test_sockets_can_be_dropped_after_some_messages(simulator: Simulator) -> None:
    """``drop_after_messages`` counts down once."""
    listener = listen(simulator)
    assert listener.wait_for(1, lambda _m: True)
    simulator.faults(drop_after_messages=5)

    submit(simulator, client_id="a")

    assert listener.ended(5)
    assert len(listener.heard) == 6
    listener.close()


def test_a_stalled_worker_ignores_interrupts_until_it_goes_on(simulator: Simulator) -> None:
    """``stall``: HTTP answers, the prompt stays running; afterwards the interrupt takes effect."""
    prompt_id = submit(simulator, 1.0)
    wait_until(lambda: queue(simulator)[0] == [prompt_id])
    simulator.faults(stall=True)
    requests.post(f"{simulator.url}/interrupt", json={"prompt_id": prompt_id}, timeout=10)
    time.sleep(0.2)

    assert queue(simulator)[0] == [prompt_id]
    simulator.faults(stall=False)
    wait_until(lambda: history(simulator, prompt_id))
    assert history(simulator, prompt_id)["status"]["messages"][-1][0] == "execution_interrupted"


def test_a_zombie_needs_a_restart(simulator: Simulator) -> None:
    """``zombie``: the prompt runs for ever, others wait, and only a restart helps."""
    simulator.faults(zombie=True)
    first, second = submit(simulator), submit(simulator)
    wait_until(lambda: not simulator.server.engine.alive)

    assert queue(simulator) == ([first], [second])
    simulator.restart()
    third = submit(simulator)
    wait_until(lambda: history(simulator, third))


def test_requests_can_be_refused(simulator: Simulator) -> None:
    """``refuse_http`` with paths and a count: only those, only so often."""
    simulator.faults(refuse_http=503, refuse_paths=["/prompt"], refuse_next=2)
    statuses = [
        requests.get(f"{simulator.url}{path}", timeout=10).status_code for path in ("/queue", "/api/prompt")
    ]
    statuses += [requests.get(f"{simulator.url}/prompt", timeout=10).status_code for _ in range(2)]

    assert statuses == [200, 503, 503, 200]


def test_an_answer_can_be_lost_though_the_prompt_was_taken(simulator: Simulator) -> None:
    """``lose_answers_next``: the connection ends without an answer, and the prompt runs."""
    simulator.faults(lose_answers_next=1)
    prompt_id = "00000000-0000-4000-8000-000000000001"

    with pytest.raises(requests.ConnectionError):
        submit(simulator, prompt_id=prompt_id)

    wait_until(lambda: history(simulator, prompt_id))


def test_a_prompt_can_be_lost_though_it_was_answered(simulator: Simulator) -> None:
    """``lose_prompt_next``: 200, and then neither in queue nor in history."""
    simulator.faults(lose_prompt_next=1)

    lost, kept = submit(simulator), submit(simulator)

    wait_until(lambda: history(simulator, kept))
    assert history(simulator, lost) is None
    assert [e["event"] for e in simulator.log if e.get("prompt_id") == lost] == ["submitted", "lost"]


@pytest.mark.parametrize(("kind", "name"), [("exception", "RuntimeError"), ("oom", "torch.OutOfMemoryError")])
def test_the_next_prompts_can_fail(simulator: Simulator, kind: str, name: str) -> None:
    """``fail_next`` hits as many prompts as ``fail_times`` says."""
    simulator.faults(fail_next=kind, fail_times=2)
    ids = [submit(simulator) for _ in range(3)]
    wait_until(lambda: history(simulator, ids[2]))

    ends = [history(simulator, prompt_id)["status"]["messages"][-1] for prompt_id in ids]

    assert [end[0] for end in ends] == ["execution_error", "execution_error", "execution_success"]
    assert ends[0][1]["exception_type"] == name


def test_interrupts_can_be_lost(simulator: Simulator) -> None:
    """``interrupt_lost_next``: 200 without effect, as in the instant before a prompt starts."""
    simulator.faults(interrupt_lost_next=1)
    prompt_id = submit(simulator, 0.3)
    wait_until(lambda: queue(simulator)[0] == [prompt_id])

    answer = requests.post(f"{simulator.url}/interrupt", json={"prompt_id": prompt_id}, timeout=10)

    wait_until(lambda: history(simulator, prompt_id))
    assert answer.status_code == 200
    assert history(simulator, prompt_id)["status"]["status_str"] == "success"


def test_outputs_can_get_lost_or_cut(simulator: Simulator) -> None:
    """``lose_outputs`` is a 404 for outputs; ``cut_view_next`` breaks a download in the middle."""
    save = {
        "1": {"class_type": "SimNoise", "inputs": {"width": 200, "height": 200, "batch": 1}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    prompt_id = submit(simulator, prompt=save)
    wait_until(lambda: history(simulator, prompt_id))
    item = history(simulator, prompt_id)["outputs"]["2"]["images"][0]
    simulator.faults(lose_outputs=True, cut_view_next=1)

    assert requests.get(f"{simulator.url}/view", params=item, timeout=10).status_code == 404
    simulator.faults(lose_outputs=False)
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        requests.get(f"{simulator.url}/view", params=item, timeout=10)
    assert requests.get(f"{simulator.url}/view", params=item, timeout=10).status_code == 200


@pytest.mark.parametrize("event", ["submitted", "started", "node", "finished"])
def test_the_process_can_die_at_a_chosen_moment(simulator: Simulator, event: str, tmp_path: Path) -> None:
    """``exit_at``: the log has that event and nothing of the prompt after it; a restart starts afresh."""
    simulator.faults(exit_at=event)
    prompt_id = "00000000-0000-4000-8000-000000000002"
    try:
        submit(simulator, 0.2, prompt_id=prompt_id)
    except requests.ConnectionError:
        assert event == "submitted"
    wait_until(lambda: simulator.exit_code is not None)

    simulator.restart()

    events = [entry["event"] for entry in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())]
    story = {
        "submitted": ["submitted"],
        "started": ["submitted", "started"],
        "node": ["submitted", "started"],
        "finished": ["submitted", "started", "finished"],
    }
    assert events == ["boot", *story[event], "exit", "boot"]
    assert queue(simulator) == ([], [])
    assert history(simulator, prompt_id) is None


def test_repaired_servers_have_no_client_id_trap(simulator: Simulator) -> None:
    """With ``client_id_trap`` off, the end of an old socket leaves the new one of the same id alone."""
    simulator.faults(client_id_trap=False)
    old, new = listen(simulator), listen(simulator)
    assert new.wait_for(1, lambda _m: True)
    old.close()
    time.sleep(0.1)

    submit(simulator, client_id="a")

    assert new.wait_for(1, is_message("execution_success"))
    new.close()


def test_repaired_servers_drop_a_socket_that_does_not_read(simulator: Simulator) -> None:
    """With ``shared_send_loop`` off, the deaf socket is reset and the others hear everything."""
    simulator.faults(shared_send_loop=False)
    listener = listen(simulator)
    with socket.create_connection(("127.0.0.1", simulator.port)) as deaf:
        deaf.sendall(
            b"GET /ws?clientId=deaf HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        wait_until(lambda: simulator.server.hub.open_sockets == 2)
        noise = {
            "1": {"class_type": "SimNoise", "inputs": {"width": 1500, "height": 1500, "batch": 3}},
            "2": {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}},
        }
        submit(simulator, prompt=noise, client_id="deaf")
        submit(simulator, client_id="a")

        assert listener.wait_for(1, is_message("execution_success"))
    listener.close()


def test_the_log_tells_what_was_rendered(simulator: Simulator, tmp_path: Path) -> None:
    """Submitted, started, finished with the files; interrupted; deleted: each with ids, in file and route."""
    done, cut, gone = submit(simulator, client_id="a"), submit(simulator, 5.0), submit(simulator, 5.0)
    wait_until(lambda: queue(simulator)[0] == [cut])
    requests.post(f"{simulator.url}/queue", json={"delete": [gone]}, timeout=10)
    requests.post(f"{simulator.url}/interrupt", json={"prompt_id": cut}, timeout=10)
    wait_until(lambda: history(simulator, cut))

    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    served = requests.get(f"{simulator.url}/simulator/log", timeout=10).text.splitlines()

    assert lines == served
    story: dict[str, list[str]] = {}
    for entry in map(json.loads, lines[1:]):
        assert entry["server"] == "gpu1"
        if entry["event"] != "read":  # our own looks at the history
            story.setdefault(entry["prompt_id"], []).append(entry["event"])
    assert story == {
        done: ["submitted", "started", "finished"],
        cut: ["submitted", "started", "interrupted"],
        gone: ["submitted", "deleted"],
    }
    finished = next(json.loads(line) for line in lines if '"finished"' in line)
    assert (finished["status"], finished["client_id"]) == ("success", "a")
    assert [Path(file).parts[0] for file in finished["files"]] == ["temp"]


def test_many_prompts_leave_nothing_behind(simulator: Simulator) -> None:
    """Hundreds of prompts, some with sockets that come and go: all end, and fast."""
    begin = time.monotonic()
    for round_number in range(10):
        listener = listen(simulator, f"c{round_number}")
        ids = [submit(simulator, client_id=f"c{round_number}") for _ in range(20)]
        if round_number % 2:
            simulator.faults(drop_sockets=True)
        wait_until(partial(history, simulator, ids[-1]))
        listener.close()

    assert time.monotonic() - begin < 20
    wait_until(lambda: simulator.server.hub.open_sockets == 0)
    assert queue(simulator) == ([], [])
