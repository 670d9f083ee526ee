"""Rows to insert into the source tables: a plain one of each, with whatever a test wants otherwise. And exports of them, and
a table for them."""

import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pg_exports import PostgresExport
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import TEAM, Source, Target

HOUR = timedelta(hours=1)
MICROSECOND = timedelta(microseconds=1)

BY_MONTH = (
    'CREATE TABLE events (uuid text, event text, "timestamp" timestamptz, distinct_id text, team_id int)'
    ' PARTITION BY RANGE ("timestamp")',
    "CREATE TABLE june PARTITION OF events FOR VALUES FROM ('2026-06-01') TO ('2026-07-01')",
    "CREATE TABLE others PARTITION OF events DEFAULT",
    f"GRANT INSERT, SELECT ON events TO {ROLE}",
)
"""A destination for events in partitions, of which one has the rows of June and one all others."""


def export_of(model: str, target: Target, hour: datetime, **changes: Any) -> PostgresExport:
    """An hourly export into the test's schema that begins a day and a half before `hour`."""
    settings: dict[str, Any] = {"model": model, "team_id": TEAM, "schema": target.schema, "start": hour - 36 * HOUR}
    return PostgresExport(**(settings | changes))


def event(inserted_at: datetime, /, **changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "uuid": uuid.uuid4(),
        "event": "$pageview",
        "properties": "{}",
        "timestamp": inserted_at,
        "team_id": TEAM,
        "distinct_id": "a",
        "elements_chain": "",
        "created_at": inserted_at,
        "person_id": uuid.uuid4(),
        "person_properties": "{}",
        "_timestamp": inserted_at,
        "_offset": 0,
        "inserted_at": inserted_at,
    }
    return row | changes


def person(inserted_at: datetime, person_id: uuid.UUID, version: int, /, **changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "id": person_id,
        "created_at": inserted_at,
        "team_id": TEAM,
        "properties": json.dumps({"version": version}),
        "is_identified": 0,
        "is_deleted": 0,
        "version": version,
        "_timestamp": inserted_at,
        "_offset": 0,
    }
    return row | changes


def mapping(
    inserted_at: datetime, distinct_id: str, person_id: uuid.UUID, version: int = 0, /, **changes: object
) -> dict[str, object]:
    row: dict[str, object] = {
        "team_id": TEAM,
        "distinct_id": distinct_id,
        "person_id": person_id,
        "is_deleted": 0,
        "version": version,
        "_timestamp": inserted_at,
        "_offset": 0,
        "_partition": 0,
    }
    return row | changes


INITIAL = (
    "referring_domain",
    "utm_source",
    "utm_medium",
    "utm_campaign",
    "utm_term",
    "utm_content",
    "gclid",
    "gad_source",
    "gclsrc",
    "dclid",
    "gbraid",
    "wbraid",
    "fbclid",
    "msclkid",
    "twclid",
    "li_fat_id",
    "mc_cid",
    "igshid",
    "ttclid",
    "_kx",
    "irclid",
)
"""The states `initial_*` of raw_sessions."""


ROWS_A_PARAMETER = 25
"""A query's parameters travel in its URL, which may have 64 KB."""


def new_session(started: datetime) -> uuid.UUID:
    """A UUIDv7 that carries a session's beginning."""
    milliseconds = int(started.timestamp() * 1000)
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | uuid.uuid4().int & (1 << 76) - 1 & ~(3 << 62) | 2 << 62)


def session(session_id: uuid.UUID, inserted_at: datetime, /, **changes: object) -> dict[str, object]:
    """What one batch of a session's events adds to it. Pageviews and the like are uuids of events."""
    row: dict[str, object] = {
        "session_id": session_id,
        "team_id": TEAM,
        "distinct_id": "a",
        "started": inserted_at,
        "ended": inserted_at,
        "inserted_at": inserted_at,
        "urls": [],
        "entry_url": "",
        "end_url": "",
        "last_external_click_url": "",
        "pageviews": [],
        "autocaptures": [],
        "screens": [],
        "vitals_lcp": None,
        **{f"initial_{name}": "" for name in INITIAL},
    }
    return row | changes


_SESSION_TYPES = (
    "Tuple(session_id UUID, team_id Int64, distinct_id String, started Int64, ended Int64, inserted_at Int64,"
    " urls Array(String), entry_url String, end_url String, last_external_click_url String,"
    " pageviews Array(Nullable(UUID)), autocaptures Array(Nullable(UUID)), screens Array(Nullable(UUID)),"
    f" vitals_lcp Nullable(Float64), {', '.join(f'initial_{name} String' for name in INITIAL)})"
)

_INSERT_SESSIONS = f"""
INSERT INTO raw_sessions (
    team_id, session_id_v7, distinct_id, min_timestamp, max_timestamp, max_inserted_at, urls,
    entry_url, end_url, last_external_click_url, {", ".join(f"initial_{name}" for name in INITIAL)},
    pageview_uniq, autocapture_uniq, screen_uniq, page_screen_autocapture_uniq_up_to, vitals_lcp)
SELECT
    row.team_id,
    toUInt128(row.session_id),
    initializeAggregation('argMaxState', row.distinct_id, fromUnixTimestamp64Micro(row.ended, 'UTC')),
    fromUnixTimestamp64Micro(row.started, 'UTC'),
    fromUnixTimestamp64Micro(row.ended, 'UTC'),
    fromUnixTimestamp64Micro(row.inserted_at, 'UTC'),
    row.urls,
    initializeAggregation('argMinState', row.entry_url, fromUnixTimestamp64Micro(row.started, 'UTC')),
    initializeAggregation('argMaxState', row.end_url, fromUnixTimestamp64Micro(row.ended, 'UTC')),
    initializeAggregation('argMaxState', row.last_external_click_url, fromUnixTimestamp64Micro(row.ended, 'UTC')),
    {
    ", ".join(
        f"initializeAggregation('argMinState', row.initial_{name}, fromUnixTimestamp64Micro(row.started, 'UTC'))"
        for name in INITIAL
    )
},
    arrayReduce('uniqState', row.pageviews),
    arrayReduce('uniqState', row.autocaptures),
    arrayReduce('uniqState', row.screens),
    arrayReduce('uniqUpToState(1)', arrayConcat(row.pageviews, row.autocaptures, row.screens)),
    initializeAggregation('argMinState', row.vitals_lcp, fromUnixTimestamp64Micro(row.started, 'UTC'))
FROM (SELECT arrayJoin(JSONExtract({{rows:String}}, 'Array({_SESSION_TYPES})')) AS row)
"""


def insert_sessions(source: Source, *rows: Mapping[str, object]) -> None:
    """Insert rows of `session`, each as a part of the session's states."""
    for first in range(0, len(rows), ROWS_A_PARAMETER):
        batch = [_plain(row) for row in rows[first : first + ROWS_A_PARAMETER]]
        source.execute(_INSERT_SESSIONS, {"rows": json.dumps(batch)})


def _plain(row: Mapping[str, object]) -> dict[str, object]:
    """The row without what is empty, which is what JSONExtract puts in its place."""
    return {name: _value(value) for name, value in row.items() if value not in ("", [], None)}


def _value(value: object) -> object:
    if isinstance(value, datetime):
        return microseconds(value)
    if isinstance(value, list):
        return [_value(item) for item in value]
    return str(value) if isinstance(value, uuid.UUID) else value


def microseconds(moment: datetime) -> int:
    """Microseconds since 1970."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // MICROSECOND
