import copy

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from distillery.backbones import BuiltModel, use_gradient_checkpointing
from distillery.losses import total_loss
from distillery.models import Backbone, build_backbone
from distillery.models_pair import StudentWithHeads
from distillery.process import UserError

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
# timm's own way; torchvision's models, which have none: blocks in stages, and blocks one level deeper
MODELS = ["test_vit", "test_resnet", "test_efficientnet", "resnet18", "torchvision ViT"]


def backbone_of(name: str, checkpointing: bool) -> Backbone:
    if name == "torchvision ViT":
        model = VisionTransformer(32, 16, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)
        if checkpointing:
            use_gradient_checkpointing(model, name)
        return Backbone(BuiltModel(model, (32, 32)), label=name, data_mean=MEAN, data_std=STD)
    source = "torchvision" if name == "resnet18" else "timm"
    return build_backbone(source=source, name=name, pretrained=False, data_mean=MEAN, data_std=STD, image_size=32,
                          gradient_checkpointing=checkpointing)  # fmt: skip


def student_of(name: str, checkpointing: bool) -> StudentWithHeads:
    torch.manual_seed(0)
    backbone = backbone_of(name, checkpointing)
    torch.manual_seed(1)
    return StudentWithHeads(backbone, {"pooled": 12, "tokens": 12}, {"pooled", "tokens"})


def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def gradients(student: StudentWithHeads) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)  # of dropout, should a model have any
    out = student(images())
    target = out.with_tensors({name: torch.ones_like(out.tensors()[name]) for name in ("pooled", "tokens")})
    total_loss(out, target, {"cls": 1.0, "patch": 1.0})["loss"].backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_and_blocks_run_twice(name):
    plain, checkpointed = (student_of(name, chosen) for chosen in (False, True))
    assert plain.unreached == checkpointed.unreached
    runs = []
    norms = [m for m in checkpointed.student.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)]
    norms[len(norms) // 2].register_forward_hook(lambda *_: runs.append(1))
    expected, found = gradients(plain), gradients(checkpointed)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[key], expected[key], rtol=1e-5, atol=1e-7) for key in expected)
    assert len(runs) == 2


@pytest.mark.parametrize("name", ["test_vit", "resnet18"])
def test_the_state_dict_is_the_same(name):
    plain, checkpointed = (student_of(name, chosen).state_dict() for chosen in (False, True))
    assert plain.keys() == checkpointed.keys()


def test_a_deep_copy_runs_its_own_weights():
    student = student_of("resnet18", checkpointing=True).eval()
    twin = copy.deepcopy(student)
    with torch.no_grad():
        before = twin(images()).pooled
        for parameter in student.parameters():
            parameter.zero_()
        assert torch.equal(twin(images()).pooled, before)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="my model has no sequence of layers .*gradient_checkpointing: false"):
        use_gradient_checkpointing(nn.Conv2d(3, 8, 3), "my model")
