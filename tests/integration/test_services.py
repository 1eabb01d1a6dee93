"""The embedded services: they start, they die with their owner, and what is killed can come back."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genpulse.testing.services import (
    FaultProxy,
    Postgres,
    S3Server,
    Service,
    ServiceError,
    accepts_connections,
    free_port,
    start_postgres,
    start_process,
    start_python,
    start_valkey,
)
from tests.support import wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ECHO = """
import contextlib, socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    connection, _ = server.accept()
    with connection, contextlib.suppress(OSError):
        while said := connection.recv(99):
            connection.sendall(said)
"""


def is_running(pid: int) -> bool:
    """Whether a process exists (a zombie does not count)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Service]:
    """A durable Valkey that this test may kill."""
    with start_valkey(tmp_path / "valkey", append_only=True) as server:
        yield server


def ping(url: str, *words: str, timeout_s: float = 2.0) -> bytes:
    """Send one inline command to a Redis-protocol server; return its first answer."""
    port = int(url.rsplit(":", 1)[1].split("/", maxsplit=1)[0])
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        connection.settimeout(timeout_s)
        connection.sendall(" ".join(words or ("PING",)).encode() + b"\r\n")
        return connection.recv(4096)


def test_killing_the_owner_leaves_no_orphan(tmp_path: Path) -> None:
    """Kill -9 of the owner ends the service and what the service itself started, in any session."""
    owner = tmp_path / "owner.py"
    owner.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from genpulse.testing.services import start_python, start_valkey\n"
        "here = Path(sys.argv[1])\n"
        'child = \'import subprocess,sys,time; p=subprocess.Popen([sys.executable,"-c","import time;\'\\\n'
        '    \'time.sleep(99)"],start_new_session=True); open("grandchild","w").write(str(p.pid)); time.sleep(99)\'\n'
        "one = start_valkey(here / 'v')\n"
        "two = start_python(['-c', child], here / 'p')\n"
        "print(one.pid, two.pid, flush=True)\n"
        "time.sleep(99)\n"
    )
    process = subprocess.Popen([sys.executable, str(owner), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        note = tmp_path / "p" / "grandchild"
        pids.append(int(wait_until(lambda: note.read_text() if note.exists() else "")))
        assert all(is_running(pid) for pid in pids)

        process.kill()
        wait_until(lambda: not any(is_running(pid) for pid in pids), 8, message="no orphan is left")


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_killing_the_watchdog_kills_the_service(own_valkey: Service) -> None:
    """Not even the watchdog's own death leaves an orphan."""
    pid = own_valkey.pid
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    os.kill(parent, signal.SIGKILL)

    wait_until(lambda: not is_running(pid))
    assert not own_valkey.alive()


def test_a_fork_of_the_owner_does_not_keep_the_service_alive(own_valkey: Service) -> None:
    """A forked pool worker holds no pipe of the watchdog, so a stop does not wait for it."""
    fork = os.fork()
    if fork == 0:
        time.sleep(30)
        os._exit(0)
    try:
        started = time.monotonic()
        own_valkey.stop()
        assert time.monotonic() - started < 5
    finally:
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)


def test_restart_after_a_kill_keeps_port_and_data(own_valkey: Service) -> None:
    """With the append-only file a killed Valkey comes back on its port with what it was told."""
    url, port, first = own_valkey.url, own_valkey.port, own_valkey.pid
    assert ping(url, "SET", "k", "v") == b"+OK\r\n"
    time.sleep(1.2)  # the file is synced each second: that is the promise of everysec

    own_valkey.kill()
    assert not own_valkey.alive()
    assert own_valkey.exit_code == -signal.SIGKILL
    own_valkey.restart()

    assert own_valkey.port == port
    assert own_valkey.pid != first
    assert ping(url, "GET", "k") == b"$1\r\nv\r\n"


def test_a_frozen_service_is_silent_and_goes_on_after_the_thaw(own_valkey: Service) -> None:
    """freeze() stops the clock of a service without ending it."""
    own_valkey.freeze()
    with pytest.raises(TimeoutError):
        ping(own_valkey.url, timeout_s=0.3)
    assert own_valkey.alive()

    own_valkey.thaw()

    assert ping(own_valkey.url) == b"+PONG\r\n"


def test_a_frozen_service_can_be_stopped(own_valkey: Service) -> None:
    """A stop thaws first, so a test that fails while frozen leaves nothing behind."""
    own_valkey.freeze()
    started = time.monotonic()

    own_valkey.stop()

    assert not is_running(own_valkey.pid)
    assert time.monotonic() - started < 5


def test_a_service_that_ignores_its_stop_signal_is_killed(tmp_path: Path) -> None:
    """After the grace nothing is asked any more."""
    deaf = "import signal,time; signal.signal(15,signal.SIG_IGN); print('deaf',flush=True); time.sleep(99)"
    service = start_python(["-c", deaf], tmp_path, grace_s=0.5)
    wait_until(lambda: "deaf" in service.log_text())

    service.stop()

    assert not is_running(service.pid)


def test_children_of_a_killed_service_live_until_the_stop(tmp_path: Path) -> None:
    """kill() is a crash of one process: what it started runs on, and the stop clears it away."""
    script = "sleep 77 & echo $! > child; wait"
    service = start_process("shell", ["/bin/sh", "-c", script], tmp_path)
    note = tmp_path / "child"
    child = int(wait_until(lambda: note.read_text().strip() if note.exists() else ""))

    service.kill()
    assert not service.alive()
    assert is_running(child)
    service.stop()

    assert not is_running(child)


def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    """The end of the log is in the error, so nobody has to look for it."""
    with pytest.raises(ServiceError, match="no such thing"):
        start_python(
            ["-c", "raise SystemExit('no such thing')"], tmp_path, probe=accepts_connections(free_port())
        )
    with pytest.raises(ServiceError, match="cannot start"):
        start_process("ghost", [tmp_path / "nothing-here"], tmp_path)


def test_postgres_serves_a_new_database_to_each_who_asks(postgres: Postgres) -> None:
    """create_database gives an empty database, and drop_database takes it even from its users."""
    import psycopg2

    one, two = postgres.create_database(), postgres.create_database()
    assert one != two
    connection = psycopg2.connect(one)
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE t (x int)")

    postgres.drop_database(one)
    postgres.drop_database(two)

    connection.close()
    with pytest.raises(psycopg2.OperationalError, match="does not exist"):
        psycopg2.connect(one)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to drop")
def test_postgres_does_not_run_as_root(postgres: Postgres) -> None:
    """Started by root, the server is nobody's."""
    import pwd

    assert Path(f"/proc/{postgres.pid}").stat().st_uid == pwd.getpwnam("nobody").pw_uid


def test_postgres_comes_back_after_a_kill_with_its_data(tmp_path: Path) -> None:
    """Kill -9 of the server loses nothing that was committed."""
    import psycopg2

    with start_postgres(tmp_path / "postgres", fsync=False) as server:
        url = server.create_database()
        with (
            contextlib.closing(psycopg2.connect(url)) as connection,
            connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("CREATE TABLE t AS SELECT 42 AS x")

        server.kill()
        server.restart()

        with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT x FROM t")
            assert cursor.fetchone() == (42,)


def test_postgres_needs_no_home(tmp_path: Path) -> None:
    """A service user has no home directory; the server starts all the same."""
    code = (
        "import sys; from pathlib import Path; from genpulse.testing.services import start_postgres\n"
        "with start_postgres(Path(sys.argv[1])) as server: print(server.create_database())"
    )
    environ = {key: value for key, value in os.environ.items() if key != "HOME"}

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environ, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("postgresql://")


def test_the_s3_server_refuses_a_wrong_secret(s3: S3Server) -> None:
    """Its verdict on a signature is worth something: the wrong secret is refused, the right one is not."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import ClientError

    def client(secret: str) -> S3Client:
        return boto3.client(
            "s3",
            endpoint_url=s3.url,
            region_name=s3.region,
            aws_access_key_id=s3.credentials.access_key_id,
            aws_secret_access_key=secret,
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )

    right, wrong = client(s3.credentials.secret_access_key), client("something else")
    right.put_object(Bucket=s3.bucket, Key="a", Body=b"x")
    with pytest.raises(ClientError, match="Signature"):
        wrong.put_object(Bucket=s3.bucket, Key="a", Body=b"x")


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[int]:
    """The port of a server that says back what it hears."""
    port = free_port()
    with start_python(["-c", ECHO, str(port)], tmp_path / "echo", probe=accepts_connections(port)):
        yield port


def test_a_proxy_passes_delays_and_holds_bytes(echo: int, fault_proxy: Callable[[str], FaultProxy]) -> None:
    """pass, delay and blackhole: the bytes arrive at once, later, and only when the hole is closed."""
    proxy = fault_proxy(f"127.0.0.1:{echo}")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as connection:
        connection.sendall(b"one")
        assert connection.recv(9) == b"one"

        proxy.set_mode("delay", delay_s=0.2)
        started = time.monotonic()
        connection.sendall(b"two")
        assert connection.recv(9) == b"two"
        assert time.monotonic() - started >= 0.35  # there and back

        proxy.set_mode("blackhole")
        connection.sendall(b"three")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(9)
        proxy.set_mode("pass")
        connection.settimeout(5)
        assert connection.recv(9) == b"three"


def test_a_proxy_refuses_and_resets(echo: int, fault_proxy: Callable[[str], FaultProxy]) -> None:
    """Refuse is what a dead process looks like, reset a broken one; both cut what is open."""
    proxy = fault_proxy(f"127.0.0.1:{echo}")
    address = ("127.0.0.1", proxy.port)
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(b"one")
        assert connection.recv(9) == b"one"
        proxy.set_mode("refuse")
        with pytest.raises(ConnectionResetError):
            connection.recv(9)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)

    proxy.set_mode("reset")
    with pytest.raises(ConnectionError), socket.create_connection(address, timeout=5) as connection:
        connection.recv(9)

    proxy.set_mode("lose")
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(b"heard, and never answered")
        with pytest.raises(ConnectionError):
            connection.recv(9)

    proxy.set_mode("pass")
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(b"two")
        assert connection.recv(9) == b"two"


def test_a_proxy_takes_the_place_of_an_address(
    own_valkey: Service, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """url_of keeps all of a URL but the address."""
    proxy = fault_proxy(own_valkey.url)

    assert (
        proxy.url_of("redis://user:secret@127.0.0.1:1/0") == f"redis://user:secret@127.0.0.1:{proxy.port}/0"
    )
    assert ping(proxy.url_of(own_valkey.url)) == b"+PONG\r\n"
