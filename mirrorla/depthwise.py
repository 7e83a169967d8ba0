"""Depthwise convolution of a token grid whose kernel's gradient is as fast as torch's fast one on CPUs.

Shapes: B images, h x w tokens, C channels, k the odd side of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# torch has a fast gradient of 3x3 depthwise kernels on CPUs; that of larger ones takes 6 to 30 times as long and, in
# one pass, leaves the cache from some 2^20 values on.
FAST_SIDE = 3
STRIP = 2**20


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve every channel on its own, at stride 1 and with zeros around the grid.

    Args:
        x: (B, h, w, C), any strides.
        weight: (C, 1, k, k), k odd.
        bias: (C,), or None.

    Returns:
        (B, h, w, C).
    """
    if weight.shape[-1] > FAST_SIDE and _runs_as_it_stands(x):
        out: Tensor = _WideDepthwise.apply(x, weight, bias)
        return out
    return _convolve(x, weight, bias)


class _WideDepthwise(torch.autograd.Function):
    """The input's gradient is a convolution again; the kernel's is put together from gradients of 3x3 kernels."""

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
    """(C, 1, k, k), strip by strip: windows of 3x3 offsets that share a row or column with the one before."""
    reach, starts = k // 2, range(0, k - 2, FAST_SIDE - 1)
    total = grad.new_zeros((x.shape[-1], 1, k, k))
    for images, top, end in _strips(x):
        rows, w = end - top, x.shape[2]
        first, last = top - reach, end + reach
        above, below = max(0, -first), max(0, last - x.shape[1])
        seen = F.pad(x[images, first + above : last - below], (0, 0, reach, reach, above, below))
        strip = grad[images, top:end]
        windows = [
            [_kernel_grad_3x3(seen[:, i : i + rows + 2, j : j + w + 2], strip)[..., i > 0 :, j > 0 :] for j in starts]
            for i in starts
        ]
        total = total + torch.cat([torch.cat(row, -1) for row in windows], -2)
    return total


def _kernel_grad_3x3(seen: Tensor, grad: Tensor) -> Tensor:
    """(C, 1, 3, 3) from what a 3x3 kernel sees (b, n + 2, w + 2, C) and its output's gradient (b, n, w, C)."""
    C = seen.shape[-1]
    maps = (grad.permute(0, 3, 1, 2), seen.permute(0, 3, 1, 2), seen.new_empty((C, 1, FAST_SIDE, FAST_SIDE)))
    once, nothing = [1, 1], [0, 0]
    found: Tensor = torch.ops.aten.convolution_backward(
        *maps, None, once, nothing, once, False, nothing, C, [False, True, False]
    )[1]
    return found


def _strips(x: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Several whole images, or some rows of one: images, first row, and the one behind the last."""
    B, h, w, C = x.shape
    images, rows = max(1, STRIP // max(1, h * w * C)), max(1, STRIP // max(1, w * C))
    for image in range(0, B, images):
        for top in range(0, h, rows):
            yield slice(image, min(image + images, B)), top, min(top + rows, h)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Batch first: a transposed view of one image would look like NCHW to the convolution, several times slower."""
    C, _, k, _ = weight.shape
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=k // 2, groups=C).permute(0, 2, 3, 1)


def _runs_as_it_stands(x: Tensor) -> bool:
    """Eager code on a CPU in full precision: compilers and autocast know torch's own convolution better."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
