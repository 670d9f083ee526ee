"""What is repaired, what is rejected, and what is left alone to the letter."""

import json

import polars as pl
import pytest

from pg_exports.interval import OnBadRows
from pg_exports.models import MODELS, Column, Kind
from pg_exports.postgres import bad_rows
from pg_exports.postgres.bad_rows import SortedRows, repaired_json, sort_out
from pg_exports.postgres.table import Destination, DestinationTable
from pg_exports.postgres.types import DestinationColumn


@pytest.mark.parametrize(
    ("written", "repaired"),
    [
        (r'{"a":"\u0000"}', r'{"a":"\ufffd"}'),
        (r'{"a":"\\u0000"}', r'{"a":"\\u0000"}'),
        (r'{"a":"\\\u0000"}', r'{"a":"\\\ufffd"}'),
        (r'{"a":"\ud83d\ude00"}', r'{"a":"\ud83d\ude00"}'),
        (r'{"a":"\ud83d"}', r'{"a":"\ufffd"}'),
        (r'{"a":"\ude00\ud83d"}', r'{"a":"\ufffd\ufffd"}'),
        (r'{"a":"\uD83D\uD83D\uDE00"}', r'{"a":"\ufffd\uD83D\uDE00"}'),
        (r'{"a":"\ud83d\\ude00"}', r'{"a":"\ufffd\\ude00"}'),
        (r'{"a":"\\ud83d\ude00"}', r'{"a":"\\ud83d\ufffd"}'),
        (r'{"a":"\ud83d\ude00","b":"\ude00"}', r'{"a":"\ud83d\ude00","b":"\ufffd"}'),
        (r'{"a":"\ud55c\uae00"}', r'{"a":"\ud55c\uae00"}'),
        ('{"a":"\0"}', '{"a":"\ufffd"}'),
        (r'{"n":1.50,"a":"\n\"\/\u00e9"}', r'{"n":1.50,"a":"\n\"\/\u00e9"}'),
    ],
)
def test_only_nuls_and_lone_surrogates_are_repaired(written: str, repaired: str) -> None:
    assert repaired_json(written) == repaired
    done = sorted_rows("repair", properties=[written])
    assert done.good["properties"].to_list() == [repaired]
    assert done.repaired.to_list() == [written != repaired]


def sorted_rows(on_bad_rows: OnBadRows, **columns: list[object]) -> SortedRows:
    kinds = {column.name: column for column in MODELS["events"].columns}
    pairs = [(kinds[name], destination(kinds[name])) for name in columns if name in kinds]
    rows = len(next(iter(columns.values())))
    key = {name: ["k"] * rows for name in ("uuid", "event", "distinct_id") if name not in columns}
    table = DestinationTable(Destination(None, "s", "events"), MODELS["events"], pairs, 1, 1)
    return sort_out(
        pl.DataFrame({**key, "team_id": [1] * rows, "identity": range(rows), **columns}), table, on_bad_rows
    )


def destination(column: Column) -> DestinationColumn:
    types = {Kind.JSON: ("jsonb", None), Kind.INTEGER: ("int4", None), Kind.TEXT: ("varchar", 200)}
    name, length = types[column.kind]
    return DestinationColumn(column.name, name, column.postgres_type, length, False, False, False)


def test_clean_rows_stay_the_frame_that_they_were() -> None:
    done = sorted_rows("repair", properties=[r'{"a":"\ud83d\ude00 \\u0000"}', None], event=["e", "f"])
    assert (done.repaired.sum(), done.bad) == (0, [])
    assert done.good["properties"].to_list() == [r'{"a":"\ud83d\ude00 \\u0000"}', None]


def test_a_repaired_row_counts_once_however_many_of_its_values_are_repaired() -> None:
    done = sorted_rows("repair", properties=[r'"\u0000"', "{}"], event=["a\0b", "c"])
    assert (done.repaired.sum(), done.bad) == (1, [])
    assert done.good["event"].to_list() == ["a\ufffdb", "c"]


def test_what_could_be_repaired_is_bad_where_the_export_says_reject() -> None:
    done = sorted_rows("reject", properties=[r'"\u0000"', "{}"], event=["a", "b"])
    assert done.good.height == 1
    [bad] = done.bad
    assert bad.fault.column == "properties"
    assert json.loads(bad.row)["properties"] == r'"\u0000"'
    assert "identity" not in json.loads(bad.row)
    assert json.loads(bad.key)["event"] == "a"


