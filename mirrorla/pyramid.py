"""The hierarchical MirrorLA backbone: four stages at strides 4, 8, 16 and 32, every one of them linear in the tokens.

Shapes: B images, C_i channels of stage i, N = h·w tokens. No parameter depends on the input's size; a side n gives
maps of ceil(n / stride), and nothing is padded into the attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from timm.layers.drop import DropPath, calculate_drop_path_rates
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from mirrorla.attention import MirrorAttention, attention_layers, folded_copy, undecayed_parameters
from mirrorla.feature_maps import layout_of
from mirrorla.heads.classifier import ClassifierHead
from mirrorla.layers import ConvFFN, ResidualDepthwise, Stem, conv_norm, init_weights, to_map, to_tokens
from mirrorla.mirror_parameters import MirrorConfig

AttentionLayout = str | Sequence[str]
"""One kind of attention for all stages, or one for each stage; the kinds are those of `feature_maps`."""
STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class PyramidSpec:
    """The sizes of one variant.

    Attributes:
        dims: channels of the four stages.
        depths: blocks of the four stages.
        heads: attention heads of the four stages.
        mlp_ratio: hidden width of the feed-forward, in multiples of the stage's channels.
        drop_path: largest stochastic-depth rate, reached at the last block.
        layer_scale: start of both residual scales in each stage.
        head_width: channels before the classifier.
    """

    dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    mlp_ratio: float
    drop_path: float
    layer_scale: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    head_width: int = 1024


class Block(nn.Module):
    """Conditional position, attention and feed-forward, each a residual step.

    Args:
        dim: channels.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward in multiples of dim.
        drop_path: probability that an image skips a residual branch in training.
        layer_scale: start of the two learned residual scales.
        mirror: mirrors of the attention.
        kind: "mirror" or a peer of `feature_maps`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float,
        mirror: MirrorConfig,
        kind: str,
    ) -> None:
        super().__init__()
        self.position = ResidualDepthwise(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = MirrorAttention(dim, num_heads, mirror=mirror, kind=kind)
        self.scale1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = ConvFFN(dim, round(mlp_ratio * dim))
        self.scale2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        grid = (x.shape[2], x.shape[3])
        x = to_tokens(self.position(x))
        x = x + self.drop_path(self.scale1 * self.attention(self.norm1(x), grid))
        x = x + self.drop_path(self.scale2 * self.ffn(self.norm2(x), grid))
        return to_map(x, grid)


class MirrorPyramid(nn.Module):
    """Stem, four stages of blocks with merging between them, and a classifier or, for dense tasks, four norms.

    Args:
        spec: sizes of the variant.
        num_classes: classes of the classifier; 0 returns pooled features.
        in_chans: channels of the images.
        drop_path_rate: overrides the variant's stochastic depth.
        mirror: mirrors of every attention layer.
        attention: kind of attention, one for all stages or one for each; without "softmax" it is strictly linear.
        dense: no classifier, and a LayerNorm2d on each of `forward_features`' maps.

    Attributes:
        channels: channels of the four maps of `forward_features`.
        strides: their strides.
        attention_kinds: kind of attention in each stage.

    Raises:
        ValueError: an unknown kind of attention, or a layout that does not name four.
    """

    def __init__(
        self,
        spec: PyramidSpec,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float | None = None,
        mirror: MirrorConfig | None = None,
        attention: AttentionLayout = "mirror",
        dense: bool = False,
    ) -> None:
        super().__init__()
        kinds = layout_of(attention, len(STRIDES))
        self.spec, self.num_classes = spec, 0 if dense else num_classes
        self.channels, self.strides, self.attention_kinds = spec.dims, STRIDES, kinds
        self.num_features = self.head_hidden_size = spec.dims[-1] if dense else spec.head_width
        rate = spec.drop_path if drop_path_rate is None else drop_path_rate
        rates = cast(list[list[float]], calculate_drop_path_rates(rate, list(spec.depths), stagewise=True))
        self.stem = Stem(in_chans, spec.dims[0])
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(
                        spec.dims[stage],
                        spec.heads[stage],
                        mlp_ratio=spec.mlp_ratio,
                        drop_path=rate,
                        layer_scale=spec.layer_scale[stage],
                        mirror=mirror or MirrorConfig(),
                        kind=kinds[stage],
                    )
                    for rate in rates[stage]
                )
            )
            for stage in range(len(STRIDES))
        )
        self.merges = nn.ModuleList(conv_norm(a, b, stride=2) for a, b in itertools.pairwise(spec.dims))
        self.norms = nn.ModuleList(LayerNorm2d(dim) if dense else nn.Identity() for dim in spec.dims)
        self.head: nn.Module = nn.Identity() if dense else ClassifierHead(spec.dims[-1], spec.head_width, num_classes)
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{stage}"}
            for stage, (dim, stride) in enumerate(zip(spec.dims, STRIDES, strict=True))
        ]
        self.apply(init_weights)

    def forward_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """The four maps, taken before merging; with `dense`, each through its own norm.

        Args:
            x: images (B, in_chans, H, W), any H, W >= 32.

        Returns:
            Four maps (B, C_i, ceil(H/s_i), ceil(W/s_i)) with s = 4, 8, 16, 32.
        """
        # channels_last makes the switch between maps and tokens free of copies.
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        features = []
        for stage, blocks in enumerate(self.stages):
            if stage:
                x = self.merges[stage - 1](x)
            x = blocks(x)
            features.append(self.norms[stage](x))
        return tuple(features)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.head(self.forward_features(x)[-1])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] = (0, 1, 2, 3),
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = True,
    ) -> list[Tensor]:
        """timm's features_only contract over `forward_features`.

        Args:
            x: images (B, in_chans, H, W).
            indices: which of the four maps.
            norm: the norms of a dense model are always applied; the flag is accepted for timm.
            output_fmt: only "NCHW".
            intermediates_only: only True.

        Returns:
            The chosen maps.
        """
        assert output_fmt == "NCHW" and intermediates_only, "only NCHW intermediates are offered"
        features = self.forward_features(x)
        return [features[index] for index in indices]

    def attentions(self) -> list[MirrorAttention]:
        """The attention layers, first to last."""
        return attention_layers(self)

    def fold(self) -> MirrorPyramid:
        """A copy for inference whose static mirrors are merged into the projections, exactly.

        Returns:
            A new model in evaluation mode; with input-dependent modulation only cross-head mirrors are merged, and a
            log line says so.
        """
        return folded_copy(self)

    def no_weight_decay(self) -> set[str]:
        """Names of the mirrors' and maps' parameters, which must not decay."""
        return undecayed_parameters(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """timm's layer groups, for layer-wise learning-rate decay.

        Args:
            coarse: one group for each stage instead of each block.
        """
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^merges\.(\d+)", None)]}
        return {
            "stem": r"^stem",
            "blocks": [(r"^stages\.(\d+)\.(\d+)", None), (r"^merges\.(\d+)", (99999,)), (r"^norms|^head", (99999,))],
        }

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc if isinstance(self.head, ClassifierHead) else nn.Identity()
