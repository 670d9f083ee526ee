"""dlt as it is out of the box: it chooses the format of its files itself."""

from pg_exports_tests.bench.contenders import dlt_pipeline
from pg_exports_tests.bench.contenders.task import Task, timed


def load(task: Task) -> str:
    """Run a pipeline that asks for nothing."""
    return dlt_pipeline.load(task, None)


if __name__ == "__main__":
    timed(load)
