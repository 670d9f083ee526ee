"""Sessions in Postgres against raw_sessions in ClickHouse: whole, once, and as they stand after the last event.

The reference takes the states' plain values from ClickHouse, one session at a time, and makes the columns in Python.
"""

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import pytest

from pg_exports.models import AddedColumn
from pg_exports_tests.conftest import (
    SAMPLE_HOURS,
    TEAM,
    RunExport,
    Source,
    Target,
    materialise,
    partition_key,
)
from pg_exports_tests.models.channels import Definitions, channel_type, definitions
from pg_exports_tests.models.comparison import Row, comparable, created_columns, differences, instant, landed_rows
from pg_exports_tests.source_rows import (
    HOUR,
    INITIAL,
    MICROSECOND,
    export_of,
    insert_sessions,
    new_session,
    session,
)

TEXTS_BEFORE_COUNTS = (
    *("entry_current_url", "entry_pathname", "entry_hostname", "end_current_url", "end_pathname", "end_hostname"),
    *("entry_utm_source", "entry_utm_campaign", "entry_utm_medium", "entry_utm_term", "entry_utm_content"),
    *("entry_referring_domain", "entry_gclid", "entry_fbclid", "entry_gad_source"),
)
CLICK_IDS = (
    *("entry_gclsrc", "entry_dclid", "entry_gbraid", "entry_wbraid", "entry_msclkid", "entry_twclid"),
    *("entry_li_fat_id", "entry_mc_cid", "entry_igshid", "entry_ttclid", "entry__kx", "entry_irclid"),
)
COLUMNS = {
    "session_id": "TEXT",
    "session_id_v7": "TEXT",
    "team_id": "BIGINT",
    "distinct_id": "TEXT",
    "start_timestamp": "TIMESTAMP WITH TIME ZONE",
    "end_timestamp": "TIMESTAMP WITH TIME ZONE",
    "urls": "TEXT[]",
    "num_uniq_urls": "BIGINT",
    **dict.fromkeys(TEXTS_BEFORE_COUNTS, "TEXT"),
    "pageview_count": "BIGINT",
    "autocapture_count": "BIGINT",
    "screen_count": "BIGINT",
    "channel_type": "TEXT",
    "session_duration": "BIGINT",
    "duration": "BIGINT",
    "is_bounce": "INTEGER",
    "last_external_click_url": "TEXT",
    "page_screen_autocapture_count_up_to": "BIGINT",
    "exit_current_url": "TEXT",
    "exit_pathname": "TEXT",
    "vitals_lcp": "DOUBLE PRECISION",
    **dict.fromkeys(CLICK_IDS, "TEXT"),
}

URLS = (
    *TEXTS_BEFORE_COUNTS[:6],
    *("exit_current_url", "exit_pathname", "last_external_click_url"),
)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

STATES = f"""
SELECT
    toUInt128(session_id_v7) AS session,
    max(max_inserted_at) AS inserted_at,
    min(min_timestamp) AS started,
    max(max_timestamp) AS ended,
    argMaxMerge(distinct_id) AS last_distinct_id,
    groupArray(urls) AS url_lists,
    argMinMerge(entry_url) AS first_url,
    argMaxMerge(end_url) AS last_url,
    argMaxMerge(last_external_click_url) AS click_url,
    uniqMerge(pageview_uniq) AS pageviews,
    uniqMerge(autocapture_uniq) AS autocaptures,
    uniqMerge(screen_uniq) AS screens,
    uniqUpToMerge(1)(page_screen_autocapture_uniq_up_to) AS up_to,
    argMinMerge(vitals_lcp) AS lcp,
    {", ".join(f"argMinMerge(initial_{name}) AS first_{name}" for name in INITIAL)}
FROM raw_sessions
WHERE team_id = {{team_id:Int64}}
GROUP BY session_id_v7
"""
STATE_NAMES = (
    *("session", "inserted_at", "started", "ended", "distinct_id", "url_lists", "first_url", "last_url", "click_url"),
    *("pageviews", "autocaptures", "screens", "up_to", "lcp", *INITIAL),
)


