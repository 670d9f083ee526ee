"""`make audit`: what it finds in files and history, and what it says of vulnerabilities with and without an answer."""

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detect_secrets", reason="detect-secrets is not installed: `make audit`")

from pg_exports_tests import audit

# None of them is in this file as it stands, as the audit looks here, too.
KEY = "AKIA" + "QWERTYUIOPASDFGH"
TOKEN = "ghp_" + 4 * "16C7e42F2"


def git(repository: Path, *words: str) -> None:
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@example.com")
    subprocess.run(("git", *identity, *words), cwd=repository, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a secret in a file that is not in git yet, one in the history, and a password of tests."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "gone.py").write_text(f'client = connect("{KEY}")\n')
    (tmp_path / "stays.py").write_text('password = "wrong"\n')
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "First")
    git(tmp_path, "rm", "--quiet", "gone.py")
    git(tmp_path, "commit", "--quiet", "--message", "Second")
    (tmp_path / "new.py").write_text(f'\ntoken = "{TOKEN}"\n')
    (tmp_path / "ignored.py").write_text(f'token = "{TOKEN}"\n')
    return tmp_path


def test_a_secret_is_found_in_a_file_before_it_is_committed_and_is_not_printed(repository: Path) -> None:
    found = audit.secrets_in_files(repository)
    assert "new.py:2: GitHub Token" in found
    assert {place.split(":")[0] for place in found} == {"new.py"}
    assert TOKEN not in str(found)


def test_a_secret_is_found_in_the_history_when_its_file_is_no_more(repository: Path) -> None:
    found = audit.secrets_in_history(repository)
    [first] = {place.split()[0] for place in found}
    assert f"{first} gone.py:1: AWS Access Key" in found
    assert KEY not in str(found)


@pytest.mark.slow
def test_this_repository_has_none() -> None:
    if not (audit.REPOSITORY / ".git").exists():
        pytest.skip("no repository")
    assert audit.secrets_in_files(audit.REPOSITORY) == []
    assert audit.secrets_in_history(audit.REPOSITORY) == []


# Vulnerabilities.


def test_all_versions_that_are_installed_are_looked_up() -> None:
    names = [requirement.partition("==")[0] for requirement in audit.pinned()]
    assert {"setuptools", "ruff", "dagster", "celery"} <= set(names)
    assert len(names) == len(set(names))


def known(name: str, identity: str, fixed: str) -> dict[str, Any]:
    """OSV's answer of a vulnerability, in its own shape."""
    span = {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": fixed}]}
    affected = {"package": {"name": name, "ecosystem": "PyPI"}, "ranges": [span]}
    return {"id": identity, "summary": "Something can be done.", "affected": [affected]}


KNOWN = {"jinja2": known("jinja2", "PYSEC-2019-217", "2.10.1")}
"""What every service knows."""


@contextlib.contextmanager
def service(vulnerable: Mapping[str, Any], status: int = 200) -> Iterator[str]:
    """A service that answers as OSV does, and its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = vulnerable.get(asked["package"]["name"])
            body = json.dumps({"vulns": [found]} if found else {}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Not into the tests' output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()


def test_a_version_that_is_known_to_be_vulnerable_is_named_with_what_fixes_it() -> None:
    with service(KNOWN | {"six": known("six", "PYSEC-1", "1.17.1")}) as url:
        found = audit.vulnerabilities(["six==1.17.0", "click==8.5.1"], url)
    assert found == ["six 1.17.0: PYSEC-1, fixed in 1.17.1"]


def test_without_known_vulnerabilities_nothing_is_said() -> None:
    with service(KNOWN) as url:
        assert audit.vulnerabilities(["six==1.17.0", "click==8.5.1"], url) == []


@pytest.mark.parametrize("status", [404, 500])
def test_a_service_that_fails_is_no_good_news(status: int) -> None:
    with service(KNOWN, status) as url, pytest.raises(audit.LookUpError, match="cannot be asked"):
        audit.vulnerabilities(["six==1.17.0"], url)


def test_nor_is_one_that_knows_nothing() -> None:
    with service({}) as url, pytest.raises(audit.LookUpError, match="knows of no vulnerability of jinja2"):
        audit.vulnerabilities(["six==1.17.0"], url)


def test_nor_is_one_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "constraints.txt").write_text("six==1.17.0\n")
    (tmp_path / "deploy" / "requirements.txt").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "Nothing secret")
    monkeypatch.setattr(audit, "REPOSITORY", tmp_path)
    nobody = "http://127.0.0.1:9/v1/query"
    assert audit.main(["--osv-url", nobody]) == audit.NOT_LOOKED_UP
    assert f"Vulnerabilities: NOT LOOKED UP. {nobody} cannot be asked" in capsys.readouterr().out
    with service(KNOWN) as url:
        assert audit.main(["--osv-url", url]) == 0
    assert "Vulnerabilities of 1 versions: 0" in capsys.readouterr().out
