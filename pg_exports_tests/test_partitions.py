"""When intervals begin and end: every length, across changes of clocks; what is no boundary is refused by name."""

import contextlib
import itertools
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import dagster as dg
import pytest
from dagster._utils.schedules import cron_string_iterator

from pg_exports import ClickHouseResource, PostgresExport, PostgresIOManager, PostgresResource
from pg_exports.errors import SettingsError
from pg_exports.interval import Interval
from pg_exports.partitions import Grid, IntervalLength, intervals, recent, unsettled
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, materialise

LATER = datetime(2040, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def of_range(grid: Grid, start: str | date | datetime, first: str, last: str | None = None) -> tuple[Interval, ...]:
    return intervals(grid.partitions(start), first, last or first, LATER)


def of_key(grid: Grid, start: str | date | datetime, key: str) -> tuple[str, str]:
    """One interval's bounds in UTC."""
    [interval] = of_range(grid, start, key)
    assert interval.partition_key == key
    assert interval.start.tzinfo is interval.end.tzinfo is UTC
    return f"{interval.start:%m-%d %H:%M}", f"{interval.end:%m-%d %H:%M}"


def keys(grid: Grid, start: str, until: str) -> list[str]:
    return list(grid.partitions(start).get_partition_keys(current_time=utc(until)))


# Keys and windows


@pytest.mark.parametrize(
    ("grid", "key", "window"),
    [
        (Grid("hour", "UTC"), "2026-11-20-13:00", ("11-20 13:00", "11-20 14:00")),
        (Grid("every 5 minutes", "UTC"), "2026-11-20-13:55", ("11-20 13:55", "11-20 14:00")),
        (Grid("every 15 minutes", "UTC"), "2026-11-20-13:45", ("11-20 13:45", "11-20 14:00")),
        (Grid("day", "UTC"), "2026-11-20", ("11-20 00:00", "11-21 00:00")),
        (Grid("day", "UTC", offset_hour=23), "2026-11-20", ("11-20 23:00", "11-21 23:00")),
        (Grid("day", "Europe/Berlin"), "2026-11-20", ("11-19 23:00", "11-20 23:00")),
        (Grid("day", "Asia/Kolkata", offset_hour=5), "2026-11-20", ("11-19 23:30", "11-20 23:30")),
        (Grid("hour", "Asia/Kolkata"), "2026-11-20-13:00", ("11-20 07:30", "11-20 08:30")),
        (Grid("every 15 minutes", "Asia/Kathmandu"), "2026-11-20-13:00", ("11-20 07:15", "11-20 07:30")),
        (Grid("week", "UTC"), "2026-11-15", ("11-15 00:00", "11-22 00:00")),
        (Grid("week", "UTC", offset_day=1), "2026-11-16", ("11-16 00:00", "11-23 00:00")),
        (Grid("week", "UTC", offset_day=6, offset_hour=22), "2026-11-14", ("11-14 22:00", "11-21 22:00")),
        (Grid("week", "Asia/Kolkata", offset_day=1, offset_hour=4), "2026-11-16", ("11-15 22:30", "11-22 22:30")),
    ],
)
def test_a_keys_interval_is_in_utc(grid: Grid, key: str, window: tuple[str, str]) -> None:
    assert of_key(grid, key[:10], key) == window


def test_a_day_in_which_clocks_go_forward_has_23_hours() -> None:
    grid = Grid("day", "Europe/Berlin")
    assert of_key(grid, "2026-03-01", "2026-03-29") == ("03-28 23:00", "03-29 22:00")
    hours = keys(Grid("hour", "Europe/Berlin"), "2026-03-29", "2026-03-29T22:00")
    assert len(hours) == 23
    assert hours[1:3] == ["2026-03-29-01:00", "2026-03-29-03:00"]


def test_a_day_in_which_clocks_go_back_has_25_hours() -> None:
    grid = Grid("day", "Europe/Berlin")
    assert of_key(grid, "2026-10-01", "2026-10-25") == ("10-24 22:00", "10-25 23:00")
    hours = keys(Grid("hour", "Europe/Berlin"), "2026-10-25", "2026-10-25T23:00")
    assert len(hours) == len(set(hours)) == 25
    assert hours[1:5] == ["2026-10-25-01:00", "2026-10-25-02:00", "2026-10-25-02:00+0100", "2026-10-25-03:00"]


def test_both_hours_of_a_repeated_hour_are_intervals_of_their_own() -> None:
    grid = Grid("hour", "Europe/Berlin")
    assert of_key(grid, "2026-10-01", "2026-10-25-02:00") == ("10-25 00:00", "10-25 01:00")
    assert of_key(grid, "2026-10-01", "2026-10-25-02:00+0100") == ("10-25 01:00", "10-25 02:00")


def test_every_quarter_of_a_repeated_hour_is_an_interval_of_its_own() -> None:
    grid = Grid("every 15 minutes", "Europe/Berlin")
    assert of_key(grid, "2026-10-01", "2026-10-25-02:45") == ("10-25 00:45", "10-25 01:00")
    assert of_key(grid, "2026-10-01", "2026-10-25-02:00+0100") == ("10-25 01:00", "10-25 01:15")
    assert of_key(grid, "2026-10-01", "2026-10-25-02:45+0100") == ("10-25 01:45", "10-25 02:00")


def test_a_week_over_a_change_of_clocks_is_an_hour_longer_or_shorter() -> None:
    grid = Grid("week", "Europe/Berlin", offset_day=1, offset_hour=3)
    [longer] = of_range(grid, "2026-10-19", "2026-10-19")
    [shorter] = of_range(grid, "2026-03-23", "2026-03-23")
    assert longer.end - longer.start == timedelta(days=7, hours=1)
    assert shorter.end - shorter.start == timedelta(days=7, hours=-1)


GRIDS = [
    Grid("hour", "Europe/Berlin"),
    Grid("every 15 minutes", "Europe/Berlin"),
    Grid("every 5 minutes", "America/New_York"),
    Grid("every 15 minutes", "Australia/Lord_Howe"),
    Grid("day", "Europe/Berlin", offset_hour=2),
    Grid("day", "America/Santiago"),
    Grid("day", "Asia/Kolkata", offset_hour=5),
    Grid("week", "Europe/Berlin", offset_day=0, offset_hour=2),
    Grid("week", "UTC", offset_day=0, offset_hour=23),
]
CHANGES_OF_CLOCKS = [
    ("2026-03-22", "2026-04-12"),
    ("2026-09-06", "2026-09-20"),
    ("2026-10-18", "2026-11-08"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("start", "until"), CHANGES_OF_CLOCKS)
def test_the_intervals_of_a_range_follow_each_other_without_gap_or_overlap(grid: Grid, start: str, until: str) -> None:
    names = keys(grid, start, until)
    found = of_range(grid, start, names[0], names[-1])
    assert [interval.partition_key for interval in found] == names
    assert all(interval.start < interval.end for interval in found)
    assert all(before.end == after.start for before, after in itertools.pairwise(found))


CHANGED_LATELY = datetime(2026, 1, 1, tzinfo=UTC)
IN_A_YEAR = CHANGED_LATELY + timedelta(days=365)


def zones_by_changes() -> dict[tuple[tuple[datetime, timedelta], ...], str]:
    """One time zone for each way in which clocks change in a year, by the hours at which they do and the offsets."""
    zones: dict[tuple[tuple[datetime, timedelta], ...], str] = {}
    hours = [CHANGED_LATELY + n * HOUR for n in range((IN_A_YEAR - CHANGED_LATELY) // HOUR)]
    days = hours[::24]
    for name in sorted(zoneinfo.available_timezones()):
        zone = zoneinfo.ZoneInfo(name)
        offsets = [day.astimezone(zone).utcoffset() or timedelta() for day in days]
        changed = [n for n in range(1, len(days)) if offsets[n] != offsets[n - 1]]
        changes = []
        for n in changed:
            within = (moment for moment in hours[24 * (n - 1) : 24 * n + 1])
            moment = next(moment for moment in within if moment.astimezone(zone).utcoffset() == offsets[n])
            changes.append((moment, offsets[n]))
        if changes:
            zones.setdefault(tuple(changes), name)
    return zones


def grids_around(zone: str, change: datetime) -> Iterator[Grid]:
    """Every grid that has a boundary near a change of clocks."""
    lengths: tuple[IntervalLength, ...] = ("hour", "every 15 minutes", "every 5 minutes")
    yield from (Grid(length, zone) for length in lengths)
    yield from (Grid("day", zone, hour) for hour in range(24))
    local = change.astimezone(zoneinfo.ZoneInfo(zone))
    days = {(local + n * HOUR).isoweekday() % 7 for n in (-3, 0)}
    hours = {(local + n * HOUR).hour for n in range(-3, 2)}
    yield from (Grid("week", zone, hour, day) for hour in hours for day in days)


def are_right(grid: Grid, change: datetime) -> bool:
    """Whether the intervals around a change of clocks follow each other, and are the same ones wherever a range begins."""
    around = {"day": 50 * HOUR, "week": 15 * 24 * HOUR}.get(grid.interval, 3 * HOUR)
    found, more = (follow_each_other(grid, change, length) for length in (around, around + HOUR / 2))
    return found is not None and more is not None and set(found) <= set(more)


def follow_each_other(grid: Grid, change: datetime, around: timedelta) -> tuple[Interval, ...] | None:
    """The intervals around a change of clocks; None if there is a hole or an overlap between them, if one is another if it is
    asked for alone, or has no key of its own."""
    zone = zoneinfo.ZoneInfo(grid.timezone)
    # Not by `partitions`, which refuses those that do not.
    partitions = grid._from((change - timedelta(days=30)).astimezone(zone))
    before = partitions.get_next_partition_window((change - around).astimezone(zone), respect_bounds=False)
    after = partitions.get_prev_partition_window((change + around).astimezone(zone), respect_bounds=False)
    assert before
    assert after
    first, last = (partitions.get_partition_key_for_timestamp(window.start.timestamp()) for window in (before, after))
    try:
        found = intervals(partitions, first, last, LATER)
        alone = [intervals(partitions, interval.partition_key, interval.partition_key, LATER)[0] for interval in found]
    except (SettingsError, ValueError):
        return None
    named = [partitions.get_partition_key_for_timestamp(interval.start.timestamp()) for interval in found]
    is_right = (
        all(one.end == next_.start and one.start < one.end for one, next_ in itertools.pairwise(found))
        and found[0].start.timestamp() == before.start.timestamp()
        and found[-1].end.timestamp() == after.end.timestamp()
        and named == [interval.partition_key for interval in found]
        and len({*named}) == len(named)
        and alone == [*found]
    )
    return found if is_right else None


def is_refused(grid: Grid, start: date) -> bool:
    with contextlib.suppress(SettingsError):
        grid.partitions(start)
        return False
    return True


def test_exactly_the_grids_that_a_change_of_clocks_breaks_are_refused() -> None:
    """In every time zone, with every length and offset."""
    zones = zones_by_changes()
    assert len(zones) > 20
    refused = set()
    for changes, zone in zones.items():
        moments = [moment for moment, _ in changes]
        for grid in {grid for moment in moments for grid in grids_around(zone, moment)}:
            is_right = all(are_right(grid, moment) for moment in moments)
            start = date(2026, 1, 4) + timedelta(days=grid.offset_day)
            assert is_refused(grid, start) is not is_right, grid
            if not is_right:
                refused.add((zone, grid.interval, grid.offset_hour, grid.offset_day))
    assert refused == {
        ("America/Godthab", "day", 23, 0),
        ("Antarctica/Troll", "day", 1, 0),
        ("Antarctica/Troll", "week", 1, 0),
        ("Australia/LHI", "hour", 0, 0),
    }


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (
            Grid("hour", "Australia/Lord_Howe"),
            r"change by 30 minutes, no whole number .* Give the export `timezone: UTC`\.$",
        ),
        (
            Grid("day", "America/Nuuk", 23),
            r"and `offset_hour: 23`: on 2026-03-29 at 01:00 UTC clocks skip from 23:00 to 00:00, .* or another `offset_hour`",
        ),
        (Grid("day", "Antarctica/Troll", 1), r"on 2026-03-29 at 01:00 UTC clocks skip from 01:00 to 03:00"),
        # Half an hour was skipped once, and a whole day.
        (Grid("hour", "Asia/Pyongyang"), None),
        (Grid("day", "Pacific/Apia"), None),
    ],
)
def test_a_grid_that_a_change_of_clocks_breaks_is_refused_with_the_change(grid: Grid, said: str | None) -> None:
    if said is None:
        grid.partitions("2026-01-01")
        with pytest.raises(SettingsError, match=r"UTC clocks (change by 30 minutes|skip from 00:00 to 00:00)"):
            grid.partitions("2010-01-01")
        return
    with pytest.raises(SettingsError, match=said):
        grid.partitions("2026-01-01")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_key_of_a_change_of_clocks_can_be_asked_for_by_itself(grid: Grid) -> None:
    for start, day in (("2026-03-22", "2026-04-05"), ("2026-10-18", "2026-10-25"), ("2026-10-18", "2026-11-01")):
        around = keys(grid, start, f"{day}T20:00")[-80:]
        assert [interval.partition_key for key in around for interval in of_range(grid, start, key)] == around


# start


@pytest.mark.parametrize(
    ("grid", "start", "first"),
    [
        (Grid("hour", "UTC"), "2026-11-20", "2026-11-20-00:00"),
        (Grid("hour", "UTC"), "2026-11-20T13:00", "2026-11-20-13:00"),
        (Grid("hour", "UTC"), " 2026-11-20 13:00:00 ", "2026-11-20-13:00"),
        (Grid("hour", "UTC"), date(2026, 11, 20), "2026-11-20-00:00"),
        (Grid("hour", "UTC"), datetime(2026, 11, 20, 13), "2026-11-20-13:00"),
        (Grid("hour", "UTC"), utc("2026-11-20T13:00"), "2026-11-20-13:00"),
        (Grid("hour", "UTC"), "2026-11-20T13:00:00Z", "2026-11-20-13:00"),
        (Grid("hour", "UTC"), "2026-11-20T13:00:00+02:00", "2026-11-20-11:00"),
        (Grid("hour", "Europe/Berlin"), "2026-11-20T13:00", "2026-11-20-13:00"),
        (Grid("hour", "Europe/Berlin"), "2026-11-20T13:00:00Z", "2026-11-20-14:00"),
        (Grid("hour", "Europe/Berlin"), "2026-10-25T02:00:00+01:00", "2026-10-25-02:00+0100"),
        (Grid("hour", "Europe/Berlin"), "2026-03-29T02:00", "2026-03-29-03:00"),
        (Grid("hour", "Asia/Kolkata"), datetime(2026, 11, 20, 7, 30, tzinfo=UTC), "2026-11-20-13:00"),
        (Grid("every 15 minutes", "Asia/Kolkata"), "2026-11-20T13:00:00Z", "2026-11-20-18:30"),
        (Grid("day", "UTC"), "20261120", "2026-11-20"),
        (Grid("day", "UTC", offset_hour=5), "20261120", "2026-11-20"),
        (Grid("day", "UTC", offset_hour=5), "2026-11-20", "2026-11-20"),
        (Grid("day", "UTC", offset_hour=5), date(2026, 11, 20), "2026-11-20"),
        (Grid("day", "UTC", offset_hour=5), "2026-11-20T05:00", "2026-11-20"),
        (Grid("day", "Europe/Berlin", offset_hour=2), "2026-03-29", "2026-03-29"),
        (Grid("week", "UTC", offset_day=3, offset_hour=4), "2026-11-18", "2026-11-18"),
        (Grid("week", "Europe/Berlin", offset_day=1), "2026-11-15T23:00:00Z", "2026-11-16"),
        (Grid("day", "Europe/Berlin"), datetime(2026, 11, 20, tzinfo=timezone(HOUR)), "2026-11-20"),
    ],
)
def test_start_is_the_beginning_of_the_first_interval(grid: Grid, start: str | date | datetime, first: str) -> None:
    assert grid.partitions(start).get_partition_keys(current_time=LATER.replace(year=2027))[0] == first


@pytest.mark.parametrize(
    ("grid", "start", "before", "after"),
    [
        (Grid("hour", "UTC"), "2026-11-20T13:30", "2026-11-20T13:00:00+00:00", "2026-11-20T14:00:00+00:00"),
        (Grid("hour", "UTC"), "2026-11-20T13:00:01", "2026-11-20T13:00:00+00:00", "2026-11-20T14:00:00+00:00"),
        (Grid("hour", "Asia/Kolkata"), "2026-11-20T13:00Z", "2026-11-20T18:00:00+05:30", "2026-11-20T19:00:00+05:30"),
        (Grid("every 5 minutes", "UTC"), "2026-11-20T13:58", "2026-11-20T13:55:00+00:00", "2026-11-20T14:00:00+00:00"),
        (Grid("day", "UTC"), "2026-11-20T13:00", "2026-11-20T00:00:00+00:00", "2026-11-21T00:00:00+00:00"),
        (Grid("day", "UTC", 6), "2026-11-20T00:00", "2026-11-19T06:00:00+00:00", "2026-11-20T06:00:00+00:00"),
        (Grid("week", "UTC"), "2026-11-20", "2026-11-15T00:00:00+00:00", "2026-11-22T00:00:00+00:00"),
        (Grid("week", "Europe/Berlin", 3, 1), "2026-10-25", "2026-10-19T03:00:00+02:00", "2026-10-26T03:00:00+01:00"),
        (Grid("hour", "Europe/Berlin"), "2026-10-25T02:30", "2026-10-25T02:00:00+02:00", "2026-10-25T02:00:00+01:00"),
    ],
)
def test_a_start_that_is_no_boundary_names_the_two_around_it(grid: Grid, start: str, before: str, after: str) -> None:
    with pytest.raises(SettingsError, match=r"`start` .* is no boundary of `interval: ") as caught:
        grid.partitions(start)
    assert f"the boundaries around it are {before} and {after} (" in str(caught.value)


@pytest.mark.parametrize("start", ["", " ", "yesterday", "2026-13-01", "2026-02-30", "20.11.2026", "2026-11-20T25:00"])
def test_a_start_that_cannot_be_read_is_an_error_with_an_example(start: str) -> None:
    with pytest.raises(SettingsError, match=r"neither an ISO date \(2026-11-20\) nor an ISO datetime"):
        Grid("hour", "UTC").partitions(start)


@pytest.mark.parametrize("start", ["0001-01-01", "9999-12-31T23:00:00-12:00", "1969-12-31"])
def test_a_start_outside_of_clickhouses_calendar_is_an_error(start: str) -> None:
    with pytest.raises(SettingsError, match="out of range"):
        Grid("hour", "Europe/Berlin").partitions(start)


@pytest.mark.parametrize("name", ["Mars/Olympus", "", "europe", "+02:00", "../../etc/passwd", "a\0b", "Europe"])
def test_an_unknown_timezone_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match=r"`timezone` .* is not known"):
        Grid("hour", name).partitions("2026-11-20")


# Keys that are refused


@pytest.mark.parametrize(
    ("grid", "key", "around"),
    [
        (Grid("hour", "UTC"), "2026-11-20-13:30", "2026-11-20-13:00 and 2026-11-20-14:00"),
        (Grid("every 15 minutes", "UTC"), "2026-11-20-13:50", "2026-11-20-13:45 and 2026-11-20-14:00"),
        (Grid("week", "UTC"), "2026-11-20", "2026-11-15 and 2026-11-22"),
        (Grid("hour", "Europe/Berlin"), "2026-10-25-02:30", "2026-10-25-02:00 and 2026-10-25-02:00+0100"),
        (Grid("hour", "Europe/Berlin"), "2026-03-29-02:00", "2026-03-29-01:00 and 2026-03-29-03:00"),
    ],
)
def test_a_key_off_the_grid_names_the_keys_around_it(grid: Grid, key: str, around: str) -> None:
    for first, last in ((key, key), (key, "2030-11-24-13:00"), ("2026-01-04-13:00", key)):
        ends = [end if grid.interval != "week" else end[:10] for end in (first, last)]
        with pytest.raises(SettingsError, match=f"Partition key '{key}' is no boundary") as caught:
            of_range(grid, "2026-01-04", *ends)
        assert around in str(caught.value)


@pytest.mark.parametrize("key", ["", "now", "2026-11-20", "2026-11-20-25:00", "2026-11-20T13:00", "9999-12-31-23:00"])
def test_a_key_that_is_none_names_how_keys_look(key: str) -> None:
    with pytest.raises(SettingsError, match=r"no key of this export\. Keys look like %Y-%m-%d-%H:%M"):
        of_range(Grid("hour", "UTC"), "2026-11-20", key)


def test_a_key_written_in_another_way_is_refused() -> None:
    with pytest.raises(SettingsError, match="2026-11-02-03:00"):
        of_range(Grid("hour", "UTC"), "2026-11-01", "2026-11-2-3:00")


def test_a_key_before_start_names_the_first_partition() -> None:
    with pytest.raises(SettingsError, match="before the export's `start`: its first partition is 2026-11-20-00:00"):
        of_range(Grid("hour", "UTC"), "2026-11-20", "2026-11-19-23:00", "2026-11-20-04:00")


def test_a_range_that_runs_backwards_is_refused() -> None:
    with pytest.raises(SettingsError, match="from 2026-11-20-05:00 to 2026-11-20-04:00 runs backwards"):
        of_range(Grid("hour", "UTC"), "2026-11-20", "2026-11-20-05:00", "2026-11-20-04:00")


def test_an_interval_is_over_at_its_end_and_not_before() -> None:
    partitions = Grid("hour", "UTC").partitions("2026-11-20")
    end = utc("2026-11-20T14:00")
    assert len(intervals(partitions, "2026-11-20-13:00", "2026-11-20-13:00", end)) == 1
    for first in ("2026-11-20-13:00", "2026-11-20-01:00"):
        with pytest.raises(SettingsError, match=r"Partition 2026-11-20-13:00 covers .* which is not over"):
            intervals(partitions, first, "2026-11-20-13:00", end - timedelta(microseconds=1))


def test_an_interval_settles_for_a_minute_after_its_end_before_a_run_reads_it() -> None:
    partitions = Grid("hour", "UTC").partitions("2026-11-20")
    end = utc("2026-11-20T14:00")
    asked = intervals(partitions, "2026-11-20-10:00", "2026-11-20-13:00", end)
    assert unsettled(asked[-1], end) == timedelta(minutes=1)
    assert unsettled(asked[-1], end + timedelta(seconds=45)) == timedelta(seconds=15)
    assert unsettled(asked[-1], end + timedelta(minutes=1)) == timedelta(0)


def test_a_range_far_into_the_future_is_refused_at_once() -> None:
    partitions = Grid("every 5 minutes", "UTC").partitions("2026-11-20")
    with pytest.raises(SettingsError, match="not over"):
        intervals(partitions, "2026-11-20-00:00", "9000-01-01-00:00", utc("2026-11-22"))


# The latest intervals


def latest(grid: Grid, start: str, now: str, count: int = 24) -> tuple[Interval, ...]:
    found = recent(grid.partitions(start), count, utc(now))
    assert all(interval.start.tzinfo is interval.end.tzinfo is UTC for interval in found)
    assert all(before.end == after.start for before, after in itertools.pairwise(found))
    return found


@pytest.mark.parametrize(
    ("grid", "now", "first", "last"),
    [
        (Grid("every 5 minutes", "UTC"), "2026-11-20T13:59:59", "2026-11-20-11:55", "2026-11-20-13:50"),
        (Grid("every 15 minutes", "Asia/Kathmandu"), "2026-11-20T13:50", "2026-11-20-13:30", "2026-11-20-19:15"),
        (Grid("hour", "UTC"), "2026-11-20T13:59", "2026-11-19-13:00", "2026-11-20-12:00"),
        (Grid("hour", "Asia/Kolkata"), "2026-11-20T13:29", "2026-11-19-18:00", "2026-11-20-17:00"),
        (Grid("day", "UTC", offset_hour=5), "2026-11-20T04:59", "2026-10-26", "2026-11-18"),
        (Grid("week", "UTC", offset_day=1), "2026-11-20T13:00", "2026-06-01", "2026-11-09"),
    ],
    ids=str,
)
def test_the_latest_intervals_are_the_last_ones_that_are_over_oldest_first(
    grid: Grid, now: str, first: str, last: str
) -> None:
    found = latest(grid, "2026-01-05", now)
    assert [len(found), found[0].partition_key, found[-1].partition_key] == [24, first, last]
    assert found[-1].end <= utc(now) < found[-1].end + (found[-1].end - found[-1].start)


@pytest.mark.parametrize("interval", ["every 5 minutes", "every 15 minutes", "hour", "day", "week"])
def test_an_interval_is_among_the_latest_from_its_end_on(interval: IntervalLength) -> None:
    grid, start = Grid(interval, "UTC"), utc("2026-11-15")
    [first] = of_range(grid, "2026-11-15", keys(grid, "2026-11-15", "2026-11-23")[0])
    for now, count in ((start, 0), (first.end - timedelta(microseconds=1), 0), (first.end, 1), (first.end + HOUR, 1)):
        found = recent(grid.partitions("2026-11-15"), 24, now)
        assert found[:1] == (first,) * count
    assert recent(grid.partitions("2026-11-15"), 24, start - timedelta(days=400)) == ()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("now", ["2026-03-29T12:00", "2026-10-25T12:00", "2026-11-01T12:00"])
def test_across_a_change_of_clocks_the_latest_intervals_are_those_of_a_range(grid: Grid, now: str) -> None:
    found = latest(grid, "2026-03-01", now, 100)
    assert found == of_range(grid, "2026-03-01", found[0].partition_key, found[-1].partition_key)
    assert found[-1].end <= utc(now)


def test_days_of_23_and_25_hours_and_a_repeated_hours_quarters_are_among_the_latest() -> None:
    berlin = "Europe/Berlin"
    for start, now, hours in (("2026-03-01", "2026-03-30T22:00", 23), ("2026-10-01", "2026-10-26T23:00", 25)):
        lengths = [interval.end - interval.start for interval in latest(Grid("day", berlin), start, now, 3)]
        assert lengths == [24 * HOUR, hours * HOUR, 24 * HOUR]
    quarters = latest(Grid("every 15 minutes", berlin), "2026-10-20", "2026-10-25T02:00", 9)
    assert [quarter.partition_key for quarter in quarters] == [
        "2026-10-25-01:45",
        *(f"2026-10-25-02:{minute}{fold}" for fold in ("", "+0100") for minute in ("00", "15", "30", "45")),
    ]
    assert [quarter.start for quarter in quarters] == [utc("2026-10-24T23:45") + n * HOUR / 4 for n in range(9)]


# Runs


def events_export(target: Target, **changes: Any) -> PostgresExport:
    settings: dict[str, Any] = {"model": "events", "team_id": TEAM, "schema": target.schema, "start": "2026-10-24"}
    return PostgresExport(**(settings | changes))


def test_a_refused_range_reads_and_writes_nothing(source: Source, target: Target, hour: datetime) -> None:
    current = hour + 3 * HOUR
    export = events_export(target, start=current - 4 * HOUR)
    hours = [f"{current + number * HOUR:%Y-%m-%d-%H:%M}" for number in range(-5, 3)]
    half_past = hours[3].replace(":00", ":30")
    for first, last, said in (
        (hours[2], hours[5], "not over"),
        (hours[2], hours[7], "not over"),
        (half_past, half_past, "no boundary"),
        (half_past, hours[4], "no boundary"),
        (hours[2], half_past, "no boundary"),
        (hours[3], hours[2], "runs backwards"),
        (hours[0], hours[2], "before the export's `start`"),
    ):
        run = materialise(export, source.resource(), target.resource(), first, last)
        assert run.error is not None
        assert said in run.error
        assert "Stack Trace" not in run.error
    assert (
        target.rows(
            "SELECT relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace"
            f" WHERE nspname = '{target.schema}'"
        )
        == []
    )


def test_a_run_without_a_partition_says_so(source: Source, target: Target) -> None:
    run = materialise(events_export(target), source.resource(), target.resource(), "")
    assert run.error is not None
    assert "this run names no partition" in run.error
    assert "Stack Trace" not in run.error


def test_a_local_day_of_25_hours_exports_all_its_rows_once(source: Source, target: Target, run: RunExport) -> None:
    source.execute(
        "INSERT INTO events (uuid, event, properties, timestamp, team_id, distinct_id, _timestamp, inserted_at)"
        " SELECT generateUUIDv4(number), 'tick', '{}', moment, 1, toString(number), moment, moment"
        " FROM (SELECT number, toDateTime64('2026-10-24 20:00:00', 6, 'UTC') + number * 600 AS moment FROM numbers(200))"
    )
    daily = events_export(target, interval="day", timezone="Europe/Berlin")
    assert run(daily, "2026-10-25").counts == (25 * 6, 0, 0)
    hourly = events_export(target, name="hourly", table="events", timezone="Europe/Berlin")
    assert run(hourly, "2026-10-25-02:00", "2026-10-25-02:00+0100").counts == (0, 0, 12)
    assert run(daily, "2026-10-24", "2026-10-26").counts == (200 - 25 * 6, 0, 25 * 6)
    assert target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(200, 200)]


