"""A folder on the node's own disk with copies of a cache's shards, shared by all processes of the node that read it.

Its name holds the user's number and the cache's fingerprint, so runs on the same cache share it, whichever cache folder
they name. Two lock files say who is there:

    users     held shared by every process that reads here; the last one to leave removes the folder
    copier    held exclusively by the one process that copies and removes; when it leaves, another takes its place

So the room is counted once, however many processes and runs share the folder. The locks end with their processes.
What a killed process left is no copy to the next one that finds the folder unused: it is set aside under another name
and hashed before it counts again. The folder of another cache that nobody uses any more is removed.

A copy gets its name when its bytes are on the disk and their hash is that of the shard's record. The rows of a copy are
compared with their checksums again when they are read (distillery/reading/shard_files.py), so a copy that the disk
damages later is found too, and the cache's own file is read in its place.
"""

import contextlib
import errno
import fcntl
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

from distillery.cache.images import IMAGE_SHARDS
from distillery.cache.index import CacheIndex
from distillery.cache.store import record_path
from distillery.system.direct_io import drop_written, start_writeback
from distillery.system.errors import UserError
from distillery.system.files import (
    create_temporary,
    hash_file,
    open_regular,
    publish_no_clobber,
    temporary_name,
    write_all,
)

_USERS, _COPIER, _SET_ASIDE = "users", "copier", ".left"
_BLOCK_BYTES = 16 << 20  # of one read: between two of them the storage may turn to other requests
_ATTEMPTS = 20  # to enter a folder that others are removing


class SourceError(Exception):
    """The shard cannot be copied for a reason that lies with the cache: whoever reads it there meets that himself."""


