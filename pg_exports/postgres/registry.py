"""The registry: which table of today the ledger and the key journals speak of.

Ledger and journals know a table by the oid and filenode that it had when it was first written to. A VACUUM FULL, a move to
another server or an upgrade by pg_upgrade changes these and keeps the rows; TRUNCATE changes them and the rows are gone; a
dump restored into a fresh cluster may even have the same numbers and no rows. So the registry keeps, beside those numbers,
where the table is now, how many rows it should have and some of their keys, and a table that has changed is counted once
before it is taken for the one that it was.

It also keeps what Postgres's own statistics should have counted if nobody else inserted rows. If they have counted more,
the table is counted: rows that came by another way, as by hand or in an attached partition, are in no journal.
"""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import polars as pl

from pg_exports.errors import DestinationError
from pg_exports.models import Kind, Model
from pg_exports.postgres import ledger, schemas
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import MERGE_TIMEOUT, Session
from pg_exports.postgres.table import NO_FILE, DestinationTable, LedgerIdentity

TABLE = "pg_exports_tables"

SAMPLES = 40
"""How many keys of rows that were exported last the registry keeps of a table."""

PATIENCE = 2.0
"""Seconds that the statistics of a transaction that has ended may take to arrive."""

_CREATE = """
CREATE TABLE IF NOT EXISTS {registry} (
    destination text NOT NULL,
    table_oid bigint NOT NULL,
    table_filenode bigint NOT NULL,
    model text NOT NULL,
    team_ids bigint[] NOT NULL,
    rows_before boolean NOT NULL,
    place text NOT NULL,
    oid_now bigint NOT NULL,
    files json NOT NULL,
    samples json NOT NULL,
    known_since timestamptz NOT NULL,
    changed_at timestamptz NOT NULL,
    PRIMARY KEY (destination, table_oid, table_filenode)
)
"""

_RECORDS = """
SELECT
    table_oid, table_filenode, model, array_to_json(team_ids)::text, rows_before, place, oid_now,
    files::text, samples::text, (extract(epoch FROM known_since) * 1000000)::bigint,
    EXISTS (SELECT FROM {ledger} WHERE {same})
FROM {registry} AS registry
WHERE destination = $1
ORDER BY changed_at DESC
"""

_SAME = """
    ledger.destination = registry.destination AND ledger.table_oid = registry.table_oid
    AND ledger.table_filenode = registry.table_filenode
"""

_SAVE = """
INSERT INTO {registry} (
    destination, table_oid, table_filenode, model, team_ids, rows_before, place, oid_now, files, samples,
    known_since, changed_at
)
VALUES (
    $1, $2, $3, $4, $5::text::bigint[], $6, $7, $8, $9::text::json, $10::text::json, clock_timestamp(), clock_timestamp()
)
ON CONFLICT (destination, table_oid, table_filenode) DO UPDATE SET
    model = excluded.model,
    team_ids = excluded.team_ids,
    rows_before = excluded.rows_before,
    place = excluded.place,
    oid_now = excluded.oid_now,
    files = excluded.files,
    samples = excluded.samples,
    changed_at = excluded.changed_at
"""

# What the ledger of a version without a registry says of a table.
_LEDGER = """
SELECT count(*), coalesce(bool_or(rows_before), false), array_to_json(array_agg(DISTINCT team_id))::text,
    coalesce(sum(keys) FILTER (WHERE keys > 0), 0)::bigint, coalesce(bool_and(keys >= 0), true),
    coalesce(sum(rows_inserted), 0)::bigint
FROM {ledger}
WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3
"""

_COUNTERS = """
SELECT file::bigint, pg_stat_get_tuples_inserted(file), pg_stat_get_tuples_deleted(file),
    pg_stat_get_xact_tuples_inserted(file), pg_relation_size(file)
FROM unnest($1::text::oid[]) AS file
"""


@dataclass(frozen=True)
class File:
    """What is known of a table's rows in one file: of a plain table its only one, of a partitioned one a leaf's.

    Attributes:
        filenode: Postgres's number of the file now.
        known_as: the number that the ledger's rows have it by.
        rows: how many rows it should have; None if that is not known.
        inserted, deleted: what the statistics should have counted.
    """

    filenode: int
    known_as: int
    rows: int | None
    inserted: int
    deleted: int


