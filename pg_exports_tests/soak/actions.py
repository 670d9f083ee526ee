"""What an owner does to the tables between the soak's rounds, and what is run after it because the documentation says so."""

import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import Source, Target
from pg_exports_tests.soak.checks import Past, committed, keys_there
from pg_exports_tests.soak.exports import DAY, EXPORTS, Day, model, replay
from pg_exports_tests.source_rows import HOUR

_TEXT = {"events": "event", "persons": "person_id", "sessions": "urls", "clicks": "page", "visits": "state"}
"""A column of each table that is rewritten as what it is."""

_SORTED_BY = {"events": "uuid", "persons": "distinct_id", "sessions": "session_id", "clicks": "number", "visits": "id"}

_SETTINGS = {
    "TimeZone": "'Asia/Kolkata'",
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "extra_float_digits": "-15",
    "bytea_output": "escape",
    "array_nulls": "off",
    "standard_conforming_strings": "off",
    "transform_null_equals": "on",
    "row_security": "off",
    "default_transaction_read_only": "on",
    "default_transaction_isolation": "serializable",
    "lock_timeout": "'1ms'",
    "statement_timeout": "'5s'",
    "idle_in_transaction_session_timeout": "'2s'",
    "plan_cache_mode": "force_generic_plan",
    "work_mem": "'64kB'",
}
"""What a role may have."""

ACTIONS = (
    "VACUUM FULL",
    "CLUSTER",
    "ALTER TYPE",
    "SET TABLESPACE",
    "restore over it",
    "restore anew",
    "restore all",
    "copy by hand",
    "attach",
    "TRUNCATE",
    "DELETE",
    "settings",
    "prune",
)


