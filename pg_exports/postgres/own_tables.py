"""pg_exports' own tables beside the destination: made where they are missing, and refused where somebody else's code would run
as the export's role in them.
"""

from collections.abc import Sequence

from pg_exports.errors import DestinationError
from pg_exports.postgres import schemas
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import LOCK_TIMEOUT, Session
from pg_exports.postgres.strangers import TRUSTED

LEDGER = "pg_exports_ledger"
JOURNAL = "pg_exports_keys"
REJECTED = "pg_exports_rejected"
REGISTRY = "pg_exports_tables"

NAMES = (LEDGER, JOURNAL, REJECTED, REGISTRY)

FIRST_NORMAL_OID = 16384
"""The first of what is not Postgres's own (FirstNormalObjectId in access/transam.h)."""

# `pg_class` has flags for most of what may run in a table. An index runs something by its expressions or its condition alone.
_LOOK = f"""
WITH {TRUSTED}
SELECT c.relname::text, c.oid::bigint, current_user::text,
    has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'UPDATE'),
    row_security_active(c.oid), pg_has_role(c.relowner, 'USAGE'), c.relpersistence = 'u',
    c.relkind = 'r' AND NOT c.relispartition AND NOT EXISTS (SELECT FROM pg_inherits AS h WHERE h.inhrelid = c.oid),
    CASE WHEN c.relowner NOT IN (SELECT oid FROM trusted) THEN pg_get_userbyid(c.relowner)::text END,
    c.relhastriggers OR c.relhasrules OR c.relchecks > 0 OR c.relhassubclass
        OR EXISTS (
            SELECT FROM pg_attribute AS a
            WHERE a.attrelid = c.oid AND a.attnum > 0 AND (a.atthasdef OR a.atttypid >= {FIRST_NORMAL_OID})
        )
        OR EXISTS (
            SELECT FROM pg_index AS i WHERE i.indrelid = c.oid AND (i.indexprs IS NOT NULL OR i.indpred IS NOT NULL)
        )
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = $1 AND c.relname = ANY ($2::text[])
ORDER BY array_position($2::text[], c.relname::text)
"""

# What would run as the export's role where it writes or reads a table, or make the rows others than it has written. Tables of
# ours have none of it. Triggers of those who are trusted are left: who watches changes by them has a function of his own. A
# condition and arguments may be anybody's who was granted TRIGGER, whatever they call.
_TRAPS = f"""
WITH {TRUSTED}
SELECT trap, remedy FROM (
    SELECT t.tgrelid AS relation, format('trigger %I', t.tgname) AS trap, format('DROP TRIGGER %I ON ', t.tgname) AS remedy
    FROM pg_trigger AS t
    JOIN pg_proc AS p ON p.oid = t.tgfoid
    WHERE NOT t.tgisinternal
        AND (t.tgqual IS NOT NULL OR t.tgnargs > 0 OR p.proowner NOT IN (SELECT oid FROM trusted))
    UNION ALL
    SELECT r.ev_class, format('rule %I', r.rulename), format('DROP RULE %I ON ', r.rulename)
    FROM pg_rewrite AS r
    UNION ALL
    SELECT k.conrelid, format('constraint %I', k.conname), NULL
    FROM pg_constraint AS k
    WHERE k.contype = 'c'
    UNION ALL
    SELECT d.adrelid, format('default of the column %I', a.attname), NULL
    FROM pg_attrdef AS d
    JOIN pg_attribute AS a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
    UNION ALL
    SELECT i.indrelid, format('index %s', i.indexrelid::regclass), NULL
    FROM pg_index AS i
    JOIN pg_depend AS d ON d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
    LEFT JOIN pg_proc AS p ON d.refclassid = 'pg_proc'::regclass AND p.oid = d.refobjid
    LEFT JOIN pg_operator AS o ON d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid
    WHERE coalesce(p.proowner, o.oprowner) NOT IN (SELECT oid FROM trusted)
    UNION ALL
    SELECT a.attrelid, format('type of the column %I', a.attname), NULL
    FROM pg_attribute AS a
    JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE t.typowner NOT IN (SELECT oid FROM trusted)
    UNION ALL
    SELECT h.inhparent, format('child %s', h.inhrelid::regclass), NULL
    FROM pg_inherits AS h
) AS traps
WHERE relation = $2::bigint::oid
ORDER BY remedy NULLS LAST, trap
LIMIT 1
"""


def ensure(session: Session, schema: str, name: str, create: str) -> None:
    """Create one of the tables where it is missing.

    Raises:
        DestinationError: the role may not create it; or as `there`.
    """
    if name in there(session, schema):
        return
    table = quoted(schema, name)
    schemas.check_may_create(session, schema, f"the table {table}")
    schemas.check_name_is_free(session, schema, name)
    with session.transaction():
        schemas.wait_to_create(session, table)
        # Somebody may have made it meanwhile.
        if name not in there(session, schema):
            session.execute(create, doing=f"creating {table}")


def hold(session: Session, schema: str) -> None:
    """Keep everybody from changing the tables themselves until the transaction ends, and look at them once more.

    Raises:
        DestinationError: one is missing; or as `there`.
        PassingError: somebody is changing one, for longer than `LOCK_TIMEOUT`.
    """
    session.execute(
        f"LOCK TABLE {', '.join(quoted(schema, name) for name in NAMES)} IN ROW EXCLUSIVE MODE",
        doing=f"waiting for the tables {', '.join(NAMES)}",
        patience=LOCK_TIMEOUT,
    )
    there(session, schema)


def there(session: Session, schema: str) -> set[str]:
    """Which of `NAMES` are there. To be asked before the first of them is read in a transaction.

    Raises:
        DestinationError: of one that is there the role may not write all, or it belongs to a stranger, or something runs in
            it that is not pg_exports' own, or a crash would empty it; with the statement that mends it.
    """
    rows = session.rows(_LOOK, schema, list(NAMES), doing=f"looking up {', '.join(NAMES)}")
    for name, oid, *found, may_be_trapped in rows:
        _check(quoted(schema, str(name)), found)
        if may_be_trapped:
            _check_traps(session, schema, str(name), oid)
    return {str(name) for name, *_ in rows}


def _check(table: str, found: Sequence[object]) -> None:
    role, may_write, has_row_security, is_owner, is_unlogged, is_plain, stranger = found
    if not is_plain:
        raise DestinationError(
            f"{table} is no plain table, as pg_exports makes it. Drop it, or set the export's `schema`."
        )
    if stranger is not None:
        raise DestinationError(
            f"{table} belongs to {stranger}, who is neither {role} nor the schema's owner: whoever owns it can read what is "
            f"written there, and have code run as {role}. If exports made it as {stranger}, run as a superuser: ALTER TABLE "
            f"{table} OWNER TO {quoted(str(role))}; otherwise drop it, or set the export's `schema` to one in which nobody "
            "else may create."
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


def _check_traps(session: Session, schema: str, name: str, oid: object) -> None:
    for trap, remedy in session.rows(_TRAPS, schema, oid, doing=f"looking at {name}"):
        table = quoted(schema, name)
        raise DestinationError(
            f"The {trap} of {table} is not pg_exports' own: what it calls would run as the export's role, or rows be others "
            f"than were written. {f'Run as the owner: {remedy}{table};' if remedy else 'As the owner, take it off the table.'}"
        )