class CopyFolder:
    """The copies of one cache's shards on this node.

    held: bytes of each copy, by the shard's position in the index; known to the copier alone.
    rejected: shards whose copy this process does not use again, as it could not be read or had damaged rows.

    Args:
        stage_dir: the folder that the user names.
        index: of the cache; verified.
    """

    def __init__(self, stage_dir: Path, index: CacheIndex) -> None:
        self.index = index
        self.path = stage_dir / f"distillery-{os.getuid()}-{index.fingerprint[:16]}"
        self.held: dict[int, int] = {}
        self.rejected: set[int] = set()
        self._users: int | None = None
        self._copier: int | None = None
        self._has_said = False
        self._removed: list[tuple[float, int]] = []  # (when, bytes) of copies removed lately

    # ---- for every process ---------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Become a user of the folder, which is made where there is none, and remove those that nobody uses any more.

        Raises:
            OSError: it cannot be made, or locked, or belongs to someone else.
        """
        for _ in range(_ATTEMPTS):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            status = self.path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                raise PermissionError(errno.EACCES, "it is not a folder of this user", str(self.path))
            try:
                users = _open_lock(self.path / _USERS)
            except FileNotFoundError:  # removed just now, by the last of its users
                continue
            try:
                if _lock(users, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    self._set_leftovers_aside()
                fcntl.flock(users, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(users), os.stat(self.path / _USERS)):
                    self._users, users = users, None
                    self._remove_abandoned()
                    return
            except FileNotFoundError:
                continue
            finally:
                if users is not None:
                    os.close(users)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self.path))

    def leave(self) -> None:
        """Stop using the folder; the last user removes it."""
        users, self._users = self._users, None
        if users is None:
            return
        with contextlib.suppress(OSError):
            if _lock(users, fcntl.LOCK_EX | fcntl.LOCK_NB):
                _remove_folder(self.path)
        os.close(users)
        if self._copier is not None:
            os.close(self._copier)
            self._copier = None

    def open(self, shard: int) -> int | None:
        """A descriptor of a shard's copy; None where there is none to use."""
        if not self.has(shard):
            return None
        try:
            return os.open(self._copy(shard), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:  # removed just now
            return None
        except OSError as error:
            self.reject(shard, os.strerror(error.errno or 0))
            return None

    def has(self, shard: int) -> bool:
        """Whether there seems to be a copy to use."""
        if shard in self.rejected:
            return False
        try:
            return os.stat(self._copy(shard), follow_symlinks=False).st_size == self.index.shard_bytes[shard]
        except OSError:
            return False

    def num_bytes(self) -> int:
        """Bytes of all that lies in the folder; 0 where it cannot be read."""
        try:
            with os.scandir(self.path) as entries:
                return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
        except OSError:  # not there yet, or changing at this moment
            return 0

    def reject(self, shard: int, reason: str) -> None:
        """Use a shard's copy no more; the cache's own file is read instead, and decides."""
        self.rejected.add(shard)
        self.say(f"{self._copy(shard)}: {reason}")

    def say(self, trouble: str) -> None:
        """Print a line on stderr about trouble with the stage disk, the first time."""
        if not self._has_said:
            self._has_said = True
            print(f"stage_dir: {trouble}. The cache itself is read instead", file=sys.stderr, flush=True)

    # ---- for the copier ------------------------------------------------------------------------------------------

    def become_copier(self, go_on: Callable[[], bool]) -> bool:
        """Whether this process copies from now on; False while another one does.

        It takes over what lies there: copies of its own list count, those set aside once they are hashed.

        Raises:
            OSError: the disk fails.
        """
        if self._copier is not None:
            return True
        copier = _open_lock(self.path / _COPIER)
        if not _lock(copier, fcntl.LOCK_EX | fcntl.LOCK_NB):
            os.close(copier)
            return False
        self._copier = copier
        self._take_over(go_on)
        return True

    def copy(self, shard: int, go_on: Callable[[], bool]) -> bool:
        """Copy a shard, comparing its hash; False where go_on() returned False meanwhile.

        Raises:
            SourceError: the cache does not give it, or not with the recorded hash. OSError: the stage disk fails.
        """
        expected = self._recorded_hash(shard)
        final = self._copy(shard)
        temporary = temporary_name(final)
        fd = create_temporary(temporary)
        try:
            if not self._copy_bytes(shard, fd, expected, go_on):
                return False
            # a disk may refuse bytes as late as this; without it they would be lost unnoticed after they were checked
            os.fsync(fd)
            publish_no_clobber(temporary, final)
        finally:
            os.close(fd)
            with contextlib.suppress(OSError):
                temporary.unlink()
        self.held[shard] = int(self.index.shard_bytes[shard])
        return True

    def remove(self, shard: int) -> None:
        """Remove a copy; its room is free when no process has it open any more."""
        self._copy(shard).unlink(missing_ok=True)
        self._removed.append((time.monotonic(), self.held.pop(shard, 0)))

    def bytes_removed_within(self, seconds: float) -> int:
        """Bytes of the copies that were removed in the last so many seconds."""
        self._removed = [(when, size) for when, size in self._removed if time.monotonic() - when < seconds]
        return sum(size for _, size in self._removed)

    def forget_lost(self) -> None:
        """Count the copies that somebody else has removed no more.

        Raises:
            OSError: the folder cannot be read, or is gone.
        """
        names = set(os.listdir(self.path))
        self.held = {shard: size for shard, size in self.held.items() if self.index.shard_names[shard] in names}

    # ---- inside --------------------------------------------------------------------------------------------------

    def _copy(self, shard: int) -> Path:
        return self.path / self.index.shard_names[shard]

    def _recorded_hash(self, shard: int) -> str:
        path = self.index.shard_path(shard)
        try:
            record = IMAGE_SHARDS.read_record(record_path(path))
        except (OSError, UserError) as error:
            # readers do without it, so nobody else would say so
            self.say(
                f"{record_path(path)} cannot be read or is damaged, so its shard is not copied. Run: python -m "
                f"distillery.cache verify {self.index.directory}, then stage 1 again"
            )
            raise SourceError(str(error)) from error
        found = (record["fingerprint"], record["bytes"], record["num_samples"])
        if found != (self.index.fingerprint, self.index.shard_bytes[shard], self.index.shard_rows[shard]):
            raise SourceError(f"{path}: its record is not of the shard that index.json lists")
        return record["hash"]

    def _copy_bytes(self, shard: int, fd: int, expected: str, go_on: Callable[[], bool]) -> bool:
        size = int(self.index.shard_bytes[shard])
        buffer, digest, position = memoryview(bytearray(min(size, _BLOCK_BYTES))), xxhash.xxh3_128(), 0
        try:
            source = open_regular(self.index.shard_path(shard))
        except (OSError, UserError) as error:
            raise SourceError(str(error)) from error
        with source:
            with contextlib.suppress(OSError):  # only a hint
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while position < size and (count := _read(source.fileno(), buffer[: size - position], position)):
                if not go_on():
                    return False
                digest.update(buffer[:count])
                write_all(fd, buffer[:count])
                start_writeback(fd, position, count)
                position += count
            # the pages of the copy are what will be read
            drop_written(source.fileno(), position)
        if f"xxh3_128:{digest.hexdigest()}" != expected:
            raise SourceError(f"{self.index.shard_path(shard)}: its bytes do not have the hash of its record")
        return True

    def _set_leftovers_aside(self) -> None:
        """Nobody else is here: what lies here was left by a process that was killed, or by a node that went down."""
        for path in self.path.iterdir():
            if path.name.startswith("."):
                path.unlink()
            elif path.suffix == ".pt":
                path.rename(path.with_name(path.name + _SET_ASIDE))

    def _take_over(self, go_on: Callable[[], bool]) -> None:
        numbers = {name: shard for shard, name in enumerate(self.index.shard_names)}
        for path in self.path.iterdir():
            shard = numbers.get(path.name.removesuffix(_SET_ASIDE))
            if path.name in (_USERS, _COPIER):
                continue
            if shard is None or not self._is_sound(path, shard):
                path.unlink()
                continue
            if path.name.endswith(_SET_ASIDE):
                path.rename(self._copy(shard))
            self.held[shard] = int(self.index.shard_bytes[shard])
            if not go_on():
                return

    def _is_sound(self, path: Path, shard: int) -> bool:
        """Whether a file that was found here can serve as the shard's copy."""
        if path.lstat().st_size != self.index.shard_bytes[shard]:
            return False
        if not path.name.endswith(_SET_ASIDE):  # another user's, made while this one's locks were held
            return True
        try:
            with open_regular(path) as file:
                return hash_file(file) == self._recorded_hash(shard)
        except (OSError, UserError, SourceError):
            return False

    def _remove_abandoned(self) -> None:
        """Remove this user's folders of other caches whose users were all killed."""
        for folder in self.path.parent.glob(f"distillery-{os.getuid()}-*"):
            if folder == self.path:
                continue
            with contextlib.suppress(OSError):  # somebody else's, or one that another process removes
                users = os.open(folder / _USERS, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    is_unused = _lock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if is_unused and os.path.samestat(os.fstat(users), os.stat(folder / _USERS)):
                        _remove_folder(folder)
                finally:
                    os.close(users)


def _remove_folder(folder: Path) -> None:
    """The lock file goes last: whoever waits for it sees then that it is gone, and makes the folder anew."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _USERS):
        path.unlink()
    folder.rmdir()


def _read(fd: int, buffer: memoryview, position: int) -> int:
    try:
        return os.preadv(fd, [buffer], position)
    except OSError as error:
        raise SourceError(os.strerror(error.errno or 0)) from error


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _lock(fd: int, operation: int) -> bool:
    """Whether a lock that is not waited for was granted."""
    try:
        fcntl.flock(fd, operation)
    except BlockingIOError:
        return False
    return True