@dataclass
class Owner:
    """Acts on the tables.

    Attributes:
        dumps: of each table, made some rounds ago; of all of them as `all`.
    """

    source: Source
    target: Target
    day: Day
    past: Past
    dice: random.Random
    is_partitioned: bool
    dumps: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        """Before there are rows."""
        folder = self.target.sandbox.postgres.folder / "elsewhere"
        self.target.sandbox.postgres.execute(f"COPY (SELECT 1) TO PROGRAM 'mkdir -p {folder}'")
        self.target.sandbox.postgres.execute(f"CREATE TABLESPACE elsewhere LOCATION '{folder}'")
        if self.is_partitioned:
            noon = self.day.hours[len(self.day.hours) // 2]
            self.target.execute(
                "ALTER TABLE events RENAME TO plain",
                'CREATE TABLE events (LIKE plain INCLUDING ALL) PARTITION BY RANGE ("timestamp")',
                "DROP TABLE plain",
                f"CREATE TABLE events_early PARTITION OF events FOR VALUES FROM (MINVALUE) TO ('{noon}')",
                f"CREATE TABLE events_later PARTITION OF events FOR VALUES FROM ('{noon}') TO (MAXVALUE)",
                f"GRANT INSERT, SELECT, UPDATE ON events TO {ROLE}",
            )
        for name in EXPORTS:
            leaves = ("events_early", "events_later") if name == "events" and self.is_partitioned else (name,)
            self.target.execute(*(f"CREATE INDEX {leaf}_sorted ON {leaf} ({_SORTED_BY[name]})" for leaf in leaves))
        self.dump()

    def dump(self) -> None:
        """Keep a dump of one table, or of all."""
        for name in self.dice.sample((*EXPORTS, "all"), 2) if self.dumps else (*EXPORTS, "all"):
            self.dumps[name] = self._dump(name)

    def act(self, action: str) -> str:
        """Do it to some table. Gives what was done."""
        name = self.dice.choice(("events", "events", *EXPORTS))
        leaf = self.dice.choice(("events_early", "events_later"))
        file = leaf if name == "events" and self.is_partitioned else name
        actions: dict[str, Callable[[], None]] = {
            "VACUUM FULL": lambda: self.target.execute(f"VACUUM FULL {file}"),
            "CLUSTER": lambda: self.target.execute(f"CLUSTER {file} USING {file}_sorted"),
            "ALTER TYPE": lambda: self._alter(name),
            "SET TABLESPACE": lambda: self._move(file),
            "restore over it": lambda: self._restore(name, anew=False),
            "restore anew": lambda: self._restore(name, anew=True),
            "restore all": self._restore_all,
            "copy by hand": lambda: self._copy(name),
            "attach": lambda: self._attach(leaf),
            "TRUNCATE": lambda: self._truncate(name, file),
            "DELETE": lambda: self._delete(name),
            "settings": self._settings,
            "prune": lambda: self.target.execute(
                "DELETE FROM pg_exports_keys WHERE destination IN ('events', 'clicks') AND random() < 0.5"
            ),
        }
        actions[action]()
        if action in ("restore all", "settings", "prune"):
            return action
        return f"{action} {leaf if action == 'attach' else file}"

    def empty(self, name: str) -> None:
        """TRUNCATE a table, with all of its partitions."""
        self.target.execute(f"TRUNCATE {name}", f"DELETE FROM pg_exports_rejected WHERE destination = '{name}'")
        self.past.deleted[name].clear()
        self.past.brought[name].clear()

    def _alter(self, name: str) -> None:
        column = _TEXT[name]
        [(kind,)] = self.target.rows(
            "SELECT format_type(atttypid, atttypmod) FROM pg_attribute"
            f" WHERE attrelid = '{name}'::regclass AND attname = '{column}'"
        )
        self.target.execute(f"ALTER TABLE {name} ALTER COLUMN {column} TYPE {kind} USING coalesce({column}, NULL)")

    def _move(self, file: str) -> None:
        [(there,)] = self.target.rows(f"SELECT reltablespace <> 0 FROM pg_class WHERE oid = '{file}'::regclass")
        self.target.execute(f"ALTER TABLE {file} SET TABLESPACE {'pg_default' if there else 'elsewhere'}")

    def _restore(self, name: str, *, anew: bool) -> None:
        """From a dump that is some rounds old. The table alone is older than the ledger: what was exported is run again."""
        hours = committed(self.target, name)
        if anew:
            self.target.execute(f"DROP TABLE {name}")
            self._run(self.dumps[name])
        else:
            self.target.execute(f"TRUNCATE {name}")
            copies = self.dumps[name].split("\nCOPY ")[1:]
            self._run(
                "SET search_path = public;\n"
                + "".join(f"COPY {c.partition(chr(10) + chr(92) + '.')[0]}\n\\.\n" for c in copies)
            )
        self.past.brought[name] = set(keys_there(self.target, name))
        self._replay(name, hours)

    def _restore_all(self) -> None:
        self._run(self.dumps["all"])
        for name in EXPORTS:
            self.past.brought[name] = set(keys_there(self.target, name))

    def _copy(self, name: str) -> None:
        """Rows of some hour, as another tool would bring them: half of those that are not there."""
        hour = self.dice.choice(self.day.hours)
        self._bring(name, hour, into=name, only="true")

    def _bring(self, name: str, hour: datetime, into: str, only: str) -> None:
        copy = f"copied_{name}"
        before = set(keys_there(self.target, name, into))
        self.target.execute(f"CREATE TABLE {copy} (LIKE {name} INCLUDING ALL)", f"GRANT ALL ON {copy} TO {ROLE}")
        replay(name, [hour], self.source, self.target, name=copy, table=copy)
        key = ("uuid", "event", "distinct_id") if name == "events" else model(name, self.target).key
        same = " AND ".join(f"t.{column} IS NOT DISTINCT FROM c.{column}" for column in key)
        self.target.execute(
            f"INSERT INTO {into} SELECT * FROM {copy} AS c WHERE {only} AND hashtext({_SORTED_BY[name]}::text) % 2 = 0"
            f" AND NOT EXISTS (SELECT FROM {name} AS t WHERE {same})",
            f"DROP TABLE {copy}",
            f"DELETE FROM pg_exports_rejected WHERE destination = '{copy}'",
        )
        self.past.brought[name] |= set(keys_there(self.target, name, into)) - before

    def _attach(self, leaf: str) -> None:
        """A partition is detached, gets rows by another way, and is attached again; or is made anew before that."""
        if not self.is_partitioned:
            self._copy("events")
            return
        noon = self.day.hours[len(self.day.hours) // 2]
        early = leaf == "events_early"
        bounds = f"FROM (MINVALUE) TO ('{noon}')" if early else f"FROM ('{noon}') TO (MAXVALUE)"
        if self.dice.random() < 0.5:
            self.target.execute(
                f"CREATE TABLE anew (LIKE {leaf} INCLUDING ALL)",
                f"INSERT INTO anew SELECT * FROM {leaf}",
                f"DROP TABLE {leaf}",
                f"ALTER TABLE anew RENAME TO {leaf}",
                f"DROP INDEX IF EXISTS anew_{_SORTED_BY['events']}_idx",
                f"CREATE INDEX IF NOT EXISTS {leaf}_sorted ON {leaf} (uuid)",
                f"ALTER TABLE events ATTACH PARTITION {leaf} FOR VALUES {bounds}",
            )
            return
        # A run of another table meanwhile, which writes nothing to this one.
        hour = self.dice.choice(self.day.hours)
        self.target.execute(f"ALTER TABLE events DETACH PARTITION {leaf}")
        self.target.execute("CREATE TABLE whole (LIKE events)", f"INSERT INTO whole SELECT * FROM {leaf}")
        only = f"c.timestamp {'<' if early else '>='} '{noon}' AND NOT EXISTS (SELECT FROM whole AS w WHERE w.uuid = c.uuid)"
        self._bring("events", hour, into=leaf, only=only)
        self.target.execute("DROP TABLE whole", f"ALTER TABLE events ATTACH PARTITION {leaf} FOR VALUES {bounds}")

    def _truncate(self, name: str, file: str) -> None:
        """The whole table, or a partition; what the partition had is run again."""
        hours = committed(self.target, name)
        if file == name:
            self.empty(name)
        else:
            self.target.execute(f"TRUNCATE {file}")
            self._replay(name, hours)

    def _delete(self, name: str) -> None:
        """Some rows by hand, and what was exported is run again: appended ones stay deleted, merged ones come back."""
        hours = committed(self.target, name)
        before = set(keys_there(self.target, name))
        column = _SORTED_BY[name]
        some = f"SELECT {column} FROM {name} ORDER BY hashtext({column}::text) LIMIT {self.dice.randint(1, 30)}"
        self.target.execute(f"DELETE FROM {name} WHERE {column} IN ({some})")
        if not model(name, self.target).merge:
            self.past.deleted[name] |= before - set(keys_there(self.target, name))
        self._replay(name, hours)

    def _settings(self) -> None:
        chosen = self.dice.sample(sorted(_SETTINGS), 4)
        self.target.sandbox.postgres.execute(
            f"ALTER ROLE {ROLE} RESET ALL", *(f"ALTER ROLE {ROLE} SET {name} = {_SETTINGS[name]}" for name in chosen)
        )

    def _replay(self, name: str, hours: list[datetime]) -> None:
        replay(name, [DAY - HOUR, *hours], self.source, self.target)

    def _dump(self, name: str) -> str:
        server = self.target.sandbox.postgres
        pattern = "public.*" if name == "all" else f"public.{name}*"
        command = [str(server.binaries / "pg_dump"), "-t", pattern, "-d", server.admin_uri_of(DATABASE)]
        command += ["--clean", "--if-exists"] if name == "all" else []
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def _run(self, script: str) -> None:
        server = self.target.sandbox.postgres
        command = [str(server.binaries / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1"]
        script = script.replace("SET transaction_timeout = 0;\n", "")
        ran = subprocess.run(
            [*command, "-d", server.admin_uri_of(DATABASE)], input=script, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
