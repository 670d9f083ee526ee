"""The dlt pipeline of both dlt contenders: Arrow batches as they arrive, documents hinted as JSON, one table.

The bench turns dlt's telemetry off in the environment, and gives it folders of its own.
"""

import tempfile
from typing import Literal

import dlt
from dlt.destinations import postgres

from pg_exports_tests.bench.contenders import source
from pg_exports_tests.bench.contenders.task import TABLE, Task, uri


def load(task: Task, file_format: Literal["parquet"] | None) -> str:
    """Extract, normalise and load. Returns the format of the files that dlt loaded."""
    rows = dlt.resource(
        source.batches(task),
        name=TABLE,
        write_disposition="append",
        columns={name: {"data_type": "json"} for name in task.json_columns},
    )
    with tempfile.TemporaryDirectory(prefix="pg_exports_bench_") as folder:
        pipeline = dlt.pipeline(
            pipeline_name="bench",
            pipelines_dir=folder,
            destination=postgres(credentials=uri()),
            dataset_name=task.schema,
        )
        info = pipeline.run(rows, loader_file_format=file_format)
        info.raise_on_failed_jobs()
    jobs = [job.job_file_info for package in info.load_packages for job in package.jobs["completed_jobs"]]
    return ", ".join(sorted({job.file_format for job in jobs if job.table_name == TABLE}))
