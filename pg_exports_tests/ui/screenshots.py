"""`make screenshots`: the pictures of README.md, of a deployment with five days of sample data.

Each is taken of what a user sees who goes there by the UI's own buttons.
"""

import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from playwright.sync_api import Page

from pg_exports.models import MODELS
from pg_exports.sandbox import sample_data, servers, source_tables
from pg_exports.sandbox.servers import SOURCE_DATABASE
from pg_exports_tests.faults import eventually
from pg_exports_tests.ui.browser import CHROMIUM, browser, choose_partitions, launch, open_partition, picture, show
from pg_exports_tests.ui.deployment import PATIENCE, REPOSITORY, Deployment, deployed

FOLDER = REPOSITORY / "docs" / "images"
HOURS = 120
"""As many as Dagster's plots show."""

EVENTS = 60_000
NOT_YET_EXPORTED = 8
"""Hours: the sample's empty one is among them."""


def main() -> int:
    """Start everything, take the pictures, stop everything."""
    if CHROMIUM is None:
        sys.stderr.write("There is no Chromium here: `make chromium`.\n")
        return 1
    folder = Path(tempfile.mkdtemp(prefix="pg_exports_tour_"))
    try:
        sandbox = servers.start(folder / "servers")
        try:
            end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
            source_tables.create_tables(sandbox.execute, SOURCE_DATABASE)
            sample_data.fill(sandbox.execute, SOURCE_DATABASE, end=end, hours=HOURS, events=EVENTS)
            with deployed(folder, sandbox) as deployment:
                export_all_but_the_latest(deployment)
                with browser() as page:
                    take_pictures(page, deployment)
        finally:
            servers.stop(sandbox)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def export_all_but_the_latest(deployment: Deployment) -> None:
    """So that there is something to backfill."""
    backfills = [
        deployment.backfill(model, list(deployment.partitions(model))[-HOURS:-NOT_YET_EXPORTED]) for model in MODELS
    ]
    deployment.wait(*backfills, seconds=600)


def take_pictures(page: Page, deployment: Deployment) -> None:
    """Go through the UI, in the order of the tour."""
    FOLDER.mkdir(exist_ok=True)
    keys = list(deployment.partitions("events"))
    exported, missing = keys[:-NOT_YET_EXPORTED], keys[-NOT_YET_EXPORTED:]
    show(page, deployment, "asset-groups/")
    page.get_by_text("% filled").first.wait_for()
    picture(page, FOLDER / "exports.png")
    open_partition(page, deployment, "events", exported[-1])
    page.get_by_text("rows_inserted").wait_for()
    picture(page, FOLDER / "partition.png")
    show(page, deployment, "assets/events")
    plots = page.get_by_role("button", name="Plots")
    plots.click()
    page.get_by_text("dagster/partition_row_count").wait_for()
    plots.evaluate("button => button.scrollIntoView()")
    picture(page, FOLDER / "plots.png")
    show(page, deployment, "assets/events?view=checks")
    page.get_by_text("reconciliation").first.click()
    page.get_by_text("rows_unchanged").first.wait_for()
    picture(page, FOLDER / "check.png")
    show(page, deployment, "assets/events")
    choose_partitions(page, missing[0], missing[-1])
    picture(page, FOLDER / "backfill.png")
    launch(page)
    eventually(lambda: all(deployment.partitions("events")[key] for key in missing), PATIENCE)
    show(page, deployment, "runs?view=backfills")
    page.get_by_text("Success", exact=True).nth(len(MODELS)).wait_for()
    picture(page, FOLDER / "backfills.png")
    show(page, deployment, "automation")
    page.get_by_text("events_schedule").wait_for()
    picture(page, FOLDER / "schedules.png")


if __name__ == "__main__":
    sys.exit(main())
