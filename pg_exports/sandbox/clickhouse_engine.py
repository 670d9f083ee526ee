"""The real ClickHouse engine (chDB), one data folder: runs a statement and hands back its answer as chunks of bytes.

Here is everything that knows chDB: a handle for each statement, settings, formats, inserts, errors. HTTP is in
`clickhouse_server`, starting and stopping the process in `clickhouse_process`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import chdb
import pyarrow as pa

# chDB encodes each block of a stream on its own. Of these formats the encodings can be put one after the other;
# ArrowStream needs `_one_arrow_stream`, and every other format is made whole before it is sent.
CONCATENABLE_FORMATS = frozenset(
    {"CSV", "JSONEachRow", "Native", "RowBinary", "TabSeparated", "TabSeparatedRaw", "TSV", "TSVRaw"}
)
ARROW_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"

# The embedded engine keeps system.query_log only when a configuration asks for it.
CONFIGURATION = """<clickhouse>
    <query_log>
        <database>system</database>
        <table>query_log</table>
        <flush_interval_milliseconds>500</flush_interval_milliseconds>
    </query_log>
</clickhouse>
"""

# Where an embedded engine differs from a server (`SELECT name FROM system.settings WHERE changed`).
SETTINGS_OF_A_SERVER = {"allow_introspection_functions": "0", "implicit_select": "0"}
BYTES_AN_APPEND = 1 << 20

_QUOTED_OR_COMMENT = re.compile(
    r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|`(?:[^`\\]|\\.)*`|--[^\n]*|/\*.*?\*/|#[ !][^\n]*", re.DOTALL
)
_FORMAT_CLAUSE = re.compile(r"\bFORMAT\s+(\w+)\s*(?:SETTINGS\b.*)?[;\s]*$", re.IGNORECASE | re.DOTALL)
_SELECT = re.compile(r"[\s(]*(?:SELECT|WITH|FROM)\b", re.IGNORECASE)
_WITHOUT_RESULT = re.compile(
    r"\s*(?:ALTER|ATTACH|CREATE|DELETE|DETACH|DROP|GRANT|INSERT|OPTIMIZE|RENAME|REVOKE|SET|SYSTEM|TRUNCATE|UPDATE|USE)\b",
    re.IGNORECASE,
)
# INSERT INTO [TABLE] name [(columns)] [SETTINGS ...] FORMAT name | VALUES: what follows is data and not SQL.
_INSERT_WITH_DATA = re.compile(
    rb"""(?:\s|--[^\n]*\n|/\*.*?\*/)*(?P<insert>INSERT\s+INTO\s+(?:TABLE\s+)?(?:`[^`]+`|"[^"]+"|[\w.]++)+
         (?:\s*\((?:`[^`]+`|"[^"]+"|[^()`"])*\))?
         (?:\s+SETTINGS\s+(?:'(?:[^'\\]|\\.)*'|[^'])*?)?)
         \s*\b(?:(?P<values>VALUES)\b|FORMAT\s+(?P<format>\w+)[ \t\f]*;?\r?\n?)""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_SETTING_NAME = re.compile(r"[A-Za-z_][\w.]*")
_CODE = re.compile(r"Code: (\d+)\.")
_VERSION = re.compile(r" \(version [\d.]+[^\n]*\)\s*$")  # some of the engine's messages end with it, some do not
_ERROR_NAME = re.compile(r"\(([A-Z][A-Z0-9_]+)\)\s*$")


class _Block(Protocol):
    """chDB's result: a whole one, or one block of a stream. `rows_read` is what it holds, `storage_*` what was read."""

    def bytes(self) -> bytes: ...
    def size(self) -> int: ...
    def rows_read(self) -> int: ...
    def rows_written(self) -> int: ...
    def bytes_written(self) -> int: ...
    def storage_rows_read(self) -> int: ...
    def storage_bytes_read(self) -> int: ...
    def elapsed(self) -> float: ...


class _Stream(Protocol):
    """chDB's stream of blocks; None is its end. One thread at a time, any thread."""

    def fetch(self) -> _Block | None: ...
    def cancel(self) -> None: ...


class _Written(Protocol):
    rows_written: int
    bytes_written: int


class _Inserter(Protocol):
    def append(self, data: bytes) -> None: ...
    def finish(self) -> _Written: ...


class _Handle(Protocol):
    """What is used here of chDB's connection. Values of `params` are text as ClickHouse's HTTP interface escapes it."""

    def query(self, query: str, output: str = ..., /, params: Mapping[str, str] | None = ...) -> _Block: ...
    def send_query(self, query: str, output: str = ..., /, params: Mapping[str, str] | None = ...) -> _Stream: ...
    def send_insert(self, query: str, encoding: str, /) -> AbstractContextManager[_Inserter]: ...
    def close(self) -> None: ...


_connect: Callable[[str], _Handle] = chdb.connect


class ClickHouseError(Exception):
    """An exception of ClickHouse: its number, its name, and `Code: N. DB::Exception: ... (NAME)` as the text."""

    def __init__(self, text: str) -> None:
        text = _VERSION.sub("", text)
        start = text.find("Code: ")
        self.text = text[start:].strip() if start >= 0 else f"Code: 1001. DB::Exception: {text} (STD_EXCEPTION)"
        super().__init__(self.text)
        code = _CODE.match(self.text)
        name = _ERROR_NAME.search(self.text)
        self.code = int(code[1]) if code else 1001
        self.name = name[1] if name else ""


@dataclass(frozen=True)
class Statement:
    """One SQL statement with what belongs to it alone; `sql` of an INSERT ends with its data."""

    sql: bytes
    database: str = ""
    default_format: str = "TabSeparated"
    parameters: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    may_stream: bool = True


