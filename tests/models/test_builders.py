import pickle
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VisionTransformer

from distillery.config.keys_model import ModelConfig
from distillery.models import configured
from distillery.models.backbone import ModelSpec, build_backbone
from distillery.models.builders import patch_size_of, round_to_patch
from distillery.models.configured import download_weights
from distillery.models.weights import load_weights
from distillery.system.errors import MissingFileError, UserError

DATA = {"data_mean": (0.5, 0.5, 0.5), "data_std": (0.25, 0.25, 0.25), "image_size": 32}
HUBCONF = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.conv = nn.Conv2d(3, width, 4, 4)
            self.head = nn.Linear(width, 5)
        def forward_features(self, images): return self.conv(images)
        def forward_head(self, x, pre_logits=False):
            x = x.mean((2, 3))
            return x if pre_logits else self.head(x)

    def tiny_net(pretrained=False, width=6):
        net = Net(width)
        if pretrained:
            nn.init.ones_(net.conv.weight)
        return net

    def always_trained(width=6): return tiny_net(True, width)
    def not_a_model(pretrained=False): return [1, 2]
    def offline(pretrained=False): raise OSError("no route to host")
    def half(pretrained=False): return tiny_net().half()
    def bfloat16(pretrained=False): return tiny_net().to(torch.bfloat16)
    def double(pretrained=False): return tiny_net().double()
    def on_meta(pretrained=False): return tiny_net().to("meta")
    def lazy(pretrained=False):
        net = Net(6)
        net.conv = nn.LazyConv2d(6, 4, 4)
        return net
    def grey(pretrained=False):
        net = Net(6)
        net.conv = nn.Conv2d(1, 6, 4, 4)
        return net
    def of_64_px(pretrained=False):
        net = Net(6)
        fixed = nn.Flatten(1), nn.Linear(6 * 16 * 16, 6), nn.Unflatten(1, (6, 1, 1))
        net.conv = nn.Sequential(nn.Conv2d(3, 6, 4, 4), *fixed)
        return net
    def needs_a_package(pretrained=False):
        net = Net(6)
        net.conv.register_forward_hook(lambda *_: __import__("no_such_package"))
        return net
    def needs_one_to_be_built(pretrained=False): import no_such_package
    def not_numbers(pretrained=False): return nn.Identity()
    def strides_14(pretrained=False):
        net = Net(6)
        net.patch_size = 14
        return net
