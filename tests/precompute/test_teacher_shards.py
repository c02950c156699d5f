import errno
import itertools
import json
import math
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from caches import MEAN, STD, make_test_cache
from stage1 import folder_bytes, wait_for_the_clock
from teachers import images_plan, live_teacher, make_images, make_teacher_test_cache, run_pass, teacher_plan

from distillery.cache.encoded import RowEncoding
from distillery.cache.images import IMAGE_SHARDS
from distillery.cache.store import record_path
from distillery.models.backbone import Features
from distillery.models.views import Augmentation
from distillery.precompute import teacher_shards
from distillery.precompute.teacher_job import TeacherJob, make_outputs, report_outputs
from distillery.reading.rows import ImageRows
from distillery.system.errors import Interrupted, RunError, UserError
from distillery.system.signals import StopFlag
from distillery.teacher_cache.local_files import TeacherFiles
from distillery.teacher_cache.outputs import (
    HostCopy,
    LiveTeacher,
    check_magnitudes,
    encode_features,
    fit_basis,
    rows_of_valid,
)
from distillery.teacher_cache.problems import find_teacher_problems
from distillery.teacher_cache.reader import TeacherCache
from distillery.teacher_cache.records import TEACHER_SHARDS, statistics_of
from distillery.teacher_cache.replay import replay_views
from distillery.teacher_cache.survey import survey_teacher

FULL = {"tokens": "full"}


