"""Peak memory of a detector's training step on one image of 800x1344 pixels: strictly linear beside softmax.

    python -m benchmarks.detection_memory [--device cpu] [--size 800x1344]

RetinaNet and Mask R-CNN over mirrorla_tiny, as configured for COCO, once with mirror attention in all stages and once
with softmax in stages 3 and 4, the layout of this family's siblings. Every point is forward and backward in fp32 in a
process of its own; its peak is the process's highest memory above the one before the step, parameters excluded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.common import RESULTS, provenance, write_csv
from lightning_modules.backbone import BackboneConfig, build_dense
from lightning_modules.callbacks.throughput import peak_memory_gib
from mirrorla.heads.detection import DetectorConfig, build_detector

LAYOUTS: dict[str, str | list[str]] = {
    "linear": "mirror",
    "hybrid": ["mirror", "mirror", "softmax", "softmax"],
}
KINDS = ("none", "retinanet", "mask_rcnn")
OBJECTS = 8


def main(arguments: list[str] | None = None) -> int:
    """Measure every point, write the CSV, print the table.

    Args:
        arguments: command line; None takes the process's.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    if options.point:
        print(json.dumps(measure_point(json.loads(options.point))))
        return 0
    device = torch.device(options.device)
    points = [
        {"device": options.device, "name": options.name, "detector": kind, "layout": layout, "size": options.size}
        for kind, layout in itertools.product(KINDS, LAYOUTS)
    ]
    rows = [{**_run_point(point), **provenance(device)} for point in track(points, description="detection memory")]
    path = options.out or RESULTS / "detection_memory.csv"
    write_csv(path, rows)
    print(table(rows))
    print(f"written: {path}")
    return 0


def measure_point(point: dict[str, str]) -> dict[str, str]:
    """Train one step in this process.

    Args:
        point: device, name of the backbone, detector ("none" is the backbone alone), layout, size as HEIGHTxWIDTH.

    Returns:
        CSV columns: the point, parameters, peak MiB above the memory before the step.
    """
    device, kind = torch.device(point["device"]), point["detector"]
    height, width = (int(side) for side in point["size"].split("x"))
    torch.manual_seed(0)
    config = DetectorConfig("retinanet" if kind == "retinanet" else "mask_rcnn")
    backbone = build_dense(BackboneConfig(point["name"], attention=LAYOUTS[point["layout"]]), config.strides, 0)
    network = (backbone if kind == "none" else build_detector(backbone, 80, config)).to(device).train()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)  # counted with the parameters, before the step
    _step(network, kind, (128, 128), device)  # libraries allocate their own workspaces
    before_gib = peak_memory_gib()
    _step(network, kind, (height, width), device)
    return {
        "backbone": point["name"],
        "detector": kind,
        "layout": point["layout"],
        "size": point["size"],
        "parameters_m": f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}",
        "peak_mib": f"{1024 * (peak_memory_gib() - before_gib):.0f}",
    }


def table(rows: list[dict[str, str]]) -> str:
    """The points as text.

    Args:
        rows: CSV rows in the order of `main`.

    Returns:
        One line a point: detector, layout, parameters, peak memory.
    """
    lines = [f"{'detector':10} {'layout':7} {'params M':>8} {'peak MiB':>9}"]
    lines += [f"{row['detector']:10} {row['layout']:7} {row['parameters_m']:>8} {row['peak_mib']:>9}" for row in rows]
    return "\n".join(lines)


def _step(network: torch.nn.Module, kind: str, size: tuple[int, int], device: torch.device) -> None:
    image = torch.randn(3, *size, device=device)
    if kind == "none":
        torch.stack([x.square().mean() for x in network(image[None])]).sum().backward()
        return
    corners = torch.rand(OBJECTS, 2, device=device) * (torch.tensor(size[::-1], device=device) - 64)
    target = {
        "boxes": torch.cat([corners, corners + 64], 1),
        "labels": torch.arange(1, OBJECTS + 1, device=device),
        "masks": torch.ones(OBJECTS, *size, dtype=torch.bool, device=device),
    }
    torch.stack(list(network([image], [target]).values())).sum().backward()


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection_memory", description=summary)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--name", default="mirrorla_tiny", help="the backbone")
    parser.add_argument("--size", default="800x1344", help="height x width of the image")
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/results/detection_memory.csv)")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    return parser


def _run_point(point: dict[str, str]) -> dict[str, str]:
    command = [sys.executable, "-m", "benchmarks.detection_memory", "--point", json.dumps(point)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{point}: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    row: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    sys.exit(main())
