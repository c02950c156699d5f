"""slurm/precompute.sbatch with a Slurm that only notes what it is asked."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "slurm" / "precompute.sbatch"
# what stands in for srun and the program it runs: it notes its arguments, then waits for a signal or ends
SRUN = """#!/bin/bash
echo "$@" > "$NOTES/srun"
[ -n "$DIES" ] || trap 'echo USR1 >> "$NOTES/signals"; sleep 0.2; exit 75' USR1
trap 'echo TERM >> "$NOTES/signals"; exit 75' TERM
touch "$NOTES/started"
[ -n "$ENDS_WITH" ] && exit "$ENDS_WITH"
for _ in $(seq 200); do sleep 0.05; done
exit 1
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$NOTES/scontrol"
exit "${SCONTROL_STATUS:-0}"
"""
# the job's own state, as the queue shows it
SQUEUE = """#!/bin/bash
[ "$*" = "--noheader --jobs $EXPECTED_JOB --format %T" ] && echo "${STATE-RUNNING}"
"""


class Job:
    """The batch script as Slurm would run it."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.notes = folder
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE)):
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        array = {
            "SLURM_ARRAY_JOB_ID": "77",
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_JOB_ID": "81",
        }
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        fakes = {"PATH": path, "NOTES": str(folder), "ENDS_WITH": "", "DIES": "", "EXPECTED_JOB": "77_3"}
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], env=fakes | array | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def note(self, name: str) -> str:
        path = self.notes / name
        return path.read_text().strip() if path.exists() else ""

    def has_started(self) -> bool:
        deadline = time.monotonic() + 20
        while not (self.notes / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return (self.notes / "started").exists()

    def status(self) -> int:
        self.output = self.process.communicate(timeout=30)[0]
        return self.process.returncode


def test_a_task_shares_the_work_with_the_others_whatever_the_size_of_the_array(tmp_path):
    job = Job(tmp_path, "--data_config", "my data.yaml", PYTHON="/venv/bin/python", ENDS_WITH="0")
    assert job.status() == 0
    assert job.note("srun").endswith("/venv/bin/python precompute_cache.py --data_config my data.yaml --num_jobs auto")
    assert job.note("scontrol") == ""


def test_a_warned_task_is_put_back_into_the_queue_under_its_own_name(tmp_path):
    job = Job(tmp_path)
    assert job.has_started()
    job.process.send_signal(signal.SIGUSR1)
    assert job.status() == 0
    assert job.note("signals") == "USR1"
    assert job.note("scontrol") == "requeue 77_3"
    assert "task 3: exit status 75, restart 0" in job.output


def test_a_task_that_the_warning_meets_before_it_is_ready_is_put_back_too(tmp_path):
    job = Job(tmp_path, DIES="yes")
    assert job.has_started()
    job.process.send_signal(signal.SIGUSR1)
    assert job.status() == 0
    assert job.note("scontrol") == "requeue 77_3"


def test_a_warning_just_after_the_start_is_passed_on(tmp_path):
    slow = tmp_path / "slow.sh"  # bash stops for a moment before the command that follows the start of srun
    slow.write_text("""trap '[ -n "${!:-}" ] && [ -z "${slept:-}" ] && slept=yes && sleep 1' DEBUG\n""")
    job = Job(tmp_path, BASH_ENV=str(slow))
    assert job.has_started()
    job.process.send_signal(signal.SIGUSR1)
    assert job.status() == 0
    assert job.note("signals") == "USR1"
    assert job.note("scontrol") == "requeue 77_3"


def test_a_task_that_stopped_by_its_own_clock_is_put_back_as_well(tmp_path):
    job = Job(tmp_path, ENDS_WITH="75")
    assert job.status() == 0
    assert job.note("scontrol") == "requeue 77_3"


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_any_other_end_is_the_jobs_own(tmp_path, status):
    job = Job(tmp_path, ENDS_WITH=str(status))
    assert job.status() == status
    assert job.note("scontrol") == ""


def test_a_cancelled_task_does_not_come_back(tmp_path):
    job = Job(tmp_path)
    assert job.has_started()
    job.process.send_signal(signal.SIGTERM)  # to the batch shell and, by Slurm, to the step
    subprocess.run(["pkill", "-TERM", "-P", str(job.process.pid)], check=True)
    assert job.status() == 75
    assert job.note("scontrol") == ""


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_task_that_was_warned_and_then_cancelled_does_not_come_back(tmp_path, state):
    job = Job(tmp_path, STATE=state)
    assert job.has_started()
    job.process.send_signal(signal.SIGUSR1)
    assert job.status() == 75
    assert job.note("scontrol") == ""


def test_a_task_that_never_gets_anywhere_stops_in_the_end(tmp_path):
    job = Job(tmp_path, ENDS_WITH="75", SLURM_RESTART_COUNT="100")
    assert job.status() == 75
    assert job.note("scontrol") == ""
    assert "Is --time too short for one shard?" in job.output


@pytest.mark.parametrize("odd", ["x", " ", "-1"])
def test_odd_variables_of_slurm_do_no_harm(tmp_path, odd):
    names = ("SLURM_RESTART_COUNT", "SLURM_CPUS_PER_TASK")
    job = Job(tmp_path, ENDS_WITH="75", **dict.fromkeys(names, odd))
    assert job.status() == 0, job.output
    assert job.note("srun").startswith("--ntasks=1 --cpus-per-task=1 ")
    assert job.output == "task 3: exit status 75, restart 0\n"


def test_where_scontrol_does_not_work_the_status_says_what_to_do(tmp_path):
    job = Job(tmp_path, ENDS_WITH="75", SCONTROL_STATUS="1")
    assert job.status() == 75


def test_without_an_array_the_job_is_requeued_under_its_own_number(tmp_path):
    environment = {
        "SLURM_ARRAY_JOB_ID": "",
        "SLURM_ARRAY_TASK_ID": "",
        "EXPECTED_JOB": "81",
    }
    job = Job(tmp_path, ENDS_WITH="75", **environment)
    assert job.status() == 0
    assert job.note("scontrol") == "requeue 81"
