"""The operators registered with torch: which code runs, its gradients, and shapes and costs without running it.

    mirrorla::attention, mirrorla::kv_state, mirrorla::apply_state and the backward of each

They take tensors that op.py has checked. S and s come back with the output because backward needs them; beyond
q, k and v nothing else is kept.

Shapes: B images, N queries, M keys, H heads, dk and dv channels, J = dk/2 blocks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from mirrorla.kernels import cpu, gradients, reference, tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels on CPU tensors, as their tests want it."""

_MIRROR = "Tensor? mirror_cos, Tensor? mirror_sin"
_Q_ROPE = "Tensor? q_cos, Tensor? q_sin"
_K_ROPE = "Tensor? k_cos, Tensor? k_sin"
_ATTENTION = f"{_MIRROR}, {_Q_ROPE}, {_K_ROPE}, Tensor? mask, float power, float eps"
_STATE = f"{_MIRROR}, {_K_ROPE}, Tensor? mask, float power"
_APPLY = f"{_MIRROR}, {_Q_ROPE}, float power, float eps"


def uses_triton(x: Tensor, dk: int, dv: int) -> bool:
    """Whether the Triton kernels serve a tensor; where a GPU goes without them, one warning says why.

    Args:
        x: q or k.
        dk: channels of a head of q and k.
        dv: channels of a head of v.
    """
    if x.device.type == "cpu":
        return INTERPRETED and tiles.hindrance(None, x.dtype, dk, dv) is None
    if x.device.type != "cuda" or x.dtype == torch.float64 or not torch.cuda.is_available():
        return False
    reason = _hindrance(x.device, x.dtype, dk, dv)
    if reason is not None:
        _warn_once(reason)
    return reason is None


@functools.cache
def _hindrance(device: torch.device, dtype: torch.dtype, dk: int, dv: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return tiles.hindrance(torch.cuda.get_device_capability(device), dtype, dk, dv)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"mirrorla: {reason}; attention runs as plain PyTorch, several times slower", stacklevel=2)


def _run(entry: str, x: Tensor, dv: int, *args: Any) -> Any:
    """Call an entry point of the kernels or of cpu.py, the only place that chooses."""
    with reference.without_autocast(x.device.type):
        if not uses_triton(x, x.shape[-1], dv):
            return getattr(cpu, entry)(*args)
        module = "backward" if entry.endswith("backward") else "forward"
        return getattr(importlib.import_module(f"mirrorla.kernels.{module}"), entry)(*args)


