"""The variants and hosts: their tables, one builder, and their registration with timm."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from mirrorla.host_parts import DeiTSpec, HostConfig, PVTSpec
from mirrorla.hosts import PVT, DeiT
from mirrorla.mirror_parameters import MirrorConfig
from mirrorla.pretrained import load_pretrained
from mirrorla.pyramid import AttentionLayout, MirrorPyramid, PyramidSpec

_SMALL_SCALE = (1.0, 1.0, 1e-6, 1e-6)

VARIANTS = MappingProxyType(
    {
        # Under 1 M parameters, for 32-pixel digits on a laptop.
        "mirrorla_pico": PyramidSpec((32, 48, 96, 128), (1, 1, 2, 1), (1, 2, 4, 4), 3.0, 0.0, head_width=256),
        "mirrorla_xtiny": PyramidSpec((32, 64, 128, 384), (2, 2, 2, 2), (1, 2, 4, 12), 3.5, 0.10),
        "mirrorla_tiny": PyramidSpec((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), 4.0, 0.10),
        "mirrorla_small": PyramidSpec((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), 3.5, 0.15),
        "mirrorla_base": PyramidSpec((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), 4.0, 0.40, _SMALL_SCALE),
        "mirrorla_large": PyramidSpec((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), 3.5, 0.55, (1e-6,) * 4),
    }
)

HOSTS: Mapping[str, DeiTSpec | PVTSpec] = MappingProxyType(
    {
        # For grids of a few hundred tokens on a laptop.
        "mirrorla_deit_pico": DeiTSpec(
            64, 2, 2, patch_size=4, image_size=64, drop_path=0.0, init_std=0.07, patch_std=0.12
        ),
        "mirrorla_deit_tiny": DeiTSpec(192, 12, 3),
        "mirrorla_deit_small": DeiTSpec(384, 12, 6),
        "mirrorla_deit_base": DeiTSpec(768, 12, 12),
        "mirrorla_pvt_tiny": PVTSpec((2, 2, 2, 2)),
        "mirrorla_pvt_small": PVTSpec((3, 4, 6, 3)),
        "mirrorla_pvt_medium": PVTSpec((3, 4, 18, 3), drop_path=0.3),
        "mirrorla_pvt_large": PVTSpec((3, 8, 27, 3), drop_path=0.3),
    }
)
MODELS = (*VARIANTS, *HOSTS)
"""Every backbone of this project, by name."""

default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "interpolation": "bicubic",
            "crop_pct": 224 / 256,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stem.0.0" if name in VARIANTS else "stem.proj",
            "classifier": "head.fc" if name in VARIANTS else "head",
        }
        for name in MODELS
    }
)


def create_backbone(
    name: str,
    *,
    num_classes: int = 1000,
    drop_path_rate: float | None = None,
    mirror: MirrorConfig | None = None,
    attention: AttentionLayout = "mirror",
    host: HostConfig | None = None,
    pretrained: str | None = None,
) -> nn.Module:
    """Build a MirrorLA variant, a host around its attention, or any peer that timm knows, by name.

    Args:
        name: "mirrorla_tiny" and the like, or a timm model name.
        num_classes: classes of the classifier.
        drop_path_rate: stochastic depth; None takes the variant's.
        mirror: mirrors of a MirrorLA variant or host; None is the default configuration.
        attention: kind of attention of a MirrorLA variant or host, one for all stages or one for each.
        host: options of a host, such as "mirrorla_deit_tiny"; None is the default configuration.
        pretrained: a .safetensors or .pt file to start from; what does not fit is reported.

    Returns:
        images (B, 3, H, W) -> logits (B, num_classes).

    Raises:
        ValueError: an unknown name or kind of attention, options for a model that has none, or a checkpoint of
            another variant.
        FileNotFoundError: no such checkpoint.
    """
    options = own_options(name, mirror, attention, host)
    model = timm.create_model(name, num_classes=num_classes, drop_path_rate=drop_path_rate, **options)
    if pretrained is not None:
        load_pretrained(model, pretrained)
    return model


def own_options(
    name: str, mirror: MirrorConfig | None, attention: AttentionLayout, host: HostConfig | None
) -> dict[str, Any]:
    """What timm must hand on to a model of this project; nothing to a peer.

    Args:
        name: "mirrorla_tiny" and the like, or a timm model name.
        mirror: mirrors of a MirrorLA variant or host.
        attention: kind of attention of a MirrorLA variant or host.
        host: options of a host.

    Raises:
        ValueError: an unknown name, the nearest is named; or options that a model without them must leave alone.
    """
    if name not in MODELS and not timm.is_model(name):
        raise ValueError(f"backbone {name!r} is unknown: {_nearest(name)}")
    if name not in HOSTS and host not in (None, HostConfig()):
        raise ValueError(f"backbone {name!r} is no host: leave host at its defaults, or choose 'mirrorla_deit_tiny'")
    if name in HOSTS:
        return {"mirror": mirror, "attention": attention, "host": host}
    if name in VARIANTS:
        return {"mirror": mirror, "attention": attention}
    kinds = (attention,) if isinstance(attention, str) else attention
    if mirror not in (None, MirrorConfig()) or set(kinds) != {"mirror"}:
        raise ValueError(f"backbone {name!r} has no mirrors: leave mirror and attention at their defaults")
    return {}


def _nearest(name: str) -> str:
    own = difflib.get_close_matches(name if name.startswith("mirrorla") else f"mirrorla_{name}", MODELS, 1, 0.85)
    near = own or difflib.get_close_matches(name, timm.list_models(), n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(MODELS)}, or a timm model name"


def _build(variant: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """timm's entry point; its registry prescribes the open keywords."""
    spec = VARIANTS.get(variant) or HOSTS[variant]
    if isinstance(spec, DeiTSpec):
        if options.pop("features_only", False):
            raise RuntimeError("a DeiT has maps at one stride only")
        return build_model_with_cfg(DeiT, variant, pretrained, spec=spec, **options)
    if options.get("features_only"):
        options["dense"] = True
    return build_model_with_cfg(
        MirrorPyramid if isinstance(spec, PyramidSpec) else PVT,
        variant,
        pretrained,
        spec=spec,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **options,
    )


