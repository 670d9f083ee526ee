"""Rows that may be there already: through a staging table, and from it into the destination what is missing or newer.

The staging table lives and dies inside the interval's transaction. It is no TEMPORARY table, as the role has no
privilege to make one.
"""

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from pg_exports.errors import DestinationError, PassingError
from pg_exports.models import Kind, Merge
from pg_exports.postgres import registry, schemas, types
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import MERGE_TIMEOUT, Session
from pg_exports.postgres.table import TEAM, DestinationTable


@dataclass(frozen=True)
class Merged:
    """Rows that were inserted, rows that replaced an older one, and rows that are not there in spite of it."""

    inserted: int
    updated: int
    missing: int = 0

    def __add__(self, other: "Merged") -> "Merged":
        return Merged(self.inserted + other.inserted, self.updated + other.updated, self.missing + other.missing)


HASH_BYTES = 128 * 1024 * 1024
"""Memory of the server's that a merge may take to look its rows up by, where the server's settings give less: with the usual
8 MB the destination's rows go through files, and 121,369 unchanged sessions take 0.67 s instead of 0.51 s.
"""

# Not `work_mem`, which sorting would take as well, and gain nothing. PostgreSQL 12 has no such setting.
_HASH_MEMORY = """
SELECT CASE WHEN current_setting('hash_mem_multiplier', true) IS NOT NULL THEN set_config(
    'hash_mem_multiplier',
    greatest(
        current_setting('hash_mem_multiplier', true)::float8,
        least(1000, $1::float8 / pg_size_bytes(current_setting('work_mem')))
    )::text,
    true
) END
"""

# Values as the same texts whatever the role's settings are, and read alike in any session.
_TEXTS_ALIKE = """
SELECT set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO', true), set_config('extra_float_digits', '1', true)
"""

INTERVAL_COLUMN = "pg_exports_interval"
"""In a staging table with the rows of several intervals: in which of them a row counts, as in a frame's `INTERVAL`."""


@contextlib.contextmanager
def staging_table(session: Session, table: DestinationTable, *, of_several_intervals: bool = False) -> Iterator[str]:
    """A table with the destination's columns and types, for the rest of the block. Gives its name.

    Raises:
        DestinationError: the role may not create tables in the schema; or the destination cannot be asked for its keys.
    """
    schema = table.destination.schema
    if not table.model.merge and table.why_not_asked:
        raise DestinationError(table.why_not_asked)
    schemas.check_may_create(session, schema, "a staging table")
    name = f"pg_exports_staging_{uuid.uuid4().hex[:12]}"
    interval = f", NULL::bigint AS {INTERVAL_COLUMN}" if of_several_intervals else ""
    session.execute(
        f"CREATE UNLOGGED TABLE {quoted(schema, name)} AS "
        f"SELECT {table.column_list}{interval} FROM {table.qualified} WITH NO DATA",
        doing="creating the staging table",
    )
    yield name
    session.execute(f"DROP TABLE {quoted(schema, name)}", doing="dropping the staging table")


class SupersededError(PassingError):
    """Another run, which may have read the source later, merged some of the same rows meanwhile: read them again."""


def snapshot(session: Session) -> str:
    """What the table is at this moment, for `merge` to tell rows that another run has written since. To be taken before
    the source is read.
    """
    [(text,)] = session.rows("SELECT pg_current_snapshot()::text", doing="taking a snapshot")
    return str(text)


