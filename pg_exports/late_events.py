"""Events that become visible in ClickHouse after their interval has run, and the runs that bring them.

Replica lag, asynchronous inserts and consumers that were down all make such events. One query takes the fingerprints of
the latest intervals at the source; where one differs from the ledger's, the source has rows that no run has seen. The sensor
that asks, every few minutes, is made by `export`.
"""

from collections.abc import Mapping
from datetime import datetime

import dagster as dg

from pg_exports.fingerprint import Fingerprint
from pg_exports.interval import Interval
from pg_exports.models import Model
from pg_exports.partitions import IntervalLength
from pg_exports.postgres import PostgresResource, ledger, registry
from pg_exports.postgres import table as tables
from pg_exports.postgres.table import Destination

INTERVALS = 24
"""How many of the latest intervals are looked at."""

SECONDS_BETWEEN: Mapping[IntervalLength, int] = {
    "every 5 minutes": 300,
    "every 15 minutes": 300,
    "hour": 600,
    "day": 3600,
    "week": 3600,
}
"""How long the sensor waits from one look to the next, by the length of an interval."""

TAGS = {"pg_exports/reason": "late events"}
"""Of the runs that are asked for."""


def exported(
    postgres: PostgresResource, destination: Destination, model: Model, export: str, team_id: int, span: Interval
) -> dict[tuple[datetime, datetime], str]:
    """The fingerprints of an export's intervals within a span that the table has, by their bounds, from the ledger.

    Raises:
        DestinationError, PassingError: Postgres refused, or did not answer.
    """
    with postgres.session(destination.database) as session, session.transaction():
        if not (tables.exists(session, destination) and ledger.exists(session, destination.schema)):
            return {}
        table = registry.look_up(session, tables.inspect(session, destination, model))
        if table is None:
            return {}
        return ledger.fingerprints(session, table, export, team_id, span)


def requests(
    export: str,
    latest: tuple[Interval, ...],
    exported: Mapping[tuple[datetime, datetime], str],
    at_source: Mapping[datetime, Fingerprint],
    now: datetime,
) -> list[dg.RunRequest] | dg.SkipReason:
    """A run for each interval that was exported and is another one at the source now.

    Args:
        export: its name.
        latest: intervals to look at.
        exported: fingerprints by bounds, as the ledger has them.
        at_source: fingerprints by start, of intervals that have rows.
        now: a run's key is spent even if the run fails; with the date in it another one may try tomorrow.
    """
    were = {interval: exported.get((interval.start, interval.end)) for interval in latest}
    if not any(were.values()):
        return dg.SkipReason("None of the latest intervals has been exported to the table that is there now.")
    found = {interval: at_source.get(interval.start, Fingerprint()) for interval in latest}
    runs = [
        dg.RunRequest(
            run_key=f"{export} {interval.partition_key} {fingerprint} {now:%Y-%m-%d}",
            partition_key=interval.partition_key,
            tags=TAGS,
        )
        for interval, fingerprint in found.items()
        if (kept := were[interval]) and not fingerprint.may_be(kept)
    ]
    return runs or dg.SkipReason(f"No late events in the latest {sum(map(bool, were.values()))} intervals.")
