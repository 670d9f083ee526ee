"""The command `python -m pg_exports.backfill EXPORT FROM TO`: one run of `dg launch` over an export's intervals.

What it adds to `dg launch --partition-range` is that FROM and TO may be dates, and that they are looked at before the run.
It is for the folder of a Dagster project, this repository or another, and loads the `.env` there as `dg` does.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import dagster as dg
import dotenv

from pg_exports.errors import SettingsError
from pg_exports.partitions import intervals, recent
from pg_exports.postgres import io_manager as io


def main() -> None:
    """Resolve the range and become `dg launch`, whose exit code is this command's."""
    parser = argparse.ArgumentParser(
        prog="python -m pg_exports.backfill",
        description="Run an export for the intervals from FROM to TO, oldest first, in one run.",
        epilog="FROM and TO are partition keys, ISO dates (all intervals that begin on them) or ISO datetimes at which an "
        "interval begins, in the export's timezone. TO is inclusive.",
    )
    parser.add_argument("export", metavar="EXPORT", help="the export's name")
    parser.add_argument("first", metavar="FROM", help="first interval")
    parser.add_argument("last", metavar="TO", help="last interval, inclusive")
    parser.add_argument(
        "--replay",
        action="store_true",
        help="ask the table itself which rows it lacks, instead of what earlier runs recorded: for rows that were deleted",
    )
    arguments = parser.parse_args()
    dotenv.load_dotenv(Path.cwd() / ".env", override=True)
    try:
        partitions = partitions_of(arguments.export)
        first, last = key_range(partitions, arguments.first, arguments.last, datetime.now(UTC))
    except SettingsError as error:
        sys.exit(str(error))
    sys.stdout.write(f"Exporting {arguments.export} from {first} to {last} ...\n")
    sys.stdout.flush()
    launch = ["launch", "--assets", arguments.export, "--partition-range", f"{first}...{last}"]
    if arguments.replay:
        launch += ["--config-json", json.dumps({"ops": {arguments.export: {"config": {"replay": True}}}})]
    os.execv(sys.executable, [sys.executable, "-m", "dagster_dg_cli.cli", *launch])  # noqa: S606


def key_range(partitions: dg.TimeWindowPartitionsDefinition, first: str, last: str, now: datetime) -> tuple[str, str]:
    """The partition keys of a range's first and last interval.

    Args:
        partitions: the export's partitions.
        first: a partition key, an ISO date or an ISO datetime, in the partitions' timezone where it carries no offset. A
            date is the first interval that begins on it.
        last: the same, inclusive. A date is the last interval that begins on it.
        now: the current time; the last interval must be over by then.

    Raises:
        SettingsError: one of them cannot be read, or is no boundary; or the range runs backwards, begins before the
            export's `start`, or ends with an interval that is not over.
    """
    keys = _key(partitions, first, last=False), _key(partitions, last, last=True)
    try:
        # The ends alone: the run looks at each of what may be 100,000 intervals.
        (begin,), (end,) = (intervals(partitions, key, key, now) for key in keys)
    except SettingsError as error:
        newest = recent(partitions, 1, now)
        if newest and partitions.time_window_for_partition_key(keys[1]).end > now:
            raise SettingsError(f"{error} The newest interval that is over is {newest[0].partition_key}.") from None
        raise
    if begin.start > end.start:
        raise SettingsError(f"The range from {keys[0]} to {keys[1]} runs backwards. Nothing was exported.")
    return keys


def _key(partitions: dg.TimeWindowPartitionsDefinition, text: str, *, last: bool) -> str:
    with contextlib.suppress(ValueError):
        # Days and weeks have dates as their keys.
        partitions.time_window_for_partition_key(text)
        return text
    with contextlib.suppress(ValueError):
        day = date.fromisoformat(text)
        # A day has 23 or 25 hours where clocks change: its last interval is the one before the next day's first.
        midnight = _timestamp(partitions, datetime.combine(day + timedelta(days=1) if last else day, time()))
        return partitions.get_partition_key_for_timestamp(midnight, end_closed=last)
    with contextlib.suppress(ValueError):
        moment = datetime.fromisoformat(text)
        begin = _timestamp(partitions, moment)
        key = partitions.get_partition_key_for_timestamp(begin)
        window = partitions.time_window_for_partition_key(key)
        if window.start.timestamp() != begin:
            after = partitions.get_partition_key_for_timestamp(window.end.timestamp())
            raise SettingsError(f"No interval begins at {text}: the keys around it are {key} and {after}.")
        return key
    raise SettingsError(
        f"{text!r} is neither a partition key ({partitions.fmt}), nor an ISO date (2026-11-20), nor an ISO datetime "
        "(2026-11-20T13:00)."
    )


def _timestamp(partitions: dg.TimeWindowPartitionsDefinition, moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=ZoneInfo(partitions.timezone))).timestamp()


def partitions_of(export: str) -> dg.TimeWindowPartitionsDefinition:
    """The partitions of an export of the project in this folder.

    Raises:
        SettingsError: there is none of this name, or the project's settings are wrong.
    """
    return _partitions(export, _exports())


def _exports() -> dict[str, dg.TimeWindowPartitionsDefinition]:
    """The partitions of the exports that are defined in the project of this folder, by the exports' names."""
    with _settings_errors_alone():
        specs = dg.load_from_defs_folder(path_within_project=Path.cwd()).resolve_all_asset_specs()
    return {
        spec.key.to_user_string(): spec.partitions_def
        for spec in specs
        if io.MODEL in spec.metadata and isinstance(spec.partitions_def, dg.TimeWindowPartitionsDefinition)
    }


def _partitions(
    export: str, exports: dict[str, dg.TimeWindowPartitionsDefinition]
) -> dg.TimeWindowPartitionsDefinition:
    if export not in exports:
        there = f"The exports are {', '.join(sorted(exports))}." if exports else "There is no export."
        raise SettingsError(f"No export is called {export}. {there}")
    return exports[export]


@contextlib.contextmanager
def _settings_errors_alone() -> Iterator[None]:
    """Without the tree of components that Dagster puts around what an export says of its settings."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SettingsError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


if __name__ == "__main__":
    main()
