"""Stored outputs of a teacher from files on this machine: what happens when those files are not the same any more.

Stage 1 and the trainer run in forks of this process; the pass is made once.
"""

import errno
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from teachers import MODEL
from workplace import Workplace

import precompute_cache
from distillery.config.load import load_configs
from distillery.evaluate.candidates import load_candidates
from distillery.reading.datasets import CachedTensorDataset
from distillery.system.errors import MissingFileError, UserError, remember_invocation, run_command
from distillery.teacher_cache import local_files, opening
from distillery.teacher_cache.local_files import (
    changed_files,
    local_sources,
    remember_files,
    remembered_files,
    scan_teacher_files,
)
from distillery.teacher_cache.opening import open_teacher_cache
from distillery.teacher_cache.problems import find_teacher_problems
from distillery.teacher_cache.reader import TeacherCache
from distillery.teacher_cache.records import FILES_NAME
from distillery.training.bindings import check_same_teacher

NET = """
from torch import nn
class Net(nn.Module):
    num_features = 8
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
    def forward_features(self, x):
        return self.stem(x).relu()
    def forward(self, x):
        return self.forward_features(x).mean((2, 3))
"""
# its module is read by path: a name in sys.modules would outlive the folder
HUBCONF = """
import pathlib, torch
FOLDER = pathlib.Path(__file__).parent
def tiny(pretrained=False, weights=FOLDER / "weights" / "tiny.pt"):
    space = {"__name__": "net"}
    exec((FOLDER / "net.py").read_text(), space)
    model = space["Net"]()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model
"""


