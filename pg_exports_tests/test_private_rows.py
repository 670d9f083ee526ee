"""What a row holds is in Postgres alone: whatever refuses it, no log, event, check or error of Dagster quotes it."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import dagster as dg
import pytest

from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.test_own_model import CHANGES, ORDERS, order, orders, own

__all__ = ["orders"]

SECRET = "ada.lovelace@example.org"
COLUMNS = "id bigint, customer text, amount double precision, paid boolean, tags text[], details jsonb, updated_at timestamptz"


def trigger(statement: str) -> str:
    """A trigger that does something with the row 7."""
    return f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN IF NEW.id = 7 THEN {statement}; END IF; RETURN NEW; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON {{}} FOR EACH ROW EXECUTE FUNCTION refuse()
    """


# What refuses the row 7, and what a person is told of it. Of some, Postgres's message quotes the value, of others its detail
# or its context.
REFUSALS: Mapping[str, tuple[str, str]] = {
    "a check": ("ALTER TABLE {} ADD CHECK (id <> 7)", "violates check constraint"),
    "a unique index": ("CREATE UNIQUE INDEX once ON {} (customer, paid)", "violates unique constraint"),
    "a text that a generated column reads as a number": (
        "ALTER TABLE {} ADD number int GENERATED ALWAYS AS (CASE id WHEN 7 THEN customer::int END) STORED",
        "SQLSTATE 22P02",
    ),
    "a text too long for a generated column": (
        "ALTER TABLE {} ADD short varchar(3) GENERATED ALWAYS AS (CASE id WHEN 7 THEN customer END) STORED",
        "SQLSTATE 22001",
    ),
    "a trigger that raises": (trigger("RAISE '% is not wanted', NEW.customer"), "at RAISE"),
    "a trigger that raises another code": (
        trigger("RAISE '% is not wanted', NEW.customer USING ERRCODE = 'insufficient_privilege'"),
        "SQLSTATE 42501",
    ),
    "a text that a generated column reads as words to search": (
        "ALTER TABLE {} ADD words tsvector GENERATED ALWAYS AS (CASE id WHEN 7 THEN ('''' || customer)::tsvector END) STORED",
        "SQLSTATE 42601",
    ),
    "a check that searches": (
        "ALTER TABLE {} ADD CHECK (id <> 7 OR 'a' @@ (customer || ' x')::tsquery)",
        "SQLSTATE 42601",
    ),
    "a trigger that writes to a table of the row's name": (
        trigger("EXECUTE format('INSERT INTO %I VALUES (1)', NEW.customer)"),
        "SQLSTATE 42P01",
    ),
    "a trigger that asks for a role's rights": (
        trigger("PERFORM has_table_privilege(NEW.customer, 'pg_class', 'SELECT')"),
        "SQLSTATE 42704",
    ),
    "a trigger whose statement has a line that looks like a function's": (
        trigger("EXECUTE 'SELECT 1 / 0 AS \"' || E'\\nSQL function ' || NEW.customer || '\"'"),
        "division by zero",
    ),
    "a trigger that raises what a constraint would": (
        trigger("RAISE '% is not wanted', NEW.customer USING ERRCODE = 'unique_violation'"),
        "SQLSTATE 23505",
    ),
    "a check that asks for a database's rights": (
        "ALTER TABLE {} ADD CHECK (id <> 7 OR has_database_privilege(customer, 'CONNECT'))",
        "SQLSTATE 3D000",
    ),
    "a trigger that gives names": (
        trigger(
            "RAISE 'x' USING ERRCODE = '23505', CONSTRAINT = NEW.customer, COLUMN = NEW.customer, TABLE = NEW.customer,"
            " SCHEMA = NEW.customer"
        ),
        "SQLSTATE 23505",
    ),
    "a trigger that quotes what looks like a function's line": (
        trigger(
            "EXECUTE 'SELECT 1 / 0 AS \"' || E'\\nPL/pgSQL function ' || NEW.customer || E' line 1 at x\\nPL/pgSQL function '"
            " || NEW.customer || E' line 1 at x\\n\"'"
        ),
        "division by zero",
    ),
    "a trigger that casts": (trigger("NEW.id := NEW.customer::int"), "SQLSTATE 22P02"),
    "a trigger whose statement fails": (
        trigger("EXECUTE format('SELECT 1 / 0 AS %I', NEW.customer)"),
        "division by zero",
    ),
}


