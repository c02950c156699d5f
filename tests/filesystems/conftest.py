import contextlib
from pathlib import Path

import pytest
from mounts import PROGRAMS, NotHere, mounted


@pytest.fixture(scope="session", params=sorted(PROGRAMS))
def file_system(request, tmp_path_factory) -> list[Path]:
    """Each of the file systems in turn, as several nodes have it; those that this machine cannot have are skipped."""
    with contextlib.ExitStack() as stack:
        try:
            folders = stack.enter_context(mounted(request.param, tmp_path_factory.mktemp(request.param)))
        except NotHere as reason:
            pytest.skip(f"no {request.param} here: {reason}")
        yield folders


@pytest.fixture
def nodes(file_system, request) -> list[Path]:
    """An empty folder for one test, as each of the nodes has it."""
    (file_system[0] / request.node.originalname).mkdir()
    return [folder / request.node.originalname for folder in file_system]


@pytest.fixture
def folder(nodes) -> Path:
    """The same of the first node."""
    return nodes[0]
