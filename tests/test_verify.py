import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan, wait_for_the_clock

from distillery.cache.store import FutureFormatError
from distillery.cache.verify import find_problems, verify_cache
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import create_temporary
from distillery.verify import repair_command, report_verification, verify_folder

ROOT = Path(__file__).resolve().parents[1]
SOURCE = SmallSource()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cache"
    run_stage1(small_plan(folder, SOURCE), SOURCE)
    return folder


@pytest.fixture
def cache(made, tmp_path):
    """A copy in which every record is newer than its shard, as the writer leaves them."""
    folder = shutil.copytree(made, tmp_path / "cache")
    hide_every_change(folder)
    wait_for_the_clock(folder)
    return folder


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def hide_every_change(folder: Path) -> None:
    """As after media rot: the files' times say nothing, every record is newer than its shard."""
    for record in folder.glob("images_*.json"):
        record.write_bytes(record.read_bytes())


def test_a_whole_cache_has_no_problem_and_nothing_is_written(cache):
    before = {path: (path.stat().st_ctime_ns, path.read_bytes()) for path in cache.iterdir()}
    read = []
    assert verify_cache(cache, read.append) == []
    assert sum(read) == sum(path.stat().st_size for path in cache.glob("*.pt"))
    assert {path: (path.stat().st_ctime_ns, path.read_bytes()) for path in cache.iterdir()} == before


DAMAGES = {
    "header": lambda c: flip(c / "images_shard_00001.pt", 60),
    "row": lambda c: flip(c / "images_shard_00001.pt", 128 + 768),
    "tail": lambda c: flip(c / "images_shard_00001.pt", -40),
    "truncated": lambda c: os.truncate(c / "images_shard_00001.pt", 4000),
    "emptied": lambda c: os.truncate(c / "images_shard_00001.pt", 0),
    "longer": lambda c: os.truncate(c / "images_shard_00001.pt", 20_000),
    "gone": lambda c: (c / "images_shard_00001.pt").unlink(),
    "link": lambda c: (shutil.move(c / "images_shard_00001.pt", c.parent / "x"),
                       (c / "images_shard_00001.pt").symlink_to(c.parent / "x")),
    "pipe": lambda c: ((c / "images_shard_00001.pt").unlink(), os.mkfifo(c / "images_shard_00001.pt")),
    "swapped": lambda c: (shutil.move(c / "images_shard_00001.pt", c / "x"),
                          shutil.move(c / "images_shard_00000.pt", c / "images_shard_00001.pt"),
                          shutil.move(c / "x", c / "images_shard_00000.pt")),
    "record gone": lambda c: (c / "images_shard_00001.json").unlink(),
    "record flipped": lambda c: flip(c / "images_shard_00001.json", 300),
    "record of another": lambda c: shutil.copy(c / "images_shard_00000.json", c / "images_shard_00001.json"),
    "index gone": lambda c: (c / "index.json").unlink(),
    "index flipped": lambda c: flip(c / "index.json", 700),
    "index emptied": lambda c: (c / "index.json").write_bytes(b""),
    "index respelt": lambda c: (c / "index.json").write_text(json.dumps(json.loads((c / "index.json").read_text()))),
    "failures gone": lambda c: (c / "failures.jsonl").unlink(),
    "failures flipped": lambda c: flip(c / "failures.jsonl", 5),
    "leftover": lambda c: (c / ".images_shard_00000.pt.tmp-0123456789ab").write_bytes(b"x"),
}  # fmt: skip
NOT_FOR_STAGE_1 = {"link", "pipe"}


