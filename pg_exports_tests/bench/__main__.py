"""The bench's command, on a sandbox of its own: `python -m pg_exports_tests.bench --help`.

Each part is a module's (`peers`, `memory`, ...); here they are put in a row, shown, and written into the README. The exit
status is 1 where what the product promises does not hold.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from pg_exports.sandbox import Sandbox, servers
from pg_exports_tests.bench import peers, report
from pg_exports_tests.bench.processes import ROOT, BenchError
from pg_exports_tests.bench.report import Bar, Section

FOLDER = ROOT / ".bench"
README = ROOT / "README.md"

PEERS = "peers"
MODULES = {"memory": "memory", "merges": "merges", "small": "small_runs", "ranges": "ranges"}
"""The parts beside the peers, and which module measures each."""

PARTS = (PEERS, *MODULES)


def main() -> int:
    """Measure, show, and write."""
    asked = _arguments()
    if not Path("/proc/self/stat").exists():
        sys.stderr.write("The bench reads what processes cost from Linux's /proc, which is not here.\n")
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _stop_what_is_left()
    if asked.stop:
        return 0
    sections: list[Section] = []
    bars: list[Bar] = []
    with _sandbox() as sandbox:
        measured = report.circumstances(sandbox, datetime.now(UTC).date())
        _say(measured)
        for part in asked.only:
            try:
                section, more = _measure(part, sandbox, asked)
                bars += more
            except BenchError as error:
                section = Section(part, (), [], [f"failed: {error}"], holds=False)
            sections.append(section)
            _say(f"\n{report.markdown(section)}\n")
            if asked.write:
                _write(measured, sections, bars)
    broken = [section.title for section in sections if not section.holds]
    if broken:
        _say(f"Does not hold: {'; '.join(broken)}.")
    return 1 if broken else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pg_exports_tests.bench", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="of the first load (default 1,000,000)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--only", type=_parts, default=PARTS, help=f"some of {','.join(PARTS)}, with commas")
    parser.add_argument("--write", action="store_true", help=f"into the README and {report.CHART}")
    parser.add_argument("--stop", action="store_true", help="only stop what an earlier bench left running")
    return parser.parse_args()


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(PARTS)}")
    return parts


def _stop_what_is_left() -> None:
    left = servers.load(FOLDER)
    if left:
        servers.stop(left)


@contextlib.contextmanager
def _sandbox() -> Iterator[Sandbox]:
    """Both servers, for the block; ClickHouse's own connections to Postgres verify its certificate, too."""
    verify = {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": str(FOLDER / "certificates" / "ca.crt")}
    before = dict(os.environ)
    os.environ.update(verify)
    try:
        sandbox = servers.start(FOLDER)
    finally:
        for name in verify:
            os.environ.pop(name)
        os.environ.update(before)
    try:
        yield sandbox
    finally:
        servers.stop(sandbox)


def _measure(part: str, sandbox: Sandbox, asked: argparse.Namespace) -> tuple[Section, list[Bar]]:
    if part == PEERS:
        return peers.measure(sandbox, asked.rounds, asked.events, _say)
    module = importlib.import_module(f"pg_exports_tests.bench.{MODULES[part]}")
    measure = cast("Callable[[Sandbox, int], Section]", module.measure)
    return measure(sandbox, asked.rounds), []


def _write(measured: str, sections: list[Section], bars: list[Bar]) -> None:
    if bars:
        report.draw(bars, ROOT / report.CHART)
    page = report.page(measured, sections, with_chart=bool(bars))
    README.write_text(report.replaced(README.read_text(), page))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
