"""When an export's intervals begin and end: partitions, the start of the first one, and the keys of a run.

Dagster accepts a start inside a period and a key off the grid, and silently means the next period; here both are errors.
"""

import contextlib
import functools
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import dagster as dg

from pg_exports.errors import SettingsError
from pg_exports.interval import Interval

IntervalLength = Literal["hour", "day", "week", "every 5 minutes", "every 15 minutes"]

_MINUTES = {"hour": "0", "every 5 minutes": "*/5", "every 15 minutes": "*/15"}
_MINUTES_AFTER = {"hour": "1", "every 5 minutes": "1-59/5", "every 15 minutes": "1-59/15"}

_LENGTHS = {
    "hour": timedelta(hours=1),
    "every 5 minutes": timedelta(minutes=5),
    "every 15 minutes": timedelta(minutes=15),
}

_YEARS_TO_COME = timedelta(days=2 * 366)
"""For which changes of clocks are looked at: what a time zone does in one year it does in the next, until its law changes."""

SETTLING = timedelta(minutes=1)
"""How long after its end an interval is left alone, for rows on their way into ClickHouse. Schedules keep to it by firing a
minute late; only a run that was started by hand, or a tick on a day when clocks change, has to wait."""

# Years that ClickHouse's DateTime holds.
_FIRST_YEAR, _LAST_YEAR = 1971, 2105


