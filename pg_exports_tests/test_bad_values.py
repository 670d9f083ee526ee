"""Values that ClickHouse holds and Postgres does not, from one to the other: repaired, set aside or named, never lost."""

import json
import re
import resource
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pytest

from pg_exports.interval import OnBadRows
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.models.comparison import exact
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

DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000

# Properties, and what lands of them; "refused" is what no repair makes JSONB. A \udcXX is the byte XX alone.
SAME, REFUSED = "same", "refused"
DOCUMENTS: Mapping[str, tuple[str, str | None]] = {
    "a NUL in an escape": (r'{"a":"x\u0000y"}', '{"a":"x\ufffdy"}'),
    "a raw NUL": ('{"a":"x\0y"}', '{"a":"x\ufffdy"}'),
    "a NUL in a key": (r'{"\u0000":1}', '{"\ufffd":1}'),
    "half a pair, the first": (r'{"a":"\ud83d!"}', '{"a":"\ufffd!"}'),
    "half a pair, the second": (r'{"a":"\uDE80"}', '{"a":"\ufffd"}'),
    "a pair the wrong way round": (r'{"a":"\ude80\ud83d"}', '{"a":"\ufffd\ufffd"}'),
    "half a pair before a pair": (r'{"a":"\ud83d\ud83d\ude80"}', '{"a":"\ufffd🚀"}'),
    "a backslash before u0000": (r'{"a":"\\u0000"}', SAME),
    "two backslashes before \\u0000": (r'{"a":"\\\u0000"}', '{"a":"\\\\\ufffd"}'),
    "a byte that is no UTF-8": ('{"a":"x\udcffy"}', '{"a":"x\ufffdy"}'),
    "the beginning of a character": ('{"a":"\udcf0\udc9f\udc9ay"}', '{"a":"\ufffdy"}'),
    "a surrogate as bytes": ('{"a":"\udced\udca0\udcbd"}', '{"a":"\ufffd\ufffd\ufffd"}'),
    "wrong bytes and a NUL": ('{"\udcff":"\\u0000\udcc3"}', '{"\ufffd":"\ufffd\ufffd"}'),
    "U+FFFD itself": ('{"a":"\ufffd"}', SAME),
    "the greatest number": ('{"a":1e131071}', SAME),
    "the least number": ('{"a":1e-16383}', SAME),
    "no document": ("", None),
    "null": ("null", SAME),
    "20,000 deep": (DEEP, REFUSED),
    "NaN": ('{"a":NaN}', REFUSED),
    "Infinity": ('{"a":-Infinity}', REFUSED),
    "a number too great": ('{"a":1e200000}', REFUSED),
    "a number too small": ('{"a":1e-16384}', REFUSED),
    "a control character": ('{"a":"x\x01y"}', REFUSED),
    "a tab and a newline": ('{"a":"x\ty\n"}', REFUSED),
    "a byte order mark": ('\ufeff{"a":1}', REFUSED),
    "no JSON": ("{'a':1}", REFUSED),
    "half a document": ('{"a":[1,2', REFUSED),
    "a document and a half": ('{"a":1}{', REFUSED),
    "an escape that JSON lacks": (r'{"a":"\x00"}', REFUSED),
    "only a wrong byte": ("\udc80", REFUSED),
    "a wrong byte behind a backslash": ('{"a":"\\\udcff"}', REFUSED),
}
REPAIRED = {name for name, (_, lands) in DOCUMENTS.items() if lands not in (SAME, REFUSED, None)}
WRONG_BYTES = {name for name, (text, _) in DOCUMENTS.items() if re.search("[\ud800-\udfff]", text)}
UNHOLDABLE = {name for name, (_, lands) in DOCUMENTS.items() if lands == REFUSED}


def insert(source: Source, table: str, *rows: Mapping[str, object]) -> None:
    """Insert rows, each text with the byte XX in place of a \\udcXX."""
    source.insert(table, *({name: _bytes(value) for name, value in row.items()} for row in rows))


