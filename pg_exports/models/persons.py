"""persons: one row for each distinct_id, with the person that it maps to now, in its latest state."""

from pg_exports.models import filters
from pg_exports.models.model import (
    MORE_COLUMNS,
    Column,
    Kind,
    Merge,
    Model,
    Query,
    Selection,
    integer,
    jsonb,
    text,
    timestamptz,
)
from pg_exports.models.model import (
    fingerprints as fingerprints_of,
)

# The ids that the interval touches come first, so that only their rows are aggregated: of 1.2 million mappings with
# 5,770 touched that takes half the time and a third of the memory of grouping them all. The intervals are gathered in the
# same pass over those rows.
#
# Of columns alone some versions (24.8) make a tuple with their names, which shards do not know: `identity` keeps it nameless.
SQL = """
WITH
    touched_mappings AS (
        SELECT DISTINCT pdi.distinct_id AS distinct_id
        FROM person_distinct_id2 AS pdi
        WHERE pdi.team_id = {team_id:Int64}
            AND pdi._timestamp >= {interval_start:DateTime64(6, 'UTC')}
            AND pdi._timestamp < {interval_end:DateTime64(6, 'UTC')}
    ),
    touched_persons AS (
        SELECT DISTINCT p.id AS person_id
        FROM person AS p
        WHERE p.team_id = {team_id:Int64}
            AND p._timestamp >= {interval_start:DateTime64(6, 'UTC')}
            AND p._timestamp < {interval_end:DateTime64(6, 'UTC')}
    ),
    mappings AS (
        SELECT
            pdi.distinct_id AS distinct_id,
            argMax((pdi.person_id, identity(pdi.is_deleted)), __STATE_OF_pdi__) AS latest,
            latest.1 AS person_id,
            latest.2 AS is_deleted,
            max(pdi.version) AS version,
            max(__STATE_OF_pdi__) AS state,
            groupUniqArrayIf(
                roundDown(toUnixTimestamp64Micro(toDateTime64(pdi._timestamp, 6, 'UTC')), {boundaries:Array(Int64)}),
                pdi._timestamp >= {interval_start:DateTime64(6, 'UTC')}
                    AND pdi._timestamp < {interval_end:DateTime64(6, 'UTC')}
            ) AS intervals
        FROM person_distinct_id2 AS pdi
        WHERE pdi.team_id = {team_id:Int64}
            AND pdi.distinct_id GLOBAL IN (
                SELECT distinct_id FROM touched_mappings
                UNION DISTINCT
                SELECT distinct_id FROM person_distinct_id2
                WHERE team_id = {team_id:Int64} AND person_id GLOBAL IN (SELECT person_id FROM touched_persons)
            ) __PART__
        GROUP BY pdi.distinct_id
        HAVING notEmpty(intervals) OR person_id GLOBAL IN (SELECT person_id FROM touched_persons)
    ),
    persons AS (
        SELECT
            p.id AS person_id,
            argMax((p.properties, p.created_at, identity(p.is_deleted)), __STATE_OF_p__) AS latest,
            latest.1 AS properties,
            latest.2 AS created_at,
            latest.3 AS is_deleted,
            max(p.version) AS version,
            max(__STATE_OF_p__) AS state,
            groupUniqArrayIf(
                roundDown(toUnixTimestamp64Micro(toDateTime64(p._timestamp, 6, 'UTC')), {boundaries:Array(Int64)}),
                p._timestamp >= {interval_start:DateTime64(6, 'UTC')}
                    AND p._timestamp < {interval_end:DateTime64(6, 'UTC')}
            ) AS intervals
        FROM person AS p
        WHERE p.team_id = {team_id:Int64} AND p.id GLOBAL IN (SELECT person_id FROM mappings)
        GROUP BY p.id
    )
SELECT
    {team_id:Int64} AS team_id,
    mappings.distinct_id AS distinct_id,
    toString(mappings.person_id) AS person_id,
    nullIf(persons.properties, '') AS properties,
    mappings.version AS person_distinct_id_version,
    persons.version AS person_version,
    toDateTime64(persons.created_at, 6, 'UTC') AS created_at,
    persons.is_deleted OR mappings.is_deleted AS is_deleted,
    cityHash64({team_id:Int64}, mappings.distinct_id) AS identity,
    cityHash64(identity, mappings.state, persons.state) AS row_state,
    interval_start __MORE_COLUMNS__
FROM mappings
GLOBAL INNER JOIN persons ON persons.person_id = mappings.person_id
ARRAY JOIN arrayDistinct(arrayConcat(mappings.intervals, persons.intervals)) AS interval_start
""".replace("__MORE_COLUMNS__", MORE_COLUMNS)

