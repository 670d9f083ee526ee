"""Which runs a round of the soak has, what strikes them, and what is done to the tables before: all from the seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pg_exports_tests.soak.actions import ACTIONS
from pg_exports_tests.soak.exports import EXPORTS, Day, Order

FAULTS = (
    "kill",
    "cut",
    "lost answers",
    "freeze",
    "restart",
    "crash",
    "ClickHouse cut",
    "ClickHouse freeze",
    "late rows",
    "lost update",
    "pooler refuses",
    "nothing",
)

READ_TIMEOUT = 2
"""Seconds of both connections."""


@dataclass(frozen=True)
class Round:
    """Runs at the same time, and the fault that strikes them.

    Attributes:
        share: how far on its way the first run is then: of the bytes that it sends, or of the time that it takes; where
            ClickHouse is at fault, of the queries that it asks.
        by_bytes: which of the first two.
        frozen: seconds until what was frozen moves again.
        actions: what is done to the tables before it.
        are_late: rows come into hours that have run, before it.
    """

    number: int
    orders: tuple[Order, ...]
    fault: str
    share: float
    by_bytes: bool
    frozen: float
    actions: tuple[str, ...]
    are_late: bool


def plan(seed: int, rounds: int, day: Day) -> Iterator[Round]:
    """The rounds of a seed. Every fault and every action comes about as often."""
    dice = random.Random(seed)
    faults, actions = _in_turn(dice, FAULTS, rounds), _in_turn(dice, ACTIONS, 2 * rounds)
    for number, fault in enumerate(faults, 1):
        first = _order(dice, day)
        if fault == "lost update":
            first = Order(dice.choice(("persons", "sessions", "visits")), first.first, first.last)
        # More often than not into the same table, some of the same intervals among them.
        others = [
            _order(dice, day, beside=first if dice.random() < 0.7 else None)
            for _ in range(dice.choice((0, 0, 0, 1, 1, 2)))
        ]
        yield Round(
            number,
            (first, *others),
            fault,
            share=dice.random(),
            by_bytes=dice.random() < 0.6,
            frozen=dice.uniform(0.2, 2 * READ_TIMEOUT),
            actions=tuple(actions[2 * number - 2 : 2 * number - dice.randint(0, 1)]),
            are_late=dice.random() < 0.6,
        )


def _in_turn(dice: random.Random, all_: Sequence[str], count: int) -> list[str]:
    """So many of them, each as often as another, or once more."""
    turns = [dice.sample(all_, len(all_)) for _ in range(-(-count // len(all_)))]
    return [one for turn in turns for one in turn][:count]


def _order(dice: random.Random, day: Day, beside: Order | None = None) -> Order:
    """Any order, or one that shares intervals with another."""
    hours, intervals = day.hours, dice.randint(1, day.longest)
    earliest, latest = 0, len(hours) - intervals
    if beside:
        earliest = max(earliest, hours.index(beside.first) - intervals + 1)
        latest = min(latest, hours.index(beside.last))
    first = dice.randint(earliest, latest)
    # Events first: theirs is the way that leaves most to go wrong.
    export = beside.export if beside else dice.choice(("events", "events", *EXPORTS))
    return Order(export, hours[first], hours[first + intervals - 1])
