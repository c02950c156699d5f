import copy
import dataclasses
import itertools
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from distillery.losses.registry import LOSSES, fields_needed
from distillery.losses.targets import FrozenTeacher
from distillery.losses.total import check_gradients, total_loss
from distillery.models.backbone import Backbone, Features, ModelSpec, build_backbone
from distillery.models.builders import BuiltModel
from distillery.models.pair import StudentWithHeads, align_teacher, resample_tokens
from distillery.system.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATA = {"data_mean": MEAN, "data_std": STD}
TINY_SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
TINY_VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2}
# timm name -> (kwargs, image_size in px, grid): class token, registers only, attention pooling, both kinds of prefix,
# maps of convolutions, maps in NHWC, a pooled feature wider than the map
TIMM = {
    "test_vit": ({}, 64, (4, 4)),
    "test_vit2": ({}, 48, (3, 3)),
    "test_vit3": ({}, 32, (2, 2)),
    "vit_small_patch14_reg4_dinov2": (TINY_VIT, 64, (5, 5)),
    "deit_tiny_distilled_patch16_224": ({"depth": 1}, 32, (2, 2)),
    "eva02_tiny_patch14_224": (TINY_VIT, 28, (2, 2)),
    "test_resnet": ({}, 96, (3, 3)),
    "test_convnext": ({}, 64, (2, 2)),
    "test_efficientnet": ({}, 64, (2, 2)),
    "test_mambaout": ({}, 64, (2, 2)),
    "swin_tiny_patch4_window7_224": (TINY_SWIN, 32, (4, 4)),
}


WITHOUT_CLASSES = {"vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224"}


def timm_backbone(name: str = "test_vit", image_size: int | None = None, **changes) -> Backbone:
    kwargs, default_size, _ = TIMM.get(name, ({}, 32, None))
    torch.manual_seed(0)
    spec = ModelSpec(**{"source": "timm", "name": name, "pretrained": False, "kwargs": kwargs, **changes})
    return build_backbone(spec, image_size=image_size or default_size, **DATA)


def random_images(batch: int, size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def own_pixels(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    """What a model should see of images normalised with MEAN and STD, the long way through pixel values."""
    mean, std, own_mean, own_std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD, tuple(backbone.mean), tuple(backbone.std))
    )
    return (images * std + mean - own_mean) / own_std


# ---- Backbone: any model as Features


@pytest.mark.parametrize("name", sorted(TIMM))
def test_any_timm_model_gives_features_of_the_stated_shapes(name):
    size = TIMM[name][1]
    backbone = timm_backbone(name).eval()
    with torch.no_grad():
        features = backbone(random_images(2, size))
    assert backbone.grid == features.grid == TIMM[name][2]
    assert features.pooled.shape == (2, backbone.pooled_width)
    assert features.tokens.shape == (2, math.prod(backbone.grid), backbone.token_width)
    assert features.logits is None and backbone.num_classes is None
    assert not torch.equal(features.pooled[0], features.pooled[1])


@torch.no_grad()
def test_with_mirror_all_features_are_means_over_image_and_mirror_image():
    options = {"name": "test_vit", "image_size": 48, "out_indices": [1]}
    plain, mirrored = (timm_backbone(**options, mirror=mirror).eval() for mirror in (False, True))
    images = random_images(2, 48)
    one, other, mean = plain(images), plain(images.flip(-1)), mirrored(images)
    torch.testing.assert_close(mean.pooled, (one.pooled + other.pooled) / 2)
    for name in ("tokens", "layers_0"):
        found, left, right = (features.tensors()[name] for features in (mean, one, other))
        # row 2, column 0 of the 3 x 3 cells, beside column 2 of the mirror image
        torch.testing.assert_close(found[:, 6], (left[:, 6] + right[:, 8]) / 2)
    again = mirrored(images.flip(-1)).mirrored().tensors()
    assert all(torch.equal(value, again[name]) for name, value in mean.tensors().items())


