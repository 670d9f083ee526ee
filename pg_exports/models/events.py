"""events: one row for each event, in the interval in which ClickHouse received it.

`$set`, `$set_once` and `$ip` are cut out of `properties` by ClickHouse where its cheap text search is provably right:
the quoted key stands once in the document, at the top level, without escapes, and what the search cut out is JSON. The
query marks every other document as a suspect, and `finish` reads its text exactly.
"""

import functools
import re
from dataclasses import replace

import polars as pl

from pg_exports.models import as_read as as_reads
from pg_exports.models import filters, json_text
from pg_exports.models.model import (
    MORE_COLUMNS,
    Merge,
    Model,
    Query,
    Selection,
    integer,
    jsonb,
    text,
    timestamptz,
    varchar,
)
from pg_exports.models.model import (
    fingerprints as fingerprints_of,
)

# A key may be written with \uXXXX escapes of its letters; none of the searches below would see it.
_ESCAPED_LETTERS = ", ".join(
    f"'\\\\u{code}'" for code in sorted({f"{ord(letter):04x}" for letter in "$set_once$ip"} | {"005F", "006F", "006E"})
)


# AND evaluates each condition on a copy of the rows that are left: half the query's time, where most are. bitAnd does not,
# and `if` is for conditions that few rows need.
def _all(*conditions: str) -> str:
    return functools.reduce(lambda first, second: f"bitAnd({first}, {second})", conditions)


# The text search takes the quote after an escaped backslash for an escaped one: what it cuts out then is no JSON.
def _certain(key: str, raw: str) -> str:
    once = f"""countSubstrings(e.properties, '"{key}"') = 1"""
    return _all(once, f"JSONHas(e.properties, '{key}')", f"isValidJSON({raw})")


def _raw(key: str) -> str:
    return f"trim(BOTH ' \\t\\r\\n' FROM simpleJSONExtractRaw(e.properties, '{key}'))"


_IDENTITY = "cityHash64(e.event, cityHash64(e.distinct_id), cityHash64(e.uuid))"

# Of two copies of an event the one with the greater version is the newer: by `_timestamp`, then by `_offset`.
_VERSION = "bitOr(bitShiftLeft(toUInt128(toUnixTimestamp(e._timestamp)), 64), toUInt128(e._offset))"

_INTERVAL = """roundDown(
        toUnixTimestamp64Micro(toDateTime64(coalesce(e.inserted_at, e._timestamp), 6, 'UTC')),
        {boundaries:Array(Int64)}
    )"""

_FROM = """FROM events AS e
WHERE e.team_id = {team_id:Int64}
    AND coalesce(e.inserted_at, e._timestamp) >= {interval_start:DateTime64(6, 'UTC')}
    AND coalesce(e.inserted_at, e._timestamp) < {interval_end:DateTime64(6, 'UTC')} __EVENTS__"""

# The copies of events that a newer one replaces in their interval. Few columns are read for it; and of events that are there
# once, which are nearly all, they are read once. Milliseconds a million events: 80, and 180 if a tenth of them is there twice.
_OLDER_COPIES = f"""SELECT identity, interval_start, arrayJoin(arrayFilter(version -> version < newest, versions))
        FROM (
            SELECT
                {_IDENTITY} AS identity,
                {_INTERVAL} AS interval_start,
                groupUniqArray({_VERSION}) AS versions,
                arrayMax(versions) AS newest
            {_FROM}
                AND identity GLOBAL IN (
                    SELECT identity
                    FROM (
                        SELECT {_IDENTITY} AS identity, {_INTERVAL} AS interval_start
                        {_FROM}
                        GROUP BY identity, interval_start
                        HAVING count() > 1
                    )
                )
            GROUP BY identity, interval_start
        )"""

