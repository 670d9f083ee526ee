"""Exports from Distributed tables land what they would from plain ones, under a profile whose settings would shorten them.

The cluster has three shards, each a server process of its own. Each has rows of its own, and some rows are on two shards.
"""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from pg_exports import ClickHouseResource
from pg_exports.clickhouse import errors, settings
from pg_exports.connection_check import Setup, steps
from pg_exports.errors import PassingError, SourceError
from pg_exports.models import MODELS, Model, OwnModel, Part, PropertyFilter, Query, Selection
from pg_exports.models.columns import AddedColumn, with_columns
from pg_exports.postgres.table import Destination
from pg_exports.sandbox import Sandbox, sample_data, source_tables
from pg_exports_tests.clickhouse import servers
from pg_exports_tests.clickhouse.servers import Cluster
from pg_exports_tests.conftest import SAMPLE_EVENTS, TEAM, Source, Target, materialise, partition_key
from pg_exports_tests.models.comparison import differences
from pg_exports_tests.source_rows import HOUR, export_of

SHARDS = 3
HOURS = 12
PLAIN, LOCAL, DISTRIBUTED = "test_plain", "test_local", "test_distributed"

PROFILE = {
    "skip_unavailable_shards": 1,
    "distributed_group_by_no_merge": 1,
    "distributed_product_mode": "local",
    "optimize_skip_unused_shards": 1,
    "read_overflow_mode_leaf": "break",
}
"""What a user may have got from an administrator, and what a query is shortened or otherwise wrong by."""


