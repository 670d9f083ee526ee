"""The destination table: made where it is missing, and matched column by column where it is there. Never altered."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pg_exports.errors import DestinationError, SettingsError
from pg_exports.models import Column, Model
from pg_exports.postgres import keys, schemas, types
from pg_exports.postgres.identifiers import MAX_BYTES, quoted
from pg_exports.postgres.session import LOCK_TIMEOUT, MERGE_TIMEOUT, Session
from pg_exports.postgres.types import DestinationColumn

OWN_PREFIX = "pg_exports_"
"""How the ledger, the rejected rows and staging tables are named."""

NO_FILE = 0
"""Stands for the filenode of a partitioned table, which has none."""

TEAM = "team_id"
"""The column of the team, in each model of PostHog's tables and in each destination that has one."""

ON_INSERT, ON_UPDATE = 4, 16
"""Bits of a trigger's events (`pg_trigger.tgtype`)."""


@dataclass(frozen=True)
class Destination:
    """Database, schema and table that an export writes to. `database` None is the connection's own."""

    database: str | None
    schema: str
    table: str

    def __post_init__(self) -> None:
        for setting, name in (("database", self.database), ("schema", self.schema), ("table", self.table)):
            if name is not None:
                _check_name(setting, name)
        if self.table.startswith(OWN_PREFIX):
            raise SettingsError(
                f"`table` {self.table!r}: names that begin with {OWN_PREFIX} are for pg_exports' own tables."
            )

    @property
    def qualified(self) -> str:
        """The quoted, qualified name, as in a statement."""
        return quoted(self.schema, self.table)

    @property
    def dotted(self) -> str:
        """The name as Dagster has tables' names."""
        return ".".join(name for name in (self.database, self.schema, self.table) if name)


@dataclass(frozen=True)
class LedgerIdentity:
    """What the ledger and the key journals know a table by, which stays when its files change and its rows do not.

    Attributes:
        oid, filenode: the numbers that it had when it was first written to.
        partition_filenodes: of its partitions, likewise.
        rows_before: it has rows that no export brought.
        team_ids: the teams whose rows were exported to it; 0 for a model without teams.
        known_since: when it was first written to, in microseconds since 1970.
    """

    oid: int
    filenode: int
    partition_filenodes: tuple[int, ...]
    rows_before: bool
    team_ids: tuple[int, ...]
    known_since: int


@dataclass(frozen=True)
class DestinationTable:
    """The destination as it is now.

    Attributes:
        pairs: the columns that both sides have.
        oid, filenode: the identity that DROP and TRUNCATE change; a partitioned table has no filenode.
        files: the filenode of each relation that holds its rows, by its oid: of the table itself, of its partitions, and of
            tables that inherit from it.
        may_drop_rows: triggers or rules of the user's own see rows that are written, and may drop or move them.
        lacking: the model's columns, optional ones among them, that the table has not.
        place: the cluster and the database that it is in.
        in_ledger: what the ledger knows it by; None before the registry was asked.
    """

    destination: Destination
    model: Model
    pairs: list[tuple[Column, DestinationColumn]]
    oid: int
    filenode: int | None
    files: Mapping[int, int] = field(default_factory=dict)
    may_drop_rows: bool = False
    lacking: tuple[Column, ...] = ()
    place: str = ""
    in_ledger: LedgerIdentity | None = None

    @property
    def qualified(self) -> str:
        """The quoted, qualified name, as in a statement."""
        return self.destination.qualified

    def added(self, column: Column) -> str:
        """The ALTER TABLE that adds a column; empty for one by which rows are told apart: those that are there would have NULL
        in it.
        """
        return "" if column.name in self.untold else _add_column(self.qualified, column)

    @property
    def untold(self) -> tuple[str, ...]:
        """Columns of the key without which the table cannot be asked for keys: rows that differ in them alone would pass for
        one. Without `team_id` it can: its rows are taken for the team's.
        """
        key = (*self.model.key, *self.model.left_out_of_key)
        return tuple(name for name in key if name not in (*self.column_names, TEAM))

    @property
    def why_not_asked(self) -> str | None:
        """Why the table cannot be asked for keys, and what to do; None if it can."""
        if not self.untold:
            return None
        left_out = [name for name in self.untold if name in self.model.left_out_of_key]
        remedy = f"Take {', '.join(left_out)} back into the export's `columns`, and set" if left_out else "Set"
        return (
            f"{self.qualified} has no {' and no '.join(self.untold)}, and {self.model.name} that differ in nothing else would "
            "pass for one. So the export can fill it, but cannot find out which rows it has: as it must if there were rows "
            "before its first run, if the table has triggers, if journals were pruned, and with `replay` or "
            "`deduplicate: table`. "
            f"{remedy} its `table` to another table, or to a name that is free."
        )

    @property
    def identity(self) -> tuple[str, int, int]:
        """Name, oid and filenode: the ledger and the journals know the table by these."""
        known = self.in_ledger
        numbers = (known.oid, known.filenode) if known else (self.oid, self.filenode or NO_FILE)
        return self.destination.table, *numbers

    @property
    def partition_filenodes(self) -> tuple[int, ...]:
        """The numbers of its partitions' files, by which the ledger knows them."""
        if self.in_ledger:
            return self.in_ledger.partition_filenodes
        return tuple(sorted(self.files.values())) if self.filenode is None else ()

    def teams(self, team_id: int) -> str:
        """The teams as whose rows the ledger may have those of an export of this team, as a bigint[] of Postgres's."""
        known = self.in_ledger.team_ids if self.in_ledger and not self.model.has_teams else ()
        return "{" + ",".join(map(str, sorted({team_id, *known}))) + "}"

    @property
    def rows_before(self) -> bool:
        """Whether it has rows that no export brought."""
        return self.in_ledger is not None and self.in_ledger.rows_before

    @property
    def column_names(self) -> list[str]:
        """The columns that are written, in the model's order."""
        return [source.name for source, _ in self.pairs]

    @property
    def column_list(self) -> str:
        """The same, quoted, as in a statement."""
        return ", ".join(quoted(name) for name in self.column_names)


