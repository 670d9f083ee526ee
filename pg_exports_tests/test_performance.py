"""What keeps an export fast, on any machine: how much it asks of the servers, and times beside each other in one test.

How fast it is in seconds is the bench's business.
"""

import math
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from logging import getLogger
from typing import Any

import dagster as dg
import polars as pl
import pyarrow as pa
import pytest

from pg_exports.interval import Interval, IntervalFrames
from pg_exports.models import Selection
from pg_exports.models.events import EVENTS
from pg_exports.postgres import bad_rows, ingest, ledger, registry, rejected, types, writer
from pg_exports.postgres import table as tables
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import Destination, DestinationTable
from pg_exports.reader import Reader
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.faults import ROWS, eventually, fill
from pg_exports_tests.postgres.tcp_proxy import tcp_proxy
from pg_exports_tests.postgres.test_ingest import event as event_row
from pg_exports_tests.postgres.test_ingest import frame
from pg_exports_tests.postgres.test_session import log_size, statements_since
from pg_exports_tests.source_rows import HOUR, event, export_of, insert_sessions, mapping, new_session, session
from pg_exports_tests.source_rows import person as source_person
from pg_exports_tests.test_ranges import copies_since
from pg_exports_tests.test_ranges_together import PEOPLE, queries

MANY = 48


def insert_rows(source: Source, model: str, hours: Sequence[datetime]) -> None:
    """Two rows of a model in each hour."""
    if model == "events":
        source.insert("events", *(event(hour) for hour in hours for _ in range(2)))
    elif model == "persons":
        source.insert("person", *(source_person(hours[0] - 9 * HOUR, who, 1) for who in PEOPLE.values()))
        people = list(PEOPLE.values())
        rows = [mapping(hour, f"{hour} {n}", people[n]) for hour in hours for n in range(2)]
        source.insert("person_distinct_id2", *rows)
    else:
        insert_sessions(source, *(session(new_session(hour), hour) for hour in hours for _ in range(2)))


# What a range asks of the servers


@pytest.mark.parametrize(
    ("model", "statements", "asked", "again", "asked_again"),
    # A few more than there are now.
    [("events", 140, 5, 90, 5), ("persons", 150, 5, 150, 5), ("sessions", 150, 5, 150, 5)],
)
def test_a_range_of_many_small_intervals_is_a_few_statements_and_queries(
    source: Source,
    target: Target,
    run: RunExport,
    hour: datetime,
    model: str,
    statements: int,
    asked: int,
    again: int,
    asked_again: int,
) -> None:
    hours = [hour - n * HOUR for n in reversed(range(MANY))]
    insert_rows(source, model, hours)
    export = export_of(model, target, hour, start=hours[0] - HOUR)
    assert run(export, partition_key(hours[0] - HOUR)).error is None
    for rows, most_statements, most_asked in (
        ((2 * MANY, 0, 0), statements, asked),
        ((0, 0, 2 * MANY), again, asked_again),
    ):
        offset, before = log_size(target), len(queries(source, model))
        assert run(export, partition_key(hours[0]), partition_key(hours[-1])).counts == rows
        said = statements_since(target, offset)
        assert len(said) <= most_statements
        assert len(queries(source, model)) - before <= most_asked


def test_dagster_looks_up_once_for_each_check_which_materialization_it_is_of(
    source: Source, run: RunExport, target: Target, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up = []
    fetch_materializations = dg.DagsterInstance.fetch_materializations

    def counting(*arguments: Any, **options: Any) -> Any:
        looked_up.append(arguments)
        return fetch_materializations(*arguments, **options)

    source.insert("events", event(hour))
    export = export_of("events", target, hour)
    monkeypatch.setattr(dg.DagsterInstance, "fetch_materializations", counting)
    done = run(export, partition_key(hour))
    assert len(done.checks) == len(looked_up) == 6
    targets = [check.target_materialization_data for check in done.checks.values()]
    assert len({target.storage_id for target in targets if target}) == 1
    assert None not in targets


@pytest.mark.parametrize("copies", [1, 3])
def test_an_intervals_copies_follow_the_bytes_of_its_rows_and_not_the_blocks_of_the_answer(
    source: Source, target: Target, run: RunExport, hour: datetime, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    fill(source, hour)
    with source.resource().frames(EVENTS.query(selection(hour)), EVENTS, columns=(), log_comment="") as frames:
        sizes = [int(frame.estimated_size()) for frame in frames]
    assert len(sizes) >= 6
    monkeypatch.setattr(ingest, "COPY_BYTES", sum(sizes) / copies)
    offset = log_size(target)
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (ROWS, 0, 0)
    # Blocks are put together whole, and a great one is cut into equal parts; the first three COPYs are smaller.
    assert math.ceil(copies / 2) <= copies_since(target, offset) <= math.ceil(1.5 * copies) + 3


def selection(hour: datetime) -> Selection:
    return Selection(TEAM, hour, hour + HOUR)


def test_columns_that_the_table_lacks_are_not_read_at_the_source(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour - n * HOUR) for n in range(3)))
    export = export_of("events", target, hour)
    optional = {"person_id", "person_properties", "created_at"}
    done = run(export, partition_key(hour - 2 * HOUR), partition_key(hour - HOUR))
    assert done.counts == (2, 0, 0)
    target.execute("ALTER TABLE events ADD person_properties jsonb")
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    assert [columns & optional for columns in source.columns_read("events")] == [set(), set(), {"person_properties"}]


