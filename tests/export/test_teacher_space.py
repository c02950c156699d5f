import importlib
import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torchvision.models import VisionTransformer

from distillery.export import __main__, standalone
from distillery.export.expressions import evaluate, find_forward
from distillery.export.formats import export_student
from distillery.export.student import load_student
from distillery.export.teacher_card import scale_remarks
from distillery.losses.registry import LOSSES
from distillery.losses.targets import Targets
from distillery.models.backbone import Backbone, Features
from distillery.models.builders import BuiltModel
from distillery.models.weights import load_weights
from distillery.system.errors import UserError, run_command
from distillery.training.trained import load_trained
from tests.export.test_formats import HUBCONF, STUDENTS, TINY, make_run
from tests.export.test_results import write_evaluations

WIDTHS = {"pooled": 20, "tokens": 12}
HUB = HUBCONF.replace("import torch\n", "import torch\nfrom parts.flat import flatten\n", 1) + (
    """
class Flat(Small):
    def forward_features(self, x):
        import lazy
        return lazy.same(flatten(super().forward_features(x)))

def flat():
    return Flat()
"""
)
SWIN = {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2]}
# source, name, kwargs, whether it has patch tokens
FAMILIES = {
    "convolutions": ("timm", "test_resnet", {}, True),
    "class token": ("timm", "test_vit", {}, True),
    "registers": ("timm", "vit_small_patch14_reg4_dinov2", TINY, True),
    "no class token": ("timm", "vit_base_patch16_siglip_gap_224", TINY, True),
    "norm in the head": ("timm", "beit_base_patch16_224", TINY, True),
    "channels last": ("timm", "swin_tiny_patch4_window7_224", SWIN, True),
    "convnext": ("timm", "test_convnext", {}, True),
    "torchvision": ("torchvision", "shufflenet_v2_x0_5", {}, True),
    "a folder's": ("torch_hub", "small", {}, True),
    "DINOv2's dictionary": ("torch_hub", "dino", {}, True),
    "one feature": ("torch_hub", "flat", {}, False),
}


def make_statistics(method):
    """Of a teacher whose channels differ in mean and deviation, as a checkpoint has them."""
    generator = torch.Generator().manual_seed(4)
    pooled, tokens = (torch.randn(200, w, generator=generator) * torch.linspace(0.5, 4, w) + 9 for w in WIDTHS.values())
    targets = Targets(WIDTHS, method)
    targets.load_statistics(targets.statistics_of([Features(pooled, tokens[None], (20, 10))]))
    return targets.statistics_state()


def make_space_run(run_dir, model, *, fields=("pooled", "tokens"), method=True, **options):
    """A run with heads for these fields; returns its student in the teacher's space."""
    train = {"standardise_targets": method} | options.pop("train", {})
    heads = {field: WIDTHS[field] for field in fields}
    make_run(run_dir, model, train=train, heads=heads, statistics=make_statistics(method) if method else {}, **options)
    return load_trained(run_dir).in_teacher_space()


def hub_model(tmp_path, name):
    (tmp_path / "code" / "parts").mkdir(parents=True)
    (tmp_path / "code" / "hubconf.py").write_text(HUB)
    (tmp_path / "code" / "lazy.py").write_text("def same(x):\n    return x\n")
    (tmp_path / "code" / "parts" / "flat.py").write_text("def flatten(x):\n    return x.mean((2, 3))\n")
    (tmp_path / "code" / "weights.bin").write_text("not for everyone")
    return {"student_name": name, "student_source": "torch_hub", "student_repo": str(tmp_path / "code")}


def normalised(config, pixels):
    mean, std = (torch.tensor(config["pretrained_cfg"][name])[:, None, None] for name in ("mean", "std"))
    return (pixels - mean) / std


def as_the_card_says(out_dir, monkeypatch, pixels=None):
    """Pixels in 0..1 and the outputs that the usage in the model card gives for them."""
    card, config = (out_dir / "README.md").read_text(), json.loads((out_dir / "config.json").read_text())
    code = card.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 13
    if pixels is None:
        pixels = torch.rand(2, *config["pretrained_cfg"]["input_size"], generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(out_dir)  # "." on the card
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo: str(out_dir))
    sys.modules.pop("student", None)
    importlib.invalidate_caches()
    names = {"images": normalised(config, pixels)}
    with standalone._imports_of(out_dir):
        exec(code, names)
    return pixels, names["outputs"]


