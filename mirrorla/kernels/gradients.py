"""Derivatives of the operators: explicit ones for training, the reference's where they are differentiated again.

Each operator of operators.py has two functions here: what forward keeps for backward, and the gradients of its
arguments in their order, None for those that have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mirrorla.kernels import reference

Grads = tuple[Tensor | None, ...]

_ops = torch.ops.mirrorla


def keep_for_attention(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    """q, k, v and their tables, which live anyway, and the state."""
    q, k, v, *tables, ctx.power, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, *output[1:], *tables)


def of_attention(ctx: Any, grad_out: Tensor, *_: Tensor) -> Grads:
    """Of q, k, v and the mirror tables, from that of the output; the state is no output to differentiate."""
    q, k, v, S, s, *tables = ctx.saved_tensors
    options = ctx.power, ctx.eps
    if not torch.is_grad_enabled():
        return _padded(_ops.attention_backward(grad_out, q, k, v, S, s, *tables, *options), tables, 12)

    def again(q: Tensor, k: Tensor, v: Tensor, *mirror: Tensor) -> Tensor:
        q_rope, k_rope = _pair(tables[2:4]), _pair(tables[4:6])
        return reference.mirror_linear_attention(
            q, k, v, mirror=_pair(mirror), q_rope=q_rope, k_rope=k_rope, mask=tables[6], power=ctx.power, eps=ctx.eps
        )

    return _padded(_differentiably(again, (q, k, v, *tables[:2]), (grad_out,)), tables, 12)


def keep_for_kv_state(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    """The inputs."""
    *tensors, ctx.power = inputs
    ctx.save_for_backward(*tensors)


def of_kv_state(ctx: Any, grad_S: Tensor, grad_s: Tensor) -> Grads:
    """Of k, v and the mirror tables, from those of S and s."""
    k, v, *tables = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return _padded(_ops.kv_state_backward(grad_S, grad_s, k, v, *tables, ctx.power), tables, 8)

    def again(k: Tensor, v: Tensor, *mirror: Tensor) -> tuple[Tensor, ...]:
        options = {"rope": _pair(tables[2:4]), "mask": tables[4], "power": ctx.power}
        return reference.kv_state(k, v, mirror=_pair(mirror), **options)[:2]

    return _padded(_differentiably(again, (k, v, *tables[:2]), (grad_S, grad_s)), tables, 8)


def keep_for_apply_state(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """The inputs."""
    *tensors, ctx.power, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def of_apply_state(ctx: Any, grad_out: Tensor) -> Grads:
    """Of q, S, s and the mirror tables, from that of the output."""
    q, S, s, *tables = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return _padded(_ops.apply_state_backward(grad_out, q, S, s, *tables, ctx.power, ctx.eps), tables, 9)

    def again(q: Tensor, S: Tensor, s: Tensor, *mirror: Tensor) -> Tensor:
        options = {"rope": _pair(tables[2:4]), "power": ctx.power, "eps": ctx.eps}
        return reference.apply_state(q, S, s, mirror=_pair(mirror), **options)

    return _padded(_differentiably(again, (q, S, s, *tables[:2]), (grad_out,)), tables, 9)


def _differentiably(function: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]) -> Grads:
    """Gradients of the reference that can be differentiated again.

    Args:
        function: of all inputs, to one tensor or several.
        inputs: tensors of the graph, or None.
        grads: of the outputs.

    Returns:
        A gradient for every input, None where none is wanted.
    """
    # Views of their own: where one tensor is both q and k, each gets its part.
    views = [x if x is None else x.view_as(x) for x in inputs]
    wanted = [x for x in views if x is not None and x.requires_grad]
    with reference.without_autocast(grads[0].device.type):
        outputs = function(*views)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in views)


def _padded(grads: Sequence[Tensor | None], tables: Sequence[Tensor | None], num_inputs: int) -> Grads:
    """One gradient for every argument of an operator: None for absent mirrors and for everything behind them."""
    *first, cos, sin = grads
    mirror = (None, None) if tables[0] is None else (cos, sin)
    return (*first, *mirror, *(None,) * (num_inputs - len(grads)))


def _pair(tables: Sequence[Tensor | None]) -> reference.Tables | None:
    first, second = tables
    return None if first is None or second is None else (first, second)
