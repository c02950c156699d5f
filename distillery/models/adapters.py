"""Adapters: each turns the outputs of one kind of model into a pooled feature and a map or tokens.

An adapter is one function `(model, images, use_cls_token, with_logits) -> Outputs`. The caller passes the model at
every call, so a deep copy (an EMA) never reads another model's weights.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distillery.system.errors import UserError


class Outputs(NamedTuple):
    """What came out of a raw model; B images, D and Dt channels, C classes."""

    pooled: Tensor  # [B, D]
    spatial: Tensor | None  # tokens [B, P, Dt] or a map [B, Dt, h, w]; None: it gives a pooled feature alone
    logits: Tensor | None  # [B, C]
    layers: tuple[Tensor, ...] = ()  # maps [B, Di, h, w] of intermediate layers


Adapter = Callable[[nn.Module, Tensor, bool, bool], Outputs]


def choose_adapter(model: nn.Module, img_size: tuple[int, int], out_indices: tuple[int, ...] = ()) -> Adapter:
    """The adapter for a model in eval mode, by the interface it offers.

    Args:
        model: the raw model.
        img_size: height and width of its input, px.
        out_indices: intermediate layers wanted.
    Raises:
        UserError: it offers none that we know, or not these layers.
    """
    from torchvision.models.vision_transformer import VisionTransformer

    ends_early = bool(out_indices) and _check_layers(model, img_size, out_indices)
    if isinstance(model, VisionTransformer):
        return torchvision_vit
    if hasattr(model, "forward_features"):
        head = getattr(model, "forward_head", None)
        pools = head is not None and "pre_logits" in inspect.signature(head).parameters
        return functools.partial(forward_features, own_pooling=pools, out_indices=out_indices, ends_early=ends_early)
    if hasattr(model, "get_intermediate_layers"):
        return last_layer
    names = trunk_names(model)
    try:
        _check_trunk(model, img_size, names)
    except UserError:
        if not _gives_feature(model, img_size):
            raise
        return feature_alone
    return functools.partial(trunk, names=names)


INTERFACES = (
    "it needs forward_features(images) -> [B, C, h, w], [B, N, D], [B, D] or DINOv2's dictionary (and forward_head for "
    "logits), or layers that run in the order they were defined"
)


def forward_features(
    model: nn.Module,
    images: Tensor,
    use_cls_token: bool,
    with_logits: bool,
    *,
    own_pooling: bool,
    out_indices: tuple[int, ...] = (),
    ends_early: bool = False,
) -> Outputs:
    """timm's interface, which many hub models share; DINOv2's dictionary too.

    out_indices: intermediate layers; ends_early: with them the model stops at the last one, the rest is a pass of its
    own.
    """
    if ends_early:
        layers = model.forward_intermediates(images, indices=list(out_indices), intermediates_only=True)
        raw = model.forward_features(images)
    elif out_indices:
        raw, layers = model.forward_intermediates(images, indices=list(out_indices))
    else:
        raw, layers = model.forward_features(images), ()
    layers = tuple(layers)
    logits = model.forward_head(raw) if with_logits and hasattr(model, "forward_head") else None
    if isinstance(raw, dict) and "x_norm_patchtokens" in raw:
        patches = raw["x_norm_patchtokens"]
        return Outputs(raw["x_norm_clstoken"] if use_cls_token else patches.mean(1), patches, logits, layers)
    if isinstance(raw, Tensor) and raw.ndim == 2:
        return Outputs(raw, None, logits, layers)
    if isinstance(raw, list | tuple) and own_pooling:  # several scales or branches, which its head brings together
        return Outputs(model.forward_head(raw, pre_logits=True), None, logits, layers)
    if not isinstance(raw, Tensor) or raw.ndim not in (3, 4):
        found = list(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
        raise UserError(f"{type(model).__name__}.forward_features returned {found}: {INTERFACES}")
    if raw.ndim == 4:
        spatial = channels_first(model, raw)
    else:
        tokens = _last_norm(model)(raw)
        spatial = tokens[:, prefix_tokens(model) :]
        if spatial.shape[1] == 0:  # PiT keeps the class token alone
            return Outputs(tokens[:, 0], None, logits, layers)
        if has_class_token(model) and not (use_cls_token and own_pooling and pools_by_attention(model)):
            return Outputs(tokens[:, 0] if use_cls_token else spatial.mean(1), spatial, logits, layers)
    # the model's own: the mean, behind a norm or a layer of its own, or the attention pooling it was pretrained with
    pooled = model.forward_head(raw, pre_logits=True) if own_pooling else _mean_over_places(spatial)
    return Outputs(pooled, spatial, logits, layers)


def torchvision_vit(model: nn.Module, images: Tensor, use_cls_token: bool, with_logits: bool) -> Outputs:
    """torchvision's VisionTransformer.forward up to its heads."""
    patches = model._process_input(images)
    # shape[0], not len(): a traced model keeps its batch size open
    tokens = model.encoder(torch.cat([model.class_token.expand(images.shape[0], -1, -1), patches], dim=1))
    pooled = tokens[:, 0] if use_cls_token else tokens[:, 1:].mean(1)
    return Outputs(pooled, tokens[:, 1:], model.heads(tokens[:, 0]) if with_logits else None)


