"""Compressed caches as stage 2 reads them: whole images, crops, order, threads, and files that change meanwhile."""

import os
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import torch
from caches import MEAN, STD, normalised
from photographs import encoded_rows, make_photograph_cache
from sklearn.datasets import load_sample_images

from data_loader import CachedTensorDataset, build_pretraining_dataloader, load_labelled
from distillery.cache.folder import load_index
from distillery.config.load import load_data_config
from distillery.models.views import Augmentation, crop_and_resize
from distillery.reading import datasets, decoding, rows, shard_files
from distillery.reading.decoding import box_of, spec_of
from distillery.reading.every_image import CachedImages
from distillery.reading.row_files import EncodedFiles
from distillery.reading.rows import CachedRows, ImageRows
from distillery.sources.pixels import DecodeError, decode_image, preprocess_image
from distillery.system import distributed
from distillery.system.errors import UserError

MODES = shard_files.READ_MODES
BAD = (3, 13)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of 20 photographs, rows of up to 40 px for images of 32 px, two of which could not be decoded."""
    folder = tmp_path_factory.mktemp("encoded") / "cache"
    make_photograph_cache(folder, stored_size=40, bad=BAD)
    return folder


def copy_of(cache, tmp_path):
    """The cache where a test may damage it."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for path in cache.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def build(folder, batch_size=4, **keys):
    data = {"cache_dir": str(folder), "use_cached": True, **keys.pop("data", {})}
    return build_pretraining_dataloader(data, {"batch_size": batch_size, "max_steps_per_epoch": None}, **keys)


def every_row(index):
    """(shards, local) of all rows, valid or not."""
    return np.repeat(np.arange(len(index.shard_rows)), index.shard_rows), np.concatenate(
        [np.arange(count) for count in index.shard_rows]
    )


def denormalised(images):
    """Pixels in 0..1 of normalised images."""
    return images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


# ---- whole images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resize_mode", ["squash", "crop"])
def test_batches_are_the_stored_rows_decoded_and_resized(tmp_path, mode, resize_mode):
    make_photograph_cache(tmp_path, stored_size=40, bad=BAD, resize_mode=resize_mode)
    stored, spec = encoded_rows(tmp_path), spec_of(load_index(tmp_path))
    assert len(stored) == 18 and spec.resize_mode == resize_mode
    by_hand = {i: torch.from_numpy(preprocess_image(data, spec)) for i, data in stored.items()}
    kinds = {True: torch.uint8, False: torch.float32}
    for raw, dtype in kinds.items():
        seen = 0
        for images, global_idx in build(tmp_path, 6, raw=raw, with_indices=True, data={"read_mode": mode}):
            assert (images.dtype, images.shape[1:]) == (dtype, (3, 32, 32))
            for image, number in zip(images, global_idx.tolist(), strict=True):
                assert torch.equal(image, by_hand[number] if raw else normalised(by_hand[number]))
            seen += len(images)
        assert seen == 18
    dataset = CachedTensorDataset(tmp_path)
    assert torch.equal(torch.stack(list(dataset)), torch.stack([normalised(image) for image in by_hand.values()]))


def test_original_files_of_another_format_are_read_too(tmp_path):
    source = make_photograph_cache(tmp_path, 8, stored_size="original")
    expected = [preprocess_image(source.encoded(i), spec_of(load_index(tmp_path))) for i in range(8)]
    assert encoded_rows(tmp_path)[0].startswith(b"\x89PNG")
    assert torch.equal(CachedTensorDataset(tmp_path)[5], normalised(torch.from_numpy(expected[5])))


