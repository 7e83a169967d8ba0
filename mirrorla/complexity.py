"""Parameters and multiply-accumulates, counted on the meta device: no memory, no time."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mirrorla.pyramid import MirrorPyramid
from mirrorla.variants import VARIANTS, create_backbone


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


def variant_table(size: int = 224) -> str:
    """The variants with their cost, one a line.

    Args:
        size: side of the image in pixels.

    Returns:
        A text table: name, parameters, GMACs, channels, depths, head widths and attention layout.
    """
    rows = [("variant", "params M", f"GMACs {size}²", "channels", "depths", "heads", "head width", "attention")]
    for name, spec in VARIANTS.items():
        with torch.device("meta"):
            model = create_backbone(name)
        assert isinstance(model, MirrorPyramid)
        rows.append(
            (
                name,
                f"{count_parameters(model) / 1e6:.2f}",
                f"{count_gmacs(model, size):.2f}",
                _join(spec.dims),
                _join(spec.depths),
                _join(spec.heads),
                _join(tuple(dim // heads for dim, heads in zip(spec.dims, spec.heads, strict=True))),
                attention_layout(model),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def attention_layout(model: MirrorPyramid) -> str:
    """The kind of attention in each stage, and whether the whole is linear in the tokens.

    Args:
        model: a pyramid.

    Returns:
        For example "mirror x4 (linear)" or "mirror, mirror, softmax, softmax (not linear)".
    """
    kinds = model.attention_kinds
    return "mirror x4 (linear)" if set(kinds) == {"mirror"} else f"{', '.join(kinds)} (not linear)"


def _join(values: tuple[int, ...]) -> str:
    return ",".join(str(value) for value in values)
