"""Every boolean setting that ClickHouse has and every number that may be 1, each alone in the profile of a shard's user: the
same rows come, or an error that names it. Those with which nothing can be decided are in `sweep.UNDECIDED`, with the reason.
"""

from collections.abc import Iterator
from datetime import datetime

import pytest

from pg_exports import ClickHouseResource
from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.clickhouse_config import ClickHouseUser, export_grants
from pg_exports_tests.clickhouse import servers, sweep
from pg_exports_tests.clickhouse.servers import Cluster, administrator

PLAIN = ClickHouseUser("plain", sweep.PASSWORD, export_grants("test_*"))
LOCAL, DISTRIBUTED = "test_sweep_local", "test_sweep_distributed"


@pytest.fixture(scope="module")
def users(sandbox: Sandbox) -> list[ClickHouseUser]:
    return sweep.profiles(sandbox.client, ("1",))


@pytest.fixture(scope="module")
def cluster(
    sandbox: Sandbox, users: list[ClickHouseUser], tmp_path_factory: pytest.TempPathFactory, sample_end: datetime
) -> Iterator[Cluster]:
    """Two servers. The rows are on both; the cluster has a secret, so the second is asked as the user who asks."""
    folder = tmp_path_factory.mktemp("settings_of_shards")
    with servers.cluster(
        sandbox, folder, 2, users_of_shards=[PLAIN, *users, *(user for user, _ in sweep.together(users))]
    ) as running:
        with administrator(running.servers[0]) as client:
            sweep.fill(client, sample_end)
        tables = [*servers.SOURCES, "typed"]
        servers.distribute(running, sweep.DATABASE, LOCAL, tables)
        servers.over(running, DISTRIBUTED, sweep.DATABASE, LOCAL, tables=tables)
        yield running


@pytest.mark.slow
def test_each_setting_of_a_shards_profile_gives_the_same_rows_or_an_error_that_names_it(
    cluster: Cluster, users: list[ClickHouseUser], sample_end: datetime
) -> None:
    def connection(user: str, database: str = DISTRIBUTED) -> ClickHouseResource:
        return sweep.connection(cluster.servers[0], user, database)

    # Of the own model's rows some are on both, which the plain table has once; its sums are others for that.
    expected = sweep.answers(connection(PLAIN.name), sample_end)
    whole = sweep.answers(connection(PLAIN.name, sweep.DATABASE), sample_end)
    assert {name for name, rows in whole.items() if rows != expected[name]} == {
        sweep.OWN.name,
        f"{sweep.OWN.name}, fingerprints",
    }
    assert len(users) > 1000
    sweep.hold(users, connection, expected, sample_end)
