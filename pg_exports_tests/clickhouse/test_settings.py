"""Every boolean and numeric setting that ClickHouse has, alone in the profile of an export's user: the same rows come, or
an error that names it. Those with which nothing can be decided are in `sweep.UNDECIDED`, with the reason.
"""

from collections.abc import Iterator
from datetime import datetime

import pytest

from pg_exports import ClickHouseResource
from pg_exports.sandbox import Sandbox, clickhouse_process
from pg_exports.sandbox.clickhouse_config import ClickHouseUser
from pg_exports.sandbox.clickhouse_process import ClickHouseServer
from pg_exports_tests.clickhouse import sweep
from pg_exports_tests.clickhouse.servers import START_SECONDS, administrator


@pytest.fixture(scope="module")
def users(sandbox: Sandbox) -> list[ClickHouseUser]:
    return sweep.profiles(sandbox.client)


@pytest.fixture(scope="module")
def server(
    users: list[ClickHouseUser], tmp_path_factory: pytest.TempPathFactory, sample_end: datetime
) -> Iterator[ClickHouseServer]:
    running = clickhouse_process.start(
        tmp_path_factory.mktemp("settings"),
        password=sweep.PASSWORD,
        users=[*users, *(user for user, _ in sweep.together(users))],
        timeout=START_SECONDS,
    )
    with administrator(running) as client:
        sweep.fill(client, sample_end)
    yield running
    clickhouse_process.stop(running)


@pytest.mark.slow
def test_each_setting_of_a_profile_gives_the_same_rows_or_an_error_that_names_it(
    server: ClickHouseServer, users: list[ClickHouseUser], sample_end: datetime
) -> None:
    def connection(user: str) -> ClickHouseResource:
        return sweep.connection(server, user)

    expected = sweep.answers(connection(server.user), sample_end)
    assert len(users) > 1000
    sweep.hold(users, connection, expected, sample_end)
