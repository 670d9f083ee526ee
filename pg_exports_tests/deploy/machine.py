"""A machine with systemd, of namespaces on this one: its own processes, services and file system; the network is this one's.

What is written there is gone with it: it lies in memory, over this machine's file system. Linux, root and systemd are needed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pg_exports_tests.faults import eventually

SYSTEMD = Path("/lib/systemd/systemd")
UNITS = Path("/lib/systemd/system")

_OWN = ("systemd-journald.service", "systemd-journald.socket", "dbus.service", "dbus.socket")
"""What the machine has of this one's units: `journalctl` and `systemd-run` take these."""

_TARGETS = {
    "basic": "dbus.socket systemd-journald.service",
    "sysinit": "",
    "sockets": "",
    "shutdown": "",
    "network-online": "",
    "multi-user": "",
}
"""And of the targets no more than the names, and what they start: this one's services stay here."""

_SPACES = ("unshare", "--mount", "--pid", "--fork", "--cgroup", "--uts", "--ipc")

# The arguments: the file system's folder, the one with what is laid over it, and what is mounted as `from:to`.
_BOOT = """
set -eu
root=$1 over=$2
shift 2
mount --make-rprivate /
mount -t tmpfs tmpfs "$root"
mkdir "$root/upper" "$root/work" "$root/machine"
mount -t overlay overlay -o "lowerdir=/,upperdir=$root/upper,workdir=$root/work" "$root/machine"
root=$root/machine
rm -rf "$root/etc/systemd/system" "$root/etc/fstab"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/dev"
for name in null zero full random urandom tty; do
    touch "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
cp -a "$over/." "$root/"
for pair in "$@"; do
    mkdir -p "$root${pair#*:}"
    mount --bind "${pair%%:*}" "$root${pair#*:}"
done
# A chroot would do, but that no process in one may have users of its own.
cd "$root"
mkdir former
pivot_root . former
umount -l former
exec env -i container=namespaces PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/systemd/transient \
    /lib/systemd/systemd --unit=basic.target --log-target=console --show-status=no
"""


@dataclass(frozen=True)
class Machine:
    """A machine that runs.

    Attributes:
        pid: of its first process, as this machine numbers it.
    """

    pid: int

    def run(self, *command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a program there, as root."""
        enter = (
            "nsenter",
            "--target",
            str(self.pid),
            "--mount",
            "--pid",
            "--uts",
            "--ipc",
            "--cgroup",
            "--root",
            "--wd",
        )
        done = subprocess.run((*enter, *command), capture_output=True, text=True, timeout=300, check=False)
        if check:
            assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def shell(self, script: str) -> str:
        """Run a shell's commands there, as root; all must succeed. What they print."""
        return self.run("bash", "-euc", script).stdout

    def log(self, unit: str) -> str:
        """The end of what a unit has printed."""
        return self.run("journalctl", "--no-pager", "--lines", "60", "--unit", unit, check=False).stdout


def is_possible() -> bool:
    """Whether this machine can have another one in it."""
    return (
        os.geteuid() == 0
        and SYSTEMD.exists()
        and (UNITS / "dbus.service").exists()
        and shutil.which("nsenter") is not None
        and _has_namespaces()
    )


def _has_namespaces() -> bool:
    command = (*_SPACES, "mount", "-t", "tmpfs", "tmpfs", "/mnt")
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def machine(folder: Path, over: Path, mounts: Mapping[Path, str]) -> Iterator[Machine]:
    """A machine for as long as the block lasts.

    Args:
        folder: an empty one.
        over: a folder with files that the machine has beside, or in place of, those of this one.
        mounts: folders of this machine, and where the other one has them.
    """
    units = over / "etc" / "systemd" / "system"
    units.mkdir(parents=True, exist_ok=True)
    for name in _OWN:
        shutil.copy(UNITS / name, units)
    for name, wanted in _TARGETS.items():
        (units / f"{name}.target").write_text(f"[Unit]\nDefaultDependencies=no\nWants={wanted}\n")
    root = folder / "root"
    root.mkdir()
    pairs: Sequence[str] = [f"{source}:{place}" for source, place in mounts.items()]
    # It does not outlive this process.
    command = ("setpriv", "--pdeathsig", "KILL", *_SPACES, "--kill-child", "bash", "-c", _BOOT)
    with (folder / "systemd.log").open("wb") as log:
        process = subprocess.Popen(
            (*command, "boot", str(root), str(over), *pairs), stdout=log, stderr=log, start_new_session=True
        )
    try:
        started: list[Machine] = []

        def has_started() -> bool:
            assert process.poll() is None, (folder / "systemd.log").read_text()[-3000:]
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            started[:] = [Machine(int(child)) for child in children]
            return (
                bool(started) and not started[0].run("systemctl", "is-active", "basic.target", check=False).returncode
            )

        eventually(has_started, 60)
        yield started[0]
    finally:
        # Its first process goes with this one, and with it all others and the file systems.
        process.send_signal(signal.SIGKILL)
        process.wait()
