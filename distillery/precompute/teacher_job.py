"""precompute_cache.py --teacher: build the teacher pass from the configuration, print its plan, run and check it."""

import shlex
from dataclasses import dataclass, replace

import numpy as np

from distillery.cache.fields import FIELD_DTYPES
from distillery.cache.folder import load_index
from distillery.cache.images import INDEX_NAME
from distillery.cache.plan import CachePlan, Survey
from distillery.config.load import Configs
from distillery.models.configured import choose_device
from distillery.precompute.estimate import progress_text
from distillery.precompute.teacher_shards import make_teacher_cache
from distillery.reading.rows import ImageRows
from distillery.system.console import ProgressLine, format_bytes
from distillery.system.errors import EXIT_DONE, EXIT_ERROR
from distillery.system.machine import free_bytes
from distillery.system.signals import StopFlag
from distillery.teacher_cache.estimate import forward_flops
from distillery.teacher_cache.local_files import TeacherFiles
from distillery.teacher_cache.opening import (
    build_live_teacher,
    compare_files,
    files_of_teacher,
    outputs_of_built,
    remember,
    spec_to_go_on_with,
    use_exact_convolutions,
)
from distillery.teacher_cache.outputs import LiveTeacher
from distillery.teacher_cache.records import TEACHER_SHARDS, teacher_index_of
from distillery.teacher_cache.replay import replay_views
from distillery.teacher_cache.survey import TeacherPlan, images_for_training, survey_teacher
from distillery.teacher_cache.targets import check_storable

DEFAULT_REPLAYS = 64


@dataclass(frozen=True)
class TeacherJob:
    """The teacher's outputs to make, and this process's share of their shards.

    flops: of one forward pass; files: on this machine, that the teacher was built from.
    """

    plan: TeacherPlan
    teacher: LiveTeacher
    shards: range
    label: str
    flops: int
    files: TeacherFiles


def build_teacher_job(configs: Configs, images: CachePlan, shards: range) -> TeacherJob:
    """Load the teacher and say what its outputs over an image cache shall be.

    Args:
        configs: all three.
        images: the cache of the training images, which may still have to be made.
        shards: this process's share of the images'; the last one's has what training takes beyond them as well.
    """
    check_storable(configs.train)
    files = files_of_teacher(configs)
    use_exact_convolutions()
    teacher, spec = build_live_teacher(configs, images.fingerprint, choose_device("auto"))
    spec = spec_to_go_on_with(images.directory, teacher, spec, files)
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
        files,
    )


def plan_outputs(configs: Configs, images: CachePlan, shards: range, image_bytes: int) -> TeacherJob:
    """Load the teacher and print what its outputs over an image cache will be.

    configs, images, shards: as of build_teacher_job; image_bytes: that are to be written before the outputs.
    """
    job = build_teacher_job(configs, images, shards)
    print("\n".join(teacher_plan_lines(job, survey_teacher(job.plan, job.shards), image_bytes)))
    return job


def teacher_plan_lines(job: TeacherJob, survey: Survey, image_bytes: int) -> list[str]:
    """What will be made, how much room it takes, what it costs once and saves in every epoch.

    image_bytes: that are to be written before it.
    """
    plan, spec = job.plan, job.plan.spec
    rows, views, epochs = plan.images.num_rows, spec.num_views, job.teacher.passes(spec.num_views)
    rows_to_make = sum(stop - start for start, stop in map(plan.rows_of, survey.missing))
    fields = ", ".join(
        f"{name} {list(shape)} {dtype} ({format_bytes(np.prod(shape) * np.dtype(FIELD_DTYPES[dtype]).itemsize)})"
        for name, (dtype, shape) in spec.view_fields.items()
    )
    state = progress_text(survey)
    if len(job.shards) < plan.num_shards:
        state = f"this job's share: shards {job.shards.start}..{job.shards.stop - 1}; {state}"
    passes, num_bytes, free = rows_to_make * epochs, rows_to_make * plan.row_bytes, free_bytes(plan.images.directory)
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
        f"the pass costs as much as {epochs} epoch{'s' * (epochs > 1)} with the live teacher",
    ]
    is_free = job.teacher.views_only_mirror and views % 2 == 0
    if is_free and not survey.done and not job.teacher.backbone.mirror:
        lines.append("advice: teacher_mirror: true gives better targets for as much arithmetic (docs/recipe.md).")
    if num_bytes and num_bytes + image_bytes > free:
        both = " with the images" if image_bytes else ""
        lines.append(
            f"WARNING: {format_bytes(num_bytes + image_bytes)} are to be written{both}, {format_bytes(free)} are free."
        )
    return lines


def _format_flops(count: float) -> str:
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} EFLOP"


def make_outputs(job: TeacherJob, stop: StopFlag, *, elastic: bool = False) -> int:
    """Run the pass over this process's share; return how many shards are left after a signal to stop.

    elastic: shared with other processes, and complete on return.
    """
    if not job.shards:  # more jobs than shards
        return 0
    survey = survey_teacher(job.plan, job.shards)
    to_make = [*survey.missing, *survey.to_check]
    rows = sum(stop_row - start for start, stop_row in map(job.plan.rows_of, to_make))
    with ProgressLine(total=rows, unit="images", desc=job.label, enabled=rows > 0) as progress:
        report = make_teacher_cache(
            job.plan,
            job.teacher,
            shards=job.shards,
            stop=stop,
            on_rows=lambda count, shards, **_: progress.advance(count, shards=shards),
            on_wait=progress.message if elastic else None,
        )
    for message in report.messages:
        print(f"repaired: {message}")
    if report.shards_made or report.shards_accepted:
        print(f"{job.label}: {report.shards_made} shards made, {report.shards_accepted} checked and kept")
    if job.files and job.files.is_whole and (job.plan.directory / INDEX_NAME).exists():
        remember(job.plan.directory, compare_files(job.files, job.plan.directory)[1])
    return report.shards_left


def report_outputs(job: TeacherJob) -> None:
    """Print what the folder holds now."""
    records = TEACHER_SHARDS.scan(job.plan.directory).records() if job.plan.directory.is_dir() else []
    rows = sum(record["num_samples"] for record in records)
    is_complete = bool(records) and teacher_index_of(records, job.plan.num_rows)["complete"]
    state = "complete" if is_complete else "not complete yet: other jobs have their share to do"
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
    use_exact_convolutions()
    teacher, spec = build_live_teacher(configs, fingerprint, choose_device("auto"))
    cache = outputs_of_built(cache_dir, spec, files_of_teacher(configs))
    teacher = replace(teacher, precision=cache.identity["resolved"]["precision"])
    images = ImageRows(cache_dir, fingerprint)
    replays = list(replay_views(cache, teacher, images, count, np.random.default_rng()))
    bad = [replay for replay in replays if not replay.agrees]
    for replay in bad:
        print(f"BAD  {cache.directory}/{replay.describe()}")
    if bad:
        shards = sorted({str(cache.directory / replay.shard) for replay in bad})
        print(f"{len(bad)} of {len(replays)} vectors are not of this teacher. Repair: rm -f -- {shlex.join(shards)}")
        print("and then the same command without --verify.")
        return EXIT_ERROR
    least = min((replay.cosine for replay in replays), default=1.0)
    print(f"OK   {cache.directory}: {len(replays)} vectors of {count} random views, least cosine {least:.6f}")
    return EXIT_DONE