@pytest.mark.parametrize("name", sorted(set(TIMM) - {"deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"}))
def test_pooled_is_what_the_exported_timm_model_returns(name):
    size = TIMM[name][1]
    backbone = timm_backbone(name).eval()
    images = random_images(2, size)
    with torch.no_grad():
        if backbone.img_size != (size, size):
            small = F.interpolate(images, backbone.img_size, mode="bilinear", antialias=True)
        else:
            small = images
        expected = backbone.model(own_pixels(backbone, small))
        assert torch.allclose(backbone(images).pooled, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224"])
def test_without_class_token_pooled_is_the_mean_of_the_patches(name):
    backbone = timm_backbone(name, use_cls_token=False).eval()
    with torch.no_grad():
        features = backbone(random_images(2, 64))
    expected = features.tokens.mean(1)
    if name == "test_vit2":  # averages before its last norm, not after it
        assert F.cosine_similarity(features.pooled, expected).min() > 0.9
    else:
        assert torch.allclose(features.pooled, expected, atol=1e-5)


def test_the_class_token_is_taken_after_the_last_norm_also_where_that_norm_is_in_the_head():
    backbone = timm_backbone("eva02_tiny_patch14_224").eval()
    assert isinstance(backbone.model.norm, nn.Identity)
    with torch.no_grad():
        images = random_images(2, 28)
        raw = backbone.model.forward_features(own_pixels(backbone, images))
        features = backbone(images)
    assert torch.allclose(features.pooled, backbone.model.fc_norm(raw[:, 0]), atol=1e-5)
    assert torch.allclose(features.tokens, backbone.model.fc_norm(raw[:, 1:]), atol=1e-5)


@pytest.mark.parametrize("name", sorted(TIMM))
def test_tokens_lie_where_the_image_does(name):
    backbone = timm_backbone(name, image_size=112 if "patch14" in name else 128).eval()
    half = backbone.img_size[0] // 2
    base = random_images(1, 2 * half)
    for quadrant in itertools.product((0, 1), (0, 1)):
        changed = base.clone()
        changed[..., quadrant[0] * half :, quadrant[1] * half :][..., :half, :half] = 3.0
        with torch.no_grad():
            moved = (backbone(changed).tokens - backbone(base).tokens).norm(dim=-1).view(1, *backbone.grid)
        assert divmod(F.adaptive_avg_pool2d(moved, 2).argmax().item(), 2) == quadrant


@pytest.mark.parametrize("name", sorted(set(TIMM) - WITHOUT_CLASSES))
def test_logits_are_the_models_own_and_the_classifier_is_kept_for_them_alone(name):
    backbone = timm_backbone(name, with_logits=True).eval()
    images = random_images(2, TIMM[name][1])
    with torch.no_grad():
        features = backbone(images)
        assert torch.allclose(features.logits, backbone.model(own_pixels(backbone, images)), atol=1e-5)
    assert features.logits.shape == (2, backbone.num_classes) and backbone.num_classes == 1000
    without = timm_backbone(name).state_dict().keys()
    assert {k.split(".")[1] for k in backbone.state_dict().keys() - without} <= {
        "head",
        "head_dist",
        "classifier",
        "fc",
    }


@pytest.mark.parametrize("name", sorted(WITHOUT_CLASSES))
def test_a_model_without_classes_cannot_give_logits(name):
    with pytest.raises(UserError, match="has no classifier.*leave kl_logits out of distill_loss_weights"):
        timm_backbone(name, with_logits=True)


# what CLIP, its ConvNeXt, its ResNet and PE have: a class token, a map, attention pooling of a map, attention pooling
# beside a class token, and a linear layer each
IMAGE_TEXT = {
    "test_vit": ({"num_classes": 24}, 64, 24),
    "test_convnext": ({"num_classes": 24}, 64, 24),
    "resnet50_clip.openai": ({}, 64, 1024),
    "vit_pe_core_tiny_patch16_384.fb": ({"depth": 1}, 64, 512),
}


@pytest.mark.parametrize("name", sorted(IMAGE_TEXT))
def test_the_projection_of_an_image_text_model_gives_what_the_model_itself_gives(name):
    kwargs, size, width = IMAGE_TEXT[name]
    backbone = timm_backbone(name, size, kwargs=kwargs, projection=True).eval()
    plain = timm_backbone(name, size, kwargs=kwargs | {"num_classes": 0}).eval()
    images = random_images(2, size)
    with torch.no_grad():
        features = backbone(images)
        assert torch.allclose(features.pooled, backbone.model(own_pixels(backbone, images)), atol=1e-5)
    assert features.pooled.shape == (2, width) and features.logits is None
    assert backbone.widths == plain.widths | {"pooled": width} and backbone.grid == plain.grid
    assert plain.state_dict().keys() < backbone.state_dict().keys()


def test_tokens_are_the_same_with_the_projection_and_without():
    plain, projected = timm_backbone(), timm_backbone(kwargs={"num_classes": 24}, projection=True)
    projected.load_state_dict(plain.state_dict(), strict=False)
    images = random_images(2, 32)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images).tokens, projected.eval()(images).tokens)


