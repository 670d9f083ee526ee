"""Items that are made ahead of their use, in a thread of their own: while one is used, the next ones are on their way."""

import contextlib
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
    thread = ThreadPoolExecutor(1, thread_name_prefix="read_ahead")
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
