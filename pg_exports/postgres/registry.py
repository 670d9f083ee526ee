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
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import polars as pl

from pg_exports.errors import DestinationError
from pg_exports.models import Kind, Model
from pg_exports.postgres import ledger, own_tables, schemas
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import MERGE_TIMEOUT, Session
from pg_exports.postgres.table import NO_FILE, DestinationTable, LedgerIdentity

TABLE = own_tables.REGISTRY

SAMPLES = 40
"""How many keys of rows that were exported last the registry keeps of a table."""

PATIENCE = 2.0
"""Seconds that the statistics of a transaction that has ended may take to arrive."""

_CREATE = """
CREATE TABLE {registry} (
    destination text NOT NULL,
    table_oid bigint NOT NULL,
    table_filenode bigint NOT NULL,
    slot integer NOT NULL,
    model text,
    team_ids bigint[],
    rows_before boolean,
    place text,
    oid_now bigint,
    rows bigint,
    files json NOT NULL,
    samples json NOT NULL,
    known_since timestamptz NOT NULL,
    changed_at timestamptz NOT NULL,
    PRIMARY KEY (destination, table_oid, table_filenode, slot)
)
"""

# What a table is stands in slot 0. Runs that write side by side add what they write in one of the other slots each, so that
# none of them waits for another; the sum of all slots counts.
_RECORDS = """
SELECT
    table_oid, table_filenode, slot, model, array_to_json(team_ids)::text, rows_before, place, oid_now, rows, files::text,
    samples::text, (extract(epoch FROM known_since) * 1000000)::bigint,
    EXISTS (
        SELECT FROM {ledger} AS ledger
        WHERE ledger.destination = registry.destination AND ledger.table_oid = registry.table_oid
            AND ledger.table_filenode = registry.table_filenode
    )
FROM {registry} AS registry
WHERE destination = $1
ORDER BY slot, changed_at DESC
"""

_SAVE = """
INSERT INTO {registry} (
    destination, table_oid, table_filenode, slot, model, team_ids, rows_before, place, oid_now, rows, files, samples,
    known_since, changed_at
)
VALUES (
    $1, $2, $3, 0, $4, $5::text::bigint[], $6, $7, $8, $9, $10::text::json, '[]', clock_timestamp(), clock_timestamp()
)
ON CONFLICT (destination, table_oid, table_filenode, slot) DO UPDATE SET
    model = excluded.model,
    team_ids = excluded.team_ids,
    rows_before = excluded.rows_before,
    place = excluded.place,
    oid_now = excluded.oid_now,
    rows = excluded.rows,
    files = excluded.files,
    changed_at = excluded.changed_at
"""

_FREE_SLOT = """
SELECT slot, rows, files::text, samples::text
FROM {registry}
WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3 AND slot > 0
LIMIT 1
FOR UPDATE SKIP LOCKED
"""

_ADD = """
INSERT INTO {registry} (
    destination, table_oid, table_filenode, slot, rows, files, samples, known_since, changed_at
)
VALUES ($1, $2, $3, $4, $5, $6::text::json, $7::text::json, clock_timestamp(), clock_timestamp())
ON CONFLICT (destination, table_oid, table_filenode, slot) DO UPDATE SET
    rows = excluded.rows,
    files = excluded.files,
    samples = excluded.samples,
    changed_at = excluded.changed_at
"""

