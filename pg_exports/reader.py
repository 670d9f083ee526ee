"""Reads an export's intervals from ClickHouse: with which queries, and what these are called in ClickHouse's query log."""

import contextlib
import functools
import json
import logging
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import polars as pl

from pg_exports.clickhouse import ClickHouseResource
from pg_exports.errors import SettingsError
from pg_exports.fingerprint import Fingerprint
from pg_exports.interval import Interval
from pg_exports.models import Model, Part, Query, Selection
from pg_exports.models.model import WHOLE, moment
from pg_exports.partitions import unsettled

CLOCKS_DIFFER = timedelta(days=1)
"""An interval that ended longer ago by this machine's clock is over by ClickHouse's, too."""

MOST_WAITED = timedelta(minutes=10)
"""How long a run waits for ClickHouse's clock to come to its interval's end."""


@dataclass(frozen=True)
class Reader:
    """The `Source` of an export.

    Attributes:
        clickhouse: the connection.
        export_model: what is asked for.
        selection: which rows, of whatever interval.
        about: what ClickHouse's query log keeps beside each query: the run or the sensor, and the export.
        log: where to say that a dictionary is not there.
    """

    clickhouse: ClickHouseResource
    export_model: Model
    selection: Selection
    about: dict[str, str]
    log: logging.Logger
    _sent: dict[Interval, list[str]] = field(default_factory=dict)

    def settle(self, last: Interval) -> None:
        """See `Source`."""
        if datetime.now(UTC) - last.end > CLOCKS_DIFFER:
            return
        [(now,)] = self.clickhouse.rows(
            Query("SELECT toUnixTimestamp64Micro(now64(6))", {}), log_comment=self._comment([last])
        )
        wait = unsettled(last, moment(now))
        if wait > MOST_WAITED:
            raise SettingsError(
                f"{last} is not over by the clock of ClickHouse, where it is {moment(now):%Y-%m-%d %H:%M:%S} UTC; here it is "
                f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC. Set the clock that is wrong, and run the interval again. Nothing "
                "was exported."
            )
        if wait > timedelta(0):
            self.log.info(f"Waiting {wait.total_seconds():.0f} s: {last} ended less than a minute ago in ClickHouse.")
            time.sleep(wait.total_seconds())

    @contextlib.contextmanager
    def read(
        self, intervals: Sequence[Interval], columns: Collection[str], part: Part = WHOLE
    ) -> Iterator[Iterator[pl.DataFrame]]:
        """See `Source`."""
        first, *others = self._questions(intervals)
        answer = contextlib.ExitStack()
        is_over = False

        def answered(some: Sequence[Interval]) -> Iterator[pl.DataFrame]:
            answer.close()
            return answer.enter_context(
                self.clickhouse.frames(
                    self.model.query(replace(self._selected(some), part=part)),
                    self.model,
                    columns=columns,
                    log_comment=self._comment(some),
                    query_id=self._new(some),
                )
            )

        def frames(of_first: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
            yield from of_first
            for some in others:
                if is_over:
                    return
                yield from answered(some)

        try:
            yield frames(answered(first))
        finally:
            # The reading thread may be in the midst of an answer: that ends too.
            is_over = True
            answer.close()

    def fingerprints(
        self, intervals: Sequence[Interval], parts: int = 1, *, of_latest: bool = False
    ) -> list[Fingerprint]:
        """See `Source`.

        Args:
            intervals: that follow each other.
            parts: in so many queries the rows of all of them are asked for.
            of_latest: of a merged model those rows alone that no later interval has.
        """
        model = self.export_model
        found = {interval.start: Fingerprint(scheme=model.fingerprint_scheme) for interval in intervals}
        query = model.latest_fingerprints if of_latest else model.fingerprints
        for some in self._questions(intervals):
            for part in map(Part, range(parts), [parts] * parts):
                rows = self.clickhouse.rows(
                    query(replace(self._selected(some), part=part)),
                    log_comment=self._comment(some),
                    query_id=self._new(some),
                )
                for start, count, xor, total in rows:
                    found[moment(start)] += Fingerprint(count, xor, total, model.fingerprint_scheme)
        return [found[interval.start] for interval in intervals]

    def states(self, interval: Interval, parts: int = 1) -> Iterator[pl.Series]:
        """The states (UInt64) of a merged model's rows of an interval that no later interval has, in so many queries.

        Raises:
            SourceError, PassingError: as `ClickHouseResource.rows`.
        """
        for part in map(Part, range(parts), [parts] * parts):
            rows = self.clickhouse.rows(
                self.export_model.latest_states(replace(self._selected([interval]), part=part)),
                log_comment=self._comment([interval]),
                query_id=self._new([interval]),
            )
            for (states,) in rows:
                yield pl.Series(states, dtype=pl.UInt64)

    def count(self, intervals: Sequence[Interval]) -> int:
        """See `Source`."""
        return sum(
            self.clickhouse.count(self.model.query(self._selected(some)), log_comment=self._comment(some))
            for some in self._questions(intervals)
        )

    def sql(self, interval: Interval) -> str:
        """See `Source`."""
        return self.model.query(self._selected([interval])).for_console()

    def query_ids(self, interval: Interval) -> list[str]:
        """See `Source`."""
        return self._sent.get(interval, [])

    def _questions(self, intervals: Sequence[Interval]) -> Iterator[Sequence[Interval]]:
        """The intervals that one query answers."""
        if self.export_model.one_interval_a_query:
            yield from ([interval] for interval in intervals)
        else:
            yield intervals

    def _selected(self, span: Sequence[Interval]) -> Selection:
        starts = tuple(interval.start for interval in span)
        return replace(self.selection, start=span[0].start, end=span[-1].end, starts=starts)

    # Asked for when the first interval is read: a failure is the IO manager's then, who knows what is written already.
    @functools.cached_property
    def model(self) -> Model:
        """See `Source`."""
        needed, without = self.export_model.dictionary, self.export_model.without_dictionary
        if not (needed and without) or self.clickhouse.has_dictionary(needed, log_comment=json.dumps(self.about)):
            return self.export_model
        left_out = ", ".join(column.name for column in self.export_model.columns if column not in without.columns)
        self.log.warning(
            f"The dictionary {needed} is not in ClickHouse's database {self.clickhouse.database}, or not to be seen by this "
            f"user. {left_out or 'What needs it'} stays as it is in Postgres, and is NULL in new rows."
        )
        return without

    def _comment(self, some: Sequence[Interval]) -> str:
        keys = dict.fromkeys(interval.partition_key for interval in (*some[:1], *some[-1:]))
        return json.dumps({**self.about, "partition": "...".join(keys)})

    def _new(self, some: Sequence[Interval]) -> str:
        """The id of a query for some intervals."""
        query_id = str(uuid.uuid4())
        for interval in some:
            self._sent.setdefault(interval, []).append(query_id)
        return query_id
