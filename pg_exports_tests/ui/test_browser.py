"""The UI in a browser: an export's page, its partitions with their figures, and a backfill by the dialog *Materialize*.

What the browser showed is kept as pictures in pytest's folder of the test.
"""

from datetime import datetime
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import expect

from pg_exports_tests.conftest import Source, Target
from pg_exports_tests.faults import eventually
from pg_exports_tests.ui.browser import CHROMIUM, browser, choose_partitions, launch, open_partition, picture, show
from pg_exports_tests.ui.deployment import PATIENCE, Deployment
from pg_exports_tests.ui.test_backfills import at_source, hours_before, insert_events, keys_of, landed, missing

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: `make chromium`")


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
