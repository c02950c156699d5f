"""The Python expression that computes the student's trained features from the raw model alone.

config.json and the model card show this expression. The export evaluates it first, so a card never shows a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distillery.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distillery.models.backbone import Backbone

TOLERANCE = 1e-4  # of the largest feature


def find_feature_call(backbone: Backbone) -> str:
    """An expression of `model`, `images` (normalised, at the model's size) and `torch` that gives the pooled features.

    Args:
        backbone: in eval mode.
    Raises:
        UserError: none does.
    """
    images, wanted = sample_features(backbone)
    for call in _candidates(backbone):
        if is_same(evaluate_call(call, backbone.model, images), wanted):
            return call
    raise UserError(
        f"no call of {type(backbone.model).__name__} gives the features that were trained, so the model card could not "
        "say how to use it. Does its code draw random numbers in eval mode?"
    )


def sample_features(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Random images [2, 3, H, W] as the raw model is given them, and their pooled features [2, D]."""
    import torch

    images = torch.randn(2, 3, *backbone.img_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.prepare(images), backbone(images).pooled


def evaluate_call(call: str, model: nn.Module, images: Tensor) -> Any:
    """What an expression of this module gives; None where this kind of model has no such method or output."""
    import torch

    try:
        with torch.no_grad():
            return eval(call, {"torch": torch, "model": model, "images": images})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, AssertionError):
        return None


def is_same(found: Any, wanted: Tensor) -> bool:
    """Whether these are the features, up to rounding."""
    import torch

    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def _candidates(backbone: Backbone) -> Iterator[str]:
    """Expressions from the plainest to the one that spells out what the model's adapter does."""
    from distillery.models.adapters import prefix_tokens, trunk_names

    model = backbone.model
    yield "model(images)"
    raw = "model.forward_features(images)"
    if hasattr(model, "forward_features"):
        patches = f"[:, {prefix_tokens(model)}:]"
        for tokens in (raw, f"model.fc_norm({raw})"):
            yield f"{tokens}[:, 0]"
            yield f"{tokens}{patches if prefix_tokens(model) else ''}.mean(1)"
        yield f"{raw}.mean((2, 3))"
        yield f"{raw}.mean((1, 2))"  # channels last
        yield f"model.forward_head({raw}, pre_logits=True)"
        yield f'{raw}["x_norm_clstoken"]'
        yield f'{raw}["x_norm_patchtokens"].mean(1)'
    if hasattr(model, "get_intermediate_layers"):
        yield "model.get_intermediate_layers(images, 1)[0][:, 0]"
        yield "model.get_intermediate_layers(images, 1)[0][:, 1:].mean(1)"
    if hasattr(model, "class_token"):  # torchvision's ViT
        class_token = "model.class_token.expand(images.shape[0], -1, -1)"
        tokens = f"model.encoder(torch.cat([{class_token}, model._process_input(images)], 1))"
        yield f"{tokens}[:, 0]"
        yield f"{tokens}[:, 1:].mean(1)"
    layers = _nested(model, trunk_names(model))
    yield f"{layers}.mean((2, 3))"
    yield f"{layers}.relu().mean((2, 3))"  # torchvision's DenseNet


def _nested(model: nn.Module, names: tuple[str, ...]) -> str:
    """The layers of a model one after the other: model.b(model.a(images))."""
    from torch import nn

    call = "images"
    for name in names:
        child = getattr(model, name)
        own = f"model.{name}" if name.isidentifier() else f'model.get_submodule("{name}")'
        for layer in [f"{own}[{place}]" for place in range(len(child))] if isinstance(child, nn.ModuleList) else [own]:
            call = f"{layer}({call})"
    return call