def test_of_a_row_that_is_too_great_to_be_kept_the_beginning_of_each_text_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_rows, "ROW_BYTES", 1_000)
    monkeypatch.setattr(bad_rows, "KEPT_CHARACTERS", 5)
    done = sorted_rows("reject", properties=[r'"\u0000"' + "é" * 200, r'"\u0000"'])
    great, small = done.bad
    assert json.loads(great.row)["properties"] == r'"\u00'
    assert "first 5 characters" in great.fault.reason
    assert json.loads(small.row)["properties"] == r'"\u0000"'


def test_a_text_that_is_too_long_and_a_number_that_is_too_great_have_no_faithful_repair() -> None:
    done = sorted_rows("repair", event=["x" * 201, "é" * 200, "y"], team_id=[1, 2, 2**31])
    assert done.good["event"].to_list() == ["é" * 200]
    assert [bad.fault.column for bad in done.bad] == ["event", "team_id"]
    assert "VARCHAR(200)" in done.bad[0].fault.reason


def test_a_nul_in_a_list_of_texts_is_repaired_in_its_place() -> None:
    lists: list[list[str | None] | None] = [["a", "b\0c", None], None, [], ["d\0"], ["e"]]
    frame = pl.DataFrame({"team_id": [1] * 5, "session_id": list("abcde"), "urls": lists})
    urls = next(column for column in MODELS["sessions"].columns if column.name == "urls")
    pairs = [(urls, DestinationColumn("urls", "_text", "text[]", None, False, False, False))]
    done = sort_out(
        frame, DestinationTable(Destination(None, "s", "sessions"), MODELS["sessions"], pairs, 1, 1), "repair"
    )
    assert done.good["urls"].to_list() == [["a", "b\ufffdc", None], None, [], ["d\ufffd"], ["e"]]
    assert (done.repaired.sum(), done.bad) == (2, [])


def test_wrong_bytes_make_a_repaired_row_a_rejected_one_or_nothing_where_the_column_is_not_written() -> None:
    as_read = [None, json.dumps({"event": "a\udcff"}), json.dumps({"person_id": "\udcff"})]
    columns: dict[str, list[object]] = {"event": ["a", "a\ufffd", "c"], "as_read": [*as_read]}
    done = sorted_rows("repair", **columns)
    assert done.good["event"].to_list() == ["a", "a\ufffd", "c"]
    assert (done.repaired.to_list(), done.bad) == ([False, True, False], [])
    assert "as_read" not in done.good.columns
    done = sorted_rows("reject", **columns)
    assert done.good["event"].to_list() == ["a", "c"]
    [bad] = done.bad
    assert (bad.fault.column, json.loads(bad.row)["event"], json.loads(bad.key)["event"]) == (
        "event",
        "a\udcff",
        "a\udcff",
    )
    assert "as_read" not in json.loads(bad.row)
    assert r"a\udcff" in bad.row
    assert "no UTF-8" in bad.fault.reason


def test_wrong_bytes_in_a_merges_key_are_never_repaired() -> None:
    distinct_id = next(column for column in MODELS["persons"].columns if column.name == "distinct_id")
    table = DestinationTable(Destination(None, "s", "persons"), MODELS["persons"], [(distinct_id, TEXT)], 1, 1)
    frame = pl.DataFrame(
        {"team_id": [1], "distinct_id": ["\ufffd"], "as_read": [json.dumps({"distinct_id": "\udcff"})]}
    )
    done = sort_out(frame, table, "repair")
    assert (done.good.height, [bad.fault.column for bad in done.bad]) == (0, ["distinct_id"])


def test_a_number_past_64_bits_is_rejected_with_its_digits() -> None:
    done = sorted_rows("repair", team_id=[1, None], as_read=[None, json.dumps({"team_id": 2**64 - 1})])
    assert done.good["team_id"].to_list() == [1]
    [bad] = done.bad
    assert "18446744073709551615" in str(bad.fault.words)
    assert "18446744073709551615" not in bad.fault.reason
    assert json.loads(bad.row)["team_id"] == 2**64 - 1


TEXT = DestinationColumn("distinct_id", "text", "text", None, False, False, False)
