"""The configuration of a backbone, shared by all tasks."""

from dataclasses import dataclass, field

from torch import nn

from mirrorla import HOSTS, HostConfig, MirrorConfig, create_backbone
from mirrorla.dense import DenseBackbone, create_dense_backbone
from mirrorla.feature_maps import check_kind, layout_of
from mirrorla.host_parts import DeiTSpec
from mirrorla.pyramid import STRIDES


@dataclass(frozen=True)
class BackboneConfig:
    """What `mirrorla.create_backbone` builds.

    Attributes:
        name: "mirrorla_tiny" and the like, or any timm model name.
        mirror: the mirrors of a MirrorLA variant.
        attention: "mirror" or a peer (relu, elu, focused, polar, norm_aware, softmax) for all stages, or a list of one
            for each of the four.
        host: options of a host such as "mirrorla_deit_tiny".
        drop_path_rate: stochastic depth; null takes the variant's.
        pretrained: a .safetensors or .pt file to start from.

    Raises:
        ValueError: an unknown kind of attention; the nearest is named.
    """

    name: str = "mirrorla_tiny"
    mirror: MirrorConfig = field(default_factory=MirrorConfig)
    attention: str | list[str] = "mirror"
    host: HostConfig = field(default_factory=HostConfig)
    drop_path_rate: float | None = None
    pretrained: str | None = None

    def __post_init__(self) -> None:
        for kind in (self.attention,) if isinstance(self.attention, str) else self.attention:
            check_kind(kind)

    @property
    def layout(self) -> tuple[str, ...]:
        """The kind of attention in each stage; a DeiT is one."""
        return layout_of(self.attention, 1 if isinstance(HOSTS.get(self.name), DeiTSpec) else len(STRIDES))


def build_classifier(config: BackboneConfig, num_classes: int) -> nn.Module:
    """A backbone with its classifier: images (B, 3, H, W) -> logits (B, num_classes)."""
    return create_backbone(
        config.name,
        num_classes=num_classes,
        drop_path_rate=config.drop_path_rate,
        mirror=config.mirror,
        attention=config.attention,
        host=config.host,
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
        host=config.host,
        pretrained=config.pretrained,
    )
    backbone.freeze(frozen_stages)
    return backbone
