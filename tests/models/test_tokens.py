"""Models that give an image feature and no patch tokens."""

from types import SimpleNamespace

import pytest
import timm
import torch
from caches import MEAN, STD, make_test_cache
from teachers import images_plan, live_teacher, run_pass, teacher_plan
from torch import nn

from distillery.losses.targets import FrozenTeacher, Targets
from distillery.losses.total import check_gradients, check_tokens, total_loss
from distillery.models.backbone import Backbone, ModelSpec, build_backbone
from distillery.models.builders import BuiltModel
from distillery.models.pair import StudentWithHeads, align
from distillery.models.weights import weights_hash
from distillery.system.errors import UserError
from distillery.teacher_cache.problems import find_teacher_problems
from distillery.teacher_cache.reader import TeacherCache
from distillery.training.bindings import teacher_hash
from distillery.training.trained import check_teacher

DATA = {"data_mean": MEAN, "data_std": STD}


class ForwardAlone(nn.Module):
    """Nothing but forward, which does more than run the layers."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.stem, self.out = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 5)

    def forward(self, images):
        return self.out(self.stem(images).relu().mean((2, 3)))


class FeaturesPooled(ForwardAlone):
    def forward_features(self, images):
        return self.forward(images)

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else x[:, :2]


class Classifier(ForwardAlone):
    """Its forward may well give logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = self.out, None

    def forward(self, images):
        return self.fc(self.stem(images).relu().mean((2, 3)))


def backbone(model: nn.Module, **changes) -> Backbone:
    return Backbone(BuiltModel(model, (8, 8)), label="my model", **DATA, **changes).eval()


def images(batch: int = 8, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [ForwardAlone, FeaturesPooled])
def test_a_feature_alone_is_the_pooled_one_and_there_are_no_tokens(kind):
    found = backbone(kind())
    features = found(images())
    assert (found.token_width, found.widths, features.tokens) == (None, {"pooled": 5}, None)
    assert torch.equal(features.pooled, found.model(images()))
    assert torch.equal(backbone(kind(), use_cls_token=False)(images()).pooled, features.pooled)


def test_logits_beside_a_feature_alone_are_those_of_its_head():
    assert backbone(FeaturesPooled(), with_logits=True).num_classes == 2
    with pytest.raises(UserError, match="my model has no classifier"):
        backbone(ForwardAlone(), with_logits=True)


def test_what_may_be_logits_is_no_feature():
    with pytest.raises(UserError, match="running its layers one by one|its layers do not run one by one"):
        backbone(Classifier())


@pytest.mark.parametrize("name, size", [("pit_ti_224", 224), ("crossvit_tiny_240", 240)])
def test_timm_models_without_patch_tokens_give_their_own_feature(name, size):
    torch.manual_seed(0)
    spec = ModelSpec(source="timm", name=name, pretrained=False, mean=MEAN, std=STD)
    found = build_backbone(spec, image_size=size, **DATA)
    assert found.token_width is None
    with torch.no_grad():
        expected = found.eval().model(images(1, size))
        assert torch.allclose(found(images(1, size)).pooled, expected, atol=1e-5)


@pytest.mark.parametrize("standardise", [True, "phi_s"])
@pytest.mark.parametrize("models", [("none", "tokens"), ("tokens", "none"), ("none", "none")])
def test_either_model_may_lack_tokens_where_no_loss_compares_them(models, standardise):
    made = {"none": lambda: backbone(ForwardAlone()), "tokens": lambda: live_teacher().backbone}
    teacher, own = (made[kind]() for kind in models)
    teacher = FrozenTeacher(teacher, standardise)
    teacher.gather_statistics([images(32)])
    student = StudentWithHeads(own.requires_grad_(True), teacher.widths, {"pooled"})
    terms = total_loss(*align(student(images()), teacher(images())), {"cls": 1.0})
    assert check_gradients(terms, student.student.parameters())["loss/cls"] > 1e-4


def test_a_loss_on_tokens_says_what_to_leave_out():
    weights = {"cls": 1.0, "patch": 0.5}
    for role in ("teacher", "student"):
        with pytest.raises(UserError, match=f"the {role} gives no patch tokens, .*leave patch out of distill_loss_w"):
            check_tokens(backbone(ForwardAlone()), role, weights, "auto")
    alone = {"cls": 1.0, "patch": 0.0}
    check_tokens(backbone(ForwardAlone()), "teacher", alone, "auto")
    with pytest.raises(UserError, match="teacher_cache.tokens is pca, and the teacher gives no patch tokens"):
        check_tokens(backbone(ForwardAlone()), "teacher", alone, "pca")
    with pytest.raises(UserError, match=r"a loss compares tokens, which the student does not give \(it gives"):
        StudentWithHeads(backbone(ForwardAlone()), {"pooled": 4, "tokens": 4}, {"tokens"})


