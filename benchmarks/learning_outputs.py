"""The outputs of the teacher that runs of benchmarks.learning share, and how many seconds it took to make them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillery.system.errors import UserError
from distillery.system.files import write_atomic
from distillery.teacher_cache.records import made_at, read_teacher_index, teacher_folders


@dataclass(frozen=True)
class TeacherOutputs:
    """Outputs of the teacher, and the note of the seconds that making them took.

    Both go by what decides the outputs, as the trainer compares it: runs of other loss weights may share them.

    cache_dir: of the images; identity: wanted_outputs of the trainer; path: of the note.
    """

    cache_dir: Path
    identity: dict[str, Any]
    path: Path

    def folder(self) -> Path | None:
        """Where they are, or a first part of them; None: nowhere."""
        fitting = [
            folder
            for folder in teacher_folders(self.cache_dir)
            if made_at(folder) and self.identity.items() <= read_teacher_index(folder)["identity"].items()
        ]
        return max(fitting, key=made_at, default=None)

    def note(self) -> dict[str, Any]:
        """seconds of work on what is there now, is_done, threads, and began (Unix, s) of a pass in progress.

        A pass that was killed counts up to the last file that it wrote.

        Raises:
            UserError: there are outputs, and nobody knows how long they took.
        """
        folder = self.folder()
        if folder is None:
            return {"seconds": 0.0, "is_done": False, "threads": None, "began": None}
        if not self.path.exists():
            raise UserError(
                f"{folder} holds outputs of the teacher, and no note says how many seconds they took. Remove that "
                "folder, so that the benchmark makes and times them, or choose another --dir."
            )
        note = json.loads(self.path.read_text())
        if note["began"] is not None:
            last_written = max(path.stat().st_mtime for path in folder.rglob("[!.]*"))  # a dot: not published
            note |= {"seconds": note["seconds"] + max(0.0, last_written - note["began"]), "began": None}
        return note

    def is_done(self) -> bool:
        """Whether they are there and timed; a pass may be in progress beside this."""
        return self.folder() is not None and self.path.exists() and json.loads(self.path.read_text())["is_done"]

    def write(self, note: dict[str, Any]) -> None:
        """Keep the note."""
        write_atomic(self.path, json.dumps(note).encode())
