"""The job `<export>_verify`: each way in which ClickHouse, the ledger, the table and Dagster may differ is found, and what it
names as the repair leaves nothing that differs.
"""

import shlex
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from pg_exports import PostgresExport, PostgresIOManager, verification
from pg_exports.alerts import watch
from pg_exports.sandbox.servers import ROLE
from pg_exports.verification import RANGES, Range
from pg_exports_tests.conftest import Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of, insert_sessions, mapping, new_session, person, session

MINUTE = timedelta(minutes=1)


class Deployment:
    """An export with a Dagster instance of its own, in which its runs are kept."""

    def __init__(self, export: PostgresExport, source: Source, target: Target, instance: dg.DagsterInstance) -> None:
        self.export = export
        self.source = source
        self.target = target
        self.instance = instance
        self.log: list[str] = []

    @property
    def definitions(self) -> dg.Definitions:
        postgres = self.target.resource()
        resources = {
            "clickhouse": self.source.resource(),
            "postgres": postgres,
            "postgres_io_manager": PostgresIOManager(postgres=postgres),
        }
        mine = dg.Definitions(resources=resources, executor=dg.in_process_executor)
        return dg.Definitions.merge(self.export.build_defs(None), mine)

    def job(self, name: str) -> dg.JobDefinition:
        return self.definitions.resolve_job_def(name)

    def run(self, first: datetime | str, last: datetime | str | None = None, *, replay: bool = False) -> None:
        """A run of the export, which must succeed."""
        first, last = (key if isinstance(key, str) else partition_key(key) for key in (first, last or first))
        result = self.job(f"{self.export.key}_job").execute_in_process(
            run_config={"ops": {self.export.key: {"config": {"replay": replay}}}},
            instance=self.instance,
            tags={"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last},
        )
        assert result.success

    def verify(self, first: datetime, last: datetime | None = None) -> list[Range]:
        """What differs, in a run of the job that fails if anything does."""
        [op] = (job := self.job(f"{self.export.key}_verify")).nodes
        config = {"first": partition_key(first), "last": partition_key(last or first)}
        result = job.execute_in_process(
            run_config={"ops": {op.name: {"config": config}}}, instance=self.instance, raise_on_error=False
        )
        entries = self.instance.all_logs(result.run_id)
        self.log = [entry.user_message for entry in entries if not entry.is_dagster_event]
        [event] = [event for event in result.all_events if event.is_step_failure or event.is_successful_output]
        if event.is_step_failure:
            failure = event.step_failure_data.user_failure_data
            assert failure is not None, str(event.step_failure_data.error)
            metadata, text = failure.metadata, failure.description or ""
            assert metadata, text
        else:
            metadata, text = event.step_output_data.metadata, ""
        table = metadata[RANGES]
        assert isinstance(table, dg.TableMetadataValue)
        ranges = [Range(**record.data) for record in table.records]  # type: ignore[arg-type]
        differences = [each for each in ranges if each.difference]
        assert result.success is not bool(differences)
        assert all(str(each) in text for each in differences)
        return differences

    def repair(self, *differences: Range) -> None:
        """Do what each difference says."""
        for each in differences:
            if each.repair.startswith("make backfill"):
                words = dict(word.split("=") for word in shlex.split(each.repair)[2:])
                assert words.pop("EXPORT") == self.export.key
                self.run(words["FROM"], words["TO"], replay=words.get("REPLAY") == "1")
            else:
                self.target.execute(each.repair.split(":\n", 1)[1])


@pytest.fixture
def deployment(source: Source, target: Target, hour: datetime) -> Iterator[Any]:
    """`deployment(model, **changes)`: hours from one before `hour` on, the source's merges stopped."""
    with dg.DagsterInstance.ephemeral() as instance:
        source.execute("SYSTEM STOP MERGES events")
        yield lambda model, **changes: Deployment(export_of(model, target, hour, **changes), source, target, instance)


def of(difference: Range) -> tuple[str, str, int]:
    return difference.first, difference.last, difference.intervals


def repaired(deployment: Deployment, first: datetime, last: datetime, said: str, *, rows: str = "") -> Range:
    """The one difference, which is repaired as it says."""
    [difference] = deployment.verify(first, last)
    assert said in (difference.difference or "")
    assert rows in (difference.difference or "")
    deployment.repair(difference)
    assert deployment.verify(first, last) == []
    return difference


def test_what_is_as_it_should_be_is_one_range_and_the_cost_is_said_before(
    deployment: Any, source: Source, target: Target, hour: datetime
) -> None:
    source.insert("events", event(hour - HOUR), event(hour), event(hour), event(hour - 3 * HOUR))
    events = deployment("events")
    events.run(hour - 3 * HOUR, hour)
    tables = "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace ORDER BY 1"
    before = target.rows(tables)
    assert events.verify(hour - 3 * HOUR, hour) == []
    cost, compared, nothing = events.log
    key, last = partition_key(hour - 3 * HOUR), partition_key(hour)
    assert cost.startswith(
        f"Comparing events {key}...{last}: 4 intervals with 4 rows in the ledger. Nothing is written."
    )
    assert "is asked 1 times" in cost
    assert f'CREATE INDEX ON "{target.schema}"."events" USING hash ("uuid")' in cost
    assert compared == f"{key}...{last}, 4 intervals: as it should be: 4 rows."
    assert nothing == "Nothing differs."
    assert target.rows(tables) == before


def test_rows_that_were_deleted_by_hand_are_found_and_a_replay_brings_them(
    deployment: Any, source: Source, target: Target, hour: datetime
) -> None:
    rows = [event(hour - n * HOUR) for n in (0, 1, 2, 3) for _ in range(3)]
    source.insert("events", *rows)
    events = deployment("events")
    events.run(hour - 3 * HOUR, hour)
    names = ", ".join(f"'{row['uuid']}'" for row in (rows[3], rows[4], rows[6]))
    target.execute(f"DELETE FROM events WHERE uuid IN ({names})")
    said = repaired(events, hour - 3 * HOUR, hour, "3 rows that were exported are not in the table")
    assert of(said) == (partition_key(hour - 2 * HOUR), partition_key(hour - HOUR), 2)
    assert (said.at_source, said.in_ledger, said.in_table) == (6, 6, 3)
    assert said.repair.endswith("REPLAY=1")
    assert target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(12, 12)]


