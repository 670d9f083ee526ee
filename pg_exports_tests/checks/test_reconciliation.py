"""The check in an export's own run: rows that a trigger of the table's keeps out are found, named and brought later."""

import uuid
from datetime import datetime

import dagster as dg
import pytest

from pg_exports import PostgresExport
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of, insert_sessions, mapping, new_session, person, session


def said(run: Run) -> dict[str, object]:
    """The check's metadata."""
    return {name: value.value for name, value in run.reconciliation.metadata.items()}


def add_trigger(target: Target, table: str, body: str) -> None:
    """A trigger before each insertion."""
    target.execute(
        f"CREATE OR REPLACE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} END$$",
        f"CREATE OR REPLACE TRIGGER meddle BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION meddle()",
    )


SWALLOW = "IF new.distinct_id LIKE 'swallowed%' THEN RETURN NULL; END IF; RETURN new;"


def drop_trigger(target: Target, table: str) -> None:
    target.execute(f"DROP TRIGGER meddle ON {table}")


def fill(source: Source, model: str, hour: datetime, distinct_id: str) -> None:
    """One row of a model."""
    if model == "events":
        source.insert("events", event(hour, distinct_id=distinct_id))
    elif model == "persons":
        who = uuid.uuid4()
        source.insert("person", person(hour, who, 1))
        source.insert("person_distinct_id2", mapping(hour, distinct_id, who))
    else:
        insert_sessions(source, session(new_session(hour), hour, distinct_id=distinct_id))


def made(run: RunExport, target: Target, model: str, hour: datetime) -> PostgresExport:
    """An export that has its tables."""
    export = export_of(model, target, hour)
    assert run(export, partition_key(hour - 10 * HOUR)).error is None
    return export


# What passes


def test_the_check_of_a_range_has_the_rows_of_both_sides_and_those_that_were_set_aside(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour - HOUR), event(hour - HOUR), event(hour), event(hour, event="x" * 201))
    export = export_of("events", target, hour)
    for written, unchanged in ((3, 0), (0, 3)):
        done = run(export, partition_key(hour - HOUR), partition_key(hour))
        assert done.error is None
        assert done.reconciliation.passed
        assert done.reconciliation.blocking
        assert said(done) == {
            "rows_at_source": 4,
            "rows_written": written,
            "rows_unchanged": unchanged,
            "rows_rejected": 1,
            "failing_intervals": {},
        }


def test_the_check_of_an_interval_without_rows_passes(target: Target, run: RunExport, hour: datetime) -> None:
    done = run(export_of("events", target, hour), partition_key(hour))
    assert done.reconciliation.passed
    assert said(done) == {
        "rows_at_source": 0,
        "rows_written": 0,
        "rows_unchanged": 0,
        "rows_rejected": 0,
        "failing_intervals": {},
    }