def ensure(session: Session, destination: Destination, model: Model, *, key_index: bool = False) -> DestinationTable:
    """The destination table, created where it is missing, with everything checked that can be before a row is sent.

    With `key_index` a table that is created gets an index for questions for keys.

    Raises:
        DestinationError: the schema, a privilege, a column or a key is missing, or a type cannot hold the values; with
            the statement that mends it.
    """
    schemas.check(session, destination.schema)
    if _relation(session, destination) is None:
        _create(session, destination, model, key_index=key_index)
    return inspect(session, destination, model)


def inspect(session: Session, destination: Destination, model: Model) -> DestinationTable:
    """The destination table as it is. Raises as `ensure`; a missing table is an error here."""
    relation = _relation(session, destination)
    if relation is None:
        raise DestinationError(f"Table {destination.qualified} is gone: it was dropped a moment ago.")
    _check_kind(destination, relation)
    _check_privileges(session, destination, ["INSERT", "SELECT", *(["UPDATE"] if model.merge else [])], relation.oid)
    _check_storage(destination, relation)
    columns = _columns(session, relation.oid)
    pairs = _matched(session, destination, model, columns)
    if model.merge:
        keys.check(session, destination.qualified, model, relation.oid)
    may_drop_rows = bool(relation.triggers & (ON_INSERT | ON_UPDATE if model.merge else ON_INSERT))
    there = {column.name for column in columns}
    lacking = tuple(column for column in model.columns if column.name not in there)
    return DestinationTable(
        destination,
        model,
        pairs,
        relation.oid,
        relation.filenode,
        relation.files,
        may_drop_rows,
        lacking,
        relation.place,
    )


def exists(session: Session, destination: Destination) -> bool:
    """Whether there is a table (or anything else) of that name."""
    return _relation(session, destination) is not None


def lock(session: Session, destination: Destination, *, wait: bool = True) -> None:
    """Keep TRUNCATE, DROP and ALTER TABLE away from the table until the transaction ends; the partitions' own ones too.

    Raises:
        PassingError: one of these has the table, for longer than `LOCK_TIMEOUT`; at once without `wait`.
    """
    session.execute(
        f"LOCK TABLE {destination.qualified} IN ROW EXCLUSIVE MODE{'' if wait else ' NOWAIT'}",
        doing=f"waiting for the table {destination.qualified}",
        patience=LOCK_TIMEOUT,
    )