@pytest.mark.parametrize("model", ["events", "persons"])
def test_a_table_that_was_restored_without_its_rows_is_found(
    deployment: Any, source: Source, target: Target, hour: datetime, model: str
) -> None:
    fill(source, hour)
    export = deployment(model)
    export.run(hour - HOUR, hour)
    there = target.count(model)
    target.execute(
        f"CREATE TABLE restored (LIKE {model} INCLUDING ALL)",
        f"DROP TABLE {model}",
        f"ALTER TABLE restored RENAME TO {model}",
        f"ALTER TABLE {model} OWNER TO {ROLE}",
    )
    said = repaired(export, hour - HOUR, hour, "Dagster shows it as materialised, and the ledger does not have it")
    assert (said.intervals, said.in_table) == (2, 0)
    assert target.count(model) == there


@pytest.mark.parametrize("model", ["events", "persons", "sessions"])
def test_an_interval_that_a_failover_has_lost_is_found(
    deployment: Any, source: Source, target: Target, hour: datetime, model: str
) -> None:
    fill(source, hour)
    export = deployment(model)
    for each in (hour - HOUR, hour):
        export.run(each)
        if each != hour:
            there = target.count(model)
            target.execute(f"CREATE TABLE of_before AS SELECT * FROM {model}")
    assert target.count(model) > there
    column = {"events": "uuid", "persons": "distinct_id", "sessions": "session_id"}[model]
    target.execute(
        f"DELETE FROM pg_exports_ledger WHERE interval_start = '{hour}'",
        f"DELETE FROM pg_exports_keys WHERE interval_start = '{hour}'",
        f"DELETE FROM {model} WHERE {column} NOT IN (SELECT {column} FROM of_before)",
    )
    said = repaired(export, hour - HOUR, hour, "Dagster shows it as materialised, and the ledger does not have it")
    assert of(said) == (partition_key(hour), partition_key(hour), 1)


