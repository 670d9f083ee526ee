"""Runs `make demo` and a short list of tests with other Pythons than this one: `python -m pg_exports_tests.python_versions`.

Without versions it takes every supported one but this; `python -m pg_exports_tests.python_versions 3.13` takes that one.
Each has a copy of the repository with a `.venv` of its own, which is deleted at the end. A Python that is not on this
machine is skipped.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VERSIONS = ("3.11", "3.12", "3.13")

MODULES = (
    "postgres/test_errors.py",
    "postgres/test_ingest.py",
    "postgres/test_session.py",
    "postgres/test_tls.py",
    "postgres/test_types.py",
    "test_backfill_command.py",
    "test_definitions.py",
    "test_metadata.py",
    "test_own_model.py",
    "test_read_ahead.py",
    "test_retries.py",
)
"""TLS, drivers and threads, Dagster's loading of definitions, its processes and what it stores, and a whole export."""

PROCESSES = 3

OF_A_CALLER = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")
"""Variables that say something about this Python, or about the `make` that started it."""


def main(versions: list[str]) -> int:
    """Test with some versions, one after the other. Gives 1 if something failed."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    lines = []
    failed = False
    for version in versions or [version for version in VERSIONS if version != own]:
        program = interpreter(version)
        if program is None:
            lines.append(f"Python {version}: skipped, it is not on this machine")
            continue
        began = time.monotonic()
        passed = test_with(program)
        lines.append(f"Python {version}: {'passed' if passed else 'FAILED'} in {time.monotonic() - began:.0f} s")
        failed = failed or not passed
    sys.stdout.write("\n" + "\n".join(lines) + "\n")
    return int(failed)


def interpreter(version: str) -> str | None:
    """The program of a Python version, if it is on this machine."""
    # pyenv's programs run the version that this names, and do nothing if it names none.
    environment = clean_environment() | {"PYENV_VERSION": version}
    command = [f"python{version}", "-c", "import ensurepip, sys; print(sys.executable)"]
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return None if ran.returncode else ran.stdout.strip()


def test_with(program: str) -> bool:
    """`make demo` and the tests in a copy of the repository."""
    # The sandbox's certificates and `.env` are in it, too: it is for the current user alone.
    with tempfile.TemporaryDirectory(prefix="pg_exports_python_") as folder:
        copy_repository(Path(folder))
        options = ["-m", "not slow", "--numprocesses", str(PROCESSES), "--dist", "loadscope", "--no-loadscope-reorder"]
        tests = [f"pg_exports_tests/{module}" for module in MODULES]
        try:
            return run(folder, "make", "demo", f"PYTHON={program}") and run(
                folder, ".venv/bin/python", "-m", "pytest", *options, *tests
            )
        finally:
            run(folder, "make", "clean")


def copy_repository(folder: Path) -> None:
    """Copy what is in git, or would be added to it."""
    repository = Path(__file__).parent.parent
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (repository / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / name, folder / name)


def run(folder: str, *command: str) -> bool:
    """Run a program in the copy. Gives whether it succeeded."""
    sys.stdout.flush()
    return subprocess.run(command, cwd=folder, env=clean_environment(), check=False).returncode == 0


def clean_environment() -> dict[str, str]:
    """The variables of this process without those of its caller."""
    return {name: value for name, value in os.environ.items() if name not in OF_A_CALLER}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
