"""The feature pyramid: every map gets the meaning of the deeper ones, all with the same number of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Extra = Literal["none", "pool", "conv"]


class FPN(nn.Module):
    """1x1 laterals, nearest-neighbour top-down sums, 3x3 outputs, and coarser levels for large objects.

    Args:
        in_channels: channels of the maps, shallow to deep.
        channels: channels of every output.
        extra: "pool" adds one level by striding (two-stage detectors), "conv" two by strided convolutions
            (RetinaNet), "none" nothing.

    Attributes:
        num_extra: levels added below the deepest map, each at twice the stride of the one before.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, extra: Extra = "none") -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.extra = extra
        self.num_extra = {"none": 0, "pool": 1, "conv": 2}[extra]
        self.coarser = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1)
            for _ in range(self.num_extra if extra == "conv" else 0)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, h_i, w_i), shallow to deep -> maps (B, channels, h_i, w_i), then the coarser ones."""
        merged = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for level in range(len(merged) - 1, 0, -1):  # sizes are given: a side of 25 halves to 13 and must come back
            merged[level - 1] = merged[level - 1] + F.interpolate(merged[level], size=merged[level - 1].shape[2:])
        out = [convolve(x) for convolve, x in zip(self.outputs, merged, strict=True)]
        if self.extra == "pool":
            out.append(out[-1][:, :, ::2, ::2])
        for place, convolve in enumerate(self.coarser):
            out.append(convolve(out[-1] if place == 0 else F.relu(out[-1])))
        return out
