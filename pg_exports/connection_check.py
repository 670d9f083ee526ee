"""Whether an export's set-up is right, step by step (both servers, TLS, login, grants, tables), and the job that finds out.

It only looks: nothing is created or written on either side. A step that fails says what to do, in the words of the error that
a run would end with. `python -m pg_exports.check` runs the jobs from the command line.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import dagster as dg

from pg_exports.clickhouse import ClickHouseResource
from pg_exports.errors import ExportError, PassingError, printable
from pg_exports.models import Model, Query, Selection
from pg_exports.postgres import PostgresResource, own_tables, schemas, strangers
from pg_exports.postgres import table as tables
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.table import Destination
from pg_exports.postgres.tls import VerifyServerIdentity

REASON, EXPORT = "pg_exports/reason", "pg_exports/export"
"""Tags of the jobs, and so of their runs."""

CONNECTION_CHECK = "connection check"
"""The value of `REASON`."""

STEPS = "steps"
"""Key of a run's metadata: the table of its steps, with the fields of `Step`."""

EXPIRES_SOON = timedelta(days=30)
"""Before a certificate's end there is a warning for so long."""

Status = Literal["passed", "note", "warning", "failed", "not reached"]

_LEVELS: Mapping[Status, int] = {"warning": logging.WARNING, "failed": logging.ERROR}


@dataclass(frozen=True)
class Step:
    """One step of a set-up, and how it went. A step that depends on one that failed is not reached."""

    name: str
    status: Status
    text: str


@dataclass(frozen=True)
class Setup:
    """What is checked.

    Attributes:
        export: the export's name.
        model: what it exports.
        selection: which rows, of whatever interval.
        destination: where they go.
    """

    export: str
    model: Model
    selection: Selection
    destination: Destination


def job(setup: Setup, postgres: str | PostgresResource) -> dg.JobDefinition:
    """The job `<export>_check`. Its run fails where a step does; the steps are in the log and in its metadata.

    It is in no pool, so that it need not wait for exports.

    Args:
        setup: what is checked.
        postgres: key of the IO manager that the export writes with, or the connection where it has one of its own.
    """
    io_manager = [postgres] if isinstance(postgres, str) else []

    # Dagster wants names of ops that differ from those of jobs.
    @dg.op(
        name=f"{setup.export}_connection",
        description=f"Goes through the set-up of {setup.export}, and writes nothing.",
        required_resource_keys={"clickhouse", *io_manager},
    )
    def check(context: dg.OpExecutionContext) -> None:
        connection = getattr(context.resources, postgres).postgres if isinstance(postgres, str) else postgres
        found: list[Step] = []
        for step in steps(setup, context.resources.clickhouse, connection):
            context.log.log(_LEVELS.get(step.status, logging.INFO), f"{step.name}: {step.status}. {step.text}")
            found.append(step)
        metadata = {STEPS: dg.MetadataValue.table([dg.TableRecord(asdict(step)) for step in found])}
        failed = [f"{step.name}: {step.text}" for step in found if step.status == "failed"]
        if failed:
            raise dg.Failure("\n\n".join(failed), metadata, allow_retries=False)
        context.add_output_metadata(metadata)

    @dg.job(
        name=f"{setup.export}_check",
        description=f"Checks that {setup.export} can be exported: both servers, TLS, login, grants, tables. Writes nothing.",
        tags={REASON: CONNECTION_CHECK, EXPORT: setup.export},
        executor_def=dg.in_process_executor,
    )
    def connection_check() -> None:
        check()

    return connection_check


