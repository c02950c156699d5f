"""Pictures of what teacher and student compute: patch features as colours, nearest neighbours, input views.

plots/pca.png shows the three leading principal components of each model's own patch features as red, green and blue.
plots/neighbours.png shows the nearest images of an image by the pooled features of each model.
plots/confusions_NAME.png shows images that the teacher has right and the student takes for another class. The text
chunks of a PNG hold its "Description" and its "Step", so a report can be made again without the models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillery.evaluate import measures
from distillery.evaluate.by_class import global_indices, identity_of, read_by_class
from distillery.evaluate.during import RunEvaluation
from distillery.evaluate.sets import EvalSet, eval_sets
from distillery.models.backbone import Backbone, eval_mode
from distillery.models.pair import resample_tokens
from distillery.reading.datasets import CachedTensorDataset, cached_labels
from distillery.report.canvas import draw_neighbours, draw_pca, draw_rows, save_png, text_of, thumbnails
from distillery.report.facts import NEIGHBOURS_NAME, PCA_NAME, PLOTS_NAME, confusions_name
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import sha256_of
from distillery.training.batches import StepBatch
from distillery.training.log import RunLog
from distillery.training.task import Position, Task

# images whose features are compared; on a CPU a ViT-B at 224 px takes a tenth of a second for each
POOL_IMAGES = 400
PCA_IMAGES, QUERIES, NEIGHBOURS = 12, 3, 5
BATCH_SIZE = 50
SHOWN_CONFUSIONS = 8
# fewer cells than this say nothing about where in the image something is
LEAST_CELLS = 4


@dataclass(frozen=True)
class Pool:
    """Images to show to the models.

    dataset: map-style, normalised float32 [3, H, W]; mean, std: its normalisation; name: for captions; labels: int64
    [N] where there are any.
    """

    dataset: Any
    mean: Sequence[float]
    std: Sequence[float]
    name: str
    labels: Tensor | None = None

    @property
    def rows(self) -> list[int]:
        """At most POOL_IMAGES rows, spread evenly."""
        return spread(POOL_IMAGES, len(self.dataset))


def spread(count: int, total: int) -> list[int]:
    """At most `count` of the numbers below `total`, evenly spaced."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def write_pictures(
    run_dir: Path, teacher: Backbone, student: Backbone, pool: Pool, *, step: int, device: torch.device
) -> list[Path]:
    """Write plots/pca.png and plots/neighbours.png, unless they are there and of this step.

    A picture that these models or images have nothing for is left out.

    Args:
        run_dir: the run folder.
        teacher: on the device, as is the student.
        student: without its heads.
        pool: the images.
        step: of the student's weights, for the caption.
        device: where the models are.
    """
    plots_dir = run_dir / PLOTS_NAME
    if text_of(plots_dir / NEIGHBOURS_NAME, "Step") == str(step):
        return []
    plots_dir.mkdir(exist_ok=True)
    shown = spread(PCA_IMAGES, len(pool.rows))
    pixels, (of_teacher, of_student) = look(pool, (teacher, student), shown, device)
    where = f"of {pool.name}; student at step {step:,}"
    written = []
    if min(math.prod(model.grid) for model in (teacher, student)) >= LEAST_CELLS:
        colours = colour_tokens(of_teacher.tokens, teacher.grid, of_student.tokens, student.grid)
        text = (
            f"Patch features of {len(shown)} images {where}: each model's three leading principal components, fitted "
            "on these images together, as red, green and blue. The student's have the order and signs that resemble "
            "the teacher's most; beyond that the colours mean nothing."
        )
        written.append(save_png(plots_dir / PCA_NAME, draw_pca(pixels[shown], *colours), text, Step=step))
    if len(pixels) > NEIGHBOURS:
        queries = spread(QUERIES, len(pixels))
        found = [nearest(seen.pooled, queries, NEIGHBOURS) for seen in (of_student, of_teacher)]
        labels = None if pool.labels is None else pool.labels[pool.rows]
        canvas = draw_neighbours(pixels, queries, *found, labels)
        text = neighbours_text(of_student.pooled, of_teacher.pooled, where, has_labels=labels is not None)
        written.append(save_png(plots_dir / NEIGHBOURS_NAME, canvas, text, Step=step))
    return written


def neighbours_text(student: Tensor, teacher: Tensor, where: str, *, has_labels: bool) -> str:
    """The caption of neighbours.png, with how far the two agree; student [N, D], teacher [N, Dt]."""
    shared = measures.neighbour_overlap(student, teacher, k=NEIGHBOURS)
    marks = " A bar under a neighbour: it has the label of the image it was asked for." if has_labels else ""
    return (
        f"The {NEIGHBOURS} nearest (cosine of pooled features) among {len(student)} images {where}. Student and "
        f"teacher share {shared:.0%} of them (by chance {NEIGHBOURS / (len(student) - 1):.1%}); linear CKA "
        f"{measures.linear_cka(student, teacher):.2f}.{marks}"
    )


