"""Plan the teacher outputs of an image cache: what a folder must hold, and what it already holds."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from distillery.cache.images import IMAGE_SHARDS, valid_rows
from distillery.cache.plan import CachePlan, Survey, survey_shards
from distillery.cache.store import ShardKind
from distillery.system.errors import UserError, teacher_command
from distillery.teacher_cache.identity import TeacherCacheSpec
from distillery.teacher_cache.records import BASIS_NAME, TEACHER_SHARDS, file_hash, teacher_shard_name


@dataclass(frozen=True)
class TeacherPlan:
    """What the teacher outputs over an image cache shall be."""

    images: CachePlan
    spec: TeacherCacheSpec
    kind: ClassVar[ShardKind] = TEACHER_SHARDS
    rows_vary: ClassVar[bool] = False

    @property
    def identity(self) -> dict:
        """All that decides the bytes."""
        return self.spec.identity

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the identity."""
        return self.spec.fingerprint

    @property
    def num_rows(self) -> int:
        """As many as the images have."""
        return self.images.num_rows

    @property
    def directory(self) -> Path:
        """The folder of the outputs."""
        return self.spec.folder(self.images.directory)

    @property
    def row_bytes(self) -> int:
        """Bytes of all views of one image."""
        return self.spec.view_bytes * self.spec.num_views

    @property
    def num_shards(self) -> int:
        """As many as the images have."""
        return self.images.num_shards

    def rows_of(self, shard_idx: int) -> tuple[int, int]:
        """(first image, image after the last) of a shard."""
        return self.images.rows_of(shard_idx)

    def shard_path(self, shard_idx: int) -> Path:
        """Where the shard is published."""
        return self.directory / teacher_shard_name(shard_idx)

    @property
    def uses_basis(self) -> bool:
        """Whether tokens are stored in a basis of their own."""
        return self.spec.identity["stored"]["tokens"]["form"] == "pca"

    def why_outdated(self, record: dict, images: dict[int, str], basis: str | None) -> str | None:
        """Why a whole shard of this identity is to be made again: it is not of the images or basis there are now.

        images: by image_hashes; basis: by basis_hash, None where one that was lost will be found again, the same.
        """
        if record["images_hash"] != images.get(record["shard_idx"]):
            return "is of other images than there are now"
        if basis not in (None, record["basis_hash"]):
            return "is in another basis than there is now"
        return self.images.why_outdated(record)


def images_for_training(images: CachePlan, max_samples: int | None) -> CachePlan:
    """The plan up to the last image that training takes, where it is there.

    Stage 1 counts max_samples in rows of the source, training in images that can be used: on a cache that has more, it
    takes one of the next for each that could not be decoded.
    """
    if max_samples is None or max_samples > images.num_rows or not images.directory.is_dir():
        return images
    records = {record["shard_idx"]: record for record in IMAGE_SHARDS.scan(images.directory).records()}
    left, end = max_samples, 0
    for shard_idx in range(max(images.num_shards, len(records))):
        start, stop = images.rows_of(shard_idx)
        if shard_idx in records:
            valid = valid_rows(records[shard_idx])
        elif shard_idx < images.num_shards:  # still to be made
            valid = np.ones(stop - start, bool)
        else:
            break
        if valid.sum() >= left:
            end = start + int(np.flatnonzero(valid)[left - 1]) + 1
            break
        left, end = left - int(valid.sum()), start + len(valid)
    return replace(images, num_rows=max(images.num_rows, end))


def survey_teacher(plan: TeacherPlan, shards: Iterable[int]) -> Survey:
    """What a folder holds of a plan's shards; reads records and file sizes only, writes nothing.

    A shard counts as finished when its record parses, its size agrees, it was not touched since its record was written
    and the image shard is still the one it was made of; one of an image shard that has changed is made again.

    Raises:
        UserError: the folder holds outputs of another configuration; or of a later format.
    """
    if not plan.directory.is_dir():
        return Survey([], [], list(shards))
    records = {record["shard_idx"]: record for record in TEACHER_SHARDS.scan(plan.directory).records()}
    for record in records.values():
        if record["fingerprint"] != plan.fingerprint:
            raise UserError(
                f"{plan.directory / record['shard_path']} was made with another configuration than its folder is named "
                "after: somebody moved it there. Move it away."
            )
    images, basis = image_hashes(plan.images.directory), basis_hash(plan)
    return survey_shards(plan, shards, records, lambda record: plan.why_outdated(record, images, basis))


def image_hashes(cache_dir: Path) -> dict[int, str]:
    """shard_idx -> file hash of the image shards that are there."""
    records = IMAGE_SHARDS.scan(cache_dir).records() if cache_dir.is_dir() else []
    return {record["shard_idx"]: record["hash"] for record in records}


def basis_hash(plan: TeacherPlan) -> str | None:
    """File hash of the token basis; None where there is or needs to be none."""
    path = plan.directory / BASIS_NAME
    return file_hash(path) if plan.uses_basis and path.is_file() else None


def check_images(plan: TeacherPlan, shards: list[int]) -> None:
    """Raise UserError unless the image shards are there, with all the rows that the plan gives them."""
    rows = {record["shard_idx"]: record["num_samples"] for record in IMAGE_SHARDS.scan(plan.images.directory).records()}
    for shard_idx in shards:
        start, stop = plan.rows_of(shard_idx)
        if rows.get(shard_idx, 0) < stop - start:
            raise UserError(
                f"{plan.images.shard_path(shard_idx)}: has {rows.get(shard_idx, 0)} images, {stop - start} are wanted. "
                f"Make the images first: {teacher_command()} does, with the same configuration."
            )
