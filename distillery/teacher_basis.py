"""The basis that tokens are stored in: principal components, fixed before the first shard of a folder is made."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillery.reading.rows import TEACHER_BATCH, ImageRows
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import create_temporary, fsync_dir, publish_no_clobber, temporary_name, write_all
from distillery.teacher_cache import load_basis
from distillery.teacher_identity import TeacherCacheSpec
from distillery.teacher_outputs import LiveTeacher, basis_bytes, fit_basis, valid_features
from distillery.teacher_records import BASIS_NAME, file_hash
from distillery.teacher_survey import TeacherPlan

BASIS_IMAGES = 2048


def ensure_basis(plan: TeacherPlan, teacher: LiveTeacher, images: ImageRows) -> str:
    """The hash of the token basis, which is fixed before the first shard is made; of several jobs the first decides.

    Raises:
        UserError: it has to be made, and images are missing.
    """
    path = plan.directory / BASIS_NAME
    if not _is_basis(path, plan.spec):
        count = min(BASIS_IMAGES, plan.images.num_rows)
        rows = np.array([i * plan.images.num_rows // count for i in range(count)])
        batches = (rows[first : first + TEACHER_BATCH] for first in range(0, count, TEACHER_BATCH))
        tokens = (tokens for part in batches if len(tokens := _tokens_of(part, teacher, images)))
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
    return valid_features(features, torch.from_numpy(valid)).tokens


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
