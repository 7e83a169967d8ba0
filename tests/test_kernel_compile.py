"""Ahead-of-time compilation of the shipped kernels: no GPU, in a process without the interpreter."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kernel_resources
from benchmarks.common import RESULTS
from mirrorla.kernels import tiles

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = RESULTS / "kernel_resources.csv"
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
SPILL_LIMIT = {"bf16": 0, "fp16": 48, "fp32": 8}
"""Bytes a thread: with a few, kernels still read and write their tensors once, and PyTorch does it several times."""
EVERYTHING = (
    kernel_resources.ARCHITECTURES,
    tuple(kernel_resources.DTYPES),
    kernel_resources.WIDTHS,
    tiles.REGIMES,
    ("plain", "all"),
)


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def table(folder, *arguments):
    """Rows of `benchmarks.kernel_resources` for some configurations."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--output", str(folder / "rows.csv"), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr[-3000:]
    return read(folder / "rows.csv")


def check(rows):
    for row in rows:
        name = " ".join(row[key] for key in ("kernel", "arch", "dtype", "width", "regime", "options"))
        assert int(row["shared_bytes"]) <= SHARED_LIMIT[row["arch"]], name
        assert row["kernel"] == "sum_parts" or row["matrix_instruction"] != "none", name
        assert int(row["spill_bytes"]) <= SPILL_LIMIT[row["dtype"]], name


def shipped(chosen):
    """Every kernel of some cases with how it is cut, as the table's columns."""
    return {
        (
            *(f"sm_{case.arch}", case.dtype, str(case.width), case.regime, case.options),
            kernel_resources.kernel_name(item),
            *(str(item.arguments.get(key, other)) for key, other in kernel_resources.CUT.values()),
        )
        for case in chosen
        for item in kernel_resources.launches(case)
    }


def test_the_committed_table_lists_every_shipped_kernel_as_it_is_cut_today_within_its_limits():
    rows = read(COMMITTED)
    columns = ("arch", "dtype", "width", "regime", "options", "kernel", *kernel_resources.CUT)
    assert {tuple(row[column] for column in columns) for row in rows} == shipped(kernel_resources.cases(*EVERYTHING))
    check(rows)


def test_heads_that_the_kernels_refuse_are_no_cases():
    cases = kernel_resources.cases((80, 90), ("fp32", "bf16"), (64, 128), ("head",), ("plain",))
    served = {(c.arch, c.dtype, c.width) for c in cases}
    assert (80, "bf16", 128) in served and (90, "fp32", 64) in served and (80, "fp32", 64) in served
    assert (80, "fp32", 128) not in served and (90, "fp32", 128) not in served


SAMPLES = [("80", "split", "all", "64"), ("90", "head", "plain", "64"), ("100", "chip", "plain", "32")]


@pytest.mark.slow
@pytest.mark.parametrize("arch,regime,options,width", SAMPLES)
def test_bf16_kernels_compile_without_spills_into_matrix_instructions(arch, regime, options, width, tmp_path):
    arguments = ("--dtype", "bf16", "--arch", arch, "--regime", regime, "--options", options, "--width", width)
    rows = table(tmp_path, *arguments, "--jobs", "1")
    kernels = {"head": {"attend"}, "split": {"state", "key_backward"}, "chip": {"attend", "attend_backward"}}
    assert {row["kernel"] for row in rows} >= kernels[regime]
    check(rows)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_shipped_configuration_compiles_within_its_architecture(tmp_path):
    check(table(tmp_path))
