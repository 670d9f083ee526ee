"""The page of attributes is what the components say."""

from pg_exports import PostgresExport
from pg_exports.scaffold import properties
from pg_exports_tests.attributes_page import PAGE, page

ATTRIBUTES = tuple(properties(PostgresExport))


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "Run `make docs`."


def test_each_attribute_has_a_description() -> None:
    assert [line for line in page().splitlines() if line.startswith("| `") and line.endswith("|  |")] == []


def test_the_page_names_each_attribute_with_its_default() -> None:
    rows = [line.split(" | ") for line in page().splitlines() if line.startswith("| `")]
    shown = {attribute.removeprefix("| "): default for attribute, _, default, *_ in rows}
    assert set(ATTRIBUTES) <= {name.strip("`") for name in shown}
    assert shown["`model`"] == "required"
    assert shown["`schema`"] == "`public`"
    assert shown["`database`"] == ""
    assert shown["`paused`"] == "`false`"


def test_nested_attributes_have_tables_of_their_own() -> None:
    assert "[InlineConnection](#inlineconnection)" in page()
    assert "### InlineConnection\n" in page()
