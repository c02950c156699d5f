"""Every byte of a cache against its hashes, every view against the records. Reads only.

    python -m distillery.verify DIR     # a cache_dir with evaluation sets and teacher outputs, or one of these alone

Exit status: 0 sound; 1 damaged; 2 no cache there, or wrong usage.
"""

import argparse
import os
import shlex
from pathlib import Path

from distillery.cache.folder import load_index
from distillery.cache.images import IMAGE_SHARDS, INDEX_NAME, is_predecessors
from distillery.cache.verify import Problem, find_problems, folders_of, shard_names
from distillery.system.errors import (
    EXIT_DONE,
    EXIT_ERROR,
    MissingFileError,
    remember_invocation,
    run_command,
    stage1_command,
    teacher_command,
)
from distillery.teacher_cache.problems import find_teacher_problems
from distillery.teacher_cache.records import STATISTICS_NAME, TEACHER_SHARDS, teacher_folders


def repair_command(problems: list[Problem], stage1: str) -> str:
    """What to type: the bad files are removed first where stage 1 might not see by itself that they are bad."""
    remove = sorted({str(problem.remove) for problem in problems if problem.remove is not None})
    return f"rm -f -- {shlex.join(remove)} && {stage1}" if remove else stage1


def report_verification(directory: Path, repair: str | None = None) -> int:
    """Verify a folder and print the outcome; returns the exit status.

    directory: of images, with its evaluation caches and teacher outputs; or of a teacher's outputs alone.
    repair: the command that makes images; None: stage 1's.

    Raises:
        MissingFileError: no cache there.
    """
    if not directory.is_dir():
        what = "a file, not a folder" if directory.exists() else "no such folder"
        raise MissingFileError(f"{directory}: {what}. Give the cache_dir of your data_config.yaml.")
    is_teachers = shard_names(directory, TEACHER_SHARDS) or (directory / STATISTICS_NAME).exists()
    images = [] if is_teachers else folders_of(directory)
    teachers = [directory] if is_teachers else teacher_folders(directory)
    is_part = len(images) > 1 or any(shard_names(folder, TEACHER_SHARDS) for folder in teachers)
    problems, upgraded = _problems_of_images(images, is_part=is_part)
    outputs = [problem for folder in teachers for problem in find_teacher_problems(folder)]
    for problem in [*problems, *outputs]:
        print(f"BAD  {problem.text}")
    if outputs:
        command = repair_command(outputs, teacher_command())
        print(f"{len(outputs)} problems of teacher outputs. Repair: {command}")
    command = repair_command(problems, repair or stage1_command())
    if problems and upgraded:
        print(f"{len(problems)} problems. Shards of an earlier format's program cannot be made again:")
        print(f"bring the bad files back from a copy, or leave them out: {command} --rebuild_index")
    elif problems:
        print(f"{len(problems)} problems. Repair (makes again exactly what is bad): {command}")
    if problems or outputs:
        return EXIT_ERROR
    shards = [path for folder in images for path in folder.glob("images_*.pt")]
    shards += [path for folder in teachers for path in folder.glob("teacher_*.pt")]
    size = sum(path.stat().st_size for path in shards)
    verified = all(load_index(folder).verified for folder in images)
    hashes = "every byte as its hash says" if verified else "no hashes to compare: unverified"
    print(f"OK   {directory}: {len(shards)} shards, {size} bytes, {hashes}")
    return EXIT_DONE


def _problems_of_images(folders: list[Path], *, is_part: bool) -> tuple[list[Problem], bool]:
    """(what is wrong, whether a shard is of an earlier format); is_part: there are other shards beside these."""
    problems, upgraded = [], False
    for folder in folders:
        try:
            problems += find_problems(folder)
        except MissingFileError:
            if not is_part:
                raise
            problems.append(Problem(f"{folder / INDEX_NAME}: missing, and every shard with it"))
        upgraded = upgraded or any(map(is_predecessors, IMAGE_SHARDS.scan(folder).records()))
    return problems, upgraded


def verify_folder(directory: Path) -> int:
    """What both commands do with their DIR: verify it, print the outcome; returns the exit status.

    Raises:
        MissingFileError: no cache there; the message says what to type where one is near.
    """
    # whose configuration it is, the folder does not say: no command may fill another cache by mistake
    remember_invocation({"data_config": "YOUR_DATA_CONFIG.yaml"})
    try:
        return report_verification(directory)
    except MissingFileError as error:
        if not directory.is_dir():
            raise
        if (directory / "checkpoints").is_dir() or directory.name == "checkpoints":
            raise MissingFileError(
                f"{directory}: a run folder. This command is for caches: give the cache_dir of your data_config.yaml. "
                "Checkpoints are checked whenever they are loaded."
            ) from error
        for parent in list(directory.absolute().parents)[:3]:  # of eval/NAME/part
            if os.access(parent, os.R_OK) and shard_names(parent, IMAGE_SHARDS):
                command = shlex.join(["python", "-m", "distillery.verify", str(parent)])
                raise MissingFileError(f"{directory}: no cache, but part of one. Run: {command}") from error
        raise


def main() -> int:
    """python -m distillery.verify DIR."""
    parser = argparse.ArgumentParser(
        prog="python -m distillery.verify",
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n")[2],
        allow_abbrev=False,
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a cache_dir, or one of the folders below it")
    return verify_folder(parser.parse_args().directory)


if __name__ == "__main__":
    run_command(main)