@dataclass(frozen=True)
class Record:
    """A table of the registry.

    Attributes:
        oid, filenode: its numbers in the ledger and the journals.
        model: whose rows it holds.
        team_ids: the teams whose rows it holds.
        rows_before: it has rows that no export brought.
        place: the cluster and the database.
        oid_now: the table's oid there.
        files: by the oid of the relation.
        samples: the first key column of some rows that were exported, as text.
        known_since: when it was first seen, in microseconds since 1970.
        in_ledger: the ledger has intervals of it.
    """

    oid: int
    filenode: int
    model: str
    team_ids: tuple[int, ...]
    rows_before: bool
    place: str
    oid_now: int
    files: Mapping[int, File]
    samples: tuple[str, ...] = ()
    known_since: int = 0
    in_ledger: bool = True

    @property
    def is_unknown(self) -> bool:
        """Whether it has rows of which the ledger knows nothing any more."""
        return self.rows != 0 and not self.in_ledger and not self.rows_before

    @property
    def rows(self) -> int | None:
        """How many rows the table should have; None if that is not known."""
        counts = [file.rows for file in self.files.values()]
        return None if None in counts else sum(count or 0 for count in counts)


@dataclass(frozen=True)
class _Counters:
    """What the statistics say of a file: rows inserted and deleted by transactions that have ended, rows inserted by this
    one (and those before it that they do not know yet), and its size in bytes.
    """

    inserted: int
    deleted: int
    mine: int
    size: int


def ensure(session: Session, schema: str) -> None:
    """Create the table where it is missing. Raises as `schemas.ensure_own`."""
    schemas.ensure_own(session, schema, TABLE, _CREATE.format(registry=quoted(schema, TABLE)))


def recognise(session: Session, table: DestinationTable, team_id: int) -> DestinationTable:
    """The table with its numbers in the ledger; it is registered if it is new, or not the one that it was.

    Raises:
        DestinationError: it holds the rows of another model.
        PassingError: it could not be counted in time.
    """
    record = _matching(_records(session, table), table)
    if record is None or team_id not in record.team_ids or record.is_unknown:
        record = _register(session, table, team_id)
    if record.model != table.model.name:
        registry = quoted(table.destination.schema, TABLE)
        raise DestinationError(
            f"{table.qualified} holds the rows of the model {record.model}; this export's model is {table.model.name}. One "
            "table takes the rows of one model, as those of two could not be told apart. Set this export's `table` to "
            "another table. If it is the same model under a new name, give it its old name, or run as the owner: "
            f"UPDATE {registry} SET model = '{table.model.name}' WHERE destination = '{table.destination.table}';"
        )
    return _with(table, record)


def _register(session: Session, table: DestinationTable, team_id: int) -> Record:
    """The record of a table that is new, has changed, or takes the rows of one more team."""
    schemas.wait_to_create(session, f"the registry's entry of {table.qualified}")
    session.execute(
        f"SELECT FROM {quoted(table.destination.schema, TABLE)} WHERE destination = $1 FOR UPDATE",
        table.destination.table,
        doing="locking the registry of tables",
    )
    records = _records(session, table)
    record = _matching(records, table) or _found(session, table, records) or _new(session, table, records)
    if record.model == table.model.name:
        record = replace(
            record,
            team_ids=tuple(sorted({*record.team_ids, team_id})),
            rows_before=record.rows_before or record.is_unknown,
        )
        _save(session, table, record)
    return record


def look_up(session: Session, table: DestinationTable) -> DestinationTable | None:
    """The table with its numbers in the ledger; None if no run has registered it as it is now. Nothing is written."""
    if not schemas.has_own(session, table.destination.schema, TABLE):
        return table
    records = _records(session, table)
    record = _matching(records, table)
    if record is None and not any((one.oid, one.filenode) == _numbers(table) for one in records):
        return table
    return _with(table, record) if record else None


