import json
import shutil
import sys

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from distillery.config.load import load_configs
from distillery.export import __main__, expressions
from distillery.export.card import find_origin
from distillery.export.expressions import evaluate, is_same, sample_features
from distillery.export.formats import export_student
from distillery.export.student import find_other_call, load_student
from distillery.models.configured import build_student_backbone
from distillery.models.pair import build_projector
from distillery.system.errors import UserError, run_command
from distillery.training.checkpoints import latest_checkpoint, save_checkpoint
from distillery.training.log import RunLog
from distillery.training.trained import build_bare_student

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 2}
HUBCONF = """
import torch
from torch import nn

class Small(nn.Module):
    num_features = 8
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.fc = nn.Linear(8, 5)
    def forward_features(self, x):
        return self.stem(x).relu()
    def forward(self, x):
        return self.fc(self.forward_features(x).mean((2, 3)))

def small(pretrained=False):
    return Small()

class Dino(nn.Module):
    # the interface of DINOv2; its forward gives something else
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.token = nn.Parameter(torch.ones(1, 1, 8))
    def forward_features(self, x):
        patches = self.stem(x).flatten(2).transpose(1, 2)
        mixed = patches + self.token
        return {"x_norm_clstoken": mixed.amax(1), "x_norm_patchtokens": mixed}
    def forward(self, x):
        return self.forward_features(x)["x_norm_clstoken"] * 2

def dino(pretrained=True):
    assert not pretrained, "it would download weights"
    return Dino()
"""
# name: model_config keys; image_size is 48, which the ViT's own 160 px differ from
STUDENTS = {
    "cnn": {"student_name": "test_resnet"},
    "vit": {"student_name": "test_vit"},
    "vit, other patch": {"student_name": "test_vit", "student_kwargs": {"patch_size": 8}},
    "vit, mean of patches": {"student_name": "test_vit", "use_cls_token": False},
    "with classes": {"student_name": "test_vit", "student_kwargs": {"num_classes": 7}},
    "own normalisation": {
        "student_name": "test_resnet",
        "student_mean": (0.1, 0.2, 0.3),
        "student_std": (0.5, 0.6, 0.7),
    },
}


def perturb(state):
    """Other values everywhere, so that a tensor left at its initial value shows."""
    generator = torch.Generator().manual_seed(5)
    return {
        k: v + 0.05 * torch.rand(v.shape, generator=generator) if v.is_floating_point() else v + 1
        for k, v in state.items()
    }


def make_run(run_dir, model, *, ema=False, train=None, heads=None, statistics=None):
    """A run folder with the checkpoint of a student; returns that student as it was trained.

    train: keys of train_config_kd.yaml; heads: field -> the teacher's width; statistics: as a checkpoint has them.
    """
    run_dir.mkdir()
    configs = load_configs(
        {"dataset_name": "pets", "cache_dir": str(run_dir / "cache"), "image_size": 48, "mean": [0.4, 0.4, 0.4]},
        {"checkpoint_dir": str(run_dir)} | (train or {}),
        {"teacher_name": "test_resnet", "teacher_pretrained": False} | model,
    )
    backbone = build_student_backbone(configs.model, configs.data).eval()
    backbone.model.load_state_dict(perturb(backbone.model.state_dict()))
    torch.manual_seed(3)
    widths = {"pooled": 20} if heads is None else heads
    layers = {field: build_projector(backbone.widths[field], wide, hidden_dim=16) for field, wide in widths.items()}
    heads = torch.nn.ModuleDict(layers).state_dict()
    state = {
        "student": backbone.model.state_dict(),
        "heads": heads,
        "optimizer": {"state": {}},
        "ema": perturb(backbone.model.state_dict()) if ema else None,
        "ema_heads": perturb(heads) if ema else None,
        "target_statistics": statistics,
        "rng": {},
        "progress": {"step": 40, "epoch": 2, "samples": 0},
        "config": configs.as_dict(),
        "global_batch_size": 16,
    }
    save_checkpoint(run_dir, state, 40, keep=1)
    return backbone


