import itertools
import math
import weakref

import pytest
import torch
from torch import nn

from distillery.losses.objective import Objective
from distillery.losses.queue import EmbeddingQueue
from distillery.losses.targets import FrozenTeacher
from distillery.models.backbone import Features, ModelSpec, build_backbone
from distillery.models.pair import StudentWithHeads
from distillery.models.views import Augmentation
from distillery.system.errors import UserError
from distillery.system.signals import StopFlag
from distillery.training.batches import SECOND_VIEW, StepBatch, live_batch
from distillery.training.checkpoints import restore, state_of
from distillery.training.engine import batches_by_step, check_first_step, train_one_epoch, train_step
from distillery.training.task import Ema, Position, Schedule, Task
from distillery.training.watch import check_finite, finite_weights

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
AS_THEY_ARE = Augmentation(hflip=False, mean=MEAN, std=STD)


def backbone(name: str, **kwargs):
    spec = ModelSpec(source="timm", name=name, pretrained=False, **kwargs)
    return build_backbone(spec, data_mean=MEAN, data_std=STD, image_size=32)


def build_task(*, student_name: str = "test_vit", weights=None, accumulation_steps: int = 1, **changes) -> Task:
    torch.manual_seed(0)
    teacher = FrozenTeacher(backbone("test_resnet"))
    student = StudentWithHeads(backbone(student_name, kwargs={"img_size": 32} if "vit" in student_name else None),
                               teacher.widths, {"pooled", "tokens"})  # fmt: skip
    teacher.gather_statistics([images_of(range(16))])
    weights = weights or {"cls": 1.0, "patch": 0.5}
    objective = Objective(student, weights)
    settings = {
        "student": student,
        "objective": objective,
        "objective_call": objective,
        "teacher": teacher,
        "teacher_call": teacher,
        "optimizer": torch.optim.AdamW(student.parameters(), lr=0.0),
        "schedule": Schedule(1e-3, 1e-6, 2, 20),
        "loss_weights": weights,
        "augment": AS_THEY_ARE,
        "to_float": lambda images: images,
        "device": torch.device("cpu"),
        "precision": "fp32",
        "max_grad_norm": 1.0,
        "accumulation_steps": accumulation_steps,
        "seed": 0,
    }
    return Task(**(settings | changes))


def images_of(rows) -> torch.Tensor:
    rows = list(rows)
    return torch.stack([torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(row)) for row in rows])


def batch_of(images: torch.Tensor, rows: torch.Tensor) -> StepBatch:
    """A batch of images as they are, without stochastic depth."""
    return StepBatch(images, rows, AS_THEY_ARE.draw(rows, seed=0, epoch=0))


def batches(num: int, size: int = 8) -> list[StepBatch]:
    rows = [range(k * size, (k + 1) * size) for k in range(num)]
    return [batch_of(images_of(of_batch), torch.tensor(of_batch)) for of_batch in rows]


def run_epoch(task: Task, position: Position, data, steps: int, log_every: int = 1, after=None) -> list[dict]:
    rows = []

    def after_step(position, row):
        rows.append(row)
        if after:
            after(position)

    with StopFlag() as stop:
        task_stop = after.stop if after and hasattr(after, "stop") else stop
        train_one_epoch(
            task, data, position, task_stop, steps_in_epoch=steps, log_every=log_every, after_step=after_step
        )
    return rows


@pytest.mark.parametrize("warmup, total", list(itertools.product([0, 1, 5], [1, 2, 50])))
def test_schedule_warms_up_to_the_peak_and_ends_at_min_lr(warmup, total):
    schedule = Schedule(1e-3, 1e-6, min(warmup, total), total)
    rates = [schedule.at(step) for step in range(total)]
    assert max(rates) <= 1e-3 * (1 + 1e-12)
    assert all(a <= b for a, b in itertools.pairwise(rates[: schedule.warmup_steps]))
    assert all(a >= b for a, b in itertools.pairwise(rates[schedule.warmup_steps :]))
    if total > warmup + 1:
        assert rates[-1] == pytest.approx(1e-6)
        assert rates[schedule.warmup_steps] == pytest.approx(1e-3)


def test_schedule_equals_the_formula():
    schedule = Schedule(0.1, 0.01, 10, 110)
    assert schedule.at(4) == pytest.approx(0.1 * 5 / 10)
    assert schedule.at(60) == pytest.approx(0.01 + 0.09 * 0.5 * (1 + math.cos(math.pi * 50 / 99)))