def test_a_ledger_that_has_lost_an_interval_whose_rows_are_there_doubles_none(
    deployment: Any, source: Source, target: Target, hour: datetime
) -> None:
    fill(source, hour)
    events = deployment("events")
    events.run(hour - HOUR, hour)
    target.execute(
        f"DELETE FROM pg_exports_ledger WHERE interval_start = '{hour}'",
        f"DELETE FROM pg_exports_keys WHERE interval_start = '{hour}'",
    )
    there = target.count("events")
    said = repaired(events, hour - HOUR, hour, "the ledger does not have it")
    assert (said.at_source, said.in_ledger, said.in_table) == (3, 0, 3)
    assert target.count("events") == there


def test_an_interval_that_was_never_exported_and_one_that_dagster_does_not_show_are_found(
    deployment: Any, source: Source, target: Target, hour: datetime
) -> None:
    fill(source, hour)
    events = deployment("events")
    events.run(hour - 2 * HOUR)
    events.run(hour - HOUR)
    assert events.verify(hour - 2 * HOUR, hour - HOUR) == []
    events.instance.wipe_assets([dg.AssetKey("events")])
    shown_again = dg.AssetMaterialization("events", partition=partition_key(hour - 2 * HOUR))
    events.instance.report_runless_asset_event(shown_again)
    shown, exported = events.verify(hour - 2 * HOUR, hour)
    assert of(shown) == (partition_key(hour - HOUR), partition_key(hour - HOUR), 1)
    assert "Dagster does not show it" in str(shown.difference)
    assert of(exported) == (partition_key(hour), partition_key(hour), 1)
    assert "not exported: neither the ledger nor Dagster has it; ClickHouse has 3 rows" in str(exported.difference)
    events.repair(shown, exported)
    assert events.verify(hour - 2 * HOUR, hour) == []
    assert target.count("events") == 5


@pytest.mark.parametrize("model", ["events", "persons", "sessions"])
def test_late_rows_are_found(deployment: Any, source: Source, target: Target, hour: datetime, model: str) -> None:
    fill(source, hour)
    export = deployment(model)
    export.run(hour - HOUR, hour)
    fill(source, hour, 1)
    said = repaired(export, hour - HOUR, hour, "became visible or changed in ClickHouse after the last run")
    assert said.intervals == 2


def test_an_event_that_was_changed_is_found(deployment: Any, source: Source, target: Target, hour: datetime) -> None:
    row = event(hour, properties='{"plan": "free"}')
    source.insert("events", row)
    events = deployment("events")
    events.run(hour - HOUR, hour)
    later = hour + MINUTE
    source.insert("events", row | {"inserted_at": later, "_timestamp": later, "properties": '{"plan": "pro"}'})
    repaired(events, hour - HOUR, hour, "some of the 1 rows have changed in ClickHouse since the last run")
    assert target.rows("SELECT properties->>'plan' FROM events") == [("pro",)]


@pytest.mark.parametrize(("model", "older"), [("persons", "person_version"), ("sessions", "end_timestamp")])
def test_merged_rows_in_an_older_version_are_found(
    deployment: Any, source: Source, target: Target, hour: datetime, model: str, older: str
) -> None:
    fill(source, hour)
    export = deployment(model)
    export.run(hour - HOUR, hour)
    step = "1" if model == "persons" else "interval '1 second'"
    target.execute(f"UPDATE {model} SET {older} = {older} - {step}")
    said = repaired(export, hour - HOUR, hour, "rows are in the table in an older version than was exported")
    assert said.intervals == 2
    target.execute(f"DELETE FROM {model}")
    repaired(export, hour - HOUR, hour, "rows that were exported are not in the table")


def test_rows_of_persons_that_the_next_interval_has_changed_are_no_difference(
    deployment: Any, source: Source, hour: datetime
) -> None:
    fill(source, hour)
    persons = deployment("persons")
    persons.run(hour - HOUR, hour)
    source.insert("person", person(hour + HOUR, PEOPLE[0], 7))
    assert persons.verify(hour - HOUR, hour) == []


