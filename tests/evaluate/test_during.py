"""What a run measures of its models on the way."""

import pytest
import torch
from caches import make_test_cache
from torch import nn

from distillery.evaluate.during import FEATURES_DIR, RunEvaluation
from distillery.losses.targets import Targets
from distillery.models.backbone import Features
from distillery.system.errors import Interrupted

WIDTH = 6


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
    """Stands in for StudentWithHeads; its head gives what it is told to."""

    def __init__(self, student: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.student, self.heads, self.head = student, {"pooled": head}, head

    def forward(self, images: torch.Tensor) -> Features:
        return self.head(images)


@pytest.fixture
def folders(tmp_path):
    for part in ("train", "test"):
        make_test_cache(tmp_path / part, 24, labels=True)
    return {"digits": (tmp_path / "train", tmp_path / "test")}


def evaluation(tmp_path, folders, student, teacher, *, is_stopped=lambda: False) -> RunEvaluation:
    targets = Targets({"pooled": WIDTH, "tokens": WIDTH}, False)
    return RunEvaluation(
        tmp_path / "run", folders, student, targets, lambda: teacher, k=1, device=torch.device("cpu"),
        is_stopped=is_stopped,
    )  # fmt: skip


def test_a_student_that_equals_its_teacher_agrees_with_it_in_every_measure(tmp_path, folders):
    teacher = Projection(0)
    own = evaluation(tmp_path, folders, Student(Projection(0), Projection(0)), teacher)
    rows = {name: row for _, name, row in own.measure(["student", "teacher"], set(), linear=False)}
    assert rows["student"]["knn_top1"] == rows["teacher"]["knn_top1"]
    for measure in ("teacher_cosine", "cka", "neighbour_overlap"):
        assert rows["student"][measure] == pytest.approx(1, abs=1e-5)
        assert measure not in rows["teacher"]


def test_the_teacher_runs_once_for_all_evaluations(tmp_path, folders):
    teacher = Projection(0)
    own = evaluation(tmp_path, folders, Student(Projection(1), Projection(2)), teacher)
    list(own.measure(["untrained", "teacher"], set(), linear=False))
    calls = teacher.calls
    first = list(own.measure(["student"], set(), linear=False))
    # another process that goes on with the run finds what it said
    again = evaluation(tmp_path, folders, Student(Projection(1), Projection(2)), None)
    assert list(again.measure(["student"], set(), linear=False)) == first
    assert teacher.calls == calls


def test_without_a_baseline_or_with_a_damaged_one_the_teacher_is_asked_again(tmp_path, folders):
    own = evaluation(tmp_path, folders, Student(Projection(1), Projection(2)), Projection(0))
    first = list(own.measure(["student"], set(), linear=False))
    (tmp_path / "run" / FEATURES_DIR / "digits.safetensors").write_bytes(b"cut")
    assert list(own.measure(["student"], set(), linear=False)) == first


def test_other_test_images_under_the_same_name_are_not_compared_with_the_kept_features(tmp_path, folders):
    own = evaluation(tmp_path, folders, Student(Projection(1), Projection(2)), Projection(0))
    list(own.measure(["teacher"], set(), linear=False))
    make_test_cache(tmp_path / "other", 16, labels=True)
    own.folders = {"digits": (tmp_path / "train", tmp_path / "other")}
    (_, _, row), = own.measure(["student"], set(), linear=False)  # fmt: skip
    assert 0 <= row["neighbour_overlap"] <= 1


def test_what_is_measured_already_is_left_out(tmp_path, folders):
    own = evaluation(tmp_path, folders, Student(Projection(1), Projection(2)), Projection(0))
    assert [name for _, name, _ in own.measure(["untrained", "teacher"], {("digits", "teacher")}, linear=False)] == [
        "untrained"
    ]


def test_a_request_to_stop_ends_an_evaluation_at_the_next_batch(tmp_path, folders):
    student = Projection(1)
    own = evaluation(tmp_path, folders, Student(student, Projection(2)), Projection(0), is_stopped=lambda: True)
    with pytest.raises(Interrupted):
        list(own.measure(["student"], set(), linear=False))
    assert student.calls == 0