# What the ledger of a version without a registry says of a table. Of partitions that are gone it does not tell how many rows
# they had.
_LEDGER = """
SELECT count(*), coalesce(bool_or(rows_before), false), array_to_json(array_agg(DISTINCT team_id))::text,
    coalesce(sum(keys) FILTER (WHERE keys > 0), 0)::bigint,
    coalesce(bool_and(keys >= 0 AND partition_filenodes <@ $4::text::bigint[]), true),
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
    """One of the files with a table's rows: its own, a partition's, or that of a table that inherits from it.

    Attributes:
        filenode: Postgres's number of the file now.
        known_as: the number that the ledger's rows have a partition's file by.
        inserted, deleted: rows that the statistics should have counted if exports alone write to it.
    """

    filenode: int
    known_as: int
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
        rows: how many rows it should have; None if that is not known.
        files: by the oid of the relation.
        samples: the first key column of some rows that were exported, as text.
        known_since: when it was first seen, in microseconds since 1970.
        in_ledger: the ledger has intervals of it.
        added_rows, added: how much of `rows` and of each file's `inserted` the other slots have.
    """

    oid: int
    filenode: int
    model: str
    team_ids: tuple[int, ...]
    rows_before: bool
    place: str
    oid_now: int
    rows: int | None
    files: Mapping[int, File]
    samples: tuple[str, ...] = ()
    known_since: int = 0
    in_ledger: bool = True
    added_rows: int = 0
    added: Mapping[int, int] = field(default_factory=dict)

    @property
    def is_partitioned(self) -> bool:
        """Whether it has no file of its own."""
        return self.oid_now not in self.files

    @property
    def is_unknown(self) -> bool:
        """Whether it has rows of which the ledger knows nothing any more."""
        return self.rows != 0 and not self.in_ledger and not self.rows_before


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
    """Create the table where it is missing. Raises as `own_tables.ensure`."""
    own_tables.ensure(session, schema, TABLE, _CREATE.format(registry=quoted(schema, TABLE)))


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
    # Somebody may have changed it meanwhile.
    own_tables.hold(session, table.destination.schema)
    _lock(session, table)
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
    if TABLE not in own_tables.there(session, table.destination.schema):
        return table
    records = _records(session, table)
    record = _matching(records, table)
    if record is None and not any((one.oid, one.filenode) == _numbers(table) for one in records):
        return table
    return _with(table, record) if record else None


def presume(session: Session, table: DestinationTable) -> DestinationTable | None:
    """As `look_up`, but a table that has changed since and is not empty is taken for the one that it was, without counting
    it. For what a mistake costs only a run.
    """
    known = look_up(session, table)
    if (known and known.in_ledger) or TABLE not in own_tables.there(session, table.destination.schema):
        return known
    candidate = _candidate(_records(session, table), table)
    if candidate is None:
        return known
    counters = _counters(session, table)
    if not any(one.size for one in counters.values()):
        return None
    emptied = [oid for oid in _changed(candidate, table) if not counters[oid].size]
    return _with(table, _renewed(candidate, table, counters, candidate.rows, emptied))


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
        registry = quoted(self.table.destination.schema, TABLE)
        free = self.session.rows(
            _FREE_SLOT.format(registry=registry), *self.table.identity, doing="reading the registry of tables"
        )
        slot, rows, files, samples = free[0] if free else (1 + secrets.randbelow(2**31 - 1), 0, "{}", "[]")
        added = {int(oid): int(count) for oid, count in json.loads(str(files)).items()}
        for oid, counters in _counters(self.session, self.table).items():
            added[oid] = added.get(oid, 0) + counters.mine - self._mine.get(oid, 0)
        self.session.execute(
            _ADD.format(registry=registry),
            *self.table.identity,
            int(str(slot)),
            int(str(rows)) + inserted,
            json.dumps({str(oid): count for oid, count in added.items() if count}),
            json.dumps([*json.loads(str(samples)), *self.samples][-SAMPLES:]),
            doing="writing the registry of tables",
        )
        if self.session.version >= _FLUSHES:
            # So that the next transaction need not wait for the statistics of this one.
            self.session.execute("SELECT pg_stat_force_next_flush()", doing="sending statistics")


_FLUSHES = 150_000
"""The first version of Postgres that sends a transaction's statistics at once if it is told to."""


_FAR_AHEAD = 2**26
"""More transactions than any server begins during one statement."""


