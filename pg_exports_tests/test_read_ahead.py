"""Items that are made ahead of their use: which, how many, and what becomes of them when nobody wants them any more."""

import os
import threading
from collections.abc import Iterator

import pytest

from pg_exports.read_ahead import read_ahead
from pg_exports_tests.faults import eventually

LONG = 10.0
"""Seconds after which an item that nobody lets go of is made in spite of it, so that a fault is no test without an end."""


class Items:
    """The numbers from 0, which are noted when they are asked for; one of them is made when it is let go of."""

    def __init__(self, count: int = 10, held: int | None = None) -> None:
        self.asked: list[int] = []
        self.let_go = threading.Event()
        self._count = count
        self._held = held

    def __iter__(self) -> Iterator[int]:
        for n in range(self._count):
            self.asked.append(n)
            if n == self._held:
                self.let_go.wait(LONG)
            yield n


def finish() -> None:
    """Wait until no thread makes items any more."""
    eventually(lambda: not any(thread.name.startswith("read_ahead") for thread in threading.enumerate()))


@pytest.mark.parametrize("count", [1, 2, 20])
def test_the_same_items_come_in_the_same_order(count: int) -> None:
    with read_ahead(range(10), count) as items:
        assert list(items) == list(range(10))
    with read_ahead(range(0), count) as nothing:
        assert list(nothing) == []


def test_an_item_that_is_none_ends_nothing() -> None:
    with read_ahead([None, 0, None], 1) as items:
        assert list(items) == [None, 0, None]


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_is_raised_in_its_items_place_behind_those_that_were_made_before(count: int) -> None:
    def broken() -> Iterator[int]:
        yield 0
        yield 1
        raise ValueError("no third one")

    used: list[int] = []
    with read_ahead(broken(), count) as items, pytest.raises(ValueError, match="no third one"):  # noqa: PT012
        for item in items:
            used.append(item)
    assert used == [0, 1]


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_than_so_many_items_are_made_ahead_of_the_one_in_use(count: int) -> None:
    source = Items()
    with read_ahead(source, count) as items:
        for item in items:
            ahead = list(range(min(item + count + 1, 10)))
            eventually(lambda ahead=ahead: source.asked == ahead)  # type: ignore[misc]  # a lambda with a default
    finish()
    assert source.asked == list(range(10))


def test_what_is_in_use_does_not_keep_the_next_item_from_being_made() -> None:
    source = Items(held=2)
    with read_ahead(source, 1) as items:
        assert [next(items), next(items)] == [0, 1]
        eventually(lambda: source.asked == [0, 1, 2])
        source.let_go.set()
        assert next(items) == 2


def test_nothing_is_made_before_the_first_item_is_asked_for() -> None:
    source = Items()
    with read_ahead(source, 3):
        finish()
    finish()
    assert source.asked == []


@pytest.mark.parametrize("fails", [False, True], ids=["by leaving", "by an error"])
def test_a_block_that_ends_early_does_not_wait_for_the_item_that_is_being_made_and_none_is_made_after_it(
    fails: bool,
) -> None:
    source = Items(held=1)
    left = False
    try:
        with read_ahead(source, 2) as items:
            assert next(items) == 0
            eventually(lambda: source.asked == [0, 1])
            if fails:
                raise KeyError
    except KeyError:
        left = True
    assert left == fails
    # It is still being made.
    assert any(thread.name.startswith("read_ahead") for thread in threading.enumerate())
    source.let_go.set()
    finish()
    assert source.asked == [0, 1]


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Only Linux has such a policy.")
def test_the_thread_gives_way_to_other_processes_and_the_rest_of_this_one_does_not() -> None:
    before = os.sched_getscheduler(0)
    with read_ahead((os.sched_getscheduler(0) for _ in range(2)), 1) as policies:
        assert list(policies) == [os.SCHED_BATCH] * 2
    assert os.sched_getscheduler(0) == before
