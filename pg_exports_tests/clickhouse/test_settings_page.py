"""docs/clickhouse.md lists every setting that a query carries, with its value."""

from pathlib import Path

import pytest

from pg_exports.clickhouse import settings


@pytest.mark.parametrize("name", settings.PINNED)
def test_a_setting_that_nothing_wins_over_is_on_the_page_with_its_value(repository: Path, name: str) -> None:
    value = settings.PINNED[name]
    shown = "''" if value == "" else str(value)
    assert f"`{name} = {shown}`" in (repository / "docs" / "clickhouse.md").read_text()


@pytest.mark.parametrize("name", settings.HTTP)
def test_a_setting_of_each_request_is_on_the_page_with_its_value(repository: Path, name: str) -> None:
    assert f"`{name} = {settings.HTTP[name]}`" in (repository / "docs" / "clickhouse.md").read_text()


@pytest.mark.parametrize("name", settings.OF_CLUSTERS)
def test_a_setting_that_a_connection_may_change_is_in_the_pages_table(repository: Path, name: str) -> None:
    page = (repository / "docs" / "clickhouse.md").read_text()
    [line] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    assert (str(settings.OF_CLUSTERS[name]) or "none") in line