def test_labels_stand_beside_their_images_and_the_teacher_pass_has_zeros_for_a_failed_row(cache):
    images, labels = (torch.cat(parts) for parts in zip(*load_labelled(cache, 8), strict=True))
    assert torch.equal(images, torch.stack(list(CachedTensorDataset(cache))))
    assert labels.tolist() == [i % 7 for i in range(20) if i not in BAD]
    index = load_index(cache)
    batch = next(iter(ImageRows(cache, index.fingerprint).batches(0, 8, 8)))
    zero = normalised(torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert torch.equal(batch[3], zero) and torch.equal(batch[2], images[2])


def test_rows_can_be_sent_to_another_process(cache):
    sent = pickle.loads(pickle.dumps(CachedTensorDataset(cache)))
    assert torch.equal(sent[7], CachedTensorDataset(cache)[7])
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(sent[7], CachedTensorDataset(cache)[7]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- order, threads, configuration ---------------------------------------------------------------------------------


def test_the_order_is_that_of_the_uint8_cache(cache, tmp_path, monkeypatch):
    make_photograph_cache(tmp_path, dtype="uint8", bad=BAD)
    monkeypatch.setattr(distributed, "on_main", lambda decide: decide())
    # runs of three rows, so that there is something to mix
    runs = {"run_bytes": 3 * 3 * 32 * 32, "window_bytes": 9 * 3 * 32 * 32}
    for raw, subset, world, done in [(True, None, 1, 0), (False, 2, 1, 0), (True, 2, 2, 0), (False, None, 2, 1)]:
        orders = []
        for folder in (cache, tmp_path):
            order = []
            for rank in range(world):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
                loader = build(folder, 2, raw=raw, with_indices=True, data={"shards_per_epoch": subset, **runs})
                for epoch in range(2):
                    loader.load_state_dict({"epoch": epoch, "samples": done * 2 * world})
                    order.append([global_idx.tolist() for _, global_idx in loader])
            orders.append(order)
        assert orders[0] == orders[1] and orders[0][0] != orders[0][1]


def test_decoding_takes_every_cpu_and_the_console_gives_stored_bytes(cache, tmp_path, monkeypatch, capsys):
    make_photograph_cache(tmp_path, 8, dtype="uint8")
    for module in ("distillery.config.keys_data", "distillery.reading.rows"):
        monkeypatch.setattr(f"{module}.usable_cpus", lambda: 11)
    loader, stored = build(cache), load_index(cache).shard_bytes.sum()
    text = capsys.readouterr().out
    assert loader.num_threads == 11 and "decoded when they are read, 11 at a time" in text
    assert f"jpeg, in 3 shards, {stored / 1000:.1f} kB" in text
    assert [build(cache, data={"num_workers": number}).num_threads for number in (3, 0)] == [3, 1]
    assert build(tmp_path).num_threads == 2
    threads = []
    stream = rows.BatchStream
    monkeypatch.setattr(
        rows, "BatchStream", lambda *a, num_threads, **k: threads.append(num_threads) or stream(*a, num_threads=2, **k)
    )
    for folder in (cache, tmp_path):
        next(iter(datasets.LabelledBatches(folder, 4)))
        every = CachedImages(load_data_config({"cache_dir": str(folder)}, require_source=False), load_index(folder))
        threads.append(every.num_threads)
    assert threads == [11, 11, 4, 11]


@pytest.mark.parametrize("keys, told", [
    ({"stored_size": 64}, "stored_size: 40 in the cache, 64 in data_config"),
    ({"stored_size": None}, "stored_size: 40 in the cache, 32 in data_config"),
    ({"stored_size": "original"}, "stored_size: 40 in the cache, original in data_config"),
    ({"jpeg_quality": 80}, "jpeg_quality: 90 in the cache, 80 in data_config"),
])  # fmt: skip
def test_a_cache_of_other_rows_is_refused_in_the_usual_words(cache, keys, told):
    same = {"cache_dtype": "jpeg", "image_size": 32}
    assert len(build(cache, data=same | {"stored_size": 40, "jpeg_quality": 90})) == 4
    with pytest.raises(UserError, match=re.escape(told)):
        build(cache, data=same | keys)


# ---- files that are damaged, or change meanwhile -------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_flipped_bit_is_found_once_always_or_never(cache, tmp_path, mode):
    folder = copy_of(cache, tmp_path)
    index = load_index(folder)
    layout = EncodedFiles(index).layout(1)
    place = np.array([1]), np.array([6])
    path, offset = index.shard_path(1), layout.payload_offset + int(layout.offsets[6]) + 50
    found = {verify: EncodedFiles(index, verify=verify, mode=mode) for verify in shard_files.VERIFY_MODES}
    before = {verify: bytes(files.read_encoded(*place)[0]) for verify, files in found.items()}
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    with path.open("r+b") as file:
        file.write(data)
    message = rf"row 6 \(global_idx 14, byte {offset - 50}\) is damaged"
    for verify, files in found.items():
        if verify == "always":
            with pytest.raises(UserError, match=message):
                files.read_encoded(*place)
        else:
            assert bytes(files.read_encoded(*place)[0]) != before[verify]
    with pytest.raises(UserError, match=message):
        EncodedFiles(index, mode=mode).read_encoded(*place)


@pytest.mark.parametrize("mode", MODES)
def test_a_shard_cut_while_it_is_open_is_an_error_with_the_row(cache, tmp_path, mode):
    folder = copy_of(cache, tmp_path)
    index = load_index(folder)
    files = EncodedFiles(index, mode=mode)
    files.read_encoded(np.array([0]), np.array([0]))
    layout = files.layout(0)
    os.truncate(index.shard_path(0), layout.payload_offset + int(layout.offsets[5]) + 3)
    with pytest.raises(UserError, match="inside row 5: it was shortened while in use"):
        files.read_encoded(np.zeros(8, np.int64), np.arange(8))


@pytest.mark.parametrize("mode", MODES)
def test_a_last_shard_that_grew_gives_the_rows_that_the_index_lists(cache, tmp_path, mode):
    folder = copy_of(cache, tmp_path)
    index, before = load_index(folder), encoded_rows(cache)
    held = EncodedFiles(index, mode=mode)
    held.read_encoded(np.array([2]), np.array([0]))
    make_photograph_cache(folder, 22, stored_size=40, bad=BAD)
    assert len(encoded_rows(folder)) == 20
    shards, local = every_row(index)
    for files in (held, EncodedFiles(index, mode=mode)):
        found = dict(enumerate(map(bytes, files.read_encoded(shards, local))))
        assert {i: data for i, data in found.items() if data} == before


def test_reads_that_stop_short_are_continued(cache, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:100]], offset))
    index, stored = load_index(cache), encoded_rows(cache)
    found = EncodedFiles(index).read_encoded(*every_row(index))
    assert [bytes(data) for data in found] == [stored.get(i, b"") for i in range(20)]