def reference(source: Source, team_id: int, start: datetime, end: datetime) -> list[Row]:
    """The sessions whose last insertion lies in the interval."""
    known = definitions(source)
    states = [dict(zip(STATE_NAMES, row, strict=True)) for row in source.rows(STATES, {"team_id": team_id})]
    for state in states:
        state |= {name: instant(state[name]) for name in ("inserted_at", "started", "ended")}
        if state["inserted_at"] == EPOCH:
            state["inserted_at"] = state["ended"]
    return [expected_row(state, team_id, known) for state in states if start <= state["inserted_at"] < end]


def expected_row(state: Mapping[str, Any], team_id: int, known: Definitions) -> Row:
    initial = {name: no_text(state[name]) for name in INITIAL}
    first, last = no_text(state["first_url"]), no_text(state["last_url"])
    entry, end = (url and urlsplit(url) for url in (first, last))
    urls = sorted({url for urls in state["url_lists"] for url in urls}, key=str.encode)
    seconds = int(state["ended"].timestamp()) - int(state["started"].timestamp())
    row = {
        "session_id": str(uuid.UUID(int=state["session"])),
        "session_id_v7": str(state["session"]),
        "team_id": team_id,
        "distinct_id": None if state["distinct_id"] == "null" else state["distinct_id"],
        "start_timestamp": state["started"],
        "end_timestamp": state["ended"],
        "urls": urls,
        "num_uniq_urls": len(urls),
        "entry_current_url": first,
        "entry_pathname": entry and entry.path,
        "entry_hostname": entry and (entry.hostname or ""),
        "end_current_url": last,
        "end_pathname": end and end.path,
        "end_hostname": end and (end.hostname or ""),
        **{f"entry_{name}": value for name, value in initial.items()},
        "pageview_count": state["pageviews"],
        "autocapture_count": state["autocaptures"],
        "screen_count": state["screens"],
        "channel_type": channel_type(known, initial),
        "session_duration": seconds,
        "duration": seconds,
        "is_bounce": bounce(state["pageviews"], state["autocaptures"], seconds),
        "last_external_click_url": no_text(state["click_url"]),
        "page_screen_autocapture_count_up_to": state["up_to"],
        "exit_current_url": last,
        "exit_pathname": end and end.path,
        "vitals_lcp": state["lcp"],
    }
    return comparable([row[name] for name in COLUMNS], COLUMNS)


def no_text(value: str) -> str | None:
    return None if value in ("", "null") else value


def bounce(pageviews: int, autocaptures: int, seconds: int) -> int | None:
    if pageviews == 0:
        return None
    return 0 if pageviews > 1 or autocaptures > 0 or seconds >= 10 else 1


def test_the_whole_sample_lands_row_by_row_and_column_by_column(
    sample: Source, sample_end: datetime, target: Target
) -> None:
    start = sample_end - SAMPLE_HOURS * HOUR
    export = export_of("sessions", target, sample_end)
    run = materialise(
        export, sample.resource(), target.resource(), partition_key(start), partition_key(sample_end - HOUR)
    )
    assert run.error is None
    assert created_columns(target, "sessions") == COLUMNS

    expected = reference(sample, TEAM, start, sample_end)
    assert len(expected) > 200
    assert differences(landed_rows(target, "sessions", COLUMNS), expected) == {}

    names = list(COLUMNS)
    assert {row[names.index("is_bounce")] for row in expected} == {None, 0, 1}
    assert len({row[names.index("channel_type")] for row in expected}) > 10
    empty = {name for name in names if all(row[names.index(name)] in (None, "") for row in expected)}
    assert empty == set(), "the sample has a value for every column"


def landed(target: Target, *columns: str) -> list[tuple[Any, ...]]:
    return [row[1:] for row in target.rows(f"SELECT start_timestamp, {', '.join(columns)} FROM sessions ORDER BY 1, 2")]


