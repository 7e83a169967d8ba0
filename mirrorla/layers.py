"""The convolutions around the attention: stem, feed-forward, merging, and the switch between tokens and maps.

Shapes: B images, N = h·w tokens, C channels. Maps are (B, C, h, w); in channels_last memory both views are free.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h·w, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h·w, C) -> (B, C, h, w)."""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def conv_norm(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution and BatchNorm; an odd side n becomes ceil(n / stride)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class Stem(nn.Sequential):
    """Four 3x3 convolutions, stride 4 in all: (B, 3, H, W) -> (B, C, ceil(H/4), ceil(W/4))."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        half = out_channels // 2
        super().__init__(
            conv_norm(in_channels, half, stride=2),
            nn.GELU(),
            conv_norm(half, half),
            nn.GELU(),
            conv_norm(half, half),
            nn.GELU(),
            conv_norm(half, out_channels, stride=2),
        )


class ResidualDepthwise(nn.Conv2d):
    """x + DW3x3(x) in one pass over memory: the residual's 1 is added to the middle of every kernel.

    Args:
        channels: of maps (B, channels, h, w).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        middle = F.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        return self._conv_forward(x, self.weight + middle, self.bias)


class ConvFFN(nn.Module):
    """fc, GELU, u + DW3x3(u), fc.

    Args:
        dim: channels in and out.
        hidden: channels between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.conv = ResidualDepthwise(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, h·w, C) on a grid (h, w) -> (B, h·w, C)."""
        hidden = self.act(self.fc1(x))
        return self.fc2(to_tokens(self.conv(to_map(hidden, grid))))


def init_weights(module: nn.Module) -> None:
    """Truncated normal 0.02 for linear layers, fan-out normal for dense convolutions, zero biases.

    Depthwise convolutions keep torch's start: fan-out would make their residual branches several times stronger.

    Args:
        module: use with `model.apply(init_weights)`; norms keep their identity start.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d) and module.groups == 1:
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