@pytest.mark.parametrize("kwargs, found", [({"num_classes": 0}, "nothing"), ({}, "a classifier of 1000 classes")])
def test_a_model_without_a_projection_is_refused(kwargs, found):
    with pytest.raises(UserError, match=f"teacher_projection: timm model 'test_vit' has {found}"):
        timm_backbone(kwargs=kwargs, projection=True)


@pytest.mark.parametrize("name", sorted(TIMM))
def test_the_state_dict_has_exactly_the_raw_models_keys(name):
    backbone = timm_backbone(name)
    assert set(backbone.state_dict()) == {f"model.{key}" for key in backbone.model.state_dict()}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_building_draws_no_random_numbers_beyond_the_models_own_and_leaves_it_untouched(name):
    kwargs, size, _ = TIMM[name]
    torch.manual_seed(0)
    raw = timm.create_model(name, num_classes=0, **({"img_size": size} if name == "test_vit" else {}))
    after = torch.rand(1)
    backbone = timm_backbone(name)
    assert torch.rand(1) == after
    for (key, ours), theirs in zip(backbone.model.state_dict().items(), raw.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key  # batch-norm statistics too
    assert all(module.training for module in backbone.modules())


def test_images_are_renormalised_to_the_models_own_mean_and_std():
    backbone = timm_backbone("test_vit").eval()
    assert backbone.mean == (0.5, 0.5, 0.5)
    images = random_images(2, 64)
    with torch.no_grad():
        expected = backbone.model(own_pixels(backbone, images))
        assert torch.allclose(backbone(images).pooled, expected, atol=1e-5)
        unlike = timm_backbone("test_vit", mean=MEAN, std=STD).eval()
        assert torch.equal(unlike(images).pooled, unlike.model(images))  # equal normalisation: not touched at all
        assert not torch.allclose(unlike(images).pooled, expected, atol=1e-3)


def test_images_of_another_size_are_resized_without_aliasing():
    backbone = timm_backbone("test_resnet", img_size=32, mean=MEAN, std=STD).eval()
    assert backbone.img_size == (32, 32) and backbone.grid == (1, 1)
    # plain bilinear resampling by 4 would read the two middle pixels alone: black
    stripes = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(32).expand(2, 3, 128, 128)
    with torch.no_grad():
        grey = backbone(torch.full((2, 3, 32, 32), 0.5)).pooled
        assert torch.allclose(backbone(stripes).pooled, grey, atol=2e-2)


@pytest.mark.parametrize(
    "image_size, kwargs, img_size, expected",
    [
        (224, {}, None, (224, 16)),  # never the native 518
        (96, {}, None, (98, 7)),
        (32, {}, None, (28, 2)),
        (4, {}, None, (14, 1)),
        (224, {}, 28, (28, 2)),
        (224, {"img_size": 42}, 28, (42, 3)),
        (32, {"img_size": 32, "patch_size": 4}, None, (32, 8)),
        (30, {"patch_size": 4}, None, (32, 8)),
    ],
)
def test_the_input_size_is_the_images_rounded_to_the_patch_unless_stated(image_size, kwargs, img_size, expected):
    name = "vit_small_patch14_dinov2"
    backbone = timm_backbone(name, image_size, kwargs=TINY_VIT | kwargs, img_size=img_size)
    assert (backbone.img_size[0], backbone.grid[0]) == expected
    assert backbone.model.patch_embed.grid_size == backbone.grid


def test_an_input_size_that_would_be_cut_at_the_edge_is_refused():
    with pytest.raises(UserError, match=r"100 px is no multiple of its patch of 16 px.*student_img_size to 96 or 112"):
        timm_backbone("test_vit", img_size=100)


def test_grids_need_not_be_square():
    backbone = timm_backbone("test_vit", kwargs={"img_size": (32, 64)}).eval()
    assert backbone.img_size == (32, 64) and backbone.grid == (2, 4)
    base = random_images(1, 64)
    changed = base.clone()
    changed[..., 32:, 32:48] = 3.0  # lower half, third quarter from the left
    with torch.no_grad():
        difference = (backbone(changed).tokens - backbone(base).tokens).norm(dim=-1)[0]
    assert divmod(difference.argmax().item(), 4) == (1, 2)


def test_the_default_pair_has_the_grids_the_documents_promise():
    teacher = timm_backbone("vit_base_patch14_dinov2.lvd142m", 224)
    student = timm_backbone("vit_small_patch16_224", 224, drop_path_rate=0.1)
    assert (teacher.grid, teacher.pooled_width, teacher.token_width) == ((16, 16), 768, 768)
    assert (student.grid, student.pooled_width, student.token_width) == ((14, 14), 384, 384)
    assert (teacher.mean, student.mean) == (MEAN, (0.5, 0.5, 0.5))
    assert sum(p.numel() for p in student.parameters()) == pytest.approx(21.6e6, rel=0.01)


def test_a_deep_copy_reads_its_own_weights():
    backbone = timm_backbone("test_resnet").eval()
    twin = copy.deepcopy(backbone)
    images = random_images(2, 96)
    with torch.no_grad():
        before = twin(images).pooled
        for parameter in backbone.parameters():
            parameter.zero_()
        assert torch.equal(twin(images).pooled, before)
        assert not torch.equal(backbone(images).pooled, before)


class TokensOnly(nn.Module):
    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.num_tokens = num_tokens

    def forward_features(self, images):
        return self.weight.expand(len(images), self.num_tokens, 8)


def wrapped(model: nn.Module, size: tuple[int, int] = (32, 32)) -> Backbone:
    return Backbone(BuiltModel(model, size), label="my model", **DATA)


def test_a_grid_is_read_from_the_number_of_tokens_or_refused():
    assert wrapped(TokensOnly(9)).grid == (3, 3)
    assert wrapped(TokensOnly(8), (32, 64)).grid == (2, 4)
    with pytest.raises(UserError, match="my model gives 10 patch tokens, which make no grid"):
        wrapped(TokensOnly(10))


# ---- FrozenTeacher


def frozen(name: str = "test_vit", **changes) -> FrozenTeacher:
    return FrozenTeacher(timm_backbone(name, **changes))


def test_the_teacher_stays_in_eval_mode_and_never_learns():
    teacher = frozen("test_resnet")
    teacher.train()
    nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = copy.deepcopy(teacher.backbone.model.state_dict())
    first, second = teacher(random_images(4, 96)), teacher(random_images(4, 96))
    assert torch.equal(first.pooled, second.pooled)
    assert all(torch.equal(before[k], v) for k, v in teacher.backbone.model.state_dict().items())


def test_teacher_outputs_can_be_saved_for_the_students_backward_pass():
    teacher = frozen()
    student = StudentWithHeads(timm_backbone("test_resnet", 64), teacher.widths, {"pooled", "tokens"})
    images = random_images(4, 64)
    target = align_teacher(teacher(images), student.student.grid)
    assert not target.pooled.requires_grad and not target.pooled.is_inference()
    weights = {name: 1.0 for name in LOSSES if name not in ("kl_logits", "layers")}
    total_loss(student(images), target, weights, second_view=target)["loss"].backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    assert all(p.grad is None for p in teacher.parameters())


def test_statistics_equal_float64_moments_and_standardise_each_channel():
    teacher = frozen()
    batches = [random_images(n, 64, seed=n) for n in (5, 7, 3)]
    raw = [teacher.backbone(batch) for batch in batches]
    teacher.gather_statistics(iter(batches))
    for field in ("pooled", "tokens"):
        values = torch.cat([getattr(f, field).flatten(0, -2) for f in raw]).detach().double()
        state = teacher.statistics_state()
        assert torch.allclose(state[f"{field}_mean"].double(), values.mean(0), atol=1e-6)
        assert torch.allclose(state[f"{field}_std"].double(), values.std(0, correction=0), rtol=1e-4)
        ours = torch.cat([getattr(teacher(b), field).flatten(0, -2) for b in batches]).double()
        assert torch.allclose(ours.mean(0), torch.zeros(ours.shape[1]).double(), atol=1e-4)
        assert torch.allclose(ours.std(0, correction=0), torch.ones(ours.shape[1]).double(), atol=1e-3)


class Channels(nn.Module):
    """A map whose channels are the image's mean in different strengths: alive, tiny, constant, huge but alive."""

    def __init__(self, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.tensor(scales))

    def forward_features(self, images):
        noise = images.mean((1, 2, 3)).view(-1, 1, 1, 1) * self.scales.view(1, -1, 1, 1)
        return (5.0 + noise).expand(-1, -1, 2, 2)


def test_a_dead_channel_does_not_explode():
    teacher = FrozenTeacher(wrapped(Channels((1.0, 0.0, 1e-7, 50.0))))
    teacher.gather_statistics([random_images(64, 8)])
    out = teacher(10 + random_images(8, 8, seed=2)).pooled
    assert out[:, [0, 3]].abs().min() > 10  # alive: ten units away from the statistics is far
    assert out[:, [1, 2]].abs().max() < 1e-3


def test_a_teacher_that_says_the_same_of_every_image_is_refused():
    with pytest.raises(UserError, match="same output for each of 8 images: look at its weights"):
        FrozenTeacher(wrapped(Channels((0.0, 0.0)))).gather_statistics([random_images(8, 8)])
    with pytest.raises(UserError, match="at least 2 images, got 0"):
        frozen().gather_statistics([])


def test_statistics_travel_in_the_checkpoint(tmp_path):
    teacher, later = frozen(), frozen()
    assert teacher.statistics_state() == {} and not teacher.has_statistics
    images = random_images(6, 64)
    assert torch.equal(teacher(images).pooled, teacher.backbone(images).pooled)  # none yet: as the model says
    teacher.gather_statistics([images])
    torch.save(teacher.statistics_state(), tmp_path / "statistics.pt")
    later.load_statistics(torch.load(tmp_path / "statistics.pt", weights_only=True))
    assert later.has_statistics
    for field in ("pooled", "tokens"):
        assert torch.equal(getattr(teacher(images), field), getattr(later(images), field))
    with pytest.raises(UserError, match="pooled has 64 channels, this teacher 96"):
        frozen("test_resnet").load_statistics(teacher.statistics_state())


def test_standardising_can_be_left_out():
    teacher = FrozenTeacher(timm_backbone(), method=False)
    images = random_images(6, 64)
    teacher.gather_statistics([images])
    assert torch.equal(teacher(images).tokens, teacher.backbone(images).tokens)


# ---- StudentWithHeads


PAIRS = list(itertools.product(["test_vit", "test_efficientnet", "test_mambaout"], ["test_resnet", "test_vit3"]))


@pytest.mark.parametrize("projector", [None, {"type": "linear"}, {"type": "mlp", "hidden_dim": 24}])
@pytest.mark.parametrize("teacher_name, student_name", PAIRS)
def test_any_pair_of_widths_and_grids_trains_every_parameter(teacher_name, student_name, projector):
    teacher = frozen(teacher_name, image_size=64, with_logits=True, out_indices=[0, -1])
    weights = dict.fromkeys(LOSSES, 1.0)
    backbone = timm_backbone(student_name, 96, out_indices=[1, -1])
    student = StudentWithHeads(backbone, teacher.widths, fields_needed(weights), projector)
    images = random_images(4, 64)
    teacher.gather_statistics([images])
    out = student(images)
    target = align_teacher(teacher(images), backbone.grid, backbone.layer_grids)
    assert out.pooled.shape == target.pooled.shape and out.tokens.shape == target.tokens.shape
    assert out.logits.shape == target.logits.shape == (4, 1000)
    assert [layer.shape for layer in out.layers] == [layer.shape for layer in target.layers]
    terms = total_loss(out, target, weights, second_view=target)
    assert min(check_gradients(terms, student.student.parameters()).values()) > 1e-6
    terms["loss"].backward()
    assert [name for name, p in student.named_parameters() if p.grad is None and p.requires_grad] == []


@pytest.mark.parametrize("fields", [{"pooled"}, {"tokens"}, {"pooled", "tokens"}, {"logits"}])
@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_convnext"])
def test_there_is_a_head_for_each_field_needed_and_what_no_loss_reaches_is_frozen(name, fields):
    student = StudentWithHeads(timm_backbone(name, 64), {"pooled": 24, "tokens": 40, "logits": 7}, fields)
    assert set(student.heads) == fields
    out = student(random_images(2, 64))
    sum(getattr(out, field).sum() for field in fields).backward()
    named = dict(student.named_parameters())
    assert {n for n, p in named.items() if p.grad is None} == {f"student.{n}" for n in student.unreached}
    assert {n for n, p in named.items() if not p.requires_grad} == {f"student.{n}" for n in student.unreached}
    assert bool(student.unreached) == (fields == {"tokens"} and name != "test_vit")  # the pooling's own layers


def test_a_classifier_nobody_asked_for_stays_in_the_weights_but_is_not_trained():
    torch.manual_seed(0)
    backbone = build_backbone(ModelSpec(source="torchvision", name="resnet18", pretrained=False), image_size=32, **DATA)
    keys = set(backbone.model.state_dict())
    student = StudentWithHeads(backbone, {"pooled": 8, "tokens": 8}, {"pooled", "tokens"})
    assert student.unreached == ["model.fc.weight", "model.fc.bias"]
    assert set(student.student.model.state_dict()) == keys
    assert {k.split(".")[0] for k in student.state_dict()} == {"student", "heads"}
    assert all(module.training for module in student.modules())


def test_unusable_projectors_fields_and_students_are_refused():
    widths = {"pooled": 8, "tokens": 8}
    with pytest.raises(UserError, match="unknown type 'mpl'; known: mlp, linear"):
        StudentWithHeads(timm_backbone(), widths, {"pooled"}, {"type": "mpl"})
    with pytest.raises(UserError, match="a loss compares logits, which the teacher does not give"):
        StudentWithHeads(timm_backbone(), widths, {"logits"})
    with pytest.raises(UserError, match="no trainable parameters"):
        StudentWithHeads(timm_backbone().requires_grad_(False), widths, {"pooled"})


def test_the_two_layer_head_is_twice_the_teachers_width_unless_stated():
    student = StudentWithHeads(timm_backbone(), {"pooled": 40, "tokens": 8}, {"pooled"})
    assert [type(layer).__name__ for layer in student.heads["pooled"]] == ["Linear", "LayerNorm", "GELU", "Linear"]
    assert student.heads["pooled"][0].weight.shape == (80, 64)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "swin_tiny_patch4_window7_224"])
