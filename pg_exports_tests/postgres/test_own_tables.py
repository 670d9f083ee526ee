"""Somebody who may create in the export's schema makes pg_exports' own tables before it does, or adds to them what runs as the
export's role: he learns nothing, and nothing of his runs.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import dagster as dg
import polars as pl
import pytest

from pg_exports import PostgresExport, PostgresIOManager
from pg_exports.errors import DestinationError
from pg_exports.postgres import ledger, own_tables, registry, writer
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.schemas import CREATION_LOCK
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.faults import eventually
from pg_exports_tests.source_rows import event, export_of

TRAP = (
    "CREATE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS"
    " $$ BEGIN EXECUTE 'GRANT SELECT ON events TO PUBLIC'; RETURN new; END $$"
)


@pytest.fixture
def intruder(sandbox: Sandbox, target: Target) -> Iterator[str]:
    """A role of a neighbour's, which may create in the schema, too."""
    role = f"{target.schema}_intruder"
    postgres_server.create_role(sandbox.postgres, role, postgres_server.new_password())
    target.execute(f"GRANT CREATE, USAGE ON SCHEMA {quoted(target.schema)} TO {quoted(role)}")
    yield role
    target.execute(f"ALTER SCHEMA {quoted(target.schema)} OWNER TO {postgres_server.SUPERUSER}")
    postgres = sandbox.postgres
    postgres.execute(f"DROP OWNED BY {quoted(role)} CASCADE", f"DROP ROLE {quoted(role)}", database=DATABASE)


