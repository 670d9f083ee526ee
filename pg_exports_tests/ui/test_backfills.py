"""Backfills as the UI launches them: by its dialog, in a browser, and by its own GraphQL mutations; run by the daemon in
processes of their own. What the browser showed is kept as pictures in pytest's folder of the test.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import pytest
from playwright.sync_api import expect

from pg_exports_tests.conftest import Source, Target, partition_key
from pg_exports_tests.faults import eventually
from pg_exports_tests.source_rows import HOUR, event, insert_sessions, mapping, new_session, person, session
from pg_exports_tests.test_concurrency import holding, waiting
from pg_exports_tests.ui import queries
from pg_exports_tests.ui.browser import CHROMIUM, browser, choose_partitions, launch, open_partition, picture, show
from pg_exports_tests.ui.deployment import PATIENCE, Deployment

_HOLD = 20_261_123


def hours_before(hour: datetime, first: int, last: int) -> list[datetime]:
    """Hours that follow each other, by how many hours they lie before one."""
    return [hour - n * HOUR for n in range(first, last - 1, -1)]


def keys_of(hours: Sequence[datetime]) -> list[str]:
    return [partition_key(hour) for hour in hours]


def insert_events(source: Source, hours: Sequence[datetime]) -> None:
    """One event in the first hour, two in the second one, and so on."""
    source.insert("events", *(event(hour) for n, hour in enumerate(hours, start=1) for _ in range(n)))


def at_source(source: Source, hours: Sequence[datetime]) -> list[tuple[str]]:
    return source.rows(
        "SELECT toString(uuid) FROM events WHERE inserted_at >= {first:DateTime64} AND inserted_at <= {last:DateTime64}"
        " ORDER BY 1",
        {"first": hours[0], "last": hours[-1]},
    )


def landed(target: Target, hours: Sequence[datetime]) -> list[tuple[str]]:
    return target.rows(f"SELECT uuid FROM events WHERE timestamp BETWEEN '{hours[0]}' AND '{hours[-1]}' ORDER BY 1")


def committed(target: Target, hours: Sequence[datetime]) -> list[datetime]:
    """The hours that are in the ledger, in the order in which they were committed."""
    rows = target.rows(
        f"SELECT interval_start FROM pg_exports_ledger WHERE export = 'events'"
        f" AND interval_start BETWEEN '{hours[0]}' AND '{hours[-1]}' ORDER BY committed_at, interval_start"
    )
    return [start for (start,) in rows]


def missing(deployment: Deployment, hours: Sequence[datetime]) -> list[str]:
    """What *Backfill only failed and missing partitions* leaves of a range."""
    shown = deployment.partitions("events")
    return [key for key in keys_of(hours) if not shown[key]]


@contextlib.contextmanager
def held_at(target: Target, hours: Sequence[datetime]) -> Iterator[None]:
    """Hold each run that has written one of the hours, before it says COMMIT."""
    target.execute(
        f"CREATE OR REPLACE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF new.interval_start BETWEEN '{hours[0]}' AND '{hours[-1]}' THEN"
        f" PERFORM pg_advisory_xact_lock_shared({_HOLD}); END IF; RETURN NULL; END $$",
        "CREATE TRIGGER hold AFTER INSERT OR UPDATE ON pg_exports_ledger FOR EACH ROW EXECUTE FUNCTION hold()",
    )
    try:
        with holding(target, f"SELECT pg_advisory_xact_lock({_HOLD})"):
            yield
    finally:
        target.execute("DROP TRIGGER hold ON pg_exports_ledger")


def test_hours_that_a_paused_schedule_missed_are_backfilled_in_one_run_oldest_first(
    deployment: Deployment, posthog: Source, landing: Target, hour: datetime
) -> None:
    # The daemon may write the state back that it read before: then the switch has to be turned once more.
    for turn, status in ((deployment.start_schedule, "RUNNING"), (deployment.stop_schedule, "STOPPED")):

        def is_turned(turn: Callable[[str], None] = turn, status: str = status) -> bool:
            turn("events_schedule")
            return deployment.schedule_status("events_schedule") == status

        eventually(is_turned, PATIENCE)
    missed = hours_before(hour, 5, 1)
    insert_events(posthog, missed)
    assert missing(deployment, missed) == keys_of(missed)
    backfill = deployment.backfill("events", missing(deployment, missed))
    deployment.wait(backfill)
    [run] = deployment.runs(backfill)
    assert run["tags"]["dagster/asset_partition_range_start"] == partition_key(missed[0])
    assert run["tags"]["dagster/asset_partition_range_end"] == partition_key(missed[-1])
    assert missing(deployment, missed) == []
    assert committed(landing, missed) == missed
    assert landed(landing, missed) == at_source(posthog, missed)
    assert len(landed(landing, missed)) == 15


def test_backfills_at_the_same_time_have_no_more_connections_than_their_pool(
    deployment: Deployment, posthog: Source, landing: Target, hour: datetime
) -> None:
    hours = hours_before(hour, 10, 9)
    insert_events(posthog, hours)
    known = new_session(hours[0])
    posthog.insert("person", person(hours[0], known, 1))
    posthog.insert("person_distinct_id2", mapping(hours[0], "a", known))
    insert_sessions(posthog, session(known, hours[0]))
    deployment.ask(queries.SET_POOL_LIMIT, pool="postgres", limit=2)
    try:
        with held_at(landing, hours):
            backfills = [deployment.backfill(asset, keys_of(hours)) for asset in ("events", "persons", "sessions")]
            eventually(lambda: waiting(landing) == 2, PATIENCE)
            # The daemon looks for runs that it may start three times more.
            time.sleep(3)
            states = [run["status"] for backfill in backfills for run in deployment.runs(backfill)]
            assert sorted(states) == ["QUEUED", "STARTED", "STARTED"]
            assert connections(landing) == 2
        deployment.wait(*backfills)
    finally:
        deployment.ask(queries.SET_POOL_LIMIT, pool="postgres", limit=4)
    assert landing.rows("SELECT count(*) FROM persons UNION ALL SELECT count(*) FROM sessions") == [(1,), (1,)]
    assert landed(landing, hours) == at_source(posthog, hours)
    assert most_at_once(landing, hours) == 2


def connections(target: Target) -> int:
    """How many connections exports have."""
    [(number,)] = target.rows("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg_exports'")
    return int(number)


def most_at_once(target: Target, hours: Sequence[datetime]) -> int:
    """How many runs wrote these hours at the same moment, by the ledger."""
    [(number,)] = target.rows(
        f"""
        WITH runs AS (
            SELECT min(started_at) AS began, max(committed_at) AS ended FROM pg_exports_ledger
            WHERE interval_start BETWEEN '{hours[0]}' AND '{hours[-1]}' GROUP BY run_id
        )
        SELECT max((SELECT count(*) FROM runs AS o WHERE o.began <= r.began AND o.ended > r.began)) FROM runs AS r
        """
    )
    return int(number)


def test_a_backfill_that_is_cancelled_leaves_whole_hours_and_another_one_completes_it(
    deployment: Deployment, posthog: Source, landing: Target, hour: datetime
) -> None:
    hours = hours_before(hour, 20, 17)
    insert_events(posthog, hours)
    with held_at(landing, hours[1:]):
        backfill = deployment.backfill("events", keys_of(hours))
        eventually(lambda: waiting(landing) == 1, PATIENCE)
        deployment.cancel(backfill)
        deployment.wait(backfill, status="CANCELED")
    assert [run["status"] for run in deployment.runs(backfill)] == ["CANCELED"]
    assert committed(landing, hours) == hours[:1]
    assert landed(landing, hours) == at_source(posthog, hours[:1])
    assert missing(deployment, hours) == keys_of(hours[1:])
    completing = deployment.backfill("events", missing(deployment, hours), page_of="events_job")
    deployment.wait(completing)
    assert len(deployment.runs(completing)) == 1
    assert missing(deployment, hours) == []
    assert landed(landing, hours) == at_source(posthog, hours)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: `make chromium`")
def test_a_backfill_is_launched_from_the_dialog_and_its_partitions_show_their_figures(
    deployment: Deployment, posthog: Source, landing: Target, hour: datetime, tmp_path: Path
) -> None:
    hours = hours_before(hour, 27, 24)
    insert_events(posthog, hours)
    keys = keys_of(hours)
    with browser() as page:
        show(page, deployment, "assets/events")
        expect(page.get_by_text("Every event that ClickHouse received")).to_be_visible()
        choose_partitions(page, keys[0], keys[-1])
        expect(page.get_by_text("4 partitions", exact=True)).to_be_visible()
        expect(
            page.get_by_text("Backfills in multiple runs, with a maximum of 720 partitions per run.")
        ).to_be_visible()
        picture(page, tmp_path / "dialog.png")
        launch(page)
        eventually(lambda: not missing(deployment, hours), PATIENCE)
        open_partition(page, deployment, "events", keys[-1])
        expect(page.get_by_text("Materialized", exact=True)).to_be_visible()
        row = page.get_by_role("row").filter(has_text="rows_inserted")
        expect(row).to_contain_text("4")
        picture(page, tmp_path / "partition.png")
    assert landed(landing, hours) == at_source(posthog, hours)