def test_student_and_teacher_compile_as_one_graph_and_give_the_same(name):
    teacher = frozen(name)
    student = StudentWithHeads(timm_backbone(name), teacher.widths, {"pooled", "tokens"}).eval()
    images = random_images(2, TIMM[name][1])
    teacher.gather_statistics([images])
    for module in (teacher, student):
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(images).tokens, module(images).tokens, atol=1e-5)


# ---- grids


def test_equal_grids_are_left_exactly_as_they_are():
    tokens = torch.randn(2, 12, 5)
    assert resample_tokens(tokens, (3, 4), (3, 4)) is tokens


@pytest.mark.parametrize("new_grid", [(3, 5), (6, 10), (9, 15), (4, 20), (11, 7), (1, 1), (7, 10)])
def test_a_ramp_keeps_its_direction_its_row_order_and_its_range(new_grid):
    grid = (7, 10)
    rows, columns = torch.meshgrid(*(torch.arange(n) + 0.5 for n in grid), indexing="ij")
    ramp = torch.stack([rows / grid[0], columns / grid[1]], dim=-1).flatten(0, 1)[None]  # [1, 70, 2] of 0..1
    new = resample_tokens(ramp, grid, new_grid)[0].view(*new_grid, 2)
    centres = [(torch.arange(n) + 0.5) / n for n in new_grid]
    for axis in (0, 1):
        along = new[..., axis].mean(1 - axis)
        assert new[..., axis].std(1 - axis, correction=0).max() < 1e-6  # constant along the other axis
        exact = centres[axis].clamp(0.5 / grid[axis], 1 - 0.5 / grid[axis])  # no old centre lies farther out
        assert torch.allclose(along, exact, atol=0.02)
        assert (along.diff() >= 0).all()