class Stop:
    """Asks to stop after a number of looks."""

    reason = "a test"

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def requested(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_exc: object) -> None:
        pass


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The plan of an undisturbed pass over 40 images in 5 shards, with all tokens."""
    return make_teacher_test_cache(tmp_path_factory.mktemp("reference"), bad=(3,), **FULL)


@pytest.fixture
def images(tmp_path):
    """The same images, without outputs: their plan."""
    make_test_cache(tmp_path / "cache", 40, bad=(3,))
    return images_plan(tmp_path / "cache", 40)


@pytest.fixture
def work(images):
    """(plan, teacher) of the same pass, not yet made."""
    teacher = live_teacher()
    return teacher_plan(images, teacher, **FULL), teacher


def test_a_finished_folder_holds_nothing_undeclared_and_every_byte_as_its_hash(reference):
    assert list(find_teacher_problems(reference.directory)) == []
    shards = [f"teacher_shard_{i:05d}" for i in range(5)]
    expected = {"index.json", "statistics.json"} | {f"{name}.{end}" for name in shards for end in ("pt", "json")}
    assert {path.name for path in reference.directory.iterdir()} == expected


def test_jobs_in_any_order_make_the_same_folder(reference, work):
    for shards in (range(3, 5), range(0, 1), range(1, 3)):
        assert run_pass(*work, shards).shards_left == 0
        assert TeacherCache(work[0].directory).index["complete"] == (shards == range(1, 3))
    assert folder_bytes(work[0].directory) == folder_bytes(reference.directory)


def test_two_passes_over_one_range_share_it(reference, work, monkeypatch):
    monkeypatch.setattr("distillery.system.signals.StopFlag.__enter__", lambda self: self)
    monkeypatch.setattr("distillery.system.signals.StopFlag.__exit__", lambda self, *exc: None)
    reports = []
    threads = [threading.Thread(target=lambda: reports.append(run_pass(*work))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.shards_left for report in reports] == [0, 0]
    assert folder_bytes(work[0].directory) == folder_bytes(reference.directory)


def test_stopped_after_any_batch_it_goes_on_to_the_same_bytes(reference, work, monkeypatch):
    monkeypatch.setattr("distillery.precompute.loop._GRACE_S", -1)
    for looks in range(12):
        report = run_pass(*work, stop=Stop(looks))
        assert report.shards_made + report.shards_left <= 5
        assert not list(work[0].directory.glob(".*"))
        if not report.shards_left:
            break
    assert report.shards_left == 0
    assert folder_bytes(work[0].directory) == folder_bytes(reference.directory)


def test_images_that_could_not_be_decoded_are_zero_and_count_nowhere(reference):
    shard = torch.load(reference.shard_path(0), weights_only=True)
    assert shard["valid"].tolist() == [True, True, True, False, True, True, True, True]
    assert not shard["pooled"][3].any()
    assert not shard["tokens"][3].any()
    assert shard["pooled"][2].any()
    counts = json.loads((reference.directory / "statistics.json").read_text())
    assert (counts["pooled_count"], counts["tokens_count"]) == (39 * 2, 39 * 2 * 16)


def test_over_a_compressed_cache_the_teacher_sees_the_images_that_its_rows_decode_to(reference, tmp_path):
    make_test_cache(tmp_path, 40, dtype="jpeg", bad=(3,))  # of PNG files as they are: the pixels of the reference
    images = replace(images_plan(tmp_path, 40), dtype="jpeg", encoding=RowEncoding("original", 90))
    teacher = live_teacher()
    plan = teacher_plan(images, teacher, **FULL)
    assert run_pass(plan, teacher).shards_made == 5
    for name in sorted(path.name for path in plan.directory.glob("*.pt")):
        shards = [torch.load(folder / name, weights_only=True) for folder in (plan.directory, reference.directory)]
        assert all(torch.equal(shards[0][field], shards[1][field]) for field in ("pooled", "tokens", "valid"))
    assert list(find_teacher_problems(plan.directory)) == []


def test_the_bytes_of_a_shard_do_not_depend_on_the_shards_made_before(reference, work):
    run_pass(*work, range(4, 5))
    assert work[0].shard_path(4).read_bytes() == reference.shard_path(4).read_bytes()


def test_a_shard_larger_than_a_batch_is_aligned_with_its_images(tmp_path):
    make_test_cache(tmp_path, 150, shard_size=150, bad=(70,))
    teacher = live_teacher()
    plan = teacher_plan(replace(images_plan(tmp_path, 150), shard_size=150), teacher)
    run_pass(plan, teacher)
    rows, found = ImageRows(tmp_path, plan.images.fingerprint), TeacherCache(plan.directory)
    global_idx = np.array([i for i in range(150) if i != 70])
    stored = found.read(global_idx, np.ones(149, np.int64))["pooled"]
    live = teacher.features(rows.read_rows(*rows.find(global_idx)), torch.from_numpy(global_idx), 1).pooled
    torch.testing.assert_close(stored, live, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options, passes",
    [({}, 2), ({"random_resized_crop": (0.5, 1.0)}, 3), ({"hflip": False}, 3)],
    ids=["mirror alone", "crops too", "no mirror"],
)
def test_views_that_differ_by_the_mirror_alone_take_one_pass_of_a_mirrored_teacher(tmp_path, options, passes):
    make_test_cache(tmp_path, 16)
    teacher = live_teacher(augmentation=Augmentation(mean=MEAN, std=STD, **options), mirror=True)
    plan = teacher_plan(images_plan(tmp_path, 16), teacher, fields=("logits",), views=3, **FULL)
    runs = []
    teacher.backbone.register_forward_hook(lambda _model, arguments, _out: runs.append(len(arguments[0])))
    run_pass(plan, teacher)
    assert sum(runs) == 16 * passes == 16 * teacher.passes(3)
    # every view is what the teacher says of it
    found, images = TeacherCache(plan.directory), ImageRows(tmp_path, plan.images.fingerprint)
    assert all(replay.agrees for replay in replay_views(found, teacher, images, 48, np.random.default_rng(0)))
    for view in range(3):
        stored = found.read(np.arange(16), np.full(16, view))
        live = teacher.features(images.read_rows(*images.find(np.arange(16))), torch.arange(16), view)
        for field in ("pooled", "tokens", "logits"):
            torch.testing.assert_close(stored[field], live.tensors()[field], rtol=2e-3, atol=1e-3)


def test_while_a_batch_is_written_the_next_one_is_computed(reference, work, monkeypatch):
    launched, seen = threading.Semaphore(0), []

    class Copy(HostCopy):
        """Outputs that arrive once the batch after them has been launched, or the shard has no more."""

        def __init__(self, tensors):
            super().__init__(tensors)
            launched.release()

        def wait(self):
            is_last = len(seen) % 2
            # this batch, and the next
            seen.append(all(launched.acquire(timeout=10) for _ in range(0 if is_last else 2)))
            return super().wait()

    monkeypatch.setattr(teacher_shards, "HostCopy", Copy)
    monkeypatch.setattr(teacher_shards, "forward_batch", lambda device: 4)
    run_pass(*work)
    assert seen == [True] * 10  # two batches in each of five shards
    assert folder_bytes(work[0].directory).keys() == folder_bytes(reference.directory).keys()


def test_where_memory_runs_out_whole_shards_are_made_in_half_the_batch(images, monkeypatch, capsys):
    teacher, calls = live_teacher(), []
    plan = teacher_plan(images, teacher, tokens="pca")
    forward = LiveTeacher.features

    def features(self, batch, *arguments):
        calls.append(len(batch))
        # in the second batch of the second shard another program has taken memory
        if len(batch) > 2 and len(calls) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, *arguments)

    monkeypatch.setattr(LiveTeacher, "features", features)
    monkeypatch.setattr(teacher_shards, "forward_batch", lambda device: 4)
    report = run_pass(plan, teacher)
    assert (report.shards_made, report.shards_left) == (5, 0)
    assert capsys.readouterr().err.startswith("out of GPU memory with 4 images at a time; going on with 2")
    assert list(find_teacher_problems(plan.directory)) == []
    # the basis takes 10 batches, the first shard 2 of 2 views each; the second shard is begun again
    assert calls == [4] * (10 + 4 + 2 + 1) + [2] * (4 * 4 * 2)


def test_one_image_that_does_not_fit_into_memory_is_an_error(work, monkeypatch):
    def features(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LiveTeacher, "features", features)
    with pytest.raises(torch.OutOfMemoryError):
        run_pass(*work)
    assert not list(work[0].directory.glob("*.pt"))
    assert not list(work[0].directory.glob(".*"))


class DeviceTensor:
    """Stands in for a tensor on the GPU: notes what is asked of it."""

    is_cuda = True

    def __init__(self, value, noted):
        self.value, self.noted = value, noted

    def to(self, device, *, non_blocking):
        self.noted.append(("copy", device, non_blocking))
        return self.value


def test_outputs_are_copied_without_a_wait_and_read_after_the_event_that_follows_them(monkeypatch):
    noted = []

    class Event:
        def __init__(self, *, blocking):
            assert blocking

        def record(self):
            noted.append("record")

        def synchronize(self):
            noted.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    a, b = torch.arange(3), torch.arange(4)
    copy = HostCopy({"a": DeviceTensor(a, noted), "b": DeviceTensor(b, noted)})
    assert noted == [("copy", "cpu", True), ("copy", "cpu", True), "record"]
    found = copy.wait()
    assert noted[3:] == ["synchronize"]
    assert found["a"] is a and found["b"] is b


@pytest.mark.parametrize("dtype, largest, fits", [
    ("float16", 65503.0, True), ("float16", 65520.0, False), ("bfloat16", 3e38, True), ("float32", 3e38, True),
    ("float32", math.inf, False), ("float16", math.nan, False), ("bfloat16", -math.nan, False),
])  # fmt: skip
def test_one_magnitude_of_a_field_says_what_every_value_says(images, dtype, largest, fits):
    teacher = live_teacher()
    spec = teacher_plan(images, teacher, dtype=dtype).spec
    pooled = torch.zeros(5, 6)
    pooled[3, 2] = largest
    encoded, magnitudes = encode_features(Features(pooled, None, (1, 1)), spec, None)
    assert bool(encoded["pooled"].isfinite().all()) == fits
    # of two views, the second
    magnitudes = torch.stack([torch.zeros_like(magnitudes), magnitudes])
    if fits:
        check_magnitudes(magnitudes, spec)
    else:
        with pytest.raises(UserError, match=f"the teacher's pooled are not finite as {dtype}"):
            check_magnitudes(magnitudes, spec)


@pytest.mark.parametrize("valid", [[True] * 4, [True, False, False, True], [False] * 4])
def test_the_rows_that_count_are_those_of_the_mask(valid):
    values = torch.arange(4.0)
    rows = rows_of_valid(np.array(valid), torch.device("cpu"))
    assert torch.equal(values[rows], values[torch.tensor(valid)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_two_passes_make_the_same_bytes_and_agree_with_the_cpu(tmp_path, precision):
    folders = []
    for name in ("a", "b"):
        make_test_cache(tmp_path / name, 40)
        cpu = live_teacher()
        gpu = replace(cpu, backbone=cpu.backbone.to("cuda"), device=torch.device("cuda"), precision=precision)
        plan = teacher_plan(images_plan(tmp_path / name), gpu, tokens="pca")
        run_pass(plan, gpu)
        folders.append(folder_bytes(plan.directory))
    assert folders[0] == folders[1]
    images = ImageRows(tmp_path / "b", plan.images.fingerprint)
    replays = replay_views(TeacherCache(plan.directory), live_teacher(), images, 20, np.random.default_rng(0))
    assert min(replay.cosine for replay in replays) > 0.999


# ---- what is found there -----------------------------------------------------------------------------------


def damaged(path) -> None:
    data = bytearray(path.read_bytes())
    data[400] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: plan.shard_path(1).unlink(),
        lambda plan: damaged(plan.shard_path(1)),
        lambda plan: os.truncate(plan.shard_path(1), 1000),
        lambda plan: plan.shard_path(1).write_bytes(b""),
        lambda plan: plan.shard_path(1).write_bytes(plan.shard_path(2).read_bytes()),
        lambda plan: record_path(plan.shard_path(1)).unlink(),
        lambda plan: damaged(record_path(plan.shard_path(1))),
        lambda plan: (plan.directory / "index.json").unlink(),
        lambda plan: (plan.directory / "statistics.json").write_text("[]"),
        lambda plan: (plan.directory / ".teacher_shard_00001.pt.tmp-0123456789ab").write_bytes(b"half a shard"),
    ],
    ids=["gone", "flipped", "cut", "empty", "swapped", "no-record", "bad-record", "no-index", "statistics", "leftover"],
)
def test_whatever_is_damaged_is_made_again_by_the_same_command(reference, work, damage):
    run_pass(*work)
    wait_for_the_clock(work[0].directory)
    damage(work[0])
    run_pass(*work)
    assert folder_bytes(work[0].directory) == folder_bytes(reference.directory)


def test_a_whole_shard_without_its_record_is_accepted_not_made_again(work):
    run_pass(*work)
    record_path(work[0].shard_path(3)).unlink()
    report = run_pass(*work)
    assert (report.shards_made, report.shards_accepted, report.messages) == (0, 1, [])


def test_a_cache_that_has_grown_is_extended_and_ends_like_one_made_at_once(tmp_path, reference):
    folder, teacher = tmp_path / "cache", live_teacher()
    plans = {}
    for rows in (20, 40):
        make_images(images_of(folder, rows), bad=(3,))
        plan = plans[rows] = teacher_plan(images_of(folder, rows), teacher, **FULL)
        expected = {20: [0, 1, 2], 40: [2, 3, 4]}[rows]
        assert survey_teacher(plan, range(plan.num_shards)).missing == expected
        run_pass(plan, teacher)
    assert folder_bytes(plans[40].directory) == folder_bytes(reference.directory)


def images_of(folder, rows):
    """The plan of the first `rows` of the reference's images."""
    return replace(images_plan(folder, 40), num_rows=rows)


