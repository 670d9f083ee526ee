"""What the sweeps over ClickHouse's settings have in common: a user for each setting and value, and what models answer."""

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError

from pg_exports import ClickHouseResource
from pg_exports.errors import ExportError, PassingError
from pg_exports.models import MODELS, Model, OwnModel, Selection
from pg_exports.sandbox import sample_data, source_tables
from pg_exports.sandbox.clickhouse_config import ClickHouseUser, export_grants
from pg_exports.sandbox.clickhouse_process import ClickHouseServer
from pg_exports_tests.conftest import TEAM
from pg_exports_tests.source_rows import HOUR

DATABASE = "test_sweep"
"""The database with PostHog's tables and `typed`."""

PASSWORD = "of the tests"
TYPED_ROWS = 100

AT_ONCE = 20
"""Settings that are tried together first."""

TYPED = f"""
CREATE TABLE {DATABASE}.typed (
    id UInt64, dt DateTime, d64 DateTime64(6, 'UTC'), d64b DateTime64(3), dec Decimal(18, 4), f Float64, b Bool,
    e Enum8('a' = 1, 'b' = 2), u UUID, ip IPv4, arr Array(Nullable(String)), ints Array(Int64), m Map(String, Int64),
    tup Tuple(a UInt64, b String), lc LowCardinality(String), n Nullable(String), ni Nullable(Int64), fs FixedString(4),
    big UInt64, day Date, day32 Date32, txt String, version UInt32
) ENGINE = ReplacingMergeTree(version) ORDER BY id
"""

TYPED_VALUES = f"""
INSERT INTO {DATABASE}.typed
SELECT
    number, toDateTime('2026-11-29 09:00:00') + number, toDateTime64('2026-11-29 09:00:00', 6, 'UTC') + number / 7,
    toDateTime64('2026-11-29 09:00:00', 3) + number / 7, toDecimal64(number / 3, 4) * 10, number / 7, number % 2,
    if(number % 2, 'a', 'b'), toUUID('00000000-0000-0000-0000-0000000000' || leftPad(toString(number % 100), 2, '0')),
    toIPv4('10.0.0.' || toString(number % 250)), ['a/b', NULL, toString(number)], [number, 2], map('k', number),
    (18446744073709551615 - number, 'x/y'), toString(number % 5), if(number % 3 = 0, NULL, toString(number)),
    if(number % 3 = 0, NULL, number), 'ab', 18446744073709551615 - number, toDate('2026-11-01') + number % 20,
    toDate32('2026-11-01') + number % 20, if(number % 4 = 0, '2026-11-29T09:00:00Z', '2026-11-29 09:00:01'),
    {{version:UInt32}}
FROM numbers({TYPED_ROWS})
"""

