"""The bench's command, on a sandbox of its own: `python -m pg_exports_tests.bench --help`.

Each part is a module's (`peers`, `memory`, ...); here they are put in a row, shown, and written into their pages. The exit
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
from pg_exports.sandbox.servers import SOURCE_DATABASE
from pg_exports_tests.bench import peers, report
from pg_exports_tests.bench.processes import ROOT, BenchError
from pg_exports_tests.bench.report import Bar, Section

FOLDER = ROOT / ".bench"
README, CAPACITY = ROOT / "README.md", ROOT / "docs" / "capacity.md"

PEERS = "peers"
MODULES = {"memory": "memory", "merges": "merges", "small": "small_runs", "ranges": "ranges"}
"""The parts beside the peers, and which module measures each."""

SIZED = {
    "streams": "streams",
    "chunks": "chunks",
    "destinations": "destinations",
    "deduplicate": "deduplicate",
    "footprint": "footprint",
}
"""Those whose size follows `--events`; they are written into `CAPACITY`, all others into `README`."""

PARTS = (PEERS, *MODULES, *SIZED)


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
    broken = []
    with _sandbox() as sandbox:
        measured = report.circumstances(sandbox, datetime.now(UTC).date())
        _say(measured)
        for part in asked.only:
            try:
                section, bars = _measure(part, sandbox, asked)
            except BenchError as error:
                broken.append(part)
                _say(f"\n### {part}\n\nfailed: {error}\n")
                continue
            broken += [] if section.holds else [section.title]
            _say(f"\n{report.markdown(section)}\n")
            if asked.write:
                _write(part, measured, section, bars)
    if broken:
        _say(f"Does not hold: {'; '.join(broken)}.")
    return 1 if broken else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pg_exports_tests.bench", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="of the first load (default 1,000,000)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--only", type=_parts, default=PARTS, help=f"some of {','.join(PARTS)}, with commas")
    parser.add_argument("--write", action="store_true", help="into README.md and docs/")
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
        sandbox = servers.start(FOLDER, (SOURCE_DATABASE, "bench_*"))
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
    module = importlib.import_module(f"pg_exports_tests.bench.{(MODULES | SIZED)[part]}")
    measure = cast("Callable[..., Section]", module.measure)
    return measure(sandbox, asked.rounds, **({"events": asked.events} if part in SIZED else {})), []


def _write(part: str, measured: str, section: Section, bars: list[Bar]) -> None:
    """Write a part into its page, where the other parts stay as they are."""
    if bars:
        report.draw(bars, ROOT / report.CHART)
    page = CAPACITY if part in SIZED else README
    text = report.markdown(section, with_chart=bool(bars))
    page.write_text(report.rewritten(page.read_text(), part, measured, text, PARTS))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
