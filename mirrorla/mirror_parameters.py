"""The learned mirrors of one attention layer: which exist, how they start, which fold into the projection.

Shapes: B images, H heads, d channels of a head, C = H·d, J = d/2 blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mirrorla.kernels.reference import Tables
from mirrorla.mirrors import NEUTRAL_ANGLE, aligned_angle, angle_modulation, relative_variance, token_moments

MODULATIONS = ("none", "instance", "ema")
INITS = ("neutral", "aligned", "uniform")
NEUTRAL_NOISE = 0.02  # radians; breaks the tie between blocks without leaving plain ReLU attention
MODULATION_LIMIT = math.pi / 8
EMA_MOMENTUM = 0.1  # as BatchNorm's


@dataclass(frozen=True)
class MirrorConfig:
    """Which mirrors an attention layer has.

    Attributes:
        modulation: "instance" turns each block by the image's own variance; "ema" by a running one, static at
            inference and so foldable; "none" keeps angles static.
        cross_head: one mirror over the concatenated heads.
        block_mirror: one mirror for each block of two channels.
        power: exponent >= 1 of the feature map ReLU(x)^power; 1 is the paper's map, more sharpens the attention.
        query_mirrors: how many mirrors a head's queries have; each reads an equal share of the values. The first starts
            at the keys', the paper's only one, and the others spread evenly over half a turn from it: more places to
            look at for the same state.
        init: "neutral" starts as plain ReLU attention; "aligned" points block means into the orthant (call
            `align_mirrors` on one batch); "uniform" draws angles uniformly.

    Raises:
        ValueError: an unknown word, a power below 1, or what turns or multiplies block mirrors without them.
    """

    modulation: Literal["none", "instance", "ema"] = "instance"
    cross_head: bool = True
    block_mirror: bool = True
    power: float = 1.0
    query_mirrors: int = 1
    init: Literal["neutral", "aligned", "uniform"] = "neutral"

    def __post_init__(self) -> None:
        if self.modulation not in MODULATIONS:
            raise ValueError(
                f"mirror.modulation {self.modulation!r} is unknown: choose one of {', '.join(MODULATIONS)}"
            )
        if self.init not in INITS:
            raise ValueError(f"mirror.init {self.init!r} is unknown: choose one of {', '.join(INITS)}")
        if not self.power >= 1.0:
            raise ValueError(f"mirror.power {self.power} is below 1: choose 1 (the paper's map) or more")
        if self.query_mirrors < 1 or (self.query_mirrors > 1 and not self.block_mirror):
            raise ValueError(
                f"mirror.query_mirrors {self.query_mirrors} must be 1 or more, and 1 without mirror.block_mirror"
            )
        if self.modulation != "none" and not self.block_mirror:
            raise ValueError(
                f'mirror.modulation "{self.modulation}" turns block mirrors, which mirror.block_mirror=false removes: '
                'set modulation to "none" or block_mirror to true'
            )


class MirrorParameters(nn.Module):
    """Angles, modulation and cross-head normal of one layer, shared by queries and keys.

    Args:
        num_heads: heads H.
        head_dim: channels of a head, even.
        config: which mirrors exist.

    Raises:
        ValueError: queries have a number of mirrors that does not divide a head.
    """

    theta: Tensor | None
    offset: Tensor | None
    gain: Tensor | None
    centre: Tensor | None
    u: Tensor | None
    running_rho: Tensor | None

    def __init__(self, num_heads: int, head_dim: int, config: MirrorConfig) -> None:
        super().__init__()
        if head_dim % config.query_mirrors:
            raise ValueError(
                f"mirror.query_mirrors {config.query_mirrors} does not divide the head width {head_dim}: give a divisor"
            )
        self.config = config
        blocks = (num_heads, head_dim // 2)
        modulated = config.modulation != "none"
        self.theta = nn.Parameter(_start_angles(config.init, blocks)) if config.block_mirror else None
        self.offset = nn.Parameter(_start_offsets(config.query_mirrors, blocks)) if config.query_mirrors > 1 else None
        self.gain = nn.Parameter(torch.zeros(blocks)) if modulated else None
        self.centre = nn.Parameter(torch.full(blocks, 0.5)) if modulated else None
        self.u = nn.Parameter(torch.randn(num_heads * head_dim)) if config.cross_head else None
        self.register_buffer("running_rho", torch.full(blocks, 0.5) if config.modulation == "ema" else None)

    def has_static(self) -> bool:
        """Whether some mirror does not depend on the tokens and can be reflected into the projection."""
        return self.u is not None or self._static_angle() is not None

    def static_tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The mirrors to reflect into the projection's rows.

        Returns:
            u (C,), cos 2t and sin 2t (H, J); None for what does not exist or depends on the tokens.
        """
        angle = self._static_angle()
        if angle is None:
            return self.u, None, None
        return self.u, torch.cos(2 * angle), torch.sin(2 * angle)

    def token_tables(self, q: Tensor, k: Tensor, q_mask: Tensor | None, k_mask: Tensor | None) -> Tables | None:
        """The mirrors that depend on the tokens.

        Args:
            q: queries (B, N, H, d), after the static mirrors.
            k: keys (B, M, H, d), after the static mirrors.
            q_mask: True for the query tokens that count (B, N), or None.
            k_mask: True for the key tokens that count (B, M), or None.

        Returns:
            cos 2t and sin 2t, each (B or 1, H, J) fp32, or None where every mirror is static.
        """
        if self.theta is None or self._static_angle() is not None:
            return None
        angle = self.fixed_angle()
        angle = self.angles(self.relative_variance(q, k, q_mask, k_mask)) if angle is None else angle.unsqueeze(0)
        return torch.cos(2 * angle), torch.sin(2 * angle)

    def query_tables(self, tables: Tables | None) -> list[Tables] | None:
        """The mirrors of the queries, each turned by its offset from the keys'.

        Args:
            tables: of `token_tables`.

        Returns:
            Tables of the same shape, one for each share of the values; None where queries have the keys' mirror.
        """
        if self.offset is None:
            return None
        assert tables is not None, "several mirrors are never static"
        cos, sin = tables
        turns = zip(torch.cos(2 * self.offset), torch.sin(2 * self.offset), strict=True)  # each (H, J)
        return [(cos * c - sin * s, sin * c + cos * s) for c, s in turns]

    def relative_variance(self, q: Tensor, k: Tensor, q_mask: Tensor | None, k_mask: Tensor | None) -> Tensor:
        """rho of the tokens, per image or, for "ema", of the batch (and then remembered for evaluation).

        Args:
            q: queries (B, N, H, d).
            k: keys (B, M, H, d).
            q_mask: True for the query tokens that count (B, N), or None.
            k_mask: True for the key tokens that count (B, M), or None.

        Returns:
            (B or 1, H, J).
        """
        rho = relative_variance(q, k, q_mask, k_mask)  # (B, H, J)
        if self.running_rho is None:
            return rho
        rho = rho.mean(0, keepdim=True)
        if self.training:
            with torch.no_grad():
                self.running_rho.lerp_(rho[0].to(self.running_rho.dtype), EMA_MOMENTUM)
        return rho

    def angles(self, rho: Tensor) -> Tensor:
        """theta + delta_alpha(rho).

        Args:
            rho: relative variance (..., H, J).

        Returns:
            (..., H, J) in radians.
        """
        assert self.theta is not None and self.gain is not None and self.centre is not None
        return self.theta + angle_modulation(rho, self.gain, self.centre, MODULATION_LIMIT)

    def without_static(self) -> MirrorParameters:
        """The mirrors that remain once the static ones are merged into the projection; parameters are shared.

        Returns:
            A module without cross-head mirror and without block mirrors, unless they follow the image or queries have
            several.
        """
        keep_blocks = self._static_angle() is None and self.config.block_mirror
        config = replace(
            self.config,
            cross_head=False,
            block_mirror=keep_blocks,
            modulation=self.config.modulation if keep_blocks else "none",
        )
        rest = MirrorParameters.__new__(MirrorParameters)
        nn.Module.__init__(rest)
        rest.config = config
        rest.theta, rest.gain, rest.centre = (self.theta, self.gain, self.centre) if keep_blocks else (None, None, None)
        rest.u, rest.offset = None, self.offset if keep_blocks else None
        rest.register_buffer("running_rho", self.running_rho if keep_blocks else None)
        return rest.train(self.training)

    @torch.no_grad()
    def align(self, q: Tensor, k: Tensor) -> None:
        """Point every block's mean over queries and keys onto the diagonal of the positive quadrant.

        Args:
            q: queries after the cross-head mirror only (B, N, H, d).
            k: keys after the cross-head mirror only (B, M, H, d).
        """
        if self.theta is not None:
            mean = (token_moments(q)[0] + token_moments(k)[0]).mean(0) / 2  # (H, d)
            self.theta.copy_(aligned_angle(mean))

    def _static_angle(self) -> Tensor | None:
        """The block angles where they can be reflected into the projection (H, J): queries and keys share them."""
        return self.fixed_angle() if self.offset is None else None

    def fixed_angle(self) -> Tensor | None:
        """The keys' block angles where they do not depend on the tokens (H, J)."""
        if self.theta is None:
            return None
        if self.config.modulation == "none":
            return self.theta
        if self.running_rho is not None and not self.training:
            return self.angles(self.running_rho)
        return None


def _start_angles(init: str, blocks: tuple[int, int]) -> Tensor:
    if init == "uniform":
        return torch.rand(blocks) * math.pi  # a mirror at t + pi is the mirror at t
    return NEUTRAL_ANGLE + NEUTRAL_NOISE * torch.randn(blocks)


def _start_offsets(count: int, blocks: tuple[int, int]) -> Tensor:
    """(count, H, J): evenly over half a turn, after which a mirror is itself again."""
    turns = math.pi / count * torch.arange(count, dtype=torch.float32)
    return turns[:, None, None] + NEUTRAL_NOISE * torch.randn(count, *blocks)
