"""Writes intervals: their rows, the keys of these, and their rows in the ledger, in one transaction.

Which way an interval's rows take is decided by what the ledger says of the table. Of an interval that none overlaps they go
straight in; of one that runs have written before, what the key journals lack; and where they do not tell, through a staging
table, what the table itself lacks. Several intervals share a transaction where all of them go straight in, are merged, or
are unchanged; any other has one to itself.
"""

import enum
import functools
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from pg_exports.interval import Counts, Example, Interval, IntervalFrames, Seconds, spanned
from pg_exports.postgres import journal, ledger, locks, own_tables, registry, rejected, streams
from pg_exports.postgres import table as tables
from pg_exports.postgres.ledger import Past, Written
from pg_exports.postgres.load import Load, Loading, may_go_straight_in
from pg_exports.postgres.progress import Progress
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import Destination, DestinationTable
from pg_exports.postgres.tally import combined


@dataclass
class Outcome:
    """What a transaction wrote, and what it took.

    Attributes:
        counts: what became of each interval's rows.
        seconds: where the time went.
        times: the first and the last of the rows' own times, of intervals that were read; None where there is none to show.
        rejected: some of the rows that were set aside.
        repaired: by column, how many of its values were repaired.
    """

    counts: Mapping[Interval, Counts] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=Seconds)
    times: dict[Interval, tuple[datetime | None, datetime | None]] = field(default_factory=dict)
    rejected: list[Example] = field(default_factory=list)
    repaired: Counter[str] = field(default_factory=Counter)


def write(
    session: Session,
    destination: Destination,
    export: IntervalFrames,
    intervals: Sequence[Interval],
    run_id: str,
    log: logging.Logger,
    others: Sequence[Session] = (),
    *,
    is_first: bool = True,
) -> Outcome:
    """Bring the table to where one run of the first interval would have left it, and say so in the ledger; and likewise for
    the intervals that follow it, up to the first one that another run holds or that must be written in another way.

    Args:
        session: in no transaction.
        destination: where to.
        export: what, from where, and how.
        intervals: oldest first.
        run_id: of the run.
        log: where to say what helps.
        others: further sessions, for an interval that is written alone.
        is_first: the session has written nothing yet.

    Raises:
        DestinationError, SourceError, PassingError: nothing was written, or with `others` what the ledger says. Where the
            answer to COMMIT was lost everything may have been: the next try of the same run finds out, and gives the counts
            that it had.
    """
    started_at = datetime.now(UTC)
    outcome = Outcome()
    with session.transaction():
        free = locks.lock(session, destination, intervals, whole_table=export.deduplicate == "table")
        tables.lock(session, destination)
        own_tables.hold(session, destination.schema)
        model = export.source.model
        table = registry.recognise(session, tables.inspect(session, destination, model), export.team_id)
        if may_go_straight_in(export, table):
            table = registry.find_others(session, table, is_first=is_first)
            if table.rows_before:
                log.warning(
                    f"Rows came into {table.qualified} by another way than exports. From now on each interval is compared "
                    "with the table, so that no row lands twice."
                )
        known = ledger.past(session, table, free, export=export.export, team_id=export.team_id, run_id=run_id)
        pasts = dict(zip(free, known, strict=True))
        way = _way(export, table, known[0])
        alike = list(itertools.takewhile(lambda interval: _way(export, table, pasts[interval]) is way, free))
        if way is _Way.WRITTEN:
            return Outcome({interval: counts for interval in alike if (counts := pasts[interval].by_this_run)})
        if way is _Way.RECORDED:
            # Rejected rows may have landed by another way since: only those that are read can be found to be there.
            rejects = rejected.Unresolved(session, table, export.export, export.team_id, alike).intervals
            complete = list(itertools.takewhile(lambda interval: interval not in rejects, alike))
            written = _unchanged(export, complete, pasts, outcome) if complete else {}
        else:
            written = {}
        record: _Record = functools.partial(
            ledger.record,
            table=table,
            export=export.export,
            team_id=export.team_id,
            run_id=run_id,
            started_at=started_at,
        )
        if not written:
            together = alike if way in (_Way.STRAIGHT, _Way.MERGED) else alike[:1]
            foreign = [interval for interval in together if pasts[interval].has_keys_of_another_scheme(model)]
            if foreign:
                journal.forget(session, table, export.team_id, export.export, foreign)
                pasts |= {interval: replace(pasts[interval], keys=0) for interval in foreign}
            progress = Progress(f"{export.export} {spanned(together)}", lambda: export.source.count(together), log)
            loading = Loading(table, export, together, pasts, run_id, log, progress)
            written = _load(session, others, loading, record, outcome)
        record(session, written=written)
    outcome.counts = {interval: what.counts for interval, what in written.items()}
    return outcome


_Record = Callable[..., None]
"""`ledger.record` of what is written, to be called with a session and `written`."""


class _Way(enum.Enum):
    """How an interval is written."""

    WRITTEN = "by this run itself, in an earlier try"
    RECORDED = "all of its rows landed once, and may still be all"
    STRAIGHT = "by COPY into the table"
    MERGED = "by COPY into a staging table, and the model's merge"
    LACKING = "what the journals lack, or the table"


def _way(export: IntervalFrames, table: DestinationTable, past: Past) -> _Way:
    if past.by_this_run and not past.by_this_run.missing:
        return _Way.WRITTEN
    if export.model.merge:
        return _Way.MERGED
    if past.fingerprints and not export.replay:
        return _Way.RECORDED
    return _Way.LACKING if past.has_interval or not may_go_straight_in(export, table) else _Way.STRAIGHT


def _unchanged(
    export: IntervalFrames, intervals: Sequence[Interval], pasts: Mapping[Interval, Past], outcome: Outcome
) -> dict[Interval, Written]:
    """The intervals as they were written before, up to the first one of which the source has not the same rows now."""
    began = time.monotonic()
    fingerprints = export.source.fingerprints(intervals)
    outcome.seconds.source += time.monotonic() - began
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
    session: Session, others: Sequence[Session], loading: Loading, record: _Record, outcome: Outcome
) -> dict[Interval, Written]:
    """The intervals' rows from the source into the table, over all sessions where it is one interval."""
    if others and len(loading.intervals) == 1:
        parts = streams.load(
            loading, session, others, lambda other, in_, out: record(other, written=_written(loading, in_, out))
        )
    else:
        parts = [Load(loading, session, loading.recorded(session))]
        parts[0].copy()
        if parts[0].is_staged:
            loading.progress.merging()
        parts[0].bring_in()
    for part in parts:
        outcome.seconds += part.seconds
        outcome.repaired += part.repaired
    for position in parts[0].tallies:
        tally = combined([part.tallies[position] for part in parts])
        if len(loading.intervals) == 1 and (
            loading.may_have_changed(tally) or any(part.has_rejected_known for part in parts)
        ):
            parts[0].replace_changed()
            tally = combined([part.tallies[position] for part in parts])
        outcome.rejected += tally.examples
        outcome.times[tally.interval] = tally.times
    return _written(loading, parts)


def _written(loading: Loading, parts: Sequence[Load], others: Sequence[Load] = ()) -> dict[Interval, Written]:
    """The intervals of which these parts are in, and the others were read."""
    written = {}
    for position in parts[0].tallies:
        tally = combined([part.tallies[position] for part in parts], [part.tallies[position] for part in others])
        written[tally.interval] = tally.written(loading.pasts[tally.interval])
    return written
