"""Forward of mirrored linear attention in Triton.

Shapes: B images, N queries, M keys, H heads, dk (even) and dv channels, J = dk/2 blocks. The README beside this file
derives the equations and counts the traffic; `mirrorla.kernels.reference` is the twin.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mirrorla.kernels import launch, tiles
from mirrorla.kernels.mapping import key_count, load_mirror, load_vector, placed, store_vector
from mirrorla.kernels.states import load_state, scaled, store_state
from mirrorla.kernels.walks import read_state, sum_keys


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mirror_cos: Tensor | None,
    mirror_sin: Tensor | None,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    mask: Tensor | None,
    power: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend.

    Args:
        q: queries (B, N, H, dk), fp32, bf16 or fp16, any strides with unit last stride; k and v likewise.
        k: keys (B, M, H, dk).
        v: values (B, M, H, dv).
        mirror_cos: cos 2t of the mirrors (B or 1, H, J), fp32, or None.
        mirror_sin: sin 2t of the mirrors.
        q_cos: rotary table of the queries (N, J), fp32, or None.
        q_sin: its sine.
        k_cos: rotary table of the keys (M, J), fp32, or None.
        k_sin: its sine.
        mask: True for the keys that count (B, M), or None.
        power: exponent of the map.
        eps: added to the denominator.

    Returns:
        out (B, N, H, dv), S (B, H, dk, dv) fp32 and s (B, H, dk) fp32; S and s are empty where backward computes them
        again.
    """
    (B, N, H, dk), M, dv = q.shape, k.shape[1], v.shape[-1]
    layout = tiles.regime(B, N, M, H, launch.sm_count(q.device))
    if layout == "split":
        S, s = state(k, v, mirror_cos, mirror_sin, k_cos, k_sin, mask, power)
        return apply(q, S, s, mirror_cos, mirror_sin, q_cos, q_sin, power, eps), S, s
    keep, tile = layout == "head", launch.tile_of("forward", q, dv, mirror_cos, q_cos, k_cos, power=power)
    out = launch.empty(B, N, H, dv, like=q)
    S = launch.empty(*((B, H, dk, dv) if keep else (0,)), like=q, dtype=launch.STATE)
    s = launch.empty(*((B, H, dk) if keep else (0,)), like=q, dtype=launch.STATE)
    attend_kernel[(B * H,)](
        **{**launch.rows("q", q), **launch.rows("k", k), **launch.rows("v", v), "out": out, "state": S, "mean": s},
        **{**launch.mirror_tables(mirror_cos, mirror_sin), **launch.key_mask(mask), **launch.exponent(power)},
        **{**launch.rope_tables("q", q_cos, q_sin), **launch.rope_tables("k", k_cos, k_sin), "eps": float(eps)},
        **{"N": N, "M": M, "H": H, "KEEP": keep, **launch.sizes(tile, q.dtype, dk, dv)},
    )
    return out, S, s


def state(
    k: Tensor,
    v: Tensor,
    mirror_cos: Tensor | None,
    mirror_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    mask: Tensor | None,
    power: float,
) -> tuple[Tensor, Tensor]:
    """Summarise keys and values in at most two launches; arguments as in `forward`.

    Returns:
        S (B, H, dk, dv) and s (B, H, dk), fp32 means over the keys that count.
    """
    (B, M, H, dk), dv = k.shape, v.shape[-1]
    tile = launch.tile_of("forward", k, dv, mirror_cos, k_cos, power=power)
    cut = launch.cut(tile, k, dv, leaves_state=True)
    states = launch.empty(B, H, cut.parts, dk, dv, like=k, dtype=launch.STATE)
    means = launch.empty(B, H, cut.parts, dk, like=k, dtype=launch.STATE)
    state_kernel[(B * H * cut.parts,)](
        **{**launch.rows("k", k), **launch.rows("v", v), "states": states, "means": means},
        **{**launch.mirror_tables(mirror_cos, mirror_sin), **launch.rope_tables("k", k_cos, k_sin)},
        **{**launch.key_mask(mask), **launch.exponent(power), **launch.sizes(tile, k.dtype, dk, dv)},
        **{**cut.arguments(H), "M": M, "SCALED": cut.parts == 1},
    )
    return launch.sum_parts(states, means, mask, M, scaled=True)


def apply(
    q: Tensor,
    S: Tensor,
    s: Tensor,
    mirror_cos: Tensor | None,
    mirror_sin: Tensor | None,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    power: float,
    eps: float,
) -> Tensor:
    """Read a state with queries in one launch; arguments as in `forward`.

    Returns:
        (B, N, H, dv) in q's dtype.
    """
    (B, N, H, dk), dv = q.shape, S.shape[-1]
    tile = launch.tile_of("forward", q, dv, mirror_cos, q_cos, power=power)
    cut = launch.cut(tile, q, dv, leaves_state=False)
    out = launch.empty(B, N, H, dv, like=q)
    apply_kernel[(B * H * cut.parts,)](
        **{**launch.rows("q", q), "out": out, "state": S.contiguous(), "mean": s.contiguous()},
        **{**launch.mirror_tables(mirror_cos, mirror_sin), **launch.rope_tables("q", q_cos, q_sin)},
        **{**launch.exponent(power), **launch.sizes(tile, q.dtype, dk, dv)},
        **{**cut.arguments(H), "N": N, "eps": float(eps)},
    )
    return out