def test_reading_ahead_asks_for_the_bytes_of_the_rows_and_no_others(cache, monkeypatch):
    asked = []
    monkeypatch.setattr(shard_files, "_is_resident", lambda *_: False)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: asked.append((offset, length)))
    files = EncodedFiles(load_index(cache))
    layout = files.layout(1)
    files.advise(np.array([1, 1, 1]), np.array([2, 7, 3]))
    first, end = (layout.payload_offset + layout.offsets[row] for row in (2, 4))
    last = layout.payload_offset + layout.offsets[7]
    assert asked == [(first, end - first), (last, layout.offsets[8] - layout.offsets[7])]


def test_a_row_that_cannot_be_decoded_any_more_is_an_error_with_its_place(cache, monkeypatch):
    def fail(*_):
        raise DecodeError("no such coding")

    monkeypatch.setattr(decoding, "preprocess_image", fail)
    with pytest.raises(UserError, match=r"00001\.pt: row 2 \(global_idx 10\) .* cannot be decoded here: no such"):
        # the ninth valid row
        CachedTensorDataset(cache)[9]


# ---- crops ---------------------------------------------------------------------------------------------------------


def test_a_box_covers_the_nearest_whole_pixels_of_the_image_or_its_centred_square():
    whole, left_half = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0, 0.25, 0.5, 0.5])
    assert box_of((30, 50), whole, is_square=False) == (0, 30, 0, 50)
    assert box_of((30, 51), whole, is_square=True) == (0, 30, 10, 40)
    assert box_of((51, 30), whole, is_square=True) == (10, 40, 0, 30)
    assert box_of((30, 50), left_half, is_square=False) == (8, 22, 0, 25)
    assert box_of((30, 50), left_half, is_square=True) == (8, 22, 10, 25)
    assert box_of((3, 3), np.array([0.999, 0.999, 0.001, 0.001]), is_square=False) == (2, 3, 2, 3)
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape, shares = tuple(rng.integers(10, 60, 2).tolist()), rng.uniform(0.1, 1, 2)
        start = rng.uniform(0, 1 - shares)
        covered = box_of(shape, np.array([*start[::-1], *shares[::-1]]), is_square=False)
        exact = np.array([start, start + shares]).T * np.array(shape)[:, None]
        assert np.abs(np.reshape(covered, (2, 2)) - exact).max() <= 0.5 + 1e-9


