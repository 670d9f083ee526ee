"""A ClickHouse answer arrives whole or is an error that says what to do, and an error leaves nothing in Postgres."""

import contextlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import trustme

from pg_exports import ClickHouseResource, PostgresExport
from pg_exports.errors import PassingError, SettingsError, SourceError
from pg_exports.models import MODELS, Model, Query, Selection
from pg_exports.models.model import bigint, text
from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.certificates import HOST
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.clickhouse.faulty_proxy import End, Spoil, faulty_proxy, first_messages, half_a_message
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key

NUMBERS = Model(
    name="numbers",
    description="Numbers and words.",
    columns=(bigint("number"), text("word")),
    key=("number",),
    merge=None,
    query=lambda selection: Query("SELECT 1", {}),
    fingerprints=lambda selection: Query("SELECT 1", {}),
)
SMALL_BLOCKS = {"max_block_size": 1000, "max_threads": 1}


def rows(clickhouse: ClickHouseResource, sql: str, **parameters: object) -> list[tuple[Any, ...]]:
    with clickhouse.frames(Query(sql, parameters), NUMBERS, log_comment="tests") as frames:
        return [row for frame in frames for row in frame.rows()]


def plain(sandbox: Sandbox, **changes: Any) -> ClickHouseResource:
    settings: dict[str, Any] = {
        "host": HOST,
        "port": sandbox.clickhouse.http_port,
        "user": ROLE,
        "password": sandbox.source_password,
    }
    return ClickHouseResource(**(settings | changes))


def https(sandbox: Sandbox, **changes: Any) -> ClickHouseResource:
    settings: dict[str, Any] = {
        "port": sandbox.clickhouse.https_port,
        "secure": True,
        "ca_certificate": str(sandbox.certificates.authority),
    }
    return plain(sandbox, **(settings | changes))


def events_export(target: Target, hour: datetime, **changes: Any) -> PostgresExport:
    settings: dict[str, Any] = {"model": "events", "team_id": TEAM, "schema": target.schema}
    return PostgresExport(**(settings | {"start": hour - timedelta(hours=24)} | changes))


def insert_events(source: Source, hour: datetime, count: int, **changes: str) -> None:
    """Events of one hour, made by the server. `changes` are expressions of `number`."""
    columns = {
        "uuid": "generateUUIDv4(number)",
        "event": "'$pageview'",
        "properties": "'{}'",
        "timestamp": "{hour:DateTime64(6)}",
        "team_id": f"{TEAM}",
        "distinct_id": "toString(number)",
        "_timestamp": "{hour:DateTime64(6)}",
        "inserted_at": "{hour:DateTime64(6)}",
    } | changes
    source.execute(
        f"INSERT INTO events ({', '.join(columns)}) SELECT {', '.join(columns.values())} FROM numbers({{count:UInt64}})",
        {"hour": hour.strftime("%Y-%m-%d %H:%M:%S"), "count": count},
    )


# A stream that breaks


@pytest.mark.parametrize("connection", ["https", "http"])
def test_an_exception_in_mid_stream_is_named(sandbox: Sandbox, connection: str) -> None:
    clickhouse = https(sandbox) if connection == "https" else plain(sandbox)
    sql = "SELECT number, toString(throwIf(number = 900000, 'the disk is full')) AS word FROM numbers(1000000)"
    with pytest.raises(
        SourceError, match=r"answered with an error: Code: 395\. DB::Exception: the disk is full"
    ) as caught:
        rows(clickhouse, sql)
    assert "__exception__" not in str(caught.value)


@pytest.mark.parametrize("end", [End.CLEAN, End.ABRUPT])
@pytest.mark.parametrize("spoil", [first_messages, half_a_message, lambda answer: b"", lambda answer: answer[:-8]])
def test_a_stream_that_is_cut_is_a_passing_error(sandbox: Sandbox, spoil: Spoil, end: End) -> None:
    with faulty_proxy(sandbox.clickhouse.http_port, spoil, end) as port:
        clickhouse = plain(sandbox, port=port, settings=SMALL_BLOCKS)
        with pytest.raises(PassingError, match=rf"ClickHouse at http://localhost:{port} broke"):
            rows(clickhouse, "SELECT number, 'a' AS word FROM numbers(5000)")