# Schedules


@dataclass(frozen=True)
class Schedule:
    """An export's schedule in a code location."""

    definition: dg.ScheduleDefinition
    repository: dg.RepositoryDefinition

    def tick(self, moment: datetime) -> Any:
        """What the schedule does at a moment."""
        context = dg.build_schedule_context(scheduled_execution_time=moment, repository_def=self.repository)
        return self.definition.evaluate_tick(context)


def scheduled(start: str, interval: IntervalLength, **changes: Any) -> Schedule:
    postgres = PostgresResource(host="unused", user="unused", database="unused")
    resources = {
        "clickhouse": ClickHouseResource(host="unused"),
        "postgres_io_manager": PostgresIOManager(postgres=postgres),
    }
    export = PostgresExport(model="events", team_id=TEAM, start=start, interval=interval, **changes)
    defs = dg.Definitions.merge(export.build_defs(None), dg.Definitions(resources=resources))
    return Schedule(defs.get_schedule_def("events_schedule"), defs.get_repository_def())


def at(schedule: Schedule, moment: datetime) -> str | None:
    """The key of the partition that a tick at a moment asks for."""
    tick = schedule.tick(moment)
    asked: list[str | None] = [request.partition_key for request in tick.run_requests or []]
    assert len(asked) == (0 if tick.skip_message else 1)
    return asked[0] if asked else None


