"""Writes intervals: their rows, the keys of these, and their rows in the ledger, in one transaction.

Which way an interval's rows take is decided by what the ledger says of the table. Of an interval that none overlaps they go
straight in; of one that runs have written before, what the key journals lack; and where they do not tell, through a staging
table, what the table itself lacks. Several intervals share a transaction where all of them go straight in, are merged, or
are unchanged; any other has one to itself.
"""

import contextlib
import enum
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import polars as pl

from pg_exports.interval import Counts, Example, Interval, IntervalFrames, Seconds, spanned
from pg_exports.models import IDENTITY
from pg_exports.postgres import ingest, journal, ledger, merge, rejected
from pg_exports.postgres import table as tables
from pg_exports.postgres.bad_rows import BadRow
from pg_exports.postgres.journal import Journal, Sieve
from pg_exports.postgres.ledger import Past, Written
from pg_exports.postgres.merge import Merged
from pg_exports.postgres.progress import Progress
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import Destination, DestinationTable
from pg_exports.postgres.tally import Tally, by_interval, counted


@dataclass
class Outcome:
    """What a transaction wrote, and what it took.

    Attributes:
        counts: what became of each interval's rows.
        seconds: where the time went.
        times: the first and the last of the rows' own times, of intervals that had rows to be read.
        rejected: some of the rows that were set aside.
        repaired: by column, how many of its values were repaired.
    """

    counts: Mapping[Interval, Counts] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=Seconds)
    times: dict[Interval, tuple[datetime, datetime]] = field(default_factory=dict)
    rejected: list[Example] = field(default_factory=list)
    repaired: Counter[str] = field(default_factory=Counter)


def write(
    session: Session,
    destination: Destination,
    export: IntervalFrames,
    intervals: Sequence[Interval],
    run_id: str,
    log: logging.Logger,
) -> Outcome:
    """Bring the table to where one run of the first interval would have left it, and say so in the ledger; and likewise for
    the intervals that follow it, up to the first one that another run holds or that must be written in another way.

    Raises:
        DestinationError, SourceError, PassingError: nothing was written. Where the answer to COMMIT was lost everything may
            have been: the next try of the same run finds out, and gives the counts that it had.
    """
    started_at = datetime.now(UTC)
    outcome = Outcome()
    with session.transaction():
        free = ledger.lock(session, destination, intervals, whole_table=export.deduplicate == "table")
        tables.lock(session, destination)
        table = tables.inspect(session, destination, export.model)
        known = ledger.past(session, table, free, export=export.export, team_id=export.team_id, run_id=run_id)
        pasts = dict(zip(free, known, strict=True))
        way = _way(export, table, known[0])
        alike = list(itertools.takewhile(lambda interval: _way(export, table, pasts[interval]) is way, free))
        if way is _Way.WRITTEN:
            return Outcome({interval: counts for interval in alike if (counts := pasts[interval].by_this_run)})
        written = _unchanged(export, alike, pasts, outcome) if way is _Way.RECORDED else {}
        if written:
            rejected.resolve(session, table, export.export, list(written))
        else:
            together = alike if way in (_Way.STRAIGHT, _Way.MERGED) else alike[:1]
            rejected.resolve(session, table, export.export, together)
            written = _load(session, table, export, together, pasts, run_id, log, outcome)
        ledger.record(
            session,
            table,
            written,
            export=export.export,
            team_id=export.team_id,
            rows_before=known[0].rows_before,
            run_id=run_id,
            started_at=started_at,
        )
    outcome.counts = {interval: what.counts for interval, what in written.items()}
    return outcome


class _Way(enum.Enum):
    """How an interval is written."""

    WRITTEN = "by this run itself, in an earlier try"
    RECORDED = "all of its rows landed once, and may still be all"
    STRAIGHT = "by COPY into the table"
    MERGED = "by COPY into a staging table, and the model's merge"
    LACKING = "what the journals lack, or the table"


def _way(export: IntervalFrames, table: DestinationTable, past: Past) -> _Way:
    if past.by_this_run:
        return _Way.WRITTEN
    if export.model.merge:
        return _Way.MERGED
    if past.fingerprints and export.model.fingerprints and not export.replay:
        return _Way.RECORDED
    return _Way.LACKING if past.has_interval or not _may_go_straight_in(export, table, past) else _Way.STRAIGHT


def _may_go_straight_in(export: IntervalFrames, table: DestinationTable, past: Past) -> bool:
    """Whether rows that no earlier run has brought are not in the table, and stay when COPY has taken them."""
    return not (export.model.merge or past.rows_before or export.deduplicate == "table" or table.may_drop_rows)


