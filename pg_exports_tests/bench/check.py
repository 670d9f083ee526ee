"""Whether what a contender wrote is what the source has: the number of rows, and some rows value by value.

A time counts only where this says so. Which rows are looked at is decided by their uuid's hash, alike for everybody.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from pg_exports.models import Query
from pg_exports.postgres.identifiers import literal, quoted
from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.servers import DATABASE
from pg_exports_tests.bench.contenders.task import TABLE

ROWS_LOOKED_AT = 400

CUT_OUT = ("set", "set_once", "ip")
"""Columns that the query cuts out of the documents, and the product reads from them where the query is not certain."""


class Row(NamedTuple):
    """An event as both sides have it; documents are read, times are microseconds since 1970."""

    event: str
    distinct_id: str
    timestamp: int
    properties: tuple[object] | None
    elements: tuple[object] | None
    set: tuple[object] | None
    set_once: tuple[object] | None
    ip: str | None


@dataclass(frozen=True)
class Expected:
    """What the source has.

    Attributes:
        rows: how many.
        sample: some of them, by uuid.
        suspects: the uuids of those of which the query does not know `CUT_OUT` for certain.
    """

    rows: int
    sample: Mapping[str, Row]
    suspects: frozenset[str]


def at_source(sandbox: Sandbox, database: str, query: Query) -> Expected:
    """Ask the source for a count and a sample."""
    with sandbox.clickhouse_client(database) as client:
        parameters = dict(query.parameters)
        [(rows,)] = client.query(f"SELECT count() FROM ({query.sql})", parameters).result_rows
        sample = client.query(
            "SELECT uuid, event, distinct_id, toUnixTimestamp64Micro(timestamp),"
            " properties, elements, set, set_once, ip, suspect"
            f" FROM ({query.sql}) WHERE cityHash64(uuid) % {max(rows // ROWS_LOOKED_AT, 1)} = 0",
            parameters,
        ).result_rows
    return Expected(
        rows,
        {uuid: row(*values) for uuid, *values, _ in sample},
        frozenset(uuid for uuid, *_, suspect in sample if suspect),
    )


def at_destination(sandbox: Sandbox, schema: str, expected: Expected) -> tuple[int, list[tuple[str, Row]]]:
    """Ask the destination for the same: the number of rows, and each row that has one of the sample's uuids."""
    table = quoted(schema, TABLE)
    [(rows,)] = sandbox.postgres.rows(f"SELECT count(*) FROM {table}", DATABASE)
    found = sandbox.postgres.rows(
        f"""SELECT uuid::text, event::text, distinct_id::text, (extract(epoch FROM timestamp) * 1000000)::bigint,
            properties::text, elements::text, "set"::text, set_once::text, ip::text
        FROM {table} WHERE uuid::text IN ({", ".join(literal(uuid) for uuid in expected.sample)})""",
        DATABASE,
    )
    return int(str(rows)), [(str(uuid), row(*values)) for uuid, *values in found]


def row(event: Any, distinct_id: Any, timestamp: Any, *values: Any) -> Row:
    """A row of an answer of either side: the documents as text, then the ip."""
    properties, elements, set_, set_once = (document(text) for text in values[:4])
    return Row(event, distinct_id, int(timestamp), properties, elements, set_, set_once, *values[4:])


def document(text: str | None) -> tuple[object] | None:
    """What a JSON text says, its numbers digit for digit; JSON's null is not SQL's."""
    return None if text is None else (json.loads(text, parse_float=Decimal),)


def difference(expected: Expected, rows: int, found: Sequence[tuple[str, Row]]) -> str | None:
    """What is wrong with a table, in a few words; None where nothing is."""
    if rows != expected.rows:
        return f"{rows:,} rows instead of {expected.rows:,}"
    if sorted(uuid for uuid, _ in found) != sorted(expected.sample):
        return f"of a sample of {len(expected.sample):,} rows some are missing, or there more than once"
    for uuid, landed in found:
        sent = expected.sample[uuid]
        uncertain = CUT_OUT if uuid in expected.suspects else ()
        wrong = [name for name in Row._fields if getattr(sent, name) != getattr(landed, name) and name not in uncertain]
        if wrong:
            return f"another {', '.join(wrong)} in the row {uuid}"
    return None
