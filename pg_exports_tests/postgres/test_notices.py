"""What a server says beside its answers: libpq writes it to standard error, which Dagster keeps; it does not get long."""

import sys
from collections.abc import Callable
from datetime import datetime

import pytest

from pg_exports import PostgresResource
from pg_exports.errors import DestinationError
from pg_exports.postgres.watchdog import ANSWER_BYTES
from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.postgres.hostile_server import NOTHING, hostile_server
from pg_exports_tests.postgres.test_login import connection
from pg_exports_tests.source_rows import event, export_of

__all__ = ["connection"]

LOUD = """
CREATE FUNCTION loud() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE WARNING 'row %', NEW.uuid; RETURN NEW; END $$
"""


def test_a_trigger_that_speaks_of_each_row_is_not_heard(
    source: Source, target: Target, run: RunExport, hour: datetime, capfd: pytest.CaptureFixture[str]
) -> None:
    source.insert("events", event(hour))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).error is None
    target.execute(LOUD, "CREATE TRIGGER loud BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION loud()")
    target.execute(f"ALTER ROLE {ROLE} SET client_min_messages = 'debug5'")
    source.insert("events", *(event(hour) for _ in range(100)))
    capfd.readouterr()
    try:
        assert run(export, partition_key(hour)).counts == (100, 0, 1)
    finally:
        target.execute(f"ALTER ROLE {ROLE} RESET client_min_messages")
    heard = capfd.readouterr().err
    assert "row " not in heard
    assert "CommitTransaction" not in heard


@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux counts what a connection has received.")
def test_a_server_that_never_stops_is_hung_up_on(
    sandbox: Sandbox, connection: Callable[..., PostgresResource], capfd: pytest.CaptureFixture[str]
) -> None:
    with hostile_server(sandbox.certificates, NOTHING, floods=True) as server:
        with (
            pytest.raises(DestinationError, match="sent more than 64 MB while logging in"),
            connection(port=server.port, authentication="none").session(),
        ):
            pass
        assert len(server.startups) == 1
    assert ANSWER_BYTES / 2 < len(capfd.readouterr().err) < 16 * ANSWER_BYTES
