"""A range in one run: committed and shown interval by interval, so that what a failure leaves is a beginning, and the next
try or the next run goes on from there.
"""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from pg_exports import PostgresExport
from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.faults import eventually
from pg_exports_tests.postgres.tcp_proxy import tcp_proxy
from pg_exports_tests.postgres.test_session import log_size, statements_since
from pg_exports_tests.source_rows import HOUR, event, export_of
from pg_exports_tests.test_concurrency import holding, waiting

FOR_EVER = 1_000_000


@pytest.fixture
def hours(hour: datetime) -> list[datetime]:
    """Four hours that follow each other."""
    return [hour - n * HOUR for n in (3, 2, 1, 0)]


@pytest.fixture
def whole(hours: list[datetime]) -> tuple[str, str]:
    """Their range."""
    return partition_key(hours[0]), partition_key(hours[-1])


@pytest.fixture
def export(source: Source, target: Target, run: RunExport, hours: list[datetime]) -> PostgresExport:
    """An export that has its tables, and rows to export: one in the first hour, two in the second one, and so on."""
    source.insert("events", *(event(hour) for n, hour in enumerate(hours, start=1) for _ in range(n)))
    made = export_of("events", target, hours[-1])
    assert run(made, partition_key(hours[0] - HOUR)).error is None
    return made


def each_once(target: Target) -> int:
    """Events, none of which is there twice."""
    [(rows, different)] = target.rows("SELECT count(*), count(DISTINCT uuid) FROM events")
    assert rows == different
    return int(rows)


def in_ledger(target: Target) -> list[tuple[datetime, int]]:
    """Start and rows of each interval that had rows."""
    return target.rows(
        "SELECT interval_start, rows_inserted + rows_unchanged FROM pg_exports_ledger WHERE rows_at_source > 0 ORDER BY 1"
    )


def shown(run: Run) -> list[tuple[str, int, int]]:
    """Each partition that Dagster shows as materialised, with the rows inserted and unchanged that it shows for it."""
    return [(key, run.metadata[key]["rows_inserted"], run.metadata[key]["rows_unchanged"]) for key in sorted(run.shown)]


def copies_since(target: Target, offset: int) -> int:
    """COPY statements that brought rows."""
    return sum("FROM STDIN" in statement for statement in statements_since(target, offset))


def intervals_read(source: Source) -> int:
    """How many times rows of an interval were read, and not just their fingerprint."""
    return sum("properties" in columns for columns in source.columns_read("events"))


