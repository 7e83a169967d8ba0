"""The data-driven start: point every block mirror at the features of one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mirrorla.attention import MirrorAttention
from mirrorla.mirrors import reflect_rows


@torch.no_grad()
def align_mirrors(model: nn.Module, images: Tensor) -> None:
    """Set each layer's block angles from one batch, first layer to last, each seeing its aligned predecessors.

    The result depends on the batch: on several ranks run it on the same images, or broadcast the parameters after it.

    Args:
        model: a model with MirrorAttention layers, changed in place; its mode is kept and its buffers are untouched.
        images: (B, 3, H, W).
    """
    was_training = model.training
    hooks = [
        module.register_forward_pre_hook(_align, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, MirrorAttention) and module.mirrors is not None
    ]
    try:
        model.eval()(images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def _align(module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    """Before a layer runs: project without block mirrors, then aim them at the means."""
    assert isinstance(module, MirrorAttention) and module.mirrors is not None
    C, u = module.dim, module.mirrors.u
    heads = (module.num_heads, module.head_dim)
    tokens = inputs[0][:, options.get("prefix", 0) :]  # a class token has no say
    features = [
        nn.functional.linear(
            tokens,
            reflect_rows(module.qkvg.weight[rows], u, None, None),
            None
            if module.qkvg.bias is None
            else reflect_rows(module.qkvg.bias[rows].unsqueeze(1), u, None, None).squeeze(1),
        ).unflatten(-1, heads)
        for rows in (slice(0, C), slice(C, 2 * C))
    ]
    module.mirrors.align(*features)
