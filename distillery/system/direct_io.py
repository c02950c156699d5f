"""Hints to Linux about large files: bypass the page cache, reserve room, start write-back, drop pages."""

import contextlib
import ctypes
import fcntl
import functools
import os

# of memory and file, for writes past the page cache: a page, and more than a sector of any usual disk
ALIGNMENT_BYTES = 4096


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
    """Drop the file's bytes up to `end` from Linux's page cache, as far as they are on the disk.

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
