"""Replace attention by plain tensor operations while a model is traced for export."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class PlainAttention(TorchFunctionMode):
    """Inside it, every call of F.scaled_dot_product_attention is plain_attention.

    The ONNX exporter takes the fused operation with four dimensions and no broadcast mask, and traces the memory layout
    of the kernel that this machine happens to have: Hiera, BEiT, SAM, NesT, Twins, MaxViT and others fail. timm's own
    switch is read when a model is built, and models from elsewhere have none.
    """

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        """Called by torch for every function of its own."""
        if function is F.scaled_dot_product_attention:
            function = plain_attention
        return function(*arguments, **(keywords or {}))


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What F.scaled_dot_product_attention computes, for a model in eval mode: softmax(q k^T scale + mask) v.

    Args:
        query: [..., L, E].
        key: [..., S, E].
        value: [..., S, Ev].
        attn_mask: bool (true: attend) or added to the scores; anything that broadcasts to [..., L, S].
        dropout_p: must be 0.
        is_causal: place i attends to the places up to i.
        scale: None: 1 / sqrt(E).
        enable_gqa: key and value have fewer heads (dimension -3), each for a group of the query's.
    Returns:
        [..., L, Ev].
    Source: PyTorch's documentation of the function.
    """
    assert dropout_p == 0, "a model in eval mode drops nothing"
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value
