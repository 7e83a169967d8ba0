"""What every shipped kernel takes of a device, found by compiling ahead of time: no GPU is needed.

    python -m benchmarks.kernel_resources                       the whole table into results/kernel_resources.csv
    python -m benchmarks.kernel_resources --arch 90 --dtype bf16 --width 64 --output /tmp/rows.csv

The arguments are those of real launches: every entry point runs on tensors without data while launches are recorded.
What several cases share is compiled once, and Triton caches it: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.common import RESULTS, provenance, write_csv
from mirrorla.kernels import backward, forward, launch, tiles

ARCHITECTURES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (16, 32, 64, 128)
SHAPES: dict[tiles.Regime, tuple[int, int, int]] = {
    "chip": (32, 12, 196),
    "head": (128, 6, 784),
    "split": (1, 16, 65536),
}
"""(B, H, N) that fall into each regime."""

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
"""What a launch tells the compiler beside its arguments."""

CUT = {"block": ("BLOCK", 0), "warps": ("num_warps", 4), "stages": ("num_stages", 3), "values": ("BLOCK_DV", 0)}
"""Columns that say how a kernel is cut: the argument, and what stands for one that a launch leaves out."""

Row = dict[str, str]


class Case(NamedTuple):
    """One configuration: `options` is "plain" or "all", with mirror, positions, mask and a general power."""

    arch: int
    dtype: str
    width: int
    regime: tiles.Regime
    options: str


class Launch(NamedTuple):
    """A recorded launch."""

    kernel: Any
    arguments: dict[str, Any]


def launches(case: Case) -> list[Launch]:
    """The launches of forward and backward for a case."""
    B, H, N = SHAPES[case.regime]
    d, J = case.width, case.width // 2
    packed = torch.empty(B, N, 4, H, d, dtype=DTYPES[case.dtype], device="meta")
    q, k, v, _ = packed.unbind(2)
    extra: tuple[Any, ...] = (None,) * 7
    if case.options == "all":
        rope = torch.empty(N, J, device="meta")
        mirror = torch.empty(B, H, J, device="meta")
        extra = (mirror, mirror, rope, rope, rope, rope, torch.empty(B, N, dtype=torch.bool, device="meta"))
    extra = (*extra, 1.0 if case.options == "plain" else 1.5, 1e-6)
    recorded: list[Launch] = []
    with _recording(recorded), patch.object(launch, "arch", lambda device: case.arch // 10):
        out, S, s = forward.forward(q, k, v, *extra)
        backward.backward(out, q, k, v, S, s, *extra)
    return recorded


def cases(
    arch: Sequence[int],
    dtype: Sequence[str],
    width: Sequence[int],
    regime: Sequence[tiles.Regime],
    options: Sequence[str],
) -> list[Case]:
    """The configurations among some that the kernels serve."""
    chosen = itertools.starmap(Case, itertools.product(arch, dtype, width, regime, options))
    return [c for c in chosen if tiles.hindrance(divmod(c.arch, 10), DTYPES[c.dtype], c.width, c.width) is None]


def kernel_name(item: Launch) -> str:
    """As the table calls it."""
    return str(item.kernel.__name__).removesuffix("_kernel")


def resources(case: Case, item: Launch) -> Row:
    """Compile one launch for its architecture and read what it takes."""
    compiled = compile_launch(case.arch, item)
    usage = _usage(compiled.asm["cubin"])
    arguments = item.arguments
    numbers = {
        **{column: arguments.get(name, other) for column, (name, other) in CUT.items()},
        "registers": usage["REG"],
        "shared_bytes": compiled.metadata.shared,
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
    }
    return {
        "kernel": kernel_name(item),
        **_columns(case),
        **{name: str(value) for name, value in numbers.items()},
        "matrix_instruction": matrix_instruction(compiled.asm["ptx"]),
    }


def compile_launch(arch: int, item: Launch) -> Any:
    """Triton's compiled kernel of one launch."""
    signature, constants, attributes = _specialised(item)
    source = ASTSource(fn=item.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: item.arguments[name] for name in OPTIONS if name in item.arguments}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def matrix_instruction(ptx: str) -> str:
    """The matrix instructions of a PTX text, "none" without any."""
    found = [name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx]
    return "+".join(name.split(".")[0] for name in found) or "none"


def _specialised(item: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and divisibility, by the rules of Triton's own launcher."""
    signature, constants, attributes = {}, {}, {}
    for parameter in item.kernel.params:
        value = item.arguments[parameter.name]
        fixed = parameter.is_constexpr or value is None
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype)[6:]]
        elif isinstance(value, float) and not fixed:
            signature[parameter.name] = "fp32"
        elif not fixed and (value != 1 or parameter.do_not_specialize):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
        else:
            signature[parameter.name] = "constexpr"
            constants[(parameter.num,)] = value
            continue
        whole = isinstance(value, int) and not parameter.do_not_specialize and value % 16 == 0
        if whole or (isinstance(value, torch.Tensor) and value.storage_offset() * value.itemsize % 16 == 0):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


@contextmanager
def _recording(into: list[Launch]) -> Iterator[None]:
    def run(kernel: Any, *, grid: object, warmup: bool, **arguments: object) -> None:
        into.append(Launch(kernel, arguments))

    with patch.object(JITFunction, "run", run):
        yield


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _identity(case: Case, item: Launch) -> str:
    """The same for launches that are one compiled kernel."""
    options = [item.arguments.get(name) for name in OPTIONS]
    return repr((case.arch, kernel_name(item), *_specialised(item), *options))


def _row(place: tuple[Case, int]) -> Row:
    case, index = place
    return resources(case, launches(case)[index])


def table(chosen: Sequence[Case], jobs: int) -> list[Row]:
    """A row for every case and kernel; prints each as it is compiled."""
    places: dict[tuple[Case, str], int] = {}  # of every row, by case and compiled kernel
    for case in chosen:
        for index, item in enumerate(launches(case)):
            places.setdefault((case, _identity(case, item)), index)
    firsts: dict[str, tuple[Case, int]] = {}  # of every compiled kernel
    for (case, identity), index in places.items():
        firsts.setdefault(identity, (case, index))
    rows: dict[str, Row] = {}
    with ProcessPoolExecutor(jobs) as pool:
        for identity, row in zip(firsts, pool.map(_row, firsts.values()), strict=True):
            rows[identity] = row
            print(f"{len(rows)}/{len(firsts)}", ",".join(row.values()), flush=True)
    return [rows[identity] | _columns(case) for case, identity in places]


def _columns(case: Case) -> Row:
    return {name: str(value) for name, value in case._asdict().items()} | {"arch": f"sm_{case.arch}"}


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    parser.add_argument("--width", type=int, nargs="+", default=WIDTHS, help="channels of a head")
    parser.add_argument("--regime", nargs="+", default=tiles.REGIMES, choices=tiles.REGIMES)
    parser.add_argument("--options", nargs="+", default=("plain", "all"), choices=("plain", "all"))
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernel_resources.csv")
    args = parser.parse_args(argv)
    rows = table(cases(args.arch, args.dtype, args.width, args.regime, args.options), args.jobs)
    origin = {k: v for k, v in provenance(torch.device("cpu")).items() if k not in ("device", "threads")}
    write_csv(args.output, [{**origin, "triton": triton.__version__, **row} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
