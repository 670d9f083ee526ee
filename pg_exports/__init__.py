"""Batch exports from ClickHouse to Postgres, as Dagster assets."""

from pg_exports.alerts import ExportAlerts
from pg_exports.at_launch import fixed_at_launch
from pg_exports.clickhouse import ClickHouseResource
from pg_exports.export import PostgresExport
from pg_exports.postgres import PostgresIOManager, PostgresResource

__all__ = [
    "ClickHouseResource",
    "ExportAlerts",
    "PostgresExport",
    "PostgresIOManager",
    "PostgresResource",
    "fixed_at_launch",
]
