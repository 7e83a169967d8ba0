"""The plain PyTorch twin of mirrored linear attention: any device, float16 to float64, differentiable to any order.

The oracle of every faster path, and what gradients of gradients are taken through.

Shapes: B images, N queries, M keys, H heads, dk and dv channels, J = dk/2 blocks.

    phi(x) = ReLU(mirror(x))^power
    S = mean_m rope(phi(k_m)) v_m^T        s = mean_m phi(k_m)
    y_n = rope(phi(q_n)) S / (phi(q_n)·s + eps)

State and denominators are means over the tokens, so that they do not grow with the context; they, the maps and all sums
are fp32 (float64 for float64 inputs). Rotary positions turn the numerator only: the denominator stays a sum of
non-negative numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mirrorla.mirrors import block_mirror
from mirrorla.positions import rotate

Tables = tuple[Tensor, Tensor]
"""cos and sin of the same shape: (N, d/2) for rotary positions, (B or 1, H, J) for mirrors."""


def feature_map(x: Tensor, mirror: Tables | None = None, power: float = 1.0) -> Tensor:
    """phi(x) = ReLU(mirror(x))^power in fp32 or better.

    Args:
        x: features (B, N, H, d).
        mirror: cos 2t and sin 2t, each (B or 1, H, J); None is the plain ReLU map.
        power: exponent >= 1; larger sharpens the attention.

    Returns:
        (B, N, H, d), non-negative.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mirror is not None:
        cos, sin = mirror
        x = block_mirror(x, cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1))
    x = x.relu()
    return x if power == 1.0 else x.pow(power)


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
        rope: rotary tables (M, dk/2).
        mask: True for the tokens that count (B, M).
        power: exponent of the map.

    Returns:
        S (B, H, dk, dv) and s (B, H, dk), means over the tokens, and the token count (B,).
    """
    if mask is not None:  # before the map: a masked key may be inf or nan, and 0 · inf would poison the state
        k, v = (x.masked_fill(~mask[:, :, None, None], 0.0) for x in (k, v))
    phi_k = feature_map(k, mirror, power)  # phi(0) = 0
    v = v.to(phi_k.dtype)
    count = phi_k.new_full((k.shape[0],), float(k.shape[1])) if mask is None else mask.sum(1).to(phi_k.dtype)
    scale = count.clamp(min=1.0).reciprocal()
    key_mean = phi_k.sum(1) * scale[:, None, None]
    roped = phi_k if rope is None else rotate(phi_k, *rope)
    state = torch.einsum("bmhd,bmhe->bhde", roped, v) * scale[:, None, None, None]
    return state, key_mean, count


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
        rope: rotary tables (N, dk/2).
        power: exponent of the map.
        eps: added to the denominator, which is >= 0 by construction.

    Returns:
        (B, N, H, dv) in q's dtype; zero for a query whose map is zero everywhere.
    """
    phi_q = feature_map(q, mirror, power)
    denominator = torch.einsum("bnhd,bhd->bnh", phi_q, key_mean) + eps
    roped = phi_q if rope is None else rotate(phi_q, *rope)
    # Divided before the product, whose result lies head by head in memory and would be slow to walk token by token.
    return torch.einsum("bnhd,bhde->bnhe", roped / denominator.unsqueeze(-1), state).to(q.dtype)


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

    Args:
        q: queries (B, N, H, dk).
        k: keys (B, M, H, dk).
        v: values (B, M, H, dv).
        mirror: cos 2t and sin 2t of the mirrors, each (B or 1, H, J); None is the plain ReLU map.
        q_rope: rotary tables of the queries (N, dk/2).
        k_rope: rotary tables of the keys (M, dk/2).
        mask: True for the keys that count (B, M).
        query_mirrors: one for each share of the value channels, instead of `mirror` for the queries.
        power: exponent of the map.
        eps: added to the denominator.

    Returns:
        (B, N, H, dv) in q's dtype.
    """
    with without_autocast(q.device.type):  # fp32 sums: see the head of the file
        state, key_mean, _ = kv_state(k, v, mirror=mirror, rope=k_rope, mask=mask, power=power)
        mirrors = (mirror,) if query_mirrors is None else query_mirrors
        return read(q, state, key_mean, mirrors, rope=q_rope, power=power, eps=eps)


def read(
    q: Tensor,
    state: Tensor,
    key_mean: Tensor,
    mirrors: Sequence[Tables | None],
    *,
    rope: Tables | None = None,
    power: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Read equal shares of a state's value channels, each through a mirror of the queries of its own.

    Args:
        q: queries (B, N, H, dk).
        state: S (B, H, dk, dv) of `kv_state`.
        key_mean: s (B, H, dk) of `kv_state`.
        mirrors: of the queries, one for each share; one alone reads everything.
        rope: rotary tables (N, dk/2).
        power: exponent of the map.
        eps: added to the denominators.

    Returns:
        (B, N, H, dv) in q's dtype.
    """
    shares = zip(mirrors, state.chunk(len(mirrors), -1), strict=True)
    return torch.cat(
        [apply_state(q, share, key_mean, mirror=one, rope=rope, power=power, eps=eps) for one, share in shares], -1
    )


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast leaves fp32 sums alone."""
    if not torch.amp.is_autocast_available(device_type):  # the meta device, for one
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
