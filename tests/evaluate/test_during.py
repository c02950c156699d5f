"""What a run measures of its models on the way."""

import sys
import types
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from caches import make_test_cache
from torch import nn

from distillery.evaluate import classification, measures
from distillery.evaluate.by_class import read_by_class
from distillery.evaluate.during import RunEvaluation
from distillery.evaluate.linear import fit_probe
from distillery.evaluate.sets import EvalSet
from distillery.evaluate.teacher_features import FEATURES_DIR
from distillery.losses.targets import Targets
from distillery.models.backbone import Features
from distillery.reading import datasets
from distillery.reading.datasets import LabelledBatches
from distillery.system.errors import Interrupted, RunError
from distillery.training.log import RunLog, read_rows
from distillery.training.task import Ema

WIDTH = 6
AGREEMENT = ("teacher_cosine", "cka", "neighbour_overlap", "cosine_in_teacher_space", "cka_in_teacher_space")


class Projection(nn.Module):
    """Stands in for a Backbone: pooled pixels times a fixed random matrix."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed)))
        self.calls = 0

    def forward(self, images: torch.Tensor) -> Features:
        self.calls += 1
        return Features(images.mean((2, 3)) @ self.weight, None, (1, 1))


class Student(nn.Module):
    """Stands in for StudentWithHeads: a backbone, and a head that adds to its feature."""

    def __init__(self, seed: int, shift: float = 0.0) -> None:
        super().__init__()
        self.student = Projection(seed)
        self.student.model = nn.Linear(1, 1)  # what averaged weights are of
        self.heads = nn.ModuleDict({"pooled": nn.Linear(WIDTH, WIDTH)})
        nn.init.eye_(self.heads["pooled"].weight)
        nn.init.constant_(self.heads["pooled"].bias, shift)


@pytest.fixture
def sets(tmp_path):
    for part in ("train", "test"):
        make_test_cache(tmp_path / part, 24, labels=True)
    return [EvalSet("digits", tmp_path / "train", tmp_path / "test")]


def evaluation(
    tmp_path, sets, student, teacher, *, is_stopped=lambda: False, teacher_hash="one", k=1, **options
) -> RunEvaluation:
    targets = Targets({"pooled": WIDTH, "tokens": WIDTH}, False)
    return RunEvaluation(
        tmp_path / "run", sets, student, targets, lambda: teacher, teacher_hash=teacher_hash, k=k,
        device=torch.device("cpu"), is_stopped=is_stopped, **options,
    )  # fmt: skip


def rows_of(own: RunEvaluation, *names: str, done=(), linear: bool = False) -> dict[str, dict]:
    return {name: row for _, name, row, _ in own.measure(list(names), set(done), linear=linear)}


def test_a_student_that_equals_its_teacher_agrees_with_it_in_every_measure(tmp_path, sets):
    rows = rows_of(evaluation(tmp_path, sets, Student(0), Projection(0)), "teacher", "student", linear=True)
    for measure in AGREEMENT:
        assert rows["student"][measure] == pytest.approx(1, abs=1e-5)
    for measure, of_teacher in (
        ("knn_top1", "knn_top1"), ("linear_top1", "linear_top1"), ("linear_top1_5shot", "linear_top1_5shot"),
        ("knn_top1_in_teacher_bank", "knn_top1"), ("linear_top1_on_teacher_probe", "linear_top1"),
    ):  # fmt: skip
        assert rows["student"][measure] == rows["teacher"][of_teacher]


def test_a_head_that_is_off_shows_in_the_teachers_space_alone(tmp_path, sets):
    plain = rows_of(evaluation(tmp_path / "a", sets, Student(0), Projection(0)), "student")["student"]
    off = rows_of(evaluation(tmp_path / "b", sets, Student(0, shift=40.0), Projection(0)), "student")["student"]
    assert off["knn_top1_in_teacher_bank"] < 1 and off["cosine_in_teacher_space"] < 0.9
    for measure in ("knn_top1", "cka", "neighbour_overlap"):
        assert off[measure] == plain[measure]


def test_the_teacher_runs_once_for_all_evaluations(tmp_path, sets):
    teacher = Projection(0)
    rows_of(evaluation(tmp_path, sets, Student(1), teacher), "teacher", "untrained", linear=True)
    calls = teacher.calls
    first = rows_of(evaluation(tmp_path, sets, Student(1), teacher), "student", linear=True)
    # another process that goes on with the run finds what it said
    assert rows_of(evaluation(tmp_path, sets, Student(1), None), "student", linear=True) == first
    assert teacher.calls == calls


def test_without_a_baseline_or_with_a_damaged_or_earlier_one_the_teacher_is_asked_again(tmp_path, sets):
    own = evaluation(tmp_path, sets, Student(1), Projection(0))
    first = rows_of(own, "student", linear=True)
    kept = tmp_path / "run" / FEATURES_DIR / "digits.safetensors"
    with safetensors.safe_open(kept, "pt") as file:
        test, images = file.get_tensor("test"), file.metadata()["test"]
    for content in (b"cut", safetensors.torch.save({"pooled": test}, {"images": images})):
        kept.write_bytes(content)
        assert rows_of(own, "student", linear=True) == first


def test_the_probe_on_the_teachers_features_is_fitted_once(tmp_path, sets, monkeypatch):
    own = evaluation(tmp_path, sets, Student(1), Projection(0))
    rows_of(own, "student")
    first = rows_of(own, "student", linear=True)  # the features were kept without a probe
    fits = []
    monkeypatch.setattr(classification, "fit_probe", lambda x, y, **_: fits.append(len(x)) or fit_probe(x, y))
    assert rows_of(own, "student", linear=True) == first
    assert fits == [24]  # the student's own


def test_other_test_images_under_the_same_name_are_not_compared_with_the_kept_features(tmp_path, sets):
    teacher = Projection(0)
    rows_of(evaluation(tmp_path, sets, Student(1), teacher), "teacher")
    make_test_cache(tmp_path / "other", 16, labels=True)
    other, calls = [replace(sets[0], test=tmp_path / "other")], teacher.calls
    assert 0 <= rows_of(evaluation(tmp_path, other, Student(1), teacher), "student")["student"]["cka"] <= 1
    assert teacher.calls > calls


def test_what_is_measured_already_is_left_out(tmp_path, sets):
    own = evaluation(tmp_path, sets, Student(1), Projection(0))
    assert list(rows_of(own, "untrained", "teacher", done={("digits", "teacher")})) == ["untrained"]


def test_a_request_to_stop_ends_an_evaluation_at_the_next_batch(tmp_path, sets):
    student = Student(1)
    own = evaluation(tmp_path, sets, student, Projection(0), is_stopped=lambda: True)
    with pytest.raises(Interrupted):
        rows_of(own, "student")
    assert student.student.calls == 0


# averaged weights


class Averaged(nn.Module):
    """A student whose feature depends on weights and on batch-norm statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.BatchNorm2d(WIDTH))

    def forward(self, images: torch.Tensor) -> Features:
        return Features(self.model(images).mean((2, 3)), None, (1, 1))