def _unchanged(
    export: IntervalFrames, intervals: Sequence[Interval], pasts: Mapping[Interval, Past], outcome: Outcome
) -> dict[Interval, Written]:
    """The intervals as they were written before, up to the first one of which the source has not the same rows now."""
    with _timing(outcome, "source"):
        fingerprints = export.source.fingerprints(intervals)
    unchanged: dict[Interval, Written] = {}
    for interval, fingerprint in zip(intervals, fingerprints, strict=True):
        past = pasts[interval]
        if str(fingerprint) not in past.fingerprints:
            break
        rows = fingerprint.rows
        counts = Counts(rows, inserted=0, updated=0, unchanged=rows, repaired=0, rejected=0, missing=0, bytes=0)
        unchanged[interval] = Written(counts, fingerprint, past.keys if past.is_journaled else ledger.UNKNOWN)
    return unchanged


def _load(
    session: Session,
    table: DestinationTable,
    export: IntervalFrames,
    intervals: Sequence[Interval],
    pasts: Mapping[Interval, Past],
    run_id: str,
    log: logging.Logger,
    outcome: Outcome,
) -> dict[Interval, Written]:
    """The intervals' rows from the source into the table."""
    past = pasts[intervals[0]]
    is_known = past.has_interval and past.is_journaled and not export.replay and bool(export.model.fingerprints)
    there = journal.read(session, table, export.team_id, intervals[0]) if is_known else None
    sieve = None if there is None or there.is_empty() else Sieve(there)
    record = Journal(session, table, export.team_id, export.export, run_id)
    tallies = {interval.position: Tally(interval, export.model) for interval in intervals}
    progress = Progress(f"{export.export} {spanned(intervals)}", lambda: export.source.count(intervals), log)

    def landed(rows: pl.DataFrame, repaired: pl.Series) -> None:
        for start, some in by_interval(rows.with_columns(repaired.alias(_REPAIRED))):
            tallies[start].add(some, some[_REPAIRED], table)
            if IDENTITY in some.columns:
                record.add(tallies[start].interval, some[IDENTITY])
        progress.tell(sum(tally.copied + tally.rejected for tally in tallies.values()) + (sieve.known if sieve else 0))

    def set_aside(rows: list[BadRow]) -> None:
        for start, some in itertools.groupby(sorted(rows, key=_interval_of), key=_interval_of):
            bad = list(some)
            tallies[start].set_aside(bad)
            rejected.keep(session, table, export.export, tallies[start].interval, run_id, bad)

    def copy(into: str, interval_column: str | None = None) -> None:
        with contextlib.ExitStack() as opened:
            with _timing(outcome, "source"):
                frames = opened.enter_context(export.source.read(intervals, table.column_names))
            every = counted(frames, tallies)
            new = sieve.sift(every) if sieve else every
            copied = ingest.copy_frames(
                session, table, into, new, export.on_bad_rows, set_aside, landed, interval_column
            )
        outcome.seconds.source += copied.seconds.source
        outcome.seconds.transform += copied.seconds.transform
        outcome.seconds.copy += copied.seconds.copy
        outcome.repaired += copied.repaired
        if into != table.destination.table:
            progress.merging()

    if _may_go_straight_in(export, table, past) and (is_known or not past.has_interval):
        copy(table.destination.table)
        for tally in tallies.values():
            tally.merged = Merged(tally.copied, 0)
    elif export.model.merge and len(intervals) > 1:
        with merge.staging_table(session, table, of_several_intervals=True) as staging:
            copy(staging, merge.INTERVAL_COLUMN)
            with _timing(outcome, "merge"):
                for start, merged in merge.merge_intervals(session, table, staging, export.model.merge).items():
                    tallies[start].merged = merged
    else:
        [tally] = tallies.values()
        with merge.staging_table(session, table) as staging:
            copy(staging)
            if tally.copied:
                if not export.model.merge:
                    _advise_index(session, table, log)
                with _timing(outcome, "merge"):
                    tally.merged = merge.merge(session, table, staging)
    if sieve:
        tallies[intervals[0].position].known = sieve.known
    record.flush()
    for tally in tallies.values():
        outcome.rejected += tally.examples
        if tally.times:
            outcome.times[tally.interval] = tally.times
    return {tally.interval: tally.written(pasts[tally.interval]) for tally in tallies.values()}


_REPAIRED = "repaired"


@contextlib.contextmanager
def _timing(outcome: Outcome, what: Literal["source", "merge"]) -> Iterator[None]:
    """Count the block's seconds."""
    began = time.monotonic()
    yield
    setattr(outcome.seconds, what, getattr(outcome.seconds, what) + time.monotonic() - began)


def _interval_of(row: BadRow) -> int:
    assert row.interval is not None
    return row.interval


def _advise_index(session: Session, table: DestinationTable, log: logging.Logger) -> None:
    statement = tables.missing_index(session, table)
    if statement:
        log.info(f"{table.qualified} is asked for keys, and read as a whole for it. If that takes long: {statement};")