def test_a_file_that_is_being_written_is_not_taken_for_a_leftover(cache):
    temporary = cache / ".images_shard_00000.pt.tmp-0123456789ab"
    fd = create_temporary(temporary)
    assert verify_cache(cache) == [f"{temporary}: a process is writing it; verify again when that has ended"]
    os.close(fd)
    assert verify_cache(cache) == [f"{temporary}: left by a killed run; stage 1 removes it"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_kind_of_damage_is_found_and_repaired_by_stage_1(cache, made, damage):
    DAMAGES[damage](cache)
    name = "failures" if "failures" in damage else "index" if "index" in damage else "images_shard_0000"
    assert name in "\n".join(verify_cache(cache))
    plan = small_plan(cache, SOURCE)
    if damage in NOT_FOR_STAGE_1:
        with pytest.raises(UserError, match="images_shard_00001.pt is a symbolic link, a pipe or a folder"):
            run_stage1(plan, SOURCE)
        (cache / "images_shard_00001.pt").unlink()
    run_stage1(plan, SOURCE)
    assert folder_bytes(cache) == folder_bytes(made)
    assert verify_cache(cache) == []


@pytest.mark.parametrize("damage", ["header", "row", "tail"])
def test_rot_that_left_no_trace_in_the_files_times_is_repaired_by_the_command_that_verify_prints(
    cache, made, damage, capsys
):
    DAMAGES[damage](cache)
    hide_every_change(cache)
    plan = small_plan(cache, SOURCE)
    report, survey = run_stage1(plan, SOURCE)
    assert survey.done == [0, 1, 2]  # stage 1 alone cannot know: it would have to read everything each time
    stage1 = shlex.join([sys.executable, str(ROOT / "tests/support/stage1.py"), str(cache)])
    assert report_verification(cache, stage1) == 1
    command = capsys.readouterr().out.splitlines()[-1].split("exactly what is bad): ")[1]
    assert command.startswith("rm -f -- ")
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
    assert folder_bytes(cache) == folder_bytes(made)
    assert report_verification(cache, stage1) == 0


def test_a_shard_of_another_cache_is_found_wherever_it_lies(cache, tmp_path):
    other = tmp_path / "other"
    source = SmallSource(30)
    run_stage1(small_plan(other, source), source)
    for name in ("images_shard_00001.pt", "images_shard_00003.pt"):
        shutil.copy(other / name, cache / name)
    problems = find_problems(cache)
    text = "\n".join(problem.text for problem in problems)
    assert "images_shard_00001.pt: differs from its record in fingerprint" in text
    assert "images_shard_00003.json: missing" in text
    assert "images_shard_00003.pt: not listed in index.json" in text
    command = repair_command(problems, "stage1")
    assert command == f"rm -f -- {cache}/images_shard_00001.pt {cache}/images_shard_00003.pt && stage1"


def test_a_shard_of_another_cache_is_found_without_index_and_record(cache, tmp_path):
    other = SmallSource(30)
    run_stage1(small_plan(tmp_path / "other", other), other)
    expected = folder_bytes(cache)
    shutil.copy(tmp_path / "other" / "images_shard_00001.pt", cache)
    (cache / "index.json").unlink()
    (cache / "images_shard_00001.json").unlink()
    with pytest.raises(UserError, match="made with another configuration"):
        run_stage1(small_plan(cache, SOURCE), SOURCE)
    removed = [problem.remove for problem in find_problems(cache) if problem.remove]
    assert removed == [cache / "images_shard_00001.pt"]
    removed[0].unlink()
    run_stage1(small_plan(cache, SOURCE), SOURCE)
    assert folder_bytes(cache) == expected


def test_without_an_index_two_caches_of_as_many_shards_are_told_and_none_is_named_for_removal(cache, tmp_path):
    other = SmallSource(30)
    run_stage1(small_plan(tmp_path / "other", other), other)
    shutil.copy(tmp_path / "other" / "images_shard_00001.pt", cache)
    for name in ("index.json", "images_shard_00001.json", "images_shard_00002.json", "images_shard_00002.pt"):
        (cache / name).unlink()
    assert not any(problem.remove for problem in find_problems(cache))
    assert sum("keep those of one of them" in problem.text for problem in find_problems(cache)) == 2


def test_a_foreign_file_is_told_and_never_named_for_removal(cache):
    (cache / "notes.txt").write_text("mine")
    problems = find_problems(cache)
    assert [problem.text for problem in problems] == [f"{cache}/notes.txt: not part of a cache; move it elsewhere"]
    assert repair_command(problems, "stage1") == "stage1"


def test_a_later_version_is_refused_not_called_damage(cache):
    index = json.loads((cache / "index.json").read_text())
    (cache / "index.json").write_text(json.dumps(index | {"format_version": 4}))
    with pytest.raises(FutureFormatError, match="later version"):
        verify_cache(cache)


def test_no_cache_is_said(tmp_path):
    with pytest.raises(MissingFileError, match="Index file not found"):
        verify_cache(tmp_path)


@pytest.mark.parametrize("index", ["lost", "damaged"])
def test_a_lost_shard_is_named_without_an_index_too(cache, made, index):
    (cache / "images_shard_00001.pt").unlink()
    (cache / "index.json").unlink() if index == "lost" else (cache / "index.json").write_text("{")
    assert f"{cache / 'images_shard_00001.pt'}: missing" in verify_cache(cache)
    run_stage1(small_plan(cache, SOURCE), SOURCE)
    assert folder_bytes(cache) == folder_bytes(made)


def test_an_evaluation_cache_of_which_records_alone_are_left_is_no_good_one(cache, capsys):
    below = cache / "eval" / "small" / "test"
    run_stage1(small_plan(below, SOURCE), SOURCE)
    for path in [*below.glob("*.pt"), below / "index.json"]:
        path.unlink()
    assert report_verification(cache, "stage1") == 1
    said = capsys.readouterr().out
    assert all(f"BAD  {below}/images_shard_0000{i}.pt: missing" in said for i in range(3))


def test_evaluation_caches_below_are_verified_too(cache, capsys):
    below = cache / "eval" / "small" / "test"
    run_stage1(small_plan(below, SOURCE), SOURCE)
    assert report_verification(cache, "stage1") == 0
    assert capsys.readouterr().out.startswith(f"OK   {cache}: 6 shards")
    (below / "index.json").unlink()  # it is found by its shards then
    flip(below / "images_shard_00002.pt", 500)
    assert report_verification(cache, "stage1") == 1
    said = capsys.readouterr().out
    assert f"BAD  {below}/images_shard_00002.pt: damaged: 1 rows of images differ" in said
    assert f"BAD  {below}/index.json: missing" in said
    assert f"rm -f -- {below}/images_shard_00002.pt && stage1" in said


COMMANDS = {"verify": ["distillery.verify"], "cache": ["distillery.cache", "verify"]}


@pytest.fixture(params=COMMANDS)
def command(request, monkeypatch, capsys):
    """Both commands, as modules are run: (exit status, standard output, standard error)."""
    module, *words = COMMANDS[request.param]

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module, *words, *map(str, arguments)])
        monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("damage, status", [(None, 0), ("row", 1), ("index emptied", 1)])