def test_missing_images_are_named_with_the_command_that_makes_them(work):
    work[0].images.shard_path(2).unlink()
    with pytest.raises(UserError, match="images_shard_00002.pt: has 0 images, 8 are wanted. Make the images first"):
        run_pass(*work)


def test_a_damaged_image_is_found_before_the_teacher_sees_it(work):
    path = work[0].images.shard_path(2)
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"images_shard_00002.pt: row 1 .*is damaged"):
        run_pass(*work)
    assert len(list(work[0].directory.glob("teacher_shard_*.pt"))) == 2


def test_a_folder_of_another_configuration_is_not_written_to(work):
    plan, teacher = work
    other = teacher_plan(plan.images, teacher, views=3, tokens="full")
    run_pass(plan, teacher)
    plan.directory.rename(other.directory)
    with pytest.raises(UserError, match="made with another configuration than its folder is named after"):
        run_pass(other, teacher)


def test_outputs_that_do_not_fit_the_dtype_are_refused(work):
    plan, teacher = work
    with torch.no_grad():
        teacher.backbone.model.stem[1].running_mean.fill_(float("nan"))
    with pytest.raises(UserError, match="the teacher's pooled are not finite as float16"):
        run_pass(plan, teacher)
    assert not list(plan.directory.glob("*.pt"))


