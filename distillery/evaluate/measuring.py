"""Measure one model on one evaluation set, on one process or several: for a run and for distillery.evaluate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillery.evaluate import measures
from distillery.evaluate.by_class import compare_by_class
from distillery.evaluate.classification import (
    TeacherFeatures,
    WithHead,
    compare_with_teacher,
    evaluate_features,
    labelled,
    measure_in_teacher_space,
    to_teacher_space,
)
from distillery.evaluate.columns import TEACHER
from distillery.evaluate.features import batches_of, extract_features
from distillery.evaluate.ranks import end_at_a_stop, on_main_unless_stopped
from distillery.evaluate.sets import EvalSet
from distillery.evaluate.teacher_features import TeacherStore
from distillery.evaluate.text import TextEmbeddings, zero_shot_top1
from distillery.losses.targets import Targets
from distillery.losses.teacher_space import TeacherSpace, fold_heads
from distillery.reading.datasets import CachedTensorDataset, LabelledBatches, cached_labels
from distillery.system.allocation import is_out_of_gpu_memory
from distillery.system.distributed import gather_on_main, is_main, on_main, rank, world_size
from distillery.system.errors import RunError

Space = Literal["backbone", "teacher"]


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    name: of evaluate.columns.MODELS; backbone: images -> Features; heads: what makes its teacher's features of its own,
    field -> module; space: "teacher" where these stand for its own features.
    """

    name: str
    backbone: nn.Module
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    space: Space = "backbone"

    @property
    def head(self) -> nn.Module | None:
        """The head for the pooled feature, where there is one."""
        return self.heads["pooled"] if "pooled" in self.heads else None  # noqa: SIM401 - a ModuleDict has no get


