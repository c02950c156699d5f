"""Compute features of labelled images."""

import math
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillery.cache.folder import load_index
from distillery.models.backbone import eval_mode
from distillery.reading.loader import DevicePrefetcher
from distillery.system.allocation import is_out_of_gpu_memory
from distillery.system.errors import UserError

BATCH_SIZE = 256
# of the images of a batch on a GPU, three of which are there at a time
MAX_BATCH_BYTES = 256 << 20
# features wait on the device until there are so many, then go to the host in one copy: one for each batch would make
# the host wait for every batch, and all at once might not fit beside the model
MAX_BYTES_ON_DEVICE = 256 << 20


def extract_features(
    model_fn: Callable[[Tensor], Any],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str,
    *,
    precision: str = "fp32",
    before_batch: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Image features of every row, in order; on the way as for_each_batch.

    Args:
        model_fn: from normalised images [B, 3, H, W] on the device to [B, D], or to Features, whose pooled is taken. A
            module is put into eval mode for the time and then back into the mode it was in.
        batches: (images, labels); labels int64 [B].
        device: where the model is.
        precision: bf16, fp16 or fp32, of the model's arithmetic on CUDA, where it has no precision of its own (a
            teacher's Backbone.precision); elsewhere it is float32.
        before_batch: called before each batch; an error of it ends the work.
    Returns:
        features float32 [N, D] and labels int64 [N], on the CPU.
    Raises:
        UserError: there are no rows.
    """
    features, labels = _Collected(), _Collected()

    def collect(batch_features: Tensor, batch_labels: Tensor) -> None:
        features.add(batch_features)
        labels.add(batch_labels)

    for_each_batch(model_fn, batches, device, collect, precision=precision, before_batch=before_batch)
    if not features:
        raise UserError("evaluation: the data set has no valid row; look at failures.jsonl of its cache")
    return features.on_host(), labels.on_host()


def for_each_batch(
    model_fn: Callable[[Tensor], Any],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str,
    consume: Callable[[Tensor, Tensor], None],
    *,
    take: Callable[[Any], Tensor] = lambda out: getattr(out, "pooled", out),
    precision: str = "fp32",
    before_batch: Callable[[], None] = lambda: None,
) -> None:
    """Hand what the model gives for each batch to `consume`, with the batch's labels, without gradients.

    Where a batch does not fit into the device's memory, smaller ones are taken from there on, and a line says so.

    Args:
        model_fn: as of extract_features.
        batches: (images, labels); labels [B, ...].
        device: where the model is.
        consume: called with float32 [B, ...] and the labels, both on the device.
        take: what is wanted of the model's output, [B, ...].
        precision: as of extract_features.
        before_batch: as of extract_features.
    """
    device, forward = torch.device(device), _Forward(model_fn, take)
    with _no_gradients(model_fn), eval_mode(model_fn) if isinstance(model_fn, nn.Module) else nullcontext():
        for images, labels in DevicePrefetcher(batches, device):
            before_batch()
            with _autocast(device, precision):
                outputs = forward(images)
            consume(outputs, labels)


def _no_gradients(model_fn: Callable[[Tensor], Any]) -> Any:
    """inference_mode, but no_grad for a module that is trained: what it may keep of this forward pass (LeViT keeps its
    attention biases) could not be saved for a backward pass.
    """
    is_trained = isinstance(model_fn, nn.Module) and any(p.requires_grad for p in model_fn.parameters())
    return torch.no_grad() if is_trained else torch.inference_mode()


def _autocast(device: torch.device, precision: str) -> Any:
    if device.type != "cuda" or precision == "fp32":
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16 if precision == "bf16" else torch.float16)


class _Forward:
    """What `take` finds in the output, float32, in memory of its own; of smaller batches where memory runs out."""

    def __init__(self, model_fn: Callable[[Tensor], Any], take: Callable[[Any], Tensor]) -> None:
        self.model_fn, self.take, self.batch_size = model_fn, take, BATCH_SIZE

    def __call__(self, images: Tensor) -> Tensor:
        while True:
            try:
                outputs = (self.model_fn(part) for part in images.split(self.batch_size))
                # cat copies: a view of the class token would keep all the tokens in memory
                return torch.cat([self.take(out).float() for out in outputs])
            except Exception as error:
                size = min(self.batch_size, len(images))
                if size == 1 or not is_out_of_gpu_memory(error):
                    raise
                self.batch_size = size // 2
            # not inside except: the error's traceback holds what was allocated
            torch.cuda.empty_cache()
            message = f"evaluation: out of memory with {size} images at a time; going on with {self.batch_size}"
            print(message, file=sys.stderr, flush=True)


class _Collected:
    """Rows of batches one after the other, [N, ...]: those past MAX_BYTES_ON_DEVICE have gone to the host."""

    def __init__(self) -> None:
        self.on_device: list[Tensor] = []
        self.moved: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self.on_device or self.moved)

    def add(self, rows: Tensor) -> None:
        """Take in the rows of a batch."""
        self.on_device.append(rows)
        if sum(part.nbytes for part in self.on_device) >= MAX_BYTES_ON_DEVICE:
            self._move()

    def on_host(self) -> Tensor:
        """All of them."""
        self._move()
        return torch.cat(self.moved)

    def _move(self) -> None:
        if self.on_device:
            self.moved.append(torch.cat(self.on_device).cpu())
            self.on_device = []


def batches_of(kind: Any, folder: Path, device: torch.device | str, share: tuple[int, int] = (0, 1)) -> Any:
    """The rows of a cache in batches of a size that fits the device.

    Args:
        kind: LabelledBatches or MaskedBatches.
        folder: the cache.
        device: where they are going to.
        share: as of LabelledBatches.
    """
    if torch.device(device).type != "cuda":
        return kind(folder, BATCH_SIZE, share)
    image_bytes = 4 * math.prod(load_index(folder).image_shape)
    size = max(1, min(BATCH_SIZE, MAX_BATCH_BYTES // image_bytes))
    return kind(folder, size, share, pin_memory=True)
