"""Exports as a user writes them in YAML, in a Dagster project of their own: what they become, and how they are refused."""

import json
import textwrap
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._utils.error import serializable_error_info_from_exc_info

REQUIRED: dict[str, Any] = {"model": "events", "team_id": 7, "start": "2026-11-20"}

Load = Callable[..., dg.Definitions]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load(yaml, ...)`: the definitions of a project with these files, each the attributes of one export."""

    def definitions(*exports: str) -> dg.Definitions:
        return dg.load_from_defs_folder(path_within_project=project(tmp_path, *exports))

    monkeypatch.syspath_prepend(str(tmp_path))
    return definitions


def project(folder: Path, *exports: str) -> Path:
    """Write a Dagster project with a `defs.yaml` an export; gives its package."""
    package = folder / f"project_{uuid.uuid4().hex}"
    (folder / "pyproject.toml").write_text(
        f'[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "{package.name}"\n'
    )
    for number, attributes in enumerate(exports):
        defs = package / "defs" / f"export_{number}"
        defs.mkdir(parents=True)
        body = textwrap.indent(textwrap.dedent(attributes).strip(), "  ")
        (defs / "defs.yaml").write_text(f"type: pg_exports.PostgresExport\n\nattributes:\n{body}\n")
    for module in (package, package / "defs"):
        (module / "__init__.py").touch()
    (package / "definitions.py").write_text(
        "from pathlib import Path\n\nimport dagster as dg\n\n\n@dg.definitions\ndef defs():\n"
        "    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)\n"
    )
    return package


def yaml(**changes: Any) -> str:
    """An export's attributes as YAML (which JSON is)."""
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in (REQUIRED | changes).items())


def refusal(load: Load, *exports: str) -> str:
    """The whole text that the UI and `dg check defs` show for a project that does not load."""
    with pytest.raises(Exception, match=r".") as caught:
        load(*exports)
    info = (caught.type, caught.value, caught.tb)
    return serializable_error_info_from_exc_info(info).to_string()


def said(text: str) -> str:
    """The last message of a chain of errors, without the stack traces."""
    return text.rsplit("pg_exports.errors.SettingsError: ", 1)[1].split("\n\nStack Trace:")[0].strip()


def assets(definitions: dg.Definitions) -> dict[str, dg.AssetSpec]:
    found = [asset for asset in definitions.assets or [] if isinstance(asset, dg.AssetsDefinition)]
    return {spec.key.to_user_string(): spec for asset in found for spec in asset.specs}
