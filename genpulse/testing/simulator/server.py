"""
The HTTP side: every route of ComfyUI that a client of workflows uses, with its exact answers.

Handlers follow the original's code line by line where its oddities matter: what is not caught there is not
caught here, so wrong JSON types become the same plain 500. Each route exists twice, with and without
``/api``. ``/simulator/...`` is ours: faults and the execution log.

Source: ComfyUI 0.3.64 ``server.py``; traces 04, 05, 08, 09, 15 to 17, 22 to 25, 33. The profile ``newer``
adds what ``PROTOCOL`` section 11 tells of versions after 0.38.
"""

# Paths are joined and compared as text, and on the event loop, because the original does.
# ruff: noqa: PTH100, PTH113, PTH118, PTH119, PTH122, ASYNC240

from __future__ import annotations

import asyncio
import io
import json
import logging
import mimetypes
import os
import platform
import time
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from aiohttp import web
from PIL import Image

from genpulse.testing.simulator.engine import Engine
from genpulse.testing.simulator.faults import Faults, UnknownFault
from genpulse.testing.simulator.files import Directories
from genpulse.testing.simulator.hub import Hub
from genpulse.testing.simulator.jobs import JobsApi
from genpulse.testing.simulator.journal import Journal
from genpulse.testing.simulator.nodes import NODES
from genpulse.testing.simulator.prompts import PromptQueue
from genpulse.testing.simulator.validation import validate_prompt

__all__ = ["Profile", "Server"]

Profile = Literal["0.3.64", "newer"]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_UPLOAD_LIMIT_BYTES = 100 * 1024 * 1024
_MODEL_FOLDERS = ["checkpoints", "configs", "loras", "vae", "text_encoders", "diffusion_models", "embeddings"]
_DOWNLOADED = {"text/html", "text/html-sandboxed", "application/xhtml+xml", "text/javascript", "text/css"}
_DOWNLOADED_NEWER = _DOWNLOADED | {"image/svg+xml", "application/xml", "text/xml"}
_CONTENT_TYPES = {
    # The recorded server's; the table of the operating system may lack or differ in these.
    ".webp": "image/webp",
    ".flac": "audio/flac",
    ".opus": "audio/ogg",
    ".mp3": "audio/mpeg",
    ".webm": "video/webm",
    ".mp4": "video/mp4",
    ".js": "text/javascript",
}
_PAGE = """<!doctype html><title>ComfyUI simulator</title>
<p>This is GenPulse's ComfyUI <em>simulator</em>, not ComfyUI. It speaks the same protocol and draws
pictures that say so. <a href="/queue">queue</a> <a href="/history?max_items=20">history</a>
<a href="/simulator/faults">faults</a> <a href="/simulator/log">log</a></p>
"""


