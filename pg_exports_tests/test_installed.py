"""Another Dagster project, with this package installed from its wheel: exports made by `dg scaffold` and in Python run there.

The project's environment has the wheel's code alone: what is installed in editable form is not to be found in it.
"""

import os
import subprocess
import sys
import uuid
import venv
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from pg_exports.sandbox import Sandbox
from pg_exports_tests.conftest import Source, Target, partition_key
from pg_exports_tests.source_rows import event, mapping, person

pytestmark = pytest.mark.slow

HOUR = timedelta(hours=1)

# As `create-dagster project` lays it out.
PYPROJECT = """
[project]
name = "warehouse"
version = "0.1.0"

[tool.dg]
directory_type = "project"

[tool.dg.project]
root_module = "warehouse"
"""

DEFINITIONS = """
from pathlib import Path

from dagster import definitions, load_from_defs_folder


@definitions
def defs():
    return load_from_defs_folder(path_within_project=Path(__file__).parent)
"""

RESOURCES = """
import dagster as dg

from pg_exports import ClickHouseResource, PostgresIOManager, PostgresResource


@dg.definitions
def resources() -> dg.Definitions:
    analytics = PostgresResource(
        host=dg.EnvVar("POSTGRES_HOST"),
        port=dg.EnvVar.int("POSTGRES_PORT"),
        user=dg.EnvVar("POSTGRES_USER"),
        password=dg.EnvVar("POSTGRES_PASSWORD"),
        database=dg.EnvVar("POSTGRES_DATABASE"),
        root_certificate=dg.EnvVar("POSTGRES_ROOT_CERTIFICATE"),
    )
    clickhouse = ClickHouseResource(
        host=dg.EnvVar("CLICKHOUSE_HOST"),
        port=dg.EnvVar.int("CLICKHOUSE_PORT"),
        user=dg.EnvVar("CLICKHOUSE_USER"),
        password=dg.EnvVar("CLICKHOUSE_PASSWORD"),
        database=dg.EnvVar("CLICKHOUSE_DATABASE"),
        secure=True,
        ca_certificate=dg.EnvVar("CLICKHOUSE_CA_CERTIFICATE"),
    )
    return dg.Definitions(
        resources={
            "clickhouse": clickhouse,
            "analytics": analytics,
            "analytics_io_manager": PostgresIOManager(postgres=analytics),
        },
        executor=dg.in_process_executor,
    )
"""

PEOPLE = """
import dagster as dg

from pg_exports import PostgresExport


@dg.definitions
def people() -> dg.Definitions:
    export = PostgresExport(
        name="people", model="persons", team_id=1, start="{start}", schema="{schema}", connection="analytics"
    )
    return export.build_defs(None)
"""


@dataclass(frozen=True)
class Project:
    """A Dagster project and the Python that it runs with."""

    folder: Path
    python: Path

    def run(self, *words: str) -> str:
        """What `python` prints with these arguments, in the project's folder."""
        environment = {**os.environ, "COLUMNS": "200", "DAGSTER_HOME": str(self.folder / "home")}
        environment.pop("PYTHONPATH", None)
        environment |= {"VIRTUAL_ENV": str(self.python.parent.parent)}
        done = subprocess.run(
            [self.python, *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def dg(self, *words: str) -> str:
        """What `dg` prints."""
        return self.run("-m", "dagster_dg_cli.cli", *words)

    def write(self, path: str, text: str) -> None:
        """Write a file of the project."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.lstrip())


def pip(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words], check=True)


@pytest.fixture(scope="module")
def python(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of its own with the wheel, and with this environment's packages but for those in editable form."""
    folder = tmp_path_factory.mktemp("environment")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, repository)
    [wheel] = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    installed = folder / "venv" / "bin" / "python"
    pip("--python", installed, "install", "--no-deps", "--no-index", wheel)
    [packages] = (folder / "venv" / "lib").glob("python*/site-packages")
    # Python reads no `.pth` files, which are what editable installs are made of, in a folder that a `.pth` names.
    (packages / "others.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n")
    return installed


@pytest.fixture
def project(python: Path, sandbox: Sandbox, source: Source, tmp_path: Path) -> Project:
    """Another Dagster project, with connections of its own and no export yet."""
    project = Project(tmp_path, python)
    environment = sandbox.environment() | {"CLICKHOUSE_DATABASE": source.database}
    project.write("pyproject.toml", PYPROJECT)
    project.write(".env", "".join(f"{name}='{value}'\n" for name, value in environment.items()))
    project.write("home/dagster.yaml", "telemetry: {enabled: false}\nnux: {enabled: false}\n")
    project.write("src/warehouse/__init__.py", "")
    project.write("src/warehouse/definitions.py", DEFINITIONS)
    project.write("src/warehouse/defs/__init__.py", "")
    project.write("src/warehouse/defs/resources.py", RESOURCES)
    [packages] = python.parent.parent.glob("lib/python*/site-packages")
    # As an editable install of the project does.
    (packages / "warehouse.pth").write_text(f"{tmp_path / 'src'}\n")
    return project


def test_exports_run_in_another_project(project: Project, source: Source, target: Target, hour: datetime) -> None:
    found = project.run("-c", "import importlib.util; print(importlib.util.find_spec('pg_exports').origin)")
    assert found.startswith(str(project.python.parent.parent))
    someone = uuid.uuid4()
    source.insert("events", event(hour, event="a"), event(hour, event="b"))
    source.insert("person", person(hour, someone, 1))
    source.insert("person_distinct_id2", mapping(hour, "someone", someone))

    start = f"{hour - 24 * HOUR:%Y-%m-%d}"
    project.dg("scaffold", "defs", "pg_exports.PostgresExport", "posthog/events", "--team-id", "1", "--start", start)
    scaffolded = project.folder / "src" / "warehouse" / "defs" / "posthog" / "events" / "defs.yaml"
    text = scaffolded.read_text()
    for before, after in (
        ("# schema: public", f"schema: {target.schema}"),
        ("# connection: postgres", "connection: analytics"),
    ):
        assert before in text
        text = text.replace(before, after)
    scaffolded.write_text(text)
    project.write("src/warehouse/defs/people.py", PEOPLE.format(start=start, schema=target.schema))
    project.dg("launch", "--assets", "events,people", "--partition", partition_key(hour))
    assert target.rows("SELECT event FROM events ORDER BY event") == [("a",), ("b",)]
    assert target.rows("SELECT distinct_id FROM persons") == [("someone",)]
