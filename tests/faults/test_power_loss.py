"""Power loss: whatever the file system kept of what was not synced, nothing published is lost or torn.

Stage 1's changes of the disk are recorded. For every prefix of them the states that a file system may show after a
crash are built: data written since the file's last fsync is there, or missing, or zeros, or cut off in the middle;
of the entries of a folder that changed since its last fsync, any set is there (of many: none, all, one, all but one).

Source: Pillai et al., All File Systems Are Not Created Equal (ALICE), OSDI 2014.
"""

import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from scale import scaled
from stage1 import folder_bytes, run_stage1, small_plan
from syscalls import watched

DATA_VARIANTS = ("kept", "lost", "zeroed", "cut")


@dataclass
class Inode:
    """A file's content: what is durable, and the changes since: (offset, bytes) or (new size, None)."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def content(self, variant: str) -> bytes:
        """What a crash leaves of it."""
        changes = {"lost": [], "cut": self.pending[: len(self.pending) // 2]}.get(variant, self.pending)
        data = bytearray(self.durable)
        for offset, written in changes:
            if written is None:
                del data[offset:]
                data.extend(bytes(offset - len(data)))
            else:
                data.extend(bytes(max(0, offset + len(written) - len(data))))
                data[offset : offset + len(written)] = bytes(len(written)) if variant == "zeroed" else written
        return bytes(data)


class Disk:
    """A model of a file system of one folder: replays recorded changes and shows what a crash may leave."""

    def __init__(self, before: dict[str, bytes]) -> None:
        self.inodes = [Inode(data) for data in before.values()]
        self.durable = {name: number for number, name in enumerate(before)}
        # what a reader sees now, and the changes of entries since the folder's last fsync
        self.entries = dict(self.durable)
        self.pending: list[dict[str, int | None]] = []
        self.published: set[str] = set()
        self.folder_is_durable = bool(before)

    def apply(self, change: tuple) -> None:
        match change:
            case ("create", name):
                self.inodes.append(Inode())
                self._enter({name: len(self.inodes) - 1})
            case ("write", name, offset, data):
                self.inodes[self.entries[name]].pending.append((offset, data))
            case ("truncate", name, size):
                self.inodes[self.entries[name]].pending.append((size, None))
            case ("fsync", name):
                inode = self.inodes[self.entries[name]]
                inode.durable, inode.pending = inode.content("kept"), []
            case ("link", source, target):
                self._enter({target: self.entries[source]})
            case ("rename", source, target):
                self._enter({target: self.entries[source], source: None})
            case ("unlink", name):
                self._enter({name: None})
            case ("fsync folder",):
                self.durable, self.pending = dict(self.entries), []
                # a record stands for a published shard
                self.published |= {n for n in self.durable if n.endswith(".json") and not n.startswith(".")}
            case ("fsync parent",):
                self.folder_is_durable = True
            case ("mkdir",) | ("fsync elsewhere",):
                pass

    def _enter(self, effect: dict[str, int | None]) -> None:
        self.pending.append(effect)
        self.entries = _with(self.entries, [effect])

    def crash_states(self) -> Iterator[dict[str, bytes] | None]:
        """Every folder a crash may leave now; None: no folder."""
        if not self.folder_is_durable:
            yield None
        last = len(self.pending)
        sizes = range(last + 1) if last <= 6 else (0, 1, last - 1, last)
        kept = [chosen for size in sizes for chosen in itertools.combinations(range(last), size)]
        for chosen, variant in itertools.product(kept, DATA_VARIANTS):
            entries = _with(self.durable, [self.pending[k] for k in chosen])
            yield {name: self.inodes[number].content(variant) for name, number in entries.items()}


def _with(entries: dict[str, int], effects: list[dict[str, int | None]]) -> dict[str, int]:
    entries = dict(entries)
    for effect in effects:
        for name, number in effect.items():
            if number is None:
                entries.pop(name, None)
            else:
                entries[name] = number
    return entries


def record(folder: Path, work) -> list[tuple]:
    """The changes `work` makes in a folder, in the order in which they were made."""
    changes: list[tuple] = []
    lock = threading.Lock()

    def name_of(fd: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), folder)

    def around(_n, call_name, call, *args):
        # a file that was renamed or unlinked meanwhile has no name to record it under: ask before the call
        before = None
        if call_name in ("write", "pwrite", "ftruncate", "fsync"):
            before = name_of(args[0])
            offset = os.lseek(args[0], 0, os.SEEK_CUR) if call_name == "write" else None
        result = call(*args)
        change = None
        match call_name:
            case "open":
                change = ("create", Path(args[0]).name)
            case "write":
                change = ("write", before, offset, bytes(args[1][:result]))
            case "pwrite":
                change = ("write", before, args[2], bytes(memoryview(args[1])[:result]))
            case "ftruncate":
                change = ("truncate", before, args[1])
            case "fsync":
                folders = {".": ("fsync folder",), "..": ("fsync parent",), "../..": ("fsync elsewhere",)}
                change = folders.get(before, ("fsync", before))
            case "link":
                change = ("link", Path(args[0]).name, Path(args[1]).name)
            case "rename" | "replace":
                change = ("rename", Path(args[0]).name, Path(args[1]).name)
            case "unlink":
                change = ("unlink", Path(args[0]).name)
            case "mkdir":
                change = ("mkdir",)
        with lock:
            changes.append(change)
        return result

    with watched(around):
        work()
    return changes


def rebuild(folder: Path, state: dict[str, bytes] | None) -> None:
    """Put a crash state on the disk; records last, so that stage 1 trusts the shards as far as it ever would."""
    shutil.rmtree(folder, ignore_errors=True)
    if state is None:
        return
    folder.mkdir()
    for name, data in sorted(state.items(), key=lambda item: item[0].endswith(".json")):
        (folder / name).write_bytes(data)


def check_all_crashes(folder: Path, plan, source, changes, before, reference, tally) -> int:
    """Build every state of every prefix, check what stands there, run stage 1 again; returns how many were built."""
    seen = set()
    disk = Disk(before)
    for change in [("mkdir",), *changes]:
        disk.apply(change)
        for state in disk.crash_states():
            key = None if state is None else frozenset(state.items())
            must_have = frozenset(disk.published)
            if (key, must_have) in seen:
                continue
            seen.add((key, must_have))
            for name in must_have:
                assert state is not None, f"the folder is lost after {name} was published"
                assert name in state, f"{name} is lost after {change}"
                if name.startswith("images_"):
                    shard = name.replace(".json", ".pt")
                    assert state.get(shard) is not None, f"{shard} is lost after {change}"
            for name, data in (state or {}).items():
                if name == "index.json":
                    json.loads(data)
                elif name.startswith("images_"):
                    assert data in (reference[name], before.get(name)), f"{name} is torn after {change}"
            rebuild(plan.directory, state)
            run_stage1(plan, source)
            assert folder_bytes(plan.directory) == reference, f"after {change}"
            tally["crash states after power loss, each resumed to the same bytes"] += 1
    return len(seen)


@pytest.mark.parametrize("what", ["new", "growing"])
def test_power_loss_at_any_moment_loses_and_tears_nothing_published(folder, source, reference, tally, what):
    plan = small_plan(folder / "cache", source)
    for _ in range(scaled(2)):  # two threads take turns differently each time
        shutil.rmtree(plan.directory, ignore_errors=True)
        before = {}
        if what == "growing":
            run_stage1(small_plan(folder / "cache", source, max_samples=12), source)
            before = folder_bytes(folder / "cache")
        changes = record(folder / "cache", lambda: run_stage1(plan, source))
        assert folder_bytes(plan.directory) == reference
        assert check_all_crashes(folder, plan, source, changes, before, reference, tally) > 30


def test_the_model_notices_a_missing_fsync(folder, source, reference, tally, monkeypatch):
    """Guards the checker: with any one kind of fsync left out, it must object."""
    for forgotten in ("file", "folder"):
        plan = small_plan(folder / "cache", source)
        shutil.rmtree(plan.directory, ignore_errors=True)
        changes = record(folder / "cache", lambda plan=plan: run_stage1(plan, source))
        kept = [c for c in changes if c[0] != ("fsync" if forgotten == "file" else "fsync folder")]
        if forgotten == "folder":
            # the program still believes what it did: a record is published once it has been renamed
            monkeypatch.setattr(Disk, "_enter", _enter_and_believe)
        with pytest.raises(AssertionError, match="torn|lost"):
            check_all_crashes(folder, plan, source, kept, {}, reference, tally)


def _enter_and_believe(self, effect) -> None:
    self.pending.append(effect)
    self.entries = _with(self.entries, [effect])
    self.published |= {n for n in effect if n.startswith("images_") and n.endswith(".json")}