def merge(session: Session, table: DestinationTable, staging: str, read_since: str) -> Merged:
    """Bring the staging table's rows into the destination: the missing ones, and those that replace an older one.

    A row replaces one of the same version that differs from it, too, as it was read later. Not if another run has written
    that since `read_since`, the `snapshot` from before the source was read: which of the two read later is not known then.

    Where a trigger or a rule of the table's may have kept some of them out, each is looked up then.

    Raises:
        DestinationError, PassingError: Postgres refused; or rows of the table may be those of the staging table or not.
    """
    rule = table.model.merge
    _give_memory(session)
    absent = _count_missing(session, table, staging)
    if rule:
        sql, parameters = _upsert(table, staging, rule, is_empty=_is_empty(session, table)), [read_since]
    else:
        sql, parameters = _insert_missing(table, staging), []
    rows = session.rows(sql, *parameters, doing=f"merging into {table.qualified}", patience=MERGE_TIMEOUT, of_rows=True)
    [(inserted, updated)] = rows if rule else _told_apart(table, rows)
    missing = _count_missing(session, table, staging)
    # A trigger may also take out or change what it has let in: that does not count as inserted.
    stayed = (
        int(str(inserted)) if rule or not table.may_drop_rows else max(0, min(int(str(inserted)), absent - missing))
    )
    return Merged(stayed, int(str(updated)), missing)


def _count_missing(session: Session, table: DestinationTable, staging: str) -> int:
    """How many of the staging table's rows are not in the destination, if it may drop some; else nobody needs to know."""
    if not table.may_drop_rows:
        return 0
    sql = f"SELECT count(*) {_missing(table, staging)}"
    [(missing,)] = session.rows(sql, doing="looking the rows up", patience=MERGE_TIMEOUT, of_rows=True)
    return int(str(missing))


def merge_intervals(
    session: Session, table: DestinationTable, staging: str, rule: Merge, read_since: str
) -> dict[int, Merged]:
    """The same with the rows of several intervals, of which one may stand in several, the same in each. It is brought in
    for the first of them, as if that had been merged first. Gives what became of each interval's rows.
    """
    _give_memory(session)
    sql = _upsert_intervals(table, staging, rule, is_empty=_is_empty(session, table))
    merged = session.rows(
        sql, read_since, doing=f"merging into {table.qualified}", patience=MERGE_TIMEOUT, of_rows=True
    )
    missing: dict[int, int] = {}
    if table.may_drop_rows:
        rows = session.rows(
            f"SELECT {INTERVAL_COLUMN}, count(*) {_missing(table, staging)} GROUP BY 1",
            doing="looking the rows up",
            patience=MERGE_TIMEOUT,
            of_rows=True,
        )
        missing = {int(str(interval)): int(str(count)) for interval, count in rows}
    counts = {int(str(interval)): (int(str(new)), int(str(changed))) for interval, new, changed in merged}
    return {
        interval: Merged(*counts.get(interval, (0, 0)), missing.get(interval, 0))
        for interval in counts.keys() | missing.keys()
    }


def differences(session: Session, table: DestinationTable, staging: str) -> pa.Table:
    """The staging table's rows that are not once in the destination, or there in an older version.

    Returns:
        `number`: what `INTERVAL_COLUMN` has of the row; `copies`: how often its key stands in the destination; `is_older`:
        it stands there in an older version; `key`: of a row with several copies the key's values as a JSON array of texts,
        times in UTC.
    """
    _give_memory(session)
    session.execute(_TEXTS_ALIKE, doing="setting how values are shown")
    rule = table.model.merge
    key = [quoted(name) for name in table.model.key if name in table.column_names]
    if rule:
        same = " AND ".join(f"d.{name} = s.{name}" for name in key)
        is_older = f"d.{key[0]} IS NOT NULL AND {_version(table, rule, 'd')} < {_version(table, rule, 's')}"
        sql = f"""
            SELECT s.{INTERVAL_COLUMN} AS number, (d.{key[0]} IS NOT NULL)::int::bigint AS copies, {is_older} AS is_older,
                NULL::text AS key
            FROM {quoted(table.destination.schema, staging)} AS s
            LEFT JOIN {table.qualified} AS d ON {same}
            WHERE d.{key[0]} IS NULL OR ({is_older})
        """
    else:
        texts = ", ".join(f"s.{name}::text" for name in key)
        sql = f"""
            SELECT s.{INTERVAL_COLUMN} AS number, count(d.tableoid) AS copies, false AS is_older,
                CASE WHEN count(d.tableoid) > 1 THEN min(json_build_array({texts})::text) END AS key
            FROM {quoted(table.destination.schema, staging)} AS s
            LEFT JOIN {table.qualified} AS d ON {_is_there(table)}
            GROUP BY 1
            HAVING count(d.tableoid) <> 1
        """
    return session.arrow(sql, doing=f"looking for rows in {table.qualified}", patience=MERGE_TIMEOUT, of_rows=True)


