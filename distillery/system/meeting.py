"""Let the processes of a run find each other: each leaves its rank in a store of process 0.

torch would wait for the others for half an hour, print nothing and ignore signals. Here a thread waits. Meanwhile the
process prints which others are missing, reacts to requests to stop, and gives up after a limit.
"""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from distillery.system.errors import Interrupted, RunError, UserError
from distillery.system.launcher import World
from distillery.system.machine import environment_number, environment_text

# a launcher starts all within moments, but torch's import takes minutes on the file system of a busy cluster
LIMIT_MINUTES = 10.0
_SILENT_S = 3.0
# a name server may learn the name of a node that has just started a little later
_UNKNOWN_NAME_S = 10.0
# a process 0 that has just ended may hold its port a moment longer
_TAKEN_PORT_S = 3.0
_RETRY_S = 0.5
# torch's own for what processes exchange through the store afterwards
_STORE_TIMEOUT = timedelta(minutes=30)


def meet(world: World, address: str, port: int, is_stopped: Callable[[], bool] = lambda: False) -> dist.Store:
    """Wait until every process of `world` is here; a line on standard error says so if it takes more than moments.

    Args:
        world: this process among the others.
        address: host of process 0.
        port: on it.
        is_stopped: whether to leave; looked at all the time.
    Returns:
        The store, for init_process_group.
    Raises:
        UserError: the address is unknown, the port taken.
        RunError: not everyone came within LIMIT_MINUTES.
        Interrupted: is_stopped.
    """
    meeting = _Meeting(world, address, port)
    thread = threading.Thread(target=meeting.hold, daemon=True)
    thread.start()
    try:
        _wait(thread, meeting, is_stopped)
    finally:
        meeting.is_over.set()
    if meeting.error is not None:
        raise meeting.error
    return meeting.store


def _wait(thread: threading.Thread, meeting: "_Meeting", is_stopped: Callable[[], bool]) -> None:
    world, began, is_silent = meeting.world, time.monotonic(), True
    while thread.is_alive():
        thread.join(0.1)
        if is_stopped():
            raise Interrupted(
                "asked to stop before all processes were here: nothing to save. Run the same command again."
            )
        waited_s = time.monotonic() - began
        if waited_s > 60 * LIMIT_MINUTES:
            raise RunError(
                f"[{world}] gave up after {LIMIT_MINUTES:g} minutes of waiting for {meeting.others()}. Start all "
                f"{world.size} within that time. {world.alone}"
            )
        if is_silent and waited_s > _SILENT_S and thread.is_alive():
            is_silent = False
            print(f"[{world}] waiting for {meeting.others()}. {world.alone}", file=sys.stderr, flush=True)


class _Meeting:
    """What the waiting thread knows: store or error once it has ended, whom it waits for before that."""

    def __init__(self, world: World, address: str, port: int) -> None:
        self.world, self.address, self.port = world, address, port
        self.store: dist.Store | None = None
        self.error: Exception | None = None
        self.num_missing, self.obstacle = world.size - 1, ""
        self.is_over = threading.Event()

    def others(self) -> str:
        """'2 other processes of 8 at host:29500 (nobody answers there: connection refused)'."""
        noun = "process" if self.num_missing == 1 else "processes"
        why = f" ({self.obstacle})" if self.obstacle else ""
        return f"{self.num_missing} other {noun} of {self.world.size} at {self.address}:{self.port}{why}"

    def hold(self) -> None:
        """The thread: open the store, wait for the others, and begin again if process 0 goes and comes back."""
        while self.store is None and self.error is None and not self.is_over.is_set():
            try:
                self._check_name()
                store = self._open()
                self._gather(store)
                self.store = store
            except (OSError, dist.DistError) as error:
                self.obstacle = f"nobody answers there: {_short(error)}"
                self.num_missing = self.world.size - 1
                self.is_over.wait(_RETRY_S)
            except Exception as error:  # raised again in the main thread
                self.error = error

    def _check_name(self) -> None:
        deadline = time.monotonic() + _UNKNOWN_NAME_S
        while not self.is_over.is_set():
            try:
                socket.getaddrinfo(self.address, self.port)
                return
            except (socket.gaierror, UnicodeError) as error:
                self.obstacle = f"no host of this name is known: {_short(error)}"
                if time.monotonic() > deadline:
                    name = ascii(self.address)[1:-1][:80]
                    raise UserError(
                        f"MASTER_ADDR={name}: no host of this name is known here ({_short(error)}). Set it to the host "
                        f"of process 0, a name or an address without port. {self.world.alone}"
                    ) from error
                self.is_over.wait(_RETRY_S)

    def _open(self) -> dist.Store:
        """The store that process 0 serves or, under torchrun, its agent; this process's number is in it."""
        options = {"timeout": _STORE_TIMEOUT, "wait_for_workers": False}
        if self.world.rank == 0 and environment_text("TORCHELASTIC_USE_AGENT_STORE") != "True":
            store = self._listen(options)
        else:
            # torch's client prints a warning for every attempt: it is called once somebody answers
            socket.create_connection((self.address, self.port), timeout=10).close()
            self.obstacle = "something answers there, but not process 0 of a run"
            store = dist.TCPStore(self.address, self.port, self.world.size, is_master=False, **options)
        self.obstacle = ""
        store = dist.PrefixStore(f"distillery/{environment_number('TORCHELASTIC_RESTART_COUNT') or 0}", store)
        store.set(_key(self.world.rank), b"here")
        return store

    def _listen(self, options: dict) -> dist.Store:
        deadline = time.monotonic() + _TAKEN_PORT_S
        while True:
            try:
                return dist.TCPStore("127.0.0.1", self.port, self.world.size, is_master=True, **options)
            except dist.DistNetworkError as error:
                if time.monotonic() > deadline or self.is_over.is_set():
                    raise UserError(
                        f"MASTER_PORT={self.port}: process 0 cannot listen there: {_short(error)}. Another program, or "
                        f"another run, has it: set another port for all processes. {self.world.alone}"
                    ) from error
                self.is_over.wait(_RETRY_S)

    def _gather(self, store: dist.Store) -> None:
        missing = set(range(self.world.size))
        while missing and not self.is_over.is_set():
            missing = {rank for rank in missing if not store.check([_key(rank)])}
            self.num_missing = len(missing)
            if missing:
                self.is_over.wait(0.05)


def _key(rank: int) -> str:
    return f"process {rank}"


def _short(error: Exception) -> str:
    """What an error of the network says, without where in torch."""
    text = str(error).splitlines()[0]
    with contextlib.suppress(IndexError):
        text = text.split("message: ")[1]
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    return text[:120].rstrip(". ").lower()
