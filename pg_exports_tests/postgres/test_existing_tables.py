"""Tables that others made: what fits is filled as it is, from first load to late row.

What does not fit is an error before the first row, whose statement mends it.
"""

import re
import uuid
from datetime import datetime
from typing import Any

import pytest

from pg_exports import PostgresExport
from pg_exports.postgres.identifiers import quoted
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.postgres.test_ingest import creation
from pg_exports_tests.source_rows import HOUR, event, export_of, insert_sessions, mapping, new_session, person, session

# As PostHog's own batch exports make them.
POSTHOGS_EVENTS = """
    uuid varchar(200), event varchar(200), properties jsonb, elements jsonb, set jsonb, set_once jsonb,
    distinct_id varchar(200), team_id bigint, ip varchar(200), site_url varchar(200), "timestamp" timestamptz
"""
POSTHOGS_PERSONS = """
    team_id bigint, distinct_id text, person_id text, properties jsonb, person_distinct_id_version bigint,
    person_version bigint, created_at timestamptz, is_deleted boolean, PRIMARY KEY (team_id, distinct_id)
"""

IDENTITY = ("uuid", "event", "distinct_id")

EVENTS = {
    "other types": """
        "timestamp" timestamp, team_id numeric, properties json, set text, distinct_id text, event text, ip char(40),
        uuid uuid NOT NULL, inserted_at timestamptz, note text, loaded_at timestamptz NOT NULL DEFAULT now()
    """,
    'An "odd" name; and widths': """
        "Event" text, id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, uuid varchar(500) UNIQUE, event varchar(500),
        team_id text, properties text, elements varchar, distinct_id varchar,
        upper_event text GENERATED ALWAYS AS (upper(event)) STORED
    """,
}


