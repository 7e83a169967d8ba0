"""What the heads of dense tasks are built of."""

from __future__ import annotations

import math

from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of about 16 channels a group, so that a map of a single pixel has something to normalise."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels)


def conv_group_norm(in_channels: int, out_channels: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, GroupNorm, ReLU; the size stays.

    GroupNorm, because it looks at one image only: the gradient of a sample does not depend on its batch, a share of one
    image trains, and no statistics travel between processes.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
        group_norm(out_channels),
        nn.ReLU(inplace=True),
    )


class FCNHead(nn.Module):
    """A 3x3 convolution and a 1x1: the auxiliary head that gives a middle map a gradient of its own.

    Args:
        in_channels: channels of the map.
        num_classes: C.
        channels: between the two convolutions.
        dropout: share of the channels that is dropped in training.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = conv_group_norm(in_channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> logits (B, C, h, w)."""
        return self.classify(self.dropout(self.conv(x)))
