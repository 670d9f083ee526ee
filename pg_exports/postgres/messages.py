"""What Postgres says in an error: all of it, and without what may quote a row.

Its detail repeats the failing row, its message a value that does not fit, its context a statement with values in it. Whole
messages are for `pg_exports_rejected` alone, which holds the rows themselves; logs and Dagster get the other ones.
"""

import re

from adbc_driver_postgresql import dbapi

# Classes of Postgres's "Appendix A". Texts about the server, the connection, a lock or a privilege quote no row; those about a
# statement may where it deals with rows: a cast or a function finds fault with one.
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
    "54000": "a limit of Postgres's is exceeded",
    "54001": "stack depth limit exceeded",
    "P0001": "a function that the table calls raised an error",
}
"""What errors about a row are, by SQLSTATE."""

# A line of the context with the name of a function, and no value, in English or German. Others have statements, documents or
# parameters.
_FUNCTION = re.compile(
    r'PL/\w+[ -][Ff]un[ck]tion [^\n]{1,200} (line|Zeile) \d+ (at|bei) [A-Za-z /]+|SQL function "[^"]+" statement \d+'
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
        return _joined(error, "PRIMARY", "DETAIL", "HINT")
    state = error.sqlstate or ""
    if state == _CHECK and "PG_DIAG_CONSTRAINT_NAME" not in found:
        return f'no partition of "{found.get("PG_DIAG_TABLE_NAME", "")}" takes it (SQLSTATE {state})'
    kind = _KINDS.get(state, "a value does not fit" if state.startswith("22") else "it refused")
    names = [f'"{found[field]}"' for field in ("PG_DIAG_COLUMN_NAME", "PG_DIAG_CONSTRAINT_NAME") if found.get(field)]
    table = [f'of "{found["PG_DIAG_TABLE_NAME"]}"'] if found.get("PG_DIAG_TABLE_NAME") else []
    return "; ".join([" ".join([kind, *names, *table, f"(SQLSTATE {state})"]), *_functions(error)])


def is_about_a_row(error: dbapi.Error, *, of_rows: bool) -> bool:
    """Whether a row may be at fault, so that Postgres's words may quote it. Arguments as those of `shown`."""
    found = fields(error)
    if not found:
        return False
    context, state = found.get("PG_DIAG_CONTEXT", ""), error.sqlstate or ""
    # In any language the context of a function or of its statement names its language.
    if "PL/" in context or "SQL" in context:
        return True
    if state.startswith(_OF_A_STATEMENT) and not state.startswith(_OF_THE_SERVER):
        # Where Postgres points at a place in our own statement, it is about that: values are bound.
        return of_rows and "PG_DIAG_STATEMENT_POSITION" not in found
    return not state.startswith(_OF_THE_SERVER)


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
    last = fields(error).get("PG_DIAG_CONTEXT", "").rsplit("\n", 1)[-1]
    name = re.escape(table)
    return re.match(rf"(?:COPY {name}, |{name}のCOPY、|{name} 복사, )\D*(\d+)(?:.*?[,、] ?\S+ (\w+)$)?", last)


def constraint(error: dbapi.Error) -> str:
    """The name of the constraint that refused, or nothing."""
    return fields(error).get("PG_DIAG_CONSTRAINT_NAME", "")


def is_in_a_function(error: dbapi.Error) -> bool:
    """Whether it happened in a function: a trigger's, a generated column's, a constraint's."""
    return bool(_functions(error))


def _functions(error: dbapi.Error) -> list[str]:
    """The context's lines that have the names of functions, the innermost first."""
    return [line for line in fields(error).get("PG_DIAG_CONTEXT", "").splitlines() if _FUNCTION.fullmatch(line)]


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
    text = re.sub(r"^[A-Z_]+: (\[libpq\] )?(Failed to connect: )?|\s*Query was: .*", "", str(error), flags=re.DOTALL)
    return re.sub(r"\s*\n\s*", " ", text).strip()