_CERTAIN = _all(
    f"""if(position(e.properties, '"$set"') = 0, 1, {_certain("$set", "raw_set")})""",
    f"""if(position(e.properties, '"$set_once"') = 0, 1, {_certain("$set_once", "raw_set_once")})""",
    f"""bitOr(position(e.properties, '"$ip"') = 0, {_certain("$ip", "raw_ip")})""",
    f"""if(position(e.properties, '\\\\u00') = 0, 1, NOT multiSearchAny(e.properties, [{_ESCAPED_LETTERS}]))""",
    "position(raw_ip, '\\\\') = 0",
)

# One row in each interval of a ReplacingMergeTree that holds an event twice: the same identity as the table's own sort key,
# and the newest copy, as the table itself keeps. (To sort by the version would hold all rows before the first is sent.) Of
# copies with equal versions any lands. Filters on properties look at the newest copy alone, as they will when ClickHouse
# has dropped the others.
SQL = f"""
WITH
    {_raw("$set")} AS raw_set,
    {_raw("$set_once")} AS raw_set_once,
    {_raw("$ip")} AS raw_ip
SELECT
    toString(e.uuid) AS uuid,
    e.event AS event,
    nullIf(e.properties, '') AS properties,
    if(empty(e.elements_chain), '"\\\\"\\\\""', toJSONString(toJSONString(e.elements_chain))) AS elements,
    nullIf(nullIf(raw_set, ''), 'null') AS set,
    nullIf(nullIf(raw_set_once, ''), 'null') AS set_once,
    e.distinct_id AS distinct_id,
    e.team_id AS team_id,
    if(startsWith(raw_ip, '"'), nullIf(substring(raw_ip, 2, length(raw_ip) - 2), ''), NULL) AS ip,
    CAST(NULL AS Nullable(String)) AS site_url,
    e.timestamp AS timestamp,
    toString(e.person_id) AS person_id,
    nullIf(e.person_properties, '') AS person_properties,
    e.elements_chain AS elements_chain,
    e.created_at AS created_at,
    toDateTime64(coalesce(e.inserted_at, e._timestamp), 6, 'UTC') AS inserted_at,
    {_IDENTITY} AS identity,
    cityHash64(identity, {_VERSION}) AS row_state,
    {_CERTAIN} = 0 AS suspect,
    {_INTERVAL} AS interval_start {MORE_COLUMNS}
{_FROM}
    AND (identity, interval_start, {_VERSION}) GLOBAL NOT IN (
        {_OLDER_COPIES}
    ) __PROPERTIES__
LIMIT 1 BY e.team_id, e.event, cityHash64(e.distinct_id), cityHash64(e.uuid), interval_start
"""

# Of the newest copies alone, as a merge of the table's parts drops the others and must not change a fingerprint.
FINGERPRINTS_SQL = fingerprints_of(f"""
    SELECT
        {_INTERVAL} AS interval_start,
        {_IDENTITY} AS identity,
        cityHash64(identity, max({_VERSION})) AS row_state
    {_FROM}
    GROUP BY interval_start, identity __NEWEST_PASSES__
""")

_DOCUMENTS: dict[filters.FilterType, str] = {"event": "e.properties", "person": "e.person_properties"}


def query(selection: Selection) -> Query:
    """Events that ClickHouse received in each interval, each identity once, in its newest copy."""
    return _query(SQL, selection)


def fingerprints(selection: Selection) -> Query:
    """The fingerprint of each of the intervals that the selection consists of, in one query."""
    return _query(FINGERPRINTS_SQL, selection)


def _query(sql: str, selection: Selection) -> Query:
    conditions, parameters = [], selection.parameters
    if selection.include_events:
        conditions.append("e.event IN {include_events:Array(String)}")
        parameters["include_events"] = list(selection.include_events)
    if selection.exclude_events:
        conditions.append("e.event NOT IN {exclude_events:Array(String)}")
        parameters["exclude_events"] = list(selection.exclude_events)
    # Behind the name, a large part of the table's sorting key: ClickHouse reads about a part's share of the rows.
    part = selection.part.condition("cityHash64(e.distinct_id)")
    events = "".join(f"\n    AND {condition}" for condition in conditions) + part
    on_properties = filters.conditions(selection.filters, _DOCUMENTS)
    passes = "".join(f"\n    AND {condition}" for condition in on_properties.sql)
    newest_passes = f"\n    HAVING argMax(1{passes}, {_VERSION})" if passes else ""
    for place, written in (("EVENTS", events), ("PROPERTIES", passes), ("NEWEST_PASSES", newest_passes)):
        sql = sql.replace(f" __{place}__", written)
    return Query(sql, parameters | on_properties.parameters)


