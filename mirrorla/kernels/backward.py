"""Backward of mirrored linear attention in Triton, from q, k, v, the output's gradient and the fp32 state alone.

Shapes as in forward.py. With g = dO S^T / z and w = rope(phi(q)) / z:

    dz = -w·g           d phi(q) = unrope(g) + dz s          dS = sum_n w_n dO_n^T      ds = sum_n dz_n phi(q_n)
    d phi(k) = (unrope(dS v) + ds) / count                   dv = rope(phi(k)) dS / count

then back through power, ReLU and mirror.
"""

from __future__ import annotations

from torch import Tensor

from mirrorla.kernels import launch, tiles
from mirrorla.kernels.backward_kernels import attend_backward_kernel, key_backward_kernel, query_backward_kernel

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor,
    s: Tensor,
    mirror_cos: Tensor | None,
    mirror_sin: Tensor | None,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    mask: Tensor | None,
    power: float,
    eps: float,
) -> Gradients:
    """Gradients of `forward`.

    Args:
        grad_out: (B, N, H, dv), any strides; copied once if its last is not 1.
        q: as in `forward`, like all further inputs.
        k: keys.
        v: values.
        S: what `forward` returned.
        s: what `forward` returned.
        mirror_cos: mirror table or None.
        mirror_sin: mirror table or None.
        q_cos: rotary table or None.
        q_sin: rotary table or None.
        k_cos: rotary table or None.
        k_sin: rotary table or None.
        mask: True for the keys that count, or None.
        power: exponent of the map.
        eps: added to the denominator.

    Returns:
        dq, dk, dv (contiguous, in q's dtype) and the gradients of the mirror tables in their shape, fp32, or None.
    """
    (B, N, H, dk), M, dv = q.shape, k.shape[1], v.shape[-1]
    keep = S.numel() > 0
    if keep and tiles.regime(B, N, M, H, launch.sm_count(q.device)) == "split":
        query_cut, key_cut = _query_cut(q, dv, mirror_cos, q_cos, power), _key_cut(k, dv, mirror_cos, k_cos, power)
        tables = launch.MirrorGradients(mirror_cos, B, query_cut.parts + key_cut.parts)
        query_side = (mirror_cos, mirror_sin, q_cos, q_sin, power, eps, query_cut, tables)
        grad_q, dS, ds = _queries(grad_out, q, S, s, *query_side, mask, M)
        key_side = (mirror_cos, mirror_sin, k_cos, k_sin, mask, power, key_cut, tables, query_cut.parts)
        return grad_q, *_keys(dS, ds, k, v, *key_side), *tables.sums()
    grad_q, grad_k = launch.empty(B, N, H, dk, like=q), launch.empty(B, M, H, dk, like=k)
    grad_v = launch.empty(B, M, H, dv, like=v)
    tables = launch.MirrorGradients(mirror_cos, B, 1)
    tile = launch.tile_of("backward", q, dv, mirror_cos, q_cos, k_cos, power=power)
    attend_backward_kernel[(B * H,)](
        **{**launch.rows("q", q), **launch.rows("k", k), **launch.rows("v", v)},
        **{**launch.rows("grad_out", launch.readable(grad_out)), "state": S, "mean": s},
        **{"dq": grad_q, "dk": grad_k, "dv": grad_v, **tables.arguments(0)},
        **{**launch.mirror_tables(mirror_cos, mirror_sin), **launch.key_mask(mask), **launch.exponent(power)},
        **{**launch.rope_tables("q", q_cos, q_sin), **launch.rope_tables("k", k_cos, k_sin)},
        **{"N": N, "M": M, "H": H, "eps": float(eps), "KEPT": keep, **launch.sizes(tile, q.dtype, dk, dv)},
    )
    return grad_q, grad_k, grad_v, *tables.sums()


def apply_backward(
    grad_out: Tensor,
    q: Tensor,
    S: Tensor,
    s: Tensor,
    mirror_cos: Tensor | None,
    mirror_sin: Tensor | None,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    power: float,
    eps: float,
) -> Gradients:
    """Gradients of `apply` in at most two launches.

    Returns:
        dq, dS (B, H, dk, dv) fp32, ds (B, H, dk) fp32 and the gradients of the mirror tables or None.
    """
    cut = _query_cut(q, S.shape[-1], mirror_cos, q_cos, power)
    tables = launch.MirrorGradients(mirror_cos, q.shape[0], cut.parts)
    query_side = (mirror_cos, mirror_sin, q_cos, q_sin, power, eps, cut, tables)
    return *_queries(grad_out, q, S, s, *query_side), *tables.sums()


