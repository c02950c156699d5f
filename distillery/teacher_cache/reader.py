"""Read stored teacher outputs for training: K views of every image, each with the teacher's outputs for it.

A folder cache_dir/teacher/<12 hex> holds the outputs of one teacher over one image cache. Its shards are aligned row by
row with the image shards. View k of an image is Augmentation.views(images, global_idx, k, seed=...). A mirrored view is
a separate view with separate outputs. distillery.precompute.teacher_shards writes these folders.
"""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from distillery.cache.fields import FIELD_DTYPES
from distillery.cache.folder import ShardLayout
from distillery.cache.plan import differences
from distillery.cache.store import decode_checksums
from distillery.reading.shard_files import ShardFiles
from distillery.system.errors import MissingFileError, UserError, teacher_command
from distillery.system.files import open_regular, read_blocks
from distillery.teacher_cache.identity import LOCAL_REPO, token_grid_of
from distillery.teacher_cache.local_files import local_dir_of, path_of_text
from distillery.teacher_cache.records import (
    BASIS_NAME,
    FOLDER_NAME,
    TEACHER_SHARDS,
    fields_of,
    made_at,
    read_teacher_index,
    statistics_of,
    teacher_folders,
)

_MAX_BASIS_BYTES = 1 << 30


def find_teacher_cache(cache_dir: Path, wanted: Mapping[str, Any], fingerprint: str | None = None) -> "TeacherCache":
    """Find the folder of teacher outputs that a configuration needs, below an image cache.

    Args:
        cache_dir: the image cache.
        wanted: configured_identity, and under "resolved" whatever of resolved_teacher is known as well.
        fingerprint: of several that fit, the one to take, where it is there; else the one that a pass named last.
            Several fit when weights have changed behind the same name, or precision: auto was another on another
            device.
    Raises:
        MissingFileError: there are none at all. UserError: there are only others, with what differs from the nearest.
    """
    fitting = fitting_folders(cache_dir, wanted, fingerprint)
    weights = [read_teacher_index(folder)["identity"]["resolved"]["weights_hash"] for folder in fitting]
    others = [folder for folder, its in zip(fitting, weights, strict=True) if its != weights[0]]
    return TeacherCache(fitting[0], of_other_weights=sorted(others))


def fitting_folders(cache_dir: Path, wanted: Mapping[str, Any], fingerprint: str | None = None) -> list[Path]:
    """The folders that find_teacher_cache chooses from, best first; arguments and errors as there.

    Where a teacher is built from files of this machine, their paths and their code do not count here. The caller
    compares the files (local_files.py), or the weights.
    """
    found, unreadable = [], None
    for folder in teacher_folders(Path(cache_dir)):
        try:
            index = read_teacher_index(folder)
        except UserError as error:
            unreadable = unreadable or error
            continue
        all_differing = list(differences(_part(index["identity"], wanted), dict(wanted)))
        differing = [entry for entry in all_differing if not _names_local_files(*entry)]
        is_other = index["fingerprint"] != fingerprint
        rank = (len(differing), is_other, len(all_differing), not index["complete"], -made_at(folder))
        found.append((rank, folder, differing))
    if not found:
        if unreadable is not None:
            raise unreadable
        raise MissingFileError(
            f"{Path(cache_dir) / FOLDER_NAME}: no teacher outputs there. Run: {teacher_command()}, "
            "or set teacher_cache.enabled: false to run the teacher in every step."
        )
    found.sort(key=lambda entry: entry[0])
    _, folder, differing = found[0]
    if differing:
        lines = [f"  {key}: the cache has {a!r}, now it would be {b!r}" for key, a, b in differing]
        raise UserError(
            f"no teacher outputs of this configuration below {cache_dir}; the nearest, {folder}, differ:\n"
            + "\n".join(lines)
            + f"\nPut the values (or the files) back, or make them: {teacher_command()}"
        )
    return [folder for _, folder, differing in found if not differing]


def _names_local_files(key: str, had: Any, now: Any) -> bool:
    """Whether two values of an identity may be two names of the same files on this machine."""
    if not isinstance(had, str) or not isinstance(now, str):
        return False
    if key == "teacher.repo":
        return had.startswith(LOCAL_REPO) and now.startswith(LOCAL_REPO)
    if key == "teacher.name":
        return local_dir_of(had) is not None and local_dir_of(now) is not None
    return key.startswith("teacher.kwargs.") and "/" in had and path_of_text(now) is not None


