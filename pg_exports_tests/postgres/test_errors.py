"""Which refusals pass by themselves, and that each says in Postgres's words what it was."""

import threading

import pytest

from pg_exports.errors import DestinationError, PassingError
from pg_exports.postgres.session import Session
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import Target


def test_a_lock_that_is_not_released_in_time_is_tried_again(target: Target) -> None:
    take = "SELECT pg_advisory_xact_lock(1)"
    with target.resource().session() as holder, target.resource().session() as waiting, holder.transaction():
        holder.execute(take, doing="taking a lock")
        with waiting.transaction():
            waiting.execute("SET LOCAL lock_timeout = '50ms'", doing="setting")
            with pytest.raises(PassingError, match=r"^Postgres refused while taking a lock: .*lock timeout"):
                waiting.execute(take, doing="taking a lock")


def test_a_deadlock_is_tried_again(target: Target) -> None:
    outcomes: list[BaseException | None] = []
    both = threading.Barrier(2)

    def lock(first: int, second: int) -> None:
        try:
            with target.resource().session() as session, session.transaction():
                session.execute("SELECT pg_advisory_xact_lock($1)", first, doing="taking a lock")
                both.wait(timeout=10)
                session.execute("SELECT pg_advisory_xact_lock($1)", second, doing="taking a lock")
        except BaseException as error:  # noqa: BLE001 - shown by the assertion
            outcomes.append(error)
        else:
            outcomes.append(None)

    threads = [threading.Thread(target=lock, args=order) for order in ((2, 3), (3, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [refused] = [outcome for outcome in outcomes if outcome]
    assert isinstance(refused, PassingError)
    assert "deadlock detected" in str(refused)


def pid_of(session: Session) -> int:
    [(pid,)] = session.rows("SELECT pg_backend_pid()", doing="asking")
    return int(str(pid))


def test_a_connection_that_the_server_ended_is_tried_again(target: Target) -> None:
    with target.resource().session() as session:
        target.execute(f"SELECT pg_terminate_backend({pid_of(session)}, 5000)")
        with pytest.raises(PassingError, match="while asking"):
            session.rows("SELECT 1", doing="asking")


def test_a_connection_that_the_server_ended_before_its_version_was_known_is_tried_again(target: Target) -> None:
    with target.resource().session() as session:
        target.execute(f"SELECT pg_terminate_backend({pid_of(session)}, 5000)")
        with pytest.raises(PassingError, match="while asking for the server's version"):
            _ = session.version


def test_a_statement_that_the_server_ends_is_tried_again(target: Target) -> None:
    with target.resource().session() as session:
        ending = threading.Timer(0.3, target.execute, [f"SELECT pg_terminate_backend({pid_of(session)})"])
        ending.start()
        with pytest.raises(PassingError, match="terminating connection"):
            session.rows("SELECT pg_sleep(10)", doing="sleeping")
        ending.join()


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("SELECT 1 / 0", "division by zero"),
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM missing", 'relation "missing" does not exist'),
        ("CREATE TEMPORARY TABLE t (a int)", "permission denied to create temporary tables"),
        ("CREATE SCHEMA s", "permission denied for database"),
        ("SELECT pg_read_file('/etc/passwd')", "permission denied for function"),
    ],
)
def test_what_another_try_will_not_mend_is_not_tried_again(statement: str, said: str, target: Target) -> None:
    with target.resource().session() as session, pytest.raises(DestinationError) as refused:
        session.execute(statement, doing="trying it")
    assert str(refused.value).startswith("Postgres refused while trying it: ")
    assert said in str(refused.value)
    assert refused.value.allow_retries is False
    assert target.sandbox.password not in str(refused.value)


def test_a_refusal_about_a_row_names_the_constraint_and_quotes_nothing(target: Target) -> None:
    target.execute("CREATE TABLE things (n int PRIMARY KEY)", f"GRANT INSERT, SELECT ON things TO {ROLE}")
    with target.resource().session() as session, pytest.raises(DestinationError) as refused:
        session.execute(f"INSERT INTO {target.schema}.things VALUES (1234), (1234)", doing="inserting")
    assert 'unique constraint "things_pkey"' in str(refused.value)
    assert "1234" not in str(refused.value)


def test_the_detail_and_the_hint_of_any_other_refusal_stand_in_the_message(target: Target) -> None:
    target.execute("CREATE TABLE things (n int)", f"GRANT SELECT ON things TO {ROLE}")
    with target.resource().session() as session, pytest.raises(DestinationError) as refused:
        session.execute(f"SELECT nn FROM {target.schema}.things", doing="asking")
    assert 'column "nn" does not exist; Perhaps you meant to reference the column "things.n".' in str(refused.value)
