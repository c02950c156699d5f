"""Students as ONNX: what the graph gives, at which sizes and in which types, and what is refused."""

import copy
import json
import re
import sys

import numpy as np
import onnx
import pytest
import torch
from caches import Images

from distillery.cache.plan import CachePlan, survey_cache
from distillery.export import onnx as onnx_module
from distillery.export import onnx_export, parity
from distillery.export.formats import export_student
from distillery.export.onnx import OUTPUT_NAMES, build_onnx, open_session, run_session
from distillery.export.onnx_export import OnnxOptions
from distillery.export.parity import Agreement, check_limits, measure_agreement
from distillery.export.plain_attention import PlainAttention, plain_attention
from distillery.export.quantise import to_float16
from distillery.export.run_images import find_images
from distillery.models.backbone import Backbone, Features, ModelSpec, build_backbone
from distillery.models.builders import BuiltModel
from distillery.models.pair import build_projector
from distillery.precompute.pipeline import make_cache
from distillery.sources.pixels import PreprocessSpec
from distillery.system.errors import UserError
from distillery.system.signals import StopFlag
from distillery.training.checkpoints import save_checkpoint
from distillery.training.trained import load_trained
from tests.export.test_formats import HUBCONF, STUDENTS, TINY, make_run, trained_features

pytest.importorskip("onnxscript", reason="the exporter needs onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="without onnxruntime there is nothing to compare with")

STUDENTS = STUDENTS | {
    "small vit": {
        "student_name": "vit_small_patch16_224",
        "student_kwargs": TINY | {"depth": 1},
        "use_cls_token": False,
    }
}
MEAN, STD = (0.4, 0.4, 0.4), (0.229, 0.224, 0.225)  # of the images of make_run


class Patches(Images):
    """Images of nine coloured fields: unlike noise, some are nearer to each other than others."""

    def pixels(self, i):
        fields = np.random.default_rng(i).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        return fields.repeat(16, axis=0).repeat(16, axis=1)


def write_images(directory, num_rows):
    """A cache of images of 48 px, as the run of make_run was trained on."""
    source = Patches(num_rows)
    spec = PreprocessSpec(48, "squash", "bicubic", MEAN, STD)
    plan = CachePlan(directory, spec, "float32", 16, num_rows, num_rows, source.identity, False)
    with StopFlag() as stop:
        survey = survey_cache(plan, range(plan.num_shards))
        make_cache(plan, source, survey=survey, batch_size=16, num_workers=1, stop=stop)


def add_heads(run_dir, **widths):
    """Untrained heads of these widths (field -> the teacher's) in the run's checkpoint."""
    (path,) = (run_dir / "checkpoints").glob("*.pt")
    state = torch.load(path, weights_only=True)
    own, projector = load_trained(run_dir).backbone.widths, state["config"]["model"]["projector"]
    torch.manual_seed(2)
    heads = {field: build_projector(own[field], width, **projector) for field, width in widths.items()}
    save_checkpoint(run_dir, state | {"heads": torch.nn.ModuleDict(heads).state_dict()}, 41, keep=1)


def of_hub(tmp_path):
    """The keys of the smallest student: one convolution, of a torch.hub folder."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(HUBCONF)
    return {"student_name": "small", "student_source": "torch_hub", "student_repo": str(tmp_path / "hub")}


FUSED = {
    "relative positions": ("vit_relpos_small_patch16_224", TINY | {"depth": 1}, 48),
    "five dimensions": (
        "hiera_tiny_224", {"embed_dim": 24, "num_heads": 1, "stages": (1,), "mask_unit_size": (2, 2), "q_pool": 0}, 32
    ),
}  # fmt: skip


def build_timm_student(name, kwargs, size):
    torch.manual_seed(0)
    spec = ModelSpec(source="timm", name=name, pretrained=False, kwargs=kwargs)
    return build_backbone(spec, data_mean=(0.5,) * 3, data_std=(0.5,) * 3, image_size=size).eval()


def images_like(backbone, batch=3):
    return torch.randn(batch, 3, *backbone.img_size, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", sorted(FUSED))
def test_models_with_fused_attention_become_onnx_and_stay_fused_themselves(name):
    backbone = build_timm_student(*FUSED[name])
    assert any(getattr(part, "fused_attn", False) for part in backbone.modules())
    model = build_onnx(backbone)
    assert model.input_shape[2:] == backbone.img_size and "takes no other size" in model.fixed_because
    (row, _) = measure_agreement(model.content, backbone, model.fields, [images_like(backbone)], neighbours=False)
    assert row.output == "features" and row.max_difference < 1e-4
    assert any(getattr(part, "fused_attn", False) for part in backbone.modules())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.tensor([[True, False, True], [True, True, True], [False, True, False]])},
        {"attn_mask": torch.tensor([[0.5, -1.0, 0.0]])},
        {"enable_gqa": True},
    ],
)
@pytest.mark.parametrize("leading", [(2,), (2, 5)])
def test_plain_attention_is_torchs_own(options, leading):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(*leading, 4, 3, 8, generator=generator) for _ in range(3))
    if "enable_gqa" in options:
        key, value = key[..., :2, :, :], value[..., :2, :, :]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(plain_attention(query, key, value, **options), expected)
    with PlainAttention():
        assert torch.equal(
            torch.nn.functional.scaled_dot_product_attention(query, key, value, **options),
            plain_attention(query, key, value, **options),
        )


class Unexportable(torch.nn.Module):
    """A model with an operation that ONNX does not have, or whose code looks at the batch size."""

    num_features = 8

    def __init__(self, way):
        super().__init__()
        self.stem, self.way = torch.nn.Conv2d(3, 8, 4, 4), way

    def forward_features(self, images):
        x = self.stem(images)
        if self.way == "operation":
            assert images.shape[-1] == 16, "at one size the exporter tries once"
            return x + torch.linalg.eigvalsh(x @ x.transpose(-2, -1))[..., None]
        return x + torch.zeros(len(images), 1, 1, 1)


@pytest.mark.parametrize(
    "way, message",
    [
        ("operation", r"Unexportable cannot be written as ONNX by torch [\w.+]+: \w+: .*--format safetensors"),
        ("batch", "Unexportable cannot be written as ONNX for any batch size"),
    ],
)
def test_a_model_that_cannot_become_onnx_is_one_short_message(tmp_path, capfd, way, message):
    built = BuiltModel(Unexportable(way), (16, 16))
    backbone = Backbone(built, label="own", data_mean=(0.5,) * 3, data_std=(0.5,) * 3).eval()
    with pytest.raises(UserError, match=message) as refused:
        build_onnx(backbone)
    assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


def test_onnx_equals_pytorch_at_any_batch_size(tmp_path):
    backbone = make_run(
        tmp_path / "run", STUDENTS["small vit"] | {"student_mean": (0.1, 0.2, 0.3), "student_std": (0.5,) * 3}
    )
    written = export_student(tmp_path / "run", tmp_path / "out", "onnx")
    assert [path.name for path in written] == ["model.onnx", "config.json", "README.md"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    mean, std = (torch.tensor(config[part])[:, None, None] for part in ("mean", "std"))
    for batch in (1, 5):
        pixels = torch.rand(batch, 3, 48, 48, generator=torch.Generator().manual_seed(batch))
        features, tokens = session.run(None, {"images": ((pixels - mean) / std).numpy()})
        torch.testing.assert_close(torch.from_numpy(features), trained_features(backbone, pixels), atol=1e-4, rtol=1e-4)
        assert tokens.shape == (batch, backbone.grid[0] * backbone.grid[1], backbone.token_width)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a convolutional student with heads for both fields, and a cache of 90 images; the tests only read it."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    make_run(run_dir, STUDENTS["own normalisation"])
    add_heads(run_dir, pooled=12, tokens=20)
    write_images(run_dir / "cache", 90)
    return run_dir


@pytest.fixture(scope="module")
def space(run):
    """The run's student in its teacher's space."""
    return load_trained(run).in_teacher_space()


@pytest.fixture(scope="module")
def model(space):
    """The graph of it."""
    return build_onnx(space, OUTPUT_NAMES["teacher"])


@pytest.fixture
def traced_once(model, monkeypatch):
    """The exports of the run take the graph that there is."""
    monkeypatch.setattr(onnx_export, "build_onnx", lambda module, names: model)


@pytest.mark.usefixtures("traced_once")
def test_in_the_teachers_space_the_outputs_are_pooled_and_tokens_at_any_size(run, tmp_path, capsys):
    export_student(run, tmp_path / "out", "onnx", space="teacher")
    module = load_trained(run).in_teacher_space()
    module.student.resizes = False
    session = open_session((tmp_path / "out" / "model.onnx").read_bytes())
    for batch, height, width in ((1, 48, 48), (3, 64, 33), (2, 75, 96)):
        images = torch.randn(batch, 3, height, width)
        found = run_session(session, images)
        assert list(found) == ["pooled", "tokens"]
        with torch.no_grad():
            expected = module(images)
        torch.testing.assert_close(found["pooled"], expected.pooled, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["tokens"], expected.tokens, atol=1e-4, rtol=1e-4)
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["onnx"]
    assert facts["input"]["shape"] == ["batch", 3, "height", "width"]
    assert [output["shape"] for output in facts["outputs"]] == [["batch", 12], ["batch", "patches", 20]]
    assert facts["compared_on"] == "90 images of the cache"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| output | `tokens` | float32 `[batch, patches, 20]` |" in card and "| pooled | " in card
    assert "- `tokens` [batch, patches, 20]: " in card and "- `pooled` [batch, 12]: " in card
    assert "fp32, " in capsys.readouterr().out


def test_a_run_without_a_head_for_patches_leaves_their_output_out(tmp_path):
    make_run(tmp_path / "run", of_hub(tmp_path))
    add_heads(tmp_path / "run", pooled=12)
    export_student(tmp_path / "run", tmp_path / "out", "onnx", space="teacher")
    session = open_session((tmp_path / "out" / "model.onnx").read_bytes())
    assert [output.name for output in session.get_outputs()] == ["pooled"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert '(pooled,) = session.run(["pooled"], {"images": images})' in card
    assert "32 images of random noise, because the run has no cache here" in card


def weight_types(content):
    return {tensor.data_type for tensor in onnx.load_model_from_string(content).graph.initializer if tensor.dims}


@pytest.mark.usefixtures("traced_once")
def test_smaller_types_keep_inputs_outputs_and_agreement(run, tmp_path, capsys):
    sizes = {}
    for precision in ("fp32", "fp16", "int8"):
        options = OnnxOptions(precision, 32 if precision == "int8" else None)
        export_student(run, tmp_path / precision, "onnx", space="teacher", onnx=options)
        content = (tmp_path / precision / "model.onnx").read_bytes()
        session, sizes[precision] = open_session(content), len(content)
        assert {value.type for value in [*session.get_inputs(), *session.get_outputs()]} == {"tensor(float)"}
        facts = json.loads((tmp_path / precision / "config.json").read_text())["onnx"]
        assert (facts["precision"], facts["bytes"]) == (precision, len(content))
        assert all(row["mean_cosine"] > 0.99 for row in facts["agreement"])
        # other sizes work in each of them
        assert run_session(session, torch.randn(2, 3, 64, 96))["tokens"].shape == (2, 6, 20)
    assert sizes["fp16"] < 0.6 * sizes["fp32"] and sizes["int8"] < 0.5 * sizes["fp32"]
    assert facts["calibrated_with"] == "32 images of the cache"
    assert facts["compared_on"] == "58 images of the cache, none of them calibrated with"
    types = weight_types((tmp_path / "int8" / "model.onnx").read_bytes())
    assert onnx.TensorProto.INT8 in types and onnx.TensorProto.FLOAT16 not in types
    assert "against PyTorch on 58 images of the cache" in capsys.readouterr().out
    for precision, message in (
        (
            "fp16",
            r"fp16 ONNX model is too far.*pooled has mean cosine 0.99.*at least 1 is asked.*--precision fp32",
        ),
        ("int8", r"int8 ONNX model is too far.*Try --calibration_images N with more images, .*--min_cosine 0.9"),
    ):
        with pytest.raises(UserError, match=message):
            options = OnnxOptions(precision, min_cosine=1.0)
            export_student(run, tmp_path / "refused", "onnx", space="teacher", onnx=options)
    assert not (tmp_path / "refused").exists()


def test_images_come_from_the_test_split_first_and_are_normalised_as_the_student_takes_them(run, tmp_path):
    trained = load_trained(run)
    data = trained.config["data"] | {"eval_datasets": {"pets": {}}, "cache_dir": str(tmp_path)}
    write_images(tmp_path / "eval" / "pets" / "test", 50)
    calibration, compared = find_images(data, trained.backbone, 8)
    assert calibration is None and compared.where == "50 images of pets/test" and compared.have_neighbours
    write_images(tmp_path, 10)
    calibration, compared = find_images(data, trained.backbone, 8)
    assert calibration.where == "8 images of the cache" and compared.where == "50 images of pets/test"
    write_images(tmp_path / "eval" / "few" / "test", 49)
    calibration, compared = find_images(data | {"eval_datasets": {"few": {}}}, trained.backbone, 8)
    assert compared.where == "10 images of the cache, some of them calibrated with: it has few"
    assert not compared.have_neighbours, "the ten nearest of ten agree whatever the graph gives"
    pixels = torch.from_numpy(np.stack([Patches(10).pixels(i) for i in range(10)])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    torch.testing.assert_close(torch.cat(list(compared)), (pixels - mean) / std, atol=1e-5, rtol=1e-5)
    # and the backbone takes its own normalisation again
    images = images_like(trained.backbone)
    assert torch.equal(trained.backbone.prepare(images), images)


def break_index(cache_dir):
    (cache_dir / "index.json").write_text("{")


def remove_shard(cache_dir):
    (cache_dir / "images_shard_00001.pt").unlink()


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("damage, reason", [(break_index, "index.json"), (remove_shard, "images_shard_00001.pt")])
def test_a_damaged_cache_stops_calibration_but_no_comparison(run, space, model, tmp_path, capsys, damage, reason):
    trained = load_trained(run)
    trained.config["data"]["cache_dir"] = str(tmp_path)
    write_images(tmp_path, 90)
    damage(tmp_path)
    with pytest.raises(UserError, match=reason) as refused:
        onnx_export.make_onnx(trained, space, "teacher", OnnxOptions("int8", 32))
    assert "cannot be made int8" not in str(refused.value)
    _, facts = onnx_export.make_onnx(trained, space, "teacher", OnnxOptions())
    assert facts["compared_on"] == "32 images of random noise, because the images of the run could not be read"
    assert facts["agreement"][0]["neighbour_overlap"] is None
    assert re.search(f"the images of the run cannot be read: .*{reason}", capsys.readouterr().err)


@pytest.mark.usefixtures("traced_once")
def test_a_cache_whose_place_is_not_known_stops_no_export_in_float32(run, space, monkeypatch, capsys):
    trained = load_trained(run)
    monkeypatch.delenv("NO_SUCH_PLACE", raising=False)
    trained.config["data"]["cache_dir"] = "$NO_SUCH_PLACE/cache"
    _, facts = onnx_export.make_onnx(trained, space, "teacher", OnnxOptions())
    assert facts["compared_on"].startswith("32 images of random noise")
    assert "the environment variable $NO_SUCH_PLACE is not set" in capsys.readouterr().err


def test_what_float16_loses_does_not_grow_with_the_teachers_mean(run, space, model):
    _, found = find_images(load_trained(run).config["data"], space.student, 0)
    images, far = next(iter(found)), copy.deepcopy(space)
    proto = onnx.load_model_from_string(model.content)
    for field, head in far.heads.items():
        with torch.no_grad():
            head[-1].bias += 10 * torch.randn(len(head[-1].bias), generator=torch.Generator().manual_seed(4))
        (bias,) = (tensor for tensor in proto.graph.initializer if tensor.name.endswith(f"heads.{field}.3.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(head[-1].bias.numpy(), bias.name))
    errors = []
    for module, content in ((space, model.content), (far, proto.SerializeToString())):
        found = run_session(open_session(to_float16(content)), images)
        with torch.no_grad():
            wanted = module(images).tensors()
        # beside how far the features of images lie from their mean
        errors.append([(found[name] - wanted[name]).norm() / wanted[name].std(0).norm() for name in found])
    torch.testing.assert_close(*errors, rtol=0.05, atol=0)


def test_k_nn_agreement_takes_evenly_spread_rows_whatever_the_batches(monkeypatch):
    monkeypatch.setattr(parity, "MAX_ROWS", 8)
    ours = torch.randn(45, 3, generator=torch.Generator().manual_seed(1))
    for sizes in ([45], [7] * 6 + [3], [1] * 45):
        total = parity._Total()
        for part in ours.split(sizes):
            total.add(part + 1, part)
            assert total.kept.shape[1] <= 8
        assert torch.equal(total.kept[1], ours[::8]) and torch.equal(total.kept[0], ours[::8] + 1)


def test_a_graph_that_fails_at_other_sizes_keeps_its_size_and_the_card_quotes_no_runtime(monkeypatch, capsys):
    backbone = build_timm_student("test_resnet", {}, 32)

    def fail(session, images):
        with onnx_module._runtime_errors():
            raise RuntimeError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code in batch node")

    monkeypatch.setattr(onnx_module, "run_session", fail)
    monkeypatch.setattr(onnx_module, "open_session", lambda content, quiet: "session")
    reason = onnx_module._why_not_open(backbone, {"features": "pooled"}, b"", ((32, 64),))
    assert reason == "the graph traced with open sizes fails at 32 x 64 px"
    assert "INVALID_ARGUMENT" in capsys.readouterr().err


class Shifted(torch.nn.Module):
    """A backbone, or a student in its teacher's space, whose pooled feature and tokens are moved a little."""

    def __init__(self, backbone, by):
        super().__init__()
        self.backbone, self.by = backbone, by

    def forward(self, images):
        own = self.backbone(images)
        return Features(own.pooled + self.by, own.tokens * float("nan") if self.by == 0 else own.tokens, own.grid)


def test_a_graph_that_gives_something_else_is_refused(space, model):
    images = [images_like(space.student)]
    check_limits(measure_agreement(model.content, space, model.fields, images, neighbours=True), "fp32", None)
    for by, message in (
        (
            0.1,
            r"the fp32 ONNX model is too far from PyTorch: pooled differs by \d.\de-\d+ of the largest",
        ),
        (0, "tokens differs by inf"),
    ):
        rows = measure_agreement(model.content, Shifted(space, by), model.fields, images, neighbours=True)
        with pytest.raises(UserError, match=message):
            check_limits(rows, "fp32", None)


@pytest.mark.parametrize(
    "precision, row, min_cosine, refused",
    [
        ("fp16", Agreement("features", 1e-2, 0.9, 0.99995, 0.9), None, None),
        ("fp16", Agreement("features", 1e-2, 0.9, 0.99999, 0.12), None, "agrees on 12% of the nearest images"),
        ("fp16", Agreement("features", 1e-2, 0.9, 0.9998, 0.9), None, "mean cosine 0.9998, at least 0.9999"),
        ("int8", Agreement("tokens", 1e-1, 0.9, 0.98, 0.1), None, None),
        ("int8", Agreement("features", 1e-1, 0.9, 0.98, 0.6), None, "agrees on 60% of the nearest images"),
        ("int8", Agreement("features", 1e-1, 0.9, 0.95, 0.6), None, "accept it: --min_cosine 0.95"),
        ("int8", Agreement("features", 1e-1, 0.9, 0.95, 0.6), 0.95, None),
        ("fp32", Agreement("features", 1e-3, 0.9, 0.9999, None), 0.99, None),
        ("fp32", Agreement("features", float("nan"), 0.9, float("nan"), None), None, "differs by nan"),
    ],
)
def test_each_precision_has_its_limit_and_min_cosine_takes_its_place(precision, row, min_cosine, refused):
    if refused is None:
        check_limits([row], precision, min_cosine)
    else:
        with pytest.raises(UserError, match=refused):
            check_limits([row], precision, min_cosine)


@pytest.mark.parametrize(
    "format, options, message",
    [
        ("timm", OnnxOptions("fp16"), "this is --format timm: add --format onnx"),
        ("onnx", OnnxOptions("fp8"), "unknown precision 'fp8'; known: fp32, fp16, int8"),
        ("onnx", OnnxOptions("fp16", 5), "this is fp16: add --precision int8"),
        ("onnx", OnnxOptions("int8", 0), "must be 1 or more"),
        ("onnx", OnnxOptions(min_cosine=2.0), "a cosine is between -1 and 1"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path, format, options, message):
    with pytest.raises(UserError, match=message):
        export_student(tmp_path / "run", tmp_path / "out", format, onnx=options)


def test_int8_without_a_cache_says_what_it_needs(tmp_path):
    make_run(tmp_path / "run", STUDENTS["cnn"])
    with pytest.raises(UserError, match="calibrated with images of the run's cache, and there is none at .*fp16"):
        export_student(tmp_path / "run", tmp_path / "out", "onnx", onnx=OnnxOptions("int8"))
    assert not (tmp_path / "out").exists()


def test_without_onnxruntime_fp32_is_written_uncompared_and_at_one_size(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run", of_hub(tmp_path))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="--precision fp16 needs the package onnxruntime.*pip install onnxruntime"):
        export_student(tmp_path / "run", tmp_path / "out", "onnx", onnx=OnnxOptions("fp16"))
    export_student(tmp_path / "run", tmp_path / "out", "onnx")
    assert "not compared with PyTorch: onnxruntime is not installed" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Height and width are fixed: onnxruntime" in card and "Not compared with PyTorch" in card


def test_missing_onnx_packages_are_named(tmp_path, monkeypatch):
    make_run(tmp_path / "run", STUDENTS["cnn"])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="needs the package onnx.*Run: pip install onnx onnxscript"):
        export_student(tmp_path / "run", tmp_path / "out", "onnx")
