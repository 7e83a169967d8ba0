"""The kernels of the backward pass; what they compute stands at the head of backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from mirrorla.kernels.mapping import key_count, load_mirror, load_vector, placed, store_vector
from mirrorla.kernels.states import load_state, scaled, store_state
from mirrorla.kernels.walks import key_gradients, query_gradients, sum_keys


@triton.jit(do_not_specialize=["mirror_b", "mask_b", "N", "M", "H"])
def attend_backward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad_out: tl.tensor,
    state: tl.tensor,
    mean: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    grad_cos: tl.tensor,
    grad_sin: tl.tensor,
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
    grad_out_b: tl.tensor,
    grad_out_n: tl.tensor,
    grad_out_h: tl.tensor,
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
    KEPT: tl.constexpr,
) -> None:
    """One program per head walks its queries, then its keys; before, its keys alone if the state was not KEPT."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    mirror = load_mirror(mirror_cos, mirror_sin, b * mirror_b + h * (DK // 2), DK // 2, BLOCK_DK // 2)
    k, v = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    scale = 1.0 / key_count(mask, b * mask_b, M)
    if KEPT:
        total = load_state(state + head * (DK * DV), DK, DV, BLOCK_DK, BLOCK_DV)
        key_mean = load_vector(mean + head * DK, DK, BLOCK_DK)
    else:
        total, key_sum = sum_keys(
            *(k, k_n, v, v_n),
            *mirror,
            *(k_cos, k_sin, mask, b * mask_b, 0, M, power),
            *(DK, DV, BLOCK_DK, BLOCK_DV, BLOCK, POWER, PARTS, mirror_cos is not None),
        )
        total, key_mean = scaled(total, scale), key_sum * scale
    queries = (q + b * q_b + h * q_h, q_n, grad_out + b * grad_out_b + h * grad_out_h, grad_out_n)
    grads = (dq + (b * N * H + h) * DK, H * DK)
    dS, ds, cos_q, sin_q = query_gradients(
        *queries,
        *grads,
        *(total, key_mean),
        *mirror,
        *(q_cos, q_sin, 0, N, power, eps),
        *(DK, DV, BLOCK_DK, BLOCK_DV, BLOCK, POWER, PARTS, mirror_cos is not None),
    )
    key_grads = (dk + (b * M * H + h) * DK, H * DK, dv + (b * M * H + h) * DV, H * DV)
    cos_k, sin_k = key_gradients(
        *(k, k_n, v, v_n),
        *key_grads,
        *(scaled(dS, scale), ds * scale),
        *mirror,
        *(k_cos, k_sin, mask, b * mask_b, 0, M, power),
        *(DK, DV, BLOCK_DK, BLOCK_DV, BLOCK, POWER, PARTS, mirror_cos is not None),
    )
    if mirror_cos is not None:
        store_vector(grad_cos + head * (DK // 2), cos_q + cos_k, DK // 2, BLOCK_DK // 2)
        store_vector(grad_sin + head * (DK // 2), sin_q + sin_k, DK // 2, BLOCK_DK // 2)


@triton.jit(do_not_specialize=["mirror_b", "mask_b", "N", "M", "H", "parts", "chunk", "mirror_parts"])
def query_backward_kernel(
    q: tl.tensor,
    grad_out: tl.tensor,
    dq: tl.tensor,
    state: tl.tensor,
    mean: tl.tensor,
    states: tl.tensor,
    means: tl.tensor,
    grad_cos: tl.tensor,
    grad_sin: tl.tensor,
    mirror_cos: tl.tensor,
    mirror_sin: tl.tensor,
    q_cos: tl.tensor,
    q_sin: tl.tensor,
    mask: tl.tensor,
    q_b: tl.tensor,
    q_n: tl.tensor,
    q_h: tl.tensor,
    grad_out_b: tl.tensor,
    grad_out_n: tl.tensor,
    grad_out_h: tl.tensor,
    mirror_b: tl.tensor,
    mask_b: tl.tensor,
    N: tl.tensor,
    M: tl.tensor,
    H: tl.tensor,
    parts: tl.tensor,
    chunk: tl.tensor,
    mirror_parts: tl.tensor,
    power: tl.tensor,
    eps: tl.tensor,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    """One program per head and part of the queries; SCALED where a head has one part."""
    b, h, part = placed(tl.program_id(0), H, parts)
    head = b * H + h
    mirror = load_mirror(mirror_cos, mirror_sin, b * mirror_b + h * (DK // 2), DK // 2, BLOCK_DK // 2)
    total = load_state(state + head * (DK * DV), DK, DV, BLOCK_DK, BLOCK_DV)
    key_mean = load_vector(mean + head * DK, DK, BLOCK_DK)
    queries = (q + b * q_b + h * q_h, q_n, grad_out + b * grad_out_b + h * grad_out_h, grad_out_n)
    grads = (dq + (b * N * H + h) * DK, H * DK)
    span = (part * chunk, tl.minimum((part + 1) * chunk, N), power, eps)
    dS, ds, cos_q, sin_q = query_gradients(
        *queries,
        *grads,
        *(total, key_mean),
        *mirror,
        *(q_cos, q_sin),
        *span,
        *(DK, DV, BLOCK_DK, BLOCK_DV, BLOCK, POWER, PARTS, mirror_cos is not None),
    )
    if SCALED:
        scale = 1.0 / key_count(mask, b * mask_b, M)
        dS, ds = scaled(dS, scale), ds * scale
    index = head * parts + part
    store_state(states + index * (DK * DV), dS, DK, DV, BLOCK_DK, BLOCK_DV)
    store_vector(means + index * DK, ds, DK, BLOCK_DK)
    if mirror_cos is not None:
        index = (head * mirror_parts + part) * (DK // 2)
        store_vector(grad_cos + index, cos_q, DK // 2, BLOCK_DK // 2)
        store_vector(grad_sin + index, sin_q, DK // 2, BLOCK_DK // 2)


@triton.jit(do_not_specialize=["mirror_b", "mask_b", "M", "H", "parts", "chunk", "mirror_parts"])
def key_backward_kernel(
    k: tl.tensor,
    v: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    state: tl.tensor,
    mean: tl.tensor,
    grad_cos: tl.tensor,
    grad_sin: tl.tensor,
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
    mirror_parts: tl.tensor,
    power: tl.tensor,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """One program per head and part of the keys; state and mean are gradients over the number of keys."""
    b, h, part = placed(tl.program_id(0), H, parts)
    head = b * H + h
    mirror = load_mirror(mirror_cos, mirror_sin, b * mirror_b + h * (DK // 2), DK // 2, BLOCK_DK // 2)
    dS = load_state(state + head * (DK * DV), DK, DV, BLOCK_DK, BLOCK_DV)
    ds = load_vector(mean + head * DK, DK, BLOCK_DK)
    keys = (k + b * k_b + h * k_h, k_n, v + b * v_b + h * v_h, v_n)
    grads = (dk + (b * M * H + h) * DK, H * DK, dv + (b * M * H + h) * DV, H * DV)
    span = (part * chunk, tl.minimum((part + 1) * chunk, M), power)
    cos_k, sin_k = key_gradients(
        *keys,
        *grads,
        *(dS, ds),
        *mirror,
        *(k_cos, k_sin, mask, b * mask_b),
        *span,
        *(DK, DV, BLOCK_DK, BLOCK_DV, BLOCK, POWER, PARTS, mirror_cos is not None),
    )
    if mirror_cos is not None:
        index = (head * mirror_parts + part) * (DK // 2)
        store_vector(grad_cos + index, cos_k, DK // 2, BLOCK_DK // 2)
        store_vector(grad_sin + index, sin_k, DK // 2, BLOCK_DK // 2)
