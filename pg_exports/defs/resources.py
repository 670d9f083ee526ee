"""This deployment's connections, from the environment. A further one is another pair like `postgres` and its IO manager.

Required variables are EnvVars, read when a run starts and shown in the UI by name; optional ones have defaults here.
"""

import os
from typing import Any

import dagster as dg

from pg_exports import ClickHouseResource, PostgresIOManager, PostgresResource
from pg_exports.errors import SettingsError


@dg.definitions
def connections() -> dg.Definitions:
    """The resources `clickhouse`, `postgres` and `postgres_io_manager`, and how a run executes."""
    postgres = PostgresResource(
        host=dg.EnvVar("POSTGRES_HOST"),
        port=_number("POSTGRES_PORT") or 5432,
        user=dg.EnvVar("POSTGRES_USER"),
        password=dg.EnvVar("POSTGRES_PASSWORD"),
        database=dg.EnvVar("POSTGRES_DATABASE"),
        **_if_set(
            verify_server_identity="POSTGRES_VERIFY_SERVER_IDENTITY", root_certificate="POSTGRES_ROOT_CERTIFICATE"
        ),
    )
    clickhouse = ClickHouseResource(
        host=dg.EnvVar("CLICKHOUSE_HOST"),
        port=_number("CLICKHOUSE_PORT"),
        user=dg.EnvVar("CLICKHOUSE_USER"),
        password=dg.EnvVar("CLICKHOUSE_PASSWORD"),
        secure=_flag("CLICKHOUSE_SECURE"),
        **_if_set(database="CLICKHOUSE_DATABASE", ca_certificate="CLICKHOUSE_CA_CERTIFICATE"),
    )
    return dg.Definitions(
        resources={
            "clickhouse": clickhouse,
            "postgres": postgres,
            "postgres_io_manager": PostgresIOManager(postgres=postgres),
        },
        # A run has one step: a process for it alone would cost it 2.5 seconds.
        executor=dg.in_process_executor,
    )


def _if_set(**variables: str) -> dict[str, Any]:
    return {field: os.environ[name] for field, name in variables.items() if os.environ.get(name)}


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    if not value.isdigit():
        raise SettingsError(f"The environment variable {name} must be a port number, not {value!r}.")
    return int(value)


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").lower()
    if value not in ("", "0", "1", "true", "false", "yes", "no"):
        raise SettingsError(f"The environment variable {name} must be true or false, not {value!r}.")
    return value in ("1", "true", "yes")
