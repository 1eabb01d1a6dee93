"""
The command line: ``genpulse start-all``, ``genpulse submit``, …

The ``start-…`` commands replace this process by the real program (gunicorn, Celery), so that
signals and exit codes are its own. What a command needs is imported inside it: ``--help`` must not
pay for a database driver. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import datetime as dt
import enum
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from genpulse import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from genpulse.client import Client
    from genpulse.config import Settings
    from genpulse.ledger import Ledger
    from genpulse.model import ApiKey

__all__ = ["Exit", "cli", "main"]


class Exit(enum.IntEnum):
    """What the shell learns; the group's help text says the same."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    TIMEOUT = 4
    REFUSED = 5
    INTERRUPTED = 130


class Failure(click.ClickException):
    """One line on standard error and an exit code."""

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(message)
        vars(self)["exit_code"] = int(code)  # click declares it as the class's


class _Group(click.Group):
    """Turns Ctrl-C into exit code 130 and the errors we expect into one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            raise click.exceptions.Exit(Exit.INTERRUPTED) from None


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Settings come from GENPULSE_… variables and a .env file; an option wins over both.",
)
@click.version_option(__version__, prog_name="genpulse")
def cli() -> None:
    """
    GenPulse: a durable task service in front of ComfyUI.

    \b
    Exit codes:
      0    it worked
      1    the task failed or was canceled, or a check found something wrong
      2    wrong usage or a wrong setting
      3    a service (API, database, broker) cannot be reached
      4    not ready in time; a task that was waited for goes on
      5    the API refused the request
      130  Ctrl-C (start-all and demo, once up, end with 0)
    """  # noqa: D301 - click's own mark, a backspace, keeps lines apart


def main() -> NoReturn:
    """The console script ``genpulse`` and ``python -m genpulse``."""
    cli(prog_name="genpulse")
    raise AssertionError  # click has left by SystemExit


# ---------------------------------------------------------------------------------------------------------------------
# The programs of a deployment


@cli.command("start-api")
@click.option("--host", help="Address to listen on; anything but loopback needs an API key.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option("--workers", type=click.IntRange(1, 64), help="API processes.")
def start_api(host: str | None, port: int | None, workers: int | None) -> None:
    """Serve the HTTP API with gunicorn; it also runs the relay and a sweeper."""
    found = settings(host=host, port=port, api_workers=workers)
    from genpulse.web.callers import reason_not_to_listen

    if reason := reason_not_to_listen(found):
        raise Failure(reason, Exit.USAGE)
    execute("gunicorn", "--config", "python:genpulse.web.gunicorn_conf", "genpulse.web:create_app()")


@cli.command("start-worker", context_settings={"ignore_unknown_options": True})
@click.option(
    "-Q", "--queues", help="Queues to serve, separated by commas.  [default: all; comfy only with a server]"
)
@click.option("-n", "--name", help="Celery node name, like gpu1@%h.")
@click.option("-c", "--concurrency", type=click.IntRange(1, 256), help="Slots.  [default: by queue]")
@click.option("--comfy", "comfy_urls", help="ComfyUI servers, name=url separated by commas.")
@click.argument("celery_options", nargs=-1, type=click.UNPROCESSED)
def start_worker(
    queues: str | None,
    name: str | None,
    concurrency: int | None,
    comfy_urls: str | None,
    celery_options: tuple[str, ...],
) -> None:
    """
    Run a Celery worker.

    The same as `celery -A genpulse worker -Q …`; what stands behind `--` is handed on to it.
    """
    found = settings(comfy_urls=comfy_urls)
    if queues is None:
        queues = ",".join(served_queues(found))
    options = ["-Q", queues, "--loglevel", found.log_level, "--without-gossip", "--without-mingle"]
    if name:
        options += ["-n", name]
    if concurrency:
        options += ["-c", str(concurrency)]
    execute("celery", "-A", "genpulse", "worker", *options, *celery_options)


@cli.command("webhook-secret")
@click.option("--new", is_flag=True, help="Make a new secret for GENPULSE_WEBHOOK_SECRET instead.")
@click.option(
    "--owner", help="Show what this owner's receivers verify with.  [default: the deployment's own]"
)
def webhook_secret(new: bool, owner: str | None) -> None:
    """
    Show the secrets that webhooks are verified with, the newest first.

    Each owner of API keys has secrets of their own, derived from GENPULSE_WEBHOOK_SECRET, so that none
    of them can sign for another's receiver.
    """
    from genpulse.tasks.webhooks import OWN_OWNER, signing_keys, whsec

    if new:
        click.echo(whsec(secrets.token_bytes(32)))
        return
    keys = signing_keys(settings(), owner or OWN_OWNER)
    if not keys:
        msg = "GENPULSE_WEBHOOK_SECRET is not set: genpulse webhook-secret --new"
        raise Failure(msg, Exit.USAGE)
    for key in keys:
        click.echo(whsec(key))


@cli.command("start-flower")
@click.option("--host", help="Address to listen on; anything but loopback needs basic auth.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option("--url-prefix", default="flower", show_default=True, help="Path below which it is served.")
@click.option("--db", type=click.Path(dir_okay=False, path_type=Path), help="Keep what it saw in this file.")
def start_flower(host: str | None, port: int | None, url_prefix: str, db: Path | None) -> None:
    """
    Run Flower, the operators' view of Celery.

    GENPULSE_FLOWER_BASIC_AUTH=user:password locks it, and must be set where there are API keys. Its
    /metrics and /healthcheck stay open even then, so keep it inside your network.
    """
    found = settings(flower_host=host, flower_port=port)
    if not found.flower_basic_auth.get_secret_value() and asks_for_keys(found):
        raise Failure(
            "this installation has API keys, and Flower shows everybody's tasks: "
            "set GENPULSE_FLOWER_BASIC_AUTH=user:password",
            Exit.USAGE,
        )
    options = [f"--address={found.flower_host}", f"--port={found.flower_port}"]
    if url_prefix.strip("/"):
        options.append(f"--url_prefix={url_prefix.strip('/')}")
    if db:
        db.parent.mkdir(parents=True, exist_ok=True)
        options += ["--persistent=True", f"--db={db}"]
    # In the environment, for everybody on this host may read a command line.
    if auth := found.flower_basic_auth.get_secret_value():
        os.environ["FLOWER_BASIC_AUTH"] = auth
    execute("celery", "-A", "genpulse", "flower", *options)


def asks_for_keys(found: Settings) -> bool:
    """Whether callers need an API key here; a ledger that does not answer has none."""
    from genpulse.errors import LedgerUnavailable
    from genpulse.web.callers import has_keys

    try:
        return bool(found.api_key.get_secret_value()) or has_keys(found)
    except LedgerUnavailable:
        return False


@cli.command("start-sweeper")
def start_sweeper() -> None:
    """Run relay and sweeper alone, beside those that the API and each worker already run."""
    found = settings()
    import signal
    import threading

    from genpulse.tasks.background import start_in_api
    from genpulse.telemetry import setup_logging

    setup_logging(found.log_level, found.log_format)
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    background = start_in_api(found)
    click.echo("relay and sweeper run; Ctrl-C ends them", err=True)
    while not asked.wait(0.5):  # short waits let a signal's handler run
        pass
    background.stop()


# ---------------------------------------------------------------------------------------------------------------------
# API keys


class Rate(click.ParamType[str]):
    """Submissions for a time."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse what the API could not count by."""
        from genpulse.config import is_rate

        if not is_rate(str(value)):
            self.fail(f"{value!r} is not like 10/second, 600/minute or 1000/hour, or 0", param, ctx)
        return str(value)


