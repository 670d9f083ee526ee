"""The rows of an interval, or of several, from the source into the table, within a transaction that is open.

First all of them are copied, into the table itself or into a staging table; then what was staged is merged. Which of the two
it is was decided before (`writer`); that several connections may share the rows is `streams`' business.
"""

import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from pg_exports.errors import PassingError
from pg_exports.fingerprint import Fingerprint, scheme_of
from pg_exports.interval import Interval, IntervalFrames, Seconds
from pg_exports.models import IDENTITY, INTERVAL, STATE, Part
from pg_exports.models.model import WHOLE
from pg_exports.postgres import ingest, journal, keys, merge, rejected
from pg_exports.postgres.bad_rows import BadRow
from pg_exports.postgres.journal import NOTHING, Journal, Recorded, Sieve
from pg_exports.postgres.ledger import Past
from pg_exports.postgres.merge import Merged
from pg_exports.postgres.progress import Progress
from pg_exports.postgres.registry import Writing
from pg_exports.postgres.rejected import Unresolved
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import DestinationTable
from pg_exports.postgres.tally import Tally, by_interval, counted


@dataclass(frozen=True)
class Loading:
    """What is to be loaded.

    Attributes:
        table: the destination as it is now.
        export: the source, and what becomes of bad and of repeated rows.
        intervals: oldest first; several only where all of them go straight in, or are merged.
        pasts: what the table has of each.
        run_id: of the run.
        log: where to say what helps.
        progress: how far all of it has come.
    """

    table: DestinationTable
    export: IntervalFrames
    intervals: Sequence[Interval]
    pasts: Mapping[Interval, Past]
    run_id: str
    log: logging.Logger
    progress: Progress

    @property
    def goes_straight_in(self) -> bool:
        """Whether the rows that no journal knows are not in the table, and stay when COPY has taken them."""
        return may_go_straight_in(self.export, self.table) and (self._is_known or not self._past.has_interval)

    @property
    def _past(self) -> Past:
        return self.pasts[self.intervals[0]]

    @property
    def _is_known(self) -> bool:
        """Whether the journals tell which of the interval's rows are there."""
        past, export = self._past, self.export
        return past.has_interval and past.is_journaled and not export.replay and not export.model.merge

    def recorded(self, session: Session) -> dict[int, Recorded]:
        """What the journals have of each interval that runs have written before, by its position."""
        again = [interval for interval in self.intervals if self.pasts[interval].has_interval]
        return journal.read(session, self.table, self.export.team_id, self.export.export, again)

    def sieve(self, recorded: Mapping[int, Recorded]) -> Sieve | None:
        """What lets the rows through that no journal knows; None if the journals do not tell, or know none."""
        keys = recorded.get(self.intervals[0].position, NOTHING).keys
        return Sieve(keys) if self._is_known and len(keys) else None

    def may_have_changed(self, tally: Tally) -> bool:
        """Whether rows of an appended model that are in the table may be others at the source now.

        Args:
            tally: of all of the interval's rows.
        """
        past, model = self._past, self.export.model
        if model.merge or not past.has_interval:
            return False
        # Without those that landed now, the rows are the ones that earlier runs met, if none of them has changed. Where the
        # journals do not tell which rows are new, late ones, too, make another fingerprint.
        met = tally.fingerprint - tally.landed if past.is_journaled else tally.fingerprint
        kept = past.own_fingerprint or ""
        if scheme_of(kept) != model.fingerprint_scheme:
            # Another export wrote the interval, or this one with other columns. A merge may have brought rows that are newer
            # than those of this interval.
            return not past.was_merged and str(met) not in past.fingerprints
        # The run before rejected some rows, which may land now.
        return kept not in (str(met), str(met + tally.unrejected))


def may_go_straight_in(export: IntervalFrames, table: DestinationTable) -> bool:
    """Whether rows that no earlier run has brought are not in the table, and stay when COPY has taken them."""
    if export.replay:
        # For a ledger that has lost intervals of which the table has rows.
        return False
    return not (export.model.merge or table.rows_before or export.deduplicate == "table" or table.may_drop_rows)


