"""Writing a shard's payload: the same file whatever the pieces, past the page cache or through it."""

import errno
import mmap
import os

import numpy as np
import pytest
import torch
import xxhash

from distillery.cache.archive import PAYLOAD_OFFSET
from distillery.precompute import image_shard
from distillery.precompute.image_shard import PayloadWriter, gap_before
from distillery.system.direct_io import ALIGNMENT_BYTES
from tests.support.caches import finish

ROWS = np.random.default_rng(0).integers(0, 256, (40, 3, 10, 11), dtype=np.uint8)
ROW_BYTES = ROWS[0].nbytes


def pieces_of(lengths: list[int]) -> list[memoryview]:
    """All rows in runs of these lengths, each in memory of its own, behind its gap."""
    first, found = 0, []
    for length in lengths:
        rows, gap = ROWS[first : first + length].tobytes(), gap_before(first * ROW_BYTES)
        memory = memoryview(mmap.mmap(-1, gap + len(rows)))
        memory[gap:] = rows
        found.append(memory)
        first += length
    assert first == len(ROWS)
    return found


def write(path, lengths: list[int]) -> tuple[int, str]:
    with open(path, "w+b") as file:
        payload = PayloadWriter(file.fileno())
        for memory in pieces_of(lengths):
            payload.write(memory)
        return finish(payload, "uint8", ROWS.shape, np.ones(len(ROWS), bool), None, "{}")


@pytest.fixture
def expected(tmp_path) -> bytes:
    write(tmp_path / "expected.pt", [40])
    return (tmp_path / "expected.pt").read_bytes()


@pytest.mark.parametrize("lengths", [[1] * 40, [13, 13, 13, 1], [39, 1], [1, 39], [25, 15]], ids=str)
@pytest.mark.parametrize("is_direct", [True, False])
def test_the_file_is_the_same_whatever_the_pieces_and_the_way(tmp_path, monkeypatch, expected, lengths, is_direct):
    if not is_direct:
        monkeypatch.setattr(image_shard, "bypass_page_cache", lambda _fd, _wanted: False)
    size, digest = write(tmp_path / "s.pt", lengths)
    data = (tmp_path / "s.pt").read_bytes()
    assert data == expected
    assert (size, digest) == (len(data), f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}")
    assert (torch.load(tmp_path / "s.pt", weights_only=True)["images"].numpy() == ROWS).all()


@pytest.mark.parametrize(
    "lengths", [[13_200], [1] * 200 + [13_000], [0, 3967, 2, 0, 4096, 5135, 0], [9000, 4200]], ids=str
)
@pytest.mark.parametrize("is_direct", [True, False])
def test_appended_pieces_of_any_length_give_the_same_file(tmp_path, monkeypatch, expected, lengths, is_direct):
    if not is_direct:
        monkeypatch.setattr(image_shard, "bypass_page_cache", lambda _fd, _wanted: False)
    data, first = ROWS.tobytes(), 0
    with open(tmp_path / "s.pt", "w+b") as file:
        payload = PayloadWriter(file.fileno())
        for length in lengths:
            payload.append(data[first : first + length])
            first += length
        finish(payload, "uint8", ROWS.shape, np.ones(len(ROWS), bool), None, "{}")
    assert first == len(data) and (tmp_path / "s.pt").read_bytes() == expected


def failing_pwrite(monkeypatch, number: int, fatal: int, *, written: int = 0) -> list[int]:
    """Have the fatal-th os.pwrite fail after so many bytes; returns the list of offsets that were written to."""
    pwrite, offsets = os.pwrite, []

    def call(fd, data, offset):
        offsets.append(offset)
        if len(offsets) == fatal:
            if written:
                return pwrite(fd, data[:written], offset)
            raise OSError(number, os.strerror(number))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", call)
    return offsets


def test_a_file_system_that_refuses_the_pages_gets_them_through_the_page_cache(tmp_path, monkeypatch, expected):
    monkeypatch.setattr(image_shard, "bypass_page_cache", lambda _fd, wanted: wanted)
    offsets = failing_pwrite(monkeypatch, errno.EINVAL, 2)
    write(tmp_path / "s.pt", [13, 13, 13, 1])
    assert offsets[1] == offsets[2] == PAYLOAD_OFFSET + 13 * ROW_BYTES - gap_before(13 * ROW_BYTES)
    assert (tmp_path / "s.pt").read_bytes() == expected


@pytest.mark.parametrize("written", [1, ALIGNMENT_BYTES - 1, ALIGNMENT_BYTES])
def test_a_short_write_is_completed(tmp_path, monkeypatch, expected, written):
    monkeypatch.setattr(image_shard, "bypass_page_cache", lambda _fd, _wanted: False)
    failing_pwrite(monkeypatch, 0, 1, written=written)
    write(tmp_path / "s.pt", [13, 27])
    assert (tmp_path / "s.pt").read_bytes() == expected


def test_after_an_error_nothing_more_is_taken_in_and_the_file_is_never_finished(tmp_path, monkeypatch):
    first, second, third = pieces_of([13, 13, 14])
    with open(tmp_path / "s.pt", "w+b") as file:
        payload = PayloadWriter(file.fileno())
        payload.write(first)
        failing_pwrite(monkeypatch, errno.EIO, 1)
        with pytest.raises(OSError, match="Input/output error"):
            payload.write(second)
        with pytest.raises(OSError, match="Input/output error"):
            payload.write(third)
        with pytest.raises(OSError, match="Input/output error"):
            finish(payload, "uint8", ROWS.shape, np.ones(len(ROWS), bool), None, "{}")


def test_a_file_that_shrank_under_the_writer_is_an_error_and_no_shard(tmp_path):
    with open(tmp_path / "s.pt", "w+b") as file:
        payload = PayloadWriter(file.fileno())
        for memory in pieces_of([20, 20]):
            payload.write(memory)
        os.ftruncate(file.fileno(), ALIGNMENT_BYTES)
        with pytest.raises(OSError, match="another program truncated it"):
            finish(payload, "uint8", ROWS.shape, np.ones(len(ROWS), bool), None, "{}")
