import pytest
import torch
from torch import nn

from distillery.models.adapters import choose_adapter
from distillery.models.backbone import Backbone, ModelSpec, build_backbone
from distillery.models.builders import BuiltModel
from distillery.system.errors import UserError

DATA = {"data_mean": (0.5, 0.5, 0.5), "data_std": (0.25, 0.25, 0.25)}
TORCHVISION = [
    "resnet18",
    "mobilenet_v3_small",
    "densenet121",
    "squeezenet1_1",
    "mnasnet0_5",
    "shufflenet_v2_x0_5",
    "regnet_x_400mf",
    "swin_t",
    "convnext_tiny",
    "googlenet",
]


def wrapped(model: nn.Module, size: tuple[int, int] = (32, 32), **changes) -> Backbone:
    return Backbone(BuiltModel(model, size), label="my model", **DATA, **changes)


def random_images(batch: int, size: int) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", TORCHVISION)
def test_a_torchvision_network_gives_its_own_map_and_logits(name):
    torch.manual_seed(0)
    kwargs = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    spec = ModelSpec(source="torchvision", name=name, pretrained=False, with_logits=True, kwargs=kwargs,
                     mean=DATA["data_mean"], std=DATA["data_std"])  # fmt: skip
    backbone = build_backbone(spec, image_size=64, **DATA).eval()
    images = random_images(2, 64)
    with torch.no_grad():
        features = backbone(images)
        assert torch.allclose(features.logits, backbone.model(images), rtol=1e-4, atol=1e-5)
    assert features.tokens.shape == (2, backbone.grid[0] * backbone.grid[1], backbone.token_width)
    assert torch.allclose(features.pooled, features.tokens.mean(1), atol=1e-5)
    assert backbone.num_classes == 1000 and backbone.mean == DATA["data_mean"]


def test_torchvisions_vision_transformer_gives_its_class_token_or_the_mean():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=24, mlp_dim=32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # torchvision leaves it zero
    images = random_images(2, 32)
    backbone = wrapped(model, with_logits=True).eval()
    with torch.no_grad():
        features = backbone(images)
        assert torch.allclose(features.logits, model(images), atol=1e-6)
        assert torch.allclose(model.heads(features.pooled), features.logits, atol=1e-6)
        mean = wrapped(model, use_cls_token=False).eval()(images)
    assert backbone.grid == (2, 2) and torch.allclose(mean.pooled, features.tokens.mean(1), atol=1e-6)


class Conv(nn.Module):
    """The smallest hub model with forward_features alone."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 8, 8)

    def forward_features(self, images):
        return self.conv(images)


def test_a_hub_model_with_a_feature_map_alone_is_averaged():
    backbone = wrapped(Conv())
    features = backbone(random_images(2, 32))
    assert (backbone.grid, backbone.pooled_width) == ((4, 4), 6)
    assert torch.allclose(features.pooled, features.tokens.mean(1), atol=1e-6)
    with pytest.raises(UserError, match="has no classifier"):
        wrapped(Conv(), with_logits=True)


class Dino2(Conv):
    """DINOv2's dictionary, with a mask token and registers that are not asked for."""

    patch_size = 8

    def forward_features(self, images):
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        return {"x_norm_clstoken": tokens[:, 0] + 7, "x_norm_patchtokens": tokens, "x_prenorm": None, "masks": None}


def test_dinov2s_dictionary_is_read():
    images = random_images(2, 32)
    backbone = wrapped(Dino2())
    features = backbone(images)
    assert backbone.grid == (4, 4)
    assert torch.allclose(features.pooled, features.tokens[:, 0] + 7)
    averaged = Backbone(BuiltModel(backbone.model, (32, 32)), label="x", **DATA, use_cls_token=False)(images)
    assert torch.allclose(averaged.pooled, features.tokens.mean(1), atol=1e-6)


class Dino1(nn.Module):
    """DINO's first hub models: forward gives the class token, get_intermediate_layers all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 8, 8)

    def get_intermediate_layers(self, images, n=1):
        patches = self.conv(images).flatten(2).transpose(1, 2)
        return [torch.cat([patches.sum(1, keepdim=True), patches], dim=1)] * n


def test_dinos_first_models_give_the_tokens_of_their_last_layer():
    images = random_images(2, 32)
    features = wrapped(Dino1())(images)
    assert features.tokens.shape == (2, 16, 6)
    assert torch.allclose(features.pooled, features.tokens.sum(1), atol=1e-5)


class ChannelsLast(Conv):
    num_features = 6

    def forward_features(self, images):
        return self.conv(images).permute(0, 2, 3, 1)


def test_a_map_with_its_channels_last_is_turned():
    model = ChannelsLast()
    images = random_images(2, 32)
    features = wrapped(model)(images)
    assert torch.allclose(features.tokens, model.conv(images).flatten(2).transpose(1, 2), atol=1e-6)


class Returns(Conv):
    def __init__(self, value) -> None:
        super().__init__()
        self.value = value

    def forward_features(self, images):
        return self.value(self.conv(images))


@pytest.mark.parametrize(
    "value, message",
    [
        (lambda x: [x, x], r"my model: Returns.forward_features returned list: it needs forward_features\(images\) ->"),
        (lambda x: x.mean((1, 2, 3)), r"forward_features returned \[1\]: it needs"),
        (lambda x: {"x": x}, "forward_features returned dict"),
        (lambda x: x / 0 @ x[0], r"my model fails on an input of 30x40 px: RuntimeError.*student_img_size"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_is_needed(value, message):
    with pytest.raises(UserError, match=message):
        wrapped(Returns(value), (30, 40))


class ResNetLike(nn.Module):
    def __init__(self, hidden_relu: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, 2, 1)
        self.bn1 = nn.BatchNorm2d(6)
        self.layer1 = nn.Conv2d(6, 9, 3, 2, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(9, 4)
        self.hidden_relu = hidden_relu

    def forward(self, images):
        x = self.bn1(self.conv1(images))
        x = self.layer1(x.relu() if self.hidden_relu else x)
        return self.fc(self.avgpool(x).flatten(1))


def test_a_hub_model_whose_layers_run_in_order_is_cut_before_its_pooling():
    torch.manual_seed(0)
    model = ResNetLike()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    backbone = wrapped(model, with_logits=True).eval()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # batch-norm statistics too
    images = random_images(2, 32)
    features = backbone(images)
    assert (backbone.grid, backbone.token_width, backbone.num_classes) == ((8, 8), 9, 4)
    assert torch.allclose(features.logits, model(images), atol=1e-6)


def test_a_hub_model_that_does_more_than_run_its_layers_is_refused_and_not_misread():
    torch.manual_seed(0)
    with pytest.raises(UserError, match="running its layers one by one gives another result than its forward"):
        wrapped(ResNetLike(hidden_relu=True))


def test_a_model_without_layers_to_cut_is_refused():
    with pytest.raises(UserError, match="its layers do not run one by one"):
        wrapped(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)))


def test_the_model_is_handed_in_at_every_call_so_that_copies_are_their_own():
    first, second = Conv().eval(), Conv().eval()
    adapter = choose_adapter(first, (32, 32))
    images = random_images(1, 32)
    assert torch.equal(adapter(second, images, True, False).spatial, second.conv(images))
