"""Check the class numbers that masks hold against the classes of an evaluation set."""

from distillery.cache.images import FAILURES_NAME
from distillery.cache.index import CacheIndex
from distillery.system.errors import UserError

_SHOWN_CLASSES = 8


def check_mask_classes(index: CacheIndex, name: str, num_classes: int | None, ignore_index: int) -> int:
    """The number of classes of an evaluation set's split, by its index alone: no mask is read.

    Args:
        index: of the folder cache_dir/eval/NAME/train or test.
        name: NAME.
        num_classes: of the configuration; None: one more than the highest class there is in this split.
        ignore_index: class number of pixels that do not count.
    Raises:
        UserError: the folder holds no masks, none that could be read, classes beyond num_classes, or, to learn from,
            less than two classes.
    """
    where = f"eval_datasets.{name}: the masks of {index.directory.name}"
    if index.mask_dtype is None:
        raise UserError(f"eval_datasets.{name}: {index.directory} holds no masks; it was cached as a labelled set.")
    classes = [number for number in index.mask_classes if number != ignore_index]
    if not index.mask_classes:
        raise UserError(f"{where} could not be read, not one: the reasons are in {index.directory / FAILURES_NAME}.")
    # of the whole split: another job of an array may add the other classes
    if len(classes) < 2 and index.complete and index.directory.name == "train":
        held = f"class {classes[0]} alone" if classes else "no class"
        raise UserError(
            f"{where} hold {held} beside ignore_index {ignore_index}: there is nothing to tell apart. In binary masks "
            "of 0 and 255 write 1 for 255; of others set ignore_index to a number that stands for no class."
        )
    if num_classes is None:
        return classes[-1] + 1 if classes else 0
    if beyond := [number for number in classes if number >= num_classes]:
        listed = ", ".join(map(str, beyond[:_SHOWN_CLASSES])) + (", ..." if len(beyond) > _SHOWN_CLASSES else "")
        remedy = f", or ignore_index: {beyond[0]}" if len(beyond) == 1 else ""
        raise UserError(
            f"{where} hold {'class' if len(beyond) == 1 else 'the classes'} {listed}, num_classes is {num_classes} "
            f"(0..{num_classes - 1}): set num_classes: {beyond[-1] + 1}{remedy}"
        )
    return num_classes
