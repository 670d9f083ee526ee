"""Writes one interval: its rows, their keys, and its row in the ledger, in one transaction.

Which way the rows take is decided by what the ledger says of the table. An interval that none overlaps goes straight in;
of one that runs have written before, what the key journals lack; and where they do not tell, through a staging table, what
the table itself lacks.
"""

import functools
import logging
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from pg_exports.fingerprint import Fingerprint
from pg_exports.interval import Counts, Interval, IntervalFrames
from pg_exports.models import IDENTITY
from pg_exports.postgres import ingest, journal, ledger, merge, rejected
from pg_exports.postgres import table as tables
from pg_exports.postgres.journal import Journal, Sieve
from pg_exports.postgres.ledger import Past
from pg_exports.postgres.merge import Merged
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import Destination, DestinationTable


@dataclass(frozen=True)
class Written:
    """An interval's counts, and what the ledger keeps beside them."""

    counts: Counts
    fingerprint: Fingerprint | None
    keys: int


def write(
    session: Session,
    destination: Destination,
    export: IntervalFrames,
    interval: Interval,
    run_id: str,
    log: logging.Logger,
) -> Counts:
    """Bring the table to where one run of the interval would have left it, and say so in the ledger.

    Raises:
        DestinationError, SourceError, PassingError: nothing of the interval was written. Where the answer to COMMIT was
            lost everything may have been: the next try of the same run finds out, and gives the counts that it had.
    """
    started_at = datetime.now(UTC)
    with session.transaction():
        ledger.lock(session, destination, interval, whole_table=export.deduplicate == "table")
        tables.lock(session, destination)
        table = tables.inspect(session, destination, export.model)
        past = ledger.past(session, table, interval, export=export.export, team_id=export.team_id, run_id=run_id)
        if past.by_this_run:
            return past.by_this_run
        rejected.resolve(session, table, export.export, interval)
        written = _unchanged(export, interval, past) or _load(session, table, export, interval, past, run_id, log)
        ledger.record(
            session,
            table,
            interval,
            written.counts,
            export=export.export,
            team_id=export.team_id,
            fingerprint=written.fingerprint,
            keys=written.keys,
            rows_before=past.rows_before,
            run_id=run_id,
            started_at=started_at,
        )
    return written.counts


def _unchanged(export: IntervalFrames, interval: Interval, past: Past) -> Written | None:
    """The interval as it was written before, if all of its rows landed then and the source has the same ones now."""
    if not (past.fingerprints and export.fingerprint) or export.replay:
        return None
    fingerprint = export.fingerprint(interval)
    if str(fingerprint) not in past.fingerprints:
        return None
    rows = fingerprint.rows
    counts = Counts(rows, inserted=0, updated=0, unchanged=rows, repaired=0, rejected=0, missing=0, bytes=0)
    return Written(counts, fingerprint, past.keys if past.is_journaled else ledger.UNKNOWN)


def _load(
    session: Session,
    table: DestinationTable,
    export: IntervalFrames,
    interval: Interval,
    past: Past,
    run_id: str,
    log: logging.Logger,
) -> Written:
    is_known = past.has_interval and past.is_journaled and not export.replay and bool(export.fingerprint)
    there = journal.read(session, table, export.team_id, interval) if is_known else pl.Series(IDENTITY, [], pl.UInt64)
    sieve = Sieve(there)
    record = Journal(session, table, export.team_id, interval, export.export, run_id)
    copy = functools.partial(
        ingest.copy_frames,
        session,
        table,
        on_bad_rows=export.on_bad_rows,
        set_aside=functools.partial(rejected.keep, session, table, export.export, interval, run_id),
        landed=record.add,
    )
    goes_straight_in = not (
        export.model.merge
        or past.rows_before
        or (past.has_interval and not is_known)
        or export.deduplicate == "table"
        or table.has_triggers
    )
    with export.read(interval) as frames:
        if goes_straight_in:
            copied = copy(table.destination.table, sieve.sift(frames))
            merged = Merged(inserted=copied.rows, updated=0)
        else:
            with merge.staging_table(session, table) as staging:
                copied = copy(staging, sieve.sift(frames))
                if copied.rows and not export.model.merge:
                    _advise_index(session, table, log)
                merged = merge.merge(session, table, staging) if copied.rows else Merged(0, 0)
    record.flush()
    # Counted where they are read and where they are written, so that the two can be compared.
    missing = merged.missing + sieve.rows - sieve.known - copied.rows - copied.rejected
    counts = Counts(
        at_source=sieve.rows,
        inserted=merged.inserted,
        updated=merged.updated,
        unchanged=sieve.known + copied.rows - merged.inserted - merged.updated - merged.missing,
        repaired=copied.repaired,
        rejected=copied.rejected,
        missing=missing,
        bytes=copied.bytes,
    )
    # Rows that did not stay must be sent again: then the journals do not count, and the table is asked.
    keys = ledger.UNKNOWN if missing else past.keys + record.written
    return Written(counts, sieve.fingerprint if export.fingerprint else None, keys)


def _advise_index(session: Session, table: DestinationTable, log: logging.Logger) -> None:
    statement = tables.missing_index(session, table)
    if statement:
        log.info(f"{table.qualified} is asked for keys, and read as a whole for it. If that takes long: {statement};")
