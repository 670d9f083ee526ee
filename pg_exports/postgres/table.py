"""The destination table: made where it is missing, and matched column by column where it is there. Never altered."""

import json
from dataclasses import dataclass

from pg_exports.errors import DestinationError, SettingsError
from pg_exports.models import Column, Model
from pg_exports.postgres import types
from pg_exports.postgres.identifiers import MAX_BYTES, quoted
from pg_exports.postgres.session import Session
from pg_exports.postgres.types import DestinationColumn

OWN_PREFIX = "pg_exports_"
"""How the ledger, the rejected rows and staging tables are named."""

CREATION_LOCK = "pg_exports: create tables"
"""What runs that want to create a table queue up behind: CREATE TABLE IF NOT EXISTS alone fails side by side."""


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


@dataclass(frozen=True)
class DestinationTable:
    """The destination as it is now: the columns that both sides have, and the identity that DROP and TRUNCATE change."""

    destination: Destination
    model: Model
    pairs: list[tuple[Column, DestinationColumn]]
    oid: int
    filenode: int | None

    @property
    def qualified(self) -> str:
        """The quoted, qualified name, as in a statement."""
        return self.destination.qualified

    @property
    def column_names(self) -> list[str]:
        """The columns that are written, in the model's order."""
        return [source.name for source, _ in self.pairs]

    @property
    def column_list(self) -> str:
        """The same, quoted, as in a statement."""
        return ", ".join(quoted(name) for name in self.column_names)


def ensure(session: Session, destination: Destination, model: Model) -> DestinationTable:
    """The destination table, created where it is missing, with everything checked that can be before a row is sent.

    Raises:
        DestinationError: the schema, a privilege, a column or a key is missing, or a type cannot hold the values; with
            the statement that mends it.
    """
    _check_schema(session, destination)
    if _relation(session, destination) is None:
        _create(session, destination, model)
    return inspect(session, destination, model)


def inspect(session: Session, destination: Destination, model: Model) -> DestinationTable:
    """The destination table as it is. Raises as `ensure`; a missing table is an error here."""
    relation = _relation(session, destination)
    if relation is None:
        raise DestinationError(f"Table {destination.qualified} is gone: it was dropped a moment ago.")
    oid, kind, filenode = relation
    if kind not in ("r", "p"):
        raise DestinationError(
            f"{destination.qualified} is no table (relkind {kind}). Set the export's `table` to a table, or to a name "
            "that is free."
        )
    _check_privileges(session, destination, model, oid)
    pairs = _matched(destination, model, _columns(session, oid))
    if model.merge:
        _check_key(session, destination, model, oid)
    return DestinationTable(destination, model, pairs, oid, filenode)


def column_types(session: Session, destination: Destination) -> dict[str, str]:
    """The base type of each of the table's columns, by name, in the table's order. A missing table is an error."""
    relation = _relation(session, destination)
    if relation is None:
        raise DestinationError(f"Table {destination.qualified} does not exist (yet): materialise the export first.")
    return {column.name: column.type for column in _columns(session, relation[0])}


def create_statement(destination: Destination, model: Model) -> str:
    """The CREATE TABLE of a model's default columns, with the primary key of a model whose rows are merged."""
    lines = [f"{quoted(column.name)} {column.postgres_type}" for column in model.columns if not column.optional]
    if model.merge:
        lines.append(f"PRIMARY KEY ({', '.join(quoted(name) for name in model.key)})")
    return f"CREATE TABLE IF NOT EXISTS {destination.qualified} (\n    " + ",\n    ".join(lines) + "\n)"


def create_if_missing(session: Session, statement: str, doing: str) -> None:
    """Run a CREATE TABLE IF NOT EXISTS in a transaction of its own, one run at a time."""
    with session.transaction():
        session.execute(
            "SELECT pg_advisory_xact_lock(hashtext($1))", CREATION_LOCK, doing=f"waiting for another run before {doing}"
        )
        session.execute(statement, doing=doing)


def check_may_create(session: Session, schema: str, what: str) -> None:
    """Make sure that the role may create tables in the schema.

    Raises:
        DestinationError: it may not; with the GRANT.
    """
    [(role, may_create)] = session.rows(
        "SELECT current_user::text, has_schema_privilege($1, 'CREATE')", schema, doing="reading privileges"
    )
    if not may_create:
        raise DestinationError(
            f"The role {role} may not create {what}. Set the export's `schema`, or run as the schema's owner: "
            f"GRANT USAGE, CREATE ON SCHEMA {quoted(schema)} TO {quoted(str(role))};"
        )


def _check_name(setting: str, name: str) -> None:
    size = len(name.encode())
    if not name or "\0" in name:
        raise SettingsError(f"`{setting}` is empty or holds a NUL; it must be a name of 1 to {MAX_BYTES} bytes.")
    if size > MAX_BYTES:
        raise SettingsError(
            f"`{setting}` {name!r} has {size} bytes. Postgres cuts names longer than {MAX_BYTES}: choose a shorter one."
        )


