"""sessions: one row for each session, as it stands when the query runs. Its channel type has a module of its own."""

from dataclasses import replace

from pg_exports.models import channel_type
from pg_exports.models.model import (
    MORE_COLUMNS,
    Column,
    Kind,
    Merge,
    Model,
    Query,
    Selection,
    bigint,
    integer,
    text,
    timestamptz,
)
from pg_exports.models.model import (
    fingerprints as fingerprints_of,
)

# What a session began with: its columns are called entry_NAME, the source's states initial_NAME.
ATTRIBUTION = ("utm_source", "utm_campaign", "utm_medium", "utm_term", "utm_content")
REFERRAL = ("referring_domain", "gclid", "fbclid", "gad_source")
CLICK_IDS = (
    "gclsrc",
    "dclid",
    "gbraid",
    "wbraid",
    "msclkid",
    "twclid",
    "li_fat_id",
    "mc_cid",
    "igshid",
    "ttclid",
    "_kx",
    "irclid",
)

BOUNCE_SECONDS = 10
"""A session of one pageview that lasts as long as this is no bounce."""

_SESSION_HOUR = "toStartOfHour(fromUnixTimestamp(intDiv(toUInt64(bitShiftRight(session_id_v7, 80)), 1000)))"

# `max_inserted_at` is a later addition to PostHog's table: in the rows from before it is the epoch. Of a session that has no
# other rows the last event's own time stands for it; of any other it does not, as a client's clock may be in the future.
_NOT_RECORDED = "toUnixTimestamp64Micro({}) = 0"
_INSERTED_AT = "if({}, max(s.max_timestamp), max(s.max_inserted_at))".format(
    _NOT_RECORDED.format("max(s.max_inserted_at)")
)
_TOUCHED_AT = f"if({_NOT_RECORDED.format('max_inserted_at')}, max_timestamp, max_inserted_at)"

# The touched sessions' hours are a prefix of the table's sort key: 16 ms instead of 57 ms on a million sessions.
SQL = """
WITH
    touched AS (
        SELECT DISTINCT session_id_v7, __SESSION_HOUR__ AS session_hour
        FROM raw_sessions
        WHERE team_id = {team_id:Int64}
            AND __TOUCHED_AT__ >= {interval_start:DateTime64(6, 'UTC')}
            AND __TOUCHED_AT__ < {interval_end:DateTime64(6, 'UTC')} __PART__
    ),
    sessions AS (
        SELECT
            s.session_id_v7 AS session_id_v7,
            nullIf(argMaxMerge(s.distinct_id), 'null') AS distinct_id,
            min(s.min_timestamp) AS start_timestamp,
            max(s.max_timestamp) AS end_timestamp,
            arraySort(groupUniqArrayArray(s.urls)) AS urls,
            nullIf(nullIf(argMinMerge(s.entry_url), ''), 'null') AS entry_current_url,
            nullIf(nullIf(argMaxMerge(s.end_url), ''), 'null') AS end_current_url,
            __ENTRY_COLUMNS__,
            uniqMerge(s.pageview_uniq) AS pageview_count,
            uniqMerge(s.autocapture_uniq) AS autocapture_count,
            uniqMerge(s.screen_uniq) AS screen_count,
            nullIf(nullIf(argMaxMerge(s.last_external_click_url), ''), 'null') AS last_external_click_url,
            uniqUpToMerge(1)(s.page_screen_autocapture_uniq_up_to) AS page_screen_autocapture_count_up_to,
            argMinMerge(s.vitals_lcp) AS vitals_lcp,
            dateDiff('second', start_timestamp, end_timestamp) AS duration,
            __INSERTED_AT__ AS inserted_at
        FROM raw_sessions AS s
        WHERE s.team_id = {team_id:Int64}
            AND __SESSION_HOUR__ GLOBAL IN (SELECT session_hour FROM touched)
            AND s.session_id_v7 GLOBAL IN (SELECT session_id_v7 FROM touched)
        GROUP BY s.session_id_v7
        HAVING __INSERTED_AT__ >= {interval_start:DateTime64(6, 'UTC')}
            AND __INSERTED_AT__ < {interval_end:DateTime64(6, 'UTC')}
    )
SELECT
    toString(reinterpretAsUUID(bitOr(bitShiftLeft(sessions.session_id_v7, 64), bitShiftRight(sessions.session_id_v7, 64))))
        AS session_id,
    toString(sessions.session_id_v7) AS session_id_v7,
    {team_id:Int64} AS team_id,
    sessions.distinct_id AS distinct_id,
    sessions.start_timestamp AS start_timestamp,
    sessions.end_timestamp AS end_timestamp,
    sessions.urls AS urls,
    length(sessions.urls) AS num_uniq_urls,
    sessions.entry_current_url AS entry_current_url,
    path(sessions.entry_current_url) AS entry_pathname,
    domain(sessions.entry_current_url) AS entry_hostname,
    sessions.end_current_url AS end_current_url,
    path(sessions.end_current_url) AS end_pathname,
    domain(sessions.end_current_url) AS end_hostname,
    __ENTRY_NAMES__,
    sessions.pageview_count AS pageview_count,
    sessions.autocapture_count AS autocapture_count,
    sessions.screen_count AS screen_count,
    __CHANNEL_TYPE__ AS channel_type,
    sessions.duration AS session_duration,
    sessions.duration AS duration,
    multiIf(
        sessions.pageview_count = 0, NULL,
        sessions.pageview_count > 1 OR sessions.autocapture_count > 0 OR sessions.duration >= __BOUNCE_SECONDS__, 0,
        1
    ) AS is_bounce,
    sessions.last_external_click_url AS last_external_click_url,
    sessions.page_screen_autocapture_count_up_to AS page_screen_autocapture_count_up_to,
    sessions.end_current_url AS exit_current_url,
    path(sessions.end_current_url) AS exit_pathname,
    sessions.vitals_lcp AS vitals_lcp,
    cityHash64({team_id:Int64}, sessions.session_id_v7) AS identity,
    cityHash64(
        identity, sessions.inserted_at, sessions.start_timestamp, sessions.end_timestamp, sessions.urls,
        sessions.pageview_count, sessions.autocapture_count, sessions.screen_count,
        sessions.page_screen_autocapture_count_up_to, ifNull(sessions.vitals_lcp, -1),
        __TEXTS__
    ) AS row_state,
    roundDown(toUnixTimestamp64Micro(sessions.inserted_at), {boundaries:Array(Int64)}) AS interval_start __MORE_COLUMNS__
FROM sessions
"""

