"""The finished runs of benchmarks.learning on disk: a JSON file for each, so that any checkout and process goes on."""

import json
import re
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning_suites import Run, Suite, slug
from distillery.system.errors import UserError
from distillery.system.files import make_directory, write_atomic

ROOT = Path(__file__).resolve().parents[1]
# of an absolute path all but the last name; not in a URL
FOLDERS = re.compile(r"""(?<![\w./~])/(?!/)(?:[^\s/'"]+/)+""")


@dataclass(frozen=True)
class Setting:
    """What every run of a suite is given; results of different settings are never mixed.

    train, test: parquet files; teacher_repo: torch.hub folder; bank, test_images: labelled images of the evaluation.
    """

    train: str
    test: str
    teacher_repo: str
    teacher: str
    student: str
    image_size: int = 32
    batch_size: int = 64
    bank: int = 20_000
    test_images: int = 5_000
    knn_k: int = 20

    def facts(self) -> dict[str, Any]:
        """What is kept with each result: of files the name and size, as they may lie elsewhere the next time."""
        files = {key: Path(getattr(self, key)) for key in ("train", "test")}
        named = {key: f"{path.name}, {path.stat().st_size} bytes" for key, path in files.items()}
        return asdict(self) | named | {"teacher_repo": Path(self.teacher_repo).name}


class Results:
    """The kept runs of a suite: OUT/learning/SUITE/LABEL_SEED.json, and LABEL.left_out.json for what could not run.

    Nothing is held in memory: several processes may add to the same folder.
    """

    def __init__(self, out: Path, suite: str) -> None:
        self.out, self.folder = out, out / "learning" / suite

    def path(self, run: Run) -> Path:
        """Where a run's result is kept."""
        return self.folder / f"{run.name}.json"

    def runs(self) -> list[dict[str, Any]]:
        """All finished runs."""
        return [entry for entry in self._entries() if "left_out" not in entry]

    def runs_of_all_suites(self) -> list[dict[str, Any]]:
        """All finished runs beside this suite's too: what is known about speeds."""
        return [run for path in sorted(self.folder.parent.glob("*/")) for run in Results(self.out, path.name).runs()]

    def left_out(self) -> dict[str, str]:
        """Label -> reason."""
        return {entry["label"]: entry["left_out"] for entry in self._entries() if "left_out" in entry}

    def find(self, run: Run) -> dict[str, Any] | None:
        """A run's result, None where it is not there yet."""
        path = self.path(run)
        return json.loads(path.read_text()) if path.exists() else None

    def add(self, run: Run, result: dict[str, Any]) -> None:
        """Keep a finished run."""
        self._write(self.path(run), result)
        self._reason_path(run).unlink(missing_ok=True)

    def leave_out(self, run: Run, reason: str) -> None:
        """Keep the reason why runs of this label are not there, without the folders of this machine."""
        self._write(self._reason_path(run), {"label": run.label, "left_out": FOLDERS.sub("", reason)})

    def _reason_path(self, run: Run) -> Path:
        return self.folder / f"{slug(run.label)}.left_out.json"

    def _entries(self) -> list[dict[str, Any]]:
        # a dot in front: a writer's temporary file
        paths = sorted(path for path in self.folder.glob("*.json") if not path.name.startswith("."))
        return [json.loads(path.read_text()) for path in paths]

    @staticmethod
    def _write(path: Path, content: dict[str, Any]) -> None:
        make_directory(path.parent)
        write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")


def runs_of(suite: Suite, out: Path) -> list[dict[str, Any]]:
    """All finished runs of a suite's table, those that another suite keeps too."""
    runs = Results(out, suite.name).runs()
    for label, (other, its_label, seed) in suite.borrowed.items():
        kept = Results(out, other).runs()
        runs += [run | {"label": label} for run in kept if (run["label"], run["seed"]) == (its_label, seed)]
    return runs


def check_setting(suite: Suite, out: Path, facts: dict[str, Any]) -> None:
    """UserError where a run of a suite's table has another setting: figures of both would stand side by side.

    The names of files and folders do not count, their sizes do.
    """
    wanted = _deciding(facts)
    for result in runs_of(suite, out):
        had = _deciding(result["setting"])
        if differing := [key for key, value in wanted.items() if had.get(key) != value]:
            raise UserError(
                f"the table of {suite.name} has a run ({result['label']}, seed {result['seed']}) of another "
                f"{', '.join(differing)}. Choose another --out, or move {out / 'learning' / result['suite']} away."
            )


def _deciding(facts: dict[str, Any]) -> dict[str, Any]:
    sizes = {key: facts[key].rpartition(", ")[2] for key in ("train", "test")}
    return {key: value for key, value in (facts | sizes).items() if key != "teacher_repo"}


def expected_seconds(
    run: Run, kept: Iterable[dict[str, Any]], machine: dict[str, Any], student: str, *, prepares: bool = False
) -> float | None:
    """How long a run will take, by the seconds an image of kept runs of this student on such a machine.

    Runs of the same label count, where there are none those of the same contender. None: nothing is known.
    prepares: the run makes the teacher's outputs first, and kept runs say how long that takes.
    """
    same = [
        result
        for result in kept
        if (result["contender"], result["student"], result["machine"]) == (run.contender, student, machine)
        and (result["views"] is None) == (run.views is None)
        and result["images_seen"]
    ]
    alike = [result for result in same if result["label"] == run.label] or same
    if not alike:
        return None
    seconds = run.images_seen * statistics.median(result["wall_seconds"] / result["images_seen"] for result in alike)
    noted = [result["prepare_seconds"] / (result["images"] * result["views"]) for result in same if result["views"]]
    return seconds + run.images * run.views * statistics.median(noted) if prepares else seconds


def revision() -> str:
    """The commit of this checkout, and "-dirty" where code or recipe differ from it."""
    commit = _git("describe", "--always", "--abbrev=12").stdout.strip()
    differs = _git("diff", "--quiet", "HEAD", "--", "*.py", "*.yaml").returncode
    return f"{commit}{'-dirty' * bool(differs)}" if commit else "unknown"


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
