"""Ahead-of-time compilation of the shipped kernels: no GPU, in a process without the interpreter."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


def table(folder, *arguments):
    """Rows of `benchmarks.kernel_resources` for some configurations."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--output", str(folder / "rows.csv"), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr[-3000:]
    with (folder / "rows.csv").open() as file:
        return list(csv.DictReader(file))


def check(rows):
    for row in rows:
        name = " ".join(row[key] for key in ("kernel", "arch", "dtype", "width", "regime", "options"))
        assert int(row["shared_bytes"]) <= SHARED_LIMIT[row["arch"]], name
        assert row["kernel"] == "sum_parts" or row["matrix_instruction"] != "none", name
        assert int(row["spill_bytes"]) == 0 or may_spill(row), name


def may_spill(row):
    """What is known and stands in the kernels' README: wide heads on Ampere, and a little in fp16 and fp32."""
    if row["arch"] == "sm_80" and (row["width"] == "128" or (row["width"] == "64" and row["options"] == "all")):
        return True
    return row["dtype"] != "bf16" and int(row["spill_bytes"]) <= (400 if row["width"] == "128" else 64)


SAMPLES = [("90", "head", "plain", "64"), ("90", "split", "all", "32"), ("100", "chip", "plain", "32")]


@pytest.mark.slow
@pytest.mark.parametrize("arch,regime,options,width", SAMPLES)
def test_bf16_kernels_compile_without_spills_into_matrix_instructions(arch, regime, options, width, tmp_path):
    arguments = ("--dtype", "bf16", "--arch", arch, "--regime", regime, "--options", options, "--width", width)
    rows = table(tmp_path, *arguments, "--jobs", "1")
    assert {row["kernel"] for row in rows} >= {"head": {"attend"}, "split": {"state", "key_backward"}}.get(
        regime, set()
    )
    check(rows)
    assert all(row["spill_bytes"] == "0" for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_shipped_configuration_compiles_within_its_architecture(tmp_path):
    check(table(tmp_path))