def test_events_tables_of_every_shape_take_first_loads_reruns_and_late_rows(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    before = event(hour)
    source.insert("events", before, event(hour, event="e" * 200, properties='{"a": [1.50]}'))
    exports = []
    for n, (table, columns) in enumerate(EVENTS.items()):
        target.execute(*creation(quoted(table), columns))
        exports.append(export_of("events", target, hour, name=f"events_{n}", table=table))
    key = partition_key(hour)
    for table, export in zip(EVENTS, exports, strict=True):
        assert run(export, key).counts == (2, 0, 0), table
    late = event(hour, timestamp=hour - 40 * 24 * HOUR)
    source.insert("events", late)
    for table, export in zip(EVENTS, exports, strict=True):
        assert run(export, key).counts == (1, 0, 2), table
    # Without journals the table is asked, in whatever type it has the keys.
    target.execute("DELETE FROM pg_exports_keys")
    source.insert("events", event(hour))
    for table, export in zip(EVENTS, exports, strict=True):
        assert run(export, key).counts == (1, 0, 3), table
        assert target.rows(f"SELECT count(*), count(DISTINCT uuid) FROM {quoted(table)}") == [(4, 4)]
    plain, odd = (quoted(table) for table in EVENTS)
    assert target.rows(
        f"""SELECT "timestamp", team_id::int, properties::text, inserted_at, note, loaded_at > inserted_at FROM {plain}
        WHERE uuid = '{late["uuid"]}'"""
    ) == [((hour - 40 * 24 * HOUR).replace(tzinfo=None), TEAM, "{}", hour, None, True)]
    assert target.rows(f"""SELECT count(DISTINCT id), count("Event"), min(team_id) FROM {odd}""") == [(4, 0, str(TEAM))]
    assert target.rows(f"SELECT upper_event, properties FROM {odd} WHERE event LIKE 'e%'") == [
        ("E" * 200, '{"a": [1.50]}')
    ]


def test_rows_that_posthogs_own_export_left_are_recognised(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    one = uuid.UUID(int=1)
    here, new = event(hour, event="é 'x'", distinct_id="d"), event(hour)
    source.insert("events", here, new)
    source.insert("person", person(hour, one, 2))
    source.insert("person_distinct_id2", *(mapping(hour, name, one, 1) for name in "abc"))
    target.execute(
        *creation("events", POSTHOGS_EVENTS),
        *creation("persons", POSTHOGS_PERSONS),
        "INSERT INTO events (uuid, event, distinct_id, team_id) VALUES"
        f" ('{here['uuid']}', 'é ''x''', 'd', {TEAM}), ('{new['uuid']}', 'another event of that uuid', 'a', {TEAM})",
        "INSERT INTO persons (team_id, distinct_id, person_distinct_id_version, person_version, is_deleted) VALUES"
        f" ({TEAM}, 'a', 1, 2, false), ({TEAM}, 'b', 1, 1, true)",
    )
    events, persons = export_of("events", target, hour), export_of("persons", target, hour)
    assert run(events, partition_key(hour)).counts == (1, 0, 1)
    assert run(persons, partition_key(hour)).counts == (1, 2, 0)
    assert run(events, partition_key(hour)).counts == (0, 0, 2)
    assert run(persons, partition_key(hour)).counts == (0, 0, 3)
    assert target.rows("SELECT distinct_id, person_version, is_deleted FROM persons ORDER BY 1") == [
        (name, 2, False) for name in "abc"
    ]


def test_persons_and_sessions_tables_of_other_types_take_first_loads_reruns_and_newer_rows(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(
        *creation(
            "persons",
            "properties text, created_at timestamp, person_version text, person_id uuid, distinct_id varchar(500)",
            "person_distinct_id_version numeric, team_id smallint, note text DEFAULT 'kept'",
            "UNIQUE (distinct_id, team_id)",
        ),
        *creation(
            "sessions",
            "end_timestamp timestamp, session_id uuid, team_id numeric, urls varchar[], session_id_v7 varchar(39)",
            "pageview_count smallint, is_bounce numeric, first_seen timestamptz DEFAULT now()",
        ),
        "CREATE UNIQUE INDEX ON sessions (team_id, session_id)",
    )
    one, opened = uuid.UUID(int=1), new_session(hour)
    source.insert("person", person(hour, one, 9))
    source.insert("person_distinct_id2", mapping(hour, "a", one), mapping(hour, "b", one))
    insert_sessions(source, session(opened, hour, urls=["a"], pageviews=[uuid.UUID(int=5)]))
    persons, sessions = export_of("persons", target, hour), export_of("sessions", target, hour)
    assert run(persons, partition_key(hour)).counts == (2, 0, 0)
    assert run(sessions, partition_key(hour)).counts == (1, 0, 0)
    target.execute("UPDATE persons SET note = 'changed by hand'")
    source.insert("person", person(hour, one, 10))
    insert_sessions(source, session(opened, hour + HOUR / 2))
    for expected in ((0, 2, 0), (0, 0, 2)):
        assert run(persons, partition_key(hour)).counts == expected
    for expected in ((0, 1, 0), (0, 0, 1)):
        assert run(sessions, partition_key(hour)).counts == expected
    assert target.rows("SELECT DISTINCT person_version, person_id::text, properties, note FROM persons") == [
        ("10", str(one), '{"version": 10}', "changed by hand")
    ]
    assert target.rows("SELECT session_id::text, pageview_count, end_timestamp, urls FROM sessions") == [
        (str(opened), 1, (hour + HOUR / 2).replace(tzinfo=None), ["a"])
    ]


def test_rows_that_a_tables_own_key_refuses_are_set_aside_and_the_others_land(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(*creation("events", "uuid text PRIMARY KEY, event text"))
    twice = event(hour)
    source.insert("events", twice, twice | {"event": "another of that uuid"}, event(hour))
    done = run(export_of("events", target, hour), partition_key(hour))
    assert (done.counts, done.metadata[partition_key(hour)]["rows_rejected"]) == ((2, 0, 0), 1)
    [(reason,)] = target.rows("SELECT reason FROM pg_exports_rejected")
    assert f"Key (uuid)=({twice['uuid']}) already exists" in reason


# What does not fit


def test_what_is_no_table_is_refused_by_name_and_left_as_it_was(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour))
    target.execute(
        "CREATE TABLE base (uuid text)",
        "CREATE VIEW plain_view AS SELECT * FROM base",
        "CREATE MATERIALIZED VIEW materialised AS SELECT * FROM base",
        "CREATE FOREIGN DATA WRAPPER nothing",
        "CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing",
        "CREATE FOREIGN TABLE elsewhere (uuid text) SERVER nowhere",
    )
    try:
        for table in ("plain_view", "materialised", "elsewhere"):
            target.execute(f"GRANT INSERT, SELECT, UPDATE ON {table} TO {ROLE}")
            error = run(export_of("events", target, hour, table=table), partition_key(hour)).error or ""
            assert f'"{target.schema}"."{table}" is no table' in error
            assert "Set the export's `table`" in error
        assert target.count("base") == 0
    finally:
        target.execute("DROP FOREIGN DATA WRAPPER nothing CASCADE")


def replay(export: PostgresExport) -> dict[str, Any]:
    """The configuration of a run that asks the table for its keys."""
    return {"ops": {export.key: {"config": {"replay": True}}}}


def test_the_advice_of_the_checks_on_a_table_with_rows_brings_none_of_them_again(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    """A table without `team_id`: four rows that others brought, and what the export makes of them."""
    before = [event(hour, event=f"e{n}", distinct_id="a'b") for n in range(4)]
    source.insert("events", *before, *(event(hour) for _ in range(3)))
    target.execute(
        *creation("events", "uuid text, event text, distinct_id text, properties jsonb"),
        *(f"INSERT INTO events VALUES ('{row['uuid']}', '{row['event']}', 'a''b', NULL)" for row in before),
    )
    export = export_of("events", target, hour)
    done = run(export, partition_key(hour))
    assert done.counts == (3, 0, 4)
    statements = done.checks["table_columns"].metadata["lacking"].value
    assert isinstance(statements, dict)
    assert "team_id" in statements
    target.execute(*statements.values())
    assert run(export, partition_key(hour), run_config=replay(export)).counts == (0, 0, 7)
    target.execute("DELETE FROM pg_exports_ledger", "DELETE FROM pg_exports_keys")
    assert run(export, partition_key(hour)).counts == (0, 0, 7)
    assert target.count("events") == 7


@pytest.mark.parametrize("lacking", ["distinct_id", "event"])
def test_a_table_that_cannot_tell_events_apart_is_filled_and_never_drops_one_for_another(
    lacking: str, source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    one = event(hour)
    another = one | {lacking: "another"}
    source.insert("events", one)
    target.execute(*creation("events", ", ".join(f"{name} text" for name in IDENTITY if name != lacking)))
    export = export_of("events", target, hour)
    done = run(export, partition_key(hour))
    assert done.counts == (1, 0, 0)
    check = done.checks["table_columns"]
    assert f'ADD COLUMN "{lacking}"' not in str(check.description)
    assert f"would have no {lacking}, by which rows are told apart" in str(check.description)
    source.insert("events", another)
    assert run(export, partition_key(hour)).counts == (1, 0, 1)
    source.insert("events", event(hour + HOUR))
    of_table = export_of("events", target, hour, deduplicate="table")
    for asking, start, options in ((export, hour, {"run_config": replay(export)}), (of_table, hour + HOUR, {})):
        error = run(asking, partition_key(start), **options).error or ""
        assert f"has no {lacking}, and events that differ in nothing else would pass for one" in error
    assert target.count("events") == 2


def test_rows_whose_key_columns_came_later_are_counted_and_named_before_anything_is_written(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    here = [event(hour) for _ in range(2)]
    source.insert("events", *here, event(hour))
    target.execute(
        *creation("events", "uuid text, event text"),
        *(f"INSERT INTO events VALUES ('{row['uuid']}', '{row['event']}')" for row in here),
        "ALTER TABLE events ADD COLUMN distinct_id text",
    )
    export = export_of("events", target, hour)
    error = run(export, partition_key(hour)).error or ""
    assert "has rows in which event or distinct_id is NULL" in error
    assert "the uuid of 2 rows at the source" in error
    assert (target.count("events"), target.count("pg_exports_ledger")) == (2, 0)
    target.execute("UPDATE events SET distinct_id = 'a'")
    assert run(export, partition_key(hour)).counts == (1, 0, 2)


def test_a_partition_that_a_crash_emptied_is_not_taken_for_loaded(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour))
    target.execute(*creation("events", POSTHOGS_EVENTS, after="PARTITION BY LIST (team_id)"))
    target.execute(f"CREATE TABLE mine PARTITION OF events FOR VALUES IN ({TEAM})")
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    target.execute("ALTER TABLE mine SET UNLOGGED")
    error = run(export, partition_key(hour)).error or ""
    assert f"{target.schema}.mine is UNLOGGED: a crash of the server empties it" in error
    target.execute("DELETE FROM mine", *re.findall("ALTER TABLE .*? SET LOGGED;", error))
    assert "with `replay`" in error
    assert run(export, partition_key(hour), run_config=replay(export)).counts == (1, 0, 0)


def remedied(source: Source, target: Target, run: RunExport, hour: datetime, model: str, table: str) -> list[str]:
    """Run an export into a table, and each statement that its errors give, until it succeeds; gives the statements."""
    statements: list[str] = []
    for _ in range(6):
        done = run(export_of(model, target, hour, name=table, table=table), partition_key(hour))
        if done.error is None:
            assert done.counts == (1, 0, 0)
            return statements
        assert target.count(table) == 0
        [given] = re.findall(r"Run as its owner: (.*;)", done.error)
        target.execute(*(f"{statement};" for statement in str(given).rstrip(";").split(";")))
        statements.append(str(given).replace(f'"{target.schema}".', ""))
    raise AssertionError(statements)


def test_the_statement_of_an_error_mends_the_table(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    """What a table lacks, found one after the other, each before a row is sent."""
    one = uuid.UUID(int=1)
    source.insert("events", event(hour))
    source.insert("person", person(hour, one, 1))
    source.insert("person_distinct_id2", mapping(hour, "a", one))
    insert_sessions(source, session(new_session(hour), hour))
    asked: dict[tuple[str, str], tuple[str, list[str]]] = {
        ("events", "bare_events"): (
            "event text, note text NOT NULL",
            [
                'ALTER TABLE "bare_events" ADD COLUMN "uuid" VARCHAR(200);',
                'ALTER TABLE "bare_events" ALTER COLUMN "note" DROP NOT NULL;',
            ],
        ),
        ("persons", "bare_persons"): (
            "team_id bigint, distinct_id text, person_version bigint, is_deleted boolean NOT NULL",
            [
                'ALTER TABLE "bare_persons" ADD COLUMN "person_distinct_id_version" INTEGER;',
                'ALTER TABLE "bare_persons" ADD PRIMARY KEY ("team_id", "distinct_id");',
            ],
        ),
        ("sessions", "bare_sessions"): (
            "session_id text, end_timestamp timestamptz",
            [
                'ALTER TABLE "bare_sessions" ADD COLUMN "team_id" BIGINT;',
                'ALTER TABLE "bare_sessions" ADD PRIMARY KEY ("team_id", "session_id");',
            ],
        ),
    }
    for (model, table), (columns, statements) in asked.items():
        target.execute(*creation(table, columns))
        assert remedied(source, target, run, hour, model, table) == statements


def test_a_type_that_cannot_hold_a_column_names_column_and_types_and_works_once_it_is_changed(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour))
    target.execute(*creation("events", 'uuid text, "timestamp" date, team_id real, properties jsonb'))
    export = export_of("events", target, hour)
    for column, declared, wanted in (
        ("team_id", "real", "INTEGER"),
        ("timestamp", "date", "TIMESTAMP WITH TIME ZONE"),
    ):
        error = run(export, partition_key(hour)).error or ""
        assert f"Column {column} of " in error
        assert f" is {declared}, which cannot hold the export's {wanted}." in error
        [statement] = re.findall(r"\((ALTER TABLE .* USING )\.\.\.\)", error)
        assert target.count("events") == 0
        target.execute(f'{statement} "{column}"::{wanted}')
    assert run(export, partition_key(hour)).counts == (1, 0, 0)


def test_a_value_that_is_wider_than_the_tables_column_is_set_aside_with_the_statement_that_widens_it(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(*creation("events", "uuid uuid, event varchar(5), team_id smallint"))
    source.insert("events", event(hour, event="short"), event(hour, event="longer"))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    [(reason,)] = target.rows("SELECT reason FROM pg_exports_rejected")
    [statement] = re.findall(r"ALTER TABLE .*? TYPE TEXT", reason)
    target.execute(statement)
    assert run(export, partition_key(hour)).counts == (1, 0, 1)
