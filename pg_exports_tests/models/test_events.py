"""Events in Postgres against events in ClickHouse: every row, every column, every awkward document.

The reference is written in Python from the rows of the source table; of the model it takes nothing.
"""

import itertools
import json
import random
import uuid
from collections import defaultdict
from collections.abc import Hashable
from datetime import datetime, timedelta
from typing import Any

from pg_exports.models import MODELS, Selection
from pg_exports.sandbox.sample_data import empty_hour
from pg_exports_tests.conftest import (
    SAMPLE_HOURS,
    TEAM,
    RunExport,
    Source,
    Target,
    materialise,
    partition_key,
)
from pg_exports_tests.models.comparison import (
    JSON_NULL,
    Row,
    comparable,
    created_columns,
    differences,
    exact,
    instant,
    landed_rows,
)
from pg_exports_tests.source_rows import HOUR, MICROSECOND, event, export_of

DEFAULT = {
    "uuid": "VARCHAR(200)",
    "event": "VARCHAR(200)",
    "properties": "JSONB",
    "elements": "JSONB",
    "set": "JSONB",
    "set_once": "JSONB",
    "distinct_id": "VARCHAR(200)",
    "team_id": "INTEGER",
    "ip": "VARCHAR(200)",
    "site_url": "VARCHAR(200)",
    "timestamp": "TIMESTAMP WITH TIME ZONE",
}
OPTIONAL = {
    "person_id": "TEXT",
    "person_properties": "JSONB",
    "elements_chain": "TEXT",
    "created_at": "TIMESTAMP WITH TIME ZONE",
    "inserted_at": "TIMESTAMP WITH TIME ZONE",
}
COLUMNS = DEFAULT | OPTIONAL
ADD_OPTIONAL = "ALTER TABLE events " + ", ".join(f'ADD COLUMN "{name}" {kind}' for name, kind in OPTIONAL.items())

SOURCE_COLUMNS = (
    "uuid, event, properties, distinct_id, team_id, timestamp, person_id, person_properties, elements_chain, created_at,"
    " inserted_at, _timestamp, toJSONString(elements_chain)"
)


def reference(source: Source, team_id: int, start: datetime, end: datetime) -> dict[tuple[Hashable, ...], set[Row]]:
    """What may land of each identity in each hour: the rows of the source that have it, one of which is to come."""
    may_land: dict[tuple[Hashable, ...], set[Row]] = defaultdict(set)
    for row in source.rows(f"SELECT {SOURCE_COLUMNS} FROM events"):
        columns = SOURCE_COLUMNS.split(", ")
        there: dict[str, Any] = dict(zip(columns, row, strict=True))
        received = instant(there["inserted_at"] or there["_timestamp"])
        assert received is not None
        if there["team_id"] != team_id or not start <= received < end:
            continue
        expected = expected_row(there, received)
        may_land[identity(expected)].add(expected)
    return may_land


def expected_row(there: dict[str, Any], received: datetime) -> Row:
    set_, set_once, ip = special_keys(there["properties"])
    row = (
        str(there["uuid"]),
        there["event"],
        there["properties"] or None,
        json.dumps(there["toJSONString(elements_chain)"]),
        None,
        None,
        there["distinct_id"],
        there["team_id"],
        ip,
        None,
        there["timestamp"],
        str(there["person_id"]),
        there["person_properties"] or None,
        there["elements_chain"],
        there["created_at"],
        received,
    )
    return (*comparable(row, COLUMNS)[:4], set_, set_once, *comparable(row, COLUMNS)[6:])


def special_keys(properties: str) -> tuple[Hashable, Hashable, str | None]:
    """`$set`, `$set_once` and `$ip` as MODELS has them, by a real JSON parser. It takes the last of a double key."""
    document = exact(properties or None)
    members = dict(document[1]) if isinstance(document, tuple) and document[0] == "object" else {}
    set_, set_once, ip = (
        None if value == JSON_NULL else value for value in map(members.get, ("$set", "$set_once", "$ip"))
    )
    return set_, set_once, ip or None if isinstance(ip, str) else None


