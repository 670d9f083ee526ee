"""`make cluster`: a cluster on this machine does a range backfill, while its workers are killed, cut off, added and removed.

It says what happens, prints which worker did what, and ends with status 1 where something does not hold.
"""

import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pg_exports.sandbox import Sandbox, servers, source_tables
from pg_exports.sandbox.servers import SOURCE_DATABASE
from pg_exports_tests.cluster import figures
from pg_exports_tests.cluster.deployment import LIMIT, Cluster, cluster
from pg_exports_tests.cluster.rows import fill
from pg_exports_tests.conftest import Target
from pg_exports_tests.faults import eventually
from pg_exports_tests.test_concurrency import holding

HOURS = 96
CHUNK = 4
ROWS = 2_500
"""Events of an hour."""

PATIENCE = 600

_HOLD = 20_261_124

HELD = 15
"""Seconds in which a worker that has a run comes to its COMMIT."""


class Story:
    """What is said, with the seconds since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """One line."""
        sys.stdout.write(f"{time.monotonic() - self._began:6.1f} s  {text}\n")
        sys.stdout.flush()


def main() -> int:
    """Start everything, tell the story, stop everything."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if shutil.which("redis-server") is None:
        sys.stderr.write("There is no redis-server here: `apt-get install redis-server`, or `make cluster` as root.\n")
        return 1
    story = Story()
    folder = Path(tempfile.mkdtemp(prefix="pg_exports_cluster_"))
    try:
        sandbox = servers.start(folder / "servers")
        try:
            return _show(folder, sandbox, story)
        except AssertionError:
            for log in sorted((folder / "home").glob("*.log")):
                sys.stderr.write(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}\n")
            raise
        finally:
            servers.stop(sandbox)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _show(folder: Path, sandbox: Sandbox, story: Story) -> int:
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    start = end - timedelta(hours=HOURS)
    source_tables.create_tables(sandbox.execute, SOURCE_DATABASE)
    fill(sandbox, SOURCE_DATABASE, start, HOURS, ROWS)
    story.say(f"ClickHouse has {HOURS * ROWS:,} events of {HOURS} hours")
    home = folder / "home"
    home.mkdir()
    with cluster(home, sandbox, "one", "two", "three", start=start.isoformat(), chunk=CHUNK) as running:
        where = "each in a network namespace of its own" if running.network else "plain processes: no namespaces here"
        story.say(f"storage, broker, webserver, daemon and 3 workers run ({where}); the UI is {running.deployment.url}")
        with figures.Samples(running) as samples:
            keys = list(running.deployment.partitions("events"))
            backfill = running.deployment.backfill("events", keys)
            story.say(f"backfill {backfill} is launched: {HOURS} intervals, in runs of {CHUNK}")
            disturb(running, backfill, story.say)
            running.deployment.wait(backfill, seconds=PATIENCE)
            story.say("the backfill is done")
        return _tell(running, backfill, keys, samples, story)


def disturb(running: Cluster, backfill: str, say: Callable[[str], None]) -> None:
    """All that befalls workers while a backfill runs."""

    def done() -> int:
        return sum(run["status"] == "SUCCESS" for run in running.deployment.runs(backfill))

    def taken_over() -> int:
        lost = figures.recoveries(running, running.deployment.runs(backfill))
        return sum(recovery.retry_worker is not None for recovery in lost)

    eventually(lambda: done() >= 3, PATIENCE)
    make_holdable(running)
    running.add("four", "five")
    running.wait_for("four", "five")
    say("workers four and five are added: there are more workers now than connections allowed")
    eventually(lambda: done() >= 8, PATIENCE)
    in_mid_transaction(running, "one", running.kill)
    say("worker one is killed in the midst of a transaction (SIGKILL to all of its processes)")
    in_mid_transaction(running, "two", running.cut_off)
    how = "its cable is taken out" if running.network else "SIGSTOP to its processes"
    say(f"worker two is cut off in the midst of a transaction ({how})")
    running.remove("three")
    say("worker three is asked to end (SIGTERM)")
    eventually(lambda: running.has_ended("three"), PATIENCE)
    say("worker three has completed its run, and is gone")
    eventually(lambda: taken_over() == 2, PATIENCE)
    say("the runs of one and two were found to be lost, and others have begun with them")
    running.heal("two")
    say("worker two is reached again")
    running.wait_for("two")
    say("worker two answers again")


def in_mid_transaction(running: Cluster, name: str, befalls: Callable[[str], None]) -> None:
    """Do something to a worker that has written rows and not committed them: until then nobody may say COMMIT.

    There may be more workers than runs allowed, so this one may have none: then the others go on for a while.
    """
    target = Target(running.sandbox, "public")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(AssertionError), holding(target, f"SELECT pg_advisory_xact_lock({_HOLD})"):
            eventually(lambda: running.is_writing(name), HELD)
            befalls(name)
            return
        time.sleep(1)
    raise AssertionError(f"Worker {name} wrote nothing in {PATIENCE} s.")


def make_holdable(running: Cluster) -> None:
    """Have each transaction wait before its COMMIT while `_HOLD` is locked.

    The trigger stays: to drop it would wait for the transaction of a worker that is cut off, and all others for that.
    """
    Target(running.sandbox, "public").execute(
        f"CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" PERFORM pg_advisory_xact_lock_shared({_HOLD}); RETURN NULL; END $$",
        "CREATE TRIGGER hold AFTER INSERT OR UPDATE ON pg_exports_ledger FOR EACH ROW EXECUTE FUNCTION hold()",
    )


def _tell(running: Cluster, backfill: str, keys: list[str], samples: figures.Samples, story: Story) -> int:
    runs, shown = running.deployment.runs(backfill), running.deployment.partitions("events")
    shares, recovered, rows = figures.shares(running, runs), figures.recoveries(running, runs), figures.rows(running)
    sys.stdout.write(f"\n{figures.text(shares, recovered, rows, samples)}\n\n")
    by_name = {share.worker: share for share in shares}
    lost = {recovery.worker for recovery in recovered}
    claims = {
        "every row of ClickHouse is in Postgres, once": rows.holds,
        "every interval is shown as materialised": all(shown[key] for key in keys),
        "the workers that were killed and cut off had a run each, and another worker completed it": lost
        == {"one", "two"}
        and all(recovery.holds for recovery in recovered),
        "the worker that was asked to end lost no run": "three" not in lost and by_name["three"].runs > 0,
        "the workers that were added took their share": by_name["four"].runs > 0 and by_name["five"].runs > 0,
        f"exports never had more than {LIMIT} connections": 0 < samples.connections <= LIMIT,
        "no worker had nothing to do while a run waited for one": max(samples.idle.values(), default=0)
        <= figures.LONGEST_IDLE,
    }
    for claim, holds in claims.items():
        sys.stdout.write(f"{'holds  ' if holds else 'FAILS  '} {claim}\n")
    story.say("stopping")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
