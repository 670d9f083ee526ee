"""Whatever an administrator has put into the profile, quota and grants of an export's user, all rows land, or the run fails
and names what stands in the way.
"""

import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from pg_exports import ClickHouseResource
from pg_exports.errors import PassingError, SourceError
from pg_exports.models import MODELS, Model, Query, Selection
from pg_exports.sandbox.clickhouse_config import ClickHouseUser
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.clickhouse import users
from pg_exports_tests.clickhouse.test_cluster_sources import OWN, rows
from pg_exports_tests.clickhouse.test_resource import NUMBERS, insert_events
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.faults import EACH_ROW_ONCE, NOTHING, eventually, fill, landed, slowly
from pg_exports_tests.models.comparison import differences
from pg_exports_tests.source_rows import HOUR, export_of, insert_sessions, new_session, session

LIMITED = 10
"""Rows that the strictest of the profiles lets through."""

NAMED = {
    "result_1000": "max_result_rows",
    "result_20000_bytes": "max_result_bytes",
    "read_1000": "max_rows_to_read",
    "read_1000_leaf": "max_rows_to_read_leaf",
    "a_twentieth_of_a_second": "max_execution_time",
    "group_by_10": "max_rows_to_group_by",
}
"""Limits that an interval of 4,167 events reaches: the run fails, and its error has this setting's name. Under the other
profiles all rows land."""


def as_user(source: Source, user: ClickHouseUser, **changes: object) -> ClickHouseResource:
    return source.resource(user=user.name, password=user.password, **changes)


@pytest.mark.parametrize("user", users.SHORTENED, ids=lambda user: user.name)
def test_no_profile_shortens_an_interval_without_a_word(
    source: Source, target: Target, run: RunExport, hour: datetime, user: ClickHouseUser
) -> None:
    # Enough of them that a limit in time is reached, too.
    properties = {"properties": "concat('{\"a\": \"', repeat('x', 50000), '\"}')"} if "second" in user.name else {}
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (0, 0, 0)
    insert_events(source, hour, 4_167, **properties)
    done = run(export, partition_key(hour), clickhouse=as_user(source, user))
    if user.name in NAMED:
        assert done.error is not None
        assert NAMED[user.name] in done.error
        assert target.count("events") == 0
    else:
        assert done.error is None
        assert done.counts == (4_167, 0, 0)


@pytest.mark.parametrize("user", users.SHORTENED, ids=lambda user: user.name)
@pytest.mark.parametrize("model", [*MODELS.values(), OWN], ids=lambda model: model.name)
def test_under_each_profile_every_model_has_all_rows_or_an_error(
    sample: Source, sample_end: datetime, model: Model, user: ClickHouseUser
) -> None:
    query = model.query(Selection(TEAM, sample_end - 6 * HOUR, sample_end))
    expected = rows(sample.resource(), query, model)
    assert len(expected) > LIMITED
    try:
        found = rows(as_user(sample, user), query, model)
    except (PassingError, SourceError) as error:
        assert any(name in str(error) for name in user.settings if not name.endswith("_mode")), str(error)  # noqa: PT017
    else:
        assert differences(found, expected) == {}


@pytest.mark.parametrize("model", MODELS)
def test_a_user_who_may_change_settings_and_no_data_exports_every_model(
    sample: Source, target: Target, run: RunExport, sample_end: datetime, model: str
) -> None:
    key = partition_key(sample_end - HOUR)
    counts = []
    for table, name in (("as_exporter", ROLE), ("as_readonly", users.READONLY_2.name)):
        password = sample.sandbox.source_password if name == ROLE else users.PASSWORD
        export = export_of(model, target, sample_end, name=table, table=table)
        done = run(export, key, clickhouse=sample.resource(user=name, password=password))
        assert done.error is None
        counts.append(done.counts)
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


def refused(
    run: RunExport, target: Target, hour: datetime, clickhouse: ClickHouseResource, model: str = "events"
) -> str:
    """The error of a run that fails at its first try."""
    failed = run(export_of(model, target, hour), partition_key(hour), clickhouse=clickhouse)
    assert failed.error is not None
    assert failed.tries == 1
    assert users.PASSWORD not in failed.error
    return failed.error