OWN = OwnModel(
    name="typed",
    query="""
        SELECT
            t.id AS id, t.d64 AS d64, t.d64b AS d64b, t.dec AS dec, t.f AS f, t.b AS b, t.e AS e, t.u AS u, t.ip AS ip,
            t.arr AS arr, t.ints AS ints, t.m AS m, t.tup AS tup, t.lc AS lc, t.n AS n, t.ni AS ni, t.fs AS fs, t.big AS big,
            t.day AS day, t.day32 AS day32, t.version AS version,
            t.dt AS at, toString(t.dec) AS dec_text, toString(t.f) AS f_text, toString(t.b) AS b_text,
            toString(t.dt) AS dt_text, toString(t.tup) AS tup_text, toString(t.arr) AS arr_text, toString(t.m) AS m_text,
            toJSONString(t.tup) AS tup_json, toDateTime(t.txt) AS parsed, CAST('2026-11-29 09:00:00' AS DateTime) AS literal,
            t.n IN (SELECT n FROM typed WHERE id < 30) AS n_in, t.n IN ('1', '2', NULL) AS n_in_list,
            least(t.ni, 5) AS least_of,
            formatDateTime(t.dt, '%M %f %e') AS formatted, splitByChar('-', t.txt) AS split, j.fs AS joined,
            s.total AS total, s.greatest AS greatest, s.different AS different,
            (SELECT sum(ni) FROM typed WHERE id > 1000000) AS nothing, (SELECT max(n) FROM typed WHERE id > 1000000) AS nobody
        FROM typed AS t
        LEFT JOIN (SELECT id, any(fs) AS fs FROM typed WHERE id % 2 = 0 GROUP BY id) AS j ON j.id = t.id
        LEFT JOIN (
            SELECT lc, sum(ni) AS total, max(n) AS greatest, count(DISTINCT n) AS different FROM typed GROUP BY lc
        ) AS s ON s.lc = t.lc
        WHERE t.d64 >= {interval_start} AND t.d64 < {interval_end}
    """,
    columns={
        "id": "BIGINT",
        "at": "TIMESTAMPTZ",
        "d64": "TIMESTAMPTZ",
        "d64b": "TIMESTAMPTZ",
        "dec": "TEXT",
        "f": "DOUBLE PRECISION",
        "b": "BOOLEAN",
        "e": "TEXT",
        "u": "UUID",
        "ip": "TEXT",
        "arr": "TEXT[]",
        "ints": "JSONB",
        "m": "JSONB",
        "tup": "JSONB",
        "lc": "TEXT",
        "n": "TEXT",
        "ni": "BIGINT",
        "fs": "TEXT",
        "big": "TEXT",
        "day": "DATE",
        "day32": "DATE",
        "version": "BIGINT",
        **dict.fromkeys(
            (
                "dec_text",
                "f_text",
                "b_text",
                "dt_text",
                "tup_text",
                "arr_text",
                "m_text",
                "tup_json",
                "formatted",
                "joined",
            ),
            "TEXT",
        ),
        **dict.fromkeys(("n_in", "n_in_list", "greatest", "nobody"), "TEXT"),
        **dict.fromkeys(("least_of", "total", "different", "nothing"), "BIGINT"),
        "parsed": "TIMESTAMPTZ",
        "literal": "TIMESTAMPTZ",
        "split": "TEXT[]",
    },
    key=["id", "at", "d64b", "f", "b", "day", "n", "version"],
).as_model()
"""Values of every kind, texts made and read, joins and aggregates with NULL, and a key whose identity is made of texts."""

UNDECIDED: Mapping[str, str] = {
    "max_local_read_bandwidth": "one byte a second: the answer does not come within the read timeout, and nothing tells why",
    "unknown_packet_in_send_data": "of ClickHouse's own tests: the server sends what no client knows",
    "memory_tracker_fault_probability": "ClickHouse's own injection of faults: its error says so, without the setting's name",
}
"""Settings that this sweep cannot decide about, with the reason."""

REFUSING = re.compile(
    "force_(index_by_date|optimize_projection|primary_key)|implicit_transaction|readonly|memory_tracker_|reader_executor_"
    "|page|limit|offset|unknown_packet_in_send_data|enforce_strict_identifier_format"
    "|merge_tree_coarse_index_granularity|query_plan_(max_optimizations_to_apply|optimize_join_order_limit)"
    "|max_(ast|bytes_(in|ratio|to_read)|columns_to_read|concurrent_queries_for_(all_users|user)|expanded_ast|local_read_bandwidth"
    "|memory_usage|os_cpu_wait_time_ratio_to_throw|parser|result|rows_(in|to_group_by|to_read)|subquery_depth|temporary)"
)
"""Settings that lead to an error with some value: each is tried alone, as all that are tried with it would be once more."""

SLOW = {"ast_fuzzer_runs", "max_local_read_bandwidth", "merge_tree_storage_snapshot_sleep_ms"}
"""What slows a query down by its value: 1,000 of it takes minutes."""

NUMERIC = re.compile(r"U?Int|NonZero|Float|Double|Seconds|Milliseconds|MaxThreads")


NUMBERS = ("0", "1", "1000")


def values(name: str, type_: str, default: str, numbers: Sequence[str]) -> list[str]:
    """The values to try: the other one of a boolean; the given numbers of a number, but small ones of threads and the like."""
    if type_ in ("Bool", "BoolAuto"):
        return ["0" if default in ("1", "true") else "1"]
    if not NUMERIC.match(type_):
        return []
    few = name in SLOW or re.search("thread|stream|connections|pool|parallel", name)
    return [number for number in numbers if number != default and not (few and int(number) > 2)]


def profiles(client: Client, numbers: Sequence[str] = NUMBERS) -> list[ClickHouseUser]:
    """A user for each boolean and numeric setting of the server and each value to try that ClickHouse takes."""

    def is_taken(name: str, value: str) -> bool:
        try:
            client.command(f"SET {name} = {value}")
        except DatabaseError:
            return False
        return True

    found = client.query("SELECT name, type, default FROM system.settings WHERE NOT is_obsolete ORDER BY name")
    return [
        ClickHouseUser(f"{name}__{value}", PASSWORD, export_grants("test_*"), {name: value})
        for name, type_, default in found.result_rows
        for value in values(str(name), str(type_), str(default), numbers)
        if is_taken(name, value)
    ]


