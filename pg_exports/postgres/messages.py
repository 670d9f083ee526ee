"""What Postgres says in an error: all of it, and without what may quote a row.

Its detail repeats the failing row, its message a value that does not fit, its context a statement with values in it. Whole
messages are for `pg_exports_rejected` alone, which holds the rows themselves; logs and Dagster get the other ones.
"""

import itertools
import re
from collections.abc import Mapping

from adbc_driver_postgresql import dbapi

from pg_exports.errors import LONGEST, shortened

# Classes of Postgres's "Appendix A". Texts about the transaction, a privilege, a limit, a lock or the server's operation quote
# no row. Those about anything else may where a statement deals with rows: a cast or a function finds fault with one, as
# `has_database_privilege` does by 3D000, and an extension by XX000.
_QUOTES_NONE = ("25", "40", "42501", "53", "55006", "55P03", "57")
_OF_THE_SERVER = ("08", "25", "26", "28", "34", "3B", "3D", "40", "42501", "53", "55", "57", "58", "XX")
_OF_A_STATEMENT = ("0A", "0B", "2B", "2F", "3F", "42")

_CHECK = "23514"

_KINDS = {
    "21000": "a query finds more than one row",
    "22001": "a text is too long for its column's type",
    "22003": "a number is out of the range of its type",
    "22007": "a text is no date or time",
    "22008": "a date or time is out of range",
    "22012": "division by zero",
    "22021": "a text has characters that the database's encoding has not",
    "22P02": "a text is no value of the type that it is read as",
    "22P05": "a text has characters that the database's encoding has not",
    "23502": "it violates not-null constraint",
    "23503": "it violates foreign key constraint",
    "23505": "it violates unique constraint",
    "23514": "it violates check constraint",
    "23P01": "it violates exclusion constraint",
    "42883": "a function or an operator is not found",
    "42P01": "a table is not found",
    "54000": "a limit of Postgres's is exceeded",
    "54001": "stack depth limit exceeded",
    "P0001": "a function that the table calls raised an error",
    "XX000": "an internal error",
}
"""What errors about a row are, by SQLSTATE."""

# A line of the context with the name of a function, and no value, in English or German. Others have statements, documents or
# parameters.
_FUNCTION = re.compile(
    r"PL/\w+[ -][Ff]un[ck]tion [^\n]{1,200} (line|Zeile) \d+ (at|bei) [A-Za-z /]+"
    r'|SQL function "[^"]+" (statement \d+|during (inlining|startup))'
)


def whole(error: dbapi.Error) -> str:
    """Postgres's primary message with its detail, hint and context (which for COPY names line and column)."""
    return _joined(error, "PRIMARY", "DETAIL", "HINT", "CONTEXT") or _libpq_text(error)


def shown(error: dbapi.Error, *, of_rows: bool) -> str:
    """The same without what may quote a row: of an error that may be about one, its kind, its SQLSTATE and the names of
    columns, constraints and functions.

    Args:
        error: the driver's.
        of_rows: the statement reads or writes rows of the destination.
    """
    found = fields(error)
    if not found:
        return _libpq_text(error)
    if not is_about_a_row(error, of_rows=of_rows):
        return shortened(_joined(error, "PRIMARY", "DETAIL", "HINT"))
    state = error.sqlstate or ""
    if state == _CHECK and "PG_DIAG_CONSTRAINT_NAME" not in found and not _is_in_a_language(found):
        return f'no partition of "{found.get("PG_DIAG_TABLE_NAME", "")}" takes it (SQLSTATE {state})'
    kind = _KINDS.get(state, "a value does not fit" if state.startswith("22") else "it refused")
    # A function may give anything for these, by RAISE ... USING.
    given = {} if _is_in_a_language(found) else found
    names = [f'"{given[field]}"' for field in ("PG_DIAG_COLUMN_NAME", "PG_DIAG_CONSTRAINT_NAME") if given.get(field)]
    table = [f'of "{given["PG_DIAG_TABLE_NAME"]}"'] if given.get("PG_DIAG_TABLE_NAME") else []
    return shortened("; ".join([" ".join([kind, *names, *table, f"(SQLSTATE {state})"]), *_functions(error)]))


