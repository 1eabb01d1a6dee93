"""
Two ways to run a simulated server: as this process until it is killed, or in a thread of a test.

Both forget everything but files when they end, because that is what the real one does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from genpulse.testing.simulator.faults import Faults
from genpulse.testing.simulator.journal import Journal
from genpulse.testing.simulator.server import Profile, Server

__all__ = ["Simulator", "run"]

_START_S = 10.0


def run(
    host: str = "127.0.0.1",
    port: int = 8188,
    *,
    data_dir: Path,
    profile: Profile = "0.3.64",
    log_path: Path | None = None,
    name: str = "",
    step_s: float = 0.05,
    previews: bool = True,
    cache: str = "",
) -> None:
    """
    Serve until a signal ends the process; prints one line with the address when ready.

    SIGTERM and SIGINT end it at once and without a farewell: like the real server, it drains nothing
    [trace 27]. Faults that crash it end the process with their code.

    Raises:
        OSError: The address is taken.
    """

    async def serve() -> None:
        journal = Journal(log_path, server=name)
        server = Server(
            data_dir,
            journal=journal,
            faults=Faults(),
            on_exit=os._exit,
            profile=profile,
            step_s=step_s,
            previews=previews,
            cache=cache,
        )
        actual = await server.start(host, port)
        print(f"simulator ready at http://{host}:{actual}", flush=True)  # noqa: T201  the promised line
        await asyncio.Event().wait()

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    asyncio.run(serve())


class Simulator:
    """
    A simulated server in a thread of its own, for tests.

    ``stop`` and ``restart`` are as abrupt as a kill: connections are reset, and only files, the log and the
    port stay. Faults survive a restart only if set again.

    Args:
        data_dir: Where ``input``, ``output`` and ``temp`` are made.
        log_path: Also append the execution log to this file.
        name: Written into each entry of the log.
        cache: ``last``, ``lru`` or ``none``; by default as the profile has it.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        profile: Profile = "0.3.64",
        step_s: float = 0.005,
        previews: bool = True,
        cache: str = "",
        log_path: Path | None = None,
        name: str = "",
        upload_limit_bytes: int = 100 * 1024 * 1024,
    ) -> None:
        self.data_dir = data_dir
        self.host = host
        self.port = port
        self.exit_code: int | None = None
        """The code with which the simulated process died by itself, or None."""
        self._journal = Journal(log_path, server=name)
        self._settings: dict[str, Any] = {
            "profile": profile,
            "step_s": step_s,
            "previews": previews,
            "cache": cache,
            "upload_limit_bytes": upload_limit_bytes,
        }
        self._server: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()

    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        return f"http://{self.host}:{self.port}"

    @property
    def log(self) -> list[dict[str, Any]]:
        """The execution log since this object was made, over all restarts."""
        return self._journal.entries()

    @property
    def server(self) -> Server:
        """The server itself, for tests that look inside."""
        if self._server is None:
            raise RuntimeError("the simulator is not running")
        return self._server

    def start(self) -> Self:
        """Start and wait until it listens. A port given out once is kept over restarts."""
        if self._thread is not None:
            raise RuntimeError("the simulator is running already")
        ready = threading.Event()
        errors: list[BaseException] = []
        self.exit_code = None

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._ended = asyncio.Event()
            server = Server(
                self.data_dir, journal=self._journal, faults=Faults(), on_exit=self._exited, **self._settings
            )
            try:
                self.port = await server.start(self.host, self.port)
            except BaseException as exc:  # noqa: BLE001  raised again in the thread that waits for the start
                errors.append(exc)
                ready.set()
                return
            self._server = server
            ready.set()
            await self._ended.wait()
            await server.stop()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), name="simulator", daemon=True)
        self._thread.start()
        if not ready.wait(_START_S):
            raise TimeoutError("the simulator did not start")
        if errors:
            self._thread = None
            raise errors[0]
        return self

    def faults(self, **changes: Any) -> dict[str, Any]:
        """
        Switch faults by name and tell how all of them stand.

        Raises:
            UnknownFault: See :class:`Faults`.
        """
        server, loop = self.server, self._loop
        if loop is None:
            raise RuntimeError("the simulator is not running")

        async def apply() -> None:
            server.apply_faults(changes)

        asyncio.run_coroutine_threadsafe(apply(), loop).result(_START_S)
        return server.faults.as_dict()

    def stop(self) -> None:
        """End it as a kill would; doing so twice is fine."""
        thread, loop = self._thread, self._loop
        if thread is None or loop is None:
            return
        with suppress(RuntimeError):  # it may have died by itself
            loop.call_soon_threadsafe(self._ended.set)
        thread.join(_START_S)
        self._thread = self._loop = self._server = None

    def restart(self) -> Self:
        """Stop and start again on the same port and files; queue, history and cache are gone."""
        self.stop()
        return self.start()

    def _exited(self, code: int) -> None:
        """The simulated process died: everything stops, from whatever thread this is called."""
        self.exit_code = code
        loop = self._loop
        if self._server is not None:
            self._server.engine.killed.set()
        if loop is not None:
            loop.call_soon_threadsafe(self._ended.set)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._journal.close()


def main(arguments: list[str] | None = None) -> None:
    """``python -m genpulse.testing.simulator``: see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m genpulse.testing.simulator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8188, help="0 takes a free one, told on the first line")
    parser.add_argument("--data-dir", type=Path, required=True, help="input, output and temp are made in it")
    parser.add_argument(
        "--log", type=Path, help="append the execution log to this file, one JSON object a line"
    )
    parser.add_argument("--profile", choices=["0.3.64", "newer"], default="0.3.64")
    parser.add_argument("--step-s", type=float, default=0.05, help="seconds for a sampler step")
    parser.add_argument("--name", default="", help="written into each entry of the log")
    parser.add_argument(
        "--cache", choices=["last", "lru", "none"], default="", help="default: as the profile has it"
    )
    parser.add_argument(
        "--no-previews", action="store_true", help="samplers send no pictures while they work"
    )
    options = parser.parse_args(arguments)
    try:
        run(
            options.host,
            options.port,
            data_dir=options.data_dir,
            profile=options.profile,
            log_path=options.log,
            name=options.name,
            step_s=options.step_s,
            previews=not options.no_previews,
            cache=options.cache,
        )
    except OSError as exc:
        sys.exit(f"cannot listen on {options.host}:{options.port}: {exc.strerror or exc}")