def _check_schema(session: Session, destination: Destination) -> None:
    rows = session.rows(
        """
        SELECT current_user::text, has_schema_privilege(oid, 'USAGE')
        FROM pg_namespace
        WHERE nspname = $1
        """,
        destination.schema,
        doing="looking up the schema",
    )
    name = quoted(destination.schema)
    if not rows:
        [(role,)] = session.rows("SELECT current_user::text", doing="reading the role")
        raise DestinationError(
            f"Schema {name} does not exist. Set the export's `schema`, or run as the database's owner: "
            f"CREATE SCHEMA {name}; GRANT USAGE, CREATE ON SCHEMA {name} TO {quoted(str(role))};"
        )
    [(role, may_use)] = rows
    if not may_use:
        raise DestinationError(
            f"The role {role} may not use schema {name}. Run as its owner: "
            f"GRANT USAGE, CREATE ON SCHEMA {name} TO {quoted(str(role))};"
        )


def _relation(session: Session, destination: Destination) -> tuple[int, str, int | None] | None:
    rows = session.rows(
        """
        SELECT c.oid::bigint, c.relkind::text, pg_relation_filenode(c.oid)::bigint
        FROM pg_class AS c
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = $2
        """,
        destination.schema,
        destination.table,
        doing="looking up the table",
    )
    return (rows[0][0], rows[0][1], rows[0][2]) if rows else None  # type: ignore[return-value]  # as the query says


def _create(session: Session, destination: Destination, model: Model) -> None:
    check_may_create(session, destination.schema, f"the table {destination.qualified}")
    create_if_missing(session, create_statement(destination, model), f"creating {destination.qualified}")


def _check_privileges(session: Session, destination: Destination, model: Model, oid: int) -> None:
    needed = ["INSERT", "SELECT", *(["UPDATE"] if model.merge else [])]
    [(role, *held)] = session.rows(
        "SELECT current_user::text, "
        + ", ".join(f"has_table_privilege($1::bigint::oid, '{privilege}')" for privilege in needed),
        oid,
        doing="reading privileges",
    )
    if not all(held):
        missing = ", ".join(privilege for privilege, is_held in zip(needed, held, strict=True) if not is_held)
        raise DestinationError(
            f"The role {role} lacks {missing} on {destination.qualified}. Run as its owner: "
            f"GRANT INSERT, SELECT, UPDATE ON {destination.qualified} TO {quoted(str(role))};"
        )


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
            c.attgenerated <> '' OR c.attidentity = 'a'
        FROM columns AS c
        JOIN based AS b ON b.attnum = c.attnum AND b.typtype <> 'd'
        ORDER BY c.attnum
        """,
        oid,
        doing="reading the table's columns",
    )
    return [DestinationColumn(*row) for row in rows]  # type: ignore[arg-type]  # the query gives them in this order


def _matched(
    destination: Destination, model: Model, columns: list[DestinationColumn]
) -> list[tuple[Column, DestinationColumn]]:
    there = {column.name: column for column in columns if not column.generated}
    pairs = [(column, there[column.name]) for column in model.columns if column.name in there]
    written = {source.name for source, _ in pairs}
    needed = [*model.key, *model.merge.version] if model.merge else [model.key[0]]
    missing = [name for name in needed if name not in written]
    if missing:
        types_of = {column.name: column.postgres_type for column in model.columns}
        statements = " ".join(
            f"ALTER TABLE {destination.qualified} ADD COLUMN {quoted(name)} {types_of[name]};" for name in missing
        )
        raise DestinationError(
            f"{destination.qualified} lacks {', '.join(missing)}, which {model.name} cannot do without. Run as its "
            f"owner: {statements}"
        )
    for column in columns:
        if column.not_null and not column.has_default and not column.generated and column.name not in written:
            raise DestinationError(
                f"Column {column.name} of {destination.qualified} is NOT NULL without a default, and {model.name} does "
                f"not fill it. Run as its owner: ALTER TABLE {destination.qualified} ALTER COLUMN "
                f"{quoted(column.name)} DROP NOT NULL;"
            )
    for source, column in pairs:
        types.check_pair(source, column, destination.qualified)
    return pairs


def _check_key(session: Session, destination: Destination, model: Model, oid: int) -> None:
    rows = session.rows(
        """
        SELECT json_agg(a.attname)::text
        FROM pg_index AS i
        CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, position)
        LEFT JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
        WHERE i.indrelid = $1::bigint::oid AND i.indisunique AND i.indisvalid AND i.indimmediate
            AND i.indpred IS NULL AND k.position <= i.indnkeyatts
        GROUP BY i.indexrelid
        """,
        oid,
        doing="reading the table's keys",
    )
    if not any(sorted(map(str, json.loads(str(names)))) == sorted(model.key) for (names,) in rows):
        raise DestinationError(
            f"{destination.qualified} has no primary key on ({', '.join(model.key)}), by which {model.name} are merged. "
            f"Run as its owner: ALTER TABLE {destination.qualified} ADD PRIMARY KEY "
            f"({', '.join(quoted(name) for name in model.key)});"
        )
