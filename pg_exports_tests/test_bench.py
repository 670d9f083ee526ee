"""The bench's own reckoning: what counts as right, who was faster, and what the README is told. Nothing is timed here."""

import dataclasses
import sys
from pathlib import Path

import pytest

from pg_exports.sandbox import Sandbox
from pg_exports_tests.bench import check, destinations, peers, report, streams
from pg_exports_tests.bench.check import Expected
from pg_exports_tests.bench.peers import LIMIT, PRODUCT, Contender, Race, Round
from pg_exports_tests.bench.processes import BenchError, Usage, run
from pg_exports_tests.bench.product import Result
from pg_exports_tests.bench.report import BEGIN, END, Section
from pg_exports_tests.bench.streams import Load, Loads

SENT = check.row("purchase", "visitor", 1_700_000_000_000_000, '{"a": 1.50}', '"[]"', '{"v": 1}', None, "10.0.0.1")
EXPECTED = Expected(3, {"a": SENT, "b": SENT}, frozenset("b"))


def contender(name: str, *seconds: float, failure: str | None = None) -> Contender:
    usage = Usage(9.0, 123_456_789, 1.25, 2.5, 0.5, "")
    return Contender(name, [Round(each, usage) for each in seconds], failure, "jsonb")


def race(*contenders: Contender) -> Race:
    return Race(1_000, list(contenders))


# Right or wrong


def test_a_table_with_the_sources_rows_is_right() -> None:
    as_jsonb = SENT._replace(properties=check.document('{"a":1.5}'))
    assert check.difference(EXPECTED, 3, [("b", SENT), ("a", as_jsonb)]) is None


def test_a_missing_row_and_one_too_many_are_noticed() -> None:
    assert check.difference(EXPECTED, 2, [("a", SENT), ("b", SENT)]) == "2 rows instead of 3"
    for found in ("a", "aa", "aab"):
        assert "missing, or there more than once" in str(
            check.difference(EXPECTED, 3, [(uuid, SENT) for uuid in found])
        )


@pytest.mark.parametrize("column", check.Row._fields)
def test_a_value_that_differs_is_noticed_in_any_column(column: str) -> None:
    landed = check.Row(**(SENT._asdict() | {column: check.document("2")}))
    assert check.difference(EXPECTED, 3, [("a", landed), ("b", SENT)]) == f"another {column} in the row a"


def test_a_document_that_landed_as_a_string_or_as_jsons_null_is_wrong() -> None:
    as_string = SENT._replace(properties=check.document('"{\\"a\\": 1.50}"'))
    assert check.difference(EXPECTED, 3, [("a", as_string), ("b", SENT)]) == "another properties in the row a"
    as_null = SENT._replace(set_once=check.document("null"))
    assert check.difference(EXPECTED, 3, [("a", as_null), ("b", SENT)]) == "another set_once in the row a"


def test_what_the_query_does_not_know_for_certain_is_not_held_against_anybody() -> None:
    read_from_the_document = SENT._replace(set=check.document("2"), ip=None)
    assert check.difference(EXPECTED, 3, [("a", SENT), ("b", read_from_the_document)]) is None


# Who was faster


def test_the_limit_comes_first_then_the_fastest_and_those_without_a_time_last() -> None:
    ran = race(
        contender(PRODUCT, 12.0, 11.0, 50.0),
        contender("python_csv", failure="cannot: no connection"),
        contender(LIMIT, 10.0, 10.0, 10.0),
        contender("polars_adbc", 9.0, 9.5, 40.0),
    )
    assert [one.name for one in ran.ranking] == [LIMIT, "polars_adbc", PRODUCT, "python_csv"]
    assert [row[:4] for row in peers.section(ran, 3).rows] == [
        (peers.TITLES[LIMIT], "10.0", "1.00", "100"),
        (peers.TITLES["polars_adbc"], "9.5", "0.95", "105"),
        (PRODUCT, "12.0", "1.20", "83"),
        (peers.TITLES["python_csv"], "cannot: no connection", "", ""),
    ]
    assert peers.section(ran, 3).rows[2][4:] == ("9.0", "123", "1.2", "2.5", "0.5")


def test_a_time_whose_rows_are_wrong_does_not_count() -> None:
    wrong = contender("python_csv", 1.0, failure="wrong: 2 rows instead of 3")
    ran = race(contender(LIMIT, 10.0), contender(PRODUCT, 11.0), wrong)
    assert peers.complaints(ran) == []
    assert [bar.title for bar in peers.bars(ran)] == [peers.TITLES[LIMIT], PRODUCT]
    assert peers.section(ran, 1).rows[-1][1] == "wrong: 2 rows instead of 3"


def test_the_promise_holds_up_to_a_quarter_above_the_limit_and_while_no_peer_is_faster() -> None:
    limit, own = contender(LIMIT, 8.0), contender(PRODUCT, 10.0)
    assert peers.section(race(limit, own, contender("python_csv", 10.0)), 1).holds
    slow = peers.section(race(limit, contender(PRODUCT, 10.1)), 1)
    assert not slow.holds
    assert slow.remarks[-1] == "**pg_exports took 1.26 x the limit, more than 1.25.**"
    beaten = peers.section(race(limit, own, contender("python_csv", 9.9)), 1)
    assert not beaten.holds
    assert beaten.remarks[-1] == f"**{peers.TITLES['python_csv']} was faster than pg_exports.**"