def save_weights(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    space = {"__name__": "net"}
    exec(NET, space)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.save(space["Net"]().state_dict(), path)


def make_hub(folder: Path, seed: int = 1) -> Path:
    save_weights(folder / "weights" / "tiny.pt", seed)
    (folder / "net.py").write_text(NET)
    (folder / "hubconf.py").write_text(HUBCONF)
    (folder / "README.md").write_text("tiny")
    return folder


class Place:
    """A workplace with a teacher in hub/, its outputs made, and the two ways into them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"

    @property
    def outputs(self) -> Path:
        (folder,) = (self.cache / "teacher").iterdir()
        return folder

    def overrides(self, **settings) -> list[str]:
        settings = {
            "cache_dir": self.cache, "checkpoint_dir": self.folder / "run", "teacher_repo": self.folder / "hub",
            "eval_datasets": "{}", "teacher_cache.views": 2, "teacher_cache.enabled": True,
        } | settings  # fmt: skip
        return [f"{key}={value}" for key, value in settings.items()]

    def open(self, *, is_plan: bool = False, fingerprint: str | None = None, **settings):
        """As the trainer does."""
        files = [self.folder / f"{name}.yaml" for name in ("data", "train", "model")]
        configs = load_configs(*files, self.overrides(**settings))
        dataset = CachedTensorDataset(self.cache)
        loader = SimpleNamespace(shard_names=[], fingerprint=dataset.index.fingerprint, dataset=dataset)
        remember_invocation({})
        return open_teacher_cache(configs, loader, torch.device("cpu"), fingerprint=fingerprint, is_plan=is_plan)

    def run_pass(self, *flags: str, **settings) -> int:
        names = [f"--{name}_config={self.folder}/{name}.yaml" for name in ("data", "train", "model")]
        sets = [part for text in self.overrides(**settings) for part in ("--set", text)]
        before, sys.argv = sys.argv, ["precompute_cache.py", "--teacher", *names, *sets, *flags]
        try:
            with pytest.raises(SystemExit) as end:
                run_command(precompute_cache.main)
        finally:
            sys.argv = before
        return end.value.code


@pytest.fixture(scope="module")
def made(tmp_path_factory, png_images) -> Path:
    folder = tmp_path_factory.mktemp("files")
    Workplace(folder, png_images)
    shutil.rmtree(folder / "hub")
    make_hub(folder / "hub")
    assert Place(folder).run_pass() == 0
    return folder


@pytest.fixture
def place(made, tmp_path) -> Place:
    """A copy, to be changed; its own hub folder is the one that the copy's outputs remember, after one hash."""
    shutil.copytree(made, tmp_path / "place")
    return Place(tmp_path / "place")


@pytest.fixture
def built(monkeypatch) -> list:
    """One entry each time the teacher is built to be compared."""
    calls, build_teacher = [], opening.build_teacher_backbone

    def counted(*arguments, **options):
        calls.append(1)
        return build_teacher(*arguments, **options)

    monkeypatch.setattr(opening, "build_teacher_backbone", counted)
    return calls


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the files that are hashed."""
    calls, file_hash = [], local_files.file_hash
    monkeypatch.setattr(local_files, "file_hash", lambda path: calls.append(path.name) or file_hash(path))
    return calls


def test_a_copied_folder_is_hashed_once_and_then_neither_hashed_nor_built(place, built, hashed):
    place.open()
    assert sorted(hashed) == ["hubconf.py", "net.py", "tiny.pt"]
    hashed.clear()
    shutil.move(place.folder / "hub", place.folder / "moved")
    os.utime(place.folder / "moved" / "README.md", (0, 0))
    place.open(teacher_repo=place.folder / "moved")
    assert (built, hashed) == ([], [])


def test_other_weights_behind_the_same_hubconf_are_refused_with_both_hashes_and_the_command(place, built):
    make_hub(place.folder / "other", seed=2)
    before = (place.outputs / FILES_NAME).read_bytes()
    for mode in ("cached", "hybrid"):
        with pytest.raises(UserError) as error:
            place.open(teacher_repo=place.folder / "other", **{"teacher_cache.mode": mode})
        cache = place.open(is_plan=True)
        assert f"resolved.weights_hash: the cache has '{cache.weights_hash}', now it would be '" in str(error.value)
        assert "precompute_cache.py --teacher" in str(error.value)
    assert len(built) == 2
    assert (place.outputs / FILES_NAME).read_bytes() == before


def test_weights_replaced_in_place_with_size_and_time_kept_are_noticed(place):
    place.open()
    weights = place.folder / "hub" / "weights" / "tiny.pt"
    status = weights.stat()
    save_weights(place.folder / "other.pt", 2)
    data = (place.folder / "other.pt").read_bytes().replace(b"other/", b"tiny/")
    weights.write_bytes((data + b"\0" * status.st_size)[: status.st_size])
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError):
        place.open()


def test_files_that_change_no_weights_are_compared_once_and_then_remembered(place, built, hashed, capsys):
    place.open()
    (place.folder / "hub" / "student\udcff.py").write_text("width = 3")  # a name that is no UTF-8
    with (place.folder / "hub" / "hubconf.py").open("a") as file:
        file.write("\ndef student(): ...\n")
    place.open(is_plan=True)
    assert "2 are new, gone or changed" in capsys.readouterr().out
    assert len(built) == 1  # a plan writes nothing
    place.open()
    assert len(built) == 2
    assert "the same weights (" in capsys.readouterr().out
    hashed.clear()
    place.open()
    assert (len(built), hashed) == (2, [])
    assert capsys.readouterr().out == ""


def test_the_pass_goes_on_in_the_folder_of_the_same_weights_and_outputs_whatever_hubconf_says_besides(place):
    before, name = (place.outputs / "index.json").read_bytes(), place.outputs.name
    shutil.move(place.folder / "hub", place.folder / "moved")
    with (place.folder / "moved" / "hubconf.py").open("a") as file:
        file.write("\ndef student(): ...\n")
    assert place.run_pass(teacher_repo=place.folder / "moved") == 0
    assert (place.outputs.name, (place.outputs / "index.json").read_bytes()) == (name, before)


@pytest.mark.parametrize("change", [".abs()", ".relu() * 2"])
def test_other_code_of_the_same_weights_is_refused_by_what_it_gives_and_gets_a_folder_of_its_own(place, capsys, change):
    net, first = place.folder / "hub" / "net.py", place.outputs
    before = {path: path.read_bytes() for path in first.iterdir()}
    net.write_text(NET.replace(".relu()", ".clamp(min=0)"))
    place.open()
    net.write_text(NET.replace(".relu()", change))
    with pytest.raises(UserError, match="gives other outputs now: teacher_shard.* Put the files back, or make"):
        place.open()
    for job in "01":
        assert place.run_pass("--num_jobs", "2", "--job_id", job) == 0
    assert f"{first}: other code of the same weights gave these outputs" in capsys.readouterr().out
    assert place.run_pass() == 0
    assert len(list((place.cache / "teacher").iterdir())) == 2
    other = place.open()
    assert other.directory != first and other.index["complete"]
    assert {path: path.read_bytes() for path in first.iterdir() if path.name != FILES_NAME} == {
        path: data for path, data in before.items() if path.name != FILES_NAME
    }
    assert place.run_pass("--verify", "8") == 0
    with pytest.raises(UserError, match="started on other teacher outputs"):
        state = {"teacher_hash": other.weights_hash, "teacher_cache": TeacherCache(first).fingerprint}
        check_same_teacher(place.folder, state, other.weights_hash, other)
    net.write_text(NET)
    assert place.open().directory == first
    assert place.run_pass("--verify", "8") == 0
    assert not [text for folder in (first, other.directory) for text in find_teacher_problems(folder)]


def test_a_shard_taken_away_is_not_made_again_by_other_code_beside_those_that_stay(place):
    (place.folder / "hub" / "net.py").write_text(NET.replace(".relu()", ".abs()"))
    (place.outputs / "teacher_shard_00001.pt").unlink()
    first = place.outputs
    assert place.run_pass() == 0
    assert not (first / "teacher_shard_00001.pt").exists()


def test_other_code_in_hubconf_gets_a_folder_of_its_own(place):
    net = (place.folder / "hub" / "net.py").read_text().replace(".relu()", ".abs()")
    (place.folder / "hub" / "net.py").write_text(net)
    with (place.folder / "hub" / "hubconf.py").open("a") as file:
        file.write("\n# abs\n")
    first = place.outputs
    assert place.run_pass() == 0
    assert len(list((place.cache / "teacher").iterdir())) == 2
    assert place.open().directory != first


def test_of_folders_of_two_teachers_each_run_gets_its_own_without_building_one(place, built):
    first = place.outputs
    make_hub(place.folder / "other", seed=2)
    assert place.run_pass(teacher_repo=place.folder / "other") == 0
    place.open()
    built.clear()
    other = place.open(teacher_repo=place.folder / "other")
    assert place.open().directory == first != other.directory
    assert (built, other.of_other_weights) == ([], [])


def test_outputs_from_before_are_compared_once_and_keep_their_folder(place, built):
    (place.outputs / FILES_NAME).unlink()
    name = place.outputs.name
    for _ in range(2):
        assert place.open().directory.name == name
    assert built == [1]


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b'{"format_version": 3, "files": 1}'])
def test_a_damaged_list_of_files_is_found_by_verify_and_costs_one_comparison(place, built, damage):
    assert list(find_teacher_problems(place.outputs)) == []
    (place.outputs / FILES_NAME).write_bytes(damage)
    ((text, remove),) = find_teacher_problems(place.outputs)
    assert "damaged" in text and remove == place.outputs / FILES_NAME
    place.open()
    assert built == [1]
    assert list(find_teacher_problems(place.outputs)) == []


def test_a_folder_that_can_only_be_read_is_used_and_one_line_says_what_could_not_be_written(
    place, built, monkeypatch, capsys
):
    (place.outputs / FILES_NAME).unlink()

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(local_files, "write_atomic", refuse)
    place.open()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if FILES_NAME in line]
    assert line.endswith("not written (Read-only file system): the next start compares the teacher again")
    place.open()
    assert built == [1, 1]


def test_a_process_killed_while_remembering_leaves_nothing_that_the_next_does_not_remove(place):
    left = place.outputs / f".{FILES_NAME}.tmp-0123456789ab"
    left.write_bytes(b"{")
    (place.outputs / FILES_NAME).unlink()
    place.open()
    assert not left.exists()
    assert list(find_teacher_problems(place.outputs)) == []


def test_a_run_that_goes_on_with_another_teacher_is_refused(place):
    make_hub(place.folder / "other", seed=2)
    with pytest.raises(UserError, match="resolved.weights_hash"):
        place.open(teacher_repo=place.folder / "other", fingerprint=place.open().fingerprint)


def test_outputs_that_are_damaged_are_still_repaired_by_the_pass(place, capsys):
    (place.outputs / FILES_NAME).unlink()
    shard = place.outputs / "teacher_shard_00000.pt"
    data = bytearray(shard.read_bytes())
    data[200:400] = bytes(200)
    shard.write_bytes(data)
    assert place.run_pass() == 0
    assert "repaired" in capsys.readouterr().out
    place.open()


def test_weights_that_teacher_kwargs_name_count_by_their_bytes_wherever_they_are(place):
    kwargs = {"teacher_kwargs": f"{{weights: {place.folder / 'a.pt'}}}"}
    save_weights(place.folder / "a.pt", 5)
    shutil.rmtree(place.cache / "teacher")
    assert place.run_pass(**kwargs) == 0
    shutil.copy(place.folder / "a.pt", place.folder / "b.pt")
    assert place.open(teacher_kwargs=f"{{weights: {place.folder / 'b.pt'}}}").directory == place.outputs
    save_weights(place.folder / "a.pt", 6)
    with pytest.raises(UserError, match="resolved.weights_hash"):
        place.open(**kwargs)


def test_a_timm_folder_counts_by_its_files_and_may_be_moved(place, built):
    import timm
    from timm.models._hub import save_for_hf

    def folder_of(name: str, seed: int) -> dict:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = timm.create_model("test_resnet", num_classes=0)
        save_for_hf(model, place.folder / name, model_config={"num_classes": 0})
        return named(name)

    def named(name: str) -> dict:
        return {"teacher_source": "timm", "teacher_repo": "null", "teacher_name": f"local-dir:{place.folder / name}"}

    first = folder_of("first", 1)
    shutil.rmtree(place.cache / "teacher")
    assert place.run_pass(**first) == 0
    built.clear()
    shutil.move(place.folder / "first", place.folder / "moved")
    assert place.open(**named("moved")).directory == place.outputs
    assert built == []
    with pytest.raises(UserError, match="resolved.weights_hash"):
        place.open(**folder_of("second", 2))
    with pytest.raises(MissingFileError, match="teacher_name: local-dir:.*first is no folder"):
        place.open(**first)


def test_evaluation_against_a_teacher_of_other_weights_is_refused(place, tmp_path):
    files = [place.folder / f"{name}.yaml" for name in ("data", "train", "model")]
    configs = load_configs(*files, place.overrides())
    state = dict.fromkeys(("config", "heads", "optimizer", "progress", "student"), {}) | {"teacher_hash": "0" * 32}
    torch.save(state, tmp_path / "step.pt")
    with pytest.raises(UserError, match="trained towards a teacher of other weights .0{32}. than there are now"):
        load_candidates(configs, [tmp_path / "step.pt"], torch.device("cpu"))


# ---- which files -------------------------------------------------------------------------------------------


def names_of(folder: Path, *leave_out: Path) -> set[str]:
    return set(scan_teacher_files({"repo": folder}, leave_out).paths)


def test_links_are_followed_and_what_no_teacher_is_made_of_is_left_out(tmp_path):
    hub = make_hub(tmp_path / "hub")
    (tmp_path / "blob").write_bytes(b"1")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "deep.bin").write_bytes(b"2")
    (hub / "linked.bin").symlink_to(tmp_path / "blob")
    (hub / "far").symlink_to(tmp_path / "far")
    (hub / "far" / "loop").symlink_to(hub)
    (hub / "gone").symlink_to(tmp_path / "nowhere")
    (hub / "circle").symlink_to(hub / "circle")
    os.mkfifo(hub / "pipe")
    (hub / "readme.pt").write_bytes(b"weights")
    for name in (".git/objects/a", "__pycache__/net.pyc", "runs/a/step.pt", ".hidden", "README_dev.rst"):
        (hub / name).parent.mkdir(parents=True, exist_ok=True)
        (hub / name).write_bytes(b"3")
    names = {"hubconf.py", "net.py", "weights/tiny.pt", "linked.bin", "far/deep.bin", "pipe", "readme.pt"}
    names |= {"gone", "circle"}
    assert names_of(hub, hub / "runs") == {f"repo/{name}" for name in names}
    before = scan_teacher_files({"repo": hub}, [hub / "runs"]).entries({})
    assert before["repo/gone"] == before["repo/pipe"] == [None]
    (tmp_path / "blob").write_bytes(b"4")
    (hub / "gone").unlink()
    now = scan_teacher_files({"repo": hub}, [hub / "runs"]).entries(before)
    assert changed_files(now, before) == ["repo/gone", "repo/linked.bin"]


def test_a_huge_folder_is_known_by_its_times_and_one_of_too_many_files_is_compared_every_time(
    place, built, hashed, monkeypatch
):
    monkeypatch.setattr(local_files, "MAX_HASHED_BYTES", 10)
    (place.outputs / FILES_NAME).unlink()
    place.open()
    place.open()
    assert (built, hashed) == ([1], [])
    (place.folder / "hub" / "net.py").touch()
    place.open()
    assert built == [1, 1]
    monkeypatch.setattr(local_files, "MAX_FILES", 2)
    for _ in range(2):
        place.open()
    assert built == [1] * 4


def test_what_is_remembered_for_another_folder_counts_for_nothing(tmp_path):
    entries = {"repo/a": [1, 2, 3, 4, "xxh3_128:" + "0" * 32]}
    assert remember_files(tmp_path, "one", entries) is None
    assert remembered_files(tmp_path, "one") == entries
    assert remembered_files(tmp_path, "two") == {}


def test_only_what_is_on_this_machine_is_a_local_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_hub(tmp_path / "hub")
    (tmp_path / "resnet50").mkdir()
    (tmp_path / "w.pt").write_bytes(b"1")
    kwargs = {
        "arch": "resnet50",
        "size": 3,
        "files": ["w.pt", "nowhere.pt"],
        "own": "weights/tiny.pt",
        "long": "x" * 5000,
    }
    model = MODEL | {"teacher_repo": "hub", "teacher_kwargs": kwargs}
    assert local_sources(model) == {
        "teacher_repo": Path("hub"), "teacher_kwargs.files.0": Path("w.pt"),
        "teacher_kwargs.own": Path("hub/weights/tiny.pt"),
    }  # fmt: skip
    assert local_sources(MODEL) == {}
    assert local_sources(MODEL | {"teacher_source": "timm", "teacher_name": "test_vit"}) == {}


def precision_of(folder: Path) -> str:
    return TeacherCache(folder).identity["resolved"]["precision"]


def run_pass_on_gpu(place: Place, monkeypatch, **settings) -> int:
    """The pass where auto is bf16, as on a GPU; the arithmetic is the CPU's."""
    with monkeypatch.context() as patch:
        patch.setattr(opening, "choose_teacher_precision", lambda train, device: "bf16")
        return place.run_pass(**settings)


def test_with_auto_a_node_of_another_precision_extends_and_reads_the_folder_in_its_recorded_one(place, monkeypatch):
    shutil.rmtree(place.cache / "teacher")
    assert run_pass_on_gpu(place, monkeypatch) == 0
    whole = {path.name: path.read_bytes() for path in place.outputs.glob("teacher_shard_*.pt")}
    assert precision_of(place.outputs) == "bf16" and len(whole) > 1
    for path in list(place.outputs.glob(f"{sorted(whole)[-1][:-3]}*")):
        path.unlink()
    assert place.run_pass() == 0
    assert precision_of(place.outputs) == "bf16"
    assert {path.name: path.read_bytes() for path in place.outputs.glob("teacher_shard_*.pt")} == whole
    assert place.open().directory == place.outputs


def test_outputs_of_a_cpu_are_extended_in_float32_where_auto_would_be_bf16(place, monkeypatch):
    made = place.outputs
    assert run_pass_on_gpu(place, monkeypatch) == 0
    assert place.outputs == made and precision_of(made) == "fp32"


def test_of_several_precisions_the_pass_extends_the_outputs_that_training_would_read(place, monkeypatch):
    first = place.outputs
    shutil.move(place.cache / "teacher", place.folder / "set_aside")
    assert run_pass_on_gpu(place, monkeypatch) == 0
    shutil.move(place.folder / "set_aside" / first.name, place.cache / "teacher")
    (read,) = {place.open().directory}
    folders = set((place.cache / "teacher").iterdir())
    assert len(folders) == 2
    for path in list(read.glob("teacher_shard_00000*")):
        path.unlink()
    before = {path.name for path in (folders - {read}).pop().iterdir()}
    assert place.run_pass() == 0
    assert (read / "teacher_shard_00000.pt").exists()
    assert {path.name for path in (folders - {read}).pop().iterdir()} == before
    assert set((place.cache / "teacher").iterdir()) == folders


def test_an_explicit_teacher_precision_has_outputs_of_its_own_whatever_the_students_precision(place):
    made = place.outputs
    with pytest.raises(UserError, match="teacher.precision: the cache has 'auto', now it would be 'bf16'"):
        place.open(teacher_precision="bf16")
    assert place.run_pass(teacher_precision="bf16") == 0
    (other,) = set(made.parent.iterdir()) - {made}
    assert precision_of(other) == "bf16"
    assert place.open(teacher_precision="bf16", precision="fp32").directory == other
    assert place.open().directory == made


def test_weights_kept_in_a_low_type_are_known_by_the_hash_of_float32(place):
    fp32 = TeacherCache(place.outputs).weights_hash
    made = place.outputs
    assert place.run_pass(teacher_precision="bf16") == 0
    (other,) = set(made.parent.iterdir()) - {made}
    assert TeacherCache(other).weights_hash == fp32