def test_the_same_stream_through_the_proxy_unspoilt_is_whole(sandbox: Sandbox) -> None:
    with faulty_proxy(sandbox.clickhouse.http_port, lambda answer: answer, End.CLEAN) as port:
        clickhouse = plain(sandbox, port=port, settings=SMALL_BLOCKS)
        assert len(rows(clickhouse, "SELECT number, 'a' AS word FROM numbers(5000)")) == 5000


@pytest.mark.parametrize("more", [b"\n", b"<html>502 Bad Gateway</html>"])
def test_bytes_after_the_end_of_the_stream_are_an_error(sandbox: Sandbox, more: bytes) -> None:
    with faulty_proxy(sandbox.clickhouse.http_port, lambda answer: answer + more, End.CLEAN) as port:
        error = refusal(plain(sandbox, port=port))
    assert isinstance(error, PassingError)
    assert "broke off before its end" in str(error)


def test_a_page_of_a_gateway_in_place_of_an_answer_is_an_error(sandbox: Sandbox) -> None:
    with faulty_proxy(sandbox.clickhouse.http_port, lambda answer: b"<html>Sign in</html>", End.CLEAN) as port:
        error = refusal(plain(sandbox, port=port))
    assert isinstance(error, PassingError)
    assert "broke off before its end" in str(error)


def test_a_stream_that_freezes_is_a_passing_error_after_the_read_timeout(sandbox: Sandbox) -> None:
    with faulty_proxy(sandbox.clickhouse.http_port, half_a_message, End.FROZEN) as port:
        clickhouse = plain(sandbox, port=port, settings=SMALL_BLOCKS, read_timeout=1)
        started = time.monotonic()
        with pytest.raises(PassingError, match=f"localhost:{port} broke: .*[Tt]imed out"):
            rows(clickhouse, "SELECT number, 'a' AS word FROM numbers(5000)")
    assert time.monotonic() - started < 15


