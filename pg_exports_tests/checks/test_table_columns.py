"""The check that warns of columns that the table lacks."""

from datetime import datetime

import dagster as dg

from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of


def test_a_table_that_an_export_made_lacks_nothing_and_the_columns_that_may_be_added_are_listed(
    target: Target, run: RunExport, hour: datetime
) -> None:
    evaluation = run(export_of("persons", target, hour), partition_key(hour)).checks["table_columns"]
    assert evaluation.passed
    assert evaluation.metadata["lacking"].value == {}
    assert evaluation.metadata["may_be_added"].value == {
        "is_deleted": f'ALTER TABLE "{target.schema}"."persons" ADD COLUMN "is_deleted" BOOLEAN;'
    }


def test_a_default_column_that_the_table_lacks_is_a_warning_with_a_statement_that_mends_it(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour - HOUR), event(hour, properties='{"a": 1}'))
    target.execute("CREATE TABLE events (uuid text, event text, distinct_id text, team_id int)")
    target.execute(f'ALTER TABLE events OWNER TO "{target.resource().user}"')
    export = export_of("events", target, hour)
    done = run(export, partition_key(hour - HOUR))
    assert done.error is None
    evaluation = done.checks["table_columns"]
    assert not evaluation.passed
    assert evaluation.severity is dg.AssetCheckSeverity.WARN
    statements = evaluation.metadata["lacking"].value
    assert isinstance(statements, dict)
    assert set(statements) == {"properties", "elements", "set", "set_once", "ip", "site_url", "timestamp"}
    assert all(statement in str(evaluation.description) for statement in statements.values())

    target.execute(*statements.values())
    assert run(export, partition_key(hour)).checks["table_columns"].passed
    assert target.rows("SELECT properties::text FROM events WHERE properties IS NOT NULL") == [('{"a": 1}',)]
