"""What this machine has: CPUs, memory, inodes, free bytes, and the type of a file system."""

import itertools
import math
import os
import re
from pathlib import Path

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


def environment_text(name: str) -> str | None:
    """An environment variable without blanks around it; None if it is unset or blank."""
    return os.environ.get(name, "").strip() or None


def environment_number(name: str) -> int | None:
    """An environment variable as a whole number >= 0; None if it is unset, blank or something else ("Unknown", "-3").

    Schedulers leave variables empty or put words into them; no caller may stumble over that.
    """
    text = environment_text(name) or ""
    # not isdigit: it takes characters that int() does not. 18 digits: what fits into 64 bits
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def usable_cpus() -> int:
    """CPUs this process may use: its affinity, SLURM_CPUS_PER_TASK and the cgroup's quota, whichever is least; of
    that its share where torchrun runs several processes on it.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if granted := environment_number("SLURM_CPUS_PER_TASK"):
        cpus = min(cpus, granted)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here: affinity and Slurm's variables decide
    return max(1, cpus // (environment_number("LOCAL_WORLD_SIZE") or 1))


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


def free_inodes(path: Path) -> int | None:
    """Files that the file system of `path`, which may not be there yet, still takes; None where it has no limit."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    return status.f_favail if status.f_files else None


def memory_left() -> int | None:
    """Bytes of memory this process may still take: what is free, or what its cgroups leave; None: not known."""
    try:
        words = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()
        return min(int(words[0]) * 1024, *_left_by_cgroups(Path("/sys/fs/cgroup")))
    except (OSError, IndexError, ValueError):
        return None


def _left_by_cgroups(root: Path) -> list[float]:
    """What the memory limits of this process's cgroup (v2, mounted at root) and of those above it leave, bytes.

    Page cache counts as free: the kernel drops it first.
    """
    left = [math.inf]
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return left
    name = next((line.removeprefix("0::/") for line in groups if line.startswith("0::/")), "")
    # in a container the name may be that on the host: then the root alone is there
    for group in (root, *(root / part for part in itertools.accumulate(Path(name).parts, os.path.join))):
        try:
            limit, used = ((group / f"memory.{what}").read_text().strip() for what in ("max", "current"))
            if limit != "max":
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                page_cache = int(counts["inactive_file"]) + int(counts["active_file"])
                left.append(int(limit) - int(used) + page_cache)
        except (OSError, ValueError, KeyError):
            continue
    return left
