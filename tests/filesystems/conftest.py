import contextlib
from pathlib import Path

import pytest
from mounts import PROGRAMS, NotHere, mounted


@pytest.fixture(scope="session", params=sorted(PROGRAMS))
def file_system(request, tmp_path_factory) -> Path:
    """A folder on each of the file systems, one after the other; those that this machine cannot have are skipped."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(mounted(request.param, tmp_path_factory.mktemp(request.param)))
        except NotHere as reason:
            pytest.skip(f"no {request.param} here: {reason}")
        yield folder


@pytest.fixture
def folder(file_system, request) -> Path:
    """An empty folder on the file system, for one test."""
    path = file_system / request.node.originalname
    path.mkdir()
    return path
