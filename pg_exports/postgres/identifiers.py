"""Quoting of Postgres identifiers and constants: the one place where a name becomes part of a statement."""

MAX_BYTES = 63
"""Longest identifier in bytes (NAMEDATALEN - 1); Postgres cuts longer ones short without an error."""


def quoted(*parts: str) -> str:
    """The quoted form of a name, or of a qualified name: `quoted("public", "My table")` is `"public"."My table"`."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in parts)


def literal(text: str) -> str:
    """A string constant, for statements that take no parameters (CREATE ROLE, SET)."""
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    return f"E'{escaped}'"
