"""Hosts on one machine: network namespaces on a bridge, each of which can be cut off. Linux, root and iproute2 are needed.

A host reaches this machine's servers under the name `localhost`, which its own /etc/hosts maps to the bridge, so that their
certificates fit. What an earlier process left behind when it was killed is removed by the next one.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

PREFIX = "pgx"
"""Of bridges and namespaces: `pgx<pid>` and `pgx<pid>-<name>`."""

_HOSTS = Path("/etc/netns")
_CHUNK = 64 * 1024


class Network:
    """A bridge of this process, and the hosts on it."""

    def __init__(self) -> None:
        self._bridge = f"{PREFIX}{os.getpid()}"
        self._hosts: dict[str, int] = {}
        number = _free_subnet()
        self._subnet = f"10.77.{number}"
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.gateway}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    @property
    def gateway(self) -> str:
        """This machine's address, as the hosts see it."""
        return f"{self._subnet}.1"

    @property
    def addresses(self) -> str:
        """The hosts' addresses, as pg_hba.conf has them."""
        return f"{self._subnet}.0/24"

    def add(self, name: str) -> list[str]:
        """A new host. Gives the command that runs another one on it."""
        host = f"{self._bridge}-{name}"
        self._hosts[name] = len(self._hosts) + 2
        folder = _HOSTS / host
        folder.mkdir(parents=True)
        (folder / "hosts").write_text(f"{self.gateway} localhost\n")
        _ip("netns", "add", host)
        _ip("link", "add", self._cable(name), "type", "veth", "peer", "name", "eth0", "netns", host)
        _ip("link", "set", self._cable(name), "master", self._bridge, "up")
        _ip("-n", host, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        _ip("-n", host, "link", "set", "eth0", "up")
        _ip("-n", host, "link", "set", "lo", "up")
        return ["ip", "netns", "exec", host]

    def address(self, name: str) -> str:
        """A host's address."""
        return f"{self._subnet}.{self._hosts[name]}"

    def cut(self, name: str) -> None:
        """Take a host's cable out: no packet passes, and nobody is told."""
        _ip("link", "set", self._cable(name), "down")

    def heal(self, name: str) -> None:
        """Put it in again."""
        _ip("link", "set", self._cable(name), "up")

    def _cable(self, name: str) -> str:
        # At most 15 characters.
        return f"v{os.getpid()}n{self._hosts[name]}"


@contextlib.contextmanager
def network() -> Iterator[Network | None]:
    """A network for as long as the block lasts; None where this machine allows none."""
    if not _is_allowed():
        yield None
        return
    _remove_leftovers()
    try:
        yield Network()
    finally:
        _remove(f"{PREFIX}{os.getpid()}")


def _is_allowed() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"{PREFIX}{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "exec", name, "ip", "link", "set", "lo", "up")
        _ip("link", "add", name, "type", "bridge")
    except subprocess.CalledProcessError:
        return False
    finally:
        _remove(name)
    return True


def _free_subnet() -> int:
    used = {address["local"] for link in json.loads(_ip("-j", "addr")) for address in link["addr_info"]}
    return next(number for number in range(1, 255) if f"10.77.{number}.1" not in used)


def _remove_leftovers() -> None:
    """What belongs to a process that is gone, or that had this one's number."""
    links = {link["ifname"] for link in json.loads(_ip("-j", "link"))}
    spaces = {space["name"] for space in json.loads(_ip("-j", "netns") or "[]")}
    found = {match for name in links | spaces if (match := re.match(rf"{PREFIX}(\d+)", name))}
    for pid in {int(match[1]) for match in found}:
        if pid == os.getpid() or not Path(f"/proc/{pid}").exists():
            _remove(f"{PREFIX}{pid}")


def _remove(bridge: str) -> None:
    """A bridge with its hosts; their cables go with them."""
    for space in json.loads(_ip("-j", "netns") or "[]"):
        if re.fullmatch(rf"{bridge}(-.*)?", space["name"]):
            for process in _ip("netns", "pids", space["name"]).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), 9)
            _ip("netns", "del", space["name"])
    for folder in _HOSTS.glob(f"{bridge}-*"):
        shutil.rmtree(folder, ignore_errors=True)
    if any(link["ifname"] == bridge for link in json.loads(_ip("-j", "link"))):
        _ip("link", "del", bridge)


def _ip(*arguments: str) -> str:
    return subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def relay(address: str, port: int) -> Iterator[None]:
    """Pass on what reaches a port of an address to the same port of 127.0.0.1, for a server that listens there alone."""
    listener = socket.create_server((address, port))
    threading.Thread(target=_accept, args=(listener, port), daemon=True).start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _accept(listener: socket.socket, port: int) -> None:
    while True:
        try:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", port))
        except OSError:
            return
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            target.sendall(data)
    # Both ways end: HTTP and its clients close a connection as a whole.
    for side in (source, target):
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
