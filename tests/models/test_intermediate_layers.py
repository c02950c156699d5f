import math
from types import SimpleNamespace

import pytest
import torch

from distillery.config.keys_train import TrainConfig
from distillery.config.load import load_configs
from distillery.losses.targets import FrozenTeacher
from distillery.losses.total import check_gradients, total_loss
from distillery.models.backbone import Backbone, ModelSpec, build_backbone
from distillery.models.pair import StudentWithHeads, align, align_teacher
from distillery.system.errors import UserError
from distillery.teacher_cache.targets import check_fields
from distillery.training.build import build_models

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
# tokens in blocks of one width, maps in stages, maps kept channels last
MODELS = {
    "test_vit": {},
    "test_resnet": {},
    "test_convnext": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
}


def backbone(name: str, out_indices: list[int] | None = None, **changes) -> Backbone:
    torch.manual_seed(0)
    chosen = {"source": "timm", "kwargs": MODELS.get(name, {}), "mean": MEAN, "std": STD} | changes
    spec = ModelSpec(name=name, pretrained=False, out_indices=out_indices, **chosen)
    return build_backbone(spec, data_mean=MEAN, data_std=STD, image_size=64)


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_layers_are_those_of_timm_and_the_other_features_stay_what_they_were(name):
    plain, model = backbone(name).eval(), backbone(name, [0, -1]).eval()
    with torch.no_grad():
        features, without = model(images()), plain(images())
        every = model.model.forward_intermediates(images(), intermediates_only=True)
    for layer, grid, expected in zip(features.layers, features.layer_grids, (every[0], every[-1]), strict=True):
        assert grid == tuple(expected.shape[2:]) and layer.shape[1] == math.prod(grid)
        assert torch.equal(layer, expected.flatten(2).transpose(1, 2))
    assert model.widths["layers_0"] == every[0].shape[1] and model.widths["layers_1"] == every[-1].shape[1]
    assert torch.allclose(features.pooled, without.pooled, atol=1e-6)
    assert torch.allclose(features.tokens, without.tokens, atol=1e-6)
    assert without.layers == () and plain.layer_grids == ()


@pytest.mark.parametrize(
    "out_indices, message",
    [
        ([0, 6], r"out_indices \[0, 6\]: it has 6 intermediate layers, 0 to 5"),
        ([-7], "it has 6 intermediate layers"),
        ([3, 1], "give each once, the first layers first"),
        ([-1, 5], "give each once"),
        ([2, 2], "give each once"),
    ],
)
def test_layers_that_are_not_there_or_out_of_order_are_refused(out_indices, message):
    with pytest.raises(UserError, match=f"timm model 'test_vit': .*{message}"):
        backbone("test_vit", out_indices)


def test_a_model_without_intermediate_layers_says_so():
    with pytest.raises(UserError, match="'resnet18': it gives no intermediate layers .* leave teacher_out_indices"):
        backbone("resnet18", [0], source="torchvision")


def test_a_teachers_layers_come_to_the_grids_of_the_students():
    teacher, student = FrozenTeacher(backbone("test_resnet", [1, 3])), backbone("test_vit", [1, 4])
    target = align_teacher(teacher(images()), student.grid, student.layer_grids)
    assert target.layer_grids == student.layer_grids == ((4, 4), (4, 4))
    assert [layer.shape[1] for layer in target.layers] == [16, 16]
    kept = align_teacher(teacher(images()), student.grid)
    assert kept.layer_grids == teacher.backbone.layer_grids != student.layer_grids


def test_every_layer_has_a_head_of_its_own_and_teaches():
    teacher = FrozenTeacher(backbone("test_resnet", [1, 3]))
    student = StudentWithHeads(backbone("test_vit", [1, 4]), teacher.widths, {"layers"})
    teacher.gather_statistics([images(8)])
    assert set(student.heads) == {"layers_0", "layers_1"}
    out, target = align(student(images(4)), teacher(images(4)))
    for field in ("layers_0", "layers_1"):
        assert out.tensors()[field].shape == target.tensors()[field].shape
    terms = total_loss(out, target, {"layers": 1.0})
    assert check_gradients(terms, student.student.parameters())["loss/layers"] > 1e-4
    # what comes after the last layer compared is reached by no loss
    assert any(name.startswith("model.blocks.5") for name in student.unreached)
    assert not any(name.startswith("model.blocks.4") for name in student.unreached)


@pytest.mark.parametrize("teacher_layers, student_layers", [([1], None), ([1, 2], [1]), (None, None)])
def test_unequal_numbers_of_layers_are_refused(teacher_layers, student_layers):
    teacher = FrozenTeacher(backbone("test_resnet", teacher_layers))
    with pytest.raises(UserError, match=r"a loss compares layers: the teacher gives \d and the student \d\. Set"):
        StudentWithHeads(backbone("test_vit", student_layers), teacher.widths, {"layers"})


def test_layers_are_standardised_per_channel():
    teacher = FrozenTeacher(backbone("test_resnet", [0, 2]))
    teacher.gather_statistics([images(32)])
    for layer in teacher(images(32)).layers:
        rows = layer.flatten(0, 1)
        assert torch.allclose(rows.mean(0), torch.zeros(rows.shape[1]), atol=1e-3)
        assert rows.std(0, correction=0).max() < 1.001


def test_the_keys_go_together():
    data, model = {"dataset_name": "parquet", "cache_dir": "none"}, {"teacher_out_indices": [1, 3]}
    with pytest.raises(UserError, match="teacher_out_indices and student_out_indices go together: as many layers"):
        load_configs(data, {"checkpoint_dir": "none"}, model | {"student_out_indices": [1]})


def test_models_built_from_the_keys_train_on_their_layers():
    model = {"teacher_name": "test_resnet", "teacher_pretrained": False, "teacher_out_indices": [0, -1],
             "student_name": "test_vit", "student_out_indices": [0, -1]}  # fmt: skip
    train = {"checkpoint_dir": "none", "distill_loss_weights": {"cls": 1.0, "layers": 0.5},
             "standardise_targets": "phi_s", "gradient_checkpointing": True}  # fmt: skip
    configs = load_configs({"dataset_name": "parquet", "cache_dir": "none", "image_size": 64}, train, model)
    teacher, student = build_models(configs, torch.device("cpu"))
    teacher.gather_statistics([images(8)])
    terms = total_loss(*align(student(images(4)), teacher(images(4))), configs.train.distill_loss_weights)
    assert min(check_gradients(terms, student.student.parameters()).values()) > 1e-4
    assert student.student.model.grad_checkpointing


def test_a_teacher_cache_has_no_layers_and_says_so():
    cache = SimpleNamespace(widths={"pooled": 8, "tokens": 8}, num_views=2, directory="teacher")
    with pytest.raises(UserError, match="layers is 0.5 and compares inner layers, which no teacher cache holds"):
        check_fields(cache, TrainConfig(distill_loss_weights={"cls": 1.0, "layers": 0.5}))


def test_a_model_that_stops_at_the_last_layer_asked_for_runs_its_rest_on_its_own():
    kwargs = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}
    plain, model = (backbone("hiera_tiny_224", indices, kwargs=kwargs).eval() for indices in (None, [0, 1]))
    with torch.no_grad():
        features, expected = model(images()), plain(images())
    assert features.layer_grids == ((16, 16), (8, 8))
    assert torch.allclose(features.pooled, expected.pooled, atol=1e-6)
    assert torch.allclose(features.tokens, expected.tokens, atol=1e-6)