class Server:
    """
    One simulated ComfyUI from start to stop; what is left afterwards are files.

    *on_exit* is called, from any thread, when the simulated process dies: by a fault, or by a body that
    kills the real one. The command line then really ends the process.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        journal: Journal,
        faults: Faults,
        on_exit: Callable[[int], None],
        profile: Profile = "0.3.64",
        step_s: float = 0.05,
        previews: bool = True,
        cache: str = "",
        upload_limit_bytes: int = _UPLOAD_LIMIT_BYTES,
    ) -> None:
        self.faults = faults
        self.journal = journal
        self.newer = profile == "newer"
        self.upload_limit_bytes = upload_limit_bytes
        self.files = Directories(data_dir)
        self.queue = PromptQueue(self._queue_changed)
        self.hub = Hub(faults, features=self.features(), queue_info=self._queue_info, crash=self._crash)
        self.engine = Engine(
            self.files,
            self.hub,
            self.queue,
            journal,
            faults,
            step_s=step_s,
            previews=previews,
            cache=cache or ("lru" if self.newer else "last"),
            at_event=self._at_event,
        )
        self._on_exit = on_exit
        self._dead = False
        self._number = 0
        self._runner: web.AppRunner | None = None
        journal.listener = self._at_event

    async def start(self, host: str, port: int) -> int:
        """
        Listen and begin to work.

        Returns:
            The port, which matters when 0 was asked for.

        Raises:
            OSError: The address is taken.
        """
        logger = logging.getLogger("genpulse.testing.simulator.http")
        logger.disabled = True  # the tracebacks of expected 500s help nobody
        self._runner = web.AppRunner(
            self._app(), access_log=None, logger=logger, shutdown_timeout=0.05, keepalive_timeout=3630
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, reuse_address=True, backlog=512)
        await site.start()
        self.hub.start()
        self.engine.start()
        self.journal.add("boot", profile="newer" if self.newer else "0.3.64", pid=os.getpid())
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """End as abruptly as a killed process: connections are reset, work is dropped."""
        self.journal.listener = None
        self.hub.stop()
        runner, self._runner = self._runner, None
        if runner is not None:
            for site in list(runner.sites):
                await site.stop()
            if runner.server is not None:
                for connection in list(runner.server.connections):
                    transport = connection.transport
                    if isinstance(transport, asyncio.Transport):
                        transport.abort()
        await asyncio.get_running_loop().run_in_executor(None, self.engine.kill)
        if runner is not None:
            await runner.cleanup()

    def features(self) -> dict[str, Any]:
        """What ``GET /features`` and the answer to ``feature_flags`` tell."""
        found: dict[str, Any] = {
            "supports_preview_metadata": True,
            "max_upload_size": self.upload_limit_bytes,
        }
        if self.newer:
            found |= {"supports_model_type_tags": True, "node_replacements": True, "assets": False}
        return found

    # -- wiring ----------------------------------------------------------------------------------

    def _app(self) -> web.Application:
        app = web.Application(
            client_max_size=self.upload_limit_bytes, middlewares=[self._fault_middleware, _origin_middleware]
        )
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "/ws", self._open_socket),
            ("GET", "/prompt", self._get_prompt),
            ("POST", "/prompt", self._post_prompt),
            ("GET", "/queue", self._get_queue),
            ("POST", "/queue", self._post_queue),
            ("POST", "/interrupt", self._post_interrupt),
            ("GET", "/history", self._get_history),
            ("POST", "/history", self._post_history),
            ("GET", "/history/{prompt_id}", self._get_history_of),
            ("POST", "/free", self._post_free),
            ("GET", "/view", self._get_view),
            ("POST", "/upload/image", self._post_upload_image),
            ("POST", "/upload/mask", self._post_upload_mask),
            ("GET", "/object_info", self._get_object_info),
            ("GET", "/object_info/{class_type}", self._get_object_info),
            ("GET", "/system_stats", self._get_system_stats),
            ("GET", "/features", self._get_features),
            ("GET", "/models", self._get_models),
            ("GET", "/models/{folder}", self._get_models_in),
            ("GET", "/embeddings", self._get_empty_list),
            ("GET", "/extensions", self._get_empty_list),
            ("GET", "/users", self._get_users),
            ("GET", "/settings", self._get_empty_dict),
            ("GET", "/workflow_templates", self._get_empty_dict),
            ("GET", "/i18n", self._get_empty_dict),
            ("GET", "/view_metadata/{folder}", _not_found),
        ]
        for method, path, handler in routes:
            app.router.add_route(method, path, handler)
            app.router.add_route(method, f"/api{path}", handler)
            if method == "GET" and path != "/ws":
                app.router.add_route("HEAD", path, handler)
                app.router.add_route("HEAD", f"/api{path}", handler)
        if self.newer:
            jobs = JobsApi(self.queue, self.journal, self.engine.interrupt)
            app.router.add_get("/api/jobs", jobs.list)
            app.router.add_get("/api/jobs/{job_id}", jobs.get)
            app.router.add_post("/api/jobs/cancel", jobs.cancel_many)
            app.router.add_post("/api/jobs/{job_id}/cancel", jobs.cancel)
        app.router.add_get("/simulator/faults", self._get_faults)
        app.router.add_post("/simulator/faults", self._post_faults)
        app.router.add_get("/simulator/log", self._get_log)
        app.router.add_get("/", self._get_page)
        # The real server looks for static files last, so an unknown path is 404 for GET and 405 otherwise.
        app.router.add_get("/{path:.*}", _no_such_file)
        return app

    @web.middleware
    async def _fault_middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        path = request.path.removeprefix("/api")
        if path.startswith("/simulator/"):
            return await handler(request)
        if self.faults.slow_http_ms > 0 and self.faults.concerns(path):
            await asyncio.sleep(self.faults.slow_http_ms / 1000)
        status = self.faults.refusal(path)
        if status:
            raise web.HTTPInternalServerError if status == 500 else _status_error(status)
        response = await handler(request)
        if self._dead:
            _reset(request)
        if request.method == "POST" and path == "/prompt" and self.faults.take("lose_answers_next"):
            _reset(request)
        return response

    def _queue_info(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": self.queue.remaining()}}

    def _queue_changed(self) -> None:
        self.hub.post("status", {"status": self._queue_info()})

    def _at_event(self, event: str) -> None:
        if self.faults.exit_at == event:
            self._crash(1)

    def _crash(self, code: int) -> None:
        self._dead = True  # where this is a thread, nothing may be answered any more
        self.faults.exit_at = ""
        self.journal.listener = None
        self.journal.add("exit", code=code)
        self._on_exit(code)

    # -- prompts ---------------------------------------------------------------------------------

    async def _open_socket(self, request: web.Request) -> web.StreamResponse:
        if client_id := request.rel_url.query.get("clientId"):
            self.journal.add("listening", client_id=client_id)
        return await self.hub.handle(request)

    async def _get_prompt(self, _request: web.Request) -> web.Response:
        return web.json_response(self._queue_info())

    async def _post_prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "number" in body:
            number = float(body["number"])
        else:
            number = self._number
            if body.get("front") if isinstance(body, dict) else "front" in body:
                number = -number
            self._number += 1
        if "prompt" not in body:
            error = {
                "type": "no_prompt",
                "message": "No prompt provided",
                "details": "No prompt provided",
                "extra_info": {},
            }
            return web.json_response({"error": error, "node_errors": {}}, status=400)
        prompt = body["prompt"]
        prompt_id = str(body.get("prompt_id", uuid.uuid4()))
        if self.newer:
            given = body.get("prompt_id")
            prompt_id = str(uuid.uuid4()) if given is None else given
            if not _is_canonical_uuid(prompt_id):
                return _invalid_prompt_id(prompt_id)
        targets = body.get("partial_execution_targets")
        verdict = validate_prompt(prompt, self.files, targets, newer=self.newer)
        extra_data: Any = body.get("extra_data", {})
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        if self.newer:
            extra_data["create_time"] = int(time.time() * 1000)
        if verdict.error is not None:
            return web.json_response({"error": verdict.error, "node_errors": verdict.node_errors}, status=400)
        client_id = extra_data.get("client_id") if isinstance(extra_data, dict) else None
        self.journal.add("submitted", prompt_id, client_id, number=number, seeds=_seeds(prompt))
        if self.faults.take("lose_prompt_next"):
            self.journal.add("lost", prompt_id, client_id)
        else:
            self.queue.put((number, prompt_id, prompt, extra_data, verdict.outputs))
        return web.json_response(
            {"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors}
        )

    async def _get_queue(self, _request: web.Request) -> web.Response:
        running, pending = self.queue.listing()
        if self.newer:
            running, pending = [_without_secrets(i) for i in running], [_without_secrets(i) for i in pending]
        return web.json_response({"queue_running": running, "queue_pending": pending})

    async def _post_queue(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "clear" in body and body["clear"]:  # noqa: RUF019  a list as body is fine, only an object is looked into
            for item in self.queue.clear():
                self._log_deleted(item)
        if "delete" in body:
            for prompt_id in body["delete"]:
                gone = self.queue.delete(prompt_id)
                if gone is not None:
                    self._log_deleted(gone)
        return web.Response(status=200)

    def _log_deleted(self, item: Any) -> None:
        extra_data = item[3] if isinstance(item[3], dict) else {}
        self.journal.add("deleted", item[1], extra_data.get("client_id"))

    async def _post_interrupt(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except json.JSONDecodeError:
            body = {}  # and so a broken body interrupts whatever runs [trace 08]
        prompt_id = body.get("prompt_id")
        if (not prompt_id or prompt_id in self.queue.running_ids()) and not self.faults.take(
            "interrupt_lost_next"
        ):
            self.engine.interrupt()
        return web.Response(status=200)

    async def _post_free(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("unload_models", False):
            self.queue.set_flag("unload_models", True)
        if body.get("free_memory", False):
            self.queue.set_flag("free_memory", True)
        return web.Response(status=200)

    async def _get_history(self, request: web.Request) -> web.Response:
        query = request.rel_url.query
        max_items = int(query["max_items"]) if "max_items" in query else None
        offset = int(query["offset"]) if "offset" in query else -1
        return web.json_response(self.queue.history(max_items=max_items, offset=offset))

    async def _get_history_of(self, request: web.Request) -> web.Response:
        prompt_id = request.match_info["prompt_id"]
        found = self.queue.history(prompt_id)
        if found:
            self.journal.add("read", prompt_id)
        return web.json_response(found)

    async def _post_history(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "clear" in body and body["clear"]:  # noqa: RUF019  as above
            self.queue.clear_history()
        if "delete" in body:
            for prompt_id in body["delete"]:
                self.queue.delete_history(prompt_id)
        return web.Response(status=200)

    # -- files -----------------------------------------------------------------------------------

    async def _post_upload_image(self, request: web.Request) -> web.Response:
        return self._upload(await request.post(), None)

    async def _post_upload_mask(self, request: web.Request) -> web.Response:
        post = await request.post()
        original = json.loads(str(post["original_ref"])) if _file_in(post) is not None else {}
        return self._upload(post, original)

    def _upload(self, post: Any, mask_of: dict[str, Any] | None) -> web.Response:
        """Store an upload; with *mask_of* its alpha channel is put into that image instead [trace 16]."""
        image = _file_in(post)
        kind = post.get("type", "input")
        if image is None or not image.filename:
            return web.Response(status=400)
        name, subfolder, overwrite = image.filename, post.get("subfolder", ""), post.get("overwrite")
        places = self.files.upload_path(kind, subfolder, name)
        if places is None:
            return web.Response(status=400)
        folder, path = places
        folder.mkdir(parents=True, exist_ok=True)
        stored = False
        if overwrite not in ("true", "1"):
            name, stored = self.files.free_name(folder, name, image.file)
            if name != image.filename:
                path = folder / name
        if not stored:
            if mask_of is None:
                path.write_bytes(image.file.read())
            else:
                self._apply_mask(image.file.read(), mask_of, path)
        return web.json_response({"name": name, "subfolder": subfolder, "type": kind})

    def _apply_mask(self, mask: bytes, original: dict[str, Any], path: Path) -> None:
        name, directory = self.files.annotated(original["filename"])
        if name[:1] == "/" or ".." in name:
            return
        directory = directory or self.files.by_type(original.get("type", "output"))
        if directory is None:
            return
        source = directory / original.get("subfolder", "") / os.path.basename(name)
        if not source.resolve().is_relative_to(directory) or not source.is_file():
            return
        with Image.open(source) as opened, Image.open(io.BytesIO(mask)) as drawn:
            picture = opened.convert("RGBA")
            picture.putalpha(drawn.getchannel("A"))
        picture.save(path, compress_level=4)

    async def _get_view(self, request: web.Request) -> web.StreamResponse:
        query = request.rel_url.query
        if "filename" not in query:
            return web.Response(status=404)
        if not query["filename"]:
            return web.Response(status=400)
        name, directory = self.files.annotated(query["filename"])
        if name[:1] == "/" or ".." in name:
            return web.Response(status=400)
        kind = query.get("type", "output")
        directory = directory or self.files.by_type(kind)
        if directory is None:
            return web.Response(status=400)
        folder = str(directory)
        if "subfolder" in query:
            folder = os.path.join(folder, query["subfolder"])
            if os.path.commonpath((os.path.abspath(folder), str(directory))) != str(directory):
                return web.Response(status=403)
        name = os.path.basename(name)
        file = os.path.join(folder, name)
        if not os.path.isfile(file) or (self.faults.lose_outputs and directory == self.files.output):
            return web.Response(status=404)
        headers = {"Content-Disposition": f'filename="{name}"'}
        if "preview" in query:
            body, content_type = _preview(file, query["preview"], query.get("channel", ""))
            return web.Response(body=body, content_type=content_type, headers=headers)
        if query.get("channel") in ("rgb", "a"):
            return web.Response(
                body=_channel(file, query["channel"]), content_type="image/png", headers=headers
            )
        if self.faults.take("cut_view_next"):
            return await _cut_off(request, file)
        headers["Content-Type"] = self._content_type(name)
        if self.newer and headers["Content-Type"] == "application/octet-stream":
            headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return web.FileResponse(file, headers=headers)

    def _content_type(self, name: str) -> str:
        extension = os.path.splitext(name)[1].lower()
        found = _CONTENT_TYPES.get(extension) or mimetypes.guess_type(name)[0] or "application/octet-stream"
        dangerous = _DOWNLOADED_NEWER if self.newer else _DOWNLOADED
        return "application/octet-stream" if found in dangerous else found

    # -- descriptions ----------------------------------------------------------------------------

    async def _get_object_info(self, request: web.Request) -> web.Response:
        wanted = request.match_info.get("class_type")
        names = list(NODES) if wanted is None else [wanted] if wanted in NODES else []
        return web.json_response({name: NODES[name].object_info(self.files) for name in names})

    async def _get_system_stats(self, _request: web.Request) -> web.Response:
        memory = 16 * 1024**3
        system = {
            "os": "posix",
            "ram_total": memory,
            "ram_free": memory // 2,
            "comfyui_version": "0.38.1" if self.newer else "0.3.64",
            "required_frontend_version": "1.27.10",
            "installed_templates_version": None,
            "required_templates_version": "0.1.95",
            "python_version": platform.python_version(),
            "pytorch_version": "simulated",
            "embedded_python": False,
            "argv": ["main.py", "--cpu"],
        }
        device = {
            "name": "cpu",
            "type": "cpu",
            "index": None,
            "vram_total": memory,
            "vram_free": memory // 2,
            "torch_vram_total": memory,
            "torch_vram_free": memory // 2,
        }
        return web.json_response({"system": system, "devices": [device]})

    async def _get_features(self, _request: web.Request) -> web.Response:
        return web.json_response(self.features())

    async def _get_models(self, _request: web.Request) -> web.Response:
        return web.json_response(_MODEL_FOLDERS)

    async def _get_models_in(self, request: web.Request) -> web.Response:
        if request.match_info["folder"] not in _MODEL_FOLDERS:
            return web.Response(status=404)
        return web.json_response([])

    async def _get_empty_list(self, _request: web.Request) -> web.Response:
        return web.json_response([])

    async def _get_empty_dict(self, _request: web.Request) -> web.Response:
        return web.json_response({})

    async def _get_users(self, _request: web.Request) -> web.Response:
        return web.json_response({"storage": "server", "migrated": True})

    async def _get_page(self, _request: web.Request) -> web.Response:
        return web.Response(text=_PAGE, content_type="text/html")

    # -- control ---------------------------------------------------------------------------------

    async def _get_faults(self, _request: web.Request) -> web.Response:
        return web.json_response(self.faults.as_dict())

    async def _post_faults(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
            if not isinstance(body, dict):
                raise UnknownFault("the body must be a JSON object")
            self.apply_faults(body)
        except ValueError as exc:  # UnknownFault is one, and so is bad JSON
            return web.json_response({"error": str(exc)}, status=400)
        return web.json_response(self.faults.as_dict())

    def apply_faults(self, changes: dict[str, Any]) -> None:
        """
        Switch faults and carry out actions; inside the event loop.

        Raises:
            UnknownFault: See ``Faults.change``.
        """
        actions = self.faults.change(changes)
        if actions.get("drop_sockets"):
            self.hub.drop_all()
        if "exit" in actions:
            self._crash(int(actions["exit"]))

    async def _get_log(self, _request: web.Request) -> web.Response:
        lines = "".join(json.dumps(entry, default=str) + "\n" for entry in self.journal.entries())
        return web.Response(text=lines, content_type="application/x-ndjson")


@web.middleware
async def _origin_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse pages of other origins on loopback, as ComfyUI does [trace 04]."""
    origin = request.headers.get("Origin")
    host = request.headers.get("Host")
    if origin and host:
        parsed = urllib.parse.urlsplit(origin)
        target = urllib.parse.urlsplit(f"//{host.lower()}")
        theirs, ours = parsed.netloc.lower(), host.lower()
        if parsed.port is None:
            ours = target.hostname or ""
        if target.port is None:
            theirs = parsed.hostname or ""
        loopback = target.hostname in ("localhost", "::1") or (target.hostname or "").startswith("127.")
        if loopback and ours and theirs and ours != theirs:
            return web.Response(status=403)
    return await handler(request)