# What happens to the rows on their way


def text_addresses(array: pa.Array | pa.ChunkedArray) -> set[int]:
    """Where the long texts of an array are."""
    chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
    arrays = [chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in chunks]
    # Validity, views, and then the texts.
    return {buffer.address for one in arrays for buffer in one.buffers()[2:] if buffer is not None}


def test_text_goes_from_a_frame_to_copy_without_a_copy(target: Target) -> None:
    documents = [f'{{"n": {n}, "a": "{"x" * 2_000}"}}' for n in range(12_500)]
    rows = frame(EVENTS, event_row()).select(pl.exclude("properties", "person_properties"))
    rows = pl.concat([rows] * len(documents)).with_columns(
        properties=pl.Series(documents), person_properties=pl.Series(documents)
    )
    assert rows.estimated_size() > 50_000_000
    with target.resource().session() as session:
        table = tables.ensure(session, Destination(None, target.schema, "events"), EVENTS)
    target.execute("ALTER TABLE events ADD person_properties json")
    with target.resource().session() as session:
        table = tables.inspect(session, table.destination, EVENTS)
    good = bad_rows.sort_out(rows, table, "repair").good
    before = pa.total_allocated_bytes()
    sent = types.arrow_table(good, table.pairs)
    assert pa.total_allocated_bytes() - before < 0.1 * rows.estimated_size()
    for name in ("properties", "person_properties"):
        there = rows[name].to_arrow(compat_level=pl.CompatLevel.newest())
        assert text_addresses(there)
        assert text_addresses(sent[name]) == text_addresses(there)


def test_the_next_rows_are_read_while_postgres_takes_the_last(target: Target) -> None:
    megabyte = "x" * 1_000_000
    one = frame(EVENTS, *(event_row(n, properties=f'"{megabyte}"') for n in range(17)))
    asked: list[int] = []
    landed: list[int] = []

    def frames() -> Iterator[pl.DataFrame]:
        for n in range(3):
            asked.append(n)
            yield one

    with target.resource().session() as session:
        table = tables.ensure(session, Destination(None, target.schema, "events"), EVENTS)
    is_first_copied = threading.Event()

    def copy(session: Session) -> None:
        def land(rows: pl.DataFrame, _: pl.Series) -> None:
            landed.append(rows.height)

        with session.transaction():
            ingest.copy_frames(session, table, "events", frames(), "fail", lambda bad: None, land)
        is_first_copied.set()

    with (
        tcp_proxy(target.sandbox.postgres.port) as proxy,
        target.resource(port=proxy.port).session() as session,
        ThreadPoolExecutor() as threads,
    ):
        frozen = proxy.after(2_000_000, proxy.freeze)
        done = threads.submit(copy, session)
        try:
            assert frozen.wait(20)
            # The piece after the one that is under way, and no more than one that waits beside it.
            eventually(lambda: len(asked) > 1, seconds=10)
            assert landed == []
        finally:
            proxy.thaw()
        done.result()
    assert (asked, landed) == ([0, 1, 2], [17, 17, 17])


@pytest.mark.parametrize("model", ["persons", "sessions"])
def test_a_merge_into_a_table_without_triggers_is_one_statement_and_what_prepares_it(
    source: Source, target: Target, run: RunExport, hour: datetime, model: str
) -> None:
    """An interval alone, and three together."""
    hours = [hour - n * HOUR for n in reversed(range(4))]
    insert_rows(source, model, hours)
    export = export_of(model, target, hour)
    offset = log_size(target)
    assert run(export, partition_key(hours[0]), partition_key(hours[-1])).error is None
    said = [statement.strip() for statement in statements_since(target, offset)]
    copied = [n for n, statement in enumerate(said) if statement.startswith("RELEASE SAVEPOINT")]
    dropped = [n for n, statement in enumerate(said) if statement.startswith("DROP TABLE")]
    assert len(copied) == len(dropped) == 2
    for is_first, begin, end in zip((True, False), copied, dropped, strict=True):
        [memory, look, merge, others] = [one for one in said[begin + 1 : end] if "pg_exports_keys" not in one]
        assert "hash_mem_multiplier" in memory
        assert "LIMIT 1" in look
        assert "INSERT INTO" in merge
        assert "ON CONFLICT" in merge
        # Which rows are there already is not asked of an empty table.
        assert ("LEFT JOIN" in merge) != is_first
        assert "pg_exports_tables" in others


