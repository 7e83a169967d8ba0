"""Which kernels run, on which tiles: regimes, parts and the shipped table, all pure functions of shapes.

Nothing is tuned at run time: a shape always runs the same code and gives the same bits.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Regime = Literal["chip", "head", "split"]
Op = Literal["forward", "backward"]

REGIMES: tuple[Regime, ...] = ("chip", "head", "split")

CHIP_TOKENS = 256
"""Up to here the state is recomputed in backward: at 49 tokens it is larger than a tensor."""

WORKSPACE_BYTES = 16 * 2**20
PROGRAMS = 528
"""Programs that a split launch aims at: four on each of the 132 multiprocessors of an H200."""

PART_TOKENS = 256
"""Least tokens of a part: below, loading and storing states outweighs the tokens."""


WIDTHS = range(8, 129)
"""Channels of a head that the kernels serve."""


class Tile(NamedTuple):
    """How a kernel is cut."""

    tokens: int
    warps: int
    stages: int
    """Depth of the software pipeline."""
    values: int = 64
    """Most value channels of a product: their tiles take registers."""


def hindrance(device_capability: tuple[int, int] | None, dtype: torch.dtype, dk: int, dv: int) -> str | None:
    """Why the kernels do not serve a call.

    Args:
        device_capability: of the CUDA device; None stands for Triton's interpreter.
        dtype: of q, k and v.
        dk: channels of a head of q and k.
        dv: channels of a head of v.

    Returns:
        The reason; None where they serve it.
    """
    name = str(dtype).removeprefix("torch.")
    if dk not in WIDTHS or dv not in WIDTHS:
        return f"heads of {dk} and {dv} channels are outside {WIDTHS[0]} to {WIDTHS[-1]}"
    where, major = "Triton's interpreter", 9
    if device_capability is not None:
        major = device_capability[0]
        where = f"compute capability {major}.{device_capability[1]}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or major < 8:
        return f"no kernel serves {name} on {where}"
    if device_capability is not None and dtype == torch.float32 and max(dk, dv) > 64:  # three parts spill
        return f"no kernel serves {name} heads of {max(dk, dv)} channels on {where}"
    return None


def regime(B: int, N: int, M: int, H: int, sm_count: int) -> Regime:
    """How the work of one call is laid out.

    Args:
        B: images.
        N: queries of an image.
        M: keys of an image.
        H: heads.
        sm_count: multiprocessors of the device.

    Returns:
        "chip": one program per head, nothing saved for backward; "head": one program per head, the state saved;
        "split": several programs per head, whose states are added in order.
    """
    if max(N, M) <= CHIP_TOKENS:
        return "chip"
    heads = B * H
    return "head" if heads >= 2 * sm_count else "split"


def part_tokens(heads: int, tokens: int, state_numbers: int, tile_tokens: int) -> int:
    """Tokens of one part of a split pass, the last may be shorter.

    Args:
        heads: B·H.
        tokens: N or M.
        state_numbers: fp32 numbers that one part leaves behind; 0 for a pass that leaves none.
        tile_tokens: tokens of a tile.

    Returns:
        A multiple of `tile_tokens`, >= 1 tile; all parts' numbers fit into the workspace if there is more than one.
    """
    parts = min(-(-PROGRAMS // max(heads, 1)), -(-tokens // PART_TOKENS))
    if state_numbers:
        parts = min(parts, WORKSPACE_BYTES // (4 * state_numbers * max(heads, 1)))
    parts = max(parts, 1)
    return max(-(-tokens // (parts * tile_tokens)), 1) * tile_tokens


def padded(width: int) -> int:
    """The power of two >= 16 that holds a head's channels: the narrowest operand of a matrix instruction."""
    return max(16, 1 << (width - 1).bit_length())