def was_there(row: str) -> str:
    """The condition that a row of this alias was committed before the snapshot $1 (text) was taken.

    A row has the lower half of the number of the transaction that wrote it; the other half is that of the numbers within
    2^31 of the snapshot. Of an older row, which Postgres has frozen, that mostly makes a number which is far ahead of all
    transactions. Not a little ahead: INSERT ... ON CONFLICT meets rows that were committed after it began.
    """
    last = "(pg_snapshot_xmax($1::text::pg_snapshot)::text::bigint + 2147483648)"
    number = f"({last} - mod({last} - {row}.xmin::text::bigint, 4294967296))"
    return (
        f"(pg_visible_in_snapshot({number}::text::xid8, $1::text::pg_snapshot)"
        f" OR {number} > pg_snapshot_xmax(pg_current_snapshot())::text::bigint + {_FAR_AHEAD})"
    )


def has_changed(session: Session, table: DestinationTable, since: str) -> bool:
    """Whether another transaction has written to the table since a snapshot was taken, and ended."""
    [(has_changed,)] = session.rows(
        f"""
        SELECT EXISTS (
            SELECT FROM {quoted(table.destination.schema, TABLE)} AS r
            WHERE destination = $2 AND table_oid = $3 AND table_filenode = $4 AND slot > 0 AND NOT {was_there("r")}
        )
        """,
        since,
        *table.identity,
        doing="reading the registry of tables",
    )
    return bool(has_changed)


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
    while (stray := _stray(session, table)) == "behind" and time.monotonic() < deadline:
        _wait_for_statistics(session)
    if stray is None:
        return table
    _lock(session, table)
    counted = _counters(session, table)
    rows, record = _count(session, table)
    deleted = _deleted(record, table, counted)
    has_others = record.rows is None or rows != record.rows - deleted
    found = replace(
        record,
        rows=rows,
        files={
            oid: File(file.filenode, file.known_as, counted[oid].inserted, counted[oid].deleted)
            for oid, file in record.files.items()
            if oid in counted
        },
        rows_before=record.rows_before or has_others,
    )
    _save(session, table, found)
    return _with(table, found)


def _wait_for_statistics(session: Session) -> None:
    """Wait a moment, and forget what the statistics have said in this transaction: they would say it again."""
    time.sleep(0.05)
    session.execute("SELECT pg_stat_clear_snapshot()", doing="reading the statistics of the table")


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
    schema = table.destination.schema
    rows = session.rows(
        _RECORDS.format(registry=quoted(schema, TABLE), ledger=quoted(schema, ledger.TABLE)),
        table.destination.table,
        doing="reading the registry of tables",
    )
    return _summed(rows)


def _summed(rows: Sequence[tuple[object, ...]]) -> list[Record]:
    """The tables that the rows of `_RECORDS` tell of."""
    records: dict[tuple[int, int], Record] = {}
    for oid, filenode, slot, model, teams, rows_before, place, oid_now, count, files, samples, since, in_ledger in rows:
        numbers = int(str(oid)), int(str(filenode))
        if slot == 0:
            records[numbers] = Record(
                *numbers,
                str(model),
                tuple(json.loads(str(teams))),
                bool(rows_before),
                str(place),
                int(str(oid_now)),
                None if count is None else int(str(count)),
                {int(file): File(**known) for file, known in json.loads(str(files)).items()},
                known_since=int(str(since)),
                in_ledger=bool(in_ledger),
            )
        elif numbers in records:
            added = {int(file): int(more) for file, more in json.loads(str(files)).items()}
            records[numbers] = _plus(records[numbers], int(str(count)), added, json.loads(str(samples)))
    return list(records.values())


def _plus(record: Record, rows: int, added: Mapping[int, int], samples: Sequence[str]) -> Record:
    """The record with what another slot has."""
    return replace(
        record,
        rows=None if record.rows is None else record.rows + rows,
        files={oid: replace(file, inserted=file.inserted + added.get(oid, 0)) for oid, file in record.files.items()},
        samples=(*record.samples, *samples),
        added_rows=record.added_rows + rows,
        added={oid: record.added.get(oid, 0) + added.get(oid, 0) for oid in record.added.keys() | added.keys()},
    )


def _lock(session: Session, table: DestinationTable) -> None:
    """Until the transaction ends, be the only one that says what the destination is."""
    session.execute(
        f"SELECT FROM {quoted(table.destination.schema, TABLE)} WHERE destination = $1 AND slot = 0 FOR UPDATE",
        table.destination.table,
        doing="locking the registry of tables",
    )


