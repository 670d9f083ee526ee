"""`make soak`, or `python -m pg_exports_tests.soak --rounds 30 --seed 7`."""

import argparse
import random
import sys
import time

from pg_exports_tests.soak.exports import Day
from pg_exports_tests.soak.play import own_servers, soak


def main() -> int:
    """Run a soak in a sandbox of its own."""
    parser = argparse.ArgumentParser(prog="python -m pg_exports_tests.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="a random one by default")
    parser.add_argument("--events", type=int, default=Day.events, help=f"of the day ({Day.events:,})")
    parser.add_argument("--hours", type=int, default=Day.length, help=f"of the day ({Day.length})")
    asked = parser.parse_args()
    print(f"{asked.rounds} rounds with SEED={asked.seed}", flush=True)
    began = time.monotonic()
    try:
        with own_servers() as (source, target):
            summary = soak(
                source, target, seed=asked.seed, rounds=asked.rounds, day=Day(length=asked.hours, events=asked.events)
            )
    except AssertionError as error:
        print(f"WRONG, with SEED={asked.seed} ROUNDS={asked.rounds}: {error}")
        return 1
    print(f"{summary}\n{asked.rounds} rounds in {time.monotonic() - began:.0f} s, SEED={asked.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
