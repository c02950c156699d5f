import errno
import os

import pytest

from distillery.system.errors import UserError
from distillery.training import lock
from distillery.training.lock import RunLock


def test_a_lock_is_held_until_the_process_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.0)
    RunLock(tmp_path).take(create=False)  # nobody has ever trained here
    assert not list(tmp_path.iterdir())
    child = os.fork()
    if child == 0:
        RunLock(tmp_path).take(create=True)
        os._exit(0)
    os.waitpid(child, 0)
    mine = RunLock(tmp_path)
    mine.take(create=False)
    mine.take(create=True)
    with pytest.raises(UserError, match=f"another process is training in this folder .*process {os.getpid()}"):
        RunLock(tmp_path).take(create=False)


def test_a_folder_that_cannot_be_written_and_one_in_use_are_named_at_once(tmp_path, monkeypatch, capsys):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take(create=True)
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.1)
    with pytest.raises(UserError, match="another process is training in this folder"):
        second.take(create=False)
    assert f"{tmp_path}: another process is training in this folder (" in capsys.readouterr().err
    monkeypatch.setattr(lock.os, "open", lambda *_args: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    with pytest.raises(UserError, match=f"checkpoint_dir {tmp_path}: Read-only file system: give another"):
        RunLock(tmp_path).take(create=True)
