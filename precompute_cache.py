"""Stage 1: decode, resize and normalise every image once, into shards that training reads at memory speed.

    python precompute_cache.py --data_config data_config.yaml --dry_run    # the plan: bytes, files, memory, hours
    python precompute_cache.py --data_config data_config.yaml              # run again after any interruption: goes on
    python precompute_cache.py --data_config data_config.yaml --num_jobs auto      # several jobs share the work
    python precompute_cache.py --data_config data_config.yaml --num_jobs 8 --job_id 3     # one eighth, always the same
    python precompute_cache.py --data_config data_config.yaml --verify     # every byte against its hash
    python precompute_cache.py --teacher --data_config data_config.yaml --train_config train_config_kd.yaml \\
           --model_config model_config_kd.yaml         # the images, then the teacher's outputs for their views

With --num_jobs auto any number of processes on any nodes join and leave. Each takes the next shards that nobody has
taken, and ends when all are there. What a killed process had taken, the others make. They find out when they next look
for work: at the first look where it ran on the same machine, after 60 seconds of silence where it ran on another.

Exit status: 0 done; 2 wrong usage or configuration; 3 done, but more images failed than max_failed_fraction allows;
75 interrupted, run the same command again; 1 anything else, damage found by --verify too.
"""

import argparse
from pathlib import Path

from distillery.cache.plan import survey_cache
from distillery.cache.rebuild import rebuild_index
from distillery.cache.verify import folders_of
from distillery.config.keys_data import DataConfig
from distillery.config.load import Configs, load_configs
from distillery.losses.registry import check_losses
from distillery.precompute.estimate import dtype_line, jpeg_encoding, measure_decoding, plan_lines, remote_lines
from distillery.precompute.jobs import (
    build_jobs,
    list_parts,
    make_job,
    open_jobs,
    print_plan,
    report_outcome,
    survey_jobs,
    workers_lines,
)
from distillery.sources.hub import NotDownloadedError
from distillery.sources.registry import open_source
from distillery.system.errors import EXIT_DONE, EXIT_ERROR, Interrupted, remember_invocation, run_command
from distillery.system.launcher import world_from_environment
from distillery.system.signals import StopFlag
from distillery.verify import report_verification

AUTO = "auto"
# torch takes seconds to import: modules that need it are imported only where a flag needs them


def parse_arguments() -> argparse.Namespace:
    """The command line; --help and wrong flags end the process."""
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
    parser.add_argument("--num_jobs", type=_num_jobs, metavar="N|auto",
                        help="share the work among N jobs; auto: among all who run this command")  # fmt: skip
    parser.add_argument("--job_id", type=int, metavar="K", help="with N jobs: this one's number, from 0")
    parser.add_argument("--teacher", action="store_true",
                        help="after the images, the teacher's outputs for teacher_cache.views views of each; with "
                             "--verify: also N of them once more through the teacher")  # fmt: skip
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                        help="override one key of a YAML file (dots for nesting); may be repeated")  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--verify", nargs="?", type=int, const=True, metavar="N",
                      help="compare every byte with its hash; N views with --teacher (default 64)")  # fmt: skip
    mode.add_argument("--rebuild_index", action="store_true", help="make index.json again from the shards; no decoding")
    mode.add_argument("--dry_run", action="store_true",
                      help="print the plan and stop; downloads nothing, and writes nothing but, of csv, json and other "
                           "files that load_dataset converts, what it converts into HF_HOME")  # fmt: skip
    mode.add_argument("--download_only", action="store_true", help="fetch data set and weights, for offline nodes")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error(f"--batch_size {arguments.batch_size}: expected 1 or more")
    if arguments.num_jobs == AUTO and arguments.job_id is not None:
        parser.error("--num_jobs auto takes no --job_id: each process takes the next shards that are free")
    if arguments.num_jobs != AUTO and (arguments.num_jobs is None) != (arguments.job_id is None):
        parser.error("--num_jobs and --job_id go together: --num_jobs 8 --job_id 0 ... --job_id 7; or --num_jobs auto")
    if arguments.job_id is not None and arguments.num_jobs < 1:
        parser.error(f"--num_jobs {arguments.num_jobs}: expected 1 or more")
    if arguments.job_id is not None and not 0 <= arguments.job_id < arguments.num_jobs:
        parser.error(
            f"--job_id {arguments.job_id}: expected 0 to {arguments.num_jobs - 1} with --num_jobs {arguments.num_jobs}"
        )
    if arguments.teacher and None in (arguments.train_config, arguments.model_config):
        parser.error("--teacher needs --train_config and --model_config: the views, and whose outputs they are")
    is_number = arguments.verify is not None and arguments.verify is not True
    if is_number and (arguments.verify < 1 or not arguments.teacher):
        parser.error(f"--verify {arguments.verify}: a number of views, 1 or more, goes with --teacher")
    if arguments.teacher and arguments.rebuild_index:
        parser.error("--rebuild_index is of the images; the teacher's index is made again by --teacher alone")
    return arguments


def _num_jobs(text: str) -> int | str:
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of jobs, or {AUTO}") from None


def main() -> int:
    """Plan, then make what is missing; or what the other modes are for."""
    arguments = parse_arguments()
    remember_invocation(vars(arguments), arguments.overrides)
    configs = load_configs(arguments.data_config, arguments.train_config, arguments.model_config, arguments.overrides)
    if configs.train is not None:
        check_losses(configs.train.distill_loss_weights, configs.train.loss_options)
    if arguments.download_only:
        return download(configs)
    if arguments.rebuild_index:
        return rebuild_indexes(configs.data)
    if arguments.verify is not None:
        return verify(configs, arguments)
    num_jobs, job_id = share_of(arguments)
    if arguments.dry_run:
        return dry_run(configs, num_jobs, job_id, with_teacher=arguments.teacher)
    return make(configs, num_jobs, job_id, arguments)