def averaged_student() -> tuple[nn.Module, Ema]:
    torch.manual_seed(0)
    student = Student(0)
    student.student = Averaged()
    ema = Ema(student.student.model, 0.5, student.heads)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(torch.randn_like(value))
        student.student.model[1].running_mean.add_(2.0)
    student.student.model[1].num_batches_tracked.add_(7)
    return student, ema


def test_the_averaged_weights_are_measured_and_the_students_own_come_back_to_the_last_bit(tmp_path, sets):
    student, ema = averaged_student()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    kept = {name: value.clone() for name, value in ema.state.items()}
    own = evaluation(tmp_path, sets, student, Projection(0), ema=ema)
    averaged = rows_of(own, "student")["student"]
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in ema.state.items())
    last = rows_of(evaluation(tmp_path, sets, student, Projection(0)), "student")["student"]
    student.student.model.load_state_dict(ema.state)
    student.heads.load_state_dict(ema.heads)
    expected = rows_of(evaluation(tmp_path, sets, student, Projection(0)), "student")["student"]
    assert averaged == expected | {"weights": "averaged"} and last != expected
    assert (last["weights"], expected["weights"]) == ("last", "last")


def test_an_evaluation_that_is_stopped_gives_the_student_its_own_weights_back(tmp_path, sets):
    student, ema = averaged_student()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    answers = iter([False, False, True])
    own = evaluation(tmp_path, sets, student, Projection(0), ema=ema, is_stopped=lambda: next(answers))
    with pytest.raises(Interrupted):
        rows_of(own, "student")
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