@pytest.fixture(scope="module")
def cluster(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three servers. `exporter` has the settings of `PROFILE` on each."""
    folder = tmp_path_factory.mktemp("cluster")
    keeper = "<zookeeper><implementation>testkeeper</implementation></zookeeper>"
    with servers.cluster(sandbox, folder, SHARDS, settings=PROFILE, more=keeper) as running:
        yield running


@pytest.fixture(scope="module")
def plain(cluster: Cluster, sample_end: datetime) -> Source:
    """The rows in plain tables of the first server."""
    source_tables.create_tables(cluster.sandbox.execute, PLAIN)
    sample_data.fill(cluster.sandbox.execute, PLAIN, end=sample_end, hours=HOURS, events=SAMPLE_EVENTS)
    return Source(cluster.sandbox, PLAIN)


@pytest.fixture(scope="module")
def spread(cluster: Cluster, plain: Source) -> str:
    """The same rows over the shards, in local tables."""
    servers.distribute(cluster, plain.database, LOCAL)
    return LOCAL


@pytest.fixture(scope="module")
def distributed(cluster: Cluster, plain: Source, spread: str) -> Source:
    """Distributed tables over them. The cluster has a secret: shards are asked as the user who asks."""
    servers.over(cluster, DISTRIBUTED, plain.database, spread)
    return Source(cluster.sandbox, DISTRIBUTED)


@pytest.fixture(scope="module")
def by_password(cluster: Cluster, plain: Source, spread: str) -> Source:
    """The same over a cluster without a secret: shards are asked as the user whom its definition names."""
    database = f"{DISTRIBUTED}_by_password"
    servers.over(cluster, database, plain.database, spread, servers.AS_EXPORTER)
    return Source(cluster.sandbox, database)


OWN = OwnModel(
    name="visits",
    query="""
        WITH known AS (SELECT distinct_id FROM person_distinct_id2 WHERE team_id = {team_id})
        SELECT e.uuid AS uuid, e.distinct_id AS distinct_id, max(p.version) AS version, max(e.inserted_at) AS inserted_at
        FROM events AS e
        INNER JOIN person AS p ON p.id = e.person_id
        WHERE e.team_id = {team_id} AND e.inserted_at >= {interval_start} AND e.inserted_at < {interval_end}
            AND e.distinct_id IN (SELECT distinct_id FROM known)
        GROUP BY e.uuid, e.distinct_id
    """,
    columns={"uuid": "UUID", "distinct_id": "TEXT", "version": "BIGINT", "inserted_at": "TIMESTAMPTZ"},
    key=["uuid"],
).as_model()
"""A query as a user writes it who has not heard of shards."""

CHANGED = {
    "events": with_columns(
        MODELS["events"],
        {
            "elements": False,
            "is_known": AddedColumn(
                expression="e.distinct_id GLOBAL IN (SELECT distinct_id FROM person_distinct_id2)", type="BOOLEAN"
            ),
        },
    ),
    "persons": with_columns(
        MODELS["persons"],
        {"properties": False, "has_mail": AddedColumn(expression="properties LIKE '%@%'", type="BOOLEAN")},
    ),
    "sessions": with_columns(
        MODELS["sessions"], {"urls": False, "hour": AddedColumn(expression="toHour(start_timestamp)", type="INTEGER")}
    ),
}

FILTERS = {
    "events": (
        PropertyFilter(key="$current_url", operator="icontains", value="a"),
        PropertyFilter(key="email", operator="is_set", type="person"),
    ),
    "persons": (PropertyFilter(key="email", operator="is_set"),),
    "sessions": (),
}


def selected(end: datetime, name: str = "", **changes: Any) -> Selection:
    """The six hours before `end`."""
    starts = tuple(end - n * HOUR for n in range(6, 0, -1))
    settings: dict[str, Any] = {"team_id": TEAM, "start": starts[0], "end": end, "starts": starts}
    return Selection(**(settings | {"filters": FILTERS.get(name, ())} | changes))


def rows(clickhouse: ClickHouseResource, query: Query, model: Model) -> list[tuple[Any, ...]]:
    """Without those times in which the two copies of an event differ that was inserted twice: from one table, too, either is
    given."""
    with clickhouse.frames(query, model, log_comment="tests") as frames:
        return [
            tuple(tuple(value) if isinstance(value, list) else value for value in row)
            for frame in frames
            for row in frame.select(sorted({*frame.columns} - {"created_at", "inserted_at"})).rows()
        ]


def value(clickhouse: ClickHouseResource, sql: str) -> Any:
    [(answer,)] = clickhouse.rows(Query(sql, {}), log_comment="tests")
    return answer


def same(plain: Source, distributed: Source, query: Query, model: Model) -> int:
    """How many rows both sources have, the same ones."""
    expected = rows(plain.resource(), query, model)
    assert differences(rows(distributed.resource(), query, model), expected) == {}
    return len(expected)


# Answers


@pytest.mark.parametrize("table", ["events", "person", "person_distinct_id2", "raw_sessions"])
def test_no_shard_has_all_rows_and_some_rows_are_on_two(plain: Source, distributed: Source, table: str) -> None:
    everything = value(plain.resource(), f"SELECT count() FROM {table}")
    by_shard = Query(f"SELECT count() FROM {table} GROUP BY _shard_num", {})
    counts = [count for (count,) in distributed.resource().rows(by_shard, log_comment="tests")]
    assert len(counts) == SHARDS
    assert max(counts) < everything < sum(counts)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_same_rows_on_shards_as_in_one_table(
    plain: Source, distributed: Source, sample_end: datetime, name: str
) -> None:
    assert same(plain, distributed, MODELS[name].query(selected(sample_end)), MODELS[name]) > 100


@pytest.mark.parametrize("name", MODELS)
def test_so_it_has_with_filters_and_other_columns(
    plain: Source, distributed: Source, sample_end: datetime, name: str
) -> None:
    assert same(plain, distributed, CHANGED[name].query(selected(sample_end, name)), CHANGED[name]) > 100


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_same_rows_where_tuples_have_the_names_of_columns(
    plain: Source, distributed: Source, sample_end: datetime, name: str
) -> None:
    query, model = MODELS[name].query(selected(sample_end)), MODELS[name]
    naming = distributed.resource(settings={"enable_named_columns_in_function_tuple": 1})
    assert differences(rows(naming, query, model), rows(plain.resource(), query, model)) == {}


@pytest.mark.parametrize("model", [*MODELS.values(), OWN], ids=lambda model: model.name)
def test_the_parts_of_an_interval_are_the_same_on_shards(
    plain: Source, distributed: Source, sample_end: datetime, model: Model
) -> None:
    parts = [
        same(plain, distributed, model.query(selected(sample_end, starts=(), part=Part(number, 3))), model)
        for number in range(3)
    ]
    assert all(parts)
    assert sum(parts) == same(plain, distributed, model.query(selected(sample_end, starts=())), model)


@pytest.mark.parametrize("model", [*MODELS.values(), OWN], ids=lambda model: model.name)
def test_fingerprints_are_the_same_on_shards(
    plain: Source, distributed: Source, sample_end: datetime, model: Model
) -> None:
    starts = () if model is OWN else selected(sample_end).starts
    query = model.fingerprints(selected(sample_end, starts=starts))
    expected = sorted(plain.resource().rows(query, log_comment="tests"))
    assert sorted(distributed.resource().rows(query, log_comment="tests")) == expected
    assert sum(found[1] for found in expected) > 100


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_counted_once_however_many_shards_have_them(
    plain: Source, distributed: Source, sample_end: datetime, name: str
) -> None:
    query = MODELS[name].query(selected(sample_end))
    counted = distributed.resource().count(query, log_comment="tests")
    assert counted == plain.resource().count(query, log_comment="tests") > 100


def test_plain_in_and_join_in_a_query_of_the_users_own_see_all_shards(
    plain: Source, distributed: Source, sample_end: datetime
) -> None:
    query = OWN.query(selected(sample_end, starts=()))
    assert same(plain, distributed, query, OWN) > 100
    of_one_shard = distributed.resource(settings={"distributed_product_mode": "local"})
    assert differences(rows(of_one_shard, query, OWN), rows(plain.resource(), query, OWN)) != {}


@pytest.mark.parametrize("name", MODELS)
def test_exports_from_shards_land_what_those_from_one_table_do(
    plain: Source, distributed: Source, by_password: Source, target: Target, sample_end: datetime, name: str
) -> None:
    first, last = partition_key(sample_end - 3 * HOUR), partition_key(sample_end - HOUR)
    counts = []
    tables = []
    for source in (plain, distributed, by_password):
        tables.append(f"{name}_{source.database}")
        export = export_of(name, target, sample_end, table=tables[-1])
        ended = materialise(export, source.resource(), target.resource(), first, last)
        assert ended.error is None
        assert ended.reconciliation.passed
        counts.append(ended.counts)
    assert counts[0] == counts[1] == counts[2]
    in_all = f"SELECT count(*) FROM ({' INTERSECT '.join(f'TABLE {table}' for table in tables)}) AS rows"
    [(rows_in_all,)] = target.rows(in_all)
    assert [target.count(table) for table in tables] == 3 * [rows_in_all]
    assert rows_in_all > 0


@pytest.mark.parametrize("name", MODELS)
def test_the_connection_check_passes_on_distributed_tables(
    distributed: Source, target: Target, sample_end: datetime, name: str
) -> None:
    setup = Setup(name, MODELS[name], selected(sample_end), Destination(None, target.schema, name))
    found = {step.name: step for step in steps(setup, distributed.resource(), target.resource())}
    assert found["Source tables"].status == "passed"


def test_thousands_of_event_names_reach_the_shards(plain: Source, distributed: Source, sample_end: datetime) -> None:
    others = tuple(f"event {number:06} of a name that is some sixty bytes long, no more" for number in range(10_000))
    query = MODELS["events"].query(selected(sample_end, include_events=(*others, "$pageview")))
    assert same(plain, distributed, query, MODELS["events"]) > 100


# The shape of the queries, by ClickHouse's own rule: it denies a subquery that each shard would answer for itself


def denying(source: Source) -> ClickHouseResource:
    return source.resource(settings={"distributed_product_mode": "deny"})


@pytest.mark.parametrize("name", MODELS)
def test_no_model_has_a_subquery_that_each_shard_would_answer_for_itself(
    distributed: Source, sample_end: datetime, name: str
) -> None:
    for model in (MODELS[name], CHANGED[name]):
        query = model.query(selected(sample_end, name, part=Part(0, 2)))
        assert denying(distributed).count(query, log_comment="tests") > 0
        assert rows(denying(distributed), query, model)


@pytest.mark.parametrize("name", ["persons", "sessions"])
def test_a_subquery_without_global_is_denied(distributed: Source, sample_end: datetime, name: str) -> None:
    query = MODELS[name].query(selected(sample_end))
    with pytest.raises(SourceError, match=r"(?s)Code: 288\..*write GLOBAL IN and GLOBAL JOIN"):
        rows(denying(distributed), Query(query.sql.replace("GLOBAL ", ""), query.parameters), MODELS[name])


# Settings


def setting(clickhouse: ClickHouseResource, name: str) -> str:
    return str(value(clickhouse, f"SELECT toString(getSetting('{name}'))"))


@pytest.mark.parametrize(
    ("name", "sent", "wrong"),
    [
        ("skip_unavailable_shards", "false", 1),
        ("distributed_group_by_no_merge", "0", 1),
        ("read_overflow_mode_leaf", "throw", "break"),
        ("timeout_overflow_mode_leaf", "throw", "break"),
        ("transfer_overflow_mode", "throw", "break"),
    ],
)
def test_no_profile_and_no_connection_can_have_answers_shortened(
    distributed: Source, name: str, sent: str, wrong: object
) -> None:
    assert setting(distributed.resource(), name) == sent
    assert setting(distributed.resource(settings={name: wrong}), name) == sent


@pytest.mark.parametrize(
    ("name", "sent", "wanted"),
    [
        ("distributed_product_mode", "global", "local"),
        ("optimize_skip_unused_shards", "false", "true"),
        ("max_parallel_replicas", "1", "3"),
        ("max_replica_delay_for_distributed_queries", "60", "300"),
        ("fallback_to_stale_replicas_for_distributed_queries", "false", "true"),
    ],
)
def test_a_connections_settings_win_over_those_for_clusters_and_these_over_the_profile(
    distributed: Source, name: str, sent: str, wanted: str
) -> None:
    assert setting(distributed.resource(), name) == sent
    assert setting(distributed.resource(settings={name: wanted}), name) == wanted


def test_sequential_consistency_is_the_connections_own_choice(distributed: Source) -> None:
    assert setting(distributed.resource(), "select_sequential_consistency") == "0"
    chosen = distributed.resource(settings={"select_sequential_consistency": 1})
    assert setting(chosen, "select_sequential_consistency") == "1"


def test_settings_that_the_server_does_not_know_are_not_sent(
    distributed: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "PINNED", {**settings.PINNED, "of_a_later_version": 1})
    assert setting(distributed.resource(), "skip_unavailable_shards") == "false"


def test_a_limit_of_each_shard_that_would_shorten_the_answer_is_an_error(
    distributed: Source, sample_end: datetime
) -> None:
    query = MODELS["events"].query(selected(sample_end))
    limited = distributed.resource(settings={"max_rows_to_read_leaf": 100})
    with pytest.raises(SourceError, match=r"Code: 158\."):
        rows(limited, query, MODELS["events"])


def test_a_group_comes_once_where_a_shards_groups_would_stand_alone(plain: Source, distributed: Source) -> None:
    sql = "SELECT count() FROM (SELECT distinct_id FROM events GROUP BY distinct_id)"
    assert value(distributed.resource(), sql) == value(plain.resource(), sql)


# Shards and replicas that are not there


@pytest.fixture
def broken(cluster: Cluster, plain: Source, spread: str) -> Iterator[Source]:
    """A database in which the second shard of `events` is out of reach, and the table itself says that this may be."""
    skipping = "SETTINGS skip_unavailable_shards = 1"
    servers.over(cluster, "test_broken", plain.database, spread, servers.UNREACHABLE, skipping)
    yield Source(cluster.sandbox, "test_broken")
    cluster.sandbox.execute("DROP DATABASE test_broken SYNC")


def test_a_shard_that_does_not_answer_is_a_passing_error_and_never_skipped(
    broken: Source, sample_end: datetime
) -> None:
    skipping = broken.rows("SELECT uniqExact(_shard_num) FROM events SETTINGS skip_unavailable_shards = 1")
    assert skipping == [(1,)]
    query = MODELS["events"].query(selected(sample_end))
    with pytest.raises(PassingError, match=r"(?s)Code: 369\..*no replica that answers .*system\.clusters"):
        rows(broken.resource(), query, MODELS["events"])
    falling_back = broken.resource(settings={"fallback_to_stale_replicas_for_distributed_queries": 1})
    with pytest.raises(PassingError, match=r"(?s)Code: 279\..*127\.0\.0\.1:1.*No shard is ever skipped"):
        rows(falling_back, query, MODELS["events"])


def test_an_export_from_a_cluster_without_one_shard_lands_nothing(
    broken: Source, target: Target, sample_end: datetime
) -> None:
    export = export_of("events", target, sample_end)
    ended = materialise(export, broken.resource(), target.resource(), partition_key(sample_end - HOUR))
    assert ended.error is not None
    assert "(ALL_REPLICAS_ARE_STALE)" in ended.error
    assert ended.tries == 6
    assert target.count("events") == 0


@pytest.fixture
def behind(cluster: Cluster, plain: Source) -> Iterator[Source]:
    """A database whose `events` have one replica, which has lost its Keeper: it would answer with what it has."""
    execute = cluster.sandbox.execute
    execute("CREATE DATABASE test_behind")
    execute(
        f"CREATE TABLE test_behind.events_replicated AS {plain.database}.events ENGINE ="
        " ReplicatedReplacingMergeTree('/events', 'first', _timestamp) PARTITION BY toYYYYMM(timestamp)"
        " ORDER BY (team_id, toDate(timestamp), event, cityHash64(distinct_id), cityHash64(uuid))"
    )
    execute(
        "CREATE TABLE test_behind.events AS test_behind.events_replicated"
        f" ENGINE = Distributed('{servers.ALONE}', 'test_behind', 'events_replicated')"
    )
    yield Source(cluster.sandbox, "test_behind")
    execute("DROP DATABASE test_behind SYNC")


def test_replicas_that_are_all_behind_are_a_passing_error_unless_the_connection_says_otherwise(
    behind: Source, sample_end: datetime
) -> None:
    [(is_readonly,)] = behind.rows("SELECT is_readonly FROM system.replicas WHERE database = 'test_behind'")
    assert is_readonly
    query = MODELS["events"].query(selected(sample_end))
    with pytest.raises(PassingError, match=r"(?s)Code: 369\..*absolute_delay and is_readonly in system\.replicas"):
        rows(behind.resource(), query, MODELS["events"])
    falling_back = behind.resource(settings={"fallback_to_stale_replicas_for_distributed_queries": 1})
    assert rows(falling_back, query, MODELS["events"]) == []
    any_delay = behind.resource(settings={"max_replica_delay_for_distributed_queries": 0})
    assert rows(any_delay, query, MODELS["events"]) == []


# Refusals


REFUSED_BY_A_SHARD = (
    "Code: 497. DB::Exception: Received from shard-2:9000, 10.0.0.2. DB::Exception: default: Not enough privileges."
    " To execute this query, it's necessary to have the grant SELECT(uuid) ON posthog.sharded_events. (ACCESS_DENIED)"
)


def test_a_shards_refusal_names_the_shard_and_not_the_connections_own_settings() -> None:
    error = errors.refused(REFUSED_BY_A_SHARD, 497, "http://ch:8123")
    assert isinstance(error, SourceError)
    assert "The shard shard-2:9000 says so" in str(error)
    assert "GRANT SELECT ON <database>" not in str(error)


@pytest.mark.parametrize("code", [95, 96, 198, 209, 210, 225, 265, 279, 289, 369, 519, 735])
def test_what_may_pass_on_a_cluster_is_tried_again(code: int) -> None:
    assert isinstance(errors.refused(f"Code: {code}. DB::Exception: it.", code, "http://ch:8123"), PassingError)


@pytest.mark.parametrize("code", [288, 452, 507, 701])
def test_what_will_not_pass_on_a_cluster_says_what_to_do(code: int) -> None:
    error = errors.refused(f"Code: {code}. DB::Exception: it.", code, "http://ch:8123")
    assert isinstance(error, SourceError)
    assert "system.query_log" not in str(error)
