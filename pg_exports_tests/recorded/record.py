"""Records what a version writes. In a checkout of that version, with this folder in it:

`python -m pytest pg_exports_tests/recorded/record.py`; the file that it names belongs into the folder.
"""

import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.recorded import BAD, EXPORTS, PARTITIONED, ROWS, create, export_of, fill

OWN_TABLES = ("pg_exports_ledger", "pg_exports_keys", "pg_exports_rejected")


def test_record(source: Source, target: Target, run: RunExport) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=3)
    create(source)
    target.execute(*PARTITIONED, f"GRANT INSERT, SELECT, UPDATE ON by_month TO {ROLE}")
    fill(source, hour)
    for name in EXPORTS:
        for each in (hour - timedelta(hours=1), hour):
            assert run(export_of(name, target, hour), partition_key(each)).counts == (ROWS, 0, 0)
    numbers = target.rows(
        f"SELECT relname, relfilenode::bigint FROM pg_class WHERE relnamespace = '{target.schema}'::regnamespace"
        " AND relkind = 'r'"
    )
    command = [str(target.sandbox.postgres.binaries / "pg_dump"), "--schema-only", "--schema", target.schema]
    dump = subprocess.run(
        [*command, "-d", target.sandbox.postgres.admin_uri_of(DATABASE)], capture_output=True, text=True, check=True
    ).stdout
    recorded = {
        "hour": hour.isoformat(),
        "filenodes": dict(numbers),
        "schema": [
            line.replace(target.schema, "{schema}")
            for line in dump.splitlines()
            if line and not line.startswith(("--", "SET", "\\", "CREATE SCHEMA", "ALTER SCHEMA", "GRANT ALL ON SCHEMA"))
        ],
        "rows": {
            table: [json.loads(row) for (row,) in target.rows(f"SELECT row_to_json(r)::text FROM {table} AS r")]
            for table in (*OWN_TABLES, *EXPORTS)
        },
    }
    assert len(recorded["rows"]["pg_exports_rejected"]) == len(BAD)  # type: ignore[index]
    path = Path(__file__).parent / "without_registry.json"
    path.write_text(json.dumps(recorded, indent=1) + "\n")