def is_about_a_row(error: dbapi.Error, *, of_rows: bool) -> bool:
    """Whether a row may be at fault, so that Postgres's words may quote it. Arguments as those of `shown`."""
    found = fields(error)
    if not found:
        return False
    state = error.sqlstate or ""
    if _is_in_a_language(found):
        return True
    if not of_rows:
        return not state.startswith((*_OF_THE_SERVER, *_OF_A_STATEMENT))
    # Where Postgres points at a place in our own statement, it is about that: values are bound.
    is_in_ours = state.startswith(_OF_A_STATEMENT) and "PG_DIAG_STATEMENT_POSITION" in found
    return not (state.startswith(_QUOTES_NONE) or is_in_ours)


def copy_line(error: dbapi.Error, table: str) -> int | None:
    """The line of a COPY into `table` at which Postgres refused, from 1.

    Only the context's last line counts: every other part of the message may quote a value that looks like it. It is in the
    server's language: "COPY t, line 1", "COPY t, Zeile 1", "tのCOPY、行 1", "t 복사, 1번째 줄".
    """
    place = _copy_place(error, table)
    return int(place[1]) if place else None


def copy_column(error: dbapi.Error, table: str) -> str | None:
    """The column of a binary COPY into `table` whose value Postgres cannot read, if it says so, likewise."""
    place = _copy_place(error, table)
    return place[2] if place else None


def _copy_place(error: dbapi.Error, table: str) -> re.Match[str] | None:
    last = fields(error).get("PG_DIAG_CONTEXT", "").rsplit("\n", 1)[-1][:LONGEST]
    name = re.escape(table)
    return re.match(rf"(?:COPY {name}, |{name}のCOPY、|{name} 복사, )\D*(\d+)(?:.*?[,、] ?\S+ (\w+)$)?", last)


def constraint(error: dbapi.Error) -> str:
    """The name of the constraint that refused, or nothing."""
    return fields(error).get("PG_DIAG_CONSTRAINT_NAME", "")


def is_in_a_function(error: dbapi.Error) -> bool:
    """Whether it happened in a function: a trigger's, a generated column's, a constraint's."""
    return bool(_functions(error))


def _functions(error: dbapi.Error) -> list[str]:
    """The lines of the context that have the names of functions, the innermost first: those before the first and after the
    last line that may quote something, in which others might look like them.
    """
    lines = fields(error).get("PG_DIAG_CONTEXT", "").split("\n")
    if not re.search("[\"']|" + _FUNCTION.pattern, lines[-1]):
        # Of COPY, at which line it is.
        lines.pop()
    first = list(itertools.takewhile(_FUNCTION.fullmatch, lines))
    last = itertools.takewhile(_FUNCTION.fullmatch, reversed(lines[len(first) :]))
    return [*first, *reversed(list(last))]


def _is_in_a_language(found: Mapping[str, str]) -> bool:
    """Whether it happened in a function, or in its statement: in any language of the server's the context has the name of
    theirs.
    """
    context = found.get("PG_DIAG_CONTEXT", "")
    return "PL/" in context or "SQL" in context


def _joined(error: dbapi.Error, *parts: str) -> str:
    found = fields(error)
    names = ("PG_DIAG_CONTEXT" if part == "CONTEXT" else f"PG_DIAG_MESSAGE_{part}" for part in parts)
    return "; ".join(found[name] for name in names if name in found)


def fields(error: dbapi.Error) -> dict[str, str]:
    """The parts of Postgres's answer, by libpq's names; none where the connection broke."""
    return {
        name.decode() if isinstance(name, bytes) else name: value.decode(errors="replace")
        for name, value in (error.details or [])
    }


def _libpq_text(error: dbapi.Error) -> str:
    """Libpq's words without the driver's, which repeats the statement behind them."""
    text = re.sub(
        r"^[A-Z_]+: (\[libpq\] )?(Failed to connect: )?|\s*Query was: .*", "", shortened(str(error)), flags=re.DOTALL
    )
    return re.sub(r"\s*\n\s*", " ", text).strip()