def refuse(target: Target, hour: datetime, state: str, times: int = FOR_EVER) -> None:
    """Have Postgres refuse the ledger's row of an interval so many times."""
    target.execute(
        "CREATE SEQUENCE tries",
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN
            IF new.interval_start = '{hour}' AND nextval('"{target.schema}".tries') <= {times} THEN
                RAISE 'not this one' USING ERRCODE = '{state}';
            END IF;
            RETURN new;
        END
        $$
        """,
        "CREATE TRIGGER refuse BEFORE INSERT ON pg_exports_ledger FOR EACH ROW EXECUTE FUNCTION refuse()",
    )


def test_an_interval_of_a_range_is_there_for_others_while_the_next_ones_are_still_to_come(
    target: Target, run: RunExport, export: PostgresExport, hours: list[datetime], whole: tuple[str, str]
) -> None:
    with ThreadPoolExecutor() as threads:
        with holding(target, hour_lock(target, hours[2])):
            done = threads.submit(run, export, *whole)
            eventually(lambda: waiting(target) == 1)
            assert each_once(target) == 3
            assert in_ledger(target) == [(hours[0], 1), (hours[1], 2)]
        assert done.result().error is None
    assert each_once(target) == 10


def hour_lock(target: Target, hour: datetime) -> str:
    """What a run that writes the hour waits for."""
    number = int(hour.timestamp()) // 3600
    return f"""SELECT pg_advisory_xact_lock(hashtext('pg_exports: "{target.schema}"."events"'), {number})"""


@pytest.mark.parametrize(
    ("fault", "tries"),
    [
        pytest.param("bad row", 1, id="a bad row"),
        pytest.param("raise_exception", 1, id="a permanent error"),
        pytest.param("serialization_failure", 6, id="a passing error that stays"),
    ],
)
def test_a_range_that_fails_keeps_and_shows_the_intervals_before_and_its_next_run_goes_on_from_there(
    source: Source,
    target: Target,
    run: RunExport,
    export: PostgresExport,
    hours: list[datetime],
    whole: tuple[str, str],
    fault: str,
    tries: int,
) -> None:
    if fault == "bad row":
        source.insert("events", event(hours[2], event="x" * 201))
        export = export_of("events", target, hours[-1], on_bad_rows="fail")
    else:
        refuse(target, hours[2], fault)
    keys = [partition_key(hour) for hour in hours]

    failed = run(export, *whole)
    assert failed.error is not None
    assert failed.tries == tries
    assert each_once(target) == 3
    assert in_ledger(target) == [(hours[0], 1), (hours[1], 2)]
    assert shown(failed) == [(keys[0], 1, 0), (keys[1], 2, 0)]
    assert failed.metadata[keys[1]]["dagster/partition_row_count"] == 2

    target.execute(
        "DROP TRIGGER IF EXISTS refuse ON pg_exports_ledger", "ALTER TABLE events ALTER COLUMN event TYPE text"
    )
    third = 4 if fault == "bad row" else 3
    copies, reads = log_size(target), intervals_read(source)
    again = run(export, *whole)
    assert (again.error, again.tries) == (None, 1)
    assert shown(again) == [(keys[0], 0, 1), (keys[1], 0, 2), (keys[2], third, 0), (keys[3], 4, 0)]
    # The third and the fourth interval together.
    assert (copies_since(target, copies), intervals_read(source) - reads) == (1, 1)
    assert each_once(target) == 7 + third


def test_a_passing_error_in_the_midst_of_a_range_costs_no_interval_before_it_and_is_not_to_be_seen_in_the_counts(
    source: Source,
    target: Target,
    run: RunExport,
    export: PostgresExport,
    hours: list[datetime],
    whole: tuple[str, str],
) -> None:
    refuse(target, hours[2], "serialization_failure", times=2)
    copies, reads = log_size(target), intervals_read(source)
    done = run(export, *whole)
    assert (done.error, done.tries) == (None, 3)
    assert shown(done) == [(partition_key(hour), n, 0) for n, hour in enumerate(hours, start=1)]
    # Of the third interval each try copies the rows.
    assert (copies_since(target, copies), intervals_read(source) - reads) == (6, 6)
    assert each_once(target) == 10
    assert done.reconciliation.passed
    assert done.reconciliation.metadata["rows_written"].value == 10


def test_a_range_whose_last_tries_reach_nothing_still_shows_what_the_first_one_wrote(
    target: Target, run: RunExport, export: PostgresExport, hours: list[datetime], whole: tuple[str, str]
) -> None:
    with (
        tcp_proxy(target.sandbox.postgres.port) as proxy,
        ThreadPoolExecutor() as threads,
        holding(target, hour_lock(target, hours[2])),
    ):
        future = threads.submit(run, export, *whole, postgres=target.resource(port=proxy.port))
        eventually(lambda: waiting(target) == 1)
        proxy.refuse()
        proxy.cut()
        failed = future.result()
    assert failed.error is not None
    assert "No connection to Postgres" in failed.error
    assert failed.tries == 6
    assert shown(failed) == [(partition_key(hours[0]), 1, 0), (partition_key(hours[1]), 2, 0)]
    assert in_ledger(target) == [(hours[0], 1), (hours[1], 2)]
    assert shown(run(export, *whole))[1:3] == [(partition_key(hours[1]), 0, 2), (partition_key(hours[2]), 3, 0)]
    assert each_once(target) == 10
