"""Stage 1: decode, resize and normalise every image once, into shards that training reads at memory speed.

    python precompute_cache.py --data_config data_config.yaml --dry_run    # the plan: bytes, files, memory, hours
    python precompute_cache.py --data_config data_config.yaml              # run again after any interruption: goes on
    python precompute_cache.py --data_config data_config.yaml --num_jobs 8 --job_id 3     # one eighth, an array task
    python precompute_cache.py --data_config data_config.yaml --verify     # every byte against its hash
    python precompute_cache.py --teacher --data_config data_config.yaml --train_config train_config_kd.yaml \\
           --model_config model_config_kd.yaml         # the images, then the teacher's outputs for their views

Exit status: 0 done; 2 wrong usage or configuration; 3 done, but more images failed than max_failed_fraction allows;
75 interrupted, run the same command again; 1 anything else, damage found by --verify too.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from distillery.system.errors import (
    EXIT_DONE,
    EXIT_ERROR,
    EXIT_TOO_MANY_FAILED,
    Interrupted,
    UserError,
    remember_command,
    run_command,
)
from distillery.system.machine import usable_cpus
from distillery.system.signals import StopFlag


def parse_arguments() -> argparse.Namespace:
    """The command line; answers --help and wrong flags before anything slow is imported."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data_config", required=True, type=Path, metavar="YAML")
    parser.add_argument("--train_config", type=Path, metavar="YAML", help="checked along with the data configuration")
    parser.add_argument("--model_config", type=Path, metavar="YAML", help="the teacher; what --download_only fetches")
    parser.add_argument("--batch_size", type=int, default=256, metavar="N",
                        help="images decoded per unit of work (default 256); changes no byte")  # fmt: skip
    parser.add_argument("--num_jobs", type=int, metavar="N", help="share the work among N jobs ...")
    parser.add_argument("--job_id", type=int, metavar="K", help="... of which this is number K, from 0")
    parser.add_argument("--teacher", action="store_true",
                        help="after the images, the teacher's outputs for teacher_cache.views views of each; with "
                             "--verify: also N of them once more through the teacher")  # fmt: skip
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                        help="override one key of a YAML file (dots for nesting); may be repeated")  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--verify", nargs="?", type=int, const=True, metavar="N",
                      help="compare every byte with its hash; N views with --teacher (default 64)")  # fmt: skip
    mode.add_argument("--rebuild_index", action="store_true", help="make index.json again from the shards; no decoding")
    mode.add_argument("--dry_run", action="store_true", help="print the plan and stop; writes and downloads nothing")
    mode.add_argument(
        "--download_only", action="store_true", help="fetch data set and weights, for nodes without internet"
    )
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error(f"--batch_size {arguments.batch_size}: expected 1 or more")
    if (arguments.num_jobs is None) != (arguments.job_id is None):
        parser.error("--num_jobs and --job_id go together: --num_jobs 8 --job_id 0 ... --job_id 7")
    if arguments.num_jobs is not None and not 0 <= arguments.job_id < arguments.num_jobs:
        parser.error(
            f"--job_id {arguments.job_id}: expected 0 to {arguments.num_jobs - 1} with --num_jobs {arguments.num_jobs}"
        )
    if arguments.teacher and None in (arguments.train_config, arguments.model_config):
        parser.error("--teacher needs --train_config and --model_config: the views, and whose outputs they are")
    if arguments.verify not in (None, True) and (arguments.verify < 1 or not arguments.teacher):
        parser.error(f"--verify {arguments.verify}: a number of views, 1 or more, goes with --teacher")
    if arguments.teacher and arguments.rebuild_index:
        parser.error("--rebuild_index is of the images; the teacher's index is made again by --teacher alone")
    return arguments


@dataclass(frozen=True)
class CacheJob:
    """One cache folder to make, and this process's share of its shards. warnings: what is wrong with its labels."""

    title: str
    plan: object  # distillery.cache.plan.CachePlan
    source: object  # distillery.sources.base.Source
    shards: range
    warnings: list[str]


