"""A cluster that several tests share, because starting one takes longer than most tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from genpulse.testing.services import Postgres
from tests.support.cluster import Cluster


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Cluster]]:
    """The clusters that were started so far, by database."""
    with ExitStack() as stack:
        found: dict[str, Cluster] = {}
        stack.callback(found.clear)
        try:
            yield found
        finally:
            for cluster in found.values():
                cluster.__exit__(None, None, None)


@pytest.fixture(params=["sqlite", "postgresql"])
def cluster(
    request: pytest.FixtureRequest, clusters: dict[str, Cluster], tmp_path_factory: pytest.TempPathFactory
) -> Cluster:
    """One API, the server ``gpu1`` and one worker for it, all well, on each database."""
    database: str = request.param
    if database not in clusters:
        folder = tmp_path_factory.mktemp(f"cluster-{database}")
        if database == "sqlite":
            migrated: Path = request.getfixturevalue("migrated_sqlite")
            url = f"sqlite:///{shutil.copy(migrated, folder / 'genpulse.db')}"
        else:
            server: Postgres = request.getfixturevalue("postgres")
            url = server.create_database(template=request.getfixturevalue("migrated_postgres"))
        clusters[database] = Cluster(folder, url)
    clusters[database].heal()
    return clusters[database]