def test_a_user_who_may_change_no_settings_gets_the_statement_that_helps(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    error = refused(run, target, hour, as_user(source, users.READONLY_1))
    assert "Code: 164" in error
    assert "ALTER USER <user> SETTINGS readonly = 2" in error


def test_a_constraint_on_a_setting_names_it_and_who_can_allow_it(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    error = refused(run, target, hour, as_user(source, users.CONSTRAINED))
    assert "Code: 452" in error
    assert "join_overflow_mode" in error
    assert "An administrator of ClickHouse can allow it" in error


def test_a_quota_that_is_used_up_is_an_error_that_says_so(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    clickhouse = as_user(source, users.FEW_QUERIES)
    assert "QUOTA_EXCEEDED" in refused(run, target, hour, clickhouse)


# Grants


def test_without_the_grant_on_dictionaries_sessions_fail_with_the_grant_to_give(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert_sessions(source, session(new_session(hour), hour))
    error = refused(run, target, hour, as_user(source, users.WITHOUT_DICTIONARIES), "sessions")
    database = source.database
    assert f"GRANT dictGet ON {database}.channel_definition_dict TO {users.WITHOUT_DICTIONARIES.name};" in error


def test_a_lacking_grant_is_named_as_the_statement_that_gives_it(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    error = refused(run, target, hour, as_user(source, users.EVENTS_ONLY))
    assert "Code: 497" in error
    assert f"GRANT SELECT ON {source.database}.events TO {users.EVENTS_ONLY.name};" in error


# Queries that end early


def wire(source: Source, secure: bool) -> dict[str, object]:
    """What a connection needs for plain HTTP, or for HTTPS, which it has anyhow."""
    port = source.sandbox.clickhouse.http_port
    return {} if secure else {"secure": False, "port": port, "ca_certificate": None}


def test_a_killed_query_is_not_taken_for_a_shutdown_whatever_the_profile_filters(
    source: Source, hour: datetime
) -> None:
    fill(source, hour, rows_of_a_part=100)
    clickhouse = as_user(source, users.FILTERED_BY_A_COLUMN, settings=slowly(200))
    model, comment = MODELS["events"], uuid.uuid4().hex
    query = model.query(Selection(TEAM, hour, hour + HOUR))
    with (
        clickhouse.frames(query, model, log_comment=json.dumps({"export": comment})) as frames,
        ThreadPoolExecutor(1) as pool,
    ):
        reading = pool.submit(list, frames)
        killed = "KILL QUERY WHERE Settings['log_comment'] LIKE {comment:String} ASYNC"
        running = "SELECT query_id FROM system.processes WHERE Settings['log_comment'] LIKE {comment:String}"
        eventually(lambda: source.rows(running, {"comment": f'{{"export": "{comment}%'}))
        source.execute(killed, {"comment": f'{{"export": "{comment}%'})
        with pytest.raises(SourceError, match="KILL QUERY"):
            reading.result()


@pytest.mark.parametrize("secure", [True, False], ids=["TLS", "plain"])
def test_a_query_that_an_administrator_killed_is_not_started_again_and_the_next_run_completes_the_interval(
    source: Source, target: Target, run: RunExport, hour: datetime, secure: bool
) -> None:
    fill(source, hour, rows_of_a_part=100)
    name = f"killed_{uuid.uuid4().hex}"
    export = export_of("events", target, hour, name=name)
    failed: list[str | None] = []
    tries: list[int] = []

    def fail() -> None:
        done = run(
            export, partition_key(hour), clickhouse=source.resource(settings=slowly(200), **wire(source, secure))
        )
        failed.append(done.error)
        tries.append(done.tries)

    runner = threading.Thread(target=fail)
    runner.start()
    kill(source, name, runner)
    runner.join()
    assert tries == [1]
    assert failed[0] is not None
    assert "QUERY_WAS_CANCELLED" in failed[0]
    assert "KILL QUERY" in failed[0]
    assert landed(target) == NOTHING
    assert run(export, partition_key(hour)).error is None
    assert landed(target) == EACH_ROW_ONCE


def kill(source: Source, export: str, runner: threading.Thread) -> None:
    """Kill the query of an export that reads rows, once it runs."""
    running = (
        "SELECT query_id FROM system.processes WHERE JSONExtractString(Settings['log_comment'], 'export') = {export:String}"
        " AND query LIKE '%AS suspect%'"
    )

    def is_killed() -> bool:
        assert runner.is_alive()
        for (query_id,) in source.rows(running, {"export": export}):
            source.execute("KILL QUERY WHERE query_id = {query_id:String} ASYNC", {"query_id": query_id})
            return True
        return False

    eventually(is_killed)


def test_a_limit_of_memory_is_a_passing_error_that_names_it(source: Source) -> None:
    clickhouse = as_user(source, users.LITTLE_MEMORY)
    sql = "SELECT groupUniqArray(number) AS n FROM numbers(10000000)"
    with pytest.raises(PassingError, match="MEMORY_LIMIT_EXCEEDED"):
        clickhouse.rows(Query(sql, {}), log_comment="tests")


@pytest.mark.parametrize("secure", [True, False], ids=["TLS", "plain"])
def test_a_limit_of_memory_in_mid_answer_is_a_passing_error_that_names_it(source: Source, secure: bool) -> None:
    clickhouse = as_user(source, users.LITTLE_MEMORY, settings={"max_block_size": 1000}, **wire(source, secure))
    sql = "SELECT number, repeat('x', if(number < 500000, 10, 1000000)) AS word FROM numbers(501000)"
    with clickhouse.frames(Query(sql, {}), NUMBERS, log_comment="tests") as frames:
        assert next(frames).height > 0
        with pytest.raises(PassingError, match=r"(?s)MEMORY_LIMIT_EXCEEDED.*`max_memory_usage`"):
            list(frames)


@pytest.mark.parametrize("secure", [True, False], ids=["TLS", "plain"])
def test_a_limit_of_time_in_mid_answer_is_an_error_that_names_it(source: Source, hour: datetime, secure: bool) -> None:
    clickhouse = as_user(source, users.LITTLE_TIME, settings={"max_block_size": 10}, **wire(source, secure))
    insert_events(source, hour, 1000)
    model = MODELS["events"]
    query = Query(
        "SELECT * REPLACE (if(sleepEachRow(0.002) = 0, event, '') AS event) FROM ("
        + model.query(Selection(TEAM, hour, hour + HOUR)).sql
        + ")",
        model.query(Selection(TEAM, hour, hour + HOUR)).parameters,
    )
    with (
        pytest.raises(PassingError, match=r"(?s)TIMEOUT_EXCEEDED.*max_execution_time"),
        clickhouse.frames(query, model, log_comment="tests") as frames,
    ):
        list(frames)


def test_a_query_that_sends_nothing_but_headers_of_its_progress_ends_with_the_read_timeout(source: Source) -> None:
    clickhouse = as_user(source, users.PROGRESS, read_timeout=2)
    began = time.monotonic()
    with pytest.raises(PassingError, match=r"[Tt]imed out"):
        clickhouse.rows(
            Query("SELECT sum(sleepEachRow(1)) AS n FROM numbers(60)", {}),
            log_comment="tests",
            settings={"max_block_size": 1},
        )
    assert time.monotonic() - began < 30
