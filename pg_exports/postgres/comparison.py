"""What the table really holds of the source's rows, beside what the ledger and the key journals say of them.

The keys of some intervals' rows are staged as those of an export are, and looked up in the table by one statement. All of it
is in a transaction that is rolled back: nothing is left behind. What the differences mean, and what repairs them, is
`verification`'s business.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import polars as pl

from pg_exports.fingerprint import Fingerprint, scheme_of
from pg_exports.interval import Interval, OnBadRows
from pg_exports.models import IDENTITY, INTERVAL, STATE, Model, Query, Selection
from pg_exports.models.model import backquoted
from pg_exports.postgres import ingest, journal, ledger, merge, registry, rejected
from pg_exports.postgres import table as tables
from pg_exports.postgres.bad_rows import BadRow
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.ledger import Bounds, Entry
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import Destination, DestinationTable
from pg_exports.reader import Reader

JOURNAL_BYTES = 64 * 1024 * 1024
"""Size of the journals that are read at a time."""


class _UndoneError(Exception):
    """Ends a transaction of which nothing is to stay."""


@contextlib.contextmanager
def undone(session: Session) -> Iterator[None]:
    """A transaction around a block, of which nothing stays."""
    with contextlib.suppress(_UndoneError), session.transaction():
        yield
        raise _UndoneError


def recognised(session: Session, destination: Destination, model: Model, team_id: int) -> DestinationTable | None:
    """The table as the next run will take it: with the numbers that the ledger knows it by, or new ones if it has lost its
    rows. None if there is no table, or no ledger. Nothing is written.

    Raises:
        DestinationError: the table does not fit the model, or holds the rows of another one.
        PassingError: it has changed, and could not be counted in time.
    """
    with undone(session):
        if not (tables.exists(session, destination) and ledger.exists(session, destination.schema)):
            return None
        table = tables.inspect(session, destination, model)
        known = registry.look_up(session, table)
        if known is None or known.in_ledger is None:
            ledger.ensure(session, destination.schema)
            registry.ensure(session, destination.schema)
            known = registry.recognise(session, table, team_id)
        return known
    raise AssertionError


def keys_alone(model: Model) -> Model:
    """The model with the columns alone by which rows are told apart and states compared. Of a merged one: the rows that no
    later interval has.
    """
    columns = tuple(column for column in model.columns if column.name in model.compared)
    names = [backquoted(name) for name in (*(column.name_in_answer for column in columns), IDENTITY, STATE, INTERVAL)]
    whole = model.without_dictionary or model
    rows = whole.latest or whole.query

    def query(selection: Selection) -> Query:
        asked = rows(selection)
        return Query(f"SELECT {', '.join(names)} FROM (\n{asked.sql.strip()}\n)", asked.parameters)

    return replace(
        model,
        columns=columns,
        query=query,
        finish=lambda frame: frame,
        needs={},
        dictionary=None,
        without_dictionary=None,
        timestamps=None,
    )


@dataclass(frozen=True)
class Twice:
    """A row that stands more than once in the table.

    Attributes:
        interval: at whose source it is.
        identity: its hash.
        copies: how often it stands there.
        key: the values of its key, as a JSON array of texts.
    """

    interval: Interval
    identity: int
    copies: int
    key: str


@dataclass(frozen=True)
class Compared:
    """An interval's rows on both sides.

    Attributes:
        fingerprint: of the rows at the source now; of a merged model of those that no later interval has.
        entry: what the ledger has of it.
        present: how many of the rows are in the table; None if it cannot be asked.
        lost: rows that are not in the table, and that the journals have (or nobody can tell).
        unread: rows in a state that no run has read.
        older: rows that are in the table in an older version than a run has read.
        rejected: rows that are set aside.
        erased: rows that were exported and the source does not have any more.
    """

    fingerprint: Fingerprint
    entry: Entry | None
    present: int | None
    lost: int = 0
    unread: int = 0
    older: int = 0
    rejected: int = 0
    erased: int = 0


@dataclass
class Comparison:
    """What was found of some intervals, and rows that stand more than once."""

    intervals: dict[Interval, Compared] = field(default_factory=dict)
    twice: list[Twice] = field(default_factory=list)


@dataclass(frozen=True)
class Sides:
    """What is compared.

    Attributes:
        session: in no transaction.
        table: as `recognised` gives it.
        export, exports: the export's name, and those of all exports of the deployment.
        team_id: whose rows.
        source: reads ClickHouse.
        on_bad_rows: what the export does with them.
    """

    session: Session
    table: DestinationTable | None
    export: str
    exports: frozenset[str]
    team_id: int
    source: Reader
    on_bad_rows: OnBadRows

    def entries(self, span: Interval) -> dict[Bounds, Entry]:
        """The ledger's intervals within a span: the export's own, else those of an export that there is not any more."""
        if self.table is None:
            return {}
        with undone(self.session):
            found = ledger.entries(self.session, self.table, self.team_id, span)
        return ledger.of_export(found, self.export, self.exports)

    def compare(self, intervals: Sequence[Interval]) -> Comparison:
        """The rows of intervals that follow each other. Once more if a run has written one of them meanwhile.

        Raises:
            DestinationError, SourceError, PassingError: as an export of them.
        """
        span = Interval("", intervals[0].start, intervals[-1].end)
        before = self.entries(span)
        for _ in range(3):
            rows = self._looked_up(intervals)
            after = self.entries(span)
            if after == before:
                break
            before = after
        return self._comparison(intervals, rows, after)

    def _looked_up(self, intervals: Sequence[Interval]) -> pl.DataFrame:
        """The rows at the source: `INTERVAL`, `IDENTITY`, `STATE`; and of each that is not once in the table `copies`,
        `is_older` and `key`.
        """
        source = replace(self.source, export_model=keys_alone(self.source.export_model))
        read: list[pl.DataFrame] = []
        set_aside: list[int] = []

        def numbered(frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
            count = 0
            for frame in frames:
                read.append(frame.select(INTERVAL, IDENTITY, STATE))
                numbers = pl.int_range(count, count + frame.height, dtype=pl.Int64, eager=True)
                count += frame.height
                yield frame.with_columns(numbers.alias(INTERVAL))

        def keep(bad: list[BadRow]) -> None:
            set_aside.extend(row.interval for row in bad if row.interval is not None)

        columns = [column.name for column in source.export_model.columns]
        with source.read(intervals, columns) as frames:
            if self.table is None or self.table.why_not_asked:
                differences = _NO_DIFFERENCES
                for _ in numbered(frames):
                    pass
            else:
                differences = self._staged(self.table, numbered(frames), keep)
        rows = pl.concat([_NO_ROWS, *read]).with_row_index("number").cast({"number": pl.Int64})
        absent = pl.DataFrame({"number": set_aside}, schema={"number": pl.Int64}).with_columns(
            copies=pl.lit(0, pl.Int64), is_older=pl.lit(False), key=pl.lit(None, pl.String)
        )
        found = pl.concat([differences, absent])
        if self.table is None:
            return rows.with_columns(
                copies=pl.lit(0, pl.Int64), is_older=pl.lit(False), key=pl.lit(None, pl.String)
            ).drop("number")
        return rows.join(found, on="number", how="left").drop("number")

    def _staged(self, table: DestinationTable, frames: Iterator[pl.DataFrame], keep: ingest.SetAside) -> pl.DataFrame:
        model = keys_alone(table.model)
        pairs = [pair for pair in table.pairs if pair[0].name in model.compared]
        narrow = replace(table, model=model, pairs=pairs, may_drop_rows=False)
        on_bad_rows: OnBadRows = "repair" if self.on_bad_rows == "repair" else "reject"
        with undone(self.session), merge.staging_table(self.session, narrow, of_several_intervals=True) as staging:
            ingest.copy_frames(
                self.session,
                narrow,
                staging,
                frames,
                on_bad_rows,
                keep,
                interval_column=merge.INTERVAL_COLUMN,
            )
            return pl.DataFrame(merge.differences(self.session, narrow, staging), schema=_NO_DIFFERENCES.schema)
        raise AssertionError

    def _comparison(
        self, intervals: Sequence[Interval], rows: pl.DataFrame, entries: Mapping[Bounds, Entry]
    ) -> Comparison:
        recorded: Mapping[int, journal.Recorded] = {}
        set_aside: Mapping[Interval, int] = {}
        if self.table is not None:
            with undone(self.session):
                recorded = journal.read(self.session, self.table, self.team_id, self.export, intervals)
                exports = {
                    interval: entry.export
                    for interval in intervals
                    if (entry := entries.get((interval.start, interval.end)))
                }
                set_aside = rejected.unresolved(self.session, self.table, exports)
        of_interval = {int(start): some for (start,), some in rows.partition_by(INTERVAL, as_dict=True).items()}
        comparison = Comparison()
        for interval in intervals:
            some = of_interval.get(interval.position, rows.clear())
            entry = entries.get((interval.start, interval.end))
            known = recorded.get(interval.position, journal.NOTHING)
            comparison.intervals[interval] = self._compared(some, entry, known, set_aside.get(interval, 0))
            comparison.twice += [
                Twice(interval, identity, copies, key)
                for identity, copies, key in some.filter(pl.col("copies") > 1)
                .select(IDENTITY, "copies", "key")
                .iter_rows()
            ]
        return comparison

    def _compared(self, rows: pl.DataFrame, entry: Entry | None, known: journal.Recorded, set_aside: int) -> Compared:
        model = self.source.export_model
        hashes = rows[model.journaled]
        fingerprint = replace(Fingerprint.of(rows[STATE]), scheme=model.fingerprint_scheme)
        can_be_asked = self.table is None or not self.table.why_not_asked
        is_absent = (rows["copies"] == 0).fill_null(value=False)
        is_older = rows["is_older"].fill_null(value=False)
        present = rows.height - int(is_absent.sum()) if can_be_asked else None
        if entry is None:
            return Compared(fingerprint, None, present, rejected=set_aside)
        # Without journals, or with those of another scheme, they do not tell what was read.
        scheme = scheme_of(entry.fingerprint)
        is_comparable = (
            scheme == model.fingerprint_scheme if model.merge else scheme.split(":")[0] == model.journal_scheme
        )
        tells = is_comparable and not (known.keys.is_empty() and entry.rows)
        is_read = (
            journal.among(hashes, known.keys) if tells else pl.repeat(True, rows.height, dtype=pl.Boolean, eager=True)
        )
        unread = ~is_read if model.merge or not can_be_asked else ~is_read & is_absent
        lost = int((is_absent & is_read).sum())
        # A row that was set aside is in no journal of an appended model, and in those of a merged one.
        late = int(unread.sum())
        if model.merge or not tells:
            lost = max(0, lost - set_aside)
        else:
            late = max(0, late - set_aside)
        erased = 0
        if not model.merge and tells and len(known.own):
            erased = len(known.own) - int(journal.among(known.own, hashes.unique().sort()).sum())
        return Compared(
            fingerprint,
            entry,
            present,
            lost=lost,
            unread=late,
            older=int((is_older & is_read).sum()),
            rejected=set_aside,
            erased=erased,
        )

    def explained(self, twice: Sequence[Twice]) -> dict[int, int]:
        """How often each of these rows was exported, by its identity: in so many intervals that do not overlap it is in the
        journals of the table. All of these are read, in bounded pieces.
        """
        counts: dict[int, int] = {}
        ends: dict[int, int] = {}
        if self.table is None or not twice:
            return counts
        wanted = pl.Series([row.identity for row in twice], dtype=pl.UInt64).unique().sort()
        with undone(self.session):
            for start, end, keys in self._journals(self.table):
                for identity in keys.filter(journal.among(keys, wanted)).unique():
                    if start >= ends.get(identity, start):
                        counts[identity] = counts.get(identity, 0) + 1
                    ends[identity] = max(end, ends.get(identity, end))
        return counts

    def _journals(self, table: DestinationTable) -> Iterator[tuple[int, int, pl.Series]]:
        """Start and end of each journaled interval, and its keys, by their starts."""
        qualified = quoted(table.destination.schema, journal.TABLE)
        of = "destination = $1 AND table_oid = $2 AND table_filenode = $3 AND team_id = ANY($4::text::bigint[])"
        identity = (*table.identity, table.teams(self.team_id))
        pieces = self.session.rows(
            f"""
            SELECT ctid::text, octet_length(keys), (extract(epoch FROM interval_start) * 1000000)::bigint,
                (extract(epoch FROM interval_end) * 1000000)::bigint
            FROM {qualified}
            WHERE {of}
            ORDER BY interval_start, interval_end
            """,
            *identity,
            doing="reading the keys of earlier runs",
        )
        places = [(str(place), int(str(size)), int(str(start)), int(str(end))) for place, size, start, end in pieces]
        for bounds, some in itertools.groupby(places, key=lambda piece: piece[2:]):
            keys = [journal.NOTHING.keys]
            for batch in _batches([(place, size) for place, size, *_ in some]):
                rows = self.session.arrow(
                    f"SELECT keys FROM {qualified} WHERE ctid = ANY($1::text[]::tid[])",
                    batch,
                    doing="reading the keys of earlier runs",
                )
                keys += [journal.series(piece) for piece in rows.column("keys").to_pylist()]
            yield *bounds, pl.concat(keys)


def _batches(pieces: Sequence[tuple[str, int]]) -> Iterator[list[str]]:
    batch: list[str] = []
    total = 0
    for place, size in pieces:
        if batch and total + size > JOURNAL_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(place)
        total += size
    yield batch


_NO_ROWS = pl.DataFrame(schema={INTERVAL: pl.Int64, IDENTITY: pl.UInt64, STATE: pl.UInt64})
_NO_DIFFERENCES = pl.DataFrame(
    schema={"number": pl.Int64, "copies": pl.Int64, "is_older": pl.Boolean, "key": pl.String}
)