def column_types(session: Session, destination: Destination) -> dict[str, str]:
    """The base type of each of the table's columns, by name, in the table's order.

    Raises:
        DestinationError: there is no table, or what is there is none, or hides rows from the role.
    """
    relation = _relation(session, destination)
    if relation is None:
        raise DestinationError(f"Table {destination.qualified} does not exist (yet): materialise the export first.")
    _check_kind(destination, relation)
    _check_privileges(session, destination, ["SELECT"], relation.oid)
    return {column.name: column.type for column in _columns(session, relation.oid)}


def create_statement(destination: Destination, model: Model) -> str:
    """The CREATE TABLE of a model's default columns, with the primary key of a model whose rows are merged."""
    lines = [f"{quoted(column.name)} {column.postgres_type}" for column in model.columns if not column.optional]
    if model.merge:
        lines.append(f"PRIMARY KEY ({', '.join(quoted(name) for name in model.key)})")
    return f"CREATE TABLE IF NOT EXISTS {destination.qualified} (\n    " + ",\n    ".join(lines) + "\n)"


def _check_name(setting: str, name: str) -> None:
    size = len(name.encode())
    if not name or "\0" in name:
        raise SettingsError(f"`{setting}` is empty or holds a NUL; it must be a name of 1 to {MAX_BYTES} bytes.")
    if size > MAX_BYTES:
        raise SettingsError(
            f"`{setting}` {name!r} has {size} bytes. Postgres cuts names longer than {MAX_BYTES}: choose a shorter one."
        )


@dataclass(frozen=True)
class _Relation:
    oid: int
    kind: str
    filenode: int | None
    files: Mapping[int, int]
    triggers: int
    unsafe: tuple[tuple[str, str], ...]
    """The qualified names of foreign partitions (f), and of what is unlogged (u) or temporary (t): itself, or partitions."""
    place: str


def _relation(session: Session, destination: Destination) -> _Relation | None:
    rows = session.rows(
        """
        WITH RECURSIVE
            relation AS (
                SELECT c.oid, c.relkind, c.relhasrules
                FROM pg_class AS c
                JOIN pg_namespace AS n ON n.oid = c.relnamespace
                WHERE n.nspname = $1 AND c.relname = $2
            ),
            heirs AS (
                SELECT i.inhrelid AS oid
                FROM relation AS r
                JOIN pg_inherits AS i ON i.inhparent = r.oid
                WHERE r.relkind = 'r'
                UNION
                SELECT i.inhrelid
                FROM heirs AS h
                JOIN pg_inherits AS i ON i.inhparent = h.oid
            ),
            leaves AS (
                SELECT t.relid AS oid
                FROM relation AS r
                CROSS JOIN pg_partition_tree(r.oid) AS t
                WHERE r.relkind = 'p' AND t.isleaf
                UNION ALL
                SELECT oid FROM heirs
            )
        SELECT
            r.oid::bigint,
            r.relkind::text,
            pg_relation_filenode(r.oid)::bigint,
            (SELECT json_object_agg(oid::bigint, pg_relation_filenode(oid)::bigint)::text FROM leaves),
            CASE WHEN r.relhasrules THEN -1 ELSE (
                SELECT bit_or(tgtype) FROM pg_trigger
                WHERE tgrelid IN (SELECT r.oid UNION ALL SELECT oid FROM leaves)
                    AND NOT tgisinternal AND tgenabled <> 'D'
            ) END,
            (
                SELECT json_agg(json_build_array(
                    quote_ident(n.nspname) || '.' || quote_ident(c.relname),
                    CASE WHEN c.relkind = 'f' THEN c.relkind ELSE c.relpersistence END
                ) ORDER BY c.oid)::text
                FROM pg_class AS c
                JOIN pg_namespace AS n ON n.oid = c.relnamespace
                WHERE c.oid IN (SELECT r.oid UNION ALL SELECT oid FROM leaves)
                    AND (c.relkind = 'f' OR c.relkind = 'r' AND c.relpersistence <> 'p')
            ),
            (
                SELECT system_identifier || '/' || oid
                FROM pg_control_system(), pg_database
                WHERE datname = current_database()
            )
        FROM relation AS r
        """,
        destination.schema,
        destination.table,
        doing="looking up the table",
    )
    if not rows:
        return None
    [(oid, kind, filenode, leaves, triggers, unsafe, place)] = rows
    numbers = {oid: filenode, **json.loads(str(leaves or "{}"))}
    # A partitioned table has no file, nor has a foreign partition.
    files = {int(str(file)): int(str(number)) for file, number in numbers.items() if number is not None}
    return _Relation(
        int(str(oid)),
        str(kind),
        None if filenode is None else int(str(filenode)),
        files,
        int(str(triggers or 0)),
        tuple((str(name), str(why)) for name, why in json.loads(str(unsafe or "[]"))),
        str(place),
    )