@pytest.mark.parametrize(
    "grid, new_grid", [((16, 16), (14, 14)), ((16, 16), (7, 7)), ((37, 37), (6, 9)), ((5, 8), (3, 8))]
)
def test_going_to_fewer_cells_keeps_the_mean_exactly(grid, new_grid):
    tokens = torch.randn(2, math.prod(grid), 6, generator=torch.Generator().manual_seed(0))
    new = resample_tokens(tokens, grid, new_grid)
    assert new.shape == (2, math.prod(new_grid), 6)
    assert torch.allclose(new.mean(1), tokens.mean(1), atol=1e-6)


def test_whole_factors_are_area_means_and_more_cells_are_bilinear():
    tokens = torch.randn(2, 48, 5, generator=torch.Generator().manual_seed(0))
    image = tokens.transpose(1, 2).unflatten(2, (6, 8))
    mean = F.avg_pool2d(image, (3, 2)).flatten(2).transpose(1, 2)
    assert torch.allclose(resample_tokens(tokens, (6, 8), (2, 4)), mean, atol=1e-6)
    larger = F.interpolate(image, (13, 9), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.allclose(resample_tokens(tokens, (6, 8), (13, 9)), larger, atol=1e-5)


def test_resampling_is_exact_under_autocast_and_refuses_a_wrong_grid():
    tokens = torch.randn(1, 16, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resample_tokens(tokens, (4, 4), (2, 2)), resample_tokens(tokens, (4, 4), (2, 2)).float())
        inside = resample_tokens(tokens, (4, 4), (3, 3))
    assert torch.equal(inside, resample_tokens(tokens, (4, 4), (3, 3)))
    with pytest.raises(UserError, match="16 tokens do not make a grid of 3x4"):
        resample_tokens(tokens, (3, 4), (2, 2))


def test_aligning_changes_the_teachers_tokens_and_grid_alone():
    teacher = Features(torch.randn(2, 3), torch.randn(2, 16, 5), (4, 4), torch.randn(2, 7))
    aligned = align_teacher(teacher, (2, 3))
    assert aligned.grid == (2, 3) and aligned.tokens.shape == (2, 6, 5)
    assert aligned.pooled is teacher.pooled and aligned.logits is teacher.logits


# ---- what the predecessor got wrong


def test_every_term_of_the_default_losses_moves_a_student_of_other_width():
    # its class loss compared squared norms of unit vectors as soon as the widths differed: zero, always
    teacher = frozen("test_vit3")  # 96 wide, student 64
    student = StudentWithHeads(timm_backbone("test_vit"), teacher.widths, {"pooled", "tokens"})
    images = random_images(6, 64)
    teacher.gather_statistics([images])
    terms = total_loss(
        student(images), align_teacher(teacher(images), student.student.grid), {"cls": 1.0, "patch": 0.5}
    )
    norms = check_gradients(terms, student.student.parameters())
    assert norms["loss/cls"] > 1e-4 and norms["loss/patch"] > 1e-4


@pytest.mark.parametrize("corner", [(0, 0), (0, 5), (5, 0), (5, 5)])
def test_a_students_patch_is_matched_to_the_same_place_of_the_teachers_grid(corner):
    # its 36 student tokens were matched to the first 36 of the teacher's 256: the top rows of the image
    tokens = torch.zeros(1, 256, 1)
    row, column = (0 if c == 0 else 15 for c in corner)
    tokens[0, row * 16 + column] = 1.0
    aligned = align_teacher(Features(torch.zeros(1, 1), tokens, (16, 16)), (6, 6))
    assert divmod(aligned.tokens[0, :, 0].argmax().item(), 6) == corner
    assert aligned.tokens.mean().item() == pytest.approx(1 / 256)


@pytest.mark.parametrize("teacher_dim, student_dim", [*itertools.product((16, 24, 48), (24, 40))])
def test_widths_are_read_from_the_models(teacher_dim, student_dim):
    # 384 and 768 were written into its code
    name = "vit_small_patch16_224"
    size = {"depth": 1, "num_heads": 2}
    teacher = FrozenTeacher(timm_backbone(name, kwargs=size | {"embed_dim": teacher_dim}))
    student = StudentWithHeads(
        timm_backbone(name, kwargs=size | {"embed_dim": student_dim}), teacher.widths, {"pooled", "tokens"}
    )
    images = random_images(3, 32)
    terms = total_loss(student(images), teacher(images), {"cls": 1.0, "patch": 1.0})
    assert torch.isfinite(terms["loss"])


def test_nothing_learnable_stands_on_the_teachers_side():
    # a learnable map of the teacher lets both sides shrink to a constant
    teacher = frozen("test_resnet", image_size=64)
    student = StudentWithHeads(timm_backbone("test_vit"), teacher.widths, {"pooled", "tokens"})
    images = random_images(6, 64)
    teacher.gather_statistics([images])
    before = teacher(images)
    optimizer = torch.optim.AdamW([p for m in (student, teacher) for p in m.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        out, target = student(images), align_teacher(teacher(images), student.student.grid)
        loss = total_loss(out, target, {"cls": 1.0, "patch": 1.0})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = teacher(images)
    assert torch.equal(before.pooled, after.pooled) and torch.equal(before.tokens, after.tokens)
    assert losses[-1] < 0.7 * losses[0]
    assert student(images).pooled.std(0).mean() > 0.3  # not collapsed: unit targets


def test_features_cannot_be_changed_after_the_fact():
    features = Features(torch.zeros(1, 2), torch.zeros(1, 4, 2), (2, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        features.pooled = torch.ones(1, 2)
