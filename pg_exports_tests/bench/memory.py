"""Does memory grow with the interval? The peak of a run's process for a small interval, for a great one, and for a small
one with a few events that are huge. MB are millions of bytes.
"""

import sys
from collections.abc import Iterator
from datetime import datetime

from pg_exports.sandbox import Sandbox, source_tables
from pg_exports_tests.bench import dataset, product
from pg_exports_tests.bench.dataset import TEAM
from pg_exports_tests.bench.processes import BenchError
from pg_exports_tests.bench.report import Section

SMALL, GREAT = 500_000, 5_000_000
"""Events of the team in an interval, about."""

HUGE_EVENTS, HUGE_MB = 20, 5
"""How many events have huge properties, and how huge."""

ITEMS_A_MB = 12_500
"""Parts of which huge properties consist."""

MB = 1_000_000

GROWTH = 1.10
"""What the great interval may take, of what the small one takes."""

MOST = 600 * MB
"""What any of them may take."""

# Evaluated for the huge rows alone: for each row of a block it would take gigabytes.
HUGE = """
INSERT INTO {database:Identifier}.events
SETTINGS short_circuit_function_evaluation = 'force_enable', optimize_on_insert = 0, max_block_size = 8192
WITH (
    SELECT groupArray(_offset)
    FROM (
        SELECT _offset, row_number() OVER (ORDER BY _offset) AS place, count() OVER () AS places
        FROM {source:Identifier}.events
        WHERE team_id = {team_id:Int64}
        GROUP BY _offset
        HAVING count() = 1
    )
    WHERE intDiv(place * {huge:UInt64}, places) > intDiv((place - 1) * {huge:UInt64}, places)
) AS chosen
SELECT * REPLACE (
    if(
        has(chosen, _offset),
        concat(
            '{"event number":', toString(_offset), ',"items":[',
            arrayStringConcat(
                arrayMap(n -> concat(
                    '{"number":', toString(n), ',"tags":["a","b",null],"price":{"amount":', toString(n / 4),
                    ',"currency":"EUR"}}'), range(toUInt64({items:UInt64} + _offset % 2))), ','),
            ']}'),
        properties
    ) AS properties
)
FROM {source:Identifier}.events
"""


def measure(sandbox: Sandbox, rounds: int, small: int = SMALL, great: int = GREAT, huge_mb: int = HUGE_MB) -> Section:
    """Export each interval, and take the highest peak of its rounds.

    Args:
        sandbox: whose servers are used; what is made in them is dropped again.
        rounds: runs of each interval.
        small, great: events in the intervals.
        huge_mb: size of the huge events' properties.

    Raises:
        BenchError: a run failed, or a run has not exported what it should.
    """
    peaks = list(_peaks(sandbox, rounds, small, great, huge_mb))
    [(_, few, _), _, (_, many, _)] = peaks
    growth = many / few
    return Section(
        title="Memory of a run",
        header=("interval", "rows", "peak MB"),
        rows=[(name, f"{rows:,}", f"{peak / MB:.0f}") for name, peak, rows in peaks],
        remarks=[
            f"Peak resident memory of the run's process, the highest of {rounds} runs; MB are millions of bytes.",
            f"The great interval takes {growth:.2f} times what the small one takes; at most {GROWTH:.2f} times is promised, "
            f"and less than {MOST / MB:.0f} MB for each.",
        ],
        holds=growth <= GROWTH and all(peak < MOST for _, peak, _ in peaks),
    )


def _peaks(sandbox: Sandbox, rounds: int, small: int, great: int, huge_mb: int) -> Iterator[tuple[str, int, int]]:
    """Name, highest peak in bytes, and rows of each interval."""
    with dataset.new_database(sandbox) as database:
        start, _ = dataset.day(sandbox, database, events=_of_both_teams(small))
        yield "small", *_peak(sandbox, rounds, database, start, small)
        with dataset.new_database(sandbox) as huge:
            _fill_with_huge(sandbox, database, huge, huge_mb)
            yield f"small, {HUGE_EVENTS} events with {huge_mb} MB", *_peak(sandbox, rounds, huge, start, small)
    with dataset.new_database(sandbox) as database:
        start, _ = dataset.day(sandbox, database, events=_of_both_teams(great))
        yield "great", *_peak(sandbox, rounds, database, start, great)


def _of_both_teams(events: int) -> int:
    return round(events / dataset.TEAM_SHARE)


def _fill_with_huge(sandbox: Sandbox, source: str, database: str, huge_mb: int) -> None:
    """Copy a day's events to a new database, with a few whose properties are huge, evenly spread."""
    source_tables.create_tables(sandbox.execute, database)
    sandbox.execute("SYSTEM STOP MERGES {database:Identifier}.events", {"database": database})
    sandbox.execute(
        HUGE,
        {"database": database, "source": source, "team_id": TEAM, "huge": HUGE_EVENTS, "items": ITEMS_A_MB * huge_mb},
    )
    with sandbox.clickhouse_client(database) as client:
        [(huge,)] = client.query(
            "SELECT countIf(length(properties) > {bytes:UInt64} AND isValidJSON(properties)) FROM events",
            {"bytes": huge_mb * MB * 95 // 100},
        ).result_rows
    if huge != HUGE_EVENTS:
        raise BenchError(f"{huge} events are huge, not {HUGE_EVENTS}.")


def _peak(sandbox: Sandbox, rounds: int, database: str, start: datetime, events: int) -> tuple[int, int]:
    """The highest peak of several first loads of a day, in bytes, and the day's rows."""
    peaks = []
    for number in range(rounds):
        with dataset.new_schema(sandbox) as schema:
            result = product.run_day(sandbox, "events", database, schema, start)
        rows = int(result.total("rows_inserted"))
        if not 0.95 * events <= rows <= 1.05 * events:
            raise BenchError(f"A run exported {rows:,} events, not about {events:,}.")
        peaks.append(result.peak_bytes)
        sys.stderr.write(
            f"memory: {rows:,} events, run {number + 1} of {rounds}: {result.peak_bytes / MB:.0f} MB,"
            f" {result.seconds:.1f} s\n"
        )
    return max(peaks), rows
