"""The commands in forks of a process that has imported torch: a call takes a second instead of six.

That process is a program of its own and runs no model, so that its forks are as a fresh interpreter is. It serves one
call after another: python tests/support/forks.py, a line of JSON for each call and for each exit status.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

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
    """Answer each call on stdin with the exit status of a fork that does it; in that fork, do it and return."""
    for module in MODULES:
        importlib.import_module(module)
    for line in iter(sys.stdin.readline, ""):
        call = json.loads(line)
        if (pid := os.fork()) == 0:
            _become(**call)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(script: str, arguments: list[str], outputs: list[str], timeout_s: float) -> None:
    """Do in this process what `python script` or `python -m script` does; SystemExit and other errors pass through."""
    import signal

    for descriptor, path in ((0, os.devnull), *enumerate(outputs, start=1)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.alarm(round(timeout_s))
    sys.argv = [str(ROOT / script), *arguments]
    if script.endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve()
