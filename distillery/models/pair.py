"""Make two backbones comparable: add heads to the student, and bring the tokens of both models to one grid."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distillery.models.backbone import Backbone, Features, eval_mode, field_of
from distillery.system.errors import UserError

PROJECTORS = ("mlp", "linear")


class StudentWithHeads(nn.Module):
    """The student with a trainable head for every field that a loss compares with the teacher's.

    One module, so that the optimiser and DistributedDataParallel see all parameters. An export keeps `student` (a
    Backbone) and drops `heads`. The teacher is never projected: with a learnable map on both sides a constant
    would satisfy every loss.

    Args:
        teacher_widths: tensor of Features -> width to project to (FrozenTeacher.widths).
        fields: the fields that losses need (losses.registry.fields_needed); other fields come out as the student has
            them. Of the layers each has a head of its own.
        projector: {"type": "mlp" | "linear", "hidden_dim": int | None}; None: twice the teacher's width.
    Raises:
        UserError: an unknown projector, or a field that one of the two does not have.
    """

    def __init__(
        self,
        backbone: Backbone,
        teacher_widths: Mapping[str, int],
        fields: Iterable[str],
        projector: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.student = backbone
        own = backbone.widths | {"logits": backbone.pooled_width}
        self.heads = nn.ModuleDict()
        for field in _tensors_of(fields, teacher_widths, own):
            if field == "logits":
                self.heads[field] = nn.Linear(own[field], teacher_widths[field])
            else:
                self.heads[field] = build_projector(own[field], teacher_widths[field], **(projector or {}))
        self.unreached = self._freeze_unreached()

    def forward(self, images: Tensor) -> Features:
        """Features of images [B, 3, H, W] in the teacher's widths, on the student's grid."""
        own = self.student(images)
        inputs = own.tensors() | {"logits": own.pooled}
        return own.with_tensors({field: head(inputs[field]) for field, head in self.heads.items()})

    def _freeze_unreached(self) -> list[str]:
        """Freeze what no loss can reach (a classifier, a mask token): DistributedDataParallel would wait for it."""
        parameters = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        if not parameters:
            raise UserError("the student has no trainable parameters")
        with eval_mode(self), torch.enable_grad():
            features = self(torch.zeros((1, 3, *self.student.img_size), device=self.student.scale.device))
            outputs = sum(features.tensors()[field].float().sum() for field in self.heads)
            gradients = torch.autograd.grad(outputs, list(parameters.values()), allow_unused=True)
        unreached = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
        for name in unreached:
            parameters[name].requires_grad_(False)
        return unreached


def _tensors_of(fields: Iterable[str], teacher_widths: Mapping[str, int], own: Mapping[str, int]) -> list[str]:
    """The tensors of Features in some of its fields, in a fixed order; UserError where the models do not match."""
    names = []
    for field in sorted(fields):
        if field == "layers":
            layers, own_layers = ([n for n in widths if field_of(n) == field] for widths in (teacher_widths, own))
            if not layers or layers != own_layers:
                raise UserError(
                    f"a loss compares layers: the teacher gives {len(layers)} and the student {len(own_layers)}. Set "
                    "teacher_out_indices and student_out_indices to as many each"
                )
            names += layers
        elif field not in teacher_widths or field not in own:
            role, widths = ("teacher", teacher_widths) if field not in teacher_widths else ("student", own)
            raise UserError(f"a loss compares {field}, which the {role} does not give (it gives {[*widths]})")
        else:
            names.append(field)
    return names


def build_projector(width: int, teacher_width: int, *, type: str = "mlp", hidden_dim: int | None = None) -> nn.Module:
    """The student-side head, width -> teacher_width: Linear, or Linear - LayerNorm - GELU - Linear.

    Source: RADIO, arXiv:2312.06709, and PHI-S, arXiv:2410.01680 (the two-layer head).
    """
    if type not in PROJECTORS:
        raise UserError(f"projector: unknown type {type!r}; known: {', '.join(PROJECTORS)}")
    if type == "linear":
        return nn.Linear(width, teacher_width)
    hidden_dim = hidden_dim or 2 * teacher_width
    return nn.Sequential(
        nn.Linear(width, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, teacher_width)
    )


def align_teacher(
    teacher: Features, grid: tuple[int, int], layer_grids: Sequence[tuple[int, int]] | None = None
) -> Features:
    """The teacher's features with its tokens on the student's grid, and its layers on those of the student's layers.

    layer_grids: as many as it has layers; None leaves the layers as they are.
    """
    tokens = None if teacher.tokens is None else resample_tokens(teacher.tokens, teacher.grid, grid)
    changed = {"grid": grid, "tokens": tokens}
    if layer_grids is not None:
        moves = zip(teacher.layers, teacher.layer_grids, layer_grids, strict=True)
        changed |= {"layers": tuple(resample_tokens(*move) for move in moves), "layer_grids": tuple(layer_grids)}
    return dataclasses.replace(teacher, **changed)


def align(student: Features, teacher: Features, at_most: tuple[int, int] | None = None) -> tuple[Features, Features]:
    """Both models' features with their tokens on the student's grid.

    at_most: cells along each axis; where the student has more, both are pooled by area to these. Stored tokens come
    on a coarse grid: interpolating them would teach the student a smoothness that the teacher does not have.
    """
    grid = student.grid if at_most is None else tuple(map(min, student.grid, at_most))
    return align_teacher(student, grid), align_teacher(teacher, grid, student.layer_grids if teacher.layers else None)


def resample_tokens(tokens: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Row-major tokens [B, h*w, D] of one grid over the image -> [B, h'*w', D] of another over the same image.

    Along each axis: fewer cells are the mean of what they cover, by area, so that the mean is kept exactly; more cells
    are interpolated linearly between the centres; equal numbers are left as they are. float32, or the tokens' type.
    """
    if grid == new_grid:
        return tokens
    if tokens.shape[1] != math.prod(grid):
        raise UserError(f"{tokens.shape[1]} tokens do not make a grid of {grid[0]}x{grid[1]}")
    # some ten small kernels in every step; a compiled step has it as a constant
    make = _resampling_matrix if torch.compiler.is_compiling() else _resampling_matrix_once
    matrix = make(grid, new_grid, tokens.dtype, tokens.device)
    # autocast would multiply in bfloat16 and round the targets to 3 digits
    with torch.autocast(device_type=tokens.device.type, enabled=False):
        return matrix @ tokens


