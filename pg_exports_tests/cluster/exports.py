"""The code location of a cluster on this machine: events, whose backfills go in small runs, from the sandbox's servers."""

import functools
import os

import dagster as dg

from pg_exports import PostgresExport
from pg_exports.defs import resources

START = "PG_EXPORTS_CLUSTER_START"
"""Where partitions begin, ISO."""

CHUNK = "PG_EXPORTS_CLUSTER_CHUNK"
"""Intervals of one run."""


# Once, as in `pg_exports.definitions`: a code server asks twice, and only the first time says that it is one.
@functools.cache
def _loaded() -> dg.Definitions:
    events = PostgresExport(
        model="events",
        team_id=1,
        start=os.environ[START],
        max_partitions_per_run=int(os.environ[CHUNK]),
        paused=True,
    )
    return dg.Definitions.merge(events.build_defs(None), resources.connections())


@dg.definitions
def defs() -> dg.Definitions:
    """One export, and the sandbox's connections."""
    return _loaded()
