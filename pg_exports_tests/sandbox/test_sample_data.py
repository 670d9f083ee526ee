"""The sample is the same whenever it is filled, and holds every case that an export has to survive."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta

import pytest

from pg_exports.sandbox import Sandbox, sample_data
from pg_exports.sandbox.sample_data import empty_hour, fill, hours_of, plan_of
from pg_exports.sandbox.source_tables import create_tables

END = datetime(2026, 3, 2, 10, tzinfo=UTC)
EVENTS = 2_000
HOURS = 72
SOURCES = ("events", "person", "person_distinct_id2", "raw_sessions")


class Engine:
    """ClickHouse, as its administrator: `execute` is what `fill` wants, `rows` what the tests ask."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def execute(self, statement: str, parameters: Mapping[str, object]) -> None:
        self._sandbox.execute(statement, parameters)

    def rows(self, query: str) -> list[list[object]]:
        answer = self._sandbox.client.raw_query(query, fmt="JSONCompactEachRow")
        return [json.loads(line) for line in answer.splitlines()]

    def value(self, query: str) -> object:
        return self.rows(query)[0][0]

    def number(self, query: str) -> float:
        return float(str(self.value(query)))


@pytest.fixture(scope="module")
def engine(sandbox: Sandbox) -> Iterator[Engine]:
    engine = Engine(sandbox)
    for database, seed in (("sample", 1), ("other", 2)):
        create_tables(engine.execute, database)
        fill(engine.execute, database, end=END, hours=HOURS, events=EVENTS, seed=seed)
    yield engine
    for database in ("sample", "other", "again"):
        sandbox.execute(f"DROP DATABASE IF EXISTS {database} SYNC")


@pytest.fixture(scope="module")
def documents(engine: Engine) -> list[str]:
    return [str(document) for (document,) in engine.rows("SELECT properties FROM sample.events")]


def checksum(engine: Engine, database: str, table: str) -> list[list[object]]:
    """Count and hash a table's rows, of sessions what their states merge to: a state's bytes depend on threads."""
    source = sessions(database) if table == "raw_sessions" else f"{database}.{table}"
    return engine.rows(f"SELECT count(), sum(cityHash64(*)) FROM {source}")


def sessions(database: str = "sample") -> str:
    return f"""(
        SELECT
            team_id, session_id_v7, count() AS row_count, uniqExact(toStartOfHour(max_inserted_at)) AS hours,
            max(max_inserted_at) AS inserted_at, min(min_timestamp) AS started, max(max_timestamp) AS ended,
            arraySort(groupUniqArrayArray(urls)) AS all_urls, argMaxMerge(distinct_id) AS last_distinct_id,
            argMinMerge(initial_referring_domain) AS referring_domain, argMinMerge(initial_utm_source) AS utm_source,
            argMinMerge(initial_gclid) AS gclid, argMinMerge(initial_fbclid) AS fbclid,
            argMinMerge(initial_gad_source) AS gad_source,
            uniqMerge(pageview_uniq) AS pageviews, uniqMerge(screen_uniq) AS screens, argMinMerge(vitals_lcp) AS lcp
        FROM {database}.raw_sessions GROUP BY team_id, session_id_v7)"""


EVENT_TIMES = "(SELECT *, coalesce(inserted_at, _timestamp) AS ingested_at FROM sample.events)"
LATEST_PERSONS = """(
    SELECT team_id, id, max(version) AS latest, argMax(is_deleted, version) AS deleted,
        argMax(properties, version) AS latest_properties
    FROM sample.person GROUP BY team_id, id)"""
LATEST_MAPPINGS = """(
    SELECT team_id, distinct_id, argMax(person_id, version) AS latest_person, argMax(is_deleted, version) AS deleted
    FROM sample.person_distinct_id2 GROUP BY team_id, distinct_id)"""


def test_the_same_seed_gives_the_same_rows_however_the_statements_are_cut(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_data, "EVENTS_A_STATEMENT", 1_200)
    monkeypatch.setattr(sample_data, "EVENTS_A_STRETCH", 300)
    create_tables(engine.execute, "again")
    fill(engine.execute, "again", end=END, hours=HOURS, events=EVENTS, seed=1)
    for table in SOURCES:
        assert checksum(engine, "again", table) == checksum(engine, "sample", table), table


@pytest.mark.parametrize("table", SOURCES)
def test_another_seed_gives_other_rows(engine: Engine, table: str) -> None:
    assert checksum(engine, "sample", table) != checksum(engine, "other", table)


def test_tables_can_be_created_twice_without_doubling_the_channels(engine: Engine) -> None:
    before = engine.rows("SELECT * FROM other.channel_definition ORDER BY domain, kind")
    create_tables(engine.execute, "other")
    assert engine.rows("SELECT * FROM other.channel_definition ORDER BY domain, kind") == before