def test_a_session_that_grows_in_the_next_interval_is_updated_once(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("sessions", target, hour)
    grows, stays = new_session(hour), new_session(hour + MICROSECOND)
    pages = [uuid.uuid4() for _ in range(3)]
    insert_sessions(
        source,
        session(grows, hour, urls=["/b", "/a"], pageviews=pages[:2], end_url="/b", entry_url="/a", initial_gclid="x"),
        session(stays, hour + MICROSECOND),
    )
    assert run(export, partition_key(hour)).counts == (2, 0, 0)

    later = hour + HOUR
    insert_sessions(
        source,
        session(grows, later, urls=["/b", "/c"], pageviews=pages[1:], end_url="/c", entry_url="/b", distinct_id="z"),
    )
    assert run(export, partition_key(later)).counts == (0, 1, 0)
    columns = ("distinct_id", "end_timestamp", "urls", "num_uniq_urls", "pageview_count", "entry_current_url")
    assert landed(target, *columns, "exit_current_url", "entry_gclid")[0] == (
        *("z", later, ["/a", "/b", "/c"], 3, 3, "/a"),
        *("/c", "x"),
    )

    both = run(export, partition_key(hour), partition_key(later))
    assert both.counts == (0, 0, 2)
    assert target.count("sessions") == 2


def test_a_late_event_that_does_not_move_the_end_is_not_lost(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export, later = export_of("sessions", target, hour), hour + HOUR
    one = new_session(hour)
    insert_sessions(source, session(one, hour, ended=hour + HOUR / 2, urls=["/a"]))
    run(export, partition_key(hour))
    insert_sessions(source, session(one, later, started=hour + HOUR / 4, ended=hour + HOUR / 4, urls=["/late"]))
    assert run(export, partition_key(later)).counts == (0, 1, 0)
    assert landed(target, "urls", "end_timestamp") == [(["/a", "/late"], hour + HOUR / 2)]
    # An event so late that only the beginning moves.
    insert_sessions(source, session(one, later, started=hour - HOUR, ended=hour - HOUR, urls=["/a"], vitals_lcp=0.1))
    assert run(export, partition_key(later)).counts == (0, 1, 0)
    assert landed(target, "start_timestamp", "duration", "vitals_lcp") == [(hour - HOUR, 5_400, 0.1)]
    assert run(export, partition_key(later)).counts == (0, 0, 1)


def test_a_session_that_ends_before_the_one_in_postgres_does_not_replace_it(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("sessions", target, hour)
    insert_sessions(source, session(new_session(hour), hour))
    run(export, partition_key(hour))
    target.execute(
        "UPDATE sessions SET end_timestamp = end_timestamp + interval '1 microsecond', distinct_id = 'newer'"
    )
    assert run(export, partition_key(hour)).counts == (0, 0, 1)
    assert landed(target, "distinct_id") == [("newer",)]


def test_the_last_insertion_decides_the_interval(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    end = hour + HOUR
    ids = {
        name: new_session(hour) for name in ("start", "last", "early", "late", "moved on", "moved in", "another team's")
    }
    insert_sessions(
        source,
        session(ids["start"], hour, distinct_id="start"),
        session(ids["last"], end - MICROSECOND, distinct_id="last"),
        session(ids["early"], hour - MICROSECOND, distinct_id="early"),
        session(ids["late"], end, distinct_id="late"),
        session(ids["moved on"], hour, distinct_id="moved on"),
        session(ids["moved in"], hour - 5 * HOUR, distinct_id="moved in"),
        session(ids["another team's"], hour, team_id=TEAM + 1),
        session(ids["start"], hour, team_id=TEAM + 1, ended=end, distinct_id="another team's", urls=["/x"]),
    )
    insert_sessions(
        source, session(ids["moved on"], end, ended=hour), session(ids["moved in"], hour, ended=hour - 6 * HOUR)
    )
    assert run(export_of("sessions", target, hour), partition_key(hour)).error is None
    assert {row[0] for row in landed(target, "distinct_id")} == {"start", "last", "moved in"}
    assert target.rows("SELECT urls FROM sessions WHERE distinct_id = 'start'") == [([],)]


def test_each_column_is_what_the_states_say(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    one = uuid.UUID("0192d3f0-0001-7abc-8def-0123456789ab")
    pages = [uuid.uuid4() for _ in range(2)]
    click = new_session(hour)
    insert_sessions(
        source,
        session(
            one,
            hour + 5 * MICROSECOND,
            started=hour + MICROSECOND,
            urls=["https://b.example/", "https://a.example/x", "https://b.example/"],
            entry_url="https://user@shop.example.com:8443/p/é?q=1#top",
            end_url="https://www.example.com",
            last_external_click_url="https://partner.example/?a=1&b=2",
            pageviews=[pages[0], pages[0], None],
            autocaptures=[pages[1]],
            vitals_lcp=1234.5,
            **{f"initial_{name}": f"{name} 'ü'" for name in INITIAL},
        ),
        session(click, hour + HOUR / 2, **{f"initial_{name}": "null" for name in INITIAL}),
    )
    assert run(export_of("sessions", target, hour), partition_key(hour)).error is None
    full, empty = (dict(zip(COLUMNS, row, strict=True)) for row in landed(target, *COLUMNS))
    assert full == {
        "session_id": "0192d3f0-0001-7abc-8def-0123456789ab",
        "session_id_v7": str(one.int),
        "team_id": TEAM,
        "distinct_id": "a",
        "start_timestamp": hour + MICROSECOND,
        "end_timestamp": hour + 5 * MICROSECOND,
        "urls": ["https://a.example/x", "https://b.example/"],
        "num_uniq_urls": 2,
        "entry_current_url": "https://user@shop.example.com:8443/p/é?q=1#top",
        "entry_pathname": "/p/é",
        "entry_hostname": "shop.example.com",
        "end_current_url": "https://www.example.com",
        "end_pathname": "",
        "end_hostname": "www.example.com",
        **{f"entry_{name}": f"{name} 'ü'" for name in INITIAL},
        "pageview_count": 1,
        "autocapture_count": 1,
        "screen_count": 0,
        "channel_type": "Paid Social",
        "session_duration": 0,
        "duration": 0,
        "is_bounce": 0,
        "last_external_click_url": "https://partner.example/?a=1&b=2",
        "page_screen_autocapture_count_up_to": 2,
        "exit_current_url": "https://www.example.com",
        "exit_pathname": "",
        "vitals_lcp": 1234.5,
    }
    assert {name: empty[name] for name in COLUMNS if name.removeprefix("entry_") in INITIAL} == {
        f"entry_{name}": None for name in INITIAL
    }
    assert empty["session_id"] == str(click)
    assert (empty["urls"], empty["num_uniq_urls"], empty["is_bounce"]) == ([], 0, None)
    assert (empty["vitals_lcp"], empty["channel_type"]) == (None, "Unknown")
    assert {name for name in URLS if empty[name] is not None} == set()


@pytest.mark.parametrize("nothing", ["", "null"])
def test_a_url_that_is_not_there_is_null_and_so_are_its_path_and_its_host(
    source: Source, target: Target, run: RunExport, hour: datetime, nothing: str
) -> None:
    none_given = {"entry_url": nothing, "end_url": nothing, "last_external_click_url": nothing}
    insert_sessions(source, session(new_session(hour), hour, distinct_id="null", **none_given))
    assert run(export_of("sessions", target, hour), partition_key(hour)).error is None
    assert landed(target, *URLS, "distinct_id") == [(None,) * (len(URLS) + 1)]


def test_a_session_from_before_insertions_were_recorded_counts_by_its_last_event(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    old, later = hour - 5 * HOUR, hour + HOUR
    names = ("old", "at the start", "too late", "mixed", "of the future", "another row")
    ids = {name: new_session(old) for name in names}

    def rows(name: str, *times: tuple[datetime, datetime]) -> list[dict[str, object]]:
        return [
            session(ids[name], inserted_at, distinct_id=name, started=old, ended=ended) for inserted_at, ended in times
        ]

    for row in (
        *rows("old", (EPOCH, old), (EPOCH, hour + HOUR - MICROSECOND)),
        *rows("at the start", (EPOCH, hour)),
        *rows("too late", (EPOCH, hour), (EPOCH, later)),
        # A row that has the time of its insertion decides, whatever a client's clock said.
        *rows("mixed", (EPOCH, later + HOUR), (hour, old)),
        *rows("of the future", (hour, datetime(2100, 1, 1, tzinfo=UTC))),
        *rows("another row", (EPOCH, hour), (later, old)),
    ):
        insert_sessions(source, row)
    assert run(export_of("sessions", target, hour), partition_key(hour)).error is None
    assert {name for (name,) in landed(target, "distinct_id")} == {"old", "at the start", "mixed", "of the future"}
    both = run(export_of("sessions", target, hour), partition_key(hour), partition_key(later))
    assert both.error is None
    assert {name for (name,) in landed(target, "distinct_id")} == set(names)
    assert differences(landed_rows(target, "sessions", COLUMNS), reference(source, TEAM, hour, later + HOUR)) == {}


def test_a_bounce_is_one_pageview_of_less_than_ten_seconds_without_autocapture(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    second = 1_000_000 * MICROSECOND

    def visit(name: str, pageviews: int, autocaptures: int, lasted: int, screens: int = 0) -> dict[str, object]:
        return session(
            new_session(hour),
            hour,
            distinct_id=name,
            ended=hour + lasted * second,
            pageviews=[uuid.uuid4() for _ in range(pageviews)],
            autocaptures=[uuid.uuid4() for _ in range(autocaptures)],
            screens=[uuid.uuid4() for _ in range(screens)],
        )

    insert_sessions(
        source,
        visit("no pageview", 0, 0, 0),
        visit("no pageview, but much else", 0, 5, 600, screens=3),
        visit("one", 1, 0, 0),
        visit("one, nine seconds", 1, 0, 9),
        visit("one, ten seconds", 1, 0, 10),
        visit("one and an autocapture", 1, 1, 0),
        visit("one and screens", 1, 0, 0, screens=4),
        visit("two", 2, 0, 0),
    )
    assert run(export_of("sessions", target, hour), partition_key(hour)).error is None
    rows = target.rows(
        "SELECT distinct_id, is_bounce, duration, session_duration, page_screen_autocapture_count_up_to FROM sessions"
    )
    assert {name: values for name, *values in rows} == {
        "no pageview": [None, 0, 0, 0],
        "no pageview, but much else": [None, 600, 600, 2],
        "one": [1, 0, 0, 1],
        "one, nine seconds": [1, 9, 9, 1],
        "one, ten seconds": [0, 10, 10, 1],
        "one and an autocapture": [0, 0, 0, 2],
        "one and screens": [1, 0, 0, 2],
        "two": [0, 0, 0, 2],
    }


def test_without_the_dictionary_the_channel_is_null_and_the_run_says_so_once(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert_sessions(
        source,
        session(new_session(hour), hour, initial_utm_campaign="cross-network"),
        session(new_session(hour), hour + HOUR, initial_referring_domain="$direct"),
    )
    source.execute("DROP DICTIONARY channel_definition_dict")
    both = run(export_of("sessions", target, hour), partition_key(hour), partition_key(hour + HOUR))
    assert both.counts == (2, 0, 0)
    assert landed(target, "channel_type", "entry_utm_campaign", "entry_referring_domain") == [
        (None, "cross-network", None),
        (None, None, "$direct"),
    ]
    assert len([line for line in both.log if "channel_definition_dict" in line]) == 1


def test_without_the_dictionary_a_channel_that_is_there_stays(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of(
        "sessions", target, hour, columns={"channel_type": "channel", "loud": LOUD, "one": ONE, "vitals_lcp": False}
    )
    one, other = new_session(hour), new_session(hour + MICROSECOND)
    insert_sessions(source, session(one, hour, initial_utm_campaign="cross-network"))
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    source.execute("DROP DICTIONARY channel_definition_dict")
    insert_sessions(
        source,
        session(one, hour, ended=hour + HOUR / 2, urls=["/new"]),
        session(other, hour + MICROSECOND, initial_utm_campaign="cross-network"),
    )
    assert run(export, partition_key(hour)).counts == (1, 1, 0)
    assert landed(target, "urls", "channel", "loud", "one") == [
        (["/new"], "Cross Network", "CROSS NETWORK", 1),
        ([], None, None, 1),
    ]
    # Nor does it pass for a change that it is not there.
    assert run(export, partition_key(hour)).counts == (0, 0, 2)


LOUD = AddedColumn(expression="upper(channel_type)", type="TEXT")
ONE = AddedColumn(expression="1", type="INTEGER")
