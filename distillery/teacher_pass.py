"""precompute_cache.py --teacher: from the configuration to the teacher's pass, its plan in words and its check."""

import shlex
from dataclasses import dataclass, replace

import numpy as np
import torch

from distillery.augment import Augmentation
from distillery.build import build_teacher_backbone, check_tokens, choose_device, choose_precision
from distillery.build_facts import weights_hash
from distillery.cache import load_index
from distillery.config import Configs
from distillery.files import format_bytes, free_bytes
from distillery.losses_table import fields_needed
from distillery.models import MEMORY_FORMAT
from distillery.plan import CachePlan, Survey
from distillery.process import EXIT_DONE, EXIT_ERROR, StopFlag
from distillery.progress import Progress
from distillery.shard_format_fields import FIELD_DTYPES
from distillery.teacher_cache import find_teacher_cache
from distillery.teacher_identity import TeacherCacheSpec, configured_identity, teacher_facts
from distillery.teacher_images import ImageRows
from distillery.teacher_outputs import LiveTeacher
from distillery.teacher_plan import forward_flops
from distillery.teacher_records import teacher_scan
from distillery.teacher_survey import TeacherPlan, images_for_training, survey_teacher
from distillery.teacher_targets import check_storable
from distillery.teacher_verify import LEAST_COSINE, replay_views
from distillery.teacher_writer import make_teacher_cache

DEFAULT_REPLAYS = 64


@dataclass(frozen=True)
class TeacherJob:
    """The teacher's outputs to make, and this process's share of their shards. flops: of one forward pass."""

    plan: TeacherPlan
    teacher: LiveTeacher
    shards: range
    label: str
    flops: int


def build_teacher_job(configs: Configs, images: CachePlan, shards: range) -> TeacherJob:
    """Load the teacher and say what its outputs over an image cache shall be.

    Args:
        configs: all three.
        images: the cache of the training images, which may still have to be made.
        shards: this process's share of the images'; the last one's has what training takes beyond them as well.
    """
    check_storable(configs.train)
    teacher, spec = build_live_teacher(configs, images.fingerprint)
    wanted = images_for_training(images, configs.data.max_samples)
    if shards.stop == images.num_shards:
        shards = range(shards.start, wanted.num_shards)
    label = f"{configs.model.teacher_name} ({configs.model.teacher_source})"
    return TeacherJob(
        TeacherPlan(wanted, spec),
        teacher,
        shards,
        label,
        forward_flops(teacher.backbone, configs.data.image_size),
    )


def build_live_teacher(configs: Configs, images: str) -> tuple[LiveTeacher, TeacherCacheSpec]:
    """The teacher of a configuration on the device, and what decides its outputs over the cache of a fingerprint."""
    device = choose_device("auto")
    # the fastest convolution is searched by the clock, and two runs may find two that round differently
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    data, train, model = configs.data, configs.train, configs.model
    loss_fields = fields_needed(train.distill_loss_weights)
    torch.manual_seed(0)  # of a teacher without weights of its own
    backbone = build_teacher_backbone(model, data, with_logits="logits" in loss_fields).requires_grad_(False).eval()
    check_tokens(backbone, train, "teacher")
    augmentation = Augmentation(**train.augment.model_dump(), mean=data.mean, std=data.std)
    precision = choose_precision(train.precision, device)
    configured = configured_identity(
        model.model_dump(),
        train.teacher_cache.model_dump(),
        precision=train.precision,
        augmentation=augmentation,
        images=images,
        loss_fields=loss_fields,
    )
    spec = TeacherCacheSpec(configured, teacher_facts(backbone, weights_hash(backbone.model), precision))
    backbone = backbone.to(device, memory_format=MEMORY_FORMAT)
    return LiveTeacher(backbone, augmentation, train.teacher_cache.seed, device, precision), spec