@dataclass(frozen=True)
class Grid:
    """Where an export's periods begin.

    Attributes:
        interval: a period's length.
        timezone: in which days and weeks, and `start`, are read.
        offset_hour: hour at which a day or week begins.
        offset_day: day on which a week begins, 0 = Sunday.
    """

    interval: IntervalLength
    timezone: str
    offset_hour: int = 0
    offset_day: int = 0

    @property
    def boundaries(self) -> str:
        """Cron expression of the periods' beginnings."""
        if self.interval in _MINUTES:
            return f"{_MINUTES[self.interval]} * * * *"
        return f"0 {self.offset_hour} * * {self.offset_day if self.interval == 'week' else '*'}"

    @property
    def schedule(self) -> str:
        """Cron expression of the moments one minute past them, when the period before is complete."""
        if self.interval in _MINUTES_AFTER:
            return f"{_MINUTES_AFTER[self.interval]} * * * *"
        return f"1 {self.offset_hour} * * {self.offset_day if self.interval == 'week' else '*'}"

    def partitions(self, start: str | date | datetime) -> dg.TimeWindowPartitionsDefinition:
        """The partitions from `start` on. Keys are like 2026-11-20-13:00, or 2026-11-20 for days and weeks.

        Raises:
            SettingsError: `start` or `timezone` cannot be read, or `start` is no boundary; with the two around it. Or a
                change of clocks since `start`, or in the years to come, leaves Dagster no periods that follow each other.
        """
        first = self._moment(start)
        self._check_changes_of_clocks(first)
        earlier = self._from(first - timedelta(days=15))
        before = earlier.get_prev_partition_window(first, respect_bounds=False)
        after = earlier.get_next_partition_window(first, respect_bounds=False)
        around = [window for window in (before and before.end, after and after.start) if window is not None]
        if first.astimezone(UTC) not in {boundary.astimezone(UTC) for boundary in around}:
            names = " and ".join(boundary.isoformat() for boundary in around)
            raise SettingsError(
                f"`start` {start} is no boundary of `interval: {self.interval}`: the boundaries around it are {names} "
                f"(`timezone` {self.timezone}, `offset_hour` {self.offset_hour}, `offset_day` {self.offset_day})."
            )
        return self._from(first)

    def _check_changes_of_clocks(self, first: datetime) -> None:
        until = max(first.astimezone(UTC), datetime.now(UTC)) + _YEARS_TO_COME
        for change in _changes_of_clocks(self._zone(), first.astimezone(UTC).date(), until.date()):
            if reason := self._off_the_grid(change):
                raise SettingsError(
                    f"`interval: {self.interval}` is not possible with `timezone: {self.timezone}`"
                    f"{f' and `offset_hour: {self.offset_hour}`' if self.offset_hour else ''}: {reason} Give the export "
                    f"`timezone: UTC`{'' if self.interval in _MINUTES else ', or another `offset_hour`'}."
                )

    def _off_the_grid(self, change: "_ChangeOfClocks") -> str | None:
        """Why Dagster's periods around a change of clocks would overlap, or leave a time out; None where they do not."""
        moment = f"on {change.moment:%Y-%m-%d} at {change.moment:%H:%M} UTC clocks"
        if self.interval in _LENGTHS:
            if change.shift % _LENGTHS[self.interval]:
                return f"{moment} change by {abs(change.shift) // timedelta(minutes=1)} minutes, no whole number of intervals."
            return None
        # Dagster takes a boundary that clocks skip to be an hour later on the same day.
        for day in (change.skipped_from.date(), change.skipped_until.date()):
            boundary = datetime.combine(day, time(self.offset_hour))
            is_skipped = change.skipped_from <= boundary < change.skipped_until
            is_later = boundary + timedelta(hours=1) < change.skipped_until
            is_next_day = self.interval == "day" and boundary.date() < change.skipped_until.date()
            is_boundary = self.interval == "day" or boundary.isoweekday() % 7 == self.offset_day
            if is_boundary and is_skipped and (is_later or is_next_day):
                skipped = f"from {change.skipped_from:%H:%M} to {change.skipped_until:%H:%M}"
                return f"{moment} skip {skipped}, and with that its boundary."
        return None

    def _from(self, first: datetime) -> dg.TimeWindowPartitionsDefinition:
        return dg.TimeWindowPartitionsDefinition(
            cron_schedule=self.boundaries,
            start=first.replace(tzinfo=None),
            timezone=self.timezone,
            fmt="%Y-%m-%d-%H:%M" if self.interval in _MINUTES else "%Y-%m-%d",
        )

    def _moment(self, start: str | date | datetime) -> datetime:
        """`start` in the grid's timezone. A date is the period that begins on it."""
        zone = self._zone()
        value = _parsed(start)
        if not _FIRST_YEAR <= value.year <= _LAST_YEAR:
            raise SettingsError(f"`start` {start} is out of range: give a year from {_FIRST_YEAR} to {_LAST_YEAR}.")
        if not isinstance(value, datetime):
            hour = 0 if self.interval in _MINUTES else self.offset_hour
            value = datetime.combine(value, time(hour))
        # By way of UTC, so that a local time that a change of clocks skips becomes the one that it stands for.
        return (value if value.tzinfo else value.replace(tzinfo=zone)).astimezone(UTC).astimezone(zone)

    def _zone(self) -> ZoneInfo:
        try:
            return ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise SettingsError(
                f"`timezone` {self.timezone!r} is not known. Give an IANA name such as UTC or Europe/Berlin."
            ) from None


@dataclass(frozen=True)
class _ChangeOfClocks:
    """When clocks change, and by how much; the local times that they skip (if they go forward)."""

    moment: datetime
    skipped_from: datetime
    shift: timedelta

    @property
    def skipped_until(self) -> datetime:
        return self.skipped_from + self.shift


@functools.cache
def _changes_of_clocks(zone: ZoneInfo, first: date, last: date) -> tuple[_ChangeOfClocks, ...]:
    """Every change between two days, to the minute."""
    changes = []
    earlier = datetime.combine(first, time(), UTC)
    while earlier.date() <= last:
        later = earlier + timedelta(days=1)
        before, after = _offset(zone, earlier), _offset(zone, later)
        if before != after:
            low, high = 0, 24 * 60
            while high - low > 1:
                middle = (low + high) // 2
                is_before = _offset(zone, earlier + timedelta(minutes=middle)) == before
                low, high = (middle, high) if is_before else (low, middle)
            moment = earlier + timedelta(minutes=high)
            changes.append(_ChangeOfClocks(moment, (moment + before).replace(tzinfo=None), after - before))
        earlier = later
    return tuple(changes)