# Times beside each other


@dataclass(frozen=True)
class Writing:
    """What it took to write an interval: seconds by the clock, and of this process's processor."""

    wall: float
    cpu: float


def frames_of(source: Source, hour: datetime) -> IntervalFrames:
    """An hour of events, without Dagster."""
    return IntervalFrames(
        export="events",
        model=EVENTS,
        team_id=TEAM,
        intervals=(Interval("", hour, hour + HOUR),),
        source=Reader(source.resource(), EVENTS, selection(hour), {}, getLogger()),
        on_bad_rows="repair",
        deduplicate="interval",
    )


def new_table(session: Session, target: Target, name: str) -> DestinationTable:
    """An empty table of events, with what an export keeps beside it."""
    table = tables.ensure(session, Destination(None, target.schema, name), EVENTS)
    ledger.ensure(session, target.schema)
    rejected.ensure(session, target.schema)
    registry.ensure(session, target.schema)
    return table


def written(source: Source, target: Target, hour: datetime, rows: int, name: str) -> Writing:
    """An hour's first load into a table of its own."""
    with target.resource().session() as session:
        table = new_table(session, target, name)
        export = frames_of(source, hour)
        wall, cpu = time.monotonic(), time.process_time()
        outcome = writer.write(session, table.destination, export, export.intervals, "run", getLogger())
        took = Writing(time.monotonic() - wall, time.process_time() - cpu)
    assert [counts.inserted for counts in outcome.counts.values()] == [rows]
    return took


def copied(source: Source, target: Target, hour: datetime, rows: int, name: str) -> float:
    """The seconds of COPY alone of the same rows, which are ready before it begins."""
    export = frames_of(source, hour)
    with target.resource().session() as session:
        table = new_table(session, target, name)
        with export.source.read(export.intervals, table.column_names) as frames:
            ready = [
                types.arrow_table(bad_rows.sort_out(piece, table, "repair").good, table.pairs)
                for piece in ingest.pieces(frames)
            ]
        began = time.monotonic()
        with session.transaction():
            sent = [
                session.copy(
                    target.schema,
                    name,
                    pa.RecordBatchReader.from_batches(one.schema, one.to_batches(max_chunksize=1_000)),
                )
                for one in ready
            ]
        took = time.monotonic() - began
    assert sum(sent) == rows
    return took


FEW, LOTS = 10_000, 50_000

PROPERTIES = (
    '{"$set": {"plan": "free"}, "$ip": "10.1.2.3", "$browser": "Firefox", "n": %d, "$lib": "web", "text": "'
    + 600 * "x"
    + '"}'
)


def insert_many(source: Source, hour: datetime, rows: int) -> None:
    """So many events in an hour, which differ."""
    source.execute(
        "INSERT INTO events (uuid, event, properties, timestamp, team_id, distinct_id, _timestamp, inserted_at) "
        "SELECT generateUUIDv4(number), '$pageview', replaceOne({properties:String}, '%d', toString(number)), "
        "{hour:DateTime64(6)}, {team:Int64}, toString(number), {hour:DateTime64(6)}, {hour:DateTime64(6)} "
        "FROM numbers({rows:UInt64})",
        {"properties": PROPERTIES, "hour": f"{hour:%Y-%m-%d %H:%M:%S}", "team": TEAM, "rows": rows},
    )


def test_an_intervals_time_is_near_that_of_its_copies_and_its_processor_time_grows_with_its_rows(
    source: Source, target: Target, hour: datetime
) -> None:
    insert_many(source, hour, LOTS)
    insert_many(source, hour - HOUR, FEW)
    many, few, alone = [], [], []
    # In turns, so that what else the machine does is shared.
    for n in range(3):
        many.append(written(source, target, hour, LOTS, f"many_{n}"))
        few.append(written(source, target, hour - HOUR, FEW, f"few_{n}"))
        alone.append(copied(source, target, hour, LOTS, f"alone_{n}"))
    assert statistics.median(one.wall for one in many) <= 4 * statistics.median(alone)
    a_row_of_many = statistics.median(one.cpu for one in many) / LOTS
    a_row_of_few = statistics.median(one.cpu for one in few) / FEW
    assert a_row_of_many <= 1.5 * a_row_of_few
