"""Any backbone as Features of a normalised image, the frozen teacher, and the student with its heads."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillery.adapters import choose_adapter
from distillery.backbones import BUILDERS, BuiltModel, ModelRequest, load_weights
from distillery.losses import Features
from distillery.process import UserError

# a channel that varies less than this share of the root mean square over channels carries no signal
DEAD_CHANNEL_SHARE = 1e-3
PROJECTORS = ("mlp", "linear")


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
    Raises:
        UserError: unknown names, arguments the model does not take, weights that cannot be had or do not fit, an input
            size it cannot take, no classifier although logits are wanted.
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
    return Backbone(
        built,
        label=f"{source} model {name!r}",
        data_mean=data_mean,
        data_std=data_std,
        use_cls_token=use_cls_token,
        with_logits=with_logits,
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
    ) -> None:
        super().__init__()
        self.model = built.model
        self.img_size = built.img_size
        self.use_cls_token = use_cls_token
        self.with_logits = with_logits
        data_mean, data_std = tuple(data_mean), tuple(data_std)
        self.mean, self.std = tuple(built.mean or data_mean), tuple(built.std or data_std)
        self._set_renormalisation(data_mean, data_std)
        self._probe(label)

    def _set_renormalisation(self, data_mean: tuple[float, ...], data_std: tuple[float, ...]) -> None:
        """((x * data_std + data_mean) - mean) / std as one scale and one shift per channel."""
        scale = [d / s for d, s in zip(data_std, self.std, strict=True)]
        shift = [(d - m) / s for d, m, s in zip(data_mean, self.mean, self.std, strict=True)]
        self._renormalise = (self.mean, self.std) != (data_mean, data_std)
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def _probe(self, label: str) -> None:
        """Run one black image to read the widths and the grid, and to fail now rather than in the first step."""
        black = torch.zeros((1, 3, *self.img_size), device=self.scale.device)
        try:
            with eval_mode(self.model):  # batch-norm statistics stay as they are, and no dropout draws random numbers
                self._adapter = choose_adapter(self.model, self.img_size)
                pooled, spatial, logits = self._adapter(self.model, black, self.use_cls_token, self.with_logits)
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

    def _grid_of(self, num_tokens: int, label: str) -> tuple[int, int]:
        """The (h, w) of so many row-major tokens: the model's own word, else the input's proportions."""
        stated = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if stated and math.prod(stated) == num_tokens:
            return tuple(stated)
        height = round(math.sqrt(num_tokens * self.img_size[0] / self.img_size[1]))
        if height == 0 or num_tokens % height:
            raise UserError(f"{label} gives {num_tokens} patch tokens, which make no grid over {self.img_size} px")
        return height, num_tokens // height

    def forward(self, images: Tensor) -> Features:
        """Features of images [B, 3, H, W] that are normalised with data_mean and data_std."""
        if images.shape[-2:] != self.img_size:
            images = F.interpolate(images, self.img_size, mode="bilinear", antialias=True, align_corners=False)
        if self._renormalise:
            images = images * self.scale + self.shift
        pooled, spatial, logits = self._adapter(self.model, images, self.use_cls_token, self.with_logits)
        tokens = spatial.flatten(2).transpose(1, 2) if spatial.ndim == 4 else spatial
        return Features(pooled, tokens, self.grid, logits)


def _is_same(logits: Tensor, pooled: Tensor) -> bool:
    """Whether what came out of the classifier's place went through unchanged: there is no classifier then."""
    return logits.shape == pooled.shape and torch.allclose(logits, pooled)