def steps(setup: Setup, clickhouse: ClickHouseResource, postgres: PostgresResource) -> Iterator[Step]:
    """The steps of a set-up in order, each as soon as it is known."""
    source = _Source(setup, clickhouse)
    with contextlib.ExitStack() as opened:
        destination = _Destination(setup, postgres, opened)
        yield from _in_order(
            [
                _Check("ClickHouse", None, source.server),
                _Check("Source tables", "ClickHouse", source.tables),
                _Check("Postgres, TLS", None, destination.certificate),
                _Check("Postgres, login", "Postgres, TLS", destination.login),
                _Check("Schema", "Postgres, login", destination.schema),
                _Check("Table", "Schema", destination.table),
                _Check("Ledger", "Schema", destination.own_tables),
                _Check("Disk", "Postgres, login", destination.disk),
            ]
        )


Said = tuple[Status, str]


@dataclass(frozen=True)
class _Check:
    """A step's name, the step that it depends on, and what finds out."""

    name: str
    needs: str | None
    find_out: Callable[[], Iterator[Said]]


def _in_order(checks: Sequence[_Check]) -> Iterator[Step]:
    failed: set[str] = set()
    for check in checks:
        if check.needs in failed:
            failed.add(check.name)
            yield Step(check.name, "not reached", f"It comes after: {check.needs}.")
            continue
        try:
            for status, text in check.find_out():
                if status == "failed":
                    failed.add(check.name)
                yield Step(check.name, status, printable(text))
        except (ExportError, PassingError) as error:
            failed.add(check.name)
            yield Step(check.name, "failed", str(error))


_NOTHING = """
SELECT * FROM (
{}
)
LIMIT 0
"""

# To use an index for `IN (SELECT ...)`, ClickHouse would read what is in the brackets; and begin to, in a further thread.
_READ_NOTHING = {"use_index_for_in_with_subqueries": 0, "max_threads": 1}


class _Source:
    """ClickHouse's side of a set-up."""

    def __init__(self, setup: Setup, clickhouse: ClickHouseResource) -> None:
        self._setup = setup
        self._clickhouse = clickhouse
        self._comment = json.dumps({"reason": CONNECTION_CHECK, "export": setup.export})

    def server(self) -> Iterator[Said]:
        """Whether it answers, and whom."""
        clickhouse = self._clickhouse
        [(version,)] = clickhouse.rows(Query("SELECT version()", {}), log_comment=self._comment)
        said = f"ClickHouse {version} at {clickhouse.address}, database {clickhouse.database}, as {clickhouse.user}."
        if clickhouse.secure:
            yield "passed", f"{said} Encrypted, the certificate is verified."
        else:
            yield (
                "warning",
                f"{said}\nNot encrypted: the password and the rows travel as they are. Set `secure` (CLICKHOUSE_SECURE).",
            )

    def tables(self) -> Iterator[Said]:
        """Whether the model's query may be asked: ClickHouse itself looks at tables, columns and grants."""
        model, hour = self._setup.model, timedelta(hours=1)
        end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        selection = replace(self._setup.selection, start=end - hour, end=end, starts=(end - hour,))
        needed, without = model.dictionary, model.without_dictionary
        is_lacking = bool(needed and without) and not self._clickhouse.has_dictionary(
            needed or "", log_comment=self._comment
        )
        asked = (without if is_lacking and without else model).query(selection)
        nothing = Query(_NOTHING.format(asked.sql.strip()), asked.parameters)
        self._clickhouse.rows(nothing, log_comment=self._comment, settings=_READ_NOTHING)
        yield "passed", f"Everything that {model.name} is read from is there, and this user may read it."
        if is_lacking:
            yield (
                "note",
                f"The dictionary {needed} is not in the database {self._clickhouse.database}, or not to be seen by this user: "
                "the columns that need it stay as they are, and are NULL in new rows. If it is there: "
                f"GRANT SHOW DICTIONARIES, dictGet ON {self._clickhouse.database}.* TO {self._clickhouse.user}",
            )


_ROLE = """
SELECT r.rolname::text, current_database()::text, current_setting('server_version'), r.rolsuper
FROM pg_roles AS r
WHERE r.rolname = current_user
"""

