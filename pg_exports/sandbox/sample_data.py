"""Sample data for the sandbox: fills PostHog's tables with the days of a small shop, alike for tests and benchmarks.

`fill` plans how many visits start in which hour and runs the statements of `sample_people`, `sample_events` and
`sample_sessions` over it, a bounded number of rows at a time. ClickHouse makes the rows itself; the tables come from
`source_tables`. The same arguments give the same rows: no clock is read and no random number drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pg_exports.sandbox.sample_events import EVENTS
from pg_exports.sandbox.sample_people import MAPPINGS, PERSONS
from pg_exports.sandbox.sample_sessions import SESSIONS
from pg_exports.sandbox.source_tables import Execute

EVENTS_A_BLOCK = 10
# ClickHouse takes half a second to analyse the events' statement; sessions are grouped in memory.
EVENTS_A_STATEMENT = 1_000_000
EVENTS_A_STRETCH = 500_000
HOURS_FROM_EMPTY_TO_END = 7
# Visits that start in each hour of the day, UTC, relative to one another.
DAILY_RHYTHM = (6, 5, 5, 5, 5, 6, 7, 9, 11, 12, 13, 13, 13, 13, 13, 13, 13, 13, 13, 13, 12, 11, 9, 7)
MERGING_TABLES = ("events", "person", "person_distinct_id2", "raw_sessions")


@dataclass(frozen=True)
class Plan:
    """Which block of events starts in which hour. Times are microseconds since 1970, UTC."""

    begin: int
    end: int
    empty: int
    hour_starts: tuple[int, ...]
    first_blocks: tuple[int, ...]


def empty_hour(end: datetime) -> datetime:
    """Return the start of the hour in which nothing is inserted into any table: seven hours before `end`."""
    return end - timedelta(hours=HOURS_FROM_EMPTY_TO_END)


def fill(
    execute: Execute, database: str, *, end: datetime, hours: int = 72, events: int = 20_000, seed: int = 1
) -> None:
    """Fill the tables, which `create_tables` made, with the `hours` before `end` as they were inserted.

    Background merges of the four tables are stopped until the engine restarts: they would remove the duplicates and
    the outdated versions that are part of the sample, sooner or later as they please.

    Args:
        execute: runs one ClickHouse statement with its parameters.
        database: the ClickHouse database that holds the tables.
        end: end of the last interval, on the hour and with a time zone.
        hours: length of the sample, insertion time.
        events: distinct events; about 0.5 % of them are inserted twice. People are a twentieth as many, at least 200.
        seed: another seed gives other rows of the same kind.

    Raises:
        ValueError: `end` is not on an hour or carries no time zone, or a size is not positive.
    """
    plan = plan_of(end, hours, events)
    whose = {
        "database": database,
        "seed": seed,
        "begin": plan.begin,
        "end": plan.end,
        "empty": plan.empty,
        "people": max(events // 20, 200),
    }
    for table in MERGING_TABLES:
        execute("SYSTEM STOP MERGES {database:Identifier}.{table:Identifier}", {"database": database, "table": table})
    execute(PERSONS, whose)
    execute(MAPPINGS, whose)
    for first in range(0, events, EVENTS_A_STATEMENT):
        count = min(EVENTS_A_STATEMENT, events - first)
        execute(EVENTS, {**whose, **hours_of(plan, first, count), "copies": 0})
    execute(EVENTS, {**whose, **hours_of(plan, 0, events), "copies": 1})
    for start, stop in insertion_stretches(plan):
        execute(SESSIONS, {"database": database, "from": start, "to": stop})


def plan_of(end: datetime, hours: int, events: int) -> Plan:
    """Spread the blocks of events over the hours by the daily rhythm, none of them over the empty hour."""
    if end.tzinfo is None or end != end.replace(minute=0, second=0, microsecond=0):
        raise ValueError(f"end must be on an hour and carry a time zone, not {end!r}")
    if hours < 1 or events < 1:
        raise ValueError(f"hours and events must be at least 1, not {hours} and {events}")
    last = end.astimezone(UTC)
    starts = [last - timedelta(hours=back) for back in range(hours, 0, -1)]
    weights = [0 if start == empty_hour(last) else DAILY_RHYTHM[start.hour] for start in starts]
    blocks = -(-events // EVENTS_A_BLOCK)
    hour_starts: list[int] = []
    first_blocks: list[int] = []
    for position, start in enumerate(starts):
        first_block = blocks * sum(weights[:position]) // sum(weights)
        if first_blocks and first_blocks[-1] == first_block:
            hour_starts.pop()
            first_blocks.pop()
        hour_starts.append(microseconds(start))
        first_blocks.append(first_block)
    return Plan(
        begin=microseconds(starts[0]),
        end=microseconds(last),
        empty=microseconds(empty_hour(last)),
        hour_starts=tuple(hour_starts),
        first_blocks=tuple(first_blocks),
    )


def hours_of(plan: Plan, first: int, count: int) -> dict[str, object]:
    """Return the parameters for `count` events from number `first`, with those hours alone that they start in."""
    first_block = first // EVENTS_A_BLOCK
    last_block = (first + count - 1) // EVENTS_A_BLOCK
    following = (*plan.first_blocks[1:], last_block + 1)
    needed = [
        position
        for position, (own, following_own) in enumerate(zip(plan.first_blocks, following, strict=True))
        if own <= last_block and following_own > first_block
    ]
    return {
        "first": first,
        "count": count,
        "first_blocks": [plan.first_blocks[position] for position in needed],
        "hour_starts": [plan.hour_starts[position] for position in needed],
    }


def insertion_stretches(plan: Plan) -> Iterator[tuple[int, int]]:
    """Cut the insertion time at whole hours into stretches of `EVENTS_A_STRETCH` events or a little more."""
    start = plan.begin
    blocks = EVENTS_A_STRETCH // EVENTS_A_BLOCK
    stretch_first_block = 0
    for hour, first_block in zip(plan.hour_starts, plan.first_blocks, strict=True):
        if first_block - stretch_first_block >= blocks:
            yield start, hour
            start, stretch_first_block = hour, first_block
    yield start, plan.end


def microseconds(moment: datetime) -> int:
    """Return the microseconds since 1970 of a moment on a whole second."""
    return int(moment.timestamp()) * 1_000_000
