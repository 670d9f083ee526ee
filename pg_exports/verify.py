"""The command `python -m pg_exports.verify EXPORT FROM TO`: whether a range is in Postgres as ClickHouse has it.

It runs the job of `verification` in this process, in the folder of a Dagster project, with the variables of its `.env`, and
with the storage that Dagster has there, in which the run is kept like any other.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._cli.utils import get_possibly_temporary_instance_for_cli
from dagster._core.utils import make_new_run_id
from dotenv import load_dotenv

from pg_exports.backfill import key_range, partitions_of
from pg_exports.check import project_definitions, quiet, said
from pg_exports.errors import SettingsError
from pg_exports.verification import VERIFICATION


def main() -> int:
    """Compare, one line for each range of intervals; 1 if anything differs."""
    parser = argparse.ArgumentParser(
        prog="python -m pg_exports.verify",
        description="Compare ClickHouse, the ledger, the table and Dagster for the intervals from FROM to TO. Nothing is "
        "written to the destination.",
        epilog="FROM and TO are as those of `python -m pg_exports.backfill`; without them, the last two days.",
    )
    parser.add_argument("export", metavar="EXPORT", help="the export's name")
    parser.add_argument("first", metavar="FROM", nargs="?", help="first interval")
    parser.add_argument("last", metavar="TO", nargs="?", help="last interval, inclusive")
    arguments = parser.parse_args()
    load_dotenv(Path.cwd() / ".env", override=True)
    try:
        config = {}
        partitions = partitions_of(arguments.export)
        if arguments.first:
            last = arguments.last or arguments.first
            config = dict(
                zip(("first", "last"), key_range(partitions, arguments.first, last, datetime.now(UTC)), strict=True)
            )
        with quiet():
            job = project_definitions().get_job_def(f"{arguments.export}_verify")
        with _instance() as instance:
            return _run(job, config, instance)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _run(job: dg.JobDefinition, config: dict[str, str], instance: dg.DagsterInstance) -> int:
    run_id = make_new_run_id()
    instance.add_event_listener(run_id, _show)
    [op] = [node.name for node in job.nodes]
    run_config = {"ops": {op: {"config": config}}} if config else None
    try:
        with quiet():
            result = job.execute_in_process(run_config, instance=instance, run_id=run_id, raise_on_error=False)
    except Exception as error:  # noqa: BLE001 - whatever resources raise that cannot be made
        raise SettingsError(said(error)) from None
    if result.success:
        return 0
    failures = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    if not any(failure.user_failure_data and failure.user_failure_data.metadata for failure in failures):
        # It could not be compared to its end: the differences were shown before.
        for failure in failures:
            text = failure.user_failure_data.description if failure.user_failure_data else None
            sys.stderr.write(f"{text or (failure.error.to_string() if failure.error else VERIFICATION)}\n")
    return 1


def _show(entry: Any) -> None:
    """What the job says, without Dagster's own events."""
    if not entry.is_dagster_event:
        sys.stdout.write(f"{entry.user_message}\n")
        sys.stdout.flush()


@contextlib.contextmanager
def _instance() -> Iterator[dg.DagsterInstance]:
    """Dagster's storage, as `dg` finds it.

    Raises:
        SettingsError: there is none.
    """
    settings = Path("dagster.yaml")
    has_storage = settings.exists() and re.search("^storage:", settings.read_text(), re.MULTILINE)
    if not (os.environ.get("DAGSTER_HOME") or has_storage):
        raise SettingsError(
            "What Dagster shows is compared, too: set DAGSTER_HOME, or run this in the folder whose dagster.yaml names the "
            "`storage`."
        )
    with quiet():
        opened = contextlib.ExitStack()
        instance = opened.enter_context(get_possibly_temporary_instance_for_cli())
    with opened:
        yield instance


if __name__ == "__main__":
    sys.exit(main())
