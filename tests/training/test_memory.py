import pytest
import torch
from torch import nn

from distillery.config.load import load_configs
from distillery.training import memory
from distillery.training.engine import train_step
from distillery.training.memory import GB, activation_bytes, fit_line, largest_batch, student_bytes, teacher_bytes
from tests.training.test_compilation import compiled_task, raw_batch
from tests.training.test_engine import build_task


def train_config(**settings):
    settings = {"checkpoint_dir": "none"} | settings
    return load_configs({"dataset_name": "parquet", "cache_dir": "none"}, settings, {}).train


class TwoLayers(nn.Module):
    """Of an image it keeps what the first layer takes its part of (192 numbers) and what tanh gave (32), once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, images):
        return self.second(self.first(images[:, 0, :8, :8].flatten(1)).tanh())


def test_what_autograd_keeps_of_an_image_is_counted_once_and_without_the_weights():
    task = build_task()
    task.student, task.depth = TwoLayers(), None
    assert activation_bytes(task, 8, "fp32") == 4 * (192 + 32)


def test_in_bf16_an_image_of_a_real_student_takes_about_half_as_much():
    task = build_task()
    assert 0.4 < activation_bytes(task, 32, "bf16") / activation_bytes(task, 32, "fp32") < 0.8


def test_a_student_takes_its_weights_gradients_and_moments_and_averages_where_they_are_kept():
    student = nn.Module()
    student.student, student.head = nn.Sequential(nn.Linear(10, 10), nn.LayerNorm(10)), nn.Linear(10, 5, bias=False)
    student.student[0].bias.requires_grad_(False)
    trained = 100 + 20 + 50
    weights = trained + 10
    # Muon has one moment of the matrix in the backbone, AdamW two of all else
    assert student_bytes(student, train_config()) == 4 * (weights + trained + 100 + 2 * 70)
    assert student_bytes(student, train_config(ema_decay=0.9)) == 4 * (2 * weights + trained + 100 + 2 * 70)
    assert student_bytes(student, train_config(optimizer="adamw")) == 4 * (weights + 3 * trained)


def test_a_teacher_in_a_low_type_takes_half_of_float32():
    assert teacher_bytes(nn.Linear(10, 10), "fp32") == 440
    assert teacher_bytes(nn.Linear(10, 10), "bf16") == teacher_bytes(nn.Linear(10, 10), "fp16") == 220


@pytest.mark.parametrize("fixed, expected", [(0, 1700), (10 * GB, 700), (18 * GB, 0)])
def test_the_largest_batch_is_what_is_left_over_the_bytes_of_an_image(fixed, expected):
    assert largest_batch(20 * GB, fixed, 10**7) == expected


def test_without_a_gpu_the_plan_is_for_usual_ones_in_the_precision_they_would_have():
    line = fit_line(build_task(), train_config(), 32)
    assert "(bf16) + student with optimiser" in line and "(computed;" in line
    assert "no GPU here: computed for 24 / 40 / 80 GB: batch_size up to" in line
    assert "(fp32)" in fit_line(build_task(), train_config(teacher_precision="fp32"), 32)


def test_a_teacher_that_fits_no_gpu_leaves_no_batch(monkeypatch):
    monkeypatch.setattr(memory, "teacher_bytes", lambda model, precision: 70 * GB)
    assert fit_line(build_task(), train_config(), 32).endswith("batch_size up to none / none / none")


def test_a_run_on_stored_outputs_has_no_teacher_to_hold():
    task = build_task()
    task.teacher = nn.Identity()
    assert fit_line(task, train_config(), 32).startswith("fits: student with optimiser")
    assert torch.is_grad_enabled()


def test_a_student_that_leaves_out_branches_is_measured_after_a_step_of_another_batch_size():
    task = compiled_task(compile=False, model={"drop_path_rate": 0.2})
    train_step(task, [raw_batch(task, 0, size=8)], 0, 0)
    assert "(computed;" in fit_line(task, train_config(), 32)