def identity(row: Row) -> tuple[Hashable, ...]:
    """The hour that received an event, and what makes it the same event as another."""
    received, names = row[-1], list(COLUMNS)
    assert isinstance(received, datetime)
    key = [row[names.index(name)] for name in ("team_id", "event", "distinct_id", "uuid")]
    return (received.replace(minute=0, second=0, microsecond=0), *key)


def test_the_whole_sample_lands_row_by_row_and_column_by_column(
    sample: Source, sample_end: datetime, target: Target
) -> None:
    start = sample_end - SAMPLE_HOURS * HOUR
    export = export_of("events", target, sample_end)
    clickhouse, postgres = sample.resource(), target.resource()
    assert materialise(export, clickhouse, postgres, partition_key(empty_hour(sample_end))).counts == (0, 0, 0)
    assert created_columns(target, "events") == DEFAULT
    target.execute(ADD_OPTIONAL)
    run = materialise(export, clickhouse, postgres, partition_key(start), partition_key(sample_end - HOUR))
    assert run.error is None

    may_land = reference(sample, TEAM, start, sample_end)
    landed = landed_rows(target, "events", COLUMNS)
    assert len(landed) > 2_000
    assert differences(map(identity, landed), may_land) == {}
    assert [row for row in landed if row not in may_land[identity(row)]][:3] == []
    assert any(len(copies) > 1 for copies in may_land.values())


