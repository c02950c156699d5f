"""Any backbone as Features of a normalised image, the frozen teacher, and the student with its heads."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillery.adapters import choose_adapter
from distillery.backbones import BUILDERS, BuiltModel, ModelRequest, use_gradient_checkpointing
from distillery.backbones_weights import load_weights
from distillery.losses import Features
from distillery.process import UserError
from distillery.standardise import Targets

PROJECTORS = ("mlp", "linear")
# the order in which tensor cores and oneDNN take convolutions: on two CPU cores a ResNet-56 ran 2.4 times as fast, a
# training step of a ResNet-20 1.2 times; a ViT, with one convolution in all, does not mind
MEMORY_FORMAT = torch.channels_last


def build_backbone(
    *,
    source: str,
    name: str,
    repo: str | None = None,
    pretrained: bool,
    checkpoint: str | Path | None = None,
    img_size: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    data_mean: Iterable[float],
    data_std: Iterable[float],
    image_size: int,
    use_cls_token: bool = True,
    drop_path_rate: float | None = None,
    with_logits: bool = False,
    out_indices: Sequence[int] | None = None,
    gradient_checkpointing: bool = False,
) -> "Backbone":
    """A model by name, at the input size that image_size (px) asks for.

    Args:
        source: one of BUILDERS.
        name: as the source knows it; timm's may carry a tag.
        repo: for torch_hub, "owner/name[:ref]" or a folder with hubconf.py.
        pretrained: take the source's weights.
        checkpoint: local weights; they take the place of `pretrained`, which then downloads nothing.
        img_size: the model's input in px; None: image_size rounded to the model's patch. `img_size` in kwargs wins.
        kwargs: passed on to the model.
        mean: the model's own normalisation; None: what the model states, else the data's.
        std: likewise.
        data_mean: what was subtracted from the images that will come.
        data_std: what they were divided by.
        image_size: their height and width in px.
        use_cls_token: pooled is the class token where there is one; else, and if false, the mean of the patches (or
            the pooling of the model's own, where it has no class token).
        drop_path_rate: passed on where the (timm) model takes it.
        with_logits: keep the classifier and give its output.
        out_indices: intermediate layers that Features.layers gets, as timm's forward_intermediates numbers them.
        gradient_checkpointing: keep only what enters a block, and compute the rest again in the backward pass.
    Raises:
        UserError: unknown names, arguments the model does not take, weights that cannot be had or do not fit, an input
            size it cannot take, no classifier although logits are wanted, layers that it does not give, no blocks.
    """
    if source not in BUILDERS:
        raise UserError(f"unknown model source {source!r}; known: {', '.join(BUILDERS)}")
    pretrained = pretrained and checkpoint is None
    want = ModelRequest(name, repo, pretrained, img_size, image_size, dict(kwargs or {}), drop_path_rate, with_logits)
    built = BUILDERS[source](want)
    if checkpoint is not None:
        load_weights(built.model, checkpoint, with_logits=with_logits)
    built = dataclasses.replace(
        built,
        mean=tuple(mean or built.mean or data_mean),
        std=tuple(std or built.std or data_std),
    )
    label = f"{source} model {name!r}"
    if gradient_checkpointing:
        use_gradient_checkpointing(built.model, label)
    return Backbone(
        built,
        label=label,
        data_mean=data_mean,
        data_std=data_std,
        use_cls_token=use_cls_token,
        with_logits=with_logits,
        out_indices=out_indices,
    )


def download_weights(model: Mapping[str, Any]) -> list[str]:
    """Fetch the weights and hub code of a model configuration into HF_HOME and TORCH_HOME, for nodes without internet.

    Args:
        model: the keys of model_config_kd.yaml.
    Returns:
        A line about each model, for people.
    Raises:
        UserError: as build_backbone.
    """
    lines = []
    for role in ("teacher", "student"):
        of = {key.removeprefix(f"{role}_"): value for key, value in model.items() if key.startswith(f"{role}_")}
        pretrained = of["pretrained"] and of["checkpoint"] is None
        if pretrained or of["source"] == "torch_hub":
            want = ModelRequest(of["name"], of["repo"], pretrained, of["img_size"], kwargs=dict(of["kwargs"] or {}))
            BUILDERS[of["source"]](want)
        what = (
            "weights are here" if pretrained else f"checkpoint {of['checkpoint']}" if of["checkpoint"] else "untrained"
        )
        lines.append(f"{role}: {of['source']} {of['name']}: {what}")
    return lines


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every submodule is in the mode that it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class Backbone(nn.Module):
    """A raw model that takes the data set's normalised images at any size and gives Features.

    `model` is the raw module, and all there is in the state dict; `img_size` (height, width) in px, `grid` (h, w) and
    the widths are read from what it gives for one black image.
    """

    def __init__(
        self,
        built: BuiltModel,
        *,
        label: str,
        data_mean: Iterable[float],
        data_std: Iterable[float],
        use_cls_token: bool = True,
        with_logits: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model = built.model
        self.img_size = built.img_size
        self.use_cls_token = use_cls_token
        self.with_logits = with_logits
        data_mean, data_std = tuple(data_mean), tuple(data_std)
        self.mean, self.std = tuple(built.mean or data_mean), tuple(built.std or data_std)
        self._set_renormalisation(data_mean, data_std)
        self._probe(label, tuple(out_indices or ()))

    def _set_renormalisation(self, data_mean: tuple[float, ...], data_std: tuple[float, ...]) -> None:
        """((x * data_std + data_mean) - mean) / std as one scale and one shift per channel."""
        scale = [d / s for d, s in zip(data_std, self.std, strict=True)]
        shift = [(d - m) / s for d, m, s in zip(data_mean, self.mean, self.std, strict=True)]
        self._renormalise = (self.mean, self.std) != (data_mean, data_std)
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def _probe(self, label: str, out_indices: tuple[int, ...]) -> None:
        """Run one black image to read the widths and the grid, and to fail now rather than in the first step."""
        black = torch.zeros((1, 3, *self.img_size), device=self.scale.device)
        try:
            with eval_mode(self.model):  # batch-norm statistics stay as they are, and no dropout draws random numbers
                self._adapter = choose_adapter(self.model, self.img_size, out_indices)
                pooled, spatial, logits, layers = self._adapter(self.model, black, self.use_cls_token, self.with_logits)
        except UserError as error:
            raise UserError(f"{label}: {error}") from error
        except Exception as error:
            raise UserError(
                f"{label} fails on an input of {self.img_size[0]}x{self.img_size[1]} px: {type(error).__name__}: "
                f"{error}. Set teacher_img_size or student_img_size to a size it takes (many want a multiple of 32)"
            ) from error
        if pooled.ndim != 2:
            raise UserError(f"{label}: its pooled feature has shape {list(pooled.shape)}, not [B, D]")
        stated = getattr(self.model, "num_classes", None)
        if self.with_logits and (logits is None or stated == 0 or _is_same(logits, pooled)):
            raise UserError(
                f"{label} has no classifier, and a loss on logits needs one: leave kl_logits out of "
                "distill_loss_weights, or take a teacher with classes"
            )
        self.num_classes = logits.shape[1] if self.with_logits else None
        self.pooled_width = pooled.shape[1]
        if spatial.ndim == 4:
            self.token_width, self.grid = spatial.shape[1], tuple(spatial.shape[2:])
        else:
            self.token_width, self.grid = spatial.shape[2], self._grid_of(spatial.shape[1], label)
        self.layer_widths = tuple(layer.shape[1] for layer in layers)
        self.layer_grids = tuple(tuple(layer.shape[2:]) for layer in layers)

    @property
    def widths(self) -> dict[str, int]:
        """Width of each tensor of Features.tensors(); logits only where they are given."""
        widths = {"pooled": self.pooled_width, "tokens": self.token_width}
        widths |= {f"layers_{i}": width for i, width in enumerate(self.layer_widths)}
        return widths if self.num_classes is None else widths | {"logits": self.num_classes}

    def _grid_of(self, num_tokens: int, label: str) -> tuple[int, int]:
        """The (h, w) of so many row-major tokens: the model's own word, else the input's proportions."""
        stated = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if stated and math.prod(stated) == num_tokens:
            return tuple(stated)
        height = round(math.sqrt(num_tokens * self.img_size[0] / self.img_size[1]))
        if height == 0 or num_tokens % height:
            raise UserError(f"{label} gives {num_tokens} patch tokens, which make no grid over {self.img_size} px")
        return height, num_tokens // height

    def prepare(self, images: Tensor) -> Tensor:
        """What the raw model is given for images as forward takes them: at its size, with its own normalisation."""
        if images.shape[-2:] != self.img_size:
            images = F.interpolate(images, self.img_size, mode="bilinear", antialias=True, align_corners=False)
        return images * self.scale + self.shift if self._renormalise else images

    def forward(self, images: Tensor) -> Features:
        """Features of images [B, 3, H, W] that are normalised with data_mean and data_std."""
        images = self.prepare(images)
        pooled, spatial, logits, layers = self._adapter(self.model, images, self.use_cls_token, self.with_logits)
        tokens = spatial.flatten(2).transpose(1, 2) if spatial.ndim == 4 else spatial
        maps = tuple(layer.flatten(2).transpose(1, 2) for layer in layers)
        return Features(pooled, tokens, self.grid, logits, maps, self.layer_grids)


def _is_same(logits: Tensor, pooled: Tensor) -> bool:
    """Whether what came out of the classifier's place went through unchanged: there is no classifier then."""
    return logits.shape == pooled.shape and torch.allclose(logits, pooled)


class FrozenTeacher(Targets):
    """A backbone that never learns: eval mode, no gradient, targets standardised once statistics are set."""

    def __init__(self, backbone: Backbone, standardise: bool | str = True) -> None:
        super().__init__(backbone.widths, standardise)
        self.backbone = backbone.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stays in eval mode, whatever is asked: batch norm and dropout would change the targets."""
        return super().train(False)

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for the student's backward pass
    def forward(self, images: Tensor) -> Features:
        """Targets for images [B, 3, H, W] as Backbone takes them."""
        return self.of(self.backbone(images))

    @torch.no_grad()
    def gather_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set the statistics to those of batches of images [B, 3, H, W].

        Several processes must end with the same: let one gather, and hand its statistics_state to the others.

        Raises:
            UserError: fewer than two images, or the same output for every image.
        """
        self.load_statistics(self.statistics_of(self.backbone(images) for images in batches))


class StudentWithHeads(nn.Module):
    """The student and, on top of it, a trainable head for every field that a loss compares with the teacher's.

    One module, so that the optimiser and DistributedDataParallel see all parameters. `student` (a Backbone) is what is
    kept; `heads` are dropped at export. The teacher is never projected: with a learnable map on both sides a constant
    would satisfy every loss.

    Args:
        teacher_widths: tensor of Features -> width to project to (FrozenTeacher.widths).
        fields: the fields that losses need (losses.fields_needed); other fields come out as the student has them. Of
            the layers each has a head of its own.
        projector: {"type": "mlp" | "linear", "hidden_dim": int | None}; None: twice the teacher's width.
    Raises:
        UserError: an unknown projector, or a field that the teacher does not have.
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
            layers, own_layers = ([n for n in widths if n.startswith("layers_")] for widths in (teacher_widths, own))
            if not layers or layers != own_layers:
                raise UserError(
                    f"a loss compares layers: the teacher gives {len(layers)} and the student {len(own_layers)}. Set "
                    "teacher_out_indices and student_out_indices to as many each"
                )
            names += layers
        elif field not in teacher_widths:
            raise UserError(f"a loss compares {field}, which the teacher does not give (it gives {[*teacher_widths]})")
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
    # autocast would run the two products in bfloat16 and round the targets to 3 digits
    with torch.autocast(device_type=tokens.device.type, enabled=False):
        rows = _resampling_matrix(grid[0], new_grid[0], tokens)
        columns = _resampling_matrix(grid[1], new_grid[1], tokens)
        out = torch.einsum("yh,xw,bhwd->byxd", rows, columns, tokens.unflatten(1, grid))
    return out.flatten(1, 2)


def _resampling_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """[new, old] weights whose rows sum to 1, in the type and on the device of `like`."""
    if new == old:
        return torch.eye(old, dtype=like.dtype, device=like.device)
    start = torch.arange(new, device=like.device, dtype=torch.float32)[:, None] * (old / new)
    cells = torch.arange(old, device=like.device, dtype=torch.float32)
    if new < old:  # the share of the new cell that each old one covers
        end = start + old / new
        overlap = torch.minimum(end, cells + 1) - torch.maximum(start, cells)
        weights = overlap.clamp(min=0) * (new / old)
    else:  # a hat around each old centre, the outermost ones extended to the border
        centres = (start + 0.5 * old / new - 0.5).clamp(0, old - 1)
        weights = (1 - (centres - cells).abs()).clamp(min=0)
    return weights.to(like.dtype)
