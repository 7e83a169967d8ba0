"""Backbones for dense tasks: a MirrorLA variant or any hierarchical timm model as maps at strides 4 to 32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import timm
from timm.layers.format import Format
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureInfo
from torch import Tensor, nn

from mirrorla.host_parts import DeiTSpec, HostConfig
from mirrorla.hosts import PVT
from mirrorla.mirror_parameters import MirrorConfig
from mirrorla.pretrained import load_pretrained
from mirrorla.pyramid import STRIDES, AttentionLayout, MirrorPyramid
from mirrorla.variants import HOSTS, own_options

HIERARCHIES = (MirrorPyramid, PVT)
"""Models of this project with maps at `STRIDES`, and stem, stages, merges and norms by these names."""


class DenseBackbone(nn.Module):
    """Maps of a network at chosen strides; frozen stages neither learn nor follow the training mode.

    Args:
        body: a dense MirrorPyramid, or a model that timm built with features_only.
        strides: wanted strides, ascending.
        name: names the network in errors.

    Attributes:
        channels: channels of the maps.
        strides: their strides.

    Raises:
        ValueError: the body has no map at one of the strides.
    """

    def __init__(self, body: nn.Module, strides: Sequence[int] = STRIDES, *, name: str = "the backbone") -> None:
        super().__init__()
        self.body, self.name = body, name
        channels, found = _maps(body)
        if missing := sorted(set(strides) - set(found)):
            raise ValueError(
                f"backbone {name!r} gives maps at strides {', '.join(map(str, found))}, and {missing[0]} is missing; "
                "choose a hierarchical one, for example 'mirrorla_tiny' or 'resnet18'"
            )
        # of several maps at one stride the last is the deepest
        self._places = [max(i for i, stride in enumerate(found) if stride == wanted) for wanted in strides]
        self.channels = tuple(channels[place] for place in self._places)
        self.strides = tuple(strides)
        self._frozen: tuple[nn.Module, ...] = ()
        if isinstance(body, HIERARCHIES):  # a norm whose map nobody reads would get no gradient
            for place in set(range(len(found))).difference(self._places):
                body.norms[place] = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> maps (B, C_i, ceil(H/s_i), ceil(W/s_i))."""
        if isinstance(self.body, HIERARCHIES):
            maps: Sequence[Tensor] = self.body.forward_features(x)
        else:
            maps = self.body(x)
            if getattr(self.body, "output_fmt", Format.NCHW) == Format.NHWC:
                maps = [features.permute(0, 3, 1, 2) for features in maps]
        return tuple(maps[place] for place in self._places)

    def forward_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """The same maps, by the name that every backbone here answers to."""
        return self(x)

    def freeze(self, stages: int) -> None:
        """Keep the first stages as they are: no gradient, and norms that use and keep their running statistics.

        Args:
            stages: how many, from the stem on: 1 is the stem and the stage of stride 4; 0 is nothing.

        Raises:
            ValueError: stages outside 0 … 4, or a network whose stages cannot be told apart.
        """
        if not 0 <= stages <= len(STRIDES):
            raise ValueError(f"model.frozen_stages {stages} must lie in 0 … {len(STRIDES)}; 0 freezes nothing")
        self._frozen = tuple(self._first_stages(stages)) if stages else ()
        for part in self._frozen:
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DenseBackbone:
        """Change the mode of everything that is not frozen."""
        super().train(mode)
        for part in self._frozen:
            part.train(False)
        return self

    def _first_stages(self, stages: int) -> list[nn.Module]:
        if isinstance(self.body, HIERARCHIES):
            return [self.body.stem, *self.body.stages[:stages], *self.body.merges[: stages - 1]]
        if not isinstance(self.body, FeatureDictNet):
            raise ValueError(f"model.frozen_stages {stages}: the stages of {self.name!r} cannot be told apart; use 0")
        _, found = _maps(self.body)
        last = max(place for place, stride in enumerate(found) if stride == STRIDES[stages - 1])
        children = list(self.body)
        return [self.body[name] for name in children[: children.index(list(self.body.return_layers)[last]) + 1]]


def create_dense_backbone(
    name: str,
    *,
    strides: Sequence[int] = STRIDES,
    drop_path_rate: float | None = None,
    mirror: MirrorConfig | None = None,
    attention: AttentionLayout = "mirror",
    host: HostConfig | None = None,
    pretrained: str | None = None,
) -> DenseBackbone:
    """Build the backbone of a detector or segmenter by name.

    Args:
        name: "mirrorla_tiny" and the like, or a timm model name.
        strides: of the wanted maps.
        drop_path_rate: stochastic depth; None takes the variant's.
        mirror: mirrors of a MirrorLA variant or host; None is the default configuration.
        attention: kind of attention of a MirrorLA variant or host, one for all stages or one for each.
        host: options of a host; None is the default configuration.
        pretrained: a .safetensors or .pt file to start from, for example a classifier's checkpoint.

    Returns:
        images (B, 3, H, W) -> maps at the strides.

    Raises:
        ValueError: an unknown name, mirror options for a peer, a model without such maps, or a checkpoint of another
            variant.
        FileNotFoundError: no such checkpoint.
    """
    options = own_options(name, mirror, attention, host)
    is_own = bool(options) and not isinstance(HOSTS.get(name), DeiTSpec)
    options["dense" if is_own else "features_only"] = True  # our own need no wrapper of timm's
    try:
        body = timm.create_model(name, drop_path_rate=drop_path_rate, **options)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"backbone {name!r} gives no feature maps ({error}); choose 'resnet18', for example") from None
    if pretrained is not None:  # before norms are left out: the report then names what the file really lacks
        load_pretrained(body, pretrained, partial(_flattened, body))
    return DenseBackbone(body, strides, name=name)


def _flattened(body: nn.Module, name: str) -> str:
    """What a features_only model calls a classifier's tensor: timm turns "stages.0.…" into "stages_0.…" in some."""
    outer, _, rest = name.partition(".")
    inner, _, leaf = rest.partition(".")
    if isinstance(body, FeatureDictNet) and f"{outer}_{inner}" in body:
        return f"{outer}_{inner}.{leaf}"
    return f"model.{name}" if isinstance(body, FeatureGetterNet) else name


def _maps(body: nn.Module) -> tuple[list[int], list[int]]:
    """Channels and strides of everything a network gives, shallow to deep."""
    if isinstance(body, HIERARCHIES):
        return list(body.channels), list(body.strides)
    info = cast(FeatureInfo, body.feature_info)
    return list(info.channels()), list(info.reduction())
