"""Writes README.md's measured tables and draws its figures from results/*.csv; a test holds them together.

make results
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import (
    attention_shapes,
    attention_tokens,
    backbone,
    backbone_profile,
    diagnostics_tokens,
    loader,
    maps,
    overtaking,
)
from benchmarks.common import RESULTS

README = Path(__file__).resolve().parent.parent / "README.md"
Rows = Sequence[Mapping[str, str]]


def attention_table(rows: Rows) -> list[str]:
    """Median time and peak memory of one layer over N, mirror beside softmax.

    Args:
        rows: of attention_cpu.csv.

    Returns:
        Markdown lines.
    """
    lines = ["| N | " + " | ".join(f"{d}: mirror | softmax" for d in ("forward", "forward+backward")) + " | peak MiB |"]
    lines.append("|---:" * 6 + "|")
    cells = {(row["direction"], row["kind"], row["N"]): row for row in rows}
    for n in dict.fromkeys(row["N"] for row in rows):
        times = [
            f"{float(cells[direction, kind, n]['p50_ms']):,.1f} ms"
            for direction in ("forward", "forward+backward")
            for kind in ("mirror", "softmax")
        ]
        peaks = [f"{float(cells['forward', kind, n]['peak_mib']):,.0f}" for kind in ("mirror", "softmax")]
        lines.append(f"| {int(n):,} | {' | '.join(times)} | {' / '.join(peaks)} |")
    return [*lines, "", _source("attention_cpu", rows[0])]


def loader_table(rows: Rows) -> list[str]:
    """Samples a second in one process, ours beside the others', stage by stage.

    Args:
        rows: of loader.csv.

    Returns:
        Markdown lines.
    """
    readers = list(dict.fromkeys(row["reader"] for row in rows))
    lines = [f"| up to and with, 0 workers | {' | '.join(readers)} |", "|---" + "|---:" * len(readers) + "|"]
    cells = {(row["stage"], row["reader"]): row for row in rows if row["workers"] == "0"}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        found = [cells.get((stage, reader)) for reader in readers]
        rates = (f"{float(one['samples_per_s']):,.0f}/s" if one else "–" for one in found)
        lines.append(f"| {stage} | {' | '.join(rates)} |")
    return [*lines, "", _source("loader", rows[0])]


def scale_table(rows: Rows) -> list[str]:
    """Index and order at ImageNet's number of samples.

    Args:
        rows: of loader_scale.csv.

    Returns:
        Markdown lines.
    """
    lines = ["| 1.28 M samples, 1281 shards | measured | target |", "|---|---:|---|"]
    lines += [f"| {row['figure']} | {row['value']} {row['unit']} | {row['target']} |" for row in rows]
    return [*lines, "", _source("loader_scale", rows[0])]


def digits_table(rows: Rows) -> list[str]:
    """What the digits' configurations reach, each seed by itself.

    Args:
        rows: of digits.csv.

    Returns:
        Markdown lines.
    """
    lines = ["| configuration | epochs | seeds | score, seed by seed | time |", "|---|---:|---|---|---:|"]
    for config in dict.fromkeys(row["config"] for row in rows):
        found = [row for row in rows if row["config"] == config]
        known = [name for name in _DIGITS_SCORES if found[0][name] != "nan"]
        percent = {name: ", ".join(f"{100 * float(row[name]):.1f}" for row in found) for name in known}
        cells = (f"{_DIGITS_SCORES[name]} {values}" for name, values in percent.items())
        minutes = f"{max(float(row['wall_s']) for row in found) / 60:.1f} min"
        seeds = ", ".join(row["seed"] for row in found)
        lines.append(f"| digits/{config} | {found[0]['epochs']} | {seeds} | {'; '.join(cells)} | {minutes} |")
    return [*lines, "", _source("digits", *rows)]


def checkpoint_table(rows: Rows) -> list[str]:
    """How long a save holds up the training, beside Lightning's.

    Args:
        rows: of checkpoint.csv.

    Returns:
        Markdown lines.
    """
    lines = [
        "| writer | blocked | first save | share at one per 5 minutes | complete after |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        blocked, first, committed = (float(row[name]) for name in ("blocked_s", "blocked_first_s", "committed_s"))
        share = float(row["share_percent"])
        lines.append(f"| {row['writer']} | {blocked:.2f} s | {first:.2f} s | {share:.2f} % | {committed:.1f} s |")
    lost, first, whole = (float(rows[0][name]) for name in ("lost_percent", "restart_s", "restart_with_imports_s"))
    told = (
        f"Slower steps while ours is written behind cost {lost:.1f} % of the time, the above included. A restart takes"
    )
    lines += [
        "",
        told,
        f"{first:.1f} s from the last import to the end of the first new step, {whole:.1f} s with imports.",
    ]
    return [*lines, "", _source("checkpoint", rows[0])]


def kernels_table(rows: Rows) -> list[str]:
    """The operator with mirrors and rotary positions beside its twin and torch's flash kernel, one line a shape.

    Args:
        rows: of attention_kernels_cpu.csv.

    Returns:
        Markdown lines.
    """
    rivals = {"mirrorla mirror rope": "ours", "reference mirror rope": "plain PyTorch", "sdpa flash": "softmax, flash"}
    times = " | ".join(f"{direction}: {' | '.join(rivals.values())}" for direction in ("forward", "both"))
    lines = [f"| shape | B | N | M | H | d | {times} |", "|---" + "|---:" * 11 + "|"]
    cells = {(row["case"], row["implementation"], row["direction"]): row for row in rows if row["level"] == "kernel"}
    for case in dict.fromkeys(row["case"] for row in rows):
        shape = cells[case, "mirrorla mirror rope", "forward"]
        found = [cells[case, rival, direction]["p50_ms"] for direction in ("forward", "both") for rival in rivals]
        shown = (f"{float(ms):,.1f} ms" if ms else "–" for ms in found)
        lines.append(
            f"| {case} | {' | '.join(shape[key] for key in ('B', 'N', 'M', 'H', 'd'))} | {' | '.join(shown)} |"
        )
    return [*lines, "", _source("attention_kernels_cpu", rows[0])]


def backbone_table(rows: Rows) -> list[str]:
    """Throughput of whole backbones beside timm's, size by size; parameters and GMACs at the first size.

    Below it, mirrorla_small per GMAC beside others of its size.

    Args:
        rows: of backbone_cpu.csv.

    Returns:
        Markdown lines.
    """
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    at = ", ".join(map(backbone.shown, sizes))
    heads = [f"{kind} images/s at {at}" for kind, *_ in backbone.STEPS]
    lines = [f"| model | parameters M | GMACs | {' | '.join(heads)} | training peak MiB |", "|---" + "|---:" * 5 + "|"]
    for name in dict.fromkeys(row["model"] for row in rows):
        found = [row for row in rows if row["model"] == name]
        columns = [rate for _, rate, _ in backbone.STEPS] + ["peak_mib"]
        cells = [" / ".join(row[column] or "–" for row in found) for column in columns]
        lines.append(f"| {name} | {found[0]['params_m']} | {found[0]['gmacs']} | {' | '.join(cells)} |")
    lines += ["", *backbone_profile.per_gmac_table(rows)]
    return [*lines, "", _source("backbone_cpu", rows[0])]


def overtaking_table(rows: Rows) -> list[str]:
    """From how many tokens on a mirror layer trains faster than a softmax layer, stage by stage.

    Args:
        rows: of backbone_cpu_overtaking.csv.

    Returns:
        Markdown lines.
    """
    return [*(f"* {line}" for line in overtaking.crossings(rows)), "", _source("backbone_cpu_overtaking", rows[0])]


def evaluation_table(rows: Rows) -> list[str]:
    """How long AP takes, ours beside pycocotools, which gets run-length codes that are already there.

    Args:
        rows: of evaluation.csv.

    Returns:
        Markdown lines.
    """
    lines = ["| | collect | score | peak |", "|---|---:|---:|---:|"]
    for row in rows:
        collected = f"{float(row['collect_s']):.1f} s" if row["collect_s"] else "–"
        score = f"{float(row['score_s']):.1f} s | {float(row['peak_gib']):.1f} GiB"
        lines.append(f"| {row['library']}, {row['kind']} | {collected} | {score} |")
    return [*lines, "", _source("evaluation", rows[0])]


_DIGITS_SCORES = {"top1": "top-1 %", "miou": "mIoU %", "box_ap50": "box AP50 %", "mask_ap50": "mask AP50 %"}

TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "digits": digits_table,
    "attention_cpu": attention_table,
    "attention_kernels_cpu": kernels_table,
    "backbone_cpu": backbone_table,
    "backbone_cpu_overtaking": overtaking_table,
    "backbone_cpu_profile": lambda rows: [*backbone_profile.table(rows), "", _source("backbone_cpu_profile", rows[0])],
    "checkpoint": checkpoint_table,
    "diagnostics_tokens": lambda rows: [*diagnostics_tokens.table(rows), "", _source("diagnostics_tokens", rows[0])],
    "evaluation": evaluation_table,
    "loader": loader_table,
    "loader_scale": scale_table,
    "maps": lambda rows: [*maps.table(rows), "", _source("maps", *rows)],
}

FIGURES: dict[str, Callable[[Rows, Path], None]] = {
    "attention_cpu": attention_tokens.plot,
    "attention_kernels_cpu": attention_shapes.plot,
    "attention_kernels_cuda": attention_shapes.plot,
    "backbone_cpu": lambda rows, path: backbone.plot(rows, _rows("backbone_cpu_overtaking"), path),
    "backbone_cuda": lambda rows, path: backbone.plot(rows, _rows("backbone_cuda_overtaking"), path),
    "diagnostics_tokens": diagnostics_tokens.plot,
    "loader": loader.plot,
}


def filled_in(text: str) -> str:
    """README's text with every table between its two markers made anew.

    Args:
        text: holds `<!-- NAME.csv -->` and `<!-- end -->` around each table.
    """
    for name, render in TABLES.items():
        table = "\n".join(render(_rows(name)))
        marked = rf"(<!-- {name}\.csv -->\n).*?(<!-- end -->)"
        text, count = re.subn(marked, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
        assert count == 1, f"README.md needs one marker for {name}.csv"
    return text


def draw() -> None:
    """Draw every figure anew that has its CSV."""
    for name, plot in FIGURES.items():
        if (source := RESULTS / f"{name}.csv").exists():
            plot(_rows(name), source.with_suffix(".png"))


def main() -> int:
    """Write README.md anew and draw the figures."""
    README.write_text(filled_in(README.read_text()))
    draw()
    return 0


def _rows(name: str) -> Rows:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _source(name: str, *rows: Mapping[str, str]) -> str:
    """Where a table's figures come from; of several rows the last one's machine, and every commit."""
    row, commits = rows[-1], ", ".join(dict.fromkeys(row["commit"] for row in rows if row["commit"]))
    threads = f", {row['threads']} thread{'s' * (row['threads'] != '1')}" if row["threads"] else ""
    where = f"{row['device']}{threads}, torch {row['torch']}, Python {row['python']}, commit {commits}"
    return f"[{name}.csv](benchmarks/results/{name}.csv): {where}."


if __name__ == "__main__":
    sys.exit(main())