def last_layer(model: nn.Module, images: Tensor, use_cls_token: bool, with_logits: bool) -> Outputs:
    """DINO's first hub models: the normalised tokens of the last layer, class token first."""
    tokens = model.get_intermediate_layers(images, 1)[0]
    return Outputs(tokens[:, 0] if use_cls_token else tokens[:, 1:].mean(1), tokens[:, 1:], None)


def trunk(
    model: nn.Module, images: Tensor, use_cls_token: bool, with_logits: bool, *, names: tuple[str, ...]
) -> Outputs:
    """ResNet-like: the layers up to the global pooling one by one, then the model's own pooling and classifier."""
    spatial = images
    for layer in _layers(model, names):
        spatial = layer(spatial)
    if type(model).__name__ == "DenseNet":  # torchvision's forward has this one outside its layers
        spatial = spatial.relu()
    return Outputs(spatial.mean((2, 3)), spatial, trunk_output(model, spatial) if with_logits else None)


def feature_alone(model: nn.Module, images: Tensor, use_cls_token: bool, with_logits: bool) -> Outputs:
    """A model about which one thing is known: its forward returns an image feature."""
    return Outputs(model(images), None, None)


TAIL_NAMES = ("avgpool", "flatten", "dropout", "fc", "classifier", "head", "heads", "linear")


def trunk_names(model: nn.Module) -> tuple[str, ...]:
    """The children up to the global pooling or classifier; auxiliary classifiers are not part of the way."""
    names = []
    for name, _ in model.named_children():
        if name in TAIL_NAMES:
            break
        if not name.lower().startswith("aux"):
            names.append(name)
    return tuple(names)


def trunk_output(model: nn.Module, spatial: Tensor) -> Tensor:
    """What the model's forward makes of its last map: logits, or the pooled feature where it has no classifier."""
    avgpool = getattr(model, "avgpool", None)
    x = avgpool(spatial) if avgpool is not None else spatial
    classifier = next((getattr(model, name) for name in TAIL_NAMES[3:] if hasattr(model, name)), nn.Identity())
    if not any(isinstance(layer, nn.Flatten | nn.Conv2d) for layer in classifier.modules()):
        x = x.flatten(1) if avgpool is not None else x.mean((2, 3))
    return classifier(x).flatten(1)


@torch.no_grad()
def _check_trunk(model: nn.Module, img_size: tuple[int, int], names: tuple[str, ...]) -> None:
    """Refuse a model whose forward is anything but its layers one by one: the features would be wrong in silence."""
    parameter = next(model.parameters())
    if parameter.is_meta:
        return
    images = _noise(model, img_size)
    theirs = model(images)  # an error here is the model's own, of its input size perhaps
    try:
        ours = trunk_output(model, trunk(model, images, False, False, names=names).spatial)
    except Exception as error:
        raise UserError(f"its layers do not run one by one ({type(error).__name__}: {error}): {INTERFACES}") from error
    if not _is_close(ours, theirs):
        raise UserError(f"running its layers one by one gives another result than its forward: {INTERFACES}")