def test_the_channel_dictionary_answers_by_name_and_kind(engine: Engine) -> None:
    assert engine.rows("""
        SELECT
            dictGetOrNull('sample.channel_definition_dict', 'type_if_paid', ('google', 'source')),
            dictGetOrNull('sample.channel_definition_dict', 'type_if_organic', ('email', 'medium')),
            dictGetOrNull('sample.channel_definition_dict', 'type_if_organic', ('nobody', 'source'))
    """) == [["Paid Search", "Email", None]]


def test_there_are_as_many_distinct_events_as_asked_for(engine: Engine) -> None:
    assert engine.number("SELECT uniqExact(uuid) FROM sample.events") == EVENTS


def test_people_are_a_twentieth_of_the_events_or_at_least_two_hundred(engine: Engine) -> None:
    assert engine.number("SELECT uniqExact(intDiv(_offset, 10)) FROM sample.person_distinct_id2") == 200


def test_properties_weigh_about_nine_hundred_bytes(engine: Engine) -> None:
    assert 800 < engine.number("SELECT avg(length(properties)) FROM sample.events") < 1_000


def test_one_event_in_five_belongs_to_the_second_team(engine: Engine) -> None:
    assert engine.rows("SELECT DISTINCT toInt32(team_id) FROM sample.events ORDER BY 1") == [[1], [2]]
    assert 0.1 < engine.number("SELECT avg(team_id = 2) FROM sample.events") < 0.3


def test_all_ten_event_names_occur(engine: Engine) -> None:
    names = {str(name) for (name,) in engine.rows("SELECT DISTINCT event FROM sample.events")}
    assert len(names) == 10
    assert {"$pageview", "$screen", 'it\'s "quoted"', "🚀 launched"} <= names


def test_everything_was_inserted_within_the_hours_asked_for(engine: Engine) -> None:
    begin = END - timedelta(hours=HOURS)
    first, last = engine.rows(f"SELECT min(ingested_at), max(ingested_at) FROM {EVENT_TIMES}")[0]
    assert str(begin) <= f"{first}+00:00"
    assert f"{last}+00:00" < str(END)


def test_every_hour_but_the_empty_one_has_events(engine: Engine) -> None:
    hours = {str(hour) for (hour,) in engine.rows(f"SELECT DISTINCT toStartOfHour(ingested_at) FROM {EVENT_TIMES}")}
    expected = {END - timedelta(hours=back) for back in range(1, HOURS + 1)} - {empty_hour(END)}
    assert hours == {hour.strftime("%Y-%m-%d %H:%M:%S") for hour in expected}


def test_nothing_was_inserted_in_the_empty_hour(engine: Engine) -> None:
    start = empty_hour(END).strftime("%Y-%m-%d %H:%M:%S")
    for moment, table in (
        ("ingested_at", EVENT_TIMES),
        ("_timestamp", "sample.person"),
        ("_timestamp", "sample.person_distinct_id2"),
        ("max_inserted_at", "sample.raw_sessions"),
    ):
        assert engine.number(f"SELECT countIf(toStartOfHour({moment}) = '{start}') FROM {table}") == 0
        assert engine.number(f"SELECT countIf(toStartOfHour({moment}) > '{start}') FROM {table}") > 0


def test_the_day_is_busier_than_the_night(engine: Engine) -> None:
    night, day = engine.rows("""
        SELECT countIf(toHour(timestamp) BETWEEN 1 AND 4), countIf(toHour(timestamp) BETWEEN 13 AND 16)
        FROM sample.events""")[0]
    assert int(str(night)) * 2 < int(str(day))


def test_properties_are_empty_or_valid_json(engine: Engine) -> None:
    assert engine.number("SELECT countIf(properties != '' AND NOT isValidJSON(properties)) FROM sample.events") == 0
    assert engine.number("SELECT countIf(properties = '') FROM sample.events") > 0
    assert engine.number("SELECT countIf(NOT isValidJSON(person_properties)) FROM sample.events") == 0
    assert engine.number("SELECT countIf(NOT isValidJSON(properties)) FROM sample.person") == 0


def test_no_value_is_beyond_what_postgres_holds(engine: Engine, documents: list[str]) -> None:
    texts = "concat(event, distinct_id, properties, person_properties, elements_chain)"
    assert engine.number("SELECT max(lengthUTF8(distinct_id)) FROM sample.events") <= 200
    assert engine.number(f"SELECT countIf(NOT isValidUTF8({texts})) FROM sample.events") == 0
    assert engine.number(f"SELECT countIf(position({texts}, char(0)) > 0) FROM sample.events") == 0
    assert not any("\0" in json.dumps(json.loads(document), ensure_ascii=False) for document in documents if document)


