"""What Dagster would write down of its users, and send: nothing, of what `make` starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DG = Path(sys.executable).parent / "dg"


def written_by_dg(repository: Path, home: Path, environment: dict[str, str]) -> list[str]:
    """The files in the home folder of somebody who has `dg` list the components."""
    subprocess.run([DG, "list", "components"], cwd=repository, env=environment | {"HOME": str(home)}, check=True)
    return sorted(path.name for path in home.rglob("*") if path.is_file())


@pytest.fixture
def environment() -> dict[str, str]:
    """A shell's, in which nothing is said of Dagster."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("DAGSTER_", "DG_", "MAKE"))}


def test_nothing_is_written_down_of_what_make_has_dg_do(
    repository: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    makefile = "environment: ; @env --null"
    command = ["make", "--eval", makefile, "environment"]
    said = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=True).stdout
    by_make = dict(line.split("=", 1) for line in said.split("\0") if "=" in line)
    assert by_make["DAGSTER_DISABLE_TELEMETRY"]
    (tmp_path / "by make").mkdir()
    assert written_by_dg(repository, tmp_path / "by make", by_make) == []
    assert "event.log" in written_by_dg(repository, tmp_path, environment)
