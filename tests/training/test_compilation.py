from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distillery.config.keys_train import TrainConfig
from distillery.training import build
from distillery.training.compilation import PAYS_FROM_STEPS, Compiled, decide_compiled

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LONG, SHORT = PAYS_FROM_STEPS, PAYS_FROM_STEPS - 1


@pytest.mark.parametrize(
    "keys, device, steps, saved, student, teacher",
    [
        ({}, CUDA, LONG, None, True, True),
        ({}, CUDA, SHORT, None, False, False),
        ({}, CPU, LONG, None, False, False),
        ({"compile": True}, CPU, 1, None, True, True),
        ({"compile": False}, CUDA, LONG, None, False, False),
        ({"compile_teacher": True}, CPU, 1, None, False, True),
        ({"compile_student": False}, CUDA, LONG, None, False, True),
        ({"compile": True, "compile_student": False}, CUDA, 1, None, False, True),
        # what auto came to at the start of a run stays; what is written does not
        ({}, CUDA, LONG, {"student": False, "teacher": False}, False, False),
        ({}, CUDA, SHORT, {"student": True, "teacher": True}, True, True),
        ({"compile": False}, CUDA, LONG, {"student": True, "teacher": True}, False, False),
    ],
)
def test_auto_compiles_long_runs_on_cuda_once_decided_and_a_written_choice_wins(
    keys, device, steps, saved, student, teacher
):
    found = decide_compiled(TrainConfig(**keys), device, steps, saved)
    assert found == Compiled(student=student, teacher=teacher)
    assert bool(found) == (student or teacher)


@pytest.mark.parametrize("layer, broadcasts", [(nn.BatchNorm2d(4), True), (nn.LayerNorm(4), False)])
def test_ranks_share_buffers_in_every_step_only_where_batch_norm_changes_them(monkeypatch, layer, broadcasts):
    found = {}
    monkeypatch.setattr(build.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda call, **options: found.update(options))
    build._wrap_student(nn.Sequential(nn.Conv2d(3, 4, 3), layer), SimpleNamespace(compile_student=False), CPU)
    assert found["broadcast_buffers"] == broadcasts
