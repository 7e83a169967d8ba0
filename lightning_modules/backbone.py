"""The configuration of a backbone, shared by all tasks."""

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from mirrorla import MirrorConfig, create_backbone
from mirrorla.dense import DenseBackbone, create_dense_backbone

AttentionKind = Literal["mirror", "softmax"]


@dataclass(frozen=True)
class BackboneConfig:
    """What `mirrorla.create_backbone` builds.

    Attributes:
        name: "mirrorla_tiny" and the like, or any timm model name.
        mirror: the mirrors of a MirrorLA variant.
        attention: kind of attention in each of the four stages.
        drop_path_rate: stochastic depth; null takes the variant's.
        pretrained: a .safetensors or .pt file to start from.
    """

    name: str = "mirrorla_tiny"
    mirror: MirrorConfig = field(default_factory=MirrorConfig)
    attention: tuple[AttentionKind, AttentionKind, AttentionKind, AttentionKind] = ("mirror",) * 4
    drop_path_rate: float | None = None
    pretrained: str | None = None


def build_classifier(config: BackboneConfig, num_classes: int) -> nn.Module:
    """A backbone with its classifier: images (B, 3, H, W) -> logits (B, num_classes)."""
    return create_backbone(
        config.name,
        num_classes=num_classes,
        drop_path_rate=config.drop_path_rate,
        mirror=config.mirror,
        attention=config.attention,
        pretrained=config.pretrained,
    )


def build_dense(config: BackboneConfig, strides: tuple[int, ...], frozen_stages: int) -> DenseBackbone:
    """A backbone that gives maps.

    Args:
        config: the network.
        strides: of the maps.
        frozen_stages: stages from the stem on that do not learn.
    """
    backbone = create_dense_backbone(
        config.name,
        strides=strides,
        drop_path_rate=config.drop_path_rate,
        mirror=config.mirror,
        attention=config.attention,
        pretrained=config.pretrained,
    )
    backbone.freeze(frozen_stages)
    return backbone
