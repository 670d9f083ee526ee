"""Fingerprints: what tells one set of rows from another, on the source's side and on what was read of it."""

from dataclasses import dataclass
from typing import cast

import polars as pl


@dataclass(frozen=True)
class Fingerprint:
    """The number of rows, and the XOR and the sum (modulo 2^64) of the hashes of their states.

    Equal for the same rows in whatever order, and it can be taken of parts and added.

    Attributes:
        rows, xor, sum: of the rows.
        scheme: what the hashes are made of: `Model.fingerprint_scheme`, which has a colon in it. Versions before it was
            kept nothing, or its first half alone.
    """

    rows: int = 0
    xor: int = 0
    sum: int = 0
    scheme: str = ""

    @classmethod
    def of(cls, states: pl.Series) -> "Fingerprint":
        """The fingerprint of rows by the hashes of their states (UInt64)."""
        if states.is_empty():
            return cls()
        xor, total = states.bitwise_xor(), states.sum()
        return cls(len(states), cast("int", xor), cast("int", total))

    def __add__(self, other: "Fingerprint") -> "Fingerprint":
        total = (self.sum + other.sum) % 2**64
        return Fingerprint(self.rows + other.rows, self.xor ^ other.xor, total, self.scheme or other.scheme)

    def __sub__(self, other: "Fingerprint") -> "Fingerprint":
        """Without rows that are among its own."""
        return Fingerprint(self.rows - other.rows, self.xor ^ other.xor, (self.sum - other.sum) % 2**64, self.scheme)

    def may_be(self, kept: str) -> bool:
        """Whether one that the ledger keeps may be of the same rows. One of another scheme tells their number alone."""
        rows = int(kept.split(":", 1)[0])
        return kept == str(self) or (scheme_of(kept) != self.scheme and rows == self.rows)

    def __str__(self) -> str:
        """As the ledger keeps it."""
        numbers = f"{self.rows}:{self.xor:016x}:{self.sum:016x}"
        return f"{numbers}:{self.scheme}" if self.scheme else numbers


def scheme_of(kept: str) -> str:
    """The scheme of a fingerprint that the ledger keeps; empty for one that has none, and for none at all."""
    return (*kept.split(":", 3), "", "", "")[3]
