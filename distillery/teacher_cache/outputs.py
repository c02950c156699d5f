"""Compute the teacher's outputs that are stored: its features of a view, in the form of the specification."""

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distillery.losses.targets import Moments
from distillery.models.backbone import Features, memory_format_of
from distillery.models.pair import resample_tokens
from distillery.models.precision import autocast_for
from distillery.models.views import Augmentation
from distillery.reading.rows import TEACHER_BATCH, ImageRows
from distillery.system.errors import Interrupted, MissingFileError, UserError
from distillery.system.files import create_temporary, fsync_dir, publish_no_clobber, temporary_name, write_all
from distillery.system.signals import StopFlag
from distillery.teacher_cache.identity import TeacherCacheSpec
from distillery.teacher_cache.reader import encode_tokens, load_basis
from distillery.teacher_cache.records import BASIS_NAME, file_hash
from distillery.teacher_cache.survey import TeacherPlan

# what a code of 127 stands for; a step is then 0.06 deviations, and nothing but freak tokens is cut off
_SCALE_STDS = 8.0
_SMALLEST_SCALE = 1e-12
BASIS_IMAGES = 2048
# images of one forward pass on a GPU, where TEACHER_BATCH would leave a small teacher waiting for its launches. As that
# one it decides the bytes: a constant, never what the memory that happens to be free has room for
CUDA_BATCH = 256


@dataclass(frozen=True)
class LiveTeacher:
    """The teacher as the pass and its verification run it: frozen, in eval mode, on the device.

    backbone: models.Backbone; seed: of the views; precision: bf16, fp16 or fp32, what float32 weights are computed in;
    weights in a low type (Backbone.keep_in) are computed in theirs.
    """

    backbone: nn.Module
    augmentation: Augmentation
    seed: int
    device: torch.device
    precision: str

    @torch.inference_mode()
    def features(self, images: Tensor, global_idx: Tensor, view: int | Tensor) -> Features:
        """The teacher's features of views, float32 on the device; arguments as Augmentation.views, float32 images."""
        images = self.augmentation.views(images.to(self.device), global_idx, view, seed=self.seed)
        with autocast_for(self.precision, images.device.type):
            features = self.backbone(images.contiguous(memory_format=memory_format_of(self.backbone, images.device)))
        return features.with_tensors({name: value.float() for name, value in features.tensors().items()})

    def views(self, images: Tensor, global_idx: Tensor, num_views: int) -> Iterator[Features]:
        """`features` of the views 0, 1, ... in turn, with as few passes of the backbone as they take."""
        step = 2 if self._has_pairs else 1
        for view in range(0, num_views, step):
            features = self.features(images, global_idx, view)
            yield features
            if view + 1 < min(num_views, view + step):
                yield features.mirrored()

    def passes(self, num_views: int) -> int:
        """How often `views` runs the backbone for an image."""
        return (num_views + 1) // 2 if self._has_pairs else num_views

    @property
    def views_only_mirror(self) -> bool:
        """Whether view 2k + 1 is the mirror image of view 2k."""
        return self.augmentation.hflip and not self.augmentation.changes_pixels

    @property
    def _has_pairs(self) -> bool:
        """Whether the backbone sees view 2k + 1 with view 2k, as it averages over both."""
        return self.backbone.mirror and self.views_only_mirror


def forward_batch(device: torch.device) -> int:
    """Images of one forward pass of the teacher's pass on a device."""
    return CUDA_BATCH if device.type == "cuda" else TEACHER_BATCH


