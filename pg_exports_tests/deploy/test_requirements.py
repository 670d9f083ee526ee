"""`deploy/requirements.txt`, what production installs: complete, at the tested versions, and nothing else is taken."""

import base64
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pg_exports_tests.python_versions import copy_repository

REPOSITORY = Path(__file__).parent.parent.parent
REQUIREMENTS = REPOSITORY / "deploy" / "requirements.txt"
CONSTRAINTS = REPOSITORY / "deploy" / "constraints.txt"
EXTRAS = ("celery", "kubernetes")

VERIFIED = "install --require-hashes --requirement deploy/requirements.txt"
PROJECT = "install --no-deps --no-index --no-build-isolation --editable ."
"""The arguments with which production installs: the packages, then the project without fetching anything."""

LARGEST = 400_000
"""Bytes of the file."""


def entries() -> dict[str, tuple[Requirement, list[str]]]:
    """Each package's requirement and hashes, by its canonical name."""
    text = REQUIREMENTS.read_text().split("\n\n", 1)[1].replace("\\\n", "")
    found: dict[str, tuple[Requirement, list[str]]] = {}
    for line in text.splitlines():
        requirement, *hashes = line.split("--hash=")
        parsed = Requirement(requirement)
        found[canonicalize_name(parsed.name)] = (parsed, [value.strip() for value in hashes])
    return found


def versions(requirement: Requirement) -> set[str]:
    return {str(specifier) for specifier in requirement.specifier}


def needed(requirement: Requirement, seen: set[str]) -> Iterator[str]:
    """The canonical names of a requirement and of all that it requires here."""
    for extra in ("", *requirement.extras):
        place = f"{canonicalize_name(requirement.name)}[{extra}]"
        if place in seen:
            continue
        seen.add(place)
        yield canonicalize_name(requirement.name)
        for text in importlib.metadata.requires(requirement.name) or ():
            further = Requirement(text)
            if further.marker is None or further.marker.evaluate({"extra": extra}):
                yield from needed(further, seen)


def test_each_package_has_one_version_and_hashes_and_no_address() -> None:
    assert len(entries()) > 100
    for name, (requirement, hashes) in entries().items():
        [version] = versions(requirement)
        assert version.startswith("=="), name
        assert requirement.url is None
        assert hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), name
    assert "://" not in REQUIREMENTS.read_text()
    assert REQUIREMENTS.stat().st_size < LARGEST


def test_no_package_is_built_from_its_source() -> None:
    assert "--only-binary :all:" in REQUIREMENTS.read_text().splitlines()


def test_the_versions_are_those_that_were_tested() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    tested: dict[str, set[str]] = {
        canonicalize_name(parsed.name): versions(parsed) for parsed in map(Requirement, lines)
    }
    for name, (requirement, _) in entries().items():
        assert tested.get(name, versions(requirement)) == versions(requirement), name
    on_linux = {
        name
        for name, (requirement, _) in entries().items()
        if requirement.marker is None or requirement.marker.evaluate({"sys_platform": "linux"})
    }
    # `dagster` requires it, and whichever there is will do.
    assert on_linux - set(tested) == {"setuptools"}


def test_nothing_that_production_needs_is_missing() -> None:
    pytest.importorskip("dagster_celery", reason="dagster-celery is not installed: `make cluster`")
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    project, build = pyproject["project"], pyproject["build-system"]
    direct = [*project["dependencies"], *build["requires"]]
    for extra in EXTRAS:
        direct += project["optional-dependencies"][extra]
    seen: set[str] = set()
    names = {name for text in direct for name in needed(Requirement(text), seen)}
    # `hatchling` imports it to install a project in editable form, and requires it nowhere.
    assert names | {"editables"} <= set(entries())


def test_a_package_with_other_contents_is_refused(tmp_path: Path) -> None:
    requirement, hashes = entries()["six"]
    [version] = versions(requirement)
    forged = wheel(tmp_path, "six", version.removeprefix("=="), {"six.py": "raise SystemExit('taken')\n"})
    listed = tmp_path / "requirements.txt"
    listed.write_text(f"six{version} " + " ".join(f"--hash={value}" for value in hashes))
    refused = install(tmp_path, listed)
    assert refused.returncode == 1
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in refused.stderr
    listed.write_text(f"six{version} --hash=sha256:{hashlib.sha256(forged.read_bytes()).hexdigest()}")
    assert install(tmp_path, listed).returncode == 0


def install(folder: Path, listed: Path) -> "subprocess.CompletedProcess[str]":
    """Install what a file lists from the wheels in a folder, as production does, but that it goes to a folder."""
    options = ("--no-index", "--find-links", folder, "--target", folder / "installed")
    command = (sys.executable, "-m", "pip", "install", "--require-hashes", "--requirement", listed, *options)
    # A machine's own settings may name other places.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return subprocess.run(
        command,
        env=environment | {"PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A wheel with these files, in good order."""
    information = f"{name}-{version}.dist-info"
    contents = {
        **files,
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{information}/RECORD"
    lines = []
    for path, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text.encode())}\n")
    made = folder / f"{name}-{version}-py2.py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in {**contents, record: "".join(lines) + f"{record},,\n"}.items():
            archive.writestr(path, text)
    return made


@pytest.mark.parametrize(
    "page", ["docs/set-up.md", "docs/cluster.md", "docs/operations.md", "deploy/kubernetes/Dockerfile"]
)
def test_whoever_sets_up_a_production_installs_from_it(page: str) -> None:
    text = re.sub(r"\\\n\s*|--(no-cache-dir|disable-pip-version-check) ", "", (REPOSITORY / page).read_text())
    assert re.findall(r"venv/bin/pip (install .*?\S)(?= &&|\n)", text)[:2] == [VERIFIED, PROJECT]


@pytest.mark.slow
def test_an_empty_environment_becomes_a_production(tmp_path: Path) -> None:
    copy_repository(tmp_path)
    venv.create(tmp_path / ".venv", with_pip=True)
    python = tmp_path / ".venv" / "bin" / "python"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "DAGSTER"))
    }
    for arguments in (VERIFIED, PROJECT):
        command = (str(python), "-m", "pip", *arguments.split())
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    program = (
        "import dagster_celery, dagster_k8s, importlib.metadata, pg_exports;"
        "print(pg_exports.__file__, *(found.name for found in importlib.metadata.distributions()), sep='\\n')"
    )
    done = subprocess.run([python, "-c", program], cwd="/", env=environment, capture_output=True, text=True, check=True)
    package, *installed = done.stdout.splitlines()
    assert package == str(tmp_path / "pg_exports" / "__init__.py")
    assert {canonicalize_name(name) for name in installed} - {"pip"} <= {"pg-exports", *entries()}
