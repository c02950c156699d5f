"""How near the ONNX graphs of seven families come to PyTorch in float32, float16 and int8, and how large they are.

    python -m benchmarks.onnx --parquet data/test.parquet --image_column img     # e.g. CIFAR-10
    python -m benchmarks.onnx --tiny --out /tmp/bench

Half of the images calibrate int8, the other half are compared (see distillery.export.parity for the measures). Six
models begin with random weights and learn for --steps steps to give each image at 8 x 8 px from their pooled feature,
so that their weights and batch-norm statistics are not those of the start; EfficientNet-lite0 has its ImageNet weights
(those of the demo's teacher). Nothing is refused here: the limits of the export follow from this table.

Writes onnx.json and onnx.png into --out.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import build_parser, draw_bars, run_benchmark, source_images
from distillery.system.console import format_bytes

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
# family -> (source, name, arguments), at 64 px
FAMILIES = {
    "ResNet-18": ("timm", "resnet18", {}),
    "MobileNetV3-small": ("timm", "mobilenetv3_small_100", {}),
    "EfficientNet-lite0, ImageNet": ("torch_hub", "efficientnet_lite0", {}),
    "ConvNeXt-atto": ("timm", "convnext_atto", {}),
    "ViT-tiny/8, 6 blocks": ("timm", "vit_tiny_patch16_224", {"patch_size": 8, "depth": 6}),
    "Swin, 6 blocks": (
        "timm",
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 48, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 4},
    ),
    "Hiera, 6 blocks": ("timm", "hiera_tiny_224", {"embed_dim": 48, "num_heads": 1, "stages": (1, 2, 3), "q_pool": 2}),
}
TINY = {"ResNet of timm's tests": ("timm", "test_resnet", {})}
BATCH = 24
TRAINING_BATCH = 32


def main() -> int:
    return run_benchmark("onnx", parse_arguments(), measure, draw)


def draw(result: dict, path: Path) -> None:
    """One panel for each precision: k-NN agreement of the pooled feature."""
    rows = [row for row in result["results"] if row["output"] == "features"]
    panels = [
        (precision, {row["name"]: 100 * row["neighbour_overlap"] for row in rows if row["precision"] == precision})
        for precision in ("fp16", "int8")
    ]
    setting = result["setting"]
    title = f"the 10 nearest images that agree with PyTorch, of {setting['images'] // 2} at {setting['size']} px"
    draw_bars(panels, path, unit="%", limits={}, title=title)


def parse_arguments() -> argparse.Namespace:
    parser = build_parser(__doc__, tiny="one small network, 16 images, one step", parquet=True)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=64, help="px")
    parser.add_argument("--steps", type=int, default=40, help="of training, in batches of 32")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.images, arguments.steps = 16, 1
    return arguments


def measure(arguments: argparse.Namespace, work: Path) -> dict:
    """Trace and compare each family; returns what onnx.json holds."""
    import torch

    from distillery.export.onnx import build_onnx
    from distillery.export.parity import HEADINGS, as_dicts, measure_agreement, table_rows
    from distillery.export.quantise import to_float16, to_int8

    images = decoded(arguments)
    calibration, compared = (half.contiguous() for half in images.chunk(2))
    torch.manual_seed(0)
    print("| family | precision | size | " + " | ".join(HEADINGS) + " |\n" + "|---" * (len(HEADINGS) + 3) + "|")
    rows = []
    for family, (source, name, kwargs) in (TINY if arguments.tiny else FAMILIES).items():
        backbone = build(source, name, kwargs, arguments.size)
        if source == "timm":
            train(backbone, calibration, arguments.steps)
        model = build_onnx(backbone.eval())
        for precision in ("fp32", "fp16", "int8"):
            content = model.content
            if precision == "fp16":
                content = to_float16(content)
            elif precision == "int8":
                content = to_int8(content, calibration.split(BATCH))
            found = measure_agreement(content, backbone, model.fields, compared.split(BATCH), neighbours=True)
            facts = {"name": family, "precision": precision, "bytes": len(content), "input": model.input_shape}
            rows += [facts | row for row in as_dicts(found)]
            for cells in table_rows(found):
                print(f"| {' | '.join((family, precision, format_bytes(len(content)), *cells))} |", flush=True)
    kept = {"images": len(images), "size": arguments.size, "steps": arguments.steps}
    return {"setting": kept | {"parquet": arguments.parquet and arguments.parquet.name}, "results": rows}


def decoded(arguments: argparse.Namespace):
    """The images as the models take them, float32 [N, 3, size, size], mean = std = 0.5."""
    import numpy as np
    import torch
    from PIL import Image

    def pixels() -> Iterator[np.ndarray]:
        for encoded in source_images(arguments, 96)[: arguments.images]:
            image = Image.open(io.BytesIO(encoded)).convert("RGB")
            yield np.asarray(image.resize((arguments.size, arguments.size), Image.Resampling.BICUBIC))

    return (torch.from_numpy(np.stack(list(pixels()))).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def build(source: str, name: str, kwargs: dict, size: int):
    """The backbone for images with mean = std = 0.5."""
    from distillery.models.backbone import build_backbone
    from distillery.models.builders import ModelSpec

    is_timm = source == "timm"
    spec = ModelSpec(
        source=source, name=name, repo=None if is_timm else str(DEMO), pretrained=not is_timm, kwargs=kwargs
    )
    return build_backbone(spec, data_mean=(0.5,) * 3, data_std=(0.5,) * 3, image_size=size)


def train(backbone, images, steps: int) -> None:
    """Let it learn to give each image at 8 x 8 px from its pooled feature."""
    import torch
    import torch.nn.functional as F

    head = torch.nn.Linear(backbone.pooled_width, 192)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05)
    targets = F.adaptive_avg_pool2d(images, 8).flatten(1)
    backbone.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (TRAINING_BATCH,))
        loss = F.mse_loss(head(backbone(images[chosen]).pooled), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    sys.exit(main())
