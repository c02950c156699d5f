import argparse
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VisionTransformer

from distillery.models.backbone import ModelSpec, build_backbone
from distillery.models.weights import load_weights
from distillery.system.errors import MissingFileError, UserError
from distillery.teacher_cache.identity import _teacher_configured

DATA = {"data_mean": (0.5, 0.5, 0.5), "data_std": (0.25, 0.25, 0.25), "image_size": 32}
State = dict[str, torch.Tensor]


def state_of(seed: int, name: str = "test_vit", **kwargs) -> State:
    torch.manual_seed(seed)
    return timm.create_model(
        name, num_classes=0, **({"img_size": 32} if name == "test_vit" else {}), **kwargs
    ).state_dict()


def below(prefix: str, state: State) -> State:
    return {f"{prefix}.{key}": value for key, value in state.items()}


def loaded(file: Path | str, role: str | None = None, model: nn.Module | None = None) -> State:
    model = model or timm.create_model("test_vit", num_classes=0, img_size=32)
    load_weights(model, file, role=role)
    return model.state_dict()


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


A, B, C, D = (state_of(seed) for seed in range(4))
HEAD = {"mlp.0.weight": torch.zeros(3, 3)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
# content, what a teacher gets, what a student gets
FILES = {
    "student and teacher": ({"student": A, "teacher": B, "epoch": 1}, B, A),
    "dino": (
        {
            "student": below("module.backbone", A) | below("module.head", HEAD),
            "teacher": below("backbone", B) | below("head", HEAD),
            "optimizer": OPTIMIZER,
            "args": argparse.Namespace(arch="vit_tiny", output_dir=Path("/nowhere")),
            "dino_loss": {"center": torch.zeros(1, 3)},
        },
        B,
        A,
    ),
    "dinov2, the teacher alone": ({"teacher": below("backbone", B) | below("dino_head", HEAD)}, B, B),
    "dinov2, one state dict": (
        {"model": below("student.backbone", A) | below("teacher.backbone", B) | below("student.dino_head", HEAD)},
        B,
        A,
    ),
    "lightning": ({"state_dict": below("student", A) | below("teacher", B), "pytorch-lightning_version": "2"}, B, A),
    "lightning with averages": ({"state_dict": below("model", A) | below("ema_model.module", B)}, B, B),
    "timm": ({"state_dict": A, "state_dict_ema": B, "optimizer": OPTIMIZER}, B, B),
    "mae, convnext": ({"model": A, "model_ema": B}, B, B),
    "ours": ({"student": A, "heads": below("pooled", HEAD), "ema": B, "optimizer": OPTIMIZER, "rng": {}}, B, A),
    "ours without averages": ({"student": A, "heads": below("pooled", HEAD), "ema": None}, A, A),
    "moco v3": ({"state_dict": below("module.base_encoder", A) | below("module.momentum_encoder", B)}, A, A),
    "moco": ({"state_dict": below("module.encoder_q", A) | below("module.encoder_k", B)}, A, A),
    "byol": ({"online_network": A, "target_network": B}, A, A),
    "swav": (below("module", A | {"prototypes.weight": torch.zeros(3, 64), "queue": torch.zeros(3)}), A, A),
    "mae": ({"model": A | below("decoder_blocks.0", HEAD) | {"mask_token": torch.zeros(1, 1, 64)}}, A, A),
    "a part of a segmenter": ({"state_dict": below("backbone", A) | below("decode_head", HEAD)}, A, A),
    "four of them": ({"student": A, "teacher": B, "student_ema": C, "teacher_ema": D}, D, C),
    "the same twice": ({"state_dict": A, "model": dict(A)}, A, A),
    "of two sizes": ({"student": A, "teacher": state_of(1, depth=2, embed_dim=32)}, A, A),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(FILES))
def test_of_several_models_in_a_file_the_roles_own_is_loaded_and_a_line_says_which(kind, tmp_path, capsys):
    content, of_teacher, of_student = FILES[kind]
    torch.save(content, tmp_path / "w.pth")
    for role, expected in ((None, of_teacher), ("teacher", of_teacher), ("student", of_student)):
        assert equal(loaded(tmp_path / "w.pth", role), expected)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) in (0, 3)
    if of_teacher is not of_student:
        assert "teacher_checkpoint" in printed and "student_checkpoint" in printed and " is loaded, not " in printed