def test_rows_that_were_copied_in_by_hand_are_found_and_the_statement_deletes_them(
    deployment: Any, source: Source, target: Target, hour: datetime
) -> None:
    rows = [event(hour - HOUR, distinct_id="it's \\ %s") for _ in range(4)]
    again = [rows[0] | {"inserted_at": hour, "_timestamp": hour}, rows[1] | {"inserted_at": hour, "_timestamp": hour}]
    source.insert("events", *rows)
    source.insert("events", *again)
    events = deployment("events")
    events.run(hour - HOUR, hour)
    assert target.count("events") == 6
    # That an event stands twice which ClickHouse received twice is no difference.
    assert events.verify(hour - HOUR, hour) == []
    names = ", ".join(f"'{row['uuid']}'" for row in rows[1:3])
    target.execute(f"INSERT INTO events SELECT * FROM events WHERE uuid IN ({names})")
    differences = events.verify(hour - HOUR, hour)
    assert [each.difference for each in differences] == ["3 rows stand in the table more often than they were exported"]
    assert "No command deletes rows. Run as the table's owner" in differences[0].repair
    events.repair(*differences)
    assert events.verify(hour - HOUR, hour) == []
    assert target.count("events") == 6


SHOWN_OTHERWISE = {"TimeZone": "Asia/Kolkata", "DateStyle": "SQL, DMY", "extra_float_digits": "-10"}


def test_the_statement_deletes_the_rows_whatever_settings_its_session_and_the_exports_have(
    source: Source, target: Target, hour: datetime
) -> None:
    source.execute(
        "CREATE TABLE readings (at DateTime64(6, 'UTC'), day Date, value Nullable(Float64)) ENGINE = MergeTree ORDER BY at"
    )
    source.execute(
        f"INSERT INTO readings SELECT toDateTime64('{hour:%Y-%m-%d %H:%M}:00.123456', 6, 'UTC'), '2026-02-03',"
        " arrayJoin([nan, inf, 0.1 + 0.2, NULL])"
    )
    model: Any = {
        "name": "readings",
        "query": "SELECT * FROM readings WHERE at >= {interval_start} AND at < {interval_end}",
        "columns": {"at": "TIMESTAMPTZ", "day": "DATE", "value": "DOUBLE PRECISION"},
        "key": ["at", "day", "value"],
    }
    with dg.DagsterInstance.ephemeral() as instance:
        readings = Deployment(PostgresExport(model=model, start=hour, schema=target.schema), source, target, instance)
        readings.run(hour)
        target.execute("INSERT INTO readings SELECT * FROM readings")
        try:
            target.execute(*(f"ALTER ROLE {ROLE} SET {name} = {value!r}" for name, value in SHOWN_OTHERWISE.items()))
            [difference] = readings.verify(hour)
        finally:
            target.execute(f"ALTER ROLE {ROLE} RESET ALL")
        assert (difference.difference or "").startswith("4 rows stand in the table more often")
        readings.repair(difference)
        assert readings.verify(hour) == []
    assert target.count("readings") == 4


def test_rows_that_were_erased_at_the_source_are_found_and_the_pages_statements_delete_them(
    deployment: Any, source: Source, target: Target, hour: datetime, repository: Any
) -> None:
    rows = [event(hour) for _ in range(4)]
    source.insert("events", *rows)
    events = deployment("events")
    events.run(hour - HOUR, hour)
    erased = [str(row["uuid"]) for row in rows[:2]]
    names = ", ".join(f"'{name}'" for name in erased)
    source.execute("SYSTEM START MERGES events")
    source.execute(f"ALTER TABLE events DELETE WHERE uuid IN ({names}) SETTINGS mutations_sync = 1")
    [said] = events.verify(hour - HOUR, hour)
    assert "2 rows that were exported are not in ClickHouse any more" in str(said.difference)
    assert 'docs/operations.md, "Rows that were erased at the source"' in said.repair
    section = (repository / "docs/operations.md").read_text().split("## Rows that were erased at the source")[1]
    look, delete, journals = section.split("```sql\n")[1].split("```")[0].strip().split(";\n\n")

    def filled(sql: str) -> str:
        return (
            sql.replace("posthog.", f"{target.schema}.")
            .replace("'0190a0b0-...', '0190a0b1-...'", names)
            .replace("2026-11-20 13:00+00", hour.isoformat())
            .replace("2026-11-20 14:00+00", (hour + HOUR).isoformat())
        )

    assert len(target.rows(filled(look))) == 2
    target.execute(filled(delete), filled(journals))
    command = section.split("```sh\n")[1].split("```")[0].strip()
    assert command == "make backfill EXPORT=events FROM=2026-11-20-13:00 TO=2026-11-20-13:00 REPLAY=1"
    events.run(hour, replay=True)
    assert events.verify(hour - HOUR, hour) == []
    assert target.count("events") == 2