def test_a_few_steps_bring_the_loss_down():
    task = build_task()
    losses = [train_step(task, batches(1), step, 0)["loss"].item() for step in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def test_accumulated_halves_equal_the_whole_batch():
    whole, halves = build_task(), build_task(accumulation_steps=2)
    train_step(whole, batches(1, size=8), 0, 0)
    train_step(halves, batches(2, size=4), 0, 0)
    for a, b in zip(whole.student.parameters(), halves.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_batches_of_a_step_are_gone_before_those_of_the_next_are_fetched():
    fetched, alive = [], []

    def fetch():
        for _ in range(9):
            alive.append(sum(images() is not None for images in fetched))
            batch = batches(1, size=2).pop()
            fetched.append(weakref.ref(batch.images))
            yield batch
            del batch

    run_epoch(build_task(accumulation_steps=3), Position(), fetch(), steps=3)
    assert max(alive) == 2


def test_the_teacher_does_not_change():
    task = build_task()
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    for step in range(3):
        train_step(task, batches(1), step, 0)
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.state_dict().items())


def test_gradients_are_clipped_before_the_step():
    task = build_task(max_grad_norm=1e-9)
    before = [value.clone() for value in task.student.parameters()]
    task.optimizer = torch.optim.SGD(task.student.parameters(), lr=0.0)
    norm = train_step(task, batches(1), 0, 0)["grad_norm"]
    assert norm > 1e-3
    moved = sum((a - b).norm().item() for a, b in zip(before, task.student.parameters(), strict=True))
    assert moved < 1e-8


def test_ema_follows_the_weights_and_copies_counters():
    model = nn.BatchNorm1d(2)
    ema = Ema(model, decay=0.9)
    model(torch.randn(8, 2))
    with torch.no_grad():
        model.weight.fill_(2.0)
    ema.update()
    torch.testing.assert_close(ema.state["weight"], torch.full((2,), 1.1))
    assert ema.state["num_batches_tracked"] == 1


def test_bf16_trains_in_float32_weights():
    task = build_task(precision="bf16")
    losses = train_step(task, batches(1), 0, 0)
    assert losses["loss"].dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in task.student.parameters())


def test_first_step_check_passes_for_a_working_task_and_leaves_no_trace():
    task = build_task(student_name="test_resnet")
    before = {name: value.clone() for name, value in task.student.state_dict().items()}
    check_first_step(task, batches(1)[0])
    assert all(torch.equal(value, before[name]) for name, value in task.student.state_dict().items())
    assert all(value.grad is None for value in task.student.parameters())
    assert task.student.training


def test_first_step_check_runs_the_student_as_a_step_does_dropout_included():
    class Dropout(nn.Module):
        def forward(self, x):
            assert not self.training, "a mask of another shape"
            return x

    task = build_task()
    task.student.heads["pooled"].append(Dropout())
    with pytest.raises(AssertionError, match="a mask of another shape"):
        check_first_step(task, batches(1)[0])
    assert task.student.training


def test_first_step_check_names_a_term_that_cannot_teach():
    task = build_task()
    for parameter in task.student.heads["tokens"].parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(UserError, match="loss/patch"):
        check_first_step(task, batches(1)[0])


def bad_teacher(task: Task, at_image: float):
    """The task's teacher, but NaN for the batch whose first pixel is `at_image`."""

    def call(images):
        features = task.teacher(images)
        factor = float("nan") if images[0, 0, 0, 0].item() == at_image else 1.0
        return Features(features.pooled * factor, features.tokens, features.grid)

    return call


def test_nan_stops_with_the_step_the_rate_and_the_images():
    task, data = build_task(), batches(3)
    task.teacher_call = bad_teacher(task, data[1][0][0, 0, 0, 0].item())
    with pytest.raises(FloatingPointError, match=r"step 1 .*loss=nan.*lr=.*global_idx\): \[8, 9"):
        run_epoch(task, Position(), data, steps=3)


def test_nan_never_reaches_the_weights_and_max_bad_steps_skips_it():
    task, data = build_task(max_bad_steps=1), batches(3)
    task.teacher_call = bad_teacher(task, data[1][0][0, 0, 0, 0].item())
    position = Position()
    run_epoch(task, position, data, steps=3)
    assert position.step == 3
    check_finite(*finite_weights(task.student))