def _bytes(value: object) -> object:
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def counts(run: Run) -> tuple[int, int, int, int]:
    """Rows at the source, inserted, repaired and rejected."""
    assert run.error is None
    [metadata] = run.metadata.values()
    return tuple(metadata[f"rows_{name}"] for name in ("at_source", "inserted", "repaired", "rejected"))


def aside(target: Target) -> dict[str, tuple[str | None, str, dict[str, Any]]]:
    """Rejected rows by event, distinct_id or session: column, reason and the row as it was."""
    kept = target.rows("SELECT column_name, reason, row_as_it_was FROM pg_exports_rejected WHERE resolved_at IS NULL")
    rows = [(column, reason, json.loads(row)) for column, reason, row in kept]
    return {row[2].get("event") or row[2].get("session_id") or row[2]["distinct_id"]: row for row in rows}


def landed(target: Target, columns: str, table: str = "events") -> dict[str, tuple[Any, ...]]:
    return {row[0]: row[1:] for row in target.rows(f"SELECT {columns} FROM {table}")}


def documents(target: Target) -> dict[str, Any]:
    """What landed, by event."""
    rows = target.rows("SELECT event, properties::text FROM events")
    return {event: exact(properties) for event, properties in rows}


def expected(names: set[str]) -> dict[str, Any]:
    wanted = {name: DOCUMENTS[name][0] if DOCUMENTS[name][1] == SAME else DOCUMENTS[name][1] for name in names}
    return {name: exact(text or None) for name, text in wanted.items()}


