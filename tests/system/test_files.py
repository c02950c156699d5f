import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

import pytest

from distillery.system import files
from distillery.system.console import format_bytes
from distillery.system.direct_io import ALIGNMENT_BYTES, bypass_page_cache, drop_written, reserve
from distillery.system.errors import UserError
from distillery.system.files import (
    canonical_json,
    create_temporary,
    expand_path,
    fsync_dir,
    is_locked,
    make_directory,
    publish_no_clobber,
    pwrite_all,
    sha256_of,
    temporary_name,
    write_all,
    write_atomic,
)
from distillery.system.machine import file_system_of, free_bytes, is_network_file_system


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_write_atomic_leaves_the_new_bytes_and_nothing_else(tmp_path):
    write_atomic(tmp_path / "a", b"old")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == {"a"}


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_write_atomic_that_fails_leaves_the_old_bytes_and_no_temporary_file(tmp_path, monkeypatch, call):
    write_atomic(tmp_path / "a", b"old")

    def fail(*_args):
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="quota"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == {"a"}


def test_write_atomic_survives_another_process_taking_its_temporary_file_for_a_leftover(tmp_path, monkeypatch):
    replace, stolen = os.replace, []

    def steal_twice(source, target):
        if len(stolen) < 2:
            stolen.append(source)
            os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", steal_twice)
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert len(stolen) == 2


def test_write_atomic_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_atomic(tmp_path / "nowhere" / "a", b"x")


def test_short_writes_are_completed(tmp_path, monkeypatch):
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    write_all(fd, b"0123456789")
    pwrite_all(fd, b"abcdefgh", 1)
    os.close(fd)
    assert (tmp_path / "a").read_bytes() == b"0abcdefgh9"


def test_a_file_written_past_the_page_cache_takes_pages_then_and_any_bytes_afterwards(tmp_path):
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    if not bypass_page_cache(fd, True):
        pytest.skip(f"{file_system_of(tmp_path)} has no O_DIRECT")
    pages = mmap.mmap(-1, 2 * ALIGNMENT_BYTES)
    pages[:] = bytes(range(256)) * (2 * ALIGNMENT_BYTES // 256)
    pwrite_all(fd, pages, 0)
    assert not bypass_page_cache(fd, False)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
    write_all(fd, b"the rest")
    os.close(fd)
    assert (tmp_path / "a").read_bytes() == pages[:] + b"the rest"


def test_what_cannot_bypass_the_page_cache_is_written_as_ever():
    read_end, write_end = os.pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "O_DIRECT")
        assert not bypass_page_cache(write_end, True)
    fd = os.open("/proc/self/comm", os.O_RDONLY)
    assert not bypass_page_cache(fd, True)
    for each in (read_end, write_end, fd):
        os.close(each)


def test_reserved_room_and_dropped_copies_change_neither_size_nor_content(tmp_path):
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    reserve(fd, 1 << 20)
    assert os.fstat(fd).st_size == 0
    os.pwrite(fd, b"x" * 100_000, 0)
    for _ in range(2):
        drop_written(fd, 50_000)
        os.fsync(fd)
    drop_written(fd, -5)
    assert os.pread(fd, 200_000, 0) == b"x" * 100_000
    os.close(fd)


def test_reserving_more_than_the_disk_has_is_no_error(tmp_path):
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    reserve(fd, 1 << 60)
    os.pwrite(fd, b"x", 0)
    os.close(fd)
    assert (tmp_path / "a").read_bytes() == b"x"


def test_publishing_gives_the_name_once_and_never_takes_it_from_another_file(tmp_path):
    final, first, second = (tmp_path / name for name in ("final", ".1", ".2"))
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    assert publish_no_clobber(first, final)
    assert not publish_no_clobber(second, final)
    assert final.read_bytes() == b"first"
    assert names(tmp_path) == {"final", ".2"}


