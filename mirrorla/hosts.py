"""Hosts for controlled swaps of the attention: DeiT, without a convolution, and PVT, around the same MirrorAttention.

Shapes: B images, C channels, N = h·w tokens of a grid, p = 1 with a class token in front of them, else 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from timm.layers.drop import calculate_drop_path_rates
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from mirrorla.attention import MirrorAttention, attention_layers, folded_copy, undecayed_parameters
from mirrorla.feature_maps import layout_of
from mirrorla.host_parts import (
    NORM_EPS,
    DeiTSpec,
    HostConfig,
    Patches,
    PlainBlock,
    PVTSpec,
    host_attention,
    start_weights,
)
from mirrorla.layers import to_map, to_tokens
from mirrorla.mirror_parameters import MirrorConfig
from mirrorla.pyramid import STRIDES, AttentionLayout


class DeiT(nn.Module):
    """Touvron et al. 2021, "Training data-efficient image transformers", without distillation, any attention inside.

    Besides its patches it has no convolution, so that only the attention can relate tokens to each other.

    Args:
        spec: sizes of the variant.
        num_classes: classes of the classifier; 0 returns features.
        in_chans: channels of the images.
        drop_path_rate: overrides the variant's stochastic depth.
        mirror: mirrors of every attention layer.
        attention: kind of attention in all blocks.
        host: positions, patches, class token and gate.

    Raises:
        ValueError: an unknown kind of attention, or several.
    """

    def __init__(
        self,
        spec: DeiTSpec,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float | None = None,
        mirror: MirrorConfig | None = None,
        attention: AttentionLayout = "mirror",
        host: HostConfig | None = None,
    ) -> None:
        super().__init__()
        host = host or HostConfig()
        patch, side = host.patch_size or spec.patch_size, host.image_size or spec.image_size
        has_token = spec.class_token if host.class_token is None else host.class_token
        self.spec = replace(spec, patch_size=patch, image_size=side, class_token=has_token)
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, spec.dim, spec.dim
        self.attention_kinds = layout_of(attention, 1)
        cells = -(-side // patch) if host.positions == "learned" else None
        self.stem = Patches(in_chans, spec.dim, patch, cells=cells, norm=False)
        self.class_token = nn.Parameter(torch.zeros(1, 1, spec.dim)) if has_token else None
        rate = spec.drop_path if drop_path_rate is None else drop_path_rate
        rates = cast(list[float], calculate_drop_path_rates(rate, spec.depth))
        self.blocks = nn.ModuleList(
            PlainBlock(
                host_attention(spec.dim, spec.heads, self.attention_kinds[0], mirror, host, lepe=False),
                spec.mlp_ratio,
                rate,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(spec.dim, eps=NORM_EPS)
        self.head = nn.Linear(spec.dim, num_classes) if num_classes else nn.Identity()
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)
        self.apply(partial(start_weights, std=spec.init_std))
        if spec.patch_std is not None:
            nn.init.trunc_normal_(self.stem.proj.weight, std=spec.patch_std)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens (B, p + N, C), the class token first."""
        x = self.stem(x)
        grid = (x.shape[2], x.shape[3])
        x = to_tokens(x)
        prefix = 0
        if self.class_token is not None:
            x, prefix = torch.cat((self.class_token.expand(x.shape[0], -1, -1).to(x.dtype), x), 1), 1
        for block in self.blocks:
            x = block(x, grid, prefix)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        x = self.forward_features(x)
        return self.head(x.mean(1) if self.class_token is None else x[:, 0])

    def attentions(self) -> list[MirrorAttention]:
        """The attention layers, first to last."""
        return attention_layers(self)

    def fold(self) -> DeiT:
        """A copy for inference; see `attention.folded_copy`."""
        return folded_copy(self)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not decay: mirrors, maps, position table and class token."""
        return undecayed_parameters(self) | ({"stem.table", "class_token"} & dict(self.named_parameters()).keys())

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """timm's layer groups, for layer-wise learning-rate decay: one for each block, coarse or not."""
        return {"stem": r"^stem|^class_token", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^head", (99999,))]}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head


class PVT(nn.Module):
    """Wang et al. 2021, "Pyramid Vision Transformer", with spatial reduction 1 and any attention inside.

    It classifies from the mean of the last stage's tokens, where the original has a class token there. The depthwise
    term over the values is part of the attention, as in the published linear peers' PVTs.

    Args:
        spec: sizes of the variant.
        num_classes: classes of the classifier; 0 returns features.
        in_chans: channels of the images.
        drop_path_rate: overrides the variant's stochastic depth.
        mirror: mirrors of every attention layer.
        attention: kind of attention, one for all stages or one for each.
        host: positions and gate.
        dense: no classifier, and a LayerNorm2d on each of `forward_features`' maps.

    Attributes:
        channels: channels of the four maps of `forward_features`.
        strides: their strides.
        attention_kinds: kind of attention in each stage.

    Raises:
        ValueError: an unknown kind of attention, a layout that does not name four, or an option of DeiT.
    """

    def __init__(
        self,
        spec: PVTSpec,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float | None = None,
        mirror: MirrorConfig | None = None,
        attention: AttentionLayout = "mirror",
        host: HostConfig | None = None,
        dense: bool = False,
    ) -> None:
        super().__init__()
        host = host or HostConfig()
        if host.patch_size is not None or host.class_token:
            wrong = "class_token true" if host.class_token else f"patch_size {host.patch_size}"
            raise ValueError(f"host.{wrong} is an option of DeiT hosts: leave it at null for a PVT")
        self.num_classes = 0 if dense else num_classes
        self.channels, self.strides, self.attention_kinds = spec.dims, STRIDES, layout_of(attention, len(STRIDES))
        self.num_features = self.head_hidden_size = spec.dims[-1]
        side = host.image_size or spec.image_size
        cells = [-(-side // stride) if host.positions == "learned" else None for stride in STRIDES]
        ins, sides = (in_chans, *spec.dims[:-1]), (STRIDES[0], 2, 2, 2)
        stem, *merges = (
            Patches(ins[stage], spec.dims[stage], sides[stage], cells=cells[stage], norm=True) for stage in range(4)
        )
        rate = spec.drop_path if drop_path_rate is None else drop_path_rate
        rates = cast(list[list[float]], calculate_drop_path_rates(rate, list(spec.depths), stagewise=True))
        self.stem, self.merges = stem, nn.ModuleList(merges)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                PlainBlock(
                    host_attention(dim, heads, kind, mirror, host, lepe=True),
                    mlp_ratio,
                    rate,
                )
                for rate in stage_rates
            )
            for dim, heads, mlp_ratio, kind, stage_rates in zip(
                spec.dims, spec.heads, spec.mlp_ratios, self.attention_kinds, rates, strict=True
            )
        )
        self.norms = nn.ModuleList(LayerNorm2d(dim, eps=NORM_EPS) if dense else nn.Identity() for dim in spec.dims)
        self.norm = nn.Identity() if dense else nn.LayerNorm(spec.dims[-1], eps=NORM_EPS)
        self.head = nn.Linear(spec.dims[-1], num_classes) if self.num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{stage}"}
            for stage, (dim, stride) in enumerate(zip(spec.dims, STRIDES, strict=True))
        ]
        self.apply(start_weights)

    def forward_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """The four maps, taken before merging; with `dense`, each through its own norm.

        Args:
            x: images (B, in_chans, H, W).

        Returns:
            Four maps (B, C_i, ceil(H/s_i), ceil(W/s_i)) with s = 4, 8, 16, 32.
        """
        features = []
        for stage, blocks in enumerate(self.stages):
            x = self.merges[stage - 1](x) if stage else self.stem(x)
            grid = (x.shape[2], x.shape[3])
            tokens = to_tokens(x)
            for block in cast(nn.ModuleList, blocks):
                tokens = block(tokens, grid)
            x = to_map(tokens, grid)
            features.append(self.norms[stage](x))
        return tuple(features)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.head(self.norm(to_tokens(self.forward_features(x)[-1])).mean(1))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] = (0, 1, 2, 3),
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = True,
    ) -> list[Tensor]:
        """timm's features_only contract over `forward_features`; see MirrorPyramid.forward_intermediates."""
        assert output_fmt == "NCHW" and intermediates_only, "only NCHW intermediates are offered"
        features = self.forward_features(x)
        return [features[index] for index in indices]

    def attentions(self) -> list[MirrorAttention]:
        """The attention layers, first to last."""
        return attention_layers(self)

    def fold(self) -> PVT:
        """A copy for inference; see `attention.folded_copy`."""
        return folded_copy(self)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not decay: mirrors, maps and position tables."""
        tables = {name for name, _ in self.named_parameters() if name.endswith(".table")}
        return undecayed_parameters(self) | tables

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """timm's layer groups, for layer-wise learning-rate decay.

        Args:
            coarse: one group for each stage instead of each block.
        """
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^merges\.(\d+)", None)]}
        last = (r"^norm|^head", (99999,))
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)\.(\d+)", None), (r"^merges\.(\d+)", (99999,)), last]}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head
