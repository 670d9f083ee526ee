"""This deployment's connections, from the environment. A further one is another pair like `postgres` and its IO manager.

Required variables are EnvVars, read when a run starts and shown in the UI by name; optional ones have defaults here.
"""

import os
from typing import Any, get_args

import dagster as dg

from pg_exports import ClickHouseResource, PostgresIOManager, PostgresResource, fixed_at_launch
from pg_exports.errors import SettingsError
from pg_exports.postgres.login import Authentication
from pg_exports.postgres.tls import VerifyServerIdentity

# A range is one event a partition for Dagster's storage: 2,180 took a minute one by one, and take a second by 500.
os.environ.setdefault("DAGSTER_EVENT_BATCH_SIZE", "500")


@dg.definitions
def connections() -> dg.Definitions:
    """The resources `clickhouse`, `postgres` and `postgres_io_manager`, which no launch can change, and how a run executes."""
    postgres = PostgresResource(
        host=dg.EnvVar("POSTGRES_HOST"),
        port=_number("POSTGRES_PORT") or 5432,
        user=dg.EnvVar("POSTGRES_USER"),
        password=dg.EnvVar("POSTGRES_PASSWORD"),
        database=dg.EnvVar("POSTGRES_DATABASE"),
        verify_server_identity=_choice("POSTGRES_VERIFY_SERVER_IDENTITY", VerifyServerIdentity, "ca-and-hostname"),
        authentication=_choice("POSTGRES_AUTHENTICATION", Authentication, "scram-sha-256"),
        **_if_set(root_certificate="POSTGRES_ROOT_CERTIFICATE"),
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
            # Dagster's own, which would take a folder at launch. Nothing is written with it.
            "io_manager": fixed_at_launch(dg.fs_io_manager),
        },
        # A step does little but wait for two servers: a process of its own would cost it 2.5 seconds.
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


def _choice(name: str, choices: Any, default: str) -> Any:
    """One of a Literal's values."""
    value = os.environ.get(name) or default
    if value not in get_args(choices):
        raise SettingsError(
            f"The environment variable {name} must be one of {', '.join(get_args(choices))}, not {value!r}."
        )
    return value


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").lower()
    if value not in ("", "0", "1", "true", "false", "yes", "no"):
        raise SettingsError(f"The environment variable {name} must be true or false, not {value!r}.")
    return value in ("1", "true", "yes")
