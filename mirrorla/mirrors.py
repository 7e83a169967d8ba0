"""Mirrors as pure functions: the block-wise isometry, the variance-aware angle and the cross-head mirror.

Shapes: B images, N tokens, H heads, d channels of a head, C = H·d, J = d/2 blocks of two channels.
Source: arXiv 2602.04346 (MirrorLA). The form of the angle modulation is our choice: the paper's abstract names its
ingredients, a base angle and a block variance, and not their combination.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mirrorla.pairs import reflect_pairs

# The mirror at this angle swaps the two channels of a block, which ReLU attention without positions cannot see.
NEUTRAL_ANGLE = 0.75 * math.pi


def block_mirror(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Reflect every two-channel block: y = (I - 2 n n^T) x with n = (cos t, sin t).

    Args:
        x: features (..., d); block j holds the channels 2j and 2j+1.
        cos: cos 2t, broadcastable to (..., J).
        sin: sin 2t, broadcastable to (..., J).

    Returns:
        (..., d) in the promoted dtype. The map is symmetric, orthogonal and its own inverse.
    """
    return reflect_pairs(x, cos, sin)


def cross_head_mirror(x: Tensor, u: Tensor) -> Tensor:
    """Reflect the concatenated heads: x - 2 (x·u) u / |u|^2.

    Args:
        x: features (..., C).
        u: normal of the mirror (C,); its length does not matter, a zero vector leaves x unchanged.

    Returns:
        (..., C). Keeps the sum of the heads' q·k and moves energy between heads.
    """
    scaled = 2.0 * u / (u.square().sum() + torch.finfo(u.dtype).tiny)
    # A product and a sum instead of a matmul: autocast leaves them in fp32. One pass, in the memory order of x.
    return torch.addcmul(x, (x * u).sum(-1, keepdim=True), scaled, value=-1.0)


def reflect_rows(weight: Tensor, u: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Apply static mirrors to the output channels of a projection, so that they cost nothing per token.

    Args:
        weight: projection weight (..., C, C_in), or its bias as (..., C, 1).
        u: normal of the cross-head mirror (C,), or None.
        cos: cos 2t of the block mirrors (H, J), or None.
        sin: sin 2t of the block mirrors (H, J), or None.

    Returns:
        (..., C, C_in): the rows of block_mirror(cross_head_mirror(W x)).
    """
    columns = weight.transpose(-2, -1)  # (..., C_in, C): one feature vector per input channel
    if u is not None:
        columns = cross_head_mirror(columns, u)
    if cos is not None and sin is not None:
        columns = block_mirror(columns, cos.flatten(), sin.flatten())
    return columns.transpose(-2, -1)


def token_moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of every channel over the tokens.

    Args:
        x: features (B, N, H, d) of any float dtype; statistics are taken in fp32 or better.
        mask: True for the tokens that count (B, N); None counts all.

    Returns:
        mean (B, H, d), population variance (B, H, d), number of tokens (B, 1, 1).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        count = x.new_full((x.shape[0], 1, 1), float(x.shape[1]))
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            mean, variance = _CpuMoments.apply(x)
            return mean, variance, count
        # Two explicit passes: var_mean is opaque to torch.compile.
        mean = x.mean(1)
        return mean, (x - mean.unsqueeze(1)).square().mean(1), count
    weight = mask.to(x.dtype)[:, :, None, None]  # (B, N, 1, 1)
    count = weight.sum(1)
    total = count.clamp(min=1.0)
    mean = (x * weight).sum(1) / total
    return mean, ((x - mean.unsqueeze(1)).square() * weight).sum(1) / total, count


def relative_variance(q: Tensor, k: Tensor, q_mask: Tensor | None = None, k_mask: Tensor | None = None) -> Tensor:
    """rho = V / (V + |mu|^2/2 + eps): how much of a block's energy is spread, pooled over q and k.

    Args:
        q: queries (B, N, H, d).
        k: keys (B, M, H, d).
        q_mask: True for the query tokens that count (B, N).
        k_mask: True for the key tokens that count (B, M).

    Returns:
        (B, H, J) in [0, 1]: 0 for a constant block, scale-free, finite for one token.
    """
    q_mean, q_var, q_count = token_moments(q, q_mask)
    k_mean, k_var, k_count = token_moments(k, k_mask)
    share = q_count / (q_count + k_count).clamp(min=1.0)
    mean = share * q_mean + (1 - share) * k_mean
    # The pooled variance: inside each group, plus between the two group means.
    variance = share * q_var + (1 - share) * k_var + share * (1 - share) * (q_mean - k_mean).square()
    spread = variance.unflatten(-1, (-1, 2)).mean(-1)  # E|x - mu|^2 / 2 of a block
    centre = mean.unflatten(-1, (-1, 2)).square().mean(-1)  # |mu|^2 / 2
    return spread / (spread + centre + 1e-6)


def angle_modulation(rho: Tensor, gain: Tensor, centre: Tensor, limit: float) -> Tensor:
    """delta_alpha = limit · tanh(gain · (rho - centre)), bounded by `limit` radians.

    Args:
        rho: relative variance (..., H, J).
        gain: learned slope (H, J); zero at the start.
        centre: learned centre (H, J).
        limit: largest change of an angle in radians.

    Returns:
        (..., H, J) in radians.
    """
    return limit * torch.tanh(gain * (rho - centre))


def aligned_angle(mean: Tensor) -> Tensor:
    """The angle whose mirror sends a block's mean onto the diagonal of the positive quadrant.

    Args:
        mean: mean feature (..., d).

    Returns:
        (..., J) in radians: (psi + pi/4 - pi) / 2 with psi the direction of the mean.
    """
    x0, x1 = mean.unflatten(-1, (-1, 2)).unbind(-1)
    return (torch.atan2(x1, x0) + 0.25 * math.pi - math.pi) / 2


class _CpuMoments(torch.autograd.Function):
    """Mean and variance over tokens whose backward is one pass over memory instead of several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(1)
        centred = x - mean.unsqueeze(1)
        ctx.save_for_backward(x, mean)
        return mean, centred.square_().mean(1)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        slope = 2.0 * grad_variance / x.shape[1]
        return torch.addcmul((grad_mean / x.shape[1] - slope * mean).unsqueeze(1), x, slope.unsqueeze(1))
