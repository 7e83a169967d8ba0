"""Mirrored linear attention: the functions that the model calls, checked and differentiable.

    mirror_linear_attention    attend
    kv_state, apply_state      its two halves, for sequences that several devices share

Where Triton serves a tensor its kernels run, elsewhere blocks of plain PyTorch; both write their gradients out (see
operators.py). Gradients of gradients go through the reference, at its cost.

Shapes: B images, N queries, M keys, H heads, dk and dv channels, J = dk/2 blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mirrorla.kernels import arguments, operators
from mirrorla.kernels.reference import Tables


def mirror_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mirror: Tables | None = None,
    q_rope: Tables | None = None,
    k_rope: Tables | None = None,
    mask: Tensor | None = None,
    query_mirrors: Sequence[Tables] | None = None,
    power: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Non-causal linear attention over mirrored features, at a cost linear in N and M.

    y_n = rope(phi(q_n)) S / (phi(q_n)·s + eps) with phi(x) = ReLU(mirror(x))^power, S = mean_m rope(phi(k_m)) v_m^T and
    s = mean_m phi(k_m). With `query_mirrors` every equal share of the value channels is read through a mirror of the
    query of its own. All sums are fp32 (float64 for float64 inputs), also under autocast, where q, k and v of different
    dtypes are first cast to autocast's. Differentiable to any order in q, k, v and the mirror tables.

    Args:
        q: queries (B, N, H, dk), any strides; the Triton kernels need a last stride of 1 and dk, dv from 8 to 128.
        k: keys (B, M, H, dk).
        v: values (B, M, H, dv).
        mirror: cos 2t and sin 2t of the mirrors, each (B or 1, H, J); None is the plain ReLU map.
        q_rope: rotary tables of the queries (N, J), without gradient; only together with k_rope.
        k_rope: rotary tables of the keys (M, J).
        mask: True for the keys that count (B, M); the others do not matter even if they are inf or nan.
        query_mirrors: one for each share of the value channels, instead of `mirror` for the queries; dv is divisible by
            their number.
        power: exponent of the map, >= 1.
        eps: added to the denominator, >= 0.

    Returns:
        (B, N, H, dv) contiguous, in q's dtype; zero for a query whose map is zero everywhere.

    Raises:
        ValueError: an argument that does not fit, in one line.
    """
    _refuse_forward_mode(q, k, v, *(mirror or ()), *(table for one in query_mirrors or () for table in one))
    q, k, v = _autocast(q, k, v)
    arguments.check_queries(q, mirror, q_rope, power, eps)
    arguments.check_keys(k, v, mirror, k_rope, mask, power)
    arguments.check_pair(q, k, q_rope, k_rope)
    mirrors, q_tables, k_tables = _wide(mirror, q), _wide(q_rope, q), _wide(k_rope, q)
    if query_mirrors is None:
        return operators.attention(q, k, v, *mirrors, *q_tables, *k_tables, mask, float(power), float(eps))[0]
    arguments.check_shares(q, v, query_mirrors, q_rope, power)
    S, s = operators.kv_state(k, v, *mirrors, *k_tables, mask, float(power))
    shares = [
        operators.apply_state(q, share, s, *_wide(one, q), *q_tables, float(power), float(eps))
        for one, share in zip(query_mirrors, S.chunk(len(query_mirrors), -1), strict=True)
    ]
    return torch.cat(shares, -1)


def kv_state(
    k: Tensor,
    v: Tensor,
    *,
    mirror: Tables | None = None,
    rope: Tables | None = None,
    mask: Tensor | None = None,
    power: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summarise keys and values; the parts of several devices add up once weighted by their counts.

    Args:
        k: keys (B, M, H, dk).
        v: values (B, M, H, dv).
        mirror: cos 2t and sin 2t of the mirrors, each (B or 1, H, J).
        rope: rotary tables (M, J).
        mask: True for the keys that count (B, M).
        power: exponent of the map.

    Returns:
        S (B, H, dk, dv) and s (B, H, dk), means over the keys that count, fp32 or float64, and their number (B,).

    Raises:
        ValueError: an argument that does not fit, in one line.
    """
    _refuse_forward_mode(k, v, *(mirror or ()))
    k, v = _autocast(k, v)
    arguments.check_keys(k, v, mirror, rope, mask, power)
    S, s = operators.kv_state(k, v, *_wide(mirror, k), *_wide(rope, k), mask, float(power))
    count = s.new_full((k.shape[0],), float(k.shape[1])) if mask is None else mask.sum(1).to(s.dtype)
    return S, s, count


def apply_state(
    q: Tensor,
    state: Tensor,
    key_mean: Tensor,
    *,
    mirror: Tables | None = None,
    rope: Tables | None = None,
    power: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Read a key-value state with queries.

    Args:
        q: queries (B, N, H, dk).
        state: S (B, H, dk, dv) of `kv_state`.
        key_mean: s (B, H, dk) of `kv_state`.
        mirror: cos 2t and sin 2t of the mirrors, each (B or 1, H, J).
        rope: rotary tables (N, J).
        power: exponent of the map.
        eps: added to the denominator, which is >= 0 by construction.

    Returns:
        (B, N, H, dv) in q's dtype.

    Raises:
        ValueError: an argument that does not fit, in one line.
    """
    _refuse_forward_mode(q, state, key_mean, *(mirror or ()))
    arguments.check_queries(q, mirror, rope, power, eps)
    arguments.check_state(q, state, key_mean)
    return operators.apply_state(q, state, key_mean, *_wide(mirror, q), *_wide(rope, q), float(power), float(eps))


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast tensors of several dtypes are cast to its own; equal ones pass, whatever their dtype."""
    device_type = tensors[0].device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    if len({x.dtype for x in tensors}) == 1:
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) for x in tensors)


def _refuse_forward_mode(*tensors: Tensor) -> None:
    """An operator would drop tangents without a word."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "mirror attention has no forward-mode derivative: use reverse mode, or the functions of the same name in "
            "mirrorla.kernels.reference"
        )


def _wide(tables: Tables | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Tables in fp32, or float64 for float64 tokens."""
    if tables is None:
        return None, None
    dtype = torch.promote_types(x.dtype, torch.float32)
    return tables[0].to(dtype), tables[1].to(dtype)
