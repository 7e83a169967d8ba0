"""Throughput and peak memory of whole backbones beside timm's, and where linear attention overtakes softmax.

    mirrorla bench backbone --device cuda

Every model takes the same steps in the same run: forward, cross-entropy, backward and AdamW on random images, in bf16
autocast on a GPU and fp32 on a CPU, weights of convolutions in channels_last (model.channels_last of `mirrorla fit`);
then the forward alone, in eval mode, ours with their static mirrors folded, on the same batch. Batches shrink with the
area of the images, and by half again where memory does not suffice. A model of ours may name its attention after a
colon: one kind for all stages, or hybrid, which is mirror in the first two and softmax in the last two. Then one layer
of each stage of mirrorla_tiny trains on growing numbers of tokens, mirror beside softmax.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from benchmarks.common import RESULTS, chosen_device, measure, provenance, quantiles_ms, write_csv
from benchmarks.overtaking import crossings, measure_layers
from benchmarks.timing import MIB, peak_mib
from mirrorla.attention import folded_copy
from mirrorla.complexity import count_gmacs, count_parameters
from mirrorla.feature_maps import KINDS

OURS = ("mirrorla_tiny", "mirrorla_tiny:hybrid", "mirrorla_small", "mirrorla_small:hybrid")
PEERS = ("pvt_v2_b1", "pvt_v2_b2", "swin_tiny_patch4_window7_224", "deit_small_patch16_224", "convnext_tiny")
HYBRID = ("mirror", "mirror", "softmax", "softmax")
SIZES = "224,512,800x1344"
BATCH_224 = {"cuda": 128, "cpu": 2}
STEPS = (("training", "images_per_s", "peak_mib"), ("inference", "inference_images_per_s", "inference_peak_mib"))
"""What the steps do, and its columns in the CSV."""
Row = dict[str, str]
Rows = Sequence[Mapping[str, str]]
Size = tuple[int, int]
"""Height and width in pixels."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the CSVs and the plot, print the tables.

    Args:
        arguments: command line; None takes the process's.

    Returns:
        The exit code.
    """
    options = parser().parse_args(arguments)
    device = chosen_device(options.device)
    points = list(itertools.product(options.sizes, options.models))
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


def model_names(text: str) -> list[str]:
    """Names by commas, from a command line.

    Raises:
        ArgumentTypeError: a name that timm does not know, or an attention that is none.
    """
    for one in (names := text.split(",")):
        name, colon, attention = one.partition(":")
        if not timm.is_model(name):
            raise argparse.ArgumentTypeError(f"{name!r} is no model of timm or of ours; see mirrorla models")
        if colon and (not name.startswith("mirrorla") or attention not in (*KINDS, "hybrid")):
            raise argparse.ArgumentTypeError(f"{one!r}: ours alone take an attention: {', '.join(KINDS)} or hybrid")
    return names


def image_sizes(text: str) -> list[Size]:
    """Sides of squares, or heights and widths, by commas, from a command line.

    Raises:
        ArgumentTypeError: anything else.
    """
    found = [re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", word) for word in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} must be sides in pixels by commas, such as 224,800x1344")
    return [(int(one[1]), int(one[2] or one[1])) for one in found if one]


def size_name(size: Size) -> str:
    """A size as `image_sizes` reads it: 224 or 800x1344."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def shown(size: str) -> str:
    """A size's name for readers: 224² or 800x1344."""
    return size if "x" in size else f"{size}²"


