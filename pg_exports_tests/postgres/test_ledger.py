"""The ledger: what it says of each run of each interval, and what it needs to be written."""

import json
import uuid
from datetime import UTC, datetime
from typing import Any

from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import (
    HOUR,
    event,
    export_of,
    insert_sessions,
    mapping,
    new_session,
    person,
    session,
)

COUNTS = "rows_at_source, rows_inserted, rows_updated, rows_unchanged, rows_repaired, rows_rejected, rows_missing"


def counts(target: Target) -> list[tuple[int, ...]]:
    """The counts of each interval, oldest first."""
    return target.rows(f"SELECT {COUNTS} FROM pg_exports_ledger ORDER BY interval_start")


def recorded(target: Target) -> dict[str, Any]:
    """The one row of the ledger, by column."""
    [(row,)] = target.rows("SELECT row_to_json(l)::text FROM pg_exports_ledger AS l")
    return dict(json.loads(row))


def moment(text: object) -> datetime:
    return datetime.fromisoformat(str(text))


def test_an_intervals_row_says_what_was_exported_where_by_which_run_and_when(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour))
    export = export_of("events", target, hour, name="mine", table="The Events")
    rows, began = [], datetime.now(UTC)
    for done in range(2):
        assert run(export, partition_key(hour)).counts == ((2, 0, 0) if done == 0 else (0, 0, 2))
        rows.append(recorded(target))
    ended = datetime.now(UTC)
    first, second = rows
    [(oid, filenode)] = target.rows(
        "SELECT oid::bigint, relfilenode::bigint FROM pg_class WHERE relname = 'The Events'"
    )
    same = {
        "destination": "The Events",
        "table_oid": oid,
        "table_filenode": filenode,
        "partition_filenodes": [],
        "team_id": TEAM,
        "interval_start": hour,
        "interval_end": hour + HOUR,
        "export": "mine",
        "fingerprint": first["fingerprint"],
        "rows_before": False,
        "rows_at_source": 2,
        "keys": 2,
    }
    for row in rows:
        row |= {name: moment(row[name]) for name in ("interval_start", "interval_end")}
        assert {name: row[name] for name in same} == same
    assert first["fingerprint"].startswith("2:")
    assert first["bytes"] > 0 == second["bytes"]
    assert len({row["run_id"] for row in rows}) == 2
    assert all(str(uuid.UUID(row["run_id"])) == row["run_id"] for row in rows)
    times = [moment(row[name]) for row in rows for name in ("started_at", "committed_at")]
    assert [began, *times, ended] == sorted([began, *times, ended])


def test_the_counts_of_first_runs_reruns_and_empty_intervals(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert(
        "events", event(hour), event(hour, properties=r'{"a": "\u0000"}'), event(hour, properties='{"a": NaN}')
    )
    export = export_of("events", target, hour)
    run(export, partition_key(hour), partition_key(hour + HOUR))
    assert counts(target) == [(3, 2, 0, 0, 1, 1, 0), (0, 0, 0, 0, 0, 0, 0)]
    source.insert("events", event(hour), event(hour + HOUR))
    run(export, partition_key(hour), partition_key(hour + HOUR))
    assert counts(target) == [(4, 1, 0, 2, 0, 1, 0), (1, 1, 0, 0, 0, 0, 0)]
    target.execute("TRUNCATE events")
    run(export, partition_key(hour + HOUR))
    # What was in the table before it was emptied stays on record, under the table's file of then.
    assert counts(target)[1:] == [(1, 1, 0, 0, 0, 0, 0)] * 2


def test_rows_that_a_trigger_drops_are_missing_and_sent_again_when_it_is_gone(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    run(export, partition_key(hour - HOUR))
    target.execute(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$"
        "BEGIN IF NEW.event = 'a' THEN RETURN NULL; END IF; RETURN NEW; END$$",
        "CREATE TRIGGER swallow BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION swallow()",
    )
    source.insert("events", *(event(hour, event=name) for name in "aab"))
    assert "reconciliation" in (run(export, partition_key(hour)).error or "")
    assert counts(target)[1] == (3, 1, 0, 0, 0, 0, 2)
    target.execute("DROP TRIGGER swallow ON events")
    assert run(export, partition_key(hour)).error is None
    assert counts(target)[1] == (3, 2, 0, 1, 0, 0, 0)


def test_the_counts_of_merged_models_tell_new_rows_from_replaced_ones(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    one = uuid.UUID(int=1)
    source.insert("person", person(hour, one, 1))
    source.insert("person_distinct_id2", *(mapping(hour, name, one) for name in ("a", "b", "a\0b")))
    opened = [new_session(hour) for _ in range(2)]
    insert_sessions(source, *(session(session_id, hour) for session_id in opened))
    people, sessions = export_of("persons", target, hour), export_of("sessions", target, hour)
    for export in (people, sessions):
        run(export, partition_key(hour))
    recorded_counts = f"SELECT {COUNTS}, keys FROM pg_exports_ledger ORDER BY export"
    assert target.rows(recorded_counts) == [(3, 2, 0, 0, 0, 1, 0, 3), (2, 2, 0, 0, 0, 0, 0, 2)]
    source.insert("person_distinct_id2", mapping(hour, "a", uuid.UUID(int=2), 1), mapping(hour, "c", one))
    source.insert("person", person(hour, uuid.UUID(int=2), 1))
    insert_sessions(source, session(opened[0], hour + HOUR / 2), session(new_session(hour), hour))
    for export in (people, sessions):
        run(export, partition_key(hour))
    assert target.rows(recorded_counts) == [(4, 1, 1, 1, 0, 1, 0, 5), (3, 1, 1, 1, 0, 0, 0, 4)]


def test_writing_needs_nothing_but_insert_select_and_update_where_the_tables_are_there(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    """Tables that another role made: each is an error with its GRANT, which is all that it takes."""
    export = export_of("events", target, hour)
    run(export, partition_key(hour - HOUR))
    tables = ["events", "pg_exports_ledger", "pg_exports_keys", "pg_exports_rejected", "pg_exports_tables"]
    target.execute(
        *(f"ALTER TABLE {table} OWNER TO CURRENT_USER" for table in tables),
        *(f"REVOKE ALL ON {table} FROM {ROLE}" for table in tables),
        f"REVOKE CREATE ON SCHEMA {target.schema} FROM {ROLE}",
    )
    source.insert("events", event(hour), event(hour, event="x" * 201))
    for table in tables:
        error = run(export, partition_key(hour)).error or ""
        grant = f'GRANT INSERT, SELECT, UPDATE ON "{target.schema}"."{table}" TO "{ROLE}";'
        assert grant in error
        assert target.count("events") == 0
        target.execute(grant)
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    source.insert("events", event(hour))
    assert run(export, partition_key(hour)).counts == (1, 0, 1)
    held = target.rows(
        "SELECT DISTINCT privilege_type::text FROM information_schema.role_table_grants"
        f" WHERE grantee = '{ROLE}' AND table_schema = '{target.schema}'"
    )
    assert {privilege for (privilege,) in held} == {"INSERT", "SELECT", "UPDATE"}
