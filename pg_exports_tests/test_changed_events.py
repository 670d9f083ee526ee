"""Events that were sent again to change them, and events that were erased at the source."""

import uuid
from datetime import datetime, timedelta
from typing import Any

import pytest

from pg_exports import PostgresExport
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of
from pg_exports_tests.test_late_rows import asked

MINUTE = timedelta(minutes=1)


def sent_again(row: dict[str, object], at: datetime, **changes: object) -> dict[str, object]:
    """The event with its identity, as it comes a second time."""
    return row | {"inserted_at": at, "_timestamp": at} | changes


def plans(target: Target) -> dict[str, str]:
    return dict(target.rows("SELECT uuid::text, properties->>'plan' FROM events"))


@pytest.mark.parametrize("streams", [1, 3])
def test_an_event_that_was_changed_within_its_interval_after_the_run_lands_changed(
    source: Source, target: Target, run: RunExport, hour: datetime, streams: int
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    rows = [event(hour, properties='{"plan": "free"}', distinct_id=str(number)) for number in range(30)]
    source.insert("events", *rows)
    export = export_of("events", target, hour, streams=streams)
    assert run(export, partition_key(hour)).counts == (30, 0, 0)
    source.insert("events", sent_again(rows[3], hour + 2 * MINUTE, properties='{"plan": "pro"}'), event(hour + MINUTE))
    ran = run(export, partition_key(hour))
    assert ran.counts == (1, 1, 29)
    assert ran.reconciliation.passed
    assert plans(target)[str(rows[3]["uuid"])] == "pro"
    assert list(plans(target).values()).count("free") == 29
    assert run(export, partition_key(hour)).counts == (0, 0, 31)


def test_an_event_that_was_changed_lands_changed_after_the_journals_were_pruned(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    rows = [event(hour, properties='{"plan": "free"}', distinct_id=str(number)) for number in range(30)]
    source.insert("events", *rows)
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (30, 0, 0)
    target.execute("DELETE FROM pg_exports_keys")
    source.insert("events", sent_again(rows[3], hour + 2 * MINUTE, properties='{"plan": "pro"}'))
    assert run(export, partition_key(hour)).counts == (0, 1, 29)
    assert plans(target)[str(rows[3]["uuid"])] == "pro"
    assert list(plans(target).values()).count("free") == 29


@pytest.mark.parametrize(
    "former", [{"name": "former"}, {"name": "quarters", "interval": "every 15 minutes"}], ids=["name", "length"]
)
def test_an_event_that_was_changed_lands_changed_by_the_first_run_of_another_export(
    source: Source, target: Target, run: RunExport, hour: datetime, former: dict[str, Any]
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    rows = [event(hour, properties='{"plan": "free"}', distinct_id=str(number)) for number in range(3)]
    source.insert("events", *rows)
    before = export_of("events", target, hour, table="events", **former)
    assert run(before, partition_key(hour)).counts == (3, 0, 0)
    source.insert("events", sent_again(rows[0], hour + MINUTE, properties='{"plan": "pro"}'))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (0, 1, 2)
    assert plans(target)[str(rows[0]["uuid"])] == "pro"
    # What another export has replaced is not undone.
    assert run(before, partition_key(hour)).counts == (0, 0, 3)
    assert plans(target)[str(rows[0]["uuid"])] == "pro"


def test_what_has_changed_is_looked_for_only_if_something_may_have(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour - HOUR), partition_key(hour)).counts == (2, 0, 0)
    reads = len(source.columns_read("events"))
    source.insert("events", event(hour))
    renamed = export_of("events", target, hour, name="renamed", table="events")
    assert run(renamed, partition_key(hour)).counts == (1, 0, 2)
    assert run(renamed, partition_key(hour + HOUR)).counts == (0, 0, 0)
    # A range's rows, and of the hours by the new name the fingerprint, the rows, and the rows of a new hour.
    assert (reads, len(source.columns_read("renamed"))) == (2, 3)


VISITS: Any = {
    "name": "visits",
    "query": "SELECT * FROM visits WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end}",
    "columns": {"page": "TEXT", "referrer": "TEXT", "state": "TEXT"},
    "key": ["page", "referrer"],
}


@pytest.fixture
def visits(source: Source, hour: datetime) -> Source:
    """A table of the user's own with two rows in the hour. One of them has NULL in a key column."""
    source.execute(
        "CREATE TABLE visits (page String, referrer Nullable(String), state String, device String,"
        " inserted_at DateTime64(6, 'UTC')) ENGINE = MergeTree ORDER BY page"
    )
    row = {"page": "/", "state": "old", "device": "phone", "inserted_at": hour}
    source.insert("visits", row | {"referrer": None}, row | {"referrer": "a"})
    return source


def change(visits: Source) -> None:
    visits.execute("ALTER TABLE visits UPDATE state = 'new' WHERE 1 SETTINGS mutations_sync = 1")


def test_a_row_that_was_changed_lands_changed_by_the_first_run_with_other_columns(
    visits: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    assert run(PostgresExport(model=VISITS, start=hour, schema=target.schema), partition_key(hour)).counts == (2, 0, 0)
    change(visits)
    wider = VISITS | {"columns": VISITS["columns"] | {"device": "TEXT"}}
    assert run(PostgresExport(model=wider, start=hour, schema=target.schema), partition_key(hour)).counts == (0, 2, 0)
    assert target.rows("SELECT DISTINCT state FROM visits") == [("new",)]


def test_a_row_that_was_changed_lands_changed_if_a_column_of_its_key_is_null(
    visits: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = PostgresExport(model=VISITS, start=hour, schema=target.schema)
    assert run(export, partition_key(hour)).counts == (2, 0, 0)
    change(visits)
    assert run(export, partition_key(hour)).counts == (0, 2, 0)
    assert target.rows("SELECT DISTINCT state FROM visits") == [("new",)]


@pytest.mark.parametrize("streams", [1, 3])
def test_an_event_that_was_changed_to_a_bad_one_is_set_aside_until_it_is_fixed(
    source: Source, target: Target, run: RunExport, hour: datetime, streams: int
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    bad = event(hour, properties='{"plan": "\\u0000"}')
    rows = [event(hour, properties='{"plan": "free"}', distinct_id=str(number)) for number in range(9)]
    source.insert("events", bad, *rows)
    export = export_of("events", target, hour, on_bad_rows="reject", streams=streams)
    assert run(export, partition_key(hour)).counts == (9, 0, 0)
    entries = "SELECT key->>'uuid', resolved_at IS NOT NULL FROM pg_exports_rejected ORDER BY rejected_at"
    assert target.rows(entries) == [(str(bad["uuid"]), False)]
    source.insert("events", sent_again(rows[0], hour + MINUTE, properties='{"plan": "pro\\u0000"}'))
    # Once more as it is: no run takes the row for resolved.
    for _ in range(2):
        ran = run(export, partition_key(hour))
        assert ran.counts == (0, 0, 8)
        assert ran.metadata[partition_key(hour)]["rows_rejected"] == 2
        assert ran.reconciliation.passed
        assert "2 rows were set aside" in (ran.checks["bad_rows"].description or "")
        assert sorted(target.rows(entries)) == sorted((str(row["uuid"]), False) for row in (bad, rows[0]))
    source.insert("events", sent_again(rows[0], hour + 2 * MINUTE, properties='{"plan": "pro"}'))
    ran = run(export, partition_key(hour))
    assert ran.counts == (0, 1, 8)
    assert ran.metadata[partition_key(hour)]["rows_rejected"] == 1
    assert sorted(target.rows(entries)) == sorted([(str(bad["uuid"]), False), (str(rows[0]["uuid"]), True)])
    assert plans(target)[str(rows[0]["uuid"])] == "pro"


def test_an_event_that_was_changed_to_a_bad_one_fails_the_run_if_bad_rows_do(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    row = event(hour)
    source.insert("events", row)
    export = export_of("events", target, hour, on_bad_rows="fail")
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    source.insert("events", sent_again(row, hour + MINUTE, properties='{"plan": "\\u0000"}'))
    assert str(row["uuid"]) in (run(export, partition_key(hour)).error or "")


def test_what_has_changed_is_reported_if_the_table_cannot_be_asked_and_what_is_late_lands(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    target.execute(
        "CREATE TABLE events (uuid text, event text, properties jsonb, team_id int)",
        f"GRANT INSERT, SELECT, UPDATE ON events TO {ROLE}",
    )
    rows = [event(hour, properties='{"plan": "free"}') for _ in range(3)]
    source.insert("events", *rows)
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (3, 0, 0)
    source.insert("events", sent_again(rows[0], hour + MINUTE, properties='{"plan": "pro"}'), event(hour))
    ran = run(export, partition_key(hour))
    assert ran.counts == (1, 0, 3)
    [warning] = [entry for entry in ran.log if "stay as they are" in entry]
    assert "has no distinct_id" in warning
    assert "Set its `table` to another table" in warning
    assert run(export, partition_key(hour)).counts == (0, 0, 4)


def test_a_role_that_may_not_update_is_told_so_when_an_event_has_changed(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    row = event(hour, properties='{"plan": "free"}')
    source.execute("SYSTEM STOP MERGES events")
    source.insert("events", row)
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    target.execute("ALTER TABLE events OWNER TO CURRENT_USER", f"GRANT INSERT, SELECT ON events TO {ROLE}")
    source.insert("events", sent_again(row, hour + MINUTE, properties='{"plan": "pro"}'))
    assert f'GRANT UPDATE ON "{target.schema}"."events" TO "{ROLE}"' in (run(export, partition_key(hour)).error or "")


def test_of_an_event_in_two_intervals_none_is_replaced_by_the_others_change(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    row = event(hour, properties='{"plan": "a"}')
    source.insert("events", row)
    source.insert("events", sent_again(row, hour + HOUR, properties='{"plan": "c"}'))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour), partition_key(hour + HOUR)).counts == (2, 0, 0)
    source.insert("events", sent_again(row, hour + MINUTE, properties='{"plan": "b"}'))
    assert run(export, partition_key(hour)).counts == (0, 0, 1)
    assert sorted(plan for (plan,) in target.rows("SELECT properties->>'plan' FROM events")) == ["a", "c"]


def test_events_that_were_erased_at_the_source_stay_and_are_reported(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    rows = [event(hour) for _ in range(5)]
    source.insert("events", *rows)
    export = export_of("events", target, hour)
    ran = run(export, partition_key(hour))
    assert ran.metadata[partition_key(hour)]["rows_erased_at_source"] == 0
    assert ran.checks["erased_rows"].passed
    names = ", ".join(f"'{row['uuid']}'" for row in rows[:2])
    source.execute(f"ALTER TABLE events DELETE WHERE uuid IN ({names}) SETTINGS mutations_sync = 1")
    ran = run(export, partition_key(hour))
    assert ran.counts == (0, 0, 3)
    assert ran.metadata[partition_key(hour)]["rows_erased_at_source"] == 2
    check = ran.checks["erased_rows"]
    assert not check.passed
    assert "2 rows that were exported earlier are not in ClickHouse" in (check.description or "")
    assert target.count("events") == 5


# The newer one replaces the older one, in whatever interval


REPLACE: dict[str, Any] = {"deduplicate": "replace"}


def test_with_replace_the_newest_of_an_event_in_several_intervals_is_there_once(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    rows = [event(hour, properties='{"plan": "free"}', uuid=uuid.uuid4()) for _ in range(3)]
    source.insert("events", *rows)
    export = export_of("events", target, hour, **REPLACE)
    assert run(export, partition_key(hour)).counts == (3, 0, 0)
    source.insert("events", sent_again(rows[0], hour + HOUR, properties='{"plan": "pro"}'), event(hour + HOUR))
    assert run(export, partition_key(hour + HOUR)).counts == (1, 1, 0)
    assert plans(target)[str(rows[0]["uuid"])] == "pro"
    # The older one does not come back.
    assert run(export, partition_key(hour)).counts == (0, 0, 3)
    assert plans(target)[str(rows[0]["uuid"])] == "pro"
    assert target.count("events") == 4
    target.execute("TRUNCATE events")
    assert run(export, partition_key(hour), partition_key(hour + HOUR)).error is None
    assert plans(target)[str(rows[0]["uuid"])] == "pro"
    assert target.count("events") == 4


def test_from_replace_to_interval_no_row_is_set_aside_or_older_than_it_was(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    row = event(hour, properties='{"plan": "free"}')
    source.insert("events", row, event(hour))
    source.insert("events", sent_again(row, hour + HOUR, properties='{"plan": "pro"}'))
    replacing = export_of("events", target, hour, **REPLACE)
    assert run(replacing, partition_key(hour), partition_key(hour + HOUR)).counts[0] == 2
    source.insert("events", event(hour))
    export = export_of("events", target, hour)
    for inserted in (1, 0):
        ran = run(export, partition_key(hour))
        assert ran.counts == (inserted, 0, 3 - inserted)
        assert ran.checks["bad_rows"].passed
        assert ran.checks["erased_rows"].passed
        assert plans(target)[str(row["uuid"])] == "pro"
    assert target.count("events") == 3


def test_from_interval_to_replace_the_newest_of_each_event_stays_once(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    row = event(hour, properties='{"plan": "free"}')
    source.insert("events", row, event(hour))
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (2, 0, 0)
    target.execute(
        "ALTER TABLE events ADD COLUMN inserted_at timestamptz",
        "ALTER TABLE events ADD PRIMARY KEY (uuid, event, distinct_id, team_id)",
    )
    export = export_of("events", target, hour, **REPLACE)
    source.insert("events", sent_again(row, hour + MINUTE, properties='{"plan": "pro"}'), event(hour))
    assert run(export, partition_key(hour)).counts[0] == 1
    assert asked(export, source, target) == []
    assert plans(target)[str(row["uuid"])] == "pro"
    source.insert("events", event(hour + 2 * MINUTE))
    assert asked(export, source, target) == [partition_key(hour)]
    assert run(export, partition_key(hour)).counts == (1, 0, 3)
    assert target.count("events") == 4


def test_with_replace_the_table_is_made_with_its_key_and_the_time_of_insertion(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour, **REPLACE)
    assert run(export, partition_key(hour)).error is None
    [(key,)] = target.rows(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE contype = 'p' AND conrelid = 'events'::regclass"
    )
    assert key == "PRIMARY KEY (uuid, event, distinct_id, team_id)"
    assert target.rows("SELECT count(inserted_at) FROM events") == [(0,)]
