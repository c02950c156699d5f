import copy

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from distillery.losses.total import total_loss
from distillery.models.backbone import Backbone, ModelSpec, build_backbone
from distillery.models.builders import BuiltModel
from distillery.models.gradient_checkpointing import use_gradient_checkpointing
from distillery.models.pair import StudentWithHeads
from distillery.system.errors import UserError

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
# timm's own way; torchvision's models, which have none: blocks in stages, and blocks one level deeper
MODELS = ["test_vit", "test_resnet", "test_efficientnet", "resnet18", "torchvision ViT"]
# networks that overwrite what enters a layer, in blocks, in long sequences of plain layers, and without any sequence
INPLACE = [("torchvision", "regnet_x_400mf"), ("torchvision", "squeezenet1_1"), ("torchvision", "mnasnet0_5"),
           ("torchvision", "shufflenet_v2_x0_5"), ("torchvision", "densenet121"), ("timm", "dla46_c")]  # fmt: skip


def backbone_of(name: str, checkpointing: bool) -> Backbone:
    if name == "torchvision ViT":
        model = VisionTransformer(32, 16, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)
        if checkpointing:
            use_gradient_checkpointing(model, name)
        return Backbone(BuiltModel(model, (32, 32)), label=name, data_mean=MEAN, data_std=STD)
    source = "torchvision" if name == "resnet18" else "timm"
    spec = ModelSpec(source=source, name=name, pretrained=False, gradient_checkpointing=checkpointing)
    return build_backbone(spec, data_mean=MEAN, data_std=STD, image_size=32)


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


class Block(nn.Module):
    """Takes a list and a number, overwrites what is in the list, drops at random and returns both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.5)

    def forward(self, maps: list[torch.Tensor], scale: float, *, overwrite: bool) -> tuple[list[torch.Tensor], float]:
        x = maps[-1].mul_(2).relu_() if overwrite else maps[-1]
        return [*maps, self.drop(self.conv(x)) * scale], scale


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 4, 4), nn.ModuleList(Block() for _ in range(3))

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        maps, scale = [self.stem(images)], 0.5
        for block in self.blocks:
            maps, scale = block(maps, scale, overwrite=True)
        return maps[-1]


class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, 2, 1)]
        for _ in range(4):
            layers += [nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.3)]
        self.features = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images).mean((2, 3))


class Broken(Vgg):
    """Its own way, as timm spells it, is wrong."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features(images)
        return x.detach() * self.features[0].weight.sum() if getattr(self, "grad_checkpointing", False) else x


class Random(Vgg):
    """Another function at every call: nothing computed again is the same."""

    calls = 0

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return self.features(images) * self.calls


def gradients_of(model: nn.Module, backbone: Backbone) -> list[torch.Tensor]:
    for part in model.modules():
        part.train(not isinstance(part, nn.BatchNorm2d))
    torch.manual_seed(3)
    features = backbone(images())
    loss = features.tokens.square().sum() + features.pooled.sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def both_gradients(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    backbone = Backbone(BuiltModel(model, (32, 32)), label="x", data_mean=MEAN, data_std=STD)
    expected = gradients_of(model, backbone)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    use_gradient_checkpointing(model, "x", backbone.outputs_of_noise)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return expected, gradients_of(model, backbone)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(a, b, strict=True))


@pytest.mark.parametrize("source, name", INPLACE)
def test_layers_that_overwrite_their_input_get_the_same_gradients(source, name):
    torch.manual_seed(0)
    spec = ModelSpec(source=source, name=name, pretrained=False)
    built = build_backbone(spec, data_mean=MEAN, data_std=STD, image_size=64)
    assert same(*both_gradients(built.model))


@pytest.mark.parametrize("kind", [Lists, Vgg, Broken])
def test_blocks_of_any_signature_get_the_same_gradients_and_run_again(kind):
    torch.manual_seed(0)
    model = kind()
    assert same(*both_gradients(model))
    runs = []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    layers[2].register_forward_hook(lambda *_: runs.append(1))
    backbone = Backbone(BuiltModel(model, (32, 32)), label="x", data_mean=MEAN, data_std=STD)
    runs.clear()
    gradients_of(model, backbone)
    assert len(runs) == 2  # forward, and again going backward


def test_a_model_whose_gradients_would_change_is_refused():
    with pytest.raises(UserError, match="x: computing its blocks again gives other gradients: set gradient_checkp"):
        both_gradients(Random())


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
