"""How good a run's student is, beside its teacher and its untrained self: k-NN, probes, label-free measures.

    python -m distillery.evaluate --run DIR                              # the newest checkpoint
    python -m distillery.evaluate --run DIR --checkpoint A.pt B.pt --json results.json
    python -m distillery.evaluate --run DIR --space teacher              # the student in its teacher's place
    python -m distillery.evaluate --run DIR --text_embeddings E.safetensors    # zero-shot, of an image-text teacher

Train and test features always come from the same weights: one function takes one model.
"""

import argparse
import json
from pathlib import Path

from distillery.system.errors import EXIT_DONE, run_command
from distillery.system.files import expand_path, write_atomic


def parse_arguments() -> argparse.Namespace:
    """The command line of python -m distillery.evaluate."""
    parser = argparse.ArgumentParser(
        prog="python -m distillery.evaluate", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run folder (checkpoint_dir)")
    parser.add_argument("--checkpoint", nargs="+", type=Path, metavar="PATH", help="default: the newest of the run")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one"
    )
    parser.add_argument(
        "--no_linear", action="store_true", help="leave the linear probes out: they take most of the time"
    )
    parser.add_argument(
        "--space",
        choices=("backbone", "teacher"),
        default="backbone",
        help="teacher: the student's features are its heads', in the units of the teacher's own (default: backbone)",
    )
    parser.add_argument(
        "--text_embeddings",
        type=Path,
        metavar="FILE",
        help="zero-shot accuracy: safetensors with tensor `embeddings` [C, Dt] and metadata `names`, a JSON list",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here as well")
    return parser.parse_args()


def main() -> int:
    """Evaluate, print the table, write the JSON file."""
    from distillery.config.load import load_dumped_configs

    arguments = parse_arguments()
    run_dir = expand_path(arguments.run)
    configs = load_dumped_configs(run_dir / "config.yaml")

    # torch takes seconds to import: --help and a wrong folder answer before it
    from distillery.evaluate.candidates import evaluate_run, find_checkpoints, format_table
    from distillery.evaluate.kept_rows import keep_rows
    from distillery.evaluate.text import load_text_embeddings
    from distillery.models.configured import choose_device
    from distillery.training.checkpoints import checkpoint_dir, load_checkpoint
    from distillery.training.identity import check_same_models

    texts = arguments.text_embeddings and load_text_embeddings(expand_path(arguments.text_embeddings))
    checkpoints = find_checkpoints(run_dir, arguments.checkpoint)
    for path in checkpoints if arguments.checkpoint else ():  # the run's own newest is of the run
        check_same_models(path, load_checkpoint(path)["config"], configs.as_dict())
    # the folder's comparison by class is of its newest checkpoint
    is_runs_own = not arguments.checkpoint and arguments.space == "backbone"
    rows = evaluate_run(
        configs, checkpoints, choose_device(arguments.device), linear=not arguments.no_linear, space=arguments.space,
        texts=texts, by_class_dir=run_dir if is_runs_own else None,
    )  # fmt: skip
    print(format_table(rows))
    are_runs_own = all(path.parent.resolve() == checkpoint_dir(run_dir).resolve() for path in checkpoints)
    if arguments.space == "backbone" and not arguments.no_linear and are_runs_own:
        keep_rows(run_dir, rows)
    if arguments.json is not None:
        content = {"run": run_dir.name, "knn_k": configs.train.knn_k, "space": arguments.space, "rows": rows}
        path = expand_path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
