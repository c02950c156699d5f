"""Find the wanted model in a checkpoint file that holds several: student and teacher, plain and averaged weights.

A file is a tree of dictionaries. One state dict may hold several models, each behind a prefix: {"teacher":
{"backbone.blocks.0...": ...}}. An entry is the path to one model, the keys and prefixes joined by dots:
"teacher.backbone".
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import expand_path

# what checkpoints of other tools, DistributedDataParallel and torch.compile put around a model's own names
WRAPPERS = {"model", "module", "_orig_mod", "backbone"}
_AVERAGED = {"ema", "swa", "averaged", "average", "avg"}
# copies that follow another model, and parts of a self-supervised method: not what their authors evaluate
_FOLLOWERS = {"target", "momentum", "k", "key", "decoder", "predictor"}
_DEPTH = 4
WEIGHTS_NAME = "model.safetensors"  # in an exported folder, and in a repository of the Hugging Face hub
_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Entry:
    """One model in a file: its name, its tensors, and which share 0..1 of the model's tensors is among them."""

    name: str
    state: dict[str, Tensor]
    left_out: tuple[str, ...] = ()  # of the same state dict

    @cached_property
    def words(self) -> set[str]:
        """The words of its name."""
        return set(re.split(r"[._]", self.name.lower()))

    def rank(self, role: str | None) -> tuple[int, int]:
        """What is taken for a role, lowest first: the role's own name, else averaged weights, else the plain ones.

        Without a role the one that a method is evaluated with: DINO's teacher, MoCo's base encoder, BYOL's online one.
        """
        own, other = ("student", "teacher") if role == "student" else ("teacher", "student")
        is_averaged = bool(self.words & _AVERAGED) and other not in self.words
        kinds = (own in self.words, is_averaged, not self.words & ({other} | _FOLLOWERS), other in self.words)
        return next((number for number, holds in enumerate(kinds) if holds), len(kinds)), 0 if is_averaged else 1


def split_entry(path: str | Path) -> tuple[Path, str | None]:
    """file.pth#teacher as a path, variables expanded, and the entry in it; a file of the whole name comes first.

    A folder, as an export writes it, stands for the weights in it.

    Raises:
        MissingFileError: a folder without weights of that name.
    """
    whole = expand_path(path)
    if "#" not in whole.name or whole.exists():
        return _weights_at(whole), None
    name, _, entry = whole.name.partition("#")
    return _weights_at(whole.with_name(name)), entry or None


def _weights_at(path: Path) -> Path:
    if not path.is_dir():
        return path
    if (path / WEIGHTS_NAME).is_file():
        return path / WEIGHTS_NAME
    held = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(held[:6]) + (f" and {len(held) - 6} more" if len(held) > 6 else "")
    raise MissingFileError(
        f"the folder {path} has no {WEIGHTS_NAME}; it holds {shown or 'nothing'}. Name a weights file, or a folder "
        "that python -m distillery.export wrote in a format other than onnx"
    )


def choose_entry(
    content: Any, own: Mapping[str, Tensor], ignored: tuple[str, ...], path: Path, entry: str | None, role: str | None
) -> tuple[Entry, list[Entry]]:
    """The entry of a file's content that is loaded, and the others that would fit as well.

    Args:
        content: of the file.
        own: state dict of the model.
        ignored: beginnings of names that need not be there, of a classifier.
        path: the file, for messages.
        entry: its name as the user wrote it; a part of the name is enough.
        role: "teacher" or "student".
    Raises:
        UserError: no entry has that name, or several entries match equally well.
    """
    dicts = dict(_state_dicts(content))
    fitting = _fitting(dicts, own, ignored) or _wrapped(dicts)
    found = [one for one in fitting if entry is None or f".{entry}." in f".{one.name}."]
    if not found:
        named = ", ".join(sorted({one.name for one in fitting if one.name})) or "none"
        raise UserError(f"{path} has no entry {entry!r} with weights of this model; entries: {named}")
    best = min(one.rank(role) for one in found)
    chosen = [one for one in found if one.rank(role) == best]
    if any(not _is_equal(one.state, chosen[0].state) for one in chosen[1:]):
        raise UserError(
            f"{path} holds several models that fit: {', '.join(one.name or '(the top)' for one in found)}. Name one: "
            f"{role or 'teacher'}_checkpoint: {path}#{chosen[0].name or chosen[1].name}"
        )
    return chosen[0], [one for one in fitting if one not in chosen]


