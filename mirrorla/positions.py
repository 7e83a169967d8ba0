"""Rotary positions of a two-dimensional grid, without complex numbers and without parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from mirrorla.pairs import rotate_pairs

# Wavelengths from 2 pi to about 200 pi tokens: the longest still varies over the largest grids in use.
ROPE_BASE = 100.0


def rope_tables(height: int, width: int, head_dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Tables of the axial two-dimensional rotary embedding.

    Args:
        height: rows of the token grid.
        width: columns of the token grid.
        head_dim: channels of a head, even; half of its pairs turn with the row, the rest with the column.
        device: where the tables are made.

    Returns:
        cos and sin, each (height·width, head_dim/2) float32, tokens in row-major order.
    """
    pairs = head_dim // 2
    row_pairs = pairs // 2
    column_pairs = pairs - row_pairs
    rows = torch.arange(height, device=device, dtype=torch.float32)
    columns = torch.arange(width, device=device, dtype=torch.float32)
    row_angle = rows[:, None] * _frequencies(row_pairs, device)
    column_angle = columns[:, None] * _frequencies(column_pairs, device)

    def spread(row_values: Tensor, column_values: Tensor) -> Tensor:
        along_rows = row_values[:, None, :].expand(height, width, row_pairs)
        along_columns = column_values[None, :, :].expand(height, width, column_pairs)
        return torch.cat((along_rows, along_columns), dim=-1).reshape(height * width, pairs)

    # Cosines of height + width angles and not of height x width.
    return spread(row_angle.cos(), column_angle.cos()), spread(row_angle.sin(), column_angle.sin())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (2j, 2j+1) by the angles of the tables.

    Args:
        x: features (B, N, H, d).
        cos: (N, d/2).
        sin: (N, d/2).

    Returns:
        (B, N, H, d) in x's dtype.
    """
    return rotate_pairs(x, cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype))


def _frequencies(count: int, device: torch.device | None) -> Tensor:
    exponent = torch.arange(count, device=device, dtype=torch.float32) / max(count, 1)
    return torch.pow(torch.tensor(ROPE_BASE, device=device), -exponent)
