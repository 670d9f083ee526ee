"""Which Distributed tables a query may read, by its words."""

import pytest

from pg_exports.clickhouse.settings import DistributedTable, ServerSettings, Value, clause

EVENTS = DistributedTable("posthog", "events")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM posthog.events",
        "SELECT * FROM `posthog`.`events` AS e",
        "SELECT * FROM posthog . events",
        "SELECT * FROM(posthog.events)",
    ],
)
@pytest.mark.parametrize("current", ["posthog", "other"])
def test_a_table_that_is_named_with_its_database_is_read_from_any(sql: str, current: str) -> None:
    assert EVENTS.is_in(sql, current)


@pytest.mark.parametrize("sql", ["SELECT * FROM events", "SELECT * FROM `events`", "JOIN events USING (id)"])
def test_a_table_that_is_named_alone_is_the_current_databases(sql: str) -> None:
    assert EVENTS.is_in(sql, "posthog")
    assert not EVENTS.is_in(sql, "other")


@pytest.mark.parametrize(
    "sql",
    ["SELECT * FROM other.events", "SELECT * FROM `other`.`events`", "SELECT events_1, my_events FROM t", "t.events"],
)
def test_another_databases_table_and_longer_names_are_others(sql: str) -> None:
    assert not EVENTS.is_in(sql, "posthog")


def test_the_tables_behind_views_are_read_too() -> None:
    over_view = DistributedTable("exports", "recent", "SELECT * FROM exports.all_events WHERE 1")
    view = DistributedTable("exports", "all_events", "SELECT * FROM posthog.events")
    other = DistributedTable("posthog", "person")
    server = ServerSettings(frozenset(), {}, (over_view, other, view, EVENTS))
    assert server.read_by("SELECT * FROM recent", "exports") == [EVENTS]
    assert server.read_by("SELECT * FROM person", "exports") == []


def test_a_settings_clause_has_texts_maps_and_truths_as_clickhouse_reads_them() -> None:
    settings: dict[str, Value] = {"a": True, "b": 0.5, "c": "it's \\", "d": {"t": "x = 'y'"}, "odd`name": 1}
    assert clause(settings) == (
        "SETTINGS `a` = 1, `b` = '0.5', `c` = 'it\\'s \\\\', `d` = {'t': 'x = \\'y\\''}, `odd\\`name` = 1"
    )