class Measuring:
    """Measures models on evaluation sets. All ranks call it together; rank 0 has the features and the files.

    Args:
        targets: with the statistics that the heads are trained with.
        load_teacher: gives the teacher's backbone, where its features are not kept.
        store: keeps the teacher's features.
        k: neighbours.
        device: where the models run.
        precision: of the models' arithmetic on CUDA, as extract_features.
        is_stopped: asked before each batch, because an evaluation may take minutes; a request to stop on any rank ends
            it on all of them.
        texts: embeddings of class names, for zero-shot accuracy.
    """

    def __init__(
        self,
        targets: Targets,
        load_teacher: Callable[[], nn.Module],
        store: TeacherStore,
        *,
        k: int,
        device: torch.device,
        precision: str = "fp32",
        is_stopped: Callable[[], bool] = lambda: False,
        texts: TextEmbeddings | None = None,
    ) -> None:
        self.targets, self.load_teacher, self.store, self.texts = targets, load_teacher, store, texts
        self.k, self.device, self.precision, self.is_stopped = k, device, precision, is_stopped

    def row(
        self, of: EvalSet, subject: Subject, *, linear: bool, by_class: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The fields of metrics.jsonl for a model on a set; where asked for, and labels are there, compare_by_class.

        Args:
            of: the set.
            subject: the model. The teacher's features are kept; every other model is compared with them.
            linear: fit linear probes too (seconds to minutes).
            by_class: compare with the teacher class by class.
        Raises:
            Interrupted: a request to stop came.
            UserError: the images have no labels, or the model gives no patches for a set with masks.
            RunError: the GPU's memory does not suffice.
        """
        try:
            if of.is_segmentation:
                return self._segmentation(of, subject, linear=linear), None
            return self._classification(of, subject, linear=linear, by_class=by_class)
        except Exception as error:
            if not is_out_of_gpu_memory(error):
                raise
            raise RunError(
                f"out of GPU memory while the {subject.name} was measured on {of.name}. Give the set fewer images: set "
                f"eval_datasets.{of.name}.max_train, remove {of.train} and run stage 1 again."
            ) from error

    def _classification(self, of: EvalSet, subject: Subject, *, linear: bool, by_class: bool) -> tuple[dict, Any]:
        self._have_teacher(of)
        if subject.name == TEACHER:
            return on_main(lambda: self._measure_teacher(of, linear=linear)), None
        head, in_space = subject.head, subject.space == "teacher"
        whole = subject.backbone if head is None else WithHead(subject.backbone, head)
        train = self.extract(whole if in_space else subject.backbone, of.train)
        test = self.extract(whole, of.test)
        return on_main(lambda: self._measure_student(of, subject, train, test, linear=linear, by_class=by_class))

    def _measure_teacher(self, of: EvalSet, *, linear: bool) -> dict[str, Any]:
        kept = self.store.load(of)
        train_y, test_y = (torch.from_numpy(cached_labels(CachedTensorDataset(part))) for part in (of.train, of.test))
        splits = (kept.train_x, train_y), (kept.test_x, test_y)
        measured = evaluate_features(*splits, k=self.k, linear=linear, device=self.device)
        self.store.keep(of, TeacherFeatures(kept.train_x, kept.test_x, measured.probe))
        agreement = compare_with_teacher(kept.test_x, kept.test_x, device=self.device)
        return measured.row | agreement | self._zero_shot(of, kept.test_x, train_y, test_y)

    def _measure_student(
        self, of: EvalSet, subject: Subject, train: Any, test: Any, *, linear: bool, by_class: bool
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        (train_x, train_y), (test_x, test_y) = train, test
        teacher, options = self.store.load(of), {"k": self.k, "linear": linear, "device": self.device}
        outputs = in_space = None
        if subject.head is not None:
            test_x, outputs = test_x.tensor_split([test_x.shape[1] - teacher.test_x.shape[1]], dim=1)
            in_space = to_teacher_space(outputs, self.targets)
        if subject.space == "teacher":
            train_x = to_teacher_space(train_x[:, -teacher.test_x.shape[1] :], self.targets)
            test_x = in_space
        measured = evaluate_features((train_x, train_y), (test_x, test_y), **options)
        row = measured.row | compare_with_teacher(test_x, teacher.test_x, outputs, self.targets, device=self.device)
        if in_space is not None:
            if linear and teacher.probe is None:
                teacher = teacher.with_probe(train_y, self.device)
                self.store.keep(of, teacher)
            row |= measure_in_teacher_space(in_space, teacher, train_y, test_y, **options)
            row |= self._zero_shot(of, in_space, train_y, test_y)
        if not by_class:
            return row, None
        queries, _ = labelled(teacher.test_x, test_y)
        of_teacher = measures.knn_predictions(
            *labelled(teacher.train_x, train_y), queries, ks=[self.k], device=self.device
        )[self.k]
        return row, compare_by_class(of, measured.predicted, of_teacher, test_y, self.k)

    def _zero_shot(self, of: EvalSet, in_space: Tensor, train_y: Tensor, test_y: Tensor) -> dict[str, float]:
        if self.texts is None:
            return {}
        self.texts.check_width(in_space.shape[1])
        classes = self.texts.for_set(of, int(max(train_y.max(), test_y.max())) + 1)
        return {"zero_shot_top1": zero_shot_top1(*labelled(in_space, test_y), classes, self.device)}

    def _have_teacher(self, of: EvalSet) -> None:
        """Let the teacher's features of a set be kept, extracted now where they are not there."""
        if not on_main(lambda: self.store.has(of)):
            (train_x, _), (test_x, _) = (self.extract(self.load_teacher(), folder) for folder in (of.train, of.test))
            on_main(lambda: self.store.keep(of, TeacherFeatures(train_x, test_x)))

    def extract(self, model: nn.Module, folder: Path) -> tuple[Tensor | None, Tensor | None]:
        """Features and labels of all rows on rank 0, (None, None) on the others, each of which extracts its share."""
        batches = batches_of(LabelledBatches, folder, self.device, (rank(), world_size()))
        found = torch.empty(0), torch.empty(0)
        if len(batches) or is_main():
            found = extract_features(
                model, batches, self.device, precision=self.precision,
                before_batch=lambda: end_at_a_stop(self.is_stopped),
            )  # fmt: skip
        for _ in range(len(batches), batches.num_rounds):
            end_at_a_stop(self.is_stopped)  # the others have a batch more, and ask before it
        features, labels = map(gather_on_main, found)
        return features, labels

    def _segmentation(self, of: EvalSet, subject: Subject, *, linear: bool) -> dict[str, Any]:
        """Rank 0 alone: the probe needs the patches of whole images at once."""
        from distillery.evaluate.segmentation import evaluate_segmentation
        from distillery.reading.datasets import MaskedBatches

        model = subject.backbone
        if subject.space == "teacher" and subject.name != TEACHER:
            heads = fold_heads(nn.ModuleDict({"tokens": subject.heads["tokens"]}), self.targets)
            model = TeacherSpace(model, heads).to(self.device)

        def work(ask: Callable[[], None]) -> dict[str, Any]:
            batches = (batches_of(MaskedBatches, folder, self.device) for folder in (of.train, of.test))
            return evaluate_segmentation(
                model, *batches, num_classes=of.num_classes, ignore_index=of.ignore_index, k=self.k, linear=linear,
                device=self.device, precision=self.precision, before_batch=ask,
            )  # fmt: skip

        return on_main_unless_stopped(work, self.is_stopped)
