"""The step on a real GPU: torch itself says whether the host waits for it. tests/gpu does without one."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from distillery.config.load import load_configs
from distillery.training import build
from distillery.training.batches import live_batch
from distillery.training.engine import train_step
from distillery.training.task import Schedule

CUDA = torch.device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_on_a_gpu_torch_sees_no_synchronisation_inside_the_step(precision, compiled):
    settings = {"checkpoint_dir": "none", "ema_decay": 0.9, "precision": precision, "compile": compiled}
    model = {"teacher_name": "test_resnet", "teacher_pretrained": False, "student_name": "test_vit",
             "student_kwargs": {"img_size": 32}}  # fmt: skip
    configs = load_configs({"dataset_name": "parquet", "cache_dir": "none", "image_size": 32}, settings, model)
    teacher, student = build.build_models(configs, CUDA)
    teacher.gather_statistics([torch.randn(16, 3, 32, 32, device=CUDA)])
    task = build.build_task(configs, teacher, student, Schedule(1e-3, 1e-6, 1, 10), True, CUDA)
    batch = live_batch(task, torch.randn(4, 3, 32, 32), torch.arange(4), 0)
    batch = tree_map_only(Tensor, lambda value: value.to(CUDA), batch)
    train_step(task, [batch], 0, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2):
            losses = train_step(task, [batch], step, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(losses["loss"])
