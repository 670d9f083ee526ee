"""Lists that are longer than ClickHouse takes in one field of a request, 128 KB: of event names, of values, of intervals."""

from datetime import UTC, datetime, timedelta

import pytest

from pg_exports.models import MODELS, PropertyFilter, Query, Selection
from pg_exports.models.model import PARAMETER_BYTES
from pg_exports_tests.clickhouse.test_resource import insert_events
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, export_of


def names(count: int) -> list[str]:
    """Awkward names of some 60 bytes, each another one."""
    return [f'event {number:06} it\'s a \\ "name", {{a:b}} and ünïcödé of some length' for number in range(count)]


@pytest.mark.parametrize("count", [4_000, 30_000])
def test_thousands_of_included_and_excluded_events_are_one_query(
    source: Source, target: Target, run: RunExport, hour: datetime, count: int
) -> None:
    wanted = names(count)
    for name in (wanted[0], wanted[count // 2], wanted[-1], "another"):
        insert_events(source, hour, 1, event=f"unhex('{name.encode().hex()}')")
    included = export_of("events", target, hour, include_events=wanted, exclude_events=wanted[: count // 2])
    assert run(included, partition_key(hour)).counts == (2, 0, 0)
    assert {name for (name,) in target.rows("SELECT event FROM events")} == {wanted[count // 2], wanted[-1]}


def test_thousands_of_values_of_a_filter_are_one_query(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    plans = names(4_000)
    insert_events(source, hour, 1, properties=f"toJSONString(map('plan', unhex('{plans[-1].encode().hex()}')))")
    insert_events(source, hour, 1, properties="toJSONString(map('plan', 'none of them'))")
    export = export_of("events", target, hour, filters=[PropertyFilter(key="plan", value=list(plans))])
    assert run(export, partition_key(hour)).counts == (1, 0, 0)


def test_a_month_of_five_minute_intervals_is_one_query(source: Source) -> None:
    start = datetime(2026, 10, 1, tzinfo=UTC)
    starts = tuple(start + n * timedelta(minutes=5) for n in range(8_928))
    for moment in (starts[0], starts[4_000], starts[-1]):
        insert_events(source, moment, 2)
    selection = Selection(TEAM, start, starts[-1] + timedelta(minutes=5), starts=starts)
    for name in MODELS:
        model = MODELS[name]
        with source.resource().frames(model.query(selection), model, log_comment="tests") as frames:
            found = [interval for frame in frames for interval in frame["interval_start"]]
        if name == "events":
            expected = [int(moment.timestamp()) * 1_000_000 for moment in (starts[0], starts[4_000], starts[-1])]
            assert sorted(found) == sorted(2 * expected)


def test_a_list_that_is_short_enough_is_sent_as_one() -> None:
    query = Query("SELECT {list:Array(String)}", {"list": ["a" * (PARAMETER_BYTES - 10)]})
    assert query.with_short_parameters() == query


def test_a_value_that_is_too_long_by_itself_is_an_error_that_says_so(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour, include_events=["x" * 200_000])
    failed = run(export, partition_key(hour))
    assert failed.error is not None
    assert "longer than the 128 KB that ClickHouse takes" in failed.error
    assert target.count("events") == 0


def test_a_query_of_the_users_own_may_be_long(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    comment = "-- " + 200 * "a comment that goes on and on, "
    query = (
        "SELECT uuid, inserted_at FROM events WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end}\n"
        + "\n".join(25 * [comment])
    )
    assert len(query) > 150_000
    insert_events(source, hour, 3)
    model = {
        "name": "long",
        "query": query + "\nORDER BY 1",
        "columns": {"uuid": "UUID", "inserted_at": "TIMESTAMPTZ"},
        "key": ["uuid"],
    }
    done = run(export_of(model, target, hour, team_id=None, start=hour - HOUR), partition_key(hour))  # type: ignore[arg-type]
    assert done.error is None
    assert done.counts == (3, 0, 0)
