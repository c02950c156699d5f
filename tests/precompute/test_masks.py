import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mosaics import encode_png, make_mosaics, mosaics
from PIL import Image
from stage1 import folder_bytes

from distillery.cache.folder import load_index
from distillery.cache.masks import check_mask_classes
from distillery.cache.plan import survey_cache
from distillery.cache.verify import verify_cache
from distillery.config.load import load_configs
from distillery.precompute import jobs, pool
from distillery.reading.datasets import LabelledBatches, MaskedBatches
from distillery.sources.masks import preprocess_mask
from distillery.sources.pixels import PreprocessSpec, preprocess_image
from distillery.system.errors import EXIT_DONE, EXIT_TOO_MANY_FAILED, EXIT_USAGE, UserError
from distillery.system.signals import StopFlag


def configuration(folder, entry, **changes):
    """A data configuration whose training images are those of the evaluation set `e`."""
    training = {"dataset_name": "parquet", "data_files": entry["data_files"], "image_column": "image"}
    other = {"cache_dir": str(folder / "cache"), "image_size": 16, "num_workers": 1, "cache_shard_size": 8}
    return training | other | {"eval_datasets": {"e": entry}} | changes


def make(data, batch_size=5):
    """Stage 1 in this process; returns its exit status."""
    configs = load_configs(data)
    made = jobs.open_jobs(configs.data, 1, 0)
    surveys = [survey_cache(job.plan, job.shards) for job in made]
    for job, survey in zip(made, surveys, strict=True):
        jobs.make_job(job, survey, configs.data, batch_size, StopFlag())
    return jobs.report_outcome(made, configs.data.max_failed_fraction)


def write_split(folder, images, masks):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "mask": masks}), folder / "a.parquet")
    return {
        "dataset_name": "parquet",
        "data_files": {split: str(folder / "a.parquet") for split in ("train", "test")},
        "task": "segmentation",
    }


def stored(folder):
    """The tensors of all shards of a folder, as plain torch.load gives them."""
    shards = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
    assert all(set(shard) == {"images", "masks", "valid", "meta"} for shard in shards)
    return [torch.cat([shard[name] for shard in shards]) for name in ("images", "masks", "valid")]


