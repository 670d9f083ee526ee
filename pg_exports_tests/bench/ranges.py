"""How long does a range take? Months of hourly intervals in one run, launched from the command line as a user does.

What is timed is the whole process of `dg launch`, in a project of its own that has one export. How such a project is made
is here too; what one interval costs is in `small_runs`.
"""

import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pg_exports
from pg_exports.models import MODELS, Selection
from pg_exports.postgres.identifiers import quoted
from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.servers import DATABASE
from pg_exports_tests.bench import dataset, processes
from pg_exports_tests.bench.dataset import HOUR, TEAM
from pg_exports_tests.bench.processes import BenchError, Usage
from pg_exports_tests.bench.product import SETTINGS
from pg_exports_tests.bench.report import Section

HOURS, EVENTS_AN_HOUR, MOST_SECONDS = 720, 1_000, 60
TINY_HOURS, EVENTS_A_TINY_HOUR, MOST_TINY_SECONDS = 8_760, 1, 300
"""Hourly intervals of a range, the sample's events by hour, and what `dg launch` may take."""

MERGED = ("persons", "sessions")
EVENTS_A_MERGED_HOUR = 100
"""The models without an aim, and the sample that they are exported from."""

PROJECT = "bench_project"

PYPROJECT = f"""
[tool.dg]
directory_type = "project"

[tool.dg.project]
root_module = "{PROJECT}"
code_location_target_module = "{PROJECT}.definitions"

[tool.dg.cli]
suppress_warnings = ["project_and_activated_venv_mismatch"]
"""

EXPORT_DEFINITIONS = (Path(pg_exports.__file__).parent / "definitions.py").read_text()
"""As the deployment in the repository loads its definitions, from the folder beside them."""

CONNECTIONS = """
from pg_exports.defs.resources import connections

__all__ = ["connections"]
"""

EXPORT = """
type: pg_exports.PostgresExport

attributes:
  model: {model}
  team_id: {team}
  start: {start:%Y-%m-%d}
  schema: {schema}
"""


def measure(
    sandbox: Sandbox,
    rounds: int,
    hours: int = HOURS,
    tiny_hours: int = TINY_HOURS,
    merged: Sequence[str] = MERGED,
) -> Section:
    """Launch each range, and take the median of its rounds.

    Args:
        sandbox: whose servers are used; what is made in them is dropped again.
        rounds: launches of the first range; of the others there is one.
        hours: intervals of the range with about a thousand events each, and of those of persons and sessions.
        tiny_hours: intervals of the range with one event each on average, most of them empty. 0 leaves it out.
        merged: models to be launched besides events.

    Raises:
        BenchError: a run failed, or the table does not hold what the source has.
    """
    ranges = [
        ("events", hours, EVENTS_AN_HOUR, MOST_SECONDS),
        ("events", tiny_hours, EVENTS_A_TINY_HOUR, MOST_TINY_SECONDS),
    ]
    ranges += [(model, hours, EVENTS_A_MERGED_HOUR, 0) for model in merged]
    rows, holds = [], True
    for model, count, events, most in ranges:
        if count:
            landed, seconds = _launch_range(sandbox, rounds if count == hours and most else 1, model, count, events)
            holds = holds and (not most or seconds < most)
            aim = f"{most} s" if most else ""
            rows.append((model, f"{count:,}", f"{landed:,}", f"{seconds:.1f}", f"{1000 * seconds / count:.0f}", aim))
    return Section(
        title="A range of hourly intervals in one run",
        header=("model", "intervals", "rows", "seconds", "ms an interval", "less than"),
        rows=rows,
        remarks=[
            f"The whole process of `dg launch --partition-range`, imports included; the first is the median of {rounds}.",
            "Each run is a first load into an empty schema, and the table's rows were compared with the source's.",
        ],
        holds=holds,
    )


