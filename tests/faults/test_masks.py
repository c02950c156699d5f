"""Masks keep the promises of images: killed anywhere, or damaged anywhere, the same command makes the same bytes."""

import itertools
import os
import shutil
import signal

import numpy as np
import pytest
from mosaics import encode_png
from processes import FINISHED, fork, wait
from scale import scaled
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan, wait_for_the_clock
from syscalls import killed_at

from distillery.cache.images import IMAGE_SHARDS
from distillery.cache.rebuild import rebuild_index
from distillery.cache.verify import verify_cache
from distillery.reading.datasets import MaskedBatches
from distillery.system.errors import UserError


class MaskedSource(SmallSource):
    """SmallSource with masks in the place of labels; that of row 5 has the wrong size."""

    def masks(self, start: int, stop: int) -> list[bytes]:
        return [
            encode_png(np.random.default_rng(row).integers(0, 9, (self.size - (row == 5), self.size), dtype=np.uint8))
            for row in range(start, stop)
        ]

    def labels(self, start: int, stop: int) -> None:
        return None


SOURCE = MaskedSource()


def plan_of(folder):
    return small_plan(folder / "cache", SOURCE, labels=False, mask_dtype="uint8")


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("masks")
    run_stage1(plan_of(folder), SOURCE)
    return folder_bytes(folder / "cache")


def test_killed_in_the_middle_of_every_write_a_cache_with_masks_ends_as_if_nothing_had_happened(
    folder, expected, tally
):
    plan = plan_of(folder)

    def run(fatal):
        with killed_at(fatal, "half"):
            run_stage1(plan, SOURCE)

    for fatal in itertools.count(1):
        shutil.rmtree(plan.directory, ignore_errors=True)
        status = wait(fork(lambda fatal=fatal: run(fatal)))
        if status == FINISHED:
            break
        assert status == -signal.SIGKILL
        tally["kills while masks are written"] += 1
        run_stage1(plan, SOURCE)
        assert folder_bytes(plan.directory) == expected
    # three shards: images, masks and what follows are a write each
    assert fatal > 9


def test_every_flipped_bit_of_a_shard_with_masks_is_found_repaired_and_noticed_by_who_reads_masks(
    folder, expected, tally, rng
):
    plan = plan_of(folder)
    run_stage1(plan, SOURCE)
    for number in range(scaled(20)):
        path = plan.shard_path(number % 3)
        data = bytearray(path.read_bytes())
        masks = IMAGE_SHARDS.fields_of(IMAGE_SHARDS.record_or_meta(path))[1]
        position = rng.choice(range(masks.offset, masks.end) if number % 2 else range(len(data)))
        data[position] ^= 1 << rng.randrange(8)
        wait_for_the_clock(plan.directory)
        path.write_bytes(data)
        assert any(str(path) in problem for problem in verify_cache(plan.directory))
        if number == 1:  # in the second shard, whose rows are all valid
            with pytest.raises(UserError, match=r"the mask of row \d .* is damaged: its checksum"):
                list(MaskedBatches(plan.directory, 4))
        run_stage1(plan, SOURCE)
        assert folder_bytes(plan.directory) == expected
        tally["bits flipped in shards with masks"] += 1


def test_records_and_index_are_made_again_from_shards_with_masks_alone(folder, expected):
    plan = plan_of(folder)
    run_stage1(plan, SOURCE)
    for path in [*plan.directory.glob("*.json"), plan.directory / "failures.jsonl"]:
        path.unlink()
    assert len(os.listdir(plan.directory)) == 3
    rebuild_index(plan.directory, plan.num_rows)
    assert folder_bytes(plan.directory) == expected


def test_a_cache_with_masks_that_grows_ends_like_one_made_at_once(folder, expected):
    plan = small_plan(folder / "cache", SOURCE, labels=False, mask_dtype="uint8", max_samples=12)
    run_stage1(plan, SOURCE)
    batches = MaskedBatches(plan.directory, 3)
    before = [mask for _, mask in batches]
    run_stage1(plan_of(folder), SOURCE)
    assert folder_bytes(plan.directory) == expected
    # who has opened the short one reads its rows from the longer shard in its place
    assert all((old == new).all() for old, (_, new) in zip(before, batches, strict=True))