@dataclass(frozen=True)
class Seen:
    """What one model gives: pooled, float32 [N, D], of all images; tokens, [S, P, D] or None, of those shown."""

    pooled: Tensor
    tokens: Tensor | None


@torch.no_grad()
def look(pool: Pool, models: Sequence[Backbone], shown: list[int], device: torch.device) -> tuple[Any, list[Seen]]:
    """The pool's images as thumbnails, uint8 [N, T, T, 3], and what each model gives for them, on the CPU.

    shown: positions in pool.rows of the images whose tokens are kept.
    """
    pixels, pooled, tokens = [], [[] for _ in models], [[] for _ in models]
    wanted = set(shown)
    for start in range(0, len(pool.rows), BATCH_SIZE):
        images = torch.stack(pool.dataset.__getitems__(pool.rows[start : start + BATCH_SIZE]))
        keep = [row for row in range(len(images)) if start + row in wanted]
        pixels.append(thumbnails(images, pool.mean, pool.std))
        for number, model in enumerate(models):
            with eval_mode(model):
                features = model(images.to(device))
            pooled[number].append(features.pooled.float().cpu())
            if features.tokens is not None:
                tokens[number].append(features.tokens[keep].float().cpu())
    seen = [
        Seen(torch.cat(one), torch.cat(other) if other else None) for one, other in zip(pooled, tokens, strict=True)
    ]
    return torch.cat(pixels).numpy(), seen


def principal_components(tokens: Tensor, count: int = 3) -> Tensor:
    """The leading principal components of tokens [N, P, D], fitted over all N x P of them: float64 [N, P, count].

    The sign is the one that makes the largest loading positive; where there are fewer dimensions, zeros follow.
    """
    rows = tokens.flatten(0, 1).double()
    rows = rows - rows.mean(dim=0)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    directions = directions[:count]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    components = rows @ (directions * largest.sign()).T
    components = torch.nn.functional.pad(components, (0, count - components.shape[1]))
    return components.unflatten(0, tokens.shape[:2])


def match_components(components: Tensor, reference: Tensor) -> Tensor:
    """Components [N, P, 3] in the order and with the signs that correlate most with those of `reference`, [N, P, 3]."""
    a, b = (part.flatten(0, 1) - part.flatten(0, 1).mean(dim=0) for part in (components, reference))
    a, b = (part / part.norm(dim=0).clamp(min=1e-12) for part in (a, b))
    correlation = a.T @ b
    orders = itertools.permutations(range(correlation.shape[0]))
    order = max(orders, key=lambda order: sum(abs(correlation[i, k].item()) for k, i in enumerate(order)))
    signs = torch.tensor([1.0 if correlation[i, k] >= 0 else -1.0 for k, i in enumerate(order)], dtype=a.dtype)
    return components[..., list(order)] * signs


def to_colours(components: Tensor) -> Tensor:
    """Components [N, P, 3] as uint8 colours: the range from 1 % to 99 % of each over all images becomes 0..255."""
    low, high = (torch.quantile(components.flatten(0, 1), q, dim=0) for q in (0.01, 0.99))
    return (255 * (components - low) / (high - low).clamp(min=1e-12)).clamp(0, 255).round().byte()


def colour_tokens(
    teacher: Tensor, teacher_grid: tuple[int, int], student: Tensor, student_grid: tuple[int, int]
) -> tuple[Any, Any]:
    """Tokens [N, P, D] of teacher and student as colours: uint8 [N, h, w, 3] of each on its own grid."""
    of_teacher, of_student = principal_components(teacher), principal_components(student)
    of_student = match_components(of_student, resample_tokens(of_teacher, teacher_grid, student_grid))
    parts = (of_teacher, teacher_grid), (of_student, student_grid)
    return tuple(to_colours(components).unflatten(1, grid).numpy() for components, grid in parts)


def nearest(features: Tensor, queries: list[int], k: int) -> list[list[int]]:
    """For each of the rows `queries` of features [N, D] its k nearest others by cosine, nearest first."""
    unit = torch.nn.functional.normalize(features, dim=1)
    similarity = unit[queries] @ unit.T
    similarity[torch.arange(len(queries)), queries] = -math.inf
    return similarity.topk(min(k, len(features) - 1), dim=1).indices.tolist()


@torch.no_grad()
def model_inputs(task: Task, batch: StepBatch) -> Any:
    """What teacher and student are given for a batch's views, above each other: uint8 [2 T, N T, 3].

    Each model's own size and normalisation are applied, and the latter is taken back for the eye. Where the teacher's
    outputs are stored, it is given nothing: then the student's inputs stand alone.

    Args:
        task: models and augmentation.
        batch: images normalised, [N, 3, H, W], as engine.check_first_step takes it.
    """
    view = task.augment.apply(batch.images, batch.view)
    models = [getattr(task.teacher, "backbone", None), task.student.student]
    strips = [
        torch.cat([*thumbnails(model.prepare(view).float().cpu(), model.mean, model.std)], dim=1)
        for model in models
        if model is not None
    ]
    return torch.cat(strips).numpy()


