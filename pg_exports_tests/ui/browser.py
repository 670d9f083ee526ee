"""Debian's Chromium, headless, that looks at a deployment's UI."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from pg_exports_tests.ui.deployment import PATIENCE, Deployment

CHROMIUM = shutil.which("chromium")

WIDTH, HEIGHT = 1280, 800

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

_STILL = 700
"""Milliseconds in which nothing has moved."""

_TRIES = 20


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A page of a browser whose clock is in UTC."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        try:
            page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT}, timezone_id="UTC", locale="en-GB")
            page.set_default_timeout(PATIENCE * 1000)
            expect.set_options(timeout=PATIENCE * 1000)
            yield page
        finally:
            chromium.close()


def show(page: Page, deployment: Deployment, path: str) -> None:
    """Open a page of the UI."""
    page.goto(f"{deployment.url}/{path}")


def open_partition(page: Page, deployment: Deployment, asset: str, key: str) -> None:
    """Open what an asset's page says of one partition."""
    show(page, deployment, f"assets/{asset}?view=partitions&partition={key}")


def choose_partitions(page: Page, first: str, last: str) -> None:
    """On an asset's page: open the dialog *Materialize* and choose a range."""
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_role("button", name="Launch backfill").wait_for()
    chosen = page.get_by_placeholder("No matching partitions")
    chosen.fill(f"[{first}...{last}]")
    chosen.press("Enter")


def launch(page: Page) -> None:
    """In that dialog: *Launch backfill*, until Dagster has taken it."""
    page.get_by_role("button", name="Launch backfill").click()
    expect(page.get_by_text("Launch runs to materialize")).to_be_hidden()


def settle(page: Page) -> None:
    """Wait until nothing moves any more: Dagster shows what is loading by something that turns."""
    before = page.screenshot()
    for _ in range(_TRIES):
        page.wait_for_timeout(_STILL)
        now = page.screenshot()
        if now == before:
            return
        before = now


def picture(page: Page, file: Path) -> None:
    """Keep what the page shows, when it has settled."""
    settle(page)
    page.screenshot(path=file)
