"""Where an export's columns come from: ClickHouse's tables as assets that Dagster knows of, and their columns."""

from collections.abc import Iterable

import dagster as dg

from pg_exports.models import Column


def source(table: str) -> dg.AssetKey:
    """The asset that stands for one of ClickHouse's tables."""
    return dg.AssetKey(["clickhouse", table])


def columns(of: Iterable[Column]) -> dg.TableColumnLineage:
    """The source columns of each column that is made from some."""
    return dg.TableColumnLineage(
        {
            column.name: [
                dg.TableColumnDep(asset_key=source(table), column_name=name)
                for table, name in (column_source.split(".") for column_source in column.sources)
            ]
            for column in of
            if column.sources
        }
    )
