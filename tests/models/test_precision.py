"""A frozen model in a precision of its own: what is cast, what stays, and what the comparison with float32 decides."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distillery.config.load import load_configs
from distillery.losses.targets import FrozenTeacher
from distillery.models import configured
from distillery.models.backbone import Backbone, ModelSpec, build_backbone, memory_format_of
from distillery.models.builders import BuiltModel
from distillery.models.configured import cast_teacher, choose_teacher_precision, place_teacher
from distillery.models.precision import autocast_for, keep_weights_in, least_cosines
from distillery.models.weights import weights_hash

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY_DINOV3 = {"embed_dim": 64, "depth": 2, "num_heads": 2}
SIZES = {"test_vit": 64, "test_resnet": 64, "test_convnext": 64, "vit_small_patch16_dinov3": 64,
         "swin_tiny_patch4_window7_224": 32}  # fmt: skip
KWARGS = {"vit_small_patch16_dinov3": TINY_DINOV3,
          "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}}  # fmt: skip
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def timm_backbone(name: str = "test_vit", **changes) -> Backbone:
    torch.manual_seed(0)
    spec = ModelSpec(source="timm", name=name, pretrained=False, kwargs=KWARGS.get(name), **changes)
    built = build_backbone(spec, data_mean=(0.5,) * 3, data_std=(0.2,) * 3, image_size=SIZES[name])
    return built.requires_grad_(False).eval()


def images_of(name: str = "test_vit", count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, SIZES[name], SIZES[name], generator=torch.Generator().manual_seed(1))


class TypesOfNorms(TorchDispatchMode):
    """Notes the types in which layer norms are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "layer_norm" in str(func):
            self.found.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", sorted(SIZES))
def test_weights_in_a_low_type_give_nearly_the_features_of_float32_in_that_type(name, precision):
    backbone, images = timm_backbone(name), images_of(name)
    float32 = backbone(images).tensors()
    backbone.keep_in(precision)
    low = backbone(images).tensors()
    assert {value.dtype for value in low.values()} == {backbone.dtype}
    assert min(least_cosines(low, float32).values()) > 0.999
    assert backbone.scale.dtype == torch.float32


def test_only_batch_norm_and_rotary_frequencies_stay_in_float32():
    resnet, dinov3 = timm_backbone("test_resnet"), timm_backbone("vit_small_patch16_dinov3")
    for backbone in (resnet, dinov3):
        backbone.keep_in("bf16")
    in_float32 = {name for name, value in resnet.model.state_dict().items() if value.dtype == torch.float32}
    norms = {name for name, module in resnet.model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name.rpartition(".")[0] for name in in_float32} == norms
    assert dict(dinov3.model.named_buffers())["rope.periods"].dtype == torch.float32
    assert {parameter.dtype for parameter in dinov3.model.parameters()} == {torch.bfloat16}


def test_autocast_around_weights_in_a_low_type_changes_nothing():
    backbone, images = timm_backbone(), images_of()
    backbone.keep_in("bf16")
    alone = backbone(images)
    with torch.autocast("cpu", torch.float16), TypesOfNorms() as norms:
        surrounded = backbone(images)
    assert torch.equal(alone.tokens, surrounded.tokens)
    assert norms.found == {torch.bfloat16}


def test_float32_weights_come_back_to_the_last_bit():
    backbone, images = timm_backbone("vit_small_patch16_dinov3"), images_of("vit_small_patch16_dinov3")
    before, state = backbone(images), copy.deepcopy(backbone.model.state_dict())
    backbone.put_back(backbone.keep_in("bf16"))
    assert torch.equal(backbone(images).tokens, before.tokens)
    assert all(torch.equal(value, state[name]) for name, value in backbone.model.state_dict().items())


def test_the_hash_of_the_weights_is_that_of_float32_whatever_they_are_kept_in():
    backbone = timm_backbone("test_resnet")
    found = weights_hash(backbone.model)
    keep_weights_in(backbone.model, torch.bfloat16)
    assert weights_hash(backbone.model) == found
    assert weights_hash(copy.deepcopy(backbone).model) == found