@dataclass(eq=False)
class Writing:
    """One transaction's rows, for the registry.

    Attributes:
        session: in the transaction, which has locked the table.
        table: as `recognise` gives it.
        samples: the first key column of some of the rows.
    """

    session: Session
    table: DestinationTable
    samples: list[str] = field(default_factory=list)
    _mine: dict[int, int] = field(default_factory=dict)

    def begin(self) -> None:
        """To be called before the first row."""
        self._mine = {oid: counters.mine for oid, counters in _counters(self.session, self.table).items()}

    def sample(self, rows: pl.DataFrame) -> None:
        """Rows that are being exported."""
        column = _sampled_column(self.table.model)
        if column and rows.height and len(self.samples) < SAMPLES:
            self.samples += [str(value) for value in rows[column].head(2) if value is not None]

    def end(self, inserted: int) -> None:
        """To be called after the last row, shortly before COMMIT.

        Args:
            inserted: rows that are in the table now and were not before.
        """
        [(files, samples)] = self.session.rows(
            f"""
            SELECT files::text, samples::text
            FROM {quoted(self.table.destination.schema, TABLE)}
            WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3
            FOR UPDATE
            """,
            *self.table.identity,
            doing="reading the registry of tables",
        )
        known = _files(str(files))
        grown = {
            oid: counters.mine - self._mine.get(oid, 0) for oid, counters in _counters(self.session, self.table).items()
        }
        # More than was inserted: some were rolled back to a savepoint, and of which file they were is not to be had.
        is_exact = len(known) == 1 or sum(grown.values()) == inserted
        for oid, more in grown.items():
            if more and oid in known:
                rows = known[oid].rows
                exact = inserted if len(known) == 1 else more
                known[oid] = replace(
                    known[oid],
                    inserted=known[oid].inserted + more,
                    rows=rows + exact if rows is not None and is_exact else None,
                )
        self.session.execute(
            f"""
            UPDATE {quoted(self.table.destination.schema, TABLE)}
            SET files = $4::text::json, samples = $5::text::json, changed_at = clock_timestamp()
            WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3
            """,
            *self.table.identity,
            _files_json(known),
            json.dumps([*json.loads(str(samples)), *self.samples][-SAMPLES:]),
            doing="writing the registry of tables",
        )
        if self.session.version >= _FLUSHES:
            # So that the next transaction need not wait for the statistics of this one.
            self.session.execute("SELECT pg_stat_force_next_flush()", doing="sending statistics")


_FLUSHES = 150_000
"""The first version of Postgres that sends a transaction's statistics at once if it is told to."""


def was_there(row: str) -> str:
    """The condition that a row of this alias was committed before the snapshot $1 (text) was taken.

    A row has the lower half of the number of the transaction that wrote it; the other half is that of the numbers within
    2^31 of the snapshot.
    """
    last = "(pg_snapshot_xmax($1::text::pg_snapshot)::text::bigint + 2147483648)"
    number = f"({last} - mod({last} - {row}.xmin::text::bigint, 4294967296))"
    return f"pg_visible_in_snapshot({number}::text::xid8, $1::text::pg_snapshot)"


def has_changed(session: Session, table: DestinationTable, since: str) -> bool:
    """Whether another transaction has written to the table since a snapshot was taken, and ended."""
    [(is_there,)] = session.rows(
        f"""
        SELECT {was_there("r")}
        FROM {quoted(table.destination.schema, TABLE)} AS r
        WHERE destination = $2 AND table_oid = $3 AND table_filenode = $4
        """,
        since,
        *table.identity,
        doing="reading the registry of tables",
    )
    return not is_there


def find_others(session: Session, table: DestinationTable, *, is_first: bool) -> DestinationTable:
    """The table, with `rows_before` if rows have come into it by another way since exports began to write to it.

    Args:
        session: in a transaction that has locked the table, before its first row.
        table: as `recognise` gives it.
        is_first: it is the session's first transaction. Before PostgreSQL 15 the statistics know nothing of a session's own
            transactions for a while: there only the first is looked at.

    Raises:
        PassingError: the table could not be counted in time.
    """
    if session.version < _FLUSHES and not is_first:
        return table
    deadline = time.monotonic() + PATIENCE
    while _stray(session, table) == "behind" and time.monotonic() < deadline:
        time.sleep(0.05)
    if _stray(session, table) is None:
        return table
    session.execute(
        f"""
        SELECT FROM {quoted(table.destination.schema, TABLE)}
        WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3
        FOR UPDATE
        """,
        *table.identity,
        doing="locking the registry of tables",
    )
    counted = _counters(session, table)
    rows, record = _count(session, table, _record(session, table))
    expected, total, deleted = record.rows, sum(rows.values()), _deleted(record, table, counted)
    has_others = expected is None or total != expected - deleted
    files = {
        oid: File(file.filenode, file.known_as, rows.get(oid, 0), counted[oid].inserted, counted[oid].deleted)
        for oid, file in record.files.items()
        if oid in counted
    }
    found = replace(record, files=files, rows_before=record.rows_before or has_others)
    _save(session, table, found)
    return _with(table, found)


