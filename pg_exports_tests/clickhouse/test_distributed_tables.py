"""Which Distributed tables a query may read, by its words."""

import pytest

from pg_exports.clickhouse.distributed import SourceTable, read_by
from pg_exports.clickhouse.settings import Value, clause

EVENTS = SourceTable("posthog", "events")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM posthog.events",
        "SELECT * FROM `posthog`.`events` AS e",
        "SELECT * FROM posthog . events",
        "SELECT * FROM(posthog.events)",
        'SELECT * FROM "posthog"."events"',
        'SELECT * FROM posthog."events"',
        'SELECT * FROM `posthog`."events"',
        "SELECT * FROM posthog./**/events",
        "SELECT * FROM posthog. -- here\n events",
        "SELECT '/*' FROM posthog.events WHERE '*/' = ''",
        "SELECT * FROM merge('posthog', '^ev.*$')",
    ],
)
@pytest.mark.parametrize("current", ["posthog", "other"])
def test_a_table_that_is_named_with_its_database_is_read_from_any(sql: str, current: str) -> None:
    assert EVENTS.is_in(sql, current)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM events",
        "SELECT * FROM `events`",
        'SELECT * FROM "events"',
        "JOIN events USING (id)",
        "merge('^ev')",
    ],
)
def test_a_table_that_is_named_alone_is_the_current_databases(sql: str) -> None:
    assert EVENTS.is_in(sql, "posthog")
    assert not EVENTS.is_in(sql, "other")


@pytest.mark.parametrize(
    "sql",
    ["SELECT * FROM other.events", "SELECT * FROM `other`.`events`", "SELECT events_1, my_events FROM t", "t.events"],
)
def test_another_databases_table_and_longer_names_are_others(sql: str) -> None:
    assert not EVENTS.is_in(sql, "posthog")


@pytest.mark.parametrize(
    "definition",
    [
        "CREATE VIEW exports.all_events AS SELECT * FROM posthog.events",
        "CREATE MATERIALIZED VIEW exports.all_events TO posthog.events AS SELECT * FROM other.thing",
        "CREATE TABLE exports.all_events (`uuid` UUID) ENGINE = Merge('posthog', '^ev')",
        "CREATE TABLE exports.all_events (`uuid` UUID) ENGINE = Merge(REGEXP('^posthog$'), '^events$')",
        "CREATE TABLE exports.all_events (`uuid` UUID) ENGINE = Buffer('posthog', 'events', 1, 1, 1, 1, 1, 1, 1)",
        "CREATE TABLE exports.all_events ENGINE = Alias('posthog', 'events')",
        "CREATE TABLE exports.all_events ENGINE = Alias(posthog.events)",
        "CREATE VIEW exports.all_events AS SELECT * FROM merge('posthog', '^ev')",
    ],
)
def test_the_tables_behind_others_are_read_too(definition: str) -> None:
    between = SourceTable("exports", "all_events", definition)
    view = SourceTable("exports", "recent", "CREATE VIEW exports.recent AS SELECT * FROM exports.all_events WHERE 1")
    other = SourceTable("third", "person")
    tables = (view, other, between, EVENTS)
    assert read_by(tables, "SELECT * FROM recent", "exports") == [EVENTS]
    assert read_by(tables, "SELECT * FROM person", "exports") == []


def test_a_settings_clause_has_texts_maps_and_truths_as_clickhouse_reads_them() -> None:
    settings: dict[str, Value] = {"a": True, "b": 0.5, "c": "it's \\", "d": {"t": "x = 'y'"}, "odd`name": 1}
    assert clause(settings) == (
        "SETTINGS `a` = 1, `b` = '0.5', `c` = 'it\\'s \\\\', `d` = {'t': 'x = \\'y\\''}, `odd\\`name` = 1"
    )
