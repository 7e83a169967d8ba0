"""MirrorAttention: project, mirror, attend at linear cost, gate. A drop-in for softmax attention.

Shapes: B images, N query tokens, M key tokens, C channels, H heads, d = C/H channels of a head, J = d/2 blocks.
Source: arXiv 2602.04346 for the mirrors; the gate, the depthwise positional term and the rotary numerator around them
are our choice.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirrorla.depthwise import depthwise_conv
from mirrorla.kernels.op import mirror_linear_attention
from mirrorla.kernels.reference import Tables
from mirrorla.mirror_parameters import MirrorConfig, MirrorParameters
from mirrorla.mirrors import reflect_rows
from mirrorla.positions import rope_tables, rotate

Grid = tuple[int, int]
"""Height and width of a token grid; tokens are in row-major order."""


class MirrorAttention(nn.Module):
    """Linear attention whose queries and keys are reflected towards the non-negative orthant before ReLU.

    With a grid it adds rotary positions to the numerator and a 5x5 depthwise term over the values; without one it is
    permutation equivariant. Static mirrors are reflected into the projection's rows, so they cost nothing per token.

    Args:
        dim: channels C, divisible by num_heads.
        num_heads: heads H; C/H must be even, because mirrors act on blocks of two channels.
        mirror: which mirrors, how they start and whether the image modulates them.
        kind: "mirror", or "softmax" for scaled dot-product attention in the same block (quadratic, for comparison).
        qkv_bias: keep it on; centred features make every orthogonal mirror keep exactly half of the energy.

    Raises:
        ValueError: dim and num_heads do not fit, or an unknown kind.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mirror: MirrorConfig | None = None,
        kind: Literal["mirror", "softmax"] = "mirror",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}: choose a divisor of {dim}")
        if (dim // num_heads) % 2:
            raise ValueError(
                f"head width dim/num_heads = {dim}/{num_heads} = {dim // num_heads} is odd; mirrors reflect blocks of "
                "two channels: choose num_heads so that it is even"
            )
        if kind not in ("mirror", "softmax"):
            raise ValueError(f'attention kind {kind!r} is unknown: choose "mirror" or "softmax"')
        self.dim, self.num_heads, self.head_dim, self.kind = dim, num_heads, dim // num_heads, kind
        self.qkvg = nn.Linear(dim, 4 * dim, bias=qkv_bias)  # rows: q, k, v, gate
        self.mirrors = (
            MirrorParameters(num_heads, self.head_dim, mirror or MirrorConfig()) if kind == "mirror" else None
        )
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        grid: Grid | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_grid: Grid | None = None,
    ) -> Tensor:
        """Attend from x to itself, or to a context.

        Args:
            x: tokens (B, N, C).
            grid: height and width of x's tokens, height·width = N; None for an unordered set.
            mask: True for the tokens that count, over the sequence attended to: (B, N), or (B, M) with a context.
            context: tokens to take keys and values from (B, M, C); None is self-attention.
            context_grid: height and width of the context's tokens, for rotary positions across sequences.

        Returns:
            (B, N, C). Rows of tokens that are masked out are undefined but finite.

        Raises:
            ValueError: a grid, mask or context of another size.
        """
        self._check(x, grid, mask, context, context_grid)
        q, k, v, gate = self.project(x, context)
        q_rope = self.rope(grid, x.device)
        k_rope = q_rope if context is None else self.rope(context_grid, x.device)
        if q_rope is None or k_rope is None:  # positions of one sequence alone mean nothing
            q_rope = k_rope = None
        if self.mirrors is None:
            y = _softmax_attention(q, k, v, q_rope, k_rope, mask)
        else:
            tables = self.mirrors.token_tables(q, k, mask if context is None else None, mask)
            power = self.mirrors.config.power
            y = mirror_linear_attention(q, k, v, mirror=tables, q_rope=q_rope, k_rope=k_rope, mask=mask, power=power)
        y = y.flatten(2)  # (B, N, C)
        if grid is not None and context is None:
            y = y + self._positional_term(v, grid, mask)
        return self.proj(self.norm(y) * F.silu(gate))

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys with all static mirrors applied, values, and the gate.

        Args:
            x: tokens (B, N, C).
            context: tokens of the keys and values (B, M, C), or None.

        Returns:
            q (B, N, H, d), k and v (B, N or M, H, d), gate (B, N, C).
        """
        weight, bias = self.reflected_projection()
        C = self.dim
        if context is None:
            q, k, v, gate = F.linear(x, weight, bias).split(C, dim=-1)
        else:
            rows = weight.split(C)
            biases = bias.split(C) if bias is not None else (None,) * 4
            q, gate = F.linear(x, rows[0], biases[0]), F.linear(x, rows[3], biases[3])
            k, v = F.linear(context, rows[1], biases[1]), F.linear(context, rows[2], biases[2])
        heads = (self.num_heads, self.head_dim)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads), gate

    def reflected_projection(self) -> tuple[Tensor, Tensor | None]:
        """The projection with its static mirrors multiplied in; gradients reach weights and mirrors.

        Returns:
            weight (4C, C) and bias (4C,) or None.
        """
        weight, bias = self.qkvg.weight, self.qkvg.bias
        if self.mirrors is None or not self.mirrors.has_static():
            return weight, bias
        u, cos, sin = self.mirrors.static_tables()
        C = self.dim

        def reflect(rows: Tensor) -> Tensor:
            q, k, rest = rows.split((C, C, 2 * C))
            return torch.cat((reflect_rows(q, u, cos, sin), reflect_rows(k, u, cos, sin), rest))

        return reflect(weight), None if bias is None else reflect(bias.unsqueeze(1)).squeeze(1)

    def fold(self) -> MirrorAttention:
        """A copy whose static mirrors are merged into the projection, exactly.

        With input-dependent mirrors only the cross-head mirror can be merged; `folded.mirrors.config.modulation` then
        still reads "instance". Mirrors of kind "ema" are merged as evaluation uses them.

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
        """Names of the mirrors' parameters: decay would pull angles towards zero, which means nothing.

        Returns:
            Parameter names relative to this module.
        """
        return {name for name, _ in self.named_parameters() if name.startswith("mirrors.")}

    def rope(self, grid: Grid | None, device: torch.device) -> Tables | None:
        """Rotary tables for a grid, each (h·w, d/2), or None without one."""
        return None if grid is None else rope_tables(*grid, self.head_dim, device)

    def _positional_term(self, v: Tensor, grid: Grid, mask: Tensor | None) -> Tensor:
        values = v.flatten(2)  # (B, N, C)
        if mask is not None:
            values = values.masked_fill(~mask.unsqueeze(-1), 0.0)  # as if the image ended there
        return depthwise_conv(values.unflatten(1, grid), self.lepe.weight, self.lepe.bias).flatten(1, 2)

    def _check(
        self, x: Tensor, grid: Grid | None, mask: Tensor | None, context: Tensor | None, context_grid: Grid | None
    ) -> None:
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, N, {self.dim}), got {tuple(x.shape)}")
        if context is not None and (context.ndim != 3 or context.shape[-1] != self.dim):
            raise ValueError(f"context must be (B, M, {self.dim}), got {tuple(context.shape)}")
        keys = x if context is None else context
        for name, tokens, shape in (("grid", x, grid), ("context_grid", keys, context_grid)):
            if shape is not None and shape[0] * shape[1] != tokens.shape[1]:
                raise ValueError(
                    f"{name} {shape[0]}x{shape[1]} has {shape[0] * shape[1]} cells for {tokens.shape[1]} tokens: "
                    "give the height and width of the token grid"
                )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != keys.shape[:2]):
            raise ValueError(
                f"mask must be bool {tuple(keys.shape[:2])}, True for tokens that count; "
                f"got {str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
            )


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, q_rope: Tables | None, k_rope: Tables | None, mask: Tensor | None
) -> Tensor:
    """torch's scaled_dot_product_attention over (B, N, H, d) tensors, with rotary positions."""
    if q_rope is not None and k_rope is not None:
        q, k = rotate(q, *q_rope), rotate(k, *k_rope)
    bias = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, M)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return y.transpose(1, 2)
