"""Who else has a hand in what a role writes to: whose code runs there as the role, and who could make it so.

Neither the role itself, the schema's owner nor superusers are strangers.
"""

from pg_exports.errors import one_line
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import Session

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
_OF_TABLE = f"""
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


def of_table(session: Session, schema: str, oid: int) -> list[str]:
    """Who can read what a role writes into a table, or have code run as that role there, beside itself, the schema's owner and
    superusers: owners of the table and of its partitions and children, and of what their triggers call. A sentence each.
    """
    return [
        one_line(_sentence(quoted(str(of), str(table)), str(who), None if trigger is None else quoted(str(trigger))))
        for of, table, who, trigger in session.rows(
            _OF_TABLE, schema, oid, doing="reading the table's owner and triggers"
        )
    ]


def _sentence(table: str, who: str, trigger: str | None) -> str:
    whose = f"{who}, who is neither the export's role nor the schema's owner:"
    if trigger:
        return (
            f"The trigger {trigger} on {table} calls a function of {whose} it runs as the export's role. If it should "
            f"not, run as the table's owner: DROP TRIGGER {trigger} ON {table};"
        )
    return (
        f"{table} belongs to {whose} he can read what is written there, and have code run as the export's role by "
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
    """Which roles may make triggers on a table, of those that are strangers."""
    return [one_line(str(name)) for (name,) in session.rows(_MAY_TRAP, schema, oid, doing="reading privileges")]


# Who acts as somebody that is trusted is, too.
_MAY_CREATE = f"""
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


def may_create(session: Session, schema: str) -> list[str]:
    """Who may create in a schema beside this role, the schema's owner and superusers: `PUBLIC` alone where everybody may."""
    names = [
        one_line(str(name)) for (name,) in session.rows(_MAY_CREATE, schema, doing="reading who may create in a schema")
    ]
    return names[:1] if names[:1] == ["PUBLIC"] else names
