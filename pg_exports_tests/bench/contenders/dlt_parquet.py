"""dlt with its fast loader: Arrow batches into Parquet files, and those by ADBC into the table."""

from pg_exports_tests.bench.contenders import dlt_pipeline
from pg_exports_tests.bench.contenders.task import Task, timed


def load(task: Task) -> str:
    """Run a pipeline that asks for Parquet."""
    return dlt_pipeline.load(task, "parquet")


if __name__ == "__main__":
    timed(load)