def test_the_frozen_teacher_has_its_own_precision_inside_any_autocast():
    images = images_of()
    teachers = {name: FrozenTeacher(timm_backbone(), precision=name) for name in ("fp32", "bf16")}
    plain = timm_backbone()(images).tokens
    with torch.autocast("cpu", torch.bfloat16), TypesOfNorms():
        assert torch.equal(teachers["fp32"](images).tokens, plain)
    with autocast_for("bf16", "cpu"):
        under_autocast = timm_backbone()(images).tokens
    assert torch.equal(teachers["bf16"](images).tokens, under_autocast)


@pytest.mark.parametrize("method", [True, "phi_s"])
def test_targets_of_a_teacher_in_a_low_type_are_standardised_in_float32(method):
    backbone = timm_backbone()
    backbone.keep_in("bf16")
    teacher = FrozenTeacher(backbone, method, "bf16")
    teacher.gather_statistics([images_of(count=16)])
    targets = teacher(images_of())
    assert {targets.pooled.dtype, targets.tokens.dtype} == {torch.float32}


class Subtle(nn.Module):
    """What it says is the small difference of two large sums: lost in 8 bits."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)

    def forward_features(self, x):
        return (self.stem(x) + 1000) - 1000

    def forward(self, x):
        return self.forward_features(x).mean((2, 3))


def subtle() -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(BuiltModel(Subtle(), (8, 8)), label="subtle", data_mean=MEAN, data_std=STD)
    return backbone.requires_grad_(False).eval()


def test_auto_keeps_float32_where_the_low_type_gives_other_features_and_says_so():
    backbone, images = subtle(), torch.rand(8, 3, 8, 8)
    before = backbone(images).pooled
    line = cast_teacher(backbone, "bf16", images, is_auto=True)
    assert "least cosine with float32 over 8 images" in line and "they stay in float32" in line
    assert backbone.dtype == torch.float32
    assert torch.equal(backbone(images).pooled, before)


def test_an_explicit_precision_is_taken_and_a_warning_says_how_far_off_it_is():
    backbone = subtle()
    line = cast_teacher(backbone, "bf16", torch.rand(8, 3, 8, 8), is_auto=False)
    assert line.startswith("WARNING: the teacher's weights in bf16") and "set teacher_precision: auto or fp32" in line
    assert backbone.dtype == torch.bfloat16


def test_features_that_overflow_count_as_far_off():
    backbone = subtle()
    backbone.model.stem.weight.mul_(1e6)
    assert "pooled -1.0" in cast_teacher(backbone, "fp16", torch.rand(8, 3, 8, 8), is_auto=True)
    assert backbone.dtype == torch.float32


def train_config(**settings):
    return load_configs(
        {"dataset_name": "parquet", "cache_dir": "none"}, {"checkpoint_dir": "none"} | settings, {}
    ).train


def test_auto_follows_precision_and_an_explicit_value_wins(monkeypatch):
    monkeypatch.setattr(configured, "choose_precision", lambda name, device: f"{name} on {device.type}")
    assert choose_teacher_precision(train_config(), CPU) == "auto on cpu"
    assert choose_teacher_precision(train_config(precision="fp32"), CUDA) == "fp32 on cuda"
    assert choose_teacher_precision(train_config(teacher_precision="fp16"), CUDA) == "fp16"


def test_on_a_cpu_auto_casts_nothing_compares_nothing_and_says_nothing(capsys):
    backbone = place_teacher(timm_backbone(), train_config(precision="bf16"), CPU, "bf16", lambda: pytest.fail("asked"))
    assert backbone.dtype == torch.float32
    assert capsys.readouterr().out == ""


def test_on_a_cpu_an_explicit_bf16_is_cast_compared_and_said(capsys):
    train = train_config(teacher_precision="bf16")
    backbone = place_teacher(timm_backbone(), train, CPU, "bf16", images_of)
    assert backbone.dtype == torch.bfloat16
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the teacher's weights in bf16: least cosine with float32 over 4 images: pooled 0.999")


@pytest.mark.parametrize("name, is_patches", [("test_vit", True), ("vit_small_patch16_dinov3", True),
                                              ("test_resnet", False), ("test_convnext", False)])  # fmt: skip
def test_on_a_gpu_models_whose_convolutions_cut_patches_stay_contiguous(name, is_patches):
    expected = torch.contiguous_format if is_patches else torch.channels_last
    model = timm_backbone(name).model
    assert memory_format_of(model, CUDA) == expected
    assert memory_format_of(model, CPU) == torch.channels_last