def main() -> int:
    """Parse, plan, then make what is missing."""
    arguments = parse_arguments()
    remember_command(vars(arguments), arguments.overrides)
    from distillery.config.load import load_configs
    from distillery.losses.registry import check_losses

    configs = load_configs(arguments.data_config, arguments.train_config, arguments.model_config, arguments.overrides)
    if configs.train is not None:
        check_losses(configs.train.distill_loss_weights, configs.train.loss_options)
    if arguments.verify is not None:
        return verify(configs, arguments)
    if arguments.download_only:
        return download(configs)
    if arguments.rebuild_index:
        return rebuild_indexes(configs.data)

    num_jobs, job_id = share_of(arguments)
    if arguments.dry_run:
        return dry_run(configs, num_jobs, job_id, with_teacher=arguments.teacher)
    with StopFlag() as stop:
        jobs = build_jobs(configs.data, num_jobs, job_id)
        # every folder is surveyed before anything is written anywhere
        surveys = [survey_job(job) for job in jobs]
        print_plan(jobs, surveys, configs.data)
        teacher = plan_teacher(configs, jobs[0]) if arguments.teacher else None
        shards_left = 0
        for job, survey in zip(jobs, surveys, strict=True):
            shards_left += make_job(job, survey, configs.data, arguments.batch_size, stop)
        if teacher is not None and not shards_left:
            from distillery.precompute.teacher_job import make_outputs

            shards_left = make_outputs(teacher, stop)
        if shards_left:
            raise Interrupted(
                f"{stop.reason}: {shards_left} shards are left to make; everything finished is saved. "
                "Run the same command again."
            )
        status = report_outcome(jobs, configs.data)
        if teacher is not None:
            from distillery.precompute.teacher_job import report_outputs

            report_outputs(teacher)
        return status


def share_of(arguments: argparse.Namespace) -> tuple[int, int]:
    """(number of jobs, this one's number): --num_jobs and --job_id, else with --teacher the launcher's processes."""
    if arguments.num_jobs is not None or not arguments.teacher:
        return arguments.num_jobs or 1, arguments.job_id or 0
    from distillery.system.launcher import world_from_environment

    world = world_from_environment()
    if world.size > 1:
        print(f"{world}: makes its share of the shards, one part of {world.size}. {world.alone}", flush=True)
    return world.size, world.rank


def plan_teacher(configs, job: CacheJob):
    """Load the teacher and print what its outputs over the training images will be; a teacher_pass.TeacherJob."""
    from distillery.precompute.teacher_job import build_teacher_job, teacher_plan_lines
    from distillery.teacher_cache.survey import survey_teacher

    teacher = build_teacher_job(configs, job.plan, job.shards)
    print("\n".join(teacher_plan_lines(teacher, survey_teacher(teacher.plan, teacher.shards))))
    return teacher


def verify(configs, arguments: argparse.Namespace) -> int:
    """Every byte against its hash; with --teacher also some stored outputs against the teacher itself."""
    from distillery.verify import report_verification

    status = report_verification(configs.data.cache_path)
    if not arguments.teacher or status != EXIT_DONE:
        return status
    from distillery.precompute.teacher_job import DEFAULT_REPLAYS, verify_outputs

    return verify_outputs(configs, DEFAULT_REPLAYS if arguments.verify is True else arguments.verify)


@dataclass(frozen=True)
class CachePart:
    """One cache folder that the configuration asks for.

    arguments: of open_source; limit: rows, None for all; is_evaluation: a split of an evaluation set; bank: of a test
    split, the folder of its train split.
    """

    title: str
    folder: Path
    arguments: dict
    limit: int | None
    labels: bool
    is_evaluation: bool = False
    bank: Path | None = None


