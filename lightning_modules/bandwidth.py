"""How fast do the processes of a job reduce together? Run by the batch script on all of them before training.

`srun python -m lightning_modules.bandwidth --at-least 10` ends with 0, or with 80 where the nodes are too slow: a bad
cable or a wrong network shows in seconds here and as a slow week otherwise.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import distributed

TOO_SLOW = 80

_MIB = 2**20


def bus_bandwidth(size_mib: int, device: torch.device, repeats: int = 5) -> float:
    """Bandwidth of an all-reduce as NCCL's tests count it, in GB/s: 2 (n - 1) / n of the bytes over the best time.

    Args:
        size_mib: of the reduced tensor, float32.
        device: where it is.
        repeats: measured after one that is not.
    """
    world, numbers = distributed.get_world_size(), torch.ones(size_mib * _MIB // 4, device=device)
    seconds = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        distributed.barrier()
        start_s = time.perf_counter()
        distributed.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start_s)
        numbers.fill_(1)
    return 2 * (world - 1) / world * size_mib * _MIB / min(seconds[1:]) / 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and judge; rank 0 says the figure.

    Args:
        argv: options.

    Returns:
        0, or TOO_SLOW.
    """
    parser = argparse.ArgumentParser(prog="lightning_modules.bandwidth", allow_abbrev=False)
    parser.add_argument("--at-least", type=float, required=True, help="GB/s")
    parser.add_argument("--size-mib", type=int, default=256)
    options = parser.parse_args(argv)
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("SLURM_LOCALID", 0))) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if has_gpu else "gloo"
    distributed.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(minutes=5))
    try:
        # The slowest view counts, and all ranks must agree on it.
        found = torch.tensor(bus_bandwidth(options.size_mib, device), device=device)
        distributed.all_reduce(found, op=distributed.ReduceOp.MIN)
    finally:
        distributed.destroy_process_group()
    is_enough = float(found) >= options.at_least
    if rank == 0:
        verdict = "" if is_enough else ": too slow, check the network or lower slurm.min_bandwidth_gb_s"
        sys.stderr.write(f"all-reduce {float(found):.2f} GB/s, {options.at_least:g} wanted{verdict}\n")
    return 0 if is_enough else TOO_SLOW


if __name__ == "__main__":
    sys.exit(main())
