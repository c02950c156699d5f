"""Files that are either whole or absent: atomic writes, publishing that never overwrites, hashes of plain data."""

import contextlib
import errno
import fcntl
import getpass
import hashlib
import itertools
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from distillery.system.errors import UserError

NO_SPACE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# how often a file is written anew, from its data, in all; ENOENT and ESTALE: another process took the temporary file
# for a dead writer's leftover
ATTEMPTS_AFTER = {errno.EIO: 2, errno.ENOENT: 5, errno.ESTALE: 5}
MAX_MEMBER_BYTES = 512 << 20
CHUNK_BYTES = 4 << 20


def expand_path(text: str | os.PathLike) -> Path:
    """A path with ~ and $VARIABLES expanded; $USER falls back to the login name (it is unset in many containers).

    Raises:
        UserError: a variable is not set, or the path begins with an empty one: it would lead to another place.
    """

    def value_of(match: re.Match) -> str:
        name = match.group(1) or match.group(2)
        value = os.environ.get(name)
        if name == "USER" and not value:
            with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
                return getpass.getuser()
        if value is None or (match.start() == 0 and not value.strip()):
            what = "not set" if value is None else "empty"
            raise UserError(f"{text}: the environment variable ${name} is {what}. Set it, or write the path out.")
        return value

    expanded = re.sub(r"\$(?:\{(\w+)\}|(\w+))", value_of, os.fspath(text))
    try:
        return Path(expanded).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: the home folder that ~ stands for is not known. Write the path out.") from error


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, no NaN; what fingerprints are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_of(value: Any) -> str:
    """SHA-256 (hex) of a plain value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def fsync_dir(directory: Path) -> None:
    """Make the directory's entries durable: without it a renamed file may be gone after a power loss."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:  # SMB and some FUSE file systems have no such call
            raise
    finally:
        os.close(fd)


def make_directory(directory: Path) -> None:
    """Make a folder with its parents, durably: what is published in it must not vanish with it after a power loss."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
    try:
        # also for an existing folder: the process that made it may have died before this line
        fsync_dir(directory.parent)
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS}:  # then it was not made just now
            raise


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer uses and that no reader takes for a finished file."""
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:12]}")


def create_temporary(path: Path) -> int:
    """Create a temporary file and lock it, for as long as the descriptor returned is open.

    The lock only tells other processes that the writer lives; nothing depends on it, and some file systems have none.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def is_locked(path: Path) -> bool | None:
    """Whether a living process holds `path` as create_temporary does; None where that cannot be known.

    Raises:
        FileNotFoundError: the file is gone.
    """
    try:
        # for writing: NFS turns flock into a byte-range lock, which it grants for writing only
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)
    return False


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte: os.write may stop short on a nearly full disk without an error."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """write_all at a position of the file."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash at any instant leaves the old file or the new one, complete.

    Source: Pillai et al., All File Systems Are Not Created Equal, OSDI 2014.
    """
    for attempt in itertools.count(1):
        temporary = temporary_name(path)
        try:
            fd = create_temporary(temporary)
            try:
                write_all(fd, data)
                # fsync before replace: after a node crash a renamed but empty file looks complete
                os.fsync(fd)
                os.replace(temporary, path)
            finally:
                os.close(fd)
            fsync_dir(path.parent)
            return
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            # a new file with all the data each time: fsync is never tried twice on the same one
            number = error.errno if isinstance(error, OSError) else None
            if attempt >= ATTEMPTS_AFTER.get(number, 1) or not path.parent.is_dir():
                raise


def may_try_again(error: OSError, failures: dict[int, int]) -> bool:
    """Whether what an error of the system hit is worth making anew, in new files.

    Never fsync the same file again: after a failed fsync the kernel may call lost pages clean.

    Args:
        error: the present one, which is counted.
        failures: errno -> how often it came up so far.
    """
    failures[error.errno] = failures.get(error.errno, 0) + 1
    return failures[error.errno] < ATTEMPTS_AFTER.get(error.errno, 1)


def publish_no_clobber(temporary: Path, final: Path) -> bool:
    """Give a finished temporary file its final name, unless that name is taken: then the temporary file stays.

    Returns:
        True when this call published, False when another file already stands there.
    Raises:
        FileNotFoundError: the temporary file is gone.
    """
    try:
        os.link(temporary, final)
    except FileExistsError:
        # an NFS server may answer EEXIST to the retry of a link that succeeded
        if not os.path.samestat(os.lstat(temporary), os.lstat(final)):
            return False
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}:
            raise
        # no hard links on this file system; two writers of one name write the same bytes, so a rename is harmless
        if os.path.lexists(final):
            return False
        os.rename(temporary, final)
    temporary.unlink(missing_ok=True)
    fsync_dir(final.parent)
    return True


def hash_file(file: BinaryIO) -> str:
    """XXH3-128 of an open file's bytes from its present position on, "xxh3_128:<hex>" as records have it."""
    return f"xxh3_128:{hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()}"


def holds(path: Path, content: bytes) -> bool:
    """Whether there is a regular file with these very bytes."""
    try:
        return stat.S_ISREG(path.lstat().st_mode) and read_regular(path, len(content)) == content
    except (OSError, UserError):
        return False


def read_blocks(file, count: int) -> Iterator[memoryview]:
    """The next `count` bytes of an unbuffered file, in blocks of one buffer that is used again; fewer at its end."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(1, count))))
    while count > 0 and (size := file.readinto(buffer[:count])):
        yield buffer[:size]
        count -= size


def read_regular(path: os.PathLike, max_bytes: int = MAX_MEMBER_BYTES) -> bytes:
    """A whole small file, opened by open_regular.

    Raises:
        UserError: it is larger than max_bytes.
    """
    with open_regular(path) as file:
        data = b"".join(map(bytes, read_blocks(file, max_bytes + 1)))
    if len(data) > max_bytes:
        raise UserError(f"{path}: larger than {max_bytes} bytes; no file of this kind is.")
    return data


def open_regular(path: os.PathLike):
    """Open for reading, refusing symbolic links, devices and pipes: a name in a cache folder must be a plain file.

    Raises:
        UserError: it is something else. OSError: it is not there, or may not be read.
    """
    # O_NONBLOCK: opening a FIFO would otherwise wait for a writer
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            reason = "is a symbolic link; a cache folder may itself be one, its files may not"
        elif error.errno == errno.ENXIO:
            reason = "is not a regular file"
        else:
            raise
        raise UserError(f"{path} {reason}.") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(f"{path} is not a regular file.")
    return os.fdopen(fd, "rb", buffering=0)
