"""Frames into tables: what lands, in which pieces, and which row an error names."""

import itertools
import json
from collections.abc import Mapping
from datetime import UTC, datetime

import polars as pl
import pytest

from pg_exports.errors import DestinationError
from pg_exports.models import AS_READ, IDENTITY, Model
from pg_exports.models.events import EVENTS
from pg_exports.models.model import FRAME_TYPES
from pg_exports.models.persons import PERSONS
from pg_exports.models.sessions import SESSIONS
from pg_exports.postgres import ingest, merge
from pg_exports.postgres import table as tables
from pg_exports.postgres.bad_rows import BadRow
from pg_exports.postgres.merge import Merged
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import Destination, DestinationTable
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import Target

MOMENT = datetime(2026, 1, 31, 12, 30, 15, 123456, tzinfo=UTC)
UUID = "0192b0ad-5f0a-7c1e-9a73-00000000000{}"

Row = Mapping[str, object]


def event(n: int = 1, **changes: object) -> Row:
    return {
        "uuid": UUID.format(n),
        "event": "$pageview",
        "properties": '{"a": 1}',
        "distinct_id": "d",
        "team_id": 1,
        "timestamp": MOMENT,
    } | changes


def person(distinct_id: str = "a", **changes: object) -> Row:
    return {
        "team_id": 1,
        "distinct_id": distinct_id,
        "person_id": UUID.format(1),
        "properties": '{"a": 1}',
        "person_distinct_id_version": 1,
        "person_version": 1,
        "created_at": MOMENT,
    } | changes


def frame(model: Model, *rows: Row) -> pl.DataFrame:
    """Rows as the source would give them; columns that a row lacks are NULL."""
    return pl.DataFrame(
        [[row.get(column.name) for column in model.columns] for row in rows],
        schema={column.name: FRAME_TYPES[column.kind] for column in model.columns},
        orient="row",
    )


def load(target: Target, model: Model, *rows: Row, table: str | None = None, staged: bool = False) -> Merged:
    """Rows on the way that an interval takes into the destination: straight in, or staged and merged."""
    with target.resource().session() as session:
        return load_by(session, Destination(None, target.schema, table or model.name), model, *rows, staged=staged)


def load_by(session: Session, destination: Destination, model: Model, *rows: Row, staged: bool = False) -> Merged:
    """The same over a connection that is open."""
    table = tables.ensure(session, destination, model)
    with session.transaction():
        if not (model.merge or staged):
            return Merged(copy(session, table, destination.table, *rows), 0)
        read_since = merge.snapshot(session)
        with merge.staging_table(session, table) as staging:
            copy(session, table, staging, *rows)
            return merge.merge(session, table, staging, read_since)


def copy(session: Session, table: DestinationTable, into: str, *rows: Row) -> int:
    """Rows into a table, where one that does not fit is an error. Gives how many went in."""
    rejected: list[BadRow] = []
    went_in: list[int] = []

    def landed(rows: pl.DataFrame, _: pl.Series) -> None:
        went_in.append(rows.height)

    ingest.copy_frames(session, table, into, [frame(table.model, *rows)], "fail", rejected.extend, landed)
    assert not rejected
    return sum(went_in)


def create(target: Target, table: str, *columns: str, after: str = "") -> None:
    """A table that another made, as its owner; the role gets what an export needs."""
    target.execute(*creation(table, *columns, after=after))


def creation(table: str, *columns: str, after: str = "") -> tuple[str, str]:
    """The statements that do so."""
    return (
        f"CREATE TABLE {table} ({', '.join(columns)}) {after}",
        f"GRANT INSERT, SELECT, UPDATE ON {table} TO {ROLE}",
    )


def test_a_models_rows_land_as_they_are(target: Target) -> None:
    load(target, EVENTS, event())
    load(target, PERSONS, person())
    load(target, SESSIONS, {"team_id": 1, "session_id": "s", "urls": ["a", None], "end_timestamp": MOMENT})
    assert target.rows('SELECT uuid, event, properties::text, ip, "timestamp" FROM events') == [
        (UUID.format(1), "$pageview", '{"a": 1}', None, MOMENT)
    ]
    assert target.rows("SELECT distinct_id, person_version, created_at FROM persons") == [("a", 1, MOMENT)]
    assert target.rows("SELECT session_id, urls, end_timestamp, is_bounce FROM sessions") == [
        ("s", ["a", None], MOMENT, None)
    ]


def test_pieces_hold_the_same_rows_in_the_same_order_and_are_bounded() -> None:
    wide = frame(EVENTS, *(event(properties="x" * 300_000, distinct_id=str(n)) for n in range(400)))
    narrow = [frame(EVENTS, event(distinct_id=str(n))) for n in range(400, 500)]
    empty = frame(EVENTS)
    cut = list(ingest.pieces([empty, wide, *narrow, empty]))
    assert pl.concat(cut).equals(pl.concat([wide, *narrow]))
    assert 7 <= len(cut) <= 9
    assert max(piece.estimated_size() for piece in cut) < 1.5 * ingest.COPY_BYTES
    assert list(ingest.pieces([empty])) == []


def test_a_value_of_many_megabytes_lands_whole(target: Target) -> None:
    document = json.dumps({"a": "é🦔" * 1_500_000})
    load(target, EVENTS, event(1, properties=document), event(2))
    assert target.rows("SELECT max(length(properties->>'a')) FROM events") == [(3_000_000,)]


