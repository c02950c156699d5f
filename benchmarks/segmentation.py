"""Segmentation by patch features on mosaics of labelled images: teacher, trained student, untrained student.

    python -m benchmarks.segmentation --train train.parquet --test test.parquet --teacher_repo FOLDER --run runs/a
    python -m benchmarks.segmentation --tiny      # seconds: does everything still run?

The data: CIFAR-10 as parquet, https://huggingface.co/datasets/uoft-cs/cifar10, folder plain_text; other labelled
parquet files of square images of one size do as well. Each mosaic is --tiles by --tiles of them, drawn with seed 0,
each image in one mosaic at most; its mask is the class of each tile. Training mosaics are made of --train alone, test
mosaics of --test. All models read the mosaics at full size: 128 px for 4 by 4 tiles of CIFAR-10. FOLDER is a torch.hub
folder: a hubconf.py with a function for each model that takes `pretrained`, where the teacher's weights are loaded.

Prints a table, and the protocol of each row (docs/segmentation.md).
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillery.config.keys_data import DataConfig
from distillery.evaluate.segmentation import evaluate_segmentation
from distillery.models.backbone import Backbone, build_backbone
from distillery.models.builders import ModelSpec
from distillery.models.configured import choose_device
from distillery.sources.pixels import decode_image
from distillery.sources.registry import open_source
from distillery.system.errors import run_command
from distillery.training.trained import build_bare_student, load_trained

# few: at 128 px the feature maps of a batch of 256 are gigabytes, and a CPU spends more on pages than on sums
BATCH_SIZE = 32
SPLITS = ("train", "test")
COLUMNS = {"miou": 9, "pixel_accuracy": 9, "knn_miou": 11}  # width of each
MEAN, STD = (DataConfig.model_fields[name].default for name in ("mean", "std"))


def main() -> int:
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    splits = [digits(0, 640), digits(640, 800)] if arguments.tiny else [tiles_of(arguments, split) for split in SPLITS]
    num_classes = 1 + max(int(labels.max()) for _, labels in splits)
    limits = arguments.max_train, arguments.max_test
    train, test = (Mosaics(*split, arguments.tiles, limit) for split, limit in zip(splits, limits, strict=True))
    print(f"{len(train.images):,} training and {len(test.images):,} test mosaics of {train.size} px", flush=True)
    print(f"{'':24}{'mIoU':>9}{'pixels':>9}{'k-NN mIoU':>11}{'seconds':>9}", flush=True)
    protocols = []
    for name, load in models(arguments, train.size).items():
        began = time.perf_counter()
        row = evaluate_segmentation(
            load().to(device), train, test, num_classes=num_classes, ignore_index=None, device=device
        )
        cells = "".join(f"{row[key]:{width}.1%}" for key, width in COLUMNS.items())
        print(f"{name:24}{cells}{time.perf_counter() - began:9.0f}", flush=True)
        protocols.append(f"{name}: {row['protocol']}")
    print("\n".join(protocols))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=Path, metavar="PARQUET", help=f"labelled images of the {split} mosaics")
    parser.add_argument("--image_column", help="default: found by its type")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--teacher_repo", type=Path, metavar="FOLDER", help="torch.hub folder of both models")
    parser.add_argument("--teacher", default="cifar_resnet56")
    parser.add_argument("--student", default="cifar_resnet20", help="untrained")
    parser.add_argument("--run", type=Path, metavar="DIR", action="append", default=[], help="run folder; repeatable")
    parser.add_argument("--tiles", type=int, default=4, help="images along each side of a mosaic")
    parser.add_argument("--max_train", type=int, default=1000, help="training mosaics (default %(default)s)")
    parser.add_argument("--max_test", type=int, default=200, help="test mosaics (default %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--tiny", action="store_true", help="mosaics of scikit-learn's digits, untrained timm models")
    arguments = parser.parse_args()
    if not arguments.tiny:
        for flag in (*SPLITS, "teacher_repo"):
            path = getattr(arguments, flag)
            if path is None or not path.exists():
                parser.error(f"--{flag} {path or 'is missing'}{': no such path' if path else ''}")
    return arguments


def models(arguments: argparse.Namespace, size: int) -> dict[str, Callable[[], Backbone]]:
    """What builds each row's model for images of `size` px."""
    if arguments.tiny:
        common = {"source": "timm", "teacher": "test_vit", "student": "test_vit"}
    else:
        common = {"source": "torch_hub", "teacher": arguments.teacher, "student": arguments.student}
    source, repo = common["source"], arguments.teacher_repo and str(arguments.teacher_repo)

    def build(role: str, *, pretrained: bool) -> Backbone:
        torch.manual_seed(0)
        spec = ModelSpec(source=source, name=common[role], repo=repo, pretrained=pretrained)
        return build_backbone(spec, data_mean=MEAN, data_std=STD, image_size=size)

    def trained(run: Path) -> Backbone:
        found = load_trained(run)
        sections = {**found.config, "data": {**found.config["data"], "image_size": size}}
        sections["model"] = {**found.config["model"], "student_img_size": None}
        student = build_bare_student(sections, MEAN, STD)
        student.model.load_state_dict(found.weights)
        return student

    return (
        {f"teacher {common['teacher']}": lambda: build("teacher", pretrained=not arguments.tiny)}
        | {f"student {run.name}": lambda run=run: trained(run) for run in arguments.run}
        | {f"untrained {common['student']}": lambda: build("student", pretrained=False)}
    )


def tiles_of(arguments: argparse.Namespace, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, S, S, 3] and labels int64 [N] of a split."""
    source = open_source(
        dataset_name="parquet",
        data_files=str(getattr(arguments, split)),
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        labels_required=True,
    )
    return np.stack([decode_image(data) for data in source.read(0, len(source))]), source.labels(0, len(source))


def digits(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Some of scikit-learn's digits, four times as large: pixels uint8 [N, 32, 32, 3] and labels int64 [N]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = (data.images[start:stop] * 15).astype(np.int16).repeat(4, axis=1).repeat(4, axis=2)
    return np.repeat(pixels[..., None], 3, axis=3), data.target[start:stop]


class Mosaics:
    """Batches (images float32 [B, 3, S, S] normalised, masks uint8 [B, S, S]) of mosaics of tiles x tiles images.

    Args:
        pixels: uint8 [N, s, s, 3]; S = tiles * s. What is left over after whole mosaics is not used.
        labels: int64 [N].
        tiles: along each side.
        limit: mosaics at most.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, tiles: int, limit: int) -> None:
        count, side = min(limit, len(pixels) // tiles**2), pixels.shape[1]
        order = np.random.default_rng(0).permutation(len(pixels))[: count * tiles**2].reshape(count, tiles, tiles)
        self.size = tiles * side
        # [count, row, column, y, x, ...] -> rows of pixels, columns of pixels
        self.images = pixels[order].transpose(0, 5, 1, 3, 2, 4).reshape(count, 3, self.size, self.size)
        self.masks = labels[order].astype(np.int16).repeat(side, axis=1).repeat(side, axis=2)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        for start in range(0, len(self.images), BATCH_SIZE):
            piece = slice(start, start + BATCH_SIZE)
            images = torch.from_numpy(self.images[piece]).float() / 255
            yield (images - mean) / std, torch.from_numpy(self.masks[piece])


if __name__ == "__main__":
    sys.exit(run_command(main))