@pytest.mark.parametrize("resize_mode", ["squash", "crop"])
@pytest.mark.parametrize("cache_dtype", ["uint8", "float16"])
def test_a_shard_holds_each_image_and_its_mask_and_both_are_read_in_order(tmp_path, resize_mode, cache_dtype):
    entry = make_mosaics(tmp_path, 19, 5)
    assert make(configuration(tmp_path, entry, resize_mode=resize_mode, cache_dtype=cache_dtype)) == EXIT_DONE
    spec = PreprocessSpec(16, resize_mode, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for split, num_rows in (("train", 19), ("test", 5)):
        table = pq.read_table(tmp_path / f"{split}.parquet").to_pydict()
        masks = np.stack([preprocess_mask(data, (32, 32), 1, spec, "uint8") for data in table["mask"]])
        folder = tmp_path / "cache" / "eval" / "e" / split
        images, found, valid = stored(folder)
        assert found.dtype == torch.uint8 and (found.numpy() == masks).all() and valid.all()
        if cache_dtype == "uint8":
            assert (images.numpy() == np.stack([preprocess_image(data, spec) for data in table["image"]])).all()
        batches = list(MaskedBatches(folder, 4))
        assert torch.equal(torch.cat([mask for _, mask in batches]), found)
        assert torch.cat([image for image, _ in batches]).shape == (num_rows, 3, 16, 16)
        index = load_index(folder)
        assert index.mask_dtype == "uint8" and index.mask_classes == tuple(np.unique(masks)) and not index.labels
        assert verify_cache(folder) == []


def test_sets_to_evaluate_on_are_decoded_exactly_whatever_jpeg_decode_says(tmp_path):
    # four fields of grey values that are the mask's numbers, in photographs of 300 x 210 px, upright and turned
    numbers = np.repeat(np.repeat(np.array([[0, 80], [160, 240]], np.uint8), 105, axis=0), 150, axis=1)
    images, masks, exif = [], [encode_png(numbers)] * 2, Image.Exif()
    for exif[0x0112] in (1, 6):
        buffer = io.BytesIO()
        Image.fromarray(numbers).convert("RGB").save(buffer, "JPEG", quality=95, exif=exif)
        images.append(buffer.getvalue())
    data = configuration(
        tmp_path, write_split(tmp_path, images, masks), cache_dtype="uint8", jpeg_decode="scaled", image_size=8
    )
    assert make(data) == EXIT_DONE
    folder = tmp_path / "cache" / "eval" / "e" / "train"
    stored_images, found, valid = stored(folder)
    assert valid.all()
    away = torch.ones(8, 8, dtype=torch.bool)  # from the fields' edges, which resizing blurs
    away[3:5], away[:, 3:5] = False, False
    difference = stored_images[:, 0].int() - found.int()
    assert difference[:, away].abs().max() <= 4 and found.unique().tolist() == [0, 80, 160, 240]
    record = json.loads((folder / "images_shard_00000.json").read_text())
    assert "jpeg_decode" not in record["identity"]["preprocess"]


def test_neither_batches_nor_workers_change_a_byte_of_a_cache_with_masks(tmp_path):
    entry = make_mosaics(tmp_path, 40, 9)
    caches = []
    for number, (batch_size, num_workers) in enumerate([(5, 1), (256, 1), (7, 2)]):
        place = tmp_path / str(number)
        make(configuration(place, entry, num_workers=num_workers, interpolation="lanczos"), batch_size)
        caches.append(folder_bytes(place / "cache"))
    assert caches[0] == caches[1] == caches[2] and len(caches[0]) == 27


def test_encoded_images_and_masks_that_no_slot_holds_reach_the_workers_all_the_same(tmp_path, monkeypatch):
    entry = make_mosaics(tmp_path, 9, 3)
    monkeypatch.setattr(pool, "SLOT_BYTES", 1000)  # less than one of them
    for number, num_workers in enumerate((1, 2)):
        make(configuration(tmp_path / str(number), entry, num_workers=num_workers, interpolation="lanczos"))
    assert folder_bytes(tmp_path / "0") == folder_bytes(tmp_path / "1")


def test_rows_whose_mask_is_wrong_fail_with_the_reason_and_are_zero_and_never_read(tmp_path, capsys):
    values, numbers = mosaics(6, tiles=1)
    images, masks = [encode_png(pixels) for pixels in values], [encode_png(pixels + 1) for pixels in numbers]
    masks[1] = encode_png(numbers[1][:4])
    masks[3] = encode_png(values[3])
    images[4] = b"no image"
    data = configuration(tmp_path, write_split(tmp_path, images, masks), max_failed_fraction=0.1)
    data["dataset_name"], data["data_files"] = "parquet", {"train": str(tmp_path / "a.parquet")}
    assert make(data) == EXIT_TOO_MANY_FAILED
    folder = tmp_path / "cache" / "eval" / "e" / "train"
    failures = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    assert [entry["global_idx"] for entry in failures] == [1, 3, 4]
    assert failures[0]["reason"] == "mask is 4x8 px, its image 8x8 px"
    assert failures[1]["reason"].startswith("mask has mode RGB")
    assert f"the first, image 1: {failures[0]['reason']}\n" in capsys.readouterr().out
    images, found, valid = stored(folder)
    assert valid.tolist() == [True, False, True, False, False, True]
    assert not found[~valid].any() and not images[~valid].any() and found[valid].all()
    # zeros of failed rows are no class
    assert 0 not in load_index(folder).mask_classes
    ((batch, read),) = MaskedBatches(folder, 8)
    assert torch.equal(read, found[valid]) and len(batch) == 3


@pytest.mark.parametrize("changes", [{"num_classes": 300}, {"ignore_index": 256}])
def test_numbers_beyond_a_byte_are_stored_as_int16_where_the_configuration_asks_for_it(tmp_path, changes):
    values, numbers = mosaics(4, tiles=1)
    masks = [encode_png(pixels.astype(np.uint16) * 33) for pixels in numbers]
    entry = write_split(tmp_path, [encode_png(pixels) for pixels in values], masks)
    data = configuration(tmp_path, entry, image_size=8)
    data["eval_datasets"]["e"] |= changes
    assert make(data) == EXIT_DONE
    folder = tmp_path / "cache" / "eval" / "e" / "test"
    _, found, _ = stored(folder)
    assert found.dtype == torch.int16 and (found.numpy() == numbers.astype(int) * 33).all()
    ((_, read),) = MaskedBatches(folder, 8)
    assert read.dtype == torch.int16 and torch.equal(read, found)


def test_a_cut_split_has_masks_from_all_over_it(tmp_path):
    entry = make_mosaics(tmp_path, 40, 9, tiles=2) | {"max_train": 4}
    assert make(configuration(tmp_path, entry)) == EXIT_DONE
    _, found, _ = stored(tmp_path / "cache" / "eval" / "e" / "train")
    assert (found.numpy() == mosaics(49, tiles=2)[1][[0, 10, 20, 30]]).all()


@pytest.mark.parametrize(
    "classes, num_classes, ignore_index, found",
    [
        ((0, 4), 5, 255, 5),
        ((0, 4, 255), None, 255, 5),
        ((0, 4, 7), 5, 7, 5),
        ((0, 5), 5, 255, r"train hold class 5, num_classes is 5 \(0\.\.4\): set num_classes: 6, or ignore_index: 5$"),
        ((0, 5, 9), 5, 255, r"train hold the classes 5, 9, num_classes is 5 \(0\.\.4\): set num_classes: 10$"),
        (tuple(range(20)), 5, 255, r"5, 6, 7, 8, 9, 10, 11, 12, \.\.\., num_classes"),
        ((255,), 5, 255, "hold no class beside ignore_index 255: there is nothing to tell apart"),
        ((0, 255), None, 255, "hold class 0 alone beside ignore_index 255: .* In binary masks of 0 and 255 write 1"),
        ((), None, 255, r"could not be read, not one: the reasons are in .*failures\.jsonl"),
    ],
)
def test_classes_are_counted_and_compared_by_the_index_alone(tmp_path, classes, num_classes, ignore_index, found):
    values, numbers = mosaics(2, tiles=1)
    entry = write_split(tmp_path, *([encode_png(pixels) for pixels in of] for of in (values, numbers)))
    make(configuration(tmp_path, entry))
    index = replace(load_index(tmp_path / "cache" / "eval" / "e" / "train"), mask_classes=classes)
    if isinstance(found, int):
        assert check_mask_classes(index, "e", num_classes, ignore_index) == found
        return
    with pytest.raises(UserError, match=found):
        check_mask_classes(index, "e", num_classes, ignore_index)


def test_stage_1_ends_with_one_message_where_masks_hold_a_class_too_many(tmp_path, capsys):
    entry = make_mosaics(tmp_path, 9, 9) | {"num_classes": 9}
    data = configuration(tmp_path, entry)
    assert make(data) == EXIT_USAGE
    said = capsys.readouterr()
    assert "error: eval_datasets.e: the masks of train hold class 9, " in said.err and "set num_classes: 10" in said.err
    assert "eval/e/test: 9 images in 2 shards" in said.out
    # what was made is kept, and is right once the configuration is
    data["eval_datasets"]["e"]["num_classes"] = 10
    assert make(data) == EXIT_DONE and "shards made" not in capsys.readouterr().out


def test_masks_and_labels_are_not_taken_for_each_other(tmp_path):
    entry = make_mosaics(tmp_path, 3, 2)
    make(configuration(tmp_path, entry))
    with pytest.raises(UserError, match="train holds no labels. It holds masks: .*task: classification"):
        LabelledBatches(tmp_path / "cache" / "eval" / "e" / "train", 2)
    with pytest.raises(UserError, match="cache holds no masks. .*task: segmentation"):
        MaskedBatches(tmp_path / "cache", 2)


def test_shares_of_masked_batches_are_all_batches_one_after_the_other(tmp_path):
    make(configuration(tmp_path, make_mosaics(tmp_path, 19, 2)))
    folder = tmp_path / "cache" / "eval" / "e" / "train"
    whole = [mask for _, mask in MaskedBatches(folder, 4)]
    shares = [MaskedBatches(folder, 4, (number, 2)) for number in range(2)]
    assert [share.num_rounds for share in shares] == [3, 3] and sum(map(len, shares)) == len(whole) == 5
    parts = [mask for share in shares for _, mask in share.held_batches()]
    assert all(map(torch.equal, whole, parts))


def test_palette_masks_are_class_numbers_in_the_cache(tmp_path):
    values, numbers = mosaics(3, tiles=1)
    masks = []
    for pixels in numbers:
        image = Image.fromarray(pixels).convert("L")
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
        path = tmp_path / "m.png"
        image.save(path)
        masks.append(path.read_bytes())
    make(configuration(tmp_path, write_split(tmp_path, [encode_png(pixels) for pixels in values], masks), image_size=8))
    assert (stored(tmp_path / "cache" / "eval" / "e" / "test")[1].numpy() == numbers).all()