def encode_features(
    features: Features, spec: TeacherCacheSpec, basis: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one view as they are stored, and how large the values are; nothing here waits for the device.

    Args:
        features: float32.
        spec: what is stored, in which form.
        basis: of the tokens, on their device; for the form pca.
    Returns:
        field -> [B, ...] of view_fields' dtype and shape; and the largest magnitude of each field, float32 [F], for
        check_magnitudes. NaN where a value is NaN.
    """
    found = {"pooled": features.pooled, "logits": features.logits}
    if spec.token_grid is not None:
        found["tokens"] = resample_tokens(features.tokens, features.grid, spec.token_grid)
    encoded, largest = {}, []
    for name, (dtype, shape) in spec.view_fields.items():
        values = found[name]
        stored = encode_tokens(values, basis) if dtype == "int8" else values.to(getattr(torch, dtype))
        encoded[name] = stored.reshape(len(stored), *shape)
        largest.append(values.abs().amax())
    return encoded, torch.stack(largest)


def check_magnitudes(largest: Tensor, spec: TeacherCacheSpec) -> None:
    """Raise UserError where a value is not finite, or too large for its dtype.

    largest: magnitudes of encode_features, [..., F], on the CPU.
    """
    worst = largest.flatten(0, -2).amax(0) if largest.ndim > 1 else largest
    for value, (name, (dtype, _)) in zip(worst, spec.view_fields.items(), strict=True):
        # rounding keeps the order: where the largest is finite as stored, all are
        stored = value if dtype == "int8" else value.to(getattr(torch, dtype))
        if not stored.isfinite():
            raise UserError(
                f"the teacher's {name} are not finite as {dtype} (largest {value.item():.3g}): set "
                "teacher_cache.dtype: float32, precision: fp32 where it is fp16, or look at the teacher's weights"
            )


class HostCopy:
    """Tensors on their way from the device to the host, while the device goes on.

    On CUDA torch takes page-locked memory for them, which it uses again once they have been dropped.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: value.to("cpu", non_blocking=True) for name, value in tensors.items()}
        self._arrived = None
        if any(value.is_cuda for value in tensors.values()):
            self._arrived = torch.cuda.Event(blocking=True)  # waited for asleep: decoding needs the CPU
            self._arrived.record()

    def wait(self) -> dict[str, Tensor]:
        """The tensors, once they are all there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


def fit_basis(batches: Iterable[Tensor], num_dims: int) -> dict[str, Tensor]:
    """The principal components of tokens [B, P, Dt], from their covariance, summed in float64.

    Returns:
        mean [Dt], components [d, Dt] (rows orthonormal, largest variance first), scale [d] (what a code of 127 stands
        for); float32 on the CPU.
    """
    moments = Moments(with_covariance=True)
    for tokens in batches:
        moments.add(tokens)
    values, vectors = torch.linalg.eigh(moments.covariance.cpu())
    num_dims = min(num_dims, len(values))
    components = vectors.T.flip(0)[:num_dims]
    # an eigenvector's sign is free: the largest entry is made positive
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * largest.sign()
    scale = _SCALE_STDS * values.flip(0)[:num_dims].clamp(min=0).sqrt()
    return {
        "mean": moments.mean.cpu().float(),
        "components": components.float().contiguous(),
        "scale": scale.float().clamp(min=_SMALLEST_SCALE),
    }


def basis_bytes(basis: Mapping[str, Tensor]) -> bytes:
    """A basis as a file for torch.load(weights_only=True); the same bytes for the same tensors."""
    buffer = io.BytesIO()
    torch.save(dict(basis), buffer)
    return buffer.getvalue()


def rows_of_valid(valid: np.ndarray, device: torch.device) -> Tensor:
    """The rows of a batch whose images could be decoded, int64 [n] on the device; valid: bool [B].

    Indexing with a mask on the device would make the host wait for how many there are; it knows that itself.
    """
    if valid.all():
        return torch.arange(len(valid), device=device)
    rows = torch.from_numpy(np.flatnonzero(valid))
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


def ensure_basis(plan: TeacherPlan, teacher: LiveTeacher, images: ImageRows, batch_size: int, stop: StopFlag) -> str:
    """The hash of the token basis, which is fixed before the first shard is made; of several jobs the first decides.

    batch_size: images of one forward pass; stop: looked at between them.

    Raises:
        UserError: it has to be made, and images are missing. Interrupted: a stop was requested before it was.
    """

    def tokens_of(rows: np.ndarray) -> Tensor:
        if stop.requested:
            raise Interrupted(f"{stop.reason}: the token basis is not made yet. Run the same command again.")
        return _tokens_of(rows, teacher, images)

    path = plan.directory / BASIS_NAME
    if not _is_basis(path, plan.spec):
        count = min(BASIS_IMAGES, plan.images.num_rows)
        rows = np.array([i * plan.images.num_rows // count for i in range(count)])
        batches = (rows[first : first + batch_size] for first in range(0, count, batch_size))
        tokens = (tokens for part in batches if len(tokens := tokens_of(part)))
        _publish_basis(path, basis_bytes(fit_basis(tokens, plan.spec.view_fields["tokens"][1][1])), plan.spec)
    return file_hash(path)


def _tokens_of(rows: np.ndarray, teacher: LiveTeacher, images: ImageRows) -> Tensor:
    """Tokens [n, P, Dt] of the first view of these images, int64 [B], without those that could not be decoded."""
    try:
        shards, local = images.find(rows)
    except MissingFileError as error:
        raise UserError(
            "teacher_cache.tokens: pca takes its basis from images of the whole cache, and not all are there. Make the "
            "images first (the same command without --teacher), then the teacher's outputs."
        ) from error
    valid = np.array([images.files.layout(s).valid[row] for s, row in zip(shards.tolist(), local, strict=True)])
    features = teacher.features(images.read_rows(shards, local), torch.from_numpy(rows), 0)
    return features.tokens[rows_of_valid(valid, teacher.device)]


def _is_basis(path: Path, spec: TeacherCacheSpec) -> bool:
    try:
        basis = load_basis(path, file_hash(path))
        _, width = spec.view_fields["tokens"][1]
        shapes = {"mean": (spec.resolved["token_width"],), "scale": (width,)}
        shapes["components"] = (width, *shapes["mean"])
        return all(basis[name].shape == shape for name, shape in shapes.items())
    except Exception:  # whatever torch.load says of a damaged file
        return False


def _publish_basis(path: Path, data: bytes, spec: TeacherCacheSpec) -> None:
    temporary = temporary_name(path)
    fd = create_temporary(temporary)
    try:
        write_all(fd, data)
        os.fsync(fd)
        if not publish_no_clobber(temporary, path) and not _is_basis(path, spec):
            temporary.replace(path)
            fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(fd)