@pytest.mark.parametrize(
    ("interval", "settings", "cron"),
    [
        ("hour", {}, "1 * * * *"),
        ("every 5 minutes", {}, "1-59/5 * * * *"),
        ("every 15 minutes", {}, "1-59/15 * * * *"),
        ("day", {"offset_hour": 5, "timezone": "Europe/Berlin"}, "1 5 * * *"),
        ("week", {"offset_hour": 5, "offset_day": 0}, "1 5 * * 0"),
    ],
)
def test_a_schedule_fires_one_minute_past_each_boundary(
    interval: IntervalLength, settings: dict[str, Any], cron: str
) -> None:
    schedule = scheduled("2026-11-15", interval, **settings).definition
    assert schedule.cron_schedule == cron
    assert schedule.execution_timezone == settings.get("timezone", "UTC")
    assert schedule.name == "events_schedule"
    assert schedule.job_name == "events_job"


@pytest.mark.parametrize(
    ("interval", "settings", "tick", "key"),
    [
        ("hour", {}, "2026-11-22T14:01", "2026-11-22-13:00"),
        ("every 5 minutes", {}, "2026-11-22T14:01", "2026-11-22-13:55"),
        ("every 5 minutes", {}, "2026-11-22T14:56", "2026-11-22-14:50"),
        ("every 15 minutes", {}, "2026-11-22T14:46", "2026-11-22-14:30"),
        ("day", {}, "2026-11-22T00:01", "2026-11-21"),
        ("day", {"offset_hour": 5}, "2026-11-22T05:01", "2026-11-21"),
        ("week", {}, "2026-11-22T00:01", "2026-11-15"),
        ("week", {"offset_day": 0, "offset_hour": 3, "timezone": "Europe/Berlin"}, "2026-11-22T02:01", "2026-11-15"),
        ("hour", {"timezone": "Asia/Kolkata"}, "2026-11-22T13:31", "2026-11-22-18:00"),
    ],
)
def test_a_tick_asks_for_the_interval_that_just_ended(
    interval: IntervalLength, settings: dict[str, Any], tick: str, key: str
) -> None:
    assert at(scheduled("2026-11-15", interval, **settings), utc(tick)) == key


