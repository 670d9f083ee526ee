"""The command `python -m pg_exports.verify`: one line for each range, what repairs it, and Dagster's own storage.

The command runs as a process in the folder of a deployment, as that of `test_backfill_command` does.
"""

import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.servers import DATABASE
from pg_exports_tests.conftest import Source, partition_key
from pg_exports_tests.test_backfill_command import backfill, deploy
from pg_exports_tests.test_definitions import at_source

HOUR = timedelta(hours=1)


def verify(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "pg_exports.verify", *words]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.usefixtures("public")
def test_the_command_names_what_differs_and_the_backfill_that_repairs_it(
    sandbox: Sandbox, sample: Source, sample_end: datetime, repository: Path, tmp_path: Path
) -> None:
    folder = deploy(tmp_path / "deployment", repository, sandbox.environment())
    first, last = sample_end - 6 * HOUR, sample_end - 5 * HOUR
    keys = partition_key(first), partition_key(last)
    assert backfill(folder, "events", *keys).returncode == 0
    rows = at_source(sample, first, last + HOUR)
    clean = verify(folder, "events", f"{first:%Y-%m-%dT%H:%M}", keys[1])
    assert clean.returncode == 0, clean.stdout[-3000:] + clean.stderr[-3000:]
    cost, compared, nothing = clean.stdout.splitlines()
    assert cost.startswith(f"Comparing events {keys[0]}...{keys[1]}: 2 intervals with {rows:,} rows in the ledger.")
    assert compared == f"{keys[0]}...{keys[1]}, 2 intervals: as it should be: {rows:,} rows."
    assert nothing == "Nothing differs."
    sandbox.postgres.execute("DELETE FROM public.events", database=DATABASE)
    lost = verify(folder, "events", *keys)
    assert lost.returncode == 1
    assert lost.stderr == ""
    assert lost.stdout.splitlines()[1:] == [
        f"{keys[0]}...{keys[1]}, 2 intervals: {rows:,} rows that were exported are not in the table. "
        f"make backfill EXPORT=events FROM={keys[0]} TO={keys[1]} REPLAY=1"
    ]
    assert backfill(folder, "events", *keys, "--replay").returncode == 0
    assert verify(folder, "events", *keys).returncode == 0


def test_without_dagsters_storage_and_with_an_unknown_export_it_says_so(
    sandbox: Sandbox, repository: Path, tmp_path: Path
) -> None:
    folder = deploy(tmp_path / "deployment", repository, sandbox.environment())
    unknown = verify(folder, "event")
    assert unknown.returncode == 1
    assert unknown.stderr.endswith("No export is called event. The exports are events, persons, sessions.\n")
    (folder / "dagster.yaml").unlink()
    without = verify(folder, "events")
    assert without.returncode == 1
    assert "What Dagster shows is compared, too: set DAGSTER_HOME" in without.stderr
    assert "Traceback" not in without.stderr
