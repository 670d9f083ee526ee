"""The models' queries are such that each shard of a cluster answers for its own rows alone, and the initiator for the rest.

ClickHouse's own rule is tested on Distributed tables in `clickhouse/test_cluster_sources`. Here is what it does not see: a
subquery that is asked on the initiator today, and would be asked on each shard after a change around it.
"""

import re
from datetime import UTC, datetime, timedelta

import pytest

from pg_exports.models import MODELS, Part, PropertyFilter, Query, Selection
from pg_exports.models.columns import AddedColumn, with_columns
from pg_exports_tests.conftest import TEAM, Source

END = datetime(2026, 11, 1, tzinfo=UTC)
STARTS = (END - timedelta(hours=2), END - timedelta(hours=1))

FILTERS = {
    "events": (PropertyFilter(key="plan", value=["pro", "team"]), PropertyFilter(key="age", operator="gt", value=30)),
    "persons": (PropertyFilter(key="plan", value=["pro", "team"]),),
    "sessions": (),
}


def queries(name: str) -> list[Query]:
    """Every query of a model, with all that can be in it."""
    selection = Selection(TEAM, STARTS[0], END, starts=STARTS, filters=FILTERS[name], part=Part(0, 2))
    added = AddedColumn(expression="toString(team_id)", type="TEXT")
    model, changed = MODELS[name], with_columns(MODELS[name], {"team": added})
    asked = [model.query, changed.query, (model.without_dictionary or model).query, model.fingerprints]
    return [query(selection) for query in asked]


def as_clickhouse_reads_it(source: Source, sql: str) -> str:
    """On one line, without comments, as its parser has it. An ARRAY JOIN, which joins no table, is one word."""
    [(formatted,)] = source.rows("SELECT formatQuerySingleLine({sql:String})", {"sql": sql})
    return str(formatted).replace("ARRAY JOIN", "ARRAY_JOIN")


def subqueries_of_each_shard(sql: str) -> list[str]:
    """Where a query has IN (SELECT ...) or a JOIN without GLOBAL, with the words before."""
    found = re.finditer(r"\S+ (?:NOT )?(?:IN \((?:SELECT|WITH)|(?:\w+ )*JOIN)\b", sql)
    return [match[0] for match in found if not re.search(r"GLOBAL", match[0])]


def tables_read(sql: str) -> set[str]:
    """The names behind FROM and JOIN, without those of the WITH."""
    names = set(re.findall(r"\b(?:FROM|JOIN) (\w+)\b", sql))
    return names - set(re.findall(r"\b(\w+) AS \(\s*SELECT", sql))


@pytest.mark.parametrize("name", MODELS)
def test_every_subquery_over_a_source_table_is_global(source: Source, name: str) -> None:
    for query in queries(name):
        assert subqueries_of_each_shard(as_clickhouse_reads_it(source, query.sql)) == []


@pytest.mark.parametrize("name", MODELS)
def test_one_that_is_not_global_is_found_wherever_it_stands(source: Source, name: str) -> None:
    sql = MODELS[name].query(Selection(TEAM, STARTS[0], END)).sql
    places = [match.start() for match in re.finditer("GLOBAL ", sql)]
    assert len(places) >= 2
    for place in places:
        spoilt = sql[:place] + sql[place + len("GLOBAL ") :]
        assert len(subqueries_of_each_shard(as_clickhouse_reads_it(source, spoilt))) == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_model_reads_its_source_tables_and_no_other(source: Source, name: str) -> None:
    read = set[str]()
    for query in queries(name):
        read |= tables_read(as_clickhouse_reads_it(source, query.sql))
    assert read == set(MODELS[name].source_tables)