def finish(frame: pl.DataFrame) -> pl.DataFrame:
    """Read `$set`, `$set_once` and `$ip` of the suspect documents from their text; drop the mark."""
    if "suspect" not in frame.columns:
        return frame
    suspects = frame["suspect"].cast(pl.Boolean)
    frame = frame.drop("suspect")
    if not suspects.any():
        return frame
    rows = suspects.arg_true().to_list()
    as_read = as_reads.originals(frame)
    values: list[tuple[str | None, ...]] = []
    for row, document in zip(rows, frame["properties"].gather(rows), strict=True):
        fitting = _set_values(document or "")
        values.append(tuple(value and _SURROGATE.sub("\ufffd", value) for value in fitting))
        original = as_read.pop(row, {})
        were = _set_values(str(original["properties"])) if "properties" in original else fitting
        if original or were != values[-1]:
            changed = {name: was for name, value, was in zip(_CUT_OUT, values[-1], were, strict=True) if was != value}
            as_read[row] = {name: was for name, was in original.items() if name not in _CUT_OUT} | changed
    exact = pl.DataFrame(values, schema=dict.fromkeys(_CUT_OUT, pl.String), orient="row")
    cut_out = [name for name in _CUT_OUT if name in frame.columns]
    frame = frame.with_columns(frame[name].scatter(rows, exact[name]) for name in cut_out)
    return as_reads.with_originals(frame, as_read)


_CUT_OUT = ("set", "set_once", "ip")

# Half a surrogate pair: a text that is cut out may hold one, a frame may not.
_SURROGATE = re.compile("[\ud800-\udfff]")


_read = json_text.reader(("$set", "$set_once", "$ip"))


def _set_values(document: str) -> tuple[str | None, str | None, str | None]:
    set_, set_once, ip = _read(document)
    return (
        _not_null(set_),
        _not_null(set_once),
        json_text.unescaped(ip) or None if ip and ip.startswith('"') else None,
    )


def _not_null(raw: str | None) -> str | None:
    return None if raw == "null" else raw


EVENTS = Model(
    name="events",
    description="Every event that ClickHouse received in the interval, late ones included.",
    columns=(
        varchar("uuid", "events.uuid"),
        varchar("event", "events.event"),
        jsonb("properties", "events.properties"),
        jsonb("elements", "events.elements_chain"),
        jsonb("set", "events.properties"),
        jsonb("set_once", "events.properties"),
        varchar("distinct_id", "events.distinct_id"),
        integer("team_id", "events.team_id"),
        varchar("ip", "events.properties"),
        varchar("site_url"),
        timestamptz("timestamp", "events.timestamp"),
        text("person_id", "events.person_id", optional=True),
        jsonb("person_properties", "events.person_properties", optional=True),
        text("elements_chain", "events.elements_chain", optional=True),
        timestamptz("created_at", "events.created_at", optional=True),
        timestamptz("inserted_at", "events.inserted_at", "events._timestamp", optional=True),
    ),
    key=("uuid", "event", "distinct_id", "team_id"),
    merge=None,
    query=query,
    fingerprints=fingerprints,
    finish=finish,
    needs=dict.fromkeys(_CUT_OUT, ("properties", "suspect")),
    filter_types=tuple(_DOCUMENTS),
    timestamps=("timestamp", "timestamp"),
    source_tables=("events",),
)


MERGED_EVENTS = replace(
    EVENTS,
    columns=tuple(
        replace(column, optional=column.optional and column.name != "inserted_at") for column in EVENTS.columns
    ),
    merge=Merge(version=("inserted_at",)),
)
"""The same with each event once in the table: of one that was sent again, in whatever interval, the newest."""