class FrozenTeacher(nn.Module):
    """A backbone that never learns: eval mode, no gradient, targets standardised per channel once statistics are set.

    Standardising keeps the few channels that carry most of a DINO model's variance from being all that is learnt.
    Source: UNIC, arXiv:2408.05088, section 3.
    """

    def __init__(self, backbone: Backbone, standardise: bool = True) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.standardise = standardise
        self.has_statistics = False
        for field, width in (("pooled", backbone.pooled_width), ("tokens", backbone.token_width)):
            self.register_buffer(f"{field}_mean", torch.zeros(width), persistent=False)
            self.register_buffer(f"{field}_std", torch.ones(width), persistent=False)
        self.eval()

    @property
    def widths(self) -> dict[str, int]:
        """Field of Features -> its width, for StudentWithHeads; logits only where they are given."""
        widths = {"pooled": self.backbone.pooled_width, "tokens": self.backbone.token_width}
        return widths if self.backbone.num_classes is None else widths | {"logits": self.backbone.num_classes}

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stays in eval mode, whatever is asked: batch norm and dropout would change the targets."""
        return super().train(False)

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for the student's backward pass
    def forward(self, images: Tensor) -> Features:
        """Targets for images [B, 3, H, W] as Backbone takes them."""
        features = self.backbone(images)
        if not self.standardise:
            return features
        return dataclasses.replace(
            features,
            pooled=(features.pooled - self.pooled_mean) / self.pooled_std,
            tokens=(features.tokens - self.tokens_mean) / self.tokens_std,
        )

    @torch.no_grad()
    def gather_statistics(self, batches: Iterable[Tensor]) -> None:
        """Mean and standard deviation of every channel over batches of images [B, 3, H, W]; summed in float64.

        Several processes must end with the same: let one gather, and hand its statistics_state to the others.

        Raises:
            UserError: fewer than two images, or the same output for every image.
        """
        count = {"pooled": 0, "tokens": 0}
        total, squares = dict(count), dict(count)
        for images in batches:
            features = self.backbone(images)
            for field, values in (("pooled", features.pooled), ("tokens", features.tokens)):
                values = values.flatten(0, -2).double()
                count[field] += len(values)
                total[field] += values.sum(0)
                squares[field] += values.square().sum(0)
        if count["pooled"] < 2:
            raise UserError(f"the teacher's statistics need at least 2 images, got {count['pooled']}")
        state = {}
        for field in count:
            mean = total[field] / count[field]
            state[f"{field}_mean"] = mean
            state[f"{field}_std"] = (squares[field] / count[field] - mean.square()).clamp(min=0).sqrt()
        if not state["pooled_std"].max() > 1e-6 * state["pooled_mean"].abs().max():
            raise UserError(
                f"the teacher gives the same output for each of {count['pooled']} images: look at its weights "
                "(teacher_pretrained, teacher_checkpoint) and at the images"
            )
        self.load_statistics(state)

    def statistics_state(self) -> dict[str, Tensor]:
        """Tensors for the checkpoint; empty before statistics are set."""
        names = [f"{field}_{what}" for field in ("pooled", "tokens") for what in ("mean", "std")]
        return {name: getattr(self, name).clone() for name in names} if self.has_statistics else {}

    def load_statistics(self, state: Mapping[str, Tensor]) -> None:
        """Set the statistics that gather_statistics found, or that statistics_state gave.

        Raises:
            UserError: they are another teacher's.
        """
        for field, width in (("pooled", self.backbone.pooled_width), ("tokens", self.backbone.token_width)):
            mean, std = state[f"{field}_mean"], state[f"{field}_std"]
            if mean.shape != (width,) or std.shape != (width,):
                raise UserError(
                    f"teacher statistics: {field} has {len(mean)} channels, this teacher {width}: not its own"
                )
            # dividing by the tiny spread of a dead channel would make noise the largest target of all
            floor = DEAD_CHANNEL_SHARE * std.double().square().mean().sqrt()
            getattr(self, f"{field}_mean").copy_(mean)
            getattr(self, f"{field}_std").copy_(std.clamp(min=max(floor.item(), 1e-12)))
        self.has_statistics = True


class StudentWithHeads(nn.Module):
    """The student and, on top of it, a trainable head for every field that a loss compares with the teacher's.

    One module, so that the optimiser and DistributedDataParallel see all parameters. `student` (a Backbone) is what is
    kept; `heads` are dropped at export. The teacher is never projected: with a learnable map on both sides a constant
    would satisfy every loss.

    Args:
        teacher_widths: field -> width to project to (FrozenTeacher.widths).
        fields: the fields that losses need (losses.fields_needed); other fields come out as the student has them.
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
        own = {"pooled": backbone.pooled_width, "tokens": backbone.token_width, "logits": backbone.pooled_width}
        self.heads = nn.ModuleDict()
        for field in sorted(fields):
            if field not in teacher_widths:
                raise UserError(
                    f"a loss compares {field}, which the teacher does not give (it gives {[*teacher_widths]})"
                )
            if field == "logits":
                self.heads[field] = nn.Linear(own[field], teacher_widths[field])
            else:
                self.heads[field] = build_projector(own[field], teacher_widths[field], **(projector or {}))
        self.unreached = self._freeze_unreached()

    def forward(self, images: Tensor) -> Features:
        """Features of images [B, 3, H, W] in the teacher's widths, on the student's grid."""
        own = self.student(images)
        inputs = {"pooled": own.pooled, "tokens": own.tokens, "logits": own.pooled}
        return dataclasses.replace(own, **{field: head(inputs[field]) for field, head in self.heads.items()})

    def _freeze_unreached(self) -> list[str]:
        """Freeze what no loss can reach (a classifier, a mask token): DistributedDataParallel would wait for it."""
        parameters = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        if not parameters:
            raise UserError("the student has no trainable parameters")
        with eval_mode(self), torch.enable_grad():
            features = self(torch.zeros((1, 3, *self.student.img_size), device=self.student.scale.device))
            outputs = sum(getattr(features, field).float().sum() for field in self.heads)
            gradients = torch.autograd.grad(outputs, list(parameters.values()), allow_unused=True)
        unreached = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
        for name in unreached:
            parameters[name].requires_grad_(False)
        return unreached


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


def align_teacher(teacher: Features, grid: tuple[int, int]) -> Features:
    """The teacher's features with its tokens on the student's grid."""
    return dataclasses.replace(teacher, tokens=resample_tokens(teacher.tokens, teacher.grid, grid), grid=grid)


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