def _part(identity: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict:
    """The keys of the identity that `wanted` has; below "resolved" too."""
    part = {key: identity.get(key) for key in wanted}
    if "resolved" in wanted:
        part["resolved"] = {key: identity["resolved"].get(key) for key in wanted["resolved"]}
    return part


@dataclass(frozen=True)
class _FieldIndex:
    """One tensor of every shard as ShardFiles wants to see it: a row is one view of one image."""

    directory: Path
    name: str
    fingerprint: str
    row_bytes: int
    num_views: int
    shard_names: list[str]
    shard_starts: np.ndarray
    shard_rows: np.ndarray
    shard_bytes: np.ndarray
    verified: bool = True

    def shard_path(self, s: int) -> Path:
        """The file of the s-th shard listed."""
        return self.directory / self.shard_names[s]


def _record_of(path: Path) -> dict:
    """The record of a listed shard, or the shard's own description where the record is lost."""
    try:
        return TEACHER_SHARDS.record_or_meta(path)
    except FileNotFoundError as error:
        if isinstance(error, UserError):
            raise
        raise MissingFileError(f"{path}: listed in the index, but not there. Run: {teacher_command()}") from error


class _FieldFiles(ShardFiles):
    """The vectors of one field; rows are numbered image * num_views + view."""

    def _load_layout(self, shard: int) -> ShardLayout:
        index, path = self.index, self.index.shard_path(shard)
        listed, record = int(index.shard_rows[shard]), _record_of(path)
        num_bytes, is_listed = None, record["num_samples"] * record["num_views"] == listed
        with contextlib.suppress(FileNotFoundError, UserError):  # it is refused when it is opened
            if (size := path.stat().st_size) != index.shard_bytes[shard]:
                # not the record: it is written after the shard, and may be the short one's still
                record, _ = TEACHER_SHARDS.meta_inside(path)
                num_bytes, is_listed = size, record["num_samples"] * record["num_views"] > listed
        found = (record["fingerprint"], record["global_start"], record["num_views"])
        if not is_listed or found != (index.fingerprint, index.shard_starts[shard], index.num_views):
            raise UserError(f"{path}: is not the shard that index.json lists. Run: {teacher_command()}")
        field = next((field for field in fields_of(record) if field.name == index.name), None)
        if field is None or field.row_bytes != index.row_bytes:
            raise UserError(f"{path}: holds other tensors than index.json says. Run: {teacher_command()}")
        checksums = decode_checksums(record["checksums"][index.name])[:listed]
        return ShardLayout(field.offset, np.ones(listed, bool), checksums, num_bytes)

    def _row_name(self, shard: int, row: int) -> str:
        local, view = divmod(row, self.index.num_views)
        start = self.index.shard_starts[shard]
        return f"{self.index.name} of row {local}, view {view} (global_idx {start + local}"

    def _command(self) -> str:
        return teacher_command()

    def _advice(self) -> str:
        cache_dir = self.index.directory.parent.parent
        return f"Run: python -m distillery.cache verify {cache_dir}, then {teacher_command()}"


class TeacherCache:
    """The teacher's outputs for K views of every image. Threads may share one; a fork opens the files for itself.

    directory: its folder; num_views: K; identity: all that decided it; weights_hash: of the teacher; widths: field ->
    width as training sees it; grid: (h, w) of the tokens, or None; statistics: pooled_mean and so on, float64 [D];
    bytes_per_view: on disk, of one view of one image; of_other_weights: as given.

    Args:
        directory: cache_dir/teacher/<12 hex>.
        of_other_weights: folders that the same configuration may mean, made before weights changed behind its names.
        verify: as ShardFiles: the checksum of a vector is compared when this process first reads it.
    Raises:
        MissingFileError: no teacher outputs there. UserError: damaged, or of a later version.
    """

    def __init__(self, directory: Path, *, verify: str = "first", of_other_weights: Sequence[Path] = ()) -> None:
        self.directory, self.of_other_weights = Path(directory), list(of_other_weights)
        self.index = read_teacher_index(self.directory)
        self.identity, self.num_views = self.index["identity"], self.index["num_views"]
        self.fingerprint = self.index["fingerprint"]
        self.weights_hash = self.identity["resolved"]["weights_hash"]
        self.grid = token_grid_of(self.identity)
        self._dtypes = {name: entry["dtype"] for name, entry in self.index["fields"].items()}
        self._shapes = {name: tuple(entry["view_shape"]) for name, entry in self.index["fields"].items()}
        self.widths = {name: shape[-1] for name, shape in self._shapes.items()}
        self.basis = None
        if self.index["basis_hash"] is not None:
            self.basis = load_basis(self.directory / BASIS_NAME, self.index["basis_hash"])
            self.widths["tokens"] = len(self.basis["mean"])
        rows = self.index["shards"]
        self._starts = np.array([row["global_start"] for row in rows], np.int64)
        self._rows = np.array([row["num_samples"] for row in rows], np.int64)
        self._files = {name: self._files_of(name, rows, verify) for name in self._shapes}
        self.bytes_per_view = sum(files.row_bytes for files in self._files.values())

    def _files_of(self, name: str, rows: list[dict], verify: str) -> _FieldFiles:
        row_bytes = int(np.prod(self._shapes[name])) * np.dtype(FIELD_DTYPES[self._dtypes[name]]).itemsize
        index = _FieldIndex(
            directory=self.directory,
            name=name,
            fingerprint=self.fingerprint,
            row_bytes=row_bytes,
            num_views=self.num_views,
            shard_names=[row["shard_path"] for row in rows],
            shard_starts=self._starts,
            shard_rows=self._rows * self.num_views,
            shard_bytes=np.array([row["bytes"] for row in rows], np.int64),
        )
        return _FieldFiles(index, verify=verify)

    @cached_property
    def statistics(self) -> dict[str, Tensor]:
        """pooled_mean, pooled_std, tokens_mean, tokens_std: float64 [D], over all images and views.

        Of the shards' records, which carry a hash: statistics.json is what they say, for people.

        Raises:
            MissingFileError: a shard is gone with its record. UserError: they are not of this teacher.
        """
        paths = [self.directory / row["shard_path"] for row in self.index["shards"]]
        records = []
        for path in paths:
            record = _record_of(path)
            if record["fingerprint"] != self.fingerprint:
                raise UserError(f"{path}: is not the shard that index.json lists. Run: {teacher_command()}")
            records.append({"sums": record["sums"]})  # most of a record are checksums
        found = statistics_of(records)
        facts = self.identity["resolved"]
        widths = {"pooled": facts["pooled_width"]}
        widths |= {} if facts["token_width"] is None else {"tokens": facts["token_width"]}
        names = [f"{name}_{what}" for name in widths for what in ("mean", "std")]
        state = {name: torch.tensor(found.get(name, []), dtype=torch.float64) for name in names}
        if wrong := [name for name, values in state.items() if len(values) != widths[name.partition("_")[0]]]:
            raise UserError(f"{self.directory}: {wrong[0]} is not of the teacher's width. Run: {teacher_command()}")
        return state

    def check_covers(self, starts: np.ndarray, rows: np.ndarray) -> None:
        """Raise UserError unless the images of these ranges have outputs: int64 [S] first rows, int64 [S] how many."""
        for start, count in zip(starts.tolist(), rows.tolist(), strict=True):
            found = self._rows_from(start, count)
            if found < count:
                raise UserError(
                    f"{self.directory}: no teacher outputs for the images from {start + found} on (the shard of "
                    f"{start}..{start + count - 1}): the image cache has grown, or the pass is not done. "
                    f"Run: {teacher_command()}"
                )

    def check_decoded(self, starts: np.ndarray, rows: np.ndarray, failed: np.ndarray) -> None:
        """Raise UserError where the teacher has not seen an image that can be decoded now: its outputs are zeros.

        starts, rows: as of check_covers; failed: int64 [S], how many images of each range could not be decoded.
        """
        now = {(start, count): bad for start, count, bad in zip(starts, rows, failed, strict=True)}
        for row in self.index["shards"]:
            before = row["num_failed"]
            if before > now.get((row["global_start"], row["num_samples"]), before):
                raise UserError(
                    f"{self.directory / row['shard_path']}: {before} images could not be decoded when the teacher "
                    "ran, and some of them can be now: the image shard was made again. "
                    f"Make the outputs again too: {teacher_command()}"
                )

    def _rows_from(self, start: int, count: int) -> int:
        """How many rows from `start` on, at most `count`, are there without a gap."""
        done = 0
        while done < count:
            shard = int(np.searchsorted(self._starts, start + done, side="right")) - 1
            left = 0 if shard < 0 else int(self._starts[shard] + self._rows[shard]) - start - done
            if left <= 0:
                break
            done = min(count, done + left)
        return done

    def read(self, global_idx: np.ndarray, view: np.ndarray, fields: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The teacher's outputs for these views: field -> float32, pooled [B, Dt], tokens [B, P, Dt], logits [B, C];
        arguments and errors as in read_stored.
        """
        return {name: self.decode(stored) for name, stored in self.read_stored(global_idx, view, fields).items()}

    def read_stored(
        self, global_idx: np.ndarray, view: np.ndarray, fields: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """The teacher's outputs for these views in their stored dtype, which is less to copy to a device.

        Args:
            global_idx: int64 [B], images whose rows are valid.
            view: int64 [B], from 0 to num_views - 1.
            fields: the fields to read; None: all.
        Returns:
            field -> stored dtype, pooled [B, Dt], tokens [B, P, Dt] or int8 [B, P, d], logits [B, C].
        Raises:
            UserError: an image has no outputs, or they are damaged. MissingFileError: a shard is gone. RunError: the
                system could not read it. All name the file.
        """
        shards = np.searchsorted(self._starts, global_idx, side="right") - 1
        local = global_idx - self._starts[shards]
        missing = (shards < 0) | (local >= self._rows[shards])
        if missing.any():
            self.check_covers(global_idx[missing][:1], np.ones(1, np.int64))
        if view.min(initial=0) < 0 or view.max(initial=0) >= self.num_views:
            raise UserError(f"{self.directory}: views {view.min()}..{view.max()} of {self.num_views} were asked for.")
        rows, found = local * self.num_views + view, {}
        for name in self._files if fields is None else fields:
            out = np.empty((len(rows), self._files[name].row_bytes), np.uint8)
            self._files[name].read(shards, rows, out)
            dtype = getattr(torch, self._dtypes[name])
            found[name] = torch.from_numpy(out).view(dtype).view(len(out), *self._shapes[name])
        return found

    def decode(self, stored: Tensor) -> Tensor:
        """A field of read_stored, on any device, as float32 [..., Dt]."""
        if stored.dtype != torch.int8:
            return stored.float()
        if self.basis["mean"].device != stored.device:
            self.basis = to_device(self.basis, stored.device)
        # autocast would multiply in bfloat16
        with torch.autocast(stored.device.type, enabled=False):
            return decode_tokens(stored, self.basis)


def load_basis(path: Path, expected_hash: str) -> dict[str, Tensor]:
    """The token basis beside the shards: mean [Dt], components [d, Dt], scale [d], float32.

    Raises:
        UserError: it is missing, or not the one the shards were made with.
    """
    try:
        with open_regular(path) as file:
            data = b"".join(map(bytes, read_blocks(file, _MAX_BASIS_BYTES)))
    except FileNotFoundError as error:
        raise MissingFileError(f"{path}: not there. Run: {teacher_command()}") from error
    if f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}" != expected_hash:
        raise UserError(f"{path}: is not the basis that the shards were made with. Run: {teacher_command()}")
    return torch.load(io.BytesIO(data), weights_only=True)


def to_device(basis: Mapping[str, Tensor] | None, device: torch.device) -> dict[str, Tensor] | None:
    """A basis on a device."""
    return None if basis is None else {name: value.to(device) for name, value in basis.items()}


def decode_tokens(stored: Tensor, basis: Mapping[str, Tensor]) -> Tensor:
    """int8 [B, P, d] in a basis -> float32 [B, P, Dt]."""
    return (stored.float() * (basis["scale"] / 127)) @ basis["components"] + basis["mean"]


def encode_tokens(tokens: Tensor, basis: Mapping[str, Tensor]) -> Tensor:
    """float32 [B, P, Dt] -> int8 [B, P, d]; what lies beyond the scale is clipped to it."""
    codes = (tokens - basis["mean"]) @ basis["components"].T * (127 / basis["scale"])
    return codes.round().clamp(-127, 127).to(torch.int8)
