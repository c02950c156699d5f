import json
import os
import zipfile

import numpy as np
import pytest
import torch

from distillery.cache.archive import crc32, read_meta
from distillery.cache.fields import digest_file, frame_of, place_fields
from distillery.system.errors import UserError

SPECS = {"pooled": ("float16", (5, 2, 3)), "tokens": ("int8", (5, 2, 4, 7)), "logits": ("float32", (5, 2, 1))}


def write_shard(path, specs=SPECS, meta="{}"):
    rng = np.random.default_rng(0)
    fields = place_fields(specs)
    data = {field.name: rng.integers(0, 60, field.size, dtype=np.uint8).tobytes() for field in fields}
    valid = np.arange(next(iter(specs.values()))[1][0]) != 1
    with open(path, "wb") as file:
        for field in fields:
            file.seek(field.offset)
            file.write(data[field.name])
        for offset, piece in frame_of(fields, [crc32(data[field.name]) for field in fields], {"valid": valid}, meta):
            file.seek(offset)
            file.write(piece)
    return fields, data, valid


def test_a_shard_is_a_plain_file_for_torch(tmp_path):
    _, data, valid = write_shard(tmp_path / "shard.pt", meta=json.dumps({"a": 1}))
    found = torch.load(tmp_path / "shard.pt", weights_only=True)
    assert [*found] == ["pooled", "tokens", "logits", "valid", "meta"]
    for name, (dtype, shape) in SPECS.items():
        assert (found[name].dtype, tuple(found[name].shape)) == (getattr(torch, dtype), shape)
        assert found[name].numpy().tobytes() == data[name]
    assert found["valid"].numpy().tolist() == valid.tolist()
    assert json.loads(read_meta(tmp_path / "shard.pt")) == {"a": 1}


def test_every_tensor_is_aligned_and_where_it_was_said_to_be(tmp_path):
    fields, data, _ = write_shard(tmp_path / "shard.pt")
    content = (tmp_path / "shard.pt").read_bytes()
    for field in fields:
        assert field.offset % 64 == 0
        assert content[field.offset : field.end] == data[field.name]
    assert fields[1].row_bytes == 28


def test_a_digest_gives_what_the_shard_was_made_of(tmp_path):
    import xxhash

    fields, data, valid = write_shard(tmp_path / "shard.pt")
    digest = digest_file(tmp_path / "shard.pt", fields, 1 << 20)
    assert digest.frame == frame_of(fields, digest.crcs, {"valid": valid}, "{}")
    for field in fields:
        views = [data[field.name][i : i + field.row_bytes] for i in range(0, field.size, field.row_bytes)]
        assert digest.checksums[field.name].tolist() == [xxhash.xxh3_64_intdigest(view) for view in views]
    content = (tmp_path / "shard.pt").read_bytes()
    assert (digest.size, digest.hash) == (len(content), f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}")


def test_each_flipped_byte_shows_in_the_frame_or_in_a_checksum(tmp_path):
    path = tmp_path / "shard.pt"
    fields, _, valid = write_shard(path)
    good, content = digest_file(path, fields, 1 << 20), bytearray(path.read_bytes())
    for position in range(0, len(content), 7):
        content[position] ^= 16
        path.write_bytes(content)
        bad = digest_file(path, fields, 1 << 20)
        sums_differ = any((bad.checksums[name] != good.checksums[name]).any() for name in good.checksums)
        assert sums_differ or bad.frame != frame_of(fields, bad.crcs, {"valid": valid}, "{}")
        content[position] ^= 16


@pytest.mark.parametrize("size", [0, 100, 300])
def test_a_file_that_ends_too_soon_is_refused(tmp_path, size):
    fields, _, _ = write_shard(tmp_path / "shard.pt")
    os.truncate(tmp_path / "shard.pt", size)
    with pytest.raises(UserError, match="not those of a shard with the rows it claims|ends before"):
        digest_file(tmp_path / "shard.pt", fields, 1 << 20)


def test_tensors_of_more_than_4_gib_are_found(tmp_path):
    path = tmp_path / "shard.pt"
    fields = place_fields({"pooled": ("float16", (1 << 20, 2, 1100)), "tokens": ("int8", (1 << 20, 2, 1, 4))})
    assert fields[0].size > 1 << 32
    with open(path, "wb") as file:  # a sparse file: its holes take no room
        for offset, piece in frame_of(fields, [0, 0], {"valid": np.ones(1 << 20, bool)}, "{}"):
            file.seek(offset)
            file.write(piece)
        file.seek(fields[1].end - 4)
        file.write(b"\1\2\3\4")
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == fields[0].size
    found = torch.load(path, weights_only=True, mmap=True)
    assert found["tokens"].shape == (1 << 20, 2, 1, 4)
    assert found["tokens"][-1, -1, 0].tolist() == [1, 2, 3, 4]