def teacher_plan_lines(job: TeacherJob, survey: Survey) -> list[str]:
    """What will be made, how much room it takes, what it costs once and saves in every epoch."""
    plan, spec = job.plan, job.plan.spec
    rows, views = plan.images.num_rows, spec.num_views
    to_make = [*survey.missing, *survey.doubtful]
    rows_to_make = sum(stop - start for start, stop in map(plan.rows_of, to_make))
    fields = ", ".join(
        f"{name} {list(shape)} {dtype} ({format_bytes(np.prod(shape) * np.dtype(FIELD_DTYPES[dtype]).itemsize)})"
        for name, (dtype, shape) in spec.view_fields.items()
    )
    state = f"{len(survey.done)} done, {len(to_make)} to go"
    if len(job.shards) < plan.num_shards:
        state = f"this job's share: shards {job.shards.start}..{job.shards.stop - 1}; {state}"
    passes, num_bytes, free = rows_to_make * views, rows_to_make * plan.row_bytes, free_bytes(plan.images.directory)
    lines = [
        f"the teacher's outputs: {job.label}, {views} views of every image, {job.teacher.precision} on "
        f"{job.teacher.device.type}",
        f"  -> {plan.directory}",
        f"  of every view: {fields}",
        f"  {format_bytes(rows * spec.view_bytes)} for each view, {format_bytes(rows * plan.row_bytes)} in all; "
        f"{plan.num_shards} shards",
        f"  {state}; {format_bytes(num_bytes)} to write, {passes} forward passes of the teacher to "
        f"run, {_format_flops(job.flops)} each: {_format_flops(passes * job.flops)}",
        f"  mode: cached then saves {rows} of them in every epoch over all images, {_format_flops(rows * job.flops)}: "
        f"the pass costs as much as {views} epochs with the live teacher",
    ]
    if num_bytes > free:
        lines.append(f"WARNING: {format_bytes(num_bytes)} are to be written, {format_bytes(free)} are free.")
    return lines


def _format_flops(count: float) -> str:
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} EFLOP"


def make_outputs(job: TeacherJob, stop: StopFlag) -> int:
    """Run the pass over this process's share; returns how many shards are left when a signal asked to stop."""
    survey = survey_teacher(job.plan, job.shards)
    to_make = [*survey.missing, *survey.doubtful]
    rows = sum(stop_row - start for start, stop_row in map(job.plan.rows_of, to_make))
    with Progress(total=rows, unit="images", desc=job.label, enabled=rows > 0) as progress:
        report = make_teacher_cache(
            job.plan,
            job.teacher,
            shards=job.shards,
            stop=stop,
            on_rows=lambda count, shards_made: progress.advance(count, shards=shards_made),
        )
    for message in report.messages:
        print(f"repaired: {message}")
    if report.shards_made or report.shards_adopted:
        print(f"{job.label}: {report.shards_made} shards made, {report.shards_adopted} checked and kept")
    return report.shards_left


def report_outputs(job: TeacherJob) -> None:
    """Say what the folder holds now."""
    records = teacher_scan(job.plan.directory).records() if job.plan.directory.is_dir() else []
    rows = sum(record["num_samples"] for record in records)
    wanted = job.plan.images.num_rows
    state = "complete" if rows >= wanted else "not complete yet: other jobs have their share to do"
    print(
        f"{job.plan.directory}: {rows} images in {job.plan.spec.num_views} views, {len(records)} shards; {state}. "
        "Training reads it with teacher_cache.enabled: true"
    )


def verify_outputs(configs: Configs, count: int) -> int:
    """Replay `count` random (image, view) pairs through the teacher and print the outcome; returns the exit status.

    Raises:
        MissingFileError, UserError: there are no outputs of this teacher and configuration, with what differs.
    """
    cache_dir = configs.data.cache_path
    fingerprint = load_index(cache_dir).fingerprint
    teacher, spec = build_live_teacher(configs, fingerprint)
    # another precision is no other teacher: a check on the CPU of what a GPU made runs in that one's precision
    names = ("weights_hash", "img_size", "mean", "std", "pooling")
    facts = {name: spec.resolved[name] for name in names if name in spec.resolved}
    cache = find_teacher_cache(cache_dir, spec.configured | {"resolved": facts})
    teacher = replace(teacher, precision=cache.identity["resolved"]["precision"])
    images = ImageRows(cache_dir, fingerprint)
    replays = list(replay_views(cache, teacher, images, count, np.random.default_rng()))
    bad = [replay for replay in replays if replay.cosine < LEAST_COSINE]
    for replay in bad:
        print(
            f"BAD  {cache.directory / replay.shard}: row {replay.row}, view {replay.view}: {replay.field} has cosine "
            f"{replay.cosine:.6f} with what the teacher says now, expected {LEAST_COSINE} or more"
        )
    if bad:
        shards = sorted({str(cache.directory / replay.shard) for replay in bad})
        print(f"{len(bad)} of {len(replays)} vectors are not of this teacher. Repair: rm -f -- {shlex.join(shards)}")
        print("and then the same command without --verify.")
        return EXIT_ERROR
    least = min((replay.cosine for replay in replays), default=1.0)
    print(f"OK   {cache.directory}: {len(replays)} vectors of {count} random views, least cosine {least:.6f}")
    return EXIT_DONE