def test_bounds_are_the_time_of_insertion_first_inclusive_last_exclusive(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    end = hour + HOUR
    source.insert(
        "events",
        event(hour, event="at the start"),
        event(end - MICROSECOND, event="last microsecond"),
        event(hour - MICROSECOND, event="a microsecond too early"),
        event(end, event="at the end"),
        event(hour, event="another team's", team_id=TEAM + 1),
        event(hour, event="a month late", timestamp=hour - timedelta(days=31)),
        event(hour, event="from the future", timestamp=hour + timedelta(days=400)),
        event(hour, event="without inserted_at", inserted_at=None),
        event(hour - HOUR, event="without inserted_at, too early", inserted_at=None),
        event(hour - 5 * HOUR, event="inserted long after Kafka", inserted_at=hour + 3 * MICROSECOND),
        event(hour, event="inserted later than Kafka", inserted_at=end),
    )
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (6, 0, 0)
    assert {name for (name,) in target.rows("SELECT event FROM events")} == {
        "at the start",
        "last microsecond",
        "a month late",
        "from the future",
        "without inserted_at",
        "inserted long after Kafka",
    }


def test_an_event_that_clickhouse_holds_twice_lands_once(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    twice = event(hour)
    others = [twice | change for change in ({"event": "other"}, {"distinct_id": "b"}, {"uuid": uuid.uuid4()})]
    source.insert("events", twice, *others)
    source.insert("events", twice | {"inserted_at": hour + MICROSECOND, "properties": '{"copy": 2}'})
    source.insert("events", twice | {"timestamp": hour - timedelta(days=40)})
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (4, 0, 0)
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (0, 0, 4)


def test_of_two_copies_the_newest_lands_by_timestamp_then_by_offset(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    versions = [(0, 5, "old"), (0, 7, "newer"), (1, 1, "newest")]
    for order in itertools.permutations(versions):
        name = "".join(copy for _, _, copy in order)
        of_three = event(hour, uuid=uuid.uuid4(), event=name, distinct_id="three copies")
        of_two = event(hour, uuid=uuid.uuid4(), event=name, distinct_id="two copies")
        once = event(hour, uuid=uuid.uuid4(), event=name, distinct_id="one copy", properties='{"copy": "newest"}')
        for seconds, offset, copy in order:
            change = {
                "_timestamp": hour + timedelta(seconds=seconds),
                "_offset": offset,
                "properties": json.dumps({"copy": copy}),
            }
            # Copies with another time of their own are in other parts of the table for good.
            source.insert("events", of_three | change | {"timestamp": hour - timedelta(days=offset)})
            if copy != "newer":
                source.insert("events", of_two | change)
        source.insert("events", once)
    for streams in (1, 3):
        export = export_of("events", target, hour, name=f"by_{streams}", table=f"by_{streams}", streams=streams)
        assert run(export, partition_key(hour)).counts == (18, 0, 0)
        assert target.rows(f"SELECT DISTINCT properties->>'copy', count(*) FROM by_{streams} GROUP BY 1") == [
            ("newest", 18)
        ]


def test_the_newest_copy_of_each_interval_lands_where_several_are_read_together(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    again = event(hour, uuid=uuid.uuid4())
    for interval in (0, 1):
        for offset in (2, 1, 3, 0):
            received = {"inserted_at": hour + interval * HOUR, "_offset": offset + 10 * interval}
            source.insert("events", again | received | {"properties": json.dumps({"copy": [interval, offset]})})
    run(export_of("events", target, hour), partition_key(hour), partition_key(hour + HOUR))
    assert target.rows("SELECT properties->'copy' FROM events ORDER BY 1") == [("[0, 3]",), ("[1, 3]",)]


def test_an_event_passes_a_filter_if_its_newest_copy_does(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    plans = {"left": ("pro", "free"), "joined": ("free", "pro"), "stayed": ("pro", "pro"), "never": ("free", "free")}
    for name, copies in plans.items():
        twice = event(hour, uuid=uuid.uuid4(), event=name)
        for offset, plan in enumerate(copies):
            source.insert("events", twice | {"_offset": offset, "properties": json.dumps({"plan": plan})})
    export = export_of("events", target, hour, filters=[{"key": "plan", "value": "pro"}])
    assert run(export, partition_key(hour)).counts == (2, 0, 0)
    assert {name for (name,) in target.rows("SELECT event FROM events")} == {"joined", "stayed"}
    # As when ClickHouse has dropped the older copies.
    source.execute("SYSTEM START MERGES events")
    source.execute("OPTIMIZE TABLE events FINAL")
    assert source.rows("SELECT count() FROM events") == [(4,)]
    before = len(source.columns_read("events"))
    assert run(export, partition_key(hour)).counts == (0, 0, 2)
    assert len(source.columns_read("events")) == before + 1


NAMES = (
    "plain",
    "it's",
    'say "hi"',
    "C:\\new\\t",
    "a, b",
    "🚀 launched",
    "['x']",
    "{team_id:Int64}",
    "%s %(x)s",
    "tab\tline\nend",
    "'); --",
)


def test_event_names_are_data_whatever_they_hold(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour, event=name) for name in (*NAMES, "Plain", "other")))
    included = export_of("events", target, hour, name="included", table="included", include_events=list(NAMES))
    excluded = export_of("events", target, hour, name="excluded", table="excluded", exclude_events=list(NAMES))
    both = export_of(
        "events", target, hour, name="both", table="both", include_events=["plain", "it's"], exclude_events=["it's"]
    )
    for export in (included, excluded, both):
        assert run(export, partition_key(hour)).error is None
    assert {name for (name,) in target.rows("SELECT event FROM included")} == set(NAMES)
    assert {name for (name,) in target.rows("SELECT event FROM excluded")} == {"Plain", "other"}
    assert {name for (name,) in target.rows('SELECT event FROM "both"')} == {"plain"}


def test_a_list_of_thousands_of_event_names_is_no_longer_than_a_query_may_be(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour, event="event 4999 'é'"), event(hour, event="other"))
    names = [f"event {number} 'é'" for number in range(5_000)]
    assert run(export_of("events", target, hour, include_events=names), partition_key(hour)).counts == (1, 0, 0)


def test_times_keep_their_microseconds_and_texts_their_bytes(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    moment = hour + 123_457 * MICROSECOND
    row = event(
        moment,
        uuid=uuid.UUID(int=1),
        event="a\tb\nc 'quoted' \\ 🚀",
        distinct_id='o\'brien "x" \\N',
        elements_chain='a.b:text="say \\"hi\\""href="/x"',
        properties="",
        person_properties="",
        timestamp=moment - timedelta(days=3, microseconds=1),
        created_at=moment - MICROSECOND,
        person_id=uuid.UUID(int=2),
        _timestamp=hour,
    )
    source.insert("events", row, event(hour, inserted_at=None, distinct_id="plain"))
    run(export_of("events", target, hour), partition_key(hour - HOUR))
    target.execute(ADD_OPTIONAL)
    assert run(export_of("events", target, hour), partition_key(hour)).error is None
    landed = {row[6]: dict(zip(COLUMNS, row, strict=True)) for row in landed_rows(target, "events", COLUMNS)}
    assert landed[row["distinct_id"]] == {
        "uuid": "00000000-0000-0000-0000-000000000001",
        "event": row["event"],
        "properties": None,
        "elements": r'"a.b:text=\"say \\\"hi\\\"\"href=\"\/x\""',
        "set": None,
        "set_once": None,
        "distinct_id": row["distinct_id"],
        "team_id": TEAM,
        "ip": None,
        "site_url": None,
        "timestamp": row["timestamp"],
        "person_id": "00000000-0000-0000-0000-000000000002",
        "person_properties": None,
        "elements_chain": row["elements_chain"],
        "created_at": row["created_at"],
        "inserted_at": moment,
    }
    assert landed["plain"]["elements"] == '""'
    assert landed["plain"]["inserted_at"] == hour


DEEP = '{"a":' * 200 + "1" + "}" * 200

DOCUMENTS: dict[str, tuple[str, str | None, str | None, str | None]] = {
    "nothing": ("", None, None, None),
    "no key": ('{"a": 1}', None, None, None),
    "an empty object": ("{}", None, None, None),
    "an object": ('{"$set":{"a":1},"$set_once":{"b":[1,2]},"$ip":"10.0.0.1"}', '{"a":1}', '{"b":[1,2]}', "10.0.0.1"),
    "a string": ('{"$set":"pro","$set_once":""}', '"pro"', '""', None),
    "a string that looks like a number": ('{"$set":"1.50"}', '"1.50"', None, None),
    "the string null": ('{"$set":"null","$set_once":"null","$ip":"null"}', '"null"', '"null"', "null"),
    "numbers": ('{"$set":1.50,"$set_once":-0.001}', "1.50", "-0.001", None),
    "a number past 64 bits": ('{"$set":12345678901234567890123}', "12345678901234567890123", None, None),
    "a number past 64 bits inside": (
        '{"$set":{"n":98765432109876543210.10}}',
        '{"n":98765432109876543210.10}',
        None,
        None,
    ),
    "more digits than a double": ('{"$set":0.1234567890123456789012345}', "0.1234567890123456789012345", None, None),
    "a number past a double": ('{"$set":1e400,"$set_once":{"a":1},"$ip":"10.0.0.1"}', "1e400", '{"a":1}', "10.0.0.1"),
    "a number past a double elsewhere": ('{"$set":{"a":1},"x":-1E+400}', '{"a":1}', None, None),
    "null": ('{"$set":null,"$set_once": null ,"$ip":null}', None, None, None),
    "an object that holds null": ('{"$set":{"a":null}}', '{"a":null}', None, None),
    "arrays": ('{"$set":[1,"two",{"three":3.0}],"$set_once":[]}', '[1,"two",{"three":3.0}]', "[]", None),
    "booleans": ('{"$set":true,"$set_once":false}', "true", "false", None),
    "a double key": ('{"$set":{"v":1},"$set":{"v":2}}', '{"v":2}', None, None),
    "a double key that ends in null": ('{"$set":{"v":1},"$set":null}', None, None, None),
    "a double key that begins with null": ('{"$set":null,"$set":1}', "1", None, None),
    "a double key, one in escapes": ('{"$set":1,"\\u0024set":2}', "2", None, None),
    "a double key, the first in escapes": ('{"\\u0024set":2,"$set":1}', "1", None, None),
    "nested only": ('{"a":{"$set":1,"$set_once":2,"$ip":"x"}}', None, None, None),
    "nested in an array only": ('{"a":[{"$set":1},{"$ip":"x"}]}', None, None, None),
    "nested first": ('{"a":{"$set":1},"$set":2}', "2", None, None),
    "nested, and on top in escapes": ('{"a":{"$set":1,"$ip":"x"},"\\u0024set":2,"$\\u0069p":"y"}', "2", None, "y"),
    "nested in itself": ('{"$set":{"$set":{"$set":3}}}', '{"$set":{"$set":3}}', None, None),
    "one nested in the other": ('{"$set":{"$set_once":1,"$ip":"x"}}', '{"$set_once":1,"$ip":"x"}', None, None),
    "an escaped key": (
        '{"\\u0024set":{"v":1},"$se\\u0074_once":2,"\\u0024\\u0069p":"10.0.0.1"}',
        '{"v":1}',
        "2",
        "10.0.0.1",
    ),
    "an escaped key, capital hexadecimals": ('{"$set\\u005Fonce":1,"$set_\\u006Fnce":2}', None, "2", None),
    "an escaped key in every letter": ('{"\\u0024\\u0073\\u0065\\u0074":1,"$set_o\\u006E\\u0063e":2}', "1", "2", None),
    "spaces around colons": (
        '{ "$set" : {"a" : 1} , "$set_once":  "b"  ,"$ip" :"10.0.0.1" }',
        '{"a":1}',
        '"b"',
        "10.0.0.1",
    ),
    "newlines and tabs": (
        '{\n\t"$set":\r\n\t{\n"a":\t1}\n,\t"$set_once":\t1.50\n,"$ip":\n"10.0.0.1"\n}',
        '{"a":1}',
        "1.50",
        "10.0.0.1",
    ),
    "a space after the colon": ('{"$set": 1.50, "$set_once": null, "$ip": "10.0.0.1"}', "1.50", None, "10.0.0.1"),
    "the key's text inside a value": (r'{"a":"\"$set\":{\"v\":1}","b":"$set_once"}', None, None, None),
    "the key's text inside a value, and the key": (r'{"a":"send \"$set\":1","$set":2}', "2", None, None),
    "the key as a value": ('{"a":"$set","b":["$ip","$set_once"]}', None, None, None),
    "the key as a value, and the key": ('{"a":"$set","$set":2}', "2", None, None),
    "the key as its own value": ('{"$set":"$set","$ip":"$ip"}', '"$set"', None, "$ip"),
    "braces in a string": ('{"$set":"a{b","x":1}', '"a{b"', None, None),
    "braces in a string of an object": ('{"$set":{"v":"} , {][ "},"$set_once":"]}"}', '{"v":"} , {][ "}', '"]}"', None),
    "quotes in a string": (
        r'{"$set":{"v":"\"} , \"$set_once\":{"},"$ip":"a\"b"}',
        r'{"v":"\"} , \"$set_once\":{"}',
        None,
        'a"b',
    ),
    "a string that ends in a backslash": (r'{"$set":{"path":"C:\\"},"x":1}', r'{"path":"C:\\"}', None, None),
    "a scalar that ends in a backslash": (r'{"$set":"C:\\","$set_once":"\\\\","$ip":"\\"}', r'"C:\\"', r'"\\\\"', "\\"),
    "a backslash before a quote": (r'{"$set":"\\\"","x":"y"}', r'"\\\""', None, None),
    "a backslash that hides the next key": (r'{"$set":"a\\","y":"b","z":{}}', r'"a\\"', None, None),
    "escapes in a value": (r'{"$set":{"n":"Zo\u00eb \ud83d\ude80"}}', r'{"n":"Zoë 🚀"}', None, None),
    "plain text that looks like an escape": (r'{"$set":"\\u0000","$ip":"\\u0041"}', r'"\\u0000"', None, "\\u0041"),
    "deep": (f'{{"$set":{DEEP},"$set_once":1}}', DEEP, "1", None),
    "lookalikes": ('{"set":1,"$sets":2,"$set ":3,"$SET":4,"$set_":5,"$ip4":"x"}', None, None, None),
    "the longer key alone": ('{"$set_once":{"v":1}}', None, '{"v":1}', None),
    "the shorter key alone": ('{"$set":{"v":1}}', '{"v":1}', None, None),
    "an ip that is empty": ('{"$ip":""}', None, None, None),
    "an ip that is a number": ('{"$ip":127}', None, None, None),
    "an ip that is an object": ('{"$ip":{"v4":"10.0.0.1"}}', None, None, None),
    "an ip that is an array": ('{"$ip":["10.0.0.1"]}', None, None, None),
    "an ip that is true": ('{"$ip":true}', None, None, None),
    "an ip with escapes": (r'{"$ip":"10.0.0.4\u002f24","x":1}', None, None, "10.0.0.4/24"),
    "an ip with a tab": (r'{"$ip":"a\tb"}', None, None, "a\tb"),
    "an ip that stands twice": ('{"$ip":"10.0.0.1","$ip":"10.0.0.2"}', None, None, "10.0.0.2"),
    "an ip that ends in null": ('{"$ip":"10.0.0.1","$ip":null}', None, None, None),
    "an ip that ends empty": ('{"$ip":"10.0.0.1","$ip":""}', None, None, None),
    "an ip with spaces": ('{"$ip":" 10.0.0.1 "}', None, None, " 10.0.0.1 "),
    "an array": ('[{"$set":1,"$ip":"x"}]', None, None, None),
    "a string alone": ('"$set"', None, None, None),
    "a null alone": ("null", None, None, None),
}


def test_set_set_once_and_ip_are_those_of_the_document(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour, event=case, properties=row[0]) for case, row in DOCUMENTS.items()))
    assert run(export_of("events", target, hour), partition_key(hour)).error is None
    landed = landed_rows(
        target, "events", {name: DEFAULT[name] for name in ("event", "properties", "set", "set_once", "ip")}
    )
    expected = [
        (case, exact(properties or None), exact(set_), exact(set_once), ip)
        for case, (properties, set_, set_once, ip) in DOCUMENTS.items()
    ]
    assert differences(landed, expected) == {}


def test_random_documents_land_as_a_json_parser_reads_them(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    dice = random.Random(20261122)
    documents = {f"{number}": random_object(dice, depth=0) for number in range(2_500)}
    source.insert("events", *(event(hour, distinct_id=number, properties=text) for number, text in documents.items()))
    assert run(export_of("events", target, hour), partition_key(hour)).error is None
    landed = landed_rows(
        target, "events", {name: DEFAULT[name] for name in ("distinct_id", "properties", "set", "set_once", "ip")}
    )
    expected = [(number, exact(text), *special_keys(text)) for number, text in documents.items()]
    assert differences(landed, expected) == {}
    for column in (2, 3, 4):
        assert 200 < sum(row[column] is not None for row in expected) < 2_300

    query = MODELS["events"].query(Selection(TEAM, hour, hour + HOUR))
    [(suspects,)] = source.rows(f"SELECT countIf(suspect) FROM ({query.sql})", query.parameters)
    assert 500 < suspects < 2_000, "both ways of reading a document are taken"


def random_object(dice: random.Random, depth: int) -> str:
    """The text of a JSON object, spaced, escaped and keyed as no sane client would."""
    space = dice.choice(("", "", "", " ", "\n", "\t \r"))
    members = [
        f"{space}{random_key(dice)}{dice.choice(('', '', space))}:{dice.choice(('', space))}{random_value(dice, depth + 1)}"
        for _ in range(dice.randrange(6))
    ]
    return f"{{{f'{space},'.join(members)}{space}}}"


def random_key(dice: random.Random) -> str:
    if dice.random() < 0.35:
        return random_string(dice)
    key = dice.choice(("$set", "$set", "$set_once", "$set_once", "$ip", "$ip", "set", "$sets"))
    if dice.random() < 0.9:
        return f'"{key}"'
    place = dice.randrange(len(key))
    code = f"{ord(key[place]):04{dice.choice('xX')}}"
    return f'"{key[:place]}\\u{code}{key[place + 1 :]}"'


def random_value(dice: random.Random, depth: int) -> str:
    kind = dice.random()
    if depth < 4 and kind < 0.25:
        return random_object(dice, depth)
    if depth < 4 and kind < 0.35:
        return f"[{dice.choice((', ', ',')).join(random_value(dice, depth + 1) for _ in range(dice.randrange(4)))}]"
    if kind < 0.8:
        return random_string(dice)
    if kind < 0.9:
        return dice.choice(("1.50", "-0", "1e3", "1E-7", "1e400", "12345678901234567890123", "0.10", "-7", "0"))
    return dice.choice(("null", "null", "true", "false", '""'))


PIECES = (
    *("a", " ", "10.0.0.1", "$set", "$ip", ":", ",", "{", "}", "[", "]", "ü", "🚀", "null", "1"),
    *(r"\"", r"\\", r"\/", r"\n", r"\t", r"\u0041", r"\u0024", r"\ud83d\ude80", r"\\u0000", r"\"$set\":", r"\"$ip\":1"),
)


def random_string(dice: random.Random) -> str:
    return f'"{"".join(dice.choices(PIECES, k=dice.randrange(5)))}"'