def test_the_roles_of_the_configuration_decide(tmp_path):
    torch.save({"student": A, "teacher": B}, tmp_path / "w.pth")
    for role, expected in (("student", A), ("teacher", B)):
        checkpoint = tmp_path / "w.pth"
        spec = ModelSpec(source="timm", name="test_vit", pretrained=False, checkpoint=checkpoint, role=role)
        built = build_backbone(spec, **DATA)
        assert equal(built.model.state_dict(), expected)


def test_an_entry_can_be_named(tmp_path):
    torch.save({"state_dict": below("student", A) | below("teacher.backbone", B)}, tmp_path / "w.pth")
    for name in ("student", "state_dict.student"):
        assert equal(loaded(f"{tmp_path}/w.pth#{name}", "teacher"), A)
    assert equal(loaded(f"{tmp_path}/w.pth#teacher", "student"), B)
    with pytest.raises(UserError, match=r"no entry 'ema' .*; entries: state_dict.student, state_dict.teacher.backbone"):
        loaded(f"{tmp_path}/w.pth#ema")
    with pytest.raises(MissingFileError, match="no checkpoint at .*/v.pth"):
        loaded(f"{tmp_path}/v.pth#teacher")
    torch.save(C, tmp_path / "w.pth#teacher")
    assert equal(loaded(f"{tmp_path}/w.pth#teacher"), C)


def test_the_line_counts_what_is_left_out_besides_the_other_models(tmp_path, capsys):
    torch.save(
        below("student", A) | below("teacher.backbone", B) | below("teacher.dino_head", HEAD), tmp_path / "w.pth"
    )
    loaded(tmp_path / "w.pth", "teacher")
    line = capsys.readouterr().out
    assert "teacher.backbone is loaded, not student (for another: w.pth#NAME); 1 tensors beside it are left out" in line


def test_what_nothing_tells_apart_is_asked_for(tmp_path):
    torch.save({"first": A, "second": B}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"several models that fit: first, second. Name one: student_checkpoint: .*#first"
    ):
        loaded(tmp_path / "w.pth", "student")
    assert equal(loaded(f"{tmp_path}/w.pth#second"), B)


def test_a_missing_tensor_of_the_roles_entry_is_an_error_and_not_a_reason_to_take_another(tmp_path):
    torch.save({"student": A, "teacher": {k: v for k, v in B.items() if k != "norm.weight"}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"1 of its \d+ tensors missing \(norm.weight\)"):
        loaded(tmp_path / "w.pth", "teacher")


def test_names_that_a_filter_has_to_change_are_found_behind_wrappers_too(tmp_path):
    own = timm.create_model("test_convnext", num_classes=0)
    names = [(r"stem.0", "downsample_layers.0.0"), ("stem.1", "downsample_layers.0.1")]
    original = {}
    for key, value in state_of(1, "test_convnext").items():
        for new, old in names:
            key = key.replace(new, old)
        key = key.replace(".blocks", "").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        if ".downsample." in key:
            stage, _, rest = key.removeprefix("stages.").partition(".downsample.")
            key = f"downsample_layers.{stage}.{rest}"
        original[key.replace("head.norm", "norm")] = value
    torch.save({"teacher": below("module.backbone", original), "epoch": 3}, tmp_path / "w.pth")
    assert equal(loaded(tmp_path / "w.pth", model=own), state_of(1, "test_convnext"))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"teacher": below("backbone", s)}])
