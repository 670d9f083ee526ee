"""Shards that shorten their answers, are killed, freeze, or are cut off in mid-answer: all rows land, or the run fails."""

import contextlib
import dataclasses
from collections.abc import Iterator
from datetime import datetime

import pytest

from pg_exports import ClickHouseResource
from pg_exports.errors import ExportError, PassingError, SourceError
from pg_exports.models import MODELS, Model, OwnModel, Selection
from pg_exports.sandbox import Sandbox, sample_data, source_tables
from pg_exports.sandbox.clickhouse_config import ClickHouseUser
from pg_exports_tests.clickhouse import servers, users
from pg_exports_tests.clickhouse.servers import Cluster
from pg_exports_tests.clickhouse.test_cluster_sources import OWN, rows
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.faults import EACH_ROW_ONCE, NOTHING, ROWS, eventually, fill, landed
from pg_exports_tests.models.comparison import differences
from pg_exports_tests.postgres.tcp_proxy import TcpProxy, tcp_proxy
from pg_exports_tests.source_rows import HOUR, export_of

PLAIN, LOCAL = "test_faults_plain", "test_faults_local"
SAMPLE, SAMPLE_LOCAL = "test_faults_sample", "test_faults_sample_local"

NOT_ON_SHARDS = ("a_twentieth_of_a_second", "twice")
"""A limit in time that this cluster keeps, and a `select` that changes only what reads a column of its own."""

GUARDED = ClickHouseUser(
    "guarded",
    users.PASSWORD,
    users.SHORTENED[0].grants,
    {"limit": 10, "max_rows_to_read": 1000, "max_result_rows": 1000, "force_primary_key": 1},
)
"""Limits that are errors when they are reached, beside one that is not."""

SHARD_USERS = (
    *(user for user in users.SHORTENED if user.name not in NOT_ON_SHARDS),
    users.FILTERED_BY_A_COLUMN,
    GUARDED,
)
"""As whom shards are asked, in a cluster of the user's name each."""

NO_TIME = ClickHouseUser(
    "no_time",
    users.PASSWORD,
    users.SHORTENED[0].grants,
    {"max_execution_time": 0.001, "timeout_overflow_mode": "break"},
)


@pytest.fixture(scope="module")
def hour() -> datetime:
    return datetime.fromisoformat("2026-11-20T10:00:00+00:00")


