"""Wrap any backbone as a module that maps normalised images to Features."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillery.models.adapters import Outputs, choose_adapter, pools_by_attention
from distillery.models.big_weights import LowWeights, build_big
from distillery.models.builders import (
    BuiltModel,
    ModelSpec,
    build_model,
    prepare_parameters,
    round_to_patch,
    short_error,
)
from distillery.models.gradient_checkpointing import use_gradient_checkpointing
from distillery.models.precision import LOW_TYPES, Float32Weights, autocast_for, keep_weights_in
from distillery.models.weights import load_weights
from distillery.system.errors import UserError


def field_of(tensor: str) -> str:
    """The field of Features to which a name of Features.tensors() belongs: layers for layers_0."""
    return "layers" if tensor.startswith("layers_") else tensor


@dataclass(frozen=True)
class Features:
    """What a model says about a batch: B images, P = h * w patches in row-major order, D channels, C classes."""

    pooled: Tensor | None  # [B, D]: class token or pooled map; None: a student in the teacher's space without this head
    tokens: Tensor | None  # [B, P, D]: patch tokens or the cells of a feature map; None: not stored
    grid: tuple[int, int]  # (h, w)
    logits: Tensor | None = None  # [B, C]
    layers: tuple[Tensor, ...] = ()  # [B, P, D] each: intermediate layers
    layer_grids: tuple[tuple[int, int], ...] = ()  # (h, w) of each of them

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor there is by name; the layers as layers_0, layers_1 and so on."""
        named = {"pooled": self.pooled, "tokens": self.tokens, "logits": self.logits}
        named |= {f"layers_{i}": layer for i, layer in enumerate(self.layers)}
        return {name: value for name, value in named.items() if value is not None}

    def with_tensors(self, named: Mapping[str, Tensor]) -> "Features":
        """The same with some tensors changed, named as in tensors()."""
        changed = tuple(named.get(f"layers_{i}", layer) for i, layer in enumerate(self.layers))
        fields = {name: value for name, value in named.items() if field_of(name) == name}
        return dataclasses.replace(self, layers=changed, **fields)

    def mirrored(self) -> "Features":
        """The columns of tokens and layers in reverse: what was said of mirrored images, laid over the images."""
        named = self.tensors()
        grids = {"tokens": self.grid} | {f"layers_{i}": grid for i, grid in enumerate(self.layer_grids)}
        maps = {name: named[name].unflatten(1, grid) for name, grid in grids.items() if name in named}
        return self.with_tensors({name: cells.flip(2).flatten(1, 2) for name, cells in maps.items()})

    def mean_with(self, other: "Features") -> "Features":
        """The mean of each tensor and the other's, in float32."""
        others = other.tensors()
        return self.with_tensors({n: (value.float() + others[n].float()) / 2 for n, value in self.tensors().items()})


def build_backbone(
    spec: ModelSpec,
    *,
    data_mean: Iterable[float],
    data_std: Iterable[float],
    image_size: int,
    low: LowWeights | None = None,
) -> "Backbone":
    """The model of a ModelSpec, for images of one data set.

    Args:
        spec: the model.
        data_mean: what was subtracted from the images that will come.
        data_std: what they were divided by.
        image_size: their height and width in px.
        low: what the weights of a frozen model are to be kept in: a big one gets them so, on that device, and a smaller
            one in float32, for keep_in.
    Raises:
        UserError: unknown names, arguments that the model does not take, weights that cannot be had or do not fit, an
            input size that it cannot take, no classifier although logits are wanted, layers that it does not give, no
            blocks, or blocks whose gradients change when they are computed again.
    """
    built = low and build_big(spec, image_size, low)
    dtype = low.dtype if built else torch.float32
    if built is None:
        built = build_model(spec, image_size)
        prepare_parameters(built.model, spec.label)
        if spec.checkpoint is not None:
            load_weights(built.model, spec.checkpoint, with_logits=spec.needs_classifier, role=spec.role)
    built = dataclasses.replace(
        built,
        mean=tuple(spec.mean or built.mean or data_mean),
        std=tuple(spec.std or built.std or data_std),
    )
    backbone = Backbone(
        built,
        label=spec.label,
        data_mean=data_mean,
        data_std=data_std,
        use_cls_token=spec.use_cls_token,
        with_logits=spec.with_logits,
        projection=spec.projection,
        mirror=spec.mirror,
        out_indices=spec.out_indices,
        dtype=dtype,
    )
    if spec.gradient_checkpointing:
        has_weights = backbone.scale.device.type != "meta"
        use_gradient_checkpointing(built.model, spec.label, backbone.outputs_of_noise if has_weights else None)
    return backbone