# The latest of a person's or a mapping's rows has the greatest: by `version`, then by `_timestamp`, then by `_offset`. As one
# number, as to compare tuples takes three times as long.
_STATE = (
    "bitOr(bitShiftLeft(toInt256({0}.version), 96),"
    " toInt256(bitOr(bitShiftLeft(toUInt128(toUnixTimestamp({0}._timestamp)), 64), toUInt128({0}._offset))))"
)
for _table in ("pdi", "p"):
    SQL = SQL.replace(f"__STATE_OF_{_table}__", _STATE.format(_table))

_DOCUMENTS: dict[filters.FilterType, str] = {"person": "persons.properties"}


# When the latest row of a mapping and of its person came; in the lower half of that row's number.
_LATEST_AT = (
    "1000000 * toInt64(bitAnd(bitShiftRight(greatest("
    "bitAnd(mappings.state, __LOWER__), bitAnd(persons.state, __LOWER__)), 64), 4294967295))"
).replace("__LOWER__", "toInt256(bitNot(bitShiftLeft(bitNot(toUInt128(0)), 96)))")

_IS_LATEST = f"""interval_start = roundDown({_LATEST_AT}, {{boundaries:Array(Int64)}})
    AND {_LATEST_AT} < toUnixTimestamp64Micro({{interval_end:DateTime64(6, 'UTC')}})"""


def query(selection: Selection) -> Query:
    """Every distinct_id, in its latest state, for each interval in which its mapping or its person has a row."""
    return _query(selection)


def latest(selection: Selection) -> Query:
    """The same for that interval alone in which the latest row of the two came."""
    return _query(selection, _IS_LATEST)


def _query(selection: Selection, *conditions: str) -> Query:
    on_properties = filters.conditions(selection.filters, _DOCUMENTS)
    conditions = (*conditions, *on_properties.sql)
    where = "WHERE " + "\n    AND ".join(conditions) + "\n" if conditions else ""
    sql = SQL.replace(" __PART__", selection.part.condition("cityHash64(pdi.distinct_id)"))
    return Query(sql + where, selection.parameters | on_properties.parameters)


def fingerprints(selection: Selection) -> Query:
    """The fingerprint of each of the intervals that the selection consists of, in one query."""
    rows = query(selection)
    return Query(fingerprints_of(rows.sql), rows.parameters)


PERSONS = Model(
    name="persons",
    description="Every distinct_id with the person that it maps to and the person's latest properties.",
    columns=(
        integer("team_id", "person_distinct_id2.team_id"),
        text("distinct_id", "person_distinct_id2.distinct_id"),
        text("person_id", "person_distinct_id2.person_id"),
        jsonb("properties", "person.properties"),
        integer("person_distinct_id_version", "person_distinct_id2.version"),
        integer("person_version", "person.version"),
        timestamptz("created_at", "person.created_at"),
        Column(
            "is_deleted",
            Kind.BOOLEAN,
            "BOOLEAN",
            optional=True,
            sources=("person.is_deleted", "person_distinct_id2.is_deleted"),
        ),
    ),
    key=("team_id", "distinct_id"),
    merge=Merge(version=("person_distinct_id_version", "person_version")),
    query=query,
    fingerprints=fingerprints,
    latest=latest,
    filter_types=tuple(_DOCUMENTS),
    timestamps=("created_at", "created_at"),
    source_tables=("person", "person_distinct_id2"),
)
