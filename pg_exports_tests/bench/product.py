"""One run of an export in this process, as the bench times it: `python -m pg_exports_tests.bench.product --help`.

Connections, executor and instance are a deployment's own, from the sandbox's environment; imports and the instance's
first contact with its storage are not counted. Other modules start it by
`run_day`, or by `arguments` and `processes.run`, and read what it prints by `Result.of`.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from pg_exports import ClickHouseResource, PostgresExport
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.servers import INSTANCE
from pg_exports_tests.bench import processes
from pg_exports_tests.bench.dataset import TEAM
from pg_exports_tests.bench.processes import Usage

MODULE = "pg_exports_tests.bench.product"

SETTINGS = Path(__file__).parents[2] / "dagster.yaml"
"""The instance's settings, those of the repository."""

STORAGE_URL = "DAGSTER_POSTGRES_URL"
"""Which variable says where Dagster's storage is."""


@dataclass(frozen=True)
class Result:
    """What one run gave.

    Attributes:
        seconds: of the run, without imports.
        cpu_seconds: of this process in that time.
        load_began: when the IO manager began, in seconds since 1970.
        load_seconds: of the IO manager in it, from connecting to the last commit; the rest is Dagster's own.
        peak_bytes: the most memory that the process held, imports included.
        metadata: the figures of each partition's materialisation.
    """

    seconds: float
    cpu_seconds: float
    load_began: float
    load_seconds: float
    peak_bytes: int
    metadata: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, output: str) -> "Result":
        """What the command printed."""
        return cls(**json.loads(output.splitlines()[-1]))

    def total(self, name: str) -> float:
        """A figure of the metadata, over all partitions.

        Raises:
            KeyError: there is no such figure.
        """
        return sum(figures[name] for figures in self.metadata.values())


def arguments(
    model: str, database: str, schema: str, *, interval: str, start: str, first: str, last: str | None = None
) -> list[str]:
    """The command for one run, of the partition `first` or of the range up to `last`."""
    words = [sys.executable, "-m", MODULE, model, database, schema]
    return [*words, "--interval", interval, "--start", start, "--first", first, *(["--last", last] if last else [])]


def run_day(
    sandbox: Sandbox, model: str, database: str, schema: str, start: datetime, *, read_first: bool = False
) -> "Result":
    """Run an export of one day in a process of its own.

    Args:
        sandbox: whose servers are used.
        model, database, schema: what is exported, from where in ClickHouse to where in Postgres.
        start: of the day.
        read_first: read all rows before the first is written, so that ClickHouse does not work beside Postgres.

    Raises:
        BenchError: the run failed.
    """
    further = ["--read-first"] if read_first else []
    return measure_day(sandbox, model, database, schema, start, *further)[0]


def measure_day(
    sandbox: Sandbox,
    model: str,
    database: str,
    schema: str,
    start: datetime,
    *further: str,
    environment: Mapping[str, str] | None = None,
) -> tuple["Result", Usage]:
    """The same with further arguments and variables, and with what the process cost."""
    date = f"{start:%Y-%m-%d}"
    command = [*arguments(model, database, schema, interval="day", start=date, first=date), *further]
    usage = processes.run(command, sandbox, environment)
    return Result.of(usage.output), usage


@contextlib.contextmanager
def storage_elsewhere(sandbox: Sandbox) -> Iterator[Mapping[str, str]]:
    """The variables of runs whose storage for Dagster is on a Postgres of its own, for the block.

    There are a hundred connections to it in each run, which are not what an export costs its destination.
    """
    server = postgres_server.start(sandbox.certificates)
    try:
        postgres_server.create_role(server, INSTANCE, sandbox.instance_password)
        postgres_server.create_database(server, INSTANCE, owner=INSTANCE)
        postgres_server.grant_export(server, INSTANCE, INSTANCE)
        yield {STORAGE_URL: dataclasses.replace(sandbox, postgres=server).environment()[STORAGE_URL]}
    finally:
        postgres_server.stop(server)


