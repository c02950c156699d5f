from types import SimpleNamespace

import numpy as np
import pytest
import torch
from caches import MEAN, STD, Images, make_test_cache
from PIL import Image
from torch import nn
from torch.utils.data import Subset

from data_loader import CachedTensorDataset
from distillery.evaluate.by_class import identity_of, write_by_class
from distillery.evaluate.sets import EvalSet
from distillery.models.backbone import Backbone
from distillery.models.builders import BuiltModel
from distillery.report.canvas import GAP_PX, LINE_PX, TILE_PX, draw_neighbours, enlarged, thumbnails
from distillery.report.pictures import (
    Pool,
    colour_tokens,
    match_components,
    model_inputs,
    nearest,
    principal_components,
    spread,
    to_colours,
    why_not,
    write_confusions,
    write_pictures,
)
from distillery.system.errors import UserError
from distillery.training.batches import StepBatch


class Grid(nn.Module):
    """Patch features on a grid of cells of 2 px."""

    num_features = 6

    def __init__(self, seed: int, cell: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 6, cell, cell)

    def forward_features(self, x):
        return self.stem(x)

    def forward(self, x):
        return self.forward_features(x).mean((2, 3))


def backbone(seed: int, size: int = 8, mean=MEAN, cell: int = 2) -> Backbone:
    built = BuiltModel(Grid(seed, cell), (size, size), mean, STD)
    return Backbone(built, label="grid", data_mean=MEAN, data_std=STD)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Pool:
    folder = tmp_path_factory.mktemp("cache")
    make_test_cache(folder, 20)
    return Pool(CachedTensorDataset(folder), MEAN, STD, "noise")


def test_rows_are_spread_evenly_and_never_more_than_there_are():
    assert spread(4, 20) == [0, 5, 10, 15]
    assert spread(9, 3) == [0, 1, 2]


def test_principal_components_are_those_of_the_covariance_over_all_images():
    torch.manual_seed(0)
    tokens = torch.randn(3, 16, 5) @ torch.randn(5, 5) + 4
    components = principal_components(tokens).flatten(0, 1)
    variances = torch.linalg.eigvalsh(tokens.flatten(0, 1).double().T.cov()).flip(0)
    assert torch.allclose(components.T.cov(), variances[:3].diag(), atol=1e-9)
    assert torch.allclose(components.mean(dim=0), torch.zeros(3, dtype=torch.float64), atol=1e-6)


def test_fewer_dimensions_than_colours_leave_the_rest_at_zero():
    components = principal_components(torch.randn(2, 4, 2))
    assert components.shape == (2, 4, 3) and (components[..., 2] == 0).all()


def test_components_in_another_order_and_sign_are_matched_back():
    torch.manual_seed(0)
    reference = torch.randn(2, 30, 3, dtype=torch.float64)
    mixed = torch.stack([-reference[..., 2], reference[..., 0], -reference[..., 1]], dim=-1)
    assert torch.allclose(match_components(mixed, reference), reference)


def test_colours_use_the_whole_range_and_constant_components_do_no_harm():
    torch.manual_seed(0)
    colours = to_colours(torch.randn(4, 50, 3, dtype=torch.float64))
    assert colours.dtype == torch.uint8 and colours.amin() == 0 and colours.amax() == 255
    assert to_colours(torch.zeros(2, 4, 3, dtype=torch.float64)).shape == (2, 4, 3)


def test_a_student_equal_to_its_teacher_has_the_same_colours():
    tokens = torch.randn(3, 16, 5)
    teacher, student = colour_tokens(tokens, (4, 4), -2 * tokens, (4, 4))
    assert teacher.shape == (3, 4, 4, 3)
    assert np.abs(teacher.astype(int) - student.astype(int)).max() <= 1


def test_grids_of_different_size_keep_their_own_cells():
    teacher, student = colour_tokens(torch.randn(2, 16, 5), (4, 4), torch.randn(2, 6, 3), (2, 3))
    assert teacher.shape == (2, 4, 4, 3) and student.shape == (2, 2, 3, 3)


def test_the_nearest_leave_the_image_itself_out_and_come_by_cosine():
    features = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 1.0], [1.0, 0.9]])
    assert nearest(features, [0], 2) == [[1, 3]]
    assert nearest(features, [0, 2], 9) == [[1, 3, 2], [3, 1, 0]]


@pytest.mark.parametrize("size", [8, TILE_PX, 300])
def test_thumbnails_are_the_pixels_without_normalisation(size):
    pixels = torch.full((2, 3, size, size), 0.5)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    tiles = thumbnails((pixels - mean) / std, MEAN, STD)
    assert tiles.shape == (2, TILE_PX, TILE_PX, 3)
    assert ((tiles.int() - 128).abs() <= 1).all()


def test_a_patch_becomes_a_block_of_its_colour():
    cells = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    big = enlarged(cells, 10)
    assert (big[:5, :5] == cells[0, 0]).all() and (big[5:, 5:] == cells[1, 1]).all()


