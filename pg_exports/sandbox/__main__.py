"""The sandbox's command: `python -m pg_exports.sandbox check | up | show | down`.

`check` says what must be installed first.
`up` starts the servers in `.sandbox/`, fills ClickHouse and writes `.env`; where they run already it leaves them.
`show` compares what ClickHouse holds with what landed in Postgres. `down` stops the servers and deletes their data.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pg_exports.models import MODELS, Model, Selection
from pg_exports.sandbox import postgres_server, sample_data, servers, source_tables
from pg_exports.sandbox.files import write_private
from pg_exports.sandbox.servers import DATABASE, ROLE, SOURCE_DATABASE, Sandbox

FOLDER = Path(".sandbox")
ENVIRONMENT = Path(".env")
MARK = "# Written for the sandbox by `make`, which overwrites it. For servers of your own, remove this line."
RANGE = "demo_range"
HOUR = timedelta(hours=1)
TEAM = 1


def main() -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(prog="python -m pg_exports.sandbox", description=__doc__)
    parser.add_argument("command", choices=("check", "up", "show", "down"))
    parser.add_argument("--hours", type=int, default=72, help="hours of sample data, up to now (default 72)")
    parser.add_argument("--events", type=int, default=20_000, help="events of sample data (default 20,000)")
    arguments = parser.parse_args()
    if arguments.command == "check":
        return _check()
    sandbox = servers.load(FOLDER.resolve())
    if arguments.command == "up":
        return _up(sandbox, arguments.hours, arguments.events)
    if sandbox is None:
        sys.stderr.write("There is no sandbox here. `make demo` starts one.\n")
        return 1
    if arguments.command == "show":
        return _show(sandbox)
    servers.stop(sandbox)
    if _is_environment_ours():
        ENVIRONMENT.unlink()
    return 0


def _is_environment_ours() -> bool:
    return ENVIRONMENT.exists() and ENVIRONMENT.read_text().startswith(MARK)


def _check() -> int:
    try:
        postgres_server.find_binaries()
    except postgres_server.PostgresSandboxError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _up(sandbox: Sandbox | None, hours: int, events: int) -> int:
    if ENVIRONMENT.exists() and not _is_environment_ours():
        sys.stderr.write(".env holds settings of your own. Move it away: the sandbox writes one for itself.\n")
        return 1
    if sandbox and sandbox.is_running:
        _write_environment(sandbox)
        return 0
    if sandbox:
        servers.stop(sandbox)
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    sandbox = servers.start(FOLDER.resolve())
    source_tables.create_tables(sandbox.execute, SOURCE_DATABASE)
    sample_data.fill(sandbox.execute, SOURCE_DATABASE, end=end, hours=hours, events=events)
    (sandbox.folder / RANGE).write_text(f"{_key(end - hours * HOUR)}...{_key(end - HOUR)}")
    _write_environment(sandbox)
    return 0


def _write_environment(sandbox: Sandbox) -> None:
    variables = sandbox.environment() | {"DAGSTER_DISABLE_TELEMETRY": "1"}
    lines = [MARK, *(f"{name}='{value}'" for name, value in variables.items())]
    write_private(ENVIRONMENT, "\n".join(lines) + "\n")


def _show(sandbox: Sandbox) -> int:
    first, last = (datetime.strptime(key, "%Y-%m-%d-%H:%M").replace(tzinfo=UTC) for key in demo_range(sandbox))
    sys.stdout.write(f"\n{'model':<10} {'rows in ClickHouse':>20} {'rows in Postgres':>18}\n")
    equal = True
    with _count_at_source(sandbox, first, last + HOUR) as counts:
        for name, at_source in counts:
            [(landed,)] = sandbox.postgres.rows(f'SELECT count(*) FROM public."{name}"', DATABASE)
            sys.stdout.write(f"{name:<10} {at_source:>20,} {landed:>18,}{'' if at_source == landed else '   DIFFER'}\n")
            equal = equal and at_source == landed
    hours = int((last - first) / HOUR) + 1
    environment = sandbox.environment()
    sys.stdout.write(
        f"\nTeam {TEAM}, {hours} hourly intervals, {first:%Y-%m-%d %H:%M} to {last + HOUR:%Y-%m-%d %H:%M} UTC, "
        f"written as the role `{ROLE}` over verified TLS.\n\nLook at them:\n"
        f'  psql "host=localhost port={sandbox.postgres.port} dbname={DATABASE} user={ROLE} sslmode=verify-full '
        f'sslrootcert={environment["POSTGRES_ROOT_CERTIFICATE"]}"\n'
        "    (the password is POSTGRES_PASSWORD in .env)\n"
        "    SELECT event, count(*) FROM events GROUP BY 1 ORDER BY 2 DESC;\n"
        "    SELECT * FROM pg_exports_ledger ORDER BY committed_at DESC LIMIT 10;\n"
        "  make dev    the same in Dagster's UI\n"
        "  make clean  stops the sandbox and deletes it\n"
    )
    return 0 if equal else 1


def demo_range(sandbox: Sandbox) -> tuple[str, str]:
    """The first and the last partition key of the sample data."""
    first, last = (sandbox.folder / RANGE).read_text().split("...")
    return first, last


@contextlib.contextmanager
def _count_at_source(sandbox: Sandbox, start: datetime, end: datetime) -> Iterator[Iterator[tuple[str, int]]]:
    """Rows that each model has at the source, by its own query."""
    with sandbox.clickhouse_client(SOURCE_DATABASE) as client:

        def count(model: Model, begin: datetime, until: datetime) -> int:
            query = model.query(Selection(TEAM, begin, until))
            [(rows,)] = client.query(f"SELECT count() FROM ({query.sql})", dict(query.parameters)).result_rows
            return int(rows)

        def all_hours(model: Model) -> int:
            hours = int((end - start) / HOUR)
            return sum(count(model, start + n * HOUR, start + (n + 1) * HOUR) for n in range(hours))

        # An appended row lands once in each interval that received it, a merged one once in all.
        yield ((m.name, count(m, start, end) if m.merge else all_hours(m)) for m in MODELS.values())


def _key(start: datetime) -> str:
    return f"{start:%Y-%m-%d-%H:%M}"


if __name__ == "__main__":
    sys.exit(main())
