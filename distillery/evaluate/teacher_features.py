"""A teacher's features of evaluation sets, kept: it runs once, and a run on stored outputs has no teacher at hand."""

from pathlib import Path

import safetensors
import safetensors.torch

from distillery.evaluate.by_class import identity_of
from distillery.evaluate.classification import TeacherFeatures
from distillery.evaluate.linear import Probe
from distillery.evaluate.sets import EvalSet
from distillery.system.files import make_directory, write_atomic

FEATURES_DIR = "teacher_features"
# earlier files hold some test rows alone: they are made again
_LAYOUT = "2"
_PROBE_PARTS = ("weight", "bias", "mean", "std", "classes")


class TeacherStore:
    """Keeps the features of one teacher, of any number of evaluation sets.

    Args:
        run_dir: the run folder that has them as teacher_features/NAME.safetensors; None: they stay in memory.
        teacher: its hash, as of training.bindings.teacher_hash; features of another teacher are made again.
    """

    def __init__(self, run_dir: Path | None, teacher: str = "") -> None:
        self._run_dir, self._teacher, self._held = run_dir, teacher, {}

    def keep(self, of: EvalSet, features: TeacherFeatures) -> None:
        """Keep the features of a set, in place of what was kept of it."""
        if self._run_dir is None:
            self._held[of.name] = features
            return
        tensors = {"train": features.train_x.contiguous(), "test": features.test_x.contiguous()}
        if features.probe is not None:
            tensors |= {f"probe_{part}": getattr(features.probe, part).contiguous() for part in _PROBE_PARTS}
        path = self._path(of)
        make_directory(path.parent)
        write_atomic(path, safetensors.torch.save(tensors, self._identity(of)))

    def has(self, of: EvalSet) -> bool:
        """Whether this teacher's features of these images are kept, and whole."""
        if self._run_dir is None:
            return of.name in self._held
        try:
            with safetensors.safe_open(self._path(of), "pt") as file:
                return file.metadata() == self._identity(of)
        except (OSError, safetensors.SafetensorError):  # not there, or damaged: they can be made again
            return False

    def load(self, of: EvalSet) -> TeacherFeatures:
        """What `has` says is kept."""
        if self._run_dir is None:
            return self._held[of.name]
        with safetensors.safe_open(self._path(of), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        has_probe = f"probe_{_PROBE_PARTS[0]}" in tensors
        probe = Probe(**{part: tensors[f"probe_{part}"] for part in _PROBE_PARTS}) if has_probe else None
        return TeacherFeatures(tensors["train"], tensors["test"], probe)

    def _path(self, of: EvalSet) -> Path:
        return self._run_dir / FEATURES_DIR / f"{of.name}.safetensors"

    def _identity(self, of: EvalSet) -> dict[str, str]:
        images = {"train": identity_of(of.train), "test": identity_of(of.test)}
        return {"layout": _LAYOUT, "teacher": self._teacher, **images}
