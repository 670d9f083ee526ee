"""A model of the user's own: what its query gives lands as the rows of the built-in models do."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from pg_exports import PostgresExport
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.postgres.test_ingest import creation
from pg_exports_tests.source_rows import HOUR, export_of
from pg_exports_tests.test_late_rows import asked
from pg_exports_tests.yaml_exports import Load, assets, refusal, said, yaml

ORDERS: dict[str, Any] = {
    "name": "orders",
    "description": "Orders as the shop has them.",
    "query": "SELECT id, customer, amount, paid, tags, details, updated_at FROM orders "
    "WHERE updated_at >= {interval_start} AND updated_at < {interval_end}",
    "columns": {
        "id": "BIGINT",
        "customer": "TEXT",
        "amount": "DOUBLE PRECISION",
        "paid": "BOOLEAN",
        "tags": "TEXT[]",
        "details": "JSONB",
        "updated_at": "TIMESTAMPTZ",
    },
    "key": ["id"],
    "version": ["updated_at"],
}
CHANGES = ORDERS | {"name": "changes", "key": ["id", "updated_at"], "version": []}


@pytest.fixture
def orders(source: Source) -> Source:
    """The test's ClickHouse database with a table that is none of PostHog's."""
    source.execute(
        "CREATE TABLE orders (id UInt64, customer Nullable(String), amount Decimal(10, 2), paid Bool, tags Array(String), "
        "details String, updated_at DateTime) ENGINE = MergeTree ORDER BY id"
    )
    return source


def order(updated_at: datetime, number: int, **changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "id": number,
        "customer": "Zoë",
        "amount": 12.5,
        "paid": True,
        "tags": ["a", "b'c"],
        "details": '{"n": 1.50}',
        "updated_at": updated_at,
    }
    return row | changes


def own(target: Target, hour: datetime, model: Mapping[str, Any] = ORDERS, **changes: Any) -> PostgresExport:
    return export_of(model, target, hour, **({"team_id": None} | changes))  # type: ignore[arg-type]


def test_rows_land_in_a_table_that_the_export_makes_in_the_types_of_its_columns(
    orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    orders.insert("orders", order(hour, 7), order(hour, 8, customer=None, tags=[], details=""))
    done = run(own(target, hour), partition_key(hour))
    assert done.error is None
    assert done.counts == (2, 0, 0)
    assert all(check.passed for check in done.checks.values())
    assert target.rows(
        "SELECT id, customer, amount, paid, tags, details::text, updated_at FROM orders ORDER BY id"
    ) == [
        (7, "Zoë", 12.5, True, ["a", "b'c"], '{"n": 1.50}', hour),
        (8, None, 12.5, True, [], None, hour),
    ]
    types = "SELECT string_agg(format_type(atttypid, atttypmod), ', ' ORDER BY attnum) FROM pg_attribute"
    assert target.rows(f"{types} WHERE attrelid = 'orders'::regclass AND attnum > 0") == [
        ("bigint, text, double precision, boolean, text[], jsonb, timestamp with time zone",)
    ]
    metadata = done.metadata[partition_key(hour)]
    assert (metadata["first_timestamp"], metadata["last_timestamp"]) == (hour.timestamp(), hour.timestamp())


def test_with_a_version_the_greater_one_replaces_and_an_older_one_never_does(
    orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = own(target, hour)
    orders.insert(
        "orders", order(hour, 7, amount=1), order(hour + HOUR / 2, 7, amount=2), order(hour - HOUR, 7, amount=0)
    )
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    assert target.rows("SELECT amount FROM orders") == [(2,)]
    assert run(export, partition_key(hour - HOUR)).counts == (0, 0, 1)
    orders.insert("orders", order(hour + HOUR, 7, amount=3), order(hour + HOUR, 8))
    assert run(export, partition_key(hour + HOUR)).counts == (1, 1, 0)
    assert target.rows("SELECT id, amount FROM orders ORDER BY id") == [(7, 3), (8, 12.5)]


def test_without_a_version_rows_are_appended_each_key_once_whatever_runs_again(
    orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    orders.insert("orders", order(hour, 7), order(hour, 7), order(hour, 8), order(hour - HOUR, 7))
    export = own(target, hour, CHANGES)
    first, last = partition_key(hour - HOUR), partition_key(hour)
    assert run(export, first, last).counts == (3, 0, 0)
    assert run(export, first, last).counts == (0, 0, 3)
    orders.insert("orders", order(hour, 9))
    again = run(export, last)
    assert again.counts == (1, 0, 2)
    assert again.error is None
    assert target.rows("SELECT id, updated_at FROM changes ORDER BY updated_at, id") == [
        (7, hour - HOUR),
        (7, hour),
        (8, hour),
        (9, hour),
    ]


@pytest.mark.parametrize("asked_by", ["replay", "VACUUM FULL", "deduplicate", "a trigger"])
def test_where_null_is_a_value_of_a_key_its_rows_are_recognised_each_time_the_table_is_asked(
    asked_by: str, orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    orders.insert("orders", order(hour, 7), order(hour, 7, customer=None), order(hour, 8, customer=None))
    settings: dict[str, Any] = {"deduplicate": "table"} if asked_by == "deduplicate" else {}
    export = own(target, hour, CHANGES | {"key": ["customer", "id"]}, **settings)
    options = {"run_config": {"ops": {"changes": {"config": {"replay": True}}}}} if asked_by == "replay" else {}
    assert run(export, partition_key(hour), **options).counts == (3, 0, 0)
    for _ in range(2):
        if asked_by == "VACUUM FULL":
            target.execute("VACUUM FULL changes")
        if asked_by == "a trigger":
            target.execute(
                "CREATE OR REPLACE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
                "CREATE OR REPLACE TRIGGER kept BEFORE INSERT ON changes FOR EACH ROW EXECUTE FUNCTION keep()",
            )
        target.execute("DELETE FROM pg_exports_ledger", "DELETE FROM pg_exports_keys")
        assert run(export, partition_key(hour), **options).counts == (0, 0, 3)
    assert target.count("changes") == 3


def test_each_column_of_the_key_must_be_in_the_table(
    orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    orders.insert("orders", order(hour, 7), order(hour + HOUR / 2, 7))
    target.execute(*creation("changes", "id bigint"), "INSERT INTO changes VALUES (7)")
    export = own(target, hour, CHANGES)
    error = run(export, partition_key(hour)).error or ""
    assert "lacks updated_at, which changes cannot do without, and has rows" in error
    assert "ALTER TABLE" not in error
    target.execute("DELETE FROM changes")
    error = run(export, partition_key(hour)).error or ""
    target.execute(error.partition("Run as its owner: ")[2].partition(";")[0])
    assert run(export, partition_key(hour)).counts == (2, 0, 0)


def test_the_sensor_finds_its_late_rows(orders: Source, target: Target, run: RunExport, hour: datetime) -> None:
    export = own(target, hour, CHANGES)
    orders.insert("orders", order(hour, 7))
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    assert asked(export, orders, target) == []
    orders.insert("orders", order(hour, 8))
    assert asked(export, orders, target) == [partition_key(hour)]
    assert run(export, partition_key(hour)).counts == (1, 0, 1)


def test_a_merged_model_that_becomes_an_appended_one_brings_no_row_twice(
    orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    orders.insert("orders", *(order(hour, number) for number in range(4)))
    assert run(own(target, hour), partition_key(hour)).counts == (4, 0, 0)
    target.execute("ALTER TABLE orders DROP CONSTRAINT orders_pkey")
    appended = own(target, hour, ORDERS | {"version": []})
    orders.insert("orders", order(hour, 4))
    assert asked(appended, orders, target) == [partition_key(hour)]
    for inserted in (1, 0):
        ran = run(appended, partition_key(hour))
        assert ran.counts == (inserted, 0, 5 - inserted)
        assert ran.checks["erased_rows"].passed
        orders.insert("orders", order(hour + HOUR, 5))
    assert target.rows("SELECT count(*), count(DISTINCT id) FROM orders") == [(5, 5)]
    orders.insert("orders", order(hour, 6))
    ran = run(appended, partition_key(hour))
    assert ran.counts == (1, 0, 5)
    assert ran.checks["erased_rows"].passed


def test_another_key_for_the_same_table_brings_no_row_twice(
    orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    orders.insert("orders", order(hour, 7), order(hour, 8))
    assert run(own(target, hour, CHANGES), partition_key(hour)).counts == (2, 0, 0)
    changed = own(target, hour, CHANGES | {"key": ["id"]})
    assert run(changed, partition_key(hour)).counts == (0, 0, 2)
    orders.insert("orders", order(hour, 9))
    ran = run(changed, partition_key(hour))
    assert ran.counts == (1, 0, 2)
    # The hashes of the former key are no rows that were erased.
    assert ran.checks["erased_rows"].passed
    assert run(changed, partition_key(hour)).counts == (0, 0, 3)
    assert run(own(target, hour, CHANGES), partition_key(hour)).counts == (0, 0, 3)
    assert target.count("changes") == 3


def test_a_range_reads_each_interval_by_a_query_of_its_own_and_writes_them_together(
    orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    hours = [hour - n * HOUR for n in range(12)]
    orders.insert("orders", *(order(each + timedelta(minutes=n), n) for each in hours for n in range(3)))
    done = run(own(target, hour, CHANGES), partition_key(hours[-1]), partition_key(hours[0]))
    assert done.error is None
    assert [metadata["rows_inserted"] for metadata in done.metadata.values()] == [3] * 12
    assert len({metadata["query_ids"] for metadata in done.metadata.values()}) == 12
    [(transactions,)] = target.rows("SELECT count(DISTINCT started_at) FROM pg_exports_ledger")
    assert transactions < 5


def test_a_value_that_its_column_cannot_hold_fails_the_interval_with_clickhouses_words(
    orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    orders.insert("orders", order(hour, 7, customer="seven"))
    model = ORDERS | {"columns": {**ORDERS["columns"], "customer": "INTEGER"}}
    error = run(own(target, hour, model), partition_key(hour)).error
    assert error is not None
    assert "Column customer holds a value that is no whole number" in error
    assert target.rows("SELECT count(*) FROM orders") == [(0,)]


def test_a_query_that_clickhouse_refuses_is_an_error_with_its_words(
    orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    model = ORDERS | {"query": ORDERS["query"].replace("FROM orders", "FROM ordres")}
    error = run(own(target, hour, model), partition_key(hour)).error
    assert error is not None
    assert "ordres" in error


def test_the_users_model_stands_in_yaml(load: Load) -> None:
    [spec] = assets(load(f"model: {dict(ORDERS)!r}\nstart: 2026-11-20".replace("True", "true"))).values()
    assert spec.key.to_user_string() == "orders"
    assert spec.description == 'Orders as the shop has them. into "public"."orders".'
    assert spec.metadata["dagster/table_name"] == "public.orders"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": "SELECT 1"}, "{interval_start}"),
        ({"query": None}, "`query`"),
        ({"columns": {}}, "`columns`"),
        ({"columns": {"id": "MONEY"}}, "MONEY"),
        ({"key": []}, "`key`"),
        ({"key": ["nothing"]}, "nothing"),
        ({"version": ["nothing"]}, "nothing"),
        ({"name": "events"}, "`name` must be another one than events, persons, sessions"),
        ({"nmae": "orders"}, "`nmae`: there is no such attribute"),
    ],
)
def test_a_wrong_model_is_one_error_that_names_export_and_attribute(
    load: Load, changes: dict[str, Any], message: str
) -> None:
    text = said(refusal(load, yaml(name="mine", model={**ORDERS, **changes})))
    assert text.startswith("Export mine: `model`: ")
    assert message in text
    with pytest.raises(ValidationError):
        PostgresExport.model_validate({"model": {**ORDERS, **changes}, "start": "2026-11-20"})


def test_filters_and_event_names_are_not_for_a_model_of_ones_own(load: Load) -> None:
    for wrong, message in (
        ({"filters": [{"key": "a", "value": 1}]}, "`filters`: orders have no properties to filter by"),
        ({"include_events": ["a"]}, "are for `model: events`"),
    ):
        assert message in said(refusal(load, yaml(name="mine", model=ORDERS, **wrong)))