@pytest.mark.parametrize("name", [LIMIT, PRODUCT])
def test_without_the_limit_or_the_product_nothing_is_promised(name: str) -> None:
    others = [contender(other, 10.0) for other in (LIMIT, PRODUCT) if other != name]
    section = peers.section(race(*others, contender(name, failure="cannot: out of memory")), 1)
    assert not section.holds
    assert "out of memory" in section.remarks[-1]


def test_a_table_with_other_types_says_so() -> None:
    assert contender("polars_adbc", 1.0).title == peers.TITLES["polars_adbc"]
    other = dataclasses.replace(contender("polars_adbc", 1.0), documents="text")
    assert other.title == f"{peers.TITLES['polars_adbc']} (documents as TEXT)"


# What the README is told


def test_a_section_becomes_a_table_with_its_remarks() -> None:
    section = Section("How long?", ("way", "s"), [("a | b", "1"), ("two\nlines", "")], ["Two rounds."], holds=True)
    assert report.markdown(section).splitlines() == [
        "### How long?",
        "",
        "| way | s |",
        "| --- | ---: |",
        "| a \\| b | 1 |",
        "| two lines |  |",
        "",
        "- Two rounds.",
    ]


def test_only_what_is_between_the_marks_is_replaced() -> None:
    readme = f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe rest.\n"
    once = report.replaced(readme, "new\n")
    assert once == f"# Title\n\n{BEGIN}\nnew\n{END}\n\nThe rest.\n"
    assert report.replaced(once, "new\n") == once


@pytest.mark.parametrize("readme", ["", BEGIN, END, f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_a_readme_without_its_marks_is_left_alone(readme: str) -> None:
    with pytest.raises(ValueError, match="must have"):
        report.replaced(readme, "new")


@pytest.mark.parametrize("page", ["README.md", "docs/capacity.md"])
def test_the_pages_have_their_marks(repository: Path, page: str) -> None:
    report.replaced((repository / page).read_text(), "new")


def test_one_part_of_a_page_is_written_and_the_others_stay() -> None:
    def written(page: str, name: str, measured: str, text: str) -> str:
        return report.rewritten(page, name, measured, text, ("memory", "ranges"))

    def shown(page: str) -> list[str]:
        return [line for line in page.splitlines() if line and not line.startswith("<!--")]

    page = written(f"# Title\n\n{BEGIN}\nold\n{END}\n", "ranges", "today", "### Ranges\n\n1 s")
    page = written(page, "memory", "today", "### Memory\n\n1 MB")
    assert shown(page) == ["# Title", f"{report.MEASURED}today", "### Memory", "1 MB", "### Ranges", "1 s"]
    later = written(page, "memory", "tomorrow", "### Memory\n\n2 MB")
    of_each = (f"{report.MEASURED}tomorrow", "2 MB", "### Ranges", f"{report.MEASURED}today", "1 s")
    assert shown(later) == ["# Title", "### Memory", *of_each]
    assert written(later, "memory", "today", "### Memory\n\n1 MB") == page
    assert written(later, "memory", "tomorrow", "### Memory\n\n2 MB") == later


# How busy a machine is, and how often a table was read


def test_the_busy_cores_are_all_cpu_seconds_by_the_seconds_of_the_run() -> None:
    usage = Usage(9.0, 0, client_cpu=4.0, postgres_cpu=5.0, clickhouse_cpu=1.0, output="")
    result = Result(4.0, cpu_seconds=2.0, load_began=0.0, load_seconds=3.0, peak_bytes=100_000_000, metadata={})
    measured = [Loads(1, [Load(result, usage)]), Loads(2, [Load(dataclasses.replace(result, load_seconds=1.5), usage)])]
    section = streams.section(measured, 600, rounds=1)
    assert section.rows[0] == ("1", "3.0", "1.00", "200", "2.0", "5.0", "1.0", "100", "2.00")
    assert section.rows[1][:4] == ("2", "1.5", "0.50", "400")
    assert "the 8.0 CPU seconds of a run over 1 would take" in section.remarks[1]


def test_a_readers_query_that_is_under_way_counts_in_part() -> None:
    assert destinations.queries([(0.0, 2.0), (2.0, 3.0), (3.0, 7.0), (8.0, 9.0)], 1.0, 4.0) == 0.5 + 1 + 0.25


# What a process costs


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_a_process_is_measured_with_those_below_it(sandbox: Sandbox) -> None:
    work = "held = b'x' * 100_000_000; import time; time.sleep(0.3); print(sum(range(5_000_000)))"
    usage = run(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"], sandbox
    )
    assert usage.output.strip() == str(sum(range(5_000_000)))
    assert 100_000_000 < usage.peak_bytes < 200_000_000
    assert usage.seconds > 0.3
    assert 0 < usage.client_cpu < usage.seconds * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_a_failure_shows_the_end_of_its_output_without_passwords(sandbox: Sandbox) -> None:
    with pytest.raises(BenchError) as failed:
        run([sys.executable, "-c", "import os, sys; sys.exit('no: ' + os.environ['POSTGRES_PASSWORD'])"], sandbox)
    assert "ended with 1:" in str(failed.value)
    assert "no: ***" in str(failed.value)
    assert sandbox.password not in str(failed.value)