def _resampling_matrix(
    grid: tuple[int, int], new_grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[h'*w', h*w] weights whose rows sum to 1: those of both axes multiplied."""
    rows, columns = (_axis_weights(old, new, device).to(dtype) for old, new in zip(grid, new_grid, strict=True))
    return torch.einsum("yh,xw->yxhw", rows, columns).flatten(2).flatten(0, 1)


@functools.cache
def _resampling_matrix_once(
    grid: tuple[int, int], new_grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    # of the teacher's pass, which is in inference mode: such a tensor could not take part in a backward pass later
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        return _resampling_matrix(grid, new_grid, dtype, device)


def _axis_weights(old: int, new: int, device: torch.device) -> Tensor:
    """[new, old] weights along one axis, float32."""
    if new == old:
        return torch.eye(old, device=device)
    start = torch.arange(new, device=device, dtype=torch.float32)[:, None] * (old / new)
    cells = torch.arange(old, device=device, dtype=torch.float32)
    if new < old:  # the share of the new cell that each old one covers
        end = start + old / new
        overlap = torch.minimum(end, cells + 1) - torch.maximum(start, cells)
        return overlap.clamp(min=0) * (new / old)
    # a hat around each old centre, the outermost ones extended to the border
    centres = (start + 0.5 * old / new - 0.5).clamp(0, old - 1)
    return (1 - (centres - cells).abs()).clamp(min=0)