@contextmanager
def waiting_to_create(target: Target, run: RunExport, model: PostgresExport, hour: datetime) -> Iterator[Future[Run]]:
    """A run that waits for whoever creates tables until the block ends, and goes on then."""
    with (
        ThreadPoolExecutor(1) as pool,
        postgres_server.admin(target.sandbox.postgres, DATABASE) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("SELECT pg_advisory_lock(hashtext(%s))", [CREATION_LOCK])
        running = pool.submit(run, model, partition_key(hour))
        try:
            eventually(lambda: target.rows("SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))
            yield running
        finally:
            cursor.execute("SELECT pg_advisory_unlock_all()")


def as_(role: str, target: Target, *statements: str) -> None:
    """Run statements as another role."""
    target.execute(f"SET ROLE {quoted(role)}", *statements)


@pytest.mark.parametrize("table", own_tables.NAMES)
def test_an_own_table_that_a_stranger_made_is_refused_and_nothing_is_written(
    source: Source, target: Target, run: RunExport, hour: datetime, intruder: str, table: str
) -> None:
    source.insert("events", event(hour))
    model = export_of("events", target, hour)
    assert run(model, partition_key(hour)).error is None
    columns = target.rows(
        f"SELECT string_agg(format('%I %s', attname, format_type(atttypid, atttypmod)), ', ') FROM pg_attribute"
        f" WHERE attrelid = '{table}'::regclass AND attnum > 0"
    )[0][0]
    target.execute("DROP TABLE events, " + ", ".join(own_tables.NAMES))
    as_(
        intruder,
        target,
        f"CREATE TABLE {table} ({columns})",
        f"GRANT INSERT, SELECT, UPDATE ON {table} TO {ROLE}",
        TRAP,
        f"CREATE TRIGGER trap BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION trap()",
    )
    error = str(run(model, partition_key(hour)).error)
    assert f"belongs to {intruder}" in error
    assert "ALTER TABLE" in error
    assert target.count(table) == 0
    assert target.rows(
        "SELECT to_regclass('events') IS NULL OR NOT has_table_privilege('public', 'events', 'SELECT')"
    ) == [(True,)]


@pytest.mark.parametrize("table", own_tables.NAMES)
def test_a_strangers_trigger_on_an_own_table_is_refused(
    source: Source, target: Target, run: RunExport, hour: datetime, intruder: str, table: str
) -> None:
    model = export_of("events", target, hour)
    assert run(model, partition_key(hour)).error is None
    target.execute(f"GRANT TRIGGER ON {table} TO {quoted(intruder)}")
    as_(
        intruder,
        target,
        TRAP,
        f"CREATE TRIGGER trap BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION trap()",
    )
    source.insert("events", event(hour))
    error = str(run(model, partition_key(hour)).error)
    assert "The trigger trap" in error
    assert "DROP TRIGGER" in error
    assert target.rows("SELECT has_table_privilege('public', 'events', 'SELECT')") == [(False,)]


def test_a_strangers_function_in_the_condition_of_a_trigger_is_refused(
    source: Source, target: Target, run: RunExport, hour: datetime, intruder: str
) -> None:
    model = export_of("events", target, hour)
    assert run(model, partition_key(hour)).error is None
    target.execute(f"GRANT TRIGGER ON {ledger.TABLE} TO {quoted(intruder)}")
    as_(
        intruder,
        target,
        f"CREATE FUNCTION trap(entry {ledger.TABLE}) RETURNS boolean LANGUAGE plpgsql AS"
        " $$ BEGIN EXECUTE 'GRANT SELECT ON events TO PUBLIC'; RETURN true; END $$",
        f"CREATE TRIGGER trap BEFORE UPDATE ON {ledger.TABLE} FOR EACH ROW WHEN (trap(new))"
        " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    )
    source.insert("events", event(hour))
    assert "The trigger trap" in str(run(model, partition_key(hour)).error)
    assert target.rows("SELECT has_table_privilege('public', 'events', 'SELECT')") == [(False,)]


def test_a_trigger_that_comes_while_a_run_reads_is_refused(
    source: Source,
    target: Target,
    run: RunExport,
    hour: datetime,
    intruder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = export_of("events", target, hour)
    assert run(model, partition_key(hour)).error is None
    target.execute(f"GRANT TRIGGER ON {ledger.TABLE} TO {quoted(intruder)}")
    source.insert("events", event(hour))
    write = writer.write

    def write_late(*arguments: Any, **options: Any) -> writer.Outcome:
        trigger = f"CREATE TRIGGER trap BEFORE INSERT OR UPDATE ON {ledger.TABLE} FOR EACH ROW EXECUTE FUNCTION trap()"
        as_(intruder, target, TRAP, trigger)
        return write(*arguments, **options)

    monkeypatch.setattr(writer, "write", write_late)
    assert "The trigger trap" in str(run(model, partition_key(hour)).error)
    assert target.rows("SELECT has_table_privilege('public', 'events', 'SELECT')") == [(False,)]
    assert target.count("events") == 0


def test_who_makes_an_own_table_while_a_run_waits_to_create_it_gets_nothing(
    source: Source, target: Target, run: RunExport, hour: datetime, intruder: str
) -> None:
    source.insert("events", event(hour))
    model = export_of("events", target, hour)
    assert run(model, partition_key(hour)).error is None
    [(columns,)] = target.rows(
        "SELECT string_agg(format('%I %s', attname, format_type(atttypid, atttypmod)), ', ') FROM pg_attribute"
        f" WHERE attrelid = '{ledger.TABLE}'::regclass AND attnum > 0"
    )
    target.execute("DROP TABLE events, " + ", ".join(own_tables.NAMES))
    # So that it waits for the ledger alone, and not for the destination before.
    target.execute("CREATE TABLE events (uuid text, event text)", f"GRANT INSERT, SELECT, UPDATE ON events TO {ROLE}")
    with waiting_to_create(target, run, model, hour) as running:
        as_(
            intruder,
            target,
            f"CREATE TABLE {ledger.TABLE} ({columns})",
            f"GRANT INSERT, SELECT, UPDATE ON {ledger.TABLE} TO {ROLE}",
            TRAP,
            f"CREATE TRIGGER trap BEFORE INSERT ON {ledger.TABLE} FOR EACH ROW EXECUTE FUNCTION trap()",
        )
    error = str(running.result().error)
    assert f"belongs to {intruder}" in error
    assert target.count(ledger.TABLE) == 0
    assert target.rows("SELECT has_table_privilege('public', 'events', 'SELECT')") == [(False,)]


def test_a_rule_on_an_own_table_is_refused(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    model = export_of("events", target, hour)
    assert run(model, partition_key(hour)).error is None
    target.execute(f"CREATE RULE forget AS ON INSERT TO {ledger.TABLE} DO INSTEAD NOTHING")
    source.insert("events", event(hour))
    error = str(run(model, partition_key(hour)).error)
    assert "The rule forget" in error
    assert target.count("events") == 0


def test_a_view_in_place_of_an_own_table_is_refused(target: Target, run: RunExport, hour: datetime) -> None:
    target.execute(f"CREATE VIEW {ledger.TABLE} AS SELECT 1 AS destination")
    assert "is no plain table" in str(run(export_of("events", target, hour), partition_key(hour)).error)


@pytest.mark.parametrize("owner", ["a superuser", "the schema's owner"])
def test_an_own_table_of_who_may_do_anything_here_is_used(
    source: Source, target: Target, run: RunExport, hour: datetime, intruder: str, owner: str
) -> None:
    model = export_of("events", target, hour)
    assert run(model, partition_key(hour)).error is None
    if owner == "the schema's owner":
        target.execute(f"ALTER SCHEMA {quoted(target.schema)} OWNER TO {quoted(intruder)}")
    name = quoted(intruder) if owner == "the schema's owner" else postgres_server.SUPERUSER
    for table in own_tables.NAMES:
        target.execute(f"ALTER TABLE {table} OWNER TO {name}", f"GRANT INSERT, SELECT, UPDATE ON {table} TO {ROLE}")
    source.insert("events", event(hour))
    assert run(model, partition_key(hour)).error is None
    assert target.count("events") == 1


TRAPS = [
    (
        "trigger trap",
        "CREATE TRIGGER trap BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW"
        " WHEN (query_to_xml('SELECT {schema}.evil(1)', true, false, '') IS NULL)"
        " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    ),
    ("constraint trap", "ALTER TABLE {table} ADD CONSTRAINT trap CHECK ({schema}.evil(1) > 0)"),
    ("default of the column destination", "ALTER TABLE {table} ALTER destination SET DEFAULT {schema}.evil(1)::text"),
    ("index", "CREATE INDEX trap ON {table} (({schema}.evil(length(destination))))"),
    ("type of the column mine", "ALTER TABLE {table} ADD mine {schema}.mine"),
    ("child", "CREATE TABLE heir () INHERITS ({table})"),
]


@pytest.mark.parametrize("table", [ledger.TABLE, registry.TABLE])
@pytest.mark.parametrize(("what", "trap"), TRAPS, ids=[what for what, _ in TRAPS])
def test_a_strangers_table_is_refused_with_its_traps_after_it_has_changed_hands(
    source: Source, target: Target, run: RunExport, hour: datetime, intruder: str, what: str, trap: str, table: str
) -> None:
    model = export_of("events", target, hour)
    assert run(model, partition_key(hour)).error is None
    target.execute(f"ALTER TABLE {table} OWNER TO {quoted(intruder)}")
    as_(
        intruder,
        target,
        "CREATE FUNCTION evil(number int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS"
        " $$ BEGIN IF current_user = 'exporter' THEN EXECUTE 'GRANT SELECT ON events TO PUBLIC'; END IF; RETURN 1; END $$",
        "CREATE DOMAIN mine AS text",
        trap.format(table=table, schema=quoted(target.schema)),
        f"GRANT ALL ON {table} TO {ROLE}",
    )
    source.insert("events", event(hour))
    assert f"belongs to {intruder}" in str(run(model, partition_key(hour)).error)
    target.execute(f"ALTER TABLE {table} OWNER TO {ROLE}")
    error = str(run(model, partition_key(hour)).error)
    assert f"The {what}" in error
    assert "is not pg_exports' own" in error
    assert target.rows("SELECT has_table_privilege('public', 'events', 'SELECT')") == [(False,)]
    assert target.count("events") == 0


FORBIDDEN = "SELECT has_table_privilege('public', 'treasure', 'SELECT')"


@pytest.fixture
def evil(target: Target, intruder: str) -> str:
    """A function of the neighbour's, which opens a table of the export's role to everybody, as whoever calls it."""
    target.execute("CREATE TABLE treasure (secret text)", f"ALTER TABLE treasure OWNER TO {ROLE}")
    as_(
        intruder,
        target,
        "CREATE FUNCTION evil() RETURNS text LANGUAGE plpgsql AS"
        f" $$ BEGIN EXECUTE 'GRANT SELECT ON {quoted(target.schema)}.treasure TO PUBLIC'; RETURN 'x'; END $$",
    )
    return f"{quoted(target.schema)}.evil()"


def test_a_view_in_place_of_the_ledger_is_not_read_by_the_sensor(
    source: Source, target: Target, intruder: str, evil: str, hour: datetime
) -> None:
    target.execute("CREATE TABLE events (uuid text, event text)", f"GRANT INSERT, SELECT, UPDATE ON events TO {ROLE}")
    text, number = f"{evil} AS export, 'x' AS fingerprint, 'x' AS run_id, 'events' AS destination", "0::bigint AS"
    as_(
        intruder,
        target,
        f"CREATE VIEW {ledger.TABLE} AS SELECT now() AS interval_start, now() AS interval_end, {text},"
        f" {number} rows_at_source, {number} rows_missing, {number} rows_rejected, {number} table_oid,"
        f" {number} table_filenode, {number} team_id",
        f"GRANT SELECT ON {ledger.TABLE} TO {ROLE}",
    )
    io_manager = PostgresIOManager(postgres=target.resource())
    definitions = dg.Definitions.merge(
        export_of("events", target, hour).build_defs(None),
        dg.Definitions(resources={"clickhouse": source.resource(), "postgres_io_manager": io_manager}),
    )
    with (
        dg.DagsterInstance.ephemeral() as instance,
        dg.build_sensor_context(
            instance=instance,
            repository_def=definitions.get_repository_def(),
            sensor_name="events_late_rows",
            resources={"clickhouse": source.resource(), "postgres_io_manager": io_manager},
        ) as context,
        pytest.raises(DestinationError, match="is no plain table"),
    ):
        definitions.get_sensor_def("events_late_rows").evaluate_tick(context)
    assert target.rows(FORBIDDEN) == [(False,)]


def test_a_view_in_place_of_the_destination_is_not_read_for_an_asset_downstream(
    source: Source, target: Target, intruder: str, evil: str, hour: datetime
) -> None:
    as_(
        intruder,
        target,
        f"CREATE VIEW events AS SELECT {evil} AS uuid, 1::bigint AS team_id",
        f"GRANT SELECT ON events TO {ROLE}",
    )
    exported = export_of("events", target, hour).build_defs(None)
    [export] = [one for one in exported.assets or [] if isinstance(one, dg.AssetsDefinition)]

    @dg.asset(partitions_def=export.partitions_def)
    def report(events: pl.DataFrame) -> None:
        raise AssertionError(events)

    resources = {
        "clickhouse": source.resource(),
        "postgres_io_manager": PostgresIOManager(postgres=target.resource()),
        "io_manager": dg.mem_io_manager,
    }
    definitions = dg.Definitions.merge(
        exported,
        dg.Definitions(
            resources=resources,
            assets=[report],
            jobs=[dg.define_asset_job("reports", [report])],
            executor=dg.in_process_executor,
        ),
    )
    with dg.DagsterInstance.ephemeral() as instance:
        run = definitions.resolve_job_def("reports").execute_in_process(
            instance=instance, partition_key=partition_key(hour), raise_on_error=False
        )
    [failed] = [event.step_failure_data.error for event in run.all_events if event.is_step_failure]
    assert "is no table (relkind v)" in str(failed)
    assert target.rows(FORBIDDEN) == [(False,)]


def test_a_trigger_that_comes_while_a_run_waits_to_register_its_table_is_refused(
    source: Source, target: Target, run: RunExport, hour: datetime, intruder: str
) -> None:
    model = export_of("events", target, hour)
    source.insert("events", event(hour))
    assert run(model, partition_key(hour)).error is None
    target.execute("VACUUM FULL events", f"GRANT TRIGGER ON {registry.TABLE} TO {quoted(intruder)}")
    with waiting_to_create(target, run, model, hour) as running:
        as_(
            intruder,
            target,
            TRAP,
            f"CREATE TRIGGER trap BEFORE INSERT OR UPDATE ON {registry.TABLE} FOR EACH ROW EXECUTE FUNCTION trap()",
        )
    assert "The trigger trap" in str(running.result().error)
    assert target.rows("SELECT has_table_privilege('public', 'events', 'SELECT')") == [(False,)]


def test_a_type_of_a_tables_name_is_named_with_its_owner(
    target: Target, run: RunExport, hour: datetime, intruder: str
) -> None:
    for table in ("events", ledger.TABLE):
        as_(intruder, target, f"CREATE TYPE {table} AS ENUM ()")
        error = str(run(export_of("events", target, hour), partition_key(hour)).error)
        assert f"A type of {intruder} has the name" in error
        assert "DROP TYPE" in error
        target.execute(f"DROP TYPE {table}")
    assert run(export_of("events", target, hour), partition_key(hour)).error is None
