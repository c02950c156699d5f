"""The 1,797 handwritten digits of scikit-learn (UCI, 8 x 8 pixels) as two parquet files of PNG images with labels.

python examples/demo/make_data.py OUT_DIR      # writes OUT_DIR/train.parquet (1,297 images) and test.parquet (500)
"""

import io
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_TEST = 500


def encoded_png(digit: np.ndarray) -> bytes:
    """An 8 x 8 digit, values 0..16, as a PNG of 64 x 64 px."""
    pixels = Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    pixels.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def main(out_dir: Path) -> None:
    """Write both parts; existing files stay."""
    datasets.disable_progress_bars()
    out_dir.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    for name, rows in (("test", order[:NUM_TEST]), ("train", order[NUM_TEST:])):
        path = out_dir / f"{name}.parquet"
        if path.exists():
            continue
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
        images = [{"bytes": encoded_png(digits.images[row]), "path": None} for row in rows]
        table = datasets.Dataset.from_dict({"image": images, "label": digits.target[rows].tolist()}, features=features)
        table.to_parquet(path)
        print(f"{path}: {len(rows)} images")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
