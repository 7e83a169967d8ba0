"""Attention over shapes: the gate, then kernels and layers timed side by side; benchmarks.attention says how."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.common import provenance, quantiles_ms, write_csv
from benchmarks.correctness import Verdict, draw, gate, values
from benchmarks.rivals import CASES, Case, LayerRival, Rival, kernels, layers
from benchmarks.timing import Call, cold_seconds, copy_rate, graph_seconds, peak_mib, sets_beyond_cache
from lightning_modules.errors import UsageError

DIRECTIONS = ("forward", "backward", "both")
Row = dict[str, str]


def run(device: torch.device, budget_s: float, out: Path, only: Sequence[str] = ()) -> int:
    """Gate, measure, write the CSV and the plot, print the table.

    Args:
        device: a CPU, or a GPU.
        budget_s: seconds of repetitions for each point.
        out: the CSV; the plot stands beside it.
        only: names of cases; none takes all.

    Returns:
        0, or 1 when one of our implementations is wrong: nothing is timed then.

    Raises:
        UsageError: no such case.
    """
    names = [case.name for case in CASES[device.type]]
    for name in only:
        if name not in names:
            raise UsageError(f"--only {name!r} is no case on {device.type}: choose from {', '.join(names)}")
    cases = [case for case in CASES[device.type] if not only or case.name in only]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    console = Console(stderr=True)
    verdicts = {case.name: gate(case, device, dtype) for case in track(cases, "correctness gate", console=console)}
    wrong = [
        (f"{case}: {name} {verdict.text}", verdict.ours)
        for case, found in verdicts.items()
        for name, verdict in found.items()
        if not verdict.right
    ]
    print("\n".join(text for text, _ in wrong) if wrong else "correctness gate: all implementations are right")
    if any(ours for _, ours in wrong):
        print("nothing is timed")
        return 1
    bytes_a_second = copy_rate(device)
    rows: list[Row] = []
    for case in track(cases, "timing", console=console):
        rows += measure_kernels(case, device, dtype, budget_s, verdicts[case.name])
        rows += measure_layers(case, device, budget_s) if case.N == case.M else []
        rows.append(cold_start(case, device))
    source = provenance(device)
    rows = [{**_with_shares(row, bytes_a_second), **source} for row in rows]
    write_csv(out, rows)
    plot(rows, out.with_suffix(".png"))
    print(f"copy rate {bytes_a_second / 1e9:.0f} GB/s, read and written; shares are of the least traffic at that rate")
    print(table(rows))
    print(f"written: {out} and {out.with_suffix('.png').name}")
    return 0


def measure_kernels(
    case: Case, device: torch.device, dtype: torch.dtype, budget_s: float, verdicts: dict[str, Verdict]
) -> list[Row]:
    """Time every implementation of a case, forward, backward and both.

    Args:
        case: the shape.
        device: of the tensors.
        dtype: of the tensors.
        budget_s: seconds for each.
        verdicts: of the gate; what is wrong gets a note instead of times.

    Returns:
        CSV rows.
    """
    rows = []
    for name, rival in kernels(case, device).items():
        right, _, text = verdicts[name]
        for direction in DIRECTIONS:
            head = _head("kernel", name, case, str(dtype).removeprefix("torch."), direction)
            head["floor_bytes"] = str(case.floor_bytes(direction, dtype.itemsize))
            if not right:
                rows.append({**head, **_EMPTY, "note": text})
                continue

            def prepare(direction: str = direction, rival: Rival = rival) -> Call:
                inputs, weight = draw(case, device, dtype)
                return _call(lambda: rival.attend(*inputs), (*inputs, *rival.tables), weight, direction)

            input_bytes = case.floor_bytes("forward", dtype.itemsize)
            rows.append({**head, **_measured(prepare, input_bytes, device, budget_s), "error": text})
    return rows


def measure_layers(case: Case, device: torch.device, budget_s: float) -> list[Row]:
    """Time the whole layer, forward and both, in bf16 autocast on a GPU and fp32 on a CPU.

    Args:
        case: the shape, N = M.
        device: of the tensors.
        budget_s: seconds for each.

    Returns:
        CSV rows.
    """
    rows = []
    dtype = "bf16 autocast" if device.type == "cuda" else "float32"
    for name, layer in layers(case, device).items():
        for direction in ("forward", "both"):

            def prepare(direction: str = direction, layer: LayerRival = layer) -> Call:
                x, weight = torch.randn(2, case.B, case.N, case.H * case.d, device=device)

                def attend() -> Tensor:
                    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        return layer.run(x)

                return _call(attend, (x.requires_grad_(), *layer.parameters), weight, direction)

            input_bytes = case.B * case.N * case.H * case.d * 4
            row = _measured(prepare, input_bytes, device, budget_s)
            rows.append({**_head("layer", name, case, dtype, direction), "floor_bytes": "", **row, "error": ""})
    return rows


def cold_start(case: Case, device: torch.device) -> Row:
    """Seconds of the first forward and backward of a process whose compiled kernels are not yet cached.

    Args:
        case: the shape.
        device: of the tensors.
    """
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.attention_shapes", device.type, case.name]
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"cold start of {case.name}: {done.stderr.strip().splitlines()[-1]}")
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    row = {**_head("cold start", "mirrorla mirror rope", case, dtype, "both"), "floor_bytes": "", **_EMPTY}
    return {**row, "p50_ms": done.stdout.split()[-1]}


def table(rows: Sequence[Row]) -> str:
    """The points as text, a line for each implementation, direction and case.

    Args:
        rows: of the CSV.
    """
    lines = [
        f"{'case':14} {'level':10} {'direction':9} {'implementation':21} {'ms':>10} {'share':>6} "
        f"{'graph ms':>10} {'share':>6} {'peak MiB':>9}"
    ]
    lines += [
        f"{row['case']:14} {row['level']:10} {row['direction']:9} {row['implementation']:21} {row['p50_ms']:>10} "
        f"{row['share_of_copy']:>6} {row['graph_ms']:>10} {row['graph_share_of_copy']:>6} {row['peak_mib']:>9} "
        f"{row['note']}".rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draw the kernels' times: a panel for each direction, a group of bars for each case.

    Args:
        rows: of the CSV.
        path: the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [row for row in rows if row["level"] == "kernel" and row["p50_ms"]]
    cases, names = (list(dict.fromkeys(row[column] for row in timed)) for column in ("case", "implementation"))
    figure, panels = plt.subplots(len(DIRECTIONS), 1, figsize=(3 + 1.2 * len(cases), 10), constrained_layout=True)
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        for place, name in enumerate(names):
            found = {
                row["case"]: float(row["p50_ms"])
                for row in timed
                if row["implementation"] == name and row["direction"] == direction
            }
            positions = [cases.index(case) + 0.8 * (place / len(names) - 0.5) for case in found]
            panel.bar(positions, list(found.values()), 0.8 / len(names), label=name)
        panel.set(yscale="log", ylabel=f"{direction}, ms", xticks=range(len(cases)), xticklabels=cases)
        panel.grid(axis="y", alpha=0.3)
    panels[0].legend(ncols=3, fontsize="small")
    figure.suptitle(f"attention kernels, {timed[0]['dtype']}, {rows[0]['device']} (commit {rows[0]['commit']})")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _call(attend: Callable[[], Tensor], leaves: Sequence[Tensor], weight: Tensor, direction: str) -> Call:
    """What is timed: forward without a graph, backward of one graph again and again, or both."""
    if direction == "forward":
        return torch.no_grad()(attend)
    if direction == "backward":
        out = attend()
        return lambda: torch.autograd.grad(out, leaves, weight.to(out.dtype), retain_graph=True)

    def both() -> object:
        out = attend()
        return torch.autograd.grad(out, leaves, weight.to(out.dtype))

    return both


def _measured(prepare: Callable[[], Call], input_bytes: int, device: torch.device, budget_s: float) -> Row:
    """Times and peak memory; what does not run leaves a note."""
    try:
        run = prepare()
        run()
        peak = peak_mib(run, device)
        seconds = cold_seconds(run, device, budget_s)
    except RuntimeError as error:
        return {**_EMPTY, "note": f"does not run: {str(error).splitlines()[0][:120]}"}
    row = {**_EMPTY, "repeats": str(len(seconds)), **quantiles_ms(seconds), "peak_mib": f"{peak:.2f}"}
    try:
        sets = sets_beyond_cache(input_bytes, device)
        replayed = graph_seconds(lambda: [prepare() for _ in range(sets)], device)
    except RuntimeError as error:
        return {**row, "note": f"no graph: {str(error).splitlines()[0][:120]}"}
    return row if replayed is None else {**row, "graph_ms": f"{replayed * 1e3:.4f}"}


def _head(level: str, implementation: str, case: Case, dtype: str, direction: str) -> Row:
    shape = {"B": case.B, "N": case.N, "M": case.M, "H": case.H, "d": case.d}
    named = {"level": level, "case": case.name, "implementation": implementation}
    return {**named, **{key: str(value) for key, value in shape.items()}, "dtype": dtype, "direction": direction}


def _with_shares(row: Row, bytes_a_second: float) -> Row:
    shares = {}
    for column, time_ms in (("share_of_copy", row["p50_ms"]), ("graph_share_of_copy", row["graph_ms"])):
        known = time_ms and row["floor_bytes"]
        share = float(row["floor_bytes"]) / (float(time_ms) * 1e-3) / bytes_a_second if known else None
        shares[column] = "" if share is None else f"{share:.1%}"
    return {**row, **shares, "copy_gb_s": f"{bytes_a_second / 1e9:.1f}"}


def _first_call_ms(device: torch.device, case: Case) -> float:
    rival = kernels(case, device)["mirrorla mirror rope"]
    inputs, weight = draw(case, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    start = time.perf_counter()
    values(rival.attend, inputs, rival.tables, weight)[-1].cpu()  # waits for the device
    return (time.perf_counter() - start) * 1e3


_EMPTY = dict.fromkeys(("repeats", "p20_ms", "p50_ms", "p80_ms", "graph_ms", "peak_mib", "error", "note"), "")


if __name__ == "__main__":
    kind, name = sys.argv[1:]
    (chosen,) = (case for case in CASES[kind] if case.name == name)
    print(f"{_first_call_ms(torch.device(kind), chosen):.1f}")
