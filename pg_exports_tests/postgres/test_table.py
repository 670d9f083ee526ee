"""The destination table: made where it is missing, taken as it is where it is there, refused with the remedy."""

import itertools
import re
import threading

import pytest

from pg_exports.errors import DestinationError, SettingsError
from pg_exports.models import Column, Kind, Model, with_columns
from pg_exports.models.events import EVENTS
from pg_exports.models.persons import PERSONS
from pg_exports.models.sessions import SESSIONS
from pg_exports.postgres import journal, ledger, rejected
from pg_exports.postgres import table as tables
from pg_exports.postgres.identifiers import MAX_BYTES, quoted
from pg_exports.postgres.merge import Merged
from pg_exports.postgres.table import Destination
from pg_exports.sandbox import postgres_server
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import Target
from pg_exports_tests.postgres.test_ingest import MOMENT, create, creation, event, load, load_by, person

PERSON_COLUMNS = (
    "team_id bigint",
    "distinct_id text",
    "person_id text",
    "properties jsonb",
    "person_distinct_id_version bigint",
    "person_version bigint",
    "created_at timestamptz",
)

OWN = Model(
    "own",
    "",
    (Column("a", Kind.INTEGER, "BIGINT"), Column("b", Kind.TEXT, "TEXT"), Column("c", Kind.TEXT, "TEXT")),
    ("a", "b"),
    None,
    EVENTS.query,
    EVENTS.fingerprints,
    key_may_be_null=True,
)

STRANGE_NAMES = {
    "capitals, spaces, quotes and a statement": ' Capital it\'s "x"; DROP TABLE y; --',
    "an emoji, a backslash, percent and braces": "🦔 é \\b\n%s %(x)s {schema} {0} $1 $$",
    "a dot": "public.events",
    "a keyword": "select",
    "63 bytes": "e" * MAX_BYTES,
    "63 bytes of two and four each": "é" + "🦔" * 15 + "x",
}


def refusal(target: Target, model: Model, table: str | None = None, schema: str | None = None) -> str:
    with (
        target.resource().session() as session,
        pytest.raises(DestinationError) as refused,
    ):
        tables.ensure(session, Destination(None, schema or target.schema, table or model.name), model)
    assert target.sandbox.password not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("model", [EVENTS, PERSONS, SESSIONS], ids=lambda model: model.name)
def test_a_missing_table_is_made_with_the_default_columns_in_order(model: Model, target: Target) -> None:
    with target.resource().session() as session:
        made = tables.ensure(session, Destination(None, target.schema, model.name), model)
        assert tables.ensure(session, made.destination, model) == made
    columns = target.rows(
        "SELECT a.attname::text, format_type(atttypid, atttypmod) FROM pg_attribute AS a"
        f" WHERE attrelid = '{model.name}'::regclass AND attnum > 0 ORDER BY attnum"
    )
    names = {"VARCHAR(200)": "character varying(200)", "TIMESTAMP WITH TIME ZONE": "timestamp with time zone"}
    assert columns == [
        (column.name, names.get(column.postgres_type, column.postgres_type.lower()))
        for column in model.columns
        if not column.optional
    ]
    keys = target.rows(
        f"SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = '{model.name}'::regclass AND contype = 'p'"
    )
    assert keys == ([(f"PRIMARY KEY ({', '.join(model.key)})",)] if model.merge else [])


