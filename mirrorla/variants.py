"""The variants: one table, one builder, and their registration with timm."""

from __future__ import annotations

import difflib
from types import MappingProxyType
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

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
            "first_conv": "stem.0.0",
            "classifier": "head.fc",
        }
        for name in VARIANTS
    }
)


def create_backbone(
    name: str,
    *,
    num_classes: int = 1000,
    drop_path_rate: float | None = None,
    mirror: MirrorConfig | None = None,
    attention: AttentionLayout = ("mirror",) * 4,
    pretrained: str | None = None,
) -> nn.Module:
    """Build a MirrorLA variant, or any peer that timm knows, by name.

    Args:
        name: "mirrorla_tiny" and the like, or a timm model name.
        num_classes: classes of the classifier.
        drop_path_rate: stochastic depth; None takes the variant's.
        mirror: mirrors of a MirrorLA variant; None is the default configuration.
        attention: kind of attention in each of the four stages of a MirrorLA variant.
        pretrained: a .safetensors or .pt file to start from; what does not fit is reported.

    Returns:
        images (B, 3, H, W) -> logits (B, num_classes).

    Raises:
        ValueError: an unknown name, mirror options for a peer, or a checkpoint of another variant.
        FileNotFoundError: no such checkpoint.
    """
    check_name(name, mirror, attention)
    if name in VARIANTS:
        model = timm.create_model(
            name, num_classes=num_classes, drop_path_rate=drop_path_rate, mirror=mirror, attention=tuple(attention)
        )
    else:
        model = timm.create_model(name, num_classes=num_classes, drop_path_rate=drop_path_rate)
    if pretrained is not None:
        load_pretrained(model, pretrained)
    return model


def check_name(name: str, mirror: MirrorConfig | None, attention: AttentionLayout) -> None:
    """Refuse a name that nobody knows, and options of mirrors for a network without them.

    Args:
        name: "mirrorla_tiny" and the like, or a timm model name.
        mirror: mirrors of a MirrorLA variant.
        attention: kind of attention in each of the four stages of a MirrorLA variant.

    Raises:
        ValueError: naming the nearest variant, or the options that must stay at their defaults.
    """
    if name in VARIANTS:
        return
    if not timm.is_model(name):
        raise ValueError(f"backbone {name!r} is unknown: {_nearest(name)}")
    if mirror not in (None, MirrorConfig()) or tuple(attention) != ("mirror",) * 4:
        raise ValueError(f"backbone {name!r} has no mirrors: leave mirror and attention at their defaults")


def _nearest(name: str) -> str:
    own = difflib.get_close_matches(name if name.startswith("mirrorla") else f"mirrorla_{name}", VARIANTS, 1, 0.85)
    near = own or difflib.get_close_matches(name, timm.list_models(), n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(VARIANTS)}, or a timm model name"


def _build(variant: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """timm's entry point; its registry prescribes the open keywords."""
    if options.get("features_only"):
        options["dense"] = True
    return build_model_with_cfg(
        MirrorPyramid,
        variant,
        pretrained,
        spec=VARIANTS[variant],
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
