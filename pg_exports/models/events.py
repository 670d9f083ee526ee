"""events: one row for each event, in the interval in which ClickHouse received it.

`$set`, `$set_once` and `$ip` are cut out of `properties` by ClickHouse where its cheap text search is provably right:
the quoted key stands once in the document, at the top level, without escapes, and what the search cut out is JSON. The
query marks every other document as a suspect, and `finish` reads its text exactly.
"""

import polars as pl

from pg_exports.models import json_text
from pg_exports.models.model import Model, Query, Selection, integer, jsonb, text, timestamptz, varchar

# A key may be written with \uXXXX escapes of its letters; none of the searches below would see it.
_ESCAPED_LETTERS = ", ".join(
    f"'\\\\u{code}'" for code in sorted({f"{ord(letter):04x}" for letter in "$set_once$ip"} | {"005F", "006F", "006E"})
)


# The text search takes the quote after an escaped backslash for an escaped one: what it cuts out then is no JSON.
def _certain(key: str, raw: str) -> str:
    return f"""(
        countSubstrings(e.properties, '"{key}"') = 0
        OR (
            countSubstrings(e.properties, '"{key}"') = 1
            AND JSONHas(e.properties, '{key}')
            AND isValidJSON({raw})
        )
    )"""


def _raw(key: str) -> str:
    return f"trim(BOTH ' \\t\\r\\n' FROM simpleJSONExtractRaw(e.properties, '{key}'))"


# One row of a ReplacingMergeTree that holds an event twice: the same identity as the table's own sort key.
SQL = f"""
WITH
    {_raw("$set")} AS raw_set,
    {_raw("$set_once")} AS raw_set_once,
    {_raw("$ip")} AS raw_ip
SELECT
    toString(e.uuid) AS uuid,
    e.event AS event,
    nullIf(e.properties, '') AS properties,
    toJSONString(toJSONString(e.elements_chain)) AS elements,
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
    NOT (
        {_certain("$set", "raw_set")}
        AND {_certain("$set_once", "raw_set_once")}
        AND {_certain("$ip", "raw_ip")}
        AND NOT multiSearchAny(e.properties, [{_ESCAPED_LETTERS}])
        AND position(raw_ip, '\\\\') = 0
    ) AS suspect
FROM events AS e
WHERE e.team_id = {{team_id:Int64}}
    AND coalesce(e.inserted_at, e._timestamp) >= {{interval_start:DateTime64(6, 'UTC')}}
    AND coalesce(e.inserted_at, e._timestamp) < {{interval_end:DateTime64(6, 'UTC')}}
    __EVENT_FILTERS__
LIMIT 1 BY e.team_id, e.event, cityHash64(e.distinct_id), cityHash64(e.uuid)
"""


def query(selection: Selection) -> Query:
    """Events that ClickHouse received in the interval, each identity once."""
    filters, parameters = [], selection.parameters
    if selection.include_events:
        filters.append("AND e.event IN {include_events:Array(String)}")
        parameters["include_events"] = list(selection.include_events)
    if selection.exclude_events:
        filters.append("AND e.event NOT IN {exclude_events:Array(String)}")
        parameters["exclude_events"] = list(selection.exclude_events)
    return Query(SQL.replace("    __EVENT_FILTERS__\n", "".join(f"    {line}\n" for line in filters)), parameters)


def finish(frame: pl.DataFrame) -> pl.DataFrame:
    """Read `$set`, `$set_once` and `$ip` of the suspect documents from their text; drop the mark."""
    suspects = frame["suspect"].cast(pl.Boolean)
    if not suspects.any():
        return frame.drop("suspect")
    rows = suspects.arg_true()
    exact = pl.DataFrame(
        [_set_values(document or "") for document in frame["properties"].gather(rows)],
        schema={"set": pl.String, "set_once": pl.String, "ip": pl.String},
        orient="row",
    )
    return frame.drop("suspect").with_columns(frame[name].scatter(rows, exact[name]) for name in exact.columns)


def _set_values(document: str) -> tuple[str | None, str | None, str | None]:
    members = json_text.members(document)
    ip = members.get("$ip", "")
    return (
        _not_null(members.get("$set")),
        _not_null(members.get("$set_once")),
        json_text.unescaped(ip) or None if ip.startswith('"') else None,
    )


def _not_null(raw: str | None) -> str | None:
    return None if raw == "null" else raw


EVENTS = Model(
    name="events",
    description="Every event that ClickHouse received in the interval, late ones included.",
    columns=(
        varchar("uuid"),
        varchar("event"),
        jsonb("properties"),
        jsonb("elements"),
        jsonb("set"),
        jsonb("set_once"),
        varchar("distinct_id"),
        integer("team_id"),
        varchar("ip"),
        varchar("site_url"),
        timestamptz("timestamp"),
        text("person_id", optional=True),
        jsonb("person_properties", optional=True),
        text("elements_chain", optional=True),
        timestamptz("created_at", optional=True),
        timestamptz("inserted_at", optional=True),
    ),
    key=("uuid", "event", "distinct_id", "team_id"),
    merge=None,
    query=query,
    finish=finish,
)