def test_the_outputs_of_such_a_teacher_are_stored_and_read(tmp_path):
    make_test_cache(tmp_path, 16, bad=(3,))
    teacher = live_teacher()
    teacher = type(teacher)(backbone(ForwardAlone()), teacher.augmentation, 0, torch.device("cpu"), "fp32")
    plan = teacher_plan(images_plan(tmp_path, 16), teacher)
    run_pass(plan, teacher)
    cache = TeacherCache(plan.directory)
    assert cache.widths == {"pooled": 5} and cache.grid is None
    assert {name: len(value) for name, value in cache.statistics.items()} == {"pooled_mean": 5, "pooled_std": 5}
    assert not list(find_teacher_problems(plan.directory))


# ---- attention pooling beside a class token


def attention_pooled(**changes) -> Backbone:
    torch.manual_seed(0)
    kwargs = {"embed_dim": 48, "depth": 2, "num_heads": 2}
    spec = ModelSpec(source="timm", name="vit_pe_core_tiny_patch16_384", pretrained=False, kwargs=kwargs, mean=MEAN,
                     std=STD, **changes)  # fmt: skip
    return build_backbone(spec, image_size=64, **DATA).eval()


def test_an_attention_pooling_beside_a_class_token_gives_the_image_feature():
    model = attention_pooled()
    with torch.no_grad():
        features = model(images(2, 64))
        assert torch.allclose(features.pooled, model.model(images(2, 64)), atol=1e-5)
        mean = attention_pooled(use_cls_token=False)(images(2, 64))
    assert torch.allclose(mean.pooled, mean.tokens.mean(1), atol=1e-5)
    assert torch.allclose(features.tokens, mean.tokens, atol=1e-5)


def test_timms_map_pooling_with_a_class_token_too():
    torch.manual_seed(0)
    kwargs = {"global_pool": "map", "depth": 1, "embed_dim": 32, "num_heads": 2}
    spec = ModelSpec(source="timm", name="vit_tiny_patch16_224", pretrained=False, kwargs=kwargs, mean=MEAN, std=STD)
    model = build_backbone(spec, image_size=32, **DATA).eval()
    assert model.pooling == "attention"
    with torch.no_grad():
        assert torch.allclose(model(images(2, 32)).pooled, model.model(images(2, 32)), atol=1e-5)


def test_a_students_attention_pooling_is_trained():
    student = StudentWithHeads(attention_pooled(), {"pooled": 8}, {"pooled"})
    assert not [name for name in student.unreached if "attn_pool" in name]


def test_only_models_pooled_by_attention_say_so_in_what_identifies_their_outputs(tmp_path):
    teacher, plans = live_teacher(), {}
    for kind, found in {"attention": attention_pooled(), "usual": teacher.backbone}.items():
        one = type(teacher)(found, teacher.augmentation, 0, torch.device("cpu"), "fp32")
        plans[kind] = teacher_plan(images_plan(tmp_path, 16), one).spec.resolved
    assert plans["attention"]["pooling"] == "attention" and "pooling" not in plans["usual"]
    assert attention_pooled(use_cls_token=False).pooling is None


def test_outputs_stored_before_with_the_class_token_are_not_mixed_with_the_pooled_feature(tmp_path):
    teacher = FrozenTeacher(attention_pooled())
    found = weights_hash(teacher.backbone.model)
    stored = {"before": {}, "now": {"pooling": "attention"}}
    before, now = (
        SimpleNamespace(weights_hash=found, directory=tmp_path, identity={"resolved": resolved})
        for resolved in stored.values()
    )
    with pytest.raises(
        UserError, match="hold the teacher's class token, .* attention pooling. Store its outputs again"
    ):
        teacher_hash(teacher, before)
    assert teacher_hash(teacher, now) == teacher_hash(teacher, None) == teacher_hash(Targets({}, True), now)
    assert teacher_hash(teacher, None) != found  # a run that was started on the class token is not gone on with
    usual = FrozenTeacher(live_teacher().backbone)
    assert teacher_hash(usual, None) == weights_hash(usual.backbone.model)
    # what is made of a run afterwards compares the same
    for of in (teacher, usual):
        check_teacher(of.backbone, {tmp_path / "step.pt": {"teacher_hash": teacher_hash(of, None)}})
    with pytest.raises(UserError, match="trained towards a teacher of other weights"):
        check_teacher(teacher.backbone, {tmp_path / "step.pt": {"teacher_hash": found}})


def test_no_plain_vision_transformer_is_pooled_by_attention():
    names = ["test_vit", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224"]
    for name in names:
        spec = ModelSpec(source="timm", name=name, pretrained=False, kwargs={"depth": 1})
        built = build_backbone(spec, image_size=28, **DATA)
        assert built.pooling is None, name
    assert timm.create_model("vit_base_patch16_siglip_224", depth=1).attn_pool is not None
    spec = ModelSpec(source="timm", name="vit_base_patch16_siglip_224", pretrained=False, kwargs={"depth": 1})
    siglip = build_backbone(spec, image_size=32, **DATA)
    assert siglip.pooling is None  # it has no class token: pooled is the same as ever