class Span(click.ParamType[float]):
    """A time from now, in seconds."""

    name = "time"
    _SECONDS: Mapping[str, int] = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """``90d`` is ninety days."""
        match = re.fullmatch(r"([1-9]\d{0,8})([smhdw])", str(value), re.ASCII)
        if match is None or int(match[1]) * self._SECONDS[match[2]] > 100 * 366 * 86_400:
            self.fail(f"{value!r} is not like 12h, 90d or 52w", param, ctx)
        return float(int(match[1]) * self._SECONDS[match[2]])


class Label(click.ParamType[str]):
    """A name that can stand in a path and in a log."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse anything that would have to be quoted somewhere."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", str(value), re.ASCII):
            self.fail("1 to 64 letters, digits, dots, dashes, underscores or @, the first a letter or digit")
        return str(value)


@cli.group()
def keys() -> None:
    """
    Make, list and revoke API keys.

    From the first key on the API asks every caller for one (Authorization: Bearer <key>), and may
    listen on other addresses than loopback. The keys are in the ledger, as digests.
    """


@keys.command("create")
@click.argument("name", type=Label())
@click.option("--owner", type=Label(), help="Whose tasks and files it works on.  [default: NAME]")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["submit", "read", "admin"]),
    help="What it may do; may be repeated.  [default: submit and read]",
)
@click.option("--expires-in", type=Span(), metavar="TIME", help="Until when it works: 12h, 90d, 52w.")
@click.option("--rate", type=Rate(), metavar="RATE", help="Its own submissions, like 10/second; 0: no limit.")
@click.option("--max-queued", type=click.IntRange(0), help="Tasks of its owner that may wait; 0: any number.")
@click.option("--max-running", type=click.IntRange(0), help="… that may run at once; 0: any number.")
@click.option("--json", "as_json", is_flag=True, help="Print all about it as JSON.")
def create_key(
    name: str,
    owner: str | None,
    scopes: tuple[str, ...],
    expires_in: float | None,
    rate: str | None,
    max_queued: int | None,
    max_running: int | None,
    as_json: bool,
) -> None:
    """
    Make an API key and print it: this once, for nobody can read it later.

    \b
    submit   send, cancel, retry and delete tasks, upload files
    read     see tasks, outputs and files
    admin    see how the whole service is doing: queues, workers, metrics

    Keys of one owner see the same tasks. What was made while there was no key belongs to the owner
    `default`. Limits that are not given are those of the settings.
    """  # noqa: D301 - click's own mark, a backspace
    from genpulse.ledger import mint

    text = mint()
    with ledger_of_settings() as ledger:
        key = ledger.add_key(
            text,
            name=name,
            owner=owner or name,
            scopes=list(dict.fromkeys(scopes)) or ["submit", "read"],
            expires_in_s=expires_in,
            rate=rate,
            max_queued=max_queued,
            max_running=max_running,
        )
    if as_json:
        click.echo(json.dumps({**key_as_json(key), "key": text.text}))
        return
    click.echo(text.text)
    until = f", until {key.expires_at:%Y-%m-%d %H:%M} UTC" if key.expires_at else ""
    click.echo(
        f"key {key.id} of {key.owner} ({', '.join(key.scopes)}){until}; it is not shown again", err=True
    )


@keys.command("list")
@click.option("--all", "everything", is_flag=True, help="Also those that are revoked or have expired.")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON, the ended ones too.")
def list_keys(everything: bool, as_json: bool) -> None:
    """List the API keys, oldest first; the keys themselves are nowhere to be had."""
    with ledger_of_settings() as ledger:
        found = ledger.list_keys()
    if as_json:
        click.echo(json.dumps([key_as_json(key) for key in found]))
        return
    rows = [("ID", "NAME", "OWNER", "SCOPES", "STATE", "LAST USED", "LIMITS")]
    rows += [
        (
            key.id,
            key.name,
            key.owner,
            ",".join(key.scopes),
            key_state(key),
            f"{key.last_used_at:%Y-%m-%d %H:%M}" if key.last_used_at else "never",
            key_limits(key),
        )
        for key in found
        if everything or key.is_usable
    ]
    if len(rows) == 1:
        ended = f" ({len(found)} ended: --all shows them)" if found else ""
        click.echo(f"no API key{ended}", err=True)
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
def revoke_key(key_id: str) -> None:
    """
    End the key with this ID, for good; it stops within two seconds.

    The ID is what `keys list` shows, and the part between the underscores of the key.
    """
    key_id = key_id.removeprefix("gp_").partition("_")[0]
    with ledger_of_settings() as ledger:
        key = ledger.revoke_key(key_id)
    if key is None:
        raise Failure(f"there is no key {key_id}", Exit.FAILED)
    click.echo(f"key {key.id} of {key.owner} is revoked", err=True)


@contextmanager
def ledger_of_settings() -> Iterator[Ledger]:
    """The ledger; one that does not answer, or has no tables, is one line."""
    from genpulse.errors import LedgerUnavailable
    from genpulse.tasks.wiring import open_ledger

    ledger = open_ledger(settings())
    try:
        yield ledger
    except LedgerUnavailable as error:
        raise Failure(f"the ledger does not answer: {error}", Exit.UNREACHABLE) from error
    finally:
        ledger.close()


def key_state(key: ApiKey) -> str:
    """One word, or until when it works."""
    if key.revoked_at:
        return "revoked"
    if key.is_expired:
        return "expired"
    return f"until {key.expires_at:%Y-%m-%d}" if key.expires_at else "usable"


def key_limits(key: ApiKey) -> str:
    """What it says about limits."""
    said = {"": key.rate, "queued ": key.max_queued, "running ": key.max_running}
    return ", ".join(f"{word}{value}" for word, value in said.items() if value is not None) or "-"


def key_as_json(key: ApiKey) -> dict[str, Any]:
    """All about a key but its digest."""
    times = {
        name: value.isoformat() if (value := getattr(key, name)) else None
        for name in ("created_at", "expires_at", "revoked_at", "last_used_at")
    }
    return {
        "id": key.id,
        "name": key.name,
        "owner": key.owner,
        "scopes": list(key.scopes),
        "usable": key.is_usable,
        "rate": key.rate,
        "max_queued": key.max_queued,
        "max_running": key.max_running,
        **times,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Setting up


@cli.command()
@click.option(
    "--wait", "wait_s", type=float, default=30.0, show_default=True, help="Seconds to wait for the database."
)
@click.option("--bucket", is_flag=True, help="Make the S3 bucket, too, if it is not there.")
def migrate(wait_s: float, bucket: bool) -> None:
    """Bring the ledger's tables up to date. Safe to repeat, and to run from several hosts at once."""
    found = settings()
    from genpulse.errors import LedgerUnavailable, StorageUnavailable
    from genpulse.testing.embedded import migrate_ledger

    try:
        migrate_ledger(found, wait_s=wait_s)
        if bucket and found.storage == "s3":
            make_bucket(found)
    except LedgerUnavailable as error:
        reason = f": {error}" if str(error) else ""
        raise Failure(f"the database does not answer{reason}", Exit.UNREACHABLE) from error
    except StorageUnavailable as error:
        raise Failure(f"the object store does not take the bucket: {error}", Exit.UNREACHABLE) from error
    click.echo("the ledger is up to date", err=True)


