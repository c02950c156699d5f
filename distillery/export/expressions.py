"""The Python expressions that compute the student's trained features from the raw model alone.

config.json, the model card and student.py contain them. The export evaluates them first, so none is ever wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distillery.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distillery.models.backbone import Backbone, Features

TOLERANCE = 1e-4  # of the largest feature


@dataclass(frozen=True)
class ForwardPass:
    """One pass through a raw model as Python expressions.

    raw: of `model`, `images` (normalised, at the model's size) and `torch`. fields: "pooled" or "tokens" -> an
    expression of `raw`, `model` and `torch`.
    """

    raw: str
    fields: dict[str, str]

    def as_one(self, field: str) -> str:
        """A field as one expression, without the name `raw`."""
        return re.sub(r"\braw\b", lambda _: self.raw, self.fields[field])


def find_feature_call(backbone: Backbone) -> str:
    """One expression of `model`, `images` and `torch` that gives the pooled features; errors as of find_forward."""
    return find_forward(backbone, ["pooled"]).as_one("pooled")


def find_forward(backbone: Backbone, fields: Iterable[str]) -> ForwardPass:
    """The plainest single pass through the raw model that gives the wanted fields.

    Args:
        backbone: in eval mode.
        fields: of "pooled" and "tokens"; the backbone gives them.
    Raises:
        UserError: no pass that is known here does.
    """
    fields = list(fields)
    images, features = sample_features(backbone)
    wanted = {field: features.tensors()[field] for field in fields}
    for raw, candidates in _candidates(backbone):
        names = {"model": backbone.model, "raw": evaluate(raw, model=backbone.model, images=images)}
        found = {
            field: next((call for call in candidates[field] if is_same(evaluate(call, **names), wanted[field])), None)
            for field in fields
        }
        if None not in found.values():
            return ForwardPass(raw, found)
    raise UserError(
        f"no call of {type(backbone.model).__name__} gives the features that were trained, so the model card could not "
        "say how to use it. Does its code draw random numbers in eval mode?"
    )


def sample_features(backbone: Backbone) -> tuple[Tensor, Features]:
    """Random images [2, 3, H, W] as the raw model is given them, and the backbone's features of them."""
    import torch

    images = torch.randn(2, 3, *backbone.img_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.prepare(images), backbone(images)


def evaluate(expression: str, **names: nn.Module | Tensor) -> Any:
    """What an expression of this module gives; None where this kind of model has no such method or output."""
    import torch

    try:
        with torch.no_grad():
            return eval(expression, {"torch": torch} | names)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, AssertionError):
        return None


def is_same(found: Any, wanted: Tensor) -> bool:
    """Whether these are the features, up to rounding."""
    import torch

    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def _candidates(backbone: Backbone) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Ways through the model, the plainest first: `raw`, and what pooled features and tokens may be of it.

    The last ones spell out what the model's adapter does.
    """
    from distillery.models.adapters import prefix_tokens, trunk_names

    model = backbone.model
    yield "model(images)", {"pooled": ["raw"], "tokens": []}
    if hasattr(model, "forward_features"):
        patches = f"[:, {prefix_tokens(model)}:]" if prefix_tokens(model) else ""
        normed = "model.fc_norm(raw)"
        pooled = [call for part in ("raw", normed) for call in (f"{part}[:, 0]", f"{part}{patches}.mean(1)")]
        pooled += ["raw.mean((2, 3))", "raw.mean((1, 2))", "model.forward_head(raw, pre_logits=True)"]  # 1, 2: NHWC
        pooled += ["raw", 'raw["x_norm_clstoken"]', 'raw["x_norm_patchtokens"].mean(1)']
        tokens = [f"raw{patches}", f"{normed}{patches}", "raw.flatten(2).transpose(1, 2)", "raw.flatten(1, 2)"]
        tokens += ['raw["x_norm_patchtokens"]']
        yield "model.forward_features(images)", {"pooled": pooled, "tokens": tokens}
    after_class_token = {"pooled": ["raw[:, 0]", "raw[:, 1:].mean(1)"], "tokens": ["raw[:, 1:]"]}
    if hasattr(model, "get_intermediate_layers"):
        yield "model.get_intermediate_layers(images, 1)[0]", after_class_token
    if hasattr(model, "class_token"):  # torchvision's ViT
        class_token = "model.class_token.expand(images.shape[0], -1, -1)"
        yield f"model.encoder(torch.cat([{class_token}, model._process_input(images)], 1))", after_class_token
    layers = _nested(model, trunk_names(model))
    of_map = {"pooled": ["raw.mean((2, 3))"], "tokens": ["raw.flatten(2).transpose(1, 2)"]}
    yield layers, of_map
    yield f"{layers}.relu()", of_map  # torchvision's DenseNet


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
