"""Start this program anew with no_streams.cpp loaded before torch; imports no torch itself."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("no_streams.cpp")
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
_FOLDER = "FAKE_CUDA_LIBRARY"


def why_not() -> str | None:
    """Why fake CUDA tensors cannot run a backward pass here; None where they can."""
    if sys.platform != "linux":
        return "fake CUDA tensors need LD_PRELOAD, which is Linux's"
    return None if COMPILER else "fake CUDA tensors need a C++ compiler (c++, g++ or clang++)"


def restart_with_library() -> None:
    """Replace this process by the same program with the library; in that program, do nothing.

    Call it before torch is imported.

    Raises:
        SystemExit: this machine cannot, or the library does not compile.
    """
    if _FOLDER in os.environ:
        # it is loaded: programs that this one starts do without
        del os.environ["LD_PRELOAD"]
        shutil.rmtree(os.environ.pop(_FOLDER))
        return
    if (problem := why_not()) is not None:
        raise SystemExit(problem)
    folder = tempfile.mkdtemp(prefix="fake_cuda_")
    library = f"{folder}/no_streams.so"
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", library, str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(folder)
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    # a real GPU stays out of it
    changes = {"LD_PRELOAD": library, _FOLDER: folder, "CUDA_VISIBLE_DEVICES": ""}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | changes)