@pytest.mark.parametrize(
    "fragment",
    [
        '"$set":{',
        '"$set": {',
        '"$set":"',
        '"$set":1.50',
        '"$set":12345678901234567890123',
        '"$set":null',
        '"$set":{"v":1},"$set":{"v":2}',
        '"$set_once":{',
        '"payload":{"$set":{',
        r'"\u0024set":{',
        '"$ip":""',
        '"$ip":null',
        '"$ip":127',
        '"$ip":"2001:',
        r"Caf\u00e9 \ud83d",
        "日本語 🚀",
        r"He said \"hi\"",
        r"C:\\path",
        r"line one\nline two",
        r"\\u0000 is plain text",
    ],
)
def test_properties_are_as_awkward_as_real_ones(documents: list[str], fragment: str) -> None:
    assert any(fragment in document for document in documents)


def test_some_inserted_at_are_null(engine: Engine) -> None:
    assert 0.005 < engine.number("SELECT avg(inserted_at IS NULL) FROM sample.events") < 0.05


def test_some_events_arrive_hours_days_and_weeks_late(engine: Engine) -> None:
    late = "SELECT countIf(ingested_at - timestamp BETWEEN {} AND {}) FROM " + EVENT_TIMES
    assert engine.number(late.format(3_600, 86_400)) > 0
    assert engine.number(late.format(86_401, 7 * 86_400)) > 0
    assert engine.number(late.format(7 * 86_400 + 1, 31 * 86_400)) > 0
    assert engine.number(f"SELECT countIf(timestamp > ingested_at) FROM {EVENT_TIMES}") == 0


def test_some_events_are_inserted_exactly_on_an_hour_and_a_microsecond_before_it(engine: Engine) -> None:
    assert engine.number("SELECT countIf(inserted_at = toStartOfHour(inserted_at)) FROM sample.events") > 0
    count = engine.number("""
        SELECT countIf(addMicroseconds(inserted_at, 1) = toStartOfHour(addMicroseconds(inserted_at, 1)))
        FROM sample.events""")
    assert count > 0


def test_some_events_stand_twice_in_one_hour_or_in_two(engine: Engine) -> None:
    copies = f"""(
        SELECT count() AS n, uniqExact(toStartOfHour(ingested_at)) AS hours, uniqExact(ingested_at) AS moments
        FROM {EVENT_TIMES} GROUP BY team_id, event, distinct_id, uuid)"""
    share = engine.number(f"SELECT avg(n > 1) FROM {copies}")
    assert 0.002 < share < 0.01
    assert engine.number(f"SELECT countIf(n > 1 AND moments = 1) FROM {copies}") > 0
    assert engine.number(f"SELECT countIf(n > 1 AND hours = 1 AND moments = 2) FROM {copies}") > 0
    assert engine.number(f"SELECT countIf(hours = 2) FROM {copies}") > 0


def test_elements_chain_belongs_to_autocapture(engine: Engine) -> None:
    assert engine.number("SELECT countIf((event = '$autocapture') != (elements_chain != '')) FROM sample.events") == 0


def test_some_people_were_merged_into_another_of_their_team(engine: Engine) -> None:
    count = engine.number("""
        SELECT countIf(persons = 2 AND latest = 1)
        FROM (
            SELECT uniqExact(person_id) AS persons, max(version) AS latest
            FROM sample.person_distinct_id2 GROUP BY team_id, distinct_id)""")
    assert count > 0


def test_deleted_people_have_a_far_higher_version_and_no_properties(engine: Engine) -> None:
    teams = engine.rows(f"SELECT DISTINCT toInt32(team_id) FROM {LATEST_PERSONS} WHERE deleted = 1 ORDER BY 1")
    assert teams == [[1], [2]]
    assert engine.number(f"SELECT min(latest) FROM {LATEST_PERSONS} WHERE deleted = 1") >= 100
    assert engine.rows(f"SELECT DISTINCT latest_properties FROM {LATEST_PERSONS} WHERE deleted = 1") == [["{}"]]


def test_some_mappings_are_deleted_and_some_have_no_person(engine: Engine) -> None:
    assert engine.number(f"SELECT countIf(deleted = 1) FROM {LATEST_MAPPINGS}") > 0
    count = engine.number(f"""
        SELECT countIf((team_id, latest_person) NOT IN (SELECT team_id, id FROM sample.person))
        FROM {LATEST_MAPPINGS}""")
    assert count > 0


