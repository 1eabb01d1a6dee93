"""
The services every test may ask for: real ones, started on first use, one of each per session.

``GENPULSE_REQUIRE_SERVICES=1`` (set in CI) turns a skip for want of a service into a failure, and
``GENPULSE_REQUIRE_BROWSER=1`` the same for the browser.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from genpulse.testing import services
from genpulse.testing.services import FaultProxy, Postgres, S3Server, Service, ServiceError

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from xdist.scheduler import LoadScopeScheduling

    from genpulse.testing.simulator import Simulator

pytest.register_assert_rewrite("tests.support")


# A shell starts what it runs in the background deaf to Ctrl-C, and so would be all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_HEAVY = ("tests/e2e/", "tests/celery_nodes/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """With ``-n``: a file is for one process, and all that starts whole deployments is for one too.

    Deployments beside one another would measure each other's seconds. The plug-in's own groups do not
    reach pytest 9.2, which keeps a test's id where they do not look for it.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # the plug-in is untyped
        def _split_scope(self, nodeid: str) -> str:
            return "deployments" if nodeid.startswith(_HEAVY) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # by number of tests; the fewest of ours take the longest
    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)  # after they were shuffled
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the deployments, so that no process has them left over at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(_HEAVY))


@pytest.fixture(scope="session")
def services_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session's services keep their data and logs."""
    return tmp_path_factory.mktemp("services")


def missing(service: str, reason: object) -> NoReturn:
    """Skip for want of a service; fail where services are required, so that no skip goes unseen."""
    kind = "BROWSER" if service == "browser" else "SERVICES"
    if os.environ.get(f"GENPULSE_REQUIRE_{kind}") == "1":
        pytest.fail(f"{service} is required: {reason}")
    pytest.skip(f"no {service}: {reason}")


@pytest.fixture(scope="session")
def valkey(services_dir: Path) -> Iterator[Service]:
    """One Valkey for the session, without persistence. Do not stop it: start your own for that."""
    try:
        server = services.start_valkey(services_dir / "valkey")
    except ServiceError as error:
        missing("valkey", error)
    with server:
        yield server


@pytest.fixture
def valkey_url(valkey: Service) -> str:
    """The URL of the session's Valkey, emptied for this test."""
    import redis

    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url


@pytest.fixture(scope="session")
def postgres(services_dir: Path) -> Iterator[Postgres]:
    """One PostgreSQL for the session."""
    try:
        server = services.start_postgres(services_dir / "postgres")
    except ServiceError as error:
        missing("postgres", error)
    with server:
        yield server


@pytest.fixture(scope="session")
def postgres_url(postgres: Postgres) -> str:
    """The administrator's database. For making databases, not for tables."""
    return postgres.url


@pytest.fixture
def fresh_postgres_url(postgres: Postgres) -> Iterator[str]:
    """A new, empty database of this test alone."""
    url = postgres.create_database()
    yield url
    postgres.drop_database(url)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a database file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'genpulse.db'}"


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file that each test copies: the migrations run once a session."""
    path = tmp_path_factory.mktemp("migrated") / "genpulse.db"
    _migrate(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # so that one file holds all of it
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Postgres) -> str:
    """The name of a migrated database that each test copies."""
    _migrate(postgres.create_database("genpulse_migrated"))
    return "genpulse_migrated"


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A new, migrated ledger of this test alone: every such test runs on both databases."""
    yield from new_ledger(request, request.param)


@pytest.fixture
def sqlite_ledger_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A new, migrated ledger on SQLite."""
    yield from new_ledger(request, "sqlite")


@pytest.fixture
def postgres_ledger_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A new, migrated ledger on PostgreSQL."""
    yield from new_ledger(request, "postgresql")


def new_ledger(request: pytest.FixtureRequest, database: str) -> Iterator[str]:
    """Copy the migrated database; take the copy away afterwards."""
    if database == "sqlite":
        path: Path = request.getfixturevalue("tmp_path") / "ledger.db"
        shutil.copy(request.getfixturevalue("migrated_sqlite"), path)
        yield f"sqlite:///{path}"
    else:
        server: Postgres = request.getfixturevalue("postgres")
        url = server.create_database(template=request.getfixturevalue("migrated_postgres"))
        yield url
        server.drop_database(url)


def _migrate(url: str) -> None:
    from genpulse.config import Settings
    from genpulse.ledger import Ledger

    ledger = Ledger.connect(Settings.build(database_url=url).ledger_url)
    try:
        ledger.migrate()
    finally:
        ledger.close()


@pytest.fixture(scope="session")
def s3(services_dir: Path) -> Iterator[S3Server]:
    """One S3 server for the session; it verifies signatures."""
    try:
        server = services.start_s3(services_dir / "s3")
    except ServiceError as error:
        missing("s3", error)
    with server:
        yield server


@pytest.fixture
def s3_settings(s3: S3Server, request: pytest.FixtureRequest) -> dict[str, str]:
    """Settings (``storage``, ``s3_…``) for a bucket of this test alone."""
    name = f"t-{abs(hash(request.node.nodeid)):x}"[:40]
    return s3.settings | {"s3_bucket": s3.create_bucket(name)}


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Simulator]:
    """A fresh ComfyUI simulator in a thread of this process; ``.url`` is its base URL."""
    from genpulse.testing.simulator import Simulator

    with Simulator(data_dir=tmp_path / "simulator") as running:
        yield running


@pytest.fixture
def start_simulator(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start simulators as processes of their own, which can be killed: ``start_simulator("gpu1")``."""
    with ExitStack() as stack:

        def start(name: str = "sim", **options: Any) -> Service:
            return stack.enter_context(services.start_simulator(tmp_path / name, name=name, **options))

        yield start


@pytest.fixture
def fault_proxy() -> Iterator[Callable[[str], FaultProxy]]:
    """Put a breakable network before an address: ``fault_proxy(valkey_url).url_of(valkey_url)``."""
    with ExitStack() as stack:
        yield lambda target: stack.enter_context(FaultProxy(target))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    executable = services.find_chromium()
    if executable is None:
        missing("browser", "no Chromium, Chrome or Edge found (GENPULSE_DEV_CHROMIUM names one)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield running
        running.close()
