import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from caches import MEAN, STD
from stage1 import folder_bytes
from teachers import (
    MODEL,
    TEACHER_CACHE,
    images_plan,
    live_teacher,
    make_images,
    make_teacher_test_cache,
    run_pass,
    teacher_plan,
)

from distillery.cache.plan import differences
from distillery.cache.store import record_path
from distillery.models.pair import resample_tokens
from distillery.models.views import Augmentation
from distillery.reading.rows import ImageRows
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import sha256_of
from distillery.teacher_cache.identity import TeacherCacheSpec, configured_identity
from distillery.teacher_cache.problems import find_teacher_problems
from distillery.teacher_cache.reader import TeacherCache, find_teacher_cache

FORMS = {
    "none": {},
    "full": {"tokens": "full"},
    "grid": {"tokens": "grid", "token_grid": 3},
    "pca": {"tokens": "pca", "token_dims": 6},
    "logits": {"fields": ("logits", "tokens"), "tokens": "auto", "dtype": "float32"},
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """One folder of teacher outputs in every form; 40 images in 5 shards, of which image 3 cannot be decoded."""
    return {
        name: make_teacher_test_cache(tmp_path_factory.mktemp(name), bad=(3,), **changes)
        for name, changes in FORMS.items()
    }


@pytest.fixture
def copy(plans, tmp_path):
    """A copy of the folder without tokens, to be damaged: (plan, TeacherCache's folder)."""
    shutil.copytree(plans["full"].images.directory, tmp_path / "cache")
    return tmp_path / "cache" / "teacher" / plans["full"].directory.name


def pairs() -> tuple[np.ndarray, np.ndarray]:
    return np.array([39, 0, 8, 0, 21, 7]), np.array([1, 0, 1, 1, 0, 0])


def live_features(plan, global_idx, view):
    images = ImageRows(plan.images.directory, plan.images.fingerprint)
    return live_teacher().features(
        images.read_rows(*images.find(global_idx)), torch.from_numpy(global_idx), torch.from_numpy(view)
    )


@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_is_what_the_teacher_says_of_these_views(plans, form):
    plan = plans[form]
    cache = find_teacher_cache(plan.images.directory, plan.spec.configured)
    found, live = cache.read(*pairs()), live_features(plan, *pairs())
    assert set(found) == set(cache.widths)
    torch.testing.assert_close(found["pooled"], live.pooled, rtol=2e-3, atol=1e-4)
    if cache.grid is not None:
        tokens = resample_tokens(live.tokens, live.grid, cache.grid)
        # all six dimensions are kept: what is lost in the form pca is the rounding to int8
        torch.testing.assert_close(found["tokens"], tokens, rtol=2e-3, atol=0.06 if form == "pca" else 1e-3)
    if "logits" in found:
        torch.testing.assert_close(found["logits"], live.logits)


@pytest.mark.parametrize("form, grid", [("none", None), ("full", (4, 4)), ("grid", (3, 3)), ("logits", (4, 4))])
def test_the_grid_is_the_teachers_or_as_coarse_as_asked_for_and_never_finer(plans, form, grid):
    cache = TeacherCache(plans[form].directory)
    assert cache.grid == grid
    assert cache.widths.get("tokens") == (grid and 6)


def test_a_mirrored_view_is_a_view_of_its_own(tmp_path):
    teacher = live_teacher(augmentation=Augmentation(hflip=True, mean=MEAN, std=STD))
    make_teacher_test_cache(tmp_path)
    plan = teacher_plan(images_plan(tmp_path), teacher, tokens="full")
    run_pass(plan, teacher)
    cache, global_idx = TeacherCache(plan.directory), np.arange(40)
    first, second = (cache.read(global_idx, np.full(40, view))["tokens"] for view in (0, 1))
    mirrored = first.unflatten(1, (4, 4)).flip(2).flatten(1, 2)
    # the convolution's windows are not symmetric: flipping a stored grid is not what the teacher says of the mirror
    assert (second - mirrored).abs().amax((1, 2)).min() > 0.01


def test_statistics_are_the_mean_and_deviation_over_all_valid_images_and_views(plans):
    plan = plans["full"]
    valid = np.array([i for i in range(40) if i != 3])
    parts = [live_features(plan, valid, np.full(len(valid), view)) for view in (0, 1)]
    statistics = TeacherCache(plan.directory).statistics
    for field in ("pooled", "tokens"):
        values = torch.cat([getattr(part, field) for part in parts]).flatten(0, -2).double()
        torch.testing.assert_close(statistics[f"{field}_mean"], values.mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(statistics[f"{field}_std"], values.std(0, correction=0), rtol=1e-5, atol=1e-7)


def test_shards_are_plain_files_for_torch_aligned_row_by_row_with_the_images(plans):
    plan = plans["pca"]
    shard = torch.load(plan.shard_path(0), weights_only=True)
    images = torch.load(plan.images.shard_path(0), weights_only=True)
    assert shard["pooled"].shape == (8, 2, 6)
    assert shard["pooled"].dtype == torch.float16
    assert shard["tokens"].shape == (8, 2, 16, 6)
    assert shard["tokens"].dtype == torch.int8
    assert torch.equal(shard["valid"], images["valid"])
    assert not shard["valid"][3]
    assert not shard["pooled"][3].any()
    assert json.loads(shard["meta"])["fingerprint"] == plan.spec.fingerprint
    assert TeacherCache(plan.directory).bytes_per_view == 6 * 2 + 16 * 6


def test_only_the_fields_asked_for_are_read(plans):
    assert set(TeacherCache(plans["full"].directory).read(*pairs(), fields=["pooled"])) == {"pooled"}


@pytest.mark.parametrize("name, dtype", [("pca", torch.int8), ("full", torch.float16)])
def test_what_is_copied_to_a_device_is_as_small_as_on_disk_and_decoded_in_float32_there(plans, name, dtype):
    cache = TeacherCache(plans[name].directory)
    stored = cache.read_stored(*pairs())
    assert stored["tokens"].dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        decoded = {field: cache.decode(values) for field, values in stored.items()}
    for field, values in cache.read(*pairs()).items():
        assert values.dtype == decoded[field].dtype == torch.float32
        assert torch.equal(values, decoded[field])


def test_copies_in_other_processes_read_the_same(plans):
    cache = TeacherCache(plans["full"].directory)
    copied = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copied.read(*pairs())["tokens"], cache.read(*pairs())["tokens"])


# ---- which folder ------------------------------------------------------------------------------------------


def wanted(plan, model=None, **changes):
    teacher_cache = {"views": 2, "seed": 0, "tokens": "none", "token_grid": 8, "token_dims": 4, "dtype": "float16"}
    return configured_identity(
        MODEL | (model or {}), teacher_cache | changes, precision="auto", images=plan.images.fingerprint,
        augmentation=live_teacher().augmentation, loss_fields=["pooled"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "model, changes, difference",
    [
        ({}, {"views": 4}, "views.num_views: the cache has 2, now it would be 4"),
        ({}, {"seed": 7}, "views.seed: the cache has 0, now it would be 7"),
        ({}, {"tokens": "full"}, "stored.tokens.form: the cache has 'none', now it would be 'full'"),
        ({"teacher_img_size": 16}, {}, "teacher.img_size: the cache has None, now it would be 16"),
        ({"teacher_kwargs": {"a": 1}}, {}, "teacher.kwargs.a: the cache has None, now it would be 1"),
        ({"teacher_name": "other"}, {"dtype": "float32"}, "teacher.name: the cache has 'tiny', now it would be 'other"),
    ],
)
def test_another_configuration_is_refused_with_what_differs(plans, model, changes, difference):
    plan = plans["none"]
    assert find_teacher_cache(plan.images.directory, wanted(plan)).num_views == 2
    with pytest.raises(UserError, match="no teacher outputs of this configuration") as error:
        find_teacher_cache(plan.images.directory, wanted(plan, model, **changes))
    assert difference in str(error.value)
    assert "precompute_cache.py --teacher" in str(error.value)


def test_other_weights_and_other_images_are_refused(plans):
    plan = plans["none"]
    with pytest.raises(UserError, match="resolved.weights_hash: the cache has '[0-9a-f]{32}', now it would be 'x'"):
        find_teacher_cache(plan.images.directory, wanted(plan) | {"resolved": {"weights_hash": "x"}})
    with pytest.raises(UserError, match="images: the cache has"):
        find_teacher_cache(plan.images.directory, wanted(plan) | {"images": "of other images"})


def test_the_nearest_of_several_folders_is_the_one_compared(plans, copy):
    teacher = live_teacher(seed=2)
    plan = teacher_plan(images_plan(copy.parents[1]), teacher, views=3)
    run_pass(plan, teacher)
    assert len(list(copy.parent.iterdir())) == 2
    with pytest.raises(UserError) as error:
        find_teacher_cache(copy.parents[1], wanted(plan, views=3, seed=1))
    assert str(plan.directory) in str(error.value)
    assert "num_views" not in str(error.value)


def test_of_several_folders_that_fit_the_one_a_run_was_started_on_is_taken(copy):
    plans = [teacher_plan(images_plan(copy.parents[1]), live_teacher(seed=seed)) for seed in (2, 3, 4)]
    for plan, seed in zip(plans, (2, 3, 4), strict=True):
        run_pass(plan, live_teacher(seed=seed))
    for plan in plans:
        found = find_teacher_cache(copy.parents[1], wanted(plan), plan.spec.fingerprint)
        assert found.fingerprint == plan.spec.fingerprint


def test_of_several_folders_that_fit_the_one_made_last_is_taken(copy):
    plans = [teacher_plan(images_plan(copy.parents[1]), live_teacher(seed=seed)) for seed in (2, 3)]
    for plan, seed in zip(plans, (2, 3), strict=True):
        run_pass(plan, live_teacher(seed=seed))
    for last, before in (plans, plans[::-1]):
        os.utime(before.directory / "index.json", ns=(0, 0))
        os.utime(last.directory / "index.json")
        assert find_teacher_cache(copy.parents[1], wanted(last)).fingerprint == last.spec.fingerprint


def test_of_folders_that_differ_in_the_weights_the_one_the_last_pass_named_is_taken_and_the_others_are_told(copy):
    plans = [teacher_plan(images_plan(copy.parents[1]), live_teacher(seed=seed)) for seed in (2, 3)]
    for turn in (0, 1, 0, 1, 1):
        run_pass(plans[turn], live_teacher(seed=turn + 2))
        found = find_teacher_cache(copy.parents[1], wanted(plans[turn]))
        assert found.directory == plans[turn].directory
        others = [plan.directory for plan in plans if plan is not plans[turn] and plan.directory.exists()]
        assert found.of_other_weights == others
    told = find_teacher_cache(copy.parents[1], wanted(plans[0]) | {"resolved": {"weights_hash": found.weights_hash}})
    assert (told.directory, told.of_other_weights) == (plans[1].directory, [])


def test_no_folder_at_all_names_the_command(tmp_path):
    with pytest.raises(MissingFileError, match="no teacher outputs there. Run: python precompute_cache.py --teacher"):
        find_teacher_cache(tmp_path, {})


def test_a_checkpoint_counts_by_its_bytes_and_a_local_hub_folder_by_its_code(tmp_path):
    def identity_of(name, weights, code):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "weights_blob").write_bytes(weights)
        (folder / "weights.pt").symlink_to(folder / "weights_blob")  # as the hub's cache has them
        (folder / "hubconf.py").write_text(code)
        model = MODEL | {"teacher_repo": str(folder), "teacher_checkpoint": str(folder / "weights.pt")}
        return configured_identity(
            model, TEACHER_CACHE, precision="auto", images="x", augmentation=live_teacher().augmentation, loss_fields=[]
        )

    first = identity_of("a", b"1", "code")
    assert first == identity_of("b", b"1", "code")
    assert first["teacher"]["checkpoint_hash"] != identity_of("c", b"2", "code")["teacher"]["checkpoint_hash"]
    assert first["teacher"]["repo"] != identity_of("d", b"1", "more code")["teacher"]["repo"]
    with pytest.raises(MissingFileError, match="teacher_checkpoint"):
        configured_identity(
            MODEL | {"teacher_checkpoint": str(tmp_path / "none")}, TEACHER_CACHE, precision="auto", images="x",
            augmentation=live_teacher().augmentation, loss_fields=[],
        )  # fmt: skip


def test_the_projection_is_part_of_the_identity_and_without_it_nothing_of_it_is_there(plans):
    plan = plans["none"]
    # outputs that were stored before there was this key have no word of it either
    assert wanted(plan, {"teacher_projection": False}) == wanted(plan)
    projected = wanted(plan, {"teacher_projection": True})
    assert projected["teacher"] == wanted(plan)["teacher"] | {"projection": True}
    assert wanted(plan, {"teacher_mirror": False}) == wanted(plan)
    mirrored = wanted(plan, {"teacher_mirror": True})
    assert mirrored["teacher"] == wanted(plan)["teacher"] | {"mirror": True}
    assert list(differences(mirrored, wanted(plan))) == [("teacher.mirror", True, False)]


def test_every_part_of_the_identity_changes_the_fingerprint(plans):
    spec = plans["none"].spec
    fingerprints = {spec.fingerprint}
    for key in ("weights_hash", "img_size", "mean", "std", "precision"):
        fingerprints.add(TeacherCacheSpec(spec.configured, spec.resolved | {key: "another"}).fingerprint)
    for key in ("teacher", "images", "views", "stored"):
        fingerprints.add(TeacherCacheSpec(spec.configured | {key: {}}, spec.resolved).fingerprint)
    assert len(fingerprints) == 10


# ---- damage ------------------------------------------------------------------------------------------------


def test_a_damaged_vector_is_found_when_it_is_first_read_and_named(copy):
    path = copy / "teacher_shard_00001.pt"
    data = bytearray(path.read_bytes())
    offset = data.index(torch.load(path, weights_only=True)["tokens"][5, 1].numpy().tobytes())
    data[offset + 3] ^= 4
    path.write_bytes(data)
    cache = TeacherCache(copy)
    cache.read(np.array([13]), np.array([0]))
    cache.read(np.array([13]), np.array([1]), fields=["pooled"])
    with pytest.raises(UserError, match=r"teacher_shard_00001.pt: tokens of row 5, view 1 \(global_idx 13, byte"):
        cache.read(np.array([13]), np.array([1]))


def test_images_without_outputs_name_the_command(copy):
    cache = TeacherCache(copy)
    with pytest.raises(UserError, match="no teacher outputs for the images from 40 on .*--teacher"):
        cache.read(np.array([3, 40]), np.array([0, 0]))
    with pytest.raises(UserError, match="views 0..2 of 2 were asked for"):
        cache.read(np.array([3, 4]), np.array([0, 2]))


def test_images_that_came_after_the_pass_are_noticed_before_training(copy):
    cache = TeacherCache(copy)
    cache.check_covers(np.array([0, 8, 32]), np.array([8, 8, 8]))
    cache.check_covers(np.array([4]), np.array([30]))
    with pytest.raises(UserError, match="from 40 on .the shard of 32..47.: the image cache has grown"):
        cache.check_covers(np.array([0, 32]), np.array([8, 16]))


def test_a_vanished_shard_is_named(copy):
    (copy / "teacher_shard_00002.pt").unlink()
    with pytest.raises(MissingFileError, match="teacher_shard_00002.pt.*--teacher"):
        TeacherCache(copy).read(np.array([16]), np.array([0]))


def test_a_last_shard_that_grew_before_it_was_opened_gives_the_outputs_the_index_lists(tmp_path):
    teacher, rows = live_teacher(), (np.array([35, 33, 2]), np.array([1, 0, 1]))
    short = images_plan(tmp_path, 36, source_rows=40)
    make_images(short)
    plan = teacher_plan(short, teacher)
    run_pass(plan, teacher)
    caches, record = [TeacherCache(plan.directory) for _ in range(2)], record_path(plan.shard_path(4))
    expected, before = TeacherCache(plan.directory).read(*rows), record.read_bytes()
    whole = images_plan(tmp_path, 40)
    make_images(whole)
    run_pass(teacher_plan(whole, teacher), teacher)
    assert len(TeacherCache(plan.directory).read(np.array([39]), np.array([0]))) == len(expected)
    # before: the moment between the longer shard and its record
    for cache, text in zip(caches, (record.read_bytes(), before), strict=True):
        record.write_bytes(text)
        found = cache.read(*rows)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_lost_record_is_made_up_for_by_what_the_shard_says(copy):
    expected = TeacherCache(copy).read(*pairs())
    for path in copy.glob("teacher_shard_*.json"):
        path.unlink()
    assert torch.equal(TeacherCache(copy).read(*pairs())["tokens"], expected["tokens"])


def test_a_shard_of_other_outputs_under_the_same_name_is_refused(copy, plans):
    for source in (plans["none"].shard_path(1), record_path(plans["none"].shard_path(1))):
        shutil.copy(source, copy / source.name)
    with pytest.raises(UserError, match="is not the shard that index.json lists"):
        TeacherCache(copy).read(np.array([9]), np.array([0]))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["shards"][0].update(shard_path="../../images_shard_00000.pt"),
        lambda index: index["shards"][1].update(global_start=0),
        lambda index: index["shards"][0].update(num_samples=10**12),
        lambda index: index["shards"][0].update(bytes=-1),
        lambda index: index.update(num_views=0),
        lambda index: index.update(fields={}),
        lambda index: index.update(shards=None),
        lambda index: index["identity"].update(images="forged"),
        lambda index: index["fields"]["pooled"].update(dtype="object"),
    ],
)
def test_a_damaged_or_hostile_index_is_refused(copy, change):
    index = json.loads((copy / "index.json").read_text())
    change(index)
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json: damaged"):
        TeacherCache(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda identity: identity.pop("resolved"),
        lambda identity: identity["resolved"].update(grid=[0]),
        lambda identity: identity["resolved"].update(weights_hash=7),
        lambda identity: identity["stored"].update(tokens=None),
    ],
)
def test_an_identity_that_lacks_what_is_read_of_it_is_refused_although_its_hash_agrees(copy, change):
    index = json.loads((copy / "index.json").read_text())
    change(index["identity"])
    index["fingerprint"] = sha256_of(index["identity"])
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json: damaged"):
        TeacherCache(copy)


