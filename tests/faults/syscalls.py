"""The calls by which stage 1 changes a disk, counted, so that something can happen at the n-th."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# what is called, and whether that one call is of interest
CHANGES: dict[str, Callable[..., bool]] = {
    "open": lambda path, flags, *_rest, **_options: bool(flags & os.O_CREAT),
    "write": lambda *_args: True,
    "pwrite": lambda *_args: True,
    # shared memory is no change of a disk
    "ftruncate": lambda fd, _size: not os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"),
    "fsync": lambda *_args: True,
    "link": lambda *_args, **_options: True,
    "rename": lambda *_args, **_options: True,
    "replace": lambda *_args, **_options: True,
    "unlink": lambda *_args, **_options: True,
    "mkdir": lambda *_args, **_options: True,
    # network file systems report a full disk or a used-up quota as late as this
    "close": lambda fd: "/cache/" in os.readlink(f"/proc/self/fd/{fd}"),
}
ALL_BUT_CLOSE = tuple(name for name in CHANGES if name != "close")


@contextmanager
def watched(around: Callable, names: tuple[str, ...] = ALL_BUT_CLOSE) -> Iterator[None]:
    """Within, every such call goes through around(n, name, call, *args); n counts from 1, over all threads.

    `call` does the call with the arguments given to it. Threads take turns.
    """
    original = {name: getattr(os, name) for name in names}
    lock, count = threading.RLock(), [0]

    def wrap(name: str) -> Callable:
        def call(*args, **options):
            if not CHANGES[name](*args, **options):
                return original[name](*args, **options)
            with lock:
                count[0] += 1
                return around(count[0], name, lambda *given: original[name](*given, **options), *args)

        return call

    for name in names:
        setattr(os, name, wrap(name))
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(os, name, function)


@contextmanager
def killed_at(fatal: int, mode: str) -> Iterator[None]:
    """Within, this process dies before or after its n-th change of the disk, or in the middle of its n-th write."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def around(n, name, call, *args):
        if n == fatal and mode == "before":
            die()
        if n == fatal and mode == "half":
            call(args[0], args[1][: len(args[1]) // 2], *args[2:])
            die()
        try:
            return call(*args)
        finally:
            if n == fatal:
                die()

    with watched(around, ("write", "pwrite") if mode == "half" else ALL_BUT_CLOSE):
        yield