@pytest.mark.parametrize("on_bad_rows", ["repair", "reject"])
def test_every_document_lands_as_it_is_or_repaired_or_is_set_aside_as_it_was(
    on_bad_rows: OnBadRows, source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert(source, "events", *(event(hour, event=name, properties=text) for name, (text, _) in DOCUMENTS.items()))
    rejected = UNHOLDABLE | (REPAIRED if on_bad_rows == "reject" else set())
    good = set(DOCUMENTS) - rejected
    done = run(export_of("events", target, hour, on_bad_rows=on_bad_rows), partition_key(hour))
    assert counts(done) == (len(DOCUMENTS), len(good), len(REPAIRED & good), len(rejected))
    assert documents(target) == expected(good)
    kept = aside(target)
    assert set(kept) == rejected
    for name, (column, reason, row) in kept.items():
        assert row["properties"] == DOCUMENTS[name][0]
        assert column == "properties"
        assert "properties" in reason or "stack depth" in reason


def test_with_fail_each_bad_document_is_named_and_no_row_of_its_interval_is_written(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    names = ("a NUL in an escape", "a byte that is no UTF-8", "20,000 deep", "a number too great")
    export = export_of("events", target, hour, on_bad_rows="fail")
    for n, name in enumerate(names):
        begin = hour - n * HOUR
        insert(source, "events", event(begin), event(begin, event=name, properties=DOCUMENTS[name][0]), event(begin))
        error = run(export, partition_key(begin)).error
        assert error is not None
        assert json.dumps(name) in error
        assert "properties" in error or "stack depth" in error
    assert (target.count("events"), target.count("pg_exports_rejected")) == (0, 0)


# $set, $set_once and $ip in documents that ClickHouse's JSON functions refuse


def test_set_and_ip_of_documents_that_clickhouse_cannot_read_are_never_null(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    members = '"$set":{"v":1.50},"$set_once":"b","$ip":"10.0.0.1"'
    refused = {
        "a surrogate": (r'{"x":"\ud800",%s}', True),
        "a wrong byte": ('{"x":"\udcff",%s}', True),
        "a wrong byte behind": ('{%s,"x":"\udcff"}', True),
        "a wrong byte in a key": ('{"$se\udcfft":2,%s}', True),
        "a raw NUL": ('{"x":"\0",%s}', True),
        "a great number": ('{"x":1e400,%s}', True),
        "deeper than simdjson goes": ('{"x":' + "[" * 2_000 + "]" * 2_000 + ",%s}", True),
    }
    insert(
        source, "events", *(event(hour, event=name, properties=text % members) for name, (text, _) in refused.items())
    )
    done = run(export_of("events", target, hour), partition_key(hour))
    assert counts(done)[3] == 0
    assert landed(target, "event, set::text, set_once::text, ip") == dict.fromkeys(
        refused, ('{"v": 1.50}', '"b"', "10.0.0.1")
    )


def test_wrong_bytes_in_set_and_ip_are_repaired_like_those_around_them(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert(
        source,
        "events",
        event(hour, event="set", properties='{"$set":{"a":"\udcf0\udc9f!"},"$set_once":"\udcff"}'),
        event(hour, event="set twice", properties='{"$set":{"a":"\udcff"},"$set":{"a":"\udcfe!"}}'),
        event(hour, event="ip", properties='{"$ip":"10.\udcff.1"}'),
        event(hour, event="escaped ip", properties=r'{"$ip":"10.\ud800\u0000.1"}'),
    )
    done = run(export_of("events", target, hour), partition_key(hour))
    assert counts(done) == (4, 4, 4, 0)
    assert landed(target, "event, set->>'a', set_once::text, ip") == {
        "set": ("\ufffd!", '"\ufffd"', None),
        "set twice": ("\ufffd!", None, None),
        "ip": (None, None, "10.\ufffd.1"),
        "escaped ip": (None, None, "10.\ufffd\ufffd.1"),
    }


@pytest.mark.parametrize("on_bad_rows", ["repair", "reject"])
def test_what_was_cut_out_of_a_document_counts_even_where_the_table_lacks_the_document(
    on_bad_rows: OnBadRows, source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(
        "CREATE TABLE events (uuid text, event text, set jsonb, ip text)", f"GRANT INSERT, SELECT ON events TO {ROLE}"
    )
    insert(
        source,
        "events",
        event(hour, event="elsewhere", properties='{"x":"\udcff","$set":1}', person_properties="\udcff"),
        event(hour, event="set", properties='{"$set":0,"$set":"\udcff"}'),
        event(hour, event="overwritten set", properties='{"$set":"\udcff","$set":1}'),
        event(hour, event="ip", properties=r'{"$ip":"\ud800"}'),
    )
    done = run(export_of("events", target, hour, on_bad_rows=on_bad_rows), partition_key(hour))
    if on_bad_rows == "repair":
        assert counts(done) == (4, 4, 2, 0)
        assert landed(target, "event, set::text, ip") == {
            "elsewhere": ("1", None),
            "set": ('"\ufffd"', None),
            "overwritten set": ("1", None),
            "ip": (None, "\ufffd"),
        }
    else:
        assert counts(done) == (4, 2, 0, 2)
        assert {name: (row[0], row[2][row[0] or ""]) for name, row in aside(target).items()} == {
            "set": ("set", '"\udcff"'),
            "ip": ("ip", "\ud800"),
        }


# Texts


@pytest.mark.parametrize("on_bad_rows", ["repair", "reject"])
def test_texts_that_are_no_texts_are_repaired_or_set_aside_as_they_were(
    on_bad_rows: OnBadRows, source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    bad = ("nul\0", "byte\udcff", "half a rocket\udcf0\udc9f", "latin \udce9t\udce9")
    insert(
        source,
        "events",
        event(hour, event="good", distinct_id="🦔 \ufeff\x01 é"),
        *(event(hour, event=text, elements_chain=text) for text in bad),
        event(hour, event="person", distinct_id="\udcff\0"),
    )
    done = run(export_of("events", target, hour, on_bad_rows=on_bad_rows), partition_key(hour))
    if on_bad_rows == "repair":
        assert counts(done) == (6, 6, 5, 0)
        assert landed(target, "event, distinct_id, elements #>> '{}'") == {
            "good": ("🦔 \ufeff\x01 é", '""'),
            "nul\ufffd": ("a", r'"nul\u0000"'),
            **{text: ("a", f'"{text}"') for text in ("byte\ufffd", "half a rocket\ufffd", "latin \ufffdt\ufffd")},
            "person": ("\ufffd\ufffd", '""'),
        }
    else:
        assert counts(done) == (6, 1, 0, 5)
        assert set(aside(target)) == {*bad, "person"}
        assert aside(target)["person"][2]["distinct_id"] == "\udcff\0"


def test_a_text_that_is_too_long_is_set_aside_whatever_is_repaired(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert(
        source,
        "events",
        event(hour, event="x" * 201),
        event(hour, event="\udcff" * 201),
        event(hour, event="\udcff" * 200, distinct_id="fits"),
        event(hour, event="é" * 200, distinct_id="é" * 200),
    )
    assert counts(run(export_of("events", target, hour), partition_key(hour))) == (4, 2, 1, 2)
    assert set(aside(target)) == {"x" * 201, "\udcff" * 201}


def test_two_keys_that_only_wrong_bytes_tell_apart_are_set_aside_and_never_merged_into_one(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert(source, "person", person(hour, uuid.UUID(int=1), 1, properties='{"a":"\udcff"}'))
    keys = ("a\udcff", "a\udcfe", "a\0", "good")
    insert(source, "person_distinct_id2", *(mapping(hour, key, uuid.UUID(int=1)) for key in keys))
    assert counts(run(export_of("persons", target, hour), partition_key(hour))) == (4, 1, 1, 3)
    assert landed(target, "distinct_id, properties->>'a'", "persons") == {"good": ("\ufffd",)}
    kept = aside(target)
    assert set(kept) == set(keys[:3])
    assert {row[0] for row in kept.values()} == {"distinct_id"}


@pytest.mark.parametrize("on_bad_rows", ["repair", "reject"])
def test_wrong_bytes_in_a_sessions_urls_are_repaired_in_their_places(
    on_bad_rows: OnBadRows, source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    good, bad = new_session(hour), new_session(hour)
    urls = ["https://a.b/ok", "https://a.b/BYTE/c?d"]
    insert_sessions(source, session(good, hour, urls=urls[:1]), session(bad, hour, urls=urls, entry_url=urls[1]))
    source.execute("RENAME TABLE raw_sessions TO all_sessions")
    source.execute(
        "CREATE VIEW raw_sessions AS SELECT * REPLACE (arrayMap(url -> replaceAll(url, 'BYTE', unhex('FF')), urls) AS urls)"
        " FROM all_sessions"
    )
    done = run(export_of("sessions", target, hour, on_bad_rows=on_bad_rows), partition_key(hour))
    if on_bad_rows == "repair":
        assert counts(done) == (2, 2, 1, 0)
        [(lists,)] = target.rows(f"SELECT urls FROM sessions WHERE session_id = '{bad}'")
        assert sorted(lists) == ["https://a.b/ok", "https://a.b/\ufffd/c?d"]
    else:
        assert counts(done) == (2, 1, 0, 1)
        [(column, _, row)] = aside(target).values()
        assert (column, sorted(row["urls"])) == ("urls", ["https://a.b/ok", "https://a.b/\udcff/c?d"])


# Numbers


@pytest.mark.parametrize("on_bad_rows", ["repair", "reject", "fail"])
def test_numbers_past_their_columns_are_set_aside_or_named_with_their_digits(
    on_bad_rows: OnBadRows, source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    versions = {"integer": 2**31, "most of 64 bits": 2**63 - 1, "past 64 bits": 2**63, "greatest": 2**64 - 1, "good": 7}
    for n, (name, version) in enumerate(versions.items(), 1):
        source.insert("person", person(hour, uuid.UUID(int=n), version))
        source.insert("person_distinct_id2", mapping(hour, name, uuid.UUID(int=n)))
    export = export_of("persons", target, hour, on_bad_rows=on_bad_rows)
    done = run(export, partition_key(hour))
    if on_bad_rows == "fail":
        assert done.error is not None
        assert "Column person_version" in done.error
        assert target.count("persons") == 0
        return
    assert counts(done) == (5, 1, 0, 4)
    kept = aside(target)
    assert {name: kept[name][2]["person_version"] for name in kept} == {
        name: version for name, version in versions.items() if name != "good"
    }
    assert "TYPE BIGINT" in kept["most of 64 bits"][1]
    assert "person_version holds 18446744073709551615" in kept["greatest"][1]
    target.execute("ALTER TABLE persons ALTER COLUMN person_version TYPE bigint")
    again = run(export, partition_key(hour))
    assert counts(again) == (5, 2, 0, 2)
    assert set(aside(target)) == {"past 64 bits", "greatest"}


# Rows that the table's own rules refuse


@pytest.mark.parametrize("on_bad_rows", ["repair", "reject", "fail"])
def test_rows_that_the_tables_constraints_refuse_are_set_aside_or_named(
    on_bad_rows: OnBadRows, source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(
        "CREATE TABLE events (uuid text, event text CHECK (event <> 'no'), distinct_id text UNIQUE,"
        ' "timestamp" timestamptz, team_id int, properties jsonb) PARTITION BY LIST (team_id)'.replace(" UNIQUE", ""),
        'CREATE TABLE mine PARTITION OF events FOR VALUES IN (1) PARTITION BY RANGE ("timestamp")',
        f"CREATE TABLE recent PARTITION OF mine FOR VALUES FROM ('{hour - HOUR}') TO ('{hour + HOUR}')",
        "CREATE UNIQUE INDEX ON recent (distinct_id)",
        f"GRANT INSERT, SELECT ON events TO {ROLE}",
    )
    names = {"no": "check constraint", "no partition": "no partition of relation", "twice": "duplicate key value"}
    insert(
        source,
        "events",
        event(hour, event="good", distinct_id="COPY events, line 1"),
        event(hour, event="no", distinct_id="COPY events, line 1, column event"),
        event(hour, event="no partition", distinct_id="c", timestamp=hour + 5 * HOUR),
        event(hour, event="first", distinct_id="COPY events, line 2"),
        event(hour, event="last", distinct_id="d", properties=r'{"a": "\u0000"}'),
    )
    # By itself: of the same event twice either one is the second.
    insert(source, "events", event(hour, event="twice", distinct_id="COPY events, line 2"))
    done = run(export_of("events", target, hour, on_bad_rows=on_bad_rows), partition_key(hour))
    if on_bad_rows == "fail":
        assert done.error is not None
        assert target.count("events") == 0
        return
    repaired = int(on_bad_rows == "repair")
    assert counts(done) == (6, 2 + repaired, repaired, 4 - repaired)
    kept = aside(target)
    assert len(kept) == 4 - repaired
    for name in kept.keys() & names.keys():
        assert names[name] in kept[name][1]
    assert {"no", "no partition"} < set(kept)
    assert len({"first", "twice"} & set(kept)) == 1


def test_a_row_that_is_repaired_and_then_refused_counts_once_as_rejected_and_is_kept_as_it_was(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert(
        source,
        "events",
        event(hour, event="both", properties='{"a": "\udcff\\u0000", "b": NaN}'),
        event(hour, event="repaired", properties=r'{"a": "\u0000"}'),
    )
    assert counts(run(export_of("events", target, hour), partition_key(hour))) == (2, 1, 1, 1)
    assert aside(target)["both"][2]["properties"] == '{"a": "\udcff\\u0000", "b": NaN}'


# What is much


def test_a_json_text_over_256_megabytes_is_about_its_row(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour, event="good"))
    source.execute(
        "INSERT INTO events (uuid, event, properties, timestamp, team_id, distinct_id, _timestamp, inserted_at)"
        " SELECT generateUUIDv4(), 'great', concat('{\"a\":\"', repeat(repeat('x', 1000000), 269), '\"}'), timestamp, team_id,"
        " distinct_id, _timestamp, inserted_at FROM events"
    )
    # Setting it aside takes ten seconds more: Postgres compresses it.
    error = run(export_of("events", target, hour, on_bad_rows="fail"), partition_key(hour)).error
    assert error is not None
    assert "at its column properties: a limit of Postgres's is exceeded (SQLSTATE 54000)" in error
    assert '"great"' in error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20