def _stray(session: Session, table: DestinationTable) -> str | None:
    """Whether the statistics are ahead of what the registry expects, or behind it; None if they agree."""
    # In this order: what the statistics know has been committed, and so is in the registry by now.
    counted = _counters(session, table)
    files = _record(session, table).files
    differences = [counted[oid].inserted - file.inserted for oid, file in files.items() if oid in counted]
    if any(difference > 0 for difference in differences):
        return "ahead"
    return "behind" if any(differences) else None


def _numbers(table: DestinationTable) -> tuple[int, int]:
    """What the ledger of a version without a registry knows the table by."""
    return table.oid, table.filenode or NO_FILE


def _matching(records: Sequence[Record], table: DestinationTable) -> Record | None:
    """The record of the table as it is now."""
    return next((one for one in records if _is_at(one, table) and _filenodes(one) == dict(table.files)), None)


def _is_at(record: Record, table: DestinationTable) -> bool:
    return record.place == table.place and record.oid_now == table.oid


def _filenodes(record: Record) -> dict[int, int]:
    return {oid: file.filenode for oid, file in record.files.items()}


def _with(table: DestinationTable, record: Record) -> DestinationTable:
    leaves = sorted(record.files[oid].known_as for oid in table.files) if table.filenode is None else []
    identity = LedgerIdentity(
        record.oid, record.filenode, tuple(leaves), record.rows_before, record.team_ids, record.known_since
    )
    return replace(table, in_ledger=identity)


def _records(session: Session, table: DestinationTable) -> list[Record]:
    """What the registry has of the destination, what was written last first."""
    rows = session.rows(
        _RECORDS.format(
            registry=quoted(table.destination.schema, TABLE),
            ledger=f"{quoted(table.destination.schema, ledger.TABLE)} AS ledger",
            same=_SAME,
        ),
        table.destination.table,
        doing="reading the registry of tables",
    )
    return [
        Record(
            int(str(oid)),
            int(str(filenode)),
            str(model),
            tuple(json.loads(str(team_ids))),
            bool(rows_before),
            str(place),
            int(str(oid_now)),
            _files(str(files)),
            tuple(json.loads(str(samples))),
            int(str(known_since)),
            bool(in_ledger),
        )
        for oid, filenode, model, team_ids, rows_before, place, oid_now, files, samples, known_since, in_ledger in rows
    ]


def _record(session: Session, table: DestinationTable) -> Record:
    return next(one for one in _records(session, table) if (one.oid, one.filenode) == table.identity[1:])


def _save(session: Session, table: DestinationTable, record: Record) -> None:
    session.execute(
        _SAVE.format(registry=quoted(table.destination.schema, TABLE)),
        table.destination.table,
        record.oid,
        record.filenode,
        record.model,
        "{" + ",".join(map(str, record.team_ids)) + "}",
        record.rows_before,
        record.place,
        record.oid_now,
        _files_json(record.files),
        json.dumps(record.samples),
        doing="writing the registry of tables",
    )


def _files(text: str) -> dict[int, File]:
    return {int(oid): File(**file) for oid, file in json.loads(text).items()}


def _files_json(files: Mapping[int, File]) -> str:
    return json.dumps({str(oid): asdict(file) for oid, file in files.items()})


def _counters(session: Session, table: DestinationTable) -> dict[int, _Counters]:
    rows = session.rows(
        _COUNTERS, "{" + ",".join(map(str, table.files)) + "}", doing="reading the statistics of the table"
    )
    return {int(str(row[0])): _Counters(*(int(str(value or 0)) for value in row[1:])) for row in rows}


