"""`dagster-daemon` that looks for backfills every second, not every 30, and for queued runs not every 5: for the tests,
`python -m pg_exports_tests.ui.daemon run ...`. For the first there is no setting. Everything else is the daemon's own.
"""

from dagster._core.run_coordinator.queued_run_coordinator import QueuedRunCoordinator
from dagster._daemon import controller
from dagster._daemon.cli import main

if __name__ == "__main__":
    controller.DEFAULT_DAEMON_INTERVAL_SECONDS = 1
    QueuedRunCoordinator.dequeue_interval_seconds = property(lambda _: 1)  # type: ignore[method-assign, assignment]
    main()
