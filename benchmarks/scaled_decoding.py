"""What jpeg_decode: scaled gains and changes, for JPEGs of several sizes: time, pixels, a teacher's features.

    python -m benchmarks.scaled_decoding --parquet data/train.parquet      # photographs of half a megapixel or less
    python -m benchmarks.scaled_decoding --tiny --out /tmp/bench

The originals are mosaics: photographs drawn with seed 0, each cut to --tile px, side by side. A photograph that is
blown up has no detail of its own size, and scaled decoding drops just that detail. An original is a JPEG of quality 90,
4:2:0. Each is decoded and resized to --size px by one thread, exact and scaled in turns, --rounds times, with the
memory of one image kept for the next as in a decode worker. A time is the median over rounds of the mean over images,
in seconds of the CPU: other work on the machine changes these less than seconds of the clock. The difference is that of
the resized pixels, in levels of 0..255: its mean, and what 99 % of the values do not exceed.

The teacher is EfficientNet-lite0 with its ImageNet weights (that of the demo). "Neighbour" is the share of images whose
nearest neighbour (cosine) among the other images' exact features is the same for both; "cosine" is the mean between
an image's two features.

Writes scaled_decoding.json and scaled_decoding.png into --out.
"""

import argparse
import io
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.common import build_parser, draw_bars, run_benchmark, source_images
from benchmarks.onnx import build
from distillery.precompute.pool import keep_freed_memory
from distillery.sources.pixels import DecodeError, PreprocessSpec, decode_image, preprocess_image
from distillery.sources.resizing import load_resampler

HALF = (0.5, 0.5, 0.5)
HEADINGS = {
    "scale": 7,
    "exact, ms": 11,
    "scaled, ms": 12,
    "ratio": 7,
    "mean": 7,
    "99 %": 6,
    "neighbour": 11,
    "cosine": 8,
}
BATCH = 32


def main() -> int:
    return run_benchmark("scaled_decoding", parse_arguments(), measure, draw)


def draw(result: dict, path: Path) -> None:
    """A panel for each size of the originals."""
    panels = [
        (row["name"], {"exact": row["exact_ms"], f"ours, scaled (1/{row['scale']})": row["scaled_ms"]})
        for row in result["results"]
    ]
    setting = result["setting"]
    title = f"JPEG to {setting['size']} px, {setting['images']} images of each size, one thread"
    draw_bars(panels, path, unit="ms of the CPU an image", limits={}, title=title)


def parse_arguments() -> argparse.Namespace:
    parser = build_parser(__doc__, tiny="8 images of two sizes, an untrained teacher", parquet=True)
    parser.add_argument("--images", type=int, default=100, help="of each size")
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.2, 1, 2, 4, 12])
    parser.add_argument("--tile", type=int, nargs=2, default=[375, 500], metavar=("H", "W"), help="px")
    parser.add_argument("--size", type=int, default=224, help="image_size, px")
    parser.add_argument("--exif", action="store_true", help="originals with an Exif block: Pillow decodes these")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.images, arguments.megapixels, arguments.tile = 8, [0.02, 0.1], [60, 80]
        arguments.size, arguments.rounds = 64, 1
    return arguments


def measure(arguments: argparse.Namespace, work: Path) -> dict:
    """Decode originals of each size both ways; returns what scaled_decoding.json holds."""
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()
    specs = [PreprocessSpec(arguments.size, "squash", "bicubic", HALF, HALF, how) for how in ("exact", "scaled")]
    tiles = cut_tiles(arguments)
    teacher = ("timm", "test_vit", {}) if arguments.tiny else ("torch_hub", "efficientnet_lite0", {})
    backbone = build(*teacher, arguments.size).eval()
    print(f"{len(tiles)} photographs\n{'':16}" + "".join(f"{heading:>{width}}" for heading, width in HEADINGS.items()))
    rows = []
    for megapixels in arguments.megapixels:
        originals, (height, width) = make_originals(tiles, megapixels, arguments.images, with_exif=arguments.exif)
        (exact_s, scaled_s), (exact, scaled) = decode_in_turns(originals, specs, arguments.rounds)
        difference = np.abs(exact.astype(np.int16) - scaled)
        row = {
            "name": f"{megapixels:g} megapixels", "height": height, "width": width,
            "bytes": sum(map(len, originals)) // len(originals), "scale": specs[1].jpeg_scale(height, width),
            "exact_ms": 1000 * exact_s, "scaled_ms": 1000 * scaled_s, "ratio": exact_s / scaled_s,
            "difference": float(difference.mean()), "difference_99": float(np.percentile(difference, 99)),
            **compare_features(features_of(backbone, exact), features_of(backbone, scaled)),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{height:>5} x {width:<8}{'1/' + str(row['scale']):>7}{row['exact_ms']:11.2f}{row['scaled_ms']:12.2f}"
            f"{row['ratio']:7.2f}{row['difference']:7.2f}{row['difference_99']:6.0f}{row['neighbour']:11.0%}"
            f"{row['cosine']:8.4f}",
            flush=True,
        )
    kept = {key: getattr(arguments, key) for key in ("images", "size", "rounds", "tile", "exif")}
    return {"setting": kept | {"photographs": len(tiles)}, "results": rows}