def main() -> int:
    """Run an export and print what it took."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("model", choices=("events", "persons", "sessions"))
    parser.add_argument("database", help="of ClickHouse, with PostHog's tables")
    parser.add_argument("schema", help="of Postgres")
    parser.add_argument("--interval", default="day")
    parser.add_argument("--start", required=True, help="beginning of the first interval")
    parser.add_argument("--first", required=True, help="key of the first partition")
    parser.add_argument("--last", help="key of the last partition, for a range")
    parser.add_argument("--streams", type=int, default=1, help="connections for one interval")
    parser.add_argument("--deduplicate", default="interval", help="of events")
    parser.add_argument("--read-first", action="store_true", help="all rows, before the first is written")
    asked = parser.parse_args()
    if asked.read_first:
        _read_first()
    os.environ["CLICKHOUSE_DATABASE"] = asked.database
    export = PostgresExport.model_validate(
        {
            "model": asked.model,
            "team_id": TEAM,
            "interval": asked.interval,
            "start": asked.start,
            "schema": asked.schema,
            "streams": asked.streams,
            "deduplicate": asked.deduplicate,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(SETTINGS, folder)
        os.environ["DAGSTER_HOME"] = folder
        with dg.DagsterInstance.get() as instance:
            # Makes the storage's tables where they are missing, and connects to it.
            instance.get_runs(limit=1)
            instance.get_event_records(dg.EventRecordsFilter(dg.DagsterEventType.RUN_START), limit=1)
            result = _run(export, instance, asked.first, asked.last)
    sys.stdout.write(json.dumps(vars(result)) + "\n")
    return 0


def _run(export: PostgresExport, instance: dg.DagsterInstance, first: str, last: str | None) -> Result:
    # Reads the environment as it is imported.
    from pg_exports.defs.resources import connections

    definitions = dg.Definitions.merge(export.build_defs(None), connections())
    job = definitions.resolve_job_def(f"{export.key}_job")
    # As a deployment does when it has loaded its definitions.
    gc.freeze()
    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last} if last else {}
    began, cpu_before = time.monotonic(), time.process_time()
    result = job.execute_in_process(instance=instance, partition_key=None if last else first, tags=tags)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_before
    materialised = [
        event.step_materialization_data.materialization for event in result.get_asset_materialization_events()
    ]
    metadata = {str(one.partition): _figures(one) for one in materialised}
    load_began, load_ended = _load_times(instance, result.run_id)
    load_seconds = round(load_ended - load_began, 3)
    return Result(round(seconds, 3), round(cpu_seconds, 3), load_began, load_seconds, _peak_bytes(), metadata)


def _read_first() -> None:
    """Let `ClickHouseResource` have all frames in memory before it gives the first."""
    as_they_come = ClickHouseResource.frames

    @contextlib.contextmanager
    @functools.wraps(as_they_come)
    def frames(*arguments: Any, **named: Any) -> Iterator[Iterator[pl.DataFrame]]:
        with as_they_come(*arguments, **named) as frames:
            rows = list(frames)
        yield iter(rows)

    setattr(ClickHouseResource, as_they_come.__name__, frames)


def _load_times(instance: dg.DagsterInstance, run_id: str) -> tuple[float, float]:
    """From what the step has returned to its first materialisation: between them the IO manager works."""
    times: dict[dg.DagsterEventType, float] = {}
    for entry in instance.all_logs(run_id):
        if entry.dagster_event:
            times.setdefault(entry.dagster_event.event_type, entry.timestamp)
    return times[dg.DagsterEventType.STEP_OUTPUT], times[dg.DagsterEventType.ASSET_MATERIALIZATION]


def _figures(materialised: dg.AssetMaterialization) -> dict[str, float]:
    numbers = (dg.IntMetadataValue, dg.FloatMetadataValue)
    entries = materialised.metadata.items()
    return {name: entry.value for name, entry in entries if isinstance(entry, numbers) and entry.value is not None}


def _peak_bytes() -> int:
    """Of this process alone: `ru_maxrss` would begin with what the process held that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("Linux's /proc/self/status has no VmHWM.")


if __name__ == "__main__":
    sys.exit(main())
