"""What a step does to a GPU, seen without one: devices, types, and every place where the host would wait for it.

The step runs on fake CUDA tensors, which have a device, a type and a shape and no numbers. Whatever needs a number on
the host fails there; copies between host and device are counted. The backward pass alone cannot run on them.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from distillery.config.load import load_configs
from distillery.losses.targets import Targets
from distillery.models import pair, views
from distillery.models.backbone import Features
from distillery.teacher_cache.reader import TeacherCache
from distillery.teacher_cache.targets import StoredTargets
from distillery.training import build
from distillery.training.batches import StepBatch, live_batch
from distillery.training.engine import Schedule, train_step

CUDA = torch.device("cuda", 0)


class Copies(TorchDispatchMode):
    """Notes every operator, and every copy between host and device that makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operators.add(str(func))
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if source is not None and isinstance(out, torch.Tensor) and source.device.type != out.device.type:
            self.waits.append(f"{func}: {source.device} -> {out.device}")
        if str(func).startswith("aten._local_scalar_dense") and source.device.type == "cuda":
            self.waits.append(f"{func}: a number of {source.device}")
        return out


def clear_constants():
    views._constants.clear()
    pair._resampling_matrix_once.cache_clear()


@pytest.fixture
def pretended_cuda(monkeypatch):
    """torch thinks that there is a GPU with bfloat16; caches of tensors are emptied, that no fake one stays."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_options: True)
    # the clock's events; only reading them, once every log_every steps, makes the host wait
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: SimpleNamespace(record=lambda: None))
    clear_constants()
    yield
    clear_constants()


def move_to_fake(model: nn.Module) -> None:
    """Replace a model's tensors by fake CUDA ones, inside FakeTensorMode."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                module._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=CUDA)


def on_gpu(batch: StepBatch) -> StepBatch:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(CUDA), batch)


def give_gradients(student: nn.Module) -> None:
    """What a backward pass leaves behind."""
    for value in student.parameters():
        if value.requires_grad:
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad + 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_a_step_of_the_default_pair_stays_on_the_gpu_and_never_makes_the_host_wait(pretended_cuda, monkeypatch, dtype):
    changes = {"random_resized_crop": [0.3, 1.0], "color_jitter": 0.5, "grayscale": 0.2, "blur": 0.5}
    settings = {"checkpoint_dir": "none", "ema_decay": 0.999, "max_bad_steps": 3, "grad_accumulation_steps": 2}
    settings["augment"] = changes
    configs = load_configs({"dataset_name": "parquet", "cache_dir": "none"}, settings, {"teacher_pretrained": False})
    assert (configs.model.teacher_name, configs.model.student_name) == (
        "vit_base_patch14_dinov2.lvd142m",
        "vit_small_patch16_224",
    )
    with torch.device("meta"):  # no weights: neither downloaded nor drawn
        teacher, student = build.build_models(configs, torch.device("meta"))
    types: dict[str, torch.dtype] = {}
    with FakeTensorMode():
        for model in (teacher, student):
            move_to_fake(model)
        task = build.build_task(configs, teacher, student, Schedule(1e-3, 1e-6, 1, 10), False, CUDA)
        assert task.precision == "bf16"
        monkeypatch.setattr(torch.Tensor, "backward", lambda *_args: give_gradients(student))
        teacher.register_forward_hook(lambda _m, _i, out: types.update(teacher=out.tokens.dtype))
        batch = on_gpu(live_batch(task, torch.zeros((4, 3, 224, 224), dtype=dtype), torch.arange(4), 0))
        train_step(task, [batch, batch], 0, 0)  # constants go to the device once
        with Copies() as copies:
            for step in (1, 2):
                losses = train_step(task, [batch, batch], step, 0)
    assert copies.waits == []
    assert "aten._fused_adamw_.default" in copies.operators
    assert {value.device for value in losses.values()} == {CUDA}
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert losses.keys() == {"loss", "loss/cls", "loss/patch", "grad_norm"}
    assert types["teacher"] in (torch.bfloat16, torch.float32)
    assert {value.dtype for value in student.parameters()} == {torch.float32}
    moments = [value for state in task.optimizer.state.values() for value in state.values()]
    assert {value.device for value in (*moments, *task.ema.state.values(), task.bad_steps.count)} == {CUDA}


def test_views_and_targets_of_stored_outputs_stay_on_the_gpu(pretended_cuda):
    settings = {"checkpoint_dir": "none", "teacher_cache": {"enabled": True}}
    settings["augment"] = {"random_resized_crop": [0.3, 1.0], "color_jitter": 0.5, "grayscale": 0.2, "blur": 0.5}
    configs = load_configs({"dataset_name": "parquet", "cache_dir": "none"}, settings, {})
    data, cache = configs.data, SimpleNamespace(widths={"pooled": 768, "tokens": 768}, grid=(8, 8), num_views=4)
    cache.decode = functools.partial(TeacherCache.decode, cache)
    with FakeTensorMode():
        cache.basis = {"mean": torch.zeros(768), "components": torch.zeros(256, 768), "scale": torch.zeros(256)}
        targets = Targets(cache.widths, True)
        move_to_fake(targets)
        augmentation = views.Augmentation(**settings["augment"], mean=data.mean, std=data.std)
        stored = StoredTargets(cache, targets, augmentation, configs.train)
        images, rows = torch.zeros((4, 3, 224, 224), device=CUDA), torch.arange(4)
        view = stored.draw(rows, 0).to(CUDA)
        pooled = torch.zeros((4, 768), dtype=torch.float16, device=CUDA)
        batch = [pooled, torch.zeros((4, 64, 256), dtype=torch.int8, device=CUDA)]
        augmentation.apply(images, view)  # constants go to the device once
        stored.targets(batch)
        with Copies() as copies:
            found = augmentation.apply(images, view), *stored.targets(batch).tensors().values()
    assert copies.waits == []
    assert {value.device for value in found} == {CUDA}
    assert found[2].shape == (4, 64, 768)


def small_configs(**train):
    settings = {"checkpoint_dir": "none", "ema_decay": 0.9, "compile_student": True, "compile_teacher": True, **train}
    model = {"teacher_name": "test_resnet", "teacher_pretrained": False, "student_name": "test_vit",
             "student_kwargs": {"img_size": 32}}  # fmt: skip
    return load_configs({"dataset_name": "parquet", "cache_dir": "none", "image_size": 32}, settings, model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_on_a_gpu_torch_sees_no_synchronisation_inside_the_step(precision):
    configs = small_configs(precision=precision, compile_student=False, compile_teacher=False)
    teacher, student = build.build_models(configs, CUDA)
    teacher.gather_statistics([torch.randn(16, 3, 32, 32, device=CUDA)])
    task = build.build_task(configs, teacher, student, Schedule(1e-3, 1e-6, 1, 10), True, CUDA)
    batch = on_gpu(live_batch(task, torch.randn(4, 3, 32, 32), torch.arange(4), 0))
    train_step(task, [batch], 0, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2):
            losses = train_step(task, [batch], step, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert isinstance(teacher(batch.images), Features)
    assert torch.isfinite(losses["loss"])
