"""A folder of embeddings: parquet files of a fixed number of rows each, made one by one.

    embeddings_00000.parquet ...    global_idx, embedding, label; what it was made of stands in the file's metadata
    failures.jsonl                  {"global_idx", "reason"} of each image left out; absent where there is none
    embeddings.json                 model, space, width, number of rows, whether all are there

The last two are made from the first. An interrupted pass goes on with the files that are missing, and ends with the
same bytes. Each file appears whole, under a name of its own until then.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distillery.cache.images import INDEX_NAME
from distillery.cache.plan import differences
from distillery.cache.store import parse_json
from distillery.precompute.loop import remove_leftovers
from distillery.reading.every_image import EveryImage, Part
from distillery.system.errors import UserError
from distillery.system.files import canonical_json, holds, make_directory, read_regular, sha256_of, write_atomic

SUMMARY_NAME, FAILURES_NAME = "embeddings.json", "failures.jsonl"
FORMAT_VERSION = 1
_PATTERN = re.compile(r"embeddings_\d{5,}\.parquet")
# of the metadata of a parquet file
_KEY = b"distillery"
_SHOWN_DIFFERENCES = 3


def file_name(number: int) -> str:
    """embeddings_00007.parquet for 7."""
    return f"embeddings_{number:05d}.parquet"


class EmbeddingFolder:
    """The embeddings of one model over one data set, as far as they are made.

    to_make: the parts whose files are missing, in order. num_rows: embeddings in the files. failures: of the files,
    {"global_idx", "reason"} in order. notes: lines for the user.

    Args:
        directory: made if need be; nothing is written before `open`.
        model: plain values that decide the embeddings of an image: weights, space, precision and so on.
        width: channels of an embedding.
        images: the data set.
    """

    def __init__(self, directory: Path, model: dict[str, Any], width: int, images: EveryImage) -> None:
        self.directory, self.images, self.width = directory, images, width
        identity = {"format_version": FORMAT_VERSION, "width": width, "model": model, "data": images.identity}
        self.identity = json.loads(json.dumps(identity))
        self.num_rows, self.failures, self.notes = 0, [], []
        made = self._survey()
        self.to_make = [part for part in images.parts if part.number not in made]
        columns = [("global_idx", pa.int64()), ("embedding", pa.list_(pa.float32(), width))]
        self._schema = pa.schema([*columns, *([("label", pa.int64())] if images.has_labels else [])])

    @property
    def is_complete(self) -> bool:
        """Whether every row that there shall be is there."""
        return not self.to_make and self.images.is_whole

    def open(self) -> None:
        """Make the folder, remove what a killed writer left, and write down what it is for.

        Raises:
            UserError: it cannot be written to.
        """
        try:
            make_directory(self.directory)
            remove_leftovers(self.directory, all_done=self.is_complete)
            self._write_failures()
            self._write_summary()
        except PermissionError as error:
            raise UserError(f"{self.directory} cannot be written to ({error.strerror}). Give another --out.") from error

    def write(self, part: Part, global_idx: np.ndarray, embeddings: np.ndarray) -> None:
        """Publish the file of a part.

        Args:
            part: one of to_make.
            global_idx: int64 [n], ascending.
            embeddings: float32 [n, width].
        """
        failures = self.images.failures(part)
        facts = {"first": part.first, "stop": part.stop, "rows": len(global_idx), "failures": failures}
        text = canonical_json({"identity": self.identity} | facts)
        values = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), self.width)
        columns = [pa.array(global_idx), values]
        if self.images.has_labels:
            columns.append(pa.array(self.images.labels(part, global_idx)))
        table = pa.Table.from_arrays(columns, schema=self._schema.with_metadata({_KEY: text}))
        buffer = pa.BufferOutputStream()
        # floats of embeddings neither repeat nor shrink
        pq.write_table(table, buffer, compression="none", use_dictionary=False, write_page_checksum=True)
        write_atomic(self.directory / file_name(part.number), buffer.getvalue().to_pybytes())
        self._count(facts)
        self.to_make.remove(part)
        if failures:
            self._write_failures()
        self._write_summary()

    def _count(self, facts: dict) -> None:
        self.num_rows += facts["rows"]
        if facts["failures"]:
            self.failures = sorted(self.failures + facts["failures"], key=lambda entry: entry["global_idx"])

    def _write_failures(self) -> None:
        self._write(FAILURES_NAME, b"".join(canonical_json(entry) + b"\n" for entry in self.failures))

    def _write_summary(self) -> None:
        content = {
            "complete": self.is_complete,
            "rows": self.num_rows,
            "failed": len(self.failures),
            "files": len(self.images.parts) - len(self.to_make),
            "fingerprint": sha256_of(self.identity),
            "data_fingerprint": self.images.fingerprint,
        }
        self._write(SUMMARY_NAME, json.dumps(content | self.identity, indent=1).encode() + b"\n")

    def _write(self, name: str, text: bytes) -> None:
        """Write a file that is made from the others; nothing to write: no such file."""
        path = self.directory / name
        if not text:
            path.unlink(missing_ok=True)
        elif not holds(path, text):
            write_atomic(path, text)

    def _survey(self) -> set[int]:
        """The numbers of the files that are made; counts what they hold.

        Raises:
            UserError: the folder is another's, or holds rows that are not wanted.
        """
        if not self.directory.exists():
            return set()
        if not self.directory.is_dir():
            raise UserError(f"--out {self.directory}: a file, not a folder. Give another --out.")
        summary = self.directory / SUMMARY_NAME
        if summary.exists():
            self._check_identity(summary, parse_json(summary, read_regular(summary)))
        wanted = {part.number: part for part in self.images.parts}
        names = [path for path in sorted(self.directory.iterdir()) if _PATTERN.fullmatch(path.name)]
        foreign = [name for name in (FAILURES_NAME, INDEX_NAME) if (self.directory / name).exists()]
        if foreign and not names and not summary.exists():
            raise UserError(f"--out {self.directory} holds something else ({', '.join(foreign)}). Give another --out.")
        numbers = {path: int(path.stem.rpartition("_")[2]) for path in names}
        return {number for path, number in numbers.items() if self._is_made(path, wanted.get(number))}

    def _is_made(self, path: Path, part: Part | None) -> bool:
        """Whether a file holds what it should; if so, it is counted."""
        try:
            metadata = pq.read_schema(path).metadata or {}
        except (pa.ArrowException, OSError) as error:
            self.notes.append(f"{path}: cannot be read ({type(error).__name__}); it is made again")
            return False
        if _KEY not in metadata:
            raise UserError(f"{path} is not of this program: give another --out, or move it away.")
        facts = parse_json(path, metadata[_KEY])
        self._check_identity(path, facts["identity"])
        if part is None or facts["first"] != part.first or facts["stop"] > part.stop:
            raise UserError(
                f"{path} holds images {facts['first']} to {facts['stop'] - 1}, which this data configuration leaves "
                "out (max_samples, max_shards). Give another --out, or take the limit away."
            )
        if facts["stop"] < part.stop:
            self.notes.append(f"{path}: the data have {part.stop - facts['stop']} images more by now; it is made again")
            return False
        self._count(facts)
        return True

    def _check_identity(self, path: Path, found: dict) -> None:
        found = {key: found.get(key) for key in self.identity}
        changed = [f"{key} is {a!r} there, {b!r} now" for key, a, b in differences(found, self.identity)]
        if changed:
            more = len(changed) - _SHOWN_DIFFERENCES
            text = "; ".join(changed[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
            raise UserError(f"{path} was made of something else: {text}. Give another --out.")
