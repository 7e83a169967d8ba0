"""Time and peak memory of one attention layer over the number of tokens, mirror beside softmax.

Softmax is torch's scaled_dot_product_attention in the same layer: same projections, gate and positions. Every point
runs in two processes of its own. One is timed while its C library keeps freed memory, as a GPU's allocator does:
otherwise large tensors are given back to the kernel and faulted in again at every call, and page faults are what one
measures. The other runs once with the library's defaults, and its highest memory above the baseline is the peak.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.common import measure, provenance, quantiles_ms, write_csv
from mirrorla import MirrorAttention

DIM, HEADS = 64, 1  # mirrorla_tiny's first stage, the one that sees this many tokens
KINDS = ("mirror", "softmax")
DIRECTIONS = ("forward", "forward+backward")
MIB = 2**20
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # glibc's; ignored elsewhere


def run(device: torch.device, tokens: Sequence[int], budget_s: float, out: Path) -> None:
    """Measure every point, write the CSV and the plot, print the table.

    Args:
        device: a CPU, or a GPU.
        tokens: numbers of tokens N.
        budget_s: seconds of repetitions for each point.
        out: the CSV; the plot stands beside it.
    """
    points = [
        {"device": device.type, "kind": kind, "direction": direction, "N": n, "budget_s": budget_s}
        for direction, kind, n in itertools.product(DIRECTIONS, KINDS, tokens)
    ]
    source = provenance(device)
    rows = [{**_run_point(point), **source} for point in track(points, description="attention")]
    write_csv(out, rows)
    plot(rows, out.with_suffix(".png"))
    print(table(rows))
    print(f"written: {out} and {out.with_suffix('.png').name}")


def measure_point(point: dict[str, object]) -> dict[str, str]:
    """Measure one kind of attention at one number of tokens, in this process.

    Args:
        point: device, kind, direction, N, budget_s, and "time" or "memory" to measure.

    Returns:
        CSV columns: the point and its times, or its peak memory.
    """
    device, N = torch.device(str(point["device"])), int(str(point["N"]))
    kind, backward = point["kind"], point["direction"] == "forward+backward"
    assert kind == "mirror" or kind == "softmax"
    torch.manual_seed(0)
    layer = MirrorAttention(DIM, HEADS, kind=kind).to(device).train(backward)
    inputs = {n: torch.randn(1, n, DIM, device=device, requires_grad=backward) for n in (64, N)}

    def run(tokens: int = N) -> None:
        with torch.set_grad_enabled(backward):
            out = layer(inputs[tokens], _grid(tokens))
        if backward:
            out.sum().backward()

    run(64)  # libraries allocate their own workspaces before the baseline is read
    before = _memory_mib(device)
    if point["measure"] == "memory":
        run()
        return {"peak_mib": f"{_memory_mib(device) - before:.1f}"}
    seconds = measure(run, device, budget_s=float(str(point["budget_s"])))
    return {
        "kind": str(kind),
        "direction": str(point["direction"]),
        "dim": str(DIM),
        "heads": str(HEADS),
        "N": str(N),
        "repeats": str(len(seconds)),
        **quantiles_ms(seconds),
    }


def table(rows: list[dict[str, str]]) -> str:
    """The points as text, with the growth of time from one N to the next.

    Args:
        rows: CSV rows in the order of `main`.

    Returns:
        One line a point: direction, kind, N, median, growth for four times the tokens, peak memory.
    """
    lines = [f"{'direction':17} {'kind':8} {'N':>6} {'p50 ms':>10} {'x':>5} {'peak MiB':>9}"]
    last: dict[str, str] = {}
    for row in rows:
        same = (row["kind"], row["direction"]) == (last.get("kind"), last.get("direction"))
        growth = f"{float(row['p50_ms']) / float(last['p50_ms']):5.2f}" if same else " " * 5
        lines.append(
            f"{row['direction']:17} {row['kind']:8} {row['N']:>6} {row['p50_ms']:>10} {growth} {row['peak_mib']:>9}"
        )
        last = row
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draw time and peak memory over N, both axes logarithmic.

    Args:
        rows: CSV rows.
        path: the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    colours = {"mirror": "#1f77b4", "softmax": "#d62728"}
    for direction, kind in itertools.product(DIRECTIONS, KINDS):
        chosen = [row for row in rows if (row["kind"], row["direction"]) == (kind, direction)]
        style = "-o" if direction == "forward" else "--s"
        for panel, column in zip(panels, ("p50_ms", "peak_mib"), strict=True):
            n = [int(row["N"]) for row in chosen]
            values = [float(row[column]) for row in chosen]
            panel.loglog(n, values, style, color=colours[kind], label=f"{kind}, {direction}", base=2)
    for panel, title in zip(
        panels, ("time per layer, ms (median)", "peak memory above the baseline, MiB"), strict=True
    ):
        panel.set(xlabel="tokens N", title=title)
        panel.set_yscale("log", base=10)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(f"attention layer, C = {DIM}, {HEADS} head, fp32, {rows[0]['device']} (commit {rows[0]['commit']})")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _run_point(point: dict[str, object]) -> dict[str, str]:
    row: dict[str, str] = {}
    for what, environment in (("time", KEEP_FREED_MEMORY), ("memory", {})):
        command = [sys.executable, "-m", "benchmarks.attention_tokens", json.dumps({**point, "measure": what})]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
        if done.returncode:
            raise RuntimeError(f"{point}: {done.stderr.strip().splitlines()[-1]}")
        row |= json.loads(done.stdout.splitlines()[-1])
    return row


def _grid(tokens: int) -> tuple[int, int]:
    """The squarest grid with exactly this many cells."""
    height = next(h for h in range(int(tokens**0.5), 0, -1) if tokens % h == 0)
    return height, tokens // height


def _memory_mib(device: torch.device) -> float:
    """Highest memory so far: the process's on a CPU, the allocator's on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it started this process
        (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(json.dumps(measure_point(json.loads(sys.argv[1]))))