def log_models(log: RunLog, task: Task, batch: StepBatch, progress: Position, *, with_weights: bool) -> None:
    """model_inputs of a batch and, with_weights, histograms of the student's weights, into TensorBoard."""
    log.write_image("inputs", model_inputs(task, batch), progress.step)
    if with_weights:
        weights = {f"weights/{name}": value for name, value in task.student.student.model.named_parameters()}
        log.write_histograms(weights, progress.step)


def draw_run(run_dir: Path, device: torch.device) -> list[Path]:
    """write_pictures of a run's newest checkpoint, unless they are there already.

    Raises:
        UserError: no checkpoint, or no images that can be read.
    """
    from distillery.config.load import load_dumped_configs
    from distillery.evaluate.candidates import load_candidates
    from distillery.training.checkpoints import latest_checkpoint

    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        raise UserError("there is no complete checkpoint yet")
    configs = load_dumped_configs(run_dir / "config.yaml")
    sets = eval_sets(configs.data)
    written = write_confusions(run_dir, sets, configs.data)
    if text_of(run_dir / PLOTS_NAME / NEIGHBOURS_NAME, "Step") == str(int(checkpoint.stem.rpartition("_")[2])):
        return written  # before the models are built, which takes a while
    pool = choose_pool(sets, configs.data)
    teacher, _, students = load_candidates(configs, [checkpoint], device)
    *_, student = students  # with the averaged weights, where the run has them
    models = teacher.subject.backbone, student.subject.backbone
    return written + write_pictures(run_dir, *models, pool, step=student.step, device=device)


def draw_features(run_dir: Path, evaluation: RunEvaluation, data: Any, *, step: int) -> str | None:
    """write_pictures of the models of a run that has ended; the reason where that has not worked, else None.

    data: the run's DataConfig; step: of the student's weights.
    """

    def draw() -> None:
        write_confusions(run_dir, evaluation.sets, data)
        pool = choose_pool(evaluation.sets, data)
        teacher, student = evaluation.load_teacher(), evaluation.student.student
        with evaluation.measured_weights():
            write_pictures(run_dir, teacher, student, pool, step=step, device=evaluation.device)

    return why_not(draw)


def choose_pool(sets: Sequence[EvalSet], data: Any) -> Pool:
    """The test images of the first evaluation set, which training never sees; without one, those of the cache.

    Args:
        sets: the run's evaluation sets.
        data: the run's DataConfig.
    """
    for of in sets:
        dataset = CachedTensorDataset(of.test)
        labels = None if of.is_segmentation else torch.from_numpy(cached_labels(dataset))
        return Pool(dataset, data.mean, data.std, f"{of.name} (test)", labels)
    if data.cache_dir is None:
        raise MissingFileError("the run has neither an evaluation set nor a cache, and raw images are not drawn")
    return Pool(CachedTensorDataset(data.cache_path), data.mean, data.std, "the training cache")


def write_confusions(run_dir: Path, sets: Sequence[EvalSet], data: Any) -> list[Path]:
    """Write plots/confusions_NAME.png of every set that evaluation/NAME.json is there of, unless it is of that step.

    Of a test split that was cached anew with other images there is none.

    Args:
        run_dir: the run folder.
        sets: its evaluation sets, whose test images are shown.
        data: the run's DataConfig.
    """
    written = []
    for of in sets:
        content, path = read_by_class(run_dir, of.name), run_dir / PLOTS_NAME / confusions_name(of.name)
        shown = (content or {}).get("confusions", [])[:SHOWN_CONFUSIONS]
        if not shown or content.get("test") != identity_of(of.test):
            continue
        if text_of(path, "Source") == (source := sha256_of(content)):
            continue
        dataset, rows = CachedTensorDataset(of.test), global_indices(of.test)
        drawn = []
        for entry in shown:
            images = torch.stack(dataset.__getitems__(np.searchsorted(rows, entry["images"]).tolist()))
            text = f"{entry['name']}, taken for {entry['said_name']}: {entry['count']:,}"
            drawn.append((text, thumbnails(images, data.mean, data.std).numpy()))
        path.parent.mkdir(exist_ok=True)
        text = (
            f"The most frequent confusions on {of.name} (test): the teacher's k-NN is right, that of the student at "
            f"step {content['step']:,} takes the images for one other class. {content['num_lost']:,} of "
            f"{content['num_images']:,} images are lost so in all."
        )
        written.append(save_png(path, draw_rows(drawn), text, Step=content["step"], Source=source))
    return written


def why_not(draw: Callable[[], Any]) -> str | None:
    """Draw; the reason where that has not worked, else None: no run and no report fails for want of a picture."""
    try:
        draw()
    except Exception as error:
        return str(error).strip().split("\n")[0] or type(error).__name__
    return None