@pytest.mark.parametrize("number, kind", [(errno.ENOSPC, RunError), (errno.EDQUOT, RunError), (errno.EROFS, UserError)])
def test_a_full_disk_stops_the_pass_cleanly_and_it_goes_on_later(reference, work, monkeypatch, number, kind):
    calls = itertools.count()

    def fail(fd, data, offset, write=teacher_shards.pwrite_all):
        if next(calls) == 10:
            raise OSError(number, os.strerror(number))
        return write(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_shards, "pwrite_all", fail)
        with pytest.raises(kind, match="full|quota|cannot be written to"):
            run_pass(*work)
    assert not list(work[0].directory.glob(".*"))
    assert list(find_teacher_problems(work[0].directory)) == []
    run_pass(*work)
    assert folder_bytes(work[0].directory) == folder_bytes(reference.directory)


def test_a_failing_fsync_is_never_taken_for_success(reference, work, monkeypatch):
    calls, fsync = itertools.count(), os.fsync

    def fail_once(fd):
        if next(calls) == 4:
            raise OSError(errno.EIO, "I/O error")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_once)
        run_pass(*work)
    assert folder_bytes(work[0].directory) == folder_bytes(reference.directory)


# ---- statistics and basis ----------------------------------------------------------------------------------


def test_statistics_do_not_depend_on_the_order_in_which_records_were_written(reference):
    records = TEACHER_SHARDS.scan(reference.directory).records()
    assert [record["shard_idx"] for record in records] == [0, 1, 2, 3, 4]
    assert statistics_of(records) == json.loads((reference.directory / "statistics.json").read_text())


