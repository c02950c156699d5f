"""Zero-shot classification against embeddings of class names."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distillery.evaluate.sets import EvalSet
from distillery.evaluate.text import TextEmbeddings, load_text_embeddings, zero_shot_top1
from distillery.system.errors import MissingFileError, UserError


def labelled_set(names=()) -> EvalSet:
    return EvalSet("pets", Path("train"), Path("test"), class_names=dict(enumerate(names)))


def texts(*names: str, width: int = 4) -> TextEmbeddings:
    return TextEmbeddings(Path("e.safetensors"), torch.eye(max(len(names), width))[: len(names), :width], list(names))


def test_names_match_whatever_their_case_spaces_and_underscores_and_further_names_do_no_harm():
    chosen = texts("Grey Wolf", "dog", "red_fox").for_set(labelled_set(["red fox", "grey_wolf"]), 2)
    assert torch.equal(chosen, torch.eye(4)[[2, 0]])


@pytest.mark.parametrize("names", [("cat",), ("cat", "dog", "DOG")])
def test_a_class_without_an_embedding_or_with_two_is_listed(names):
    with pytest.raises(UserError, match="of 1 of the 2 classes of pets it has no embedding, or several: 'dog'"):
        texts(*names).for_set(labelled_set(["cat", "dog"]), 2)


def test_without_class_names_the_embeddings_stand_in_the_order_of_the_numbers():
    assert torch.equal(texts("a", "b").for_set(labelled_set(), 2), torch.eye(4)[:2])
    with pytest.raises(UserError, match="2 names, and pets has at least 3 classes, whose names are not known"):
        texts("a", "b").for_set(labelled_set(), 3)


def test_two_classes_may_have_one_name_where_all_names_stand_in_the_order_of_the_classes():
    names = ["tench", "crane", "crane"]
    assert torch.equal(texts(*names).for_set(labelled_set(names), 3), torch.eye(4)[:3])


def test_another_width_than_the_teachers_says_both_and_the_key_for_image_text_teachers():
    with pytest.raises(UserError, match="have 4 dimensions, the teacher's feature has 7.*teacher_projection: true"):
        texts("a").check_width(7)


def test_an_image_is_of_the_class_whose_embedding_is_nearest_by_cosine():
    x = torch.tensor([[9.0, 1.0], [0.1, 0.2], [-5.0, -4.9]])
    embeddings = torch.tensor([[0.01, 0.0], [0.0, 100.0], [0.0, 0.0]])
    assert zero_shot_top1(x, torch.tensor([0, 1, 0]), embeddings) == pytest.approx(2 / 3)
    # a class that has no embedding is never the nearest, not even where all others point away
    assert zero_shot_top1(x[2:], torch.tensor([1]), embeddings) == 1.0


def write(path: Path, tensors: dict, names=None) -> Path:
    path.write_bytes(safetensors.torch.save(tensors, None if names is None else {"names": names}))
    return path


def test_a_file_is_read_as_it_was_written(tmp_path):
    given = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).half()
    found = load_text_embeddings(write(tmp_path / "e", {"embeddings": given}, json.dumps(["a", "b"])))
    assert torch.equal(found.embeddings, given.float()) and found.names == ["a", "b"]


@pytest.mark.parametrize(
    "tensors, names, message",
    [
        ({"text": torch.ones(2, 3)}, '["a", "b"]', r"no tensor `embeddings` \(it has \['text'\]\)"),
        ({"embeddings": torch.ones(2, 3)}, None, "no metadata `names`"),
        ({"embeddings": torch.ones(2, 3)}, "a, b", "is no JSON list of texts"),
        ({"embeddings": torch.ones(2, 3)}, '["a"]', r"has embeddings \[2, 3\] and 1 names"),
    ],
)
def test_what_a_file_lacks_is_said_in_one_line(tmp_path, tensors, names, message):
    with pytest.raises(UserError, match=message) as caught:
        load_text_embeddings(write(tmp_path / "e", tensors, names))
    assert "\n" not in str(caught.value) and "expected a tensor `embeddings` [C, Dt]" in str(caught.value)


def test_no_file_and_a_file_of_another_kind_are_told_apart(tmp_path):
    with pytest.raises(MissingFileError, match="is not there"):
        load_text_embeddings(tmp_path / "none")
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(UserError, match="is no safetensors file"):
        load_text_embeddings(tmp_path / "text")