@pytest.fixture(scope="module")
def cluster(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("faults")
    with servers.cluster(sandbox, folder, 2, users=(*SHARD_USERS, NO_TIME)) as running:
        yield running


@pytest.fixture(scope="module")
def plain(cluster: Cluster, hour: datetime) -> Source:
    """`ROWS` events of one hour, in a table of the first server."""
    source_tables.create_tables(cluster.sandbox.execute, PLAIN)
    source = Source(cluster.sandbox, PLAIN)
    fill(source, hour)
    servers.distribute(cluster, PLAIN, LOCAL)
    return source


def over(cluster: Cluster, plain: Source, definition: str) -> Source:
    database = f"test_over_{definition}"
    if not cluster.sandbox.client.command(f"EXISTS DATABASE {database}"):
        servers.over(cluster, database, plain.database, LOCAL, definition)
    return Source(cluster.sandbox, database)


def events(clickhouse: ClickHouseResource, hour: datetime) -> list[tuple[object, ...]]:
    model: Model = MODELS["events"]
    query = model.query(Selection(TEAM, hour, hour + HOUR))
    with clickhouse.frames(query, model, log_comment="tests") as frames:
        return [row for frame in frames for row in frame.select("uuid", "distinct_id", "timestamp").rows()]


# Profiles of a shard's user


@pytest.mark.parametrize("shards", ["", "_alone"], ids=["two shards", "one remote shard"])
@pytest.mark.parametrize("user", [*SHARD_USERS, NO_TIME], ids=lambda user: user.name)
def test_no_profile_of_a_shards_user_shortens_an_answer_without_a_word(
    cluster: Cluster, plain: Source, hour: datetime, user: ClickHouseUser, shards: str
) -> None:
    distributed = over(cluster, plain, user.name + shards)
    on_the_shard = Source(dataclasses.replace(cluster.sandbox, clickhouse=cluster.servers[-1]), LOCAL)
    expected = events((on_the_shard if shards else plain).resource(), hour)
    try:
        found = events(distributed.resource(), hour)
    except (ExportError, PassingError) as error:
        assert any(name in str(error) for name in user.settings if not name.endswith("_mode")), str(error)  # noqa: PT017
    else:
        assert differences(found, expected) == {}
        assert len(found) > ROWS / 3


@pytest.fixture(scope="module")
def sample(cluster: Cluster, sample_end: datetime) -> Source:
    """Sample data, on the first server and over the shards."""
    source_tables.create_tables(cluster.sandbox.execute, SAMPLE)
    sample_data.fill(cluster.sandbox.execute, SAMPLE, end=sample_end, hours=6, events=1000)
    servers.distribute(cluster, SAMPLE, SAMPLE_LOCAL)
    return Source(cluster.sandbox, SAMPLE)


@pytest.mark.parametrize("user", SHARD_USERS, ids=lambda user: user.name)
def test_under_no_profile_of_a_shards_user_a_model_has_other_rows(
    cluster: Cluster, sample: Source, sample_end: datetime, user: ClickHouseUser
) -> None:
    database = f"test_sample_{user.name}"
    servers.over(cluster, database, SAMPLE, SAMPLE_LOCAL, user.name)
    for model in (*MODELS.values(), OWN):
        query = model.query(Selection(TEAM, sample_end - 3 * HOUR, sample_end))
        expected = rows(sample.resource(), query, model)
        assert len(expected) > 20
        try:
            found = rows(Source(cluster.sandbox, database).resource(), query, model)
        except (ExportError, PassingError) as error:
            assert any(name in str(error) for name in user.settings if not name.endswith("_mode")), str(error)  # noqa: PT017
        else:
            assert differences(found, expected) == {}


SIMPLE = OwnModel(
    name="simple",
    query="SELECT uuid FROM test_over_limit_10.events WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end}",
    columns={"uuid": "UUID"},
    key=["uuid"],
).as_model()
"""Its rows pass through the asked server as they come from the shards, which is how some of them would be missing."""


def test_a_simple_query_of_the_users_own_over_another_database_is_refused_too(
    cluster: Cluster, plain: Source, hour: datetime
) -> None:
    over(cluster, plain, "limit_10")
    query = SIMPLE.query(Selection(TEAM, hour, hour + HOUR))
    with (
        pytest.raises(SourceError, match=r"test_over_limit_10\.events .* changes its answers"),
        plain.resource().frames(query, SIMPLE, log_comment="tests"),
    ):
        pass


def test_what_limits_the_asking_user_does_not_keep_a_short_answer_from_being_found(
    cluster: Cluster, plain: Source, hour: datetime
) -> None:
    distributed = over(cluster, plain, "offset_5_alone")
    guarded = distributed.resource(settings={"max_rows_to_read": 1000, "max_result_rows": 100, "force_primary_key": 1})
    with pytest.raises(SourceError, match="changes its answers"):
        events(guarded, hour)


def test_shards_that_have_no_rows_yet_are_as_good_as_others(cluster: Cluster, plain: Source, hour: datetime) -> None:
    database = "test_over_empty"
    cluster.execute(f"CREATE DATABASE {database}_local")
    for table in servers.SOURCES:
        cluster.execute(f"CREATE TABLE {database}_local.{table} AS {plain.database}.{table}", [cluster.servers[0]])
        cluster.execute(f"CREATE TABLE {database}_local.{table} AS {LOCAL}.{table}", cluster.servers[1:])
    servers.over(cluster, database, PLAIN, f"{database}_local")
    servers.over(cluster, f"{database}_twice", PLAIN, database, servers.ALONE)
    for name in (database, f"{database}_twice"):
        assert events(Source(cluster.sandbox, name).resource(), hour) == []


# Shards that go


@pytest.fixture
def shard_by_proxy(
    sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory, hour: datetime
) -> Iterator[tuple[Cluster, TcpProxy]]:
    """A cluster in which the second server is reached through a proxy."""
    with contextlib.ExitStack() as opened:
        proxies: list[TcpProxy] = []

        def route(port: int) -> int:
            proxies.append(opened.enter_context(tcp_proxy(port)))
            return proxies[-1].port

        folder = tmp_path_factory.mktemp("proxied")
        running = opened.enter_context(servers.cluster(sandbox, folder, 2, route=route))
        source_tables.create_tables(running.sandbox.execute, PLAIN)
        fill(Source(running.sandbox, PLAIN), hour)
        servers.distribute(running, PLAIN, LOCAL)
        servers.over(running, "test_over_whole", PLAIN, LOCAL)
        yield running, proxies[1]


MID_ANSWER = 50_000
"""Bytes that a shard sends of the hour's events before it is struck: some of all, and more than of any other answer."""


def test_a_shard_that_is_cut_off_in_mid_answer_fails_the_try_and_the_next_one_brings_each_row_once(
    shard_by_proxy: tuple[Cluster, TcpProxy], target: Target, run: RunExport, hour: datetime
) -> None:
    cluster, proxy = shard_by_proxy
    source = Source(cluster.sandbox, "test_over_whole").resource()
    export = export_of("events", target, hour, start=hour - HOUR)
    is_cut = proxy.after_answered(MID_ANSWER, proxy.cut)
    done = run(export, partition_key(hour), clickhouse=source)
    assert is_cut.is_set()
    assert done.error is None
    assert done.tries > 1
    assert landed(target) == EACH_ROW_ONCE


def test_a_shard_that_freezes_is_a_passing_error_and_nothing_lands(
    shard_by_proxy: tuple[Cluster, TcpProxy], target: Target, run: RunExport, hour: datetime
) -> None:
    cluster, _ = shard_by_proxy
    source = Source(cluster.sandbox, "test_over_whole")
    impatient = {"receive_timeout": 1, "connect_timeout_with_failover_ms": 500, "use_hedged_requests": 0}
    with cluster.frozen(1), pytest.raises(PassingError, match=r"Code: (209|279|210|369|519|159)|timed out"):
        events(source.resource(settings=impatient, read_timeout=10), hour)
    export = export_of("events", target, hour, start=hour - HOUR)

    def lands() -> bool:
        # The server that is asked remembers for a while that the shard did not answer.
        return run(export, partition_key(hour), clickhouse=source.resource()).error is None

    eventually(lands, seconds=120)
    assert landed(target) == EACH_ROW_ONCE


def test_a_shard_that_is_killed_in_mid_answer_fails_the_run_and_the_next_run_completes_the_interval(
    shard_by_proxy: tuple[Cluster, TcpProxy], target: Target, run: RunExport, hour: datetime
) -> None:
    cluster, proxy = shard_by_proxy
    source = Source(cluster.sandbox, "test_over_whole")
    export = export_of("events", target, hour, start=hour - HOUR)

    def kill() -> None:
        # What it has sent already would still arrive.
        cluster.kill(1)
        proxy.cut()

    is_killed = proxy.after_answered(MID_ANSWER, kill)
    failed = run(export, partition_key(hour), clickhouse=source.resource())
    assert is_killed.is_set()
    assert failed.error is not None
    assert landed(target) == NOTHING
    cluster.start_again(1)
    assert run(export, partition_key(hour), clickhouse=source.resource()).counts == (ROWS, 0, 0)
    assert landed(target) == EACH_ROW_ONCE