def test_weights_that_are_not_finite_are_refused():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="weight; not saved"):
        check_finite(*finite_weights(model))


def test_an_epoch_counts_steps_and_samples_and_logs_every_so_often():
    task, position = build_task(), Position()
    rows = run_epoch(task, position, batches(4), steps=4, log_every=2)
    assert (position.step, position.samples) == (4, 32)
    assert [row is not None for row in rows] == [False, True, False, True]
    assert {"loss", "loss/cls", "loss/patch", "lr", "grad_norm", "images_per_second", "step_seconds",
            "data_wait_fraction"} <= rows[1].keys()  # fmt: skip


def test_a_capped_epoch_ends_at_its_cap():
    position = Position()
    run_epoch(build_task(), position, batches(4), steps=2)
    assert position.step == 2


def test_groups_that_the_end_cuts_short_are_left_out():
    assert list(batches_by_step(range(7), 3)) == [[0, 1, 2], [3, 4, 5]]


def test_a_stop_request_ends_the_epoch_after_the_step_and_resuming_equals_the_straight_run():
    straight = build_task()
    run_epoch(straight, Position(), batches(4), steps=4)

    class StopAt:
        stop = StopFlag()

        def __call__(self, position):
            if position.step == 2:
                self.stop.reason = "SIGTERM"

    task, position = build_task(), Position()
    run_epoch(task, position, batches(4), steps=4, after=StopAt())
    assert position.step == 2
    run_epoch(task, position, batches(4)[position.samples // 8 :], steps=4)
    for a, b in zip(straight.student.state_dict().values(), task.student.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def queue_task() -> Task:
    return build_task(
        weights={"cls": 1.0, "similarity_queue": 1.0},
        queue=EmbeddingQueue(20, FrozenTeacher(backbone("test_resnet")).widths["pooled"], torch.device("cpu")),
    )


def test_a_queue_is_filled_with_the_targets_of_the_steps_and_not_by_the_first_step_check():
    task, data = queue_task(), batches(3)
    check_first_step(task, data[0])
    assert len(task.queue.rows) == 0
    train_step(task, data[:1], 0, 0)
    assert torch.equal(task.queue.rows, task.teacher(data[0][0]).pooled)
    train_step(task, data[1:2], 1, 0)
    train_step(task, data[2:3], 2, 0)
    assert len(task.queue.rows) == 20


def test_a_run_with_a_queue_resumes_to_the_same_bits(tmp_path):
    straight, stopped, later = queue_task(), queue_task(), queue_task()
    run_epoch(straight, Position(), batches(4), steps=4)
    position = Position()
    run_epoch(stopped, position, batches(2), steps=2)
    torch.save(state_of(stopped, position), tmp_path / "state.pt")
    resumed = Position()
    restore(later, resumed, torch.load(tmp_path / "state.pt", weights_only=True), 8)
    run_epoch(later, resumed, batches(4)[2:], steps=4)
    assert torch.equal(straight.queue.rows, later.queue.rows)
    for a, b in zip(straight.student.state_dict().values(), later.student.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weight, epochs", [(0.0, [3]), (0.1, [3, 3 + SECOND_VIEW])])
def test_a_second_view_is_drawn_under_a_number_of_its_own_and_only_for_losses_that_need_it(weight, epochs):
    drawn, seen = [], []

    class Augment:
        def draw(self, global_idx, *, seed, epoch):
            drawn.append(epoch)
            return torch.full((len(global_idx), 1), float(epoch >= SECOND_VIEW))

        def apply(self, images, parameters):
            return images + parameters[:, :, None, None]

    task = build_task(weights={"cls": 1.0, "barlow": weight}, augment=Augment())
    task.teacher_call = lambda view: seen.append(view[0, 0, 0, 0].item()) or task.teacher(view)
    images, rows = images_of(range(8)), torch.arange(8)
    losses = train_step(task, [live_batch(task, images, rows, 3)], 0, 3)
    assert sorted(drawn) == epochs
    first = images[0, 0, 0, 0].item()
    assert sorted(seen) == pytest.approx([first, first + 1][: len(epochs)])
    assert ("loss/barlow" in losses) == (len(epochs) == 2)
