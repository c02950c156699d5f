"""The cache folders that a configuration needs, this process's share of each, and a summary at the end."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distillery.cache.archive import pixel_dtype_of
from distillery.cache.encoded import is_encoded
from distillery.cache.folder import load_index
from distillery.cache.images import FAILURES_NAME, IMAGE_SHARDS, INDEX_NAME, index_of
from distillery.cache.lease_names import last_heartbeat, list_leases
from distillery.cache.masks import check_mask_classes
from distillery.cache.plan import CachePlan, Survey, rows_made_of, survey_cache
from distillery.config.keys_data import DataConfig, EvalDataset
from distillery.precompute.estimate import (
    DecodeSpeed,
    bytes_to_write,
    job_lines,
    jpeg_encoding,
    room_lines,
    sampled_row_bytes,
)
from distillery.precompute.leases import holders_of
from distillery.precompute.pipeline import make_cache
from distillery.sources.base import Source
from distillery.sources.evaluation import PartOfSource, label_warnings, number_as, spread_rows
from distillery.sources.pixels import PreprocessSpec
from distillery.sources.registry import open_source
from distillery.system.console import ProgressLine
from distillery.system.errors import EXIT_DONE, EXIT_TOO_MANY_FAILED, EXIT_USAGE, UserError
from distillery.system.signals import StopFlag

_WORKERS_SHOWN = 10


@dataclass(frozen=True)
class CachePart:
    """One cache folder that the configuration needs.

    arguments: those of open_source; limit: the most rows, None for all; dtype: of the rows; dataset: where the folder
    holds a split of an evaluation set, its name and entry; bank: for a test split with labels, the folder of its train
    split.
    """

    title: str
    folder: Path
    arguments: dict[str, Any]
    limit: int | None
    dtype: str
    labels: bool
    dataset: tuple[str, EvalDataset] | None = None
    bank: Path | None = None


@dataclass(frozen=True)
class CacheJob:
    """One cache folder to make, and this process's share of its shards. warnings: what is wrong with its labels."""

    part: CachePart
    plan: CachePlan
    source: Source
    shards: range
    warnings: list[str]

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.part.title


def list_parts(data: DataConfig) -> list[CachePart]:
    """The training cache, and one cache with labels or masks for each split of each evaluation set."""
    labels, limit = data.label_column is not None, data.max_rows
    parts = [CachePart("the training images", data.cache_path, data.source_arguments, limit, data.cache_dtype, labels)]
    dtype = pixel_dtype_of(data.cache_dtype)
    for name, entry in data.eval_datasets.items():
        has_labels = entry.mask_dtype is None
        bank = data.cache_path / "eval" / name / "train" if has_labels else None
        for split, limit, its_bank in (("train", entry.max_train, None), ("test", entry.max_test, bank)):
            folder = data.cache_path / "eval" / name / split
            title, arguments = f"evaluation set {name}/{split}", entry.source_arguments(split)
            parts.append(CachePart(title, folder, arguments, limit, dtype, has_labels, (name, entry), its_bank))
    return parts


def open_jobs(data: DataConfig, num_jobs: int, job_id: int) -> list[CacheJob]:
    """build_jobs of every part, its source opened, and downloaded where it is not here."""
    return build_jobs(data, [(part, open_source(**part.arguments)) for part in list_parts(data)], num_jobs, job_id)