def tile(op: Op, dtype: torch.dtype, dk: int, dv: int, arch: int, *, plain: bool) -> Tile:
    """The shipped tile of a kernel.

    All regimes share it: the pass over the queries, which they share, takes the most registers.

    Args:
        op: which pass.
        dtype: of q, k and v.
        dk: channels of q and k.
        dv: channels of v.
        arch: major compute capability: 8, 9, 10 …
        plain: neither mirror nor positions nor a power, whose tables and derivatives take registers.

    Returns:
        The entry for the wider of dk and dv.
    """
    width = padded(max(dk, dv))
    pair = TABLE[op][dtype][width]
    if arch < 9:
        pair = AMPERE[op][dtype].get(width, pair)
    return pair[0] if plain else pair[1]


_Table = dict[Op, dict[torch.dtype, dict[int, tuple[Tile, Tile]]]]

_FORWARD = {16: (Tile(64, 4, 3),) * 2, 32: (Tile(64, 4, 3),) * 2, 64: (Tile(64, 4, 3),) * 2}

TABLE: _Table = {
    "forward": {
        torch.bfloat16: {**_FORWARD, 128: (Tile(64, 8, 2), Tile(32, 8, 1))},
        torch.float16: {
            16: (Tile(64, 4, 3), Tile(64, 4, 3)),
            32: (Tile(64, 4, 2), Tile(64, 4, 2)),
            64: (Tile(64, 4, 2), Tile(64, 8, 2)),
            128: (Tile(32, 8, 2), Tile(16, 8, 2)),
        },
        torch.float32: {
            16: (Tile(64, 8, 2), Tile(32, 8, 2)),
            32: (Tile(16, 4, 1), Tile(32, 4, 2)),
            64: (Tile(16, 4, 2), Tile(32, 4, 2)),
            128: (Tile(32, 8, 2), Tile(32, 8, 2)),
        },
    },
    "backward": {
        torch.bfloat16: {
            16: (Tile(64, 4, 2), Tile(64, 4, 2)),
            32: (Tile(64, 4, 2), Tile(16, 4, 2)),
            64: (Tile(64, 8, 2), Tile(32, 8, 2)),
            128: (Tile(32, 8, 1), Tile(16, 8, 1, 128)),
        },
        torch.float16: {
            16: (Tile(64, 4, 2), Tile(64, 8, 2)),
            32: (Tile(32, 8, 2), Tile(16, 4, 2)),
            64: (Tile(64, 8, 2), Tile(16, 8, 2)),
            128: (Tile(16, 8, 1, 16), Tile(16, 8, 1, 128)),
        },
        torch.float32: {
            16: (Tile(32, 8, 2), Tile(32, 8, 2)),
            32: (Tile(16, 8, 1), Tile(16, 4, 2)),
            64: (Tile(16, 8, 1), Tile(16, 8, 1)),
            128: (Tile(16, 8, 1), Tile(16, 8, 1)),
        },
    },
}
"""By the padded width: the tile of a plain call and that of one with extras.

Chosen so that the compiler spills nothing in bf16 and next to nothing in fp16 and fp32, on all three architectures
(benchmarks/results/kernel_resources.csv), not by timing: no device has measured them yet.
"""

_SMALL = {64: (Tile(32, 4, 3), Tile(32, 4, 3)), 128: (Tile(16, 8, 2, 32), Tile(16, 8, 2))}
_SMALL_BACKWARD = {64: (Tile(32, 8, 2), Tile(16, 8, 2)), 128: (Tile(16, 8, 1, 32), Tile(16, 8, 1, 32))}

AMPERE: _Table = {
    "forward": {torch.bfloat16: _SMALL, torch.float16: _SMALL, torch.float32: {128: _SMALL[128]}},
    "backward": {
        torch.bfloat16: _SMALL_BACKWARD,
        torch.float16: {**_SMALL_BACKWARD, 128: (Tile(16, 8, 1, 16), Tile(16, 8, 2, 16))},
        torch.float32: {},
    },
}
"""Where compute capability 8 differs: its products hold both operands in registers, newer ones in shared memory."""
