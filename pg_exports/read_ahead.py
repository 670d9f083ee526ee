"""Items that are made ahead of their use, in a thread of their own: while one is used, the next ones are on their way."""

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


@contextlib.contextmanager
def read_ahead(items: Iterable[Item], count: int) -> Iterator[Iterator[Item]]:
    """The same items in the same order, up to `count` of them made ahead. What making one raises is raised in its place.

    When the block ends early, the item that is being made is not waited for: whoever opened what it reads closes it.
    """
    source = iter(items)
    thread = ThreadPoolExecutor(1, thread_name_prefix="read_ahead", initializer=_be_patient)
    ahead: deque[Future[tuple[Item] | None]] = deque()

    def make() -> tuple[Item] | None:
        for item in source:
            return (item,)
        return None

    def use() -> Iterator[Item]:
        ahead.extend(thread.submit(make) for _ in range(count))
        while made := ahead.popleft().result():
            ahead.append(thread.submit(make))
            yield made[0]
            made = None  # memory: it is not to wait beside the next one

    try:
        yield use()
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _be_patient() -> None:
    """Have Linux wake this thread a little later than others: on two cores with Postgres and ClickHouse on them, Postgres's
    COPY was kept waiting for a core for 2.2 s of 15, and is for 1.8 s.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
