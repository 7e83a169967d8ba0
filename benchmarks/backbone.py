"""Training throughput and peak memory of whole backbones beside timm's, and where linear attention overtakes softmax.

    mirrorla bench backbone --device cuda

Every model takes the same steps in the same run: forward, cross-entropy, backward and AdamW on random images, in bf16
autocast on a GPU and fp32 on a CPU. Batches shrink with the image's area, and by half again where memory does not
suffice. Then one layer of each stage of mirrorla_tiny trains on growing numbers of tokens, mirror beside softmax.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from benchmarks.common import RESULTS, chosen_device, measure, numbers, provenance, quantiles_ms, write_csv
from benchmarks.rivals import squarest_grid
from benchmarks.timing import MIB, peak_mib
from mirrorla import VARIANTS, MirrorAttention
from mirrorla.complexity import count_gmacs, count_parameters

OURS = ("mirrorla_tiny", "mirrorla_small")
PEERS = ("swin_tiny_patch4_window7_224", "pvt_v2_b2", "deit_small_patch16_224", "convnext_tiny")
SIZES = {"cuda": "224,512,1024", "cpu": "224"}
BATCH_224 = {"cuda": 128, "cpu": 2}
TOKENS = {"cuda": (64, 256, 1024, 4096, 16384), "cpu": (16, 64, 256, 1024, 4096)}
LAYER_BATCH = {"cuda": 16, "cpu": 1}
Row = dict[str, str]
Rows = Sequence[Mapping[str, str]]


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the CSVs and the plot, print the tables.

    Args:
        arguments: command line; None takes the process's.

    Returns:
        The exit code.
    """
    options = parser().parse_args(arguments)
    device = chosen_device(options.device)
    sizes = options.sizes or [int(size) for size in SIZES[device.type].split(",")]
    points = list(itertools.product(sizes, options.models.split(",")))
    console = Console(stderr=True)
    rows = [
        measure_model(name, size, device, options.budget_s) for size, name in track(points, "models", console=console)
    ]
    overtaking = measure_layers(device, options.budget_s / 4, console)
    source = provenance(device)
    out = options.out or RESULTS / f"backbone_{device.type}.csv"
    write_csv(out, [{**row, **source} for row in rows])
    write_csv(out.with_stem(f"{out.stem}_overtaking"), [{**row, **source} for row in overtaking])
    plot([{**row, **source} for row in rows], overtaking, out.with_suffix(".png"))
    print(table(rows))
    print("\n".join(crossings(overtaking)))
    print(f"written: {out}, {out.stem}_overtaking.csv and {out.with_suffix('.png').name}")
    return 0


def measure_model(name: str, size: int, device: torch.device, budget_s: float) -> Row:
    """Train one model on random images for a while.

    Args:
        name: of a timm model; ours are registered there.
        size: side of the images in pixels.
        device: where to.
        budget_s: seconds of steps.

    Returns:
        CSV columns; empty times and a note where not even one image fits.
    """
    head = {"model": name, "size": str(size), "precision": "bf16 autocast" if device.type == "cuda" else "float32"}
    batch = max(1, BATCH_224[device.type] * 224**2 // size**2)
    while batch:
        try:
            return {**head, **_trained(name, size, batch, device, budget_s), "note": ""}
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            batch //= 2
    return {**head, **dict.fromkeys(_COLUMNS, ""), "note": "out of memory"}


def _trained(name: str, size: int, batch: int, device: torch.device, budget_s: float) -> Row:
    torch.manual_seed(0)
    model = build(name, size).to(device).train()
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimizer's state is there before memory is weighed
    peak = peak_mib(step, device)
    held = sum(x.numel() * x.element_size() for x in model.parameters()) * 3 / MIB  # weights and AdamW's two moments
    seconds = measure(step, device, budget_s=budget_s)
    quantiles = quantiles_ms(seconds)
    values = (
        batch,
        f"{count_parameters(model) / 1e6:.2f}",
        f"{count_gmacs(model, size):.2f}",
        f"{batch / float(quantiles['p50_ms']) * 1e3:.2f}",
        f"{peak + held:.0f}",
        len(seconds),
    )
    return {**{column: str(value) for column, value in zip(_COLUMNS, values, strict=False)}, **quantiles}


def build(name: str, size: int) -> nn.Module:
    """A model for images of one size: those with position tables or windows are told it.

    Args:
        name: of a timm model.
        size: side of the images in pixels.
    """
    if name.startswith(("swin", "deit", "vit")):
        return timm.create_model(name, img_size=size)
    return timm.create_model(name)


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


def table(rows: Sequence[Row]) -> str:
    """The models as text, one a line.

    Args:
        rows: of `measure_model`.
    """
    lines = [f"{'model':30} {'size':>5} {'batch':>5} {'params M':>9} {'GMACs':>8} {'images/s':>9} {'peak MiB':>9}"]
    lines += [
        f"{row['model']:30} {row['size']:>5} {row['batch']:>5} {row['params_m']:>9} {row['gmacs']:>8} "
        f"{row['images_per_s']:>9} {row['peak_mib']:>9} {row['note']}".rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: Rows, overtaking: Rows, path: Path) -> None:
    """Draw throughput by model and size, and the layers' times over N.

    Args:
        rows: of the CSV of models.
        overtaking: of the CSV of layers.
        path: the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    for place, name in enumerate(names := list(dict.fromkeys(row["model"] for row in rows))):
        found = {
            row["size"]: float(row["images_per_s"]) for row in rows if row["model"] == name and row["images_per_s"]
        }
        positions = [sizes.index(size) + 0.8 * (place / len(names) - 0.5) for size in found]
        left.bar(positions, list(found.values()), 0.8 / len(names), label=name)
    left.set(yscale="log", ylabel="training images/s", xticks=range(len(sizes)), xticklabels=[f"{s}²" for s in sizes])
    left.legend(fontsize="small")
    for colour, (stage, group) in enumerate(itertools.groupby(overtaking, key=lambda row: row["stage"])):
        points = list(group)
        n = [int(row["N"]) for row in points]
        for kind, style in (("mirror", "-o"), ("softmax", "--s")):
            times = [float(row[kind]) for row in points]
            right.loglog(n, times, style, base=2, color=f"C{colour}", label=f"stage {stage}, {kind}")
    right.set(xlabel="tokens N", ylabel="forward and backward of a layer, ms")
    right.legend(fontsize="small")
    figure.suptitle(f"backbones, {rows[0]['device']} (commit {rows[0]['commit']})")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.backbone",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu, small images alone")
    made.add_argument(
        "--models", default=",".join((*OURS, *PEERS)), help="timm names, by commas (default: %(default)s)"
    )
    made.add_argument(
        "--sizes", type=numbers, help=f"sides of the images (default: {SIZES['cuda']}; cpu: {SIZES['cpu']})"
    )
    made.add_argument("--budget_s", type=float, default=8.0, help="seconds of steps for each model (default: 8)")
    made.add_argument("--out", type=Path, help="CSV file (default: in benchmarks/results/), the plot beside it")
    return made


_COLUMNS = ("batch", "params_m", "gmacs", "images_per_s", "peak_mib", "repeats", "p20_ms", "p50_ms", "p80_ms")


if __name__ == "__main__":
    sys.exit(main())
