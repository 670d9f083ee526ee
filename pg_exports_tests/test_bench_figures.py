"""The bench's own figures at a tiny size: every part runs, compares what landed with the source, and reports.

How fast anything is, is `make bench`'s business. The other way to launch a range (`persons`, `sessions`, a year of tiny
intervals) differs by a name and a number from the one that is launched here, and is left to it: `dg launch` takes long.
"""

import pytest

from pg_exports.sandbox import Sandbox
from pg_exports_tests.bench import (
    deduplicate,
    destinations,
    footprint,
    memory,
    merges,
    ranges,
    report,
    small_runs,
    streams,
)
from pg_exports_tests.bench.report import Section

pytestmark = pytest.mark.slow


def check_report(section: Section, rows: int) -> None:
    assert len(section.rows) == rows
    assert all(len(row) == len(section.header) for row in section.rows)
    assert section.title in report.markdown(section)


def check_nothing_is_left(sandbox: Sandbox) -> None:
    with sandbox.clickhouse_client() as client:
        assert client.query("SELECT name FROM system.databases WHERE name LIKE 'bench\\_%'").result_rows == []
    assert sandbox.postgres.rows("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'bench\\_%'", "exports") == []


def test_memory_is_measured_of_a_small_a_great_and_a_huge_interval(sandbox: Sandbox) -> None:
    section = memory.measure(sandbox, rounds=1, small=500, great=1_000, huge_mb=1)
    check_report(section, rows=3)
    assert [float(row[2]) > 50 for row in section.rows] == [True, True, True]
    check_nothing_is_left(sandbox)


def test_a_range_is_launched_and_its_rows_are_counted(sandbox: Sandbox) -> None:
    section = ranges.measure(sandbox, rounds=1, hours=3, tiny_hours=0, merged=())
    check_report(section, rows=1)
    assert section.rows[0][:2] == ("events", "3")
    check_nothing_is_left(sandbox)


def test_a_small_run_is_measured_beside_one_that_does_nothing(sandbox: Sandbox) -> None:
    section = small_runs.measure(sandbox, rounds=1, events=100, least_rounds=1)
    check_report(section, rows=3)
    check_nothing_is_left(sandbox)


def test_a_merge_is_measured_beside_sql_by_hand_and_their_results_are_equal(sandbox: Sandbox) -> None:
    section = merges.measure(sandbox, rounds=1, persons=500, session_events=0, states=("half updated",))
    check_report(section, rows=1)
    check_nothing_is_left(sandbox)


def test_a_day_is_loaded_twice_with_each_way_to_deduplicate(sandbox: Sandbox) -> None:
    section = deduplicate.measure(sandbox, rounds=1, events=2_000)
    check_report(section, rows=3)
    assert [row[0] for row in section.rows] == ["interval", "table", "replace"]
    check_nothing_is_left(sandbox)


def test_a_day_is_loaded_over_as_many_connections_as_are_asked_for(sandbox: Sandbox) -> None:
    section = streams.measure(sandbox, rounds=1, events=2_000, streams=(1, 3))
    check_report(section, rows=2)
    assert [row[0] for row in section.rows] == ["1", "3"]
    check_nothing_is_left(sandbox)


def test_tables_of_other_kinds_are_loaded_beside_the_plain_one_and_read_meanwhile(sandbox: Sandbox) -> None:
    both = destinations.Variant("both", partitioned=True, indexes=destinations.TWO_BTREES, read=True)
    by_hash = destinations.Variant("by hash", "persons", partitioned=True)
    section = destinations.measure(sandbox, rounds=1, events=3_000, variants=(both, by_hash))
    check_report(section, rows=2)
    partitions, _, _, _, _, _, alone, beside = section.rows[0][1:]
    assert int(partitions) >= 1
    assert float(alone) > 0
    assert float(beside) > 0
    assert section.rows[1][1] == str(destinations.HASH_PARTITIONS)
    check_nothing_is_left(sandbox)
    assert sandbox.postgres.rows(f"SELECT FROM pg_roles WHERE rolname = '{destinations.READER}'") == []


def test_the_footprint_of_a_model_is_measured_and_the_servers_settings_are_as_before(sandbox: Sandbox) -> None:
    section = footprint.measure(sandbox, rounds=1, events=4_000, models=("events",))
    check_report(section, rows=13)
    figures = {title: values for title, *values in section.rows}
    assert figures["rows of the sample"][1] == "0"
    # A kilobyte a row, about, and each goes into the log as it is.
    assert all(500 < float(figures[name][0].replace(",", "")) < 5_000 for name in ("table MB", "WAL MB"))
    assert sandbox.postgres.rows("SELECT current_setting('full_page_writes')") == [("off",)]
    check_nothing_is_left(sandbox)
