"""What `dg scaffold defs pg_exports.PostgresExport NAME` writes: an export's file with every attribute in it, explained.

The attributes are read from the component itself; `export` names this scaffolder, and knows nothing else of it.
"""

import contextlib
import json
import re
import textwrap
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
import dagster as dg
from pydantic import BaseModel, ValidationError

from pg_exports.component import sentence
from pg_exports.errors import SettingsError

if TYPE_CHECKING:
    from pg_exports.export import PostgresExport

_TEAM = "PG_EXPORTS_TEAM_ID"
_WIDTH = 100

# Text that YAML reads as text without quotes.
_PLAIN = re.compile("(?!(?:true|false|null|none|yes|no|on|off|y|n)$)[a-z][a-z0-9_ -]*", re.IGNORECASE)


class ExportParameters(BaseModel):
    """The options of `dg scaffold defs pg_exports.PostgresExport`.

    Attributes:
        model, interval, start, team_id: the export's attributes of these names. `start` is yesterday (of weeks, the Sunday
            before) unless it is given, and the team that of the environment variable PG_EXPORTS_TEAM_ID.
    """

    model: str = "events"
    interval: str = "hour"
    start: str | None = None
    team_id: int | None = None


class ExportScaffolder(dg.Scaffolder[ExportParameters]):
    """Writes an export's `defs.yaml`, or its `component.py` with `--format python`.

    The folder's name becomes the export's name and its table's.
    """

    @classmethod
    def get_scaffold_params(cls) -> type[ExportParameters]:
        """The options that the command takes."""
        return ExportParameters

    def scaffold(self, request: dg.ScaffoldRequest[ExportParameters]) -> None:
        """Write the file.

        Raises:
            click.ClickException: the name or an option is none that an export can have; no file is written.
        """
        given = request.params
        chosen: dict[str, Any] = {
            "name": request.target_path.name,
            "model": given.model,
            "team_id": given.team_id,
            "start": given.start or _yesterday(given.interval),
            "interval": given.interval,
            "table": request.target_path.name,
        }
        problem = _problem(chosen | {"team_id": 1 if given.team_id is None else given.team_id})
        if problem:
            with contextlib.suppress(OSError):
                # dg has made the folder already, and would refuse the next try.
                request.target_path.rmdir()
            raise click.ClickException(f"{problem} No file was written.")
        if request.scaffold_format == "python":
            (request.target_path / "component.py").write_text(_python(chosen))
        else:
            (request.target_path / "defs.yaml").write_text(_yaml(request.type_name, chosen))


def properties(component: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """A component's attributes by their names in YAML, each as its JSON schema has it, with its description."""
    attributes = component.model_json_schema(by_alias=True)["properties"]
    in_resolvers = {
        field.alias or name: resolver.description
        for name, field in component.model_fields.items()
        for resolver in field.metadata
        if isinstance(resolver, dg.Resolver)
    }
    return {name: {"description": in_resolvers.get(name) or ""} | attribute for name, attribute in attributes.items()}


def as_yaml(value: Any) -> str:
    """A value as it is written behind an attribute's name; nothing for None."""
    if value is None:
        return ""
    return str(value) if isinstance(value, date) or _PLAIN.fullmatch(str(value)) else json.dumps(value)


def _yesterday(interval: str) -> date:
    day = datetime.now(UTC).date() - timedelta(days=1)
    return day - timedelta(days=day.isoweekday() % 7) if interval == "week" else day


def _problem(chosen: Mapping[str, Any]) -> str | None:
    if chosen["name"][0].isdigit():
        # Of quoted digits, too, Dagster's templates make a number.
        return f"Export {chosen['name']}: the folder's name becomes the export's `name`, and must begin with a letter."
    try:
        _export()(**chosen).build_defs(None)
    except SettingsError as error:
        return str(error)
    except ValidationError as error:
        return f"Export {chosen['name']}: {sentence(error)}."
    return None


def _export() -> "type[PostgresExport]":
    # `export` names the scaffolder, so that it cannot be imported before it.
    from pg_exports.export import PostgresExport

    return PostgresExport


def _yaml(type_name: str, chosen: Mapping[str, Any]) -> str:
    known = properties(_export())
    values = {**chosen, "team_id": chosen["team_id"] or f"{{{{ env.{_TEAM} }}}}"}
    lines = [
        f"type: {type_name}",
        "",
        "# `dg check defs` says what is wrong in here. The lines that are commented out have the defaults.",
        "attributes:",
    ]
    for name in (*values, *(name for name in known if name not in values)):
        lines += textwrap.wrap(known[name]["description"], _WIDTH, initial_indent="  # ", subsequent_indent="  # ")
        mark, value = ("", values[name]) if name in values else ("# ", known[name].get("default"))
        lines += [f"  {mark}{name}: {as_yaml(value)}".rstrip(), ""]
    return "\n".join(lines[:-1]) + "\n"


def _python(chosen: Mapping[str, Any]) -> str:
    team = chosen["team_id"] or f'int(os.environ["{_TEAM}"])'
    values = [f'    {name}="{chosen[name]}",' for name in ("name", "model", "start", "interval", "table")]
    lines = [
        *([] if chosen["team_id"] else ["import os", ""]),
        "import dagster as dg",
        "",
        "from pg_exports import PostgresExport",
        "",
        "",
        "@dg.component_instance",
        "def load(context: dg.ComponentLoadContext) -> PostgresExport:",
        f'    """The export {chosen["name"]}."""',
        "    return PostgresExport(",
        *(f"    {value}" for value in (*values, f"    team_id={team},")),
        "    )",
    ]
    return "\n".join(lines) + "\n"
