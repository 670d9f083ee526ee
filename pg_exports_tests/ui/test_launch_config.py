"""Somebody who may launch runs, and no more, tries to read what is in the environment of a run: passwords above all.

Dagster resolves `{env: NAME}` in a launch's configuration, in the run's own environment.
"""

import json
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pg_exports_tests.conftest import partition_key
from pg_exports_tests.source_rows import HOUR
from pg_exports_tests.ui import queries
from pg_exports_tests.ui.deployment import PATIENCE, Deployment

PASSWORD = {"env": "POSTGRES_PASSWORD"}
"""What is put where a launch takes a text."""

MINE = {"host": "127.0.0.1", "user": "anybody", "database": "any"}


@pytest.fixture
def requests() -> Iterator[tuple[int, list[dict[str, str]]]]:
    """A host of the attacker's: its port, and the headers of what it is sent."""
    sent: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(dict(self.headers))
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, sent
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("job", ["events_job", "events_check", "events_verify"])
def test_a_launch_with_a_host_of_ones_own_is_refused_and_nothing_is_sent_there(
    deployment: Deployment, requests: tuple[int, list[dict[str, str]]], sample_end: datetime, job: str
) -> None:
    port, sent = requests
    partition = partition_key(sample_end - 40 * HOUR) if job == "events_job" else None
    mine = {**MINE, "port": port, "password": PASSWORD}
    for name, config in (
        ("clickhouse", mine),
        ("clickhouse", {"ca_certificate": "/etc/passwd", "secure": True}),
        ("postgres_io_manager", {"postgres": {"host": "127.0.0.1"}}),
        ("postgres_io_manager", {"postgres": mine}),
        ("io_manager", {"base_dir": PASSWORD}),
    ):
        answer = deployment.launch(job, {"resources": {name: {"config": config}}}, partition=partition)
        assert answer["__typename"] == "RunConfigValidationInvalid", (name, _log(deployment, answer), sent)
        assert "Received unexpected config entr" in json.dumps(answer["errors"])
    assert sent == []


@pytest.mark.parametrize(
    ("job", "op", "config"),
    [
        ("events_job", "events", {"replay": PASSWORD}),
        ("events_verify", "events_verification", {"first": PASSWORD}),
        ("events_verify", "events_verification", {"last": {"env": "DAGSTER_POSTGRES_URL"}}),
    ],
)
def test_what_a_run_can_be_told_is_taken_as_it_is_written(
    deployment: Deployment, sample_end: datetime, job: str, op: str, config: dict[str, object]
) -> None:
    partition = partition_key(sample_end - 40 * HOUR) if job == "events_job" else None
    answer = deployment.launch(job, {"ops": {op: {"config": config}}}, partition=partition)
    assert answer["__typename"] == "RunConfigValidationInvalid", _log(deployment, answer)


def _log(deployment: Deployment, launched: dict[str, Any]) -> str:
    """What was shown of a run that should not have been, once it has ended."""
    if "run" not in launched:
        return json.dumps(launched)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        text = json.dumps(deployment.ask(queries.LOG, id=launched["run"]["runId"]))
        if "Execution of run" in text or "Finished execution" in text:
            return text[-4000:]
        time.sleep(1)
    return text[-4000:]
