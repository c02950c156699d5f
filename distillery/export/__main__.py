"""Take the student away: its weights under the model's own names, or ONNX, with a configuration and a model card.

    python -m distillery.export --run DIR --out DIR                        # model.safetensors for timm.create_model
    python -m distillery.export --run DIR --out DIR --format huggingface   # a folder to upload to the hub as it is
    python -m distillery.export --run DIR --out DIR --format onnx --weights ema     # model.onnx of averaged weights
    python -m distillery.export --run DIR --out DIR --format onnx --precision int8  # a quarter of the bytes
    python -m distillery.export --run DIR --out DIR --space teacher        # student.py gives the teacher's features

Teacher and optimiser stay behind, and the heads too unless the student leaves in its teacher's space.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distillery.export.formats import FORMATS, SPACES, export_student
from distillery.export.onnx_export import CALIBRATION_IMAGES, OnnxOptions
from distillery.export.quantise import PRECISIONS
from distillery.system.errors import EXIT_DONE, run_command
from distillery.system.files import expand_path


def main() -> int:
    """Export one student."""
    parser = argparse.ArgumentParser(
        prog="python -m distillery.export", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run folder (checkpoint_dir)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write, made if need be")
    parser.add_argument("--format", choices=FORMATS, help="default: timm; of --space teacher: safetensors")
    parser.add_argument("--space", choices=SPACES, default="backbone",
                        help="whose features: the student's own (backbone, the default) or its teacher's")  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="default: the newest of the run")
    parser.add_argument("--weights", choices=("auto", "student", "ema"), default="auto",
                        help="default: auto, the averaged ones where the run has ema_decay, else the last")  # fmt: skip
    parser.add_argument("--ema", dest="weights", action="store_const", const="ema", help="the same as --weights ema")
    onnx = parser.add_argument_group("with --format onnx")
    onnx.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    onnx.add_argument("--calibration_images", type=int, metavar="N",
                      help=f"of the run's cache, for int8; default: {CALIBRATION_IMAGES}")  # fmt: skip
    onnx.add_argument("--min_cosine", type=float, metavar="X",
                      help="write the file where each output's mean cosine with PyTorch reaches X; default: limits of "
                      "the precision's own")  # fmt: skip
    arguments = parser.parse_args()
    checkpoint = expand_path(arguments.checkpoint) if arguments.checkpoint else None
    run_dir, out_dir = expand_path(arguments.run), expand_path(arguments.out)
    options = OnnxOptions(arguments.precision, arguments.calibration_images, arguments.min_cosine)
    written = export_student(
        run_dir, out_dir, arguments.format, checkpoint, arguments.weights, arguments.space, onnx=options
    )
    for path in written:
        print(path)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
