"""The command line, from the repository's root: the shipped definitions load, and their exports run.

Each command is a process of its own, in a folder that is the repository but for its `.env`: Dagster loads that file,
and it wins over the environment.
"""

import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.servers import DATABASE, SOURCE_DATABASE
from pg_exports_tests.conftest import Source, partition_key

HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def deployment(sandbox: Sandbox, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's root with the test sandbox's `.env`."""
    folder = tmp_path_factory.mktemp("deployment")
    for name in ("pyproject.toml", "workspace.yaml", "dagster.yaml", "pg_exports"):
        (folder / name).symlink_to(repository / name)
    lines = [f"{name}='{value}'\n" for name, value in sandbox.environment().items()]
    (folder / ".env").write_text("".join(lines))
    return folder


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """One of the commands installed beside this Python, in a folder, with what it printed."""
    environment = {**os.environ, "COLUMNS": "200"}
    environment.pop("DAGSTER_HOME", None)
    program = str(Path(sys.executable).parent / words[0])
    return subprocess.run(
        [program, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def landed(sandbox: Sandbox, table: str) -> int:
    [(rows,)] = sandbox.postgres.rows(f"SELECT count(*) FROM public.{table}", DATABASE)
    return int(str(rows))


def at_source(source: Source, start: datetime, end: datetime) -> int:
    [(rows,)] = source.rows(
        "SELECT uniqExact(event, distinct_id, uuid, toStartOfHour(coalesce(inserted_at, _timestamp))) FROM events "
        "WHERE team_id = 1 AND coalesce(inserted_at, _timestamp) >= {a:DateTime64} AND "
        "coalesce(inserted_at, _timestamp) < {b:DateTime64}",
        {"a": start, "b": end},
    )
    return int(rows)


def test_the_definitions_check_and_list(deployment: Path) -> None:
    checked = command(deployment, "dg", "check", "defs")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    listed = command(deployment, "dg", "list", "defs")
    assert listed.returncode == 0, listed.stderr
    for name in ("events", "persons", "sessions", "events_job", "events_schedule", "postgres_io_manager", "clickhouse"):
        assert name in listed.stdout


def test_the_component_is_known_to_dg(deployment: Path) -> None:
    assert "pg_exports.PostgresExport" in command(deployment, "dg", "list", "components").stdout


@pytest.mark.usefixtures("public")
def test_one_partition_and_then_a_range_are_exported_from_the_command_line(
    sandbox: Sandbox, sample: Source, sample_end: datetime, deployment: Path
) -> None:
    assert sample.database == SOURCE_DATABASE
    last = sample_end - HOUR
    single = command(deployment, "dg", "launch", "--assets", "events", "--partition", partition_key(last))
    assert single.returncode == 0, single.stdout[-3000:] + single.stderr[-3000:]
    assert landed(sandbox, "events") == at_source(sample, last, sample_end)

    keys = f"{partition_key(last - 3 * HOUR)}...{partition_key(last)}"
    several = command(deployment, "dg", "launch", "--assets", "events", "--partition-range", keys)
    assert several.returncode == 0, several.stdout[-3000:] + several.stderr[-3000:]
    assert landed(sandbox, "events") == at_source(sample, last - 3 * HOUR, sample_end)

    words = ["--select", "events", "--partition", partition_key(last - 4 * HOUR)]
    older = command(deployment, "dagster", "asset", "materialize", "-m", "pg_exports.definitions", *words)
    assert older.returncode == 0, older.stdout[-3000:] + older.stderr[-3000:]
    assert landed(sandbox, "events") == at_source(sample, last - 4 * HOUR, sample_end)


@pytest.mark.parametrize("words", [("--partition", "{next}"), ("--partition-range", "{last}...{next}")])
def test_a_partition_that_is_not_over_fails_and_writes_nothing(
    sandbox: Sandbox, sample: Source, sample_end: datetime, deployment: Path, words: tuple[str, str]
) -> None:
    before = sandbox.postgres.rows("SELECT to_regclass('public.persons')", DATABASE)
    keys = {"last": partition_key(sample_end - HOUR), "next": partition_key(sample_end + HOUR)}
    run = command(deployment, "dg", "launch", "--assets", "persons", words[0], words[1].format(**keys))
    assert run.returncode != 0
    # Dagster itself knows no such partition, and says so before the export can.
    assert "Could not find a partition with key" in run.stdout + run.stderr
    assert sandbox.postgres.rows("SELECT to_regclass('public.persons')", DATABASE) == before