def parts_of(data) -> list[CachePart]:
    """The training cache and one cache with labels for each part of each evaluation set."""
    limits = [data.max_samples, data.max_shards and data.max_shards * data.cache_shard_size]
    limit = min((rows for rows in limits if rows), default=None)
    labels = data.label_column is not None
    parts = [CachePart("the training images", data.cache_path, data.source_arguments, limit, labels)]
    for name, entry in data.eval_datasets.items():
        bank = data.cache_path / "eval" / name / "train"
        for part, limit, its_bank in (("train", entry.max_train, None), ("test", entry.max_test, bank)):
            folder = data.cache_path / "eval" / name / part
            arguments = entry.source_arguments(part) | {"labels_required": True}
            parts.append(CachePart(f"evaluation set {name}/{part}", folder, arguments, limit, True, True, its_bank))
    return parts


def build_jobs(data, num_jobs: int, job_id: int) -> list[CacheJob]:
    """The share of every part that this process makes, its source opened (and downloaded where it is not here)."""
    from distillery.sources.registry import open_source

    return _jobs_of(data, [(part, open_source(**part.arguments)) for part in parts_of(data)], num_jobs, job_id)


def _jobs_of(data, opened: list[tuple[CachePart, object]], num_jobs: int, job_id: int) -> list[CacheJob]:
    """The jobs of opened parts; the two splits of an evaluation set get one numbering of their classes."""
    from distillery.sources.evaluation import label_warnings, number_as

    jobs, sources = [], {}
    for part, source in opened:
        if len(source) == 0:
            raise UserError(f"{part.title}: {source.describe()} holds no images.")
        source, warnings = _rows_wanted(part, source), []
        if (bank := sources.get(part.bank)) is not None:
            source = number_as(bank, source, part.title)
            labels = (of.labels(0, len(of)) for of in (bank, source))
            warnings = label_warnings(*labels, dict(enumerate(source.class_names or [])))
        sources[part.folder] = source
        jobs.append(_job_of(data, part, source, num_jobs, job_id, warnings))
    return jobs


def _rows_wanted(part: CachePart, source):
    """The source, or of a split that is cut for evaluation as many rows from all over it."""
    from distillery.cache.plan import is_made_of
    from distillery.sources.evaluation import PartOfSource, spread_rows

    is_cut = part.is_evaluation and part.limit is not None and part.limit < len(source)
    # caches of earlier versions hold the first rows, and stay as they are
    if not is_cut or is_made_of(part.folder, source.identity):
        return source
    return PartOfSource(source, rows=spread_rows(len(source), part.limit))


