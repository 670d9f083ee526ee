"""Postgres's advisory locks, by which runs wait for one another; each ends with its transaction.

Any role of the database can take them, whatever its rights: an error names who holds one.
"""

from pg_exports.errors import PassingError
from pg_exports.postgres.errors import LockedError
from pg_exports.postgres.session import LOCK_TIMEOUT, Session

_TAKE = "SELECT pg_advisory_xact_lock(hashtext($1))"

_TAKE_NUMBERS = """
SELECT count(pg_advisory_xact_lock(hashtext($1), number::int)) FROM generate_series($2::bigint, $3::bigint) AS number
"""

# A lock with a number is known by two keys of 32 bits, one without by both halves of one of 64 bits.
_HOLDERS = """
SELECT DISTINCT pid::bigint, usename::text, application_name, usename = current_user
FROM pg_locks
LEFT JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND granted AND pid <> pg_backend_pid()
    AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND CASE objsubid
        WHEN 2 THEN classid::bigint = hashtext($1)::bigint & 4294967295 AND objid::bigint BETWEEN $2 AND $3
        ELSE $2 IS NULL AND classid::bigint << 32 | objid::bigint = hashtext($1)::bigint
    END
LIMIT 5
"""


def take(session: Session, name: str, numbers: tuple[int, int] | None = None, *, doing: str) -> None:
    """Wait for the lock of a name, or for those of a name and each number from the first to the last, in ascending order.
    They are held until the transaction ends.

    Raises:
        PassingError: somebody else holds one for longer than `LOCK_TIMEOUT`; the error says who.
    """
    try:
        session.execute(_TAKE_NUMBERS if numbers else _TAKE, name, *(numbers or ()), doing=doing, patience=LOCK_TIMEOUT)
    except LockedError as error:
        # Postgres answers no question in a transaction that failed.
        session.roll_back()
        raise PassingError(f"{error}\n{_holders(session, name, numbers)}") from None


def _holders(session: Session, name: str, numbers: tuple[int, int] | None) -> str:
    """Who holds it, a sentence each."""
    holders = session.rows(_HOLDERS, name, *(numbers or (None, None)), doing="looking for who holds the lock")
    said = [
        f"Process {pid} of the role {role} ({application or 'without a name'}) holds it"
        + (
            ": another run, or one that has gone without a word."
            if is_own
            else f", which is not the export's. An administrator can end it: SELECT pg_terminate_backend({pid});"
        )
        for pid, role, application, is_own in holders
    ]
    return "\n".join(said) or "Nobody holds it any more."
