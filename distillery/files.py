"""Files that are either whole or absent: atomic writes, no-clobber publishing, hashes of plain data."""

import contextlib
import ctypes
import errno
import fcntl
import functools
import getpass
import hashlib
import itertools
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from distillery.process import UserError

NETWORK_FILE_SYSTEMS = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb3",
    "fuse.sshfs",
    "9p",
    "afs",
    "wekafs",
    "panfs",
    "orangefs",
    "fuse.glusterfs",
    "fuse.juicefs",
}
NO_SPACE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# of memory and file, for writes past the page cache: a page, and more than a sector of any usual disk
ALIGNMENT_BYTES = 4096
# how often a file is written anew, from its data, in all; ENOENT and ESTALE: another process took the temporary file
# for a dead writer's leftover
ATTEMPTS_AFTER = {errno.EIO: 2, errno.ENOENT: 5, errno.ESTALE: 5}


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
        # also when it is there already: whoever made it may have died before this
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


def bypass_page_cache(fd: int, wanted: bool) -> bool:
    """Have writes to a file go straight to the disk, or no longer; returns whether they do now.

    They must then begin and end at multiples of ALIGNMENT_BYTES, in memory as in the file; where the file system cannot
    do it, or not with pages of that size, writes go on as before or fail with EINVAL. Durable they are only after
    fsync, as ever. Source: open(2), O_DIRECT; fcntl(2), F_SETFL.
    """
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~direct
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | direct if wanted else flags)
    except OSError:
        return False
    return wanted and direct != 0


def start_writeback(fd: int, offset: int, count: int) -> None:
    """Have Linux begin to write these bytes to the disk, without waiting: the fsync to come then has little left to do.

    Source: sync_file_range(2). A hint: where it is not known or fails, fsync does all the work and tells the error.
    """
    function = _libc_function("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if function is not None and count > 0:
        function(fd, offset, count, 2)  # SYNC_FILE_RANGE_WRITE


def may_try_again(error: OSError, failures: dict[int, int]) -> bool:
    """Whether what an error of the system hit is worth making anew, in new files.

    Never fsync the same file again: after a failed fsync the kernel may call lost pages clean.

    Args:
        error: the present one, which is counted.
        failures: errno -> how often it came up so far.
    """
    failures[error.errno] = failures.get(error.errno, 0) + 1
    return failures[error.errno] < ATTEMPTS_AFTER.get(error.errno, 1)


def reserve(fd: int, count: int) -> None:
    """Have Linux set room on the disk aside for the first `count` bytes; the file's size stays what it is.

    Writing to them and the fsync then cost less: the blocks need not be accounted for and sought page by page.
    Source: fallocate(2). A hint: where it is not known or fails, the writes find room or tell the error. Not
    os.posix_fallocate, which writes zeros where the file system cannot do it.
    """
    function = _libc_function("fallocate64", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if function is not None:
        function(fd, 1, 0, count)  # FALLOC_FL_KEEP_SIZE


def drop_written(fd: int, end: int) -> None:
    """Have Linux let go of its copies in memory of the file's bytes up to `end`, as far as they are on the disk.

    A stream of hundreds of GB would push everything else out of the page cache, and new pages are dear: in a virtual
    machine one can cost more than to fill it. Bytes not yet on the disk stay, so call it some way behind
    start_writeback. Source: posix_fadvise(2), POSIX_FADV_DONTNEED. A hint.
    """
    if end > 0 and hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, end, os.POSIX_FADV_DONTNEED)


@functools.cache
def _libc_function(name: str, *argtypes: type):
    """A function of the C library, None where it has no such function."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function.argtypes = argtypes
    return function


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


def file_system_of(path: Path) -> str:
    """The type of the file system that holds `path`, as /proc/mounts names it ('' where that cannot be read)."""
    try:
        mounts = Path("/proc/mounts").read_text()
    except OSError:
        return ""
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in mounts.splitlines():
        _, mount_point, file_system, *_ = line.split()
        mount_point = mount_point.replace("\\040", " ")
        inside = real == mount_point or real.startswith(mount_point.rstrip("/") + "/")
        if inside and len(mount_point) >= len(best):
            best, kind = mount_point, file_system
    return kind


def is_network_file_system(path: Path) -> bool:
    """Whether `path` lies on a network or parallel file system, where small reads are slow and mmap is risky."""
    return file_system_of(path) in NETWORK_FILE_SYSTEMS


def free_bytes(path: Path) -> int:
    """Bytes a user may still write where `path` lies or will lie (quotas can be tighter: they are not visible here)."""
    while not path.exists():
        path = path.parent
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize


def hash_file(file: BinaryIO) -> str:
    """XXH3-128 of an open file's bytes from its present position on, "xxh3_128:<hex>" as records have it."""
    return f"xxh3_128:{hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()}"


def format_bytes(count: float) -> str:
    """1234567 -> '1.2 MB' (powers of 1000, as disks are sold)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
