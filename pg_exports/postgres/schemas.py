"""The schema that an export writes to: whether the role may use it and create tables there, and who else may."""

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


# Whom the schema belongs to decides what is in it, and a superuser about everything: neither gets more by a table of ours than
# he has. `pg_database_owner`, to whom `public` belongs from PostgreSQL 14 on, stands for the database's owner.
TRUSTED = """
trusted AS (
    SELECT r.oid
    FROM pg_roles AS r
    JOIN pg_namespace AS n ON n.nspname = $1
    JOIN pg_database AS d ON d.datname = current_database()
    WHERE r.rolsuper OR r.rolname IN (current_user, session_user) OR r.oid = n.nspowner
        OR (r.oid = d.datdba AND n.nspowner::regrole::text = 'pg_database_owner')
)
"""
"""The roles that may own a table or a function that runs as the export's role, of the schema $1."""

# Of a table and of its partitions and children: whom they belong to, and whose functions their triggers call.
_STRANGERS = f"""
WITH RECURSIVE
    {TRUSTED},
    relations AS (
        SELECT $2::bigint::oid AS oid
        UNION
        SELECT i.inhrelid FROM relations AS r JOIN pg_inherits AS i ON i.inhparent = r.oid
    )
SELECT n.nspname::text, c.relname::text, pg_get_userbyid(c.relowner)::text, NULL
FROM relations AS r
JOIN pg_class AS c ON c.oid = r.oid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relowner NOT IN (SELECT oid FROM trusted)
UNION
SELECT n.nspname::text, c.relname::text, pg_get_userbyid(p.proowner)::text, t.tgname::text
FROM relations AS r
JOIN pg_class AS c ON c.oid = r.oid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_trigger AS t ON t.tgrelid = r.oid AND NOT t.tgisinternal AND t.tgenabled <> 'D'
JOIN pg_proc AS p ON p.oid = t.tgfoid
WHERE p.proowner NOT IN (SELECT oid FROM trusted)
ORDER BY 1, 2, 3, 4
LIMIT 20
"""


def strangers(session: Session, schema: str, oid: int) -> list[str]:
    """Who can read what a role writes into a table, or have code run as that role there, beside itself, the schema's owner and
    superusers: owners of the table and of its partitions and children, and of what their triggers call. A sentence each.
    """
    return [
        one_line(_stranger(quoted(str(of), str(table)), str(who), None if trigger is None else quoted(str(trigger))))
        for of, table, who, trigger in session.rows(
            _STRANGERS, schema, oid, doing="reading the table's owner and triggers"
        )
    ]


def _stranger(table: str, who: str, trigger: str | None) -> str:
    is_stranger = f"{who}, who is neither the export's role nor the schema's owner:"
    if trigger:
        return (
            f"The trigger {trigger} on {table} calls a function of {is_stranger} it runs as the export's role. If it should "
            f"not, run as the table's owner: DROP TRIGGER {trigger} ON {table};"
        )
    return (
        f"{table} belongs to {is_stranger} he can read what is written there, and have code run as the export's role by "
        "triggers. If he should not, set the export's `table` to a name that is free, and its `schema` to one in which nobody "
        "else may create."
    )


_MAY_TRAP = f"""
WITH {TRUSTED}
SELECT CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)::text) END
FROM pg_class, aclexplode(relacl)
WHERE oid = $2::bigint::oid AND privilege_type = 'TRIGGER' AND grantee <> relowner
    AND grantee NOT IN (SELECT oid FROM trusted)
ORDER BY 1
"""


def may_make_triggers(session: Session, schema: str, oid: int) -> list[str]:
    """Which roles may make triggers on a table, of those that `strangers` would name."""
    return [one_line(str(name)) for (name,) in session.rows(_MAY_TRAP, schema, oid, doing="reading privileges")]


# Who acts as somebody that is trusted is, too.
_CREATORS = f"""
WITH {TRUSTED}
SELECT name FROM (
    SELECT 'PUBLIC' AS name
    FROM pg_namespace, aclexplode(coalesce(nspacl, acldefault('n', nspowner)))
    WHERE nspname = $1 AND grantee = 0 AND privilege_type = 'CREATE'
    UNION ALL
    SELECT rolname::text FROM pg_roles AS r
    WHERE has_schema_privilege(r.oid, $1, 'CREATE') AND r.rolcanlogin
        AND NOT EXISTS (SELECT FROM trusted AS t WHERE t.oid = r.oid OR pg_has_role(r.oid, t.oid, 'MEMBER'))
) AS creators
ORDER BY name <> 'PUBLIC', name
"""


def creators(session: Session, schema: str) -> list[str]:
    """Who may create in a schema beside this role, the schema's owner and superusers: `PUBLIC` alone where everybody may."""
    names = [
        one_line(str(name)) for (name,) in session.rows(_CREATORS, schema, doing="reading who may create in a schema")
    ]
    return names[:1] if names[:1] == ["PUBLIC"] else names


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
