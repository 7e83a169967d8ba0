"""Depthwise convolution of a token grid whose backward stays linear in its size on CPUs.

Shapes: B images, h x w tokens, C channels, k the odd side of the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Values from which torch's gradient of a depthwise kernel leaves the cache on CPUs: seven times the time for four
# times the tokens at 65 536 tokens of 64 channels, one thread. Below, torch's own is left alone.
LARGE = 2**20
STRIP = 2**18


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve every channel on its own, at stride 1 and with zeros around the grid.

    Args:
        x: (B, h, w, C), any strides.
        weight: (C, 1, k, k), k odd.
        bias: (C,), or None.

    Returns:
        (B, h, w, C).
    """
    if x.numel() >= LARGE and _runs_as_it_stands(x):
        out: Tensor = _LargeDepthwise.apply(x, weight, bias)
        return out
    return _convolve(x, weight, bias)


class _LargeDepthwise(torch.autograd.Function):
    """The input's gradient is a convolution again, the kernel's k^2 products each, in strips that fit into cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _convolve(grad, weight.flip(2, 3), None) if wanted[0] else None,
            _kernel_grad(x, grad, weight.shape[-1]) if wanted[1] else None,
            grad.sum((0, 1, 2)) if wanted[2] else None,
        )


def _kernel_grad(x: Tensor, grad: Tensor, k: int) -> Tensor:
    """(C, 1, k, k): for every offset the sum over tokens of grad times the shifted x, strip by strip of rows."""
    B, h, w, C = x.shape
    reach, rows = k // 2, max(1, STRIP // (w * C))
    total = grad.new_zeros((k, k, C))
    for image in range(B):
        for top in range(0, h, rows):
            strip = grad[image, top : top + rows]
            first, last = top - reach, top + len(strip) + reach
            above, below = max(0, -first), max(0, last - h)
            seen = F.pad(x[image, max(0, first) : min(h, last)], (0, 0, reach, reach, above, below))
            sums = [(strip * seen[i : i + len(strip), j : j + w]).sum((0, 1)) for i in range(k) for j in range(k)]
            total = total + torch.stack(sums).view(k, k, C)
    return total.permute(2, 0, 1).unsqueeze(1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Batch first: a transposed view of one image would look like NCHW to the convolution, several times slower."""
    C, _, k, _ = weight.shape
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=k // 2, groups=C).permute(0, 2, 3, 1)


def _runs_as_it_stands(x: Tensor) -> bool:
    """Eager code on a CPU in full precision: compilers and autocast know torch's own convolution better."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
