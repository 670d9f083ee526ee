"""A node of Kubernetes as a run sees it: takes the Jobs that the launcher sends, and starts their containers' commands.

The API is Kubernetes's own over HTTP, the two requests that the launcher makes. A container is a process with the variables
of its pod alone; ConfigMaps and Secrets are those that the node was given. What a mount is for a path, the caller sees to.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Node:
    """A node that works in a folder of its own.

    Attributes:
        folder: where containers run and log, and where the launcher's kubeconfig is.
        objects: the data of ConfigMaps and Secrets, by name.
        jobs: the Jobs that were sent, by name.
    """

    folder: Path
    objects: Mapping[str, Mapping[str, str]]
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def kubeconfig(self) -> Path:
        """The file with the address of the node's API."""
        return self.folder / "kubeconfig"

    def start(self, job: str) -> None:
        """Start a Job's container."""
        [container] = self.jobs[job]["spec"]["template"]["spec"]["containers"]
        program, *words = container["args"]
        with (self.folder / f"{job}.log").open("wb") as log:
            self._processes[job] = subprocess.Popen(
                [Path(sys.executable).with_name(program), *words],
                cwd=self.folder,
                env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **self._variables(container)},
                stdout=log,
                stderr=log,
            )

    def wait(self, job: str) -> int:
        """The exit code of a Job's container."""
        return self._processes[job].wait(timeout=300)

    def kill(self, job: str) -> None:
        """End a Job's container as the kernel does where there is no memory left."""
        self._processes[job].send_signal(signal.SIGKILL)
        self._processes[job].wait(timeout=60)

    def log(self, job: str) -> str:
        """What a Job's container has printed."""
        return (self.folder / f"{job}.log").read_text()

    def status(self, job: str) -> dict[str, Any]:
        """A Job with its status. One container, never started twice."""
        process = self._processes.get(job)
        code = process.poll() if process else None
        counts = {"active": 1} if code is None else {"succeeded": 1} if code == 0 else {"failed": 1}
        return {**self.jobs[job], "status": counts}

    def _variables(self, container: Mapping[str, Any]) -> dict[str, str]:
        variables: dict[str, str] = {}
        for source in container["envFrom"]:
            [reference] = source.values()
            variables |= self.objects[reference["name"]]
        for entry in container["env"]:
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            variables[entry["name"]] = (
                self.objects[reference["name"]][reference["key"]] if reference else entry["value"]
            )
        return variables


@contextlib.contextmanager
def node(folder: Path, objects: Mapping[str, Mapping[str, str]]) -> Iterator[Node]:
    """A node whose API answers meanwhile."""
    running = Node(folder, objects)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(running))
    cluster = {"name": "node", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    context = {"name": "node", "context": {"cluster": "node", "user": "node"}}
    user = {"name": "node", "user": {"token": "none"}}
    running.kubeconfig.write_text(
        json.dumps({"clusters": [cluster], "contexts": [context], "users": [user], "current-context": "node"})
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
        for job in running._processes:
            running.kill(job)


def _handler(running: Node) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            running.jobs[job["metadata"]["name"]] = job
            self._answer(job, 201)

        def do_GET(self) -> None:
            name = self.path.removesuffix("/status").rpartition("/")[2]
            self._answer(running.status(name) if name in running.jobs else {}, 200 if name in running.jobs else 404)

        def log_message(self, *_: object) -> None:
            """Not into the tests' output."""

        def _answer(self, content: Mapping[str, Any], status: int) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