def in_data_normalisation(pixels):
    return (pixels - 0.4) / torch.tensor((0.229, 0.224, 0.225))[:, None, None]


@torch.no_grad()
def assert_gives(outputs, space, student, pixels):
    """The outputs are the run's own student's with folded heads, for pixels normalised as the data set is."""
    student.set_data_normalisation((0.4, 0.4, 0.4), (0.229, 0.224, 0.225))
    wanted = space(in_data_normalisation(pixels))
    assert set(outputs) == {*wanted.tensors(), "grid"} and outputs["grid"] == wanted.grid
    for field, value in wanted.tensors().items():
        torch.testing.assert_close(outputs[field], value, atol=1e-4 * value.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_code_on_the_card_gives_the_teachers_space(tmp_path, monkeypatch, name):
    source, student, kwargs, has_tokens = FAMILIES[name]
    model = {"student_source": source, "student_name": student, "student_kwargs": kwargs}
    if source == "torch_hub":
        model |= hub_model(tmp_path, student)
    fields = ("pooled", "tokens") if has_tokens else ("pooled",)
    space = make_space_run(tmp_path / "run", model, fields=fields)
    export_student(tmp_path / "run", tmp_path / "out", space="teacher")
    pixels, outputs = as_the_card_says(tmp_path / "out", monkeypatch)
    assert_gives(outputs, space, space.student, pixels)
    assert (tmp_path / "out" / "student.py").read_text().count("raw = ") == 1, "one pass for both outputs"
    other, outputs = as_the_card_says(tmp_path / "out", monkeypatch, torch.rand(2, 3, 61, 35))
    assert_gives(outputs, space, space.student, other)


def test_torchvisions_vit_gives_both_outputs_of_one_pass():
    torch.manual_seed(0)
    model = VisionTransformer(32, 16, 1, 2, 24, 32)
    backbone = Backbone(BuiltModel(model, (32, 32)), label="own", data_mean=(0.5,) * 3, data_std=(0.5,) * 3).eval()
    forward = find_forward(backbone, ["pooled", "tokens"])
    images = torch.randn(2, 3, 32, 32)
    raw = evaluate(forward.raw, model=model, images=images)
    wanted = backbone(images).tensors()
    for field, call in forward.fields.items():
        torch.testing.assert_close(evaluate(call, model=model, raw=raw), wanted[field])
    torch.testing.assert_close(evaluate(forward.as_one("pooled"), model=model, images=images), wanted["pooled"])


ALONE = """
import sys
sys.modules["distillery"] = None  # an import of it is an error
import torch
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    from student import load_student
    model = load_student(folder)
    images = torch.load(f"{folder}/images.pt")
    with torch.no_grad():
        torch.save(model(images), f"{folder}/outputs.pt")
    sys.path.remove(folder)
    del sys.modules["student"]
assert not [path for path in sys.path if path.endswith("repository")], sys.path
"""


def test_a_process_without_this_package_loads_and_runs_the_folders(tmp_path):
    spaces = {
        "a": make_space_run(tmp_path / "run a", STUDENTS["vit"], method="phi_s"),
        "b": make_space_run(tmp_path / "run b", hub_model(tmp_path, "flat"), fields=["pooled"]),
    }
    folders = [tmp_path / f"out {name}" for name in spaces]
    pixels = torch.rand(3, 3, 50, 40)
    for folder, name in zip(folders, spaces, strict=True):
        export_student(tmp_path / f"run {name}", folder, space="teacher")
        torch.save(normalised(json.loads((folder / "config.json").read_text()), pixels), folder / "images.pt")
    (tmp_path / "code").rename(tmp_path / "gone")
    # isolated: neither the working directory nor PYTHONPATH is looked at
    subprocess.run([sys.executable, "-I", "-c", ALONE, *map(str, folders)], check=True, cwd=tmp_path)
    for folder, space in zip(folders, spaces.values(), strict=True):
        assert_gives(torch.load(folder / "outputs.pt"), space, space.student, pixels)


def test_the_keys_are_the_raw_models_behind_student_and_the_heads(tmp_path):
    make_space_run(tmp_path / "run", STUDENTS["vit"])
    written = export_student(tmp_path / "run", tmp_path / "out", space="teacher")
    names = ["model.safetensors", "config.json", "README.md", "student.py"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    trained = load_trained(tmp_path / "run")
    keys = [f"student.{name}" for name in trained.weights] + [f"heads.{name}" for name in trained.head_weights]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == set(keys)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["distillation"]["outputs"] == WIDTHS and config["distillation"]["grid"] == [3, 3]


def test_of_a_torch_hub_folder_only_its_code_comes_along_and_not_an_export_in_it(tmp_path):
    make_space_run(tmp_path / "run", hub_model(tmp_path, "small"))
    for unwanted in (".git", "__pycache__", "venv"):
        (tmp_path / "code" / unwanted).mkdir()
        (tmp_path / "code" / unwanted / "other.py").write_text("")
    (tmp_path / "code" / "venv" / "pyvenv.cfg").write_text("")
    out = tmp_path / "code" / "out"
    for _ in range(2):
        export_student(tmp_path / "run", out, "huggingface", space="teacher")
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    code = ["hub/hubconf.py", "hub/lazy.py", "hub/parts/flat.py"]
    assert found == ["README.md", "config.json", *code, "model.safetensors", "student.py"]
    assert "| code in hub/, of the student's torch.hub folder | must be checked" in (out / "README.md").read_text()


def test_a_student_of_github_is_loaded_from_there(tmp_path):
    make_space_run(tmp_path / "run", hub_model(tmp_path, "small"))
    student = load_student(tmp_path / "run")
    space, forward = student.trained.in_teacher_space(), find_forward(student.backbone, WIDTHS)
    student.config["model"]["student_repo"] = "owner/name:v1"
    code = standalone.code_of(student, space, forward)
    assert 'self.student = torch.hub.load("owner/name:v1", "small", trust_repo=True, pretrained=False)' in code
    assert "import sys" not in code and '"hub"' not in code


ODD = """
class Odd(Small):
    def forward_features(self, x):
        return super().forward_features(x) * len(__file__)

def small():
    return Odd()
"""


@pytest.mark.parametrize(
    "change, message",
    [
        ("open(__file__.replace('hubconf.py', 'weights.bin'))", "FileNotFoundError.* only the .py files come along"),
        (ODD, "gives other features than were trained"),
    ],
    ids=["needs another file", "gives something else"],
)
def test_a_folder_that_does_not_stand_alone_is_not_written(tmp_path, change, message):
    model = hub_model(tmp_path, "small")
    with (tmp_path / "code" / "hubconf.py").open("a") as file:
        file.write(change)
    make_space_run(tmp_path / "run", model)
    with pytest.raises(UserError, match=f"student.py of small .*{message}.*--space backbone"):
        export_student(tmp_path / "run", tmp_path / "out", space="teacher")
    assert not (tmp_path / "out").exists()


def test_averaged_weights_leave_with_averaged_heads(tmp_path, monkeypatch):
    averaged = make_space_run(tmp_path / "run", STUDENTS["cnn"], ema=True)
    export_student(tmp_path / "run", tmp_path / "out", space="teacher")
    pixels, outputs = as_the_card_says(tmp_path / "out", monkeypatch)
    assert_gives(outputs, averaged, averaged.student, pixels)
    export_student(tmp_path / "run", tmp_path / "last", weights="student", space="teacher")
    last, ema = (load_file(tmp_path / folder / "model.safetensors") for folder in ("last", "out"))
    assert not any(torch.equal(last[key], ema[key]) for key in last)


def test_heads_that_an_older_run_did_not_average_are_remarked_on(tmp_path, capsys):
    make_space_run(tmp_path / "run", STUDENTS["cnn"], ema=True)
    (path,) = (tmp_path / "run" / "checkpoints").glob("*.pt")
    state = torch.load(path, weights_only=True)
    del state["ema_heads"]
    torch.save(state, tmp_path / "older.pt")
    for weights, checkpoint, is_said in (
        ("auto", "older.pt", True),
        ("student", "older.pt", False),
        ("auto", path, False),
    ):
        export_student(tmp_path / "run", tmp_path / "out", None, tmp_path / checkpoint, weights, "teacher")
        words = "weights are averaged, those of its heads are the last"
        assert (words in capsys.readouterr().err) is is_said
        assert (words in (tmp_path / "out" / "README.md").read_text()) is is_said


def test_student_py_of_an_earlier_export_never_gets_other_weights(tmp_path):
    make_space_run(tmp_path / "run", hub_model(tmp_path, "small"))
    export_student(tmp_path / "run", tmp_path / "out", "safetensors")
    export_student(tmp_path / "run", tmp_path / "out", space="teacher")  # replaces the weights, and brings its code
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=r"out holds student\.py of an export with --space teacher.*remove that one: rm -r /"
    ):
        export_student(tmp_path / "run", tmp_path / "out", "safetensors")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


@pytest.mark.parametrize("field, other", [("pooled", "tokens"), ("tokens", "pooled")])
def test_an_output_without_a_head_is_left_out_and_this_is_said(tmp_path, monkeypatch, capsys, field, other):
    space = make_space_run(tmp_path / "run", STUDENTS["vit"], fields=[field])
    export_student(tmp_path / "run", tmp_path / "out", space="teacher")
    assert re.fullmatch(rf"{other} is left out: no loss of the run compares .*\n", capsys.readouterr().err)
    pixels, outputs = as_the_card_says(tmp_path / "out", monkeypatch)
    assert outputs.keys() == {field, "grid"}
    assert_gives(outputs, space, space.student, pixels)
    assert f"`{other}` is left out" in (tmp_path / "out" / "README.md").read_text()


def test_the_hub_folder_has_a_front_matter_and_a_card_that_loads_it_from_the_hub(tmp_path, monkeypatch):
    space = make_space_run(tmp_path / "run", STUDENTS["cnn"])
    export_student(tmp_path / "run", tmp_path / "out", "huggingface", space="teacher")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'snapshot_download("USER/NAME")' in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    # timm could not load the heads, so the hub must not offer timm's snippet
    assert metadata["library_name"] == "pytorch" and metadata["pipeline_tag"] == "image-feature-extraction"
    pixels, outputs = as_the_card_says(tmp_path / "out", monkeypatch)
    assert_gives(outputs, space, space.student, pixels)


@pytest.mark.parametrize("mirror", [True, False])
def test_the_card_says_that_the_targets_were_means_over_mirror_images(tmp_path, mirror):
    make_space_run(tmp_path / "run", STUDENTS["cnn"] | {"teacher_mirror": mirror})
    export_student(tmp_path / "run", tmp_path / "out", space="teacher")
    assert ("the mean over image and mirror image" in (tmp_path / "out" / "README.md").read_text()) is mirror


@pytest.mark.parametrize(
    "method, words",
    [(True, "divided by its standard deviation"), ("phi_s", "PHI-S"), (False, "nothing had to be undone")],
)
def test_the_card_says_what_was_undone(tmp_path, monkeypatch, method, words):
    space = make_space_run(tmp_path / "run", STUDENTS["cnn"], method=method)
    export_student(tmp_path / "run", tmp_path / "out", space="teacher")
    assert words in (tmp_path / "out" / "README.md").read_text()
    pixels, outputs = as_the_card_says(tmp_path / "out", monkeypatch)
    assert_gives(outputs, space, space.student, pixels)


@pytest.mark.parametrize("loss", sorted(name for name, term in LOSSES.items() if term.field in WIDTHS))
def test_every_loss_that_fixes_no_scale_is_remarked_on(loss):
    field = LOSSES[loss].field
    facts = {"outputs": {field: 5}, "losses": {loss: 1.0, "layers": 1.0}, "standardisation_undone": True}
    # what a loss says of a target that is twice as long, as a fraction of what it says of an unrelated one
    generator = torch.Generator().manual_seed(0)
    target, other = torch.randn(2, 6, 4, 5, generator=generator)
    if field == "pooled":
        target, other = target[:, 0], other[:, 0]
    base = LOSSES[loss].function(target, target)
    longer, unrelated = (LOSSES[loss].function(made, target) - base for made in (2 * target, other))
    is_blind = abs(longer) < 1e-3 * unrelated
    assert bool(scale_remarks(facts)) is bool(is_blind)
    # beside a loss on values the remark falls away
    beside = {"pooled": "mse", "tokens": "patch_mse"}[field]
    assert not scale_remarks(facts | {"losses": {loss: 1.0, beside: 0.1}})
    assert bool(scale_remarks(facts | {"losses": {beside: 0, loss: 1.0}})) is bool(is_blind)


@pytest.mark.parametrize(
    "loss, method, words",
    [
        ("cosine", True, "measured from the teacher's mean, the directions"),
        ("cosine", "phi_s", "measured from the teacher's mean, the directions"),
        ("cosine", False, "measured from zero, the directions"),
        ("barlow", True, "each channel rises and falls"),
        ("barlow", "phi_s", "each channel of the rotated features rises and falls"),
        ("barlow", False, "each channel rises and falls"),
    ],
)
def test_the_remark_on_scale_is_true_of_the_targets_that_the_loss_saw(loss, method, words):
    facts = {"outputs": {"pooled": 5}, "losses": {loss: 1.0}, "standardisation_undone": method}
    (remark,) = scale_remarks(facts)
    assert words in remark


IN_SPACE = {
    "cosine_in_teacher_space": 0.912,
    "cka_in_teacher_space": 0.834,
    "knn_top1_in_teacher_bank": 0.78,
    "linear_top1_on_teacher_probe": 0.69,
}


def test_the_card_says_how_close_the_exported_weights_are_on_test_images(tmp_path):
    make_space_run(tmp_path / "run", STUDENTS["cnn"])
    write_evaluations(
        tmp_path / "run",
        {"step": 0, "model": "teacher", "knn_top1": 0.95, "linear_top1": 0.97},
        {"step": 20, "model": "student", "knn_top1": 0.31, "weights": "last"} | dict.fromkeys(IN_SPACE, 0.123),
        {"model": "student", "knn_top1": 0.8, "linear_top1": 0.85, "weights": "last"} | IN_SPACE,
        {"model": "student", "knn_top1": 0.77, "weights": "averaged"} | dict.fromkeys(IN_SPACE, 0.456),
    )
    export_student(tmp_path / "run", tmp_path / "out", space="teacher")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| digits | cosine with the teacher's features | 0.912 | - |" in card
    assert "| digits | CKA with them | 0.834 | - |" in card
    assert "| digits | k-NN among the teacher's training features | 78.0% | 95.0% |" in card
    assert "| digits | the teacher's linear probe | 69.0% | 97.0% |" in card
    assert "| digits | student | 80.0% | 85.0% |" in card
    assert not re.search(r"0\.123|12\.3%|0\.456|45\.6%|77\.0%", card), "figures of another step or other weights"


def test_a_run_that_did_not_measure_it_names_the_command_that_does(tmp_path):
    make_space_run(tmp_path / "run", STUDENTS["cnn"])
    write_evaluations(tmp_path / "run", {"model": "student", "knn_top1": 0.8})
    export_student(tmp_path / "run", tmp_path / "out", space="teacher")
    card = (tmp_path / "out" / "README.md").read_text()
    command = "`python -m distillery.evaluate --run DIR --checkpoint DIR/checkpoints/step_00000040.pt`"
    assert command in card and "`eval_datasets`, which it needs" in card and "| digits | student | 80.0% |" in card


def test_onnx_gives_the_teachers_space_under_the_names_of_its_fields(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="the exporter needs onnxscript")
    pytest.importorskip("onnxruntime", reason="the code on the card needs it")
    model = STUDENTS["own normalisation"] | {"student_name": "test_vit", "student_kwargs": {"depth": 1}}
    space = make_space_run(tmp_path / "run", model)
    written = export_student(tmp_path / "run", tmp_path / "out", "onnx", space="teacher")
    assert [path.name for path in written] == ["model.onnx", "config.json", "README.md"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    pixels = torch.rand(5, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    names = {"images": normalised(config, pixels).numpy()}
    monkeypatch.chdir(tmp_path / "out")
    exec(code, names)
    outputs = {field: torch.from_numpy(names[field]) for field in WIDTHS}
    assert_gives(outputs | {"grid": space.student.grid}, space, space.student, pixels)


def test_a_folder_in_the_teachers_space_starts_a_new_run(tmp_path, capsys):
    space = make_space_run(tmp_path / "run", STUDENTS["vit"])
    export_student(tmp_path / "run", tmp_path / "out", space="teacher")
    model = make_run(tmp_path / "next", STUDENTS["vit"]).model
    load_weights(model, tmp_path / "out", role="student")
    wanted = space.student.model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    assert "student is loaded; 12 tensors beside it are left out (heads.pooled.0.bias" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, fields, message",
    [
        (["--format", "timm"], ["pooled"], "--format timm holds the student alone.*use --format safetensors"),
        ([], [], "this run has no head for pooled features or patches.*--space backbone"),
        (["--weights", "ema"], ["pooled"], "no averaged weights"),
    ],
)
def test_what_cannot_leave_in_the_teachers_space_is_one_line_and_status_2(
    tmp_path, monkeypatch, capsys, flags, fields, message
):
    make_run(tmp_path / "run", STUDENTS["cnn"], heads={field: WIDTHS[field] for field in fields})
    arguments = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--space", "teacher", *flags]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command(__main__.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
