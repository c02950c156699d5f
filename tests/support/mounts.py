"""File systems made for tests: XFS and btrfs in a file, and sshfs from an SSH server of its own on this machine.

Nothing of the machine's own is touched but its packages: neither ~/.ssh nor the configuration of sshd.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from distillery.system.machine import file_system_of

IMAGE_BYTES = 600_000_000
NUM_CLIENTS = 3
# program -> Debian package
PROGRAMS = {
    "xfs": {"mkfs.xfs": "xfsprogs"},
    "btrfs": {"mkfs.btrfs": "btrfs-progs"},
    "sshfs": {"sshfs": "sshfs", "ssh": "openssh-client", "sshd": "openssh-server"},
}
_PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])  # where a user's PATH lacks them
_NO_START = Path("/usr/sbin/policy-rc.d")
_SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""


class NotHere(Exception):
    """This machine cannot have that file system; the message says why."""


def call(*command: str | Path) -> None:
    """Run a command; where it fails, NotHere with the end of what it prints."""
    environment = os.environ | {"PATH": _PATH, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        printed = " ".join((done.stderr or done.stdout or f"status {done.returncode}").split())
        raise NotHere(f"{command[0]}: {printed[-300:]}")


def install(kind: str) -> None:
    """Install the programs of a file system that are missing, with apt-get; no server is started by that."""
    missing = [package for name, package in PROGRAMS[kind].items() if shutil.which(name, path=_PATH) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise NotHere(f"{' and '.join(missing)} not installed, and there is no apt-get to install it with")
    made = not _NO_START.exists()
    if made:
        _NO_START.write_text("#!/bin/sh\nexit 101\n")
        _NO_START.chmod(0o755)
    try:
        call("apt-get", "update", "-q")
        call("apt-get", "install", "-y", "-q", "--no-install-recommends", *missing)
    finally:
        if made:
            _NO_START.unlink()


@contextlib.contextmanager
def mounted(kind: str, work: Path) -> Iterator[list[Path]]:
    """A folder on a file system of this kind, empty, as NUM_CLIENTS nodes have it; afterwards it is gone.

    Of sshfs they are mounts of their own, each with what it has cached; a disk has one node, so they are all the same.

    Args:
        kind: of PROGRAMS.
        work: an empty folder for the file system's own files, on an ordinary disk.
    Raises:
        NotHere: the kernel, a right or a program is missing.
    """
    install(kind)
    folders = [work / f"client{number}" for number in range(NUM_CLIENTS if kind == "sshfs" else 1)]
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(_ssh_server(work)) if kind == "sshfs" else None
        for folder in folders:
            folder.mkdir()
            if port is None:
                _mount_image(kind, work, folder)
            else:
                _mount_sshfs(work, folder, port)
            stack.callback(_unmount, folder)
            assert file_system_of(folder) == {"sshfs": "fuse.sshfs"}.get(kind, kind)
        yield folders * (NUM_CLIENTS // len(folders))


def _mount_image(kind: str, work: Path, folder: Path) -> None:
    image = work / "image"
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES)
    call(f"mkfs.{kind}", "-q", image)
    call("mount", "-t", kind, "-o", "loop", image, folder)


def _mount_sshfs(work: Path, folder: Path, port: int) -> None:
    options = {"IdentityFile": work / "user", "UserKnownHostsFile": work / "known_hosts", "IdentitiesOnly": "yes"}
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    # the user's own ~/.ssh/config plays no part
    call("sshfs", "-F", "/dev/null", "-p", str(port), *flags, f"127.0.0.1:{work / 'served'}", folder)


@contextlib.contextmanager
def _ssh_server(work: Path) -> Iterator[int]:
    """An sshd for one key that is made here; gives its port."""
    for name in ("host", "user"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", work / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (work / "known_hosts").write_text(f"[127.0.0.1]:{port} {(work / 'host.pub').read_text()}")
    (work / "served").mkdir()
    (work / "sshd_config").write_text(_SSHD.format(port=port, folder=work))
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd asks for it; a service would make it
    program = shutil.which("sshd", path=_PATH)  # it starts itself again, by its full name
    with (
        open(work / "sshd.log", "w") as log,
        subprocess.Popen([program, "-D", "-e", "-f", work / "sshd_config"], stderr=log) as server,
    ):
        try:
            _wait_for_port(port, server, work / "sshd.log")
            yield port
        finally:
            server.terminate()


def _wait_for_port(port: int, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if server.poll() is not None or time.monotonic() > deadline:
            raise NotHere(f"sshd does not answer: {(log.read_text().strip().splitlines() or ['?'])[-1]}")
        time.sleep(0.05)


def _unmount(folder: Path) -> None:
    for _ in range(20):  # a process that was killed just now may still have a file open
        try:
            call("umount", folder)
        except NotHere:
            time.sleep(0.25)
        else:
            return
    call("umount", "--lazy", folder)
