"""The schema that an export writes to: whether the role may use it and create tables there."""

from pg_exports.errors import DestinationError, one_line
from pg_exports.postgres import advisory_locks
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import Session

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


def check_name_is_free(session: Session, schema: str, name: str) -> None:
    """Make sure that no type has the name of a table that is to be made: a table makes a type of its own name.

    Raises:
        DestinationError: one has it; with whose it is.
    """
    owners = session.rows(_TYPE, schema, name, doing="looking for a type of the table's name")
    if owners:
        raise DestinationError(
            f"A type of {one_line(str(owners[0][0]))} has the name {quoted(schema, name)}, so that no table can. Run as its "
            f"owner: DROP TYPE {quoted(schema, name)}; or set the export's `table` or `schema`."
        )


# Not a table's own, nor an array's, which makes room.
_TYPE = """
SELECT pg_get_userbyid(t.typowner)::text
FROM pg_type AS t
JOIN pg_namespace AS n ON n.oid = t.typnamespace
WHERE n.nspname = $1 AND t.typname = $2 AND t.typrelid = 0 AND t.typcategory <> 'A'
"""


def wait_to_create(session: Session, what: str) -> None:
    """Until the transaction ends, be the only run that creates tables."""
    advisory_locks.take(session, CREATION_LOCK, doing=f"waiting for another run before creating {what}")


def searched(session: Session) -> list[str]:
    """The schemas in which names are looked up outside transactions: none, but for a pooler that takes no options at login."""
    with session.transaction():
        session.execute(
            "SELECT set_config('search_path', (SELECT reset_val FROM pg_settings WHERE name = 'search_path'), true)",
            doing="reading the search path",
        )
        rows = session.rows(
            "SELECT pg_catalog.unnest(pg_catalog.current_schemas(false))::pg_catalog.text", doing="reading schemas"
        )
        session.execute("SET LOCAL search_path = pg_catalog, pg_temp", doing="setting the search path")
    return [str(name) for (name,) in rows if name != "pg_catalog"]


def row_security(table: str, role: str, *, is_owner: bool) -> DestinationError:
    """The error where row-level security applies to the role on a table: it hides rows that are there, and COPY refuses it.

    The remedy opens the table to nobody else. On the partitions of a table it does not matter: what goes through the
    table itself meets the table's own policies only.
    """
    remedy = (
        f"Run as its owner: ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY;"
        if is_owner
        else f"Run as a superuser (on Supabase as postgres): ALTER ROLE {quoted(role)} BYPASSRLS;\nThe role still needs a "
        f"GRANT for each table. ALTER TABLE {table} DISABLE ROW LEVEL SECURITY would do as well, but opens the table to "
        "every role that has a privilege on it."
    )
    return DestinationError(
        f"Row-level security of {table} applies to the role {role}: rows that are there would be hidden from the export, "
        f"and rows that it writes refused. {remedy}"
    )
