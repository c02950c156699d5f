"""What a student lost against its teacher, class by class."""

import pytest
import torch
from caches import make_test_cache

from distillery.evaluate.by_class import compare_by_class, global_indices, read_by_class, write_by_class
from distillery.evaluate.sets import EvalSet


@pytest.fixture
def of(tmp_path) -> EvalSet:
    make_test_cache(tmp_path / "test", 14, bad=(0, 9), labels=True)
    return EvalSet("digits", tmp_path / "train", tmp_path / "test", class_names={0: "nought", 1: "one"})


def test_rows_that_could_not_be_decoded_are_no_part_of_the_numbering(of):
    assert global_indices(of.test).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13]


def test_losses_are_counted_by_class_and_by_what_the_student_says(of):
    labels = torch.tensor([0] * 6 + [1] * 4 + [2] * 2)
    teacher = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 2, 2])
    student = torch.tensor([1, 1, 2, 0, 0, 1, 1, 1, 1, 1, 2, 2])
    content = compare_by_class(of, student, teacher, labels, k=5)
    assert [(entry["name"], entry["images"]) for entry in content["classes"]] == [("nought", 6), ("2", 2), ("one", 4)]
    first = content["classes"][0]
    assert (first["student"], first["teacher"]) == pytest.approx((2 / 6, 5 / 6))
    assert first["difference"] == pytest.approx(-3 / 6) and content["classes"][-1]["difference"] == pytest.approx(1 / 4)
    # row 5 is no loss: the teacher was wrong too
    assert content["num_lost"] == 3 and (content["k"], content["num_images"]) == (5, 12)
    said = [(entry["name"], entry["said_name"], entry["count"], entry["images"]) for entry in content["confusions"]]
    assert said == [("nought", "one", 2, [1, 2]), ("nought", "2", 1, [3])]


def test_rows_without_a_label_are_no_part_of_the_comparison(of):
    labels = torch.tensor([-1, 0, 0] + [-1] * 9)
    content = compare_by_class(of, torch.tensor([0, 1]), torch.tensor([0, 0]), labels, k=5)
    assert content["num_images"] == 2 and content["confusions"][0]["images"] == [3]


def test_the_comparison_is_read_as_it_was_written_and_a_damaged_one_is_none(of, tmp_path):
    labels = torch.zeros(12, dtype=torch.int64)
    content = compare_by_class(of, labels, labels, labels, k=1) | {"step": 3}
    assert content["confusions"] == []
    write_by_class(tmp_path / "run", content)
    assert read_by_class(tmp_path / "run", "digits") == content
    (tmp_path / "run" / "evaluation" / "digits.json").write_text("{")
    assert read_by_class(tmp_path / "run", "digits") is None