def _create(session: Session, destination: Destination, model: Model, *, key_index: bool) -> None:
    schemas.check_may_create(session, destination.schema, f"the table {destination.qualified}")
    schemas.check_name_is_free(session, destination.schema, destination.table)
    with session.transaction():
        schemas.wait_to_create(session, destination.qualified)
        if _relation(session, destination) is None:
            session.execute(create_statement(destination, model), doing=f"creating {destination.qualified}")
            if key_index:
                session.execute(
                    keys.create_index(destination.qualified, model), doing=f"indexing {destination.qualified}"
                )


def _check_storage(destination: Destination, relation: _Relation) -> None:
    unlogged = [name for name, why in relation.unsafe if why == "u"]
    if unlogged:
        statements = " ".join(f"ALTER TABLE {name} SET LOGGED;" for name in unlogged)
        raise DestinationError(
            f"{', '.join(unlogged)} is UNLOGGED: a crash of the server empties it, and its intervals would still count as "
            f"loaded. Run as its owner: {statements}\nIf the server may have crashed since rows came in, run their intervals "
            "again, with `replay` (README.md, Each row once)."
        )
    for name, why in relation.unsafe:
        if why == "f":
            raise DestinationError(
                f"Partition {name} of {destination.qualified} is a foreign table: its rows commit apart from the ledger, so "
                "a run that breaks off could lose them or leave them twice. Make it a table of this database, or set the "
                "export's `table` to another one."
            )
        raise DestinationError(f"{name} is a temporary table. Set the export's `table` to one that stays.")


def _check_kind(destination: Destination, relation: _Relation) -> None:
    """A view, or what else has a name of that kind, would run its owner's code as this role."""
    if relation.kind not in ("r", "p"):
        raise DestinationError(
            f"{destination.qualified} is no table (relkind {relation.kind}). Set the export's `table` to a table, or "
            "to a name that is free."
        )


def _check_privileges(session: Session, destination: Destination, needed: Sequence[str], oid: int) -> None:
    [(role, *held, has_row_security, is_owner)] = session.rows(
        "SELECT current_user::text, "
        + ", ".join(f"has_table_privilege(c.oid, '{privilege}')" for privilege in needed)
        + ", row_security_active(c.oid), pg_has_role(c.relowner, 'USAGE') FROM pg_class AS c WHERE c.oid = $1::bigint::oid",
        oid,
        doing="reading privileges",
    )
    if not all(held):
        missing = ", ".join(privilege for privilege, is_held in zip(needed, held, strict=True) if not is_held)
        raise DestinationError(
            f"The role {role} lacks {missing} on {destination.qualified}. Run as its owner: "
            f"GRANT INSERT, SELECT, UPDATE ON {destination.qualified} TO {quoted(str(role))};"
        )
    if has_row_security:
        raise schemas.row_security(destination.qualified, str(role), is_owner=bool(is_owner))


def _columns(session: Session, oid: int) -> list[DestinationColumn]:
    rows = session.rows(
        """
        WITH RECURSIVE
            columns AS (
                SELECT a.*, t.typtype, t.typname, t.typbasetype, t.typtypmod, a.atttypmod AS modifier
                FROM pg_attribute AS a
                JOIN pg_type AS t ON t.oid = a.atttypid
                WHERE a.attrelid = $1::bigint::oid AND a.attnum > 0 AND NOT a.attisdropped
            ),
            -- A domain may stand on a domain: the last one's base is the type that counts.
            based AS (
                SELECT attnum, typtype, typname, typbasetype, typtypmod, modifier FROM columns
                UNION ALL
                SELECT b.attnum, t.typtype, t.typname, t.typbasetype, t.typtypmod, b.typtypmod
                FROM based AS b
                JOIN pg_type AS t ON t.oid = b.typbasetype
                WHERE b.typtype = 'd'
            )
        SELECT
            c.attname::text,
            b.typname::text,
            format_type(c.atttypid, c.atttypmod),
            CASE WHEN b.typname IN ('varchar', 'bpchar') THEN nullif(b.modifier, -1) - 4 END,
            c.attnotnull,
            c.atthasdef OR c.attidentity <> '',
            c.attgenerated <> '' OR c.attidentity = 'a',
            -- A NUMERIC's modifier has the scale in its last eleven bits, with a sign.
            CASE
                WHEN b.typname IN ('timestamp', 'timestamptz') THEN nullif(b.modifier, -1)
                WHEN b.typname = 'numeric' AND b.modifier >= 4 THEN (((b.modifier - 4) & 2047) # 1024) - 1024
            END,
            (SELECT quote_ident(l.collname) FROM pg_collation AS l WHERE l.oid = c.attcollation AND NOT l.collisdeterministic)
        FROM columns AS c
        JOIN based AS b ON b.attnum = c.attnum AND b.typtype <> 'd'
        ORDER BY c.attnum
        """,
        oid,
        doing="reading the table's columns",
    )
    return [DestinationColumn(*row) for row in rows]  # type: ignore[arg-type]  # the query gives them in this order


