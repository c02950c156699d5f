"""Embeddings of every image of a data set, by a run's student or teacher or by any other model, as parquet files.

    python -m distillery.embed --run DIR --data_config YAML --out DIR                       # a run's student
    python -m distillery.embed --run DIR --space teacher --data_config YAML --out DIR       # in its teacher's space
    python -m distillery.embed --model_config YAML --role teacher --data_config YAML --out DIR

Run again after any interruption, it goes on. Exit status: 0 done, as far as the cache is complete (embeddings.json says
whether all is there); 2 wrong usage or configuration; 3 done, but more
images failed than max_failed_fraction allows; 75 interrupted, run the same command again; 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.config.errors import owner_of
from distillery.config.keys_data import DataConfig
from distillery.config.keys_train import TrainConfig
from distillery.config.load import Configs, load_data_config, load_dumped_configs, load_model_config
from distillery.system.console import ProgressLine
from distillery.system.errors import (
    EXIT_DONE,
    EXIT_TOO_MANY_FAILED,
    Interrupted,
    UserError,
    remember_invocation,
    run_command,
    stage1_command,
)
from distillery.system.files import expand_path
from distillery.system.signals import StopFlag

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distillery.export.embedders import Embedder
    from distillery.export.embeddings import EmbeddingFolder
    from distillery.reading.every_image import Part

# a signal's grace: a file that is nearly done is finished, a big one that has just begun is dropped
_GRACE_S = 15
# of a forward pass, as the evaluation has it
MOST_IMAGES = 256


def parse_arguments() -> argparse.Namespace:
    """The command line; --help and wrong flags end the process."""
    first, examples, rest = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m distillery.embed",
        description=first,
        epilog=f"{examples}\n\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--run", type=Path, metavar="DIR", help="run folder (checkpoint_dir)")
    whose.add_argument("--model_config", type=Path, metavar="YAML", help="its teacher or student, without a run")
    parser.add_argument("--role", choices=("student", "teacher", "untrained"),
                        help="default: student, of a run; untrained: it before its first step")  # fmt: skip
    parser.add_argument("--space", choices=("backbone", "teacher"), default="backbone",
                        help="teacher: the student in the units of its teacher's features")  # fmt: skip
    parser.add_argument("--weights", choices=("auto", "student", "ema"),
                        help="default: auto, the averaged ones where the run has ema_decay, else the last")  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="default: the newest of the run")
    parser.add_argument("--data_config", required=True, type=Path, metavar="YAML", help="the images")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write, made if need be")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: CUDA where there is one")  # fmt: skip
    parser.add_argument("--batch_size", type=int, metavar="N",
                        help=f"images of a forward pass (default {MOST_IMAGES}, fewer of more than 295 px); may change "
                        "last digits")  # fmt: skip
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                        help="override one key of a YAML file given (dots for nesting); may be repeated")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.batch_size is not None and not 1 <= arguments.batch_size <= MOST_IMAGES:
        parser.error(f"--batch_size {arguments.batch_size}: expected 1 to {MOST_IMAGES}")
    if arguments.model_config and arguments.role not in ("teacher", "student"):
        parser.error("--model_config needs --role teacher or --role student: which of its two models")
    arguments.role = arguments.role or "student"
    is_trained = arguments.run is not None and arguments.role == "student"
    if not is_trained and (arguments.weights or arguments.checkpoint):
        parser.error("--weights and --checkpoint choose among the weights of a run's student: --run DIR --role student")
    if arguments.space == "teacher" and not is_trained and arguments.role != "teacher":
        parser.error("--space teacher needs a head that was trained: --run DIR --role student")
    return arguments


def load_inputs(arguments: argparse.Namespace) -> tuple[DataConfig, Configs]:
    """The images' configuration, and that of the models.

    Raises:
        UserError: as load_configs.
    """
    of_model = [text for text in arguments.overrides if arguments.model_config and _owner(text) == "model"]
    of_data = [text for text in arguments.overrides if text not in of_model]
    data = load_data_config(arguments.data_config, of_data, require_source=False)
    if arguments.run is not None:
        return data, load_dumped_configs(expand_path(arguments.run) / "config.yaml")
    return data, Configs(data, TrainConfig(), load_model_config(arguments.model_config, of_model))


def _owner(override: str) -> str | None:
    return owner_of(override.partition("=")[0].strip().partition(".")[0])


def load_embedder(arguments: argparse.Namespace, data: DataConfig, configs: Configs, device: torch.device) -> Embedder:
    """The model that the command line names, for the images of `data`; configs: of the models."""
    from distillery.export.embedders import student_embedder, teacher_embedder, untrained_embedder

    if arguments.role == "teacher":
        return teacher_embedder(configs, data, device, arguments.run and expand_path(arguments.run))
    if arguments.role == "untrained" or arguments.run is None:
        return untrained_embedder(configs, data, device, arguments.role)
    return student_embedder(
        expand_path(arguments.run),
        data,
        device,
        space=arguments.space,
        checkpoint=arguments.checkpoint and expand_path(arguments.checkpoint),
        weights=arguments.weights or "auto",
    )


def main() -> int:
    """Find the images, load the model, make what is missing."""
    arguments = parse_arguments()
    remember_invocation(vars(arguments), arguments.overrides)
    data, configs = load_inputs(arguments)
    out = expand_path(arguments.out)

    # torch takes seconds to import: --help and configuration errors answer before it
    from data_loader import find_cache
    from distillery.evaluate.features import MAX_BATCH_BYTES
    from distillery.export.embeddings import EmbeddingFolder
    from distillery.models.configured import choose_device
    from distillery.reading.every_image import CachedImages, RawImages

    device = choose_device(arguments.device)
    index = find_cache(data)
    images = RawImages(data) if index is None else CachedImages(data, index)
    print(images.line, flush=True)
    # of the data alone: a resumed pass must have the same batches
    fitting = MAX_BATCH_BYTES // (4 * math.prod(images.image_shape))
    batch_size = arguments.batch_size or max(1, min(MOST_IMAGES, fitting))
    with StopFlag() as stop:
        embedder = load_embedder(arguments, data, configs, device)
        print(f"{embedder.label}, on {device.type}", flush=True)
        folder = EmbeddingFolder(out, embedder.identity, embedder.width, images)
        for note in folder.notes:
            print(note, flush=True)
        folder.open()
        with contextlib.suppress(Interrupted):
            make_embeddings(folder, embedder, device, batch_size, data.prefetch_batches, stop)
        if folder.to_make:
            raise Interrupted(
                f"{stop.reason}: {len(folder.to_make)} files are left to make; everything finished is saved. Run the "
                "same command again."
            )
    return report_outcome(folder, data)


def report_outcome(folder: EmbeddingFolder, data: DataConfig) -> int:
    """Print what the folder holds; returns the exit status."""
    failed, rows = len(folder.failures), folder.num_rows
    print(f"{folder.directory}: {rows} embeddings of {folder.width} channels; {failed} images could not be decoded")
    if not folder.is_complete:
        print(f"  the cache is incomplete: complete it ({stage1_command()}), and the same command goes on")
    if failed:
        print(f"  they are left out; the reasons are in {folder.directory / 'failures.jsonl'}")
    if failed <= data.max_failed_fraction * (rows + failed):
        return EXIT_DONE
    print(f"  more than max_failed_fraction {data.max_failed_fraction} allows: look at the reasons")
    return EXIT_TOO_MANY_FAILED


def make_embeddings(
    folder: EmbeddingFolder, embedder: Embedder, device: torch.device, batch_size: int, ahead: int, stop: StopFlag
) -> None:
    """Make the files that are missing, in order, until done or a stop is requested.

    Args:
        folder: opened.
        embedder: the model.
        device: where it is.
        batch_size: images of a forward pass.
        ahead: batches read ahead.
        stop: looked at between batches.
    Raises:
        Interrupted: a stop was requested, and the file in hand takes too long.
    """
    images, parts = folder.images, list(folder.to_make)
    total, left = sum(part.num_read for part in images.parts), sum(part.num_read for part in parts)
    stream = images.batches(parts, batch_size, pin_memory=device.type == "cuda", ahead=ahead)
    writing: Future | None = None
    with (
        contextlib.closing(stream),
        ThreadPoolExecutor(1, thread_name_prefix="write-embeddings") as writer,
        ProgressLine(total, "images", "embedding", initial=total - left, enabled=left > 0) as progress,
    ):
        for part in parts:
            if stop.requested:
                break
            batches = itertools.islice(stream, images.num_batches(part, batch_size))
            embeddings, global_idx = _of_part(part, batches, embedder, device, stop, progress)
            if writing is not None:
                writing.result()
            writing = writer.submit(folder.write, part, global_idx, embeddings)
        if writing is not None:
            writing.result()


def _of_part(
    part: Part, batches: Iterator[tuple[Tensor, Tensor]], embedder: Embedder, device: torch.device, stop: StopFlag,
    progress: ProgressLine,
) -> tuple[Any, Any]:  # fmt: skip
    """(embeddings float32 [n, D], global_idx int64 [n]) of a part's images that could be decoded, as arrays.

    Raises:
        Interrupted: as make_embeddings. UserError: an embedding is not finite.
    """
    import numpy as np

    from distillery.evaluate.features import extract_features

    stop_seen: list[float] = []

    def counted() -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        for images, global_idx in batches:
            done += len(global_idx)
            progress.advance(len(global_idx))
            if len(global_idx):
                yield images, global_idx
            del images
        progress.advance(part.num_read - done)

    def check_stop() -> None:
        if stop.requested and not stop_seen:
            stop_seen.append(time.monotonic())
        if stop_seen and time.monotonic() - stop_seen[0] > _GRACE_S:
            raise Interrupted

    found = counted()
    head = next(found, None)
    if head is None:
        return np.empty((0, embedder.width), np.float32), np.empty(0, np.int64)
    chained = itertools.chain([head], found)
    del head
    embeddings, global_idx = extract_features(
        embedder.module, chained, device, precision=embedder.precision, before_batch=check_stop
    )
    num_bad = int((~embeddings.isfinite().all(dim=1)).sum())
    if num_bad:
        raise UserError(
            f"{num_bad} of the embeddings of images {part.first} to {part.stop - 1} are not finite: look at the "
            f"model's weights, or at its precision ({embedder.precision})"
        )
    return embeddings.numpy(), global_idx.numpy()


if __name__ == "__main__":
    run_command(main)
