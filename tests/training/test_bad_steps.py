import math

import pytest
import torch
from torch import nn

from distillery.training.engine import check_numbers, train_step
from distillery.training.task import Position
from distillery.training.watch import BadSteps, RunningStatistics, check_finite, finite_weights
from tests.training.test_engine import batches, build_task, run_epoch

CPU = torch.device("cpu")
NAN = float("nan")


def losses(loss: float, grad_norm: float = 1.0, **parts: float) -> tuple[list[str], torch.Tensor]:
    return ["loss", *parts, "grad_norm"], torch.tensor([loss, *parts.values(), grad_norm])


@pytest.mark.parametrize(
    "loss, grad_norm, counts, counts_in_fp16",
    [(1.0, 1.0, 0, 0), (NAN, 1.0, 1, 1), (math.inf, 1.0, 1, 1), (1.0, NAN, 1, 0), (1.0, math.inf, 1, 0)],
)
def test_a_gradient_that_is_not_finite_is_bad_too_but_in_fp16_it_is_the_scalers_business(
    loss, grad_norm, counts, counts_in_fp16
):
    for gradients_count, expected in ((True, counts), (False, counts_in_fp16)):
        bad = BadSteps(CPU, 0, gradients_count=gradients_count)
        assert bool(bad.note(0, 0, *losses(loss, grad_norm), torch.arange(2))) == bool(expected)
        assert bad.count == expected
        assert bad.exceeded() == bool(expected)


def test_the_last_bad_step_is_described_whatever_came_after_it():
    bad = BadSteps(CPU, 1)
    for step, loss in enumerate([1.0, NAN, 2.0, NAN, 3.0, 4.0]):
        bad.note(step, step // 2, *losses(loss, step), torch.arange(3) + 10 * step)
    assert bad.exceeded()
    text = bad.describe(lambda step: step / 100)
    assert "at step 3 (epoch 1): loss=nan, grad_norm=3, lr=3.000e-02; 2 such steps, max_bad_steps is 1" in text
    assert text.endswith("images (global_idx): [30, 31, 32]")


@pytest.mark.parametrize("bad_step", range(4))
def test_steps_may_differ_in_their_losses_and_the_last_bad_one_is_described_with_its_own(bad_step):
    bad = BadSteps(CPU, 0)
    for step in range(4):
        more = {"loss/patch": step + 0.5} if step % 2 else {}
        bad.note(step, 0, *losses(NAN if step == bad_step else 1.0, **more), torch.arange(2) + step)
    text = bad.describe(lambda _step: 0.0)
    assert f"at step {bad_step} (epoch 0)" in text and f"[{bad_step}, {bad_step + 1}]" in text
    assert (f"loss/patch={bad_step + 0.5}" in text) == bool(bad_step % 2)


def test_as_many_bad_steps_as_allowed_are_no_error():
    bad = BadSteps(CPU, 2)
    for step in range(2):
        bad.note(step, 0, *losses(NAN), torch.arange(1))
    assert not bad.exceeded()


def broken_image(batch: int) -> list:
    """Three batches, with a NaN in one image of one of them."""
    data = batches(3)
    data[batch].images[4, 0, 7, 7] = NAN
    return data


@pytest.mark.parametrize("student_name", ["test_vit", "test_resnet"])
def test_a_nan_in_one_image_is_skipped_and_reaches_neither_weights_nor_running_statistics(student_name):
    task, position = build_task(max_bad_steps=1, student_name=student_name), Position()
    statistics = {}
    data = broken_image(1)
    for step in range(3):
        train_step(task, [data[step]], step, 0)
        statistics[step] = {name: value.clone() for name, value in task.student.state_dict().items()}
        check_finite(*finite_weights(task.student))
    assert task.bad_steps.count == 1
    floats = [name for name, value in statistics[0].items() if value.is_floating_point()]
    assert all(torch.equal(statistics[1][name], statistics[0][name]) for name in floats)
    assert any(not torch.equal(statistics[2][name], statistics[1][name]) for name in floats)
    position.step = 3
    check_numbers(task)


@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_step_is_left_out_by_the_optimiser_and_good_ones_are_taken(fused):
    task = build_task(max_bad_steps=1)
    task.optimizer = torch.optim.AdamW(task.student.parameters(), lr=0.0, fused=fused)
    weights = [value.detach().clone() for value in task.student.parameters()]
    train_step(task, [broken_image(0)[0]], 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(weights, task.student.parameters(), strict=True))
    train_step(task, batches(1), 1, 0)
    assert any(not torch.equal(a, b) for a, b in zip(weights, task.student.parameters(), strict=True))
    check_finite(*finite_weights(task.student))
    steps = {value["step"].item() for value in task.optimizer.state.values()}
    assert steps == {1.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outside_fp16_no_number_of_bad_steps_scales_the_loss(precision):
    task = build_task(precision=precision, max_bad_steps=9)
    for step in range(3):
        train_step(task, [broken_image(0)[0]], step, 0)
    assert task.scaler.scale(torch.ones(())) == 1 and task.scaler.get_scale() == 1


def test_running_statistics_come_back_where_a_step_was_bad_and_stay_where_it_was_not():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(2))
    statistics = RunningStatistics(model)
    for is_bad in (True, False):
        before = [value.clone() for value in model.buffers()]
        statistics.remember()
        for value in model.buffers():
            value.fill_(NAN if is_bad else 7) if value.is_floating_point() else value.add_(1)
        statistics.undo_where(torch.tensor(is_bad))
        for value, old in zip(model.buffers(), before, strict=True):
            assert torch.equal(value, old) == (is_bad and value.is_floating_point())


def test_a_gradient_that_overflows_behind_a_finite_loss_stops_the_run():
    task = build_task()
    weight = next(value for value in task.student.parameters() if value.requires_grad)
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match=r"step 0 \(epoch 0\): loss=[\d.]+, .*grad_norm="):
        run_epoch(task, Position(), batches(2), steps=2)
    check_finite(*finite_weights(task.student))


def test_a_skipped_step_of_the_fp16_scaler_is_no_error_and_later_steps_train():
    task = build_task(precision="fp16")
    assert task.scaler.get_scale() == 65536.0
    hook = task.student.heads["pooled"][0].weight.register_hook(lambda gradient: gradient * math.inf)
    before = [value.clone() for value in task.student.parameters()]
    train_step(task, batches(1), 0, 0)
    check_numbers(task)
    assert all(torch.equal(a, b) for a, b in zip(before, task.student.parameters(), strict=True))
    assert task.scaler.get_scale() == 32768.0
    hook.remove()
    train_step(task, batches(1), 1, 0)
    assert any(not torch.equal(a, b) for a, b in zip(before, task.student.parameters(), strict=True))


def test_an_fp16_scaler_that_never_comes_to_an_end_is_an_error():
    task = build_task(precision="fp16")
    task.student.heads["pooled"][0].weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="fp16.*use precision: bf16"):
        for step in range(40):
            train_step(task, batches(1, size=2), step, 0)
            check_numbers(task)


def test_each_tensor_that_is_not_finite_is_counted_and_the_first_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    check_finite(*finite_weights(model))
    model[1].running_var[0] = math.inf
    model[1].running_mean[1] = NAN
    with pytest.raises(FloatingPointError, match="2 tensors of the student .* the first is 1.running_mean"):
        check_finite(*finite_weights(model))