def test_a_poisoned_row_leaves_no_row_and_the_next_run_completes_it(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert_events(source, hour, 5000)
    source.execute("RENAME TABLE events TO all_events")
    source.execute(
        "CREATE VIEW events AS SELECT * REPLACE (if(distinct_id = '4321', toString(throwIf(distinct_id = '4321',"
        " 'poisoned')), elements_chain) AS elements_chain) FROM all_events"
    )
    export = events_export(target, hour)
    poisoned = run(export, partition_key(hour), clickhouse=source.resource(settings=SMALL_BLOCKS))
    assert poisoned.error is not None
    assert "DB::Exception: poisoned" in poisoned.error
    assert (target.count("events"), target.count("pg_exports_ledger")) == (0, 0)
    source.execute("DROP VIEW events")
    source.execute("RENAME TABLE all_events TO events")
    assert run(export, partition_key(hour)).counts == (5000, 0, 0)


# Values that a frame cannot hold


def test_what_a_frame_cannot_hold_stands_beside_it_as_it_was(sandbox: Sandbox) -> None:
    sql = (
        "SELECT if(number = 3, 9223372036854775808, toUInt64(number)) AS number,"
        " if(number > 2, unhex('C328'), 'a') AS word FROM numbers(5)"
    )
    with https(sandbox).frames(Query(sql, {}), NUMBERS, log_comment="tests") as frames:
        rows = pl.concat(frames).rows()
    assert rows == [
        (0, "a", None),
        (1, "a", None),
        (2, "a", None),
        (None, "\ufffd(", '{"word": "\\udcc3(", "number": 9223372036854775808}'),
        (4, "\ufffd(", '{"word": "\\udcc3("}'),
    ]


def test_a_whole_number_of_63_bits_is_one_that_a_frame_holds(sandbox: Sandbox) -> None:
    assert rows(https(sandbox), "SELECT toUInt64(9223372036854775807) AS number, 'a' AS word") == [(2**63 - 1, "a")]


def test_an_answer_without_one_of_the_models_columns_is_an_error_that_names_it(sandbox: Sandbox) -> None:
    with pytest.raises(SourceError, match=r'does not fit its columns: .*"word"'):
        rows(https(sandbox), "SELECT 1 AS number")


def test_an_answer_without_rows_has_no_frames(sandbox: Sandbox) -> None:
    assert rows(https(sandbox), "SELECT 1 AS number, 'a' AS word WHERE 0") == []


def test_text_with_nul_emoji_and_quotes_arrives_as_it_is(sandbox: Sandbox) -> None:
    awkward = 'it\'s \\ a "tab"\t and 😀\x00.'
    assert rows(https(sandbox), "SELECT 1 AS number, {word:String} AS word", word=awkward) == [(1, awkward)]


# Memory


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_half_a_million_rows_are_read_in_the_memory_of_a_few_blocks(sandbox: Sandbox) -> None:
    sql = "SELECT number, repeat('x', 1000) AS word FROM numbers(500000)"
    read, peak = 0, 0
    with https(sandbox).frames(Query(sql, {}), NUMBERS, log_comment="tests") as frames:
        read += next(frames).height
        before = _resident_bytes()
        for frame in frames:
            read += frame.height
            peak = max(peak, _resident_bytes())
    assert read == 500_000
    assert peak - before < 250 << 20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_reader_that_stops_early_hangs_up(sandbox: Sandbox) -> None:
    comment = f"stops early {uuid.uuid4()}"
    sql = "SELECT number, repeat('x', 1000) AS word FROM numbers(100000000)"
    with https(sandbox).frames(Query(sql, {}), NUMBERS, log_comment=comment) as frames:
        assert next(frames).height > 0
    running = "SELECT count() FROM system.processes WHERE query LIKE '%100000000%' AND query NOT LIKE '%processes%'"
    deadline = time.monotonic() + 10
    with sandbox.clickhouse_client() as client:
        while client.command(running) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.command(running) == 0


# Connecting


def test_https_with_the_right_authority_connects(sandbox: Sandbox) -> None:
    assert rows(https(sandbox), "SELECT 1 AS number, 'a' AS word") == [(1, "a")]


def test_plain_http_connects(sandbox: Sandbox) -> None:
    assert rows(plain(sandbox), "SELECT 1 AS number, 'a' AS word") == [(1, "a")]


def another_authority(folder: Path) -> str:
    trustme.CA().cert_pem.write_to_path(str(folder / "another.crt"))
    return str(folder / "another.crt")


def garbage(folder: Path) -> str:
    (folder / "garbage.crt").write_text("this is no certificate")
    return str(folder / "garbage.crt")


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port on which nothing listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def refusal(clickhouse: ClickHouseResource, sql: str = "SELECT 1 AS number, 'a' AS word") -> Exception:
    """The error with which a query ends; it shows no password."""
    with pytest.raises((SourceError, PassingError, SettingsError)) as caught:
        rows(clickhouse, sql)
    assert not clickhouse.password or clickhouse.password not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return caught.value


def test_a_query_that_still_runs_when_the_driver_sends_it_again_is_a_passing_error(sandbox: Sandbox) -> None:
    """As it does, with the same id, when its connection broke before an answer came."""
    one, query = str(uuid.uuid4()), Query("SELECT number, 'a' AS word FROM numbers(300000000)", {})
    clickhouse = plain(sandbox, settings=SMALL_BLOCKS)
    with (
        clickhouse.frames(query, NUMBERS, log_comment="tests", query_id=one) as frames,
        contextlib.ExitStack() as again,
    ):
        next(frames)
        with pytest.raises(PassingError, match=f"Code: 216.*{one} is already running"):
            again.enter_context(clickhouse.frames(query, NUMBERS, log_comment="tests", query_id=one))


def test_another_authority_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    error = refusal(https(sandbox, ca_certificate=another_authority(tmp_path)))
    assert isinstance(error, SourceError)
    assert f"The certificate of ClickHouse at https://localhost:{sandbox.clickhouse.https_port}" in str(error)
    assert "CLICKHOUSE_CA_CERTIFICATE" in str(error)


def test_the_systems_authorities_do_not_know_the_sandboxs(sandbox: Sandbox) -> None:
    assert "CLICKHOUSE_CA_CERTIFICATE" in str(refusal(https(sandbox, ca_certificate=None)))


def test_a_certificate_of_another_name_is_refused(sandbox: Sandbox) -> None:
    error = refusal(https(sandbox, host="127.0.0.1"))
    assert isinstance(error, SourceError)
    assert "`host` to a name in it" in str(error)


def test_an_authority_that_is_no_file_is_named(sandbox: Sandbox, tmp_path: Path) -> None:
    error = refusal(https(sandbox, ca_certificate=str(tmp_path / "gone.crt")))
    assert isinstance(error, SettingsError)
    assert str(tmp_path / "gone.crt") in str(error)


def test_an_authority_that_is_no_certificate_is_named(sandbox: Sandbox, tmp_path: Path) -> None:
    error = refusal(https(sandbox, ca_certificate=garbage(tmp_path)))
    assert isinstance(error, SettingsError)
    assert "garbage.crt" in str(error)


def test_https_on_a_port_of_plain_http_names_port_and_secure(sandbox: Sandbox) -> None:
    error = refusal(https(sandbox, port=sandbox.clickhouse.http_port))
    assert isinstance(error, SourceError)
    assert "does not speak TLS on this port" in str(error)
    assert "CLICKHOUSE_PORT, CLICKHOUSE_SECURE" in str(error)


def test_plain_http_on_a_port_of_https_names_port_and_secure(sandbox: Sandbox) -> None:
    error = refusal(plain(sandbox, port=sandbox.clickhouse.https_port))
    assert "CLICKHOUSE_SECURE" in str(error)


def test_a_host_that_is_down_is_a_passing_error(sandbox: Sandbox, silent_port: int) -> None:
    for clickhouse in (https(sandbox, port=silent_port), plain(sandbox, port=silent_port)):
        error = refusal(clickhouse)
        assert isinstance(error, PassingError)
        assert f"localhost:{silent_port} does not answer" in str(error)
        assert "CLICKHOUSE_HOST" in str(error)


def test_a_host_that_cannot_be_found_is_named(sandbox: Sandbox) -> None:
    error = refusal(plain(sandbox, host="no-such-host.invalid"))
    assert "no-such-host.invalid" in str(error)
    assert "CLICKHOUSE_HOST" in str(error)


@pytest.mark.parametrize("host", ["", " ", "https://user:hidden@localhost", "localhost:8123", "a b", "a/b"])
def test_a_host_that_is_no_host_is_refused_and_not_shown(sandbox: Sandbox, host: str) -> None:
    error = refusal(plain(sandbox, host=host))
    assert isinstance(error, SettingsError)
    assert "CLICKHOUSE_HOST" in str(error)
    assert "hidden" not in str(error)


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_a_port_that_is_no_port_is_named(sandbox: Sandbox, port: int) -> None:
    assert "CLICKHOUSE_PORT" in str(refusal(plain(sandbox, port=port)))


@pytest.mark.parametrize("wrong", [{"password": "not-the-password"}, {"user": "nobody"}, {"password": ""}])
def test_wrong_credentials_are_a_lasting_error_that_names_their_settings(
    sandbox: Sandbox, wrong: dict[str, str]
) -> None:
    error = refusal(https(sandbox, **wrong))
    assert isinstance(error, SourceError)
    assert "Code: 516" in str(error)
    assert "CLICKHOUSE_USER, CLICKHOUSE_PASSWORD" in str(error)
    assert sandbox.source_password not in str(error)


def test_a_missing_database_table_or_column_is_named(sandbox: Sandbox, source: Source) -> None:
    error = refusal(https(sandbox, database="no_such_database"))
    assert "no_such_database" in str(error)
    assert "CLICKHOUSE_DATABASE" in str(error)
    error = refusal(source.resource(), "SELECT 1 AS number, word FROM no_such_table")
    assert "no_such_table" in str(error)
    assert "CLICKHOUSE_DATABASE" in str(error)
    error = refusal(source.resource(), "SELECT 1 AS number, no_such_column AS word FROM events")
    assert "no_such_column" in str(error)
    assert "PostHog's tables" in str(error)


def test_an_export_from_a_database_without_the_tables_says_so(
    sandbox: Sandbox, source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("DROP TABLE events SYNC")
    failed = run(events_export(target, hour), partition_key(hour))
    assert failed.error is not None
    assert "(UNKNOWN_TABLE)" in failed.error
    assert "A source table is missing" in failed.error
    assert sandbox.source_password not in failed.error + " ".join(failed.log)


# Settings and names


def test_query_settings_arrive(sandbox: Sandbox) -> None:
    sql = "SELECT getSetting('max_threads') AS number, toString(getSetting('max_block_size')) AS word"
    assert rows(https(sandbox, settings=SMALL_BLOCKS), sql) == [(1, "1000")]


@pytest.mark.parametrize(
    ("shortening", "code"),
    [
        ({"max_result_rows": 100, "result_overflow_mode": "break", "max_block_size": 50}, 396),
        ({"max_rows_to_read": 100, "read_overflow_mode": "break"}, 158),
    ],
)
def test_a_limit_that_would_shorten_the_answer_is_an_error(
    sandbox: Sandbox, shortening: dict[str, Any], code: int
) -> None:
    error = refusal(https(sandbox, settings=shortening), "SELECT number, 'a' AS word FROM numbers(5000)")
    assert f"Code: {code}" in str(error)


def test_a_setting_that_cuts_every_answer_has_no_effect(sandbox: Sandbox) -> None:
    cutting = {"limit": 5, "offset": 2, "use_query_cache": 1}
    assert len(rows(https(sandbox, settings=cutting), "SELECT number, 'a' AS word FROM numbers(5000)")) == 5000


def test_an_unknown_query_setting_is_a_lasting_error_that_names_it(sandbox: Sandbox) -> None:
    error = refusal(https(sandbox, settings={"max_thread": 1}))
    assert isinstance(error, (SourceError, SettingsError))
    assert "max_thread" in str(error)
    assert "`settings`" in str(error)


def test_a_query_setting_that_is_none_is_a_lasting_error_that_names_it(sandbox: Sandbox) -> None:
    error = refusal(https(sandbox, settings={"user": "another"}))
    assert isinstance(error, SourceError)
    assert "Unknown setting 'user'" in str(error)
    assert "`settings`" in str(error)


@pytest.mark.parametrize("value", ["", None, [1]], ids=repr)
def test_a_query_setting_without_a_value_is_a_lasting_error_that_names_it(sandbox: Sandbox, value: object) -> None:
    error = refusal(https(sandbox, settings={"max_threads": value}))
    assert isinstance(error, SettingsError)
    assert "max_threads" in str(error)
    assert "`settings`" in str(error)


@pytest.mark.parametrize("value", ["many", 1.5, -1, {"a": "1"}], ids=repr)
def test_a_query_setting_with_a_wrong_value_is_a_lasting_error_that_names_it(sandbox: Sandbox, value: object) -> None:
    error = refusal(https(sandbox, settings={"max_threads": value}))
    assert isinstance(error, SourceError)
    assert f"the connection's `settings` that may be the cause: max_threads = {value}" in str(error)


def test_a_query_setting_may_be_a_yaml_boolean(sandbox: Sandbox) -> None:
    sql = "SELECT getSetting('max_threads') AS number, toString(getSetting('use_uncompressed_cache')) AS word"
    [row] = rows(https(sandbox, settings={"max_threads": True, "use_uncompressed_cache": True}), sql)
    assert row in ((1, "true"), (1, "1"))


def test_text_is_checked_where_the_server_would_send_bytes(sandbox: Sandbox) -> None:
    [row] = rows(
        https(sandbox, settings={"output_format_arrow_string_as_string": 0}), "SELECT 1 AS number, unhex('FF') AS word"
    )
    assert row == (1, "\ufffd", '{"word": "\\udcff"}')


def test_the_query_log_names_run_export_and_partition(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert_events(source, hour, 3)
    name = f"log_{uuid.uuid4().hex}"
    run(
        events_export(target, hour, name=name),
        partition_key(hour),
        clickhouse=source.resource(settings={"max_threads": 1}),
    )
    [(run_id,)] = target.rows("SELECT run_id FROM pg_exports_ledger")
    source.execute("SYSTEM FLUSH LOGS")
    [(comment, threads)] = source.rows(
        "SELECT log_comment, Settings['max_threads'] FROM system.query_log WHERE type = 'QueryFinish'"
        " AND query LIKE '%FROM events AS e%' AND JSONExtractString(log_comment, 'export') = {name:String}",
        {"name": name},
    )
    assert json.loads(comment) == {"run_id": run_id, "export": name, "partition": partition_key(hour)}
    assert threads == "1"


def test_a_connection_asks_for_the_servers_settings_once_and_for_nothing_else(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "urllib3.connectionpool")
    clickhouse = https(sandbox)
    for _ in range(3):
        assert clickhouse.rows(Query("SELECT 1", {}), log_comment="tests") == [(1,)]
    assert len([record for record in caplog.messages if '"POST /' in record]) == 4


def test_a_query_goes_out_with_the_id_that_it_is_given(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "urllib3.connectionpool")
    query = Query("SELECT number, 'a' AS word FROM numbers({rows:UInt8})", {"rows": 2})
    streamed, small = uuid.uuid4().hex, uuid.uuid4().hex
    with https(sandbox).frames(query, NUMBERS, log_comment="tests", query_id=streamed) as frames:
        assert sum(frame.height for frame in frames) == 2
    assert len(https(sandbox).rows(query, log_comment="tests", query_id=small)) == 2
    for query_id in (streamed, small):
        [request] = [record for record in caplog.messages if query_id in record]
        assert re.search(rf'"POST /\?.*\bquery_id={query_id}\b.* 200 ', request)


def test_a_querys_rows_are_counted_without_reading_its_other_columns(
    sandbox: Sandbox, source: Source, hour: datetime
) -> None:
    insert_events(source, hour, 3)
    insert_events(source, hour, 1, event="'other'")
    selection = Selection(TEAM, hour, hour + timedelta(hours=1), include_events=("$pageview",))
    export = uuid.uuid4().hex
    counted = source.resource().count(MODELS["events"].query(selection), log_comment=json.dumps({"export": export}))
    assert counted == 3
    [read] = source.columns_read(export)
    assert "event" in read
    assert not {"properties", "person_properties", "elements_chain"} & read
    assert https(sandbox).count(Query("SELECT 1 WHERE 0", {}), log_comment="") == 0


def test_event_names_with_quotes_are_data(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    names = ["it's", 'a "b"', "back\\slash", "\\'", "{team_id:Int64}", "') OR 1 --", "😀", "new\nline", "tab\t", "[]"]
    for name in [*names, "another"]:
        insert_events(source, hour, 1, event=f"unhex('{name.encode().hex()}')")
    included = events_export(target, hour, include_events=names, exclude_events=names[:2])
    assert run(included, partition_key(hour)).counts == (len(names) - 2, 0, 0)
    assert {name for (name,) in target.rows("SELECT event FROM events")} == set(names[2:])
    excluded = events_export(target, hour, name="the_rest", table="the_rest", exclude_events=names)
    assert run(excluded, partition_key(hour)).error is None
    assert target.rows("SELECT event FROM the_rest") == [("another",)]


def test_a_database_with_an_awkward_name_is_read(sandbox: Sandbox) -> None:
    name = f'test_it\'s a "test" {uuid.uuid4().hex}'
    sandbox.execute(f"CREATE DATABASE `{name}`")
    try:
        sql = "SELECT 1 AS number, currentDatabase() AS word"
        assert rows(https(sandbox, database=name), sql) == [(1, name)]
    finally:
        sandbox.execute(f"DROP DATABASE `{name}`")


def test_no_repr_shows_the_password(sandbox: Sandbox) -> None:
    clickhouse = https(sandbox)
    assert clickhouse.password not in f"{clickhouse!r} {clickhouse!s} {clickhouse.address}"


def test_a_wrong_field_is_refused_without_the_password() -> None:
    with pytest.raises(ValueError, match="secure") as caught:
        ClickHouseResource(host="localhost", password="hidden", secure="perhaps")  # type: ignore[arg-type]  # wrong on purpose
    assert "hidden" not in str(caught.value)


def test_a_dictionary_is_found_by_its_name(sandbox: Sandbox, source: Source) -> None:
    assert source.resource().has_dictionary("channel_definition_dict")
    assert not source.resource().has_dictionary("no 'such' dictionary")
    with pytest.raises(SourceError, match="CLICKHOUSE_PASSWORD"):
        source.resource(password="wrong").has_dictionary("channel_definition_dict")
