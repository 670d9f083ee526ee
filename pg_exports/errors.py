"""The errors that a user sees. Each says what is wrong, where, and what to do about it.

They are Dagster failures, so that the UI shows the message itself, and each class knows whether another try may help.
"""

import dagster as dg


class ExportError(dg.Failure):
    """Something is wrong that another try will not mend; the message says what to change. Not retried."""

    def __init__(self, message: str) -> None:
        super().__init__(description=message, allow_retries=False)

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
        super().__init__(description=message, allow_retries=True)

    def __str__(self) -> str:
        return self.description or ""
