"""Every setting that a query pins, set to something else in the profile of a shard's user: the same rows."""

from collections.abc import Iterator
from datetime import datetime

import pytest

from pg_exports.clickhouse import settings
from pg_exports.models import MODELS, Model, Selection
from pg_exports.sandbox import Sandbox, sample_data, source_tables
from pg_exports.sandbox.clickhouse_config import ClickHouseUser, export_grants
from pg_exports_tests.clickhouse import servers
from pg_exports_tests.clickhouse.servers import Cluster
from pg_exports_tests.clickhouse.test_cluster_sources import OWN, rows
from pg_exports_tests.conftest import TEAM, Source
from pg_exports_tests.models.comparison import differences
from pg_exports_tests.source_rows import HOUR

PLAIN, LOCAL = "test_pinned_plain", "test_pinned_local"

OTHERS = {
    "compatibility": "24.8",
    "session_timezone": "Asia/Tokyo",
    "join_default_strictness": "ANY",
    "count_distinct_implementation": "uniq",
    "union_default_mode": "DISTINCT",
    "intersect_default_mode": "DISTINCT",
    "except_default_mode": "DISTINCT",
    "date_time_overflow_behavior": "saturate",
    "geotoh3_argument_order": "lon_lat",
    "date_time_input_format": "basic",
    "cast_string_to_date_time_mode": "basic",
    "date_time_output_format": "iso",
    "interval_output_format": "kusto",
    "bool_true_representation": "yes",
    "bool_false_representation": "no",
    "format_csv_delimiter": ";",
    "format_csv_null_representation": "nothing",
    "format_tsv_null_representation": "nothing",
}
"""Other values of those that are no numbers."""


def other(name: str) -> object:
    value = settings.PINNED[name]
    return OTHERS[name] if isinstance(value, str) else 1 - int(str(value))


NAMES = [*settings.ROWS, *settings.MEANING, *settings.TEXTS, *settings.WIRE]
USERS = [
    ClickHouseUser(f"pinned_{name}", "of the tests", export_grants("test_*"), {name: other(name)}) for name in NAMES
]


@pytest.fixture(scope="module")
def cluster(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory, sample_end: datetime) -> Iterator[Cluster]:
    with servers.cluster(sandbox, tmp_path_factory.mktemp("pinned"), 2, users=USERS) as running:
        source_tables.create_tables(running.sandbox.execute, PLAIN)
        sample_data.fill(running.sandbox.execute, PLAIN, end=sample_end, hours=4, events=600)
        servers.distribute(running, PLAIN, LOCAL)
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("user", USERS, ids=lambda user: user.name)
def test_no_profile_of_a_shards_user_changes_a_row(
    cluster: Cluster, sample_end: datetime, user: ClickHouseUser
) -> None:
    database = f"test_{user.name}"
    servers.over(cluster, database, PLAIN, LOCAL, user.name)
    plain, distributed = Source(cluster.sandbox, PLAIN).resource(), Source(cluster.sandbox, database).resource()
    models: list[Model] = [*MODELS.values(), OWN]
    for model in models:
        query = model.query(Selection(TEAM, sample_end - HOUR, sample_end))
        expected = rows(plain, query, model)
        assert expected
        assert differences(rows(distributed, query, model), expected) == {}
