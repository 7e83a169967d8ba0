"""The peers of mirror attention: other feature maps, and softmax, behind one signature in the same block.

A linear map is a pair phi(q), phi(k) of non-negative features that the operator of `kernels` attends with, so sums are
fp32 and denominators see no positions, as for mirrors. Each map is written as its authors published it; what they put
around it (convolutions over values, gates, positions) is the block's and the same for all. The learned divisors of
queries and keys in the code of FLatten and PolaFormer are left out: a divisor of a channel is part of its projection.

Shapes: B images, N queries, M keys, H heads, d channels of a head, F = width·d features of a head.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirrorla.kernels.op import mirror_linear_attention
from mirrorla.kernels.reference import Tables
from mirrorla.positions import rotate

Stream = tuple[Tensor, Tensor, Tensor]
"""phi(q) (B, N, H, F), phi(k) (B, M, H, F) and the values they weigh (B, M, H, e)."""

SATURATION = 1e3
"""Largest input of a power, far above what trains: its fifth power times itself stays far below fp32's 3e38."""


class FeatureMap(nn.Module):
    """A linear peer: subclasses give phi of queries and of keys, and most need nothing else.

    Args:
        num_heads: heads H.
        head_dim: channels of a head d.

    Attributes:
        width: features for each channel; the state is (width·d) x d.
        cuts: whether phi drops the negative half of q and k, so that its retained energy says something.
    """

    width = 1
    cuts = False

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()

    def queries(self, q: Tensor) -> Tensor:
        """phi(q) >= 0: (B, N, H, d) of fp32 or better -> (B, N, H, F)."""
        raise NotImplementedError

    def keys(self, k: Tensor) -> Tensor:
        """phi(k) >= 0: (B, M, H, d) of fp32 or better -> (B, M, H, F); the queries' map unless a peer has another."""
        return self.queries(k)

    def streams(self, q: Tensor, k: Tensor, v: Tensor) -> list[Stream]:
        """What is attended with; the outputs of several streams are concatenated along the channels.

        Args:
            q: queries (B, N, H, d).
            k: keys (B, M, H, d).
            v: values (B, M, H, d).
        """
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        return [(self.queries(q), self.keys(k), v)]

    def tables(self, rope: Tables | None) -> Tables | None:
        """Rotary tables (N, d/2) for F features: every block of d turns alike."""
        return None if rope is None else (rope[0].repeat(1, self.width), rope[1].repeat(1, self.width))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_rope: Tables | None, k_rope: Tables | None, mask: Tensor | None
    ) -> Tensor:
        """Attend.

        Args:
            q: queries (B, N, H, d).
            k: keys (B, M, H, d).
            v: values (B, M, H, d).
            q_rope: rotary tables of the queries (N, d/2), or None.
            k_rope: rotary tables of the keys (M, d/2), or None.
            mask: True for the keys that count (B, M), or None.

        Returns:
            (B, N, H, d) in q's dtype.
        """
        if mask is not None:  # before the map: the gradient of a masked inf or nan would be nan
            k = k.masked_fill(~mask[:, :, None, None], 0.0)
        q_rope, k_rope = self.tables(q_rope), self.tables(k_rope)
        parts = [
            mirror_linear_attention(phi_q, phi_k, values, q_rope=q_rope, k_rope=k_rope, mask=mask)  # ReLU(phi) = phi
            for phi_q, phi_k, values in self.streams(q, k, v)
        ]
        return torch.cat(parts, -1).to(q.dtype)


class Relu(FeatureMap):
    """phi(x) = ReLU(x): mirror attention without mirrors, and the same computation."""

    cuts = True

    def queries(self, q: Tensor) -> Tensor:
        """phi of queries and keys; see FeatureMap."""
        return q.relu()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_rope: Tables | None, k_rope: Tables | None, mask: Tensor | None
    ) -> Tensor:
        """Attend without features in memory: the operator maps by itself; see FeatureMap."""
        return mirror_linear_attention(q, k, v, q_rope=q_rope, k_rope=k_rope, mask=mask)


class Elu(FeatureMap):
    """phi(x) = ELU(x) + 1: Katharopoulos et al. 2020, "Transformers are RNNs", equation 7."""

    def queries(self, q: Tensor) -> Tensor:
        """phi of queries and keys; see FeatureMap."""
        return torch.where(q > 0, q + 1, q.clamp(max=0).exp())  # exp(x) - 1 + 1 would be 0 below -17


class Focused(FeatureMap):
    """phi(x) = |r| / |r^3| · r^3 with r = ReLU(x): Han et al. 2023, "FLatten Transformer", equation 5, power 3.

    Norms are taken over the channels of a head, where the authors' code takes them over all heads at once.
    """

    cuts = True

    def queries(self, q: Tensor) -> Tensor:
        """phi of queries and keys; see FeatureMap."""
        unit, size = _unit_largest(q.relu())
        cubes = unit.pow(3)
        ratio = torch.linalg.vector_norm(unit, dim=-1, keepdim=True) / _norm_of_unit(cubes)
        return cubes * ratio * size