def _record(session: Session, table: DestinationTable) -> Record:
    return next(one for one in _records(session, table) if (one.oid, one.filenode) == table.identity[1:])


def _save(session: Session, table: DestinationTable, record: Record) -> None:
    files = {
        str(oid): asdict(replace(file, inserted=file.inserted - record.added.get(oid, 0)))
        for oid, file in record.files.items()
    }
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
        None if record.rows is None else record.rows - record.added_rows,
        json.dumps(files),
        doing="writing the registry of tables",
    )


def _counters(session: Session, table: DestinationTable) -> dict[int, _Counters]:
    rows = session.rows(
        _COUNTERS, "{" + ",".join(map(str, table.files)) + "}", doing="reading the statistics of the table"
    )
    return {int(str(row[0])): _Counters(*(int(str(value or 0)) for value in row[1:])) for row in rows}


def _sampled_column(model: Model) -> str | None:
    """The key column whose values are kept, if they are alike as text on both sides."""
    kinds = {column.name: column.kind for column in model.columns}
    return model.key[0] if not model.merge and kinds[model.key[0]] in (Kind.TEXT, Kind.INTEGER) else None


def _count(session: Session, table: DestinationTable) -> tuple[int, Record]:
    """The rows of the table, and what the registry says of it at the same moment."""
    schema = table.destination.schema
    records = _RECORDS.format(registry=quoted(schema, TABLE), ledger=quoted(schema, ledger.TABLE))
    answer = session.rows(
        f"SELECT r.*, (SELECT count(*) FROM {table.qualified}) FROM ({records}) AS r",
        table.destination.table,
        doing=f"counting {table.qualified}, which has changed",
        patience=MERGE_TIMEOUT,
        of_rows=True,
    )
    record = next(one for one in _summed([row[:-1] for row in answer]) if (one.oid, one.filenode) == table.identity[1:])
    return int(str(answer[0][-1])), record


def _rows(session: Session, table: DestinationTable, files: Sequence[int] = ()) -> int:
    """How many rows the table has, or some of its partitions."""
    where = f" WHERE tableoid::bigint IN ({', '.join(map(str, files))})" if files else ""
    sql = f"SELECT count(*) FROM {table.qualified}{where}"
    [(rows,)] = session.rows(sql, doing=f"counting {table.qualified}", patience=MERGE_TIMEOUT, of_rows=True)
    return int(str(rows))


def _found(session: Session, table: DestinationTable, records: Sequence[Record]) -> Record | None:
    """The record of a table that has changed since, if it still has the rows that the ledger speaks of."""
    legacy = _legacy(session, table, records)
    if legacy:
        return legacy
    candidate = _candidate(records, table)
    counters = _counters(session, table)
    if candidate is None or not any(one.size for one in counters.values()):
        return None
    if table.model.merge and _is_at(candidate, table) and table.filenode is not None:
        # A merge compares every row with the table: nothing depends on what the ledger says.
        return _renewed(candidate, table, counters, candidate.rows)
    known = _filenodes(candidate)
    changed = _changed(candidate, table)
    emptied = [oid for oid in changed if not counters[oid].size]
    gone = [oid for oid in known if oid not in table.files]
    is_here, is_partitioned = _is_at(candidate, table), candidate.is_partitioned
    if is_here and is_partitioned and emptied == changed and not (gone or any(oid in known for oid in changed)):
        # New partitions without rows. What the statistics should have counted of the others stays.
        renewed = _renewed(candidate, table, counters, candidate.rows, emptied)
        return replace(renewed, files={**renewed.files, **candidate.files})
    rows = _rows(session, table)
    deadline = time.monotonic() + PATIENCE
    deleted = _deleted(candidate, table, counters)
    while is_here and candidate.rows is not None and rows < candidate.rows - deleted and time.monotonic() < deadline:
        # The statistics may be about to tell of rows that were deleted a moment ago.
        _wait_for_statistics(session)
        counters = _counters(session, table)
        deleted = _deleted(candidate, table, counters)
    expected = None if candidate.rows is None else candidate.rows - deleted
    is_whole = expected is not None and rows > 0 and rows == expected
    if not (is_here and is_partitioned):
        # More rows than expected of a table that has not moved: its own, and some that came by another way.
        has_others = is_here and expected is not None and rows > expected
        if not (is_whole or has_others) or not _has_samples(session, table, candidate):
            return None
        renewed = _renewed(candidate, table, counters, rows)
        return replace(renewed, rows_before=renewed.rows_before or (has_others and not table.model.merge))
    if emptied == changed:
        # Partitions that have gone or were truncated took their rows along; the others' are all there.
        others = any(counters[oid].inserted > file.inserted for oid, file in candidate.files.items() if oid in counters)
    else:
        # Rows may have moved into a new partition, or a partition was rewritten. If not, they came by another way.
        others = not is_whole and not (rows == candidate.rows and deleted == _rows(session, table, changed))
        emptied = changed if others else emptied
    renewed = _renewed(candidate, table, counters, rows, emptied)
    return replace(renewed, rows_before=renewed.rows_before or (others and not table.model.merge))


