"""The trainer's teacher in its own precision, beside a student in another."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distillery.config.load import load_configs
from distillery.models import big_weights
from distillery.models.weights import weights_hash
from distillery.training import build
from distillery.training.batches import live_batch
from distillery.training.bindings import teacher_hash
from distillery.training.engine import train_step
from distillery.training.task import Schedule

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def configs_of(teacher_checkpoint: str | None = None, **train):
    model = {"teacher_name": "test_vit", "teacher_pretrained": False, "teacher_img_size": 32,
             "teacher_checkpoint": teacher_checkpoint, "student_name": "test_resnet"}  # fmt: skip
    settings = {"checkpoint_dir": "none", **train}
    return load_configs({"dataset_name": "parquet", "cache_dir": "none", "image_size": 32}, settings, model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_the_cpu_with_a_teacher_in_bf16_computes_losses_in_float32(precision):
    configs = configs_of(teacher_precision="bf16", precision=precision)
    teacher, student = build.build_models(configs, CPU)
    assert teacher.backbone.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    images = torch.randn(8, 3, 32, 32)
    teacher.gather_statistics([images])
    task = build.build_task(configs, teacher, student, Schedule(1e-3, 1e-6, 1, 10), True, CPU)
    losses = train_step(task, [live_batch(task, images, torch.arange(8), 0)], 0, 0)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert all(torch.isfinite(value) for value in losses.values())


def test_a_run_keeps_its_teacher_when_only_the_precision_changes():
    plain, cast = (build.build_teacher(configs_of(teacher_precision=name), CPU) for name in ("auto", "bf16"))
    assert teacher_hash(plain, None) == teacher_hash(cast, None) == weights_hash(plain.backbone.model)


def test_what_a_teacher_says_on_a_cpu_with_auto_is_what_autocast_makes_of_float32_weights():
    images = torch.randn(4, 3, 32, 32)
    teacher = build.build_teacher(configs_of(precision="bf16"), CPU)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = teacher.backbone(images).tokens
    assert torch.equal(teacher(images).tokens, expected)


def test_a_big_teacher_is_loaded_in_its_precision_and_a_line_says_why_it_is_not_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(big_weights, "BIG_MODEL", 1)
    usual = build.build_teacher(configs_of(), CPU)
    torch.save(usual.backbone.model.state_dict(), tmp_path / "weights.pt")
    configs = configs_of(teacher_precision="bf16", teacher_checkpoint=str(tmp_path / "weights.pt"))
    capsys.readouterr()
    teacher = build.build_teacher(configs, CPU)
    assert capsys.readouterr().out.startswith("the teacher's weights in bf16: loaded so, and not compared with float32")
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher_hash(teacher, None) == teacher_hash(usual, None)
    images = torch.randn(4, 3, 32, 32)
    assert nn.functional.cosine_similarity(teacher(images).pooled.float(), usual(images).pooled).min() > 0.999


class Casts(TorchDispatchMode):
    """Counts changes of type."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_cast = str(func) == "aten._to_copy.default" and out.dtype != args[0].dtype
        self.count += is_cast
        return out


def test_on_a_gpu_a_teacher_in_bf16_casts_its_input_and_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_args, **_options: True)
    teacher = build.build_teacher(configs_of(teacher_precision="bf16", standardise_targets=False), CPU)
    # written out, as fake tensors have it, attention computes in float32; the GPU's own kernel takes bf16
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_options: v)
    with FakeTensorMode():
        for module in teacher.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                    module._parameters[name] = nn.Parameter(fake, requires_grad=False)
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
        images = torch.zeros((4, 3, 32, 32), device=CUDA)
        with torch.autocast("cuda", torch.bfloat16), Casts() as casts:
            features = teacher(images)
    assert casts.count == 1
    assert features.tokens.dtype == torch.bfloat16
