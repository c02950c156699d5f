"""The lock of a run folder."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from distillery.system.errors import UserError

LOCK_NAME = ".lock"
_PATIENCE_S = 60.0


class RunLock:
    """Keeps a second process out of a run folder, where the file system has locks; it ends with the process."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_NAME
        self._fd: int | None = None

    def take(self, *, create: bool) -> None:
        """Take the lock, unless it is held already; without `create` only where the file is there.

        Raises:
            UserError: another process has it and keeps it for a minute; with `create`, when it has been faster.
        """
        if self._fd is not None or not (create or self._path.exists()):
            return
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            raise UserError(f"checkpoint_dir {self._path.parent}: {os.strerror(error.errno)}: give another.") from error
        began = last = time.monotonic()
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
                in_use = f"{self._path.parent}: another process is training in this folder ({holder})"
                if last - began > (0.0 if create else _PATIENCE_S):
                    os.close(fd)
                    raise UserError(
                        f"{in_use}. Wait for it, or give another checkpoint_dir. If it is certain that it is gone, "
                        f"delete {self._path}."
                    ) from None
                if last == began and not create:
                    print(f"{in_use}; waiting up to {_PATIENCE_S:.0f} s for it", file=sys.stderr, flush=True)
                time.sleep(0.5)
                last = time.monotonic()
            except OSError:
                break  # no locks on this file system
        self._fd = fd
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{socket.gethostname()}, process {os.getpid()}".encode(), 0)
