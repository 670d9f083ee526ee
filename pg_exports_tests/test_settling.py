"""A run leaves its last interval alone until ClickHouse's clock is a minute past its end, whatever the host's clock says."""

import logging
import time
from datetime import UTC, datetime, timedelta

import pytest

from pg_exports import PostgresExport, reader
from pg_exports.errors import SettingsError
from pg_exports.interval import Interval
from pg_exports.models.model import moment
from pg_exports.reader import Reader
from pg_exports_tests.conftest import TEAM, Source


def clickhouse_now(source: Source) -> datetime:
    [(now,)] = source.rows("SELECT toUnixTimestamp64Micro(now64(6))")
    return moment(now)


def reader_of(source: Source) -> Reader:
    export = PostgresExport(model="events", team_id=TEAM, start="2026-11-20")
    return export.source(source.resource(), {}, logging.getLogger())


def ended(ago: timedelta, source: Source) -> Interval:
    end = clickhouse_now(source) - ago
    return Interval("an hour", end - timedelta(hours=1), end)


class Fast(datetime):
    """A host's clock that is five minutes fast."""

    @classmethod
    def now(cls, tz: object = None) -> "Fast":
        return cls.fromtimestamp(time.time() + 300, UTC)


def test_a_run_waits_until_its_interval_has_been_over_for_a_minute_in_clickhouse(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    for clock in (datetime, Fast):
        monkeypatch.setattr(reader, "datetime", clock)
        last = ended(timedelta(seconds=58), source)
        reader_of(source).settle(last)
        assert clickhouse_now(source) - last.end >= timedelta(seconds=60)


def test_a_run_of_an_interval_that_is_over_waits_for_nothing(source: Source) -> None:
    last = ended(timedelta(minutes=2), source)
    began = time.monotonic()
    reader_of(source).settle(last)
    assert time.monotonic() - began < 5


def test_an_interval_that_is_far_from_over_in_clickhouse_is_an_error_that_names_both_clocks(source: Source) -> None:
    with pytest.raises(SettingsError, match=r"is not over by the clock of ClickHouse, where it is 20.*; here it is 20"):
        reader_of(source).settle(ended(timedelta(minutes=-20), source))