def ticks(schedule: Schedule, start: datetime, end: datetime) -> Iterator[datetime]:
    """The moments at which Dagster's daemon evaluates a schedule."""
    cron, zone = schedule.definition.cron_schedule, schedule.definition.execution_timezone
    assert isinstance(cron, str)
    return itertools.takewhile(
        lambda moment: moment.timestamp() <= end.timestamp(), cron_string_iterator(start.timestamp(), cron, zone)
    )


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.timezone == "Europe/Berlin"], ids=str)
@pytest.mark.parametrize(("start", "end"), [("2026-03-28T20:00", "2026-03-30"), ("2026-10-24T20:00", "2026-10-26")])
def test_across_a_change_of_clocks_the_ticks_ask_for_every_interval_once(grid: Grid, start: str, end: str) -> None:
    first = utc(start) - timedelta(days=15 if grid.interval == "week" else 1)
    schedule = scheduled(
        "2026-03-01", grid.interval, timezone=grid.timezone, offset_hour=grid.offset_hour, offset_day=grid.offset_day
    )
    asked = [(moment, at(schedule, moment)) for moment in ticks(schedule, first, utc(end))]
    names = [key for _, key in asked if key is not None]
    found = of_range(grid, "2026-03-01", names[0], names[-1])
    assert names == [interval.partition_key for interval in found]
    for (moment, _), interval in zip(asked, found, strict=True):
        # Where clocks skip the boundary's own hour, Dagster fires at the hour after it, which is the boundary.
        assert moment.astimezone(UTC) - interval.end in (timedelta(minutes=1), timedelta())


def test_before_the_first_interval_is_over_a_tick_is_skipped_with_the_reason() -> None:
    schedule = scheduled("2026-11-20T13:00", "hour")
    for moment in ("2026-11-19T00:01", "2026-11-20T13:01"):
        assert (
            schedule.tick(utc(moment)).skip_message
            == "No interval is over yet: the first one begins at `start` 2026-11-20T13:00."
        )
    assert at(schedule, utc("2026-11-20T14:01")) == "2026-11-20-13:00"


def test_a_schedule_runs_unless_it_is_paused() -> None:
    assert scheduled("2026-11-15", "hour").definition.default_status is dg.DefaultScheduleStatus.RUNNING
    assert scheduled("2026-11-15", "hour", paused=True).definition.default_status is dg.DefaultScheduleStatus.STOPPED