def state_backward(
    grad_S: Tensor,
    grad_s: Tensor,
    k: Tensor,
    v: Tensor,
    mirror_cos: Tensor | None,
    mirror_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    mask: Tensor | None,
    power: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `state` in one launch, after a division by the number of keys.

    Returns:
        dk, dv and the gradients of the mirror tables or None.
    """
    if mask is None:
        grad_S, grad_s = grad_S / max(k.shape[1], 1), grad_s / max(k.shape[1], 1)
    else:
        count = mask.sum(1).clamp(min=1)
        grad_S, grad_s = grad_S / count[:, None, None, None], grad_s / count[:, None, None]
    cut = _key_cut(k, v.shape[-1], mirror_cos, k_cos, power)
    tables = launch.MirrorGradients(mirror_cos, k.shape[0], cut.parts)
    key_side = (mirror_cos, mirror_sin, k_cos, k_sin, mask, power, cut, tables, 0)
    return *_keys(grad_S, grad_s, k, v, *key_side), *tables.sums()


def _query_cut(q: Tensor, dv: int, mirror: Tensor | None, rope: Tensor | None, power: float) -> launch.Cut:
    return launch.cut(launch.tile_of("backward", q, dv, mirror, rope, power=power), q, dv, leaves_state=True)


def _key_cut(k: Tensor, dv: int, mirror: Tensor | None, rope: Tensor | None, power: float) -> launch.Cut:
    return launch.cut(launch.tile_of("backward", k, dv, mirror, rope, power=power), k, dv, leaves_state=False)


def _queries(
    grad_out: Tensor,
    q: Tensor,
    S: Tensor,
    s: Tensor,
    mirror_cos: Tensor | None,
    mirror_sin: Tensor | None,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    power: float,
    eps: float,
    cut: launch.Cut,
    tables: launch.MirrorGradients,
    mask: Tensor | None = None,
    M: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dS, ds; the latter two divided by the number of keys if M is given."""
    (B, N, H, dk), dv = q.shape, S.shape[-1]
    grad_q = launch.empty(B, N, H, dk, like=q)
    states = launch.empty(B, H, cut.parts, dk, dv, like=q, dtype=launch.STATE)
    means = launch.empty(B, H, cut.parts, dk, like=q, dtype=launch.STATE)
    query_backward_kernel[(B * H * cut.parts,)](
        **{**launch.rows("q", q), **launch.rows("grad_out", launch.readable(grad_out)), "dq": grad_q},
        **{"state": S.contiguous(), "mean": s.contiguous(), "states": states, "means": means, **tables.arguments(0)},
        **{**launch.mirror_tables(mirror_cos, mirror_sin), **launch.rope_tables("q", q_cos, q_sin)},
        **{**launch.key_mask(mask), **launch.exponent(power), "M": M, "SCALED": cut.parts == 1 and M > 0},
        **{**cut.arguments(H), "mirror_parts": tables.parts, "N": N, "eps": float(eps)},
        **launch.sizes(cut.tile, q.dtype, dk, dv),
    )
    return grad_q, *launch.sum_parts(states, means, mask, M, scaled=M > 0)


def _keys(
    dS: Tensor,
    ds: Tensor,
    k: Tensor,
    v: Tensor,
    mirror_cos: Tensor | None,
    mirror_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    mask: Tensor | None,
    power: float,
    cut: launch.Cut,
    tables: launch.MirrorGradients,
    first_part: int,
) -> tuple[Tensor, Tensor]:
    """dk and dv from gradients of the state already divided by the number of keys."""
    (B, M, H, dk), dv = k.shape, v.shape[-1]
    grad_k, grad_v = launch.empty(B, M, H, dk, like=k), launch.empty(B, M, H, dv, like=v)
    key_backward_kernel[(B * H * cut.parts,)](
        **{**launch.rows("k", k), **launch.rows("v", v), "dk": grad_k, "dv": grad_v},
        **{"state": dS.contiguous(), "mean": ds.contiguous(), **tables.arguments(first_part)},
        **{**launch.mirror_tables(mirror_cos, mirror_sin), **launch.rope_tables("k", k_cos, k_sin)},
        **{**launch.key_mask(mask), **launch.exponent(power), **launch.sizes(cut.tile, k.dtype, dk, dv)},
        **{**cut.arguments(H), "mirror_parts": tables.parts, "M": M},
    )
    return grad_k, grad_v