_ENTRY = (*ATTRIBUTION, *REFERRAL, *CLICK_IDS)
_TEXTS = (
    *("distinct_id", "entry_current_url", "end_current_url", "last_external_click_url"),
    *(f"entry_{name}" for name in _ENTRY),
)

_STATEMENT = (
    SQL.replace("__SESSION_HOUR__", _SESSION_HOUR)
    .replace("__TOUCHED_AT__", _TOUCHED_AT)
    .replace("__INSERTED_AT__", _INSERTED_AT)
    # Every text of the row, as a late event may change one and nothing else. NULL is '' for all of them.
    .replace("__TEXTS__", ",\n        ".join(f"ifNull(sessions.{name}, '')" for name in _TEXTS))
    .replace(
        "__ENTRY_COLUMNS__",
        ",\n            ".join(
            f"nullIf(nullIf(argMinMerge(s.initial_{name}), ''), 'null') AS entry_{name}" for name in _ENTRY
        ),
    )
    .replace("__ENTRY_NAMES__", ",\n    ".join(f"sessions.entry_{name} AS entry_{name}" for name in _ENTRY))
    .replace("__BOUNCE_SECONDS__", str(BOUNCE_SECONDS))
    .replace("__MORE_COLUMNS__", MORE_COLUMNS)
)


def query(selection: Selection) -> Query:
    """Sessions whose last insertion is in one of the intervals, each whole."""
    return _query(selection, channel_type.SQL)


def query_without_channel_types(selection: Selection) -> Query:
    """The same for a source without the dictionary of channels: `channel_type` is NULL."""
    return _query(selection, "CAST(NULL AS Nullable(String))")


def fingerprints(selection: Selection) -> Query:
    """The fingerprint of each of the intervals that the selection consists of, in one query."""
    rows = query_without_channel_types(selection)
    return Query(fingerprints_of(rows.sql), rows.parameters)


def _query(selection: Selection, channel_type_sql: str) -> Query:
    part = selection.part.condition("cityHash64(session_id_v7)")
    sql = _STATEMENT.replace("__CHANNEL_TYPE__", channel_type_sql).replace(" __PART__", part)
    return Query(sql, selection.parameters)


def _of(*columns: str) -> tuple[str, ...]:
    return tuple(f"raw_sessions.{column}" for column in columns)


_SESSIONS = Model(
    name="sessions",
    description="Every session with its times, URLs, attribution and counts.",
    columns=(
        text("session_id", *_of("session_id_v7")),
        text("session_id_v7", *_of("session_id_v7")),
        bigint("team_id", *_of("team_id")),
        text("distinct_id", *_of("distinct_id")),
        timestamptz("start_timestamp", *_of("min_timestamp")),
        timestamptz("end_timestamp", *_of("max_timestamp")),
        Column("urls", Kind.TEXT_LIST, "TEXT[]", sources=_of("urls")),
        bigint("num_uniq_urls", *_of("urls")),
        *(
            text(f"{end}_{part}", *_of(f"{end}_url"))
            for end in ("entry", "end")
            for part in ("current_url", "pathname", "hostname")
        ),
        *(text(f"entry_{name}", *_of(f"initial_{name}")) for name in (*ATTRIBUTION, *REFERRAL)),
        bigint("pageview_count", *_of("pageview_uniq")),
        bigint("autocapture_count", *_of("autocapture_uniq")),
        bigint("screen_count", *_of("screen_uniq")),
        text(
            "channel_type",
            *_of(*(f"initial_{name}" for name in ("utm_source", "utm_campaign", "utm_medium", *REFERRAL))),
        ),
        bigint("session_duration", *_of("min_timestamp", "max_timestamp")),
        bigint("duration", *_of("min_timestamp", "max_timestamp")),
        integer("is_bounce", *_of("pageview_uniq", "autocapture_uniq", "min_timestamp", "max_timestamp")),
        text("last_external_click_url", *_of("last_external_click_url")),
        bigint("page_screen_autocapture_count_up_to", *_of("page_screen_autocapture_uniq_up_to")),
        text("exit_current_url", *_of("end_url")),
        text("exit_pathname", *_of("end_url")),
        Column("vitals_lcp", Kind.FLOAT, "DOUBLE PRECISION", sources=_of("vitals_lcp")),
        *(text(f"entry_{name}", *_of(f"initial_{name}")) for name in CLICK_IDS),
    ),
    key=("team_id", "session_id"),
    merge=Merge(version=("end_timestamp",)),
    query=query,
    fingerprints=fingerprints,
    timestamps=("start_timestamp", "end_timestamp"),
    source_tables=("raw_sessions",),
)

SESSIONS = replace(
    _SESSIONS,
    dictionary=channel_type.DICTIONARY,
    without_dictionary=replace(
        _SESSIONS,
        columns=tuple(column for column in _SESSIONS.columns if column.name != "channel_type"),
        query=query_without_channel_types,
    ),
)