@register_model
def mirrorla_pico(pretrained: bool = False, **options: Any) -> nn.Module:
    """MirrorLA pico, for 32-pixel images on a laptop."""
    return _build("mirrorla_pico", pretrained, **options)


@register_model
def mirrorla_xtiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """MirrorLA xtiny."""
    return _build("mirrorla_xtiny", pretrained, **options)


@register_model
def mirrorla_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """MirrorLA tiny."""
    return _build("mirrorla_tiny", pretrained, **options)


@register_model
def mirrorla_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """MirrorLA small."""
    return _build("mirrorla_small", pretrained, **options)


@register_model
def mirrorla_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """MirrorLA base."""
    return _build("mirrorla_base", pretrained, **options)


@register_model
def mirrorla_large(pretrained: bool = False, **options: Any) -> nn.Module:
    """MirrorLA large."""
    return _build("mirrorla_large", pretrained, **options)


@register_model
def mirrorla_deit_pico(pretrained: bool = False, **options: Any) -> nn.Module:
    """Mirror attention in DeiT pico, for small grids on a laptop."""
    return _build("mirrorla_deit_pico", pretrained, **options)


@register_model
def mirrorla_deit_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """Mirror attention in DeiT tiny."""
    return _build("mirrorla_deit_tiny", pretrained, **options)


@register_model
def mirrorla_deit_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """Mirror attention in DeiT small."""
    return _build("mirrorla_deit_small", pretrained, **options)


@register_model
def mirrorla_deit_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """Mirror attention in DeiT base."""
    return _build("mirrorla_deit_base", pretrained, **options)


@register_model
def mirrorla_pvt_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """Mirror attention in PVT tiny."""
    return _build("mirrorla_pvt_tiny", pretrained, **options)


@register_model
def mirrorla_pvt_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """Mirror attention in PVT small."""
    return _build("mirrorla_pvt_small", pretrained, **options)


@register_model
def mirrorla_pvt_medium(pretrained: bool = False, **options: Any) -> nn.Module:
    """Mirror attention in PVT medium."""
    return _build("mirrorla_pvt_medium", pretrained, **options)


@register_model
def mirrorla_pvt_large(pretrained: bool = False, **options: Any) -> nn.Module:
    """Mirror attention in PVT large."""
    return _build("mirrorla_pvt_large", pretrained, **options)
