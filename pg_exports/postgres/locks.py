"""The locks under which a table's intervals are written: of the hours that an interval touches, by whatever export.

They are advisory and a transaction's own, so that they end with it. A run's further sessions, each of which commits a part of
an interval, hold another one beside: a later run waits for these, too.
"""

from collections.abc import Sequence

from pg_exports.errors import PassingError
from pg_exports.interval import Interval
from pg_exports.postgres import advisory_locks
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import Destination


def lock(
    session: Session, destination: Destination, intervals: Sequence[Interval], *, whole_table: bool = False
) -> Sequence[Interval]:
    """Wait for every run that writes to the table in an hour that the first interval touches, and keep others waiting.

    Hours, in ascending order, so that intervals of different lengths meet without a deadlock. Until the transaction ends.
    With `whole_table` also for every other run that asks for it.

    Gives the first interval, and those that follow it up to one that another run holds: for these none is waited for.
    """
    name, parts = _names(destination)
    if whole_table:
        advisory_locks.take(session, name, doing=f"waiting for another run into {destination.qualified}")
    advisory_locks.take(session, name, _hours(intervals[0]), doing=f"waiting for another run of {intervals[0]}")
    held = None
    if len(intervals) > 1:
        held = _first_held(session, name, intervals)
    return _without_parts(session, parts, [one for one in intervals if held is None or _hours(one)[1] < held])


def join(session: Session, destination: Destination, interval: Interval) -> None:
    """Have later runs of an interval, which another session of this process has locked, wait for this session too: it may
    commit a part of the interval when the other one has gone.

    Raises:
        PassingError: it has gone already, and a later run waits.
    """
    _, parts = _names(destination)
    [(joined,)] = session.rows(
        """
        SELECT bool_and(pg_try_advisory_xact_lock_shared(hashtext($1), hour::int))
        FROM generate_series($2::bigint, $3::bigint) AS hour
        """,
        parts,
        *_hours(interval),
        doing=f"joining the run of {interval}",
    )
    if not joined:
        raise PassingError(f"Another run holds {interval}.")


def _names(destination: Destination) -> tuple[str, str]:
    """What the locks of a table's hours are called, and those of further sessions that write parts of an interval."""
    name = f"pg_exports: {destination.qualified}"
    return name, f"{name}, parts"


def _first_held(session: Session, name: str, intervals: Sequence[Interval]) -> int | None:
    """Lock the hours of the intervals behind the first; the first hour that another run holds."""
    [(held,)] = session.rows(
        """
        SELECT min(hour) FROM generate_series($2::bigint, $3::bigint) AS hour
        WHERE NOT pg_try_advisory_xact_lock(hashtext($1), hour::int)
        """,
        name,
        _hours(intervals[0])[1] + 1,
        _hours(intervals[-1])[1],
        doing="looking for other runs",
    )
    return None if held is None else int(str(held))


_PARTS = """
SELECT min(objid::bigint)
FROM pg_locks
WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND classid::bigint = hashtext($1)::bigint & 4294967295 AND objid::bigint BETWEEN $2 AND $3 AND objsubid = 2
"""


def _without_parts(session: Session, parts: str, intervals: Sequence[Interval]) -> Sequence[Interval]:
    """Wait for the parts of the first interval that a run without its first session may still commit. The same intervals up
    to one that has such parts.
    """
    first, last = _hours(intervals[0])[0], _hours(intervals[-1])[1]
    [(hour,)] = session.rows(_PARTS, parts, first, last, doing="looking for parts of intervals")
    if hour is None:
        return intervals
    before = [interval for interval in intervals if _hours(interval)[1] < int(str(hour))]
    if before:
        return before
    session.execute("SAVEPOINT pg_exports_parts", doing="setting a savepoint")
    doing = f"waiting for parts of {intervals[0]} that an earlier run commits"
    advisory_locks.take(session, parts, _hours(intervals[0]), doing=doing)
    # Nobody else can come by them now: the hours are this session's. Its own further sessions need them.
    session.execute("ROLLBACK TO SAVEPOINT pg_exports_parts", doing="going back to a savepoint")
    session.execute("RELEASE SAVEPOINT pg_exports_parts", doing="releasing a savepoint")
    return intervals[:1]


def _hours(interval: Interval) -> tuple[int, int]:
    """The first and the last hour that the interval touches, since 1970."""
    return int(interval.start.timestamp()) // 3600, (int(interval.end.timestamp()) - 1) // 3600