def build_jobs(data: DataConfig, opened: list[tuple[CachePart, Source]], num_jobs: int, job_id: int) -> list[CacheJob]:
    """The share of each part that job number job_id of num_jobs makes.

    The test split of an evaluation set takes the numbering of its train split's classes.
    """
    jobs: list[CacheJob] = []
    sources: dict[Path, Source] = {}
    spec = PreprocessSpec(**data.preprocess_arguments)
    for part, source in opened:
        if len(source) == 0:
            raise UserError(f"{part.title}: {source.describe()} holds no images.")
        source, warnings = _rows_wanted(part, source), []
        if (bank := sources.get(part.bank)) is not None:
            source = number_as(bank, source, part.title)
            labels = (of.labels(0, len(of)) for of in (bank, source))
            warnings = label_warnings(*labels, dict(enumerate(source.class_names or [])))
        sources[part.folder] = source
        is_training, encoding = part.dataset is None, None
        if is_training and is_encoded(data.cache_dtype):
            encoding = jpeg_encoding(data)
            encoding.identity()  # that the encoder is missing is said before anything is written
        plan = CachePlan(
            directory=part.folder,
            # evaluation sets are small, and what is measured on them shall not depend on how training images are stored
            spec=spec if is_training else replace(spec, jpeg_decode="exact"),
            dtype=part.dtype,
            shard_size=data.cache_shard_size,
            num_rows=min(part.limit or len(source), len(source)),
            source_num_samples=len(source),
            source_identity=source.identity,
            labels=part.labels,
            mask_dtype=None if is_training else part.dataset[1].mask_dtype,
            encoding=encoding,
        )
        share = range(plan.num_shards * job_id // num_jobs, plan.num_shards * (job_id + 1) // num_jobs)
        jobs.append(CacheJob(part, plan, source, share, warnings))
    return jobs


def survey_jobs(jobs: list[CacheJob]) -> list[Survey]:
    """What the folder of each job holds. Where encoded rows are to be made and none is there, a few tell their size."""
    surveys = [survey_cache(job.plan, job.shards) for job in jobs]
    return [
        replace(survey, row_bytes=sampled_row_bytes(job.source, job.plan))
        if job.plan.rows_vary and survey.row_bytes is None and survey.missing
        else survey
        for job, survey in zip(jobs, surveys, strict=True)
    ]


def _rows_wanted(part: CachePart, source: Source) -> Source:
    """The source, or of a split that is cut for evaluation as many rows from all over it."""
    is_cut = part.dataset is not None and part.limit is not None and part.limit < len(source)
    # finished caches of earlier versions hold the first rows, and stay as they are
    if not is_cut or rows_made_of(part.folder, source.identity) == part.limit:
        return source
    return PartOfSource(source, rows=spread_rows(len(source), part.limit))


def print_plan(jobs: list[CacheJob], surveys: list[Survey], data: DataConfig, speed: DecodeSpeed | None = None) -> int:
    """Print what will be made, how much room it takes and how much there is; speed as job_lines has it.

    Returns:
        Bytes to write.
    """
    total = 0
    for job, survey in zip(jobs, surveys, strict=True):
        print("\n".join(job_lines(job.title, job.source, job.plan, job.shards, survey, speed)))
        for warning in job.warnings:
            print(f"  WARNING: {warning}")
        total += bytes_to_write(job.plan, survey, speed)
    print("\n".join(room_lines(data, total)))
    return total


def workers_lines(title: str, directory: Path) -> list[str]:
    """Which processes have leases on a folder's shards, a line each; title: what the folder holds.

    One of another machine may have been killed: the line says when its last heartbeat was.
    """
    lines = []
    for holder, leases in holders_of(list_leases(directory)).items():
        shards = ", ".join(lease.shards for lease in leases)
        if holder.is_dead():
            lines.append(f"{title}: {holder} was killed; the next process takes over {shards}")
        else:
            lines.append(f"{title}: {holder} has taken {shards}; {last_heartbeat(directory, leases)}")
    if len(lines) > _WORKERS_SHOWN:
        lines[_WORKERS_SHOWN:] = [f"{title}: {len(lines) - _WORKERS_SHOWN} more processes have taken shards"]
    return lines


def make_job(
    job: CacheJob, survey: Survey, data: DataConfig, batch_size: int, stop: StopFlag, *, elastic: bool = False
) -> int:
    """Make the missing shards of one cache; return how many are left after a signal to stop.

    elastic: shared with other processes, and complete on return.
    """
    to_make = [*survey.missing, *survey.to_check]
    if stop.requested:
        return len(to_make)
    rows = sum(after - first for first, after in map(job.plan.rows_of, to_make))
    with ProgressLine(total=rows, unit="images", desc=job.title, enabled=rows > 0) as progress:
        report = make_cache(
            job.plan,
            job.source,
            survey=survey,
            batch_size=batch_size,
            num_workers=data.workers,
            stop=stop,
            on_rows=progress.advance,
            on_wait=progress.message if elastic else None,
        )
    for message in report.messages:
        print(f"repaired: {message}")
    if report.shards_made or report.shards_accepted:
        print(f"{job.title}: {report.shards_made} shards made, {report.shards_accepted} checked and kept")
    return report.shards_left


def report_outcome(jobs: list[CacheJob], max_failed_fraction: float) -> int:
    """Print what the folders hold now; returns the exit status.

    It is 3 where too many images failed, and 2 where masks do not fit the classes that their evaluation set has.
    """
    status = EXIT_DONE
    for job in jobs:
        records = IMAGE_SHARDS.scan(job.plan.directory).records() if job.plan.directory.exists() else []
        if not records:
            continue
        index = index_of(records, job.plan.num_rows)
        failed, rows = sum(record["num_failed"] for record in records), index["num_samples"]
        state = "complete" if index["complete"] else "not complete yet: other jobs have their share to do"
        print(f"{job.plan.directory}: {rows} images in {len(records)} shards, {failed} could not be decoded; {state}")
        if failed:
            first = next(record["failures"][0] for record in records if record["failures"])
            print(f"  the first, image {first['global_idx']}: {first['reason']}")
            print(f"  the reasons are in {job.plan.directory / FAILURES_NAME}; training leaves these images out")
        if failed > max_failed_fraction * rows:
            print(f"  more than max_failed_fraction {max_failed_fraction} allows: look at the reasons")
            status = EXIT_TOO_MANY_FAILED
    for job in jobs:
        if job.plan.mask_dtype is None or not (job.plan.directory / INDEX_NAME).exists():
            continue
        name, entry = job.part.dataset
        try:
            check_mask_classes(load_index(job.plan.directory), name, entry.num_classes, entry.ignore_index)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = status or EXIT_USAGE
    return status