def test_an_index_of_a_later_version_is_refused(copy):
    index = json.loads((copy / "index.json").read_text()) | {"format_version": 4}
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="later version"):
        TeacherCache(copy)


@pytest.mark.parametrize("lost", ["statistics", "records", "both"])
def test_statistics_are_those_of_the_shards_whatever_statistics_json_says_and_it_is_made_again(copy, plans, lost):
    expected = TeacherCache(plans["full"].directory).statistics
    if lost != "records":
        found = json.loads((copy / "statistics.json").read_text())
        (copy / "statistics.json").write_text(json.dumps(found | {"pooled_std": [100.0] * 6}))
    if lost != "statistics":
        (copy / "teacher_shard_00001.json").unlink()
    found = TeacherCache(copy).statistics
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    teacher, images = live_teacher(), images_plan(copy.parents[1])
    assert run_pass(teacher_plan(images, teacher, **FORMS["full"]), teacher).shards_made == 0
    assert folder_bytes(copy) == folder_bytes(plans["full"].directory)


def test_another_basis_than_the_shards_were_made_with_is_refused(plans, tmp_path):
    shutil.copytree(plans["pca"].images.directory, tmp_path / "cache")
    folder = tmp_path / "cache" / "teacher" / plans["pca"].directory.name
    (folder / "token_basis.pt").write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the basis that the shards were made with"):
        TeacherCache(folder)
    assert [path.name for _, path in find_teacher_problems(folder)] == ["token_basis.pt"]