def cut_tiles(arguments: argparse.Namespace) -> list[np.ndarray]:
    """The photographs, uint8 [H, W, 3] each, of the size of a tile: of smaller ones and of damaged ones none."""
    height, width = arguments.tile
    given = argparse.Namespace(**vars(arguments) | {"images": None})
    tiles = []
    for data in source_images(given, height):
        try:
            pixels = decode_image(data)
        except DecodeError:
            continue
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        if top >= 0 and left >= 0:
            tiles.append(pixels[top : top + height, left : left + width])
    if not tiles:
        sys.exit(f"no photograph has {height} x {width} px: give a smaller --tile")
    return tiles


def make_originals(
    tiles: list[np.ndarray], megapixels: float, count: int, *, with_exif: bool = False
) -> tuple[list[bytes], tuple[int, int]]:
    """(`count` JPEGs, their height and width): as wide to high as a tile, tiled from the upper left corner."""
    from PIL import Image

    rng, (tile_height, tile_width, _) = np.random.default_rng(0), tiles[0].shape
    height = round((megapixels * 1e6 * tile_height / tile_width) ** 0.5)
    width = round(megapixels * 1e6 / height)
    rows, columns = -(-height // tile_height), -(-width // tile_width)
    files, exif = [], Image.Exif()
    exif[0x0112] = 1  # upright
    options = {"exif": exif} if with_exif else {}  # an empty block would be written too
    for _ in range(count):
        # a mosaic has no photograph twice where there are enough
        chosen = rng.choice(len(tiles), rows * columns, replace=rows * columns > len(tiles)).reshape(rows, columns)
        mosaic = np.concatenate([np.concatenate([tiles[i] for i in row], axis=1) for row in chosen])
        buffer = io.BytesIO()
        Image.fromarray(mosaic[:height, :width]).save(buffer, "JPEG", quality=90, **options)
        files.append(buffer.getvalue())
    return files, (height, width)


def decode_in_turns(
    files: list[bytes], specs: list[PreprocessSpec], rounds: int
) -> tuple[list[float], list[np.ndarray]]:
    """(seconds of the CPU an image by each specification; its pixels, uint8 [N, 3, size, size])."""
    preprocess_image(files[0], specs[0])  # what is imported and allocated once
    seconds: list[list[float]] = [[] for _ in specs]
    for _ in range(rounds):
        found, spent = [[] for _ in specs], [0.0] * len(specs)
        for data in files:
            for i, spec in enumerate(specs):
                began = time.process_time()
                found[i].append(preprocess_image(data, spec))
                spent[i] += time.process_time() - began
        for taken, total in zip(seconds, spent, strict=True):
            taken.append(total / len(files))
    return [statistics.median(taken) for taken in seconds], [np.stack(pixels) for pixels in found]


def features_of(backbone, pixels: np.ndarray):
    """Pooled features of unit length, float32 [N, D]."""
    torch = load_resampler()
    images = (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        features = torch.cat([backbone(batch).pooled for batch in images.split(BATCH)])
    return torch.nn.functional.normalize(features.float(), dim=1)


def compare_features(exact, scaled) -> dict[str, float]:
    """How far a teacher sees the same in the scaled images: see the module's docstring."""
    neighbours = []
    for features in (exact, scaled):
        similar = features @ exact.T
        similar.fill_diagonal_(-2)  # an image is not its own neighbour
        neighbours.append(similar.argmax(1))
    same = (neighbours[0] == neighbours[1]).float().mean().item()
    return {"neighbour": same, "cosine": (exact * scaled).sum(1).mean().item()}


if __name__ == "__main__":
    sys.exit(main())