def make_bucket(found: Settings) -> None:
    """
    Make the bucket of the settings in an S3-compatible server, if it is not there.

    Raises:
        StorageUnavailable: It is not there and cannot be made.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    from genpulse.errors import StorageUnavailable
    from genpulse.tasks.wiring import open_storage

    try:
        open_storage(found).check()
    except StorageUnavailable:
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        client = boto3.client(
            "s3",
            endpoint_url=found.s3_endpoint_url or None,
            region_name=found.s3_region or "us-east-1",
            aws_access_key_id=found.s3_access_key_id.get_secret_value() or None,
            aws_secret_access_key=found.s3_secret_access_key.get_secret_value() or None,
            config=config,
        )
        try:
            client.create_bucket(Bucket=found.s3_bucket)
        except (BotoCoreError, ClientError) as error:
            raise StorageUnavailable(type(error).__name__) from error
        click.echo(f"made the bucket {found.s3_bucket}", err=True)


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8188, show_default=True, help="Port to listen on."
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data/comfyui-simulator"),
    show_default=True,
    help="Its input, output and temp folders.",
)
@click.option("--step-s", type=click.FloatRange(0), help="Seconds that one sampler step takes.")
@click.option(
    "--log", "log_path", type=click.Path(dir_okay=False, path_type=Path), help="Write what it runs here."
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def simulator(
    host: str,
    port: int,
    data_dir: Path,
    step_s: float | None,
    log_path: Path | None,
    options: tuple[str, ...],
) -> None:
    """
    Run the ComfyUI simulator: the real protocol, pictures drawn without any model.

    What stands behind `--` is handed on to it (`-- --help` shows what there is).
    """
    command = ["--host", host, "--port", str(port), "--data-dir", str(data_dir)]
    if step_s is not None:
        command += ["--step-s", str(step_s)]
    if log_path:
        command += ["--log", str(log_path)]
    execute("genpulse.testing.simulator", *command, *options)


# ---------------------------------------------------------------------------------------------------------------------
# Everything on one machine


def stack_options(function: Any) -> Any:
    """The options that ``start-all`` and ``demo`` share."""
    options = [
        click.option(
            "--data-dir",
            type=click.Path(file_okay=False, path_type=Path),
            help="Folder of everything.  [default: data]",
        ),
        click.option("--port", type=click.IntRange(1, 65535), help="Port of the API.  [default: 8000]"),
        click.option("--flower-port", type=click.IntRange(1, 65535), help="Port of Flower.  [default: 5555]"),
        click.option(
            "--comfy-port", type=click.IntRange(1, 65535), help="Port of the ComfyUI that is started here."
        ),
        click.option("--valkey-port", type=click.IntRange(1, 65535), help="Port of Valkey.  [default: any]"),
        click.option("--comfy", "comfy_urls", help="Your ComfyUI servers, name=url separated by commas."),
        click.option(
            "--comfy-args", default="", help="More arguments for libs/comfyui/main.py, like '--cpu'."
        ),
        click.option("--no-flower", is_flag=True, help="Do without Flower."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@cli.command("start-all")
@stack_options
def start_all(**options: Any) -> None:
    """
    Run everything on this machine: Valkey, ComfyUI, API, worker, Flower.

    ComfyUI is what --comfy or GENPULSE_COMFY_URLS names, else libs/comfyui/main.py if it is there,
    else a simulator that draws its pictures. Ctrl-C stops all of it; a killed start-all takes its
    processes along. The data folder keeps tasks and pictures for the next run.
    """
    console = stderr_console()
    with stack_failures():
        from genpulse.testing.embedded import run_stack

        raise SystemExit(run_stack(stack_settings(options), stack_ports(options), console))


@cli.command()
@click.option(
    "--once", is_flag=True, help="End after the picture; exit code 0 only if its pixels were right."
)
@stack_options
def demo(once: bool, **options: Any) -> None:
    """
    Show it: start everything, send a workflow through the API, end with a picture on disk.

    Stays up until Ctrl-C. With --comfy URL the workflow runs on your ComfyUI (of core nodes only,
    so it needs no model); without it on the simulator.
    """
    console = stderr_console()
    with stack_failures():
        from genpulse.testing.demo import run_demo

        raise SystemExit(run_demo(stack_settings(options), stack_ports(options), console, once=once))


def stack_settings(options: Mapping[str, Any]) -> Settings:
    """Settings with the options of ``start-all`` over them."""
    return settings(
        data_dir=options["data_dir"],
        port=options["port"],
        flower_port=options["flower_port"],
        comfy_urls=named_servers(options["comfy_urls"]),
    )


def named_servers(text: str | None) -> str | None:
    """
    ``--comfy`` as the setting takes it: ``gpu-box:8188`` becomes ``gpu-box:8188=http://gpu-box:8188``.

    The setting wants a name for a server elsewhere, because a fleet must agree on it. This stack is all
    of its fleet, so the address will do.
    """
    if text is None:
        return None
    servers = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, url = part.partition("=")
        if not equals:
            url = part if "://" in part else f"http://{part}"
            name = url.partition("://")[2].strip("/").replace("/", "-")
        servers.append(f"{name}={url}")
    return ",".join(servers)


def stack_ports(options: Mapping[str, Any]) -> Any:
    """What else the embedded stack is told."""
    from genpulse.testing.embedded import StackOptions

    return StackOptions(
        comfy_port=options["comfy_port"],
        valkey_port=options["valkey_port"],
        comfy_args=tuple(options["comfy_args"].split()),
        flower=not options["no_flower"],
    )


@contextmanager
def stack_failures() -> Iterator[None]:
    """A stack that cannot start says why in one line."""
    from genpulse.testing.embedded import StackError

    try:
        yield
    except StackError as error:
        raise Failure(str(error), Exit(error.exit_code)) from error


# ---------------------------------------------------------------------------------------------------------------------
# Talking to an API


def api_options(function: Any) -> Any:
    """The options of every command that talks to an API."""
    function = click.option(
        "--api-key",
        help="Key of the API.  [default: GENPULSE_API_KEY]",
        envvar="GENPULSE_API_KEY",
        show_envvar=False,
    )(function)
    return click.option(
        "--url", help="Where the API is.  [default: GENPULSE_PUBLIC_URL, else the one running here]"
    )(function)


@cli.command()
@click.argument("workflow", type=click.File("rb"))
@click.option(
    "-i", "--input", "inputs", multiple=True, metavar="NAME=VALUE", help="Set an input; may be repeated."
)
@click.option(
    "-g",
    "--grid",
    "grid",
    multiple=True,
    metavar="NAME=VALUES",
    help="Submit a task for each of these values; with several, for each combination.",
)
@click.option("--wait", is_flag=True, help="Wait until the task is final.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Save the outputs here; implies --wait.",
)
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(0), help="Seconds to wait; the task goes on afterwards."
)
@click.option("--priority", type=click.Choice(["low", "normal", "high"]), help="How urgent it is.")
@click.option("--type", "task_type", default="comfyui", show_default=True, help="Task type.")
@click.option(
    "--render-timeout", type=click.IntRange(1), help="Seconds the rendering may take (`timeout_s`)."
)
@click.option("--idempotency-key", help="The same key and body never make a second task.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the task as JSON on standard output; no progress."
)
@api_options
def submit(
    workflow: Any,
    inputs: tuple[str, ...],
    grid: tuple[str, ...],
    wait: bool,
    output: Path | None,
    timeout_s: float | None,
    priority: str | None,
    task_type: str,
    render_timeout: int | None,
    idempotency_key: str | None,
    as_json: bool,
    url: str | None,
    api_key: str | None,
) -> None:
    """
    Send WORKFLOW (a file in ComfyUI's API format, or - for standard input) to the API.

    With another --type the file is that task type's params as JSON, and -i sets some of them.

    \b
    -i prompt='a red fox'   a node titled INPUT_prompt; or 6.text=… for field `text` of node 6
    -i seed=7               numbers, true, false and null keep their type
    -i 'size:=[64, 64]'     any JSON
    -i image=@cat.png       uploads the file first
    -i note=@@home          a text that starts with @

    \b
    -g seed=1,2,3           a task for each value: a batch
    -g seed=1..100          whole numbers, both ends included
    -g prompt=@list.txt     each line of a file
    -g 'prompt:=["a", "b"]' a JSON list

    Prints the task's id, or with --output the saved files' paths. Of a batch it prints the batch's id,
    and each task's files go to a folder of its own below --output.
    """  # noqa: D301 - click's own mark, a backspace
    graph = read_workflow(workflow)
    values = dict(map(parse_grid, grid))
    console = stderr_console()
    with api(url, api_key) as client:
        bound = {name: bind(value, client) for name, value in map(parse_input, inputs)}
        params = (
            {"workflow": graph, **({"inputs": bound} if bound else {})}
            if task_type in WORKFLOW_TYPES
            else graph | bound
        )
        extra = {"priority": priority, "timeout_s": render_timeout}
        body = {"task_type": task_type, "params": params} | {k: v for k, v in extra.items() if v is not None}
        if values:
            prefix = "inputs." if task_type in WORKFLOW_TYPES else ""
            places = {prefix + name: found for name, found in values.items()}
            accepted = client.submit_batch(
                {"template": body, "grid": places}, idempotency_key=idempotency_key
            )
            batch_id = str(accepted["batch_id"])
            if not (wait or output):
                click.echo(json.dumps(accepted) if as_json else batch_id)
                return
            if not as_json:
                console.print(f"batch {batch_id}: {accepted['total']} tasks", highlight=False)
            see_batch_through(client, batch_id, console, output, timeout_s, as_json=as_json)
            return
        accepted = client.submit(body, idempotency_key=idempotency_key)
        task_id = str(accepted["task_id"])
        if not (wait or output):
            click.echo(json.dumps(accepted) if as_json else task_id)
            return
        if not as_json:
            console.print(f"task {task_id}", highlight=False)
        task = wait_for(client, task_id, console, timeout_s, quiet=as_json)
        saved = save_outputs(client, task, output) if output else []
    report(task, saved, as_json=as_json, printed_paths=output is not None)


def wait_for(
    client: Client, task_id: str, console: Console, timeout_s: float | None, *, quiet: bool
) -> dict[str, Any]:
    """Follow a task on the terminal; whoever stops waiting is told how to go on."""
    from genpulse.client import WaitTimeout
    from genpulse.terminal import showing

    try:
        with showing(console, quiet=quiet) as show:
            return client.follow(task_id, timeout_s=timeout_s, on_change=show)
    except WaitTimeout as error:
        raise Failure(str(error), Exit.TIMEOUT) from error
    except KeyboardInterrupt:
        click.echo(f"no longer waiting; the task goes on: GET {client.url}/task/{task_id}", err=True)
        raise


@cli.command()
@click.argument("task_id")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Save the outputs here at the end.",
)
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(0), help="Seconds to wait; the task goes on afterwards."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print each event as a line of JSON, as it comes; no progress."
)
@api_options
def watch(
    task_id: str,
    output: Path | None,
    timeout_s: float | None,
    as_json: bool,
    url: str | None,
    api_key: str | None,
) -> None:
    """
    Watch the task TASK_ID until it is final.

    Prints the task's id, or with --output the saved files' paths. Exit code 1 if it failed.
    """
    if as_json and timeout_s is not None:
        msg = "--timeout and --json do not go together"
        raise click.UsageError(msg)
    with api(url, api_key) as client:
        task = (
            print_events(client, task_id)
            if as_json
            else wait_for(client, task_id, stderr_console(), timeout_s, quiet=False)
        )
        saved = save_outputs(client, task, output) if output else []
    if as_json and task["status"] == "completed":
        return
    report(task, saved, as_json=False, printed_paths=output is not None)


def print_events(client: Client, task_id: str) -> dict[str, Any]:
    """Print the events of a task as lines of JSON; the final task."""
    for event in client.events(task_id):
        click.echo(json.dumps(event._asdict()))
        if event.name == "done":
            return event.data
    return client.task(task_id)


@cli.command()
@click.argument("batch_id")
@click.option("--cancel", is_flag=True, help="Cancel every task that is not final.")
@click.option("--wait", is_flag=True, help="Wait until every task is final.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Save the outputs here, each task's in a folder of its own; implies --wait.",
)
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(0), help="Seconds to wait; the tasks go on afterwards."
)
@click.option("--json", "as_json", is_flag=True, help="Print the batch as JSON, with all its tasks.")
@api_options
def batch(
    batch_id: str,
    cancel: bool,
    wait: bool,
    output: Path | None,
    timeout_s: float | None,
    as_json: bool,
    url: str | None,
    api_key: str | None,
) -> None:
    """Show how far a batch is, wait for it, or cancel it."""
    with api(url, api_key) as client:
        if cancel:
            client.cancel_batch(batch_id)
        if wait or output:
            see_batch_through(client, batch_id, stderr_console(), output, timeout_s, as_json=as_json)
            return
        found = client.batch(batch_id)
        if as_json:
            click.echo(json.dumps({**found, "tasks": list(client.batch_tasks(batch_id))}))
        else:
            click.echo(f"{found['status']}: {counted(found)}")


def see_batch_through(
    client: Client,
    batch_id: str,
    console: Console,
    output: Path | None,
    timeout_s: float | None,
    *,
    as_json: bool,
) -> None:
    """Wait for a batch, save what its tasks made, and say how it ended; leave with 1 unless all completed."""
    from genpulse.client import WaitTimeout
    from genpulse.terminal import showing

    try:
        with showing(console, quiet=as_json) as show:
            found = client.follow_batch(
                batch_id,
                timeout_s=timeout_s,
                on_change=lambda read: show({**read, "progress_detail": {"class_type": counted(read)}}),
            )
    except WaitTimeout as error:
        raise Failure(str(error), Exit.TIMEOUT) from error
    except KeyboardInterrupt:
        click.echo(f"no longer waiting; the tasks go on: genpulse batch {batch_id}", err=True)
        raise
    tasks = list(client.batch_tasks(batch_id)) if output or as_json else []
    saved = [
        path
        for task in tasks
        if output and task["status"] == "completed"
        for path in save_outputs(client, client.task(task["task_id"]), output / f"{task['index']:04d}")
    ]
    if as_json:
        click.echo(json.dumps({**found, "tasks": tasks, "saved": [str(path) for path in saved]}))
    elif output:
        for path in saved:
            click.echo(str(path))
    else:
        click.echo(batch_id)
    if found["status"] != "completed":
        raise Failure(f"batch {batch_id} {found['status']}: {counted(found)}", Exit.FAILED)


def counted(found: Mapping[str, Any]) -> str:
    """The counts of a batch that are not zero: ``3 of 10 completed, 1 failed``."""
    counts = {name: number for name, number in found["counts"].items() if number and name != "completed"}
    shown = [f"{found['counts']['completed']} of {found['total']} completed"]
    return ", ".join(shown + [f"{number} {name}" for name, number in counts.items()])


def save_outputs(client: Client, task: Mapping[str, Any], folder: Path) -> list[Path]:
    """Download everything a completed task made."""
    from genpulse.client import DownloadDamaged

    if task["status"] != "completed":
        return []
    try:
        return [client.download(output, folder) for output in task.get("outputs") or ()]
    except DownloadDamaged as error:
        raise Failure(str(error), Exit.FAILED) from error
    except OSError as error:
        raise Failure(f"cannot write to {folder}: {error.strerror or error}", Exit.FAILED) from error


def report(task: Mapping[str, Any], saved: list[Path], *, as_json: bool, printed_paths: bool) -> None:
    """Print a final task; leave with 1 if it did not complete."""
    from genpulse.terminal import error_line

    if as_json:
        click.echo(json.dumps({**task, "saved": [str(path) for path in saved]}))
    elif task["status"] == "completed" and printed_paths:
        for path in saved:
            click.echo(str(path))
    elif task["status"] == "completed":
        click.echo(task["task_id"])
        for output in task.get("outputs") or ():
            click.echo(f"{output['name']}  {output['url']}", err=True)
    if task["status"] != "completed":
        raise Failure(f"task {task['task_id']} {task['status']}: {error_line(task)}", Exit.FAILED)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@api_options
def status(as_json: bool, url: str | None, api_key: str | None) -> None:
    """Show queues, workers and ComfyUI servers. Exit code 1 unless everything is well."""
    with api(url, api_key) as client:
        found = client.status()
    if as_json:
        click.echo(json.dumps(found))
    else:
        from rich.console import Console

        from genpulse.terminal import status_parts

        console = Console()
        if not console.is_terminal:
            console.width = 160  # nobody's window: do not fold
        for part in status_parts(found):
            console.print(part)
    if found.get("status") != "ok":
        raise SystemExit(Exit.FAILED)


@cli.command()
@click.argument("task_ids", nargs=-1, metavar="[TASK_ID]...")
@click.option(
    "--status", type=click.Choice(["failed", "canceled", "completed"]), help="Retry tasks that ended so."
)
@click.option("--error-code", help="Only those with this error code, like server_lost.")
@click.option("--task-type", help="Only those of this type.")
@click.option("--since", help="Only those submitted since: 90m, 2h, 7d, or 2026-10-31T12:00:00Z.")
@click.option("--until", help="Only those submitted before, spelled alike.")
@click.option("--limit", type=click.IntRange(1), help="At most so many, the oldest first.")
@click.option("--again", is_flag=True, help="Also tasks that were retried already.")
@click.option("--dry-run", is_flag=True, help="Only show which.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@api_options
def retry(
    task_ids: tuple[str, ...],
    status: str | None,
    error_code: str | None,
    task_type: str | None,
    since: str | None,
    until: str | None,
    limit: int | None,
    again: bool,
    dry_run: bool,
    as_json: bool,
    url: str | None,
    api_key: str | None,
) -> None:
    """
    Send final tasks again: those named, or those that a filter finds.

    \b
    genpulse retry 0190…7f21                      this task
    genpulse retry --status failed --since 7d     all that failed this week
    genpulse retry --error-code server_lost --since 2h --dry-run

    Each becomes a new task with the same request. A filter means failed tasks if it names no other
    status, and leaves those alone that have a retry already. Prints a line "<task> <its retry>" for
    each; exit code 5 if any could not be sent again.
    """  # noqa: D301 - click's own mark, a backspace
    given = {
        "status": status,
        "error_code": error_code,
        "task_type": task_type,
        "created_after": since and instant("--since", since),
        "created_before": until and instant("--until", until),
        "again": again or None,
        "dry_run": dry_run or None,
    }
    filters = {name: value for name, value in given.items() if value is not None}
    if task_ids and (filters or limit):
        raise click.UsageError("name tasks, or give a filter, not both")
    if not task_ids and not filters.keys() - {"again", "dry_run"}:
        raise click.UsageError("name a task, or give a filter, for example --status failed")
    report: dict[str, list[dict[str, Any]]] = {"retried": [], "refused": []}
    try:
        with api(url, api_key) as client:
            pages = retry_named(client, task_ids) if task_ids else retry_found(client, filters, limit)
            for page in pages:
                for name in report:
                    report[name] += page[name]
                if not as_json:
                    show_retries(page)
    finally:  # an API that goes away in the middle does not take back what was done
        if as_json:
            click.echo(json.dumps(report))
        count = len(report["retried"])
        click.echo(
            f"{'would retry' if dry_run else 'retried'} {count} task{'' if count == 1 else 's'}", err=True
        )
    if report["refused"]:
        raise SystemExit(Exit.REFUSED)


def retry_named(client: Client, task_ids: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """Retry each of these; what one is refused for does not stop the others."""
    from genpulse.client import ApiRefused

    for task_id in dict.fromkeys(task_ids):
        try:
            made = client.retry(task_id)
        except ApiRefused as error:
            if error.status in {401, 403, 429}:  # the next one would hear the same
                raise
            refusal = {"task_id": task_id, "code": error.code, "detail": str(error)}
            yield {"retried": [], "refused": [refusal]}
        else:
            yield {"retried": [{"retry_of": task_id, "task_id": made["task_id"]}], "refused": []}


def retry_found(client: Client, filters: Mapping[str, Any], limit: int | None) -> Iterator[Mapping[str, Any]]:
    """Retry what the filter finds, page by page."""
    cursor: dict[str, Any] = {}
    seen = 0
    while limit is None or seen < limit:
        size = RETRY_PAGE if limit is None else min(RETRY_PAGE, limit - seen)
        page = client.retry_matching(**filters, **cursor, limit=size)
        yield page
        if not page["next_cursor"]:
            return
        cursor = {"cursor": page["next_cursor"]}
        seen += size


RETRY_PAGE = 200


def show_retries(page: Mapping[str, Any]) -> None:
    """What was done on standard output, what was refused on standard error."""
    for pair in page["retried"]:
        click.echo(" ".join(filter(None, (pair["retry_of"], pair["task_id"]))))
    for refusal in page["refused"]:
        click.echo(f"{refusal['task_id']}: {refusal['detail']} ({refusal['code']})", err=True)


def instant(option: str, text: str) -> str:
    """
    A time as the API takes it, of ``2h`` (ago) or of an RFC 3339 text, which is for the API to judge.

    Raises:
        click.UsageError: Neither.
    """
    ago = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if ago:
        seconds = int(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[ago[2]]
        return (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=seconds)).isoformat()
    if not re.match(r"\d{4}-\d\d-\d\d[Tt]", text):
        msg = f"{option} {text}: expected a time like 2h, 7d or 2026-10-31T12:00:00Z"
        raise click.UsageError(msg)
    return text


@contextmanager
def api(url: str | None, api_key: str | None) -> Iterator[Client]:
    """A client of the API that is meant; its failures become lines and exit codes."""
    from genpulse.client import ApiRefused, ApiUnreachable, Client

    found = settings()
    key = api_key if api_key is not None else found.api_key.get_secret_value()
    try:
        with Client(url or default_url(found), key) as client:
            yield client
    except ApiUnreachable as error:
        raise Failure(str(error), Exit.UNREACHABLE) from error
    except ApiRefused as error:
        # A single mistake is often the whole sentence already: then only its place is news.
        places = [
            f"  {pointer}" if detail == str(error) else f"  {pointer}: {detail}"
            for pointer, detail in error.errors
        ]
        lines = [f"{error} ({error.code})", *places]
        raise Failure("\n".join(lines), Exit.REFUSED) from error


def default_url(found: Settings) -> str:
    """The configured API, or the one that a ``start-all`` of this data folder serves."""
    from genpulse.testing.embedded import local_url, running_url

    if found.public_url:
        return found.public_url
    if "port" not in found.model_fields_set and (url := running_url(found.data_dir)):
        return url
    return local_url(found.host, found.port)


WORKFLOW_TYPES = ("comfyui", "comfy-workflow")


def read_workflow(file: Any) -> dict[str, Any]:
    """The workflow as JSON; what it means is for the API to judge."""
    try:
        graph = json.loads(file.read())
    except ValueError as error:
        raise click.UsageError(f"{file.name}: not JSON ({error})") from error
    if not isinstance(graph, dict):
        msg = f"{file.name}: a workflow is a JSON object"
        raise click.UsageError(msg)
    return graph


def parse_input(text: str) -> tuple[str, Any]:
    """
    ``name=value`` or ``name:=json``. A path to upload becomes a :class:`pathlib.Path`.

    Raises:
        click.UsageError: No ``=``, no name, or bad JSON behind ``:=``.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip(":"):
        msg = f"-i {text}: expected NAME=VALUE"
        raise click.UsageError(msg)
    if name.endswith(":"):
        try:
            return name[:-1], json.loads(value)
        except ValueError as error:
            raise click.UsageError(f"-i {text}: not JSON behind := ({error})") from error
    if value.startswith("@@"):
        return name, value[1:]
    if value.startswith("@"):
        return name, Path(value[1:])
    try:
        literal = json.loads(value)
    except ValueError:
        return name, value
    return name, literal if literal is None or isinstance(literal, bool | int | float) else value


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """
    ``name=a,b``, ``name=1..9``, ``name=@file`` of lines, or ``name:=[json, …]``.

    Raises:
        click.UsageError: None of these.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip(":"):
        msg = f"-g {text}: expected NAME=VALUES"
        raise click.UsageError(msg)
    if name.endswith(":"):
        name, found = parse_input(text)
        if not isinstance(found, list) or not found:
            msg = f"-g {text}: expected a list with values behind :="
            raise click.UsageError(msg)
        return name, found
    if value.startswith("@"):
        try:
            lines = Path(value[1:]).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"-g {text}: cannot read {value[1:]} ({error})") from error
        return name, [line for line in lines if line.strip()]
    if ends := re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})", value):
        first, last = int(ends[1]), int(ends[2])
        if not 0 <= last - first < 1000:  # the API takes no more tasks than that
            msg = f"-g {text}: expected 1 to 1,000 numbers"
            raise click.UsageError(msg)
        return name, list(range(first, last + 1))
    return name, [parse_input(f"{name}={part}")[1] for part in value.split(",")]


def bind(value: Any, client: Client) -> Any:
    """The value as the API takes it; a local file is uploaded and becomes ``asset:<id>``."""
    if not isinstance(value, Path):
        return value
    try:
        return f"asset:{client.upload(value)['id']}"
    except OSError as error:
        raise click.UsageError(f"cannot read {value}: {error.strerror or error}") from error


# ---------------------------------------------------------------------------------------------------------------------


def settings(**options: Any) -> Settings:
    """
    The settings, with command-line options over the environment.

    An option given becomes a variable of this process, so that the program it turns into and the
    children it starts see it too.
    """
    from genpulse.config import PREFIX, Settings, SettingsError

    for name, value in options.items():
        if value is not None:
            os.environ[PREFIX + name.upper()] = str(value)
    try:
        return Settings.from_env()
    except SettingsError as error:
        raise Failure(str(error), Exit.USAGE) from error


def served_queues(found: Settings) -> list[str]:
    """Every queue, without ``comfy`` where no ComfyUI server is named."""
    from genpulse.tasks.queues import QUEUES

    return [queue for queue in QUEUES if queue != "comfy" or found.servers]


def execute(module: str, *arguments: str) -> NoReturn:
    """Become ``python -m module``, with this interpreter, whatever is on ``PATH``."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - no shell is the point


def stderr_console() -> Console:
    """Where people read: standard error."""
    from rich.console import Console

    return Console(stderr=True)
