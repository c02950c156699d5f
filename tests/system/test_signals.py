import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distillery.system import machine, signals
from distillery.system.errors import EXIT_INTERRUPTED, Interrupted, MissingFileError, RunError, UserError, run_command
from distillery.system.machine import environment_number, free_inodes, memory_left, usable_cpus
from distillery.system.signals import STOP_SIGNALS, StopFlag

ROOT = Path(__file__).resolve().parents[2]
WORK = """
import sys, time
from distillery.system.signals import StopFlag
with StopFlag() as stop:
    print("ready", flush=True)
    for _ in range(1000):
        time.sleep(0.01)
        if stop.requested and "obey" in sys.argv:
            break
print(stop.reason, flush=True)
"""


def test_the_fewest_cpus_of_affinity_slurm_and_cgroup_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _self: "max 100000\n")
    assert usable_cpus() == 16
    monkeypatch.setattr(Path, "read_text", lambda _self: "250000 100000\n")
    assert usable_cpus() == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert usable_cpus() == 2
    monkeypatch.setattr(Path, "read_text", lambda _self: "max 100000\n")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # torchrun's processes on this node
    assert usable_cpus() == 4


ODD = ["", " ", "many", "-3", "1.5", "\N{SUPERSCRIPT TWO}", "9" * 5000]


@pytest.mark.parametrize("odd", [*ODD, "0"])
def test_odd_variables_of_launchers_are_ignored(monkeypatch, odd):
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE", "SLURM_JOB_END_TIME"):
        monkeypatch.setenv(name, odd)
    assert usable_cpus() >= 1
    assert signals.slurm_seconds_left() == float("inf")


@pytest.mark.parametrize("text, number", [*((odd, None) for odd in ODD), ("0", 0), (" 12\n", 12), ("007", 7)])
def test_an_environment_variable_is_a_whole_number_or_nothing(monkeypatch, text, number):
    monkeypatch.setenv("NUMBER", text)
    assert environment_number("NUMBER") == number
    monkeypatch.delenv("NUMBER")
    assert environment_number("NUMBER") is None


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_the_time_limit_sets_the_flag():
    with StopFlag(max_minutes=0.01 / 60) as stop:
        time.sleep(0.02)
        assert stop.requested
        assert stop.reason == "the time limit"


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_leaves_at_once_even_when_the_work_does_not_look(second):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    worker = subprocess.Popen([sys.executable, "-c", WORK], env=environment, stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "ready\n"
    worker.send_signal(signal.SIGTERM)
    time.sleep(signals._ECHO_S + 0.2)
    began = time.monotonic()
    worker.send_signal(second)
    assert worker.wait(timeout=5) == EXIT_INTERRUPTED
    assert time.monotonic() - began < 2
    assert worker.stdout.read() == ""


@pytest.mark.parametrize(
    "error, status, text",
    [
        (UserError("mend this"), 2, "error: mend this\n"),
        (MissingFileError("not there"), 2, "error: not there\n"),
        (RunError("disk full"), 1, "error: disk full\n"),
        (Interrupted("go on later"), 75, "go on later\n"),
        (KeyboardInterrupt(), 75, None),
        (
            OSError(28, "No space left on device", "runs/a/x"),
            1,
            "error: runs/a/x: No space left on device. What was "
            "saved before stays; mend it, then run the same command again.\n",
        ),
        (OSError(9, "Bad file descriptor"), 1, None),
        (ZeroDivisionError("oops"), 1, None),
    ],
)
def test_each_kind_of_error_has_its_exit_status_and_only_bugs_a_traceback(capsys, error, status, text):
    def fail():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(fail)
    assert ended.value.code == status
    said = capsys.readouterr().err
    assert text is None or said == text
    assert ("Traceback" in said) == (text is None and status == 1)


def test_a_hangup_that_nohup_ignores_is_none(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_is_no_error_of_the_work():
    master, slave = os.openpty()
    told, tell = os.pipe()  # not the terminal: its line can be read here while the worker is still writing it
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    work = WORK.replace('print("ready", flush=True)', f'import os; os.write({tell}, b"ready")')
    worker = subprocess.Popen(
        [sys.executable, "-c", work + "sys.exit(75)", "obey"], env=environment, stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True, pass_fds=[tell],
    )  # fmt: skip
    os.close(slave)
    os.close(tell)
    assert os.read(told, 100) == b"ready"
    os.close(told)
    os.close(master)  # what is written to the terminal now is an error
    worker.send_signal(signal.SIGHUP)
    assert worker.wait(timeout=20) == EXIT_INTERRUPTED


def test_what_main_returns_is_the_exit_status_or_the_result():
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: 3)
    assert ended.value.code == 3
    assert run_command(lambda: "configs") == "configs"


def test_the_least_limit_of_the_cgroups_above_counts_and_page_cache_is_free(tmp_path, monkeypatch):
    def group(path, limit, used, page_cache):
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.max").write_text(f"{limit}\n")
        (path / "memory.current").write_text(f"{used}\n")
        (path / "memory.stat").write_text(f"anon 7\ninactive_file {page_cache}\nactive_file 5\n")

    read = Path.read_text
    cgroup = "1:cpu:/other\n0::/slurm/job_1/step_0\n"
    monkeypatch.setattr(Path, "read_text", lambda path: cgroup if str(path) == "/proc/self/cgroup" else read(path))
    assert machine._left_by_cgroups(tmp_path) == [math.inf]
    group(tmp_path / "slurm", "max", 900, 0)
    group(tmp_path / "slurm" / "job_1", 1000, 700, 95)
    group(tmp_path / "slurm" / "job_1" / "step_0", 800, 100, 0)
    assert machine._left_by_cgroups(tmp_path) == [math.inf, 400, 705]


def test_lines_for_a_log_file_are_there_even_when_the_process_is_killed(tmp_path):
    code = (
        "import os; from distillery.system.errors import run_command\n"
        "run_command(lambda: (print('WARNING: no room'), os.kill(os.getpid(), 9)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(tmp_path / "log", "wb") as log:
        killed = subprocess.run([sys.executable, "-c", code], stdout=log, env=environment | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -9
    assert (tmp_path / "log").read_text() == "WARNING: no room\n"


def test_room_is_read_from_the_system(tmp_path):
    inodes = free_inodes(tmp_path / "not" / "there" / "yet")
    assert inodes is None or inodes > 0
    assert memory_left() is None or memory_left() > 0
