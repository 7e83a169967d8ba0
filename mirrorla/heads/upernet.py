"""UPerNet: pooled context on the deepest map, a top-down pyramid, and all levels fused at stride 4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirrorla.heads.layers import conv_group_norm

POOL_SIZES = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """The map beside its averages over 1x1, 2x2, 3x3 and 6x6 regions.

    Args:
        in_channels: channels of the map.
        channels: of each pooled branch and of the output.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv_group_norm(in_channels, channels, 1) for _ in POOL_SIZES)
        self.fuse = conv_group_norm(in_channels + len(POOL_SIZES) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, channels, h, w)."""
        pooled = [
            branch(F.adaptive_avg_pool2d(x, size)) for branch, size in zip(self.branches, POOL_SIZES, strict=True)
        ]
        return self.fuse(torch.cat([x, *(_resized(branch, x) for branch in pooled)], 1))


class UPerNet(nn.Module):
    """Pyramid pooling on the deepest map, laterals, top-down sums, 3x3 outputs, fusion, a 1x1.

    Args:
        in_channels: channels of the four maps, shallow to deep.
        num_classes: C.
        channels: of everything inside.
        dropout: share of the fused channels that is dropped in training.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        *shallow, deepest = in_channels
        self.context = PyramidPooling(deepest, channels)
        self.laterals = nn.ModuleList(conv_group_norm(width, channels, 1) for width in shallow)
        self.outputs = nn.ModuleList(conv_group_norm(channels, channels) for _ in shallow)
        self.fuse = conv_group_norm(len(in_channels) * channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h_i, w_i), shallow to deep -> logits (B, C, h_0, w_0)."""
        *shallow, deepest = maps
        merged = [lateral(x) for lateral, x in zip(self.laterals, shallow, strict=True)]
        merged.append(self.context(deepest))
        for level in range(len(shallow), 0, -1):
            merged[level - 1] = merged[level - 1] + _resized(merged[level], merged[level - 1])
        levels = [convolve(x) for convolve, x in zip(self.outputs, merged[:-1], strict=True)] + [merged[-1]]
        return self.classify(self.dropout(self.fuse(torch.cat([_resized(x, levels[0]) for x in levels], 1))))


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
