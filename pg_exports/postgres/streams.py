"""One interval over several connections, each of which reads and copies a part of its rows.

Postgres has no transaction over several connections that a role without further rights and settings could have (PREPARE
TRANSACTION is off unless the server's `max_prepared_transactions` is raised, and what it leaves behind needs somebody to clear
it away). So all parts are copied before the first is committed: a failure until then leaves nothing of the interval. Then they
are merged and committed one after the other, and each brings the ledger's row up to date: it says how many rows and which keys
are in, and that the others are missing. Should the run end in between, the next one sends what is missing, as it does with
late rows.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from pg_exports.errors import PassingError
from pg_exports.models import Part
from pg_exports.postgres import locks
from pg_exports.postgres import table as tables
from pg_exports.postgres.load import Load, Loading
from pg_exports.postgres.session import Session

KEEP_ALIVE = 60.0
"""Seconds after which a connection that waits for the others says so to the server, which would give it up in the end."""

LAST_WORDS = 10.0
"""Seconds that the other parts have to end when one fails. One that waits for ClickHouse by then is left behind."""

Record = Callable[[Session, Sequence[Load], Sequence[Load]], None]
"""Writes the ledger's row of an interval of which some parts are in once the session has committed, and the others not."""


def load(loading: Loading, session: Session, others: Sequence[Session], record: Record) -> list[Load]:
    """Load one interval over several connections, and commit all parts but the first, which the caller commits.

    Args:
        loading: the interval, which `session` has locked.
        session: in a transaction.
        others: further ones, in none. One that cannot have the table at once is not used.
        record: is called before each commit.

    Raises: as `Load.copy`. Then nothing was committed, or what the ledger says.
    """
    with contextlib.ExitStack() as rolled_back:
        transactions = [
            (other, rolled_back.enter_context(begun)) for other in others if (begun := _begun(other, loading))
        ]
        recorded = loading.recorded(session)
        sessions = [session, *(other for other, _ in transactions)]
        parts = [Load(loading, one, recorded, Part(number, len(sessions))) for number, one in enumerate(sessions)]
        _copy_side_by_side(parts)
        if parts[0].is_staged:
            loading.progress.merging()
        # The first one last: as long as it lasts, no other run begins with the interval.
        out = parts[1:] + parts[:1]
        in_: list[Load] = []
        for other, transaction in transactions:
            in_.append(out.pop(0))
            in_[-1].bring_in()
            record(other, in_, out)
            transaction.close()
        parts[0].bring_in()
    return parts


def _begun(other: Session, loading: Loading) -> contextlib.ExitStack | None:
    """A further connection's transaction, in which others are kept from the interval and the table for as long as it lasts.

    A TRUNCATE that waits for the first connection would have this one wait for it, and so for ever: it does not wait.
    """
    [interval] = loading.intervals
    try:
        with contextlib.ExitStack() as transaction:
            transaction.enter_context(other.transaction())
            locks.join(other, loading.table.destination, interval)
            tables.lock(other, loading.table.destination, wait=False)
            return transaction.pop_all()
    except PassingError as error:
        loading.log.info(f"{loading.export.export} {interval} goes over one connection less. {error}")
        return None


def _copy_side_by_side(parts: Sequence[Load]) -> None:
    """Copy all parts, each in a thread of its own. What one raises, or what interrupts this thread, ends the others."""
    threads = ThreadPoolExecutor(len(parts), thread_name_prefix="pg_exports stream")
    running: dict[Future[None], Load] = {threads.submit(part.copy): part for part in parts}
    try:
        while running:
            ended, _ = wait(running, timeout=KEEP_ALIVE, return_when=FIRST_EXCEPTION)
            for one in ended:
                one.result()
                del running[one]
            for part in parts:
                if running and part not in running.values():
                    part.session.execute("SELECT 1", doing="waiting for the interval's other parts")
    except BaseException:
        _stop(running)
        raise
    finally:
        threads.shutdown(wait=False)


def _stop(running: Mapping[Future[None], Load]) -> None:
    deadline = time.monotonic() + LAST_WORDS
    while time.monotonic() < deadline and not all(one.done() for one in running):
        for one, part in running.items():
            if not one.done():
                part.stop()
        wait(running, timeout=0.5)
