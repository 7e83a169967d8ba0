"""Parameters and multiply-accumulates, counted on the meta device: no memory, no time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mirrorla.attention import MirrorAttention, attention_layers
from mirrorla.feature_maps import KINDS, PEERS
from mirrorla.host_parts import DeiTSpec
from mirrorla.hosts import PVT, DeiT
from mirrorla.kernels.op import mirror_linear_attention
from mirrorla.pyramid import MirrorPyramid
from mirrorla.variants import HOSTS, MODELS, VARIANTS, create_backbone

Shape = tuple[int, int, int]
"""Tokens, heads and head width of one attention layer."""


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values of a model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_gmacs(model: nn.Module, size: int | tuple[int, int] = 224, channels: int = 3) -> float:
    """Multiply-accumulates of one forward pass in units of 10^9.

    Matrix products and convolutions are counted, half of what torch's FLOP counter reports; element-wise work is not.

    Args:
        model: any model of images; it may live on any device and is not changed.
        size: side of the square image, or (height, width), in pixels.
        channels: channels of the image.

    Returns:
        GMACs for one image.
    """
    height, width = (size, size) if isinstance(size, int) else size
    parameter = next(model.parameters())
    image = torch.empty((1, channels, height, width), device=parameter.device, dtype=parameter.dtype)
    was_training = model.training
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(image)
    finally:
        model.train(was_training)
    return counter.get_total_flops() / 2e9


def core_gmacs(kind: str, shape: Shape) -> float:
    """Multiply-accumulates of attention itself in units of 10^9: between the projections, without positions and gate.

    Args:
        kind: "mirror" or a peer of `feature_maps`.
        shape: tokens, heads and head width.
    """
    tokens, heads, width = shape
    x = torch.empty(1, tokens, heads, width, device="meta")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        if kind == "mirror":  # whichever mirrors: turning pairs of channels is element-wise
            mirror_linear_attention(x, x, x)
        else:
            PEERS[kind](heads, width)(x, x, x, None, None, None)
    return counter.get_total_flops() / 2e9


def variant_table(size: int = 224) -> str:
    """The variants and hosts with their cost, one a line.

    Args:
        size: side of the image in pixels.

    Returns:
        A text table: name, parameters, GMACs, channels, depths, head widths and attention layout.
    """
    rows = [("variant", "params M", f"GMACs {size}²", "channels", "depths", "heads", "head width", "attention")]
    for name in MODELS:
        model = _on_meta(name)
        dims, depths, heads = _sizes(name)
        rows.append(
            (
                name,
                f"{count_parameters(model) / 1e6:.2f}",
                f"{count_gmacs(model, size):.2f}",
                _join(dims),
                _join(depths),
                _join(heads),
                _join([dim // number for dim, number in zip(dims, heads, strict=True)]),
                attention_layout(model),
            )
        )
    return _aligned(rows)


def comparison_table(size: int = 224, names: Sequence[str] = MODELS) -> str:
    """Every variant and host with every kind of attention in all of its stages, one a line.

    Args:
        size: side of the image in pixels.
        names: the models, all of this project's.

    Returns:
        A text table: name, kind of attention, parameters, GMACs, those of the core, and the core's share of mirror's.
    """
    rows = [("model", "attention", "params M", f"GMACs {size}²", "of them core", "core of mirror's")]
    for name in names:
        shapes, around = _layers_and_rest(_on_meta(name), size)
        cores = {kind: sum(core_gmacs(kind, shape) * count for shape, count in shapes.items()) for kind in KINDS}
        for kind in KINDS:
            parameters = count_parameters(_on_meta(name, kind)) / 1e6
            share = cores[kind] / cores["mirror"]
            rows.append(
                (name, kind, f"{parameters:.3f}", f"{around + cores[kind]:.3f}", f"{cores[kind]:.4f}", f"{share:.2f}x")
            )
    return _aligned(rows)


def attention_layout(model: MirrorPyramid | DeiT | PVT) -> str:
    """The kind of attention in each stage, and whether the whole is linear in the tokens.

    Args:
        model: a variant or host.

    Returns:
        For example "mirror x4 (linear)" or "mirror, mirror, softmax, softmax (not linear)".
    """
    kinds = model.attention_kinds
    words = f"{kinds[0]} x{len(kinds)}" if len(set(kinds)) == 1 and len(kinds) > 1 else ", ".join(kinds)
    return f"{words} ({'not linear' if 'softmax' in kinds else 'linear'})"


def _on_meta(name: str, kind: str = "mirror") -> MirrorPyramid | DeiT | PVT:
    with torch.device("meta"):
        return cast(MirrorPyramid | DeiT | PVT, create_backbone(name, attention=kind))


def _layers_and_rest(model: nn.Module, size: int) -> tuple[Counter[Shape], float]:
    """How many attention layers of which shape a model of mirrors has, and the GMACs of everything around them."""
    shapes: Counter[Shape] = Counter()

    def record(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, MirrorAttention)
        shapes[inputs[0].shape[1], layer.num_heads, layer.head_dim] += 1

    for layer in attention_layers(model):
        layer.register_forward_pre_hook(record)
    total = count_gmacs(model, size)
    return shapes, total - sum(core_gmacs("mirror", shape) * count for shape, count in shapes.items())


def _sizes(name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Channels, depths and heads of the stages; a DeiT is one."""
    spec = VARIANTS.get(name) or HOSTS[name]
    if isinstance(spec, DeiTSpec):
        return (spec.dim,), (spec.depth,), (spec.heads,)
    return spec.dims, spec.depths, spec.heads


def _join(values: Sequence[int]) -> str:
    return ",".join(str(value) for value in values)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