def may_refuse(user: ClickHouseUser) -> bool:
    """Whether a setting of the user's is one of `REFUSING`."""
    return any(map(REFUSING.match, user.settings))


def together(users: Sequence[ClickHouseUser]) -> list[tuple[ClickHouseUser, Sequence[ClickHouseUser]]]:
    """Users with the settings of several of those at once, and whose these are: settings whose names stand far apart, and none
    of `REFUSING`.
    """
    peaceful = [user for user in users if not may_refuse(user)]
    count = -(-len(peaceful) // AT_ONCE)
    return [
        (
            ClickHouseUser(
                f"together_{number}",
                PASSWORD,
                export_grants("test_*"),
                {name: value for user in peaceful[number::count] for name, value in user.settings.items()},
            ),
            peaceful[number::count],
        )
        for number in range(count)
    ]


def fill(client: Client, end: datetime) -> None:
    """Make `DATABASE`, with four hours of sample data before `end`."""

    def execute(sql: str, parameters: Mapping[str, object] | None = None) -> None:
        client.command(sql, dict(parameters or {}))

    source_tables.create_tables(execute, DATABASE)
    sample_data.fill(execute, DATABASE, end=end, hours=4, events=300)
    execute(TYPED)
    execute(TYPED_VALUES, {"version": 1})
    execute(f"DELETE FROM {DATABASE}.typed WHERE id > {TYPED_ROWS - 10}")
    execute(f"SYSTEM STOP MERGES {DATABASE}.typed")
    execute(TYPED_VALUES, {"version": 2})


def connection(server: ClickHouseServer, user: str, database: str = DATABASE) -> ClickHouseResource:
    """As an export's, by a user of a sweep."""
    return ClickHouseResource(
        host=server.host, port=server.http_port, user=user, password=PASSWORD, database=database, read_timeout=20
    )


def answers(clickhouse: ClickHouseResource, end: datetime) -> dict[str, list[str]]:
    """The rows of each model, as texts, and the fingerprints."""
    typed = datetime.fromisoformat("2026-11-29T09:00:00+00:00")
    selections: list[tuple[Model, Selection]] = [
        (model, Selection(TEAM, end - 2 * HOUR, end)) for model in MODELS.values()
    ]
    selections.append((OWN, Selection(0, typed, typed + HOUR)))
    answered = {}
    for model, selection in selections:
        with clickhouse.frames(model.query(selection), model, log_comment="tests") as frames:
            # Of an event that is there twice, either copy may come.
            rows = [
                json.dumps(row, default=str)
                for frame in frames
                for row in frame.select(sorted({*frame.columns} - {"created_at", "inserted_at"})).rows()
            ]
        answered[model.name] = sorted(rows)
        fingerprints = clickhouse.rows(model.fingerprints(selection), log_comment="tests")
        answered[f"{model.name}, fingerprints"] = sorted(str(row) for row in fingerprints)
    return answered


def hold(
    users: Sequence[ClickHouseUser],
    connection: Callable[[str], ClickHouseResource],
    expected: dict[str, list[str]],
    end: datetime,
) -> None:
    """Assert that each user gets the expected rows, or an error that names the user's setting; but for `UNDECIDED`, which may
    give any error, and no other rows either.

    Where the settings of several users together give the expected rows, none of these users is asked.
    """
    assert all(expected.values())
    others: dict[str, list[str]] = {}
    nameless: dict[str, str] = {}
    refused = 0
    alone = [user for user in users if may_refuse(user)]
    for several, members in together(users):
        assert len(several.settings) == len(members)
        with contextlib.suppress(ExportError, PassingError):
            if answers(connection(several.name), end) == expected:
                continue
        alone += members
    assert len(alone) < len(users)
    for user in alone:
        [name] = user.settings
        try:
            answered = answers(connection(user.name), end)
        except (ExportError, PassingError) as error:
            refused += 1
            if name not in str(error) and name not in UNDECIDED:
                nameless[user.name] = str(error)
        else:
            if answered != expected:
                others[user.name] = [model for model, rows in answered.items() if rows != expected[model]]
    assert others == {}
    assert nameless == {}
    assert refused > 10
