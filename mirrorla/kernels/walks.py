"""Device functions that walk tokens: keys into a state, queries through it, and both ways back.

The state and its gradient are held transposed and cut by value channels; see states.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirrorla.kernels.mapping import (
    load_rope,
    load_rows,
    mirror_gradient,
    product,
    raised,
    rectified,
    reflected,
    split,
    store_columns,
    store_rows,
    through_map,
    transposed,
    turned,
    turned_back,
)
from mirrorla.kernels.states import split_state, zero_state


@triton.jit
def sum_keys(
    k: tl.tensor,
    k_n: tl.tensor,
    v: tl.tensor,
    v_n: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    k_cos: tl.tensor,
    k_sin: tl.tensor,
    mask: tl.tensor,
    mask_row: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    power: tl.tensor,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    PARTS: tl.constexpr,
    MIRROR: tl.constexpr,
) -> tuple[tuple[tl.tensor, ...], tl.tensor]:
    """Unscaled state and key sum (BLOCK_DK,) of the keys first … last."""
    ROPE: tl.constexpr = k_cos is not None
    MAPPED: tl.constexpr = 2 if PARTS == 1 and (MIRROR or ROPE or POWER != 1) else PARTS
    state = zero_state(DV, BLOCK_DK, BLOCK_DV)
    total = tl.zeros((BLOCK, BLOCK_DK), tl.float32)  # its rows are added once, after the loop
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        valid = kept(mask, mask_row, rows, rows < last)
        phi = raised(rectified(load_rows(k, k_n, rows, valid, DK, BLOCK_DK), cos, sin, MIRROR), power, POWER)
        row_cos, row_sin = load_rope(k_cos, k_sin, rows, valid, DK // 2, BLOCK_DK // 2)
        roped = split(turned(phi, row_cos, row_sin, ROPE), MAPPED)
        sums = ()
        for c in tl.static_range(len(state)):
            value = split(load_rows(v + c * BLOCK_DV, v_n, rows, valid, DV - c * BLOCK_DV, BLOCK_DV), PARTS)
            sums += (state[c] + product(*transposed(*value), *roped, PARTS, MAPPED),)  # type: ignore[assignment]
        state = sums
        total += phi
    return state, tl.sum(total, 0)


@triton.jit
def read_state(
    q: tl.tensor,
    q_n: tl.tensor,
    out: tl.tensor,
    out_n: tl.tensor,
    state: tl.tuple,
    mean: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_cos: tl.tensor,
    q_sin: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    power: tl.tensor,
    eps: tl.tensor,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    PARTS: tl.constexpr,
    MIRROR: tl.constexpr,
) -> None:
    """Write the outputs of the queries first … last."""
    ROPE: tl.constexpr = q_cos is not None
    MAPPED: tl.constexpr = 2 if PARTS == 1 and (MIRROR or ROPE or POWER != 1) else PARTS
    FINE: tl.constexpr = 2 if PARTS == 1 else PARTS
    parts = split_state(state, FINE)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        valid = rows < last
        phi = raised(rectified(load_rows(q, q_n, rows, valid, DK, BLOCK_DK), cos, sin, MIRROR), power, POWER)
        row_cos, row_sin = load_rope(q_cos, q_sin, rows, valid, DK // 2, BLOCK_DK // 2)
        roped = transposed(*split(turned(phi, row_cos, row_sin, ROPE), MAPPED))
        z = tl.sum(phi * mean[None, :], 1) + eps
        for c in tl.static_range(len(state)):
            y = product(*parts[c], *roped, FINE, MAPPED) / z[None, :]
            store_columns(out + c * BLOCK_DV, out_n, rows, valid, y, DV - c * BLOCK_DV, BLOCK_DV)


@triton.jit
def query_gradients(
    q: tl.tensor,
    q_n: tl.tensor,
    grad_out: tl.tensor,
    grad_out_n: tl.tensor,
    dq: tl.tensor,
    dq_n: tl.tensor,
    state: tl.tuple,
    mean: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_cos: tl.tensor,
    q_sin: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    power: tl.tensor,
    eps: tl.tensor,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    PARTS: tl.constexpr,
    MIRROR: tl.constexpr,
) -> tuple[tuple[tl.tensor, ...], tl.tensor, tl.tensor, tl.tensor]:
    """Write dq of the queries first … last; return gradients of state, mean and the mirror's tables.

    Wide heads walk the queries twice, for dq and for the state's gradient: together they outgrow the registers.
    """
    ROPE: tl.constexpr = q_cos is not None
    APART: tl.constexpr = BLOCK_DK > 64
    FINE: tl.constexpr = 2 if PARTS == 1 else PARTS
    parts = split_state(state, FINE)
    grad_state = zero_state(DV, BLOCK_DK, BLOCK_DV)
    grad_mean = tl.zeros((BLOCK_DK,), tl.float32)
    grad_cos = tl.zeros((BLOCK_DK // 2,), tl.float32)
    grad_sin = tl.zeros((BLOCK_DK // 2,), tl.float32)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        valid = rows < last
        x = load_rows(q, q_n, rows, valid, DK, BLOCK_DK)
        row_cos, row_sin = load_rope(q_cos, q_sin, rows, valid, DK // 2, BLOCK_DK // 2)
        r = rectified(x, cos, sin, MIRROR)
        phi = raised(r, power, POWER)
        reciprocal = inverse(phi, mean, valid, eps)
        weight = turned(phi, row_cos, row_sin, ROPE) * reciprocal[:, None]
        fine = split(weight, FINE)
        g = tl.zeros((BLOCK, BLOCK_DK), tl.float32)
        sums = ()
        for c in tl.static_range(len(state)):
            dy = load_rows(grad_out + c * BLOCK_DV, grad_out_n, rows, valid, DV - c * BLOCK_DV, BLOCK_DV)
            dy = split(dy, PARTS)
            # g's product comes last: mma.sync lays all products of a loop out by the last one's shape, and g's puts
            # warps side by side over channels where the state's would have all of them work on the same few tokens.
            if not APART:
                sums += (grad_state[c] + product(*transposed(*dy), *fine, PARTS, FINE),)  # type: ignore[assignment]
            g += product(*dy, *parts[c], PARTS, FINE)
        if not APART:
            grad_state = sums
        # Divided by z twice, never by z^2, which overflows at features of 1e12.
        dz = -tl.sum(weight * g, 1) * reciprocal
        grad_mean += tl.sum(dz[:, None] * phi, 0)
        grad = turned_back(g * reciprocal[:, None], row_cos, row_sin, ROPE) + dz[:, None] * mean[None, :]
        grad = through_map(grad, r, power, POWER)
        if MIRROR:
            tile_cos, tile_sin = mirror_gradient(x, grad)
            grad_cos += tile_cos
            grad_sin += tile_sin
        store_rows(dq, dq_n, rows, valid, reflected(grad, cos, sin, MIRROR), DK, BLOCK_DK)
    if APART:
        for start in range(first, last, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            valid = rows < last
            x = load_rows(q, q_n, rows, valid, DK, BLOCK_DK)
            row_cos, row_sin = load_rope(q_cos, q_sin, rows, valid, DK // 2, BLOCK_DK // 2)
            phi = raised(rectified(x, cos, sin, MIRROR), power, POWER)
            weight = turned(phi, row_cos, row_sin, ROPE) * inverse(phi, mean, valid, eps)[:, None]
            fine = split(weight, FINE)
            sums = ()
            for c in tl.static_range(len(state)):
                dy = load_rows(grad_out + c * BLOCK_DV, grad_out_n, rows, valid, DV - c * BLOCK_DV, BLOCK_DV)
                sums += (grad_state[c] + product(*transposed(*split(dy, PARTS)), *fine, PARTS, FINE),)  # type: ignore[assignment]
            grad_state = sums
    return grad_state, grad_mean, grad_cos, grad_sin


@triton.jit
def inverse(phi: tl.tensor, mean: tl.tensor, valid: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """1/z of mapped queries; 1 past the end, where z is 0 with eps = 0."""
    return 1.0 / tl.where(valid, tl.sum(phi * mean[None, :], 1) + eps, 1.0)


@triton.jit
def key_gradients(
    k: tl.tensor,
    k_n: tl.tensor,
    v: tl.tensor,
    v_n: tl.tensor,
    dk: tl.tensor,
    dk_n: tl.tensor,
    dv: tl.tensor,
    dv_n: tl.tensor,
    grad_state: tl.tuple,
    grad_mean: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    k_cos: tl.tensor,
    k_sin: tl.tensor,
    mask: tl.tensor,
    mask_row: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    power: tl.tensor,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    PARTS: tl.constexpr,
    MIRROR: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Write dk and dv of the keys first … last, given gradients already divided by the number of keys."""
    ROPE: tl.constexpr = k_cos is not None
    MAPPED: tl.constexpr = 2 if PARTS == 1 and (MIRROR or ROPE or POWER != 1) else PARTS
    FINE: tl.constexpr = 2 if PARTS == 1 else PARTS
    parts = split_state(grad_state, FINE)
    grad_cos = tl.zeros((BLOCK_DK // 2,), tl.float32)
    grad_sin = tl.zeros((BLOCK_DK // 2,), tl.float32)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        valid = rows < last
        keep = kept(mask, mask_row, rows, valid)
        x = load_rows(k, k_n, rows, keep, DK, BLOCK_DK)
        row_cos, row_sin = load_rope(k_cos, k_sin, rows, keep, DK // 2, BLOCK_DK // 2)
        r = rectified(x, cos, sin, MIRROR)
        roped = transposed(*split(turned(raised(r, power, POWER), row_cos, row_sin, ROPE), MAPPED))
        grad = tl.zeros((BLOCK, BLOCK_DK), tl.float32)
        for c in tl.static_range(len(grad_state)):
            grad_v = product(*parts[c], *roped, FINE, MAPPED)
            store_columns(dv + c * BLOCK_DV, dv_n, rows, valid, grad_v, DV - c * BLOCK_DV, BLOCK_DV)
            value = split(load_rows(v + c * BLOCK_DV, v_n, rows, keep, DV - c * BLOCK_DV, BLOCK_DV), PARTS)
            grad += product(*value, *parts[c], PARTS, FINE)
        grad = turned_back(grad, row_cos, row_sin, ROPE) + grad_mean[None, :]
        grad = through_map(grad, r, power, POWER)
        if MIRROR:
            tile_cos, tile_sin = mirror_gradient(x, grad)
            grad_cos += tile_cos
            grad_sin += tile_sin
        store_rows(dk, dk_n, rows, valid, reflected(grad, cos, sin, MIRROR), DK, BLOCK_DK)
    return grad_cos, grad_sin


@triton.jit
def kept(mask: tl.tensor, mask_row: tl.tensor, rows: tl.tensor, valid: tl.tensor) -> tl.tensor:
    """Which of the valid rows count; the image's mask starts at `mask_row`."""
    if mask is not None:
        valid = valid & (tl.load(mask + mask_row + rows, mask=valid, other=0) != 0)
    return valid