def _offset(zone: ZoneInfo, moment: datetime) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta()


def intervals(
    partitions: dg.TimeWindowPartitionsDefinition, first: str, last: str, now: datetime
) -> tuple[Interval, ...]:
    """The intervals of a run, in UTC, oldest first.

    Args:
        partitions: the export's partitions.
        first: the range's first key.
        last: its last key, inclusive; the same for one partition.
        now: the current time; an interval must be over by then.

    Raises:
        SettingsError: a key is off the grid or before `start`, the range runs backwards, or an interval is not over.
    """
    begin, end = _window(partitions, first), _window(partitions, last)
    if begin.start.timestamp() < partitions.start_timestamp:
        raise SettingsError(
            f"Partition {first} is before the export's `start`: its first partition is "
            f"{partitions.get_partition_key_for_timestamp(partitions.start_timestamp)}. Nothing was exported."
        )
    if begin.start.timestamp() > end.start.timestamp():
        raise SettingsError(f"The range from {first} to {last} runs backwards. Nothing was exported.")
    if end.end.timestamp() > now.timestamp():
        raise SettingsError(
            f"Partition {last} covers {_interval(last, end)}, which is not over: it is {now:%Y-%m-%d %H:%M:%S} UTC. "
            "Nothing was exported. Ask for it after its end, or for a range that ends before it."
        )
    # Dagster names a range's first key wrongly where that is the second of two equal local times (02:00+0100).
    _, *others = partitions.get_partition_keys_in_range(dg.PartitionKeyRange(first, last))
    return tuple(_interval(key, partitions.time_window_for_partition_key(key)) for key in (first, *others))


def recent(
    partitions: dg.TimeWindowPartitionsDefinition, count: int, now: datetime, since: datetime | None = None
) -> tuple[Interval, ...]:
    """The latest intervals that are over, in UTC, oldest first: so many, and all those that ended after `since`."""
    found: list[Interval] = []
    with dg.partition_loading_context(effective_dt=now):
        window = partitions.get_last_partition_window()
    while window is not None and (
        len(found) < count or (since is not None and window.end.timestamp() > since.timestamp())
    ):
        key = partitions.get_partition_key_for_timestamp(window.start.timestamp())
        found.append(_interval(key, window))
        window = partitions.get_prev_partition_window(window.start)
    return tuple(reversed(found))


def unsettled(last: Interval, now: datetime) -> timedelta:
    """How long to wait until the last of a run's intervals has settled; zero or less for one that has."""
    return last.end + SETTLING - now


def _interval(key: str, window: dg.TimeWindow) -> Interval:
    return Interval(key, window.start.astimezone(UTC), window.end.astimezone(UTC))


def _window(partitions: dg.TimeWindowPartitionsDefinition, key: str) -> dg.TimeWindow:
    try:
        window = partitions.time_window_for_partition_key(key)
    except (ValueError, OverflowError):
        raise SettingsError(
            f"Partition key {key!r} is no key of this export. Keys look like {partitions.fmt}."
        ) from None
    # By its timestamp: in an hour that a change of clocks repeats, two windows begin at the same local time.
    meant = partitions.get_partition_key_for_timestamp(window.start.timestamp())
    if key != meant:
        before = partitions.get_prev_partition_window(window.start, respect_bounds=False)
        names = [partitions.get_partition_key_for_timestamp(before.start.timestamp()), meant] if before else [meant]
        raise SettingsError(
            f"Partition key {key!r} is no boundary of this export's intervals: the keys around it are {' and '.join(names)}."
        )
    return window


def _parsed(start: str | date | datetime) -> date | datetime:
    if not isinstance(start, str):
        return start
    text = start.strip()
    for read in (date.fromisoformat, datetime.fromisoformat):
        with contextlib.suppress(ValueError):
            return read(text)
    raise SettingsError(
        f"`start` {start!r} is neither an ISO date (2026-11-20) nor an ISO datetime (2026-11-20T13:00:00+01:00)."
    )
