"""The teacher pass: run K views of every cached image through the teacher, into shards aligned with the images'.

    image shards (a thread reads ahead, checksums compared) -> teacher, TEACHER_BATCH images of one view at a time ->
    a thread writes the vectors to their places in the shard's temporary file -> hash, fsync, publish, record -> views

The shard alone decides which images share a forward pass. On one machine, a shard is therefore a pure function of the
specification and its number. After a pass was killed, the same command goes on and produces the same bytes.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import xxhash
from torch import Tensor

from distillery.cache.archive import crc32
from distillery.cache.fields import frame_of, place_fields
from distillery.cache.plan import Survey
from distillery.cache.store import encode_checksums
from distillery.losses.targets import Moments
from distillery.precompute.loop import MakingReport, OpenShard, ShardLoop
from distillery.reading.rows import ImageRows
from distillery.system.files import hash_file, pwrite_all
from distillery.system.machine import usable_cpus
from distillery.system.signals import StopFlag
from distillery.teacher_cache.outputs import LiveTeacher, encode_features, ensure_basis, valid_features
from distillery.teacher_cache.reader import load_basis, to_device
from distillery.teacher_cache.records import BASIS_NAME, encode_sums, mark_as_current
from distillery.teacher_cache.survey import TeacherPlan, check_images, image_hashes, survey_teacher


def make_teacher_cache(
    plan: TeacherPlan,
    teacher: LiveTeacher,
    *,
    shards: Iterable[int],
    stop: StopFlag,
    on_rows: Callable[..., None] = lambda rows, **state: None,
) -> MakingReport:
    """Make the shards of a range that are missing; run again, it goes on where it was.

    Args:
        plan: what the outputs shall be; the images of the range must be there.
        teacher: the one that the plan's specification describes.
        shards: the shard numbers this call is to make (all, or an array task's share).
        stop: looked at between batches.
        on_rows: called with (images done just now, shards=made so far).
    Raises:
        RunError: the disk is full or fails, the images cannot be read; what is published stays, the same command goes
            on.
        UserError: the folder cannot be written to, images are missing, or the outputs do not fit the dtype.
    """
    report = _TeacherLoop(plan, shards, teacher, stop=stop, on_rows=on_rows).run(usable_cpus())
    mark_as_current(plan.directory)
    return report


class _TeacherLoop(ShardLoop):
    """Shards of the teacher's outputs; arguments as ShardLoop and make_teacher_cache."""

    def __init__(self, plan: TeacherPlan, shards: Iterable[int], teacher: LiveTeacher, **options) -> None:
        super().__init__(plan, shards, **options)
        self.teacher, self.images = teacher, ImageRows(plan.images.directory, plan.images.fingerprint)
        self.image_hashes: dict[int, str] = {}
        self.basis: dict[str, Tensor] | None = None
        self.basis_hash: str | None = None

    def survey(self) -> Survey:
        # the basis first: shards in another one count as missing
        if self.plan.uses_basis:
            self.basis_hash = ensure_basis(self.plan, self.teacher, self.images)
            basis = load_basis(self.plan.directory / BASIS_NAME, self.basis_hash)
            self.basis = to_device(basis, self.teacher.device)
        self.image_hashes = image_hashes(self.plan.images.directory)
        survey = survey_teacher(self.plan, sorted(self.left))
        check_images(self.plan, [*survey.missing, *survey.to_check])
        return survey

    def why_outdated(self, record: dict) -> str | None:
        return self.plan.why_outdated(record, self.image_hashes, self.basis_hash)

    def make(self, shards: list[int]) -> None:
        for shard_idx in self.claim(shards):
            if not self._make(shard_idx):
                return
            self.published(shard_idx)

    def _make(self, shard_idx: int) -> bool:
        """Compute, write and publish a shard; False when the grace after a stop request ran out on the way."""
        s = self.images.position(self.plan.images.shard_path(shard_idx).name)
        shard = OpenTeacherShard(self, shard_idx, self.image_hashes[shard_idx], self.basis_hash)
        writing: Future | None = None
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="write-outputs") as pool:
                for first, images, valid in self.images.batches(s, shard.num_rows):
                    encoded = self._outputs(images, valid, shard.start + first, shard.sums)
                    if writing is not None:
                        writing.result()
                    writing = pool.submit(shard.write, first, encoded, valid.numpy())
                    self.on_rows(len(valid), shards=self.num_made)
                    if self.grace_is_over():
                        return False
                writing.result()
            shard.publish()
        finally:
            shard.close()
        return True

    def _outputs(self, images: Tensor, valid: Tensor, start: int, sums: dict[str, Moments]) -> dict[str, np.ndarray]:
        """All views of a batch as they are stored: field -> [n, K, ...]; adds them to the sums."""
        global_idx = torch.arange(start, start + len(images))
        images, views = images.to(self.teacher.device), []
        for view in range(self.plan.spec.num_views):
            features = self.teacher.features(images, global_idx, view)
            views.append(encode_features(features, self.plan.spec, self.basis))
            kept = valid_features(features, valid)
            for name, added in sums.items():
                added.add(kept.tensors()[name])
        return {name: torch.stack([one[name] for one in views], dim=1).cpu().numpy() for name in views[0]}


