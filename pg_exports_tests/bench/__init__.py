"""`make bench`: what an export costs, beside other ways to bring the same rows from ClickHouse into Postgres."""
