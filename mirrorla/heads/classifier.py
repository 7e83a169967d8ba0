"""Image classification from the last feature map."""

from __future__ import annotations

from torch import Tensor, nn


class ClassifierHead(nn.Module):
    """1x1 convolution, BatchNorm, SiLU, global average pool, linear.

    Args:
        in_channels: channels of the last stage.
        width: channels after the 1x1 convolution.
        num_classes: classes; 0 gives the pooled features.
    """

    def __init__(self, in_channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.SiLU()
        self.fc: nn.Module = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> logits (B, num_classes)."""
        return self.fc(self.act(self.norm(self.expand(x))).mean((2, 3)))
