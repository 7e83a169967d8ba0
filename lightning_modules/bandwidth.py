"""How fast do the processes of a job reduce together? Run by the batch script on all of them before training.

`srun … lightning_modules.bandwidth --at-least 10 --strikes FILE` ends with 0, or with 80 where the nodes are too slow:
a bad cable or a wrong network shows in seconds here and as a slow week otherwise. Then every node is measured with its
neighbours on either side as well, and those that are slow with both get a strike; the second one excludes a node.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

TOO_SLOW = 80

_MIB = 2**20
_TIMEOUT = timedelta(minutes=5)
Pair = tuple[int, int]


def bus_bandwidth(
    size_mib: int, device: torch.device, repeats: int = 5, group: distributed.ProcessGroup | None = None
) -> float:
    """Bandwidth of an all-reduce as NCCL's tests count it, in GB/s: 2 (n - 1) / n of the bytes over the best time.

    Args:
        size_mib: of the reduced tensor, float32.
        device: where it is.
        repeats: measured after one that is not.
        group: who reduces together; all if None.
    """
    world, numbers = distributed.get_world_size(group), torch.ones(size_mib * _MIB // 4, device=device)
    seconds = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        distributed.barrier(group)
        start_s = time.perf_counter()
        distributed.all_reduce(numbers, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start_s)
        numbers.fill_(1)
    return 2 * (world - 1) / world * size_mib * _MIB / min(seconds[1:]) / 1e9


def rounds_of(num_nodes: int) -> list[list[Pair]]:
    """Pairs of neighbours in a ring, in rounds in which no node is twice, so that pairs do not disturb each other.

    Args:
        num_nodes: nodes 0 … n - 1.
    """
    if num_nodes < 2:
        return []
    ring = [(node, (node + 1) % num_nodes) for node in range(num_nodes if num_nodes > 2 else 1)]
    last = [ring.pop()] if len(ring) % 2 and len(ring) > 1 else []
    return [part for part in (ring[::2], ring[1::2], last) if part]


def to_blame(found: Mapping[Pair, float], at_least: float) -> list[int]:
    """Nodes that are slow with every neighbour; a healthy node beside a bad one is still fast with the other.

    Args:
        found: GB/s of each pair.
        at_least: what a pair must reach.
    """
    nodes = sorted({node for pair in found for node in pair})
    return [node for node in nodes if all(speed < at_least for pair, speed in found.items() if node in pair)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and judge; rank 0 says the figure.

    Args:
        argv: options.

    Returns:
        0, or TOO_SLOW; TOO_SLOW too where the processes do not even find together.
    """
    parser = argparse.ArgumentParser(prog="lightning_modules.bandwidth", allow_abbrev=False)
    parser.add_argument("--at-least", type=float, required=True, help="GB/s")
    parser.add_argument("--size-mib", type=int, default=256)
    parser.add_argument("--strikes", type=Path, help="where a line is added for every node to blame")
    options = parser.parse_args(argv)
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("SLURM_LOCALID", 0))) if has_gpu else torch.device("cpu")
    try:
        if has_gpu:
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if has_gpu else "gloo", rank=rank, world_size=world, timeout=_TIMEOUT)
        return _judge(options, device)
    except RuntimeError as error:  # a broken network or device, which another node may not have
        sys.stderr.write(f"rank {rank} on {_node()} cannot measure the bandwidth: {' '.join(str(error).split())}\n")
        return TOO_SLOW
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _judge(options: argparse.Namespace, device: torch.device) -> int:
    """The slowest view counts, and all ranks agree on it."""
    found = torch.tensor(bus_bandwidth(options.size_mib, device), device=device)
    distributed.all_reduce(found, op=distributed.ReduceOp.MIN)
    is_enough, rank = float(found) >= options.at_least, distributed.get_rank()
    if rank == 0:
        verdict = "" if is_enough else ": too slow, check the network or lower slurm.min_bandwidth_gb_s"
        sys.stderr.write(f"all-reduce {float(found):.2f} GB/s, {options.at_least:g} wanted{verdict}\n")
    if is_enough:
        return 0
    ranks_of = _places()
    names, speeds = list(ranks_of), _measure_pairs(list(ranks_of.values()), options.size_mib, device)
    if rank == 0:
        speeds = speeds or {(0, 0): float(found)}  # a single node has only itself to blame
        for node in to_blame(speeds, options.at_least):
            best = max(speed for pair, speed in speeds.items() if node in pair)
            _strike(options.strikes, names[node], f"reduces with {best:.2f} GB/s at best, {options.at_least:g} wanted")
    return TOO_SLOW


def _places() -> dict[str, list[int]]:
    """The ranks of every node, by its name, in order of the ranks."""
    names: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(names, _node())
    return {name: [rank for rank, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}


def _measure_pairs(nodes: Sequence[Sequence[int]], size_mib: int, device: torch.device) -> dict[Pair, float]:
    """GB/s of all pairs of neighbours, as their slowest rank saw it.

    Args:
        nodes: the ranks of each.
        size_mib: see bus_bandwidth.
        device: of this rank.
    """
    mine: dict[Pair, float] = {}
    for pairs in rounds_of(len(nodes)):
        for pair in pairs:
            members = sorted([*nodes[pair[0]], *nodes[pair[1]]])
            if distributed.get_rank() in members:
                group = distributed.new_group(members, use_local_synchronization=True)
                assert isinstance(group, distributed.ProcessGroup)  # this rank is one of its members
                mine[pair] = bus_bandwidth(size_mib, device, group=group)
        distributed.barrier()
    views: list[dict[Pair, float]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(views, mine)
    return {pair: min(view[pair] for view in views if pair in view) for view in views for pair in view}


def _strike(path: Path | None, name: str, reason: str) -> None:
    sys.stderr.write(f"node {name} {reason}\n")
    if path is not None:
        with path.open("a") as stream:
            stream.write(f"{name} {reason}\n")


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


if __name__ == "__main__":
    sys.exit(main())
