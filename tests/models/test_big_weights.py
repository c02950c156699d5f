"""A big teacher goes straight into a low type: its memory is measured in a child process."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from distillery.models import big_weights
from distillery.models.backbone import ModelSpec, build_backbone
from distillery.models.big_weights import LowWeights
from distillery.models.weights import weights_hash

DATA = {"data_mean": (0.5,) * 3, "data_std": (0.2,) * 3, "image_size": 32}
LOW = LowWeights("bf16", torch.device("cpu"))
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 1024, "depth": 8, "num_heads": 8}


@pytest.fixture
def all_are_big(monkeypatch):
    monkeypatch.setattr(big_weights, "BIG_MODEL", 1)


def spec_of(name: str, checkpoint, **changes) -> ModelSpec:
    return ModelSpec(source="timm", name=name, pretrained=False, checkpoint=checkpoint, **changes)


def save(model: nn.Module, path) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        old = path.name == "old.pt"
        torch.save({"teacher": model.state_dict()}, path, _use_new_zipfile_serialization=not old)


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt", "old.pt"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "vit_tiny_patch16_dinov3_qkvb"])
def test_a_big_model_is_what_casting_the_usual_one_gives_to_the_last_bit(all_are_big, tmp_path, name, file):
    kwargs = {"embed_dim": 64, "depth": 2, "num_heads": 2} if "dinov3" in name else {}
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0, **kwargs)
    save(model, tmp_path / file)
    spec = spec_of(name, tmp_path / file, kwargs=kwargs)
    usual, big = build_backbone(spec, **DATA), build_backbone(spec, low=LOW, **DATA)
    digest = weights_hash(usual.model)
    usual.keep_in("bf16")
    assert (big.dtype, weights_hash(big.model)) == (torch.bfloat16, digest)
    for (key, a), (_, b) in zip(usual.model.named_parameters(), big.model.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), key
    for (key, a), (_, b) in zip(usual.model.named_buffers(), big.model.named_buffers(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), key
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = [model.requires_grad_(False).eval()(images).pooled for model in (usual, big)]
    assert torch.nn.functional.cosine_similarity(*map(torch.Tensor.float, outputs)).min() > 0.99999


def test_published_weights_of_timm_go_the_same_way(all_are_big, tmp_path, monkeypatch):
    model = timm.create_model("test_vit", num_classes=0)
    folder = tmp_path / "published"
    timm.models.save_for_hf(model, folder, model_config={"architecture": "test_vit", "num_classes": 0})
    spec = ModelSpec(source="timm", name=f"local-dir:{folder}", pretrained=True)
    big = build_backbone(spec, low=LOW, **DATA | {"image_size": 160})
    assert {parameter.dtype for parameter in big.model.parameters()} == {torch.bfloat16}
    assert weights_hash(big.model) == weights_hash(model)


def test_smaller_and_untrained_models_are_built_in_the_usual_way_and_draw_the_same_weights(tmp_path):
    states = []
    for low in (None, LOW):
        torch.manual_seed(5)
        backbone = build_backbone(spec_of("test_vit", None), low=low, **DATA)
        assert backbone.dtype == torch.float32
        states.append(backbone.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    save(backbone.model, tmp_path / "weights.pt")
    assert build_backbone(spec_of("test_vit", tmp_path / "weights.pt"), low=LOW, **DATA).dtype == torch.float32


def test_torch_is_as_before_when_a_file_cannot_be_loaded(all_are_big, tmp_path):
    before = nn.Module.register_parameter, nn.Module.load_state_dict, torch.load
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        build_backbone(spec_of("test_vit", tmp_path / "weights.pt"), low=LOW, **DATA)
    assert (nn.Module.register_parameter, nn.Module.load_state_dict, torch.load) == before


LOAD = """
import json, sys, threading, time
import torch
from distillery.models import big_weights, configured
from distillery.models.backbone import ModelSpec, build_backbone

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.002)

path, kwargs = sys.argv[1], json.loads(sys.argv[2])
big_weights.BIG_MODEL = 10_000_000
torch.set_num_threads(1)
low = big_weights.LowWeights("bf16", torch.device("cpu"))
data = {"data_mean": (0.5,) * 3, "data_std": (0.2,) * 3, "image_size": 32}
# imports, and all that a first model costs, before the measurement
build_backbone(ModelSpec(source="timm", name="test_vit", pretrained=False), **data).keep_in("bf16")
done, peaks = [], []
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
backbone = build_backbone(
    ModelSpec(source="timm", name="vit_base_patch16_224", pretrained=False, checkpoint=path, kwargs=kwargs),
    low=low, **data
)
done.append(1)
thread.join()
size = sum(value.numel() * 2 for value in backbone.model.parameters())
print(json.dumps({"peak": max(peaks) - before, "size": size, "dtype": str(backbone.dtype)}))
"""


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt"])
def test_400_mb_of_float32_are_loaded_as_bf16_on_hardly_more_memory_than_bf16_takes(tmp_path, file):
    save(timm.create_model("vit_base_patch16_224", num_classes=0, **VIT), tmp_path / file)
    assert (tmp_path / file).stat().st_size > 400e6
    command = [sys.executable, "-c", LOAD, str(tmp_path / file), json.dumps(VIT)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert found["dtype"] == "torch.bfloat16"
    assert 0.9 * found["size"] < found["peak"] < 1.2 * found["size"]
