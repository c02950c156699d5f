"""Processes that come, come late, or never: threads stand in for them."""

import socket
import threading

import pytest

from distillery.system import meeting
from distillery.system.errors import Interrupted, RunError, UserError
from distillery.system.launcher import World
from distillery.system.meeting import meet


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    monkeypatch.setattr(meeting, "LIMIT_MINUTES", 1 / 60)
    monkeypatch.setattr(meeting, "_SILENT_S", 0.3)
    monkeypatch.setattr(meeting, "_UNKNOWN_NAME_S", 0.1)
    monkeypatch.setattr(meeting, "_RETRY_S", 0.05)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


@pytest.fixture
def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_whoever_comes_first_all_get_the_store_and_nothing_is_printed(port, capsys):
    stores = {}

    def come(rank: int) -> None:
        stores[rank] = meet(World(rank, 3), "127.0.0.1", port)

    others = [threading.Thread(target=come, args=(rank,)) for rank in (2, 1)]
    for thread in others:
        thread.start()
    come(0)
    for thread in others:
        thread.join()
    stores[2].set("word", "of process 2")
    assert stores[0].get("word") == stores[1].get("word") == b"of process 2"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank, why", [(0, ""), (1, " (nobody answers there: connection refused)")])
def test_a_process_alone_says_once_whom_it_waits_for_and_gives_up_in_time(port, capsys, rank, why):
    where = f"2 other processes of 3 at 127.0.0.1:{port}{why}."
    with pytest.raises(RunError) as raised:
        meet(World(rank, 3), "127.0.0.1", port)
    assert capsys.readouterr().err == (
        f"[process {rank} of 3] waiting for {where} To run alone: unset RANK WORLD_SIZE\n"
    )
    assert f"gave up after 0.0166667 minutes of waiting for {where}" in str(raised.value)
    assert str(raised.value).endswith("To run alone: unset RANK WORLD_SIZE")


def test_only_those_that_are_missing_are_counted(port, capsys):
    def come() -> None:
        with pytest.raises(RunError):
            meet(World(1, 3), "127.0.0.1", port)

    other = threading.Thread(target=come)
    other.start()
    with pytest.raises(RunError, match="waiting for 1 other process of 3"):
        meet(World(0, 3), "127.0.0.1", port)
    other.join()


def test_a_request_to_stop_ends_the_waiting_at_once(port):
    with pytest.raises(Interrupted, match="Run the same command again"):
        meet(World(0, 2), "127.0.0.1", port, is_stopped=lambda: True)


def test_a_taken_port_is_an_error_within_moments(monkeypatch):
    monkeypatch.setattr(meeting, "_TAKEN_PORT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        with pytest.raises(
            UserError, match=f"MASTER_PORT={taken}: process 0 cannot listen there: address already in use"
        ):
            meet(World(0, 2), "127.0.0.1", taken)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("address", ["no.such.host.invalid", "127.0.0.1:29500", "a..b", "x" * 300])
def test_an_address_that_is_none_is_an_error_in_one_short_line(port, rank, address):
    with pytest.raises(UserError, match="MASTER_ADDR=.*: no host of this name is known here") as raised:
        meet(World(rank, 2), address, port)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_a_port_of_another_program_is_told_from_one_where_nobody_is():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(RunError, match="something answers there, but not process 0 of a run"):
            meet(World(1, 2), "127.0.0.1", port)


def test_process_0_may_go_and_come_back_while_the_others_wait(port, monkeypatch):
    monkeypatch.setattr(meeting, "LIMIT_MINUTES", 20 / 60)
    store = []
    other = threading.Thread(target=lambda: store.append(meet(World(1, 3), "127.0.0.1", port)))
    third = threading.Thread(target=lambda: store.append(meet(World(2, 3), "127.0.0.1", port)))
    other.start()
    passed = iter(range(10))
    with pytest.raises(Interrupted):  # after half a second
        meet(World(0, 3), "127.0.0.1", port, is_stopped=lambda: next(passed) > 4)
    third.start()
    store.append(meet(World(0, 3), "127.0.0.1", port))
    other.join(timeout=10)
    third.join(timeout=10)
    assert len(store) == 3