# the record


class Console:
    """Takes the lines that a run prints."""

    def __init__(self) -> None:
        self.lines = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def segmentation_row(model, train, test, *, linear, **_):
    """Stands in for evaluate_segmentation."""
    assert model is not None and train is not None and test is not None
    return {"miou": 0.5, "pixel_accuracy": 0.75 if linear else None, "knn_miou": 0.25, "class_iou": [0.5, None],
            "protocol": "Patches of 2 px."}  # fmt: skip


def test_sets_of_both_tasks_are_measured_in_one_run(tmp_path, sets, monkeypatch):
    with_masks = EvalSet("streets", tmp_path / "train", tmp_path / "test", "segmentation", num_classes=2)
    module = types.ModuleType("segmentation")
    module.evaluate_segmentation = segmentation_row
    monkeypatch.setitem(sys.modules, "distillery.evaluate.segmentation", module)
    monkeypatch.setattr(datasets, "MaskedBatches", LabelledBatches, raising=False)
    own = evaluation(tmp_path, [*sets, with_masks], Student(1), Projection(0))
    (tmp_path / "run").mkdir()
    log, console = RunLog(tmp_path / "run", tensorboard=False, wandb_project=None, is_main=True), Console()
    for step, linear in ((0, True), (5, False), (9, True)):
        assert own.record(log, console, read_rows(log.path), step=step, epoch=step, linear=linear)
    rows = [(row["step"], row["dataset"], row["model"]) for row in read_rows(log.path)]
    assert rows[:4] == [(0, name, model) for name in ("digits", "streets") for model in ("untrained", "teacher")]
    assert rows[4:] == [(step, name, "student") for step in (5, 9) for name in ("digits", "streets")]
    student = read_rows(log.path)[-1]
    assert "knn_top1" not in student and student["weights"] == "last" and student["knn_miou"] == 0.25
    assert any("student on streets: k-NN mIoU 25.0%" in line for line in console.lines)
    assert log.best_step({5, 9}) in (5, 9)


def test_the_teacher_of_a_set_that_came_later_is_measured_with_the_student(tmp_path, sets):
    own = evaluation(tmp_path, sets, Student(1), Projection(0))
    (tmp_path / "run").mkdir()
    log = RunLog(tmp_path / "run", tensorboard=False, wandb_project=None, is_main=True)
    for step in (5, 9):
        own.record(log, Console(), read_rows(log.path), step=step, epoch=step, linear=False)
    rows = read_rows(log.path)
    assert [(row["step"], row["model"]) for row in rows] == [(5, "teacher"), (5, "student"), (9, "student")]
    assert rows[0]["linear_top1"] is not None and rows[1]["linear_top1"] is None


