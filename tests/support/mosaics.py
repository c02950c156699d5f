"""Segmentation data from real images: scanned digits in a mosaic, and the digit of each tile as its mask."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

NUM_DIGITS, DIGIT_SIZE = 10, 8


def mosaics(num_images: int, *, tiles: int = 4, scale: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of tiles x tiles digits, and their masks.

    Args:
        num_images: N.
        tiles: digits in each row and in each column of an image.
        scale: pixels that each scanned pixel becomes, in height and in width.
        seed: chooses the digits.
    Returns:
        (images, uint8 [N, S, S, 3]; masks, uint8 [N, S, S], the digit 0..9 of the tile), S = 8 * tiles * scale px.
    Source: the 1,797 digits of 8 x 8 px that scikit-learn brings along (UCI, handwritten digits).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = np.random.default_rng(seed).integers(0, len(digits.target), (num_images, tiles, tiles))
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)[chosen]
    numbers = np.broadcast_to(digits.target.astype(np.uint8)[chosen][..., None, None], grey.shape)
    images, masks = (np.repeat(np.repeat(_joined(of), scale, axis=1), scale, axis=2) for of in (grey, numbers))
    return np.repeat(images[..., None], 3, axis=3), masks


def _joined(parts: np.ndarray) -> np.ndarray:
    """[N, rows, columns, h, w] -> [N, rows * h, columns * w]."""
    count, rows, columns, height, width = parts.shape
    return parts.transpose(0, 1, 3, 2, 4).reshape(count, rows * height, columns * width)


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels [H, W, 3] or [H, W]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_mosaics(
    folder: Path, num_train: int, num_test: int, *, tiles: int = 4, scale: int = 1, seed: int = 0
) -> dict[str, object]:
    """Write train.parquet and test.parquet below a folder: the columns image and mask, PNG files as bytes.

    Args:
        folder: made where it is not there.
        num_train, num_test: images of each split.
        tiles, scale, seed: as `mosaics` takes them.
    Returns:
        An entry of eval_datasets that names the two splits: classes 0 to 9.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    images, masks = mosaics(num_train + num_test, tiles=tiles, scale=scale, seed=seed)
    for split, part in (("train", slice(num_train)), ("test", slice(num_train, None))):
        columns = {"image": images[part], "mask": masks[part]}
        table = pa.table({name: [encode_png(pixels) for pixels in values] for name, values in columns.items()})
        pq.write_table(table, folder / f"{split}.parquet")
    return {
        "dataset_name": "parquet",
        "data_files": {split: str(folder / f"{split}.parquet") for split in ("train", "test")},
        "task": "segmentation",
        "mask_column": "mask",
        "num_classes": NUM_DIGITS,
    }
