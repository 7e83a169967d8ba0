"""A trained network as other programs can run it: mirrors folded, attention in operators that every runtime knows.

The project's own operators are fast where this package is installed and unknown elsewhere; their place is taken by the
plain PyTorch below, in fp32. What an exported file computes is compared with the network it was made from each time.

Shapes: B images, N = h·w tokens, H heads, d channels of a head, C = H·d.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirrorla.attention import Grid, MirrorAttention, folded_copy
from mirrorla.feature_maps import FeatureMap
from mirrorla.heads.upernet import POOL_SIZES, PyramidPooling
from mirrorla.kernels import reference
from mirrorla.kernels.reference import Tables
from mirrorla.layers import to_map, to_tokens
from mirrorla.mirror_parameters import MirrorConfig, MirrorParameters
from mirrorla.positions import rotate


class PortableAttention(nn.Module):
    """A folded MirrorAttention of one image's tokens, whose program holds for every grid.

    Sizes stay symbols: nothing asks how many tokens there are, as the operator's fast paths do.

    Args:
        layer: folded; its parameters are shared.
    """

    def __init__(self, layer: MirrorAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, grid: Grid, prefix: int = 0) -> Tensor:
        """Tokens (B, prefix + N, C), those behind the prefix of a grid -> the same shape."""
        layer = self.layer
        q, k, v, gate = layer.project(x)
        rope = layer.rope(grid, x.device, prefix)
        if layer.mirrors is not None:
            tables = _mirror_tables(layer.mirrors, *(x[:, prefix:] if prefix else x for x in (q, k)))
            y = _mirror_attention(q, k, v, tables, rope, layer.mirrors.config.power, layer.mirrors.query_tables(tables))
        elif isinstance(layer.map, FeatureMap):
            roped = layer.map.tables(rope)
            streams = layer.map.streams(q, k, v)  # ReLU(phi) = phi
            y = torch.cat([_mirror_attention(*stream, None, roped, 1.0) for stream in streams], -1)
        else:
            y = _softmax_attention(q, k, v, rope)
        y = y.flatten(2)
        if layer.lepe is not None:
            values = v[:, prefix:] if prefix else v
            term = to_tokens(layer.lepe(to_map(values.flatten(2), grid)))
            y = y + (F.pad(term, (0, 0, prefix, 0)) if prefix else term)
        return layer.output(y, gate)


class PortablePooling(nn.Module):
    """A segmenter's pooled context; ONNX has no average over regions whose number is fixed and whose size is not.

    Args:
        pooling: its parameters are shared.
    """

    def __init__(self, pooling: PyramidPooling) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, channels, h, w)."""
        branches = zip(self.pooling.branches, POOL_SIZES, strict=True)
        pooled = [branch(region_means(x, parts)) for branch, parts in branches]
        resized = [F.interpolate(part, size=x.shape[2:], mode="bilinear", align_corners=False) for part in pooled]
        return self.pooling.fuse(torch.cat([x, *resized], 1))


def region_means(x: Tensor, parts: int) -> Tensor:
    """F.adaptive_avg_pool2d(x, parts) as weighted sums: (B, C, h, w) -> (B, C, parts, parts)."""
    rows, columns = (_region_weights(x.shape[place], parts, x) for place in (2, 3))
    # No matmul: its reshapes would tie the program to widths that the number of parts does not divide.
    x = (x.unsqueeze(2) * rows.unsqueeze(2)).sum(3)  # (B, C, parts, w)
    return (x.unsqueeze(3) * columns).sum(4)


def _region_weights(length: int, parts: int, like: Tensor) -> Tensor:
    """(parts, length): each row the mean over cells floor(i·length/parts) … ceil((i+1)·length/parts) - 1."""
    part = torch.arange(parts, device=like.device)[:, None]
    cells = torch.arange(length, device=like.device)
    inside = (cells >= part * length // parts) & (cells < ((part + 1) * length + parts - 1) // parts)
    weights = inside.to(like.dtype)
    return weights / weights.sum(1, keepdim=True)


def folded(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose static mirrors are part of the projections.

    Args:
        network: anything that contains MirrorAttention layers, or none.
    """
    return folded_copy(network).requires_grad_(False)


def portable(network: nn.Module) -> nn.Module:
    """A folded network without this project's operators; parameters are shared."""
    parts = {id(part): part for part in network.parameters()}
    copied = copy.deepcopy(network, dict(parts))
    for name, module in list(copied.named_modules()):
        if isinstance(module, MirrorAttention):
            copied.set_submodule(name, PortableAttention(module))
        elif isinstance(module, PyramidPooling):
            copied.set_submodule(name, PortablePooling(module))
    return copied.eval()


def folded_mirrors(config: MirrorConfig) -> MirrorConfig:
    """The mirrors that a folded network still has: what a plain model must be built with to take its weights."""
    return MirrorParameters(1, 2 * config.query_mirrors, config).eval().without_static().config


def _mirror_tables(mirrors: MirrorParameters, q: Tensor, k: Tensor) -> Tables | None:
    """cos 2t and sin 2t (B or 1, H, J) of the mirrors that are not folded; None where all are."""
    if not mirrors.config.block_mirror:
        return None
    angle = mirrors.fixed_angle()
    angle = mirrors.angles(_relative_variance(q, k)) if angle is None else angle.unsqueeze(0)
    return torch.cos(2 * angle), torch.sin(2 * angle)


def _relative_variance(q: Tensor, k: Tensor) -> Tensor:
    """rho (B, H, J) of as many queries as keys: together they are one set of 2 N tokens."""
    x = torch.cat((q, k), 1)
    mean = x.mean(1)
    spread = (x - mean.unsqueeze(1)).square().mean(1).unflatten(-1, (-1, 2)).mean(-1)
    return spread / (spread + mean.unflatten(-1, (-1, 2)).square().mean(-1) + 1e-6)


def _mirror_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mirror: Tables | None,
    rope: Tables | None,
    power: float,
    query_mirrors: Sequence[Tables] | None = None,
) -> Tensor:
    """Mirrored linear attention (B, N, H, d); see reference.py."""
    phi_k = reference.feature_map(k, mirror, power)
    # Means on both sides: a number of tokens turned into a float would be fixed in the program.
    roped = phi_k if rope is None else rotate(phi_k, *rope)
    state = torch.einsum("bmhd,bmhe->bhde", roped, v) / k.shape[1]
    mirrors = (mirror,) if query_mirrors is None else query_mirrors
    return reference.read(q, state, phi_k.mean(1), mirrors, rope=rope, power=power)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, rope: Tables | None) -> Tensor:
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    heads = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2)
