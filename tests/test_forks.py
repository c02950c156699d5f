"""Commands run in forks fail as programs do: in time, with their children, and with a message that names them."""

import functools
import os
import signal
import time
from pathlib import Path

import forks
import pytest


@pytest.fixture
def server(monkeypatch):
    """A server of its own that has imported nothing, so that it starts at once."""
    monkeypatch.setattr(forks, "MODULES", ())
    monkeypatch.setattr(forks, "_server", functools.cache(forks._server.__wrapped__))
    yield forks._server
    process, calls = forks._server()
    calls.close()
    assert process.wait(10.0) == 0


def script(folder, text):
    (folder / "script.py").write_text(text)
    return str(folder / "script.py")


def test_a_dead_server_is_an_error_that_names_the_command_and_the_next_call_works(server, tmp_path):
    path = script(tmp_path, "print('here')")
    os.kill(server()[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=rf"exit status is -9. It was to run: {path} --flag"):
        forks.run_forked(path, "--flag")
    assert forks.run_forked(path).stdout == "here\n"


def test_a_command_that_runs_too_long_is_killed_with_its_children(server, tmp_path):
    path = script(tmp_path, "import subprocess; subprocess.run(['sh', '-c', 'echo $$; exec sleep 300'])")
    with pytest.raises(TimeoutError, match=rf"{path} timed out after 1 s") as error:
        forks.run_forked(path, timeout_s=1.0)
    child = int(str(error.value).split()[-1])
    assert_ended(child)
    assert forks.run_forked(script(tmp_path, "print('here')")).stdout == "here\n", "the server is alive"


def test_an_interrupted_call_leaves_nothing_behind(server, tmp_path):
    path = script(tmp_path, f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
                  f"os.kill({os.getpid()}, {signal.SIGUSR1:d}); time.sleep(300)")  # fmt: skip
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            forks.run_forked(path)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert_ended(int((tmp_path / "pid").read_text()))
    assert forks.run_forked(script(tmp_path, "print('here')")).stdout == "here\n"


def assert_ended(pid):
    deadline = time.monotonic() + 10.0
    while state_of(pid) not in ("gone", "Z"):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.01)


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def test_each_call_has_the_environment_of_its_moment(server, tmp_path, monkeypatch):
    path = script(tmp_path, "import os; print(os.environ.get('PLACE'), os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for value in ("first", "second"):
        monkeypatch.setenv("PLACE", value)
        assert forks.run_forked(path).stdout == f"{value} 1\n"
    monkeypatch.delenv("PLACE")
    assert forks.run_forked(path).stdout == "None 1\n"


@pytest.mark.parametrize("end, status, words", [
    ("raise SystemExit('wrong')", 1, "wrong\n"), ("raise SystemExit(3)", 3, ""), ("1 / 0", 1, "ZeroDivisionError"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, ""), ("", 0, ""),
])  # fmt: skip
def test_a_command_ends_with_the_status_and_the_last_words_of_a_program(server, tmp_path, end, status, words):
    done = forks.run_forked(script(tmp_path, end))
    assert done.returncode == status and words in done.stderr