class Polar(FeatureMap):
    """phi(x) = [ReLU(x)^p, ReLU(-x)^p]: Meng et al. 2025, "PolaFormer" (arXiv 2501.15061), section 4.

    The first half of the values is weighed by same-signed products, the second half by opposite-signed ones, and
    p = 1 + 4·sigmoid(w) is learned for every head and channel; w = 0 at the start, as in the authors' code. Their
    polarity coefficients multiply the concatenated streams: that is the block's gate.
    """

    width = 2

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__(num_heads, head_dim)
        self.power = nn.Parameter(torch.zeros(num_heads, head_dim))

    def queries(self, q: Tensor) -> Tensor:
        """phi of queries and keys; see FeatureMap."""
        return _both_signs(q.clamp(-SATURATION, SATURATION), 1 + 4 * self.power.to(q.dtype).sigmoid())

    def streams(self, q: Tensor, k: Tensor, v: Tensor) -> list[Stream]:
        """The same-signed stream over the first half of the values, the opposite-signed one over the second."""
        [(same, phi_k, v)] = super().streams(q, k, v)
        opposite = same.roll(same.shape[-1] // 2, -1)
        first, second = v.chunk(2, dim=-1)
        return [(same, phi_k, first), (opposite, phi_k, second)]


class NormAware(FeatureMap):
    """phi(q) = [ReLU(q), ReLU(-q)] / |q| to the power 3·(0.5 + tanh|q|); phi(k) = [ReLU(k^3), ReLU(-k^3)].

    Meng et al. 2025, "NaLaFormer" (arXiv 2506.21137), in the form of the authors' vision models (without the option
    that takes cosines and sines of directions); the norm is over the channels of a head.
    """

    width = 2

    def queries(self, q: Tensor) -> Tensor:
        """phi of queries; see FeatureMap."""
        unit, size = _unit_largest(q)
        norm = _norm_of_unit(unit)
        return _both_signs(unit / norm, 3 * (0.5 + torch.tanh(norm * size)))

    def keys(self, k: Tensor) -> Tensor:
        """phi of keys; see FeatureMap."""
        return _both_signs(k.clamp(-SATURATION, SATURATION).pow(3))


class Softmax(nn.Module):
    """softmax(q·k / sqrt d), torch's scaled_dot_product_attention; rotary positions turn all of it. Quadratic.

    Args:
        num_heads: heads H.
        head_dim: channels of a head d.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_rope: Tables | None, k_rope: Tables | None, mask: Tensor | None
    ) -> Tensor:
        """Attend; see FeatureMap."""
        if q_rope is not None and k_rope is not None:
            q, k = rotate(q, *q_rope), rotate(k, *k_rope)
        bias = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, M)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
        return y.transpose(1, 2)


PEERS = MappingProxyType(
    {
        "relu": Relu,
        "elu": Elu,
        "focused": Focused,
        "polar": Polar,
        "norm_aware": NormAware,
        "softmax": Softmax,
    }
)
KINDS = ("mirror", *PEERS)
"""Every kind of attention that a block takes."""


def check_kind(kind: str) -> str:
    """A kind of attention, or its refusal.

    Raises:
        ValueError: naming the nearest kind.
    """
    if kind in KINDS:
        return kind
    near = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(KINDS)}"
    raise ValueError(f"attention kind {kind!r} is unknown: {hint}")


def layout_of(attention: str | Sequence[str], stages: int) -> tuple[str, ...]:
    """The kind of attention in each stage.

    Args:
        attention: one kind for all stages, or one for each.
        stages: number of stages.

    Raises:
        ValueError: an unknown kind, or kinds for another number of stages.
    """
    kinds = (attention,) * stages if isinstance(attention, str) else tuple(attention)
    for kind in kinds:
        check_kind(kind)
    if len(kinds) != stages:
        wanted = "four stages" if stages == 4 else "one stage" if stages == 1 else f"{stages} stages"
        raise ValueError(f'attention {list(kinds)} must name {wanted}, or be one kind for all, for example "mirror"')
    return kinds


def _both_signs(x: Tensor, power: Tensor | None = None) -> Tensor:
    """[ReLU(x), ReLU(-x)] along the channels, to a power."""
    positive, negative = x.relu(), (-x).relu()
    if power is not None:
        positive, negative = positive.pow(power), negative.pow(power)
    return torch.cat((positive, negative), dim=-1)


def _unit_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over its largest channel, and that (B, N, H, 1), a constant: powers and norms then neither over- nor underflow.

    Gradients stay exact where the factor cancels, that is in homogeneous functions put together from both results.
    """
    size = x.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return x / size, size


def _norm_of_unit(unit: Tensor) -> Tensor:
    """Norm over the channels of vectors whose largest is 1, so at least 1; for zero vectors something to divide by."""
    return torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp(min=0.5)
