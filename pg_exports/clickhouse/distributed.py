"""Which Distributed tables a query may read: found by names, as only ClickHouse's own analysis would know for sure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_MERGE = re.compile(r"\bmerge\s*\(", re.IGNORECASE)
_COMMENT = re.compile(r"/\*.*?\*/|--[^\n]*", re.DOTALL)
_QUOTE = r"[\"'`]?"


@dataclass(frozen=True)
class SourceTable:
    """A Distributed table, whose rows are on the shards of a cluster, or a table that may read such ones: a view, or one with
    the engine Merge, Buffer or Alias.

    Attributes:
        database, name: of the table.
        definition: its CREATE statement; empty for a Distributed table.
    """

    database: str
    name: str
    definition: str = ""

    def is_in(self, sql: str, current_database: str) -> bool:
        """Whether a query may read it: its name is one of the query's words, in any quotes, with its database or, in that,
        without. Where a query merges tables by a pattern, every table of a database that it names may be meant.
        """
        is_current = self.database == current_database
        database, name = re.escape(self.database), re.escape(self.name)
        named = rf"(?<!\w){database}{_QUOTE}\s*[.,]\s*{_QUOTE}{name}(?!\w)"
        if is_current:
            named += rf"|(?<![\w.\"'`]){_QUOTE}{name}(?!\w)"
        # Without comments, and with them: what looks like one may be within a text.
        texts = (sql, _COMMENT.sub(" ", sql))
        merged = _MERGE.search(sql) is not None and (
            is_current or re.search(rf"(?<!\w){database}(?!\w)", sql) is not None
        )
        return merged or any(re.search(named, text) for text in texts)


def read_by(tables: Sequence[SourceTable], sql: str, database: str) -> list[SourceTable]:
    """The Distributed tables among some that a query may read, itself or by others, in a current database."""
    found: list[SourceTable] = []
    texts = [(sql, database)]
    while texts:
        text, current = texts.pop()
        new = [table for table in tables if table not in found and table.is_in(text, current)]
        found += new
        texts += [(table.definition, table.database) for table in new if table.definition]
    return [table for table in found if not table.definition]
