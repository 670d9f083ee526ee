"""ClickHouse's engine out of the wheel `chdb-core`: the one module that uses what is private in that wheel.

`_chdb.query` runs ClickHouse's LocalServer, a whole server without listeners; its statement `SYSTEM START LISTEN` opens them.
LocalServer reads `config.xml` of the current folder. Read in chdb-core 26.9.0; earlier than 26.7 it does not listen.
How the server is configured, started and stopped is in the modules beside this one.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "chdb-core"

TESTED_VERSION = "26.9.0"
"""Of the package; `deploy/constraints.txt` has the same."""

Run = Callable[[str], None]
"""Runs statements separated by semicolons; returns when the last one has ended and the engine has shut down."""


class EngineError(Exception):
    """The installed package has no engine that can be a server, or a statement failed."""


def load() -> Callable[[Path], Run]:
    """Load the engine into this process. What it returns makes, of a folder for the data, the function that runs statements.

    A process runs statements once: the engine ends with them.

    Raises:
        EngineError: the package is not installed, or lacks the entry point.
    """
    module = _module()
    query: Any = getattr(module, "query", None)
    if query is None:
        raise _unfit("its module _chdb has no function `query`")

    def for_folder(data: Path) -> Run:
        def run(statements: str) -> None:
            result = query(statements, "TSV", path=str(data))
            if result.has_error():
                raise _explained(result.error_message())

        return run

    return for_folder


def _module() -> ModuleType:
    """The wheel's extension module, without `import chdb`, which starts an engine of its own."""
    package = importlib.util.find_spec("chdb")
    folders = list(package.submodule_search_locations or ()) if package else []
    files = [file for folder in folders for file in Path(folder).glob("_chdb*.so")]
    if not files:
        raise _unfit("its module _chdb was not found")
    [file, *_] = files
    spec = importlib.util.spec_from_file_location("_chdb", file)
    assert spec
    assert spec.loader
    # The module looks for libraries beside it in the current folder.
    with contextlib.chdir(file.parent):
        # So that its symbols are found before those of other libraries in the process.
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(file), mode=sys.getdlopenflags() | getattr(os, "RTLD_DEEPBIND", 0))
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            raise _unfit(str(error)) from error
    return module


def _explained(message: str) -> EngineError:
    if "SYNTAX_ERROR" in message and "LISTEN" in message:
        return _unfit(f"it cannot open ClickHouse's ports: {message}")
    return EngineError(message)


def _unfit(reason: str) -> EngineError:
    try:
        installed = f"{PACKAGE} {importlib.metadata.version(PACKAGE)} is installed"
    except importlib.metadata.PackageNotFoundError:
        installed = f"{PACKAGE} is not installed"
    return EngineError(
        f"The sandbox's ClickHouse server needs {PACKAGE} {TESTED_VERSION}; {installed}, and {reason}. "
        f"Install it: pip install '{PACKAGE}=={TESTED_VERSION}'"
    )