def test_the_basis_is_that_of_the_covariance_largest_first(tmp_path):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(5, 5, generator=generator)
    batches = [torch.randn(4, 7, 5, generator=generator) @ mixing + 3 for _ in range(3)]
    basis = fit_basis(batches, 3)
    rows = torch.cat(batches).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(rows.T.cov(correction=0))
    torch.testing.assert_close(basis["mean"], rows.mean(0).float())
    torch.testing.assert_close(basis["scale"], (8 * values.flip(0)[:3].sqrt()).float())
    torch.testing.assert_close(basis["components"].abs(), vectors.T.flip(0)[:3].abs().float(), rtol=1e-4, atol=1e-5)
    assert (basis["components"].amax(1) == basis["components"].abs().amax(1)).all()


def test_the_basis_is_of_evenly_spread_images_whoever_makes_it(tmp_path):
    plans = [make_teacher_test_cache(tmp_path / name, tokens="pca") for name in ("a", "b")]
    assert folder_bytes(plans[0].directory) == folder_bytes(plans[1].directory)
    basis = plans[0].directory / "token_basis.pt"
    basis.unlink()
    teacher = live_teacher()
    assert run_pass(teacher_plan(images_plan(tmp_path / "a"), teacher, tokens="pca"), teacher).shards_made == 0
    assert folder_bytes(plans[0].directory) == folder_bytes(plans[1].directory)


def test_shards_in_another_basis_are_made_again(tmp_path):
    plan, teacher = make_teacher_test_cache(tmp_path, tokens="pca"), live_teacher()
    before = folder_bytes(plan.directory)
    basis = torch.load(plan.directory / "token_basis.pt", weights_only=True)
    torch.save(basis | {"scale": basis["scale"] * 2}, plan.directory / "token_basis.pt")
    report = run_pass(plan, teacher)
    assert report.shards_made == 5
    (plan.directory / "token_basis.pt").unlink()
    run_pass(plan, teacher)
    assert folder_bytes(plan.directory) == before


def test_a_basis_waits_for_the_whole_image_cache(tmp_path):
    make_test_cache(tmp_path, 40, shards=[0, 1, 2])
    teacher = live_teacher()
    plan = teacher_plan(images_plan(tmp_path), teacher, tokens="pca")
    with pytest.raises(UserError, match="takes its basis from images of the whole cache"):
        run_pass(plan, teacher, range(2))


# ---- the live teacher --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, FULL, {"tokens": "pca", "token_dims": 3}, {"fields": ("logits",)}])
def test_replayed_views_agree_with_what_is_stored(tmp_path, changes):
    plan = make_teacher_test_cache(tmp_path, bad=(3,), **changes)
    images = ImageRows(tmp_path, plan.images.fingerprint)
    replays = list(replay_views(TeacherCache(plan.directory), live_teacher(), images, 20, np.random.default_rng(0)))
    assert {replay.field for replay in replays} == set(plan.spec.view_fields)
    assert {replay.shard for replay in replays} == {f"teacher_shard_{i:05d}.pt" for i in range(5)}
    assert min(replay.cosine for replay in replays) > 0.9999


