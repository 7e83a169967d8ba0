"""Where a training step's time goes, backbone beside backbone: `python -m benchmarks.backbone_profile`.

Self time of torch's operators in forward, backward and AdamW step on one thread, by kind; fp32 on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from benchmarks.backbone import BATCH_224, build, model_names, shown
from benchmarks.backbone import STEPS as KINDS_OF_STEP
from benchmarks.common import RESULTS, provenance, write_csv
from benchmarks.timing import unheard
from mirrorla.complexity import count_gmacs

MODELS = "mirrorla_small,pvt_v2_b2,swin_tiny_patch4_window7_224,convnext_tiny"
OURS = "mirrorla_small"
LIKE_OURS = ("mirrorla_small:hybrid", "pvt_v2_b2", "swin_tiny_patch4_window7_224", "deit_small_patch16_224")
SIDE = 224
STEPS = 3
KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm"),
    "convolutions": ("convolution", "conv2d"),
    "norms": ("norm",),
    "activations": ("gelu", "silu", "softmax"),
}
"""Kinds of operators by parts of their names, the first that fits; the rest adds, multiplies and copies."""
REST, OPTIMIZER = "adding, multiplying, copying", "AdamW"
Rows = Sequence[Mapping[str, str]]


def kind_of(name: str, parents: Sequence[str]) -> str:
    """The kind of an operator.

    Args:
        name: of the operator, such as aten::addmm.
        parents: names of what called it.
    """
    if any("Optimizer" in parent for parent in (name, *parents)):
        return OPTIMIZER
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), REST)


def shares(name: str, batch: int) -> dict[str, float]:
    """Milliseconds of each kind of operator in one training step.

    Args:
        name: of a model, as `mirrorla bench backbone` takes it.
        batch: images of 224² pixels.
    """
    torch.manual_seed(0)
    model = build(name, (SIDE, SIDE)).to(memory_format=torch.channels_last).train()
    images, labels = torch.randn(batch, 3, SIDE, SIDE), torch.randint(1000, (batch,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with unheard(), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
        for _ in range(STEPS):
            step()
    found: Counter[str] = Counter()
    for event in profile.events() or ():
        found[kind_of(event.name, _parents(event))] += event.self_cpu_time_total
    return {kind: found[kind] / STEPS / 1e3 for kind in (*KINDS, REST, OPTIMIZER)}


def _parents(event: FunctionEvent) -> list[str]:
    names = []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.append(event.name)
    return names


def table(rows: Rows) -> list[str]:
    """Shares of the step's time, one line a model.

    Args:
        rows: of backbone_cpu_profile.csv.

    Returns:
        Markdown lines.
    """
    kinds = (*KINDS, REST, OPTIMIZER)
    lines = [f"| one training step | ms per GMAC | {' | '.join(kinds)} |", "|---" + "|---:" * (len(kinds) + 1) + "|"]
    for row in rows:
        total = sum(float(row[kind]) for kind in kinds)
        per_gmac = total / float(row["gmacs"]) / int(row["batch"])
        lines.append(
            f"| {row['model']} | {per_gmac:.0f} | {' | '.join(f'{float(row[kind]) / total:.0%}' for kind in kinds)} |"
        )
    return lines


def per_gmac_table(rows: Rows) -> list[str]:
    """mirrorla_small's images/s times GMACs over those of others of its size: above 1 its GMACs take less time.

    Args:
        rows: of backbone_cpu.csv.

    Returns:
        Markdown lines; models that are not there are left out, and a dash stands where memory did not suffice.
    """
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    by_place = {(row["model"], row["size"]): row for row in rows}
    at = ", ".join(map(shown, sizes))
    heads = (f"{kind} at {at}" for kind, *_ in KINDS_OF_STEP)
    lines = [f"| {OURS}, throughput per GMAC over | {' | '.join(heads)} |", "|---|---:|---:|"]
    for name in LIKE_OURS:
        pairs = [(by_place.get((OURS, size)), by_place.get((name, size))) for size in sizes]
        if all(ours and peer for ours, peer in pairs):
            cells = (" / ".join(_ratio(ours, peer, rate) for ours, peer in pairs) for _, rate, _ in KINDS_OF_STEP)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _ratio(ours: Mapping[str, str] | None, peer: Mapping[str, str] | None, rate: str) -> str:
    if not (ours and peer and ours[rate] and peer[rate]):
        return "–"
    a, b = (float(row[rate]) * float(row["gmacs"]) for row in (ours, peer))
    return f"{a / b:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Profile the models one after another, write the CSV, print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", type=model_names, default=MODELS, help="timm names, by commas (default: %(default)s)")
    made.add_argument("--out", type=Path, default=RESULTS / "backbone_cpu_profile.csv", help="CSV file")
    args = made.parse_args(argv)
    torch.set_num_threads(1)
    source, batch = provenance(torch.device("cpu")), BATCH_224["cpu"]
    rows = []
    for name in args.models:
        head = {"model": name, "batch": str(batch), "gmacs": f"{count_gmacs(build(name, (SIDE, SIDE)), SIDE):.2f}"}
        rows.append({**head, **{kind: f"{ms:.2f}" for kind, ms in shares(name, batch).items()}, **source})
    write_csv(args.out, rows)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