def memory_format_of(model: nn.Module, device: torch.device) -> torch.memory_format:
    """The memory format that a model's convolutions are fastest in on a device.

    channels_last is the order in which tensor cores and oneDNN take convolutions: on two CPU cores a ResNet-56 ran 2.4
    times as fast, a training step of a ResNet-20 1.2 times. On a GPU, convolutions that cut the image into patches
    (kernel = stride, all that a ViT has) are matrix products, and their channels_last kernel may be slow: such a model
    stays contiguous. On the CPU all are channels_last.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if device.type != "cpu" and all(module.kernel_size == module.stride for module in convolutions):
        return torch.contiguous_format
    return torch.channels_last


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
    the widths are read from what it gives for one black image. Of a model without patch tokens `token_width` is None.
    With `projection`, pooled is what comes out of the classifier's place, an image-text model's feature in text space.
    With `mirror`, all features are means over the image and its mirror image, float32.
    `dtype` is the type of its weights: float32, or what keep_in has made of them. `precision` is what float32 weights
    are computed in: bf16, fp16 or fp32 whatever autocast surrounds them; None: what the surrounding autocast says.
    `resizes`: False gives the raw model images of the size that they come in; `grid` is that of img_size all the same.
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
        projection: bool = False,
        mirror: bool = False,
        out_indices: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model = built.model
        self.dtype = dtype
        self.precision: str | None = None
        self.resizes = True
        self._format_on_gpu = memory_format_of(built.model, torch.device("cuda"))
        self.img_size = built.img_size
        self.use_cls_token = use_cls_token
        self.with_logits, self.projection, self.mirror = with_logits, projection, mirror
        data_mean, data_std = tuple(data_mean), tuple(data_std)
        self.mean, self.std = tuple(built.mean or data_mean), tuple(built.std or data_std)
        self.set_data_normalisation(data_mean, data_std)
        self._probe(label, tuple(out_indices or ()))

    def set_data_normalisation(self, data_mean: Iterable[float], data_std: Iterable[float]) -> None:
        """Take images that are normalised with these: what follows is one scale and one shift per channel."""
        data_mean, data_std = tuple(data_mean), tuple(data_std)
        scale = [d / s for d, s in zip(data_std, self.std, strict=True)]
        shift = [(d - m) / s for d, m, s in zip(data_mean, self.mean, self.std, strict=True)]
        self._renormalise = (self.mean, self.std) != (data_mean, data_std)
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def _probe(self, label: str, out_indices: tuple[int, ...]) -> None:
        """Run one black image to read the widths and the grid, and to fail now rather than in the first step."""
        try:
            pooled, spatial, logits, layers = self._try_adapter(self.img_size, out_indices)
        except UserError as error:
            raise UserError(f"{label}: {error}") from error
        except Exception as error:
            raise self._first_forward_error(label, error, out_indices) from error
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
        if spatial is None:
            self.token_width, self.grid = None, (1, 1)
        elif spatial.ndim == 4:
            self.token_width, self.grid = spatial.shape[1], tuple(spatial.shape[2:])
        else:
            self.token_width, self.grid = spatial.shape[2], self._grid_of(spatial.shape[1], label)
        self.layer_widths = tuple(layer.shape[1] for layer in layers)
        self.layer_grids = tuple(tuple(layer.shape[2:]) for layer in layers)

    def _try_adapter(self, img_size: tuple[int, int], out_indices: tuple[int, ...]) -> Outputs:
        black = torch.zeros((1, 3, *img_size), device=next(self.model.parameters()).device, dtype=self.dtype)
        with eval_mode(self.model):  # batch-norm statistics stay as they are, and no dropout draws random numbers
            self._adapter = choose_adapter(self.model, img_size, out_indices)
            return self._outputs(black)

    def _first_forward_error(self, label: str, error: Exception, out_indices: tuple[int, ...]) -> UserError:
        """What went wrong; advice on the input size only where another size was tried and works."""
        height, width = self.img_size
        what = f"{label} fails on an input of {height}x{width} px: {short_error(error)}"
        if isinstance(error, ImportError):
            return UserError(f"{what}. Install that package here")
        native = (getattr(self.model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
        near = round_to_patch(max(self.img_size), (32, 32))
        for size in dict.fromkeys([near, tuple(native[1:]), (64, 64), (224, 224)]):
            if size == self.img_size:
                continue
            with contextlib.suppress(Exception):  # of a size that was a guess
                self._try_adapter(size, out_indices)
                return UserError(
                    f"{what}. It takes {size[0]}x{size[1]} px: set teacher_img_size or student_img_size to a size it "
                    f"takes, e.g. {size[0]}"
                )
        return UserError(f"{what}. Other sizes fail too: the input size is not the reason")

    @property
    def widths(self) -> dict[str, int]:
        """Width of each tensor of Features.tensors(); tokens and logits only where they are given."""
        widths = {"pooled": self.pooled_width}
        widths |= {} if self.token_width is None else {"tokens": self.token_width}
        widths |= {f"layers_{i}": width for i, width in enumerate(self.layer_widths)}
        return widths if self.num_classes is None else widths | {"logits": self.num_classes}

    @property
    def pooling(self) -> str | None:
        """ "attention" where pooled comes out of an attention layer beside a class token; None: as everywhere else."""
        return "attention" if self.use_cls_token and pools_by_attention(self.model) else None

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
        if self.resizes and images.shape[-2:] != self.img_size:
            images = F.interpolate(images, self.img_size, mode="bilinear", antialias=True, align_corners=False)
        return images * self.scale + self.shift if self._renormalise else images

    def keep_in(self, precision: str) -> Float32Weights:
        """Keep the raw model's weights in bf16 or fp16 from now on; return the float32 ones.

        Only for a model that does not learn: its gradients would be lost in the low type's few digits.
        """
        self.dtype = LOW_TYPES[precision]
        return keep_weights_in(self.model, self.dtype)

    def put_back(self, weights: Float32Weights) -> None:
        """Undo keep_in."""
        self.dtype = torch.float32
        weights.put_back()

    def forward(self, images: Tensor) -> Features:
        """Features of images [B, 3, H, W] that are normalised with data_mean and data_std.

        Images: float32. The features of weights in a low type (keep_in) have that type, and no autocast has a part in
        them: it would run every layer norm in float32. Otherwise their types are what autocast makes them.
        """
        images = self.prepare(images)
        if not self.mirror:
            return self._features_of(images)
        return self._features_of(images).mean_with(self._features_of(images.flip(-1)).mirrored())

    def _features_of(self, images: Tensor) -> Features:
        """Of images as prepare gives them, as they are."""
        if images.is_cuda:
            # the caller's view may suit another model: a CNN and a ViT see the same one
            images = images.contiguous(memory_format=self._format_on_gpu)
        if self.dtype != torch.float32:
            with torch.autocast(images.device.type, enabled=False):
                return self._features(images.to(self.dtype))
        with contextlib.nullcontext() if self.precision is None else autocast_for(self.precision, images.device.type):
            return self._features(images)

    def _outputs(self, images: Tensor) -> Outputs:
        needs_classifier = self.with_logits or self.projection
        outputs = self._adapter(self.model, images, self.use_cls_token, needs_classifier)
        return outputs._replace(pooled=outputs.logits, logits=None) if self.projection else outputs

    def _features(self, images: Tensor) -> Features:
        pooled, spatial, logits, layers = self._outputs(images)
        is_map = spatial is not None and spatial.ndim == 4
        tokens = spatial.flatten(2).transpose(1, 2) if is_map else spatial
        maps = tuple(layer.flatten(2).transpose(1, 2) for layer in layers)
        return Features(pooled, tokens, self.grid, logits, maps, self.layer_grids)

    def outputs_of_noise(self) -> list[Tensor]:
        """Every tensor that it gives for one image of random pixels."""
        noise = torch.rand((1, 3, *self.img_size), generator=torch.Generator().manual_seed(0))
        return list(self(noise.to(self.scale.device)).tensors().values())


def _is_same(logits: Tensor, pooled: Tensor) -> bool:
    """Whether what came out of the classifier's place went through unchanged: there is no classifier then."""
    return logits.shape == pooled.shape and torch.allclose(logits, pooled)
