"""Which node is to blame for a slow network: pure rules, and real processes that measure themselves."""

import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules import bandwidth
from lightning_modules.bandwidth import rounds_of, to_blame
from lightning_modules.exit_codes import ExitCode


@given(st.integers(2, 40))
def test_every_node_meets_both_neighbours_and_never_two_at_once(num_nodes):
    rounds = rounds_of(num_nodes)
    for pairs in rounds:
        met = [node for pair in pairs for node in pair]
        assert len(set(met)) == len(met)
    found = [pair for pairs in rounds for pair in pairs]
    assert len(set(found)) == len(found) == (num_nodes if num_nodes > 2 else 1)
    assert {node for pair in found for node in pair} == set(range(num_nodes))
    assert len(rounds) <= 3


@given(st.integers(4, 40), st.data())
def test_one_bad_node_is_blamed_and_no_other(num_nodes, data):
    bad = data.draw(st.integers(0, num_nodes - 1))
    pairs = [pair for pairs in rounds_of(num_nodes) for pair in pairs]
    assert to_blame({pair: 1.0 if bad in pair else 20.0 for pair in pairs}, 10) == [bad]
    assert to_blame(dict.fromkeys(pairs, 20.0), 10) == []


def test_of_two_nodes_both_are_blamed():
    assert to_blame({(0, 1): 1.0}, 10) == [0, 1]
    assert rounds_of(1) == []


def measure(folder, *options, world=2):
    """Run the check as a step of `world` nodes with one process each; gives exit codes and what rank 0 said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lightning_modules.bandwidth", "--strikes", str(folder / "strikes"), *options]
    processes = []
    for rank in range(world):
        place = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(world), "SLURMD_NODENAME": f"node{rank + 1}"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(subprocess.Popen(command, env={**os.environ, **place}, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], said[0]


@pytest.mark.parametrize(
    ("at_least", "code", "struck"), [("1e-9", 0, []), ("1e9", ExitCode.UNFIT_NODE, ["node1", "node2"])]
)
def test_slow_nodes_get_a_strike_as_unfit_ones_do(at_least, code, struck, tmp_path):
    codes, said = measure(tmp_path, "--at-least", at_least, "--size-mib", "1")
    assert codes == [code, code]
    assert f" GB/s, {float(at_least):g} wanted" in said
    strikes = tmp_path / "strikes"
    assert [line.split()[0] for line in strikes.read_text().splitlines()] == struck if struck else not strikes.exists()


def test_processes_that_do_not_find_together_make_an_unfit_job(tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidth, "_TIMEOUT", bandwidth.timedelta(seconds=1))
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    assert bandwidth.main(["--at-least", "1"]) == bandwidth.TOO_SLOW == ExitCode.UNFIT_NODE
