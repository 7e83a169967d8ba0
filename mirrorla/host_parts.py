"""The parts of the hosts: their sizes, options, patches, blocks and start.

Shapes: B images, C channels, N = h·w tokens of a grid. Any size of image is taken: its right and lower edges are padded
to whole patches, and learned position tables are resized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from mirrorla.attention import Grid, MirrorAttention
from mirrorla.mirror_parameters import MirrorConfig

POSITIONS = ("learned", "roped", "none")
NORM_EPS = 1e-6  # both hosts'


@dataclass(frozen=True)
class HostConfig:
    """Options of a host; None takes the variant's.

    Attributes:
        positions: "learned" adds a table to the tokens, "roped" turns queries and keys, "none" leaves positions out.
        patch_size: side of DeiT's patches in pixels; PVT's are given by its strides.
        image_size: side in pixels of the images that learned tables are made for; for others they are resized.
        class_token: classify from a token of its own, which mirrors' statistics leave out, or from the mean of all;
            PVT has the mean.
        gate: the gate of the pyramid's attention, a fourth projection that the hosts as published do not have.

    Raises:
        ValueError: an unknown word, or a size below one patch or pixel.
    """

    positions: Literal["learned", "roped", "none"] = "learned"
    patch_size: int | None = None
    image_size: int | None = None
    class_token: bool | None = None
    gate: bool = True

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(f"host.positions {self.positions!r} is unknown: choose one of {', '.join(POSITIONS)}")
        for name in ("patch_size", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"host.{name} {value} must be 1 pixel or more, or null")


@dataclass(frozen=True)
class DeiTSpec:
    """The sizes of one DeiT.

    Attributes:
        dim: channels.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the feed-forward, in multiples of dim.
        patch_size: side of a patch in pixels.
        image_size: side in pixels that the position table is made for.
        class_token: classify from a class token, not from the mean.
        drop_path: largest stochastic-depth rate.
        init_std: deviation of the linear layers' first weights. The published 0.02 is made for 192 channels and more:
            with 64 it leaves q·k near 0 in every head, and digits/recall is learnt late or never.
        patch_std: deviation of the patches' first weights; None is torch's start, with which a step of Adam moves
            patches of three equal channels three times as far, for their size, as those of one.
    """

    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    patch_size: int = 16
    image_size: int = 224
    class_token: bool = True
    drop_path: float = 0.1
    init_std: float = 0.02
    patch_std: float | None = None


@dataclass(frozen=True)
class PVTSpec:
    """The sizes of one PVT, whose attention sees all tokens of a stage: spatial reduction 1.

    Attributes:
        depths: blocks of the four stages.
        dims: channels of the four stages.
        heads: attention heads of the four stages.
        mlp_ratios: hidden widths of the feed-forwards, in multiples of the stage's channels.
        image_size: side in pixels that the position tables are made for.
        drop_path: largest stochastic-depth rate.
    """

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int] = (64, 128, 320, 512)
    heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, float, float, float] = (8.0, 8.0, 4.0, 4.0)
    image_size: int = 224
    drop_path: float = 0.1


class Patches(nn.Module):
    """Non-overlapping patches, each through one linear map, and what is known of their places.

    Args:
        in_channels: channels of the images or maps.
        dim: channels C of a token.
        patch: side of a patch.
        cells: side of the learned position table, or None without one.
        norm: LayerNorm the tokens, as PVT does.
    """

    def __init__(self, in_channels: int, dim: int, patch: int, *, cells: int | None, norm: bool) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.norm = LayerNorm2d(dim, eps=NORM_EPS) if norm else nn.Identity()
        self.table = None if cells is None else nn.Parameter(torch.zeros(1, dim, cells, cells))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, C, ceil(H / patch), ceil(W / patch))."""
        # Whatever the size: zeros that make no whole patch are dropped, so a side n gives ceil(n / patch) cells.
        x = self.norm(self.proj(F.pad(x, (0, self.patch - 1, 0, self.patch - 1))))
        if self.table is None:
            return x
        if not torch.compiler.is_exporting() and self.table.shape[2:] == x.shape[2:]:  # a program has no "if"
            return x + self.table
        return x + F.interpolate(self.table, size=x.shape[2:], mode="bicubic", align_corners=False)


class PlainBlock(nn.Module):
    """Attention and feed-forward, each a residual step: the block of DeiT and PVT.

    Args:
        attention: of C channels.
        mlp_ratio: hidden width of the feed-forward in multiples of C.
        drop_path: probability that an image skips a residual branch in training.
    """

    def __init__(self, attention: MirrorAttention, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        dim = attention.dim
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, round(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid, prefix: int = 0) -> Tensor:
        """Tokens (B, prefix + h·w, C) of a grid (h, w) -> the same shape."""
        x = x + self.drop_path(self.attention(self.norm1(x), grid, prefix=prefix))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def host_attention(
    dim: int, num_heads: int, kind: str, mirror: MirrorConfig | None, host: HostConfig, *, lepe: bool
) -> MirrorAttention:
    """The attention of a host's block.

    Args:
        dim: channels.
        num_heads: attention heads.
        kind: "mirror" or a peer of `feature_maps`.
        mirror: its mirrors.
        host: positions and gate.
        lepe: the depthwise term over the values, a convolution.
    """
    rotary = host.positions == "roped"
    return MirrorAttention(dim, num_heads, mirror=mirror, kind=kind, gate=host.gate, lepe=lepe, rotary=rotary)


def start_weights(module: nn.Module, std: float = 0.02) -> None:
    """Truncated normal for linear layers and tables, zero biases; 0.02 is what both hosts were published with.

    Args:
        module: use with `model.apply(start_weights)`; convolutions and norms keep torch's start.
        std: deviation of the linear layers' weights; that of tables is always 0.02.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Patches) and module.table is not None:
        nn.init.trunc_normal_(module.table, std=0.02)