@dataclass
class Answer:
    """What a statement gave: the format (None: no result set), figures, and the bytes. Close it when done with it."""

    format: str | None
    summary: dict[str, str]
    chunks: Iterator[bytes]
    handle: _Handle
    stream: _Stream | None = None

    def close(self) -> None:
        """Cancel what still runs and give the engine's handle back."""
        try:
            if self.stream is not None:
                self.stream.cancel()
        finally:
            self.handle.close()


class Engine:
    """The engine on one data folder, of which chDB allows one in a process. Safe to use from many threads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        configuration = folder / "config.xml"
        configuration.write_text(CONFIGURATION)
        self._address = f"{folder / 'data'}?config-file={configuration}"
        # The engine lives as long as one handle is open, and takes half a second to start.
        try:
            self._keeper = _connect(self._address)
        except RuntimeError as error:
            raise SystemExit(f"The engine cannot open {folder}; has another process opened it? {error}") from None
        facts = self._keeper.query("SELECT version(), timezone()", "TabSeparated").bytes().decode()
        self.version, self.timezone = facts.split()

    def close(self) -> None:
        """End the engine, once no answer is open any more."""
        self._keeper.close()

    def run(self, statement: Statement) -> Answer:
        """Run the statement up to the first chunk of its answer.

        Raises ClickHouseError for what fails before the first chunk; `Answer.chunks` raises it for what fails later.
        """
        # A handle has one database and one set of settings, and a second query on a handle that has an open stream
        # silently returns nothing: so each statement has its own (1.5 ms).
        handle = _connect(self._address)
        try:
            with _engine_errors():
                _apply_settings(handle, statement)
                return _run(handle, statement)
        except BaseException:
            handle.close()
            raise


def _run(handle: _Handle, statement: Statement) -> Answer:
    insert = None if statement.parameters else _INSERT_WITH_DATA.match(statement.sql)
    if insert:
        return _insert(handle, insert)
    sql = statement.sql.decode()
    bare = _QUOTED_OR_COMMENT.sub(lambda found: "''" if found[0][0] in "'\"`" else " ", sql)
    clause = _FORMAT_CLAUSE.search(bare)
    format_name = clause[1] if clause else statement.default_format
    streamable = format_name == "ArrowStream" or format_name in CONCATENABLE_FORMATS
    if statement.may_stream and streamable and _SELECT.match(bare):
        return _stream(handle, sql, format_name, statement.parameters)
    result = handle.query(sql, format_name, params=statement.parameters)
    has_result = bool(result.size()) or not _WITHOUT_RESULT.match(bare)
    return Answer(format_name if has_result else None, _figures(result), iter([result.bytes()]), handle)


def _stream(handle: _Handle, sql: str, format_name: str, parameters: Mapping[str, str]) -> Answer:
    stream = handle.send_query(sql, format_name, params=parameters)
    first = stream.fetch()
    if first is None and format_name == "ArrowStream":
        # A stream without rows has no block at all, so its schema comes from the same query made whole.
        schema = handle.query(sql, format_name, params=parameters)
        return Answer(format_name, _figures(schema), iter([schema.bytes()]), handle)
    blocks = _blocks(first, stream)
    chunks = _one_arrow_stream(blocks) if format_name == "ArrowStream" else blocks
    return Answer(format_name, _figures(first), chunks, handle, stream)


def _blocks(first: _Block | None, stream: _Stream) -> Iterator[bytes]:
    block = first
    while block is not None:
        yield block.bytes()
        with _engine_errors():
            block = stream.fetch()


def _one_arrow_stream(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Of many Arrow streams one: the first one's schema, every batch as it was written, one end-of-stream marker."""
    for number, block in enumerate(blocks):
        messages = pa.ipc.MessageReader.open_stream(block)
        yield b"".join(message.serialize() for message in messages if number == 0 or message.type != "schema")
    yield ARROW_END_OF_STREAM


def _insert(handle: _Handle, insert: re.Match[bytes]) -> Answer:
    # `query` reads a Native block that follows the SQL only up to the parser's buffer of 1 MB.
    format_name = "Values" if insert["values"] else insert["format"].decode()
    with handle.send_insert(insert["insert"].decode(), format_name) as inserter:
        for start in range(insert.end(), len(insert.string), BYTES_AN_APPEND):
            inserter.append(insert.string[start : start + BYTES_AN_APPEND])
        written = inserter.finish()
    summary = {"written_rows": str(written.rows_written), "written_bytes": str(written.bytes_written)}
    return Answer(None, summary, iter(()), handle)


def _apply_settings(handle: _Handle, statement: Statement) -> None:
    if statement.database:
        handle.query("USE `{}`".format(statement.database.replace("\\", "\\\\").replace("`", "\\`")))
    settings = {**SETTINGS_OF_A_SERVER, **statement.settings}
    for name in settings:
        if not _SETTING_NAME.fullmatch(name):
            raise ClickHouseError(f"Code: 115. DB::Exception: Unknown setting '{name}'. (UNKNOWN_SETTING)")
    handle.query("SET " + ", ".join(f"{name} = {_literal(value)}" for name, value in settings.items()))


def _literal(value: str) -> str:
    return "'{}'".format(value.replace("\\", "\\\\").replace("'", "\\'"))


def _figures(result: _Block | None) -> dict[str, str]:
    if result is None:
        return {}
    return {
        "read_rows": str(result.storage_rows_read()),
        "read_bytes": str(result.storage_bytes_read()),
        "written_rows": str(result.rows_written()),
        "written_bytes": str(result.bytes_written()),
        "result_rows": str(result.rows_read()),
        "result_bytes": str(result.size()),
        "elapsed_ns": str(int(result.elapsed() * 1e9)),
    }


@contextmanager
def _engine_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ClickHouseError(str(error)) from None