class OpenTeacherShard(OpenShard):
    """A shard of teacher outputs in the making, with checksums and sums of what has been written to it.

    Args:
        loop, shard_idx: as OpenShard.
        images_hash: file hash of the image shard it is made of.
        basis_hash: file hash of the token basis; None without one.
    """

    plan: TeacherPlan

    def __init__(self, loop: ShardLoop, shard_idx: int, images_hash: str, basis_hash: str | None) -> None:
        start, stop = loop.plan.rows_of(shard_idx)
        spec, rows = loop.plan.spec, stop - start
        self.fields = place_fields(
            {name: (dtype, (rows, spec.num_views, *shape)) for name, (dtype, shape) in spec.view_fields.items()}
        )
        super().__init__(loop, shard_idx, self.fields[-1].end)
        self.images_hash, self.basis_hash = images_hash, basis_hash
        self.crcs = [0] * len(self.fields)
        self.checksums = {field.name: np.zeros(field.num_rows, np.uint64) for field in self.fields}
        self.valid = np.zeros(self.num_rows, bool)
        self.rows_written = 0
        summed = ("pooled",) if spec.resolved["token_width"] is None else ("pooled", "tokens")
        self.sums = {name: Moments() for name in summed}

    def write(self, first: int, values: Mapping[str, np.ndarray], valid: np.ndarray) -> None:
        """Write the rows that follow those written so far; rows that are not valid become zero.

        Args:
            first: number of the first row.
            values: field -> [n, K, ...] in the field's dtype.
            valid: bool [n].
        """
        assert first == self.rows_written
        views = self.plan.spec.num_views
        for key, its_field in enumerate(self.fields):
            part = np.ascontiguousarray(values[its_field.name])
            if not valid.all():
                part[~valid] = 0
            data, checksums = memoryview(part).cast("B"), self.checksums[its_field.name]
            for i in range(len(part) * views):
                row = data[i * its_field.row_bytes : (i + 1) * its_field.row_bytes]
                checksums[first * views + i] = xxhash.xxh3_64_intdigest(row)
            self.crcs[key] = crc32(data, self.crcs[key])
            pwrite_all(self.fd, data, its_field.offset + first * views * its_field.row_bytes)
        self.valid[first : first + len(valid)] = valid
        self.rows_written += len(valid)

    def meta(self) -> dict:
        """All the record says except the file's own size and hash."""
        return super().meta() | {
            "num_views": self.plan.spec.num_views,
            "failed_rows": np.flatnonzero(~self.valid).tolist(),
            "images_hash": self.images_hash,
            "basis_hash": self.basis_hash,
            "fields": {field.name: {"dtype": field.dtype, "shape": list(field.shape)} for field in self.fields},
            "checksums": {name: encode_checksums(values) for name, values in self.checksums.items()},
            "sums": {
                name: encode_sums(found.count, found.total.cpu().numpy(), found.products.cpu().numpy())
                for name, found in self.sums.items()
            },
            "libraries": {"torch": torch.__version__},
        }

    def publish(self) -> None:
        """Complete the file and publish it."""
        assert self.rows_written == self.num_rows
        meta = self.meta()
        frame = frame_of(self.fields, self.crcs, {"valid": self.valid}, json.dumps(meta, sort_keys=True))
        for offset, piece in frame:
            pwrite_all(self.fd, piece, offset)
        size = offset + len(piece)
        os.ftruncate(self.fd, size)
        with open(self.fd, "rb", buffering=0, closefd=False) as file:
            file.seek(0)
            file_hash = hash_file(file)
        self.publish_file(meta | {"bytes": size, "hash": file_hash})