def test_many_at_once_make_it_once(target: Target) -> None:
    errors: list[BaseException] = []

    def ensure() -> None:
        try:
            with target.resource().session() as session:
                tables.ensure(session, Destination(None, target.schema, "persons"), PERSONS)
                ledger.ensure(session, target.schema)
        except BaseException as error:  # noqa: BLE001 - shown by the assertion
            errors.append(error)

    threads = [threading.Thread(target=ensure) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("name", STRANGE_NAMES.values(), ids=STRANGE_NAMES)
def test_schema_and_table_may_be_called(name: str, target: Target) -> None:
    postgres_server.grant_export(target.sandbox.postgres, ROLE, DATABASE, name)
    strange = Target(target.sandbox, name)
    try:
        with strange.resource().session() as session:
            named, shorter = Destination(None, name, name), Destination(None, name, name[:-1])
            assert load_by(session, named, EVENTS, event(1)) == Merged(1, 0)
            assert load_by(session, named, EVENTS, event(1), event(2), staged=True) == Merged(1, 0)
            assert load_by(session, shorter, PERSONS, person()) == Merged(1, 0)
            ledger.ensure(session, name)
        tables_there = strange.rows(
            "SELECT tablename::text FROM pg_tables WHERE schemaname = current_schema() ORDER BY tablename::text"
        )
        assert {row[0] for row in tables_there} == {name, name[:-1], ledger.TABLE, journal.TABLE}
    finally:
        target.sandbox.postgres.execute(f"DROP SCHEMA {quoted(name)} CASCADE", database=DATABASE)


@pytest.mark.parametrize("name", ["e" * 64, "é" * 32, "🦔" * 16, "", "a\0b"])
def test_a_name_that_postgres_would_cut_short_is_refused_before_a_connection_is_made(name: str) -> None:
    with pytest.raises(SettingsError, match="`table`"):
        Destination(None, "public", name)
    with pytest.raises(SettingsError, match="`schema`"):
        Destination(None, name, "events")
    with pytest.raises(SettingsError, match="`database`"):
        Destination(name, "public", "events")


def test_a_missing_schema_names_the_setting_and_both_statements(target: Target) -> None:
    message = refusal(target, EVENTS, schema='mis"sing')
    assert "Set the export's `schema`" in message
    assert f'CREATE SCHEMA "mis""sing"; GRANT USAGE, CREATE ON SCHEMA "mis""sing" TO "{ROLE}";' in message


def test_a_schema_that_the_role_may_not_use_names_the_grant(target: Target) -> None:
    target.execute(f"REVOKE USAGE ON SCHEMA {target.schema} FROM {ROLE}")
    assert f'GRANT USAGE, CREATE ON SCHEMA "{target.schema}" TO "{ROLE}";' in refusal(target, EVENTS)


def test_a_missing_table_that_the_role_may_not_make_names_the_grant(target: Target) -> None:
    target.execute(f"REVOKE CREATE ON SCHEMA {target.schema} FROM {ROLE}")
    message = refusal(target, EVENTS)
    assert f'may not create the table "{target.schema}"."events"' in message
    assert f'GRANT USAGE, CREATE ON SCHEMA "{target.schema}" TO "{ROLE}";' in message


def test_a_ledger_or_staging_table_that_the_role_may_not_make_names_the_grant(target: Target) -> None:
    create(target, "persons", *PERSON_COLUMNS, "PRIMARY KEY (team_id, distinct_id)")
    target.execute(f"REVOKE CREATE ON SCHEMA {target.schema} FROM {ROLE}")
    with target.resource().session() as session, pytest.raises(DestinationError) as refused:
        ledger.ensure(session, target.schema)
    assert f'may not create the table "{target.schema}"."{ledger.TABLE}"' in str(refused.value)
    with pytest.raises(DestinationError) as refused:
        load(target, PERSONS, person())
    assert "may not create a staging table" in str(refused.value)
    assert f'GRANT USAGE, CREATE ON SCHEMA "{target.schema}" TO "{ROLE}";' in str(refused.value)
    assert target.count("persons") == 0


def test_a_privilege_that_is_missing_on_the_table_is_named_with_the_grant(target: Target) -> None:
    for privilege in ("INSERT", "SELECT", "UPDATE"):
        create(target, quoted(privilege.lower()), *PERSON_COLUMNS, "PRIMARY KEY (team_id, distinct_id)")
        target.execute(f"REVOKE {privilege} ON {quoted(privilege.lower())} FROM {ROLE}")
        message = refusal(target, PERSONS, privilege.lower())
        assert f"The role {ROLE} lacks {privilege} on" in message
        assert f'GRANT INSERT, SELECT, UPDATE ON "{target.schema}"."{privilege.lower()}" TO "{ROLE}";' in message


def test_an_append_model_does_without_update(target: Target) -> None:
    create(target, "events", "uuid text, event text, distinct_id text")
    target.execute(f"REVOKE UPDATE ON events FROM {ROLE}")
    assert load(target, EVENTS, event(1)) == Merged(1, 0)
    assert load(target, EVENTS, event(1), event(2), staged=True) == Merged(1, 0)


def test_the_names_of_pg_exports_own_tables_are_not_for_destinations() -> None:
    with pytest.raises(SettingsError, match="names that begin with pg_exports_"):
        Destination(None, "public", "pg_exports_ledger")


def test_a_name_that_something_else_has_is_refused(target: Target) -> None:
    target.execute(
        "CREATE VIEW a_view AS SELECT 'a'::text AS uuid",
        "CREATE MATERIALIZED VIEW a_materialized_view AS SELECT 'a'::text AS uuid",
        "CREATE SEQUENCE a_sequence",
        "CREATE TABLE other (uuid text)",
        "CREATE INDEX an_index ON other (uuid)",
    )
    for name in ("a_view", "a_materialized_view", "a_sequence", "an_index"):
        message = refusal(target, EVENTS, name)
        assert f'"{target.schema}"."{name}" is no table' in message
        assert "Set the export's `table`" in message


def test_a_name_that_a_type_has_is_an_error_that_names_its_owner(target: Target) -> None:
    target.execute("CREATE TYPE events AS ENUM ('a')")
    said = f'A type of {postgres_server.SUPERUSER} has the name "{target.schema}"."events"'
    assert said in refusal(target, EVENTS)


def test_tables_that_posthog_made_are_filled_as_they_are(target: Target) -> None:
    """Its events have no primary key and BIGINT team_id, its persons BIGINT versions and is_deleted."""
    create(
        target,
        "events",
        "uuid varchar(200), event varchar(200), properties jsonb, elements jsonb, set jsonb, set_once jsonb",
        "distinct_id varchar(200), team_id bigint, ip varchar(200), site_url varchar(200)",
        '"timestamp" timestamptz, id bigint GENERATED ALWAYS AS IDENTITY, loaded_at timestamptz DEFAULT now()',
        "note text, upper_event text GENERATED ALWAYS AS (upper(event)) STORED",
    )
    create(target, "persons", *PERSON_COLUMNS, "is_deleted boolean", "note text", "PRIMARY KEY (team_id, distinct_id)")
    assert load(target, EVENTS, event(1), event(2)) == Merged(2, 0)
    assert load(target, EVENTS, event(2), event(3), staged=True) == Merged(1, 0)
    assert load(target, PERSONS, person("a", is_deleted=True, team_id=2**40, person_version=2**62)) == Merged(1, 0)
    assert target.rows("SELECT id, note, upper_event, loaded_at IS NULL FROM events ORDER BY id") == [
        (n, None, "$PAGEVIEW", False) for n in (1, 2, 3)
    ]
    assert target.rows("SELECT team_id, person_version, is_deleted, note FROM persons") == [(2**40, 2**62, True, None)]


def test_a_column_added_by_hand_is_filled_from_the_next_run_on(target: Target) -> None:
    rows = {"person_id": "p", "elements_chain": "a:b", "created_at": MOMENT, "inserted_at": MOMENT}
    load(target, EVENTS, event(1, **rows))
    target.execute(
        "ALTER TABLE events ADD COLUMN person_id text", "ALTER TABLE events ADD COLUMN created_at timestamptz"
    )
    load(target, EVENTS, event(2, **rows))
    assert target.rows("SELECT person_id, created_at FROM events ORDER BY uuid") == [(None, None), ("p", MOMENT)]


def test_a_column_that_was_dropped_is_left_out(target: Target) -> None:
    load(target, EVENTS, event(1))
    target.execute("ALTER TABLE events DROP COLUMN elements", "ALTER TABLE events DROP COLUMN timestamp")
    assert load(target, EVENTS, event(1), event(2), staged=True) == Merged(1, 0)


def test_an_identity_column_of_the_models_name_is_filled_where_postgres_lets_it_be(target: Target) -> None:
    create(
        target,
        "events",
        "uuid text, team_id integer GENERATED BY DEFAULT AS IDENTITY",
        "event text GENERATED ALWAYS AS ('fixed') STORED",
    )
    load(target, EVENTS, event(team_id=7))
    assert target.rows("SELECT team_id, event FROM events") == [(7, "fixed")]


def test_a_virtual_generated_column_of_the_models_name_is_left_to_postgres(target: Target) -> None:
    [(version,)] = target.rows("SELECT current_setting('server_version_num')::int")
    if version < 180000:
        pytest.skip("PostgreSQL has virtual generated columns from 18 on")
    virtual = "properties text GENERATED ALWAYS AS ('team ' || team_id) VIRTUAL"
    create(target, "events", f"uuid text, event text, distinct_id text, team_id integer, {virtual}")
    create(target, "persons", *PERSON_COLUMNS, "PRIMARY KEY (team_id, distinct_id)")
    target.execute("ALTER TABLE persons ADD COLUMN name text GENERATED ALWAYS AS (upper(distinct_id)) VIRTUAL NOT NULL")
    assert load(target, EVENTS, event(1, team_id=7)) == Merged(1, 0)
    assert load(target, EVENTS, event(1, team_id=7), event(2, team_id=7), staged=True) == Merged(1, 0)
    assert load(target, PERSONS, person("a")) == Merged(1, 0)
    assert load(target, PERSONS, person("a", person_version=2**40)) == Merged(0, 1)
    assert target.rows("SELECT properties FROM events") == [("team 7",), ("team 7",)]
    assert target.rows("SELECT name FROM persons") == [("A",)]


def test_a_version_column_that_is_missing_names_the_alter_table(target: Target) -> None:
    for gone in ("person_distinct_id_version", "person_version"):
        columns = [column for column in PERSON_COLUMNS if not column.startswith(gone)]
        create(target, f"without_{gone}", *columns, "PRIMARY KEY (team_id, distinct_id)")
        message = refusal(target, PERSONS, f"without_{gone}")
        assert f'ALTER TABLE "{target.schema}"."without_{gone}" ADD COLUMN "{gone}" INTEGER;' in message


def test_a_key_column_that_is_missing_names_the_alter_table(target: Target) -> None:
    create(target, "events", "event text")
    create(target, "persons", *PERSON_COLUMNS[1:])
    create(target, "sessions", "team_id bigint")
    assert f'ALTER TABLE "{target.schema}"."events" ADD COLUMN "uuid" VARCHAR(200);' in refusal(target, EVENTS)
    assert 'ADD COLUMN "team_id" INTEGER;' in refusal(target, PERSONS)
    message = refusal(target, SESSIONS)
    assert 'ADD COLUMN "session_id" TEXT;' in message
    assert 'ADD COLUMN "end_timestamp" TIMESTAMP WITH TIME ZONE;' in message


def test_a_generated_key_column_counts_as_missing_and_cannot_be_added(target: Target) -> None:
    create(target, "events", "event text", "uuid text GENERATED ALWAYS AS (event) STORED")
    message = refusal(target, EVENTS)
    assert "lacks uuid" in message
    assert "ALTER TABLE" not in message
    assert "Set the export's `table` to another table" in message


def test_a_key_column_is_not_to_be_added_to_a_table_with_rows_which_would_have_none(target: Target) -> None:
    create(target, "events", "event text")
    create(target, "persons", *PERSON_COLUMNS[1:])
    create(target, "own", "a bigint")
    target.execute("INSERT INTO events DEFAULT VALUES", "INSERT INTO persons DEFAULT VALUES")
    for model, table in ((EVENTS, "events"), (PERSONS, "persons"), (OWN, "own")):
        if model is OWN:
            assert 'Run as its owner: ALTER TABLE "' in refusal(target, OWN, table)
            target.execute("INSERT INTO own DEFAULT VALUES")
        message = refusal(target, model, table)
        assert "has rows, which would stay without and be taken for others than the export's" in message
        assert "Set the export's `table` to another table, or to a name that is free." in message
        assert "ALTER TABLE" not in message


def test_a_version_column_may_be_added_to_a_table_with_rows_which_are_then_older_than_any(target: Target) -> None:
    create(target, "persons", *PERSON_COLUMNS[:5], "PRIMARY KEY (team_id, distinct_id)")
    target.execute("INSERT INTO persons (team_id, distinct_id) VALUES (1, 'a')")
    target.execute(refusal(target, PERSONS).partition("Run as its owner: ")[2])
    assert load(target, PERSONS, person("a", person_version=0)) == Merged(0, 1)


# What rows need to stay, and to be seen


def test_a_table_that_a_crash_would_empty_is_refused_until_it_is_logged(target: Target) -> None:
    target.execute(
        "CREATE UNLOGGED TABLE plain (uuid text)",
        "CREATE TABLE parted (uuid text, team_id int) PARTITION BY LIST (team_id)",
        "CREATE TABLE one PARTITION OF parted FOR VALUES IN (1)",
        "CREATE TABLE others PARTITION OF parted DEFAULT PARTITION BY RANGE (team_id)",
        'CREATE UNLOGGED TABLE "The two" PARTITION OF others FOR VALUES FROM (2) TO (3)',
        "CREATE UNLOGGED TABLE three PARTITION OF others FOR VALUES FROM (3) TO (4)",
        f"GRANT INSERT, SELECT ON plain, parted TO {ROLE}",
    )
    for table, expected in (
        ("plain", ["plain"]),
        ("parted", ['"The two"', "three"]),
    ):
        message = refusal(target, EVENTS, table)
        assert "is UNLOGGED: a crash of the server empties it" in message
        statements = re.findall("ALTER TABLE .*? SET LOGGED;", message)
        assert statements == [f"ALTER TABLE {target.schema}.{name} SET LOGGED;" for name in expected]
        target.execute(*statements)
        assert load(target, EVENTS, event(team_id=2), table=table) == Merged(1, 0)


def test_a_foreign_partition_is_refused_as_its_rows_commit_apart(target: Target) -> None:
    target.execute(
        "CREATE FOREIGN DATA WRAPPER nothing",
        "CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing",
        "CREATE TABLE events (uuid text, team_id int) PARTITION BY LIST (team_id)",
        "CREATE FOREIGN TABLE elsewhere PARTITION OF events FOR VALUES IN (1) SERVER nowhere",
        f"GRANT INSERT, SELECT ON events TO {ROLE}",
    )
    try:
        message = refusal(target, EVENTS)
    finally:
        target.execute("DROP FOREIGN DATA WRAPPER nothing CASCADE")
    assert f'Partition {target.schema}.elsewhere of "{target.schema}"."events" is a foreign table' in message
    assert "Make it a table of this database" in message


@pytest.mark.parametrize("model", [EVENTS, PERSONS], ids=lambda model: model.name)
def test_row_level_security_that_applies_to_the_role_is_refused_with_a_remedy_that_opens_nothing(
    model: Model, target: Target
) -> None:
    with target.resource().session() as session:
        tables.ensure(session, Destination(None, target.schema, model.name), model)
    table = f'"{target.schema}"."{model.name}"'
    # Its owner is exempt from its policies until they are forced on it.
    target.execute(f"ALTER TABLE {model.name} ENABLE ROW LEVEL SECURITY")
    row = event() if model is EVENTS else person()
    assert load(target, model, row) == Merged(1, 0)
    target.execute(f"ALTER TABLE {model.name} FORCE ROW LEVEL SECURITY")
    message = refusal(target, model)
    assert f"Row-level security of {table} applies to the role {ROLE}" in message
    statement = f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY;"
    assert f"Run as its owner: {statement}" in message
    target.execute(statement)
    assert load(target, model, row, staged=True) == Merged(0, 0)

    # Another role's: it sees none of the rows, and would bring them again.
    target.execute(
        f"ALTER TABLE {model.name} OWNER TO CURRENT_USER",
        f"GRANT INSERT, SELECT, UPDATE ON {model.name} TO {ROLE}",
        f"CREATE POLICY writes ON {model.name} FOR INSERT TO {ROLE} WITH CHECK (true)",
    )
    message = refusal(target, model)
    [statement] = re.findall("ALTER ROLE .*?;", message)
    assert statement == f'ALTER ROLE "{ROLE}" BYPASSRLS;'
    assert "opens the table to every role" in message
    try:
        target.execute(statement)
        assert load(target, model, row, staged=True) == Merged(0, 0)
    finally:
        target.execute(f"ALTER ROLE {ROLE} NOBYPASSRLS")
    assert target.count(model.name) == 1


def test_row_level_security_of_a_partition_does_not_matter(target: Target) -> None:
    create(
        target,
        "events",
        "uuid text, event text, distinct_id text, team_id int",
        after="PARTITION BY LIST (team_id)",
    )
    target.execute(
        "CREATE TABLE one PARTITION OF events FOR VALUES IN (1)",
        "ALTER TABLE one ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE one FORCE ROW LEVEL SECURITY",
    )
    assert load(target, EVENTS, event(1)) == Merged(1, 0)
    assert load(target, EVENTS, event(1), event(2), staged=True) == Merged(1, 0)


@pytest.mark.parametrize("name", [ledger.TABLE, journal.TABLE, rejected.TABLE])
def test_the_tables_of_pg_exports_must_keep_and_show_their_rows_too(name: str, target: Target) -> None:
    def ensure() -> None:
        with target.resource().session() as session:
            ledger.ensure(session, target.schema)
            rejected.ensure(session, target.schema)

    ensure()
    changes = {
        "ENABLE ROW LEVEL SECURITY": None,
        "FORCE ROW LEVEL SECURITY": f'ALTER TABLE "{target.schema}"."{name}" NO FORCE ROW LEVEL SECURITY;',
        "SET UNLOGGED": f'ALTER TABLE "{target.schema}"."{name}" SET LOGGED;',
    }
    for change, remedy in changes.items():
        target.execute(f"ALTER TABLE {name} {change}")
        if remedy:
            with pytest.raises(DestinationError) as refused:
                ensure()
            assert remedy in str(refused.value)
            target.execute(remedy)
        ensure()


def test_a_table_that_cannot_tell_events_apart_takes_first_loads_and_is_not_asked_for_keys(target: Target) -> None:
    for lacking in ("distinct_id", "event"):
        kept = [f"{name} text" for name in ("uuid", "event", "distinct_id") if name != lacking]
        create(target, f"without_{lacking}", *kept)
        assert load(target, EVENTS, event(1), event(1, **{lacking: "b"}), table=f"without_{lacking}") == Merged(2, 0)
        with pytest.raises(DestinationError) as refused:
            load(target, EVENTS, event(2), table=f"without_{lacking}", staged=True)
        assert f"has no {lacking}, and events that differ in nothing else would pass for one" in str(refused.value)
        assert "Set its `table` to another table" in str(refused.value)
        assert target.count(f"without_{lacking}") == 2


def test_nor_is_one_from_which_the_export_leaves_out_what_tells_them_apart(target: Target) -> None:
    model = with_columns(EVENTS, {"distinct_id": False, "team_id": False})
    assert load(target, model, event(1), event(1)) == Merged(2, 0)
    with pytest.raises(DestinationError, match="Take distinct_id back into the export's `columns`"):
        load(target, model, event(2), staged=True)
    of_one_team = with_columns(EVENTS, {"team_id": False})
    assert load(target, of_one_team, event(1), event(2), table="of_one_team", staged=True) == Merged(2, 0)


def test_a_unique_index_whose_collation_takes_different_texts_for_equal_is_to_be_dropped(target: Target) -> None:
    target.execute("CREATE COLLATION any_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
    create(target, "persons", *PERSON_COLUMNS, "PRIMARY KEY (team_id, distinct_id)")
    target.execute('CREATE UNIQUE INDEX "Any" ON persons (team_id, distinct_id COLLATE any_case)')
    message = refusal(target, PERSONS)
    assert "has a collation that takes different texts for equal" in message
    target.execute(message.partition("Run as its owner: ")[2])
    assert load(target, PERSONS, person("a"), person("A")) == Merged(2, 0)


def test_a_not_null_column_that_nobody_fills_names_the_alter_table(target: Target) -> None:
    create(target, "events", "uuid text", "note text NOT NULL")
    assert 'ALTER COLUMN "note" DROP NOT NULL;' in refusal(target, EVENTS)
    target.execute("ALTER TABLE events ALTER COLUMN note SET DEFAULT ''")
    assert load(target, EVENTS, event()) == Merged(1, 0)


def test_a_merge_model_needs_a_key_that_on_conflict_can_use(target: Target) -> None:
    keys = (
        (),
        ("UNIQUE (distinct_id)",),
        ("UNIQUE (team_id, distinct_id, person_id)",),
        ("UNIQUE (team_id, distinct_id) DEFERRABLE",),
    )
    indexes = ("(team_id, distinct_id) WHERE team_id > 0", "(team_id, lower(distinct_id))")
    made = [creation(f"t{n}", *PERSON_COLUMNS, *key) for n, key in enumerate([*keys, *[()] * len(indexes)])]
    target.execute(
        *itertools.chain.from_iterable(made),
        *(f"CREATE UNIQUE INDEX ON t{n} {index}" for n, index in enumerate(indexes, start=len(keys))),
    )
    for n in range(len(made)):
        expected = f'ALTER TABLE "{target.schema}"."t{n}" ADD PRIMARY KEY ("team_id", "distinct_id");'
        assert expected in refusal(target, PERSONS, f"t{n}")


def test_a_table_with_another_primary_key_gets_a_unique_index(target: Target) -> None:
    create(target, "persons", "id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY", *PERSON_COLUMNS)
    message = refusal(target, PERSONS)
    assert "It has another one." in message
    # A key that is NULL in one row or another would let that person in again and again.
    statements = message.partition("Run as its owner: ")[2]
    assert statements.startswith(f'ALTER TABLE "{target.schema}"."persons" ALTER COLUMN "team_id" SET NOT NULL, ')
    target.execute(*(f"{statement};" for statement in statements.rstrip(";").split(";")))
    assert load(target, PERSONS, person()) == Merged(1, 0)


@pytest.mark.parametrize("partition_key", ["RANGE (person_version)", "HASH (lower(distinct_id))"])
def test_a_table_that_is_partitioned_by_what_is_not_in_the_key_is_to_be_made_anew(
    target: Target, partition_key: str
) -> None:
    create(target, "persons", *PERSON_COLUMNS, after=f"PARTITION BY {partition_key}")
    message = refusal(target, PERSONS)
    assert f"It is partitioned by {partition_key}, and Postgres wants that in each key: make the table anew" in message
    assert "ALTER TABLE" not in message


def test_a_unique_index_on_the_same_columns_in_any_order_is_a_key(target: Target) -> None:
    indexes = (
        "(distinct_id, team_id)",
        "(team_id, distinct_id) INCLUDE (person_version)",
        "(team_id DESC, distinct_id)",
    )
    made = [(*creation(f"t{n}", *PERSON_COLUMNS), f"CREATE UNIQUE INDEX ON t{n} {i}") for n, i in enumerate(indexes)]
    target.execute(*itertools.chain.from_iterable(made))
    with target.resource().session() as session:
        for n in range(len(indexes)):
            destination = Destination(None, target.schema, f"t{n}")
            assert load_by(session, destination, PERSONS, person()) == Merged(1, 0)
            assert load_by(session, destination, PERSONS, person(person_version=2)) == Merged(0, 1)


def test_a_partitioned_table_counts_like_any_other(target: Target) -> None:
    create(
        target,
        "persons",
        *PERSON_COLUMNS,
        "PRIMARY KEY (team_id, distinct_id)",
        after="PARTITION BY HASH (distinct_id)",
    )
    for remainder in (0, 1):
        target.execute(
            f"CREATE TABLE p{remainder} PARTITION OF persons FOR VALUES WITH (MODULUS 2, REMAINDER {remainder})"
        )
    people = [person(name) for name in "abcdef"]
    assert load(target, PERSONS, *people) == Merged(6, 0)
    assert load(target, PERSONS, *people[1:], person("a", person_version=2), person("new")) == Merged(1, 1)


def test_a_table_that_is_dropped_in_between_is_an_error_that_says_so(target: Target) -> None:
    with target.resource().session() as session:
        made = tables.ensure(session, Destination(None, target.schema, "events"), EVENTS)
        target.execute("DROP TABLE events")
        with pytest.raises(DestinationError, match="is gone"):
            tables.inspect(session, made.destination, EVENTS)
        with pytest.raises(DestinationError, match="does not exist"):
            tables.column_types(session, made.destination)


def test_a_ledger_that_another_role_made_names_the_grant(target: Target) -> None:
    target.execute(f"CREATE TABLE {ledger.TABLE} (a int)")
    with target.resource().session() as session, pytest.raises(DestinationError) as refused:
        ledger.ensure(session, target.schema)
    assert f'GRANT INSERT, SELECT, UPDATE ON "{target.schema}"."{ledger.TABLE}" TO "{ROLE}";' in str(refused.value)


def test_the_schema_is_always_named_so_that_a_search_path_changes_nothing(target: Target) -> None:
    target.sandbox.postgres.execute(f"ALTER ROLE {ROLE} SET search_path = public, pg_temp")
    try:
        assert load(target, PERSONS, person()) == Merged(1, 0)
    finally:
        target.sandbox.postgres.execute(f"ALTER ROLE {ROLE} RESET search_path")
    assert target.count("persons") == 1
