"""Attention kernels and layers beside their rivals, behind a correctness gate; or one layer over the number of tokens.

    mirrorla bench attention --device cuda
    mirrorla bench attention --over tokens

Over shapes, every implementation is first held to the float64 reference, values and gradients, on the device: one of
ours that fails ends the run with exit code 1 before anything is timed. Forward, backward and both are then timed cold
(median of calls, the cache cleared before each) and, on a GPU, replayed from a CUDA graph over inputs that together
exceed the L2 cache twice. Beside every time stands its share of the memory traffic that a copy reaches in the same run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.common import RESULTS, chosen_device, numbers

BUDGET_S = {"cpu": 2.0, "cuda": 0.2}
TOKENS = "256,1024,4096,16384,65536"


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the CSV and the plot, print the table.

    Args:
        arguments: command line; None takes the process's.

    Returns:
        0, or 1 when the correctness gate is red.

    Raises:
        UsageError: no such device or shape.
    """
    options = parser().parse_args(arguments)
    device = chosen_device(options.device)
    budget_s = options.budget_s or BUDGET_S[device.type]
    if options.over == "tokens":
        from benchmarks import attention_tokens

        out = options.out or RESULTS / f"attention_{device.type}.csv"
        attention_tokens.run(device, options.tokens, budget_s, out)
        return 0
    from benchmarks import attention_shapes

    out = options.out or RESULTS / f"attention_kernels_{device.type}.csv"
    return attention_shapes.run(device, budget_s, out, [name for name in options.only.split(",") if name])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu, with fewer shapes")
    made.add_argument("--over", choices=("shapes", "tokens"), default="shapes", help="default: shapes")
    made.add_argument("--only", metavar="CASES", default="", help="shapes of the table by commas, for example S1,HR")
    made.add_argument("--tokens", default=TOKENS, type=numbers, help="with --over tokens: numbers of tokens, by commas")
    made.add_argument("--budget_s", type=float, help="seconds of repetitions for each point (default: 2; cuda: 0.2)")
    made.add_argument("--out", type=Path, help="CSV file (default: in benchmarks/results/), the plot beside it")
    return made


if __name__ == "__main__":
    sys.exit(main())