def replace_changed(session: Session, table: DestinationTable, staging: str) -> int:
    """Replace the destination's rows of an appended model that differ from the staging table's row of their key.

    A key that the destination has more than once is left alone: it stands in several intervals, and which of its rows is
    this interval's is not known.

    Returns:
        How many rows were replaced.

    Raises:
        DestinationError: the role may not update; with the GRANT.
    """
    key = [quoted(name) for name in table.model.key if name in table.column_names]
    others = [quoted(name) for name in table.column_names if name not in table.model.key]
    if not others:
        return 0
    changed = f"""
        pairs AS MATERIALIZED (
            SELECT d.ctid AS place, d.tableoid AS file, s.*,
                count(*) OVER (PARTITION BY {", ".join(f"s.{name}" for name in key)}) AS copies,
                ({_values(table, "s")}) IS DISTINCT FROM ({_values(table, "d")}) AS has_changed
            FROM {quoted(table.destination.schema, staging)} AS s
            JOIN {table.qualified} AS d ON {_is_same(table)}
        ),
        changed AS (SELECT * FROM pairs WHERE copies = 1 AND has_changed)
    """
    [(role, may_update)] = session.rows(
        "SELECT current_user::text, has_table_privilege($1::bigint::oid, 'UPDATE')",
        table.oid,
        doing="reading privileges",
    )
    if not may_update:
        [(has_changed,)] = session.rows(
            f"WITH {changed} SELECT EXISTS (SELECT FROM changed)",
            doing=f"looking for rows of {table.qualified} that have changed",
            patience=MERGE_TIMEOUT,
            of_rows=True,
        )
        if not has_changed:
            return 0
        raise DestinationError(
            f"Rows of {table.qualified} have changed at the source, and the role {role} may not update them. Run as its "
            f"owner: GRANT UPDATE ON {table.qualified} TO {quoted(str(role))};"
        )
    [(replaced,)] = session.rows(
        f"""
        WITH
            {changed},
            replaced AS (
                UPDATE {table.qualified} AS d
                SET {", ".join(f"{name} = c.{name}" for name in others)}
                FROM changed AS c
                WHERE d.ctid = c.place AND d.tableoid = c.file
                RETURNING 1
            )
        SELECT count(*) FROM replaced
        """,
        doing=f"replacing rows of {table.qualified} that have changed",
        patience=MERGE_TIMEOUT,
        of_rows=True,
    )
    return int(str(replaced))


def check_superseded(session: Session, table: DestinationTable, staging: str, rule: Merge, read_since: str) -> None:
    """Make sure that `merge` left no row out that another run has written since `read_since`.

    Raises:
        SupersededError: it did.
    """
    if not registry.has_changed(session, table, read_since):
        return
    same = " AND ".join(f"d.{quoted(name)} = s.{quoted(name)}" for name in table.model.key)
    [(superseded,)] = session.rows(
        f"""
        SELECT count(*)
        FROM {quoted(table.destination.schema, staging)} AS s
        JOIN {table.qualified} AS d ON {same}
        WHERE {_version(table, rule, "s")} = {_version(table, rule, "d")} AND {_differs(table, "s")}
            AND NOT {registry.was_there("d")} AND d.xmin <> pg_current_xact_id()::xid
        """,
        read_since,
        doing="looking for rows of other runs",
        patience=MERGE_TIMEOUT,
        of_rows=True,
    )
    if superseded:
        raise SupersededError(
            f"Another run has merged {superseded} of the same rows into {table.qualified} while this one read them."
        )