def _present(grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What an operator may return: tensors that share no memory; absent gradients of the mirrors are empty."""
    *first, cos, sin = grads
    if cos is None or sin is None:
        return *(grad for grad in first if grad is not None), like.new_empty(0), like.new_empty(0)
    shared = cos.untyped_storage().data_ptr() == sin.untyped_storage().data_ptr()
    return *(grad for grad in first if grad is not None), cos, sin.clone() if shared else sin


@custom_op(
    "mirrorla::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_ATTENTION}) -> (Tensor, Tensor, Tensor)",
)
def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, N, H, dv), S (B, H, dk, dv), s (B, H, dk); S and s are empty where backward makes them again."""
    return _run("forward", q, v.shape[-1], q, k, v, *options)


@custom_op(
    "mirrorla::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor S, Tensor s, {_ATTENTION})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """dq, dk, dv and the gradients of the mirror tables."""
    return _present(_run("backward", q, v.shape[-1], grad_out, q, k, v, *rest), q)


@custom_op("mirrorla::kv_state", mutates_args=(), schema=f"(Tensor k, Tensor v, {_STATE}) -> (Tensor, Tensor)")
def kv_state(k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """S (B, H, dk, dv) and s (B, H, dk)."""
    return _run("state", k, v.shape[-1], k, v, *options)


@custom_op(
    "mirrorla::kv_state_backward",
    mutates_args=(),
    schema=f"(Tensor grad_S, Tensor grad_s, Tensor k, Tensor v, {_STATE}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def kv_state_backward(grad_S: Tensor, grad_s: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """dk, dv and the gradients of the mirror tables."""
    return _present(_run("state_backward", k, v.shape[-1], grad_S, grad_s, k, v, *options), k)


@custom_op("mirrorla::apply_state", mutates_args=(), schema=f"(Tensor q, Tensor S, Tensor s, {_APPLY}) -> Tensor")
def apply_state(q: Tensor, S: Tensor, s: Tensor, *options: Any) -> Tensor:
    """(B, N, H, dv)."""
    return _run("apply", q, S.shape[-1], q, S, s, *options)


@custom_op(
    "mirrorla::apply_state_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor q, Tensor S, Tensor s, {_APPLY}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def apply_state_backward(grad_out: Tensor, q: Tensor, S: Tensor, s: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """dq, dS, ds and the gradients of the mirror tables."""
    return _present(_run("apply_backward", q, S.shape[-1], grad_out, q, S, s, *options), q)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, H, dk), dv = q.shape, v.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    kept = not (uses_triton(q, dk, dv) and max(N, k.shape[1]) <= tiles.CHIP_TOKENS)
    S_shape, s_shape = ((B, H, dk, dv), (B, H, dk)) if kept else ((0,), (0,))
    return q.new_empty((B, N, H, dv)), q.new_empty(S_shape, dtype=wide), q.new_empty(s_shape, dtype=wide)


@attention_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor, s: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v)), *_like_tables(options[:2], q)


@kv_state.register_fake
def _(k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    (B, _, H, dk), dv = k.shape, v.shape[-1]
    wide = torch.promote_types(k.dtype, torch.float32)
    return k.new_empty((B, H, dk, dv), dtype=wide), k.new_empty((B, H, dk), dtype=wide)


@kv_state_backward.register_fake
def _(grad_S: Tensor, grad_s: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return k.new_empty(k.shape), v.new_empty(v.shape), *_like_tables(options[:2], k)


@apply_state.register_fake
def _(q: Tensor, S: Tensor, s: Tensor, *options: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], S.shape[-1]))


@apply_state_backward.register_fake
def _(grad_out: Tensor, q: Tensor, S: Tensor, s: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, S, s)), *_like_tables(options[:2], q)


def _like_tables(mirror: Sequence[Tensor | None], x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if table is None else table.new_empty(table.shape) for table in mirror)


attention.register_autograd(gradients.of_attention, setup_context=gradients.keep_for_attention)
kv_state.register_autograd(gradients.of_kv_state, setup_context=gradients.keep_for_kv_state)
apply_state.register_autograd(gradients.of_apply_state, setup_context=gradients.keep_for_apply_state)


# FLOPs: of the products with S and dS, and of phi(q)·s, the same that torch counts in the reference.


@register_flop_formula(torch.ops.mirrorla.attention)
def _(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    return _state_flops(k, v[-1]) + _reading_flops(q, v[-1])


@register_flop_formula(torch.ops.mirrorla.attention_backward)
def _(_: Any, q: Sequence[int], k: Sequence[int], v: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * _state_flops(k, v[-1]) + _reading_flops(q, 2 * v[-1])


@register_flop_formula(torch.ops.mirrorla.kv_state)
def _(k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    return _state_flops(k, v[-1])


@register_flop_formula(torch.ops.mirrorla.kv_state_backward)
def _(_: Any, __: Any, k: Sequence[int], v: Sequence[int], *___: Any, **____: Any) -> int:
    return 2 * _state_flops(k, v[-1])


@register_flop_formula(torch.ops.mirrorla.apply_state)
def _(q: Sequence[int], S: Sequence[int], *_: Any, **__: Any) -> int:
    return _reading_flops(q, S[-1])


@register_flop_formula(torch.ops.mirrorla.apply_state_backward)
def _(_: Any, q: Sequence[int], S: Sequence[int], *__: Any, **___: Any) -> int:
    return _reading_flops(q, 2 * S[-1])


def _state_flops(k: Sequence[int], dv: int) -> int:
    B, M, H, dk = k
    return 2 * B * M * H * dk * dv


def _reading_flops(q: Sequence[int], dv: int) -> int:
    B, N, H, dk = q
    return 2 * B * N * H * dk * (dv + 1)