def test_a_set_that_was_cached_anew_gets_another_row_of_its_teacher(tmp_path, sets):
    own = evaluation(tmp_path, sets, Student(1), Projection(0))
    (tmp_path / "run").mkdir()
    log = RunLog(tmp_path / "run", tensorboard=False, wandb_project=None, is_main=True)
    own.record(log, Console(), read_rows(log.path), step=5, epoch=5, linear=False)
    make_test_cache(tmp_path / "other", 16, labels=True)
    own = evaluation(tmp_path, [replace(sets[0], test=tmp_path / "other")], Student(1), Projection(0))
    for step in (9, 12):
        own.record(log, Console(), read_rows(log.path), step=step, epoch=step, linear=False)
    rows = [(row["step"], row["model"]) for row in read_rows(log.path)]
    assert rows == [(5, "teacher"), (5, "student"), (9, "teacher"), (9, "student"), (12, "student")]
    # a run that is at its end measures nothing anew: its teacher's row would be of other images than its student's
    make_test_cache(tmp_path / "third", 20, labels=True)
    again = evaluation(tmp_path, [replace(sets[0], test=tmp_path / "third")], Student(1), None)
    again.record(log, Console(), read_rows(log.path), step=12, epoch=12, linear=False)
    assert len(read_rows(log.path)) == len(rows)


def test_memory_of_the_gpu_that_does_not_suffice_is_said_with_the_set_and_what_to_do(tmp_path, sets, monkeypatch):
    def fail(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measures, "knn_predictions", fail)
    with pytest.raises(RunError, match=r"teacher was measured on digits.*eval_datasets\.digits\.max_train"):
        rows_of(evaluation(tmp_path, sets, Student(1), Projection(0)), "teacher")


def test_an_evaluation_that_turns_out_to_be_the_last_fits_the_probe_after_all(tmp_path, sets):
    own = evaluation(tmp_path, sets, Student(1), Projection(0))
    (tmp_path / "run").mkdir()
    log = RunLog(tmp_path / "run", tensorboard=False, wandb_project=None, is_main=True)
    for linear in (False, False, True, True):  # num_epochs was lowered to where the run stood
        own.record(log, Console(), read_rows(log.path), step=3, epoch=1, linear=linear)
    students = [row["linear_top1"] for row in read_rows(log.path) if row["model"] == "student"]
    assert len(students) == 2 and students[0] is None and students[1] is not None
    assert read_by_class(tmp_path / "run", "digits")["step"] == 3


def test_features_and_baselines_are_of_one_teacher(tmp_path, sets):
    first = evaluation(tmp_path, sets, Student(1), Projection(0))
    rows_of(first, "teacher")
    assert first.store.has(sets[0])
    others = {
        "teacher": evaluation(tmp_path, sets, Student(1), Projection(0), teacher_hash="two"),
        "student": evaluation(tmp_path, sets, Student(2), Projection(0)),
        "k": evaluation(tmp_path, sets, Student(1), Projection(0), k=2),
        "sets": evaluation(tmp_path, [], Student(1), Projection(0)),
    }
    torch.nn.init.zeros_(others["student"].student.student.model.weight)
    assert not others["teacher"].store.has(sets[0])
    assert len({own.baselines() for own in (first, *others.values())}) == 5


def test_what_was_lost_by_class_is_written_after_the_last_evaluation(tmp_path, sets):
    own = evaluation(tmp_path, sets, Student(1), Projection(0))
    (tmp_path / "run").mkdir()
    log = RunLog(tmp_path / "run", tensorboard=False, wandb_project=None, is_main=True)
    own.record(log, Console(), [], step=3, epoch=1, linear=False)
    assert read_by_class(tmp_path / "run", "digits") is None
    own.record(log, Console(), read_rows(log.path), step=6, epoch=2, linear=True)
    content = read_by_class(tmp_path / "run", "digits")
    assert (content["step"], content["weights"], content["k"], content["num_images"]) == (6, "last", 1, 24)
    row = read_rows(log.path)[-1]
    share = sum(entry["images"] * entry["student"] for entry in content["classes"]) / 24
    assert share == pytest.approx(row["knn_top1"])
