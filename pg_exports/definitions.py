"""The code location's entry point: loads what is in `defs/`, and nothing else."""

import functools
from pathlib import Path

import dagster as dg


@dg.definitions
def defs() -> dg.Definitions:
    """Everything under `defs/`."""
    return _loaded()


# Dagster asks for the definitions six times in a `dg launch`, of 0.1 s each. A reload is a new process.
@functools.cache
def _loaded() -> dg.Definitions:
    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