def test_publishing_again_after_the_link_was_made_but_not_acknowledged_succeeds(tmp_path):
    final, temporary = tmp_path / "final", tmp_path / ".t"
    temporary.write_bytes(b"x")
    os.link(temporary, final)  # what an NFS server did before its answer was lost
    assert publish_no_clobber(temporary, final)
    assert names(tmp_path) == {"final"}


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_publishing_works_without_hard_links_and_does_not_clobber_there_either(tmp_path, monkeypatch, number):
    def no_links(*_args):
        raise OSError(number, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    final, first, second = (tmp_path / name for name in ("final", ".1", ".2"))
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    assert publish_no_clobber(first, final)
    assert not publish_no_clobber(second, final)
    assert final.read_bytes() == b"first"


def test_publishing_onto_a_symbolic_link_does_not_follow_it(tmp_path):
    temporary = tmp_path / ".t"
    temporary.write_bytes(b"x")
    (tmp_path / "final").symlink_to(tmp_path / "elsewhere")
    assert not publish_no_clobber(temporary, tmp_path / "final")
    assert not (tmp_path / "elsewhere").exists()


def test_files_get_the_permissions_the_umask_leaves(tmp_path):
    previous = os.umask(0o007)
    try:
        write_atomic(tmp_path / "a", b"x")
        make_directory(tmp_path / "b" / "c")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o660
    assert stat.S_IMODE((tmp_path / "b" / "c").stat().st_mode) == 0o770


def test_make_directory_syncs_every_folder_it_adds_an_entry_to(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "fsync_dir", synced.append)
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert {tmp_path, tmp_path / "a"} <= set(synced)


def test_a_folder_that_cannot_be_synced_by_its_file_system_is_tolerated_but_not_an_io_error(tmp_path, monkeypatch):
    def refuse(number):
        def fsync(_fd):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    fsync_dir(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        fsync_dir(tmp_path)


def test_a_temporary_file_is_seen_as_locked_until_its_writer_closes_it(tmp_path):
    path = temporary_name(tmp_path / "a")
    fd = create_temporary(path)
    assert is_locked(path) is True
    os.close(fd)
    assert is_locked(path) is False
    assert path != temporary_name(tmp_path / "a")


def test_where_locks_do_not_work_nothing_is_known_of_them(tmp_path, monkeypatch):
    def no_locks(*_args):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    os.close(create_temporary(tmp_path / "a"))
    assert is_locked(tmp_path / "a") is None
    with pytest.raises(FileNotFoundError):
        is_locked(tmp_path / "b")


def test_paths_expand_variables_and_home(monkeypatch):
    monkeypatch.setenv("PLACE", "/x")
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path("$PLACE/a/${PLACE}") == Path("/x/a//x")
    assert expand_path("~/a") == Path("/home/me/a")
    monkeypatch.delenv("USER", raising=False)
    monkeypatch.setattr(files.getpass, "getuser", lambda: "me")
    assert expand_path("/scratch/$USER") == Path("/scratch/me")


def test_a_path_that_begins_with_an_empty_variable_does_not_lead_to_the_root(monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(UserError, match=r"^\$EMPTY/cache: the environment variable \$EMPTY is empty. Set it"):
        expand_path("$EMPTY/cache")
    assert expand_path("/scratch/cache$EMPTY") == Path("/scratch/cache")
    monkeypatch.setenv("USER", "")
    monkeypatch.setattr(files.getpass, "getuser", lambda: "me")
    assert expand_path("/scratch/$USER") == Path("/scratch/me")


def test_an_unset_variable_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"\$NO_SUCH_VARIABLE is not set"):
        expand_path("$NO_SUCH_VARIABLE/a")

    def nameless():
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.delenv("USER", raising=False)
    monkeypatch.setattr(files.getpass, "getuser", nameless)
    with pytest.raises(UserError, match=r"\$USER is not set"):
        expand_path("/scratch/$USER")


def test_the_canonical_json_does_not_depend_on_key_order_and_has_no_nan():
    assert canonical_json({"b": 1, "a": [1.5, None]}) == b'{"a":[1.5,null],"b":1}'
    assert sha256_of({"a": 1, "b": 2}) == sha256_of({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_the_deepest_mount_point_decides_the_file_system(monkeypatch):
    mounts = "/dev/a / ext4 rw 0 0\nserver:/x /data nfs4 rw 0 0\nnone /data/fast\\040disk tmpfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda _self: mounts)
    assert file_system_of(Path("/database")) == "ext4"
    assert file_system_of(Path("/data/x")) == "nfs4"
    assert file_system_of(Path("/data/fast disk/x")) == "tmpfs"
    assert is_network_file_system(Path("/data"))
    assert not is_network_file_system(Path("/data/fast disk"))


def test_free_bytes_of_a_folder_to_come_are_those_of_the_nearest_one_there(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(free_bytes(tmp_path), rel=0.5)


def test_bytes_are_told_in_powers_of_1000():
    assert [format_bytes(n) for n in (0, 999, 1234567, 301e9, 2e15)] == [
        "0 bytes", "999 bytes", "1.2 MB", "301.0 GB", "2000.0 TB",
    ]  # fmt: skip