def test_rejected_rows_are_no_difference(deployment: Any, source: Source, target: Target, hour: datetime) -> None:
    source.insert("events", event(hour, properties='{"a": "\\u0000"}'), event(hour))
    events = deployment("events", on_bad_rows="reject")
    events.run(hour - HOUR, hour)
    assert target.count("events") == 1
    assert events.verify(hour - HOUR, hour) == []
    target.execute("DELETE FROM events")
    repaired(events, hour - HOUR, hour, "1 rows that were exported are not in the table")


def test_a_table_that_was_rewritten_is_the_one_that_it_was(
    deployment: Any, source: Source, target: Target, hour: datetime
) -> None:
    fill(source, hour)
    events = deployment("events")
    events.run(hour - HOUR, hour)
    target.execute("VACUUM FULL events")
    assert events.verify(hour - HOUR, hour) == []


def test_each_pass_is_for_a_bounded_number_of_rows(
    deployment: Any, source: Source, target: Target, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source, hour)
    events = deployment("events")
    events.run(hour - 3 * HOUR, hour)
    monkeypatch.setattr(verification, "ROWS_AT_ONCE", 2)
    target.execute("DELETE FROM events")
    [difference] = events.verify(hour - 3 * HOUR, hour)
    assert "is asked 2 times" in events.log[0]
    assert (difference.at_source, difference.in_table, difference.intervals) == (5, 0, 2)


def test_without_a_range_the_last_two_days_are_compared(deployment: Any, source: Source, hour: datetime) -> None:
    events = deployment("events")
    some = verification._intervals(events.export._grid().partitions(events.export.start), first="", last="")
    assert some[0].start == hour - 36 * HOUR
    assert some[-1].end in (hour + 2 * HOUR, hour + 3 * HOUR)


def test_an_own_model_whose_key_may_be_null_is_looked_up(
    deployment: Any, source: Source, target: Target, hour: datetime
) -> None:
    source.execute("CREATE TABLE notes (id Nullable(String), text String, at DateTime64(6, 'UTC')) ENGINE = Memory")
    for number, name in enumerate((None, "a", "b", None)):
        source.insert("notes", {"id": name, "text": str(number), "at": hour + number * MINUTE})
    model = {
        "name": "notes",
        "query": "SELECT id, text FROM notes WHERE at >= {interval_start} AND at < {interval_end}",
        "columns": {"id": "TEXT", "text": "TEXT"},
        "key": ["id", "text"],
    }
    notes = deployment(model, team_id=None)
    notes.run(hour - HOUR, hour)
    assert notes.verify(hour - HOUR, hour) == []
    target.execute("DELETE FROM notes WHERE id IS NULL OR id = 'a'")
    repaired(notes, hour - HOUR, hour, "3 rows that were exported are not in the table")
    assert target.count("notes") == 4


def test_a_run_that_finds_differences_is_no_failure_of_the_export(
    deployment: Any, source: Source, hour: datetime
) -> None:
    fill(source, hour)
    events = deployment("events")
    assert [each.intervals for each in events.verify(hour - HOUR, hour)] == [2]
    repository = events.definitions.get_repository_def()
    later = datetime.now(UTC) + MINUTE
    with dg.build_sensor_context(instance=events.instance, repository_def=repository) as context:
        failed, last = watch.failed_runs(context, watch.exports_of(repository), 0, later)
    assert last > 0
    assert failed == {}


PEOPLE = [uuid.UUID(int=number + 1) for number in range(3)]


def fill(source: Source, hour: datetime, number: int = 0) -> None:
    """Two events, a person and a session in the hour before, and three, one and one in the hour itself; with another number
    others.
    """
    moments = (hour - HOUR + (5 + number) * MINUTE, hour + (5 + number) * MINUTE)
    source.insert("events", *(event(moment) for moment in (moments[0], *moments, moments[1], moments[1])))
    for place, moment in enumerate(moments):
        one = uuid.UUID(int=PEOPLE[place].int + 10 * number)
        source.insert("person", person(moment, one, 3))
        source.insert("person_distinct_id2", mapping(moment, f"of {one}", one))
        insert_sessions(source, session(new_session(moment), moment))