@dataclass(eq=False)
class Load:
    """The rows of all that is loaded, or a part of them, on one connection.

    Attributes:
        loading: what is loaded.
        session: in a transaction.
        recorded: what the journals have, as `Loading.recorded` gives it.
        part: which of the rows.
        tallies: what has become of them so far, by their interval's position.
        seconds: where the time went.
        repaired: by column, how many values were repaired.
    """

    loading: Loading
    session: Session
    recorded: Mapping[int, Recorded]
    part: Part = WHOLE
    tallies: dict[int, Tally] = field(init=False)
    seconds: Seconds = field(default_factory=Seconds)
    repaired: Counter[str] = field(default_factory=Counter)
    _sieve: Sieve | None = field(init=False)
    _writing: Writing = field(init=False)
    _read_since: str = ""
    _unresolved: Unresolved | None = None
    _staging: str | None = None
    _staged: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _answer: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _is_stopped: bool = False

    def __post_init__(self) -> None:
        loading = self.loading
        self.tallies = {
            interval.position: Tally(
                interval, loading.export.model, recorded=self.recorded.get(interval.position, NOTHING)
            )
            for interval in loading.intervals
        }
        self._sieve = loading.sieve(self.recorded)
        self._writing = Writing(self.session, loading.table)

    @property
    def is_staged(self) -> bool:
        """Whether what was copied waits in a staging table."""
        return self._staging is not None

    @property
    def dealt_with(self) -> int:
        """Rows that were copied, rejected, or known."""
        known = self._sieve.known if self._sieve else 0
        return known + sum(tally.copied + tally.rejected for tally in self.tallies.values())

    def copy(self) -> None:
        """Read the rows, and COPY them to where they go.

        Raises:
            DestinationError, SourceError, PassingError: as the source's and the destination's statements do; PassingError
                also where it was stopped.
        """
        loading = self.loading
        several = len(loading.intervals) > 1
        self._writing.begin()
        self._read_since = merge.snapshot(self.session)
        unresolved = Unresolved(
            self.session, loading.table, loading.export.export, loading.export.team_id, loading.intervals
        )
        self._unresolved = unresolved
        if not loading.goes_straight_in:
            staging = merge.staging_table(self.session, loading.table, of_several_intervals=several)
            self._staging = self._staged.enter_context(staging)
        record = Journal(self.session, loading.table, loading.export.team_id, loading.export.export, loading.run_id)

        def landed(rows: pl.DataFrame, repaired: pl.Series) -> None:
            self._writing.sample(rows)
            for start, some in by_interval(rows.with_columns(repaired.alias(_REPAIRED))):
                self.tallies[start].add(some, some[_REPAIRED], loading.table)
                if not loading.export.model.merge:
                    record.add(self.tallies[start].interval, self.tallies[start].new(some[IDENTITY]))
            record.flush(at_least=journal.PIECE)
            loading.progress.tell(self.dealt_with, self.part.number)

        with self._answer:
            began = time.monotonic()
            answer = loading.export.source.read(loading.intervals, loading.table.column_names, self.part)
            frames = self._answer.enter_context(answer)
            self.seconds.source += time.monotonic() - began
            known = self._sieve.keys if self._sieve and not loading.table.why_not_asked else NOTHING.keys
            every = unresolved.watch(counted(self._until_stopped(frames), self.tallies), known)
            if loading.export.model.merge:
                every = self._recorded_as_read(every, record)
            copied = ingest.copy_frames(
                self.session,
                loading.table,
                self._staging or loading.table.destination.table,
                self._sieve.sift(every) if self._sieve else every,
                loading.export.on_bad_rows,
                self._set_aside,
                landed,
                merge.INTERVAL_COLUMN if self._staging and several else None,
            )
        record.flush()
        self.seconds.source += copied.seconds.source
        self.seconds.transform += copied.seconds.transform
        self.seconds.copy += copied.seconds.copy
        self.repaired += copied.repaired
        if self._sieve:
            self.tallies[loading.intervals[0].position].known = self._sieve.known

    def bring_in(self) -> None:
        """Merge what was copied into a staging table. Raises as `copy`."""
        loading = self.loading
        began = time.monotonic()
        rule = loading.export.model.merge
        if self._staging is None:
            for tally in self.tallies.values():
                tally.merged = Merged(tally.copied, 0)
        elif rule and len(loading.intervals) > 1:
            merged = merge.merge_intervals(self.session, loading.table, self._staging, rule, self._read_since)
            for start, rows in merged.items():
                self.tallies[start].merged = rows
        else:
            [tally] = self.tallies.values()
            if tally.copied:
                if not loading.export.model.merge:
                    _advise_index(self.session, loading.table, loading.log)
                tally.merged = merge.merge(self.session, loading.table, self._staging, self._read_since)
        if self._staging and rule:
            merge.check_superseded(self.session, loading.table, self._staging, rule, self._read_since)
        self._staged.close()
        if self._unresolved:
            for tally in self.tallies.values():
                tally.unrejected = Fingerprint.of(pl.Series(self._unresolved.states, dtype=pl.UInt64))
            # Of an interval that lacks rows nobody knows which.
            self._unresolved.resolve(tally.interval for tally in self.tallies.values() if not tally.merged.missing)
        self._writing.end(sum(tally.merged.inserted for tally in self.tallies.values()))
        self.seconds.merge += time.monotonic() - began

    @property
    def has_rejected_known(self) -> bool:
        """Whether an earlier run has rejected rows that are in the table in another state."""
        return self._unresolved is not None and self._unresolved.has_known

    def replace_changed(self) -> None:
        """Read all rows of the only interval, of an appended model, once more, and replace the rows of the table that differ
        from the source's. To be called after `bring_in`.

        An event is changed by sending it again: in one interval it keeps its identity, and so its place in the journals.

        Raises:
            DestinationError, SourceError, PassingError: as `copy`; DestinationError also if the role may not update.
        """
        table, export, log = self.loading.table, self.loading.export, self.loading.log
        [tally] = self.tallies.values()
        if table.why_not_asked:
            log.warning(
                f"Rows of {tally.interval} have changed in ClickHouse, or were erased there. Those in {table.qualified} stay "
                f"as they are. {table.why_not_asked}"
            )
            return
        assert self._unresolved

        def set_aside(bad: list[BadRow]) -> None:
            if self._sieve:
                tally.known -= len(bad)
                self._set_aside(bad)

        with merge.staging_table(self.session, table) as staging:
            with export.source.read(self.loading.intervals, table.column_names) as frames:
                # The others have landed as they are now, or were set aside, when they were read first.
                some = self._unresolved.watch(self._sieve.kept_back(frames)) if self._sieve else frames
                ingest.copy_frames(self.session, table, staging, some, export.on_bad_rows, set_aside)
            _advise_index(self.session, table, log)
            tally.merged += Merged(0, merge.replace_changed(self.session, table, staging))
        self._unresolved.resolve([tally.interval])

    def stop(self) -> None:
        """From another thread: have `copy` end soon, with an error."""
        self._is_stopped = True
        # Its own thread may be about to close it. What led here is the error to raise.
        with contextlib.suppress(Exception):
            self._answer.close()
        self.session.give_up()

    def _until_stopped(self, frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        for frame in frames:
            if self._is_stopped:
                break
            yield frame
        if self._is_stopped:
            raise PassingError("The load was stopped, as another part of the interval failed.")

    def _recorded_as_read(self, frames: Iterator[pl.DataFrame], record: Journal) -> Iterator[pl.DataFrame]:
        """The frames of a merged model, of which the journals keep all states: also those of rows that are set aside."""
        for frame in frames:
            for start, rows in by_interval(frame.select(INTERVAL, STATE)):
                record.add(self.tallies[start].interval, self.tallies[start].new(rows[STATE]))
            yield frame

    def _set_aside(self, rows: list[BadRow]) -> None:
        loading = self.loading
        for start, some in itertools.groupby(sorted(rows, key=_interval_of), key=_interval_of):
            bad = list(some)
            tally = self.tallies[start]
            tally.set_aside(bad)
            if self._unresolved:
                self._unresolved.reject(tally.interval, bad)
            rejected.keep(self.session, loading.table, loading.export.export, tally.interval, loading.run_id, bad)


_REPAIRED = "repaired"


def _interval_of(row: BadRow) -> int:
    assert row.interval is not None
    return row.interval


def _advise_index(session: Session, table: DestinationTable, log: logging.Logger) -> None:
    statement = keys.missing_index(session, table.qualified, table.model, table.oid)
    if statement:
        log.info(f"{table.qualified} is asked for keys, and read as a whole for it. If that takes long: {statement};")