def test_rows_that_are_merged_count_as_there_whether_they_are_new_newer_or_the_same(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    people = {name: uuid.uuid4() for name in "abc"}
    source.insert("person", *(person(hour, people[name], 1) for name in "ab"))
    source.insert("person_distinct_id2", *(mapping(hour, name, people[name]) for name in "ab"))
    export = export_of("persons", target, hour)
    run(export, partition_key(hour))
    source.insert("person", person(hour, people["a"], 2), person(hour, people["c"], 1))
    source.insert("person_distinct_id2", mapping(hour, "c", people["c"]))
    done = run(export, partition_key(hour))
    assert done.counts == (1, 1, 1)
    assert done.reconciliation.passed
    assert (said(done)["rows_written"], said(done)["rows_unchanged"]) == (2, 1)


# What does not stay


@pytest.mark.parametrize("model", ["events", "persons", "sessions"])
def test_rows_that_a_trigger_swallows_fail_the_run_by_name_and_number_and_come_with_the_next_run_once_it_is_gone(
    source: Source, target: Target, run: RunExport, hour: datetime, model: str
) -> None:
    for name in ("a", "b", "swallowed 1", "swallowed 2"):
        fill(source, model, hour, name)
    fill(source, model, hour - HOUR, "c")
    export = made(run, target, model, hour)
    add_trigger(target, model, SWALLOW)
    keys = partition_key(hour - HOUR), partition_key(hour)

    failed = run(export, *keys)
    assert failed.error is not None
    assert failed.tries == 1
    assert not failed.reconciliation.passed
    assert failed.reconciliation.severity is dg.AssetCheckSeverity.ERROR
    assert said(failed) == {
        "rows_at_source": 5,
        "rows_written": 3,
        "rows_unchanged": 0,
        "rows_rejected": 0,
        "failing_intervals": {keys[1]: 2},
    }
    assert f"2 rows did not stay in the table, of the intervals {keys[1]}." in str(failed.reconciliation.description)
    assert any("2 missing" in line for line in failed.log)
    assert target.rows(f"SELECT distinct_id FROM {model} ORDER BY 1") == [("a",), ("b",), ("c",)]
    assert target.rows("SELECT max(rows_missing) FROM pg_exports_ledger") == [(2,)]

    drop_trigger(target, model)
    done = run(export, *keys)
    assert done.error is None
    assert done.reconciliation.passed
    assert done.counts == (2, 0, 3)
    assert target.rows(f"SELECT count(*), count(DISTINCT distinct_id) FROM {model}") == [(5, 5)]
    assert run(export, *keys).counts == (0, 0, 5)


def test_what_is_downstream_does_not_run_on_an_interval_that_lacks_rows(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    fill(source, "events", hour, "swallowed")
    export = made(run, target, "events", hour)
    seen: list[str] = []

    @dg.asset(deps=["events"], partitions_def=partitions_of(export))
    def downstream(context: dg.AssetExecutionContext) -> None:
        seen.append(context.partition_key)

    add_trigger(target, "events", SWALLOW)
    assert run(export, partition_key(hour), downstream=[downstream]).error is not None
    assert seen == []
    drop_trigger(target, "events")
    assert run(export, partition_key(hour), downstream=[downstream]).error is None
    assert seen == [partition_key(hour)]


def partitions_of(export: PostgresExport) -> dg.PartitionsDefinition:
    [asset] = export.build_defs(None).assets or []
    assert isinstance(asset, dg.AssetsDefinition)
    assert asset.partitions_def
    return asset.partitions_def


def test_late_rows_that_are_swallowed_are_missed_among_those_that_earlier_runs_brought(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    fill(source, "events", hour, "a")
    assert run(export, partition_key(hour)).error is None
    add_trigger(target, "events", SWALLOW)
    fill(source, "events", hour, "swallowed")
    fill(source, "events", hour, "b")
    assert said(run(export, partition_key(hour)))["failing_intervals"] == {partition_key(hour): 1}
    drop_trigger(target, "events")
    assert run(export, partition_key(hour)).counts == (1, 0, 2)
    assert target.count("events") == 3


def test_a_newer_state_that_a_trigger_swallows_is_missed_though_an_older_one_is_there(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    who = uuid.uuid4()
    source.insert("person", person(hour - HOUR, who, 1))
    source.insert("person_distinct_id2", mapping(hour - HOUR, "a", who))
    export = export_of("persons", target, hour)
    run(export, partition_key(hour - HOUR))
    add_trigger(target, "persons", "RETURN NULL;")
    source.insert("person", person(hour, who, 2))
    assert said(run(export, partition_key(hour)))["failing_intervals"] == {partition_key(hour): 1}
    drop_trigger(target, "persons")
    assert run(export, partition_key(hour)).counts == (0, 1, 0)
    assert target.rows("SELECT person_version FROM persons") == [(2,)]


def test_rows_that_one_export_misses_are_not_taken_for_there_after_a_run_of_another_or_of_a_narrower_one(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = made(run, target, "events", hour)
    source.insert("events", *(event(hour, event=name, distinct_id=name) for name in ("a", "b", "swallowed")))
    add_trigger(target, "events", SWALLOW)
    assert run(export, partition_key(hour)).error is not None
    others = [
        export_of("events", target, hour, name="other", table="events", include_events=["a"]),
        export_of("events", target, hour, include_events=["a"]),
    ]
    for other in others:
        assert run(other, partition_key(hour)).counts == (0, 0, 1)
    drop_trigger(target, "events")
    assert run(export, partition_key(hour)).counts == (1, 0, 2)
    assert target.rows("SELECT distinct_id FROM events ORDER BY 1") == [("a",), ("b",), ("swallowed",)]


# Triggers that do no harm


def test_rows_that_a_trigger_moves_into_child_tables_are_there(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = made(run, target, "events", hour)
    target.execute("CREATE TABLE events_now () INHERITS (events)", f"GRANT INSERT, SELECT ON events_now TO {ROLE}")
    add_trigger(target, "events", f'INSERT INTO "{target.schema}".events_now SELECT new.*; RETURN NULL;')
    fill(source, "events", hour, "a")
    for rows in (1, 2):
        done = run(export, partition_key(hour))
        assert done.error is None
        assert done.reconciliation.passed
        assert target.rows("SELECT count(*), (SELECT count(*) FROM ONLY events) FROM events_now") == [(rows, 0)]
        fill(source, "events", hour, "b")


def test_a_trigger_that_fills_a_column_of_the_users_own_is_no_concern(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = made(run, target, "events", hour)
    target.execute("ALTER TABLE events ADD COLUMN seen text")
    add_trigger(target, "events", "new.seen := 'yes'; RETURN new;")
    fill(source, "events", hour, "a")
    done = run(export, partition_key(hour))
    assert done.error is None
    assert done.reconciliation.passed
    assert done.counts == (1, 0, 0)
    assert target.rows("SELECT seen FROM events") == [("yes",)]


def test_rows_that_a_trigger_deletes_after_their_insertion_are_missed_too(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = made(run, target, "events", hour)
    target.execute(
        f"GRANT DELETE ON events TO {ROLE}",
        f"""
        CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            DELETE FROM "{target.schema}".events WHERE distinct_id = 'a';
            RETURN NULL;
        END
        $$
        """,
        "CREATE TRIGGER forget AFTER INSERT ON events FOR EACH STATEMENT EXECUTE FUNCTION forget()",
    )
    fill(source, "events", hour, "a")
    fill(source, "events", hour, "b")
    assert said(run(export, partition_key(hour)))["failing_intervals"] == {partition_key(hour): 1}
