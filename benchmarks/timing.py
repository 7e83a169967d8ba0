"""How a call is timed and weighed: cold calls, replays of a CUDA graph, the rate of a copy, peak memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from benchmarks.common import measure

MIB = 2**20
REPLAYS = 20
Call = Callable[[], object]


def cold_seconds(run: Call, device: torch.device, budget_s: float) -> list[float]:
    """Time calls whose inputs are not in cache: triton's do_bench clears a GPU's cache before each.

    Args:
        run: what to time; on a CPU its inputs stay in cache if they fit.
        device: of the tensors.
        budget_s: seconds to spend.

    Returns:
        Seconds of each call.
    """
    if device.type != "cuda":
        return measure(run, device, budget_s=budget_s)
    from triton.testing import do_bench

    found = do_bench(run, warmup=25, rep=int(budget_s * 1000), return_mode="all")
    return [milliseconds / 1e3 for milliseconds in found]


def graph_seconds(prepare: Callable[[], Sequence[Call]], device: torch.device) -> float | None:
    """Time a call in a replayed CUDA graph: no launch gaps, and inputs that no call before it has touched.

    Args:
        prepare: makes calls with inputs of their own, which together exceed the cache; run on the capturing stream,
            where autograd then also runs backward.
        device: of the tensors.

    Returns:
        Seconds of one call, the median over replays; None without a GPU.
    """
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        calls = prepare()
        for call in (*calls, *calls):
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]  # results alive until the end: memory is not used twice
    seconds = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(kept))
    return sorted(seconds)[len(seconds) // 2]


def sets_beyond_cache(input_bytes: int, device: torch.device) -> int:
    """How many sets of inputs exceed a GPU's L2 cache twice; 1 on a CPU, whose calls are not replayed."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, 1 + -(-2 * cache // max(input_bytes, 1)))


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that is far larger than every cache."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = sorted(cold_seconds(lambda: target.copy_(source), device, 0.5))
    return 2 * size / seconds[len(seconds) // 2]


def peak_mib(run: Call, device: torch.device) -> float:
    """Highest memory of torch's allocator during a call, above what was there before.

    Args:
        run: what to weigh.
        device: of the tensors.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with unheard(), torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0)) / MIB


@contextmanager
def unheard() -> Iterator[None]:
    """The profiler's library writes to stderr behind Python's back."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
