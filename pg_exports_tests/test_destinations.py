"""What docs/destinations.md and the README say of tables by month and by hash: their own SQL, run as the tables' owner would
run it, and exports into what it makes.
"""

import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psycopg2
import pytest

from pg_exports.models import MODELS
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.table import Destination, create_statement
from pg_exports.sandbox import postgres_server
from pg_exports.sandbox.servers import DATABASE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.faults import ROWS, fill_persons
from pg_exports_tests.source_rows import event, export_of

AUGUST, SEPTEMBER, OCTOBER, NOVEMBER = (datetime(2026, month, 15, 12, tzinfo=UTC) for month in (8, 9, 10, 11))


class Page:
    """The page's SQL, block by block, as it is in a test's own schema."""

    def __init__(self, file: Path, target: Target) -> None:
        self._blocks = re.findall(r"```sql\n(.*?)```", file.read_text(), re.DOTALL)
        self._target = target

    def block(self, telling: str) -> str:
        """The one block that has these words."""
        [block] = [block for block in self._blocks if telling in block]
        return str(block)

    def run(self, telling: str, instead: tuple[str, str] = ("", "")) -> None:
        """Run a block through psql as the superuser, with other words instead of some."""
        self.execute(self.block(telling).replace(*instead))

    def execute(self, sql: str) -> None:
        script = sql.replace("posthog.", f"{self._target.schema}.").replace("'posthog'", f"'{self._target.schema}'")
        psql = self._target.sandbox.postgres.binaries / "psql"
        uri = self._target.sandbox.postgres.admin_uri_of(DATABASE)
        command = [str(psql), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", uri, "-f", "-"]
        ran = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr


@pytest.fixture
def page(repository: Path, target: Target) -> Page:
    return Page(repository / "docs" / "destinations.md", target)


def by_partition(target: Target) -> dict[str, int]:
    rows = target.rows("SELECT tableoid::regclass::text, count(*) FROM events GROUP BY 1")
    return {str(partition): int(count) for partition, count in rows}


def test_the_tables_have_the_columns_and_keys_that_an_export_would_make(page: Page) -> None:
    for model in ("events", "persons"):
        made = create_statement(Destination(None, "posthog", model), MODELS[model])
        expected = made.replace('"', "").replace(" IF NOT EXISTS", "") + " PARTITION BY"
        assert expected in page.block(f"CREATE TABLE posthog.{model} (")


def test_the_table_by_month_of_the_readme_takes_what_an_export_sends(
    repository: Path, source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    Page(repository / "README.md", target).run("PARTITION BY RANGE (timestamp)")
    source.insert("events", *(event(hour, timestamp=moment) for moment in (OCTOBER, NOVEMBER)))
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (2, 0, 0)
    assert by_partition(target) == {"events_default": 1, "events_2026_11": 1}


def test_months_are_made_ahead_filled_moved_out_of_the_default_partition_and_dropped(
    source: Source, target: Target, page: Page, run: RunExport, hour: datetime
) -> None:
    page.run("CREATE FUNCTION posthog.add_months")
    for _ in range(2):
        page.execute("SELECT posthog.add_months(current_date, 3);")
    export, key = export_of("events", target, hour), partition_key(hour)
    source.insert("events", *(event(hour, timestamp=moment) for moment in (AUGUST, SEPTEMBER, OCTOBER)))
    assert run(export, key).counts == (3, 0, 0)
    assert by_partition(target) == {"events_default": 1, "events_2026_09": 1, "events_2026_10": 1}
    page.run("WITH moved AS")
    assert by_partition(target) == {"events_2026_08": 1, "events_2026_09": 1, "events_2026_10": 1}
    assert run(export, key).counts == (0, 0, 3)
    page.run("DROP TABLE posthog.events_2026_09")
    # It comes again when the interval is compared with the table: into the default partition.
    assert run(export, key).counts == (1, 0, 2)
    assert by_partition(target) == {"events_default": 1, "events_2026_08": 1, "events_2026_10": 1}
    assert run(export, key).counts == (0, 0, 3)


def test_an_index_is_made_partition_by_partition_and_new_months_have_it(target: Target, page: Page) -> None:
    page.run("CREATE FUNCTION posthog.add_months")
    page.run("ON ONLY posthog.events")
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'events_uuid'::regclass"
    assert target.rows(valid) == [(False,)]
    rest = page.block("ON ONLY posthog.events").partition("\n")[2]
    for month in ("2026_09", "2026_11", "2026_12", "2027_01", "default"):
        if month != "default":
            page.execute(f"DROP TABLE posthog.events_{month};")
        else:
            page.execute(rest.replace("2026_10", month))
    assert target.rows(valid) == [(True,)]
    page.execute("SELECT posthog.add_months('2027-03-01', 1);")
    assert target.rows("SELECT count(*) FROM pg_indexes WHERE tablename = 'events_2027_03'") == [(1,)]


def test_persons_are_merged_into_partitions_by_hash(
    source: Source, target: Target, page: Page, run: RunExport, hour: datetime
) -> None:
    page.run("PARTITION BY HASH")
    fill_persons(source, hour)
    export = export_of("persons", target, hour)
    assert run(export, partition_key(hour)).counts == (ROWS, 0, 0)
    assert run(export, partition_key(hour)).counts == (0, 0, ROWS)
    assert target.rows("SELECT count(DISTINCT tableoid) FROM persons") == [(4,)]


def test_persons_by_month_are_refused_before_a_row_is_sent(
    source: Source, target: Target, page: Page, run: RunExport, hour: datetime
) -> None:
    table = page.block("PARTITION BY HASH").partition(";")[0] + ";"
    by_month = table.replace("distinct_id)\n)", "distinct_id, created_at)\n)").replace(
        "HASH (distinct_id)", "RANGE (created_at)"
    )
    page.execute(f"{by_month} GRANT INSERT, SELECT, UPDATE ON posthog.persons TO exporter;")
    fill_persons(source, hour)
    refused = run(export_of("persons", target, hour), partition_key(hour)).error or ""
    assert "has no primary key on (team_id, distinct_id), by which persons are merged" in refused
    assert (
        "It is partitioned by RANGE (created_at), and Postgres wants that in each key: make the table anew" in refused
    )


def test_what_is_asked_about_readers_and_vacuum_can_be_asked(page: Page) -> None:
    page.run("backend_xmin")


# While a load holds the table, by the page's own table of who waits.
OF_NOVEMBER = "FOR VALUES FROM ('2027-11-01') TO ('2027-12-01')"
WAITING = {
    "CREATE INDEX ON events (uuid)": True,
    f"CREATE TABLE november PARTITION OF events {OF_NOVEMBER}": True,
    f"ALTER TABLE events ATTACH PARTITION november {OF_NOVEMBER}": False,
    "ALTER TABLE events DETACH PARTITION events_2026_09": True,
    "DROP TABLE events_2026_09": True,
    "ANALYZE events": False,
    "SELECT count(*) FROM events": False,
}


@pytest.mark.parametrize("with_default", [False, True])
def test_what_waits_for_a_load(target: Target, page: Page, with_default: bool) -> None:
    page.run("CREATE FUNCTION posthog.add_months")
    if not with_default:
        page.execute("DROP TABLE posthog.events_default;")
    with postgres_server.admin(target.sandbox.postgres, DATABASE) as load, load.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute(f"LOCK TABLE {quoted(target.schema)}.events IN ROW EXCLUSIVE MODE")
        for statement, waits in WAITING.items():
            if "ATTACH" in statement:
                target.execute("CREATE TABLE november (LIKE events)")
            waited = is_refused(target, statement)
            assert waited == (waits or ("ATTACH" in statement and with_default)), statement
        cursor.execute("ROLLBACK")


def is_refused(target: Target, statement: str) -> bool:
    """Whether it does not get its lock soon."""
    refused = ""
    try:
        target.execute("SET lock_timeout = '200ms'", statement)
    except psycopg2.Error as error:
        refused = str(error)
    assert not refused or "lock timeout" in refused
    return bool(refused)