def _state_dicts(content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, tensors) of each dictionary with tensors in it; those of an optimiser are none."""
    if not isinstance(content, Mapping):
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield name, tensors
    for key, value in content.items():
        if isinstance(key, str) and "optim" not in key and depth < _DEPTH:
            yield from _state_dicts(value, f"{name}.{key}" if name else key, depth + 1)


def _fitting(
    dicts: Mapping[str, dict[str, Tensor]], own: Mapping[str, Tensor], ignored: tuple[str, ...]
) -> list[Entry]:
    """The entries with most of the model's names, and of these, where shapes tell them apart, those of its shapes."""
    core = {key for key in own if not key.startswith(ignored) and not key.endswith("num_batches_tracked")}
    shares: dict[tuple[str, str], float] = {}
    for name, tensors in dicts.items():
        counts = Counter(prefix for key in tensors for prefix, rest in _splits(key) if rest in core)
        shares |= {(name, prefix): count / len(core) for prefix, count in counts.items()}
    enough = max(_LEAST_SHARE, 0.95 * max(shares.values(), default=0.0))
    places = [place for place, share in shares.items() if share >= enough]
    entries = []
    for name, prefix in places:
        inner = tuple(other for of, other in places if of == name and other != prefix and other.startswith(prefix))
        mine = {k.removeprefix(prefix): v for k, v in dicts[name].items() if _is_below(k, prefix, inner)}
        named = tuple(other for of, other in places if of == name)  # "" begins every name: nothing is left over then
        entries.append(
            Entry(f"{name}.{prefix}".strip("."), mine, tuple(k for k in dicts[name] if not k.startswith(named)))
        )
    shaped = [one for one in entries if _share_of_shapes(one.state, own, core) > 0.8]
    return shaped or entries


def _splits(key: str) -> Iterator[tuple[str, str]]:
    yield "", key
    for match in re.finditer(r"\.", key):
        yield key[: match.end()], key[match.end() :]


def _is_below(key: str, prefix: str, inner: tuple[str, ...]) -> bool:
    return key.startswith(prefix) and not (inner and key.startswith(inner))


def _share_of_shapes(state: Mapping[str, Tensor], own: Mapping[str, Tensor], core: Iterable[str]) -> float:
    common = [key for key in core if key in state]
    return sum(state[key].shape == own[key].shape for key in common) / max(1, len(common))


def _wrapped(dicts: Mapping[str, dict[str, Tensor]]) -> list[Entry]:
    """Entries by their names alone, for weights whose names the model's own filter still has to change.

    Those of the largest dictionary's size; a state dict all of whose names begin with wrappers or roles is split there.
    """
    entries = []
    for name, tensors in dicts.items():
        for prefix in {_wrapper_of(key) for key in tensors}:
            mine = {key.removeprefix(prefix): value for key, value in tensors.items() if _wrapper_of(key) == prefix}
            rest = tuple(key for key in tensors if _wrapper_of(key) != prefix)
            entries.append(Entry(f"{name}.{prefix}".strip("."), mine, rest))
    most = max((len(one.state) for one in entries), default=0)
    return [one for one in entries if len(one.state) > _LEAST_SHARE * most] or [Entry("", {})]


def _wrapper_of(key: str) -> str:
    """The wrappers and roles that a name begins with, with their dots."""
    parts = key.split(".")
    for number, part in enumerate(parts):
        words = set(part.lower().split("_"))
        if part not in WRAPPERS and not words & ({"student", "teacher", "online"} | _AVERAGED | _FOLLOWERS):
            return "".join(f"{one}." for one in parts[:number])
    return ""


def _is_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a)
