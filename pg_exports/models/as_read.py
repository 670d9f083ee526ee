"""What rows were before they were made to fit a frame: the column `AS_READ`, in those frames alone that need it.

A frame holds neither bytes that are no UTF-8 nor numbers past 64 bits. Whoever writes the
rows reads here what they were, and decides.
"""

import json
from collections.abc import Mapping

import polars as pl

from pg_exports.models.model import AS_READ


def originals(frame: pl.DataFrame) -> dict[int, dict[str, object]]:
    """What the rows were that did not fit: by row, the columns at fault with their values.

    In a text each byte that is no UTF-8 is a surrogate from U+DC80 on (Python's `surrogateescape`).
    """
    if AS_READ not in frame.columns:
        return {}
    rows = frame[AS_READ].is_not_null().arg_true()
    return {row: json.loads(text) for row, text in zip(rows, frame[AS_READ].gather(rows), strict=True)}


def with_originals(frame: pl.DataFrame, values: Mapping[int, Mapping[str, object]]) -> pl.DataFrame:
    """The frame with `values` for what its rows were, in place of what it knew; without the column if there are none."""
    without = frame.drop(AS_READ, strict=False)
    return without.with_columns(column(values, frame.height)) if any(values.values()) else without


def column(values: Mapping[int, Mapping[str, object]], height: int) -> pl.Series:
    """The column `AS_READ` of a frame with so many rows."""
    texts = {row: json.dumps(value) for row, value in values.items() if value}
    nulls = pl.repeat(None, height, dtype=pl.String, eager=True).alias(AS_READ)
    return nulls.scatter(list(texts), list(texts.values()))
