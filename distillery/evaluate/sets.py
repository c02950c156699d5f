"""The evaluation sets of a run: what each measures, and the caches of its two splits."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distillery.cache.folder import load_index, load_labels
from distillery.cache.index import CacheIndex
from distillery.config.keys_data import DataConfig
from distillery.sources.evaluation import label_warnings
from distillery.system import distributed
from distillery.system.errors import UserError, stage1_command
from distillery.system.files import expand_path

CLASSIFICATION, SEGMENTATION = "classification", "segmentation"


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set.

    train, test: cache folders of the splits; num_classes, ignore_index: of the masks, where the task is segmentation;
    class_names: number -> name, as far as the caches know names.
    """

    name: str
    train: Path
    test: Path
    task: str = CLASSIFICATION
    num_classes: int | None = None
    ignore_index: int = 255
    class_names: dict[int, str] = field(default_factory=dict)

    @property
    def is_segmentation(self) -> bool:
        """Whether its images have masks, and no labels."""
        return self.task == SEGMENTATION

    def name_of(self, number: int) -> str:
        """A class by its name, or by its number where no name is known."""
        return self.class_names.get(number, str(number))


def eval_sets(data: DataConfig, k: int | None = None) -> list[EvalSet]:
    """The evaluation sets of a data configuration, in its order; rank 0 prints what makes their numbers mean little.

    k: neighbours that shall vote.

    Raises:
        UserError: one of them has not been cached, or its masks hold a class that its num_classes leaves out.
    """
    found = []
    for name, dataset in data.eval_datasets.items():
        parts = tuple(expand_path(data.cache_dir) / "eval" / name / part for part in ("train", "test"))
        for part in parts:
            if not (part / "index.json").exists():
                raise UserError(
                    f"eval_datasets.{name}: {part} is not there. Run: python precompute_cache.py --data_config "
                    "data_config.yaml (it caches evaluation sets too), or remove it from eval_datasets."
                )
        indexes = [load_index(part) for part in parts]
        for index, key in zip(indexes, ("max_train", "max_test"), strict=True):
            count, limit = index.num_samples, getattr(dataset, key)
            if limit is not None and count > limit and distributed.is_main():
                why = f"{index.directory} holds {count} images, more than {key} ({limit}): all are used"
                print(f"eval_datasets.{name}: {why}. For fewer, remove that folder and run: {stage1_command()}")
        num_classes = None
        if k is not None and dataset.task != SEGMENTATION and indexes[0].num_valid < k and distributed.is_main():
            print(f"eval_datasets.{name}: knn_k is {k}, and there are {indexes[0].num_valid} training images: all vote")
        if dataset.task == SEGMENTATION:
            num_classes = count_mask_classes(indexes, name, dataset.num_classes, dataset.ignore_index)
        elif distributed.is_main():
            for warning in _label_warnings(*indexes):
                print(f"WARNING: eval_datasets.{name}: {warning}")
        names = indexes[1].class_names | indexes[0].class_names
        found.append(EvalSet(name, *parts, dataset.task, num_classes, dataset.ignore_index, names))
    return found


def count_mask_classes(indexes: Iterable[CacheIndex], name: str, num_classes: int | None, ignore_index: int) -> int:
    """The number of classes of a segmentation set.

    Args:
        indexes: of its splits.
        name: of the set, for messages.
        num_classes: as configured; None: as many as the masks of both splits have.
        ignore_index: the number that is no class.
    Raises:
        UserError: the masks hold a class that num_classes leaves out.
    """
    from distillery.cache.masks import check_mask_classes

    return max(check_mask_classes(index, name, num_classes, ignore_index) for index in indexes)


def _label_warnings(train: CacheIndex, test: CacheIndex) -> list[str]:
    """label_warnings of two caches; none of one that cannot be read: the evaluation says so."""
    if not (train.labels and test.labels):
        return []
    try:
        labels = [np.concatenate([load_labels(of, s) for s in range(len(of.shard_names))]) for of in (train, test)]
    except (OSError, UserError):
        return []
    return label_warnings(*labels, test.class_names)
