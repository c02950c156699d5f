"""How good a run's student is, beside its teacher and its untrained self: k-NN, linear probe, label-free measures.

    python -m distillery.evaluate --run DIR                              # the newest checkpoint
    python -m distillery.evaluate --run DIR --checkpoint A.pt B.pt --json results.json

Train and test features always come from the same weights: one function takes one model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.evaluate_table import format_table
from distillery.system.errors import EXIT_DONE, UserError, run_command
from distillery.system.files import expand_path, write_atomic

if TYPE_CHECKING:  # --help and wrong arguments answer before torch is imported
    import torch
    from torch import Tensor

    from distillery.config.load import Configs

BATCH_SIZE = 256
# rows of the label-free comparison with the teacher: overlap@10 depends on their number, so it is fixed
MAX_COMPARED_ROWS = 5000
UNTRAINED, STUDENT, STUDENT_EMA, TEACHER = "untrained", "student", "student_ema", "teacher"


def extract_features(
    model_fn: Callable[[Tensor], Any], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Image features of every row, in order.

    Args:
        model_fn: from normalised images [B, 3, H, W] on the device to [B, D], or to Features, whose pooled is taken. A
            module is put into eval mode for the time and then back into the mode it was in.
        batches: (images, labels) on any device; labels int64 [B].
        device: where the model is.
    Returns:
        features float32 [N, D] and labels int64 [N], on the CPU.
    Raises:
        UserError: there are no rows.
    """
    from contextlib import nullcontext

    import torch
    from torch import nn

    from distillery.models.backbone import eval_mode

    features, labels = [], []
    with torch.no_grad(), eval_mode(model_fn) if isinstance(model_fn, nn.Module) else nullcontext():
        for images, batch_labels in batches:
            out = model_fn(images.to(device, non_blocking=True))
            features.append(getattr(out, "pooled", out).float().cpu())
            labels.append(batch_labels.cpu())
    if not features:
        raise UserError("evaluation: the data set has no valid row; look at failures.jsonl of its cache")
    return torch.cat(features), torch.cat(labels)