@torch.no_grad()
def _gives_feature(model: nn.Module, img_size: tuple[int, int]) -> bool:
    """Whether forward gives [B, D] that are no logits, as far as the names of its layers say."""
    if isinstance(model, nn.Sequential) or any(name in TAIL_NAMES[3:] for name, _ in model.named_children()):
        return False
    try:
        out = model(_noise(model, img_size))
    except Exception:  # the caller has a better error
        return False
    return isinstance(out, Tensor) and out.ndim == 2


def _noise(model: nn.Module, img_size: tuple[int, int]) -> Tensor:
    images = torch.rand((2, 3, *img_size), generator=torch.Generator().manual_seed(0))
    return images.to(next(model.parameters()))


@torch.no_grad()
def _check_layers(model: nn.Module, img_size: tuple[int, int], out_indices: tuple[int, ...]) -> bool:
    """Refuse layers that the model does not have, or that it returns in another order than `out_indices`.

    Returns:
        Whether the model stops after the last of these layers, instead of running to its end.
    """
    if not hasattr(model, "forward_intermediates"):
        raise UserError(
            "it gives no intermediate layers (timm's forward_intermediates): leave teacher_out_indices and "
            "student_out_indices null, or take a model of timm's"
        )
    parameter = next(model.parameters())
    if parameter.is_meta:
        return False
    images = _noise(model, img_size)
    final, every = model.forward_intermediates(images)
    places = [index + len(every) if index < 0 else index for index in out_indices]
    if places != sorted(set(places)) or not 0 <= places[0] <= places[-1] < len(every):
        raise UserError(
            f"out_indices {list(out_indices)}: it has {len(every)} intermediate layers, 0 to {len(every) - 1} (or "
            f"{-len(every)} to -1): give each once, the first layers first"
        )
    whole = model.forward_features(images)
    if not _is_close(final, whole):
        raise UserError("its forward_intermediates ends with another result than its forward_features")
    return not _is_close(model.forward_intermediates(images, indices=list(out_indices))[0], whole)


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def _layers(model: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Module]:
    for name in names:
        child = getattr(model, name)
        yield from child if isinstance(child, nn.ModuleList) else [child]


def channels_first(model: nn.Module, spatial: Tensor) -> Tensor:
    """A map as [B, C, h, w], whichever way the model (Swin and its kin) keeps it."""
    width = getattr(model, "num_features", None)
    by_width = spatial.shape[-1] == width and spatial.shape[1] != width
    channels_last = getattr(model, "output_fmt", None) == "NHWC" or by_width
    return spatial.permute(0, 3, 1, 2) if channels_last else spatial


def prefix_tokens(model: nn.Module) -> int:
    """How many class and register tokens stand before the patch tokens."""
    class_tokens = getattr(model, "cls_token", None)
    return getattr(model, "num_prefix_tokens", 0 if class_tokens is None else class_tokens.shape[1])


def has_class_token(model: nn.Module) -> bool:
    """Whether the first token is a class token (registers alone are none)."""
    return getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None)


def pools_by_attention(model: nn.Module) -> bool:
    """Whether a layer of its own makes the image feature from all tokens, beside a class token (PE, timm's map)."""
    return isinstance(getattr(model, "attn_pool", None), nn.Module) and has_class_token(model)


def _last_norm(model: nn.Module) -> nn.Module:
    # models that average their tokens keep the last norm in the head: without it the tokens are the raw residuals
    after_pooling = getattr(model, "fc_norm", None)
    in_head = isinstance(getattr(model, "norm", None), nn.Identity) and after_pooling is not None
    return after_pooling if in_head else nn.Identity()


def _mean_over_places(spatial: Tensor) -> Tensor:
    return spatial.mean(1) if spatial.ndim == 3 else spatial.mean((2, 3))
