import functools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from distillery.config.keys_train import TrainConfig
from distillery.config.load import load_configs
from distillery.losses.registry import LOSSES
from distillery.models.backbone import eval_mode
from distillery.training import build
from distillery.training.batches import live_batch
from distillery.training.checkpoints import state_of
from distillery.training.compilation import (
    PAYS_FROM_STEPS,
    Compiled,
    compile_now,
    decide_compiled,
    graph_breaks,
    num_graphs,
)
from distillery.training.engine import check_first_step, rehearse_step, train_step
from distillery.training.task import Position, Schedule
from tests.training.test_engine import images_of

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
        # what auto came to at the start of a run stays, on CUDA; what is written does not
        ({}, CPU, LONG, {"student": True, "teacher": True}, False, False),
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
    build._wrap_for_ranks(nn.Sequential(nn.Conv2d(3, 4, 3), layer), CPU)
    assert found["broadcast_buffers"] == broadcasts


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes, not compiled any further; a graph after the first step is an error."""
    found = []

    def keep(graph, _inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    torch._dynamo.reset()
    counters.clear()
    yield found
    torch.compiler.set_stance("default")


def compiled_task(teacher_name="test_resnet", student_name="test_vit", model=None, **train):
    settings = {"checkpoint_dir": "none", "ema_decay": 0.9, "compile": True, **train}
    model = {"teacher_name": teacher_name, "teacher_pretrained": False, "student_name": student_name,
             "student_kwargs": {"img_size": 32} if student_name == "test_vit" else {}} | (model or {})  # fmt: skip
    configs = load_configs({"dataset_name": "parquet", "cache_dir": "none", "image_size": 32}, settings, model)
    teacher, student = build.build_models(configs, CPU)
    teacher.gather_statistics([images_of(range(16))])
    return build.build_task(configs, teacher, student, Schedule(1e-3, 1e-6, 1, 10), True, CPU)


def raw_batch(task, step, size=4):
    rows = torch.arange(size) + size * step
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    return live_batch(task, images, rows, step)


VIEWS = {"hflip": True, "random_resized_crop": [0.3, 1.0], "color_jitter": 0.5, "grayscale": 0.2, "blur": 0.5}


def test_the_whole_step_is_three_graphs_made_in_the_first_step_and_a_checkpoint_shows_no_trace(graphs):
    task = compiled_task(model={"drop_path_rate": 0.2}, augment=VIEWS)
    check_first_step(task, live_batch(task, images_of(range(3)), torch.arange(3), 0))
    assert not graphs  # so few images would be another graph
    for step in range(3):
        losses = train_step(task, [raw_batch(task, step)], step, step)
        assert torch.isfinite(losses["loss"])
        if step == 0:
            after_one_step = len(graphs)
        with eval_mode(task.student):  # an evaluation between two epochs
            task.student.student(images_of(range(5)))
    convolutions = [node for graph in graphs for node in graph.graph.nodes if "conv" in str(node.target)]
    attentions = [node for graph in graphs for node in graph.graph.nodes if "attention" in str(node.target)]
    assert convolutions and attentions  # the bodies of both models are in the graphs, not only what surrounds them
    losses_of_tokens = [node for graph in graphs for node in graph.graph.nodes if "smooth_l1" in str(node.target)]
    assert losses_of_tokens and any("uint8" in str(node.meta) for graph in graphs for node in graph.graph.nodes)
    # views, teacher, student with its losses; later steps, other epochs and draws do not compile again
    assert after_one_step == len(graphs) == num_graphs() == 3
    assert graph_breaks() == 0
    state = state_of(task, Position())
    names = [*state["student"], *state["heads"], *state["ema"]]
    assert not any("_orig_mod" in name or name.startswith("module.") for name in names)
    assert state["student"].keys() == task.student.student.model.state_dict().keys()


def test_all_losses_together_compile_whole_and_once_a_queue_only_when_it_is_full(graphs):
    weights = {name: 0.7 for name in LOSSES if name not in ("kl_logits", "layers")}
    task = compiled_task(distill_loss_weights=weights, loss_options={"similarity_queue": {"queue_size": 8}})
    for step in range(4):
        train_step(task, [raw_batch(task, step)], step, 0)
        assert len(graphs) == (0 if step < 2 else 3)  # the queue holds two batches
    assert graph_breaks() == 0


def test_a_compiled_step_learns_what_an_uncompiled_one_does(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = {}
    for is_compiled in (False, True):
        task = compiled_task(compile=is_compiled, augment=VIEWS, model={"drop_path_rate": 0.2})
        found[is_compiled] = [train_step(task, [raw_batch(task, step)], step, 0)["loss"].item() for step in range(4)]
    assert found[True] == pytest.approx(found[False], rel=1e-4)


def test_a_rehearsal_compiles_everything_and_leaves_weights_statistics_gradients_and_queue_alone(graphs):
    queue = {"loss_options": {"similarity_queue": {"queue_size": 8}}}
    weights = {"cls": 1.0, "similarity_queue": 1.0}
    task = compiled_task(student_name="test_resnet", distill_loss_weights=weights, **queue)
    before = {name: value.clone() for name, value in task.student.state_dict().items()}
    line = compile_now(lambda: rehearse_step(task, raw_batch(task, 0)))
    assert line.startswith(f"torch.compile: {len(graphs)} graphs in ") and line.endswith(", 0 graph breaks")
    assert all(torch.equal(value, before[name]) for name, value in task.student.state_dict().items())
    assert all(value.grad is None for value in task.student.parameters())
    assert len(task.queue.rows) == 0
    so_far = len(graphs)
    for step in range(4):  # the queue of two batches is full after two steps
        train_step(task, [raw_batch(task, step)], step, 0)
    assert len(graphs) == so_far


def test_where_compiling_fails_the_run_goes_on_uncompiled_and_says_so(monkeypatch):
    def fails(_graph, _inputs):
        raise RuntimeError("no compiler here\n\nand pages of advice")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fails))
    task = compiled_task()
    try:
        line = compile_now(lambda: rehearse_step(task, raw_batch(task, 0)))
        assert "no compiler here" in line and "pages" not in line and "compile: false" in line
        assert torch.isfinite(train_step(task, [raw_batch(task, 0)], 0, 0)["loss"])
    finally:
        torch.compiler.set_stance("default")