def test_the_command_writes_nothing_and_its_exit_status_says_how_it_went(cache, damage, status, command):
    if damage:
        DAMAGES[damage](cache)
    before = folder_bytes(cache)
    found, said, _ = command(cache)
    assert found == status
    assert said.startswith("BAD " if status else "OK ")
    assert folder_bytes(cache) == before


def test_the_command_verifies_a_folder_of_an_evaluation_set_alone(cache, command):
    below = cache / "eval" / "small" / "test"
    run_stage1(small_plan(below, SOURCE), SOURCE)
    assert command(below)[0] == 0
    flip(below / "images_shard_00002.pt", 500)
    assert command(below)[0] == 1


def test_a_cache_that_lost_all_but_its_evaluation_set_is_damaged(cache, command):
    run_stage1(small_plan(cache / "eval" / "small" / "test", SOURCE), SOURCE)
    for path in [path for path in cache.iterdir() if path.is_file()]:
        path.unlink()
    status, said, _ = command(cache)
    assert status == 1
    assert f"BAD  {cache}/index.json: missing, and every shard with it\n" in said


@pytest.mark.parametrize("left", ["shards", "damaged index"])
def test_shards_without_records_are_a_damaged_cache_not_none(cache, left, command):
    for path in cache.glob("*.json*"):
        path.unlink()
    if left == "damaged index":
        (cache / "index.json").write_text("{")
    status, said, errors = command(cache)
    assert (status, errors) == (1, "")
    assert "images_shard_00001.json: missing" in said


def test_where_there_is_no_cache_one_line_says_what_to_type(cache, tmp_path, command):
    empty = tmp_path / "empty"
    for folder in (empty / "teacher" / "abc", cache / "teacher" / "abc", cache / "eval" / "small"):
        folder.mkdir(parents=True)
    near = f"no cache, but part of one. Run: python -m distillery.verify {cache}"
    for folder, message in {
        tmp_path / "nowhere": "nowhere: no such folder. Give the cache_dir of your data_config.yaml.",
        cache / "index.json": "index.json: a file, not a folder. Give the cache_dir",
        empty: "Index file not found: .*json. Run: python precompute_cache.py --data_config YOUR_DATA_CONFIG.yaml",
        cache / "teacher": near,
        cache / "teacher" / "abc": near,
        cache / "eval" / "small": near,
    }.items():
        status, said, errors = command(folder)
        assert (status, said) == (2, "")
        assert re.fullmatch(f"error: .*{message}.*\n", errors), errors


def test_wrong_usage_is_status_2_and_help_is_an_answer(command, tmp_path):
    assert command()[0] == command(tmp_path, tmp_path)[0] == command("--no_such_flag")[0] == 2
    status, said, _ = command("--help")
    assert status == 0
    assert "DIR" in said


def test_the_package_itself_names_its_commands():
    for flags, status in (["--help"], 0), ([], 2):
        done = subprocess.run(
            [sys.executable, "-m", "distillery", *flags], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status
        assert "python -m distillery.verify DIR" in done.stdout + done.stderr


def test_every_module_that_a_document_or_a_message_tells_to_run_does_something():
    patterns = ("*.md", "docs/*.md", "configs/*.md", "distillery/**/*.py")
    texts = [path.read_text() for pattern in patterns for path in ROOT.glob(pattern)]
    names = {name for text in texts for name in re.findall(r"python\s+-m distillery\.(\w+(?:\.\w+)*)", text)}
    assert {"cache", "evaluate", "export", "report", "verify"} <= names
    for name in names:
        command = ROOT / "distillery" / name.replace(".", "/") / "__main__.py"
        command = command if command.exists() else command.parent.with_suffix(".py")
        assert 'if __name__ == "__main__":' in command.read_text(), name


@pytest.mark.parametrize("name", [".", "checkpoints"])
def test_a_run_folder_is_told_apart_from_a_cache(tmp_path, name):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(MissingFileError, match="a run folder. This command is for caches"):
        verify_folder(tmp_path / name)


@pytest.mark.parametrize("verify", [verify_folder, report_verification])
@pytest.mark.parametrize("name, what", [("none", "no such folder"), ("file", "a file, not a folder")])
def test_where_there_is_no_folder_a_message_says_so(tmp_path, verify, name, what):
    (tmp_path / "file").touch()
    with pytest.raises(MissingFileError, match=f"{name}: {what}. Give the cache_dir"):
        verify(tmp_path / name)