def make(configs: Configs, num_jobs: int, job_id: int, arguments: argparse.Namespace) -> int:
    """Make this job's share of the shards: images first, then with --teacher its outputs."""
    elastic = arguments.num_jobs == AUTO
    with StopFlag() as stop:
        jobs = open_jobs(configs.data, num_jobs, job_id)
        # every folder is surveyed before anything is written anywhere
        surveys = survey_jobs(jobs)
        image_bytes = print_plan(jobs, surveys, configs.data)
        if arguments.teacher:
            from distillery.precompute import teacher_job

            outputs = teacher_job.plan_outputs(configs, jobs[0].plan, jobs[0].shards, image_bytes)
        shards_left = 0
        for job, survey in zip(jobs, surveys, strict=True):
            shards_left += make_job(job, survey, configs.data, arguments.batch_size, stop, elastic=elastic)
        if arguments.teacher and not shards_left:
            shards_left = teacher_job.make_outputs(outputs, stop, elastic=elastic)
        if shards_left:
            raise Interrupted(
                f"{stop.reason}: {shards_left} shards are left to make; everything finished is saved. "
                "Run the same command again."
            )
        status = report_outcome(jobs, configs.data.max_failed_fraction)
        if arguments.teacher:
            teacher_job.report_outputs(outputs)
        return status


def share_of(arguments: argparse.Namespace) -> tuple[int, int]:
    """(number of jobs, this one's number): --num_jobs and --job_id, else with --teacher the launcher's processes.

    A process of --num_jobs auto has all shards as its share, and claims some of them at a time.
    """
    if arguments.num_jobs == AUTO:
        return 1, 0
    if arguments.num_jobs is not None or not arguments.teacher:
        return arguments.num_jobs or 1, arguments.job_id or 0
    world = world_from_environment()
    if world.size > 1:
        print(f"{world}: makes its share of the shards, one part of {world.size}. {world.alone}", flush=True)
    return world.size, world.rank


def dry_run(configs: Configs, num_jobs: int, job_id: int, *, with_teacher: bool) -> int:
    """Print the plan, of a few decoded images the hours too; no cache is written, nothing is downloaded."""
    data, opened, remote = configs.data, [], []
    for part in list_parts(data):
        try:
            opened.append((part, open_source(**part.arguments, download=False)))
        except NotDownloadedError as error:
            remote.append((part, error.hub_split))
    jobs = build_jobs(data, opened, num_jobs, job_id)
    surveys, speed = [survey_cache(job.plan, job.shards) for job in jobs], None
    if jobs:
        speed = measure_decoding(jobs[0].source, jobs[0].plan.spec, jobs[0].plan.dtype, jpeg_encoding(data))
    image_bytes = print_plan(jobs, surveys, data, speed)
    at_work = [line for job in jobs for line in workers_lines(job.title, job.plan.directory)]
    if with_teacher and jobs and jobs[0].plan.directory == data.cache_path:
        from distillery.precompute.teacher_job import plan_outputs

        outputs = plan_outputs(configs, jobs[0].plan, jobs[0].shards, image_bytes)
        at_work += workers_lines("the teacher's outputs", outputs.plan.directory)
    elif with_teacher:
        print("the teacher's outputs: what they cost is known once the training images are here (--download_only)")
    for line in at_work:
        print(line)
    for part, facts in remote:
        print("\n".join(remote_lines(part.title, facts, part.limit, part.dtype, data)))
    if jobs:
        if jobs[0].part.dataset is None:
            print(dtype_line(jobs[0].plan, jpeg_encoding(data), speed))
        missing = [(job.plan, survey.missing) for job, survey in zip(jobs, surveys, strict=True)]
        print("\n".join(plan_lines(missing, data.cache_path, data.workers, speed)))
    return EXIT_DONE


def verify(configs: Configs, arguments: argparse.Namespace) -> int:
    """Compare every byte with its hash; with --teacher also some stored outputs with the teacher itself."""
    status = report_verification(configs.data.cache_path)
    if not arguments.teacher or status != EXIT_DONE:
        return status
    from distillery.precompute.teacher_job import DEFAULT_REPLAYS, verify_outputs

    return verify_outputs(configs, DEFAULT_REPLAYS if arguments.verify is True else arguments.verify)


def rebuild_indexes(data: DataConfig) -> int:
    """Make index.json, failures.jsonl and lost records again from the shards alone, in every folder of the cache."""
    status = EXIT_DONE
    for folder in folders_of(data.cache_path):
        report = rebuild_index(folder, data.max_rows if folder == data.cache_path else None)
        how = " (upgraded from the predecessor's format)" if report.was_upgraded else ""
        shards = f"{len(report.index['shards'])} shards, {report.num_hashed} of them hashed{how}"
        print(f"{folder}: index.json made again from {shards}")
        for problem in report.problems:
            print(f"  left out: {problem}")
            status = EXIT_ERROR
    return status


def download(configs: Configs) -> int:
    """Fetch everything the two commands need from the network, into HF_HOME and TORCH_HOME."""
    for job in open_jobs(configs.data, 1, 0):
        print(f"{job.title}: {job.source.describe()}: {len(job.source)} images, all here")
    if configs.model is not None:
        from distillery.models.configured import download_weights

        for line in download_weights(configs.model):
            print(line)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