def measure_model(name: str, size: Size, device: torch.device, budget_s: float) -> Row:
    """Train one model on random images for a while, then let it infer.

    Args:
        name: of a timm model; ours are registered there.
        size: of the images.
        device: where to.
        budget_s: seconds of steps, half of them training.

    Returns:
        CSV columns; empty times and a note where not even one image fits.
    """
    head = {
        "model": name,
        "size": size_name(size),
        "precision": "bf16 autocast" if device.type == "cuda" else "float32",
    }
    batch = max(1, BATCH_224[device.type] * 224**2 // (size[0] * size[1]))
    while batch:
        try:
            return {**head, **_measured(name, size, batch, device, budget_s / 2), "note": ""}
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            batch //= 2
    return {**head, **dict.fromkeys(_COLUMNS, ""), "note": "out of memory"}


def _measured(name: str, size: Size, batch: int, device: torch.device, budget_s: float) -> Row:
    torch.manual_seed(0)
    model = build(name, size).to(memory_format=torch.channels_last).to(device).train()
    images = torch.randn(batch, 3, *size, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits: torch.Tensor = model(images)
            return logits

    def train() -> None:
        nn.functional.cross_entropy(forward(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def infer() -> None:
        with torch.inference_mode():
            forward()

    weights = sum(x.numel() * x.element_size() for x in model.parameters()) / MIB
    row = {
        "batch": str(batch),
        "params_m": f"{count_parameters(model) / 1e6:.2f}",
        "gmacs": f"{count_gmacs(model, size):.2f}",
    }
    train()  # the optimizer's state is there before memory is weighed
    row |= _timed("", train, batch, 3 * weights, device, budget_s)  # weights and AdamW's two moments
    model.eval()
    if name.startswith("mirrorla"):
        model = folded_copy(model)
    return row | _timed("inference_", infer, batch, weights, device, budget_s)


def _timed(
    prefix: str, run: Callable[[], None], batch: int, held_mib: float, device: torch.device, budget_s: float
) -> Row:
    """Rate, peak memory and quantiles of one kind of step; `held_mib` is there before and after it."""
    peak = peak_mib(run, device)
    seconds = measure(run, device, budget_s=budget_s)
    quantiles = quantiles_ms(seconds)
    found = {
        "images_per_s": f"{batch / float(quantiles['p50_ms']) * 1e3:.2f}",
        "peak_mib": f"{peak + held_mib:.0f}",
        "repeats": str(len(seconds)),
        **quantiles,
    }
    return {f"{prefix}{column}": value for column, value in found.items()}


def build(name: str, size: Size) -> nn.Module:
    """A model for images of one size: those with position tables or windows are told it.

    Args:
        name: of a timm model; after a colon the attention of one of ours.
        size: of the images.
    """
    name, _, attention = name.partition(":")
    if attention:
        return timm.create_model(name, attention=HYBRID if attention == "hybrid" else attention)
    if name.startswith(("swin", "deit", "vit")):
        return timm.create_model(name, img_size=size)
    return timm.create_model(name)


def table(rows: Sequence[Row]) -> str:
    """The models as text, one a line.

    Args:
        rows: of `measure_model`.
    """
    heads = ("model", "size", "batch", "params M", "GMACs", "train img/s", "MiB", "infer img/s", "MiB", "")
    columns = [
        "model",
        "size",
        "batch",
        "params_m",
        "gmacs",
        *(column for kind in STEPS for column in kind[1:]),
        "note",
    ]
    cells = [heads, *([row[column] for column in columns] for row in rows)]
    lines = [f"{first:30} {' '.join(f'{cell:>11}' for cell in rest)}".rstrip() for first, *rest in cells]
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

    figure, (*bars, right) = plt.subplots(1, 3, figsize=(18, 5), constrained_layout=True)
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    names = list(dict.fromkeys(row["model"] for row in rows))
    for axes, (kind, rate, _) in zip(bars, STEPS, strict=True):
        for place, name in enumerate(names):
            found = {row["size"]: float(row[rate]) for row in rows if row["model"] == name and row[rate]}
            positions = [sizes.index(size) + 0.8 * (place / len(names) - 0.5) for size in found]
            axes.bar(positions, list(found.values()), 0.8 / len(names), label=name)
        axes.set(
            yscale="log",
            ylabel=f"{kind} images/s",
            xticks=range(len(sizes)),
            xticklabels=[shown(size) for size in sizes],
        )
    bars[0].legend(fontsize="small")
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
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    made.add_argument(
        "--models",
        type=model_names,
        default=",".join((*OURS, *PEERS)),
        help="timm names, by commas, ours with :ATTENTION if not mirror (default: %(default)s)",
    )
    made.add_argument(
        "--sizes", type=image_sizes, default=SIZES, help="sides of the images, or HxW (default: %(default)s)"
    )
    made.add_argument("--budget_s", type=float, default=8.0, help="seconds of steps for each model (default: 8)")
    made.add_argument("--out", type=Path, help="CSV file (default: in benchmarks/results/), the plot beside it")
    return made


_STEP = ("images_per_s", "peak_mib", "repeats", "p20_ms", "p50_ms", "p80_ms")
_COLUMNS = ("batch", "params_m", "gmacs", *_STEP, *(f"inference_{column}" for column in _STEP))


if __name__ == "__main__":
    sys.exit(main())
