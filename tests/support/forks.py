"""The commands in forks of a process that has imported torch: a call takes a second instead of six.

That process is a program of its own and runs no model, so that its forks are as a fresh interpreter is. It serves one
call after another: python tests/support/forks.py, a line of JSON for each call and for each exit status.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
# what the trainer, evaluation, report and export import once their command line is parsed
MODULES = (
    "distill_trainer", "data_loader", "distillery.evaluate.during", "distillery.report.page",
    "distillery.report.pictures", "distillery.teacher_cache.opening", "distillery.training.estimate",
    "distillery.training.run", "timm", "torchvision", "torch._dynamo", "huggingface_hub",
)  # fmt: skip


def run_forked(script: str, *arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess:
    """A script of the repository, or a module of distillery or benchmarks, in a fork; what it prints is text."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        call = {"script": script, "arguments": arguments, "outputs": [str(path) for path in outputs]}
        server = _server()
        server.stdin.write(json.dumps(call | {"timeout_s": timeout_s}) + "\n")
        server.stdin.flush()
        status = json.loads(server.stdout.readline())
        texts = [path.read_text() for path in outputs]
    return subprocess.CompletedProcess([script, *arguments], status, *texts)


@functools.cache
def _server() -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.stdin.close)  # which ends it
    return server


def serve() -> None:
    """Answer each call on stdin with the exit status of a fork that does it."""
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a fork's collector would copy what it only looks at
    for line in iter(sys.stdin.readline, ""):
        if (pid := os.fork()) == 0:
            _do(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _do(script: str, arguments: list[str], outputs: list[str], timeout_s: float) -> NoReturn:
    """End this process as `python script` or `python -m script` would, but for taking all objects apart."""
    for descriptor, path in ((0, os.devnull), *enumerate(outputs, start=1)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.alarm(round(timeout_s))
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
    serve()