def _sampled_column(model: Model) -> str | None:
    """The key column whose values are kept, if they are alike as text on both sides."""
    kinds = {column.name: column.kind for column in model.columns}
    return model.key[0] if not model.merge and kinds[model.key[0]] in (Kind.TEXT, Kind.INTEGER) else None


def _count(session: Session, table: DestinationTable, record: Record) -> tuple[dict[int, int], Record]:
    """The rows of each of the table's files, and what the registry says at the same moment."""
    counted = session.rows(
        f"""
        SELECT files, (
            SELECT json_object_agg(file, rows)::text
            FROM (SELECT tableoid::bigint AS file, count(*) AS rows FROM {table.qualified} GROUP BY tableoid) AS counted
        )
        FROM {quoted(table.destination.schema, TABLE)}
        WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3
        """,
        table.destination.table,
        record.oid,
        record.filenode,
        doing=f"counting {table.qualified}, which has changed",
        patience=MERGE_TIMEOUT,
    )
    [(files, rows)] = counted
    return (
        {int(oid): int(count) for oid, count in json.loads(str(rows or "{}")).items()},
        replace(record, files=_files(str(files))),
    )


def _found(session: Session, table: DestinationTable, records: Sequence[Record]) -> Record | None:
    """The record of a table that has changed since, if it still has the rows that the ledger speaks of."""
    legacy = _legacy(session, table, records)
    if legacy:
        return legacy
    here = [one for one in records if _is_at(one, table)]
    candidate = next(iter(here or records), None)
    counters = _counters(session, table)
    if candidate is None or not any(one.size for one in counters.values()):
        return None
    if table.filenode is None and candidate.oid_now != table.oid:
        # Its partitions have other names and numbers, by which the ledger could not tell what went into which.
        return None
    if table.model.merge and _is_at(candidate, table) and table.filenode is not None:
        # A merge compares every row with the table: nothing depends on what the ledger says.
        return _renewed(candidate, table, counters)
    changed = [oid for oid, filenode in table.files.items() if _filenodes(candidate).get(oid) != filenode]
    gone = candidate.files.keys() - table.files.keys()
    if table.filenode is None and _is_at(candidate, table) and not any(counters[oid].size for oid in changed):
        # New partitions without rows, partitions that have gone, and such as were truncated.
        return _renewed(candidate, table, counters, emptied=changed)
    rows = _rows(session, table)
    if not sum(rows.values()):
        return None
    if table.filenode is not None:
        [expected] = [file.rows for file in candidate.files.values()]
        deleted = _deleted(candidate, table, counters)
        if expected is None or rows.get(table.oid, 0) != expected - deleted:
            return None
        return _renewed(candidate, table, counters) if _has_samples(session, table, candidate) else None
    return _repartitioned(candidate, table, counters, rows, gone)


def _deleted(candidate: Record, table: DestinationTable, counters: Mapping[int, _Counters]) -> int:
    """Rows that were deleted since the registry looked last, as far as the statistics tell."""
    return sum(
        max(0, counters[oid].deleted - file.deleted)
        for oid, file in candidate.files.items()
        if oid in counters and candidate.place == table.place
    )


def _repartitioned(
    candidate: Record,
    table: DestinationTable,
    counters: Mapping[int, _Counters],
    rows: Mapping[int, int],
    gone: Collection[int],
) -> Record:
    """The record of a partitioned table of which a partition with rows is new, or has another file."""
    expected = {oid: file.rows for oid, file in candidate.files.items() if oid not in gone}
    total = sum(rows.values())
    is_moved = None not in expected.values() and total == sum(count or 0 for count in expected.values())
    others = not is_moved
    files = {}
    for oid, filenode in table.files.items():
        file = candidate.files.get(oid)
        there = rows.get(oid, 0)
        is_same = file is not None and (file.filenode == filenode or (bool(there) and file.rows == there))
        files[oid] = File(
            filenode,
            file.known_as if file and is_same else filenode,
            there,
            counters[oid].inserted,
            counters[oid].deleted,
        )
    return replace(
        candidate,
        place=table.place,
        oid_now=table.oid,
        files=files,
        rows_before=candidate.rows_before or (others and not table.model.merge),
    )


