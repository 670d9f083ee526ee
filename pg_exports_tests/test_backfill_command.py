"""The command `python -m pg_exports.backfill`: the keys that dates and datetimes stand for, and a run of it.

The command runs as a process in the folder of a deployment, as those of `test_definitions` do.
"""

import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pg_exports.backfill import key_range
from pg_exports.errors import SettingsError
from pg_exports.partitions import Grid, IntervalLength
from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.servers import DATABASE
from pg_exports_tests.conftest import Source, partition_key
from pg_exports_tests.test_definitions import at_source

NOW = datetime(2026, 11, 23, 1, 30, tzinfo=UTC)
HOUR = timedelta(hours=1)
BERLIN = "Europe/Berlin"

# Clocks in Berlin go back on 2025-10-26, and forward on 2026-03-29.
BACK, FORWARD = "2025-10-26", "2026-03-29"


def keys(interval: IntervalLength, first: str, last: str, timezone: str = "UTC", **grid: int) -> tuple[str, str]:
    start = "2025-10-05" if interval == "week" else "2025-10-01"
    return key_range(Grid(interval, timezone, **grid).partitions(start), first, last, NOW)


@pytest.mark.parametrize(
    ("interval", "begin", "end"),
    [
        ("hour", "-00:00", "-23:00"),
        ("every 5 minutes", "-00:00", "-23:55"),
        ("every 15 minutes", "-00:00", "-23:45"),
        ("day", "", ""),
    ],
)
@pytest.mark.parametrize("day", [BACK, FORWARD, "2026-11-20"])
def test_dates_are_their_first_and_their_last_interval(
    interval: IntervalLength, begin: str, end: str, day: str
) -> None:
    assert keys(interval, day, day, BERLIN) == (day + begin, day + end)
    assert keys(interval, "2025-10-02", day, BERLIN) == ("2025-10-02" + begin, day + end)


def test_a_day_that_begins_at_one_begins_there() -> None:
    assert keys("hour", FORWARD, FORWARD, "Asia/Beirut") == (f"{FORWARD}-01:00", f"{FORWARD}-23:00")


def test_weeks_are_named_by_the_date_on_which_they_begin() -> None:
    assert keys("week", "2025-10-19", "2026-03-29", BERLIN) == ("2025-10-19", "2026-03-29")
    with pytest.raises(SettingsError, match="the keys around it are 2025-10-19 and 2025-10-26"):
        keys("week", "2025-10-20", "2026-03-29", BERLIN)


def test_partition_keys_stay_as_they_are() -> None:
    assert keys("hour", "2026-11-20-13:00", "2026-11-20-14:00") == ("2026-11-20-13:00", "2026-11-20-14:00")
    assert keys("hour", f"{BACK}-02:00+0100", "2026-11-20", BERLIN)[0] == f"{BACK}-02:00+0100"


def test_datetimes_are_read_in_the_exports_timezone_or_by_their_offset() -> None:
    assert keys("hour", "2026-11-20T13:00", "2026-11-20 14:00", BERLIN) == ("2026-11-20-13:00", "2026-11-20-14:00")
    assert keys("hour", "2026-11-20T13:00Z", "2026-11-20T13:00Z", BERLIN) == ("2026-11-20-14:00", "2026-11-20-14:00")
    twice = keys("hour", f"{BACK}T02:00+02:00", f"{BACK}T02:00+01:00", BERLIN)
    assert twice == (f"{BACK}-02:00", f"{BACK}-02:00+0100")
    assert keys("day", "2026-11-20T06:00", "2026-11-21", offset_hour=6) == ("2026-11-20", "2026-11-21")


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ("2026-11-21", "2026-11-20", "from 2026-11-21-00:00 to 2026-11-20-23:00 runs backwards"),
        ("2025-09-30", "2026-11-20", "is before the export's `start`: its first partition is 2025-10-01-00:00"),
        ("2026-11-23", "2026-11-23", "which is not over.*The newest interval that is over is 2026-11-23-00:00"),
        ("2026-11-23T01:00", "2026-11-23T01:00", "which is not over"),
        ("2026-11-20T13:07", "2026-11-21", "the keys around it are 2026-11-20-13:00 and 2026-11-20-14:00"),
        ("2026-11-20-13:07", "2026-11-21", "the keys around it are 2026-11-20-13:00 and 2026-11-20-14:00"),
        ("yesterday", "2026-11-21", "'yesterday' is neither a partition key"),
    ],
)
def test_a_range_that_cannot_be_exported_is_an_error(first: str, last: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as refused:
        keys("hour", first, last)
    assert ("newest" in str(refused.value)) == ("not over" in str(refused.value))


def deploy(folder: Path, repository: Path, environment: Mapping[str, str]) -> Path:
    """The repository's root with an `.env` of its own."""
    folder.mkdir()
    for name in ("pyproject.toml", "dagster.yaml", "pg_exports"):
        (folder / name).symlink_to(repository / name)
    (folder / ".env").write_text("".join(f"{name}='{value}'\n" for name, value in environment.items()))
    return folder


def backfill(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "pg_exports.backfill", *words]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.usefixtures("public")
def test_the_command_exports_a_range_in_one_run(
    sandbox: Sandbox, sample: Source, sample_end: datetime, repository: Path, tmp_path: Path
) -> None:
    deployment = deploy(tmp_path / "deployment", repository, sandbox.environment())
    first, last = sample_end - 6 * HOUR, sample_end - 4 * HOUR
    run = backfill(deployment, "events", f"{first:%Y-%m-%dT%H:%M}", partition_key(last))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    [(intervals, runs, rows)] = sandbox.postgres.rows(
        "SELECT count(*), count(DISTINCT run_id), sum(rows_inserted) FROM public.pg_exports_ledger "
        f"WHERE export = 'events' AND interval_start BETWEEN '{first.isoformat()}' AND '{last.isoformat()}'",
        DATABASE,
    )
    assert (intervals, runs, rows) == (3, 1, at_source(sample, first, last + HOUR))


def test_an_unknown_export_is_one_line_with_those_that_are_there(
    sandbox: Sandbox, repository: Path, tmp_path: Path
) -> None:
    deployment = deploy(tmp_path / "deployment", repository, sandbox.environment())
    run = backfill(deployment, "event", "2026-11-20", "2026-11-21")
    assert run.returncode == 1
    assert run.stderr.endswith("No export is called event. The exports are events, persons, sessions.\n")
    assert "Traceback" not in run.stderr


def test_the_commands_exit_code_is_that_of_the_run(
    sandbox: Sandbox, sample_end: datetime, repository: Path, tmp_path: Path
) -> None:
    environment = sandbox.environment() | {"POSTGRES_PASSWORD": "wrong"}
    key = partition_key(sample_end - HOUR)
    run = backfill(deploy(tmp_path / "deployment", repository, environment), "events", key, key)
    assert run.returncode == 1, run.stdout
    assert "password authentication failed" in run.stdout + run.stderr