def test_both_pictures_are_written_with_their_captions_and_not_drawn_again_for_the_same_step(pool, tmp_path):
    options = {"device": torch.device("cpu")}
    paths = write_pictures(tmp_path, backbone(0), backbone(1), pool, step=7, **options)
    assert [path.name for path in paths] == ["pca.png", "neighbours.png"]
    with Image.open(paths[0]) as pca, Image.open(paths[1]) as neighbours:
        assert "12 images of noise; student at step 7" in pca.info["Description"]
        assert "among 20 images of noise" in neighbours.info["Description"]
        assert pca.info["Step"] == neighbours.info["Step"] == "7"
        assert pca.width > 6 * TILE_PX and pca.height > 6 * TILE_PX
        assert neighbours.width > 6 * TILE_PX and neighbours.height > 6 * TILE_PX
    before = [path.stat().st_mtime_ns for path in paths]
    assert write_pictures(tmp_path, backbone(0), backbone(1), pool, step=7, **options) == []
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert len(write_pictures(tmp_path, backbone(0), backbone(1), pool, step=8, **options)) == 2


def test_drawing_draws_no_random_numbers_and_leaves_the_student_in_training_mode(pool, tmp_path):
    teacher, student = backbone(0), backbone(1).train()
    state = torch.get_rng_state()
    write_pictures(tmp_path, teacher, student, pool, step=1, device=torch.device("cpu"))
    assert student.training and torch.equal(torch.get_rng_state(), state)


def test_a_model_without_a_patch_grid_and_a_pool_of_few_images_leave_pictures_out(pool, tmp_path):
    few = Pool(Subset(pool.dataset, range(4)), MEAN, STD, "noise")
    assert write_pictures(tmp_path, backbone(0, cell=8), backbone(1), few, step=1, device=torch.device("cpu")) == []


def test_labels_mark_the_neighbours_of_the_same_class(pool, tmp_path):
    plain = write_pictures(tmp_path, backbone(0), backbone(1), pool, step=1, device=torch.device("cpu"))[1].read_bytes()
    labelled = Pool(pool.dataset, MEAN, STD, "noise", torch.zeros(20, dtype=torch.int64))
    path = write_pictures(tmp_path, backbone(0), backbone(1), labelled, step=2, device=torch.device("cpu"))[1]
    assert path.read_bytes() != plain
    with Image.open(path) as image:
        assert "has the label of the image" in image.info["Description"]


def test_two_neighbours_without_a_label_have_none_in_common():
    pixels, found = np.zeros((2, TILE_PX, TILE_PX, 3), np.uint8), [[1]]
    drawn = [draw_neighbours(pixels, [0], found, found, labels) for labels in (None, torch.tensor([-1, -1]))]
    assert drawn[0].tobytes() == drawn[1].tobytes()
    assert draw_neighbours(pixels, [0], found, found, torch.tensor([3, 3])).tobytes() != drawn[0].tobytes()


def test_the_inputs_of_both_models_are_shown_as_they_get_them():
    images = torch.rand(3, 3, 8, 8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    task = SimpleNamespace(
        augment=SimpleNamespace(apply=lambda images, _parameters: images.flip(3)),
        teacher=SimpleNamespace(backbone=backbone(0, size=16, mean=(0.5, 0.5, 0.5))),
        student=SimpleNamespace(student=backbone(1)),
    )
    strip = model_inputs(task, StepBatch((images - mean) / std, torch.arange(3), torch.zeros(3, 0)))
    assert strip.shape == (2 * TILE_PX, 3 * TILE_PX, 3) and strip.dtype == np.uint8
    expected = thumbnails((images.flip(3) - mean) / std, MEAN, STD)[0].numpy()
    assert np.abs(strip[TILE_PX:, :TILE_PX].astype(int) - expected.astype(int)).max() <= 1
    # the teacher's is larger and normalised differently, and yet the same picture
    assert np.abs(strip[:TILE_PX].mean() - strip[TILE_PX:].mean()) < 4


def test_the_reason_for_missing_pictures_is_one_line():
    def fail():
        raise UserError("no cache\nand more")

    assert why_not(fail) == "no cache"
    assert why_not(lambda: []) is None


def test_the_worst_confusions_are_drawn_from_the_images_that_the_comparison_names(tmp_path):
    make_test_cache(tmp_path / "test", 14, bad=(0,), labels=True)
    of = EvalSet("digits", tmp_path / "train", tmp_path / "test")
    data = SimpleNamespace(mean=MEAN, std=STD)
    assert write_confusions(tmp_path, [of], data) == []  # nothing has been compared
    entry = {"class": 0, "name": "nought", "said": 1, "said_name": "one", "count": 2, "images": [3, 9]}
    content = {"dataset": "digits", "step": 4, "num_lost": 2, "num_images": 13, "classes": [], "confusions": [entry]}
    write_by_class(tmp_path, content | {"test": "12 of other images"})
    assert write_confusions(tmp_path, [of], data) == []
    write_by_class(tmp_path, content | {"test": identity_of(of.test)})
    (path,) = write_confusions(tmp_path, [of], data)
    with Image.open(path) as image:
        assert "student at step 4" in image.info["Description"] and image.info["Step"] == "4"
        shown = np.asarray(image)[LINE_PX : LINE_PX + TILE_PX, TILE_PX + GAP_PX : 2 * TILE_PX + GAP_PX, :3]
    expected = enlarged(Images(14, labels=True).pixels(9))
    assert np.abs(shown.astype(int) - expected).max() <= 1
    assert write_confusions(tmp_path, [of], data) == []  # of this comparison already
    write_by_class(tmp_path, content | {"test": identity_of(of.test), "k": 5})
    assert write_confusions(tmp_path, [of], data) == [path]  # of the same step, and another comparison