# Of an owner, and of a superuser, they cannot be taken away.
_NEEDLESS = """
SELECT string_agg(privilege, ', ')
FROM pg_class AS c
CROSS JOIN unnest(ARRAY['DELETE', 'TRUNCATE']) AS privilege
WHERE c.oid = $1::bigint::oid AND NOT pg_has_role(c.relowner, 'USAGE') AND has_table_privilege(c.oid, privilege)
"""

# Few roles may see where the data are. A server with the client's own address is on the client's machine.
_DISK = """
SELECT
    pg_size_pretty(pg_database_size(current_database())),
    (SELECT setting FROM pg_settings WHERE name = 'data_directory' AND inet_client_addr() = inet_server_addr())
"""

_VERIFIED: Mapping[VerifyServerIdentity, str] = {
    "no": "Its identity is not verified (`verify_server_identity` is `no`).",
    "ca": "Its certificate is signed by an authority in `root_certificate`; the name in it is not checked.",
    "ca-and-hostname": "Its certificate is signed by an authority in `root_certificate`, and has the name of `host`.",
}


class _Destination:
    """Postgres's side of a set-up, over one connection from the login on. Each question has a transaction of its own."""

    def __init__(self, setup: Setup, postgres: PostgresResource, opened: contextlib.ExitStack) -> None:
        """`opened` closes the connection."""
        self._model = setup.model
        self._destination = setup.destination
        self._postgres = postgres
        self._opened = opened

    def certificate(self) -> Iterator[Said]:
        """Whether the server answers and speaks TLS, and the certificate that it shows."""
        self._postgres.check(self._destination.database or self._postgres.database)
        # What reads certificates is not loaded by each run of an export.
        from pg_exports.postgres import server_certificate

        shown = server_certificate.read(self._postgres.host, self._postgres.port)
        subject = f"{shown.subject or '(no subject)'} for {', '.join(shown.names) or '(no names)'}"
        said = (
            f"{self._postgres.host}:{self._postgres.port} speaks {shown.protocol} ({shown.cipher}).\nCertificate of "
            f"{subject}, issued by {shown.issuer or '(nobody)'}, valid until {shown.expires:%Y-%m-%d %H:%M} UTC."
        )
        now = datetime.now(UTC)
        invalid: Status = "warning" if self._postgres.verify_server_identity == "no" else "failed"
        if shown.expires < now:
            yield invalid, f"{said}\nThe certificate has expired: renew it on the server."
        elif shown.begins > now:
            yield (
                invalid,
                f"{said}\nThe certificate is valid from {shown.begins:%Y-%m-%d %H:%M} UTC on only: is this machine's clock "
                "right?",
            )
        elif shown.expires < now + EXPIRES_SOON:
            yield (
                "warning",
                f"{said}\nThe certificate expires in {(shown.expires - now).days} days: renew it on the server.",
            )
        else:
            yield "passed", said

    def login(self) -> Iterator[Said]:
        """Whether the server is trusted, lets the role in, and takes writes: a standby begins no transaction that may."""
        for warning in self._postgres.warnings():
            yield "warning", warning
        self._session = self._opened.enter_context(self._postgres.session(self._destination.database))
        with self._session.transaction():
            [(role, database, version, is_superuser)] = self._session.rows(_ROLE, doing="reading the role")
        self._role = str(role)
        yield (
            "passed",
            f"PostgreSQL {version}, database {database}, as {role}. {_VERIFIED[self._postgres.verify_server_identity]}",
        )
        if is_superuser:
            yield (
                "warning",
                f"The role {role} is a superuser. An export needs none: USAGE and CREATE on its schema are enough.",
            )
        for schema in schemas.searched(self._session):
            creators = strangers.may_create(self._session, schema)
            if creators:
                yield (
                    "warning",
                    f"Over this pooler names are looked up in {quoted(schema)} before a transaction begins, and "
                    f"{', '.join(creators)} may create functions there that would run as {role}. Run as a superuser: "
                    f"ALTER ROLE {quoted(str(role))} SET search_path = pg_catalog, pg_temp;",
                )

    def schema(self) -> Iterator[Said]:
        """Whether the schema is there, and the role may use it and create tables in it."""
        name = quoted(self._destination.schema)
        with self._session.transaction():
            schemas.check(self._session, self._destination.schema)
            schemas.check_may_create(self._session, self._destination.schema, f"tables in schema {name}")
            creators = strangers.may_create(self._session, self._destination.schema)
        yield "passed", f"{name}: the role may use it, and create tables in it."
        if creators:
            of = ", ".join(creator if creator == "PUBLIC" else quoted(creator) for creator in creators)
            yield (
                "warning",
                f"{', '.join(creators)} may create tables in {name}, too, and so take a table's name before the export does. "
                f"Give it a schema of its own, or run as the schema's owner: REVOKE CREATE ON SCHEMA {name} FROM {of};",
            )

    def table(self) -> Iterator[Said]:
        """Whether the table fits the model, where it is there."""
        session, destination = self._session, self._destination
        with session.transaction():
            if not tables.exists(session, destination):
                schemas.check_name_is_free(session, destination.schema, destination.table)
                yield "passed", f"{destination.qualified} is not there yet: the first run creates it."
                return
            table = tables.inspect(session, destination, self._model)
            [(needless,)] = session.rows(_NEEDLESS, table.oid, doing="reading privileges")
            warnings = strangers.of_table(session, destination.schema, table.oid)
            trappers = ", ".join(strangers.may_make_triggers(session, destination.schema, table.oid))
        key = f" Its rows are merged by ({', '.join(self._model.key)})." if self._model.merge else ""
        yield (
            "passed",
            f"{destination.qualified} is there, and can hold {self._model.name}: {len(table.pairs)} of the "
            f"{len(self._model.columns)} columns that can be filled.{key}",
        )
        for warning in warnings:
            yield "warning", warning
        if trappers:
            yield (
                "warning",
                f"{trappers} may make triggers on {destination.qualified}, which would run as {self._role}. Run as its owner: "
                f"REVOKE TRIGGER ON {destination.qualified} FROM {trappers};",
            )
        if needless:
            yield (
                "warning",
                f"The role {self._role} has {needless} on {destination.qualified}, which no export needs. Run as its owner: "
                f"REVOKE {needless} ON {destination.qualified} FROM {quoted(self._role)};",
            )
        statuses: tuple[tuple[Status, bool], ...] = (("warning", False), ("note", True))
        for status, optional in statuses:
            lacking = [
                column for column in table.lacking if column.optional is optional and column.name not in table.untold
            ]
            if lacking:
                yield (
                    status,
                    f"{destination.qualified} lacks {', '.join(column.name for column in lacking)}. To have "
                    f"{'it' if len(lacking) == 1 else 'them'} filled, run as its owner: {' '.join(map(table.added, lacking))}",
                )
        if table.why_not_asked and not self._model.merge:
            yield "warning", table.why_not_asked

    def own_tables(self) -> Iterator[Said]:
        """Whether the ledger and what goes with it can be written, or made."""
        session, schema = self._session, self._destination.schema
        with session.transaction():
            there = own_tables.there(session, schema)
            for name in own_tables.NAMES:
                if name in there:
                    yield "passed", f"{quoted(schema, name)} is there, and the role may write it."
                else:
                    schemas.check_name_is_free(session, schema, name)
                    yield "passed", f"{quoted(schema, name)} is not there yet: the first run creates it."

    def disk(self) -> Iterator[Said]:
        """How much there is, as far as a client can see."""
        with self._session.transaction():
            [(size, folder)] = self._session.rows(_DISK, doing="reading the database's size")
        said = f"The database holds {size}."
        if folder and Path(str(folder)).is_dir():
            free = shutil.disk_usage(str(folder)).free
            yield "note", f"{said} {free / 2**30:,.1f} GB are free where the server keeps its data."
        else:
            yield "note", f"{said} How much room is left, a client cannot see: watch the server's disk."
