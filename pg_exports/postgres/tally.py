"""What becomes of an interval's rows: counted where they are read and where they are written, so that the two can be
compared.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import polars as pl

from pg_exports.fingerprint import Fingerprint
from pg_exports.interval import SAMPLE, Counts, Example, Interval
from pg_exports.models import IDENTITY, INTERVAL, STATE, Model
from pg_exports.postgres import ledger, types
from pg_exports.postgres.bad_rows import BadRow
from pg_exports.postgres.journal import NOTHING, Recorded, among
from pg_exports.postgres.ledger import Past, Written
from pg_exports.postgres.merge import Merged
from pg_exports.postgres.table import DestinationTable


@dataclass
class Tally:
    """An interval's rows, so far.

    Attributes:
        interval, model: whose rows they are.
        at_source: rows that were read, and their `fingerprint`.
        known: rows that the journals know, and were not sent.
        recorded: what the journals have of the interval; `met` of its own hashes were read again.
        landed: the fingerprint of rows that COPY took and the interval's own journals do not have.
        unrejected: the fingerprint of those that an earlier run has rejected, of an interval that is loaded alone.
        journaled: hashes that the journals got.
        copied: rows that COPY took; `repaired` of them were; their size as Arrow in `bytes`.
        rejected: rows that were set aside; `examples` has some of them.
        absent: rows of parts that are not in, beside those that are known.
        merged: what the merge did with those that were copied.
        bounds: the first and the last of the rows' own times, of those that were read, in microseconds since 1970.
    """

    interval: Interval
    model: Model
    at_source: int = 0
    known: int = 0
    recorded: Recorded = NOTHING
    met: int = 0
    landed: Fingerprint = field(init=False)
    unrejected: Fingerprint = field(default_factory=Fingerprint)
    journaled: int = 0
    copied: int = 0
    repaired: int = 0
    rejected: int = 0
    absent: int = 0
    bytes: int = 0
    fingerprint: Fingerprint = field(init=False)
    merged: Merged = field(default_factory=lambda: Merged(0, 0))
    bounds: tuple[int, int] | None = None
    examples: list[Example] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fingerprint = self.landed = Fingerprint(scheme=self.model.fingerprint_scheme)

    def read(self, rows: pl.DataFrame) -> None:
        """Rows that came from the source."""
        self.at_source += rows.height
        self.fingerprint += Fingerprint.of(rows[STATE])
        if len(self.recorded.keys):
            self.met += int(among(rows[self.model.journaled], self.recorded.own).sum())
        if self.model.timestamps:
            # As numbers: Python has no times outside the years 1 to 9999.
            first, last = (rows[name].to_physical() for name in self.model.timestamps)
            found = [int(str(time)) for time in (first.min(), last.max()) if time is not None]
            self.bounds = _bounds(*(self.bounds or ()), *found)

    @property
    def times(self) -> tuple[datetime | None, datetime | None]:
        """The bounds as times; None for one that is outside the years 1 to 9999, or if there are none."""
        if self.bounds is None:
            return None, None
        first, last = self.bounds
        return types.moment(first), types.moment(last)

    def add(self, rows: pl.DataFrame, repaired: pl.Series, table: DestinationTable) -> None:
        """Rows that COPY took, with a mask of those that were repaired."""
        self.copied += rows.height
        self.landed += Fingerprint.of(rows[STATE].filter(~among(rows[self.model.journaled], self.recorded.own)))
        self.repaired += int(repaired.sum())
        self.bytes += int(rows.select(table.column_names).estimated_size())

    def new(self, hashes: pl.Series) -> pl.Series:
        """Those of some rows' hashes that the interval's own journals do not have; they are to be written."""
        new = hashes.filter(~among(hashes, self.recorded.own)) if len(self.recorded.own) else hashes
        self.journaled += len(new)
        return new

    def set_aside(self, rows: list[BadRow]) -> None:
        """Rows that were rejected."""
        self.rejected += len(rows)
        self.examples += [
            Example(self.interval, row.key, row.fault.column, row.fault.reason)
            for row in rows[: SAMPLE - len(self.examples)]
        ]

    def written(self, past: Past) -> Written:
        """The interval, once all of its rows are where they go. What an earlier try of the run has brought counts, too."""
        missing = self.merged.missing + self.at_source - self.known - self.copied - self.rejected
        unchanged = self.known + self.copied - self.merged.inserted - self.merged.updated - self.merged.missing
        earlier = past.by_this_run
        inserted = min(unchanged, earlier.inserted) if earlier else 0
        updated = min(unchanged - inserted, earlier.updated) if earlier else 0
        counts = Counts(
            at_source=self.at_source,
            inserted=self.merged.inserted + inserted,
            updated=self.merged.updated + updated,
            unchanged=unchanged - inserted - updated,
            repaired=self.repaired + (earlier.repaired if earlier else 0),
            rejected=self.rejected,
            missing=missing,
            bytes=self.bytes + (earlier.bytes if earlier else 0),
            erased=len(self.recorded.own) - self.met if past.is_journaled and not self.model.merge else 0,
        )
        # Rows that did not stay must be sent again: then the journals do not count, and the table is asked.
        is_known = missing == self.absent
        return Written(counts, self.fingerprint, past.keys + self.journaled if is_known else ledger.UNKNOWN)


def combined(parts: Sequence[Tally], others: Sequence[Tally] = ()) -> Tally:
    """What became of an interval of which these parts are in, while the others were read only."""
    tally = Tally(parts[0].interval, parts[0].model)
    for part in (*parts, *others):
        tally.at_source += part.at_source
        tally.known += part.known
        tally.recorded = part.recorded
        tally.met += part.met
        tally.bounds = _bounds(*(tally.bounds or ()), *(part.bounds or ()))
    for part in parts:
        # Without that of the others, so that the interval is not taken for one that is whole.
        tally.fingerprint += part.fingerprint
        tally.copied += part.copied
        tally.journaled += part.journaled
        tally.landed += part.landed
        tally.unrejected += part.unrejected
        tally.repaired += part.repaired
        tally.rejected += part.rejected
        tally.bytes += part.bytes
        tally.merged += part.merged
        tally.examples += part.examples[: SAMPLE - len(tally.examples)]
    tally.absent = sum(part.copied + part.rejected for part in others)
    return tally


def _bounds(*times: int) -> tuple[int, int] | None:
    return (min(times), max(times)) if times else None


def counted(frames: Iterable[pl.DataFrame], tallies: Mapping[int, Tally]) -> Iterator[pl.DataFrame]:
    """The frames, each interval's rows noted on the way."""
    model = next(iter(tallies.values())).model
    noted = {INTERVAL, STATE, IDENTITY, *(model.timestamps or ())}
    for frame in frames:
        for start, rows in by_interval(frame.select(name for name in frame.columns if name in noted)):
            tallies[start].read(rows)
        yield frame


def by_interval(frame: pl.DataFrame) -> Iterator[tuple[int, pl.DataFrame]]:
    """The rows of each interval, by `INTERVAL`."""
    starts = frame[INTERVAL]
    first, last = starts.min(), starts.max()
    if first == last:
        yield from [(int(str(first)), frame)] if frame.height else []
    else:
        for (start,), rows in frame.partition_by(INTERVAL, as_dict=True).items():
            yield int(start), rows
