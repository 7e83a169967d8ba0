"""Mirrored linear attention in blocks of tokens, its derivatives written out: the op wherever Triton does not serve.

Plain PyTorch without an autograd graph. The maps and products of a block stay in cache, and of the size of q only the
results are written, where autograd over the reference writes every step. With r = rope(phi(q)),
z = phi(q)·s + eps, g = dO S^T, dz = -(r·g) / z^2 and means over `count` keys:

    dphi(q) = unrope(g / z) + dz s              dS = sum_n (r_n / z_n) dO_n^T      ds = sum_n dz_n phi(q_n)
    dphi(k) = (unrope(v dS^T) + ds) / count     dv = rope(phi(k)) dS / count

Shapes: B images, N queries, M keys, H heads, dk and dv channels, J = dk/2 blocks. Maps, sums and state are fp32,
float64 for float64 inputs, and so must be the tables: mirrors (B or 1, H, J), rotary (N or M, J). Arguments are those
of the Triton entry points in forward.py and backward.py, and mean the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mirrorla.kernels.blocks import Scratch, TokenMap, blocks, flat, product

Optional = Tensor | None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mirror_cos: Optional,
    mirror_sin: Optional,
    q_cos: Optional,
    q_sin: Optional,
    k_cos: Optional,
    k_sin: Optional,
    mask: Optional,
    power: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend.

    Returns:
        out (B, N, H, dv) in q's dtype, S (B, H, dk, dv) and s (B, H, dk).
    """
    S, s = state(k, v, mirror_cos, mirror_sin, k_cos, k_sin, mask, power)
    return apply(q, S, s, mirror_cos, mirror_sin, q_cos, q_sin, power, eps), S, s


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor,
    s: Tensor,
    mirror_cos: Optional,
    mirror_sin: Optional,
    q_cos: Optional,
    q_sin: Optional,
    k_cos: Optional,
    k_sin: Optional,
    mask: Optional,
    power: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `forward`.

    Returns:
        dq, dk, dv in the inputs' dtypes, and the mirror tables' gradients, empty without mirrors.
    """
    mirror = mirror_cos, mirror_sin
    dq, dS, ds, q_dcos, q_dsin = apply_backward(grad_out, q, S, s, *mirror, q_cos, q_sin, power, eps)
    dk, dv, k_dcos, k_dsin = state_backward(dS, ds, k, v, *mirror, k_cos, k_sin, mask, power)
    return dq, dk, dv, q_dcos + k_dcos, q_dsin + k_dsin


def state(
    k: Tensor,
    v: Tensor,
    mirror_cos: Optional,
    mirror_sin: Optional,
    k_cos: Optional,
    k_sin: Optional,
    mask: Optional,
    power: float,
) -> tuple[Tensor, Tensor]:
    """Summarise keys and values.

    Returns:
        S (B, H, dk, dv) and s (B, H, dk), means over the keys that count.
    """
    (B, M, H, dk), dv = k.shape, v.shape[-1]
    scratch = Scratch(k)
    keys = TokenMap(k, mirror_cos, mirror_sin, k_cos, k_sin, mask, power, scratch)
    S = k.new_zeros((B, H, dk, dv), dtype=scratch.dtype)
    s = k.new_zeros((B, H, dk), dtype=scratch.dtype)
    for images, tokens in blocks(k):
        block = keys.forward(images, tokens)
        values = scratch.load("v", v[images, tokens], None if mask is None else mask[images, tokens])
        s[images] += block.phi.sum(1)
        S[images].flatten(0, 1).baddbmm_(flat(block.roped).transpose(1, 2), flat(values))
    share = _share(mask, M, S)
    return S.mul_(share[..., None]), s.mul_(share)


def apply(
    q: Tensor,
    S: Tensor,
    s: Tensor,
    mirror_cos: Optional,
    mirror_sin: Optional,
    q_cos: Optional,
    q_sin: Optional,
    power: float,
    eps: float,
) -> Tensor:
    """Read a state with queries.

    Returns:
        (B, N, H, dv) in q's dtype.
    """
    scratch = Scratch(q)
    queries = TokenMap(q, mirror_cos, mirror_sin, q_cos, q_sin, None, power, scratch)
    out = q.new_empty((*q.shape[:3], S.shape[-1]))
    for images, tokens in blocks(q):
        block = queries.forward(images, tokens)
        work = scratch.take("work", *block.phi.shape)
        z = _denominator(block.phi, s[images], eps, work)
        product(torch.div(block.roped, z, out=work), S[images], out[images, tokens])
    return out


def apply_backward(
    grad_out: Tensor,
    q: Tensor,
    S: Tensor,
    s: Tensor,
    mirror_cos: Optional,
    mirror_sin: Optional,
    q_cos: Optional,
    q_sin: Optional,
    power: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `apply`.

    Returns:
        dq (B, N, H, dk), dS (B, H, dk, dv), ds (B, H, dk), and the mirror tables' gradients, empty without mirrors.
    """
    scratch = Scratch(q)
    queries = TokenMap(q, mirror_cos, mirror_sin, q_cos, q_sin, None, power, scratch)
    dq, dS, ds = torch.empty_like(q, memory_format=torch.contiguous_format), torch.zeros_like(S), torch.zeros_like(s)
    for images, tokens in blocks(q):
        block = queries.forward(images, tokens)
        work = scratch.take("work", *block.phi.shape)
        z = _denominator(block.phi, s[images], eps, work)
        dout = scratch.load("dout", grad_out[images, tokens])
        g = product(dout, S[images].mT, scratch.take("grad", *block.phi.shape))
        dz = torch.mul(block.roped, g, out=work).sum(-1, keepdim=True).div_(z).div_(z).neg_()
        dS[images].flatten(0, 1).baddbmm_(flat(torch.div(block.roped, z, out=work)).transpose(1, 2), flat(dout))
        ds[images] += torch.mul(block.phi, dz, out=work).sum(1)
        queries.unrotate(g.div_(z), tokens).addcmul_(dz, s[images].unsqueeze(1))
        queries.backward(block, g, images, dq[images, tokens])
    return dq, dS, ds, *queries.mirror_grads()