def _give_memory(session: Session) -> None:
    session.execute(_HASH_MEMORY, float(HASH_BYTES), doing="setting the memory of a merge")


def _is_empty(session: Session, table: DestinationTable) -> bool:
    """Whether the table has no rows yet. Another run may bring some at any time: this decides how, not what is written."""
    sql = f"SELECT 1 FROM {table.qualified} LIMIT 1"
    return not session.rows(sql, doing=f"looking into {table.qualified}", patience=MERGE_TIMEOUT, of_rows=True)


def _insert_missing(table: DestinationTable, staging: str) -> str:
    there = "" if table.model.key_may_be_null else f"there AS MATERIALIZED ({_there(table, staging)}),"
    unsure = "(SELECT count(*) FROM there WHERE NOT is_sure)" if there else "0::bigint"
    return f"""
        WITH
            {there}
            written AS (
                INSERT INTO {table.qualified} ({table.column_list})
                SELECT {table.column_list} FROM ({_absent(table, staging, "there" if there else None)}) AS s
                RETURNING 1
            )
        SELECT (SELECT count(*) FROM written), {unsure}
    """


def _told_apart(table: DestinationTable, rows: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """The answer of `_insert_missing` as that of `_upsert`, if each row was found in the table or not.

    Raises:
        DestinationError: of some it cannot be told.
    """
    [(inserted, unsure)] = rows
    if unsure:
        names = " or ".join(name for name in table.model.key[1:] if name != TEAM)
        raise DestinationError(
            f"{table.qualified} has rows in which {names} is NULL, as in a column that was added later. They have the "
            f"{table.model.key[0]} of {unsure} rows at the source, and whether they are these cannot be told. Fill the "
            "columns in such rows, or set the export's `table` to another table, or to a name that is free. Nothing was "
            "written."
        )
    return [(inserted, 0)]


def _absent(table: DestinationTable, staging: str, there: str | None = None) -> str:
    """The staging table's rows whose key is not in the destination. `there` is the name that `_there` has in the statement, if
    it has one.
    """
    rows = f"SELECT s.* FROM {quoted(table.destination.schema, staging)} AS s"
    if not table.model.key_may_be_null:
        there = there or f"({_there(table, staging)})"
        return f"{rows} WHERE NOT EXISTS (SELECT FROM {there} AS t WHERE t.place = s.ctid)"
    # NULL is a value like any other here. In two halves, as an index serves `=` alone, and no join that takes NULL for equal
    # can be a hash join without the hash.
    key = [quoted(name) for name in table.model.key]
    of_staging, of_table = (", ".join(f"{side}.{name}" for name in key) for side in "sd")
    equal = " AND ".join(f"d.{name} = s.{name}" for name in key)
    same = " AND ".join(f"d.{name} IS NOT DISTINCT FROM s.{name}" for name in key)
    hashes = " = ".join(f"hash_record_extended(ROW({columns}), 0)" for columns in (of_table, of_staging))
    return f"""
        {rows}
        WHERE num_nulls({of_staging}) = 0 AND NOT EXISTS (SELECT FROM {table.qualified} AS d WHERE {equal})
        UNION ALL
        {rows}
        WHERE num_nulls({of_staging}) > 0 AND NOT EXISTS (
            SELECT FROM {table.qualified} AS d WHERE num_nulls({of_table}) > 0 AND {hashes} AND {same}
        )
    """


def _there(table: DestinationTable, staging: str) -> str:
    """The places of the staging table's rows that are in the destination or may be, and whether that is sure.

    At the source no column of the key is NULL. In the destination one is that was added later, and its row may be any that
    agrees in the other columns. A row without a team is taken for the team's.
    """
    _, *others = (quoted(name) for name in table.model.key if name in table.column_names)
    told_by = [f"d.{name}" for name in others if name != quoted(TEAM)]
    is_sure = f"bool_or(num_nulls({', '.join(told_by)}) = 0)" if told_by else "true"
    return f"""
        SELECT s.ctid AS place, {is_sure} AS is_sure
        FROM {quoted(table.destination.schema, staging)} AS s
        JOIN {table.qualified} AS d ON {_is_there(table)}
        GROUP BY s.ctid
    """


def _is_there(table: DestinationTable) -> str:
    """The condition that `d`, of the destination, is the row `s` of the staging table, or may be it."""
    if table.model.key_may_be_null:
        return _is_same(table)
    first, *others = (quoted(name) for name in table.model.key if name in table.column_names)
    return " AND ".join([f"d.{first} = s.{first}", *(f"(d.{name} = s.{name} OR d.{name} IS NULL)" for name in others)])


def _is_same(table: DestinationTable) -> str:
    """The condition that `d`, of the destination, has the key of `s`, of the staging table."""
    key = [quoted(name) for name in table.model.key if name in table.column_names]
    if not table.model.key_may_be_null:
        return " AND ".join(f"d.{name} = s.{name}" for name in key)
    # NULL is a value like any other here. A join that takes NULL for equal can be a hash join with the hash alone.
    sides = [f"hash_record_extended(ROW({', '.join(f'{side}.{name}' for name in key)}), 0)" for side in "sd"]
    return " AND ".join([" = ".join(sides), *(f"d.{name} IS NOT DISTINCT FROM s.{name}" for name in key)])


def _missing(table: DestinationTable, staging: str) -> str:
    """The staging table's rows that are not in the destination, or there in an older version."""
    rule = table.model.merge
    if not rule:
        return f"FROM ({_absent(table, staging)}) AS s"
    key = [quoted(name) for name in table.model.key]
    not_older = f"{_version(table, rule, 'd')} >= {_version(table, rule, 's')}"
    return f"""
        FROM {quoted(table.destination.schema, staging)} AS s
        WHERE NOT EXISTS (
            SELECT FROM {table.qualified} AS d WHERE {" AND ".join(f"d.{name} = s.{name}" for name in key)} AND {not_older}
        )
    """


def _upsert(table: DestinationTable, staging: str, rule: Merge, *, is_empty: bool) -> str:
    return f"""
        WITH written AS (
            {_insert(table, quoted(table.destination.schema, staging), rule, is_empty=is_empty)}
            RETURNING {_is_new(table)} AS is_new
        )
        SELECT count(*) FILTER (WHERE is_new), count(*) FILTER (WHERE NOT is_new) FROM written
    """


def _upsert_intervals(table: DestinationTable, staging: str, rule: Merge, *, is_empty: bool) -> str:
    key = ", ".join(quoted(name) for name in table.model.key)
    # Of a row that stands in several intervals the latest state; of those that were read one after the other, the later.
    later = "DESC" if table.model.one_interval_a_query else "ASC"
    return f"""
        WITH
            first AS MATERIALIZED (
                SELECT DISTINCT ON ({key}) *
                FROM {quoted(table.destination.schema, staging)} AS s
                ORDER BY {key}, {_version(table, rule, "s")} DESC, {INTERVAL_COLUMN} {later}
            ),
            written AS (
                {_insert(table, "first", rule, is_empty=is_empty)}
                RETURNING {", ".join(f"d.{quoted(name)}" for name in table.model.key)}, {_is_new(table)} AS is_new
            )
        SELECT {INTERVAL_COLUMN}, count(*) FILTER (WHERE is_new), count(*) FILTER (WHERE NOT is_new)
        FROM written
        JOIN first USING ({key})
        GROUP BY 1
    """


def _insert(table: DestinationTable, rows: str, rule: Merge, *, is_empty: bool) -> str:
    """Unchanged rows are left out first, as ON CONFLICT would lock and write them; an empty table has none. In the order of
    the key, so that two merges of the same rows wait for each other instead of deadlocking; the rule stands twice, as the
    destination's row may change between the two.
    """
    key = [quoted(name) for name in table.model.key]
    others = [quoted(name) for name in table.column_names if name not in table.model.key]
    same = " AND ".join(f"d.{name} = s.{name}" for name in key)
    left_out = f"""
        LEFT JOIN {table.qualified} AS d ON {same}
        WHERE d.{key[0]} IS NULL OR {_replaces(table, rule, "s")}
    """
    return f"""
        INSERT INTO {table.qualified} AS d ({table.column_list})
        SELECT {", ".join(f"s.{quoted(name)}" for name in table.column_names)}
        FROM {rows} AS s
        {"" if is_empty else left_out}
        ORDER BY {", ".join(f"s.{name}" for name in key)}
        ON CONFLICT ({", ".join(key)}) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in others)}
        WHERE {_replaces(table, rule, "excluded")}
    """


def _is_new(table: DestinationTable) -> str:
    """Whether a row that was written was inserted. A partitioned table (it has no file) gives no system columns; there
    the statement's snapshot tells, in which a row that another run committed meanwhile is new.
    """
    if table.filenode is not None:
        return "(xmax = 0)"
    key = [quoted(name) for name in table.model.key]
    same = " AND ".join(f"before.{name} = d.{name}" for name in key)
    return f"NOT EXISTS (SELECT FROM {table.qualified} AS before WHERE {same})"


def _replaces(table: DestinationTable, rule: Merge, incoming: str) -> str:
    of_incoming, of_table = _version(table, rule, incoming), _version(table, rule, "d")
    is_newer = f"{of_incoming} > {of_table}"
    is_changed = f"{of_incoming} = {of_table} AND {_differs(table, incoming)} AND {registry.was_there('d')}"
    return f"({is_newer} OR ({is_changed}))"


def _differs(table: DestinationTable, incoming: str) -> str:
    return f"({_values(table, incoming)}) IS DISTINCT FROM ({_values(table, 'd')})"


def _version(table: DestinationTable, rule: Merge, side: str) -> str:
    """The version columns as a row that compares with NULL lowest, whatever their type."""
    parts = []
    for source, destination in table.pairs:
        if source.name in rule.version:
            column = f"{side}.{quoted(source.name)}"
            if source.kind is Kind.INTEGER and destination.type in types.TEXT_TYPES:
                column = f"{column}::numeric"
            elif source.kind is Kind.TEXT and destination.type in types.TEXT_TYPES:
                # As ClickHouse compares texts, and not as a language sorts them.
                column = f'{column} COLLATE "C"'
            elif source.kind is Kind.FLOAT:
                # The greatest number for Postgres; for ClickHouse as low as NULL.
                column = f"nullif({column}, 'NaN')"
            least = _least(destination.type) if not column.endswith("::numeric") else "0"
            parts.append((rule.version.index(source.name), f"{column} IS NOT NULL, coalesce({column}, {least})"))
    return f"ROW({', '.join(part for _, part in sorted(parts))})"


def _least(type_: str) -> str:
    """A value of a type that stands in for NULL. Any value does: the comparison checks IS NOT NULL first."""
    if type_.startswith("timestamp") or type_ == "date":
        return "'-infinity'"
    if type_ in types.TEXT_TYPES:
        return "''"
    return {"bool": "false", "uuid": "'00000000-0000-0000-0000-000000000000'"}.get(type_, "0")


def _values(table: DestinationTable, side: str) -> str:
    """Every column but the key's; JSON, which has no equality, as text."""
    return ", ".join(
        f"{side}.{quoted(source.name)}{'::text' if destination.type == 'json' else ''}"
        for source, destination in table.pairs
        if source.name not in table.model.key
    )
