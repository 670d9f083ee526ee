"""Rows that become visible in ClickHouse after their interval has run, and the runs that bring them.

Replica lag, asynchronous inserts and consumers that were down all make such rows. A sensor looks at each interval of the last
days (`late_rows_days`) over and over, as many at a time as a tick can afford. It requests a run if the source has rows that
no run has read. Of a model whose rows are appended the fingerprint tells; the fingerprint of a merged one changes whenever a
row moves on to a later interval, so the states of its rows are compared with those in the journals.

It also requests a run of an interval that Dagster shows as materialised and the ledger has lost, as in a failover.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta

import dagster as dg

from pg_exports.fingerprint import Fingerprint, scheme_of
from pg_exports.interval import Interval
from pg_exports.models import Model
from pg_exports.partitions import IntervalLength
from pg_exports.postgres import PostgresResource, journal, ledger, registry
from pg_exports.postgres import table as tables
from pg_exports.postgres.ledger import Bounds, Entry
from pg_exports.postgres.table import Destination, DestinationTable
from pg_exports.reader import Reader

DAYS = 2.0
"""How many days after its end an interval is looked at, where the export does not say."""

AT_LEAST = 2
"""So many intervals are looked at, however long they are."""

SECONDS_BETWEEN: Mapping[IntervalLength, int] = {
    "every 5 minutes": 300,
    "every 15 minutes": 300,
    "hour": 600,
    "day": 3600,
    "week": 3600,
}
"""How long the sensor waits from one tick to the next, by the length of an interval."""

ROWS_A_QUERY, ROWS_A_TICK = 1_000_000, 5_000_000
"""Rows, as the ledger has them, that one query looks at, and all queries of one tick. An interval with more is looked at
alone, in several queries.
"""

SECONDS_A_TICK = 30
"""No further query is sent later in a tick, which Dagster ends after 60 s."""

LONGEST_WAIT = timedelta(hours=6)
"""Most time until the next attempt, after attempts that have changed nothing."""

TAGS = {"pg_exports/reason": "late rows"}
"""Of the runs that are requested."""

_LOST = "lost"
"""How the digest of an interval begins that the ledger has lost."""

_UNFINISHED = [
    status
    for status in dg.DagsterRunStatus
    if status not in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
]


@dataclass(frozen=True)
class Attempt:
    """The last run that was requested for an interval.

    Attributes:
        digest: what was late.
        number: how many were requested for that, this one included.
        at: when, in seconds since 1970.
    """

    digest: str
    number: int
    at: float


@dataclass(frozen=True)
class Cursor:
    """What the sensor remembers from one tick to the next, by partition key.

    Attributes:
        last: the interval that was looked at last.
        settled: the fingerprint of each merged interval without late rows, and the run that wrote the interval last. A
            failover or a restored dump may undo that run; then the interval is looked at again.
        attempts: the runs that were requested.
    """

    last: str = ""
    settled: Mapping[str, str] = field(default_factory=dict)
    attempts: Mapping[str, Attempt] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str | None) -> "Cursor":
        """As `str` gives it. One of an earlier version is an empty one."""
        try:
            kept = json.loads(text or "")
            attempts = {key: Attempt(**attempt) for key, attempt in kept["attempts"].items()}
            return cls(kept["last"], kept["settled"], attempts)
        except (ValueError, KeyError, TypeError):
            return cls()

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    def of(self, keys: Collection[str]) -> "Cursor":
        """The same of these intervals alone."""
        return Cursor(
            self.last,
            {key: text for key, text in self.settled.items() if key in keys},
            {key: attempt for key, attempt in self.attempts.items() if key in keys},
        )


@dataclass(frozen=True)
class Exported:
    """What the table has of the latest intervals.

    Attributes:
        table: as it is now; None if no export has written to it.
        entries: the ledger's, by their bounds.
    """

    table: DestinationTable | None
    entries: Mapping[Bounds, Entry]


@dataclass(frozen=True)
class Watch:
    """An export whose late rows are looked for.

    Attributes:
        export: its name.
        exports: the names of all exports of the deployment.
        model, team_id, destination: what it exports, and where to.
        postgres: the connection.
        source: reads ClickHouse.
        between: the time from one tick to the next.
    """

    export: str
    exports: frozenset[str]
    model: Model
    team_id: int
    destination: Destination
    postgres: PostgresResource
    source: Reader
    between: timedelta

    def tick(self, latest: Sequence[Interval], cursor: Cursor, instance: dg.DagsterInstance) -> dg.SensorResult:
        """Look at some of the latest intervals (oldest first).

        Raises:
            DestinationError, SourceError, PassingError: a server refused, or did not answer.
        """
        now = datetime.now(UTC)
        cursor = cursor.of({interval.partition_key for interval in latest})
        exported = self._exported(Interval("", latest[0].start, latest[-1].end))
        late = self._lost(latest, exported, instance)
        known = [interval for interval in latest if _bounds(interval) in exported.entries]
        if not (known or late):
            none = "None of the latest intervals has been exported to the table that is there now."
            return dg.SensorResult(skip_reason=none, cursor=str(cursor))
        looked = 0
        for some in _in_turn(known, exported.entries, cursor.last):
            if looked and datetime.now(UTC) - now > timedelta(seconds=SECONDS_A_TICK):
                break
            found, settled = self._late(some, exported, cursor)
            late |= found
            looked += len(some)
            cursor = replace(cursor, last=some[-1].partition_key, settled={**cursor.settled, **settled})
        requests, attempts = self._requests(late, cursor, instance, now)
        cursor = replace(cursor, attempts=attempts)
        if requests:
            return dg.SensorResult(run_requests=requests, cursor=str(cursor))
        said = f"{len(late)} intervals have late rows, and are about to be exported again." if late else "No late rows"
        return dg.SensorResult(
            skip_reason=f"{said} in {looked} of the latest {len(known)} intervals.", cursor=str(cursor)
        )

    def _exported(self, span: Interval) -> Exported:
        with self.postgres.session(self.destination.database) as session, session.transaction():
            if not (tables.exists(session, self.destination) and ledger.exists(session, self.destination.schema)):
                return Exported(None, {})
            table = registry.presume(session, tables.inspect(session, self.destination, self.model))
            if table is None:
                return Exported(None, {})
            entries = ledger.entries(session, table, self.team_id, span)
        return Exported(table, ledger.of_export(entries, self.export, self.exports))

    def _lost(
        self, latest: Sequence[Interval], exported: Exported, instance: dg.DagsterInstance
    ) -> dict[Interval, str]:
        """The intervals that Dagster has shown as materialised since the table is known, and that the ledger has not."""
        lacking = {interval.partition_key: interval for interval in latest if _bounds(interval) not in exported.entries}
        if not lacking or exported.table is None or not exported.table.in_ledger:
            return {}
        records = instance.fetch_materializations(
            dg.AssetRecordsFilter(
                asset_key=dg.AssetKey(self.export),
                asset_partitions=list(lacking),
                after_timestamp=exported.table.in_ledger.known_since / 1e6,
            ),
            limit=len(lacking),
        ).records
        return {lacking[str(record.partition_key)]: f"{_LOST} {record.run_id}" for record in records}

    def _late(
        self, intervals: Sequence[Interval], exported: Exported, cursor: Cursor
    ) -> tuple[dict[Interval, str], dict[str, str]]:
        """The late rows of consecutive intervals, and the fingerprints of the merged intervals that have none."""
        parts = -(-max(exported.entries[_bounds(interval)].rows for interval in intervals) // ROWS_A_QUERY)
        if not self.model.merge:
            fingerprints = self.source.fingerprints(intervals, max(1, parts))
            now = dict(zip(intervals, fingerprints, strict=True))
            kept = {interval: exported.entries[_bounds(interval)].fingerprint for interval in intervals}
            return {
                interval: str(fingerprint)
                for interval, fingerprint in now.items()
                if (text := kept[interval]) and not fingerprint.may_be(text)
            }, {}
        comparable = [interval for interval in intervals if self._is_comparable(exported.entries[_bounds(interval)])]
        fingerprints = self.source.fingerprints(intervals, max(1, parts), of_latest=True)
        states = {
            interval: f"{fingerprint} {exported.entries[_bounds(interval)].run_id}"
            for interval, fingerprint in zip(intervals, fingerprints, strict=True)
            if interval in comparable
        }
        late, settled = {}, {}
        for interval, state in states.items():
            if cursor.settled.get(interval.partition_key) == state:
                continue
            unread = self._unread(interval, exported, max(1, parts))
            if unread.rows:
                late[interval] = str(unread)
            else:
                settled[interval.partition_key] = state
        return late, settled

    def _is_comparable(self, entry: Entry) -> bool:
        """Whether the journals have the states of an interval's rows, made as they are now."""
        return scheme_of(entry.fingerprint) == self.model.fingerprint_scheme

    def _unread(self, interval: Interval, exported: Exported, parts: int) -> Fingerprint:
        """The fingerprint of a merged model's rows of an interval that no run has read in the state in which they are."""
        assert exported.table
        with self.postgres.session(self.destination.database) as session, session.transaction():
            recorded = journal.read(session, exported.table, self.team_id, self.export, [interval])
        keys = recorded.get(interval.position, journal.NOTHING).keys
        if keys.is_empty() and exported.entries[_bounds(interval)].rows:
            # The journals were pruned.
            return Fingerprint()
        unread = Fingerprint(scheme=self.model.fingerprint_scheme)
        for states in self.source.states(interval, parts):
            unread += Fingerprint.of(states.filter(~journal.among(states, keys)))
        return unread

    def _requests(
        self, late: Mapping[Interval, str], cursor: Cursor, instance: dg.DagsterInstance, now: datetime
    ) -> tuple[list[dg.RunRequest], dict[str, Attempt]]:
        """A run for each interval that has none under way, and whose last one was long enough ago."""
        requests, attempts = [], dict(cursor.attempts)
        for interval, digest in sorted(late.items(), key=lambda item: item[0].start):
            key = interval.partition_key
            before = attempts.get(key)
            number = before.number + 1 if before and before.digest == digest else 1
            if before and before.digest == digest and now.timestamp() - before.at < self._wait(before.number):
                continue
            if self._is_under_way(key, instance):
                continue
            attempts[key] = Attempt(digest, number, now.timestamp())
            # Of an interval that the ledger has lost the table may have rows.
            replay = {"ops": {self.export: {"config": {"replay": True}}}} if digest.startswith(_LOST) else {}
            requests.append(
                dg.RunRequest(
                    run_key=f"{self.export} {key} {digest} {number} {now:%Y-%m-%dT%H:%M}",
                    partition_key=key,
                    run_config=replay,
                    tags=TAGS,
                )
            )
        return requests, attempts

    def _wait(self, attempts: int) -> float:
        """Seconds from one attempt to the next: twice as long after each, as its cause may last."""
        return min(LONGEST_WAIT.total_seconds(), self.between.total_seconds() * 2.0 ** (attempts - 1))

    def _is_under_way(self, key: str, instance: dg.DagsterInstance) -> bool:
        runs = dg.RunsFilter(
            job_name=f"{self.export}_job", statuses=_UNFINISHED, tags={"dagster/partition": key, **TAGS}
        )
        return bool(instance.get_run_records(runs, limit=1))


def _bounds(interval: Interval) -> Bounds:
    return interval.start, interval.end


def _in_turn(known: Sequence[Interval], entries: Mapping[Bounds, Entry], last: str) -> Iterator[Sequence[Interval]]:
    """Intervals for one query each, from the one after the last one that was looked at, as many as a tick can afford."""
    place = next((n + 1 for n, interval in enumerate(known) if interval.partition_key == last), 0)
    some: list[Interval] = []
    rows, total = 0, 0
    for interval in (*known[place:], *known[:place]):
        count = entries[_bounds(interval)].rows
        if some and (total + rows + count > ROWS_A_TICK):
            break
        if some and (rows + count > ROWS_A_QUERY or some[-1].end != interval.start):
            yield some
            some, rows, total = [], 0, total + rows
        some.append(interval)
        rows += count
    if some:
        yield some