@triton.jit(do_not_specialize=["mirror_b", "mask_b", "N", "M", "H"])
def attend_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    state: tl.tensor,
    mean: tl.tensor,
    mirror_cos: tl.tensor,
    mirror_sin: tl.tensor,
    q_cos: tl.tensor,
    q_sin: tl.tensor,
    k_cos: tl.tensor,
    k_sin: tl.tensor,
    mask: tl.tensor,
    q_b: tl.tensor,
    q_n: tl.tensor,
    q_h: tl.tensor,
    k_b: tl.tensor,
    k_n: tl.tensor,
    k_h: tl.tensor,
    v_b: tl.tensor,
    v_n: tl.tensor,
    v_h: tl.tensor,
    mirror_b: tl.tensor,
    mask_b: tl.tensor,
    N: tl.tensor,
    M: tl.tensor,
    H: tl.tensor,
    power: tl.tensor,
    eps: tl.tensor,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    PARTS: tl.constexpr,
    KEEP: tl.constexpr,
) -> None:
    """One program per head walks its keys, then its queries."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    mirror = load_mirror(mirror_cos, mirror_sin, b * mirror_b + h * (DK // 2), DK // 2, BLOCK_DK // 2)
    keys = (k + b * k_b + h * k_h, k_n, v + b * v_b + h * v_h, v_n)
    total, key_sum = sum_keys(
        *keys,
        *mirror,
        *(k_cos, k_sin, mask, b * mask_b, 0, M, power),
        *(DK, DV, BLOCK_DK, BLOCK_DV, BLOCK, POWER, PARTS, mirror_cos is not None),
    )
    scale = 1.0 / key_count(mask, b * mask_b, M)
    total, key_sum = scaled(total, scale), key_sum * scale
    if KEEP:
        store_state(state + head * (DK * DV), total, DK, DV, BLOCK_DK, BLOCK_DV)
        store_vector(mean + head * DK, key_sum, DK, BLOCK_DK)
    queries = (q + b * q_b + h * q_h, q_n, out + (b * N * H + h) * DV, H * DV)
    read_state(
        *queries,
        *(total, key_sum),
        *mirror,
        *(q_cos, q_sin, 0, N, power, eps),
        *(DK, DV, BLOCK_DK, BLOCK_DV, BLOCK, POWER, PARTS, mirror_cos is not None),
    )


@triton.jit(do_not_specialize=["mirror_b", "mask_b", "M", "H", "parts", "chunk"])
def state_kernel(
    k: tl.tensor,
    v: tl.tensor,
    states: tl.tensor,
    means: tl.tensor,
    mirror_cos: tl.tensor,
    mirror_sin: tl.tensor,
    k_cos: tl.tensor,
    k_sin: tl.tensor,
    mask: tl.tensor,
    k_b: tl.tensor,
    k_n: tl.tensor,
    k_h: tl.tensor,
    v_b: tl.tensor,
    v_n: tl.tensor,
    v_h: tl.tensor,
    mirror_b: tl.tensor,
    mask_b: tl.tensor,
    M: tl.tensor,
    H: tl.tensor,
    parts: tl.tensor,
    chunk: tl.tensor,
    power: tl.tensor,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    """One program per head and part of the keys; SCALED where a head has one part."""
    b, h, part = placed(tl.program_id(0), H, parts)
    mirror = load_mirror(mirror_cos, mirror_sin, b * mirror_b + h * (DK // 2), DK // 2, BLOCK_DK // 2)
    keys = (k + b * k_b + h * k_h, k_n, v + b * v_b + h * v_h, v_n)
    span = (part * chunk, tl.minimum((part + 1) * chunk, M), power)
    total, key_sum = sum_keys(
        *keys,
        *mirror,
        *(k_cos, k_sin, mask, b * mask_b),
        *span,
        *(DK, DV, BLOCK_DK, BLOCK_DV, BLOCK, POWER, PARTS, mirror_cos is not None),
    )
    if SCALED:
        scale = 1.0 / key_count(mask, b * mask_b, M)
        total, key_sum = scaled(total, scale), key_sum * scale
    index = (b * H + h) * parts + part
    store_state(states + index * (DK * DV), total, DK, DV, BLOCK_DK, BLOCK_DV)
    store_vector(means + index * DK, key_sum, DK, BLOCK_DK)


@triton.jit(do_not_specialize=["mirror_b", "N", "H", "parts", "chunk"])
def apply_kernel(
    q: tl.tensor,
    out: tl.tensor,
    state: tl.tensor,
    mean: tl.tensor,
    mirror_cos: tl.tensor,
    mirror_sin: tl.tensor,
    q_cos: tl.tensor,
    q_sin: tl.tensor,
    q_b: tl.tensor,
    q_n: tl.tensor,
    q_h: tl.tensor,
    mirror_b: tl.tensor,
    N: tl.tensor,
    H: tl.tensor,
    parts: tl.tensor,
    chunk: tl.tensor,
    power: tl.tensor,
    eps: tl.tensor,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """One program per head and part of the queries."""
    b, h, part = placed(tl.program_id(0), H, parts)
    mirror = load_mirror(mirror_cos, mirror_sin, b * mirror_b + h * (DK // 2), DK // 2, BLOCK_DK // 2)
    total = load_state(state + (b * H + h) * (DK * DV), DK, DV, BLOCK_DK, BLOCK_DV)
    key_mean = load_vector(mean + (b * H + h) * DK, DK, BLOCK_DK)
    queries = (q + b * q_b + h * q_h, q_n, out + (b * N * H + h) * DV, H * DV)
    span = (part * chunk, tl.minimum((part + 1) * chunk, N), power, eps)
    read_state(
        *queries,
        *(total, key_mean),
        *mirror,
        *(q_cos, q_sin),
        *span,
        *(DK, DV, BLOCK_DK, BLOCK_DV, BLOCK, POWER, PARTS, mirror_cos is not None),
    )