def as_the_card_says(out_dir):
    """The features that the usage in the model card gives for images [2, 3, H, W] in 0..1."""
    config = json.loads((out_dir / "config.json").read_text())
    card = (out_dir / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("model.safetensors", str(out_dir / "model.safetensors"))
    code = code.replace("local-dir:.", f"local-dir:{out_dir}").replace("model.onnx", str(out_dir / "model.onnx"))
    pixels = torch.rand(2, *config["pretrained_cfg"]["input_size"], generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(config["pretrained_cfg"][name])[:, None, None] for name in ("mean", "std"))
    images = (pixels - mean) / std
    names = {"images": images.numpy() if "onnxruntime" in code else images}
    with torch.no_grad():
        exec(code, names)
    return pixels, torch.as_tensor(names["features"])


def trained_features(backbone, pixels):
    """What the student gave in training for the same pixels, normalised as the data set is."""
    data_mean, data_std = torch.tensor([0.4] * 3)[:, None, None], torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    with torch.no_grad():
        return backbone((pixels - data_mean) / data_std).pooled


@pytest.mark.parametrize("format", ["timm", "safetensors", "huggingface"])
@pytest.mark.parametrize("name", sorted(STUDENTS))
def test_the_code_on_the_card_gives_the_features_that_were_trained(tmp_path, name, format):
    backbone = make_run(tmp_path / "run", STUDENTS[name])
    written = export_student(tmp_path / "run", tmp_path / "out", format)
    assert [path.name for path in written] == ["model.safetensors", "config.json", "README.md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in written)
    pixels, features = as_the_card_says(tmp_path / "out")
    torch.testing.assert_close(features, trained_features(backbone, pixels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(STUDENTS))
def test_the_keys_are_exactly_those_of_the_model_without_classifier(tmp_path, name):
    make_run(tmp_path / "run", STUDENTS[name])
    export_student(tmp_path / "run", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    kwargs = json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]
    model = timm.create_model(STUDENTS[name]["student_name"], num_classes=0, **kwargs)
    loaded = model.load_state_dict(weights, strict=True)
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
    assert not [key for key in weights if key.startswith(("head.", "fc."))]


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_timm_loads_the_folder_as_a_hub_model(tmp_path, name):
    make_run(tmp_path / "run", STUDENTS[name])
    export_student(tmp_path / "run", tmp_path / "out", "huggingface")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    data = timm.data.resolve_model_data_config(model)
    assert list(data["input_size"]) == [3, 48, 48] and data["crop_mode"] == "squash"


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_a_new_classifier_can_be_put_on_the_folder(tmp_path, name):
    make_run(tmp_path / "run", STUDENTS[name])
    export_student(tmp_path / "run", tmp_path / "out", "huggingface")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=10)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())
    assert model.num_classes == 10


def test_averaged_weights_are_exported_by_choice(tmp_path):
    backbone = make_run(tmp_path / "run", STUDENTS["cnn"], ema=True)
    export_student(tmp_path / "run", tmp_path / "last", weights="student")
    export_student(tmp_path / "run", tmp_path / "ema")
    last, ema = (load_file(tmp_path / part / "model.safetensors") for part in ("last", "ema"))
    own, averaged = backbone.model.state_dict(), perturb(backbone.model.state_dict())
    assert all(torch.equal(last[key], own[key]) and torch.equal(ema[key], averaged[key]) for key in last)
    assert json.loads((tmp_path / "ema" / "config.json").read_text())["distillation"]["weights"] == "averaged"


def test_a_student_of_another_source_keeps_its_own_keys(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(HUBCONF)
    model = {"student_name": "small", "student_source": "torch_hub", "student_repo": str(tmp_path / "hub")}
    backbone = make_run(tmp_path / "run", model)
    for format in ("timm", "huggingface"):
        with pytest.raises(UserError, match="comes from torch_hub, which timm cannot build: use --format safetensors"):
            export_student(tmp_path / "run", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    export_student(tmp_path / "run", tmp_path / "out", "safetensors")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == backbone.model.state_dict().keys()
    # its own forward gives class scores: the card must name the call that gives the features
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["distillation"]["features"] == "model.forward_features(images).mean((2, 3))"


CARDS = {
    "class token": ("timm", "test_vit", {}),
    "registers": ("timm", "vit_small_patch14_reg4_dinov2", TINY),
    "norm in the head": ("timm", "beit_base_patch16_224", TINY),
    "norm in the head, rotary": ("timm", "eva02_tiny_patch14_224", TINY),
    "distilled": ("timm", "deit_tiny_distilled_patch16_224", TINY),
    "class attention": ("timm", "cait_xxs24_224", TINY),
    "channels last": (
        "timm", "swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2]}
    ),
    "no class token": ("timm", "vit_base_patch16_siglip_gap_224", TINY),
    "DINOv2's dictionary": ("torch_hub", "dino", {}),
    "classifier on the way": ("torchvision", "shufflenet_v2_x0_5", {}),
    "layers one by one": ("torchvision", "resnet18", {"weights": "DEFAULT"}),
}  # fmt: skip


@pytest.mark.parametrize("use_cls_token", [True, False])
@pytest.mark.parametrize("name", sorted(CARDS))
def test_every_card_names_an_expression_that_gives_the_trained_features(tmp_path, name, use_cls_token):
    source, student, kwargs = CARDS[name]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(HUBCONF)
    model = {
        "student_source": source,
        "student_name": student,
        "student_kwargs": kwargs,
        "use_cls_token": use_cls_token,
        "student_repo": str(tmp_path / "hub") if source == "torch_hub" else None,
    }
    backbone = make_run(tmp_path / "run", model)
    export_student(tmp_path / "run", tmp_path / "out", "huggingface" if source == "timm" else "safetensors")
    pixels, features = as_the_card_says(tmp_path / "out")
    torch.testing.assert_close(features, trained_features(backbone, pixels), atol=1e-4, rtol=1e-4)
    named = json.loads((tmp_path / "out" / "config.json").read_text())["distillation"]["features"]
    assert f"features = {named}\n" in (tmp_path / "out" / "README.md").read_text()


def test_torchvisions_vit_is_built_at_its_input_size_and_without_pretrained_weights():
    model = {"student_source": "torchvision", "student_name": "vit_b_16", "student_kwargs": {"weights": "DEFAULT"}}
    assert find_other_call(model, (48, 48)) == ("vit_b_16", {"weights": None, "image_size": 48})


def test_a_wrong_expression_does_not_pass_and_a_student_without_any_is_refused(tmp_path, monkeypatch):
    make_run(tmp_path / "run", STUDENTS["vit, mean of patches"])
    backbone = load_student(tmp_path / "run").backbone
    images, features = sample_features(backbone)
    right = "model.forward_features(images)[:, 1:].mean(1)"
    wrong = ("model(images)", "model.forward_features(images)[:, 0]", f"{right} * 1.001", "model.fc_norm(images)")
    for call in (right, *wrong):
        found = evaluate(call, model=backbone.model, images=images)
        assert is_same(found, features.pooled) is (call == right)
    ways = [(call, {"pooled": ["raw"]}) for call in wrong]
    monkeypatch.setattr(expressions, "_candidates", lambda backbone: ways)
    with pytest.raises(UserError, match="no call of VisionTransformer gives the features that were trained"):
        export_student(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["timm", "safetensors", "huggingface", "onnx"])
def test_a_student_that_began_from_an_exported_folder_stands_alone(tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="the code on the card needs it")
    first = STUDENTS["vit"] | {"student_kwargs": {"patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 1}}
    make_run(tmp_path / "first run", first)
    export_student(tmp_path / "first run", tmp_path / "first", "huggingface")
    second = {"student_name": f"local-dir:{tmp_path / 'first'}", "student_pretrained": True,
              "student_kwargs": {"drop_rate": 0.1}}  # fmt: skip
    backbone = make_run(tmp_path / "run", second)
    export_student(tmp_path / "run", tmp_path / "out", format)
    (tmp_path / "first").rename(tmp_path / "gone")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "test_vit"
    assert config["model_args"] == {
        "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 1, "img_size": 48, "drop_rate": 0.1
    }  # fmt: skip
    pixels, features = as_the_card_says(tmp_path / "out")
    torch.testing.assert_close(features, trained_features(backbone, pixels), atol=1e-4, rtol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| weights the student began with | must be checked where the weights came from |" in card
    assert front_matter(tmp_path / "out")["license"] == "other"


def test_a_folder_is_exported_again_at_another_input_size(tmp_path):
    make_run(tmp_path / "first run", STUDENTS["vit"] | {"student_kwargs": {"img_size": 64}})
    export_student(tmp_path / "first run", tmp_path / "first", "huggingface")
    make_run(tmp_path / "run", {"student_name": f"local-dir:{tmp_path / 'first'}"})
    export_student(tmp_path / "run", tmp_path / "out", "huggingface")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"] == {"img_size": 48} and config["pretrained_cfg"]["input_size"] == [3, 48, 48]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights.update({"extra.weight": torch.zeros(1)}), r"0 of \d+ .* unknown \['extra.weight'\]"),
        (
            lambda weights: weights.pop("conv1.0.weight"),
            r"1 of \d+ tensors missing or of another shape \['conv1.0.weight'\]",
        ),
        (lambda weights: weights.update({"conv1.0.weight": torch.zeros(2)}), r"another shape \['conv1.0.weight'\]"),
    ],
    ids=["unknown", "missing", "other shape"],
)
def test_weights_that_are_not_the_students_are_refused(tmp_path, change, message):
    make_run(tmp_path / "run", STUDENTS["cnn"])
    (path,) = (tmp_path / "run" / "checkpoints").glob("*.pt")
    state = torch.load(path, weights_only=True)
    change(state["student"])
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match=message):
        export_student(tmp_path / "run", tmp_path / "out", checkpoint=tmp_path / "other.pt")


def test_what_cannot_be_exported_says_what_to_do(tmp_path):
    make_run(tmp_path / "run", STUDENTS["cnn"])
    with pytest.raises(UserError, match="no averaged weights.*Use --weights student"):
        export_student(tmp_path / "run", tmp_path / "out", weights="ema")
    with pytest.raises(UserError, match="unknown format 'tflite'; known: timm, safetensors, huggingface, onnx"):
        export_student(tmp_path / "run", tmp_path / "out", "tflite")
    with pytest.raises(UserError, match="no complete checkpoint"):
        export_student(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("out", ["file", "file/inner"])
def test_an_out_that_is_a_file_is_refused(tmp_path, out):
    make_run(tmp_path / "run", STUDENTS["cnn"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"--out .*{out}: .*/file is a file. Name a folder"):
        export_student(tmp_path / "run", tmp_path / out)
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_of_the_teacher_heads_or_optimiser_leaves(tmp_path):
    make_run(tmp_path / "run", STUDENTS["cnn"])
    student = load_student(tmp_path / "run")
    assert student.weights.keys() == build_bare_student(student.config).model.state_dict().keys()
    assert not [key for key in student.weights if "pooled" in key or "heads" in key]


def test_the_card_tells_results_and_data_of_the_exported_step_only(tmp_path):
    make_run(tmp_path / "run", STUDENTS["cnn"])
    log = RunLog(tmp_path / "run", tensorboard=False, wandb_project=None, is_main=True)
    log.write("eval", step=0, dataset="digits", model="teacher", knn_top1=0.9, linear_top1=None)
    log.write("eval", step=20, dataset="digits", model="student", knn_top1=0.5)
    log.write("eval", step=40, dataset="digits", model="student", knn_top1=0.8, linear_top1=0.85)
    (tmp_path / "run" / "shards.json").write_text(json.dumps({"fingerprint": "abc123", "shards": ["a", "b"]}))
    export_student(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| digits | teacher | 90.0% | - |" in card and "| digits | student | 80.0% | 85.0% |" in card
    assert "50.0%" not in card and "`abc123` (2 shards)" in card
    assert "40 steps, 640 images seen; losses 1 x cls, 2 x patch; last weights" in card
    assert "| weight_decay | `0.04` |" in card
    assert "| learning_rate | `0.004` |" in card, "the rule's value, not null"


def test_the_card_of_a_checkpoint_elsewhere_has_the_results_of_the_run_that_it_lies_in(tmp_path):
    for name, knn in (("run", 0.8), ("run/previous_1", 0.6)):
        make_run(tmp_path / name.replace("/", "-"), STUDENTS["cnn"])
        (tmp_path / name.replace("/", "-")).rename(tmp_path / name)
        log = RunLog(tmp_path / name, tensorboard=False, wandb_project=None, is_main=True)
        log.write("eval", step=40, dataset="digits", model="student", knn_top1=knn)
    before = latest_checkpoint(tmp_path / "run" / "previous_1")
    alone = shutil.copy2(before, tmp_path / "copy.pt")
    for path, shown in ((before, True), (alone, False)):
        export_student(tmp_path / "run", tmp_path / "out", checkpoint=path)
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("60.0%" in card) is shown and "80.0%" not in card


def front_matter(out_dir):
    return yaml.safe_load((out_dir / "README.md").read_text().split("---\n")[1])


def test_the_card_takes_the_teachers_licence_from_timm_and_says_what_must_be_checked(tmp_path):
    make_run(tmp_path / "run", STUDENTS["cnn"] | {"teacher_pretrained": True})
    export_student(tmp_path / "run", tmp_path / "out", "huggingface")
    known = timm.get_pretrained_cfg("test_resnet")
    metadata = front_matter(tmp_path / "out")
    assert metadata["license"] == known.license == "apache-2.0"
    assert metadata["base_model"] == known.hf_hub_id
    assert metadata["library_name"] == "timm" and metadata["pipeline_tag"] == "image-feature-extraction"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| teacher's weights, test_resnet | apache-2.0 (as timm states it" in card
    assert "| images, pets | must be checked where they came from |" in card


def test_a_licence_that_is_not_known_is_not_claimed(tmp_path):
    make_run(tmp_path / "run", STUDENTS["cnn"])  # its teacher has no published weights
    export_student(tmp_path / "run", tmp_path / "out")
    metadata = front_matter(tmp_path / "out")
    assert (metadata["license"], metadata["license_name"]) == ("other", "to-be-checked")
    assert "base_model" not in metadata
    assert "must be checked where the weights came from" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, {"teacher_license": "apache-2.0", "student_start": None, "student_start_license": None}),
        ({"teacher_checkpoint": "own.pt"}, {"teacher": None, "teacher_license": None}),
        ({"teacher_source": "torch_hub"}, {"teacher": None, "teacher_license": None}),
        ({"student_pretrained": True}, {"student_start_license": "apache-2.0"}),
    ],
)
def test_origin_claims_only_what_is_certain(change, expected):
    model = {"teacher_source": "timm", "teacher_name": "test_resnet", "teacher_pretrained": True,
             "student_source": "timm", "student_name": "test_vit", "student_pretrained": False}  # fmt: skip
    origin = find_origin({"dataset_name": "me/images"}, model | change)
    assert origin.items() >= expected.items()
    assert origin["data"] == "me/images"


def test_files_on_disk_are_no_hub_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "images").mkdir(parents=True)
    model = {"teacher_source": "torch_hub", "student_source": "torch_hub"}
    assert find_origin({"dataset_name": "me/images"}, model)["data"] is None
    assert find_origin({"dataset_name": "parquet"}, model)["data"] is None


@pytest.mark.parametrize("folder, status", [("run", 0), ("none", 2)])
def test_the_command_exports_and_answers_mistakes_with_status_2(tmp_path, monkeypatch, capsys, folder, status):
    make_run(tmp_path / "run", STUDENTS["cnn"])
    monkeypatch.setattr(sys, "argv", ["export", "--run", str(tmp_path / folder), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        run_command(__main__.main)
    assert stop.value.code == status
    assert (tmp_path / "out" / "model.safetensors").exists() is (status == 0)
    out, err = capsys.readouterr()
    assert "README.md" in out if status == 0 else "has no complete checkpoint" in err


@pytest.mark.parametrize("flags", [["--weights", "ema"], ["--ema"]])
def test_the_command_exports_averaged_weights_by_choice(tmp_path, monkeypatch, flags):
    make_run(tmp_path / "run", STUDENTS["cnn"], ema=True)
    monkeypatch.setattr(sys, "argv", ["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as stop:
        run_command(__main__.main)
    assert stop.value.code == 0
    averaged = load_student(tmp_path / "run", weights="ema").weights
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[key], averaged[key]) for key in averaged)


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "student.py"])
def test_files_that_no_export_has_made_are_never_overwritten(tmp_path, name):
    make_run(tmp_path / "run", STUDENTS["cnn"])
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=f"out holds {name}, and no config.json of an export"):
        export_student(tmp_path / "run", out)
    assert [path.read_text() for path in out.iterdir()] == ['{"mine": 1}']
    (out / name).unlink()
    export_student(tmp_path / "run", out)
    (out / "README.md").unlink()  # as if killed before its end
    export_student(tmp_path / "run", out)
    assert json.loads((out / "config.json").read_text())["distillation"] and (out / "README.md").exists()
