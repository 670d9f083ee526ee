"""`make audit`: secrets in the repository's files and history, and known vulnerabilities of the versions that are installed.

detect-secrets finds the former; no value is printed, and nothing is sent anywhere. pip-audit asks OSV for the latter.
The exit status is 1 if something was found, and 2 if nothing was found and vulnerabilities could not be looked up.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from detect_secrets.core.potential_secret import PotentialSecret
from detect_secrets.core.scan import scan_diff, scan_file
from detect_secrets.settings import get_settings, transient_settings

FOUND, NOT_LOOKED_UP = 1, 2

OSV = "https://api.osv.dev/v1/query"

REPOSITORY = Path(__file__).parent.parent

ALLOWED = Path(__file__).with_name("not_secrets.txt")
"""Values that detect-secrets takes for secrets, in files or in what they once were. One a line."""

NOT_SCANNED = (
    "deploy/requirements.txt",
    "pg_exports_tests/recorded/",
    "pg_exports_tests/not_secrets.txt",
    "docs/benchmark.svg",
)
"""Hashes of packages; what an earlier version wrote, with hashes of rows; the values that are allowed; a drawing."""

VULNERABLE = "jinja2==2.4.1"
"""Known to be vulnerable for years. A service that does not know it knows nothing."""

_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[.*?\])?==([^\s;\\]+)", re.MULTILINE)
_COMMIT = re.compile(r"^commit ([0-9a-f]{40})$", re.MULTILINE)


class LookUpError(Exception):
    """Vulnerabilities could not be looked up."""


def main(arguments: Sequence[str]) -> int:
    """Look for everything; print what was found. The exit status."""
    parser = argparse.ArgumentParser(prog="python -m pg_exports_tests.audit")
    parser.add_argument("--osv-url", default=OSV, help="of another service that answers as OSV does")
    options = parser.parse_args(arguments)
    found = False
    for what, places in (("files", secrets_in_files(REPOSITORY)), ("history", secrets_in_history(REPOSITORY))):
        _say(f"Secrets in the {what}: {len(places)}", *places)
        found = found or bool(places)
    if found:
        _say(
            f"What is no secret belongs into {ALLOWED.relative_to(REPOSITORY)}. A secret must be replaced where it is used."
        )
    if _is_shallow(REPOSITORY):
        _say("Only a part of the history is here: `git fetch --unshallow`.")
    try:
        vulnerable = vulnerabilities(pinned(), options.osv_url)
    except LookUpError as error:
        _say(f"Vulnerabilities: NOT LOOKED UP. {error}")
        return FOUND if found else NOT_LOOKED_UP
    _say(f"Vulnerabilities of {len(pinned())} versions: {len(vulnerable)}", *vulnerable)
    return FOUND if found or vulnerable else 0


def _say(*lines: str) -> None:
    sys.stdout.write("\n    ".join(lines) + "\n")
    sys.stdout.flush()


def secrets_in_files(repository: Path) -> list[str]:
    """Where something in the files looks like a secret: those that are in git, and those that would be added."""
    names = _git(repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    with _settings(), contextlib.chdir(repository):
        files = [name for name in names if name and not name.startswith(NOT_SCANNED)]
        return [_place(secret) for name in files for secret in scan_file(name)]


def secrets_in_history(repository: Path) -> list[str]:
    """The same for all lines that a commit of any branch has added, with the commit."""
    options = ("--all", "-m", "--patch", "--unified=0", "--no-color", "--no-ext-diff", "--format=commit %H")
    left_out = [f":(exclude){name}" for name in NOT_SCANNED]
    _, *parts = _COMMIT.split(_git(repository, "log", *options, "--", ".", *left_out))
    places: dict[str, None] = {}
    with _settings():
        # It would leave out files that are no more.
        get_settings().disable_filters("detect_secrets.filters.common.is_invalid_file")
        for commit, patch in zip(parts[::2], parts[1::2], strict=True):
            places.update({f"{commit[:12]} {_place(secret)}": None for secret in scan_diff(patch)})
    return list(places)


def _place(secret: PotentialSecret) -> str:
    return f"{secret.filename}:{secret.line_number}: {secret.type}"


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """All detectors but that of addresses, without verification by those whose secrets they would be."""
    detectors = [detector.__name__ for detector in get_mapping_from_secret_type_to_class().values()]
    allowed = [f"^{re.escape(line)}$" for line in ALLOWED.read_text().splitlines() if line and not line.startswith("#")]
    settings = {
        "plugins_used": [{"name": name} for name in detectors if name != "IPPublicDetector"],
        "filters_used": [{"path": "detect_secrets.filters.regex.should_exclude_secret", "pattern": allowed}],
    }
    with transient_settings(settings):
        yield


def _git(repository: Path, *words: str) -> str:
    done = subprocess.run(("git", *words), cwd=repository, capture_output=True, check=True)
    return done.stdout.decode(errors="replace")


def _is_shallow(repository: Path) -> bool:
    return _git(repository, "rev-parse", "--is-shallow-repository").strip() == "true"


def pinned() -> list[str]:
    """What is installed for development and for production, as `name==version`."""
    files = [REPOSITORY / "deploy" / name for name in ("constraints.txt", "requirements.txt")]
    found = {
        (re.sub(r"[-_.]+", "-", name).lower(), version)
        for file in files
        for name, version in _REQUIREMENT.findall(file.read_text())
    }
    return [f"{name}=={version}" for name, version in sorted(found)]


def vulnerabilities(requirements: Sequence[str], osv_url: str) -> list[str]:
    """The known vulnerabilities of some versions: each with its id, and the versions without it.

    Raises:
        LookUpError: the service did not answer for each of them, or does not know `VULNERABLE`.
    """
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text("".join(f"{requirement}\n" for requirement in (*requirements, VULNERABLE)))
        answers = _ask(listed, osv_url)
    lines = {
        f"{answer['name']}=={answer['version']}": [
            f"{answer['name']} {answer['version']}: {known['id']}, fixed in {', '.join(known['fix_versions']) or 'no version'}"
            for known in answer["vulns"]
        ]
        for answer in answers
    }
    if not lines.pop(VULNERABLE, None):
        raise LookUpError(f"{osv_url} knows of no vulnerability of {VULNERABLE}, so of none at all.")
    return [line for found in lines.values() for line in found]


def _ask(listed: Path, osv_url: str) -> list[dict[str, Any]]:
    """pip-audit's answers. Where it fails, and where it skips a package, its exit status does not tell."""
    service = ("--vulnerability-service", "osv", "--osv-url", osv_url)
    options = (
        "--no-deps",
        "--disable-pip",
        "--format",
        "json",
        "--progress-spinner",
        "off",
        "--requirement",
        str(listed),
    )
    command = (sys.executable, "-m", "pip_audit", *service, *options)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answers = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = done.stderr.strip().splitlines() or ["pip-audit said nothing"]
        raise LookUpError(f"{osv_url} cannot be asked: {reason[-1]}") from None
    skipped = [answer["name"] for answer in answers if "skip_reason" in answer]
    if skipped:
        raise LookUpError(f"{osv_url} says nothing of {', '.join(skipped)}.")
    return list(answers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
