"""Estimate what stored teacher outputs cost and save, as lines for the console before anything is written."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distillery.config.load import Configs
from distillery.losses.registry import fields_needed
from distillery.models.backbone import Backbone, eval_mode
from distillery.system.console import format_bytes
from distillery.system.errors import teacher_command
from distillery.teacher_cache.identity import TeacherCacheSpec, resolved_teacher
from distillery.teacher_cache.reader import TeacherCache
from distillery.teacher_cache.targets import wanted_outputs

# a backward pass computes two products for every one of the forward pass
_PASSES_OF_A_STEP = 3


def describe_cache(cache: TeacherCache, configs: Configs, num_images: int) -> str:
    """Where a run's targets come from, in a line."""
    block = configs.train.teacher_cache
    how = "the teacher is not loaded for training"
    if block.mode == "hybrid":
        how = f"{block.live_fraction:.3g} of the steps run the teacher on new views instead"
        if live_fields := fields_needed(configs.train.distill_loss_weights) - set(cache.widths):
            how += f", and these alone compare {', '.join(sorted(live_fields))}"
    size, others = format_bytes(cache.num_views * cache.bytes_per_view * num_images), cache.of_other_weights
    return (
        f"targets: {block.mode}: {cache.num_views} views of each of {num_images} images, {size}, from "
        f"{cache.directory}; {how}"
        + "".join(f"\n  WARNING: {other} fits as well, made with other weights of that name" for other in others)
    )


def describe_saving(
    configs: Configs, teacher: Backbone, student: nn.Module, cache: TeacherCache | None, num_images: int
) -> list[str]:
    """The teacher's share of a step's arithmetic, and what storing its outputs costs and saves.

    Args:
        configs: data, train and model.
        teacher: its backbone.
        student: with its heads.
        cache: the stored outputs, where the configuration uses them and they exist.
        num_images: that the run trains on.
    """
    share, line = _teacher_share(teacher, student, configs.data.image_size)
    block = configs.train.teacher_cache
    if cache is None:
        configured = wanted_outputs(configs, images="")
        spec = TeacherCacheSpec(configured, resolved_teacher(teacher, "", configs.train.precision))
        view_bytes, num_views = spec.view_bytes, block.views
    else:
        view_bytes, num_views = cache.bytes_per_view, cache.num_views
    cost = (
        f"{num_views} views x {format_bytes(view_bytes)} x {num_images} images = "
        f"{format_bytes(num_views * view_bytes * num_images)}"
    )
    left = 1 - share + share * (block.live_fraction if block.mode == "hybrid" else 0.0)
    saved = f"{left:.0%} of the arithmetic of a live one (computed: less than {1 / max(left, 1e-9):.3g} times faster)"
    if not block.is_read:
        mode = "cached" if block.mode == "live" else block.mode
        return [
            f"targets: live: {line}",
            f"  stored (teacher_cache: {{enabled: true, mode: {mode}}}), {cost}, an epoch would take {saved}",
        ]
    if cache is not None:
        return [describe_cache(cache, configs, num_images), f"  {line}", f"  stored, {cost}, an epoch takes {saved}"]
    return [
        f"targets: {block.mode}, but they have not been made: run {teacher_command()}",
        f"  {line}",
        f"  stored, {cost}, an epoch will take {saved}",
    ]


def _teacher_share(teacher: Backbone, student: nn.Module, image_size: int) -> tuple[float, str]:
    """The teacher's share of a live step's arithmetic, 0..1, and both in words."""
    of_teacher, of_student = (forward_flops(model, image_size) for model in (teacher, student))
    of_student *= _PASSES_OF_A_STEP
    share = of_teacher / max(1, of_teacher + of_student)
    return share, (
        f"teacher {of_teacher / 1e9:.3g} GFLOP an image, student {of_student / 1e9:.3g} (forward and backward): the "
        f"teacher is {share:.0%} of a live step"
    )


@torch.no_grad()
def forward_flops(model: nn.Module, image_size: int) -> int:
    """Floating point operations for one image, by the shapes of its products."""
    device = next(model.parameters()).device
    # the counter does not know the CPU's fused attention: written out, it is products like the others
    with eval_mode(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros((1, 3, image_size, image_size), device=device))
    return counter.get_total_flops()
