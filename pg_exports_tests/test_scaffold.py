"""`dg scaffold defs pg_exports.PostgresExport`: what it writes loads as it is, in a copy of the repository.

Another project, with pg_exports installed from its wheel, is in `test_installed`.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import dagster as dg
import pytest
from dagster.components.core.defs_module import CompositeYamlComponent

from pg_exports import PostgresExport
from pg_exports.scaffold import ExportParameters, ExportScaffolder, properties

TYPE = "pg_exports.PostgresExport"
ATTRIBUTES = tuple(properties(PostgresExport))


@pytest.fixture(scope="module")
def project(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's code, and an instance of Dagster without a server."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(repository / "pyproject.toml", folder)
    shutil.copytree(repository / "pg_exports", folder / "pg_exports", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "home").mkdir()
    (folder / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\nnux: {enabled: false}\n")
    return folder


def dg_command(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "COLUMNS": "200",
        "DAGSTER_HOME": str(project / "home"),
        "PG_EXPORTS_TEAM_ID": "1",
        "PYTHONPATH": str(project),
    }
    program = str(Path(sys.executable).parent / "dg")
    return subprocess.run(
        [program, *words], cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def loaded(file: Path) -> PostgresExport:
    with contextlib.chdir(file.parent):
        component = PostgresExport.from_yaml_path(file)
    assert isinstance(component, CompositeYamlComponent)
    [export] = component.components
    assert isinstance(export, PostgresExport)
    return export


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where an export is to be, as dg has made it."""
    path = tmp_path / "purchases"
    path.mkdir()
    return path


def scaffold(folder: Path, **parameters: str | int) -> Path:
    """The file that the scaffolder writes, in this process."""
    request = dg.ScaffoldRequest(TYPE, folder, "yaml", None, ExportParameters.model_validate(parameters))
    ExportScaffolder().scaffold(request)
    return folder / "defs.yaml"


def test_a_scaffolded_export_passes_the_checks_and_is_listed(project: Path) -> None:
    scaffolded = dg_command(project, "scaffold", "defs", TYPE, "eu/purchases")
    assert scaffolded.returncode == 0, scaffolded.stdout + scaffolded.stderr
    in_python = dg_command(
        project, "scaffold", "defs", TYPE, "people", "--format", "python", "--model", "persons", "--interval", "week"
    )
    assert in_python.returncode == 0, in_python.stdout + in_python.stderr
    checked = dg_command(project, "check", "defs")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "YAML validated successfully" in checked.stdout
    listed = dg_command(project, "list", "defs")
    for name in ("purchases", "purchases_schedule", "people", "people_schedule"):
        assert f" {name} " in listed.stdout, listed.stdout + listed.stderr


def test_a_folder_that_is_there_stays_as_it_is(project: Path) -> None:
    before = (project / "pg_exports" / "defs" / "events" / "defs.yaml").read_text()
    scaffolded = dg_command(project, "scaffold", "defs", TYPE, "events")
    assert scaffolded.returncode != 0
    assert "already exists" in scaffolded.stdout + scaffolded.stderr
    assert (project / "pg_exports" / "defs" / "events" / "defs.yaml").read_text() == before


def test_two_exports_of_one_name_are_an_error_that_says_where_they_are(project: Path) -> None:
    scaffolded = dg_command(project, "scaffold", "defs", TYPE, "eu/events")
    assert scaffolded.returncode == 0, scaffolded.stdout + scaffolded.stderr
    checked = dg_command(project, "check", "defs")
    shutil.rmtree(project / "pg_exports" / "defs" / "eu" / "events")
    assert checked.returncode != 0
    said = "Two exports are called events, in pg_exports/defs/eu/events and pg_exports/defs/events: "
    assert f"{said}give one of them a `name` of its own." in checked.stdout + checked.stderr


def test_a_name_that_no_export_can_have_is_an_error_and_nothing_stays(project: Path) -> None:
    scaffolded = dg_command(project, "scaffold", "defs", TYPE, "page-views")
    assert scaffolded.returncode != 0
    assert (
        "Export page-views: `name` must be letters, digits and underscores. No file was written." in scaffolded.stderr
    )
    assert "Traceback" not in scaffolded.stderr
    assert not (project / "pg_exports" / "defs" / "page-views").exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"name": "2026_11"}, "must begin with a letter"),
        ({"interval": "hours"}, "`interval`: Input should be 'hour'"),
        ({"team_id": 0}, "`team_id` must be a team's number"),
        ({"interval": "week", "start": "2026-11-20"}, "is no boundary of `interval: week`"),
    ],
)
def test_an_option_that_no_export_can_have_is_an_error(
    tmp_path: Path, parameters: dict[str, str | int], message: str
) -> None:
    folder = tmp_path / str(parameters.get("name", "purchases"))
    folder.mkdir()
    with pytest.raises(click.ClickException, match=message):
        scaffold(folder, **parameters)
    assert not folder.exists()


def test_the_file_names_every_attribute_with_its_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_EXPORTS_TEAM_ID", "7")
    file = scaffold(folder)
    written = loaded(file)
    assert (written.key, written.team_id, written.table) == ("purchases", 7, "purchases")

    lines = [line.removeprefix("  ").removeprefix("# ") for line in file.read_text().splitlines()]
    assert [name for name in ATTRIBUTES if not any(line.startswith(f"{name}:") for line in lines)] == []

    # With every line in force it is the same export: what is commented out are the defaults.
    uncommented = [
        line.replace("  # ", "  ", 1) if line.startswith(tuple(f"  # {name}:" for name in ATTRIBUTES)) else line
        for line in file.read_text().splitlines()
    ]
    file.write_text("\n".join(uncommented))
    assert loaded(file) == written


@pytest.mark.parametrize("interval", ["hour", "day", "week", "every 5 minutes", "every 15 minutes"])
def test_the_start_of_a_scaffolded_export_is_a_recent_boundary(folder: Path, interval: str) -> None:
    [asset] = loaded(scaffold(folder, interval=interval, team_id=1)).build_defs(None).assets or []
    assert isinstance(asset, dg.AssetsDefinition)
    assert isinstance(asset.partitions_def, dg.TimeWindowPartitionsDefinition)
    age = datetime.now(UTC).timestamp() - asset.partitions_def.start_timestamp
    assert 0 < age < timedelta(days=8).total_seconds()


@pytest.mark.parametrize("name", ["null", "on", "Yes"])
def test_a_name_that_yaml_would_read_as_something_else_stays_a_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert loaded(scaffold(tmp_path / name, team_id=1)).key == name
