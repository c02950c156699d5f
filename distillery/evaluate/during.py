"""Evaluate during a run: the baselines before the first step, then the student at intervals and at the end."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from distillery.evaluate.by_class import identity_of, write_by_class
from distillery.evaluate.columns import STUDENT, TEACHER, UNTRAINED, headline
from distillery.evaluate.measuring import Measuring, Subject
from distillery.evaluate.sets import EvalSet
from distillery.evaluate.teacher_features import TeacherStore
from distillery.losses.targets import Targets
from distillery.models.backbone import Backbone
from distillery.models.pair import StudentWithHeads
from distillery.models.weights import weights_hash
from distillery.system.console import ProgressLine
from distillery.system.distributed import copy_from_main, is_main
from distillery.system.errors import Interrupted
from distillery.system.files import sha256_of
from distillery.training.log import RunLog
from distillery.training.task import Ema


class RunEvaluation:
    """Measures a run's models on its evaluation sets.

    All ranks call it together. Each extracts its share of the features; rank 0 measures them and has the files.

    Args:
        run_dir: the run folder; the teacher's features are kept there, and what the student lost class by class.
        sets: the evaluation sets.
        student: the student with its heads.
        targets: standardises the teacher's features for the student.
        load_teacher: loads the teacher, for a run that trains without it.
        teacher_hash: as of training.bindings.
        ema: the run's averaged weights, which are measured where there are any; None: the student as it is.
        k: neighbours.
        device: where the models run.
        is_stopped: as of Measuring.
        precision: as of Measuring.
    """

    def __init__(
        self,
        run_dir: Path,
        sets: list[EvalSet],
        student: StudentWithHeads,
        targets: Targets,
        load_teacher: Callable[[], Backbone],
        *,
        teacher_hash: str,
        ema: Ema | None = None,
        k: int,
        device: torch.device,
        is_stopped: Callable[[], bool],
        precision: str = "fp32",
    ) -> None:
        self.run_dir, self.sets, self.student, self.ema = run_dir, sets, student, ema
        self.targets, self.load_teacher = targets, load_teacher
        self.device, self.store, self.teacher_hash = device, TeacherStore(run_dir, teacher_hash), teacher_hash
        self._how = {"k": k, "device": device, "precision": precision, "is_stopped": is_stopped}

    def baselines(self) -> str:
        """A hash of what decides the figures before the first step: both models' weights, the sets' images, k."""
        images = {of.name: images_of(of) for of in self.sets}
        return sha256_of([self.teacher_hash, weights_hash(self.student.student.model), images, self._how["k"]])

    def record(
        self, log: RunLog, console: ProgressLine, rows: list[dict], *, step: int, epoch: int, linear: bool
    ) -> bool:
        """Measure the baselines before the first step, the student after it, and log what is not in `rows` yet.

        The teacher of a set that came later is measured with the student.

        Args:
            log: takes the rows.
            console: says the headline of each.
            rows: the eval rows that the log has.
            step: where the run stands.
            epoch: how many are done.
            linear: whether this is the first evaluation or the last one, which fit linear probes; after the last one,
                evaluation/NAME.json compares the student with its teacher class by class.
        Returns:
            False where a request to stop came before everything was measured.
        """
        done = {
            (row.get("dataset"), row.get("model"))
            for row in rows
            if row.get("step") == step and (has_probe(row) or not linear)
        }
        names = [UNTRAINED, TEACHER] if step == 0 else [TEACHER, STUDENT]
        images = {of.name: images_of(of) for of in self.sets}
        for row in rows:
            # of a set that was cached anew the row is of other images: it is measured with the next row of the student
            name = row.get("dataset")
            is_of_these = row.get("images", images.get(name)) == images.get(name)
            if row.get("model") == TEACHER and (is_of_these or any((name, other) in done for other in names)):
                done.add((name, TEACHER))
        # closed: the student gets its own weights back whatever happens
        with contextlib.closing(self.measure(names, done, linear=linear)) as measured:
            try:
                for of, name, row, by_class in measured:
                    if by_class is not None and is_main():
                        write_by_class(self.run_dir, by_class | {"step": step, "weights": row["weights"]})
                    log.write("eval", step=step, epoch=epoch, dataset=of.name, model=name, **row)
                    console.message(f"epoch {epoch}: {name} on {of.name}: {headline(row)}")
            except Interrupted:
                return False
        return True

    def measure(
        self, names: list[str], done: set[tuple[str, str]], *, linear: bool
    ) -> Iterator[tuple[EvalSet, str, dict, dict | None]]:
        """(set, model, row of metrics.jsonl, comparison by class or None) of each of the models and each set.

        Args:
            names: of teacher, untrained and student; the last two are the student as it is now, or its average.
            done: (data set, model) that are left out.
            linear: fit the linear probes too, and compare the student by class.
        Raises:
            Interrupted: a request to stop came; nothing of the row in hand is kept.
        """
        # where the run does without the teacher, this one is gone as soon as it has been measured
        teacher = functools.cache(self.load_teacher)
        measuring = Measuring(self.targets, teacher, self.store, **self._how)
        # a rank's batch-norm statistics are its own until the next forward pass
        copy_from_main(self.student.buffers())
        with self.measured_weights() as which:
            copy_from_main(self.student.buffers())
            for of in self.sets:
                for name in names:
                    if (of.name, name) in done:
                        continue
                    if name == TEACHER:
                        subject = Subject(TEACHER, teacher())
                    else:  # an untrained head says nothing
                        heads = self.student.heads if name == STUDENT else {}
                        subject = Subject(name, self.student.student, heads)
                    # the teacher's row is its only one
                    row, by_class = measuring.row(
                        of, subject, linear=linear or name == TEACHER, by_class=linear and name == STUDENT
                    )
                    facts = {TEACHER: {"images": images_of(of)}, STUDENT: {"weights": which}}.get(name, {})
                    yield of, name, row | facts, by_class

    @contextlib.contextmanager
    def measured_weights(self) -> Iterator[str]:
        """The student with the weights that evaluation measures: "averaged" or "last".

        Afterwards it has its own again, to the last bit. One more copy of its weights is in memory meanwhile.
        """
        if self.ema is None:
            yield "last"
            return
        modules = ((self.student.student.model, self.ema.state), (self.student.heads, self.ema.heads))
        now = [(module.state_dict(), averages) for module, averages in modules]
        own = [(state, {name: value.clone() for name, value in state.items()}) for state, _ in now]
        try:
            _overwrite(now)
            yield "averaged"
        finally:
            _overwrite(own)


def images_of(of: EvalSet) -> list[str]:
    """Which images the caches of a set's two splits hold."""
    return [identity_of(of.train), identity_of(of.test)]


def has_probe(row: dict) -> bool:
    """Whether an eval row has the figure of a linear probe, of images or of patches."""
    return row.get("linear_top1") is not None or row.get("miou") is not None


@torch.no_grad()
def _overwrite(pairs: list[tuple[dict, dict]]) -> None:
    """Copy the values of the second dict of each pair into the tensors of the first."""
    for state, values in pairs:
        for name, value in state.items():
            value.copy_(values[name])