def told(run: Run) -> str:
    """All that Dagster keeps of a run."""
    return "\n".join([str(run.error), str(run.checks), *run.log, *map(dg.serialize_value, run.events)])


def make(target: Target, table: str, refusal: str) -> None:
    key = "id" if table == "orders" else "id, updated_at"
    target.execute(
        f"CREATE TABLE {table} ({COLUMNS}, PRIMARY KEY ({key}))",
        f"GRANT INSERT, SELECT, UPDATE ON {table} TO {ROLE}",
        refusal.format(table),
    )


@pytest.mark.parametrize("on_bad_rows", ["reject", "fail"])
@pytest.mark.parametrize("model", [ORDERS, CHANGES], ids=["merged", "appended"])
@pytest.mark.parametrize("name", REFUSALS)
def test_a_row_that_postgres_refuses_is_quoted_in_postgres_alone(
    name: str, model: dict[str, Any], on_bad_rows: str, orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    refusal, said = REFUSALS[name]
    make(target, model["name"], refusal)
    # Every statement that fails is sent its parameters in the context, where an administrator has asked for that.
    target.execute(f"ALTER ROLE {ROLE} SET log_parameter_max_length_on_error = -1")
    orders.insert(
        "orders", order(hour, 6, customer=SECRET), order(hour, 7, customer=SECRET, details=f'{{"a": "{SECRET}"}}')
    )
    done = run(own(target, hour, model, on_bad_rows=on_bad_rows), partition_key(hour))
    assert said in told(done)
    assert SECRET not in told(done)
    if done.error is None:
        [(row,)] = target.rows("SELECT row_as_it_was FROM pg_exports_rejected")
        assert SECRET in row
        assert target.count(model["name"]) == 1


@pytest.mark.parametrize(
    "expression",
    [
        "toInt32(assumeNotNull(customer))",
        "toUUID(assumeNotNull(customer))",
        "CAST(customer AS Enum8('a' = 1))",
        "base58Decode(customer)",
        "parseTimeDelta(customer)",
    ],
)
def test_a_value_that_a_query_cannot_convert_is_quoted_in_clickhouse_alone(
    expression: str, orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    orders.insert("orders", order(hour, 7, customer=SECRET))
    model = ORDERS | {"query": ORDERS["query"].replace("customer", f"toString({expression}) AS customer")}
    done = run(own(target, hour, model), partition_key(hour))
    assert "a value that the function cannot take: while executing 'FUNCTION" in str(done.error)
    assert "`exception` of system.query_log" in str(done.error)
    assert SECRET not in told(done)
    assert f"FUNCTION {expression.split('(')[0]}(" in str(done.error)
    orders.execute("SYSTEM FLUSH LOGS")
    assert orders.rows(f"SELECT count() > 0 FROM system.query_log WHERE exception LIKE '%{SECRET}%'") == [(True,)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("customer", "toString(toInt32(assumeNotNull((SELECT any(customer) FROM orders)))) AS customer"),
        ("customer", "toString(now() > (SELECT any(customer) FROM orders)) AS customer"),
        ("customer", "toString(updated_at > (SELECT any(customer) FROM orders)) AS customer"),
        ("customer", "toString(generateUUIDv4() = (SELECT any(customer) FROM orders)) AS customer"),
        ("FROM orders", "FROM (SELECT * FROM orders LIMIT (SELECT any(customer) FROM orders))"),
    ],
)
def test_a_value_that_a_query_takes_for_a_constant_is_quoted_in_clickhouse_alone(
    before: str, after: str, orders: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    orders.insert("orders", order(hour, 7, customer=SECRET))
    done = run(own(target, hour, ORDERS | {"query": ORDERS["query"].replace(before, after, 1)}), partition_key(hour))
    assert "`exception` of system.query_log" in str(done.error)
    assert SECRET not in told(done)
