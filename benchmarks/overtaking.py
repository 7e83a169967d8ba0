"""From how many tokens on a layer of mirror attention trains faster than one of softmax; `mirrorla bench backbone`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.common import measure, quantiles_ms
from benchmarks.rivals import squarest_grid
from mirrorla import VARIANTS, MirrorAttention

TOKENS = {"cuda": (64, 256, 1024, 4096, 16384), "cpu": (16, 64, 256, 1024, 4096)}
LAYER_BATCH = {"cuda": 16, "cpu": 1}
Row = dict[str, str]
Rows = Sequence[Mapping[str, str]]


def measure_layers(device: torch.device, budget_s: float, console: Console) -> list[Row]:
    """Time forward and backward of one layer of each stage, mirror beside softmax, over the number of tokens.

    Args:
        device: where to.
        budget_s: seconds for each point.
        console: of the progress bar.

    Returns:
        CSV rows.
    """
    spec = VARIANTS["mirrorla_tiny"]
    stages = list(enumerate(zip(spec.dims, spec.heads, strict=True)))
    rows = []
    for (stage, (C, H)), N in track(list(itertools.product(stages, TOKENS[device.type])), "layers", console=console):
        times = {kind: _layer_ms(C, H, N, kind, device, budget_s) for kind in ("mirror", "softmax")}
        shape = {"stage": stage + 1, "B": LAYER_BATCH[device.type], "C": C, "H": H, "N": N}
        rows.append({**{key: str(value) for key, value in shape.items()}, **times})
    return rows


def _layer_ms(C: int, H: int, N: int, kind: str, device: torch.device, budget_s: float) -> str:
    torch.manual_seed(0)
    layer = MirrorAttention(C, H, kind="mirror" if kind == "mirror" else "softmax").to(device)
    x = torch.randn(LAYER_BATCH[device.type], N, C, device=device, requires_grad=True)
    leaves = [x, *layer.parameters()]

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = layer(x, squarest_grid(N))
        torch.autograd.grad(out.float().sum(), leaves)

    return quantiles_ms(measure(run, device, budget_s=budget_s))["p50_ms"]


def crossings(rows: Rows) -> list[str]:
    """Where mirror attention becomes faster than softmax, one line a stage.

    Args:
        rows: of `measure_layers`.
    """
    lines = []
    for stage, group in itertools.groupby(rows, key=lambda row: (row["stage"], row["C"], row["H"])):
        points = [(int(row["N"]), math.log(float(row["mirror"]) / float(row["softmax"]))) for row in group]
        lines.append(f"stage {stage[0]} (C {stage[1]}, {stage[2]} heads): {_crossing(points)}")
    return lines


def _crossing(points: Sequence[tuple[int, float]]) -> str:
    """The N at which the logarithm of a ratio of times falls below 0, on a straight line in log N."""
    if points[0][1] < 0:
        return f"linear attention is faster from N <= {points[0][0]} on"
    for (n, above), (m, below) in itertools.pairwise(points):
        if below < 0 <= above:
            crossing = math.exp(math.log(n) + above / (above - below) * math.log(m / n))
            return f"linear attention is faster from N of about {crossing:.0f} on"
    return f"softmax is faster up to N = {points[-1][0]}"
