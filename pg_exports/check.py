"""The command that goes through the set-up of a project's exports: `python -m pg_exports.check [EXPORT ...]`.

It runs the jobs of `connection_check` in this process, in the folder of a Dagster project, with the variables of its `.env`.
Dagster's own storage is not needed.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg
from dagster.components.definitions import LazyDefinitions
from dotenv import dotenv_values

from pg_exports.connection_check import CONNECTION_CHECK, EXPORT, REASON, STEPS, Step
from pg_exports.errors import ExportError, SettingsError


def main() -> int:
    """Check the exports that are named, or all of them; 1 where something failed."""
    parser = argparse.ArgumentParser(
        prog="python -m pg_exports.check",
        description="Go through the set-up of exports: both servers, TLS, login, grants, tables. Nothing is written.",
    )
    parser.add_argument(
        "exports", nargs="*", metavar="EXPORT", help="an export's name (all of the project's by default)"
    )
    try:
        return _check(parser.parse_args().exports)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _check(names: Sequence[str]) -> int:
    # As `dg` does: the file wins over the environment.
    os.environ.update({name: value for name, value in dotenv_values(".env").items() if value is not None})
    with quiet():
        definitions = project_definitions()
        checks = {
            job.tags[EXPORT]: job
            for job in definitions.resolve_all_job_defs()
            if job.tags.get(REASON) == CONNECTION_CHECK
        }
    unknown = [name for name in names if name not in checks]
    if unknown or not checks:
        there = f"There are {', '.join(sorted(checks))}." if checks else "There are none."
        raise SettingsError(f"There is no export {', '.join(unknown) or 'to check'} in this project. {there}")
    shown: set[Step] = set()
    failed = 0
    for name in names or sorted(checks):
        sys.stdout.write(f"{name}\n")
        for step in _steps(checks[name]):
            # Exports share connections.
            text = "as above" if step in shown else step.text.replace("\n", f"\n{'':32}")
            sys.stdout.write(f"  {step.status:<12}{step.name:<18}{text}\n")
            sys.stdout.flush()
            shown.add(step)
            failed += step.status == "failed"
    sys.stdout.write("Nothing failed.\n" if not failed else f"{failed} failed.\n")
    return 1 if failed else 0


def _module() -> str:
    """The module of the project in this folder that has its definitions."""
    file = Path("pyproject.toml")
    settings = tomllib.loads(file.read_text()) if file.exists() else {}
    project = settings.get("tool", {}).get("dg", {}).get("project")
    if project is None:
        raise SettingsError(
            "There is no Dagster project in this folder (a pyproject.toml with [tool.dg.project]). Run this in its root."
        )
    return str(project.get("code_location_target_module") or f"{project['root_module']}.definitions")


def project_definitions() -> dg.Definitions:
    """What the project in this folder defines.

    Raises:
        SettingsError: there is no project, or it does not load.
    """
    name = _module()
    try:
        for value in vars(importlib.import_module(name)).values():
            found = value() if isinstance(value, LazyDefinitions) else value
            if isinstance(found, dg.Definitions):
                return found
    except Exception as error:  # noqa: BLE001 - whatever a project's modules raise
        raise SettingsError(f"The definitions of {name} do not load. {said(error)}") from None
    raise SettingsError(f"The module {name} has no definitions.")


def _steps(job: dg.JobDefinition) -> Sequence[Step]:
    try:
        with quiet(), dg.DagsterInstance.ephemeral() as instance:
            result = job.execute_in_process(instance=instance)
        [kept] = [event.step_output_data.metadata for event in result.all_events if event.is_successful_output]
    except dg.Failure as failure:
        kept = failure.metadata
    except Exception as error:  # noqa: BLE001 - whatever resources raise that cannot be made
        return [Step("Settings", "failed", said(error))]
    table = kept[STEPS]
    assert isinstance(table, dg.TableMetadataValue)
    return [Step(**record.data) for record in table.records]  # type: ignore[arg-type]  # as `connection_check` made them


def said(error: BaseException) -> str:
    """What is wrong, for a user: the error of this package's own that is behind it, or the first one."""
    for cause in _causes(error):
        if isinstance(cause, ExportError):
            return str(cause)
    return f"{type(cause).__name__}: {cause}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the log of Dagster's runs, and its warnings."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":
    sys.exit(main())