def _matched(
    session: Session, destination: Destination, model: Model, columns: list[DestinationColumn]
) -> list[tuple[Column, DestinationColumn]]:
    there = {column.name: column for column in columns if not column.generated}
    pairs = [(column, there[column.name]) for column in model.columns if column.name in there]
    written = {source.name for source, _ in pairs}
    _check_lacking(session, destination, model, columns, written)
    for column in columns:
        if column.not_null and not column.has_default and not column.generated and column.name not in written:
            raise DestinationError(
                f"Column {column.name} of {destination.qualified} is NOT NULL without a default, and {model.name} does "
                f"not fill it. Run as its owner: ALTER TABLE {destination.qualified} ALTER COLUMN "
                f"{quoted(column.name)} DROP NOT NULL;"
            )
    for source, column in pairs:
        types.check_pair(source, column, destination.qualified)
        if source.name in model.compared:
            _check_compared(session, destination, model, source, column)
    return pairs


def _check_lacking(
    session: Session, destination: Destination, model: Model, columns: list[DestinationColumn], written: set[str]
) -> None:
    """Make sure of the columns that the model cannot do without. Not even of events' whole key: rows that go straight in need
    none (`DestinationTable.untold`).
    """
    needed = model.compared if model.merge or model.key_may_be_null else model.key[:1]
    missing = [column for column in model.columns if column.name in needed and column.name not in written]
    if not missing:
        return
    names = ", ".join(column.name for column in missing)
    generated = {column.name for column in columns}.intersection(column.name for column in missing)
    would_be_null = any(column.name in model.key for column in missing) and _has_rows(session, destination)
    if generated or would_be_null:
        reason = (
            f"fills {', '.join(sorted(generated))} itself"
            if generated
            else "has rows, which would stay without and be taken for others than the export's"
        )
        raise DestinationError(
            f"{destination.qualified} lacks {names}, which {model.name} cannot do without, and {reason}. Set the export's "
            "`table` to another table, or to a name that is free."
        )
    statements = " ".join(_add_column(destination.qualified, column) for column in missing)
    raise DestinationError(
        f"{destination.qualified} lacks {names}, which {model.name} cannot do without. Run as its owner: {statements}"
    )


def _check_compared(
    session: Session, destination: Destination, model: Model, source: Column, column: DestinationColumn
) -> None:
    """Make sure that a column by whose values rows are compared tells apart what differs at the source."""
    blur = types.blur(source, column)
    if not blur:
        return
    table = destination.qualified
    if blur.is_lossy and _has_rows(session, destination):
        remedy = (
            "The values that are there have lost what they differed in, so the rows cannot be recognised: set the export's "
            "`table` to another table, or to a name that is free."
        )
    else:
        remedy = f"Run as its owner: ALTER TABLE {table} ALTER COLUMN {quoted(source.name)} TYPE {blur.remedy};"
    raise DestinationError(
        f"Column {source.name} of {table} is {column.declared}, which {blur.reason}. {model.name} are compared by it, and "
        f"rows that differ at the source would pass for one. {remedy}"
    )


def _has_rows(session: Session, destination: Destination) -> bool:
    sql = f"SELECT EXISTS (SELECT FROM {destination.qualified})"
    [(has_rows,)] = session.rows(
        sql, doing=f"looking into {destination.qualified}", patience=MERGE_TIMEOUT, of_rows=True
    )
    return bool(has_rows)


def _add_column(qualified: str, column: Column) -> str:
    return f"ALTER TABLE {qualified} ADD COLUMN {quoted(column.name)} {column.postgres_type};"
