"""What Postgres says in an error: all of it, and without what may quote a row.

Its detail repeats the failing row, its message a value that does not fit, its context a statement with values in it. Whole
messages are for `pg_exports_rejected` alone, which holds the rows themselves; logs and Dagster get the other ones.
"""

import re

from adbc_driver_postgresql import dbapi

# Classes of Postgres's "Appendix A". Errors about the server, the connection, a privilege or a statement quote no row; those
# of constraints, of queries that find too many rows, and of limits do in their detail alone.
_WITHOUT_ROWS = (
    "08",
    "0A",
    "0B",
    "25",
    "26",
    "28",
    "2B",
    "34",
    "3B",
    "3D",
    "3F",
    "40",
    "42",
    "53",
    "55",
    "57",
    "58",
    "XX",
)
_ROW_IN_DETAIL = ("21", "23", "27", "44", "54")

_KINDS = {
    "22001": "a text is too long for its column's type",
    "22003": "a number is out of the range of its type",
    "22007": "a text is no date or time",
    "22008": "a date or time is out of range",
    "22012": "division by zero",
    "22021": "a text has characters that the database's encoding has not",
    "22P02": "a text is no value of the type that it is read as",
    "22P05": "a text has characters that the database's encoding has not",
    "P0001": "a function that the table calls raised an error",
}
"""Errors whose own message quotes a value, by SQLSTATE."""

# A line of the context with the name of a function, and no value, in English or German. Others have statements, documents or
# parameters.
_FUNCTION = re.compile("PL/.*|SQL[ -][Ff]un[ck]tion .*")


def whole(error: dbapi.Error) -> str:
    """Postgres's primary message with its detail, hint and context (which for COPY names line and column)."""
    return _joined(error, "PRIMARY", "DETAIL", "HINT", "CONTEXT") or _libpq_text(error)


def shown(error: dbapi.Error) -> str:
    """The same without what may quote a row: of an error about a value its kind and its SQLSTATE, and of a context the names
    of functions.
    """
    if not fields(error):
        return _libpq_text(error)
    state, functions = error.sqlstate or "", _functions(error)
    if not is_about_a_row(error):
        said = _joined(error, "PRIMARY", "DETAIL", "HINT")
    elif state.startswith(_ROW_IN_DETAIL) and not functions:
        said = _joined(error, "PRIMARY")
    else:
        other = "a value does not fit" if state.startswith("22") else "refused"
        kind = _KINDS.get(state, "a function that the table calls refused" if functions else other)
        of_constraint = f", constraint {constraint(error)}" if constraint(error) else ""
        said = f"{kind}{of_constraint} (SQLSTATE {state})"
    return "; ".join([said, *functions])


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


def is_about_a_row(error: dbapi.Error) -> bool:
    """Whether a row is at fault, so that Postgres's words may quote it."""
    return bool(fields(error)) and (not (error.sqlstate or "").startswith(_WITHOUT_ROWS) or _is_raised(error))


def is_in_a_function(error: dbapi.Error) -> bool:
    """Whether it happened in a function: a trigger's, a generated column's, a constraint's."""
    return bool(_functions(error))


def _is_raised(error: dbapi.Error) -> bool:
    """Whether a function has chosen code and message itself."""
    return any(line.endswith("RAISE") for line in _functions(error)[:1])


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