def test_batch_norms_count_may_be_missing_as_pytorch_has_it(wrap, tmp_path):
    full = state_of(1, "test_resnet")
    torch.save(wrap({k: v for k, v in full.items() if "num_batches" not in k}), tmp_path / "w.pth")
    assert equal(loaded(tmp_path / "w.pth", model=timm.create_model("test_resnet", num_classes=0)), full)
    torch.save({k: v for k, v in full.items() if "running_mean" not in k}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="running_mean"):
        loaded(tmp_path / "w.pth", model=timm.create_model("test_resnet", num_classes=0))


class Stemmed(VisionTransformer):
    """A torchvision ViT with batch norm in it: counts are filled in beside converted position embeddings."""

    def __init__(self, image_size: int) -> None:
        super().__init__(image_size, 16, 1, 2, 24, 32, num_classes=5)
        self.extra = nn.BatchNorm2d(3)


def test_batch_norms_count_may_be_missing_where_position_embeddings_are_resampled(tmp_path):
    state = {k: v for k, v in Stemmed(64).state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.pth")
    small = Stemmed(32)
    load_weights(small, tmp_path / "w.pth")
    assert torch.equal(small.class_token, state["class_token"])


def test_an_entry_is_part_of_what_identifies_a_teacher(tmp_path):
    torch.save({"student": A, "teacher": B}, tmp_path / "w.pth")
    keys = ["source", "name", "repo", "pretrained", "kwargs", "img_size", "mean", "std"]
    of = {f"teacher_{key}": None for key in keys} | {"use_cls_token": True}
    plain, named = (
        _teacher_configured(of | {"teacher_checkpoint": path}, "fp32")
        for path in (f"{tmp_path}/w.pth", f"{tmp_path}/w.pth#student")
    )
    assert named == plain | {"checkpoint_entry": "student"}


def export_of(folder: Path, state: State) -> Path:
    """A folder as an export leaves it, as far as its weights go."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "README.md").write_text("a card")
    return folder


def test_a_folder_stands_for_the_weights_in_it(tmp_path, capsys):
    folder = export_of(tmp_path / "export", A)
    for role in ("teacher", "student"):
        assert equal(loaded(folder, role), A)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_of_a_student_in_its_teachers_space_the_heads_stay_behind_and_a_line_says_so(tmp_path, capsys, role):
    heads = {"pooled.0.weight": torch.zeros(8, 64), "pooled.0.bias": torch.zeros(8)}
    folder = export_of(tmp_path / "export", below("student", A) | below("heads", heads))
    assert equal(loaded(folder, role), A)
    line = capsys.readouterr().out
    assert f"{role}_checkpoint {folder}/model.safetensors: student is loaded; 2 tensors beside it are left out" in line
    assert "heads.pooled.0.weight" in line


def test_a_folder_without_weights_is_told_from_what_it_holds(tmp_path):
    for name in ("model.onnx", "config.json", "README.md"):
        (tmp_path / name).write_text("")
    with pytest.raises(MissingFileError, match="no model.safetensors; it holds README.md, config.json, model.onnx"):
        loaded(tmp_path, "student")
    for number in range(8):
        (tmp_path / f"A{number}").mkdir()
    with pytest.raises(MissingFileError, match="it holds A0, A1, A2, A3, A4, A5 and 5 more"):
        loaded(tmp_path, "student")


def test_a_folder_and_the_file_in_it_are_the_same_teacher(tmp_path):
    folder = export_of(tmp_path / "export", A)
    keys = ["source", "name", "repo", "pretrained", "kwargs", "img_size", "mean", "std"]
    of = {f"teacher_{key}": None for key in keys} | {"use_cls_token": True}
    paths = (folder, folder / "model.safetensors")
    as_folder, as_file = (_teacher_configured(of | {"teacher_checkpoint": path}, "fp32") for path in paths)
    assert as_folder == as_file
