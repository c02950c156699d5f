"""Wrong bytes: every one is found by verify, repaired by stage 1, and noticed by training before it is trained on."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scale import scaled
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan, wait_for_the_clock

from distillery.cache.folder import load_index
from distillery.cache.store import FutureFormatError
from distillery.cache.verify import find_problems, verify_cache
from distillery.reading.shard_files import ShardFiles
from distillery.system.errors import UserError


@pytest.fixture
def cache(folder, source) -> Path:
    run_stage1(small_plan(folder / "cache", source), source)
    return folder / "cache"


def regions(cache: Path) -> list[tuple[str, Path, range]]:
    """(name, file, bytes) of every part of a cache folder; together they are all of it."""
    found = []
    for shard in sorted(cache.glob("*.pt")):
        data = shard.read_bytes()
        marks = [0, 128, data.index(b"PK\7\10"), data.index(b"archive/data.pkl"), data.index(b"PK\1\2"), len(data)]
        names = ["header", "rows", "masks and labels", "description", "zip directory"]
        found += [
            (name, shard, range(*ends)) for name, ends in zip(names, zip(marks, marks[1:], strict=False), strict=True)
        ]
        record = shard.with_suffix(".json")
        found.append(("record", record, range(record.stat().st_size)))
    for name in ("index.json", "failures.jsonl"):
        found.append((name, cache / name, range((cache / name).stat().st_size)))
    return found


def flip(path: Path, position: int, bit: int) -> None:
    wait_for_the_clock(path.parent)
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def makes_a_later_version(path: Path, position: int, bit: int) -> bool:
    """The one flip in a cache that is not repaired but refused: it turns format_version 3 into 7."""
    data = path.read_bytes()
    start = data.find(b'"format_version": ')
    return path.suffix == ".json" and position == start + len(b'"format_version": ') and bit == 2


def test_every_flipped_bit_is_found_by_verify_and_repaired_by_stage_1(cache, source, reference, tally, rng):
    plan, found_in = small_plan(cache, source), Counter()
    parts = regions(cache)
    assert sum(len(part) for _, _, part in parts) == sum(len(data) for data in reference.values())
    for number in range(scaled(120)):
        name, path, part = parts[number % len(parts)]
        position, bit = rng.choice(part), rng.randrange(8)
        is_refused = makes_a_later_version(path, position, bit)
        kept = {p.name: p.stat().st_ino for p in cache.glob("*.pt") if p != path}
        flip(path, position, bit)
        tally["bits flipped: found by verify, repaired by stage 1"] += 1
        found_in[name] += 1
        if is_refused:
            with pytest.raises(FutureFormatError, match="is damaged: remove it"):
                run_stage1(plan, source)
            path.unlink()
        else:
            problems = verify_cache(cache)
            assert any(str(path) in problem for problem in problems), f"{name}, byte {position}, bit {bit}"
        run_stage1(plan, source)
        assert folder_bytes(cache) == reference, f"{name}, byte {position}, bit {bit}"
        assert kept.items() <= {p.name: p.stat().st_ino for p in cache.glob("*.pt")}.items()  # only the bad one
    assert len(found_in) == 8


def test_flipped_bits_that_left_no_trace_are_repaired_after_what_verify_says_to_remove(
    cache, source, reference, tally, rng
):
    plan = small_plan(cache, source)
    parts = [part for part in regions(cache) if part[1].suffix == ".pt"]
    for number in range(scaled(30)):
        _, path, part = parts[number % len(parts)]
        flip(path, rng.choice(part), rng.randrange(8))
        for record in cache.glob("images_*.json"):
            record.write_bytes(record.read_bytes())  # newer than its shard again, as if only the medium had changed
        removed = [problem.remove for problem in find_problems(cache)]
        assert removed == [path]
        path.unlink()
        run_stage1(plan, source)
        assert folder_bytes(cache) == reference
        tally["bits flipped without a trace in the file's times"] += 1


def test_training_notices_every_flipped_bit_of_a_row_when_it_first_reads_it(cache, tally, rng):
    index = load_index(cache)
    shards = np.repeat(np.arange(3), index.shard_rows)
    local = np.concatenate([np.arange(rows) for rows in index.shard_rows])
    out = np.zeros((len(shards), index.row_bytes), np.uint8)
    ShardFiles(index).read(shards, local, out)
    for _ in range(scaled(30)):
        shard, row = rng.randrange(3), rng.randrange(6)
        position, bit = 128 + row * index.row_bytes + rng.randrange(index.row_bytes), rng.randrange(8)
        flip(index.shard_path(shard), position, bit)
        with pytest.raises(UserError, match=index.shard_names[shard]):
            ShardFiles(index).read(shards, local, out)
        flip(index.shard_path(shard), position, bit)
        tally["bits flipped: noticed by training"] += 1
    ShardFiles(index).read(shards, local, out)


def other_cache(folder: Path) -> Path:
    """A cache of the same shapes from another source."""
    source = SmallSource(30)
    run_stage1(small_plan(folder / "other", source), source)
    return folder / "other"


def truncate(rng, cache: Path, _other: Path) -> None:
    path = rng.choice(sorted(cache.iterdir()))
    os.truncate(path, rng.randrange(path.stat().st_size))


def lengthen(rng, cache: Path, _other: Path) -> None:
    with open(rng.choice(sorted(cache.iterdir())), "ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


def blank(rng, cache: Path, _other: Path) -> None:
    """A lost sector: 512 bytes of zeros."""
    with open(rng.choice(sorted(cache.glob("*.pt"))), "r+b") as file:
        file.seek(rng.randrange(0, 5000, 512))
        file.write(bytes(512))


def repeat(rng, cache: Path, _other: Path) -> None:
    """A misdirected write: one sector's bytes on another."""
    with open(rng.choice(sorted(cache.glob("*.pt"))), "r+b") as file:
        source, target = rng.sample(range(0, 5000, 512), 2)
        file.seek(source)
        data = file.read(512)
        file.seek(target)
        file.write(data)


