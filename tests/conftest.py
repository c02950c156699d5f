import io
import signal

import numpy as np
import pytest
from PIL import Image

from distillery.system.errors import remember_invocation

# begun last, one of them would keep a single core busy while the other has nothing left; those that take longest first
LONG_FILES = [
    "test_scripts.py", "test_benchmarks.py", "test_fake_cuda.py", "test_benchmarks_learning.py",
    "test_benchmarks_gpu.py", "test_kills.py", "test_onnx.py", "test_hub.py",
]  # fmt: skip


def pytest_configure(config):
    import torch

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's choice is not that of the programs tested
    torch.set_num_threads(1)  # test tensors are tiny: threads cost more than they bring, and change no result


def pytest_collection_modifyitems(items):
    """Long files first; the order of the others, and within a file, stays."""
    ranks = {name: rank for rank, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(autouse=True)
def forget_the_command():
    """What a command that ran in this process was given is not of the next test's messages."""
    yield
    remember_invocation({})


@pytest.fixture(scope="session")
def png_images() -> list[bytes]:
    """96 encoded colour images of 40 x 40 px, each with a pattern of its own."""
    rng = np.random.default_rng(0)
    images = []
    for number in range(96):
        pixels = rng.integers(0, 64, (40, 40, 3), dtype=np.uint8)
        pixels[number % 8 * 5 : number % 8 * 5 + 5] += np.uint8(100 + number)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return images


@pytest.fixture(scope="session")
def place(tmp_path_factory, png_images):
    """A workplace whose cache is made: 96 images of 32 px in 4 shards, an evaluation set of 96 and 32."""
    from workplace import Workplace

    place = Workplace(tmp_path_factory.mktemp("place"), png_images)
    done = place.precompute()
    assert done.returncode == 0, done.stderr
    return place
