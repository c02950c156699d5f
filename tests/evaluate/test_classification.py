"""The row of a model on a set with labels, and the student in its teacher's space."""

import pytest
import torch
from torch import nn

from distillery.evaluate.classification import (
    TeacherFeatures,
    WithHead,
    compare_with_teacher,
    evaluate_features,
    measure_in_teacher_space,
    to_targets,
    to_teacher_space,
)
from distillery.losses.targets import Targets
from distillery.losses.teacher_space import TeacherSpace, fold_heads
from distillery.models.backbone import Features
from distillery.models.pair import build_projector
from distillery.system.errors import UserError

ROW = {"knn_top1", "knn_top1_k1", "knn_top1_k5", "knn_top1_k20", "linear_top1", "feature_std", "effective_rank",
       "collapsed"}  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def labelled(rows=60, dims=5):
    return torch.randn(rows, dims, generator=generator()), torch.arange(rows) % 3


def targets_of(width: int, method) -> Targets:
    """Standardising targets whose channels have means far larger than their deviations, as those of DINO have."""
    targets = Targets({"pooled": width}, method)
    features = 30 + torch.randn(200, width, generator=generator()) * torch.logspace(-1, 1, width)
    targets.load_statistics(targets.statistics_of([Features(features, None, (0, 0))]))
    return targets


def test_a_row_has_the_fields_of_metrics_jsonl():
    data = labelled()
    row = evaluate_features(data, data, k=1).row
    assert set(row) == ROW
    assert row["knn_top1"] == row["knn_top1_k1"] == 1.0 and row["linear_top1"] is None and row["collapsed"] is False
    row = evaluate_features(data, data, k=1, linear=True).row
    assert set(row) == ROW | {f"linear_top1_{n}shot{end}" for n in (1, 5, 10) for end in ("", "_std")}
    assert all(type(value) in (float, bool) for value in row.values()) and 0 < row["linear_top1"] <= 1


def test_collapsed_features_are_called_so_in_the_row():
    x = torch.ones(60, 5) + 1e-4 * torch.randn(60, 5, generator=generator())
    data = x, torch.arange(60) % 3
    assert evaluate_features(data, data).row["collapsed"] is True


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_labels_and_bad_features_are_errors_that_name_the_split(part):
    x, y = labelled(6, 3)
    good = {"train": (x, y), "test": (x, y)}
    with pytest.raises(UserError, match=f"none of the 6 images of the {part} split has a label"):
        evaluate_features(**good | {part: (x, torch.full((6,), -1))})
    bad = x.clone()
    bad[2, 1] = float("nan")
    with pytest.raises(FloatingPointError, match=f"1 {part} features not finite"):
        evaluate_features(**good | {part: (bad, y)})


def test_rows_without_a_label_are_left_out():
    (train_x, train_y), (test_x, test_y) = labelled(90), labelled(30)
    test_x = test_x + 0.3
    whole = evaluate_features((train_x, train_y), (test_x, test_y), k=3, linear=True)
    more = torch.full((1, train_x.shape[1]), 9.0), torch.tensor([-1])
    train, test = (
        (torch.cat([more[0], x]), torch.cat([more[1], y])) for x, y in ((train_x, train_y), (test_x, test_y))
    )
    assert evaluate_features(train, test, k=3, linear=True).row == whole.row
    kept = TeacherFeatures(train[0], test[0]).with_probe(train[1], "cpu")
    in_place = measure_in_teacher_space(test[0], kept, train[1], test[1], k=3, linear=True, device="cpu")
    assert in_place == {
        "knn_top1_in_teacher_bank": whole.row["knn_top1"], "linear_top1_on_teacher_probe": whole.row["linear_top1"]
    }  # fmt: skip


def test_the_teacher_agrees_with_itself_completely():
    x, targets = torch.randn(40, 6, generator=generator()), targets_of(6, True)
    agreement = compare_with_teacher(x, x, to_targets(x, targets), targets)
    assert agreement == pytest.approx(dict.fromkeys(agreement, 1.0), abs=1e-5) and len(agreement) == 5
    assert compare_with_teacher(x, x) == pytest.approx({"teacher_cosine": None, "cka": 1.0, "neighbour_overlap": 1.0})


@pytest.mark.parametrize("method", [True, False, "phi_s"])
def test_outputs_come_into_the_teachers_space_as_those_of_a_folded_head_do(method):
    class Mean(nn.Module):
        def forward(self, images):
            return Features(images.mean((2, 3)), None, (1, 1))

    targets = targets_of(8, method)
    torch.manual_seed(0)
    heads = nn.ModuleDict({"pooled": build_projector(3, 8)})
    images = torch.randn(20, 3, 4, 4, generator=generator())
    with torch.no_grad():
        both = WithHead(Mean(), heads["pooled"])(images)
        folded = TeacherSpace(Mean(), fold_heads(heads, targets))(images).pooled
    assert torch.equal(both[:, :3], images.mean((2, 3)))
    torch.testing.assert_close(to_teacher_space(both[:, 3:], targets), folded, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", [True, False, "phi_s"])
def test_a_teachers_features_go_to_targets_and_back(method):
    targets = targets_of(8, method)
    x = 30 + torch.randn(20, 8, generator=generator(1))
    torch.testing.assert_close(to_teacher_space(to_targets(x, targets), targets), x, rtol=1e-4, atol=1e-3)


def test_in_the_teachers_place_its_bank_and_its_probe_are_used():
    train_x, train_y = labelled(90)
    test_x, test_y = train_x[:30] + 0.01, train_y[:30]
    teacher = TeacherFeatures(train_x, test_x).with_probe(train_y, "cpu")
    options = {"k": 1, "linear": True, "device": "cpu"}
    same = measure_in_teacher_space(test_x, teacher, train_y, test_y, **options)
    own = evaluate_features((train_x, train_y), (test_x, test_y), k=1, linear=True).row
    assert same == {"knn_top1_in_teacher_bank": own["knn_top1"], "linear_top1_on_teacher_probe": own["linear_top1"]}
    # as good a feature in a space of its own says nothing there
    turned = measure_in_teacher_space(test_x.roll(1, dims=1), teacher, train_y, test_y, **options)
    assert turned["knn_top1_in_teacher_bank"] < 0.7
    assert "linear_top1_on_teacher_probe" not in measure_in_teacher_space(
        test_x, teacher, train_y, test_y, **options | {"linear": False}
    )