"""


@pytest.fixture
def hub(tmp_path) -> str:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(textwrap.dedent(HUBCONF))
    return str(tmp_path / "hub")


def from_hub(repo: str, name: str = "tiny_net", **changes):
    torch.manual_seed(0)
    data = {key: changes.pop(key, value) for key, value in DATA.items()}
    spec = ModelSpec(**{"source": "torch_hub", "repo": repo, "name": name, "pretrained": False} | changes)
    return build_backbone(spec, **data)


def from_timm(name: str, **changes):
    torch.manual_seed(0)
    data = {key: changes.pop(key, value) for key, value in DATA.items()}
    return build_backbone(ModelSpec(**{"source": "timm", "name": name, "pretrained": False} | changes), **data)


# ---- torch.hub


def test_a_local_hub_folder_is_a_source(hub, monkeypatch):
    backbone = from_hub(hub, with_logits=True)
    assert (backbone.grid, backbone.pooled_width, backbone.num_classes) == ((8, 8), 6, 5)
    assert backbone.mean == DATA["data_mean"] and backbone.std == DATA["data_std"]  # it states none of its own
    assert from_hub(hub, kwargs={"width": 9}).token_width == 9
    assert from_hub(hub, pretrained=True).model.conv.weight.eq(1).all()
    assert not from_hub(hub).model.conv.weight.eq(1).all()
    monkeypatch.setenv("MY_HUB", hub)
    assert from_hub("$MY_HUB").grid == (8, 8)


def test_an_entry_point_that_takes_no_pretrained_is_called_without_it(hub):
    assert from_hub(hub, "always_trained", pretrained=True).model.conv.weight.eq(1).all()


def test_a_hub_models_input_is_rounded_to_the_patch_it_states(hub):
    assert from_hub(hub, "strides_14").img_size == (28, 28)
    with pytest.raises(UserError, match="32 px is no multiple of its patch of 14 px"):
        from_hub(hub, "strides_14", img_size=32)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("tiny_nte", {}, "unknown torch_hub model 'tiny_nte' of .*; nearest: tiny_net"),
        ("zzz", {}, "unknown torch_hub model 'zzz' of .*; known: tiny_net, always_trained"),
        ("not_a_model", {}, "returned a list, not a torch.nn.Module"),
        ("tiny_net", {"kwargs": {"widht": 3}}, r"does not take teacher_kwargs or student_kwargs \{'widht': 3\}"),
        (
            "offline",
            {"pretrained": True},
            "no pretrained weights: OSError: no route to host. .*--download_only",
        ),
        ("offline", {}, "could not be built: OSError: no route to host"),
        ("tiny_net", {"repo": None}, "set teacher_repo or student_repo"),
        ("on_meta", {}, "is on the meta device, without weights"),
        ("lazy", {}, "has lazy layers, whose shapes are not known yet: run it once"),
        ("not_numbers", {}, "has no parameters"),
        (
            "needs_one_to_be_built",
            {"pretrained": True},
            "could not be built: ModuleNotFoundError.*Install that package",
        ),
        ("tiny_net", {"repo": "/nowhere/at/all"}, "/nowhere/at/all is no folder, and '/nowhere/at/all' no owner/name"),
        ("tiny_net", {"repo": "."}, "there is no hubconf.py in"),
        ("tiny_net", {"repo": "$NOT_SET_ANYWHERE/x"}, "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_what_a_hub_cannot_give_is_said(hub, tmp_path, monkeypatch, name, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        from_hub(**{"repo": hub, "name": name, **changes})


@pytest.mark.parametrize("name", ["half", "bfloat16", "double"])
def test_a_model_of_another_precision_is_cast_to_float32(hub, name, tmp_path):
    backbone = from_hub(hub, name)
    assert {value.dtype for value in backbone.model.state_dict().values()} == {torch.float32}
    torch.save({k: v + 1e-5 for k, v in backbone.model.state_dict().items()}, tmp_path / "w.pt")
    loaded = from_hub(hub, name, checkpoint=tmp_path / "w.pt").model.state_dict()
    assert torch.equal(loaded["conv.weight"], backbone.model.state_dict()["conv.weight"] + 1e-5)


@pytest.mark.parametrize(
    "name, message",
    [
        ("grey", "RuntimeError: Given groups=1, weight of size.*the input size is not the reason"),
        ("needs_a_package", "ModuleNotFoundError: No module named 'no_such_package'. Install that package here"),
    ],
)
def test_advice_on_the_input_size_is_not_given_where_it_would_not_help(hub, name, message):
    with pytest.raises(UserError, match=f"(?i)'{name}' fails on an input of 32x32 px: {message}") as caught:
        from_hub(hub, name)
    assert "img_size" not in str(caught.value) and len(str(caught.value)) < 500


def test_advice_on_the_input_size_is_one_that_works(hub):
    with pytest.raises(UserError, match="fails on an input of 32x32 px.*It takes 64x64 px: set teacher_img_size or"):
        from_hub(hub, "of_64_px")
    assert from_hub(hub, "of_64_px", img_size=64).img_size == (64, 64)


def test_a_repository_that_cannot_be_reached_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise RuntimeError("It looks like there is no internet connection")

    monkeypatch.setattr(torch.hub, "load", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"on GitHub \(no folder of that name is here\).*no internet.*--download_only"):
        from_hub("facebookresearch/dinov2:main", "dinov2_vits14")


# ---- timm and torchvision


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source": "tim"}, "unknown model source 'tim'; known: timm, torchvision, torch_hub"),
        ({"name": "vit_smal_patch16_224"}, "unknown timm model 'vit_smal_patch16_224'; nearest: vit_small_patch16_224"),
        ({"name": "vit_base_patch14_dinov2.lvd142"}, "nearest: vit_base_patch14_dinov2.lvd142m"),
        ({"source": "torchvision", "name": "resnet_18"}, "unknown torchvision model 'resnet_18'; nearest: resnet18"),
        ({"name": "test_vit", "kwargs": {"dept": 2}}, r"does not take teacher_kwargs or student_kwargs.*'dept'"),
        ({"source": "torchvision", "name": "resnet18", "kwargs": {"dept": 2}}, "does not take teacher_kwargs"),
        (
            {"source": "torchvision", "name": "resnet18", "kwargs": {"weights": "IMAGENET"}},
            "unknown weights 'IMAGENET' of torchvision model 'resnet18'; .*IMAGENET1K_V1",
        ),
        (
            {"source": "torchvision", "name": "alexnet", "image_size": 16},
            "fails on an input of 16x16 px: RuntimeError.*It takes 224x224 px: set teacher_img_size",
        ),
        ({"name": "dla46_c", "image_size": 100}, "fails on an input of 100x100 px.*student_img_size to a size it"),
        (
            {"name": "nest_tiny", "image_size": 50},
            "could not be built: AssertionError.*Check its kwargs",
        ),
    ],
)
def test_what_timm_and_torchvision_do_not_know_is_answered_with_what_is_near(changes, message):
    with pytest.raises(UserError, match=message):
        from_timm(**{"name": "test_vit", **changes})


def test_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="no pretrained weights: OSError: We couldn't connect.*teacher_checkpoint"):
        from_timm("test_vit", pretrained=True)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="torchvision model 'resnet18': no pretrained weights.*--download_only"):
        from_timm("resnet18", source="torchvision", pretrained=True)
    with pytest.raises(UserError, match="torchvision model 'vit_b_16': no pretrained weights"):
        from_timm("vit_b_16", source="torchvision", pretrained=True)


def test_drop_path_goes_only_to_models_that_take_it():
    drops = [m for m in from_timm("test_vit", drop_path_rate=0.3).modules() if type(m).__name__ == "DropPath"]
    assert max(m.drop_prob for m in drops) == pytest.approx(0.3)
    assert from_timm("ghostnet_050", drop_path_rate=0.3).grid == (1, 1)
    chosen = from_timm("test_vit", drop_path_rate=0.3, kwargs={"drop_path_rate": 0.2})
    assert max(m.drop_prob for m in chosen.modules() if type(m).__name__ == "DropPath") == pytest.approx(0.2)


def test_the_normalisation_is_the_models_own_unless_stated():
    assert from_timm("test_vit").mean == (0.5, 0.5, 0.5)
    assert from_timm("resnet18", source="torchvision").std == (0.229, 0.224, 0.225)
    stated = from_timm("test_vit", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert (stated.mean, stated.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))


def test_a_torchvision_transformer_is_rounded_to_its_patch():
    assert from_timm("vit_b_32", source="torchvision", image_size=50).img_size == (64, 64)
    with pytest.raises(UserError, match="40 px is no multiple of its patch of 32 px"):
        from_timm("vit_b_32", source="torchvision", img_size=40)


def test_rounding_takes_the_nearest_multiple_and_at_least_one_patch():
    assert [round_to_patch(n, (14, 14))[0] for n in (1, 20, 21, 27, 28, 34, 35, 224, 518)] == [
        14, 14, 28, 28, 28, 28, 42, 224, 518,
    ]  # fmt: skip
    assert round_to_patch(32, (4, 16)) == (32, 32)


def test_patches_are_told_from_overlapping_and_convolutional_stems():
    assert patch_size_of(timm.create_model("test_vit")) == (16, 16)
    assert patch_size_of(timm.create_model("test_resnet")) is None
    assert patch_size_of(timm.create_model("pvt_v2_b0")) is None


# ---- local checkpoints


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("test_vit", num_classes=0, img_size=32)


def equal(model: nn.Module, state: dict) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "optimizer": {}},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.model.{k}": v for k, v in s.items()}},
        lambda s: {"student": s, "heads": {}, "progress": {"step": 7}},
    ],
)
def test_a_checkpoint_is_taken_out_of_its_wrappers(vit, tmp_path, wrap):
    torch.save(wrap(vit.state_dict()), tmp_path / "weights.pt")
    backbone = from_timm("test_vit", checkpoint=tmp_path / "weights.pt", pretrained=True)  # and nothing is downloaded
    assert equal(backbone.model, vit.state_dict())


def test_safetensors_and_paths_with_variables_are_read(vit, tmp_path, monkeypatch):
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    assert equal(from_timm("test_vit", checkpoint="$WEIGHTS/model.safetensors").model, vit.state_dict())


def test_position_embeddings_are_resampled_to_the_input(tmp_path):
    large = timm.create_model("test_vit", num_classes=0, img_size=64)
    torch.save(large.state_dict(), tmp_path / "large.pt")
    backbone = from_timm("test_vit", checkpoint=tmp_path / "large.pt")
    assert backbone.grid == (2, 2) and backbone.model.pos_embed.shape != large.pos_embed.shape
    assert torch.equal(backbone.model.blocks[0].attn.qkv.weight, large.blocks[0].attn.qkv.weight)
    small, big = (VisionTransformer(s, 16, 1, 2, 24, 32, num_classes=5) for s in (32, 64))
    nn.init.ones_(big.encoder.pos_embedding)
    torch.save(big.state_dict(), tmp_path / "tv.pt")
    load_weights(small, tmp_path / "tv.pt")
    assert torch.allclose(small.encoder.pos_embedding, torch.ones(1, 5, 24))


@pytest.mark.parametrize("classes_in_file", [0, 7, 1000])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_only_the_classifier_may_differ_and_only_where_no_logits_are_wanted(name, classes_in_file, tmp_path):
    model = timm.create_model(name, num_classes=classes_in_file, **({"img_size": 32} if name == "test_vit" else {}))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    backbone = from_timm(name, checkpoint=tmp_path / "weights.pt")
    assert equal(backbone.model, model.state_dict())
    wanted = {"checkpoint": tmp_path / "weights.pt", "with_logits": True}
    if classes_in_file == 1000:
        assert equal(from_timm(name, **wanted).model, model.state_dict())
    else:
        with pytest.raises(UserError, match="does not fit the model: .*(missing|another shape)"):
            from_timm(name, **wanted)


def test_a_checkpoint_without_the_projection_is_refused_where_it_is_wanted(tmp_path):
    weights = timm.create_model("test_vit", num_classes=24, img_size=32).state_dict()
    path = tmp_path / "weights.pt"
    spec = ModelSpec(source="timm", name="test_vit", pretrained=False, checkpoint=path, projection=True,
                     kwargs={"num_classes": 24})  # fmt: skip
    torch.save(weights, path)
    assert torch.equal(build_backbone(spec, **DATA).model.head.weight, weights["head.weight"])
    torch.save({name: value for name, value in weights.items() if not name.startswith("head.")}, path)
    with pytest.raises(UserError, match=r"2 of its \d+ tensors missing \(head.bias, head.weight\)"):
        build_backbone(spec, **DATA)


def test_a_hub_models_checkpoint_may_have_other_classes(hub, tmp_path):
    state = from_hub(hub).model.state_dict()
    other = {k: torch.zeros(9, *v.shape[1:]) if k.startswith("head") else v + 1 for k, v in state.items()}
    torch.save(other, tmp_path / "w.pt")
    loaded = from_hub(hub, checkpoint=tmp_path / "w.pt").model
    assert torch.equal(loaded.conv.weight, other["conv.weight"]) and loaded.head.weight.shape == (5, 6)


def test_weights_of_another_model_are_refused_by_name(vit, tmp_path):
    def refused(state: dict, message: str) -> None:
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(UserError, match=message):
            load_weights(vit, tmp_path / "w.pt")

    good = vit.state_dict()
    refused({k: v for k, v in good.items() if k != "norm.weight"}, r"1 of its \d+ tensors missing \(norm.weight\), 0 ")
    refused(good | {"extra": torch.ones(1)}, r"0 of its \d+ tensors missing, 1 unexpected \(extra\)")
    refused(good | {"norm.weight": torch.ones(3)}, r"1 of another shape \(norm.weight \[3\] for \[64\]\)")
    refused(timm.create_model("test_resnet").state_dict(), "does not fit the model")
    refused({}, "does not fit the model")


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_file_that_is_no_weights_file_is_refused_and_never_run(vit, tmp_path):
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "marker"), protocol=2))
    torch.save(Malicious(tmp_path / "marker"), tmp_path / "bad.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 100)
    for name in ("bad.pt", "bad.pth", "bad.safetensors"):
        with pytest.raises(UserError, match=f"{name} cannot be read as weights"):
            load_weights(vit, tmp_path / name)
    assert not (tmp_path / "marker").exists()
    with pytest.raises(MissingFileError, match="no checkpoint at .*nowhere.pt: check teacher_checkpoint"):
        load_weights(vit, tmp_path / "nowhere.pt")


def test_download_weights_builds_what_needs_the_network_and_says_what_is_here(hub, tmp_path, vit):
    torch.save(vit.state_dict(), tmp_path / "w.pt")
    teacher = {"teacher_source": "torch_hub", "teacher_repo": hub, "teacher_name": "tiny_net"}
    student = {"student_name": "test_vit", "student_pretrained": True, "student_checkpoint": str(tmp_path / "w.pt")}
    assert download_weights(ModelConfig(**teacher, **student)) == [
        "teacher: torch_hub tiny_net: weights are here",
        f"student: timm test_vit: checkpoint {tmp_path}/w.pt",
    ]
    with pytest.raises(UserError, match="unknown torch_hub model 'tiny'"):
        download_weights(ModelConfig(**teacher | {"teacher_name": "tiny"}))


def test_a_file_of_more_than_tensors_is_answered_in_one_plain_line(vit, tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(UserError) as caught:
        load_weights(vit, tmp_path / "whole.pt")
    for number, content in enumerate((b"version https://git-lfs.github.com/spec/v1\n", b"", b"<html>")):
        (tmp_path / f"{number}.pt").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as weights: torch.save has not written it, or not to its"):
            load_weights(vit, tmp_path / f"{number}.pt")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UserError, match="it holds more than tensors"):
        load_weights(vit, tmp_path / "script.pt")
    text = str(caught.value)
    assert "it holds more than tensors, which may be code. It must be .safetensors, or a state dict" in text
    assert "weights_only" not in text and "\x1b" not in text and "\n" not in text


def test_an_untrained_model_of_a_hub_repository_is_fetched_too(monkeypatch):
    built = []
    monkeypatch.setattr(configured, "build_model", lambda spec, image_size: built.append(spec.name))
    download_weights(ModelConfig(teacher_name="resnet18", student_name="hf-hub:me/small", student_pretrained=False))
    assert built == ["resnet18", "hf-hub:me/small"]
