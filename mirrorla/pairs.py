"""Arithmetic on channel pairs (2j, 2j+1): the rotations of positions and the reflections of mirrors.

A pair is a point of the plane, or one complex number. Eager CPU code takes the complex view: one vectorised pass
instead of eight strided ones. Everything else takes real arithmetic, which compilers fuse and exporters understand.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x0, x1) -> (cos x0 - sin x1, sin x0 + cos x1).

    Args:
        x: (..., d).
        cos: broadcastable to (..., d/2).
        sin: broadcastable to (..., d/2).

    Returns:
        (..., d) in the promoted dtype.
    """
    if _complex_is_faster(x, cos):
        return torch.view_as_real(_complex(x) * torch.complex(cos, sin)).flatten(-2)
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos * x0 - sin * x1, sin * x0 + cos * x1), dim=-1).flatten(-2)


def reflect_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x0, x1) -> (-(cos x0 + sin x1), cos x1 - sin x0): the Householder reflection at half the table's angle.

    Args:
        x: (..., d).
        cos: cos 2t, broadcastable to (..., d/2).
        sin: sin 2t, broadcastable to (..., d/2).

    Returns:
        (..., d) in the promoted dtype.
    """
    if _complex_is_faster(x, cos):
        return torch.view_as_real(_complex(x).conj() * torch.complex(-cos, -sin)).flatten(-2)
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-(cos * x0 + sin * x1), cos * x1 - sin * x0), dim=-1).flatten(-2)


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _complex_is_faster(x: Tensor, table: Tensor) -> bool:
    """Whether a complex view exists without a copy, in code that runs as it stands."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != table.dtype:
        return False
    if x.dtype not in (torch.float32, torch.float64) or x.stride(-1) != 1 or x.storage_offset() % 2:
        return False
    return all(stride % 2 == 0 for stride in x.stride()[:-1])
