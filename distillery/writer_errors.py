"""What an error of the system means for the one who makes a cache, and what to do."""

import errno
import os
from concurrent.futures.process import BrokenProcessPool

from distillery.cache.plan import CachePlan
from distillery.system.console import format_bytes
from distillery.system.errors import RunError, UserError
from distillery.system.files import NO_SPACE_ERRNOS
from distillery.system.machine import free_bytes

_DENIED_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS}


def explain_write_error(plan: CachePlan, error: Exception, shards_left: list[int], num_workers: int) -> Exception:
    """An error of the system, as what it means for the user."""
    if isinstance(error, BrokenProcessPool):
        return RunError(
            "a decode worker was killed, most likely by the system for want of memory. Everything published stays; "
            f"run the same command again with fewer workers (num_workers is {num_workers})."
        )
    if error.errno in NO_SPACE_ERRNOS:
        return RunError(_no_space_message(plan, error, shards_left))
    reason = f"{error.filename or plan.directory}: {os.strerror(error.errno) if error.errno else error}"
    if error.errno in _DENIED_ERRNOS:
        return UserError(
            f"the cache folder {plan.directory} cannot be written to ({reason}). Training reads it as it is; to go on "
            "making it, have its permissions changed, or give another cache_dir."
        )
    return RunError(
        f"{reason} (error {error.errno}) while writing the cache. Nothing doubtful was published; everything published "
        "stays. When the storage works again, run the same command again."
    )


def _no_space_message(plan: CachePlan, error: OSError, shards_left: list[int]) -> str:
    needed = sum(stop - start for start, stop in map(plan.rows_of, shards_left)) * plan.row_bytes
    what = {errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file-size limit (ulimit -f) was reached"}
    return (
        f"{plan.directory}: {what.get(error.errno, 'the disk is full')} ({os.strerror(error.errno)}). "
        f"{len(shards_left)} shards are left to make: {needed} bytes ({format_bytes(needed)}) needed, "
        f"{free_bytes(plan.directory)} bytes ({format_bytes(free_bytes(plan.directory))}) free. "
        "Everything published is intact; make room and run the same command again."
    )
