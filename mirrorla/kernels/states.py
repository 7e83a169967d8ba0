"""Device functions on states: a tuple of tiles (BLOCK_DV, BLOCK_DK), one for every BLOCK_DV value channels.

Products add to one tile at a time: what they keep in registers grows with it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirrorla.kernels.mapping import split


@triton.jit
def zero_state(DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr) -> tuple[tl.tensor, ...]:
    """A state of zeros: a tile (BLOCK_DV, BLOCK_DK) for every BLOCK_DV value channels."""
    state = ()
    for _ in tl.static_range(0, DV, BLOCK_DV):
        state += (tl.zeros((BLOCK_DV, BLOCK_DK), tl.float32),)  # type: ignore[assignment]
    return state


@triton.jit
def load_state(
    base: tl.tensor, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """A stored (dk, dv) state as tiles (BLOCK_DV, BLOCK_DK)."""
    state = ()
    for first in tl.static_range(0, DV, BLOCK_DV):
        i, j = first + tl.arange(0, BLOCK_DV)[:, None], tl.arange(0, BLOCK_DK)[None, :]
        state += (tl.load(base + j * DV + i, mask=(i < DV) & (j < DK), other=0.0),)  # type: ignore[assignment]
    return state


@triton.jit
def store_state(
    base: tl.tensor,
    state: tl.tuple,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
) -> None:
    """The inverse of `load_state`."""
    for c in tl.static_range(len(state)):
        i, j = c * BLOCK_DV + tl.arange(0, BLOCK_DV)[:, None], tl.arange(0, BLOCK_DK)[None, :]
        tl.store(base + j * DV + i, state[c], mask=(i < DV) & (j < DK))


@triton.jit
def scaled(state: tl.tuple, factor: tl.tensor) -> tuple[tl.tensor, ...]:
    """All tiles of a state times a number."""
    out = ()
    for c in tl.static_range(len(state)):
        out += (state[c] * factor,)  # type: ignore[assignment]
    return out


@triton.jit
def split_state(state: tl.tuple, PARTS: tl.constexpr) -> tuple[tuple[tl.tensor, ...], ...]:
    """`split` of every tile of a state."""
    out = ()
    for c in tl.static_range(len(state)):
        out += (split(state[c], PARTS),)  # type: ignore[assignment]
    return out