def swap(rng, cache: Path, _other: Path) -> None:
    kinds = [sorted(cache.glob(pattern)) for pattern in ("*.pt", "images_*.json")]
    # files that were lost before may have left one of a kind alone
    one, other = rng.sample(rng.choice([paths for paths in kinds if len(paths) > 1]), 2)
    shutil.move(one, cache / "aside")
    shutil.move(other, one)
    shutil.move(cache / "aside", other)


def take_foreign(rng, cache: Path, other: Path) -> None:
    path = rng.choice(sorted(cache.glob("*.pt")))
    shutil.copy(other / path.name, path)


def lose(rng, cache: Path, _other: Path) -> None:
    rng.choice(sorted(cache.iterdir())).unlink()


def copy_over(rng, cache: Path, _other: Path) -> None:
    one, other = rng.sample(sorted(cache.iterdir()), 2)
    shutil.copy(one, other)


DAMAGES = [truncate, lengthen, blank, repeat, swap, take_foreign, lose, copy_over]


@pytest.mark.parametrize("at_once", [1, 3])
def test_truncated_swapped_foreign_and_lost_files_are_found_and_repaired(
    folder, cache, source, reference, tally, rng, at_once
):
    other, plan = other_cache(folder), small_plan(cache, source)
    for number in range(scaled(48 if at_once == 1 else 24)):
        damages = [DAMAGES[number % len(DAMAGES)], *rng.choices(DAMAGES, k=at_once - 1)]
        wait_for_the_clock(cache)
        for damage in damages:
            damage(rng, cache, other)
        names = ", ".join(damage.__name__ for damage in damages)
        if folder_bytes(cache) != reference:
            assert verify_cache(cache), names
        try:
            run_stage1(plan, source)
        except UserError as error:
            # a foreign shard whose record is lost too: it may be another cache, so only the user can say
            assert "made with another configuration" in str(error), names
            for problem in find_problems(cache):
                if problem.remove:
                    problem.remove.unlink(missing_ok=True)  # one file may have two problems
            run_stage1(plan, source)
        assert folder_bytes(cache) == reference, names
        assert verify_cache(cache) == []
        tally["files truncated, lengthened, blanked, swapped, foreign, lost"] += at_once


def test_the_index_cut_off_at_every_byte_is_made_again_without_making_a_shard(cache, source, reference, tally):
    plan, whole = small_plan(cache, source), reference["index.json"]
    shards = {path.name: path.stat().st_ino for path in cache.glob("*.pt")}
    step = max(1, len(whole) // scaled(100))
    for length in range(0, len(whole), step):
        (cache / "index.json").write_bytes(whole[:length])
        report, _ = run_stage1(plan, source)
        assert (report.shards_made, report.shards_accepted) == (0, 0)
        assert (cache / "index.json").read_bytes() == whole
        tally["index.json cut off at the n-th byte"] += 1
    assert {path.name: path.stat().st_ino for path in cache.glob("*.pt")} == shards
