"""The schema that an export writes to: whether the role may use it and create tables there, and pg_exports' own tables."""

from pg_exports.errors import DestinationError
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import LOCK_TIMEOUT, Session

CREATION_LOCK = "pg_exports: create tables"
"""What runs that want to create a table queue up behind: CREATE TABLE IF NOT EXISTS alone fails side by side."""


def check(session: Session, schema: str) -> None:
    """Make sure that the schema is there, and that the role may use it.

    Raises:
        DestinationError: it is not, or may not; with the statement that mends it.
    """
    rows = session.rows(
        """
        SELECT current_user::text, has_schema_privilege(oid, 'USAGE')
        FROM pg_namespace
        WHERE nspname = $1
        """,
        schema,
        doing="looking up the schema",
    )
    name = quoted(schema)
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


def wait_to_create(session: Session, what: str) -> None:
    """Until the transaction ends, be the only run that creates tables."""
    session.execute(
        "SELECT pg_advisory_xact_lock(hashtext($1))",
        CREATION_LOCK,
        doing=f"waiting for another run before creating {what}",
        patience=LOCK_TIMEOUT,
    )


def ensure_own(session: Session, schema: str, name: str, create: str) -> None:
    """Create one of pg_exports' own tables where it is missing.

    Raises:
        DestinationError: the role may not create it, or not write the one that another role made; with the GRANT.
    """
    if not has_own(session, schema, name):
        table = quoted(schema, name)
        check_may_create(session, schema, f"the table {table}")
        with session.transaction():
            wait_to_create(session, table)
            session.execute(create, doing=f"creating {table}")


def has_own(session: Session, schema: str, name: str) -> bool:
    """Whether one of pg_exports' own tables is there.

    Raises:
        DestinationError: it is, and another role made it whose grants do not suffice; with the GRANT.
    """
    rows = session.rows(
        """
        SELECT current_user::text, has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'SELECT')
            AND has_table_privilege(c.oid, 'UPDATE')
        FROM pg_class AS c
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = $2
        """,
        schema,
        name,
        doing=f"looking up {name}",
    )
    if rows and not rows[0][1]:
        table = quoted(schema, name)
        raise DestinationError(
            f"The role {rows[0][0]} may not write {table}, which another role made. Run as its owner: "
            f"GRANT INSERT, SELECT, UPDATE ON {table} TO {quoted(str(rows[0][0]))};"
        )
    return bool(rows)
