"""What the bench has measured, as Markdown tables; what it writes of the README and other pages, and the chart beside it.

Only text and pictures are made here. What is measured is in `peers` and the modules beside it.
"""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pg_exports.sandbox import Sandbox

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
"""Between these lines a page is the bench's."""

MEASURED = "Measured by `make bench`: "

_PART = re.compile(r"<!-- bench:part (\w+), ([^\n]*) -->\n(.*?)(?=<!-- bench:part |\Z)", re.DOTALL)
"""A part of a page: its name, the circumstances, its text."""

CHART = Path("docs") / "benchmark.svg"
"""Below the repository's root."""

PACKAGES = (
    "dagster",
    "clickhouse-connect",
    "polars",
    "pyarrow",
    "adbc-driver-postgresql",
    "dlt",
    "psycopg",
)
"""Whose versions stand beside the figures."""

# Read on white and on black alike.
TEXT, BAR, OWN_BAR = "#76808a", "#8fa3b8", "#e8743b"


@dataclass(frozen=True)
class Section:
    """One question to the bench, and its answer.

    Attributes:
        title: the question, in a few words.
        header: names of the table's columns; the first is text, the others are figures.
        rows: the table.
        remarks: what to know about the figures, a sentence each.
        holds: whether what the product promises is kept.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    remarks: Sequence[str]
    holds: bool


@dataclass(frozen=True)
class Bar:
    """A bar of the chart: the median, between what the rounds were, and whether it is the product's or the limit's."""

    title: str
    seconds: float
    least: float
    most: float
    own: bool = False
    limit: bool = False


def markdown(section: Section, *, with_chart: bool = False) -> str:
    """A section as Markdown: title, chart, table, remarks."""
    chart = ["", f"![Seconds of a first load]({CHART.as_posix()})"] if with_chart else []
    rows = ["", table(section.header, section.rows)] if section.rows else []
    remarks = ["", *(f"- {remark}" for remark in section.remarks)] if section.remarks else []
    return "\n".join([f"### {section.title}", *chart, *rows, *remarks])


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [header, ("---", *("---:" for _ in header[1:])), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: str) -> str:
    return " ".join(value.replace("|", "\\|").split())


def circumstances(sandbox: Sandbox, day: date) -> str:
    """When and on what was measured, in a sentence."""
    with sandbox.clickhouse_client() as client:
        [(clickhouse,)] = client.query("SELECT version()").result_rows
    [(postgres,)] = sandbox.postgres.rows("SELECT split_part(current_setting('server_version'), ' ', 1)")
    programs: Mapping[str, object] = {
        "PostgreSQL": postgres,
        "ClickHouse": clickhouse,
        "Python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }
    versions = ", ".join(f"{name} {value}" for name, value in programs.items() if value)
    return f"{day:%Y-%m-%d}, {len(os.sched_getaffinity(0))} CPU cores, everything on one machine; {versions}."


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def rewritten(page: str, name: str, measured: str, text: str, order: Sequence[str]) -> str:
    """A page with the text of one part replaced, or added; what it has of the other parts stays.

    Args:
        page: the whole page.
        name: of the part.
        measured: the circumstances. They head the page while they are those of all its parts, and each part otherwise.
        text: the part's Markdown, from its title on.
        order: the names of all parts.

    Raises:
        ValueError: as `replaced`.
    """
    parts = {**_parts(page.partition(BEGIN)[2].partition(END)[0]), name: (measured, text)}
    alike = len({circumstances for circumstances, _ in parts.values()}) == 1
    lines = [f"{MEASURED}{measured}"] if alike else []
    for part in sorted(parts, key=order.index):
        circumstances, text = parts[part]
        title, _, rest = text.partition("\n")
        body = text if alike else f"{title}\n\n{MEASURED}{circumstances}\n{rest}"
        lines.append(f"<!-- bench:part {part}, {circumstances} -->\n{body}")
    return replaced(page, "\n\n".join(lines))


def _parts(text: str) -> dict[str, tuple[str, str]]:
    """Circumstances and text of each part."""
    parts = {}
    for name, circumstances, body in _PART.findall(text):
        parts[name] = circumstances, body.replace(f"\n\n{MEASURED}{circumstances}\n", "\n", 1).strip()
    return parts


def replaced(page: str, text: str) -> str:
    """A page with another text between the marks.

    Raises:
        ValueError: it has not each mark once, in this order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"The page must have {BEGIN} and {END} once, in this order.")
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


def draw(bars: Sequence[Bar], path: Path) -> None:
    """The chart, with a line at the limit, as an SVG that is the same for the same figures."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    with mpl.rc_context(
        {"svg.hashsalt": "pg_exports", "text.color": TEXT, "font.size": 10, "font.family": "DejaVu Sans"}
    ):
        figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.42 * len(bars)))
        places = range(len(bars))
        axes.barh(places, [bar.seconds for bar in bars], 0.62, color=[OWN_BAR if bar.own else BAR for bar in bars])
        spread = [[bar.seconds - bar.least for bar in bars], [bar.most - bar.seconds for bar in bars]]
        axes.errorbar([bar.seconds for bar in bars], places, xerr=spread, fmt="none", ecolor=TEXT, elinewidth=1)
        for place, bar in zip(places, bars, strict=True):
            axes.text(bar.most, place, f"  {bar.seconds:.1f} s", va="center")
        for limit in (bar for bar in bars if bar.limit):
            axes.axvline(limit.seconds, color=TEXT, linewidth=1, linestyle="--")
        axes.set_yticks(places, [bar.title.replace("`", "") for bar in bars])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("seconds from the first request to the commit", color=TEXT)
        axes.tick_params(colors=TEXT, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
