"""The teacher pass: run K views of every cached image through the teacher, into shards aligned with the images'.

    image shards (threads read ahead, checksums compared) -> teacher, a batch of one view at a time ->
    a thread writes the vectors to their places in the shard's temporary file -> hash, fsync, publish, record -> views

While the device computes a batch, the thread waits for the outputs of the batch before, checks them and writes them.

The shard alone decides which images share a forward pass. On one machine, a shard is therefore a pure function of the
specification and its number. After a pass was killed, the same command goes on and produces the same bytes; on a GPU,
as long as the same number of images fits into its memory at a time.
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from distillery.cache.archive import crc32
from distillery.cache.fields import frame_of, place_fields
from distillery.cache.images import IMAGE_SHARDS
from distillery.cache.plan import Survey
from distillery.cache.store import encode_checksums
from distillery.losses.targets import Moments
from distillery.precompute.loop import MakingReport, OpenShard, ShardLoop
from distillery.reading.loader import DevicePrefetcher
from distillery.reading.rows import ImageRows
from distillery.system.allocation import is_out_of_gpu_memory
from distillery.system.files import hash_file, pwrite_all
from distillery.system.machine import usable_cpus
from distillery.system.signals import StopFlag
from distillery.teacher_cache.outputs import (
    HostCopy,
    LiveTeacher,
    check_magnitudes,
    encode_features,
    ensure_basis,
    forward_batch,
    rows_of_valid,
)
from distillery.teacher_cache.reader import load_basis, to_device
from distillery.teacher_cache.records import BASIS_NAME, encode_sums, mark_as_current
from distillery.teacher_cache.survey import TeacherPlan, check_images, image_hashes, survey_teacher

# beside the fields of a batch's outputs
_MAGNITUDES = "magnitudes"


def make_teacher_cache(
    plan: TeacherPlan,
    teacher: LiveTeacher,
    *,
    shards: Iterable[int],
    stop: StopFlag,
    on_rows: Callable[..., None] = lambda rows, **state: None,
    on_wait: Callable[[str], None] | None = None,
) -> MakingReport:
    """Make the shards of a range that are missing; run again, it goes on where it was.

    Args:
        plan: what the outputs shall be; the images of the range must be there.
        teacher: the one that the plan's specification describes.
        shards: the shard numbers this call is to make (all, or an array task's share).
        stop: looked at between batches.
        on_rows: called with (images done just now, shards=made so far).
        on_wait: as of ShardLoop: None for one job's share.
    Raises:
        RunError: the disk is full or fails, the images cannot be read; what is published stays, the same command goes
            on.
        UserError: the folder cannot be written to, images are missing, or the outputs do not fit the dtype.
    """
    loop = _TeacherLoop(plan, shards, teacher, stop=stop, on_rows=on_rows, on_wait=on_wait)
    report = loop.run(usable_cpus())
    mark_as_current(plan.directory)
    return report


class _TeacherLoop(ShardLoop):
    """Shards of the teacher's outputs; arguments as ShardLoop and make_teacher_cache."""

    def __init__(self, plan: TeacherPlan, shards: Iterable[int], teacher: LiveTeacher, **options) -> None:
        super().__init__(plan, shards, **options)
        self.teacher, self.images = teacher, ImageRows(plan.images.directory, plan.images.fingerprint)
        self.batch_size = forward_batch(teacher.device)
        self.image_hashes: dict[int, str] = {}
        self.basis: dict[str, Tensor] | None = None
        self.basis_hash: str | None = None

    def survey(self) -> Survey:
        # the basis first: shards in another one count as missing
        if self.plan.uses_basis:
            self.basis_hash = self._within_memory(
                lambda: ensure_basis(self.plan, self.teacher, self.images, self.batch_size, self.stop)
            )
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
            if not self._within_memory(functools.partial(self._make, shard_idx)):
                return
            self.published(shard_idx)

    def _within_memory(self, work: Callable[[], Any]) -> Any:
        """Do work in batches of self.batch_size; where the GPU's memory does not suffice, all of it again with half.

        A shard is never made with two batch sizes: how much memory is free would decide its bytes.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if self.batch_size == 1 or not is_out_of_gpu_memory(error):
                    raise
                self.batch_size //= 2
            # not inside except: the error's traceback holds what was allocated
            torch.cuda.empty_cache()
            print(
                f"out of GPU memory with {2 * self.batch_size} images at a time; going on with {self.batch_size}. "
                "Another batch size may change the last digits of the outputs.",
                file=sys.stderr,
                flush=True,
            )

    def _make(self, shard_idx: int) -> bool:
        """Compute, write and publish a shard; False when the grace after a stop request ran out on the way."""
        s = self._position(self.plan.images.shard_path(shard_idx).name)
        valid = self.images.files.layout(s).valid
        shard = OpenTeacherShard(self, shard_idx, self.image_hashes[shard_idx], self.basis_hash)
        size, device = self.batch_size, self.teacher.device
        batches = self.images.batches(s, shard.num_rows, size, pin_memory=device.type == "cuda")
        writing: Future | None = None
        try:
            with contextlib.closing(batches), ThreadPoolExecutor(1, thread_name_prefix="write-outputs") as pool:
                starts = range(0, shard.num_rows, size)
                for first, images in zip(starts, DevicePrefetcher(batches, device), strict=True):
                    kept = valid[first : first + len(images)]
                    # the device has this batch to compute while the one before is written
                    outputs = self._outputs(images, kept, shard.start + first, shard.sums)
                    if writing is not None:
                        writing.result()
                    writing = pool.submit(self._write, shard, first, outputs, kept)
                    self.on_rows(len(kept), shards=self.num_made)
                    if self.grace_is_over():
                        return False
                writing.result()
            shard.publish()
        finally:
            shard.close()
        return True

    def _position(self, shard_name: str) -> int:
        """The number of an image shard among those listed."""
        if shard_name not in self.images.index.shard_names:
            # its record is there (check_images): a process that had not seen it yet wrote the index
            IMAGE_SHARDS.scan(self.plan.images.directory).write_views(self.plan.images.num_rows)
            self.images = ImageRows(self.plan.images.directory, self.plan.images.fingerprint)
        return self.images.position(shard_name)

    def _outputs(self, images: Tensor, valid: np.ndarray, start: int, sums: dict[str, Moments]) -> HostCopy:
        """All views of a batch as they are stored: field -> [n, K, ...], on the way to the host; adds them to the sums.

        With them come the magnitudes of encode_features, [K, F]. Nothing here waits for the device.
        """
        global_idx = torch.arange(start, start + len(images), device=self.teacher.device)
        rows = rows_of_valid(valid, self.teacher.device)
        views, largest = [], []
        for features in self.teacher.views(images, global_idx, self.plan.spec.num_views):
            encoded, magnitudes = encode_features(features, self.plan.spec, self.basis)
            views.append(encoded)
            largest.append(magnitudes)
            for name, added in sums.items():
                added.add(features.tensors()[name][rows])
        stacked = {name: torch.stack([one[name] for one in views], dim=1) for name in views[0]}
        return HostCopy(stacked | {_MAGNITUDES: torch.stack(largest)})

    def _write(self, shard: "OpenTeacherShard", first: int, outputs: HostCopy, valid: np.ndarray) -> None:
        values = outputs.wait()
        check_magnitudes(values.pop(_MAGNITUDES), self.plan.spec)
        shard.write(first, {name: value.numpy() for name, value in values.items()}, valid)


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