def _job_of(data, part: CachePart, source, num_jobs: int, job_id: int, warnings: list[str]) -> CacheJob:
    from distillery.cache.plan import CachePlan
    from distillery.sources.pixels import PreprocessSpec

    plan = CachePlan(
        directory=part.folder,
        spec=PreprocessSpec(data.image_size, data.resize_mode, data.interpolation, tuple(data.mean), tuple(data.std)),
        dtype=data.cache_dtype,
        shard_size=data.cache_shard_size,
        num_rows=min(part.limit or len(source), len(source)),
        source_num_samples=len(source),
        source_identity=source.identity,
        labels=part.labels,
    )
    share = range(plan.num_shards * job_id // num_jobs, plan.num_shards * (job_id + 1) // num_jobs)
    return CacheJob(part.title, plan, source, share, warnings)


def survey_job(job: CacheJob):
    """What is already there of a job's shards."""
    from distillery.cache.plan import survey_cache

    return survey_cache(job.plan, job.shards)


def print_plan(jobs: list[CacheJob], surveys: list, data) -> None:
    """What will be made, how much room it takes, how much there is."""
    from distillery.precompute.estimate import bytes_to_write, job_lines, room_lines

    total = 0
    for job, survey in zip(jobs, surveys, strict=True):
        print("\n".join(job_lines(job.title, job.source, job.plan, job.shards, survey)))
        for warning in job.warnings:
            print(f"  WARNING: {warning}")
        total += bytes_to_write(job.plan, survey)
    print("\n".join(room_lines(data, total)))


def dry_run(configs, num_jobs: int, job_id: int, *, with_teacher: bool) -> int:
    """The plan alone: nothing is written, nothing is downloaded; a few images are decoded to tell the hours."""
    from distillery.precompute.estimate import measure_decoding, plan_lines, remote_lines
    from distillery.sources.hub import NotDownloadedError
    from distillery.sources.registry import open_source

    data, opened, remote = configs.data, [], []
    for part in parts_of(data):
        try:
            source = open_source(**part.arguments, download=False)
        except NotDownloadedError as error:
            remote.append((part, error.facts))
        else:
            opened.append((part, source))
    jobs = _jobs_of(data, opened, num_jobs, job_id)
    surveys = [survey_job(job) for job in jobs]
    print_plan(jobs, surveys, data)
    if with_teacher and jobs and jobs[0].plan.directory == data.cache_path:
        plan_teacher(configs, jobs[0])
    elif with_teacher:
        print("the teacher's outputs: what they cost is known once the training images are here (--download_only)")
    for part, facts in remote:
        print("\n".join(remote_lines(part.title, facts, part.limit, data)))
    if jobs:
        speed = measure_decoding(jobs[0].source, jobs[0].plan.spec, data.cache_dtype)
        to_make = [(job.plan, [*survey.missing, *survey.to_check]) for job, survey in zip(jobs, surveys, strict=True)]
        print("\n".join(plan_lines(to_make, data.cache_path, data.num_workers or usable_cpus(), speed)))
    return EXIT_DONE


def make_job(job: CacheJob, survey, data, batch_size: int, stop: StopFlag) -> int:
    """Make what is missing of one cache; returns how many shards are left when a signal asked to stop."""
    from distillery.precompute.pipeline import make_cache
    from distillery.system.console import Progress

    if stop.requested:
        return len(survey.missing) + len(survey.to_check)
    rows = sum(after - first for first, after in map(job.plan.rows_of, [*survey.missing, *survey.to_check]))
    with Progress(total=rows, unit="images", desc=job.title, enabled=rows > 0) as progress:
        report = make_cache(
            job.plan,
            job.source,
            survey=survey,
            batch_size=batch_size,
            num_workers=data.num_workers or usable_cpus(),
            stop=stop,
            on_rows=progress.advance,
        )
    for message in report.messages:
        print(f"repaired: {message}")
    if report.shards_made or report.shards_accepted:
        print(f"{job.title}: {report.shards_made} shards made, {report.shards_accepted} checked and kept")
    return report.shards_left


def rebuild_indexes(data) -> int:
    """Make index.json, failures.jsonl and lost records again from the shards alone, in every folder of the cache."""
    from distillery.cache.rebuild import rebuild_index

    status = EXIT_DONE
    limit = parts_of(data)[0].limit
    evaluation = sorted(path for path in data.cache_path.glob("eval/*/*") if path.is_dir())
    for folder in [data.cache_path, *evaluation]:
        report = rebuild_index(folder, limit if folder == data.cache_path else None)
        how = " (upgraded from the predecessor's format)" if report.was_upgraded else ""
        shards = len(report.index["shards"])
        print(f"{folder}: index.json made again from {shards} shards, {report.num_hashed} of them hashed{how}")
        for problem in report.problems:
            print(f"  left out: {problem}")
            status = EXIT_ERROR
    return status


def report_outcome(jobs: list[CacheJob], data) -> int:
    """Say what the folders hold now; exit status 3 when too many images failed."""
    from distillery.cache.images import FAILURES_NAME, IMAGE_SHARDS, index_of

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
            print(f"  the reasons are in {job.plan.directory / FAILURES_NAME}; training leaves these images out")
        if failed > data.max_failed_fraction * rows:
            print(f"  more than max_failed_fraction {data.max_failed_fraction} allows: look at the reasons")
            status = EXIT_TOO_MANY_FAILED
    return status


def download(configs) -> int:
    """Fetch everything the two commands need from the network, into HF_HOME and TORCH_HOME."""
    for job in build_jobs(configs.data, 1, 0):
        print(f"{job.title}: {job.source.describe()}: {len(job.source)} images, all here")
    if configs.model is not None:
        from distillery.models.backbone import download_weights

        for line in download_weights(configs.model.model_dump()):
            print(line)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
