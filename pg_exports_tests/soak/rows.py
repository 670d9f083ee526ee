"""The soak's rows in ClickHouse: a day's, some of them bad, and those that come late."""

import random
import uuid
from datetime import datetime, timedelta

from pg_exports.sandbox import sample_data
from pg_exports_tests.conftest import TEAM, Source
from pg_exports_tests.soak.exports import DAY, Day
from pg_exports_tests.source_rows import event, insert_sessions, mapping, person, session

LATE, REFUSED = "late", "refused"
"""What the distinct_ids of rows begin with that come while exports run, and of rows that no repair makes holdable."""

AN_HOUR = 100
"""Rows of each own model."""

_TABLES = {
    "clicks": "CREATE TABLE clicks (page Nullable(String), number UInt64, text String, inserted_at DateTime64(6, 'UTC'))"
    " ENGINE = MergeTree ORDER BY number",
    "visits": "CREATE TABLE visits (id UInt64, distinct_id String, state String, at DateTime64(6, 'UTC'),"
    " inserted_at DateTime64(6, 'UTC')) ENGINE = MergeTree ORDER BY id",
}

_CHANGED = f"""
INSERT INTO events
SELECT * REPLACE (_timestamp + {{number:UInt32}} AS _timestamp, concat('{{"changed": ', {{text:String}}, '}}') AS properties)
FROM events
WHERE team_id = {TEAM} AND inserted_at >= {{start:DateTime64(6, 'UTC')}} AND inserted_at < {{end:DateTime64(6, 'UTC')}}
    AND NOT startsWith(distinct_id, '{REFUSED}') AND cityHash64(uuid) % 40 = {{number:UInt32}} % 40
"""


def create(source: Source, name: str) -> None:
    """The table of an own model."""
    source.execute(_TABLES[name])


def fill(source: Source, day: Day) -> None:
    """A day's rows of every model, some of them bad."""
    sample_data.fill(source.sandbox.execute, source.database, end=day.end, hours=len(day.hours), events=day.events)
    for hour in day.hours:
        insert_clicks(source, hour, AN_HOUR)
        # Every other visit goes on for some hours.
        insert_visits(source, "early", hour, *(random.Random(str(hour)).sample(range(20 * AN_HOUR), AN_HOUR)))
    _insert_bad_rows(source, day)


def insert_clicks(source: Source, moment: datetime, count: int) -> None:
    """New ones, a fourth of them without a page."""
    first = source.rows("SELECT count() FROM clicks")[0][0]
    source.insert(
        "clicks",
        *(
            {"page": None if n % 4 == 0 else f"p{n % 7}", "number": n, "text": f"{n}", "inserted_at": moment}
            for n in range(first, first + count)
        ),
    )


def insert_visits(source: Source, state: str, moment: datetime, *numbers: int, name: str = "a") -> None:
    source.insert(
        "visits",
        *(
            {"id": n, "distinct_id": name, "state": f"{state} {moment}", "at": moment, "inserted_at": moment}
            for n in numbers
        ),
    )


def insert_late(source: Source, hour: datetime, seed: int) -> None:
    """Rows of every model in an hour: new ones, others in another state, and events that were sent again.

    Args:
        hour: when it begins.
        seed: no other call has it.
    """
    dice = random.Random(seed)
    moment = hour + timedelta(minutes=dice.randrange(60))
    source.insert("events", *(event(moment, distinct_id=f"{LATE} {number}") for number in range(20)))
    until = hour + timedelta(hours=1)
    source.execute(_CHANGED, {"number": seed, "text": str(seed), "start": _text(hour), "end": _text(until)})
    insert_clicks(source, moment, 5)
    insert_more(source, moment, dice.randrange(5), seed)


def insert_more(source: Source, moment: datetime, one: int, seed: int) -> None:
    """Another state of a person, a session and a visit, and a new one of each, stamped with a moment."""
    source.insert("person", person(moment, uuid.UUID(int=one), seed))
    source.insert("person_distinct_id2", mapping(moment, f"{LATE} {one}", uuid.UUID(int=one), seed))
    # An event of a session may come after later ones.
    ended = DAY + timedelta(seconds=10_000 - seed if seed % 2 else seed)
    parts = [
        session(
            session_id(number),
            moment,
            distinct_id=LATE,
            started=DAY,
            ended=ended,
            pageviews=[uuid.UUID(int=1000 + seed)],
            urls=[f"https://a.b/{seed}"],
        )
        for number in (one, 1000 + seed)
    ]
    insert_sessions(source, *parts)
    insert_visits(source, f"late {seed}", moment + timedelta(microseconds=seed), one, 10**6 + seed, name=LATE)


def session_id(number: int) -> uuid.UUID:
    """A UUIDv7 of the day's first moment."""
    return uuid.UUID(int=int(DAY.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62 | number)


def _insert_bad_rows(source: Source, day: Day) -> None:
    """Some in every fourth hour: rows that are repaired, and rows that are refused."""
    for number, hour in enumerate(day.hours[::4], 1):
        nul, bad = r'{"a": "\u0000"}', f"{REFUSED} {number}"
        source.insert(
            "events",
            event(hour, properties=nul),
            event(hour, properties='{"a": NaN}', distinct_id=bad),
            event(hour, event="x" * 201, distinct_id=bad),
        )
        good_id, bad_id = uuid.UUID(int=100 + number), uuid.UUID(int=200 + number)
        source.insert("person", person(hour, good_id, 1, properties=nul), person(hour, bad_id, 2**31))
        source.insert("person_distinct_id2", mapping(hour, f"nul {number}", good_id), mapping(hour, bad, bad_id))
        insert_sessions(source, session(session_id(100 + number), hour, entry_url="https://a.b/\0"))


def _text(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}"
