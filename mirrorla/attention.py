"""MirrorAttention: project, mirror, attend at linear cost, gate. A drop-in for softmax attention.

Shapes: B images, N query tokens, M key tokens, C channels, H heads, d = C/H channels of a head, J = d/2 blocks.
Source: arXiv 2602.04346 for the mirrors; the gate, the depthwise positional term and the rotary numerator around them
are our choice.
"""

from __future__ import annotations

import copy
import logging
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirrorla.depthwise import depthwise_conv
from mirrorla.feature_maps import PEERS, check_kind
from mirrorla.kernels.op import mirror_linear_attention
from mirrorla.kernels.reference import Tables
from mirrorla.mirror_parameters import MirrorConfig, MirrorParameters
from mirrorla.mirrors import reflect_rows
from mirrorla.positions import rope_tables

_log = logging.getLogger(__name__)
Network = TypeVar("Network", bound=nn.Module)

Grid = tuple[int, int]
"""Height and width of a token grid; tokens are in row-major order."""


class MirrorAttention(nn.Module):
    """Linear attention whose queries and keys are reflected towards the non-negative orthant before ReLU.

    With a grid it adds rotary positions to the numerator and a 5x5 depthwise term over the values; without one it is
    permutation equivariant. Static mirrors are reflected into the projection's rows, so they cost nothing per token.
    The peers of the mirrors take their place in the same block, with the same projections.

    Args:
        dim: channels C, divisible by num_heads.
        num_heads: heads H; C/H must be even, because mirrors act on blocks of two channels.
        mirror: which mirrors, how they start and whether the image modulates them.
        kind: "mirror", or a peer of `feature_maps` in the same block: "softmax" is quadratic, the others linear.
        qkv_bias: keep it on; centred features make every orthogonal mirror keep exactly half of the energy.
        gate: LayerNorm the output and multiply it with SiLU of a fourth projection; without, both are left out.
        lepe: the depthwise term over the values.
        rotary: turn queries and keys by their place in a grid.

    Raises:
        ValueError: dim, num_heads and the mirrors do not fit, or an unknown kind; the nearest is named.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mirror: MirrorConfig | None = None,
        kind: str = "mirror",
        qkv_bias: bool = True,
        gate: bool = True,
        lepe: bool = True,
        rotary: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}: choose a divisor of {dim}")
        if (dim // num_heads) % 2:
            raise ValueError(
                f"head width dim/num_heads = {dim}/{num_heads} = {dim // num_heads} is odd; mirrors reflect blocks of "
                "two channels: choose num_heads so that it is even"
            )
        self.dim, self.num_heads, self.head_dim, self.kind = dim, num_heads, dim // num_heads, check_kind(kind)
        self.gate, self.rotary = gate, rotary
        self.qkvg = nn.Linear(dim, (4 if gate else 3) * dim, bias=qkv_bias)  # rows: q, k, v, and the gate
        self.mirrors = (
            MirrorParameters(num_heads, self.head_dim, mirror or MirrorConfig()) if kind == "mirror" else None
        )
        self.map = None if kind == "mirror" else PEERS[kind](num_heads, self.head_dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim) if lepe else None
        self.norm = nn.LayerNorm(dim) if gate else None
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        grid: Grid | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_grid: Grid | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Attend from x to itself, or to a context.

        Args:
            x: tokens (B, N, C).
            grid: height and width of x's tokens, height·width = N - prefix; None for an unordered set.
            mask: True for the tokens that count, over the sequence attended to: (B, N), or (B, M) with a context.
            context: tokens to take keys and values from (B, M, C); None is self-attention.
            context_grid: height and width of the context's tokens, for rotary positions across sequences.
            prefix: how many tokens at the start of x lie outside the grid, such as a class token: they attend and are
                attended to, but have no position and no say in the mirrors' statistics. Only without a context.

        Returns:
            (B, N, C). Rows of tokens that are masked out are undefined but finite.

        Raises:
            ValueError: a grid, mask or context of another size.
        """
        self._check(x, grid, mask, context, context_grid, prefix)
        q, k, v, gate = self.project(x, context)
        q_rope = self.rope(grid, x.device, prefix)
        k_rope = q_rope if context is None else self.rope(context_grid, x.device)
        if q_rope is None or k_rope is None:  # positions of one sequence alone mean nothing
            q_rope = k_rope = None
        if self.mirrors is None:
            assert self.map is not None, "a layer has mirrors or a peer's map"
            y = self.map(q, k, v, q_rope, k_rope, mask)
        else:
            tables = self.token_tables(q, k, mask if context is None else None, mask, prefix)
            y = mirror_linear_attention(
                q,
                k,
                v,
                mirror=tables,
                q_rope=q_rope,
                k_rope=k_rope,
                mask=mask,
                power=self.mirrors.config.power,
                query_mirrors=self.mirrors.query_tables(tables),
            )
        y = y.flatten(2)  # (B, N, C)
        if grid is not None and context is None and self.lepe is not None:
            y = y + self._positional_term(v, grid, mask, prefix)
        return self.output(y, gate)

    def output(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """What has been attended to (B, N, C), normed, gated and mixed: (B, N, C)."""
        return self.proj(y if self.norm is None or gate is None else self.norm(y) * F.silu(gate))

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries and keys with all static mirrors applied, values, and the gate.

        Args:
            x: tokens (B, N, C).
            context: tokens of the keys and values (B, M, C), or None.

        Returns:
            q (B, N, H, d), k and v (B, N or M, H, d), gate (B, N, C) or None.
        """
        weight, bias = self.reflected_projection()
        C = self.dim
        if context is None:
            q, k, v, *gates = F.linear(x, weight, bias).split(C, dim=-1)
        else:
            rows = weight.split(C)
            biases = bias.split(C) if bias is not None else (None,) * len(rows)
            q, *gates = (F.linear(x, rows[i], biases[i]) for i in range(len(rows)) if i not in (1, 2))
            k, v = F.linear(context, rows[1], biases[1]), F.linear(context, rows[2], biases[2])
        gate = gates[0] if gates else None
        heads = (self.num_heads, self.head_dim)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads), gate

    def reflected_projection(self) -> tuple[Tensor, Tensor | None]:
        """The projection with its static mirrors multiplied in; gradients reach weights and mirrors.

        Returns:
            weight (4C, C), or (3C, C) without gate, and bias (4C,) or (3C,) or None.
        """
        weight, bias = self.qkvg.weight, self.qkvg.bias
        if self.mirrors is None or not self.mirrors.has_static():
            return weight, bias
        u, cos, sin = self.mirrors.static_tables()
        C = self.dim

        def reflect(rows: Tensor) -> Tensor:  # (4C, C_in) or (3C, C_in)
            qk, rest = rows.split((2 * C, len(rows) - 2 * C))
            return torch.cat((reflect_rows(qk.unflatten(0, (2, C)), u, cos, sin).flatten(0, 1), rest))

        return reflect(weight), None if bias is None else reflect(bias.unsqueeze(1)).squeeze(1)

    def fold(self) -> MirrorAttention:
        """A copy whose static mirrors are merged into the projection, exactly.

        With input-dependent mirrors, or several of the queries, only the cross-head mirror can be merged. Mirrors of
        kind "ema" are merged as evaluation uses them.

        Returns:
            A new module in evaluation mode with the same outputs.
        """
        folded = copy.deepcopy(self).eval()
        if folded.mirrors is None:
            return folded
        with torch.no_grad():
            weight, bias = folded.reflected_projection()
            folded.qkvg.weight.copy_(weight)
            if bias is not None:
                folded.qkvg.bias.copy_(bias)
        folded.mirrors = folded.mirrors.without_static()
        return folded

    def no_weight_decay(self) -> set[str]:
        """Names of the mirrors' and the map's parameters: decay pulls angles and powers where it means nothing.

        Returns:
            Parameter names relative to this module.
        """
        return {name for name, _ in self.named_parameters() if name.startswith(("mirrors.", "map."))}

    def rope(self, grid: Grid | None, device: torch.device, prefix: int = 0) -> Tables | None:
        """Rotary tables for a grid, each (prefix + h·w, d/2), or None without one or without rotary positions."""
        if grid is None or not self.rotary:
            return None
        cos, sin = rope_tables(*grid, self.head_dim, device)
        return (F.pad(cos, (0, 0, prefix, 0), value=1.0), F.pad(sin, (0, 0, prefix, 0))) if prefix else (cos, sin)

    def token_tables(
        self, q: Tensor, k: Tensor, q_mask: Tensor | None, k_mask: Tensor | None, prefix: int = 0
    ) -> Tables | None:
        """The mirrors that depend on the tokens behind the prefix; see MirrorParameters.token_tables."""
        assert self.mirrors is not None, "only mirrors have tables"
        if prefix:
            q, k = q[:, prefix:], k[:, prefix:]
            q_mask, k_mask = (None if mask is None else mask[:, prefix:] for mask in (q_mask, k_mask))
        return self.mirrors.token_tables(q, k, q_mask, k_mask)

    def _positional_term(self, v: Tensor, grid: Grid, mask: Tensor | None, prefix: int) -> Tensor:
        assert self.lepe is not None
        values = v.flatten(2)  # (B, N, C)
        if mask is not None:
            values = values.masked_fill(~mask.unsqueeze(-1), 0.0)  # as if the image ended there
        if prefix:
            values = values[:, prefix:]
        term = depthwise_conv(values.unflatten(1, grid), self.lepe.weight, self.lepe.bias).flatten(1, 2)
        return F.pad(term, (0, 0, prefix, 0)) if prefix else term

    def _check(
        self,
        x: Tensor,
        grid: Grid | None,
        mask: Tensor | None,
        context: Tensor | None,
        context_grid: Grid | None,
        prefix: int,
    ) -> None:
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, N, {self.dim}), got {tuple(x.shape)}")
        if context is not None and (context.ndim != 3 or context.shape[-1] != self.dim):
            raise ValueError(f"context must be (B, M, {self.dim}), got {tuple(context.shape)}")
        if prefix and context is not None:
            raise ValueError(f"prefix {prefix} is for attention from x to itself: leave it at 0 with a context")
        keys = x if context is None else context
        for name, tokens, shape in (("grid", x, grid), ("context_grid", keys, context_grid)):
            count = tokens.shape[1] - prefix
            if shape is not None and shape[0] * shape[1] != count:
                raise ValueError(
                    f"{name} {shape[0]}x{shape[1]} has {shape[0] * shape[1]} cells for {count} tokens: "
                    "give the height and width of the token grid"
                )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != keys.shape[:2]):
            raise ValueError(
                f"mask must be bool {tuple(keys.shape[:2])}, True for tokens that count; "
                f"got {str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
            )


def attention_layers(model: nn.Module) -> list[MirrorAttention]:
    """The attention layers of a model, first to last."""
    return [module for module in model.modules() if isinstance(module, MirrorAttention)]


def folded_copy(model: Network) -> Network:
    """A copy of a model for inference whose static mirrors are merged into the projections, exactly.

    Returns:
        A new model in evaluation mode; with input-dependent modulation only cross-head mirrors are merged, and a log
        line says so.
    """
    folded = copy.deepcopy(model).eval()
    for name, module in list(folded.named_modules()):
        if isinstance(module, MirrorAttention):
            folded.set_submodule(name, module.fold())
    dynamic = sum(a.mirrors is not None and a.mirrors.config.block_mirror for a in attention_layers(folded))
    if dynamic:
        _log.warning(
            "block mirrors of %d layers stay, since they follow the image or queries have several; the rest is folded",
            dynamic,
        )
    return folded


def undecayed_parameters(model: nn.Module) -> set[str]:
    """Names of all mirrors' and maps' parameters of a model, which must not decay."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MirrorAttention)]
    return {f"{prefix}.{name}" for prefix, layer in layers for name in layer.no_weight_decay()}
