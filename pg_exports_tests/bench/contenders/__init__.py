"""Ways to bring a day of events from ClickHouse into Postgres, one module each: `python -m ...contenders.NAME`.

Each reads its task from the environment, does it in this process, and prints JSON with the seconds from its first request
to its commit. It knows nothing of the others, and creates its table itself, in a schema of its own.
"""
