"""The commands in forks of a process that has imported torch: a call takes a second instead of six.

That process is a program of its own and runs no model, so that its forks are as a fresh interpreter is. It serves one
call after another: python tests/support/forks.py MODULES, with a socket as its stdin.
"""

import contextlib
import functools
import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
# what the trainer, evaluation, report and export import once their command line is parsed
MODULES = (
    "distill_trainer", "data_loader", "distillery.evaluate.during", "distillery.report.page",
    "distillery.report.pictures", "distillery.teacher_cache.opening", "distillery.training.estimate",
    "distillery.training.run", "timm", "torchvision", "torch._dynamo", "huggingface_hub",
)  # fmt: skip
# a fork cannot change them: torch has read the one when it was imported, the interpreter the other when it started
OWN_VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
START_LIMIT_S = 180.0  # for the server's imports, on a busy machine


def run_forked(script: str, *arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess:
    """A script of the repository, or a module of distillery or benchmarks, in a fork; what it prints is text.

    The fork gets the environment of this moment, except OWN_VARIABLES. A variable that one of MODULES reads when it
    is imported, such as HF_ENDPOINT, has the effect that it had when the server started.

    Args:
        timeout_s: at this limit, in seconds, the fork and its children are killed.
    Raises:
        TimeoutError: the fork ran into the limit; the message has what it printed.
        RuntimeError: the server died or is stuck; the next call starts another one.
    """
    command = " ".join([script, *arguments])
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        call = {"script": script, "arguments": arguments, "outputs": outputs, "environment": dict(os.environ)}
        status = _answer(command, call, timeout_s)
        texts = [Path(path).read_text() for path in outputs]
    if status is None:
        raise TimeoutError(f"{command} timed out after {timeout_s:g} s. It printed:\n{''.join(texts)}")
    return subprocess.CompletedProcess([script, *arguments], status, *texts)


def _answer(command: str, call: dict, timeout_s: float) -> int | None:
    """The server's answer to a call: the exit status, None for a fork that ran into its limit."""
    server, calls = _server()
    try:
        calls.send((call, timeout_s))
        if calls.poll(START_LIMIT_S + timeout_s):
            return calls.recv()
        trouble = "did not answer"
    except (EOFError, OSError):
        trouble = "has ended"
    except BaseException:  # the answer that still comes would be taken for that of the next call
        _discard(server, calls)
        raise
    status = _discard(server, calls)
    raise RuntimeError(f"The server of forks {trouble}, its exit status is {status}. It was to run: {command}")


@functools.cache
def _server() -> tuple[subprocess.Popen, Connection]:
    """The process that forks, and the connection to it, whose end ends it."""
    ours, theirs = Pipe()
    with theirs:
        # in a session of its own: Ctrl-C ends the tests, which ends the connection, on which the server ends its fork
        server = subprocess.Popen(
            [sys.executable, __file__, *MODULES], cwd=ROOT, env=os.environ | OWN_VARIABLES, stdin=theirs,
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    return server, ours


def _discard(server: subprocess.Popen, calls: Connection) -> int:
    """The exit status of the server, which the next call will not use."""
    _server.cache_clear()
    calls.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(10.0)  # it kills its fork first
    server.kill()
    return server.wait()


def serve(modules: list[str]) -> None:
    """Answer each call with the exit status of a fork that does it."""
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a fork's collector would copy what it only looks at
    calls = Connection(sys.stdin.fileno())
    with contextlib.suppress(EOFError, BrokenPipeError):  # the tests have ended
        while True:
            call, timeout_s = calls.recv()
            if (pid := os.fork()) == 0:
                _do(**call)
            calls.send(_status(pid, timeout_s, calls))


def _status(pid: int, timeout_s: float, calls: Connection) -> int | None:
    """The exit status of a fork; None for one that ran into its limit, or whose caller is gone: it is killed."""
    deadline = time.monotonic() + timeout_s
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        # no call comes before the answer to the last one: what can be read is the end of the connection
        if calls.poll(0.01) or time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
    return os.waitstatus_to_exitcode(ended[1])


def _do(script: str, arguments: list[str], outputs: list[str], environment: dict[str, str]) -> NoReturn:
    """End this process with the status, and the last words, that `python script` or `python -m script` would have.

    What an interpreter does after that is skipped, as taking apart torch's objects takes long: functions of atexit,
    waiting for threads, ending multiprocessing's daemons, writing what is in the buffers of files left open.
    """
    os.setsid()  # its children are in its group and can be killed with it
    os.environ.clear()
    os.environ.update(environment | OWN_VARIABLES)
    sys.path[0] = str(ROOT)
    for descriptor, path in ((0, os.devnull), *enumerate(outputs, start=1)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv, status = [str(ROOT / script), *arguments], 1
    try:
        if script.endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1:])