def _candidate(records: Sequence[Record], table: DestinationTable) -> Record | None:
    """The record that a table which has changed may belong to."""
    here = [one for one in records if _is_at(one, table)]
    candidate = next(iter(here or records), None)
    if candidate is None or candidate.is_partitioned != (table.filenode is None):
        return None
    if candidate.is_partitioned and candidate.oid_now != table.oid:
        # Its partitions have other names and numbers, by which the ledger could not tell what went into which.
        return None
    return candidate


def _changed(candidate: Record, table: DestinationTable) -> list[int]:
    """The oids of the relations with other files than the record has."""
    known = _filenodes(candidate)
    return [oid for oid, filenode in table.files.items() if known.get(oid) != filenode]


def _deleted(candidate: Record, table: DestinationTable, counters: Mapping[int, _Counters]) -> int:
    """Rows that were deleted since the registry looked last, as far as the statistics tell."""
    return sum(
        max(0, counters[oid].deleted - file.deleted)
        for oid, file in candidate.files.items()
        if oid in counters and candidate.place == table.place
    )


def _renewed(
    candidate: Record,
    table: DestinationTable,
    counters: Mapping[int, _Counters],
    rows: int | None,
    others: Collection[int] = (),
) -> Record:
    """The record with so many rows and the table's files as they are now, some of which are others than they were."""
    files = {}
    for oid, filenode in table.files.items():
        file = candidate.files.get(candidate.oid_now if oid == table.oid else oid)
        known_as = filenode if file is None or oid in others else file.known_as
        files[oid] = File(filenode, known_as, counters[oid].inserted, counters[oid].deleted)
    # What other slots have added of other files does not count in these.
    return replace(candidate, place=table.place, oid_now=table.oid, rows=rows, files=files)


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
        of_rows=True,
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
        "{" + ",".join(map(str, table.files.values())) + "}",
        doing="reading the ledger",
    )
    counters = _counters(session, table)
    if not intervals or (inserted and not any(one.size for one in counters.values())):
        return None
    # Counted once, as the ledger knows neither the rows before it nor those that were deleted by hand.
    rows = None if table.model.merge else _rows(session, table)
    has_others = bool(rows_before) or (rows is not None and bool(is_exact) and rows > int(str(known)))
    teams = tuple(json.loads(str(team_ids)))
    files = _files(table, counters)
    return Record(oid, filenode, table.model.name, teams, has_others, table.place, table.oid, rows, files)


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
    rows = _rows(session, table) if has_rows else 0
    files = _files(table, counters)
    return Record(oid, filenode, table.model.name, (), bool(has_rows), table.place, table.oid, rows, files)


def _files(table: DestinationTable, counters: Mapping[int, _Counters]) -> dict[int, File]:
    """The files of a table that is new to the registry."""
    return {
        oid: File(filenode, filenode, counters[oid].inserted, counters[oid].deleted)
        for oid, filenode in table.files.items()
    }