def evaluate_features(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: int = 20,
    linear: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """What a row of metrics.jsonl says about one model's features on one data set.

    Args:
        train_x: the bank of the k-NN and the probe's training rows, float32 [N, D].
        train_y: int64 [N].
        test_x: of the same model, [M, D].
        test_y: int64 [M].
        k: neighbours.
        linear: fit the linear probe too (seconds to minutes).
        device: where the k-NN is computed.
    Returns:
        knn_top1 and linear_top1 (None where not asked for) in 0..1; feature_std and effective_rank of the test rows;
        collapsed: what these two say.
    Raises:
        UserError: a label is negative: a split without labels.
        FloatingPointError: a feature is not finite.
    """
    from distillery import measures

    for part, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if y.min() < 0:
            raise UserError(f"evaluation: label {int(y.min())} in the {part} split; choose a split that has labels")
        if not x.isfinite().all():
            raise FloatingPointError(f"evaluation: {int((~x.isfinite().all(dim=1)).sum())} {part} features not finite")
    std, rank = measures.feature_std(test_x), measures.effective_rank(test_x)
    return {
        "knn_top1": measures.knn_top1(train_x, train_y, test_x, test_y, k=k, device=device),
        "linear_top1": measures.linear_top1(train_x, train_y, test_x, test_y) if linear else None,
        "feature_std": std,
        "effective_rank": rank,
        "collapsed": measures.is_collapsed(std, rank),
    }


def evaluate_on_folders(
    model_fn: Callable[[Tensor], Any],
    train: Path,
    test: Path,
    *,
    k: int = 20,
    linear: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """`evaluate_features` of one model on the caches of an evaluation set's two splits."""
    from distillery.reading.datasets import load_labelled

    train_x, train_y = extract_features(model_fn, load_labelled(train, BATCH_SIZE), device)
    test_x, test_y = extract_features(model_fn, load_labelled(test, BATCH_SIZE), device)
    return evaluate_features(train_x, train_y, test_x, test_y, k=k, linear=linear, device=device)


def compare_with_teacher(
    student_x: Tensor,
    teacher_x: Tensor,
    projected: Tensor | None = None,
    target: Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """How far a student agrees with its teacher on the same images, without labels; all are 1 for the teacher itself.

    Args:
        student_x: the student's own features, [N, D]; the first 5,000 rows are compared.
        teacher_x: the teacher's, [N, Dt].
        projected: the student's after its head, [N, Dt], where there is a head.
        target: what it is trained towards, [N, Dt]: the teacher's, standardised where the run does so.
        device: where neighbours are searched.
    Returns:
        teacher_cosine (None without `projected`), cka, neighbour_overlap.
    """
    from distillery import measures

    student_x, teacher_x = student_x[:MAX_COMPARED_ROWS], teacher_x[:MAX_COMPARED_ROWS]
    has_head = projected is not None and target is not None
    return {
        "teacher_cosine": measures.mean_cosine(projected, target) if has_head else None,
        "cka": measures.linear_cka(student_x, teacher_x),
        "neighbour_overlap": measures.neighbour_overlap(student_x, teacher_x, device=device),
    }


@dataclass(frozen=True)
class Candidate:
    """One row of the table. own: images -> its own Features; aligned: -> Features in the teacher's widths, or None."""

    model: str
    own: Callable[[Tensor], Any]
    aligned: Callable[[Tensor], Any] | None = None
    step: int | None = None
    checkpoint: str | None = None

    @property
    def label(self) -> str:
        """Its name for the console."""
        return self.model if self.step is None else f"{self.model} at step {self.step}"


def load_candidates(
    configs: Configs, checkpoints: list[Path], device: torch.device
) -> tuple[Candidate, Callable, Iterator[Candidate]]:
    """A run's models, built as the trainer builds them.

    Args:
        configs: the run's.
        checkpoints: files of the run.
        device: where the models go.
    Returns:
        the teacher; the targets it sets (images -> Features, standardised where the run does so); and the untrained
        student, then each checkpoint's student and its EMA: these share one module, so each is valid until the next.
    Raises:
        UserError: a student was trained towards a teacher of other weights.
    """
    from distillery.training.build import build_models
    from distillery.training.checkpoints import load_checkpoint

    teacher, student = build_models(configs, device)
    _check_teacher(configs, teacher.backbone.model, checkpoints)
    aligned = student if "pooled" in student.heads else None  # without a loss on pooled features there is no such head

    def candidates() -> Iterator[Candidate]:
        yield Candidate(UNTRAINED, student.student)
        for path in checkpoints:
            state = load_checkpoint(path)
            if state.get("target_statistics"):
                teacher.load_statistics(state["target_statistics"])
            student.heads.load_state_dict(state["heads"])
            for name, weights in ((STUDENT, state["student"]), (STUDENT_EMA, state.get("ema"))):
                if weights is not None:
                    student.student.model.load_state_dict(weights)
                    yield Candidate(name, student.student, aligned, state["progress"]["step"], str(path))

    return Candidate(TEACHER, teacher.backbone), teacher, candidates()


def _check_teacher(configs: Configs, teacher: torch.nn.Module, checkpoints: list[Path]) -> None:
    """Raise UserError unless the students were trained towards a teacher of these weights."""
    from distillery.models.weights import weights_hash
    from distillery.training.checkpoints import load_checkpoint

    model = configs.model
    if not model.teacher_pretrained and model.teacher_checkpoint is None and model.teacher_source != "torch_hub":
        return  # drawn anew by every process
    now = weights_hash(teacher)
    for path in checkpoints:
        trained = load_checkpoint(path).get("teacher_hash")
        if trained not in (None, now):
            raise UserError(
                f"{path}: its student was trained towards a teacher of other weights ({trained}) than there are now "
                f"({now}). Put the teacher's files (teacher_name, teacher_repo, teacher_checkpoint) back."
            )


def evaluate_candidate(
    candidate: Candidate,
    folders: tuple[Path, Path],
    reference: tuple[dict[str, Any], Tensor] | None = None,
    targets: Callable[[Tensor], Any] | None = None,
    *,
    k: int,
    linear: bool,
    device: torch.device,
) -> tuple[dict[str, Any], Tensor]:
    """One row of `evaluate_run`, and the candidate's test features.

    Args:
        candidate: the model.
        folders: caches of the train and test split.
        reference: the teacher's own row and test features; None for the teacher itself.
        targets: what the student is trained towards, images -> Features.
        k: neighbours.
        linear: fit the linear probe.
        device: where the models run.
    """
    from distillery.reading.datasets import load_labelled

    train, test = (extract_features(candidate.own, load_labelled(folder, BATCH_SIZE), device) for folder in folders)
    measured = evaluate_features(*train, *test, k=k, linear=linear, device=device)
    teacher_row, teacher_x = reference or (measured, test[0])
    aligned = []
    if candidate.aligned is not None:
        for model in (candidate.aligned, targets):
            aligned.append(extract_features(model, load_labelled(folders[1], BATCH_SIZE), device)[0])
    row = {"model": candidate.model, "step": candidate.step, "checkpoint": candidate.checkpoint}
    agreement = compare_with_teacher(test[0], teacher_x, *aligned, device=device)
    return row | with_shares(measured, teacher_row) | agreement, test[0]


def evaluate_run(
    configs: Configs, checkpoints: list[Path], device: torch.device, *, linear: bool = True
) -> list[dict[str, Any]]:
    """Evaluate a run's models on all of its evaluation sets.

    Args:
        configs: the run's.
        checkpoints: files of the run.
        device: where the models run.
        linear: fit linear probes.
    Returns:
        One row per data set and model: the fields of `evaluate_features`, those of `compare_with_teacher`, and
        knn_share, linear_share, rank_share: the figure as a share of the teacher's.
    """
    from distillery.training.build import eval_folders

    folders = eval_folders(configs.data)
    if not folders:
        raise UserError(
            "this run's data configuration has no eval_datasets. Add one to the run's config.yaml, "
            "and run stage 1 with the same entry to cache it."
        )
    teacher, targets, students = load_candidates(configs, checkpoints, device)
    options = {"k": configs.train.knn_k, "linear": linear, "device": device}
    references: dict[str, tuple[dict[str, Any], Tensor]] = {}
    rows: dict[str, list[dict[str, Any]]] = {dataset: [] for dataset in folders}
    for candidate in itertools.chain([teacher], students):
        for dataset, parts in folders.items():
            print(f"{dataset}: {candidate.label}", file=sys.stderr, flush=True)
            row, test_x = evaluate_candidate(candidate, parts, references.get(dataset), targets, **options)
            rows[dataset].append({"dataset": dataset} | row)
            if candidate is teacher:
                references[dataset] = (row, test_x)
    # the teacher is evaluated first and shown last
    return [row for of_dataset in rows.values() for row in (*of_dataset[1:], of_dataset[0])]


def with_shares(measured: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """A model's measures with their share of the teacher's."""
    shares = {}
    for share, name in (("knn_share", "knn_top1"), ("linear_share", "linear_top1"), ("rank_share", "effective_rank")):
        shares[share] = measured[name] / teacher[name] if measured[name] is not None and teacher[name] else None
    return measured | shares


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
        "--no_linear", action="store_true", help="leave the linear probe out: it takes most of the time"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here as well")
    return parser.parse_args()


def find_checkpoints(run_dir: Path, given: list[Path] | None) -> list[Path]:
    """The checkpoints to evaluate: those given, else the newest complete one.

    Raises:
        UserError: the run has none.
    """
    from distillery.training.checkpoints import latest_checkpoint

    if given:
        return [expand_path(path) for path in given]
    latest = latest_checkpoint(run_dir)
    if latest is None:
        raise UserError(
            f"{run_dir} has no complete checkpoint. Start distill_trainer.py, or name one: --checkpoint PATH"
        )
    return [latest]


def main() -> int:
    """Evaluate, print the table, write the JSON file."""
    from distillery.config.load import load_dumped_configs

    arguments = parse_arguments()
    run_dir = expand_path(arguments.run)
    configs = load_dumped_configs(run_dir / "config.yaml")
    checkpoints = find_checkpoints(run_dir, arguments.checkpoint)

    from distillery.models.configured import choose_device
    from distillery.training.checkpoints import load_checkpoint
    from distillery.training.folder import check_same_models

    for path in checkpoints if arguments.checkpoint else ():  # the run's own newest is of the run
        check_same_models(path, load_checkpoint(path)["config"], configs.as_dict())
    rows = evaluate_run(configs, checkpoints, choose_device(arguments.device), linear=not arguments.no_linear)
    print(format_table(rows))
    if arguments.json is not None:
        content = {"run": run_dir.name, "knn_k": configs.train.knn_k, "rows": rows}
        path = expand_path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