# What the table has beside uuid and what else tells events apart, the value that does not fit, what the error says.
MISFITS: list[tuple[str, Row, str]] = [
    ("event varchar(3)", {"event": "four"}, "Column event of"),
    ("team_id smallint", {"team_id": 32_768}, "Column team_id of"),
    ("team_id integer", {"team_id": -(2**31) - 1}, "Column team_id of"),
    ("team_id numeric(3)", {"team_id": 1_000}, "number is out of the range"),
    ("properties jsonb", {"properties": '{"a":'}, "at its column properties: a text is no value of the type"),
    ("properties varchar(7)", {"properties": '{"a": 1}'}, "Column properties of"),
    ("event text", {"event": "a\0b"}, "Column event holds a NUL"),
    ("event text CHECK (event <> 'no')", {"event": "no"}, "violates check constraint"),
    ("distinct_id uuid", {"distinct_id": "no-uuid"}, "Column distinct_id of"),
    ("ip text NOT NULL", {"ip": None}, '"ip" DROP NOT NULL'),
    ("ip varchar(200) NOT NULL", {"ip": None}, '"ip" DROP NOT NULL'),
]


@pytest.mark.parametrize("staged", [False, True], ids=["straight in", "staged"])
def test_a_value_that_does_not_fit_names_column_and_row_and_nothing_is_written(staged: bool, target: Target) -> None:
    good: Row = {"ip": "x", "event": "ok", "properties": "{}", "distinct_id": UUID.format(1)}
    made = [
        creation(
            f"t{n}",
            columns,
            *(f"{name} text" for name in ("uuid", "event", "distinct_id") if not columns.startswith(f"{name} ")),
        )
        for n, (columns, *_) in enumerate(MISFITS)
    ]
    target.execute(*itertools.chain.from_iterable(made))
    with target.resource().session() as session:
        for n, (columns, changes, reason) in enumerate(MISFITS):
            destination = Destination(None, target.schema, f"t{n}")
            rows = [event(1, **good), event(2, **good), event(3, **{**good, **changes}), event(4, **good)]
            with pytest.raises(DestinationError, match=reason) as refused:
                load_by(session, destination, EVENTS, *rows, staged=staged)
            # A statement that merges does not say which row it was about.
            assert (UUID.format(3) in str(refused.value)) is not (staged and "CHECK" in columns)
            assert session.rows(f"SELECT 1 FROM {destination.qualified}", doing="counting") == []


def test_rows_that_no_partition_takes_are_an_error_and_the_others_land_in_theirs(target: Target) -> None:
    columns = 'uuid uuid, event text, distinct_id text, "timestamp" timestamptz'
    create(target, "events", columns, after='PARTITION BY RANGE ("timestamp")')
    target.execute("CREATE TABLE january PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')")
    load(target, EVENTS, event(1), event(2))
    assert load(target, EVENTS, event(2), event(3), staged=True) == Merged(1, 0)
    assert target.count("january") == 3
    with pytest.raises(DestinationError, match='no partition of "events" takes it'):
        load(target, EVENTS, event(4, timestamp=MOMENT.replace(month=2, day=1)))


def test_rows_that_went_in_are_told_with_their_identity_and_those_that_did_not_are_not(target: Target) -> None:
    documents = ['{"a": 1}', r'{"a": "\u0000"}', '{"a": NaN}', "{}"]
    rows = [event(n, properties=text, event="x" * 201 if text == "{}" else "e") for n, text in enumerate(documents)]
    frames = [frame(EVENTS, row).with_columns(pl.lit(n, pl.UInt64).alias(IDENTITY)) for n, row in enumerate(rows)]
    # Only some frames have this column.
    frames[0] = frames[0].with_columns(pl.lit(json.dumps({"event": "\udcff"})).alias(AS_READ))
    landed: list[pl.DataFrame] = []
    mended: list[pl.Series] = []
    rejected: list[BadRow] = []

    def land(rows: pl.DataFrame, repaired: pl.Series) -> None:
        landed.append(rows)
        mended.append(repaired)

    with target.resource().session() as session:
        table = tables.ensure(session, Destination(None, target.schema, "events"), EVENTS)
        with session.transaction():
            ingest.copy_frames(session, table, "events", frames, "repair", rejected.extend, land)
    assert sorted(pl.concat(landed)[IDENTITY]) == [0, 1]
    assert sorted(json.loads(bad.row)["uuid"] for bad in rejected) == [UUID.format(2), UUID.format(3)]
    assert sum(map(int, map(pl.Series.sum, mended))) == 2
    assert target.count("events") == 2


def test_a_database_that_cannot_hold_every_character_is_an_error_that_names_the_row(target: Target) -> None:
    target.sandbox.postgres.execute(
        "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0",
        f"GRANT CREATE ON DATABASE latin TO {ROLE}",
    )
    try:
        target.sandbox.postgres.execute(f"CREATE SCHEMA s AUTHORIZATION {ROLE}", database="latin")
        with target.resource(database="latin").session() as session:
            table = tables.ensure(session, Destination(None, "s", "events"), EVENTS)
            with session.transaction():
                copy(session, table, "events", event(1, event="é"))
            assert session.rows("SELECT event FROM s.events", doing="reading") == [("é",)]
            with pytest.raises(DestinationError, match="the database's encoding has not") as refused:
                load_by(session, table.destination, EVENTS, event(2), event(3, event="🦔"))
            assert UUID.format(3) in str(refused.value)
    finally:
        target.sandbox.postgres.execute("DROP DATABASE latin")
