"""Further slots of the pool that a step holds one of: a connection is a slot, also where a run has several of them."""

import contextlib
from collections.abc import Iterator

import dagster as dg
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext


@contextlib.contextmanager
def further_slots(context: dg.OutputContext, count: int) -> Iterator[int]:
    """Claim up to so many further slots of the step's pool, for the block, and give how many there were.

    None is waited for: two runs that wait for each other's slots would wait for ever. All of them are given where the pool
    has no limit, or where the instance limits runs and not steps (`granularity: run`).
    """
    step, instance = context.step_context.step, context.step_context.instance
    if not step.pool or count < 1:
        yield max(0, count)
        return
    keys = [f"{step.key} stream {number}" for number in range(2, count + 2)]
    # On leaving it this gives up what is still waited for, but keeps what was claimed.
    with InstanceConcurrencyContext(instance, context.step_context.dagster_run) as slots:
        claimed = [key for key in keys if slots.claim(step.pool, key)]
    try:
        yield len(claimed)
    finally:
        for key in claimed:
            slots.free_step(key)
