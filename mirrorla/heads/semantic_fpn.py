"""SemanticFPN: every level of a feature pyramid is brought to stride 4 and added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirrorla.heads.fpn import FPN
from mirrorla.heads.layers import conv_group_norm


class SemanticFPN(nn.Module):
    """A pyramid, on each level as many steps of 3x3 convolution and doubling as lead to stride 4, their sum, a 1x1.

    Args:
        in_channels: channels of the four maps, shallow to deep.
        num_classes: C.
        channels: of the pyramid; the steps have half of them.
        dropout: share of the summed channels that is dropped in training.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.fpn = FPN(in_channels, channels)
        half = channels // 2
        self.steps = nn.ModuleList(
            nn.ModuleList(conv_group_norm(width, half) for width in [channels] + [half] * (max(level, 1) - 1))
            for level in range(len(in_channels))
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(half, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h_i, w_i), shallow to deep -> logits (B, C, h_0, w_0)."""
        pyramid = self.fpn(maps)
        sizes = [x.shape[2:] for x in pyramid]
        levels = []
        for level, (x, steps) in enumerate(zip(pyramid, self.steps, strict=True)):
            assert isinstance(steps, nn.ModuleList)
            for step, size in zip(steps, sizes[:level][::-1] or sizes[:1], strict=True):
                x = step(x)
                if level:
                    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            levels.append(x)
        return self.classify(self.dropout(torch.stack(levels).sum(0)))