def test_an_index_that_another_process_wrote_without_the_newest_images_is_written_again(reference, work):
    plan, teacher = work
    path = plan.images.directory / "index.json"
    whole = path.read_bytes()
    records = [record for record in IMAGE_SHARDS.scan(plan.images.directory).records() if record["shard_idx"] < 3]
    path.write_bytes(IMAGE_SHARDS.views_of(records, 40)[1]["index.json"])
    assert run_pass(plan, teacher).shards_left == 0
    assert path.read_bytes() == whole
    assert folder_bytes(plan.directory) == folder_bytes(reference.directory)


def test_a_job_without_a_shard_makes_nothing_and_needs_no_images(tmp_path):
    teacher = live_teacher()
    plan = teacher_plan(images_plan(tmp_path / "none"), teacher)
    job = TeacherJob(plan, teacher, range(0), "tiny", 0, TeacherFiles({}, {}, True))
    with StopFlag() as stop:
        assert make_outputs(job, stop) == 0
    assert not (tmp_path / "none").exists()


def test_outputs_with_a_gap_inside_are_not_complete_however_many_rows_there_are(work, capsys):
    plan, teacher = work
    run_pass(plan, teacher, range(2))
    run_pass(plan, teacher, range(3, 5))
    wanted = replace(plan, images=replace(plan.images, num_rows=24))
    job = TeacherJob(wanted, teacher, range(3), "tiny", 0, TeacherFiles({}, {}, True))
    report_outputs(job)
    assert "32 images in 2 views, 4 shards; not complete yet" in capsys.readouterr().out
    run_pass(plan, teacher)
    report_outputs(job)
    assert "40 images in 2 views, 5 shards; complete" in capsys.readouterr().out


def test_a_stop_before_the_basis_is_there_ends_with_status_75(tmp_path):
    make_test_cache(tmp_path, 40)
    teacher = live_teacher()
    plan = teacher_plan(images_plan(tmp_path), teacher, tokens="pca")
    with pytest.raises(Interrupted, match="a test: the token basis is not made yet"):
        run_pass(plan, teacher, stop=Stop(0))
    assert not (plan.directory / "token_basis.pt").exists()


def test_outputs_of_images_that_could_not_be_decoded_then_and_can_be_now_are_refused(reference):
    cache = TeacherCache(reference.directory)
    starts, rows = np.arange(0, 40, 8), np.full(5, 8)
    cache.check_decoded(starts, rows, np.array([1, 0, 0, 0, 0]))
    cache.check_decoded(starts, rows, np.array([2, 1, 0, 0, 0]))  # training leaves more of them out
    cache.check_decoded(starts, np.array([7, 8, 8, 8, 8]), np.zeros(5, int))  # a shard that is not read to its end
    with pytest.raises(UserError, match="00000.pt: 1 images could not be decoded when the teacher ran.*--teacher"):
        cache.check_decoded(starts, rows, np.zeros(5, int))


def test_a_replay_catches_the_one_shard_of_another_teacher(work):
    plan, teacher = work
    run_pass(plan, teacher, range(3))
    run_pass(plan, live_teacher(seed=2), range(3, 4))
    run_pass(plan, teacher)
    images = ImageRows(plan.images.directory, plan.images.fingerprint)
    replays = list(replay_views(TeacherCache(plan.directory), teacher, images, 10, np.random.default_rng(0)))
    assert {replay.shard for replay in replays if replay.cosine < 0.999} == {"teacher_shard_00003.pt"}
    assert all(replay.cosine < 0.999 for replay in replays if replay.shard == "teacher_shard_00003.pt")


def test_a_lost_basis_is_found_again_and_no_shard_counts_as_missing_without_it(tmp_path):
    plan = make_teacher_test_cache(tmp_path, tokens="pca", token_dims=6)
    before = folder_bytes(plan.directory)
    (plan.directory / "token_basis.pt").unlink()
    assert survey_teacher(plan, range(5)).done == [0, 1, 2, 3, 4]
    assert run_pass(plan, live_teacher()).shards_made == 0
    assert folder_bytes(plan.directory) == before