@pytest.mark.parametrize(("table", "key"), [("person", "id"), ("person_distinct_id2", "distinct_id")])
def test_some_higher_versions_carry_an_older_time(engine: Engine, table: str, key: str) -> None:
    count = engine.number(f"""
        SELECT countIf(argument < newest)
        FROM (
            SELECT argMax(_timestamp, version) AS argument, max(_timestamp) AS newest
            FROM sample.{table} GROUP BY team_id, {key})""")
    assert count > 0


def test_some_distinct_ids_belong_to_both_teams(engine: Engine) -> None:
    count = engine.number("""
        SELECT countIf(teams = 2)
        FROM (SELECT uniqExact(team_id) AS teams FROM sample.person_distinct_id2 GROUP BY distinct_id)""")
    assert count > 0


def test_an_event_carries_a_person_that_its_distinct_id_had(engine: Engine) -> None:
    known, strangers = engine.rows("""
        SELECT
            countIf((team_id, distinct_id) IN (SELECT team_id, distinct_id FROM sample.person_distinct_id2)) AS known,
            countIf((team_id, distinct_id) IN (SELECT team_id, distinct_id FROM sample.person_distinct_id2)
                AND (team_id, distinct_id, person_id)
                    NOT IN (SELECT team_id, distinct_id, person_id FROM sample.person_distinct_id2)) AS strangers
        FROM sample.events""")[0]
    assert int(str(known)) > EVENTS * 0.7
    assert int(str(strangers)) == 0
    assert int(str(known)) < EVENTS


def test_sessions_are_those_of_the_events(engine: Engine) -> None:
    of_events = """
        SELECT DISTINCT team_id, toUInt128(toUUIDOrZero(JSONExtractString(properties, '$session_id'))) AS session
        FROM sample.events WHERE bitAnd(bitShiftRight(session, 76), 0xF) = 7"""
    assert engine.number(f"SELECT count() FROM ({of_events})") == engine.number(f"SELECT count() FROM {sessions()}")
    assert engine.number(f"SELECT count() FROM {sessions()} WHERE (team_id, session_id_v7) NOT IN ({of_events})") == 0
    assert engine.number("SELECT countIf(JSONExtractString(properties, '$session_id') = '') FROM sample.events") > 0


def test_some_sessions_grow_in_a_later_hour(engine: Engine) -> None:
    assert engine.number(f"SELECT countIf(hours > 1) FROM {sessions()}") > 0


def test_some_late_rows_change_a_session_without_moving_its_end(engine: Engine) -> None:
    count = engine.number("""
        SELECT countIf(newest.ended < last_end AND NOT hasAll(earlier_urls, newest.urls))
        FROM (
            SELECT
                max(max_inserted_at) AS last_inserted_at,
                max(max_timestamp) AS last_end,
                argMax(CAST((max_timestamp, urls), 'Tuple(ended DateTime64(6), urls Array(String))'), max_inserted_at)
                    AS newest,
                groupArray((max_inserted_at, urls)) AS stages,
                arrayFlatten(arrayMap(stage -> if(stage.1 < last_inserted_at, stage.2, []), stages)) AS earlier_urls
            FROM sample.raw_sessions GROUP BY team_id, session_id_v7 HAVING count() > 1)""")
    assert count > 0


def test_sessions_come_with_and_without_attribution(engine: Engine) -> None:
    counts = engine.rows(f"""
        SELECT countIf(utm_source = 'google'), countIf(utm_source = 'null'), countIf(utm_source = ''),
            countIf(gclid != ''), countIf(fbclid != ''), countIf(gad_source = '1'),
            countIf(referring_domain = '$direct'), countIf(referring_domain = ''),
            countIf(pageviews = 0 AND screens > 0), countIf(lcp IS NOT NULL), countIf(length(all_urls) > 2)
        FROM {sessions()}""")[0]
    assert all(int(str(count)) > 0 for count in counts)


def test_a_statement_gets_only_the_hours_of_its_events() -> None:
    plan = plan_of(END, HOURS, 100_000)
    assert len(plan.hour_starts) == HOURS - 1
    assert hours_of(plan, 0, 100_000)["hour_starts"] == list(plan.hour_starts)
    assert hours_of(plan, 0, 10)["hour_starts"] == [plan.hour_starts[0]]
    assert hours_of(plan, 99_990, 10)["hour_starts"] == [plan.hour_starts[-1]]


@pytest.mark.parametrize("end", [datetime(2026, 3, 2, 10), datetime(2026, 3, 2, 10, 30, tzinfo=UTC)])
def test_an_end_off_the_hour_or_without_a_time_zone_is_refused(end: datetime) -> None:
    with pytest.raises(ValueError, match="end must be on an hour"):
        plan_of(end, HOURS, EVENTS)