def new_project(folder: Path, definitions: str) -> Path:
    """Make a project in an empty folder, with the repository's settings of the instance. Gives the folder of its module."""
    (folder / "pyproject.toml").write_text(PYPROJECT)
    shutil.copy(SETTINGS, folder)
    module = folder / PROJECT
    module.mkdir()
    (module / "__init__.py").touch()
    (module / "definitions.py").write_text(definitions)
    (module / "defs").mkdir()
    (module / "defs" / "__init__.py").touch()
    return module


def new_export_project(folder: Path, model: str, schema: str, start: datetime) -> None:
    """Make a project with one hourly export in an empty folder."""
    module = new_project(folder, EXPORT_DEFINITIONS)
    (module / "defs" / "connections.py").write_text(CONNECTIONS)
    (module / "defs" / model).mkdir()
    export = EXPORT.format(model=model, team=TEAM, start=start, schema=schema)
    (module / "defs" / model / "defs.yaml").write_text(export)


def launch(sandbox: Sandbox, folder: Path, asset: str, *partitions: str, database: str = "") -> Usage:
    """`dg launch` in a project's folder.

    Args:
        sandbox: whose servers are used.
        folder: the project's.
        asset: its only one.
        partitions: `--partition` or `--partition-range`, and its value.
        database: of ClickHouse, for an export.

    Raises:
        BenchError: the run failed.
    """
    command = [str(Path(sys.executable).parent / "dg"), "launch", "--assets", asset, *partitions]
    environment = {"DAGSTER_HOME": str(folder), **({"CLICKHOUSE_DATABASE": database} if database else {})}
    return processes.run(command, sandbox, environment, folder)


def _launch_range(sandbox: Sandbox, rounds: int, model: str, count: int, events: int) -> tuple[int, float]:
    """The rows that landed, and the median of the seconds that they took."""
    seconds = []
    with dataset.new_database(sandbox) as database:
        start, end = dataset.hours(sandbox, database, count=count, events=max(count * events, 10))
        expected = rows_at_source(sandbox, database, model, start, end)
        for number in range(rounds):
            with dataset.new_schema(sandbox) as schema, tempfile.TemporaryDirectory() as folder:
                new_export_project(Path(folder), model, schema, start)
                keys = f"{dataset.key(start)}...{dataset.key(end - HOUR)}"
                usage = launch(sandbox, Path(folder), model, "--partition-range", keys, database=database)
                check_landed(sandbox, schema, model, expected)
            seconds.append(usage.seconds)
            sys.stderr.write(
                f"ranges: {count:,} intervals with {expected:,} {model}, run {number + 1} of {rounds}:"
                f" {usage.seconds:.1f} s\n"
            )
    return expected, statistics.median(seconds)


def check_landed(sandbox: Sandbox, schema: str, model: str, expected: int) -> None:
    """Compare a table's rows with the number that it should have.

    Raises:
        BenchError: it has more or fewer.
    """
    [(landed,)] = sandbox.postgres.rows(f"SELECT count(*) FROM {quoted(schema, model)}", DATABASE)
    if landed != expected:
        raise BenchError(f"{landed} {model} landed, not {expected:,}.")


# An event that ClickHouse received twice counts once in each interval that received it.
EVENTS_ONCE = """
SELECT uniqExact(event, distinct_id, uuid, toStartOfHour(coalesce(inserted_at, _timestamp)))
FROM events
WHERE team_id = {team_id:Int64}
    AND coalesce(inserted_at, _timestamp) >= {interval_start:DateTime64(6, 'UTC')}
    AND coalesce(inserted_at, _timestamp) < {interval_end:DateTime64(6, 'UTC')}
"""


def rows_at_source(sandbox: Sandbox, database: str, model: str, start: datetime, end: datetime) -> int:
    """What a range of hourly intervals should bring; of a merged model each row once."""
    query = MODELS[model].query(Selection(TEAM, start, end))
    sql = f"SELECT count() FROM ({query.sql})" if MODELS[model].merge else EVENTS_ONCE
    with sandbox.clickhouse_client(database) as client:
        [(rows,)] = client.query(sql, dict(query.parameters)).result_rows
    return int(rows)
