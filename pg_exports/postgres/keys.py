"""The key of a destination table: the one by which rows are merged, and the index for questions for keys."""

import json

from pg_exports.errors import DestinationError
from pg_exports.models import Model
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import Session


def check(session: Session, qualified: str, model: Model, oid: int) -> None:
    """Make sure that a table has the unique key by which a model's rows are merged.

    Raises:
        DestinationError: it has not; with the statement that mends it, or why none can.
    """
    rows = session.rows(
        """
        SELECT
            json_agg(a.attname)::text,
            i.indexrelid::regclass::text,
            bool_or(EXISTS (SELECT FROM pg_collation AS l WHERE l.oid = k.ordering AND NOT l.collisdeterministic))
        FROM pg_index AS i
        CROSS JOIN unnest(i.indkey::int2[], i.indcollation::oid[]) WITH ORDINALITY AS k(attnum, ordering, position)
        LEFT JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
        WHERE i.indrelid = $1::bigint::oid AND i.indisunique AND i.indisvalid AND i.indimmediate
            AND i.indpred IS NULL AND k.position <= i.indnkeyatts
        GROUP BY i.indexrelid
        """,
        oid,
        doing="reading the table's keys",
    )
    indexes = [
        (index, is_blurred)
        for names, index, is_blurred in rows
        if sorted(map(str, json.loads(str(names)))) == sorted(model.key)
    ]
    for index, is_blurred in indexes:
        if is_blurred:
            # ON CONFLICT would take it, whatever other index there is.
            raise DestinationError(
                f"The unique index {index} of {qualified} has a collation that takes different texts for equal: {model.name} "
                f"that differ at the source would pass for one. Run as its owner: DROP INDEX {index};"
            )
    if not indexes:
        raise DestinationError(
            f"{qualified} has no primary key on ({', '.join(model.key)}), by which {model.name} are merged. "
            f"{_remedy(session, qualified, model, oid)}"
        )


def _remedy(session: Session, qualified: str, model: Model, oid: int) -> str:
    """How a table gets the key, as far as Postgres lets it: a key of a partitioned table has the partition key in it."""
    [(partition_key, columns, has_primary_key)] = session.rows(
        """
        SELECT
            pg_get_partkeydef(c.oid),
            (
                SELECT json_agg(a.attname)::text
                FROM pg_partitioned_table AS p
                CROSS JOIN unnest(p.partattrs::int2[]) AS k(attnum)
                LEFT JOIN pg_attribute AS a ON a.attrelid = p.partrelid AND a.attnum = k.attnum
                WHERE p.partrelid = c.oid
            ),
            EXISTS (SELECT FROM pg_index AS i WHERE i.indrelid = c.oid AND i.indisprimary)
        FROM pg_class AS c
        WHERE c.oid = $1::bigint::oid
        """,
        oid,
        doing="reading the table's keys",
    )
    key = ", ".join(quoted(name) for name in model.key)
    if columns and not set(json.loads(str(columns))) <= set(model.key):
        return (
            f"It is partitioned by {partition_key}, and Postgres wants that in each key: make the table anew, plain or "
            f"partitioned by columns of the key (docs/destinations.md)."
        )
    if has_primary_key:
        not_null = ", ".join(f"ALTER COLUMN {quoted(name)} SET NOT NULL" for name in model.key)
        return (
            f"It has another one. Run as its owner: ALTER TABLE {qualified} {not_null}; "
            f"CREATE UNIQUE INDEX ON {qualified} ({key});"
        )
    return f"Run as its owner: ALTER TABLE {qualified} ADD PRIMARY KEY ({key});"


def missing_index(session: Session, qualified: str, model: Model, oid: int) -> str | None:
    """The CREATE INDEX without which each question for keys reads the whole table; None where there is such an index."""
    key = model.key[0]
    [(is_there,)] = session.rows(
        """
        SELECT EXISTS (
            SELECT FROM pg_index AS i
            JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
            WHERE i.indrelid = $1::bigint::oid AND i.indisvalid AND i.indpred IS NULL AND a.attname = $2
        )
        """,
        oid,
        key,
        doing="reading the table's indexes",
    )
    return None if is_there else create_index(qualified, model)


def create_index(qualified: str, model: Model) -> str:
    """The CREATE INDEX for questions for keys. A hash index takes half of the disk that a btree takes (docs/capacity.md)."""
    return f"CREATE INDEX ON {qualified} USING hash ({quoted(model.key[0])})"
