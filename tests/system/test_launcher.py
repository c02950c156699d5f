"""What the variables of torchrun, srun and a user's own scripts mean, and which of them are errors."""

import pytest

from distillery.system.errors import UserError
from distillery.system.launcher import World, check_environment, is_restarted, meeting_point, world_from_environment

HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", *HERE, *STEP, "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST",
         "SLURM_JOB_NODELIST", "TORCHELASTIC_RESTART_COUNT")  # fmt: skip


@pytest.fixture
def given(monkeypatch):
    """Sets the variables of a launcher; all others are unset."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def give(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.mark.parametrize(
    "environment, rank_size_local",
    [
        ({}, (0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "abc"}, (0, 1, 0)),
        ({"RANK": "", "WORLD_SIZE": " "}, (0, 1, 0)),
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"LOCAL_RANK": "x"}, (0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, (1, 2, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0)),  # the batch script itself
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, (5, 8, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | STEP, (1, 2, 1)),
        (STEP | {"WORLD_SIZE": "4"}, (1, 4, 0)),  # exported by a batch script, the rank left to srun
    ],
)
def test_rank_and_world_come_from_torchrun_else_from_srun(given, environment, rank_size_local):
    given(environment)
    world = world_from_environment()
    assert (world.rank, world.size, world.local_rank) == rank_size_local


@pytest.mark.parametrize("name", [*STEP, "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"])
@pytest.mark.parametrize("value", ["", " ", "x", "-3", "\N{SUPERSCRIPT TWO}", "9" * 5000])
def test_an_odd_variable_of_slurm_is_as_if_unset(given, name, value):
    given(STEP | {"SLURM_LOCALID": "0", "SLURM_JOB_ID": "7", name: value})
    check_environment()
    assert world_from_environment().size == (1 if name in STEP else 4)


@pytest.mark.parametrize("value, again", [("", False), ("0", False), ("x", False), ("2", True)])
def test_a_restart_by_torchrun_is_a_count_above_0(given, value, again):
    given({"TORCHELASTIC_RESTART_COUNT": value})
    assert is_restarted() == again


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "0"}, "RANK=0 is set, WORLD_SIZE is not. .*unset RANK$"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "WORLD_SIZE=2 is set, RANK is not. .*unset WORLD_SIZE$"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x is set, RANK is not"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x: expected a whole number from 0 on. .*unset RANK WORLD_SIZE"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1: expected a whole number from 0 on"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a whole number from 1 on"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected a whole number from 1 on"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2: the processes have the numbers 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK=x: expected a whole number from 0 on"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"},
            r"WORLD_SIZE=2 are set without MASTER_PORT \(a free port",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, r"are set without MASTER_ADDR \(the host of process 0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": ""}, "without MASTER_ADDR .* MASTER_PORT"),
        (HERE | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "MASTER_PORT=70000: expected .* 1 to 65535"),
        (HERE | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "0"}, "MASTER_PORT=0: expected"),
        (STEP | {"MASTER_PORT": "x"}, "MASTER_PORT=x: .* unset SLURM_PROCID SLURM_STEP_NUM_TASKS"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "2"}, "^RANK=9{40}: expected"),
    ],
)
def test_a_wrong_variable_is_one_line_that_says_what_to_set_and_how_to_run_alone(given, environment, message):
    given(environment)
    with pytest.raises(UserError, match=message) as raised:
        check_environment()
    assert "\n" not in str(raised.value)
    assert "un alone: unset " in str(raised.value)


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, ("127.0.0.1", 15000)),
        ({"SLURM_JOB_ID": "15007", "SLURM_STEP_NODELIST": "a[3-4]"}, ("a3", 15007)),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": "b,c"}, ("b", 15007)),
        ({"MASTER_ADDR": "here", "SLURM_JOB_ID": "7"}, ("here", 15007)),
        ({"MASTER_PORT": "29500", "SLURM_STEP_NODELIST": "a"}, ("a", 29500)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_STEP_NODELIST": "a"}, ("a", 15000)),  # made of Slurm's by a script
    ],
)
def test_tasks_of_srun_meet_on_the_first_node_unless_told_where(given, environment, place):
    given(STEP | environment)
    assert meeting_point(world_from_environment()) == place


@pytest.mark.parametrize(
    "nodes, first",
    [("vm", "vm"), ("a1,a2", "a1"), ("node[03-07,9],x1", "node03"), ("n[1,5]", "n1"), ("x1,node[03-07]", "x1")],
)
def test_the_first_node_of_a_slurm_list_is_where_the_processes_meet(given, nodes, first):
    given(STEP | {"SLURM_STEP_NODELIST": nodes})
    assert meeting_point(World(1, 4))[0] == first