def test_crops_of_large_jpegs_are_decoded_at_a_fraction_of_their_size_where_that_is_asked_for(cache):
    index = load_index(cache)
    photograph = simplejpeg.encode_jpeg(load_sample_images().images[0], quality=95)
    found = {}
    for how in ("exact", "scaled"):
        changed = replace(index, preprocess=index.preprocess | {"jpeg_decode": how})
        # 214 px high: a half of that is more than twice 32 px, a quarter is not
        decoder = decoding.RowDecoder(changed, lambda _: np.array([[0.2, 0.3, 0.4, 0.5]], np.float32))
        out, zero = np.empty((1, 3 * 32 * 32), np.uint8), np.zeros(1, np.int64)
        decoder.decode([memoryview(photograph)], zero, zero, zero, out)
        found[how] = out.astype(int)
    difference = np.abs(found["exact"] - found["scaled"]).mean()
    assert 0 < difference < 4 < found["exact"].std()


@pytest.mark.parametrize("resize_mode", ["squash", "crop"])
def test_a_loader_with_boxes_gives_these_boxes_alone_of_its_own_epoch(tmp_path, resize_mode):
    make_photograph_cache(tmp_path, stored_size=40, resize_mode=resize_mode)
    stored, asked = encoded_rows(tmp_path), set()

    def top_left(global_idx, epoch):
        asked.add(epoch)
        return torch.tensor([[0.0, 0.0, 0.5, 0.5]]).expand(len(global_idx), 4) * (1 + epoch)

    loader = build(tmp_path, raw=True, with_indices=True)
    whole = {int(number): image for images, idx in loader for image, number in zip(images, idx, strict=True)}
    loader.crop_boxes = top_left
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        for images, global_idx in loader:
            for image, number in zip(images, global_idx.tolist(), strict=True):
                pixels = torch.from_numpy(decode_image(stored[number])).permute(2, 0, 1)
                height, width = pixels.shape[1:]
                if resize_mode == "crop":
                    side = min(height, width)
                    top, left = (height - side) // 2, (width - side) // 2
                    pixels = pixels[:, top : top + side, left : left + side]
                if epoch == 0:
                    pixels = pixels[:, : round(pixels.shape[1] / 2), : round(pixels.shape[2] / 2)]
                by_hand = torch.nn.functional.interpolate(pixels[None], size=32, mode="bicubic", antialias=True)[0]
                assert torch.equal(image, by_hand)
                assert epoch == 0 or torch.equal(image, whole[number])
    assert asked == {0, 1}


@pytest.mark.parametrize("resize_mode", ["squash", "crop"])
def test_a_crop_cut_while_decoding_is_what_the_device_would_cut_out_of_the_uint8_cache(tmp_path, resize_mode):
    shape = {"size": 64, "source_size": 80, "resize_mode": resize_mode}
    make_photograph_cache(tmp_path / "uint8", dtype="uint8", **shape)
    make_photograph_cache(tmp_path / "jpeg", quality=98, **shape)
    augment = Augmentation(hflip=True, random_resized_crop=(0.4, 1.0), mean=MEAN, std=STD)
    whole, idx = torch.stack(list(CachedTensorDataset(tmp_path / "uint8"))), torch.arange(20)
    encoded = CachedRows(load_index(tmp_path / "jpeg"))
    cut = torch.empty(20, 3, 64, 64)
    boxes = augment.boxes(idx, seed=5, epoch=2)
    encoded.cropped(lambda global_idx: boxes[global_idx].numpy()).fill(
        *every_row(encoded.index), cut.view(20, -1).numpy().view(np.uint8), np.empty(20, np.int64)
    )
    rest = augment.without_crop()
    views = rest.apply(cut, rest.draw(idx, seed=5, epoch=2))
    expected = augment(whole, idx, seed=5, epoch=2)
    seen, wanted = denormalised(views), denormalised(expected)
    one_px_aside = 255 * (wanted[..., 1:] - wanted[..., :-1]).abs().mean()
    assert 255 * (seen - wanted).abs().mean() < 0.7 * one_px_aside
    if resize_mode == "squash":
        return
    # with the box rounded as it was, JPEG and another kernel are left
    spans = np.array([box_of((64, 64), box, is_square=True) for box in boxes.double().numpy()]) / 64
    top, bottom, left, right = torch.from_numpy(spans).float().unbind(1)
    on_device = crop_and_resize(denormalised(whole), left, top, right - left, bottom - top)
    assert 255 * (on_device - denormalised(cut)).abs().mean() < 0.4 * one_px_aside
