"""What the models promise as models: columns, parameters, and queries that a person can paste into a console."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone

import pytest

from pg_exports.models import IDENTITY, INTERVAL, MODELS, STATE, Model, Query, Selection
from pg_exports.sandbox import source_tables
from pg_exports_tests.conftest import SAMPLE_HOURS, TEAM, Source
from pg_exports_tests.source_rows import HOUR

ODD_NAMES = (
    "it's",
    'say "hi"',
    "C:\\new\\t",
    "a, b",
    "🚀 launched",
    "['x']",
    "{team_id:Int64}",
    "tab\tline\nend",
    "\\'",
)

CONSOLE = """
import sys
import chdb
console = chdb.connect(":memory:")
for statement in sys.stdin.read().split(chr(0)):
    print(console.query(statement, "TSVRaw"), end="")
"""


def in_a_console(*statements: str) -> list[str]:
    """What ClickHouse's own console prints: the engine's, in a process of its own, with nothing bound from outside."""
    answer = subprocess.run(
        [sys.executable, "-c", CONSOLE], input="\0".join(statements), capture_output=True, text=True, check=True
    )
    return answer.stdout.splitlines()


def creating(*tables: str) -> list[str]:
    return [source_tables.TABLES[table].replace("{database:Identifier}", "default") for table in tables]


def test_an_events_query_can_be_pasted_into_a_console(hour: datetime) -> None:
    selection = Selection(
        TEAM, hour, hour + HOUR, include_events=(*ODD_NAMES, "left out"), exclude_events=("left out",)
    )
    inserts = [
        Query(
            "INSERT INTO events (event, team_id, distinct_id, properties, inserted_at)"
            " VALUES ({name:String}, 1, {name:String}, '{\"$set\": 1.50}', {at:DateTime64(6, 'UTC')})",
            {"name": name, "at": f"{hour:%Y-%m-%d %H:%M:%S}"},
        ).for_console()
        for name in (*ODD_NAMES, "left out", "other")
    ]
    pasted = MODELS["events"].query(selection).for_console()
    counted = pasted.replace("\nSELECT", "\nSELECT hex(event), set FROM (SELECT", 1).removesuffix(";\n") + ");"
    lines = in_a_console(*creating("events"), *inserts, counted)
    assert sorted(lines) == sorted(f"{name.encode().hex().upper()}\t1.50" for name in ODD_NAMES)


def test_every_query_can_be_pasted_into_a_console(hour: datetime) -> None:
    queries = [(model.without_dictionary or model).query for model in MODELS.values()]
    selection = Selection(TEAM, hour, hour + 2 * HOUR, starts=(hour, hour + HOUR))
    pasted = [query(selection).for_console() for query in queries]
    pasted += [query(selection).without(["team_id", "distinct_id"]).for_console() for query in queries]
    bounds = ", ".join(str(int(start.timestamp()) * 1_000_000) for start in selection.starts)
    assert all(f"SET param_boundaries = '[{bounds}]';\n" in query for query in pasted)
    assert in_a_console(*creating("events", "person", "person_distinct_id2", "raw_sessions"), *pasted) == []


def test_bounds_are_bound_in_utc_to_the_microsecond_whatever_their_zone() -> None:
    start = datetime(2026, 3, 29, 2, 30, 0, 1, tzinfo=timezone(timedelta(hours=5, minutes=45)))
    assert Selection(TEAM, start, datetime(2026, 3, 29, tzinfo=UTC)).parameters == {
        "team_id": TEAM,
        "interval_start": "2026-03-28 20:45:00.000001",
        "interval_end": "2026-03-29 00:00:00.000000",
        "boundaries": [1_774_730_700_000_001],
    }


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_values_are_bound_and_never_pasted(model: Model, hour: datetime) -> None:
    one = model.query(Selection(7_777_777, hour, hour + HOUR))
    other = model.query(Selection(TEAM, hour - HOUR, hour))
    assert one.sql == other.sql
    assert "7777777" not in one.sql
    names = MODELS["events"].query(Selection(TEAM, hour, hour, include_events=("x-in",), exclude_events=("x-out",)))
    assert "x-" not in names.sql


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_a_query_gives_the_models_columns_of_the_team_alone(model: Model, sample: Source, sample_end: datetime) -> None:
    start = sample_end - SAMPLE_HOURS * HOUR
    for team_id in (1, 2):
        query = model.query(Selection(team_id, start, sample_end))
        with sample.resource().frames(query, model, log_comment="") as frames:
            rows = 0
            for frame in frames:
                assert frame.columns == [*(column.name for column in model.columns), IDENTITY, STATE, INTERVAL]
                assert frame[IDENTITY].is_unique().all()
                assert frame[STATE].is_unique().all()
                assert set(frame["team_id"]) == {team_id}
                assert frame.select(model.key).is_unique().all()
                rows += frame.height
        assert rows > 30


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_columns_name_source_columns_that_there_are(model: Model, sample: Source) -> None:
    there = sample.rows("SELECT table || '.' || name FROM system.columns WHERE database = currentDatabase()")
    sources = {column.name: set(column.sources) for column in model.columns}
    assert set[str]().union(*sources.values()) <= {name for (name,) in there}
    assert {name for name, of in sources.items() if not of} <= {"site_url"}
    assert {source.partition(".")[0] for of in sources.values() for source in of} == set(model.source_tables)
    assert model.timestamps
    assert {*model.timestamps} <= {column.name for column in model.columns}