def _renewed(
    candidate: Record, table: DestinationTable, counters: Mapping[int, _Counters], emptied: Collection[int] = ()
) -> Record:
    """The record with the table's files as they are now; those in `emptied` are others, and have no rows yet."""
    files = {}
    [*known] = candidate.files.values()
    for oid, filenode in table.files.items():
        file = candidate.files.get(oid) or (known[0] if table.filenode is not None and len(known) == 1 else None)
        is_other = file is None or oid in emptied
        files[oid] = File(
            filenode,
            filenode if is_other or file is None else file.known_as,
            0 if is_other or file is None else file.rows,
            counters[oid].inserted,
            counters[oid].deleted,
        )
    return replace(candidate, place=table.place, oid_now=table.oid, files=files)


def _has_samples(session: Session, table: DestinationTable, record: Record) -> bool:
    """Whether most of the rows are there of which the registry keeps the key."""
    column = _sampled_column(table.model)
    if not column or not record.samples:
        return True
    [(found,)] = session.rows(
        f"SELECT count(DISTINCT {quoted(column)}) FROM {table.qualified} WHERE {quoted(column)}::text = ANY($1)",
        list(record.samples),
        doing=f"looking for rows of {table.qualified}, which has changed",
        patience=MERGE_TIMEOUT,
    )
    return 2 * int(str(found)) >= len(set(record.samples))


def _legacy(session: Session, table: DestinationTable, records: Sequence[Record]) -> Record | None:
    """The record of a table that a version without a registry has written to."""
    oid, filenode = _numbers(table)
    if any((one.oid, one.filenode) == (oid, filenode) for one in records):
        return None
    schema = table.destination.schema
    [(intervals, rows_before, team_ids, known, is_exact, inserted)] = session.rows(
        _LEDGER.format(ledger=quoted(schema, ledger.TABLE)),
        table.destination.table,
        oid,
        filenode,
        doing="reading the ledger",
    )
    counters = _counters(session, table)
    if not intervals or (inserted and not any(one.size for one in counters.values())):
        return None
    rows = int(str(known)) if is_exact and not rows_before and table.filenode is not None else None
    files = {
        file: File(number, number, None if table.model.merge else rows, counters[file].inserted, counters[file].deleted)
        for file, number in table.files.items()
    }
    teams = tuple(json.loads(str(team_ids)))
    return Record(oid, filenode, table.model.name, teams, bool(rows_before), table.place, table.oid, files)


def _new(session: Session, table: DestinationTable, records: Sequence[Record]) -> Record:
    """The record of a table that no export has written to, or that has lost the rows which the ledger speaks of."""
    oid, filenode = _numbers(table)
    schema = table.destination.schema
    [(is_taken, least, has_rows)] = session.rows(
        f"""
        SELECT
            EXISTS (
                SELECT FROM {quoted(schema, ledger.TABLE)}
                WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3
            ),
            (SELECT min(table_filenode) FROM {quoted(schema, ledger.TABLE)} WHERE destination = $1 AND table_oid = $2),
            EXISTS (SELECT FROM {table.qualified})
        """,
        table.destination.table,
        oid,
        filenode,
        doing="reading the ledger",
    )
    numbers = [one.filenode for one in records if one.oid == oid]
    if is_taken or filenode in numbers:
        # A table elsewhere had the same numbers, or this one had rows that are gone: below all that there are.
        filenode = min([0, int(str(least or 0)), *numbers]) - 1
    counters = _counters(session, table)
    rows = _rows(session, table) if has_rows else {}
    files = {
        file: File(number, number, rows.get(file, 0), counters[file].inserted, counters[file].deleted)
        for file, number in table.files.items()
    }
    return Record(oid, filenode, table.model.name, (), bool(has_rows), table.place, table.oid, files)


def _rows(session: Session, table: DestinationTable) -> dict[int, int]:
    """The rows of each of the table's files."""
    rows = session.rows(
        f"SELECT tableoid::bigint, count(*) FROM {table.qualified} GROUP BY tableoid",
        doing=f"counting {table.qualified}",
        patience=MERGE_TIMEOUT,
    )
    return {int(str(oid)): int(str(count)) for oid, count in rows}
