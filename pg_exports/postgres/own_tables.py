"""pg_exports' own tables beside the destination: made where they are missing, and refused where somebody else's code would run
as the export's role in them.
"""

from collections.abc import Collection, Sequence

from pg_exports.errors import DestinationError
from pg_exports.postgres import schemas
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.schemas import TRUSTED
from pg_exports.postgres.session import LOCK_TIMEOUT, Session

# A trigger depends on its function, and on the functions and operators of its WHEN; Postgres's own are in no pg_depend.
_LOOK = f"""
WITH
    {TRUSTED},
    of_strangers AS (
        SELECT 'pg_proc'::regclass::oid AS class, oid FROM pg_proc WHERE proowner NOT IN (SELECT oid FROM trusted)
        UNION ALL
        SELECT 'pg_operator'::regclass::oid, oid FROM pg_operator WHERE oprowner NOT IN (SELECT oid FROM trusted)
        UNION ALL
        SELECT 'pg_type'::regclass::oid, oid FROM pg_type WHERE typowner NOT IN (SELECT oid FROM trusted)
    )
SELECT c.relname::text, current_user::text, has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'SELECT')
    AND has_table_privilege(c.oid, 'UPDATE'),
    row_security_active(c.oid), pg_has_role(c.relowner, 'USAGE'), c.relpersistence = 'u',
    c.relkind = 'r' AND NOT c.relispartition,
    CASE WHEN c.relowner NOT IN (SELECT oid FROM trusted) THEN pg_get_userbyid(c.relowner)::text END,
    (
        SELECT min(t.tgname::text)
        FROM pg_trigger AS t
        JOIN pg_depend AS d ON d.classid = 'pg_trigger'::regclass AND d.objid = t.oid
        WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND (d.refclassid, d.refobjid) IN (SELECT class, oid FROM of_strangers)
    ),
    (SELECT min(r.rulename::text) FROM pg_rewrite AS r WHERE r.ev_class = c.oid AND c.relkind = 'r')
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = $1 AND c.relname = ANY ($2::text[])
"""


def ensure(session: Session, schema: str, name: str, create: str) -> None:
    """Create one of the tables where it is missing.

    Raises:
        DestinationError: the role may not create it; or as `there`.
    """
    if there(session, schema, [name]):
        return
    table = quoted(schema, name)
    schemas.check_may_create(session, schema, f"the table {table}")
    with session.transaction():
        schemas.wait_to_create(session, table)
        # Somebody may have made it meanwhile.
        if not there(session, schema, [name]):
            session.execute(create, doing=f"creating {table}")


def hold(session: Session, schema: str, names: Collection[str]) -> None:
    """Keep everybody from changing the tables themselves until the transaction ends, and look at them once more.

    Raises:
        DestinationError: one is missing; or as `there`.
        PassingError: somebody is changing one, for longer than `LOCK_TIMEOUT`.
    """
    session.execute(
        f"LOCK TABLE {', '.join(quoted(schema, name) for name in names)} IN ROW EXCLUSIVE MODE",
        doing=f"waiting for the tables {', '.join(names)}",
        patience=LOCK_TIMEOUT,
    )
    there(session, schema, names)


def there(session: Session, schema: str, names: Collection[str]) -> set[str]:
    """Which of the tables are there.

    Raises:
        DestinationError: one is, and the role may not write all of it, a crash would empty it, or somebody else made it who
            could read it, and have code run as this role; with the statement that mends it.
    """
    rows = session.rows(_LOOK, schema, list(names), doing=f"looking up {', '.join(names)}")
    for name, *found in rows:
        _check(quoted(schema, str(name)), found)
    return {str(name) for name, *_ in rows}


def _check(table: str, found: Sequence[object]) -> None:
    role, may_write, has_row_security, is_owner, is_unlogged, is_plain, stranger, trigger, rule = found
    if not is_plain:
        raise DestinationError(
            f"{table} is no plain table, as pg_exports makes it. Drop it, or set the export's `schema`."
        )
    if stranger is not None:
        raise DestinationError(
            f"{table} belongs to {stranger}, who is neither {role} nor the schema's owner: whoever owns it can read what is "
            f"written there, and have code run as {role}. If it is yours, run as a superuser: ALTER TABLE {table} OWNER TO "
            f"{quoted(str(role))}; otherwise set the export's `schema` to one in which nobody else may create."
        )
    if trigger is not None:
        raise DestinationError(
            f"The trigger {trigger} on {table} calls a function that belongs to neither {role} nor the schema's owner, and "
            f"would run as {role}. Run as the table's owner: DROP TRIGGER {quoted(str(trigger))} ON {table};"
        )
    if rule is not None:
        raise DestinationError(
            f"The rule {rule} on {table} changes what is written there. Run as the table's owner: DROP RULE "
            f"{quoted(str(rule))} ON {table};"
        )
    if not may_write:
        raise DestinationError(
            f"The role {role} may not write {table}, which another role made. Run as its owner: "
            f"GRANT INSERT, SELECT, UPDATE ON {table} TO {quoted(str(role))};"
        )
    if has_row_security:
        raise schemas.row_security(table, str(role), is_owner=bool(is_owner))
    if is_unlogged:
        raise DestinationError(
            f"{table} is UNLOGGED: a crash of the server empties it. Run as its owner: ALTER TABLE {table} SET LOGGED;"
        )
