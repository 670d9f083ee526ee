"""The errors that a user sees. Each says what is wrong, where, and what to do about it.

They are Dagster failures, so that the UI shows the message itself, and each class knows whether another try may help.
"""

import re

import dagster as dg

# Control characters but for tabs and line feeds, halves of surrogate pairs, and what turns the direction of writing or begins
# a line: a terminal or a log viewer would obey them.
_NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""A text that may be a server's or a row's, for logs and messages: what a terminal would obey is written as `\x1b`."""
    return _NOT_SHOWN.sub(lambda found: ascii(found.group())[1:-1], text)


def one_line(text: str) -> str:
    r"""The same on one line: a name may hold a line feed, which is written as `\n` then."""
    return printable(text).replace("\n", "\\n")


LONGEST = 8_000
"""Characters of an error: Dagster keeps it, and a server's text may have any number."""


def shortened(text: str) -> str:
    """A printable text whose middle is left out where it is too long: what an error is about stands at its ends. To be asked
    before a pattern looks at a server's text, too: some take long for long ones.
    """
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} ... ({len(text) - LONGEST} characters are left out) ... {text[-half:]}"
    return printable(text)


class ExportError(dg.Failure):
    """Something is wrong that another try will not mend; the message says what to change. Not retried."""

    def __init__(self, message: str) -> None:
        super().__init__(description=shortened(message), allow_retries=False)

    def __str__(self) -> str:
        return self.description or ""


class SettingsError(ExportError):
    """An export, connection or environment variable is set wrongly."""


class SourceError(ExportError):
    """ClickHouse refuses: identity, privileges, missing tables, bad answers."""


class DestinationError(ExportError):
    """Postgres refuses: identity, TLS, privileges, the table's columns and types, values that it cannot hold."""


class PassingError(dg.Failure):
    """Something that may be over at the next try: a lost connection, a server that restarts, a lock that is held."""

    def __init__(self, message: str) -> None:
        super().__init__(description=shortened(message), allow_retries=True)

    def __str__(self) -> str:
        return self.description or ""
