"""Evaluate during a run: the baselines before the first step, then the student at intervals and at the end."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from distillery.cache.folder import load_index
from distillery.evaluate.columns import STUDENT, TEACHER, UNTRAINED
from distillery.evaluate.features import (
    MAX_COMPARED_ROWS,
    compare_with_teacher,
    evaluate_features,
    extract_features,
    labelled_batches,
)
from distillery.losses.targets import Targets
from distillery.models.backbone import Backbone, Features
from distillery.models.pair import StudentWithHeads
from distillery.system.console import ProgressLine
from distillery.system.distributed import any_rank, copy_from_main, gather_on_main, is_main, on_main, rank, world_size
from distillery.system.errors import Interrupted
from distillery.system.files import make_directory, write_atomic
from distillery.training.log import RunLog

# the teacher's features of the test rows, which the student's are compared with: a run on stored outputs has no teacher
FEATURES_DIR = "teacher_features"


class RunEvaluation:
    """Measures a run's models on its evaluation sets.

    All ranks call it together. Each extracts its share of the features; rank 0 measures them and has the files.

    Args:
        run_dir: the run folder; the teacher's test features are kept there.
        folders: name of an evaluation set -> caches of its train and test split.
        student: the student with its heads.
        targets: standardises the teacher's features for the student.
        load_teacher: loads the teacher, for a run that trains without it.
        k: neighbours.
        device: where the models run.
        is_stopped: called before each batch, because an evaluation may take minutes; a request to stop on any rank ends
            it on all of them.
        precision: of the models' arithmetic on CUDA, as extract_features.
    """

    def __init__(
        self,
        run_dir: Path,
        folders: dict[str, tuple[Path, Path]],
        student: StudentWithHeads,
        targets: Targets,
        load_teacher: Callable[[], Backbone],
        *,
        k: int,
        device: torch.device,
        is_stopped: Callable[[], bool],
        precision: str = "fp32",
    ) -> None:
        self.run_dir, self.folders, self.student, self.targets = run_dir, folders, student, targets
        self.k, self.device, self.precision, self.is_stopped = k, device, precision, is_stopped
        self.load_teacher = load_teacher

    def record(
        self, log: RunLog, console: ProgressLine, rows: list[dict], *, step: int, epoch: int, linear: bool
    ) -> bool:
        """Measure the baselines before the first step, the student after it, and log what is not in `rows` yet.

        Returns:
            False where a request to stop came before everything was measured.
        """
        done = {(row.get("dataset"), row.get("model")) for row in rows}
        names = [UNTRAINED, TEACHER] if step == 0 else [STUDENT]
        try:
            for dataset, name, row in self.measure(names, done, linear=linear):
                log.write("eval", step=step, epoch=epoch, dataset=dataset, model=name, **row)
                console.message(f"epoch {epoch}: {name} on {dataset}: k-NN {row['knn_top1']:.1%}")
        except Interrupted:
            return False
        return True

    def measure(self, names: list[str], done: set[tuple[str, str]], *, linear: bool) -> Iterator[tuple[str, str, dict]]:
        """(data set, model, row of metrics.jsonl) for each of the models `names` and each evaluation set.

        Args:
            names: of teacher, untrained and student; the last two are the student as it is now.
            done: (data set, model) that are left out.
            linear: fit the linear probe too.
        Raises:
            Interrupted: a request to stop came; nothing of the row in hand is kept.
        """
        # a rank's batch-norm statistics are its own until the next forward pass
        copy_from_main(self.student.buffers())
        # where the run does without the teacher, this one is gone as soon as it has been measured
        teacher = functools.cache(self.load_teacher)
        for dataset in self.folders:
            for name in names:
                if (dataset, name) not in done:
                    model = teacher() if name == TEACHER else self.student.student
                    yield dataset, name, self._row(dataset, name, model, teacher, linear=linear)

    def _row(self, dataset: str, name: str, model: Backbone, teacher: Callable[[], Backbone], *, linear: bool) -> dict:
        train, test = (self._extract(model, folder) for folder in self.folders[dataset])
        row = on_main(lambda: evaluate_features(*train, *test, k=self.k, linear=linear, device=self.device))
        if name == TEACHER and is_main():
            self._keep(dataset, test[0])
        return row | self._agreement(dataset, test[0], teacher) if name == STUDENT else row

    def _agreement(self, dataset: str, student_x: Tensor | None, teacher: Callable[[], Backbone]) -> dict[str, Any]:
        """compare_with_teacher on the test rows; student_x: their features, on rank 0."""
        test = self.folders[dataset][1]
        teacher_x = self._kept(dataset) if is_main() else None
        if not on_main(lambda: teacher_x is not None):
            found = self._extract(teacher(), test)[0]
            teacher_x = self._keep(dataset, found) if is_main() else None
        projected = self._extract(self.student, test)[0] if "pooled" in self.student.heads else None

        def compare() -> dict[str, Any]:
            aligned = ()
            if projected is not None:
                target = self.targets.standardise(Features(teacher_x.to(self.device), None, (0, 0))).pooled
                aligned = (projected[: len(teacher_x)], target.cpu())
            return compare_with_teacher(student_x[: len(teacher_x)], teacher_x, *aligned, device=self.device)

        return on_main(compare)

    def _extract(self, model: nn.Module, folder: Path) -> tuple[Tensor | None, Tensor | None]:
        """Features and labels of all rows on rank 0, (None, None) on the others, each of which extracts its share."""
        batches = labelled_batches(folder, self.device, (rank(), world_size()))
        found = torch.empty(0), torch.empty(0)
        if len(batches) or is_main():
            found = extract_features(
                model, batches, self.device, precision=self.precision, before_batch=self._end_at_a_stop
            )
        for _ in range(len(batches), batches.num_rounds):
            self._end_at_a_stop()  # the others have a batch more, and ask before it
        features, labels = map(gather_on_main, found)
        return features, labels

    def _end_at_a_stop(self) -> None:
        """Raise Interrupted on all ranks once one has a request to stop."""
        if any_rank(self.is_stopped())[0]:
            raise Interrupted

    def _keep(self, dataset: str, features: Tensor) -> Tensor:
        kept = features[:MAX_COMPARED_ROWS].contiguous()
        path = self.run_dir / FEATURES_DIR / f"{dataset}.safetensors"
        make_directory(path.parent)
        write_atomic(path, safetensors.torch.save({"pooled": kept}, {"images": self._images_of(dataset)}))
        return kept

    def _kept(self, dataset: str) -> Tensor | None:
        """The teacher's features of the test rows, where those that were kept are of these images."""
        path = self.run_dir / FEATURES_DIR / f"{dataset}.safetensors"
        try:
            with safetensors.safe_open(path, "pt") as file:
                return file.get_tensor("pooled") if file.metadata() == {"images": self._images_of(dataset)} else None
        except (OSError, safetensors.SafetensorError):  # not there, or damaged: they can be made again
            return None

    def _images_of(self, dataset: str) -> str:
        index = load_index(self.folders[dataset][1])
        return f"{index.num_samples} of {index.fingerprint}"
