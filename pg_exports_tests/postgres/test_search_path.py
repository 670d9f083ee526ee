"""Who may create in a schema that the export's role searches puts functions and operators there that fit a statement's
types better than Postgres's own do, or come before them. None of them is ever called.
"""

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

import pg_exports
from pg_exports.postgres.identifiers import quoted
from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.postgres.test_role_settings import fill, settings_of
from pg_exports_tests.source_rows import HOUR, event, export_of

TYPES = (
    "smallint",
    "integer",
    "bigint",
    "numeric",
    "double precision",
    "text",
    "oid",
    "regproc",
    '"char"',
    "name",
    "boolean",
)
OPERATORS = ("=", "<>", "<", ">", "<=", ">=", "+", "-", "*", "/", "||")

BODY = "LANGUAGE plpgsql AS $$ BEGIN INSERT INTO {schema}.caught VALUES ({what}, current_user); {end}; END $$"


def words_of_the_product() -> list[str]:
    """What stands before a bracket anywhere in the product: every function of Postgres's that it calls is among these."""
    package = Path(pg_exports.__file__).parent
    text = "\n".join(path.read_text() for path in (package / "postgres").glob("*.py"))
    return sorted(set(re.findall(r"\b([a-z_0-9]+)\(", text)))


def functions(sandbox: Sandbox) -> list[tuple[str, str, str]]:
    """Those of these words that are Postgres's functions: name, types of the arguments, type of the result. Of those that
    return a set the trap returns one, too.
    """
    names = ", ".join(f"'{name}'" for name in words_of_the_product())
    found = sandbox.postgres.rows(
        "SELECT proname::text, pg_get_function_arguments(oid), pg_get_function_result(oid) FROM pg_proc"
        f" WHERE pronamespace = 'pg_catalog'::regnamespace AND prokind = 'f' AND proname IN ({names})"
        " AND pg_get_function_arguments(oid) !~ 'internal|any|OUT|VARIADIC|cstring'"
        " AND pg_get_function_result(oid) !~ 'internal|any|SETOF|cstring|trigger'",
        DATABASE,
    )
    return [(str(name), str(arguments), str(result)) for name, arguments, result in found]


@pytest.fixture
def traps(sandbox: Sandbox, target: Target) -> Iterator[str]:
    """A schema of the intruder's, with a table of the traps that were called."""
    schema = quoted(f"{target.schema}_traps")

    def function(name: str, arguments: str, result: str, what: str) -> str:
        end = "RETURN" if result == "void" else "RETURN NULL"
        body = BODY.format(schema=schema, what=f"'{what}'", end=end)
        return f"CREATE FUNCTION {schema}.{quoted(name)}({arguments}) RETURNS {result} {body}"

    statements = [f"CREATE SCHEMA {schema}", f"CREATE TABLE {schema}.caught (what text, who text)"]
    for name, arguments, result in functions(sandbox):
        statements.append(function(name, arguments, result, f"{name}({arguments})".replace("'", "''")))
    statements += [
        function("pg_advisory_xact_lock", "integer", "void", "pg_advisory_xact_lock(integer)"),
        function("unnest", "smallint[]", "smallint", "unnest(smallint[])"),
    ]
    for number, operator in enumerate(OPERATORS):
        for left in TYPES:
            for right in TYPES:
                name = f"trap_{number}_{TYPES.index(left)}_{TYPES.index(right)}"
                result = "boolean" if number < 6 else right
                statements += [
                    function(name, f"{left}, {right}", result, f"{left} {operator} {right}"),
                    f"CREATE OPERATOR {schema}.{operator}"
                    f" (FUNCTION = {schema}.{name}, LEFTARG = {left}, RIGHTARG = {right})",
                ]
    statements += [f"GRANT USAGE ON SCHEMA {schema} TO {ROLE}", f"GRANT ALL ON {schema}.caught TO {ROLE}"]
    sandbox.postgres.execute(";\n".join(statements), database=DATABASE)
    yield schema
    sandbox.postgres.execute(f"DROP SCHEMA {schema} CASCADE", database=DATABASE)


@pytest.mark.parametrize("path", ["{traps}, pg_catalog", '"$user", {traps}'])
def test_no_function_or_operator_of_another_role_is_called(
    sandbox: Sandbox, source: Source, target: Target, run: RunExport, hour: datetime, traps: str, path: str
) -> None:
    with settings_of(f"ROLE {ROLE}", sandbox, {"search_path": path.format(traps=traps)}):
        for version in (1, 2):
            fill(source, hour, version)
            for model in ("events", "persons", "sessions"):
                for _ in range(2):
                    found = run(export_of(model, target, hour), partition_key(hour))
                    assert found.error is None
        both = export_of("events", target, hour, deduplicate="replace", table="replaced")
        assert run(both, partition_key(hour), partition_key(hour + HOUR)).error is None
    assert sandbox.postgres.rows(f"SELECT DISTINCT what, who FROM {traps}.caught", DATABASE) == []
    assert target.count("events") > 0


TRIGGER = (
    "CREATE TABLE seen (uuid text)",
    "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
    " $$ BEGIN INSERT INTO seen VALUES (new.uuid); RETURN new; END $$",
    "CREATE TRIGGER note BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION note()",
    f"GRANT INSERT ON seen TO {ROLE}",
)


def test_a_trigger_that_names_a_table_without_its_schema_is_told_how_to_find_it(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).error is None
    target.execute(*TRIGGER)
    source.insert("events", event(hour))
    error = str(run(export, partition_key(hour)).error)
    assert "note() line" in error
    assert "ALTER FUNCTION ... SET search_path" in error
    assert target.count("events") == 0

    target.execute(f"ALTER FUNCTION note() SET search_path = {target.schema}, pg_temp")
    assert run(export, partition_key(hour)).error is None
    assert target.count("events") == target.count("seen") == 1


def test_a_constraint_whose_function_names_another_without_its_schema_is_told_how_to_find_it(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).error is None
    schema = target.schema
    target.execute(
        f"SET search_path = {schema}",
        "CREATE FUNCTION is_known(text) RETURNS boolean LANGUAGE sql STABLE AS $$ SELECT $1 <> '' $$",
        "CREATE FUNCTION is_good(text) RETURNS boolean LANGUAGE sql STABLE AS $$ SELECT is_known($1) $$",
        "ALTER TABLE events ADD CHECK (is_good(event))",
    )
    source.insert("events", event(hour))
    error = str(run(export, partition_key(hour)).error)
    assert "a function or an operator is not found (SQLSTATE 42883); SQL function" in error
    assert "ALTER FUNCTION ... SET search_path" in error
    assert target.count("events") == 0