async def _not_found(_request: web.Request) -> web.Response:
    return web.Response(status=404)


async def _no_such_file(_request: web.Request) -> web.Response:
    return web.Response(status=404, content_type="application/octet-stream")


def _status_error(status: int) -> web.HTTPException:
    class Refused(web.HTTPException):
        status_code = status

    return Refused(text=f"{status}: refused by the simulator")


def _reset(request: web.Request) -> None:
    transport = request.transport
    if isinstance(transport, asyncio.Transport):
        transport.abort()


async def _cut_off(request: web.Request, file: str) -> web.StreamResponse:
    """Announce the whole file, send half of it and reset the connection."""
    content = Path(file).read_bytes()
    response = web.StreamResponse(headers={"Content-Length": str(len(content))})
    await response.prepare(request)
    with suppress(ConnectionError):
        await response.write(content[: len(content) // 2])
        await asyncio.sleep(0.05)
    _reset(request)
    return response


def _file_in(post: Any) -> web.FileField | None:
    image = post.get("image")
    if image is None or (isinstance(image, str) and not image):
        return None
    if not isinstance(image, web.FileField):
        raise TypeError("image is no file")  # a text field: 500 as in the original [trace 15]
    return image


def _preview(file: str, wanted: str, channel: str) -> tuple[bytes, str]:
    parts = wanted.split(";")
    kind = parts[0] if parts[0] in ("webp", "jpeg") and "a" not in channel else "webp"
    quality = int(parts[-1]) if parts[-1].isdigit() else 90
    buffer = io.BytesIO()
    with Image.open(file) as image:
        shown = image.convert("RGB") if kind == "jpeg" or channel == "rgb" else image
        shown.save(buffer, format=kind, quality=quality)
    return buffer.getvalue(), f"image/{kind}"


def _channel(file: str, channel: str) -> bytes:
    buffer = io.BytesIO()
    with Image.open(file) as image:
        if channel == "rgb":
            image.convert("RGB").save(buffer, format="PNG")
        else:
            alpha = image.getchannel("A") if image.mode == "RGBA" else Image.new("L", image.size, 255)
            picture = Image.new("RGBA", image.size)
            picture.putalpha(alpha)
            picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _seeds(prompt: Any) -> list[Any]:
    """What tells for whom a prompt is, whatever its id: the literal seeds in it."""
    inputs = [node["inputs"] for node in prompt.values() if isinstance(node.get("inputs"), dict)]
    return [each["seed"] for each in inputs if isinstance(each.get("seed"), int)]


def _is_canonical_uuid(value: Any) -> bool:
    try:
        return isinstance(value, str) and str(uuid.UUID(value)) == value
    except ValueError:
        return False


def _invalid_prompt_id(value: Any) -> web.Response:
    error = {
        "type": "invalid_prompt_id",
        "message": "prompt_id must be a valid UUID",
        "details": f"{value!r} is not a canonical UUID",
        "extra_info": {},
    }
    return web.json_response({"error": error, "node_errors": {}}, status=400)


def _without_secrets(item: Any) -> Any:
    hidden = ("auth_token_comfy_org", "api_key_comfy_org")
    return (*item[:3], {key: value for key, value in item[3].items() if key not in hidden}, item[4])