def state_backward(
    grad_S: Tensor,
    grad_s: Tensor,
    k: Tensor,
    v: Tensor,
    mirror_cos: Optional,
    mirror_sin: Optional,
    k_cos: Optional,
    k_sin: Optional,
    mask: Optional,
    power: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `state`.

    Returns:
        dk (B, M, H, dk) and dv (B, M, H, dv), 0 for masked keys, and the mirror tables' gradients, empty without.
    """
    scratch = Scratch(k)
    keys = TokenMap(k, mirror_cos, mirror_sin, k_cos, k_sin, mask, power, scratch)
    share = _share(mask, k.shape[1], grad_S)
    dS, ds = grad_S * share[..., None], grad_s * share
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    for images, tokens in blocks(k):
        block = keys.forward(images, tokens)
        values = scratch.load("v", v[images, tokens], None if mask is None else mask[images, tokens])
        product(block.roped, dS[images], dv[images, tokens])
        g = product(values, dS[images].mT, scratch.take("grad", *block.phi.shape))
        keys.unrotate(g, tokens).add_(ds[images].unsqueeze(1))
        keys.backward(block, g, images, dk[images, tokens])
    return dk, dv, *keys.mirror_grads()


def _denominator(phi: Tensor, s: Tensor, eps: float, work: Tensor) -> Tensor:
    """phi·s + eps of a block (b, n, H, 1): a product and a sum, since thin matrix-vector products of heads are slow."""
    return torch.mul(phi, s.unsqueeze(1), out=work).sum(-1, keepdim=True).add_(eps)


def _share(mask: Optional, M: int, like: Tensor) -> Tensor:
    """1 / count of the keys that count, at least 1: (B or 1, 1, 1)."""
    count = like.new_full((1,), float(M)) if mask is None else mask.sum(1).to(like.dtype)
    return count.clamp(min=1.0).reciprocal()[:, None, None]
